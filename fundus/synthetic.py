"""Drawn fundus photographs with graded lesions: data for demos and tests without any download.

The idea: an eye is drawn as it is built. Vessel trees grow out of the optic disc on a map, lesions
are outlines placed on that map by grade, tissue and blood reflect and absorb per colour channel, a
camera adds light, haze, blur and noise. Only the lesions see the grade, and they have a random
stream of their own: one seed with two grades is one eye with other lesions, so that nothing else
can tell a benchmark the grade. Places on the map are complex numbers in disc diameters (DD): the
disc at 0, temporal to the right, up is up; headings are angles (radians) on it.
"""

import io
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from fundus.manifest import Manifest, Record, read_manifest, write_manifest
from fundus.photographs import crop_square, find_fundus
from fundus.splits import split_patients
from utils import log, sha256_of, write_json

TABLE = {  # fewest and most in grades 1-4 (exudates: clusters; beading: veins); then radius (DD),
    # its spread, least radius in pixels so that it is seen, roughness, stretch, soft edge (DD)
    "microaneurysm": (((2, 8), (6, 20), (10, 30), (8, 25)), (0.02, 0.2, 0.85, 0.04, 0.06, 0)),
    "haemorrhage": (((0, 0), (3, 15), (16, 40), (5, 28)), (0.055, 0.5, 1.5, 0.12, 0.25, 0.02)),
    "hard_exudate": (((0, 0), (0, 3), (0, 4), (0, 3)), (0.02, 0.5, 0.7, 0.2, 0.15, 0)),
    "cotton_wool_spot": (((0, 0), (0, 1), (2, 6), (0, 4)), (0.13, 0.2, 2, 0.1, 0.25, 0.05)),
    "venous_beading": (((0, 0), (0, 0), (1, 2), (0, 2)), (0.065, 0.15, 1, 0.04, 0.1, 0)),
    "new_vessel": (((0, 0), (0, 0), (0, 0), (1, 2)), (0, 0, 0, 0, 0, 0)),
    "preretinal_haemorrhage": (((0, 0), (0, 0), (0, 0), (0, 1)), (0, 0, 0, 0, 0, 0.01)),
}
LESIONS = tuple(TABLE)
SHARES = (0.493, 0.101, 0.273, 0.053, 0.080)  # of the grades 0 to 4 in APTOS 2019
# Albedo (red, green, blue) of tissue; optical density of pigment and blood, which swallows green.
RETINA, DISC, EXUDATE, COTTON = np.float32(
    ((0.56, 0.34, 0.22), (0.98, 0.72, 0.43), (1, 0.8, 0.4), (0.82, 0.63, 0.43))
)
PIGMENT, ARTERY, VEIN, CLOT = np.float32(
    ((0.9, 1.2, 1.2), (0.08, 0.5, 0.42), (0.32, 0.75, 0.55), (0.5, 1.2, 0.9))
)
# Trunks above the macula (those below mirror them): heading at the disc and far away (degrees),
# length over which it bends, length, width (DD). Arteries, then veins.
TRUNKS = np.array(
    (
        ((82, -4, 1.75, 7.0, 0.072), (128, 152, 1.0, 4.5, 0.056), (36, 2, 0.5, 2.1, 0.026)),
        ((98, -6, 1.95, 7.5, 0.100), (115, 135, 1.2, 4.5, 0.075), (52, -8, 0.6, 2.0, 0.030)),
    )
)
# Frame's width and diameter of the fundus, both over the frame's height.
CAMERAS = ((1.5, 1.22), (1.5, 1.2), (1.5, 0.95), (1.33, 0.96), (1.33, 1.14), (1, 0.97), (1.5, 1.02))
STEPS = 60  # points along a vessel


@dataclass(frozen=True)
class DrawnEye:
    """Everything that determines one photograph: grade on the ICDR scale (0-4), eye "left" or
    "right"; all of seed but its last number is the patient's (camera, pigmentation)."""

    patient: str
    eye: str
    grade: int
    seed: tuple[int, ...]


def plan_eyes(count: int, seed: int = 0) -> list[DrawnEye]:
    """`count` photographs of `count`/2 patients, both eyes adjacent (odd: the last has one eye).

    A longer plan starts with the shorter one. Grades follow APTOS 2019's shares; fellow eyes differ
    by one grade at most. Raises ValueError for a negative count or seed.
    """
    if count < 0 or seed < 0:
        raise ValueError(f"expected count and seed of 0 or more, got {count} and {seed}")
    plan: list[DrawnEye] = []
    for patient in range((count + 1) // 2):
        rng = _stream(0, (seed, patient))
        grade = int(rng.choice(5, p=SHARES))
        fellow = grade + int(rng.choice((-1, 1)))  # a Metropolis step leaves the shares as they are
        if not 0 <= fellow <= 4 or rng.random() > SHARES[fellow] / SHARES[grade]:
            fellow = grade
        plan += [
            DrawnEye(f"p{patient + 1:04d}", side, level, (seed, patient, index))
            for index, (side, level) in enumerate((("left", grade), ("right", fellow)))
        ]
    return plan[:count]


def draw_photograph(eye: DrawnEye, height: int = 384) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The camera's frame and its lesions: uint8 (H, W, 3) RGB with black surround, and for every
    name in LESIONS a bool (H, W) mask, all False where the lesion is absent.

    H is `height`, W follows the patient's camera (1 to 1.5 H). The same eye and height give the
    same bits in any process. Raises ValueError for an unknown eye or grade or a height under 64.
    """
    if eye.eye not in ("left", "right") or eye.grade not in range(5) or height < 64:
        raise ValueError(
            "expected eye left or right, grade 0 to 4, height of 64 or more, "
            f"got {eye.eye!r}, {eye.grade!r}, {height!r}"
        )
    view = _View(eye, height)
    trees = _vessels(_stream(1, eye.seed), view)
    shapes = _lesions(_stream(2, eye.seed), view, trees[1][0], eye.grade)
    layers = {name: _paint(view, shapes[name], TABLE[name][1][-1]) for name in LESIONS}
    masks = {name: (layers[name] > 0.3) & (view.aperture > 0.5) for name in LESIONS}
    layers["artery"], layers["vein"] = (_paint(view, _strips(*tree), 0) for tree in trees)
    patient, rng = _stream(3, eye.seed[:-1]), _stream(4, eye.seed)
    return _expose(rng, patient, view, _retina(rng, patient, view, layers)), masks


def _stream(use: int, seed: tuple[int, ...]) -> np.random.Generator:
    return np.random.default_rng((use, *seed, 1))  # numpy takes (1,) and (1, 0) for the same seed


class _View:
    # Where the camera looks. Planes (H, W): place on the map z, distance r from the centre.
    def __init__(self, eye: DrawnEye, height: int):
        camera, rng = _stream(5, eye.seed[:-1]), _stream(6, eye.seed)
        aspect, fill = CAMERAS[camera.integers(len(CAMERAS))]
        self.shape = (height, round(height * aspect))
        self.over = 3 if height <= 512 else 2  # outlines are drawn so much finer
        self.radius = height * fill * camera.uniform(0.97, 1.03) / 2
        self.dd, self.side = self.radius / camera.uniform(3.2, 4.1), 1 if eye.eye == "left" else -1
        self.fovea = complex(rng.uniform(2.35, 2.75), -rng.uniform(0, 0.5))
        self.gaze = self.fovea * float(rng.choice((1, 0.7, 0.7, 0.4)))
        self.gaze += complex(*rng.normal(0, 0.15, 2))
        self.centre = np.array(self.shape[::-1]) / 2 + rng.normal(0, 0.008, 2) * height
        y, x = np.indices(self.shape, np.float32) + np.float32(0.5)
        x, y = x - float(self.centre[0]), y - float(self.centre[1])
        self.z = (x * self.side - 1j * y) / self.dd + self.gaze
        self.r = np.hypot(x, y) / self.radius  # 1 at the rim of the fundus
        out, across = (0.73 * x - 0.68 * y) / self.radius, (0.68 * x + 0.73 * y) / self.radius
        notch = (out > 0.9) & (out < 1.04) & (np.abs(across) < 0.04) & (camera.random() < 0.5)
        edge = np.where(notch, np.float32(0.9), self.r)  # the notch tells which way is up
        self.aperture = np.clip((1 - edge) * self.radius / camera.uniform(1, 3) + 0.5, 0, 1)

    def pixels(self, z: np.ndarray) -> np.ndarray:
        away = (z - self.gaze) * self.dd
        return np.stack((away.real * self.side, -away.imag), -1) + self.centre

    def place(self, rng, count: int, centres, spread: float) -> np.ndarray:
        # Up to `count` places about the centres in turn, on retina that the photograph shows.
        z = np.resize(centres, 60 * count) + rng.normal(0, spread, (60 * count, 2)) @ (1, 1j)
        at, margin = self.pixels(z), 0.25 * self.dd
        seen = np.minimum(at, self.shape[::-1] - at).min(1) > margin
        seen &= np.abs(z - self.gaze) < 0.97 * self.radius / self.dd - 0.25
        return z[seen & (np.abs(z) > 0.85) & (np.abs(z - self.fovea) > 0.15)][:count]


def _vessels(rng, view: _View) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    # Arteries, veins: places, headings and widths (N, STEPS) of each.
    trees = []
    for rows in np.tile(TRUNKS, (1, 2, 1)):
        up, jitter = np.repeat((1, -1), 3), rng.normal(0, 1, (6, 6))
        first, last = np.radians(rows[:, :2].T + jitter[:2] * ((9,), (7,))) * up
        bend, length, width = rows[:, 2:].T * np.exp(0.12 * jitter[2:5])
        root = 0.03 * jitter[5] - 0.1 + 0.02j * up
        trunks = _grow(rng, view, root, first, last, bend, length, width)
        branches = _branch(rng, view, trunks, 9, 1.4)
        parts = trunks, branches, _branch(rng, view, branches, 4, 1.4)
        trees.append(tuple(np.concatenate(part) for part in zip(*parts, strict=True)))
    return trees


def _branch(rng, view: _View, parents, children: int, curl: float):
    # The next generation, leaving left and right by turns; returns what `_grow` does.
    size, order = (len(parents[0]), children), np.arange(children)
    at = ((order + rng.uniform(0.2, 1.2, size)) * (STEPS - 6) / (children + 0.3)).astype(int)
    root, heading, width = (np.take_along_axis(part, at, 1) for part in parents)
    side = 1 - 2 * ((order + rng.integers(0, 2, (size[0], 1))) % 2)
    first, last = (heading + side * rng.uniform(*turn, size) for turn in ((0.4, 1), (0, curl)))
    width = width * rng.uniform(0.3, 0.8, size)
    length = rng.uniform(0.9, 2.2, size) * (width / 0.03) ** 0.7
    keep = (width > 0.008) & ((np.abs(root) > rng.uniform(0.5, 1.5, size)) | (curl > 3))
    shoots = root, first, last, rng.uniform(0.3, 1.2, size), length, width
    return _grow(rng, view, *(part[keep] for part in shoots))


def _grow(rng, view: _View, *shoots) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    # Vessels from their root, heading, last heading, bend, length and width, all (N,).
    z, first, last, bend, length, width = (np.asarray(part)[:, None] for part in shoots)
    s = (t := np.linspace(0, 1, STEPS)) * length
    heading = last + (first - last) * np.exp(-((s / bend) ** 1.5))
    for wave, size in ((2.4, 0.16), (1.0, 0.2), (0.45, 0.24)):  # thin vessels wind more
        swing = size * rng.normal(0, 1, z.shape) * np.clip(0.05 / width, 0.5, 1.3) ** 0.7
        phase = rng.uniform(0, 6.28, z.shape)
        heading = heading + swing * (np.sin(s * 6.28 / wave + phase) - np.sin(phase) * np.exp(-s))
    z = z + np.cumsum(np.exp(1j * heading), 1) * length / STEPS
    near = np.abs(z - view.fovea) < 0.3  # no vessels in the fovea
    left = np.where(near.any(1), near.argmax(1), STEPS)[:, None] - np.arange(STEPS)
    return z, heading, width * (1 - 0.6 * t) * np.clip(left / 10, 0, 1)


def _strips(z, heading, width) -> list[tuple[np.ndarray, float]]:
    # Outlines of vessels and their strength, thin ones first so that trunks lie on top of them.
    strips, across = [], 0.5j * np.exp(1j * heading) * width
    for i in np.argsort(width[:, 0], kind="stable"):
        strength = min(1, 0.25 + 12 * width[i, 0])
        for part in (1, 0.3)[: 1 + (width[i, 0] > 0.045)]:  # the inner one is the wall's glint
            sides = z[i] + part * across[i], (z[i] - part * across[i])[::-1]
            strips.append((np.concatenate(sides), strength * (0.57 + 0.43 * part)))
    return strips


def _blobs(rng, view: _View, z, name: str) -> list[tuple[np.ndarray, float]]:
    # Irregular round outlines about the places, some longer than wide, and their strength.
    radius, spread, least, rough, stretch, _ = TABLE[name][1]
    n, t = (len(z), 1), np.linspace(0, 2 * np.pi, 30, endpoint=False)
    r = np.clip(radius * np.exp(rng.normal(0, spread, n)), least / view.dd, 0.17)
    for k in (2, 3, 4, 5):
        r = r * np.exp(rng.normal(0, rough, n) * np.cos(k * t + rng.uniform(0, 6.28, n)))
    longer, turn = np.exp(stretch * np.abs(rng.normal(0, 1, n))), rng.uniform(0, np.pi, n)
    around = r * (np.cos(t) * longer + 1j * np.sin(t) / longer) * np.exp(1j * turn)
    return list(zip(z[:, None] + around, rng.uniform(0.65, 1, len(z)), strict=True))


def _paint(view: _View, shapes, soft: float) -> np.ndarray:
    # Coverage 0-1 by the outlines times their strength, (H, W), drawn fine and averaged down.
    if not shapes:
        return np.zeros(view.shape, np.float32)
    sheet = Image.new("L", (view.shape[1] * view.over, view.shape[0] * view.over))
    draw = ImageDraw.Draw(sheet)
    for outline, strength in shapes:
        corners = (view.pixels(outline) * view.over).round().ravel().tolist()
        draw.polygon(corners, int(255 * strength))
    sheet = sheet.reduce(view.over).filter(ImageFilter.GaussianBlur(soft * view.dd))
    return np.asarray(sheet, np.float32) / 255


def _lesions(rng, view: _View, veins, grade: int) -> dict[str, list[tuple[np.ndarray, float]]]:
    # Outlines by lesion name. Counts lean to the low end, so that grades overlap as in life.
    bounds = {name: ((0, 0), *TABLE[name][0])[grade] for name in LESIONS}
    count = {
        name: int(low + (high - low + 1) * rng.beta(1.2, 1.6))
        for name, (low, high) in bounds.items()
    }
    quarters = rng.permutation((1 + 1j, 1 - 1j, -1 + 1j, -1 - 1j)) * 1.15 + 0.8 * view.fovea
    arcades = np.array((2.2 + 1.8j, 0.9 + 1.4j, -0.8 + 0.9j))
    arcades = rng.permutation((*arcades, *arcades.conj()))
    shapes: dict[str, list[tuple[np.ndarray, float]]] = {name: [] for name in LESIONS}
    scattered = {
        "microaneurysm": (view.fovea, 1.1),
        "haemorrhage": (quarters, 0.7),
        "cotton_wool_spot": (arcades, 0.25),
    }
    for name, (centres, spread) in scattered.items():
        shapes[name] = _blobs(rng, view, view.place(rng, count[name], centres, spread), name)
    for centre in view.place(rng, count["hard_exudate"], view.fovea, 0.8):  # specks in an arc
        turn = rng.uniform(0, 6.28) + rng.uniform(0, rng.uniform(2, 6.28), rng.integers(5, 22))
        arc = centre + rng.uniform(0.1, 0.4) * np.exp(1j * turn)
        specks = view.place(rng, len(turn), arc, 0.06)
        shapes["hard_exudate"] += _blobs(rng, view, specks, "hard_exudate")
    for trunk in rng.permutation((0, 3))[: count["venous_beading"]]:
        beads = veins[trunk, (start := rng.integers(8, 18)) : start + 14 : 2]
        shapes["venous_beading"] += _blobs(rng, view, beads, "venous_beading")
    for _ in range(count["new_vessel"]):  # a frond on the disc or an arcade, curling
        root = view.place(rng, int(rng.random() > 0.6), arcades, 0.2).sum()
        first = rng.uniform(0, 6.28) + rng.uniform(-1.5, 1.5, 11)
        last, length = first + rng.normal(0, 2, 11), rng.uniform(0.4, 1.1, 11)
        stems = _grow(rng, view, *np.broadcast_arrays(root, first, last, 0.3, length, 0.042))
        shapes["new_vessel"] += _strips(*stems) + _strips(*_branch(rng, view, stems, 5, 5))
    t = np.linspace(0, np.pi, 24)  # blood settles in the shape of a boat, level at the top
    boat = rng.uniform(0.25, 0.7) * (np.cos(t) - 1j * np.sin(t) * rng.uniform(0.4, 0.8))
    spots = view.place(rng, count["preretinal_haemorrhage"], (2.2 + 1.6j, 2.2 - 1.6j), 0.3)
    return shapes | {"preretinal_haemorrhage": [(spot + boat, 1.0) for spot in spots]}


def _smooth(rng, view: _View, *octaves: tuple[float, float]) -> np.ndarray:
    # Smooth noise (H, W): cells per DD and weight of each octave, coarse to fine.
    noise = Image.new("F", (1, 1))
    for cells, weight in octaves:
        size = [max(3, round(n / view.dd * cells)) for n in view.shape]
        coarse = np.asarray(noise.resize(size[::-1], Image.Resampling.BICUBIC))
        fine = rng.standard_normal(size, dtype=np.float32) * np.float32(weight)
        noise = Image.fromarray(coarse + fine)
    return np.asarray(noise.resize(view.shape[::-1], Image.Resampling.BICUBIC))


def _retina(rng, patient, view: _View, layers) -> list[np.ndarray]:
    # What the eye reflects, a plane (H, W) per channel.
    u, d, f = view.z.real, np.abs(view.z), np.abs(view.z - view.fovea)
    pigment = patient.uniform(0, 0.3) + _smooth(
        rng, view, (0.6, 0.06), (2.5, 0.04), (8, 0.03), (16, 0.025)
    )
    ridges = np.exp(-((_smooth(rng, view, (2.2, 1), (5, 0.4)) / 0.4) ** 2))
    pigment -= 0.13 * patient.uniform() ** 2 * ridges * np.clip(f - 0.8, 0, 1.2)  # choroid
    pigment += patient.uniform(0.15, 0.4) * np.exp(-((f / 0.6) ** 2))  # macula
    pigment += patient.uniform(0.1, 0.4) * np.exp(-((f / 0.22) ** 2))  # fovea
    pigment -= patient.uniform(0, 0.45) * np.exp(-((d / 1.4) ** 2))  # nerve fibres' sheen
    size, cup = patient.uniform(0.47, 0.54), patient.uniform(0.15, 0.35)
    cup = 0.84 + 0.3 * np.exp(-((np.abs(view.z - 0.06) / cup) ** 2))
    halo = patient.uniform(0, 0.3) * np.exp(-(((d - size) / 0.1) ** 2)) * (u > 0)
    disc = np.maximum(np.clip((size - d) / 0.08 + 0.5, 0, 1), halo)
    pale = 0.85 + 0.15 * np.tanh(u * 3)  # the temporal side of the disc is paler
    clot = 0.9 * layers["microaneurysm"] + layers["haemorrhage"]
    vein = np.maximum(layers["vein"], layers["venous_beading"])
    artery = np.maximum(layers["artery"], 1.8 * layers["new_vessel"])
    planes = []
    for c in range(3):
        plane = RETINA[c] * np.exp(-PIGMENT[c] * pigment)
        plane += (DISC[c] * cup * (1, pale, pale)[c] - plane) * disc
        plane += (COTTON[c] - plane) * 0.85 * layers["cotton_wool_spot"]
        plane *= np.exp(-ARTERY[c] * artery - VEIN[c] * vein - CLOT[c] * clot)
        plane += (EXUDATE[c] - plane) * 0.85 * layers["hard_exudate"]
        pool = RETINA[c] * np.exp(-1.5 * CLOT[c])
        planes.append(plane + (pool - plane) * 0.93 * layers["preretinal_haemorrhage"])
    return planes


def _expose(rng, patient, view: _View, planes) -> np.ndarray:
    # Light, lens and sensor: uint8 (H, W, 3). Exposure and colour spread as in EyePACS.
    red = float(np.clip(np.exp(patient.normal(-0.62, 0.36)), 0.2, 0.95))
    green = float(np.clip(patient.normal(0.66, 0.11), 0.42, 0.88))
    blue = float(np.clip(patient.normal(0.1 + 0.9 * green, 0.17), 0.12, 0.85))
    away = (view.z - view.gaze) * complex(np.exp(1j * rng.uniform(0, 6.28)))
    away *= view.dd / view.radius
    light = 1.3 - rng.uniform(0.15, 0.7) * view.r**2 + rng.uniform(0, 0.4) * away.real
    light = np.clip(light, 0.15, 2)
    veil = (1 + _smooth(rng, view, (0.25, 0.4))) * float(rng.choice((0.02, 0.02, 0.1, 0.25)))
    veil += patient.uniform(0, 0.5) * np.exp(np.minimum(view.r - 1, 0) / 0.03)  # the lens's edge
    crescent = np.clip(view.r - 0.7, 0, 0.5) * np.clip(away.imag, 0, 1)
    veil += max(0.0, rng.uniform(-1.5, 1.5)) * crescent  # light scattered by the iris
    ghost = np.abs(view.z - view.gaze - complex(*rng.normal(0, 0.8, 2))) / rng.uniform(0.15, 0.45)
    veil += max(0.0, rng.uniform(-0.6, 0.3)) * np.exp(-(ghost**2))  # a reflection in the lens
    veil = np.clip(veil, 0, 0.9)
    tint = np.array((0.6, 0.71, 0.15 + 0.66 * blue)) * (0.45 + 0.8 * red)
    frame = np.empty((*view.shape, 3), np.float32)
    for c, share in enumerate((1, green, green * blue)):
        plane = planes[c] * light * (red * share / float(RETINA[c]) * 1.15)
        plane += (float(tint[c]) - plane) * veil
        square = plane * plane  # bright parts saturate as on film
        frame[..., c] = plane / np.sqrt(np.sqrt(1 + square * square)) * view.aperture
    image = Image.fromarray((np.clip(frame, 0, 1) * 255).astype(np.uint8))
    image = image.filter(ImageFilter.GaussianBlur(view.dd * (0.006 + patient.exponential(0.006))))
    grain = rng.standard_normal(view.shape, dtype=np.float32) * patient.uniform(0.5, 3)
    grain *= 0.25 + 0.75 * view.aperture
    image = Image.fromarray(np.clip(np.asarray(image) + grain[..., None], 0, 255).astype(np.uint8))
    image.save(file := io.BytesIO(), "JPEG", quality=int(patient.integers(70, 96)))
    return np.array(Image.open(file))


SYNTHETIC_SIZE = 256  # side of the drawn ones
SYNTHETIC_COUNT = 1000
SYNTHETIC_VERSION = 3  # of the drawn folder: part of the cache's name


def synthetic_manifest(count: int) -> Manifest:
    """Return the cached folder of `count` drawn photographs; draws it if it is not there yet."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ssrl"
    folder = cache / f"synthetic-{count}-{SYNTHETIC_SIZE}-v{SYNTHETIC_VERSION}"
    if not (folder / "manifest.csv").is_file():
        draw_folder(folder, count)
    return read_manifest(folder)


def draw_folder(folder: Path, count: int, seed: int = 0) -> None:
    """Draw `count` photographs with their lesion masks as a prepared folder, on all cores.

    `folder` receives images/*.jpg, masks/<image>_<lesion>.png (255 inside, only where there is such
    a lesion) and manifest.csv, the manifest last: a folder that has it is complete.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "masks").mkdir(exist_ok=True)
    eyes = plan_eyes(count, seed)
    records = [
        Record(f"images/{e.patient}_{e.eye}.jpg", e.grade, e.patient, e.eye, "train", "synthetic")
        for e in eyes
    ]
    log.info("drawing %d synthetic photographs into %s", count, folder)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        drawn = pool.map(partial(_draw_eye, folder), eyes, chunksize=8)
        digests = list(tqdm(drawn, total=count, desc="draw", disable=None))
    records = [replace(r, sha256=digest) for r, digest in zip(records, digests, strict=True)]
    write_json(folder / "data_report.json", {"layout": "synthetic", "size": SYNTHETIC_SIZE})
    write_manifest(folder, split_patients(records))


def _draw_eye(folder: Path, eye: DrawnEye) -> str:
    """Draw a photograph and its masks in the prepared form; returns the photograph's SHA-256."""
    frame, masks = draw_photograph(eye, height=SYNTHETIC_SIZE * 9 // 8)
    box, name = find_fundus(frame), f"{eye.patient}_{eye.eye}"
    picture = Image.fromarray(crop_square(frame, box, SYNTHETIC_SIZE))
    picture.save(folder / "images" / f"{name}.jpg", quality=95, subsampling=0)
    for lesion, mask in masks.items():
        if mask.any():
            whole = mask.astype(np.uint8) * 255
            share = crop_square(whole, box, SYNTHETIC_SIZE, Image.Resampling.BOX)
            inside = (share > 0).astype(np.uint8) * 255  # lesions of one pixel survive
            Image.fromarray(inside).save(folder / "masks" / f"{name}_{lesion}.png")
    return sha256_of(folder / "images" / f"{name}.jpg")
