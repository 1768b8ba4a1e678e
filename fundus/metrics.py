"""Every number reported: accuracy beside its majority line, QWK, AUROC, recall, with intervals.

Shapes: N images, G = 5 grades. Grades are ICDR's 0-4; referable DR is grade 2 and above.
scikit-learn computes the values; the bootstrap repeats them a thousand times from sufficient
statistics (confusion counts of each patient, sorted scores), held against scikit-learn by tests.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fundus.manifest import GRADES

REFERABLE = 2  # the first referable grade


@dataclass(frozen=True)
class Predictions:
    """Predictions of one method on one test set; row i of all belongs to one image."""

    grades: np.ndarray  # (N,) int, the truth
    predicted: np.ndarray  # (N,) int
    probabilities: np.ndarray  # (N, G) float, rows summing to 1
    patients: np.ndarray  # (N,) str


def majority(train_grades: np.ndarray, grades: np.ndarray) -> dict[str, Any]:
    """Return what always answering train's most frequent grade scores on the test `grades`."""
    grade = int(np.bincount(train_grades, minlength=GRADES).argmax())
    predicted = np.full_like(grades, grade)
    constant = np.tile(np.eye(GRADES)[grade], (len(grades), 1))
    line = Predictions(grades, predicted, constant, np.arange(len(grades)).astype(str))
    return {"grade": grade} | {k: v["value"] for k, v in point_values(line).items()}


def point_values(p: Predictions) -> dict[str, dict[str, Any]]:
    """Return {name: {value}} of all metrics, by scikit-learn.

    An undefined one has value None and its reason. Balanced accuracy is the mean recall of the
    grades that occur, as scikit-learn defines it.
    """
    from sklearn import metrics as sk

    labels = np.arange(GRADES)
    recalls = sk.recall_score(p.grades, p.predicted, labels=labels, average=None, zero_division=0)
    present = np.bincount(p.grades, minlength=GRADES) > 0
    absent = ", ".join(map(str, labels[~present]))
    values: dict[str, dict[str, Any]] = {
        "accuracy": {"value": float(sk.accuracy_score(p.grades, p.predicted))},
        "balanced_accuracy": {"value": float(recalls[present].mean())},
        "qwk": _qwk(p),
        "macro_auroc": {"value": None, "reason": f"no test image of grade {absent}"},
        "referable_auroc": {"value": None, "reason": "all test images on one side of grade 2"},
    }
    if present.all():
        auroc = sk.roc_auc_score(p.grades, p.probabilities, multi_class="ovr", labels=labels)
        values["macro_auroc"] = {"value": float(auroc)}
    referable = p.grades >= REFERABLE
    if 0 < referable.sum() < len(referable):
        auroc = sk.roc_auc_score(referable, _referable_share(p))
        values["referable_auroc"] = {"value": float(auroc)}
    for grade in labels:
        there = {"value": float(recalls[grade])}
        missing = {"value": None, "reason": f"no test image of grade {grade}"}
        values[f"recall_{grade}"] = there if present[grade] else missing
    return values


def _referable_share(p: Predictions) -> np.ndarray:
    """Return the probability of referable DR, (N,); rounded, so that equal votes stay equal."""
    return p.probabilities[:, REFERABLE:].sum(axis=1, dtype=np.float64).round(6)


def _qwk(p: Predictions) -> dict[str, Any]:
    """Return quadratic weighted kappa; undefined where truth and prediction are one same grade."""
    from sklearn.metrics import cohen_kappa_score

    if len({*p.grades.tolist(), *p.predicted.tolist()}) == 1:
        return {"value": None, "reason": "truth and prediction are one same grade throughout"}
    labels = list(range(GRADES))
    kappa = cohen_kappa_score(p.grades, p.predicted, labels=labels, weights="quadratic")
    return {"value": float(kappa)}


def brief(votes: np.ndarray, grades: np.ndarray, train_grades: np.ndarray) -> dict[str, float]:
    """Return accuracy, majority accuracy and QWK (0 where undefined) of votes (N, G)."""
    votes = np.asarray(votes)
    p = Predictions(grades, votes.argmax(1), votes, np.arange(len(grades)).astype(str))
    values, line = point_values(p), majority(train_grades, grades)
    qwk = values["qwk"]["value"] or 0.0  # one grade only: nothing is shown
    return {"accuracy": values["accuracy"]["value"], "majority": line["accuracy"], "qwk": qwk}


def evaluate(p: Predictions, draws: int = 1000, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Return {name: {value, ci95: [low, high]}}: percentile bootstrap over patients, seeded.

    Patients are drawn with replacement, all their images with them, so that two eyes of a patient
    do not count as independent. Draws in which a metric is undefined do not enter its interval.
    """
    values = point_values(p)
    samples = _bootstrap(p, draws, np.random.default_rng(seed))
    for name, entry in values.items():
        entry["ci95"] = None
        if entry["value"] is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # no defined draw: stays None
                low, high = np.nanpercentile(samples[name], [2.5, 97.5])
            entry["ci95"] = None if np.isnan(low) else [float(low), float(high)]
    return values


def _bootstrap(p: Predictions, draws: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Return each metric's values (draws,) over resampled patients, NaN where undefined."""
    _, patient = np.unique(p.patients, return_inverse=True)
    count = patient.max() + 1
    cells = np.zeros((count, GRADES * GRADES), np.float32)
    np.add.at(cells, (patient, p.grades * GRADES + p.predicted), 1)
    scores = {"referable_auroc": _referable_share(p)}
    truths = {"referable_auroc": p.grades >= REFERABLE}
    for grade in range(GRADES):
        scores[f"auroc_{grade}"] = p.probabilities[:, grade]
        truths[f"auroc_{grade}"] = p.grades == grade
    ranks = {name: np.unique(score, return_inverse=True)[1] for name, score in scores.items()}
    confusions, aurocs = [], {name: np.full(draws, np.nan) for name in scores}
    for draw in range(draws):
        drawn = np.bincount(rng.integers(count, size=count), minlength=count).astype(np.float32)
        confusions.append((drawn @ cells).reshape(GRADES, GRADES))
        for name in scores:
            aurocs[name][draw] = weighted_auroc(ranks[name], truths[name], drawn[patient])
    samples = confusion_metrics(np.stack(confusions))
    samples["referable_auroc"] = aurocs.pop("referable_auroc")
    samples["macro_auroc"] = np.mean(list(aurocs.values()), axis=0)
    return samples


def weighted_auroc(ranks: np.ndarray, truth: np.ndarray, weight: np.ndarray) -> float:
    """Return the AUROC of weighted samples from their scores' dense ranks, ties counting half.

    `ranks` (N,) int, `truth` (N,) bool, `weight` (N,) non-negative; NaN if a side has no weight.
    """
    positive = np.bincount(ranks, weight * truth)
    negative = np.bincount(ranks, weight * ~truth)
    total = positive.sum() * negative.sum()
    below = np.cumsum(negative) - negative / 2
    return float(positive @ below / total) if total else float("nan")


def confusion_metrics(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Return accuracy, balanced accuracy, QWK and recalls of confusion matrices (..., G, G).

    Rows are the truth. NaN where undefined.
    """
    total = confusion.sum(axis=(-2, -1))
    rows, columns = confusion.sum(axis=-1), confusion.sum(axis=-2)
    right = np.diagonal(confusion, axis1=-2, axis2=-1)
    grades = np.arange(GRADES)
    penalty = (grades[:, None] - grades) ** 2
    expected = rows[..., :, None] * columns[..., None, :] / total[..., None, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        recalls = right / rows
        disagreement = (penalty * confusion).sum(axis=(-2, -1))
        qwk = 1 - disagreement / (penalty * expected).sum(axis=(-2, -1))
    recall_sum = np.where(rows > 0, np.nan_to_num(recalls), 0).sum(axis=-1)
    return {
        "accuracy": right.sum(axis=-1) / total,
        "balanced_accuracy": recall_sum / (rows > 0).sum(axis=-1),
        "qwk": qwk,
        **{f"recall_{grade}": recalls[..., grade] for grade in range(GRADES)},
    }


def summarize(p: Predictions, train_grades: np.ndarray) -> dict[str, Any]:
    """Return what results.json says of predictions: majority line, metrics, confusion matrix.

    The confusion matrix has the truth in rows.
    """
    table = np.zeros((GRADES, GRADES), int)
    np.add.at(table, (p.grades, p.predicted), 1)
    line = majority(train_grades, p.grades)
    return {"majority": line, "metrics": evaluate(p), "confusion": table.tolist()}


def result_lines(summary: dict[str, Any]) -> list[str]:
    """Return a summary as lines for people: every metric beside its majority line."""
    lines = [f"{'':18}{'value':>8}   {'95 % interval':16}{'majority':>8}"]
    for name, entry in summary["metrics"].items():
        if entry["value"] is None:
            lines.append(f"{name:18}{'-':>8}   ({entry['reason']})")
            continue
        ci = "{:.3f} to {:.3f}".format(*entry["ci95"]) if entry["ci95"] else "-"
        base = summary["majority"].get(name)
        base_text = "-" if base is None else f"{base:.3f}"
        lines.append(f"{name:18}{entry['value']:8.3f}   {ci:16}{base_text:>8}")
    return lines


def report(p: Predictions, train_grades: np.ndarray, folder: Path, title: str) -> dict[str, Any]:
    """Print the metrics, draw `folder`/confusion.png and return the summary."""
    summary = summarize(p, train_grades)
    plot_confusion(summary["confusion"], folder / "confusion.png")
    print(
        "\n".join(
            [f"\n{title}, {len(p.grades)} test photographs, {folder}", *result_lines(summary)]
        )
    )
    return summary


def plot_confusion(confusion: list[list[int]], path: Path) -> None:
    """Draw a confusion matrix as PNG: counts, shaded by the share of their row."""
    from matplotlib.figure import Figure

    table = np.array(confusion)
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(4.2, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="predicted grade", ylabel="grade")
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(table.shape):
        color = "white" if share[row, column] > 0.6 else "black"
        axes.text(column, row, table[row, column], ha="center", va="center", color=color)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png")
