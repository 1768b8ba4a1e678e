"""Drawn fundus photographs with graded lesions: data for demos and tests without any download.

An eye is drawn as it is built. Vessel trees grow out of the optic disc on a map, lesions are
outlines that the grade places on that map (eye_map.py), tissue and blood reflect and absorb each
colour, a camera is aimed at it (camera.py) and adds light, haze, blur and noise. Only the lesions
depend on the grade, and they have random numbers of their own: one seed with two grades is one eye
with other lesions, so that nothing else can tell a benchmark the grade. The order in which random
numbers are taken is part of every drawing.

    python -m fundus.synthetic OUT --count 20

writes frames as a camera gives them, uncropped, into OUT/images, and masks of their lesions, of the
same size, into OUT/masks/<lesion>.

Shapes: H and W are the height and width of the camera's frame. DD are diameters of the optic disc.
"""

import argparse
import io
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from fundus.camera import Camera
from fundus.eye_map import (
    ARTERIES,
    LESION_KINDS,
    VEINS,
    WHOLE_TURN,
    Outline,
    grow_tree,
    outline_lesions,
    outline_vessels,
)
from fundus.manifest import GRADES, Manifest, Record, read_manifest, write_manifest
from fundus.photographs import crop_square, find_fundus
from fundus.splits import split_patients
from utils import InputError, log, sha256_of, write_json

SYNTHETIC_COUNT = 1000  # photographs, unless somebody says how many
SYNTHETIC_MAX = 1_000_000  # some 24 GB of files, and 17 hours of drawing on two cores
SYNTHETIC_SIZE = 256  # side of a photograph in pixels, unless somebody says which
SYNTHETIC_SIZES = (64, 2048)  # the least and the largest

# Part of the cache's name. Raise it with every change of the drawing, so that none is mixed up.
SYNTHETIC_VERSION = 3

# How frequent the grades 0 to 4 are in APTOS 2019.
GRADE_SHARES = (0.493, 0.101, 0.273, 0.053, 0.080)

# Albedo of tissue in red, green and blue: the share of the light that it throws back.
RETINA = np.float32((0.56, 0.34, 0.22))
DISC = np.float32((0.98, 0.72, 0.43))
EXUDATE = np.float32((1, 0.8, 0.4))
COTTON_WOOL = np.float32((0.82, 0.63, 0.43))

# Optical density of what lies before the tissue. Blood swallows green above all.
PIGMENT = np.float32((0.9, 1.2, 1.2))
ARTERY = np.float32((0.08, 0.5, 0.42))
VEIN = np.float32((0.32, 0.75, 0.55))
CLOT = np.float32((0.5, 1.2, 0.9))

# How much deposits and pools of blood hide of what is behind them.
DEPOSIT_OPACITY = 0.85
POOL_OPACITY = 0.93


class Stream(IntEnum):
    """What random numbers are for. Each use has a sequence of its own, which no other can shift."""

    PLAN = 0
    VESSELS = 1
    LESIONS = 2
    PATIENT = 3  # pigmentation, colours and lens, which the patient's two eyes share
    PHOTOGRAPH = 4
    CAMERA = 5  # shared by the two eyes, too
    AIM = 6


@dataclass(frozen=True)
class DrawnEye:
    """All that determines one photograph."""

    patient: str
    eye: str  # "left" or "right"
    grade: int  # 0 to 4 on the ICDR scale
    seed: tuple[int, ...]  # all but the last number are the patient's

    @property
    def name(self) -> str:
        """Stem of the names of its files."""
        return f"{self.patient}_{self.eye}"

    @property
    def patient_seed(self) -> tuple[int, ...]:
        """Seed of what the patient's two photographs share."""
        return self.seed[:-1]


def plan_eyes(count: int, seed: int = 0) -> list[DrawnEye]:
    """Return `count` eyes of `count` / 2 patients, left and right in turn; the last may have one.

    A longer plan starts with the shorter one. Grades follow APTOS 2019's shares; fellow eyes differ
    by one grade at most. Raises ValueError for a negative count or seed.
    """
    if count < 0 or seed < 0:
        raise ValueError(f"expected count and seed of 0 or more, got {count} and {seed}")

    plan: list[DrawnEye] = []
    for patient in range((count + 1) // 2):
        rng = _stream(Stream.PLAN, (seed, patient))
        grade = int(rng.choice(GRADES, p=GRADE_SHARES))

        # The fellow eye is a Metropolis step away, which leaves the shares as they are.
        fellow = grade + int(rng.choice((-1, 1)))
        is_grade = 0 <= fellow < GRADES
        if not is_grade or rng.random() > GRADE_SHARES[fellow] / GRADE_SHARES[grade]:
            fellow = grade

        name = f"p{patient + 1:04d}"
        plan.append(DrawnEye(name, "left", grade, (seed, patient, 0)))
        plan.append(DrawnEye(name, "right", fellow, (seed, patient, 1)))
    return plan[:count]


def draw_photograph(eye: DrawnEye, height: int = 384) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the camera's frame and the masks of its lesions.

    The frame is uint8 RGB (H, W, 3) with a black surround. Each name in eye_map.LESIONS has a mask,
    bool (H, W), all False where there is no such lesion. H is `height`, W is 1 to 1.5 H, as the
    patient's camera has it. The same eye and height give the same bits in any process. Raises
    ValueError for an unknown eye or grade and for a height under 64.
    """
    if eye.eye not in ("left", "right") or eye.grade not in range(GRADES) or height < 64:
        raise ValueError(
            f"expected eye left or right, grade 0 to {GRADES - 1}, height of 64 or more, "
            f"got {eye.eye!r}, {eye.grade!r}, {height!r}"
        )

    camera = _aim_camera(eye, height)
    vessel_rng = _stream(Stream.VESSELS, eye.seed)
    arteries = grow_tree(vessel_rng, camera, ARTERIES)
    veins = grow_tree(vessel_rng, camera, VEINS)
    lesion_rng = _stream(Stream.LESIONS, eye.seed)
    outlines = outline_lesions(lesion_rng, camera, veins, eye.grade)

    layers = {}
    masks = {}
    for name, kind in LESION_KINDS.items():
        layers[name] = _paint(camera, outlines[name], soft_edge=kind.soft_edge)
        # A pixel that a lesion's soft edge barely touches does not belong to it.
        masks[name] = (layers[name] > 0.3) & (camera.aperture > 0.5)
    layers["artery"] = _paint(camera, outline_vessels(arteries))
    layers["vein"] = _paint(camera, outline_vessels(veins))

    patient_rng = _stream(Stream.PATIENT, eye.patient_seed)
    rng = _stream(Stream.PHOTOGRAPH, eye.seed)
    planes = _reflect(rng, patient_rng, camera, layers)
    return _expose(rng, patient_rng, camera, planes), masks


def _aim_camera(eye: DrawnEye, height: int) -> Camera:
    """Return the patient's camera, aimed at this eye."""
    camera_rng = _stream(Stream.CAMERA, eye.patient_seed)
    aim_rng = _stream(Stream.AIM, eye.seed)
    return Camera(camera_rng, aim_rng, height, is_left=eye.eye == "left")


def _stream(use: Stream, seed: tuple[int, ...]) -> Generator:
    """Return the random numbers of one use, from their start."""
    # The 1 at the end, because numpy takes (1,) and (1, 0) for the same seed.
    return np.random.default_rng((int(use), *seed, 1))


def _paint(camera: Camera, outlines: list[Outline], *, soft_edge: float = 0.0) -> np.ndarray:
    """Return how strongly the outlines cover each pixel: float32 (H, W), 0 to 1.

    `soft_edge` is the sigma of a blur in DD.
    """
    if not outlines:
        return np.zeros(camera.shape, np.float32)

    # Pillow's polygons have hard edges, so they are drawn larger and averaged down.
    height, width = camera.shape
    oversampling = 3
    if height > 512:
        oversampling = 2
    sheet = Image.new("L", (width * oversampling, height * oversampling))
    draw = ImageDraw.Draw(sheet)
    for outline in outlines:
        pixels = camera.to_pixels(outline.corners) * oversampling
        draw.polygon(pixels.round().ravel().tolist(), int(255 * outline.strength))
    sheet = sheet.reduce(oversampling)
    sheet = sheet.filter(ImageFilter.GaussianBlur(soft_edge * camera.disc_diameter))
    return np.asarray(sheet, np.float32) / 255


# ----------------------------------------------------------------------------------------- tissue


def _reflect(
    rng: Generator, patient_rng: Generator, camera: Camera, layers: dict[str, np.ndarray]
) -> list[np.ndarray]:
    """Return the share of the light that the eye throws back: red, green and blue, each (H, W)."""
    pigment = _pigment(rng, patient_rng, camera)
    disc, cup, pallor = _optic_disc(patient_rng, camera)

    # New vessels are thin; they would not be seen without more blood than arteries of their width.
    artery = np.maximum(layers["artery"], 1.8 * layers["new_vessel"])
    vein = np.maximum(layers["vein"], layers["venous_beading"])
    clot = 0.9 * layers["microaneurysm"] + layers["haemorrhage"]

    # From the back of the eye to its front: `plane += (tissue - plane) * share` covers what is
    # behind with tissue, `plane *= exp(-density)` lets light pass through blood.
    planes = []
    for channel in range(3):
        plane = RETINA[channel] * np.exp(-PIGMENT[channel] * pigment)
        disc_tissue = DISC[channel] * cup
        if channel > 0:
            disc_tissue = disc_tissue * pallor
        plane += (disc_tissue - plane) * disc
        plane += (COTTON_WOOL[channel] - plane) * DEPOSIT_OPACITY * layers["cotton_wool_spot"]
        plane *= np.exp(-ARTERY[channel] * artery - VEIN[channel] * vein - CLOT[channel] * clot)
        plane += (EXUDATE[channel] - plane) * DEPOSIT_OPACITY * layers["hard_exudate"]
        pool = RETINA[channel] * np.exp(-1.5 * CLOT[channel])
        plane = plane + (pool - plane) * POOL_OPACITY * layers["preretinal_haemorrhage"]
        planes.append(plane)
    return planes


def _pigment(rng: Generator, patient_rng: Generator, camera: Camera) -> np.ndarray:
    """Return how much pigment covers the retina, (H, W); below 0 it is paler than RETINA."""
    from_disc = np.abs(camera.places)
    from_fovea = np.abs(camera.places - camera.fovea)

    # A patient's pigmentation is blotched, from coarse to fine.
    blotches = _smooth_noise(rng, camera, (0.6, 0.06), (2.5, 0.04), (8, 0.03), (16, 0.025))
    pigment = patient_rng.uniform(0, 0.3) + blotches

    # On some eyes vessels of the choroid shine through, except at the macula.
    ridges = np.exp(-((_smooth_noise(rng, camera, (2.2, 1), (5, 0.4)) / 0.4) ** 2))
    pigment -= 0.13 * patient_rng.uniform() ** 2 * ridges * np.clip(from_fovea - 0.8, 0, 1.2)

    # The macula is dark, its fovea darker still; about the disc nerve fibres have a sheen.
    pigment += patient_rng.uniform(0.15, 0.4) * np.exp(-((from_fovea / 0.6) ** 2))
    pigment += patient_rng.uniform(0.1, 0.4) * np.exp(-((from_fovea / 0.22) ** 2))
    pigment -= patient_rng.uniform(0, 0.45) * np.exp(-((from_disc / 1.4) ** 2))
    return pigment


def _optic_disc(
    patient_rng: Generator, camera: Camera
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return where the optic disc is (0 to 1), its brightness and its pallor, each (H, W)."""
    temporal = camera.places.real
    from_centre = np.abs(camera.places)
    radius = patient_rng.uniform(0.47, 0.54)

    # The cup in its middle is brighter.
    cup_radius = patient_rng.uniform(0.15, 0.35)
    brightness = 0.84 + 0.3 * np.exp(-((np.abs(camera.places - 0.06) / cup_radius) ** 2))

    # Many discs have a pale crescent along their temporal rim.
    crescent = patient_rng.uniform(0, 0.3) * np.exp(-(((from_centre - radius) / 0.1) ** 2))
    crescent = crescent * (temporal > 0)
    share = np.maximum(np.clip((radius - from_centre) / 0.08 + 0.5, 0, 1), crescent)

    # Towards the nose the disc is redder: pallor is of green and blue.
    pallor = 0.85 + 0.15 * np.tanh(temporal * 3)
    return share, brightness, pallor


def _smooth_noise(rng: Generator, camera: Camera, *octaves: tuple[float, float]) -> np.ndarray:
    """Return smooth noise, float32 (H, W): a sum of octaves, each (cells per DD, weight)."""
    # From coarse to fine: what there is so far is enlarged, and finer noise is added to it.
    noise = Image.new("F", (1, 1))
    for cells, weight in octaves:
        size = [max(3, round(side / camera.disc_diameter * cells)) for side in camera.shape]
        coarser = np.asarray(noise.resize(size[::-1], Image.Resampling.BICUBIC))
        finer = rng.standard_normal(size, dtype=np.float32) * np.float32(weight)
        noise = Image.fromarray(coarser + finer)
    return np.asarray(noise.resize(camera.shape[::-1], Image.Resampling.BICUBIC))


# --------------------------------------------------------------------------------------- exposure


def _expose(
    rng: Generator, patient_rng: Generator, camera: Camera, planes: list[np.ndarray]
) -> np.ndarray:
    """Return the photograph of what the eye throws back: uint8 (H, W, 3)."""
    # How bright plain retina comes out. The spread is that of EyePACS; green is drawn relative to
    # red, and blue relative to green.
    red = float(np.clip(np.exp(patient_rng.normal(-0.62, 0.36)), 0.2, 0.95))
    green = float(np.clip(patient_rng.normal(0.66, 0.11), 0.42, 0.88))
    blue = float(np.clip(patient_rng.normal(0.1 + 0.9 * green, 0.17), 0.12, 0.85))
    exposure = (red, red * green, red * (green * blue))

    # Light is brightest in the middle and towards a random side.
    direction = complex(np.exp(1j * rng.uniform(0, WHOLE_TURN)))
    offset = (camera.places - camera.gaze) * direction
    offset *= camera.disc_diameter / camera.radius  # of length 1 at the rim
    fall_off = rng.uniform(0.15, 0.7)
    slope = rng.uniform(0, 0.4)
    light = 1.3 - fall_off * camera.eccentricity**2 + slope * offset.real
    light = np.clip(light, 0.15, 2)

    # Stray light is paler than the retina, and brighter where the exposure is longer.
    veil = _veil(rng, patient_rng, camera, offset)
    veil_colour = np.array((0.6, 0.71, 0.15 + 0.66 * blue)) * (0.45 + 0.8 * red)

    frame = np.empty((*camera.shape, 3), np.float32)
    for channel in range(3):
        plane = planes[channel] * light * (exposure[channel] / float(RETINA[channel]) * 1.15)
        plane += (float(veil_colour[channel]) - plane) * veil
        # Bright parts saturate gently, as on film: x / (1 + x^4)^(1/4).
        square = plane * plane
        frame[..., channel] = plane / np.sqrt(np.sqrt(1 + square * square)) * camera.aperture
    return _develop(rng, patient_rng, camera, frame)


def _veil(rng: Generator, patient_rng: Generator, camera: Camera, offset: np.ndarray) -> np.ndarray:
    """Return the share of stray light in each pixel, (H, W), 0 to 0.9.

    `offset` is each pixel's from the middle of the fundus, complex (H, W): along the light and
    across it, of length 1 at the rim.
    """
    # Half of the eyes are clear, the others have a cloudy lens.
    clouds = 1 + _smooth_noise(rng, camera, (0.25, 0.4))
    veil = clouds * float(rng.choice((0.02, 0.02, 0.1, 0.25)))

    # Light from the edge of the camera's lens lies along the rim, on some photographs with a
    # crescent of light that the iris scatters.
    veil += patient_rng.uniform(0, 0.5) * np.exp(np.minimum(camera.eccentricity - 1, 0) / 0.03)
    crescent = np.clip(camera.eccentricity - 0.7, 0, 0.5) * np.clip(offset.imag, 0, 1)
    veil += max(0.0, rng.uniform(-1.5, 1.5)) * crescent

    # One photograph in three has a round reflection.
    centre = complex(*rng.normal(0, 0.8, 2))
    distance = np.abs(camera.places - camera.gaze - centre) / rng.uniform(0.15, 0.45)
    veil += max(0.0, rng.uniform(-0.6, 0.3)) * np.exp(-(distance**2))
    return np.clip(veil, 0, 0.9)


def _develop(
    rng: Generator, patient_rng: Generator, camera: Camera, frame: np.ndarray
) -> np.ndarray:
    """Return a frame (H, W, 3) of 0 to 1 as lens, sensor and JPEG leave it: uint8."""
    image = Image.fromarray((np.clip(frame, 0, 1) * 255).astype(np.uint8))
    blur = camera.disc_diameter * (0.006 + patient_rng.exponential(0.006))
    image = image.filter(ImageFilter.GaussianBlur(blur))

    # One grain for all colours; the black surround has a quarter of it.
    grain = rng.standard_normal(camera.shape, dtype=np.float32) * patient_rng.uniform(0.5, 3)
    grain *= 0.25 + 0.75 * camera.aperture
    noisy = np.clip(np.asarray(image) + grain[..., None], 0, 255).astype(np.uint8)

    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=int(patient_rng.integers(70, 96)))
    return np.array(Image.open(file))


# ----------------------------------------------------------------------------------------- folder


def synthetic_manifest(count: int, size: int = SYNTHETIC_SIZE) -> Manifest:
    """Return the cached folder of `count` drawn photographs; draw it if it is not there yet.

    `size` is their side in pixels. Raises InputError for a count above SYNTHETIC_MAX.
    """
    if count > SYNTHETIC_MAX:
        raise InputError(
            f"--data synthetic:{count}: expected {SYNTHETIC_MAX:,} photographs or fewer"
        )

    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ssrl"
    folder = cache / f"synthetic-{count}-{size}-v{SYNTHETIC_VERSION}"
    if not (folder / "manifest.csv").is_file():
        draw_folder(folder, count, size=size)
    return read_manifest(folder)


def draw_folder(folder: Path, count: int, seed: int = 0, *, size: int = SYNTHETIC_SIZE) -> None:
    """Draw `count` photographs with their lesion masks as a prepared folder, on all cores.

    `size` is the side of the photographs in pixels.

    `folder` receives images/*.jpg, masks/<image>_<lesion>.png (255 inside, only where there is such
    a lesion) and manifest.csv, the manifest last: a folder that has it is complete.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "masks").mkdir(exist_ok=True)
    eyes = plan_eyes(count, seed)
    log.info("drawing %d synthetic photographs into %s", count, folder)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        drawn = pool.map(partial(_draw_into, folder, size), eyes, chunksize=8)
        digests = list(tqdm(drawn, total=count, desc="draw", disable=None))

    records = []
    for eye, digest in zip(eyes, digests, strict=True):
        record = Record(
            path=f"images/{eye.name}.jpg",
            grade=eye.grade,
            patient=eye.patient,
            eye=eye.eye,
            split="train",
            source="synthetic",
            sha256=digest,
        )
        records.append(record)
    write_json(folder / "data_report.json", {"layout": "synthetic", "size": size})
    write_manifest(folder, split_patients(records))


def _draw_into(folder: Path, size: int, eye: DrawnEye) -> str:
    """Write a photograph and its masks, cropped to the fundus; return the photograph's SHA-256."""
    # The frame is higher than the picture, because most fundi do not fill it.
    frame, masks = draw_photograph(eye, height=size * 9 // 8)
    box = find_fundus(frame)
    path = folder / "images" / f"{eye.name}.jpg"
    picture = Image.fromarray(crop_square(frame, box, size))
    picture.save(path, quality=95, subsampling=0)

    for lesion, mask in masks.items():
        if not mask.any():
            continue
        # All pixels that hold some of a lesion count, so that those of one pixel survive.
        white = mask.astype(np.uint8) * 255
        share = crop_square(white, box, size, Image.Resampling.BOX)
        inside = (share > 0).astype(np.uint8) * 255
        Image.fromarray(inside).save(folder / "masks" / f"{eye.name}_{lesion}.png")
    return sha256_of(path)


def draw_frames(folder: Path, count: int, height: int = 576, seed: int = 0) -> None:
    """Draw `count` eyes with lesions as cameras give them, with their masks, on all cores.

    `folder` receives images/<name>.png and masks/<lesion>/<name>.png of the same size (255 inside,
    only where there is such a lesion). Eyes without retinopathy are passed over. Raises InputError
    where the folder has files already.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: is not empty; name a new folder")
    # Half of all eyes are healthy; of so many, enough are not.
    eyes = [eye for eye in plan_eyes(6 * count + 60, seed) if eye.grade > 0][:count]
    (folder / "images").mkdir(parents=True)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        drawn = pool.map(partial(_draw_frame, folder, height), eyes)
        for _ in tqdm(drawn, total=count, desc="draw", disable=None):
            pass


def _draw_frame(folder: Path, height: int, eye: DrawnEye) -> None:
    """Write one eye's frame and the masks of its lesions."""
    frame, masks = draw_photograph(eye, height)
    Image.fromarray(frame).save(folder / "images" / f"{eye.name}.png")
    for lesion, mask in masks.items():
        if mask.any():
            (folder / "masks" / lesion).mkdir(parents=True, exist_ok=True)
            white = mask.astype(np.uint8) * 255
            Image.fromarray(white).save(folder / "masks" / lesion / f"{eye.name}.png")


def main() -> None:
    """Draw the frames that the command line asks for."""
    parser = argparse.ArgumentParser(description="Draw fundus photographs and masks of lesions.")
    parser.add_argument("folder", metavar="OUT", type=Path, help="new folder for images and masks")
    parser.add_argument("--count", type=int, default=20, help="how many photographs (1 to 10000)")
    parser.add_argument("--height", type=int, default=576, help="of a frame in pixels (64 to 4096)")
    parser.add_argument("--seed", type=int, default=0, help="another one draws other eyes")
    options = parser.parse_args()

    limits = {"count": (1, 10_000), "height": (64, 4096), "seed": (0, 2**32 - 1)}
    for name, (low, high) in limits.items():
        if not low <= getattr(options, name) <= high:
            parser.error(f"--{name} {getattr(options, name)}: expected {low} to {high}")
    try:
        draw_frames(options.folder, options.count, options.height, options.seed)
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
