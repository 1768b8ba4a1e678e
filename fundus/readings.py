"""How the outputs of a probe are read: as calibrated probabilities, and as grades on a scale.

A probe is trained to tell grades apart as if they had no order. Two readings of its logits mend
what that costs; both are fitted on photographs that the probe has not learnt from.

- The temperature (Guo et al. 2017, arXiv 1706.04599) divides the logits. It makes probabilities
  honest and leaves the most probable grade as it is.
- The ordinal reading takes the expected grade, sum of g p_g, as a place on the scale 0 to G - 1 and
  cuts the scale at four thresholds, those with the highest quadratic weighted kappa (QWK).

Shapes: N images, M distinct expected grades, G grades.
"""

from __future__ import annotations

import numpy as np

from fundus.manifest import GRADES

LOG_TEMPERATURES = (np.log(0.01), np.log(100.0))  # where the temperature is sought
SCALE = (-0.5, GRADES - 0.5)  # ends of the scale of grades, as if grades were rounded to


# ------------------------------------------------------------------------------------ probabilities
def fit_temperature(logits: np.ndarray, grades: np.ndarray) -> float:
    """Return the temperature T, 0.01 to 100, with the least log-loss of softmax(logits / T).

    Guo et al. 2017, section 4.2. `logits` are (N, G), `grades` (N,) int. It is 1 where no
    temperature is better than that. Near an end of the range there is no best one: towards 0.01
    every photograph is right, towards 100 the logits are worse than none. Raises ValueError for
    logits that are not finite, for none, and for grades that have no column.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    logits = np.asarray(logits, np.float64)
    grades = np.asarray(grades)
    _check_grades(grades, len(logits), logits.shape[1])
    if not np.isfinite(logits).all():
        raise ValueError("logits: expected finite numbers")
    rows = np.arange(len(grades))

    def loss(log_temperature: float) -> float:
        # The loss is convex in 1 / T, hence has one valley in log T, which a search by sections
        # finds.
        scaled = logits / np.exp(log_temperature)
        return -float(log_softmax(scaled, axis=1)[rows, grades].mean())

    found = minimize_scalar(
        loss, bounds=LOG_TEMPERATURES, method="bounded", options={"xatol": 1e-8}
    )
    if loss(found.x) >= loss(0.0):
        return 1.0
    return float(np.exp(found.x))


def expected_grade(probabilities: np.ndarray) -> np.ndarray:
    """Return the mean of the grade under each row of `probabilities` (N, G), as (N,) float64."""
    probabilities = np.asarray(probabilities, np.float64)
    return probabilities @ np.arange(probabilities.shape[1])


# ---------------------------------------------------------------------------------- ordinal reading
def read_thresholds(expected: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Return the grade of each expected grade: how many thresholds it reaches, (N,) int."""
    reached = np.asarray(expected)[:, None] >= np.asarray(thresholds)  # (N, G - 1)
    return reached.sum(axis=1)


def fit_thresholds(expected: np.ndarray, grades: np.ndarray) -> np.ndarray:
    """Return the thresholds (G - 1,), increasing, whose reading of `expected` has the highest QWK.

    `expected` (N,) are grades on the scale, `grades` (N,) int the truth. The optimum is global and
    exact, see _best_cuts. A threshold lies midway between the two neighbouring values that it
    parts; of several equally good places it takes the middle one. Two thresholds may be equal: the
    grade between them is then never given. Where no reading has a QWK above 0, and where the truth
    is one grade, all are read as the grade nearest to the truth's mean. Raises ValueError for
    values that are not finite, for none, and for grades outside 0 to G - 1.
    """
    expected = np.asarray(expected, np.float64)
    grades = np.asarray(grades)
    _check_grades(grades, len(expected), GRADES)
    if not np.isfinite(expected).all():
        raise ValueError("expected grades: expected finite numbers")

    values, place = np.unique(expected, return_inverse=True)
    images = np.bincount(place)  # (M,)
    sums = np.bincount(place, weights=grades)  # (M,), whole numbers
    cuts = _best_cuts(_from_each_cut(images), _from_each_cut(sums), int(np.sum(grades**2)))

    # Cut m lies below value m. The outermost ones lie between the values and the scale's ends.
    low = min(SCALE[0], values[0])
    high = max(SCALE[1], np.nextafter(values[-1], np.inf))
    borders = np.concatenate([[low], values, [high]])
    # Rounding may put a midpoint onto the value below, which must not reach it.
    middles = np.maximum((borders[:-1] + borders[1:]) / 2, np.nextafter(borders[:-1], np.inf))
    middles[0] = min(middles[0], values[0])
    return np.sort(middles[cuts])


def _from_each_cut(amounts: np.ndarray) -> np.ndarray:
    """Return the sum of `amounts` (M,) from each cut upwards, (M + 1,); the last one is 0."""
    return np.concatenate([np.cumsum(amounts[::-1])[::-1], [0]])


def _best_cuts(above: np.ndarray, sums: np.ndarray, squares: int) -> np.ndarray:
    """Return the cut of each threshold, (G - 1,) int from 0 to M, that together maximise QWK.

    `above` (M + 1,) are the images from each cut upwards, `sums` (M + 1,) the sum of their grades,
    `squares` the sum of g^2 over all images.

    QWK is 1 - O / E: the squared errors observed, and those expected by chance. An image that
    reaches threshold i adds 1 to its reading p and 2 i - 1 to p^2. So with a_i images and a sum of
    grades s_i above threshold i, and the mean grade m of all N images,
        O = sum g^2         + sum_i of (2 i - 1) a_i - 2 s_i
        E = sum g^2         + sum_i of (2 i - 1) a_i - 2 m a_i.
    Both are sums over thresholds. For a ratio r, therefore, O - r E is least where each threshold
    on its own makes its term least; and the least O / E is found by putting the ratio reached in
    for r until it falls no more (Dinkelbach 1967, "On nonlinear fractional programming").
    Thresholds need not be held in order: as r <= 1, a higher one never wants a lower cut.
    """
    total = above[0]
    mean = sums[0] / total
    step = 2 * np.arange(1, GRADES)[:, None] - 1  # (G - 1, 1)
    observed = step * above - 2 * sums  # (G - 1, M + 1)
    chance = step * above - 2 * mean * above

    rows = np.arange(GRADES - 1)
    constant = np.where(rows < np.floor(mean + 0.5), 0, len(above) - 1)
    if squares * total == sums[0] ** 2:
        return constant  # the truth is one grade: QWK is 0 or undefined
    ratio = 1.0  # of QWK 0, which any constant reading has
    while True:
        cuts = _middle_of_least(observed - ratio * chance, tolerance=1e-9 * total)
        reached = (squares + observed[rows, cuts].sum()) / (squares + chance[rows, cuts].sum())
        if reached >= ratio - 1e-12:
            break
        ratio = reached
    if ratio == 1.0:
        return constant
    return cuts


def _middle_of_least(terms: np.ndarray, tolerance: float) -> np.ndarray:
    """Return the column of the least term of each row; the middle one of several."""
    columns = []
    for row in terms:
        least = np.flatnonzero(row <= row.min() + tolerance)
        columns.append(least[(len(least) - 1) // 2])
    return np.array(columns)


def _check_grades(grades: np.ndarray, count: int, columns: int) -> None:
    """Raise ValueError unless there are `count` grades, at least one, from 0 to `columns` - 1."""
    if grades.shape != (count,) or not count:
        raise ValueError(f"grades of shape {grades.shape} for {count} images: expected one each")
    if grades.min() < 0 or grades.max() >= columns:
        raise ValueError(f"grades {grades.min()} to {grades.max()}: expected 0 to {columns - 1}")
