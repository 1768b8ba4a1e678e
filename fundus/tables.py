"""What an evaluation writes beside its numbers: its data described, and its tables.

predictions.csv holds what every number can be recomputed from, doubtful.csv the grades that the
method doubts. Shapes: N photographs, G grades.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import astuple, fields
from typing import Any

import numpy as np

from fundus.doubt import Doubt, doubtful_labels
from fundus.manifest import GRADES, Manifest, Record
from fundus.predictions import Predictions

# What the table of several test sets shows of each.
COMPARED = {"qwk": "QWK", "referable_auroc": "referable AUROC", "accuracy": "accuracy"}


def describe_data(
    manifest: Manifest, tested: Manifest, records: Sequence[Record]
) -> dict[str, Any]:
    """Return what results.json says of the data: path, fingerprint, each split's counts.

    Train and val are the manifest's; the records that are tested may be another's.
    """
    about: dict[str, Any] = {"path": manifest.root.name, "fingerprint": manifest.fingerprint}
    if tested is not manifest:
        about["test_path"] = tested.root.name
        about["test_fingerprint"] = tested.fingerprint
    about["train"] = _count(manifest.split("train"))
    about["val"] = _count(manifest.split("val"))
    about["test"] = _count(records)
    return about


def _count(records: Sequence[Record]) -> dict[str, Any]:
    """Return the numbers of images, of patients, and of images of each grade."""
    by_grade = [0] * GRADES
    for record in records:
        if record.grade is not None:
            by_grade[record.grade] += 1
    return {
        "images": len(records),
        "patients": len({record.patient for record in records}),
        "by_grade": by_grade,
    }


def predictions_table(
    records: Sequence[Record], predictions: Predictions, thresholded: np.ndarray | None = None
) -> str:
    """Return predictions as csv, a row a photograph, from which every metric can be recomputed."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    shares = [f"p{grade}" for grade in range(GRADES)]
    header = ["path", "patient", "eye", "grade", "prediction", *shares]
    if thresholded is not None:
        header.append("thresholded")
    writer.writerow(header)
    for number, record in enumerate(records):
        # Python writes as many digits as it takes to read the very same number again.
        row = [record.path, record.patient, record.eye, record.grade]
        row.append(int(predictions.predicted[number]))
        row += predictions.probabilities[number].tolist()
        if thresholded is not None:
            row.append(int(thresholded[number]))
        writer.writerow(row)
    return text.getvalue()


def doubts_table(records: Sequence[Record], probabilities: np.ndarray) -> str:
    """Return doubtful.csv: the records whose grade is doubtful by probabilities (N, G)."""
    grades = np.array([record.grade for record in records])
    paths = [record.path for record in records]
    patients = [record.patient for record in records]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(column.name for column in fields(Doubt))
    for doubt in doubtful_labels(grades, probabilities, paths, patients):
        writer.writerow(astuple(doubt))
    return text.getvalue()


def folds_line(means: dict[str, Any]) -> str:
    """Return the folds' main metrics, each averaged over them, as one line."""
    parts = []
    for metric, title in COMPARED.items():
        entry = means[metric]
        if entry["value"] is None:
            parts.append(f"{title} - ({entry['reason']})")
        else:
            parts.append(f"{title} {entry['value']:.3f} (sd {entry['sd']:.3f})")
    return f"mean of the folds' own: {', '.join(parts)}"


def table_lines(summaries: dict[str, dict[str, Any]]) -> list[str]:
    """Return a table of several test sets' main metrics with intervals, a line each."""
    width = max(len(name) for name in summaries) + 2
    lines = ["".ljust(width) + "".join(title.ljust(24) for title in COMPARED.values())]
    for name, summary in summaries.items():
        line = name.ljust(width)
        for metric in COMPARED:
            entry = summary["metrics"][metric]
            text = "-"
            if entry["value"] is not None:
                text = f"{entry['value']:.3f}"
            if entry["ci95"]:
                text += " [{:.3f}, {:.3f}]".format(*entry["ci95"])
            line += text.ljust(24)
        lines.append(line.rstrip())
    return lines
