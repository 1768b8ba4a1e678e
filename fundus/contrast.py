"""Where a prepared photograph shows retina, and the contrast of what is on it.

Contrast is by what share of the light around it a pixel differs, divided by how much pixels around
it differ (their spread). So neither illumination nor pigment nor a hazy lens decides. The surround
never counts, nor does the rim of the fundus, nor, for lesions, the optic disc.

Lengths are in pixels of a picture of 256 x 256, on which a microaneurysm is one or two wide, a
large vein four, the optic disc 35.
Shapes: H and W are the picture's height and width (256), P a number of pixels that are measured,
S the number of SCALES, B that of BLOB_SCALES.
"""

from dataclasses import dataclass

import numpy as np

SIDE = 256  # of the pictures, in pixels

# Where to look.
DARKEST_FUNDUS = 16  # grey levels; JPEG leaves some noise in the black surround
LEAST_FUNDUS = 0.1  # of the picture; anything smaller is no fundus, and the whole picture counts
RIM = 8  # pixels at the rim, where lens and iris throw light and shadows
LEAST_INSIDE = 0.02  # of the picture; a fundus that would keep less is used with its rim
DISC_RADIUS = 26  # of the optic disc, with a margin for the crescent beside it
LEAST_OFF_DISC = 0.5  # of the fundus; if the bright place takes more, it is no optic disc
RING_ENDS = (0.35, 0.65)  # radii, as shares of the fundus' own
SECTOR_END = 0.55  # radius that parts near sectors from far ones
SECTORS = 8  # quadrants, near and far

# Contrast.
LIGHT_SIGMA = 8.0  # of the light around a pixel: wider than vessels, narrower than illumination
SPREAD_SIGMA = 16.0  # wider again, so that a lesion does not hide itself
REDUCTION = 4  # both are smooth, and copies of a quarter of the side give the same
DARK_LEVEL = 10  # grey levels added to the light, so that noise in the dark is no contrast
CLIP = 0.5  # share of the light; what differs by more is no stronger sign
LEAST_SPREAD = 0.015  # share of the light; noise must not be raised to contrast
STRONGEST = 8.0  # spreads

COLORS = ("red", "green", "blue", "red-green", "green-blue")
PLANES = ("green", "red", "yellow")  # blood darkens green, then red; exudates are yellow
BLOOD_PLANES = PLANES[:2]
SCALES = (0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # sigmas of the blurred copies
BLOB_SCALES = (1.0, 1.5, 2.0, 3.0, 4.0)  # from microaneurysms to blots and cotton wool


@dataclass(frozen=True)
class Retina:
    """What is measured of a photograph."""

    color: np.ndarray  # float32 (5, H, W): COLORS, 0 to 1, then differences of logarithms
    spread: np.ndarray  # float32 (3, H, W): how much pixels around each one differ, by PLANES
    blurred: np.ndarray  # float32 (3, S, H, W): contrast of PLANES at SCALES, 0 off the fundus
    lower: np.ndarray  # float32 (2, B, H, W): the Hessian's eigenvalues, see hessian_eigenvalues
    higher: np.ndarray  # float32 (2, B, H, W)
    fundus_share: float  # of the picture
    inside: np.ndarray  # int (P,): the fundus without its rim, as places in a flattened plane
    off_disc: np.ndarray  # bool (H, W): and without the optic disc
    places: np.ndarray  # int (P,): the same as places in a flattened plane
    ring: np.ndarray  # int (H, W): 0 to 2 from the centre outwards
    sector: np.ndarray  # int (H, W): 0 to 7

    def contrast(self, plane: str, sigma: float) -> np.ndarray:
        """Return the contrast (H, W) of one of PLANES at one of SCALES."""
        return self.blurred[PLANES.index(plane), SCALES.index(sigma)]


def measure_retina(picture: np.ndarray) -> Retina:
    """Return what is measured of a prepared picture, uint8 RGB (256, 256, 3)."""
    pixels = np.moveaxis(picture, 2, 0).astype(np.float32)
    fundus = find_fundus(picture)
    inside = _without_rim(fundus)
    red_light = local_mean(pixels[0], fundus, LIGHT_SIGMA)
    green_light = local_mean(pixels[1], fundus, LIGHT_SIGMA)
    off_disc = _without_disc(red_light + green_light, inside)

    logs = np.log(pixels + DARK_LEVEL)
    red_green = logs[0] - logs[1]
    green_blue = logs[1] - logs[2]
    differences = (
        (pixels[1] - green_light) / (green_light + DARK_LEVEL),
        (pixels[0] - red_light) / (red_light + DARK_LEVEL),
        green_blue - local_mean(green_blue, fundus, LIGHT_SIGMA),
    )
    spread = np.empty((len(PLANES), SIDE, SIDE), np.float32)
    blurred = np.empty((len(PLANES), len(SCALES), SIDE, SIDE), np.float32)
    for number, difference in enumerate(differences):
        clipped = np.clip(difference, -CLIP, CLIP)
        # The optic disc would raise the spread around it, and hide the lesions there.
        variance = local_mean(clipped * clipped, off_disc, SPREAD_SIGMA)
        spread[number] = np.sqrt(variance) + LEAST_SPREAD
        contrast = np.clip(clipped / spread[number], -STRONGEST, STRONGEST) * fundus
        blurred[number] = blur_at_scales(contrast)

    eigenvalues = np.empty((2, len(BLOOD_PLANES), len(BLOB_SCALES), SIDE, SIDE), np.float32)
    for plane in range(len(BLOOD_PLANES)):
        for number, sigma in enumerate(BLOB_SCALES):
            smooth = blurred[plane, SCALES.index(sigma)]
            eigenvalues[:, plane, number] = hessian_eigenvalues(smooth, sigma)

    ring, sector = _rings_and_sectors(fundus)
    return Retina(
        color=np.stack([*(pixels / 255), red_green, green_blue]),
        spread=spread,
        blurred=blurred,
        lower=eigenvalues[0],
        higher=eigenvalues[1],
        fundus_share=float(fundus.mean()),
        inside=np.flatnonzero(inside),
        off_disc=off_disc,
        places=np.flatnonzero(off_disc),
        ring=ring,
        sector=sector,
    )


# ------------------------------------------------------------------------------------ where to look
def find_fundus(picture: np.ndarray) -> np.ndarray:
    """Return the fundus as a bool mask (H, W): the largest bright region, its holes filled.

    Where that is no fundus, everything is True.
    """
    from scipy import ndimage

    numbers, count = ndimage.label(picture.max(axis=2) > DARKEST_FUNDUS)
    if count:
        sizes = np.bincount(numbers.ravel())
        sizes[0] = 0  # the surround
        fundus = ndimage.binary_fill_holes(numbers == sizes.argmax())
        if fundus.mean() >= LEAST_FUNDUS:
            return fundus
    return np.ones(numbers.shape, bool)


def _without_rim(fundus: np.ndarray) -> np.ndarray:
    """Return a fundus' mask (H, W) without RIM pixels at its rim, where enough is left."""
    from scipy import ndimage

    share = ndimage.uniform_filter(fundus.astype(np.float32), 2 * RIM + 1, mode="constant")
    inside = share > 0.999  # rather than 1, which rounding may miss
    if inside.mean() < LEAST_INSIDE:
        return fundus
    return inside


def _without_disc(light: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Return a mask (H, W) without the optic disc: the brightest place of the smooth light."""
    row, column = divmod(int(np.where(inside, light, -1).argmax()), SIDE)
    lines = np.arange(SIDE)
    squared = (lines[:, None] - row) ** 2 + (lines - column) ** 2
    off_disc = inside & (squared >= DISC_RADIUS**2)
    if off_disc.sum() < LEAST_OFF_DISC * inside.sum():
        return inside
    return off_disc


def _rings_and_sectors(fundus: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers (H, W) of the rings and of the sectors around the fundus' middle."""
    rows, columns = np.nonzero(fundus)
    radius = np.sqrt(len(rows) / np.pi)
    y = (np.arange(SIDE)[:, None] - rows.mean()) / radius
    x = (np.arange(SIDE) - columns.mean()) / radius
    distance = np.sqrt(x * x + y * y)
    ring = (distance > RING_ENDS[0]).astype(int) + (distance > RING_ENDS[1])
    sector = 4 * (distance > SECTOR_END) + 2 * (y > 0) + (x > 0)
    return ring, sector


# ----------------------------------------------------------------------------------------- contrast
def local_mean(plane: np.ndarray, mask: np.ndarray, sigma: float) -> np.ndarray:
    """Return the Gaussian mean (H, W) of a plane's pixels in a mask, both (H, W).

    What is outside the mask has no weight, so that the rim is no edge.
    """
    from scipy import ndimage

    weight = mask.astype(np.float32)
    means = []
    for full in (plane * weight, weight):
        blocks = full.reshape(SIDE // REDUCTION, REDUCTION, SIDE // REDUCTION, REDUCTION)
        small = blocks.mean(axis=(1, 3))
        means.append(ndimage.gaussian_filter(small, sigma / REDUCTION, mode="constant"))
    total, weights = means
    return _enlarge(total / np.maximum(weights, 1e-3))


def _enlarge(small: np.ndarray) -> np.ndarray:
    """Return a reduced plane at full size (H, W), with straight lines between its pixels."""
    places = (np.arange(SIDE) + 0.5) / REDUCTION - 0.5
    places = np.clip(places, 0, len(small) - 1)
    before = np.minimum(places.astype(int), len(small) - 2)
    share = (places - before).astype(np.float32)
    rows = small[before] * (1 - share[:, None]) + small[before + 1] * share[:, None]
    return rows[:, before] * (1 - share) + rows[:, before + 1] * share


def blur_at_scales(contrast: np.ndarray) -> np.ndarray:
    """Return a plane (H, W) under Gaussians of SCALES, (S, H, W)."""
    from scipy import ndimage

    # Variances add up, so each copy is made from the one before, by a narrower Gaussian.
    copies = []
    smooth = contrast
    done = 0.0
    for sigma in SCALES:
        step = np.sqrt(sigma**2 - done**2)
        smooth = ndimage.gaussian_filter(smooth, step, truncate=3, mode="constant")
        copies.append(smooth)
        done = sigma
    return np.stack(copies)


def hessian_eigenvalues(smooth: np.ndarray, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the lower and the higher eigenvalue of a smooth plane's Hessian, times sigma^2.

    `smooth` (H, W) is a plane under a Gaussian of `sigma`. Both eigenvalues are positive on a dark
    blob and negative on a bright one; on a line one of them is near 0. With sigma^2, blobs as wide
    as the Gaussian respond alike at all scales (Lindeberg, Int. J. Comput. Vision 30, 1998).
    """
    edged = np.pad(smooth, 1, "edge")
    xx = edged[1:-1, 2:] - 2 * smooth + edged[1:-1, :-2]
    yy = edged[2:, 1:-1] - 2 * smooth + edged[:-2, 1:-1]
    xy = (edged[2:, 2:] - edged[2:, :-2] - edged[:-2, 2:] + edged[:-2, :-2]) / 4
    mean = (xx + yy) / 2
    half = (xx - yy) / 2
    root = np.sqrt(half * half + xy * xy)
    return sigma**2 * (mean - root), sigma**2 * (mean + root)
