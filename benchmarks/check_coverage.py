"""How often do the 95 % intervals of fundus/intervals.py hold the truth?

    python -m benchmarks.check_coverage

Test sets are drawn whose truth is known: patients with two correlated eyes, EyePACS' grades, and
the answers of two models whose errors are correlated, too. The truth is each metric's value on
400,000 patients; a thousand test sets of 100, 300 and 600 patients get intervals of the images, of
the patients, and of the difference of both models. For comparison, the plain percentile bootstrap
of the images.

The script writes benchmarks/results/coverage.json: for each metric the share of the intervals that
hold the truth, the share of test sets that have one, and the mean width. It fails where coverage is
below 93 or above 97 % by more than three standard errors of the simulation itself; differences of
recalls may be above.

Shapes: P patients, N = 2 P images, G grades.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from typing import Any

import numpy as np

from benchmarks import measure
from fundus.draws import draw_patients
from fundus.intervals import evaluate, paired_difference
from fundus.manifest import GRADES
from fundus.predictions import Predictions, patient_level
from fundus.scores import METRICS, PATIENT_METRICS, Entries, bootstrap, point_values

PREVALENCE = np.array([0.735, 0.070, 0.151, 0.025, 0.020])  # EyePACS' grades
SIZES = (100, 300, 600)  # patients
TRUTH = 400_000  # patients that the truth is told by
VALIDATION = 1_000  # patients that the thresholds are chosen on, the same for all test sets
FEWEST = 200  # intervals below which coverage is not judged
LOW, HIGH = 0.93, 0.97  # of coverage
OURS = ("images", "patients", "difference")
COLUMNS = ("method", "metric", "patients", "intervals", "coverage", "with an interval", "width")

# Standard deviation of a model's error about the severity of an eye, which has standard deviation
# 1: QWK is then 0.60 and 0.67.
NOISES = (0.7, 0.58)


# --------------------------------------------------------------------------------------- the model
def draw_eyes(patients: int, rng: np.random.Generator, between: float) -> np.ndarray:
    """Return numbers (N,) of standard deviation 1; two eyes of a patient correlate by `between`."""
    shared = rng.normal(size=(patients, 1))
    own = rng.normal(size=(patients, 2))
    return (math.sqrt(between) * shared + math.sqrt(1 - between) * own).ravel()


def draw_models(patients: int, rng: np.random.Generator) -> list[Predictions]:
    """Return what two models predict of the same photographs, two of each patient.

    Eyes have a severity whose quantiles are the grades. A model sees it with an error, answers with
    the posterior of the grades, sharper than it should be, and errs in each grade on its own.
    """
    from scipy.stats import norm

    cuts = norm.ppf(np.cumsum(PREVALENCE / PREVALENCE.sum())[:-1])
    severity = draw_eyes(patients, rng, between=0.75)
    grades = np.searchsorted(cuts, severity)
    names = np.repeat(np.arange(patients), 2)
    common = draw_eyes(patients, rng, between=0.5)
    models = []
    for noise in NOISES:
        error = math.sqrt(0.5) * common + math.sqrt(0.5) * draw_eyes(patients, rng, between=0.5)
        seen = severity + noise * error
        # Severity given what is seen is normal, too.
        mean = seen / (1 + noise**2)
        spread = noise / math.sqrt(1 + noise**2)
        below = norm.cdf((cuts - mean[:, None]) / spread)
        edges = np.c_[np.zeros(len(seen)), below, np.ones(len(seen))]
        logits = 1.3 * np.log(np.diff(edges, axis=1).clip(1e-6))
        logits += 0.8 * rng.normal(size=(len(seen), GRADES))
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        models.append(Predictions(grades, shares.argmax(axis=1), shares, names))
    return models


@cache
def validations() -> list[Predictions]:
    """Return both models' predictions of the validation set."""
    return draw_models(VALIDATION, np.random.default_rng(1))


def find_truth(patients: int = TRUTH) -> dict[str, dict[str, float]]:
    """Return each metric's true value by kind: of images, of patients, of the difference."""
    held = validations()
    values = []
    models = draw_models(patients, np.random.default_rng(2))
    for predictions, validation in zip(models, held, strict=True):
        values.append(_values(point_values(predictions, validation)))
    by_patient = point_values(patient_level(models[0]), patient_level(held[0]), PATIENT_METRICS)
    return {
        "images": values[0],
        "patients": _values(by_patient),
        "difference": {name: values[0][name] - values[1][name] for name in values[0]},
    }


def _values(entries: Entries) -> dict[str, float]:
    """Return the values alone."""
    return {name: entry["value"] for name, entry in entries.items()}


# --------------------------------------------------------------------------------- the simulation
def simulate(patients: int, number: int) -> dict[str, dict[str, list[float] | None]]:
    """Return the intervals of one test set by kind and metric, None where there is none."""
    ours, other = draw_models(patients, np.random.default_rng((3, patients, number)))
    held = validations()
    entries = {
        "images": evaluate(ours, held[0], seed=number),
        "patients": evaluate(
            patient_level(ours), patient_level(held[0]), PATIENT_METRICS, seed=number
        ),
        "difference": paired_difference([ours], [other], held[:1], held[1:], seed=number),
    }
    found: dict[str, dict[str, list[float] | None]] = {}
    for kind, of_kind in entries.items():
        found[kind] = {name: entry["ci95"] for name, entry in of_kind.items()}

    plain = point_values(ours, held[0])
    samples = bootstrap(ours, draw_patients(ours.patients, 1000, number), plain)
    found["percentile bootstrap"] = {}
    for name, values in samples.items():
        # Where ours gives none, the comparison has none either.
        if found["images"][name]:
            found["percentile bootstrap"][name] = np.nanpercentile(values, [2.5, 97.5]).tolist()
    return found


def count_coverage(
    truth: dict[str, dict[str, float]], patients: int, simulations: int, workers: int
) -> list[list[Any]]:
    """Return the rows of COLUMNS for test sets of some size."""
    covered: dict[tuple[str, str], list[bool]] = defaultdict(list)
    widths: dict[tuple[str, str], list[float]] = defaultdict(list)
    with ProcessPoolExecutor(workers) as pool:
        for found in pool.map(partial(simulate, patients), range(simulations), chunksize=10):
            for kind, intervals in found.items():
                true_values = truth.get(kind, truth["images"])
                for name, interval in intervals.items():
                    if interval:
                        low, high = interval
                        covered[kind, name].append(low <= true_values[name] <= high)
                        widths[kind, name].append(high - low)
    rows = []
    for kind in (*OURS, "percentile bootstrap"):
        for metric in METRICS:
            key = kind, metric.name
            if key in covered:
                count = len(covered[key])
                coverage = round(float(np.mean(covered[key])), 4)
                width = round(float(np.mean(widths[key])), 4)
                rows.append(
                    [kind, metric.name, patients, count, coverage, count / simulations, width]
                )
    return rows


def list_failures(rows: list[list[Any]]) -> list[str]:
    """Return in words which of our intervals cover too little or too much."""
    failures = []
    for kind, name, patients, count, coverage, *_ in rows:
        if kind not in OURS or count < FEWEST:
            continue
        error = math.sqrt(0.95 * 0.05 / count)
        highest = HIGH + 3 * error
        # Hardly any image of a rare grade tells two models apart: the only intervals of these few
        # counts that hold the truth often enough hold it too often.
        if kind == "difference" and name.startswith("recall"):
            highest = 1
        if not LOW - 3 * error <= coverage <= highest:
            failures.append(
                f"{kind}, {name}, {patients} patients: {coverage:.3f} of {count} intervals"
            )
    return failures


def main() -> None:
    """Simulate, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulations", type=int, default=1000, help="test sets of each size")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    options = parser.parse_args()

    truth = find_truth()
    rows = []
    for patients in SIZES:
        rows += count_coverage(truth, patients, options.simulations, options.workers)
    result = {
        "simulations": options.simulations,
        "standard_error": round(math.sqrt(0.95 * 0.05 / options.simulations), 4),
        "truth": truth,
        "columns": list(COLUMNS),
        "rows": rows,
    }
    measure.write_result("coverage", result)
    failures = list_failures(rows)
    if failures:
        sys.exit("\n".join(["coverage is not 93 to 97 %:", *failures]))


if __name__ == "__main__":
    main()
