"""Hand-made statistics of a prepared photograph: the line that a network must beat.

Nothing here is learned. What a grader counts and compares is measured, and brought to a scale on
which a linear probe can add it up: logarithms of energies and of counts, and bounded ratios.
GROUPS, at the end, is the table of all that is measured; a further group is an entry there, its
function and a test. On what it is measured, contrast.py says.

Shapes: H and W are the picture's height and width (256), P a number of pixels, C of components, F
the number of features.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any, NamedTuple

import numpy as np

from fundus.contrast import (
    BLOB_SCALES,
    BLOOD_PLANES,
    COLORS,
    PLANES,
    SCALES,
    SECTORS,
    SIDE,
    Retina,
    measure_retina,
)

VERSION = 1  # goes up with any change of a number, so that cached ones are made anew
BANDS = tuple(f"{finer}-{coarser}" for finer, coarser in pairwise(SCALES))
SIGNS = ("dark", "bright")
RINGS = ("centre", "middle", "outer")
LEAST_PIXELS = 20  # of a ring or sector; a smaller one says nothing
LOG_FLOOR = 0.02  # spreads; the logarithm of less says nothing and would be a heavy tail

BLOB_LEVELS = (0.2, 0.35, 0.6)  # spreads: common, some, and rare on a retina without lesions
ROUND = 0.6  # least ratio of a round peak's two curvatures; on a vessel it is near 0
TOP_PEAKS = 20  # whose mean says how strong the strongest are; one alone would be chance
TOP_ROUND_PEAKS = 10  # of which there are fewer

PART_SCALE = 0.7  # of the blurred copies that components are cut out of
YELLOW_SCALE = 1.0  # the yellow plane is noisier
PART_LEVELS = (1.5, 2.5)  # contrast at which they are cut out, in spreads
LEAST_AREA = 3  # pixels of a component; fewer are noise
AREAS = (8, 25)  # pixels that part tiny (microaneurysms) from small, and small from large ones
ELONGATED = 2.2  # ratio of the axes from which a component is a vessel's
LEAST_FILL = 0.7  # of its ellipse; what fills less is branched or bent, as vessels are
TOP_PARTS = 5  # whose mean contrast says how strong the strongest are
FINE, COARSE = 1.0, 4.0  # scales that most lesions lie between

# Shares of the full scale, as JPEG leaves what is overexposed or dark.
FULL_RED = 0.98
FULL_GREEN = 0.9
EMPTY_GREEN = 0.1

COLOR_STATISTICS = ("mean", "std", "skewness", "p5", "p95")
BAND_STATISTICS = ("rms", "p0.1", "p1", "p99", "p99.9")
BLOB_STATISTICS = (
    "p99",
    "p99.9",
    "top",
    "round top",
    *(f"count>{level}" for level in BLOB_LEVELS),
    *(f"round count>{level}" for level in BLOB_LEVELS),
    "central round count",
)
LINE_STATISTICS = ("p50", "p90", "p99")
PART_KINDS = ("dark", "bright", "yellow")
PART_STATISTICS = (
    "tiny count",
    "small count",
    "large count",
    "long count",
    "compact area",
    "long area",
    "compact share",
    "contrast",
    "largest area",
)
SECTOR_PLANES = ("green", "red-green", "dark", "bright")
QUALITY = (
    "fundus share",
    "red full",
    "green full",
    "green empty",
    *(f"{plane} spread" for plane in PLANES),
)


def handmade_features(picture: np.ndarray) -> np.ndarray:
    """Return the statistics of a prepared picture, uint8 RGB (256, 256, 3): float32 (F,).

    FEATURE_NAMES names them. They are finite for any picture, and the same picture gives the same
    numbers. Raises ValueError for another shape or type.
    """
    if picture.shape != (SIDE, SIDE, 3) or picture.dtype != np.uint8:
        raise ValueError(f"expected uint8 ({SIDE}, {SIDE}, 3), got {picture.dtype} {picture.shape}")
    retina = measure_retina(picture)
    features = []
    for group in GROUPS:
        values = np.asarray(group.measure(retina), np.float32)
        features.append(values.ravel())
    return np.concatenate(features)


# ------------------------------------------------------------------------------------------ helpers
def _curvatures(retina: Retina) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Give the weaker and the stronger curvature (H, W): by plane, by scale, dark before bright.

    They are positive where what is dark, or bright, bulges.
    """
    for plane in range(len(BLOOD_PLANES)):
        for scale in range(len(BLOB_SCALES)):
            lower = retina.lower[plane, scale]
            higher = retina.higher[plane, scale]
            yield lower, higher
            yield -higher, -lower


def _peaks(response: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the places in a mask (H, W) of peaks: positive, and no neighbour of the 8 higher."""
    is_peak = mask & (response > 0)
    edged = np.pad(response, 1)
    for down, right in product(range(3), range(3)):
        is_peak &= response >= edged[down : down + SIDE, right : right + SIDE]
    return np.flatnonzero(is_peak)


def _log(values: np.ndarray | float) -> np.ndarray:
    """Return logarithms of amounts of contrast; those below LOG_FLOOR differ little."""
    return np.log(np.maximum(values, 0) + LOG_FLOOR)


def _quantiles(ordered: np.ndarray, shares: tuple[float, ...]) -> np.ndarray:
    """Return the values at shares of an ordered array; sorting once is faster than a percentile."""
    ranks = np.round(np.array(shares) * (len(ordered) - 1))
    return ordered[ranks.astype(int)]


def _mean_of_largest(values: np.ndarray, count: int) -> float:
    """Return the mean of the `count` largest values; 0 if there are none."""
    if len(values) == 0:
        return 0.0
    return float(np.sort(values)[-count:].mean())


# ------------------------------------------------------------------------------------------- groups
def color_moments(retina: Retina) -> list[list[float]]:
    """Return the distribution of each colour: (COLORS, COLOR_STATISTICS)."""
    table = []
    for plane in retina.color:
        values = np.sort(plane.take(retina.inside))
        deviation = values.std()
        # A plain colour has no skewness; the arctangent bounds that of a spot on it.
        standard = (values - values.mean()) / (deviation + 0.01)
        skewness = np.arctan((standard * standard * standard).mean())
        low, high = _quantiles(values, (0.05, 0.95))
        table.append([values.mean(), deviation, skewness, low, high])
    return table


def ring_colors(retina: Retina) -> list[np.ndarray]:
    """Return how each ring's mean colour differs from the whole: (COLORS, RINGS)."""
    rings = retina.ring.take(retina.places)
    count = np.bincount(rings, minlength=len(RINGS))
    table = []
    for plane in retina.color:
        values = plane.take(retina.places)
        means = np.bincount(rings, values, minlength=len(RINGS)) / np.maximum(count, 1)
        table.append(np.where(count >= LEAST_PIXELS, means - values.mean(), 0))
    return table


def band_energies(retina: Retina) -> list[np.ndarray]:
    """Return the energy and the extremes of band-passes: (PLANES, BANDS, BAND_STATISTICS).

    A band is what one blurred copy shows and the next does not. Low percentiles are of what is
    dark; all are amounts.
    """
    table = []
    for copies in retina.blurred:
        for finer, coarser in pairwise(copies):
            band = np.sort((finer - coarser).take(retina.places))
            energy = np.sqrt((band * band).mean())
            lowest, low, high, highest = _quantiles(band, (0.001, 0.01, 0.99, 0.999))
            table.append(_log(np.array([energy, -lowest, -low, high, highest])))
    return table


def blob_responses(retina: Retina) -> list[list[float]]:
    """Return the strength and number of blobs: (BLOOD_PLANES, BLOB_SCALES, SIGNS, BLOB_STATISTICS).

    A blob curves in both directions, so the weaker curvature is its response.
    """
    table = []
    for blob, edge in _curvatures(retina):
        ordered = np.sort(blob.take(retina.places))
        peaks = _peaks(blob, retina.off_disc)
        heights = blob.take(peaks)
        is_round = heights > ROUND * edge.take(peaks)
        round_heights = heights[is_round]
        central_heights = heights[is_round & (retina.ring.take(peaks) == 0)]

        row = [*_log(_quantiles(ordered, (0.99, 0.999)))]
        row.append(_log(_mean_of_largest(heights, TOP_PEAKS)))
        row.append(_log(_mean_of_largest(round_heights, TOP_ROUND_PEAKS)))
        row += [np.log1p((heights > level).sum()) for level in BLOB_LEVELS]
        row += [np.log1p((round_heights > level).sum()) for level in BLOB_LEVELS]
        row.append(np.log1p((central_heights > BLOB_LEVELS[1]).sum()))
        table.append(row)
    return table


def line_responses(retina: Retina) -> list[np.ndarray]:
    """Return the strength of lines: (BLOOD_PLANES, BLOB_SCALES, SIGNS, LINE_STATISTICS).

    A line, such as a vessel, curves across and not along: its response is the difference.
    """
    table = []
    for blob, edge in _curvatures(retina):
        line = np.sort((edge - np.maximum(blob, 0)).take(retina.places))
        table.append(_log(_quantiles(line, (0.5, 0.9, 0.99))))
    return table


def components(retina: Retina) -> list[list[float]]:
    """Return what connected dark, bright and yellow spots are like: (.., PART_STATISTICS).

    The first axes are PART_KINDS and PART_LEVELS. Compact ones are tiny, small or large (lesions),
    the others long (vessels).
    """
    green = retina.contrast("green", PART_SCALE)
    yellow = retina.contrast("yellow", YELLOW_SCALE)
    table = []
    for plane in (-green, green, yellow):
        for level in PART_LEVELS:
            parts = find_components(plane, retina.off_disc, level)
            table.append(_describe(parts))
    return table


class Components(NamedTuple):
    """Connected regions above a level; row i of all belongs to one region."""

    area: np.ndarray  # int (C,), pixels
    contrast: np.ndarray  # (C,), mean over the region
    compact: np.ndarray  # bool (C,)


def find_components(plane: np.ndarray, mask: np.ndarray, level: float) -> Components:
    """Return the 8-connected regions of a plane above a level, in a mask, both (H, W).

    A region is compact if the ellipse of its second moments is round and filled.
    """
    from scipy import ndimage

    numbers, count = ndimage.label((plane > level) & mask, structure=np.ones((3, 3)))
    rows, columns = np.nonzero(numbers)
    region = numbers[rows, columns] - 1

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(region, values, minlength=count) / area

    area = np.bincount(region, minlength=count)
    y = rows - mean(rows)[region]
    x = columns - mean(columns)[region]
    # A pixel has an extent of its own: a twelfth is the variance over its side.
    yy = mean(y * y) + 1 / 12
    xx = mean(x * x) + 1 / 12
    xy = mean(x * y)
    root = np.sqrt(((xx - yy) / 2) ** 2 + xy * xy)
    longer = np.sqrt((xx + yy) / 2 + root)  # half of the ellipse's half axis
    shorter = np.sqrt(np.maximum((xx + yy) / 2 - root, 1 / 12))
    fill = area / (4 * np.pi * longer * shorter)
    compact = (longer < ELONGATED * shorter) & (fill > LEAST_FILL)
    return Components(area, mean(plane[rows, columns]), compact)


def _describe(parts: Components) -> list[float]:
    """Return PART_STATISTICS of components."""
    counted = parts.area >= LEAST_AREA
    compact = parts.area[counted & parts.compact]
    long = parts.area[counted & ~parts.compact]
    contrasts = parts.contrast[counted & parts.compact]
    size = np.digitize(compact, AREAS)
    tiny, small, large = np.bincount(size, minlength=3)
    # The area that is added keeps a few pixels alone from being a large share.
    share = compact.sum() / (compact.sum() + long.sum() + AREAS[1])
    return [
        np.log1p(tiny),
        np.log1p(small),
        np.log1p(large),
        np.log1p(len(long)),
        np.log1p(compact.sum()),
        np.log1p(long.sum()),
        share,
        np.log1p(_mean_of_largest(contrasts, TOP_PARTS)),
        np.log1p(compact.max(initial=0)),
    ]


def sector_contrasts(retina: Retina) -> list[list[float]]:
    """Return how much the sectors differ: (SECTOR_PLANES, deviation and range).

    Lesions come in clusters, and half-shadows make a photograph hard to grade.
    """
    sectors = retina.sector.take(retina.places)
    counts = np.bincount(sectors, minlength=SECTORS)
    is_large = counts >= LEAST_PIXELS
    band = retina.contrast("green", FINE) - retina.contrast("green", COARSE)
    band = band.take(retina.places)

    def means(values: np.ndarray) -> np.ndarray:
        return np.bincount(sectors, values, minlength=SECTORS)[is_large] / counts[is_large]

    table = []
    for values in (
        means(retina.color[COLORS.index("green")].take(retina.places)),
        means(retina.color[COLORS.index("red-green")].take(retina.places)),
        _log(np.sqrt(means(np.minimum(band, 0) ** 2))),
        _log(np.sqrt(means(np.maximum(band, 0) ** 2))),
    ):
        if len(values) == 0:
            table.append([0.0, 0.0])
        else:
            table.append([values.std(), np.ptp(values)])
    return table


def photograph_quality(retina: Retina) -> list[float]:
    """Return what says how well the retina is seen: (QUALITY,).

    The shares of pixels that are full or empty, as square roots, since most are near 0.
    """
    red = retina.color[0].take(retina.inside)
    green = retina.color[1].take(retina.inside)
    spreads = [np.log(plane.take(retina.places)).mean() for plane in retina.spread]
    return [
        retina.fundus_share,
        np.sqrt((red > FULL_RED).mean()),
        np.sqrt((green > FULL_GREEN).mean()),
        np.sqrt((green < EMPTY_GREEN).mean()),
        *spreads,
    ]


# ---------------------------------------------------------------------------------------- the table
@dataclass(frozen=True)
class Group:
    """Statistics that are measured together."""

    name: str
    measure: Callable[[Retina], Any]  # an array with the shape of the axes, or what gives one
    axes: tuple[tuple[Any, ...], ...]  # what each axis goes over, in words or numbers
    sees: str  # in words


GROUPS = (
    Group("color", color_moments, (COLORS, COLOR_STATISTICS), "pigment, light, a cloudy lens"),
    Group("ring color", ring_colors, (COLORS, RINGS), "the macula's tint, the light's fall-off"),
    Group("band", band_energies, (PLANES, BANDS, BAND_STATISTICS), "texture of every size"),
    Group(
        "blob",
        blob_responses,
        (BLOOD_PLANES, BLOB_SCALES, SIGNS, BLOB_STATISTICS),
        "microaneurysms, haemorrhages, exudates, cotton wool",
    ),
    Group(
        "line",
        line_responses,
        (BLOOD_PLANES, BLOB_SCALES, SIGNS, LINE_STATISTICS),
        "vessels, and how sharp they are",
    ),
    Group("part", components, (PART_KINDS, PART_LEVELS, PART_STATISTICS), "lesions, one by one"),
    Group(
        "sector",
        sector_contrasts,
        (SECTOR_PLANES, ("deviation", "range")),
        "clusters of lesions, half-shadows",
    ),
    Group("quality", photograph_quality, (QUALITY,), "exposure, haze and blur"),
)


def _name_features() -> tuple[str, ...]:
    """Return a name for each feature: its group and its place on each axis."""
    names = []
    for group in GROUPS:
        for place in product(*group.axes):
            names.append(" ".join([group.name, *map(str, place)]))
    return tuple(names)


FEATURE_NAMES = _name_features()
