"""Lesions painted on photographs, so that a network can learn to find some without any label.

Microaneurysms, haemorrhages, hard exudates and cotton wool spots in the forms of drawn eyes
(eye_map.py) are laid on a photograph at random places, in random numbers and strengths: blood lets
less light through, deposits throw more of it back. Vessels, noise, reflections and the photograph's
own lesions stay as they are. A network that tells apart what was painted has to see what is small,
and looks past what is there on every photograph. Painting anomalies on normal pictures is the idea
of CutPaste (arXiv 2104.04015); there they are pieces of other pictures.

Lengths are in pixels, or in diameters of the optic disc (DD). Places are complex, x + y j.
Shapes: H and W are the picture's height and width, h and w those of a window of it, K is the number
of kinds (PAINTED), N a number of places.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter

from fundus.eye_map import LESION_KINDS, Outline, outline_blobs
from fundus.synthetic import CLOT, COTTON_WOOL, EXUDATE, RETINA

DISC_SHARE = 0.137  # the optic disc's diameter, as a share of a picture that the fundus fills
DARKEST_RETINA = 24  # grey levels; nothing is painted on what is darker
GRID = 8  # pixels between the places that are looked at for retina

PAINTED_SHARE = 0.7  # of pictures that have lesions of a kind, kind by kind
STRENGTHS = (0.1, 1.0)  # of a kind on a picture: from hardly seen to those of drawn eyes
BLURS = (0.3, 1.2)  # sigma in pixels of 512, of all edges of a picture
TINT = 0.1  # standard deviation of the logarithm of a kind's colour, channel by channel
GLOWS = (0.9, 1.6)  # how much brighter deposits are than those of drawn eyes
SPECKS = (5, 22)  # of a cluster of hard exudates
CLUSTER_RADII = (0.1, 0.4)  # DD
SPECK_SCATTER = 0.06  # DD
OVERSAMPLING = 4  # polygons have hard edges, so they are drawn larger and averaged down


class Paint(NamedTuple):
    """How a kind of lesion is painted."""

    most: int  # lesions, or clusters, on a picture
    density: np.ndarray | None = None  # optical, of blood: red, green, blue
    albedo: np.ndarray | None = None  # of a deposit, by that of the retina


PAINTED = {
    "microaneurysm": Paint(most=60, density=CLOT),
    "haemorrhage": Paint(most=40, density=CLOT),
    "hard_exudate": Paint(most=8, albedo=EXUDATE / RETINA),
    "cotton_wool_spot": Paint(most=8, albedo=COTTON_WOOL / RETINA),
}


def paint_lesions(picture: np.ndarray, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return a picture with lesions painted on it, uint8 (H, W, 3), and where: uint8 (H, W, K).

    `picture` is uint8 RGB (H, W, 3), which the fundus fills. The masks say which share of a pixel a
    lesion covers, 255 for all of it. What shows no retina, such as a black picture, stays as it is.
    """
    painted = picture.astype(np.float32)
    masks = np.zeros((*picture.shape[:2], len(PAINTED)), np.uint8)
    side = max(picture.shape[:2])
    disc = DISC_SHARE * side
    retina = _find_retina(picture) / disc
    blur = rng.uniform(*BLURS) * side / 512
    for number, (name, paint) in enumerate(PAINTED.items()):
        if len(retina) == 0 or rng.random() > PAINTED_SHARE:
            continue
        colour = _mix(rng, paint)
        sigma = math.hypot(blur, LESION_KINDS[name].soft_edge * disc)
        for outline in _outline(rng, name, paint, retina, disc):
            _lay(painted, masks[..., number], outline.corners * disc, colour, sigma)
    return np.clip(painted.round(), 0, 255).astype(np.uint8), masks


def known_lesions(root: Path, path: str, shape: tuple[int, int]) -> np.ndarray:
    """Return the masks of lesions that a picture came with: uint8 (H, W, K), 255 inside.

    `path` is the picture's within the prepared folder `root`, `shape` its (H, W). Drawn photographs
    have masks (fundus/synthetic.py); for any other there is nothing in them.
    """
    masks = np.zeros((*shape, len(PAINTED)), np.uint8)
    if not (root / "masks").is_dir():
        return masks
    for number, name in enumerate(PAINTED):
        file = root / "masks" / f"{Path(path).stem}_{name}.png"
        if file.is_file():
            with Image.open(file) as image:
                masks[..., number] = np.asarray(image.convert("L").resize(shape[::-1]))
    return masks


# ------------------------------------------------------------------------------------------ helpers
def _find_retina(picture: np.ndarray) -> np.ndarray:
    """Return places on retina, complex (N,), every GRID pixels."""
    rows, columns = np.nonzero(picture[::GRID, ::GRID].max(axis=2) > DARKEST_RETINA)
    return GRID * (columns + 1j * rows)


def _outline(
    rng: Generator, name: str, paint: Paint, retina: np.ndarray, disc: float
) -> list[Outline]:
    """Return the outlines of a kind's lesions on a picture, in DD; few are as likely as many."""
    count = int(math.exp(rng.uniform(0, math.log(paint.most + 1))))
    spacing = GRID / disc
    places = rng.choice(retina, count) + spacing * (rng.random(count) + 1j * rng.random(count))
    if name == "hard_exudate":
        places = np.concatenate([_scatter_specks(rng, leak) for leak in places])
    return outline_blobs(rng, disc, places, LESION_KINDS[name])


def _scatter_specks(rng: Generator, leak: complex) -> np.ndarray:
    """Return the places of a cluster's specks, complex (N,): on an arc about a leak."""
    count = int(rng.integers(*SPECKS))
    angles = rng.uniform(0, 2 * math.pi) + rng.uniform(0, rng.uniform(2, 2 * math.pi), count)
    arc = leak + rng.uniform(*CLUSTER_RADII) * np.exp(1j * angles)
    return arc + SPECK_SCATTER * (rng.normal(size=count) + 1j * rng.normal(size=count))


class Colour(NamedTuple):
    """What a kind of lesion does to the light on one picture; one of both is set."""

    density: np.ndarray | None  # (3,): what passes is exp(-density)
    albedo: np.ndarray | None  # (3,), by that of what is around
    opacity: float  # of a deposit


def _mix(rng: Generator, paint: Paint) -> Colour:
    """Return a kind's colour on a picture."""
    strength = rng.uniform(*STRENGTHS)
    tint = np.exp(TINT * rng.normal(size=3))
    if paint.density is not None:
        return Colour(paint.density * tint * strength, None, 1.0)
    return Colour(None, paint.albedo * tint * rng.uniform(*GLOWS), strength)


def _lay(
    painted: np.ndarray, mask: np.ndarray, corners: np.ndarray, colour: Colour, sigma: float
) -> None:
    """Paint a lesion of these corners (complex, pixels) on `painted` (H, W, 3) and `mask` (H, W).

    Both change in place; `sigma` is the blur of its edge.
    """
    # A window with room for the edge, as far as it lies on the picture.
    margin = math.ceil(3 * sigma) + 2
    left = math.floor(corners.real.min()) - margin
    top = math.floor(corners.imag.min()) - margin
    width = math.ceil(corners.real.max()) + margin - left
    height = math.ceil(corners.imag.max()) + margin - top
    rows = slice(max(top, 0), min(top + height, mask.shape[0]))
    columns = slice(max(left, 0), min(left + width, mask.shape[1]))
    if rows.start >= rows.stop or columns.start >= columns.stop:
        return

    # How much of each pixel it covers.
    sheet = Image.new("L", (width * OVERSAMPLING, height * OVERSAMPLING))
    points = (corners - complex(left, top)) * OVERSAMPLING
    pairs = np.stack([points.real, points.imag], axis=1)
    ImageDraw.Draw(sheet).polygon(pairs.ravel().tolist(), 255)
    sheet = sheet.reduce(OVERSAMPLING).filter(ImageFilter.GaussianBlur(sigma))
    share = np.asarray(sheet)[
        rows.start - top : rows.stop - top, columns.start - left : columns.stop - left
    ]
    window = painted[rows, columns]
    is_retina = window.max(axis=2) > DARKEST_RETINA
    share = np.where(is_retina, share, 0)
    mask[rows, columns] = np.maximum(mask[rows, columns], share)

    share = share[..., None].astype(np.float32) / 255
    if colour.density is not None:
        window *= np.exp(-colour.density * share)
    elif is_retina.any():
        light = window[is_retina].mean(axis=0)
        window += (light * colour.albedo - window) * share * colour.opacity
