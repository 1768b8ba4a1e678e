"""Does attention lie on lesions? Lift, pointing game and average precision against a turned null.

Only attention inside the fundus counts, scaled to 1 there. Each measure is also taken with the
lesions turned about the fundus' middle, which stands for turning the map the other way: distances
from the middle and the map's shape are kept, and only where they meet is left to chance.

Shapes: S the picture's side in pixels, h w the grid of patches and P = h w, M maps (the mean over
heads first, then each head), T turns, N photographs, R draws.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fundus.draws import draw_patients
from fundus.lesions import Lesions, widen

MEASURES = ("lift", "pointing", "ap")

# Of a patch's pixels, how many must be covered for it to hold a lesion, or to belong to the fundus.
LESION_SHARE = 0.01
FUNDUS_SHARE = 0.5

TURNS = 180  # two degrees apart; the first one is none
LEAST_KEPT = 0.95  # of a turned mask; a turn that takes more of it out of the fundus does not count


@dataclass(frozen=True)
class Patches:
    """The patches of a picture, and which part of each is fundus."""

    size: int  # the picture's side in pixels
    patch: int  # the patch's
    inside: np.ndarray  # bool (S, S), the fundus
    pixels: np.ndarray  # float64 (P,), pixels of the fundus in each patch
    counted: np.ndarray  # bool (P,), the patches that are fundus enough to be told apart

    @property
    def grid(self) -> int:
        """Patches in a row, the last one padded."""
        return math.ceil(self.size / self.patch)


@dataclass(frozen=True)
class Scores:
    """The measures of one class in one photograph."""

    share: float  # of the fundus that the lesions cover
    wide_share: float  # the same of the widened ones
    values: dict[str, np.ndarray]  # by measure, float64 (M, T), NaN where undefined
    kept: np.ndarray  # bool (T,), the turns that count

    def observed(self, measure: str) -> np.ndarray:
        """Return the values (M,) of lesions that were not turned."""
        return self.values[measure][:, 0]


# ------------------------------------------------------------------------------------- on the grid
def cut_patches(inside: np.ndarray, patch: int) -> Patches:
    """Return the patches of a picture whose fundus is `inside`, bool (S, S)."""
    pixels = pool(inside, patch)
    counted = pixels >= FUNDUS_SHARE * patch**2
    return Patches(inside.shape[0], patch, inside, pixels, counted)


def pool(values: np.ndarray, patch: int) -> np.ndarray:
    """Return the sum of values (S, S) over each patch, row by row: float64 (P,)."""
    padding = -values.shape[0] % patch
    padded = np.pad(values.astype(np.float64), ((0, padding), (0, padding)))
    grid = padded.shape[0] // patch
    return padded.reshape(grid, patch, grid, patch).sum(axis=(1, 3)).ravel()


def holds_lesion(share: np.ndarray, patch: int) -> np.ndarray:
    """Return which patches hold a lesion, bool (P,): LESION_SHARE of their pixels or more."""
    return pool(share, patch) >= LESION_SHARE * patch**2


def densities(attention: np.ndarray, patches: Patches) -> np.ndarray:
    """Return the attention on a pixel of each patch, (M, P), which sums to 1 inside the fundus.

    `attention` is (H, h, w). The mean over heads comes first, of heads that are scaled so.
    """
    heads = attention.reshape(len(attention), -1).astype(np.float64)
    total = heads @ patches.pixels
    heads = heads / np.maximum(total, 1e-300)[:, None]
    return np.concatenate([heads.mean(axis=0, keepdims=True), heads])


# ------------------------------------------------------------------------------------------- turns
def turned(weights: np.ndarray, patches: Patches) -> Iterator[np.ndarray]:
    """Give the sum of a mask's weights (S, S) over each patch (P,), turn after turn.

    The mask's places are turned, not its pixels resampled: what falls on the fundus keeps its
    weight, and the rest is lost. For speed cells of a quarter of a patch are turned as one.
    """
    cell = _cell(patches.patch)
    sums = pool(weights, cell)  # row by row
    cells = math.ceil(patches.size / cell)
    rows, columns = np.divmod(np.flatnonzero(sums), cells)
    sums = sums[sums > 0]
    middle = patches.size / 2
    x = (columns + 0.5) * cell - middle
    y = (rows + 0.5) * cell - middle

    yield pool(weights, patches.patch)
    for angle in turn_angles()[1:]:
        new_x = np.floor(x * np.cos(angle) - y * np.sin(angle) + middle).astype(int)
        new_y = np.floor(x * np.sin(angle) + y * np.cos(angle) + middle).astype(int)
        hit = _look_up(patches.inside, new_x, new_y)
        place = new_y[hit] // patches.patch * patches.grid + new_x[hit] // patches.patch
        yield np.bincount(place, sums[hit], minlength=patches.grid**2)


def turn_angles() -> np.ndarray:
    """Return the angles of all turns, (T,), in radians."""
    return np.arange(TURNS) * (2 * np.pi / TURNS)


def _cell(patch: int) -> int:
    """Return the largest divisor of a patch's side that is at most a quarter of it."""
    for cell in range(max(1, patch // 4), 1, -1):
        if patch % cell == 0:
            return cell
    return 1


def _look_up(mask: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return a bool mask (S, S) at whole places, False outside of it."""
    side = mask.shape[0]
    is_there = (x >= 0) & (x < side) & (y >= 0) & (y < side)
    found = np.zeros(x.shape, dtype=bool)
    found[is_there] = mask[y[is_there], x[is_there]]
    return found


# ---------------------------------------------------------------------------------------- measures
def score_photograph(
    attention: np.ndarray, lesions: Lesions, patch: int, radius: float
) -> dict[str, Scores]:
    """Return the scores of each class in one photograph, whose attention is (H, h, w).

    `radius` in pixels is by how much lesions are widened for lift and pointing game.
    """
    patches = cut_patches(lesions.inside, patch)
    density = densities(attention, patches)
    fundus = lesions.inside.sum()
    scores = {}
    for lesion, share in lesions.shares.items():
        wide = widen(share, radius) & lesions.inside
        covered = np.stack(list(turned(wide, patches)))  # (T, P)
        held = np.stack(list(turned(share, patches))) >= LESION_SHARE * patch**2
        values = {
            "lift": lifts(density, covered, patches),
            "pointing": pointing(density, wide, patches),
            "ap": map_precisions(density, held, patches),
        }
        kept = covered.sum(axis=1) >= LEAST_KEPT * wide.sum()
        scores[lesion] = Scores(
            float(share.sum() / fundus), float(wide.sum() / fundus), values, kept
        )
    return scores


def lifts(density: np.ndarray, covered: np.ndarray, patches: Patches) -> np.ndarray:
    """Return the share of attention on the lesions over their share of the fundus, (M, T).

    `density` is (M, P), `covered` (T, P) the pixels of lesions in each patch. 1 is what attention
    that is the same everywhere gives; NaN where a turn leaves no lesion.
    """
    area = covered.sum(axis=1) / patches.pixels.sum()
    with np.errstate(invalid="ignore"):
        return (density @ covered.T) / area


def pointing(density: np.ndarray, wide: np.ndarray, patches: Patches) -> np.ndarray:
    """Return whether each map's maximum lies on a lesion, (M, T): 1 or 0, of equal ones the mean.

    The pointing game of arXiv 1608.00507, with `wide`, bool (S, S), for its tolerance. The maximum
    is the middle of the strongest patch among those that are counted.
    """
    middle = patches.size / 2
    angles = -turn_angles()[:, None]  # the point turns the other way
    hits = np.full((len(density), TURNS), np.nan)
    for number, values in enumerate(density):
        allowed = np.where(patches.counted, values, -np.inf)
        strongest = np.flatnonzero(patches.counted & (allowed == allowed.max()))
        if not len(strongest):
            continue
        rows, columns = np.divmod(strongest, patches.grid)
        x = (columns + 0.5) * patches.patch - middle
        y = (rows + 0.5) * patches.patch - middle
        new_x = np.floor(x * np.cos(angles) - y * np.sin(angles) + middle).astype(int)
        new_y = np.floor(x * np.sin(angles) + y * np.cos(angles) + middle).astype(int)
        hits[number] = _look_up(wide, new_x, new_y).mean(axis=1)
    return hits


def map_precisions(density: np.ndarray, held: np.ndarray, patches: Patches) -> np.ndarray:
    """Return each map's average precision for the patches that hold a lesion, (M, T).

    `held` is bool (T, P). Patches that are not counted take no part; NaN without a lesion.
    """
    truth = held[:, patches.counted]
    precisions = []
    for values in density:
        precisions.append(average_precisions(values[patches.counted], truth))
    return np.stack(precisions)


def average_precisions(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return the average precision (T,) of scores (P,) for each row of bool truth (T, P).

    As scikit-learn defines it: equal scores count as one step. NaN for rows
    without any True.
    """
    order = np.argsort(-scores, kind="stable")
    descending = -scores[order]
    # How many scores are as high as each one, or higher.
    counts = np.searchsorted(descending, descending, side="right")
    found = truth[:, order]
    hits = np.cumsum(found, axis=1)
    if hits.shape[1] == 0:
        return np.full(len(truth), np.nan)
    precision = hits[:, counts - 1] / counts
    with np.errstate(invalid="ignore"):
        return (precision * found).sum(axis=1) / hits[:, -1]


# ------------------------------------------------------------------------------- over photographs
def summarize(
    scores: Sequence[Scores], patients: np.ndarray, draws: int, seed: int
) -> dict[str, Any]:
    """Return what lesions.json says of one class, from its scores in N photographs.

    For each measure: the mean over photographs with its interval, the null's mean and middle 95 %,
    and p, the chance that the null is as high; of the mean over heads, and of each head.
    """
    shares = [score.share for score in scores]
    wide_shares = [score.wide_share for score in scores]
    summary: dict[str, Any] = {
        "photographs": len(scores),
        "patients": len(set(patients.tolist())),
        "fundus_share": float(np.mean(shares)),
        "widened_share": float(np.mean(wide_shares)),
    }
    picked = _pick_turns(scores, draws, seed)
    for measure in MEASURES:
        observed = np.stack([score.observed(measure) for score in scores])  # (N, M)
        null = _null(scores, measure, picked)  # (R, M)
        intervals = mean_intervals(observed, patients, draws, seed)
        entries = []
        for number in range(observed.shape[1]):
            of_map = observed[:, number]
            entries.append(_entry(of_map, intervals[number], null[:, number]))
        summary[measure] = {"mean": entries[0], "heads": entries[1:]}
    return summary


def _pick_turns(scores: Sequence[Scores], draws: int, seed: int) -> np.ndarray:
    """Return a turn for each photograph in each draw, int (R, N), each allowed one as likely."""
    rng = np.random.default_rng((seed, 1))
    picked = np.zeros((draws, len(scores)), int)
    for number, score in enumerate(scores):
        picked[:, number] = rng.choice(np.flatnonzero(score.kept), draws)
    return picked


def _null(scores: Sequence[Scores], measure: str, picked: np.ndarray) -> np.ndarray:
    """Return the mean over photographs in each draw, (R, M), of those whose own is defined."""
    maps = len(scores[0].values[measure])
    total = np.zeros((len(picked), maps))
    count = np.zeros((len(picked), maps))
    for number, score in enumerate(scores):
        values = score.values[measure][:, picked[:, number]].T  # (R, M)
        is_defined = ~np.isnan(values) & ~np.isnan(score.observed(measure))
        total += np.where(is_defined, values, 0)
        count += is_defined
    with np.errstate(invalid="ignore"):
        return total / count


def mean_intervals(
    values: np.ndarray, patients: np.ndarray, draws: int, seed: int
) -> list[list[float] | None]:
    """Return the 95 % interval of each column's mean, (N, M) -> M, by bootstrap over patients.

    NaN are left out, and None where a column has no other value.
    """
    drawn = draw_patients(patients, draws, seed)
    is_defined = ~np.isnan(values)
    filled = np.where(is_defined, values, 0)
    weights = drawn.counts[:, drawn.patient_of_image].astype(np.float64)  # (R, N)
    with np.errstate(invalid="ignore"):
        means = (weights @ filled) / (weights @ is_defined)

    intervals: list[list[float] | None] = []
    for column in means.T:
        defined = column[~np.isnan(column)]
        interval = None
        if len(defined):
            low, high = np.percentile(defined, [2.5, 97.5])
            interval = [float(low), float(high)]
        intervals.append(interval)
    return intervals


def _entry(observed: np.ndarray, interval: list[float] | None, null: np.ndarray) -> dict[str, Any]:
    """Return what is said of one map: observed (N,) against its null (R,)."""
    defined = observed[~np.isnan(observed)]
    null = null[~np.isnan(null)]
    if not len(defined) or not len(null):
        return {"value": None, "reason": "no lesion is large enough to make a patch one of lesions"}
    value = float(defined.mean())
    low, high = np.percentile(null, [2.5, 97.5])
    # Values that are equal but for rounding are as high.
    reached = int((null >= value - 1e-9 * abs(value)).sum())
    return {
        "value": value,
        "photographs": len(defined),
        "ci95": interval,
        "null": {"mean": float(null.mean()), "ci95": [float(low), float(high)]},
        "p": (1 + reached) / (1 + len(null)),
    }
