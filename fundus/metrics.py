"""Every number reported of predictions, beside the majority line and with intervals.

The table is METRICS in scores.py; intervals.py holds what stands in brackets. Here both become what
results.json says and people read.
Shapes: N images, G grades. Referable DR is grade 2 and above.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fundus.intervals import evaluate
from fundus.manifest import GRADES
from fundus.predictions import REFERABLE, Predictions, patient_level, reliability
from fundus.scores import (
    DECISIONS,
    METRICS,
    PATIENT_METRICS,
    Entries,
    Metric,
    OperatingPoint,
    confusion_metrics,
    point_values,
)

# Whoever evaluates finds all of it here.
__all__ = [
    "DECISIONS",
    "METRICS",
    "PATIENT_METRICS",
    "REFERABLE",
    "Entries",
    "Metric",
    "OperatingPoint",
    "Predictions",
    "confusion_metrics",
    "evaluate",
    "majority",
    "mean_of_folds",
    "patient_level",
    "plain_values",
    "point_values",
    "print_summary",
    "reliability",
    "short_scores",
    "summarize",
    "summary_lines",
]

REASON = 60  # characters of a reason that people are shown
# What people are shown; results.json has all.
SHOWN = (
    "accuracy",
    "balanced_accuracy",
    "qwk",
    "macro_f1",
    "macro_auroc",
    "referable_auroc",
    "referable_ap",
    "sensitivity_at_90_specificity",
    "log_loss",
    "ece",
    *(f"recall_{grade}" for grade in range(GRADES)),
)
SHOWN_OF_PARTS = ("accuracy", "balanced_accuracy", "qwk", "macro_f1", "referable_auroc")


def plain_values(
    predictions: Predictions, validation: Predictions | None = None
) -> dict[str, float | None]:
    """Return the value of every metric by its name, None where it is undefined."""
    entries = point_values(predictions, validation)
    return {name: entry["value"] for name, entry in entries.items()}


def majority(train_grades: np.ndarray, grades: np.ndarray) -> dict[str, Any]:
    """Return what always answering train's most frequent grade scores on the test `grades`.

    Its probabilities are the grades' shares in train, for which no features are needed: the
    log-loss to beat. None where a metric has no value for it.
    """
    counts = np.bincount(train_grades, minlength=GRADES)
    grade = int(counts.argmax())
    constant = Predictions(
        grades,
        predicted=np.full_like(grades, grade),
        probabilities=np.tile(counts / counts.sum(), (len(grades), 1)),
        patients=np.arange(len(grades)).astype(str),
    )
    line: dict[str, Any] = {"grade": grade}
    return line | plain_values(constant)


def mean_of_folds(folds: Sequence[Entries]) -> Entries:
    """Return {name: {value, sd}} of metrics over folds; value None and a reason if one has none.

    Ranks of all folds together mix methods that learnt from other shares of grades. Where features
    tell nothing, a fold that holds more of a grade leaves fewer to learn from, and the AUROC of all
    together falls below chance (Parker, Guenter and Bedo 2007, BMC Bioinformatics 8:326); the mean
    of the folds' own does not.
    """
    means: Entries = {}
    for name in folds[0]:
        values = [fold[name]["value"] for fold in folds]
        undefined = [str(number) for number, value in enumerate(values, 1) if value is None]
        if undefined:
            means[name] = {"value": None, "reason": f"undefined in fold {', '.join(undefined)}"}
        else:
            means[name] = {"value": float(np.mean(values)), "sd": float(np.std(values, ddof=1))}
    return means


def short_scores(
    votes: np.ndarray, grades: np.ndarray, train_grades: np.ndarray
) -> dict[str, float | None]:
    """Return accuracy, majority accuracy and QWK of votes (N, G), for the log of a training.

    QWK is None where it is undefined, as where all are of one grade.
    """
    patients = np.arange(len(grades)).astype(str)
    predicted = votes.argmax(axis=1)
    values = point_values(Predictions(grades, predicted, votes, patients), metrics=DECISIONS)
    return {
        "accuracy": values["accuracy"]["value"],
        "majority": majority(train_grades, grades)["accuracy"],
        "qwk": values["qwk"]["value"],
    }


# ------------------------------------------------------------------------------------ what is shown
def summarize(
    predictions: Predictions,
    train_grades: np.ndarray,
    validation: Predictions | None = None,
    thresholded: tuple[list[float], np.ndarray] | None = None,
) -> dict[str, Any]:
    """Return what results.json says of predictions.

    majority, metrics, patients, thresholded, confusion (truth in rows), reliability, validation.
    `validation` are the same method's predictions on val, or out of fold: operating points take
    their thresholds from them. `thresholded` are the four thresholds of another reading of the same
    probabilities, and the grades (N,) that it predicts. What is not given is left out.
    """
    summary: dict[str, Any] = {
        "majority": majority(train_grades, predictions.grades),
        "metrics": evaluate(predictions, validation),
    }
    by_patient = None
    if validation is not None:
        by_patient = patient_level(validation)
    summary["patients"] = evaluate(patient_level(predictions), by_patient, PATIENT_METRICS)
    if thresholded is not None:
        thresholds, predicted = thresholded
        reading = Predictions(
            predictions.grades, predicted, predictions.probabilities, predictions.patients
        )
        summary["thresholded"] = {
            "thresholds": [float(threshold) for threshold in thresholds],
            "metrics": evaluate(reading, metrics=DECISIONS),
            "confusion": reading.confusion.tolist(),
        }
    summary["confusion"] = predictions.confusion.tolist()
    summary["reliability"] = reliability(predictions)
    if validation is not None:
        summary["validation"] = plain_values(validation, validation)
    return summary


def print_summary(summary: dict[str, Any], title: str) -> None:
    """Print a summary below its title, after a blank line."""
    print("\n".join(["", title, *summary_lines(summary)]))


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """Return a summary as lines for people: the main metrics beside their majority lines.

    Below those of the most probable grade stand those of the thresholds and of patients. A dash
    stands for what is undefined; why, and why there is no interval, stands at the line's end.
    """
    titles = {metric.name: metric.title for metric in METRICS}
    width = 1 + max(len(titles[name]) for name in SHOWN)
    lines = [f"{'':{width}}{'value':>8}   {'95 % interval':16}{'majority':>8}"]
    for name in SHOWN:
        text = _entry_text(summary["metrics"][name], summary["majority"][name])
        lines.append(f"{titles[name]:{width}}{text}")

    parts = {"patients, by their worse eye": summary["patients"]}
    if "thresholded" in summary:
        parts = {"grades by thresholds": summary["thresholded"]["metrics"]} | parts
    for title, entries in parts.items():
        lines.append(title)
        for name in SHOWN_OF_PARTS:
            if name in entries:
                lines.append(f"{titles[name]:{width}}{_entry_text(entries[name])}".rstrip())
    return lines


def _entry_text(entry: dict[str, Any], baseline: float | None = None) -> str:
    """Return what stands behind a metric's title: value, interval, majority line, reasons."""
    if entry["value"] is None:
        return f"{'-':>8}   ({_shorten(entry['reason'])})"
    interval = "-"
    if entry["ci95"]:
        interval = "{:.3f} to {:.3f}".format(*entry["ci95"])
    beside = "-"
    if baseline is not None:
        beside = f"{baseline:.3f}"
    text = f"{entry['value']:8.3f}   {interval:16}{beside:>8}"
    if "no_interval" in entry:
        text += f"   (no interval: {_shorten(entry['no_interval'])})"
    return text


def _shorten(reason: str) -> str:
    """Return a reason in at most 60 characters."""
    if len(reason) <= REASON:
        return reason
    return reason[: REASON - 3].rstrip() + "..."
