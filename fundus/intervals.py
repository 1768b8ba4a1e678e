"""95 % intervals over patients: of each metric, and of the difference of two evaluations.

A patient's two eyes are correlated, so patients are drawn and not images.
Shapes: N images, P patients, R draws of the bootstrap.
"""

from __future__ import annotations

import numpy as np

from fundus.draws import draw_patients
from fundus.predictions import Predictions
from fundus.scores import METRICS, Entries, Metric, OperatingPoint, bootstrap, point_values

FEWEST = 10  # patients that an interval takes, of each group that the metric stands on


def evaluate(
    predictions: Predictions,
    validation: Predictions | None = None,
    metrics: tuple[Metric | OperatingPoint, ...] = METRICS,
    draws: int = 1000,
    seed: int = 0,
) -> Entries:
    """Return {name: {value, ci95: [low, high]}} of metrics; see point_values for the values.

    Where ci95 is None though there is a value, `no_interval` says why. `undefined_draws` counts the
    draws in which the metric had no value, where there are any.
    """
    entries = point_values(predictions, validation, metrics)
    drawn = draw_patients(predictions.patients, draws, seed)
    samples = bootstrap(predictions, drawn, entries, metrics)
    for metric in metrics:
        entry = entries[metric.name]
        entry["ci95"] = None
        if entry["value"] is None:
            continue
        reason = why_no_interval(metric, predictions)
        if reason:
            entry["no_interval"] = reason
            continue
        defined = samples[metric.name][~np.isnan(samples[metric.name])]
        if len(defined) < draws:
            entry["undefined_draws"] = draws - len(defined)
        low, high = np.percentile(defined, [2.5, 97.5])
        entry["ci95"] = [float(low), float(high)]
    return entries


def why_no_interval(metric: Metric | OperatingPoint, predictions: Predictions) -> str:
    """Return the reason that a metric which has a value gets no interval; "" where it gets one."""
    total = len(np.unique(predictions.patients))
    if total < FEWEST:
        return f"{_patients(total)}; an interval takes {FEWEST}"
    few = []
    for name, images in metric.strata(predictions).items():
        count = len(np.unique(predictions.patients[images]))
        if count < FEWEST:
            few.append(f"{_patients(count)} {name}")
    if few:
        return f"{', '.join(few)}; an interval takes {FEWEST}"
    if metric.name == "ece":
        return "the error is biased upward by chance, and so would its interval be"
    return ""


def _patients(count: int) -> str:
    """Return a number of patients in words."""
    if count == 1:
        return "1 patient"
    return f"{count} patients"
