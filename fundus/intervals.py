"""95 % intervals over patients: of each metric, and of the difference of two evaluations.

A patient's two eyes are correlated, so patients are drawn and counted, not images. The methods are
those that cover: benchmarks/check_coverage.py draws test sets whose truth is known and writes how
often each interval holds it to benchmarks/results/coverage.json.
- Shares of images (accuracy, recalls, sensitivity, specificity): Wilson's interval on the effective
  number of images. The bootstrap fails where none or few are hits: draws have none either.
- Differences of such shares: Agresti and Min's interval for matched pairs, over patients.
- Means of losses (log-loss, Brier score): the bootstrap-t, which follows their skewness.
- All else: percentiles of 1,000 draws of patients, expanded for small groups. A metric that weighs
  grades alike is as uncertain as its rarest grade, however many patients the others have.
Thresholds of operating points come from validation and are held fixed: the interval is that of the
chosen threshold.
Shapes: N images, P patients, R draws of the bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fundus.draws import Draws, draw_patients
from fundus.predictions import Predictions
from fundus.scores import METRICS, Entries, Metric, OperatingPoint, Rate, bootstrap, point_values

FEWEST = 10  # patients that an interval takes, of each group that the metric stands on
Z = 1.959963984540054  # standard deviations of the normal distribution that 95 % lie within
AnyMetric = Metric | OperatingPoint


# -------------------------------------------------------------------------------- of one evaluation
def evaluate(
    predictions: Predictions,
    validation: Predictions | None = None,
    metrics: tuple[AnyMetric, ...] = METRICS,
    draws: int = 1000,
    seed: int = 0,
) -> Entries:
    """Return {name: {value, ci95: [low, high]}} of metrics; see point_values for the values.

    Where ci95 is None though there is a value, `no_interval` says why. `undefined_draws` counts the
    draws in which the metric had no value, where there are any.
    """
    entries = point_values(predictions, validation, metrics)
    drawn = draw_patients(predictions.patients, draws, seed)
    resampled = []  # what takes the bootstrap
    for metric in metrics:
        entry = entries[metric.name]
        entry["ci95"] = None
        if entry["value"] is None:
            continue
        reason = why_no_interval(metric, predictions)
        if reason:
            entry["no_interval"] = reason
            continue
        rate = metric.rate(predictions, entry)
        if rate is not None:
            entry["ci95"] = rate_interval(rate, drawn)
        elif metric.losses:
            entry["ci95"] = mean_interval(metric.losses(predictions), drawn)
        else:
            resampled.append(metric)

    samples = bootstrap(predictions, drawn, entries, tuple(resampled))
    for metric in resampled:
        patients = fewest_patients(metric, predictions)
        entries[metric.name] |= expanded_percentiles(samples[metric.name], patients)
    return entries


def why_no_interval(metric: AnyMetric, predictions: Predictions) -> str:
    """Return the reason that a metric which has a value gets no interval; "" where it gets one."""
    if metric.name == "ece":
        return "chance biases it upward, and resampling adds to that"
    few = []
    for name, count in _count_patients(metric, predictions).items():
        if count < FEWEST:
            few.append(f"{count} patient{'s' * (count != 1)}{name}")
    if few:
        return f"{', '.join(few)}; an interval takes {FEWEST}"
    return ""


def fewest_patients(metric: AnyMetric, predictions: Predictions) -> int:
    """Return the number of patients of the smallest group of images that a metric stands on."""
    return min(_count_patients(metric, predictions).values())


def _count_patients(metric: AnyMetric, predictions: Predictions) -> dict[str, int]:
    """Return the number of patients of each group that a metric stands on, and of all ("")."""
    total = len(np.unique(predictions.patients))
    if total < FEWEST:
        return {"": total}  # that says it all
    counts = {"": total}
    for name, images in metric.strata(predictions).items():
        counts[f" {name}"] = len(np.unique(predictions.patients[images]))
    return counts


# ---------------------------------------------------------------------------------- the two methods
def expanded_percentiles(samples: np.ndarray, patients: int) -> dict[str, Any]:
    """Return {ci95, undefined_draws} of a metric's draws (R,), NaN where undefined.

    Percentiles at the levels of Student's t with `patients` - 1 degrees of freedom in place of 2.5
    and 97.5 %, since those of the bootstrap are too narrow for few (Hesterberg 2015, The American
    Statistician 69:371, "expanded percentile"; here without his factor sqrt(n / (n - 1)), as
    `patients` is the number of the smallest group alone). `undefined_draws` only where there are.
    """
    from scipy import stats

    defined = samples[~np.isnan(samples)]
    tail = 100 * stats.norm.cdf(stats.t.ppf(0.025, patients - 1))
    found: dict[str, Any] = {"ci95": np.percentile(defined, [tail, 100 - tail]).tolist()}
    if len(defined) < len(samples):
        found["undefined_draws"] = len(samples) - len(defined)
    return found


def mean_interval(losses: np.ndarray, draws: Draws) -> list[float]:
    """Return the 95 % bootstrap-t interval of the mean of losses (N,).

    Each draw's error counts in its own standard errors, so that the interval reaches farther to
    where a few large losses may be missing (Efron and Tibshirani 1993, chapter 12.5).
    """
    totals, images = draws.patient_sums(np.stack([losses, np.ones(len(losses))], axis=1)).T
    columns = np.stack([totals, images, totals**2, totals * images, images**2], axis=1)
    mean, error = _mean_and_error(columns.sum(axis=0))
    means, errors = _mean_and_error(draws.weigh_patients(columns))
    is_sure = errors <= 1e-12 * np.abs(means)  # as where all losses are the same
    if is_sure.all():
        return [float(mean), float(mean)]
    low, high = np.percentile((means - mean)[~is_sure] / errors[~is_sure], [2.5, 97.5])
    return [float(mean - high * error), float(mean - low * error)]


def _mean_and_error(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a ratio of totals and its standard error, of sums (..., 5) over patients.

    The sums are of total, images, total^2, total * images and images^2; the error is linearised.
    """
    total, images, squares, products, image_squares = np.moveaxis(sums, -1, 0)
    mean = total / images
    residual = squares - 2 * mean * products + mean**2 * image_squares
    return mean, np.sqrt(np.maximum(residual, 0)) / images


def rate_interval(rate: Rate, draws: Draws) -> list[float]:
    """Return Wilson's 95 % interval of a share of images, on their effective number.

    Korn and Graubard 1998, Survey Methodology 24:193, with Wilson's interval in the place of
    Clopper and Pearson's.
    """
    hits, among = rate
    table = _by_patient(np.stack([hits & among, among], axis=1), draws)
    found, images = table.T
    share = found.sum() / images.sum()
    return list(wilson(share, effective_number(found, images)))


def wilson(share: float, number: float) -> tuple[float, float]:
    """Return Wilson's 95 % score interval of a share of `number` trials, within 0 to 1.

    Wilson 1927, Journal of the American Statistical Association 22:209.
    """
    middle = share + Z**2 / (2 * number)
    half = Z * math.sqrt(share * (1 - share) / number + Z**2 / (4 * number**2))
    scale = 1 + Z**2 / number
    # At 0 and 1 the bound is the share itself, but for rounding.
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def effective_number(found: np.ndarray, images: np.ndarray) -> float:
    """Return how many independent images would tell a share as well as patients (P,) do.

    `found` are each patient's hits, among `images`. p (1 - p) / variance, with the variance of the
    ratio of sums over patients (Kish 1965, Survey Sampling, section 6.3); at most the images there
    are. Where all or none are hits no variance can be seen, and a patient counts once.
    """
    patients = len(images)
    share = found.sum() / images.sum()
    if share in (0, 1):
        return patients
    squares = ((found - share * images) ** 2).sum()
    variance = squares * patients / (patients - 1) / images.sum() ** 2
    return min(images.sum(), share * (1 - share) / max(variance, 1e-12))


def _by_patient(columns: np.ndarray, draws: Draws) -> np.ndarray:
    """Return the sums of columns (N, C) over each patient's images, without patients of none.

    The last column counts the images in question.
    """
    sums = draws.patient_sums(columns.astype(np.float64))
    return sums[sums[:, -1] > 0]


# ----------------------------------------------------------------------------- of two evaluations
def paired_difference(
    a: Sequence[Predictions],
    b: Sequence[Predictions],
    validation_a: Sequence[Predictions] | None = None,
    validation_b: Sequence[Predictions] | None = None,
    metrics: tuple[AnyMetric, ...] = METRICS,
    draws: int = 1000,
    seed: int = 0,
) -> Entries:
    """Return {name: {value, ci95, a, b, seeds, spread}}: by how much `a` exceeds `b`.

    Both are the predictions of one or more seeds for the same images in the same order, which the
    caller sees to. `value` is the mean over seeds of a's metric less that of b's, and the interval
    that of this mean over patients, drawn alike for all; seeds are not drawn. `a` and `b` hold each
    seed's metric; `seeds` their differences and `spread` (from two seeds on) the standard deviation
    of those, both only where there are as many of one as of the other. Reasons as in evaluate.
    """
    drawn = draw_patients(a[0].patients, draws, seed)
    sides = [_evaluate_seeds(a, validation_a, metrics), _evaluate_seeds(b, validation_b, metrics)]
    entries: Entries = {}
    resampled = []
    for metric in metrics:
        entry = _difference(metric.name, sides)
        entries[metric.name] = entry
        if entry["value"] is None:
            continue
        reason = why_no_interval(metric, a[0])
        if reason:
            entry["no_interval"] = reason
        elif metric.rate(a[0], sides[0][0][metric.name]) is None:
            resampled.append(metric)
        else:
            rates = [_rates(metric, a, sides[0]), _rates(metric, b, sides[1])]
            entry["ci95"] = difference_interval(rates[0], rates[1], drawn)

    means = []
    for side, values in zip((a, b), sides, strict=True):
        means.append(_mean_samples(side, values, drawn, tuple(resampled)))
    for metric in resampled:
        samples = means[0][metric.name] - means[1][metric.name]
        entries[metric.name] |= expanded_percentiles(samples, fewest_patients(metric, a[0]))
    return entries


def _evaluate_seeds(
    side: Sequence[Predictions],
    validation: Sequence[Predictions] | None,
    metrics: tuple[AnyMetric, ...],
) -> list[Entries]:
    """Return the point values of each seed, each with its own validation."""
    held: Sequence[Predictions | None] = validation or [None] * len(side)
    return [point_values(one, own, metrics) for one, own in zip(side, held, strict=True)]


def _difference(name: str, sides: list[list[Entries]]) -> dict[str, Any]:
    """Return {value, ci95: None, a, b, ...} of one metric, or why one of the seeds lacks it."""
    for entries in (*sides[0], *sides[1]):
        if entries[name]["value"] is None:
            return {"value": None, "ci95": None, "reason": entries[name]["reason"]}
    a = [entries[name]["value"] for entries in sides[0]]
    b = [entries[name]["value"] for entries in sides[1]]
    found: dict[str, Any] = {"value": float(np.mean(a) - np.mean(b)), "ci95": None, "a": a, "b": b}
    if len(a) == len(b):
        found["seeds"] = np.subtract(a, b).tolist()
        if len(a) > 1:
            found["spread"] = float(np.std(found["seeds"], ddof=1))
    return found


def _rates(
    metric: AnyMetric, side: Sequence[Predictions], entries: list[Entries]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the share of seeds for which an image is a hit, (N,), and the images in question."""
    every = []
    for predictions, values in zip(side, entries, strict=True):
        hits, among = metric.rate(predictions, values[metric.name])
        every.append(hits & among)
    return np.mean(every, axis=0), among


def difference_interval(a: Rate, b: Rate, draws: Draws) -> list[float]:
    """Return the 95 % interval of the difference of two shares of the same images.

    Agresti and Min 2005, Statistics in Medicine 24:729: before the interval of the mean difference
    is taken, half a patient is added whose images all speak for `a`, half a one for `b`, and one
    for neither; so it has a width where no patient tells them apart. Over patients: the variance of
    the ratio of sums, as in effective_number. It errs to the wide side where hits are rare.
    """
    among = a[1]
    gain, images = _by_patient(np.stack([a[0] - b[0], among], axis=1), draws).T
    typical = images.mean()  # images of a patient that is added
    gain = np.r_[gain, typical, -typical, 0]
    images = np.r_[images, typical, typical, typical]
    weight = np.r_[np.ones(len(images) - 3), 0.5, 0.5, 1]
    patients = weight.sum()
    total = weight @ images
    mean = weight @ gain / total
    squares = weight @ (gain - mean * images) ** 2
    half = Z * math.sqrt(squares * patients / (patients - 1)) / total
    return [max(-1.0, mean - half), min(1.0, mean + half)]


def _mean_samples(
    side: Sequence[Predictions],
    entries: list[Entries],
    drawn: Draws,
    metrics: tuple[AnyMetric, ...],
) -> dict[str, np.ndarray]:
    """Return the mean over seeds of each metric in each draw, (R,)."""
    by_seed = []
    for predictions, values in zip(side, entries, strict=True):
        by_seed.append(bootstrap(predictions, drawn, values, metrics))
    means = {}
    for metric in metrics:
        means[metric.name] = np.mean([samples[metric.name] for samples in by_seed], axis=0)
    return means
