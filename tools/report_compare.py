"""Compare evaluations of the same test photographs, out of their predictions.csv.

The difference of two intervals says little: both sides err on the same photographs. Here patients
are drawn for both at once (fundus/intervals.py, paired_difference).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fundus.intervals import paired_difference
from fundus.manifest import GRADES
from fundus.metrics import DECISIONS, METRICS, PATIENT_METRICS, Predictions, patient_level
from tools.report_runs import interval, number
from utils import InputError

SHARES = [f"p{grade}" for grade in range(GRADES)]
TITLES = {metric.name: metric.title for metric in METRICS}
LOWER_IS_BETTER = ("log_loss", "brier", "ece")
# Their thresholds come from predictions on validation, which evaluations do not write.
NO_POINTS = "Operating points are left out: their thresholds need the predictions on validation."


@dataclass(frozen=True)
class Listed:
    """What a predictions.csv says, its rows in the order of their paths."""

    folder: Path
    paths: list[str]
    predictions: Predictions
    thresholded: Predictions | None  # the same with the grades that thresholds give


@dataclass(frozen=True)
class Comparison:
    """Differences of two evaluations, each of one or more seeds."""

    name_a: str
    name_b: str
    images: int
    patients: int
    parts: dict[str, dict[str, dict[str, Any]]]  # by title, then by metric: paired_difference's


# ----------------------------------------------------------------------------------------- reading
def read_predictions(folder: Path) -> Listed:
    """Return the predictions of an evaluation's folder.

    Raises InputError where there are none, or where a row is not of this form.
    """
    file = folder / "predictions.csv"
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            reader = csv.DictReader(lines)
            rows = list(reader)
            columns = reader.fieldnames or []
    except FileNotFoundError:
        raise InputError(
            f"{folder}: holds no predictions.csv; name the folder of an evaluation, such as "
            "runs/demo/linear"
        ) from None
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{file}: cannot be read ({error}); evaluate again") from None
    missing = {"path", "patient", "grade", "prediction", *SHARES} - set(columns)
    if missing or not rows:
        what = f"lacks the columns {', '.join(sorted(missing))}" if missing else "holds no rows"
        raise InputError(f"{file}: {what}; evaluate again")
    return _build(folder, rows, has_thresholds="thresholded" in columns)


def _build(folder: Path, rows: list[dict[str, str]], *, has_thresholds: bool) -> Listed:
    """Return the rows as arrays, sorted by path; InputError names a row that cannot be."""
    file = folder / "predictions.csv"
    checked: dict[str, tuple[str, list[int], list[float]]] = {}
    for place, row in enumerate(rows, start=2):  # line 1 is the header
        names = ["grade", "prediction"]
        if has_thresholds:
            names.append("thresholded")
        try:
            grades = [int(row[name]) for name in names]
            shares = [float(row[name]) for name in SHARES]
        except (TypeError, ValueError):
            raise InputError(f"{file}, line {place}: holds no numbers; evaluate again") from None
        if not all(0 <= grade < GRADES for grade in grades):
            raise InputError(f"{file}, line {place}: a grade outside 0 to {GRADES - 1}")
        if min(shares) < 0 or not math.isclose(sum(shares), 1, abs_tol=1e-5):
            raise InputError(f"{file}, line {place}: p0 to p{GRADES - 1} are no probabilities")
        if row["path"] in checked:
            raise InputError(f"{file}, line {place}: {row['path']} is there twice")
        checked[row["path"]] = (row["patient"], grades, shares)

    paths = sorted(checked)
    patients = np.array([checked[path][0] for path in paths])
    grades = np.array([checked[path][1] for path in paths])
    shares = np.array([checked[path][2] for path in paths])
    thresholded = None
    if has_thresholds:
        thresholded = Predictions(grades[:, 0], grades[:, 2], shares, patients)
    predictions = Predictions(grades[:, 0], grades[:, 1], shares, patients)
    return Listed(folder, paths, predictions, thresholded)


def check_same_photographs(every: Sequence[Listed]) -> None:
    """Raise InputError unless all are of the same photographs, patients and grades."""
    first = every[0]
    for other in every[1:]:
        where = f"{first.folder} and {other.folder}"
        apart = sorted(set(first.paths) ^ set(other.paths))
        if apart:
            raise InputError(
                f"{where}: are not of the same test photographs ({len(apart)} are in one of them "
                f"alone, the first {apart[0]}); evaluate both on the same --data or --test-data"
            )
        for name, ours, theirs in (
            ("patients", first.predictions.patients, other.predictions.patients),
            ("grades", first.predictions.grades, other.predictions.grades),
        ):
            differ = np.flatnonzero(ours != theirs)
            if len(differ):
                place = differ[0]
                raise InputError(
                    f"{where}: have other {name} for {len(differ)} photographs, the first "
                    f"{first.paths[place]} ({ours[place]}, {theirs[place]}); evaluate both on the "
                    "same manifest"
                )


# --------------------------------------------------------------------------------------- comparing
def split_folders(names: str) -> list[Path]:
    """Return the folders of one side, which commas part: one a seed.

    Raises InputError where one is named twice, which would count its seed twice.
    """
    folders = [Path(name) for name in names.split(",") if name]
    places = [folder.resolve() for folder in folders]
    if not folders or len(set(places)) < len(places):
        raise InputError(f"--compare {names}: name each folder once, with commas between seeds")
    return folders


def compare(
    a: Sequence[Path], b: Sequence[Path], metrics: Sequence[str] | None = None
) -> Comparison:
    """Return by how much the evaluation in folders `a`, one a seed, exceeds that in `b`.

    `metrics` are names of those that are compared, by the most probable grade and the probabilities
    alone; None takes all of them, and the readings by thresholds and by patient. Raises InputError
    where predictions cannot be read or are not of the same photographs.
    """
    sides = []
    for folders in (a, b):
        sides.append([read_predictions(folder) for folder in folders])
    every = [*sides[0], *sides[1]]
    check_same_photographs(every)
    plain = [[one.predictions for one in side] for side in sides]

    parts = {"most probable grade": _differences(plain, METRICS, metrics)}
    if metrics is None:
        if all(one.thresholded for one in every):
            read = [[one.thresholded for one in side] for side in sides]
            parts["grades by thresholds"] = _differences(read, DECISIONS)
        worst = [[patient_level(one) for one in side] for side in plain]
        parts["patients, by their worse eye"] = _differences(worst, PATIENT_METRICS)
    images = len(every[0].paths)
    patients = len(set(every[0].predictions.patients.tolist()))
    return Comparison(_name_side(a), _name_side(b), images, patients, parts)


def _differences(
    sides: list[list[Any]], metrics: Sequence[Any], names: Sequence[str] | None = None
) -> dict[str, dict[str, Any]]:
    """Return paired_difference of those metrics that predictions alone tell."""
    chosen = []
    for metric in metrics:
        if metric.group != "operating point" and (names is None or metric.name in names):
            chosen.append(metric)
    return paired_difference(sides[0], sides[1], metrics=tuple(chosen))


def _name_side(folders: Sequence[Path]) -> str:
    """Return what a side is called: its folder, and how many seeds there are."""
    first = folders[0].resolve()
    name = f"{first.parent.name}/{first.name}"
    if len(folders) > 1:
        others = len(folders) - 1
        name += f" and {others} more seed{'s' * (others > 1)}"
    return name


# ------------------------------------------------------------------------------ what is shown
def comparison_rows(entries: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Return a row of plain text for each metric: title, A, B, difference, spread, remark."""
    rows = []
    for name, entry in entries.items():
        title = TITLES.get(name, name)
        if name in LOWER_IS_BETTER:
            title += " (lower is better)"
        value = number(entry.get("value"))
        difference = "-"
        if value is not None:
            difference = f"{value:+.3f}"
        limits = interval(entry.get("ci95"))
        if limits:
            difference += f" [{limits[0]:+.3f}, {limits[1]:+.3f}]"
        spread = "-"
        if number(entry.get("spread")) is not None:
            spread = f"{entry['spread']:.3f}"
        remark = entry.get("reason", "")
        if entry.get("no_interval"):
            remark = f"no interval: {entry['no_interval']}"
        rows.append([title, _mean(entry, "a"), _mean(entry, "b"), difference, spread, remark])
    return rows


def _mean(entry: dict[str, Any], side: str) -> str:
    """Return the mean over seeds of one side's metric, a dash where it has none."""
    values = entry.get(side)
    if not values:
        return "-"
    return f"{float(np.mean(values)):.3f}"


def comparison_header(*, short: bool = False) -> list[str]:
    """Return the header of comparison_rows."""
    spread = "spread over seeds"
    if short:
        spread = "spread"
    return ["metric", "A", "B", "A - B [95 % interval]", spread, "remark"]
