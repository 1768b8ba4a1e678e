"""Hand-made statistics of a photograph: the line that a network must beat.

Nothing here is learned. What a grader counts and compares is measured, and brought to a scale on
which a linear probe can add it up: logarithms of energies and counts, and ratios that are bounded.
GROUPS, at the end, is the table of all that is measured; a further group is an entry there, its
function and a test.

Lesions are measured on contrast: by what share of its light a pixel differs from its surroundings,
over how much the pixels around it differ. So neither illumination, nor pigment, nor a hazy lens
decides. Sizes are in pixels of a picture of 256 x 256, on which a microaneurysm is one or two wide,
a large vein four, the optic disc 35.
Shapes: H and W are the picture's sides, P the number of pixels that count, S scales, F statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

SIDE = 256  # of the pictures, in pixels

# Where to look.
DARKEST_FUNDUS = 16  # grey levels; JPEG leaves some noise in the black surround
LEAST_FUNDUS = 0.1  # of the picture; what is smaller is no fundus, and the whole picture counts
RIM = 8  # pixels at the rim, where lens and iris throw light and shadows
LEAST_INSIDE = 0.02  # of the picture; a fundus of which the rim leaves less is used with its rim
DISC_RADIUS = 26  # of the optic disc, with a margin for the crescent beside it
LIGHT_SIGMA = 12.0  # of the surroundings: wider than vessels, narrower than the illumination
SPREAD_SIGMA = 24.0  # wider again, so that a lesion does not hide itself
REDUCTION = 4  # both are smooth: copies of a quarter of the side give the same

# Contrast.
DARK_LEVEL = 10  # grey levels added to the light, so that noise in the dark is no contrast
CLIP = 0.5  # share of the light: what differs by more is no stronger sign
LEAST_SPREAD = 0.008  # share of the light: that of noise, which is not to be raised to contrast
STRONGEST = 8  # contrast, in spreads

# What is measured.
COLORS = ("red", "green", "blue", "red-green", "green-blue")
PLANES = ("green", "red", "yellow")  # of contrast; haemoglobin darkens green, exudates are yellow
SCALES = (0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # sigmas of the blurred copies
BANDS = ("0.7-1", "1-1.5", "1.5-2", "2-3", "3-4", "4-6")
BLOB_SCALES = SCALES[1:6]
RINGS = ("centre", "middle", "outer")
RING_ENDS = (0.35, 0.65)  # radii, of the fundus' own
SECTORS = 8  # quadrants times near and far
NEAR = 0.55  # radius up to which a sector is near, of the fundus' own
LEAST_PIXELS = 20  # of a ring or a sector; one with fewer says nothing

BLOB_LEVELS = (0.25, 0.5, 1.0)  # responses of peaks that are counted, in spreads
ROUND = 0.6  # least ratio of a round peak's curvatures; a vessel's is near 0
PART_LEVELS = (1.0, 2.0)  # contrast at which components are cut out, in spreads
LOG_FLOOR = 0.02  # spreads; logarithms of less say nothing and would be heavy tails


@dataclass(frozen=True)
class Eye:
    """A photograph as the groups see it."""

    color: np.ndarray  # float32 (5, H, W): COLORS, 0 to 1, the last two differences of logarithms
    spread: np.ndarray  # float32 (3, H, W): how much pixels differ around each, in each plane
    blurred: np.ndarray  # float32 (3, S, H, W): contrast of PLANES at SCALES, 0 off the fundus
    inside: np.ndarray  # int (P,): places of the fundus without its rim, in a flat plane
    off_disc: np.ndarray  # int (P,): those without the optic disc
    lesion_mask: np.ndarray  # bool (H, W): the same as a mask
    ring: np.ndarray  # int (H, W): which of RINGS
    sector: np.ndarray  # int (H, W): which of the sectors
    fundus_share: float  # of the picture


def handmade_features(picture: np.ndarray) -> np.ndarray:
    """Return the hand-made statistics, float32 (F,), of a picture, uint8 RGB (256, 256, 3).

    FEATURE_NAMES names them. They are finite for any picture. Raises ValueError for another shape
    or type.
    """
    if picture.shape != (SIDE, SIDE, 3) or picture.dtype != np.uint8:
        raise ValueError(f"expected uint8 ({SIDE}, {SIDE}, 3), got {picture.dtype} {picture.shape}")
    eye = prepare_eye(picture)
    values = []
    for group in GROUPS:
        found = np.asarray(group.measure(eye), np.float32)
        values.append(found.reshape(-1))
    return np.concatenate(values)


# -------------------------------------------------------------------------------------- preparation
def prepare_eye(picture: np.ndarray) -> Eye:
    """Return what the groups measure, of a picture uint8 (H, W, 3)."""
    fundus = find_fundus_mask(picture)
    pixels = np.moveaxis(picture, 2, 0).astype(np.float32)
    inside = without_rim(fundus)
    red_light = _surroundings(pixels[0], fundus, LIGHT_SIGMA)
    green_light = _surroundings(pixels[1], fundus, LIGHT_SIGMA)

    # The disc is brighter than any exudate, and its rim sharper than any lesion's.
    lesion_mask = inside & ~find_disc(red_light + green_light, inside)
    if lesion_mask.sum() < 0.5 * inside.sum():
        lesion_mask = inside

    contrast, spread = _contrast(pixels, fundus, green_light, red_light)
    logarithms = np.log(pixels + 8)
    differences = [logarithms[0] - logarithms[1], logarithms[1] - logarithms[2]]
    ring, sector = _places(fundus)
    return Eye(
        color=np.stack([*(pixels / 255), *differences]),
        spread=spread,
        blurred=_blur(contrast),
        inside=np.flatnonzero(inside),
        off_disc=np.flatnonzero(lesion_mask),
        lesion_mask=lesion_mask,
        ring=ring,
        sector=sector,
        fundus_share=float(fundus.mean()),
    )


def find_fundus_mask(picture: np.ndarray) -> np.ndarray:
    """Return the largest bright region, holes filled, bool (H, W); all where there is none."""
    from scipy import ndimage

    bright = picture.max(axis=2) > DARKEST_FUNDUS
    numbers, count = ndimage.label(bright)
    if count:
        sizes = np.bincount(numbers.ravel())
        sizes[0] = 0  # the surround
        fundus = ndimage.binary_fill_holes(numbers == sizes.argmax())
        if fundus.mean() >= LEAST_FUNDUS:
            return fundus
    return np.ones(bright.shape, bool)


def without_rim(mask: np.ndarray) -> np.ndarray:
    """Return a mask without its outermost pixels, bool (H, W); itself where little is left."""
    from scipy import ndimage

    share = ndimage.uniform_filter(mask.astype(np.float32), 2 * RIM + 1, mode="constant")
    inside = share > 0.999
    if inside.mean() < LEAST_INSIDE:
        return mask
    return inside


def find_disc(light: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Return the disc around the brightest place inside, bool (H, W)."""
    row, column = np.unravel_index(np.where(inside, light, -1).argmax(), light.shape)
    down = np.arange(SIDE)[:, None] - row
    right = np.arange(SIDE) - column
    return right * right + down * down < DISC_RADIUS**2


def _places(fundus: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ring and sector of each pixel, by where it lies in the fundus, int (H, W) both."""
    rows, columns = np.nonzero(fundus)
    radius = np.sqrt(len(rows) / np.pi)
    down = (np.arange(SIDE) - rows.mean())[:, None] / radius
    right = (np.arange(SIDE) - columns.mean()) / radius
    distance = np.sqrt(right * right + down * down)
    ring = np.digitize(distance, RING_ENDS)
    sector = 4 * (distance > NEAR) + 2 * (down > 0) + (right > 0)
    return ring, sector


def _surroundings(plane: np.ndarray, mask: np.ndarray, sigma: float) -> np.ndarray:
    """Return the mean of a plane around each pixel, Gaussian, over what is in the mask alone."""
    from scipy import ndimage

    weight = mask.astype(np.float32)
    total = ndimage.gaussian_filter(_reduce(plane * weight), sigma / REDUCTION, mode="constant")
    weights = ndimage.gaussian_filter(_reduce(weight), sigma / REDUCTION, mode="constant")
    return _enlarge(total / np.maximum(weights, 1e-3))


def _reduce(plane: np.ndarray) -> np.ndarray:
    """Return the means of blocks of REDUCTION x REDUCTION."""
    count = SIDE // REDUCTION
    return plane.reshape(count, REDUCTION, count, REDUCTION).mean(axis=(1, 3))


def _enlarge(small: np.ndarray) -> np.ndarray:
    """Return a reduced plane at the picture's size, bilinear."""
    count = len(small)
    place = (np.arange(count * REDUCTION) + 0.5) / REDUCTION - 0.5
    place = np.clip(place, 0, count - 1)
    low = np.minimum(place.astype(int), count - 2)
    share = (place - low).astype(np.float32)
    rows = small[low] * (1 - share)[:, None] + small[low + 1] * share[:, None]
    return rows[:, low] * (1 - share) + rows[:, low + 1] * share


def _contrast(
    pixels: np.ndarray, fundus: np.ndarray, green_light: np.ndarray, red_light: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return contrast and spread of PLANES, float32 (3, H, W) both; contrast is in spreads."""
    red, green, blue = pixels
    yellow = np.log((green + DARK_LEVEL) / (blue + DARK_LEVEL))
    planes = (
        (green - green_light) / (green_light + DARK_LEVEL),
        (red - red_light) / (red_light + DARK_LEVEL),
        yellow - _surroundings(yellow, fundus, LIGHT_SIGMA),
    )
    contrasts = []
    spreads = []
    for plane in planes:
        clipped = np.clip(plane, -CLIP, CLIP)
        variance = _surroundings(clipped * clipped, fundus, SPREAD_SIGMA)
        spread = np.sqrt(variance) + LEAST_SPREAD
        contrasts.append(np.clip(clipped / spread, -STRONGEST, STRONGEST) * fundus)
        spreads.append(spread)
    return np.stack(contrasts), np.stack(spreads)


def _blur(contrast: np.ndarray) -> np.ndarray:
    """Return contrast (3, H, W) blurred to each of SCALES, float32 (3, S, H, W)."""
    from scipy import ndimage

    blurred = np.empty((len(contrast), len(SCALES), SIDE, SIDE), np.float32)
    for plane, current in enumerate(contrast):
        # Variances add, so that each scale is made from the one before, by a small step.
        done = 0.0
        for number, sigma in enumerate(SCALES):
            step = np.sqrt(sigma**2 - done**2)
            current = ndimage.gaussian_filter(current, step, truncate=3, mode="constant")
            blurred[plane, number] = current
            done = sigma
    return blurred


# ------------------------------------------------------------------------------------------- groups
# Each returns numbers in the order of its axes in GROUPS.
COLOR_STATS = ("mean", "std", "skew", "p5", "p95")
BAND_STATS = ("rms", "p0.1", "p1", "p99", "p99.9")
BLOB_STATS = (
    *("p99", "p99.9", "top", "round top"),
    *("n1", "n2", "n3", "round n1", "round n2", "round n3"),
    *("round n2 in centre", "over lines", "line p50", "line p90", "line p99"),
)
PART_STATS = (
    *("tiny", "small", "large", "long"),
    *("round area", "long area", "round share", "depth", "largest"),
)


def color_moments(eye: Eye) -> list[list[float]]:
    """Return COLOR_STATS of each of COLORS inside the fundus."""
    places = eye.inside[::2]  # half of the pixels say the same
    rows = []
    for plane in eye.color:
        values = np.sort(plane.take(places))
        mean = values.mean()
        std = values.std()
        standard = (values - mean) / (std + 0.01)
        skew = np.arctan((standard**3).mean())
        rows.append([mean, std, skew, *_quantiles(values, (0.05, 0.95))])
    return rows


def ring_colors(eye: Eye) -> list[np.ndarray]:
    """Return how each of COLORS differs from its mean in each of RINGS, off the disc."""
    ring = eye.ring.take(eye.off_disc)
    counts = np.bincount(ring, minlength=len(RINGS))
    rows = []
    for plane in eye.color:
        values = plane.take(eye.off_disc)
        means = np.bincount(ring, values, minlength=len(RINGS)) / np.maximum(counts, 1)
        rows.append(np.where(counts > LEAST_PIXELS, means - values.mean(), 0))
    return rows


def band_energies(eye: Eye) -> list[np.ndarray]:
    """Return the logarithms of BAND_STATS of each plane's band-passes, off the disc."""
    rows = []
    for plane in eye.blurred:
        for finer, coarser in zip(plane[:-1], plane[1:], strict=True):
            values = np.sort((finer - coarser).take(eye.off_disc))
            darkest, dark, bright, brightest = _quantiles(values, (0.001, 0.01, 0.99, 0.999))
            rms = np.sqrt((values * values).mean())
            rows.append(_log(np.array([rms, -darkest, -dark, bright, brightest])))
    return rows


def blobs(eye: Eye) -> list[list[float]]:
    """Return BLOB_STATS of dark and of bright blobs in green and red, by the Hessian.

    A blob is curved in both directions, a line (a vessel) in one.
    """
    rows = []
    for plane in eye.blurred[:2]:
        for sigma in BLOB_SCALES:
            lower, higher = hessian_eigenvalues(plane[SCALES.index(sigma)], sigma)
            # Of a dark blob both curvatures are positive, of a bright one both are negative.
            rows.append(_blob_stats(eye, lower, higher))
            rows.append(_blob_stats(eye, -higher, -lower))
    return rows


def hessian_eigenvalues(smooth: np.ndarray, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the lower and higher curvature of a plane (H, W), times sigma^2.

    With that factor a blob has its strongest response at its own scale (Lindeberg 1998).
    """
    padded = np.pad(smooth, 1, "edge")
    xx = padded[1:-1, 2:] - 2 * smooth + padded[1:-1, :-2]
    yy = padded[2:, 1:-1] - 2 * smooth + padded[:-2, 1:-1]
    xy = (padded[2:, 2:] - padded[2:, :-2] - padded[:-2, 2:] + padded[:-2, :-2]) / 4
    mean = (xx + yy) / 2
    half = (xx - yy) / 2
    root = np.sqrt(half * half + xy * xy)
    return sigma**2 * (mean - root), sigma**2 * (mean + root)


def _blob_stats(eye: Eye, weaker: np.ndarray, stronger: np.ndarray) -> list[float]:
    """Return BLOB_STATS of a blob's weaker and stronger curvature (H, W), positive where it is."""
    responses = np.sort(weaker.take(eye.off_disc))
    lines = np.sort((stronger - np.maximum(weaker, 0)).take(eye.off_disc))
    places = find_peaks(weaker, eye.lesion_mask)
    peaks = weaker.take(places)
    is_round = peaks > ROUND * stronger.take(places)
    round_peaks = np.sort(peaks[is_round])
    central = (eye.ring.take(places) == 0) & is_round & (peaks > BLOB_LEVELS[1])

    top = _log(_mean_of_last(np.sort(peaks), 20))
    line_levels = _log(_quantiles(lines, (0.5, 0.9, 0.99)))
    stats = [*_log(_quantiles(responses, (0.99, 0.999)))]
    stats += [top, _log(_mean_of_last(round_peaks, 10))]
    for found in (peaks, round_peaks):
        for level in BLOB_LEVELS:
            stats.append(np.log1p((found > level).sum()))
    return [*stats, np.log1p(central.sum()), top - line_levels[2], *line_levels]


def find_peaks(response: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the places, in a flat plane, where a response is positive and above all around it."""
    is_peak = mask & (response > 0)
    padded = np.pad(response, 1)
    for down, right in product(range(3), range(3)):
        is_peak &= response >= padded[down : down + SIDE, right : right + SIDE]
    return np.flatnonzero(is_peak)


def parts(eye: Eye) -> list[list[float]]:
    """Return PART_STATS of connected dark, bright and yellow parts, at each of PART_LEVELS."""
    green = eye.blurred[0, 0]
    yellow = eye.blurred[2, 1]
    rows = []
    for plane in (-green, green, yellow):
        for level in PART_LEVELS:
            rows.append(_part_stats(plane, level, eye.lesion_mask))
    return rows


def _part_stats(plane: np.ndarray, level: float, mask: np.ndarray) -> list[float]:
    """Return PART_STATS of the parts of a plane (H, W) above a level, inside a mask."""
    from scipy import ndimage

    numbers, count = ndimage.label((plane > level) & mask, structure=np.ones((3, 3)))
    if count == 0:
        return [0.0] * len(PART_STATS)
    rows, columns = np.nonzero(numbers)
    part = numbers[rows, columns] - 1
    area = np.bincount(part)
    depth = np.bincount(part, plane[rows, columns]) / area
    is_round = _is_compact(part, rows, columns, area) & (area >= 3)
    is_long = ~is_round & (area >= 3)

    round_area = area[is_round].sum()
    counted = round_area + area[is_long].sum()
    tiny = is_round & (area < 8)
    large = is_round & (area >= 25)
    small = is_round & ~tiny & ~large
    return [
        np.log1p(tiny.sum()),
        np.log1p(small.sum()),
        np.log1p(large.sum()),
        np.log1p(is_long.sum()),
        np.log1p(round_area),
        np.log1p(area[is_long].sum()),
        round_area / (counted + 20),  # 20 pixels more, so that one small part is no certainty
        np.log1p(_mean_of_last(np.sort(depth[is_round]), 5)),
        np.log1p(area[is_round].max(initial=0)),
    ]


def _is_compact(
    part: np.ndarray, rows: np.ndarray, columns: np.ndarray, area: np.ndarray
) -> np.ndarray:
    """Return which parts are compact, bool, by the ellipse that has their second moments.

    `part` (P,) int says which part the pixel at `rows` and `columns` belongs to.
    """
    down = rows - (np.bincount(part, rows) / area)[part]
    right = columns - (np.bincount(part, columns) / area)[part]
    # A pixel is a square of its own, whose second moment is 1 / 12.
    yy = np.bincount(part, down * down) / area + 1 / 12
    xx = np.bincount(part, right * right) / area + 1 / 12
    xy = np.bincount(part, down * right) / area
    root = np.sqrt(((xx - yy) / 2) ** 2 + xy**2)
    longer = np.sqrt((xx + yy) / 2 + root)
    shorter = np.sqrt(np.maximum((xx + yy) / 2 - root, 1 / 12))
    filled = area / (4 * np.pi * longer * shorter)
    return (longer < 2.2 * shorter) & (filled > 0.7)


def sector_spreads(eye: Eye) -> list[list[float]]:
    """Return how light, colour, dark and bright detail differ between sectors: std and range.

    Disease is in some places and not in others; illumination is smooth.
    """
    sector = eye.sector.take(eye.off_disc)
    counts = np.bincount(sector, minlength=SECTORS)
    is_used = counts > LEAST_PIXELS
    if is_used.sum() < 2:
        return [[0.0, 0.0]] * 4
    detail = (eye.blurred[0, 1] - eye.blurred[0, 5]).take(eye.off_disc)
    measured = (
        eye.color[1].take(eye.off_disc),
        eye.color[3].take(eye.off_disc),
        np.minimum(detail, 0) ** 2,
        np.maximum(detail, 0) ** 2,
    )
    rows = []
    for number, values in enumerate(measured):
        means = np.bincount(sector, values, minlength=SECTORS)[is_used] / counts[is_used]
        if number >= 2:
            means = _log(np.sqrt(means))  # of energies
        rows.append([means.std(), means.max() - means.min()])
    return rows


def quality(eye: Eye) -> list[float]:
    """Return what the photograph itself is like: its fundus' share, over- and underexposure, blur.

    A probe can hold against it what it reads in the other groups.
    """
    red = eye.color[0].take(eye.inside)
    green = eye.color[1].take(eye.inside)
    exposure = [(red > 0.98).mean(), (green > 0.9).mean(), (green < 0.1).mean()]
    spreads = [np.log(plane.take(eye.off_disc)).mean() for plane in eye.spread]
    return [eye.fundus_share, *exposure, *spreads]


def _log(values: Any) -> Any:
    """Return logarithms that begin to fall at LOG_FLOOR; of nothing and less it is the lowest."""
    return np.log(np.maximum(values, 0) + LOG_FLOOR)


def _quantiles(ordered: np.ndarray, shares: Sequence[float]) -> np.ndarray:
    """Return the values at shares (0 to 1) of rising ones, the nearest."""
    return ordered[np.round(np.asarray(shares) * (len(ordered) - 1)).astype(int)]


def _mean_of_last(ordered: np.ndarray, count: int) -> float:
    """Return the mean of the last `count` of rising values, or of all; 0 where there is none."""
    if not len(ordered):
        return 0.0
    return float(ordered[-count:].mean())


# ---------------------------------------------------------------------------------------- the table
@dataclass(frozen=True)
class Group:
    """A group of statistics: its function, and what tells its numbers apart, slowest first."""

    name: str
    measure: Callable[[Eye], Any]
    axes: tuple[tuple[Any, ...], ...]


GROUPS = (
    Group("color", color_moments, (COLORS, COLOR_STATS)),
    Group("ring", ring_colors, (COLORS, RINGS)),
    Group("band", band_energies, (PLANES, BANDS, BAND_STATS)),
    Group("blob", blobs, (PLANES[:2], BLOB_SCALES, ("dark", "bright"), BLOB_STATS)),
    Group("part", parts, (("dark", "bright", "yellow"), PART_LEVELS, PART_STATS)),
    Group("sector", sector_spreads, (("light", "red-green", "dark", "bright"), ("std", "range"))),
    Group(
        "quality",
        quality,
        (("fundus", "red full", "green full", "green dark", *(f"spread {p}" for p in PLANES)),),
    ),
)


def _name_features() -> tuple[str, ...]:
    """Return the name of each statistic: its group, and its place on each axis."""
    names = []
    for group in GROUPS:
        for place in product(*group.axes):
            names.append(" ".join([group.name, *map(str, place)]))
    return tuple(names)


FEATURE_NAMES = _name_features()
