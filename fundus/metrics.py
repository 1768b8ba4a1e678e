"""Every number reported: accuracy beside its majority line, QWK, AUROC, recall, with intervals.

METRICS is the table of them: a further metric is an entry there, its functions and a test.
scikit-learn computes the values. The bootstrap needs each of them a thousand times over, for which
scikit-learn is too slow: there they come from sums over patients, or from scores that are sorted
once. The tests hold both ways against each other.
Shapes: N images, P patients, R draws of the bootstrap, G grades. Referable DR is grade 2 and above.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from fundus.manifest import GRADES

REFERABLE = 2  # the first referable grade
Entries = dict[str, dict[str, Any]]  # what results.json says of each metric, by its name


@dataclass(frozen=True)
class Predictions:
    """Predictions of one method on one test set; row i of all belongs to one image."""

    grades: np.ndarray  # (N,) int, the truth
    predicted: np.ndarray  # (N,) int
    probabilities: np.ndarray  # (N, G) float, rows summing to 1
    patients: np.ndarray  # (N,) str


@dataclass(frozen=True)
class Draws:
    """The bootstrap's draws of patients, with replacement and with all images of a patient."""

    patient_of_image: np.ndarray  # (N,) int, 0 to P - 1
    counts: np.ndarray  # (R, P) uint16, how often each draw holds each patient

    def image_weights(self) -> Iterator[np.ndarray]:
        """Give how often each draw holds each image, (N,) float32, draw by draw."""
        for count in self.counts:
            yield count.astype(np.float32)[self.patient_of_image]


def always_defined(_predictions: Predictions) -> str:
    """Return no reason: the metric has a value for any predictions."""
    return ""


@dataclass(frozen=True)
class Metric:
    """One number that is reported of predictions.

    The bootstrap computes it from confusion matrices alone, or else from what is drawn: one of
    `from_confusion` and `from_draws` is given.
    """

    name: str  # its key in results.json
    title: str  # its name for people
    value: Callable[[Predictions], float]  # asked only where it is defined
    from_confusion: Callable[[np.ndarray], np.ndarray] | None = None  # (..., G, G) -> (...)
    from_draws: Callable[[Predictions, Draws], np.ndarray] | None = None  # -> (R,)
    why_undefined: Callable[[Predictions], str] = always_defined  # the reason; "" where defined


# --------------------------------------------------------------------------- values by scikit-learn
def _scikit() -> ModuleType:
    """Return sklearn.metrics, imported late: it would double the time of every `--help`."""
    import sklearn.metrics

    return sklearn.metrics


def accuracy(predictions: Predictions) -> float:
    """Return the share of images whose grade is predicted."""
    return float(_scikit().accuracy_score(predictions.grades, predictions.predicted))


def recalls(predictions: Predictions) -> np.ndarray:
    """Return the recall of each grade, (G,); 0 for grades that do not occur."""
    return _scikit().recall_score(
        predictions.grades,
        predictions.predicted,
        labels=np.arange(GRADES),
        average=None,
        zero_division=0,
    )


def balanced_accuracy(predictions: Predictions) -> float:
    """Return the mean recall of the grades that occur, as scikit-learn defines it."""
    return float(recalls(predictions)[_present(predictions)].mean())


def qwk(predictions: Predictions) -> float:
    """Return quadratic weighted kappa: 1 is agreement, 0 what chance would give."""
    kappa = _scikit().cohen_kappa_score(
        predictions.grades, predictions.predicted, labels=np.arange(GRADES), weights="quadratic"
    )
    return float(kappa)


def macro_auroc(predictions: Predictions) -> float:
    """Return the mean over grades of the AUROC of each grade against all others."""
    auroc = _scikit().roc_auc_score(
        predictions.grades, predictions.probabilities, multi_class="ovr", labels=np.arange(GRADES)
    )
    return float(auroc)


def referable_auroc(predictions: Predictions) -> float:
    """Return the AUROC of referable DR by its probability."""
    referable = predictions.grades >= REFERABLE
    return float(_scikit().roc_auc_score(referable, _referable_share(predictions)))


def _referable_share(predictions: Predictions) -> np.ndarray:
    """Return the probability of referable DR, (N,) float64."""
    share = predictions.probabilities[:, REFERABLE:].sum(axis=1, dtype=np.float64)
    # Equal votes of a k-NN differ in their last bits after summing; rounded, they are ties again.
    return share.round(6)


def _present(predictions: Predictions) -> np.ndarray:
    """Return which grades occur among the truth, (G,) bool."""
    return np.bincount(predictions.grades, minlength=GRADES) > 0


# ------------------------------------------------------------------------- where they are undefined
def reason_without_two_grades(predictions: Predictions) -> str:
    """Return why kappa is 0 / 0: truth and prediction are one same grade."""
    answers = {*predictions.grades.tolist(), *predictions.predicted.tolist()}
    if len(answers) == 1:
        return "truth and prediction are one same grade throughout"
    return ""


def reason_without_all_grades(predictions: Predictions) -> str:
    """Return which grades do not occur, so that they cannot be told from the others."""
    absent = np.flatnonzero(~_present(predictions))
    if len(absent):
        return f"no test image of grade {', '.join(map(str, absent))}"
    return ""


def reason_without_both_sides(predictions: Predictions) -> str:
    """Return that there is nothing to tell apart: all images are referable, or none."""
    referable = predictions.grades >= REFERABLE
    if referable.all() or not referable.any():
        return f"all test images on one side of grade {REFERABLE}"
    return ""


# -------------------------------------------------------------- values of the draws, from confusion
# These metrics depend on the confusion matrix alone. So each patient gets one matrix, and that of a
# draw is the sum over the patients drawn.
def confusion_accuracy(confusion: np.ndarray) -> np.ndarray:
    """Return the accuracy (...) of confusion matrices (..., G, G) with the truth in rows."""
    right = np.diagonal(confusion, axis1=-2, axis2=-1)
    return right.sum(axis=-1) / confusion.sum(axis=(-2, -1))


def confusion_recalls(confusion: np.ndarray) -> np.ndarray:
    """Return the recall of each grade (..., G); NaN for grades that do not occur."""
    right = np.diagonal(confusion, axis1=-2, axis2=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return right / confusion.sum(axis=-1)


def confusion_balanced_accuracy(confusion: np.ndarray) -> np.ndarray:
    """Return the mean recall of the grades that occur, (...)."""
    present = confusion.sum(axis=-1) > 0
    total = np.where(present, confusion_recalls(confusion), 0).sum(axis=-1)
    return total / present.sum(axis=-1)


def confusion_qwk(confusion: np.ndarray) -> np.ndarray:
    """Return quadratic weighted kappa (...); NaN where truth and prediction are one same grade."""
    truth = confusion.sum(axis=-1)
    predicted = confusion.sum(axis=-2)
    total = confusion.sum(axis=(-2, -1))
    chance = truth[..., :, None] * predicted[..., None, :] / total[..., None, None]  # (..., G, G)

    grades = np.arange(GRADES)
    penalty = (grades[:, None] - grades) ** 2
    observed = (penalty * confusion).sum(axis=(-2, -1))
    expected = (penalty * chance).sum(axis=(-2, -1))
    with np.errstate(divide="ignore", invalid="ignore"):
        return 1 - observed / expected


# ----------------------------------------------------------------- values of the draws, from scores
def draw_macro_auroc(predictions: Predictions, draws: Draws) -> np.ndarray:
    """Return the macro AUROC of each draw, (R,); NaN for draws that lack a grade."""
    aurocs = []
    for grade in range(GRADES):
        score = predictions.probabilities[:, grade]
        aurocs.append(_draw_auroc(score, predictions.grades == grade, draws))
    return np.mean(aurocs, axis=0)


def draw_referable_auroc(predictions: Predictions, draws: Draws) -> np.ndarray:
    """Return the AUROC of referable DR of each draw, (R,); NaN for draws of one side alone."""
    score = _referable_share(predictions)
    return _draw_auroc(score, predictions.grades >= REFERABLE, draws)


def _draw_auroc(score: np.ndarray, truth: np.ndarray, draws: Draws) -> np.ndarray:
    """Return the AUROC (R,) of each draw; scores are sorted once, since draws only weigh images."""
    ranks = np.unique(score, return_inverse=True)[1]
    aurocs = [weighted_auroc(ranks, truth, weight) for weight in draws.image_weights()]
    return np.array(aurocs)


def weighted_auroc(ranks: np.ndarray, truth: np.ndarray, weight: np.ndarray) -> float:
    """Return the AUROC of weighted samples from their scores' dense ranks.

    `ranks` (N,) int, `truth` (N,) bool, `weight` (N,) non-negative; NaN if a side has no weight.
    """
    positive = np.bincount(ranks, weight * truth)
    negative = np.bincount(ranks, weight * ~truth)
    pairs = positive.sum() * negative.sum()
    if not pairs:
        return float("nan")
    # The AUROC is the share of pairs in which the positive has the higher score; a tie counts half.
    below = np.cumsum(negative) - negative / 2
    return float(positive @ below / pairs)


# ---------------------------------------------------------------------------------------- the table
def recall_metric(grade: int) -> Metric:
    """Return the entry of one grade's recall."""

    def value(predictions: Predictions) -> float:
        return float(recalls(predictions)[grade])

    def from_confusion(confusion: np.ndarray) -> np.ndarray:
        return confusion_recalls(confusion)[..., grade]

    def why_undefined(predictions: Predictions) -> str:
        if grade in predictions.grades:
            return ""
        return f"no test image of grade {grade}"

    return Metric(
        f"recall_{grade}",
        f"recall of grade {grade}",
        value,
        from_confusion=from_confusion,
        why_undefined=why_undefined,
    )


METRICS = (
    Metric("accuracy", "accuracy", accuracy, from_confusion=confusion_accuracy),
    Metric(
        "balanced_accuracy",
        "balanced accuracy",
        balanced_accuracy,
        from_confusion=confusion_balanced_accuracy,
    ),
    Metric(
        "qwk", "QWK", qwk, from_confusion=confusion_qwk, why_undefined=reason_without_two_grades
    ),
    Metric(
        "macro_auroc",
        "macro AUROC",
        macro_auroc,
        from_draws=draw_macro_auroc,
        why_undefined=reason_without_all_grades,
    ),
    Metric(
        "referable_auroc",
        "referable AUROC",
        referable_auroc,
        from_draws=draw_referable_auroc,
        why_undefined=reason_without_both_sides,
    ),
    *map(recall_metric, range(GRADES)),
)


def point_values(predictions: Predictions) -> Entries:
    """Return {name: {value}} of all metrics; an undefined one has value None and its reason."""
    values: Entries = {}
    for metric in METRICS:
        reason = metric.why_undefined(predictions)
        if reason:
            values[metric.name] = {"value": None, "reason": reason}
        else:
            values[metric.name] = {"value": metric.value(predictions)}
    return values


def confusion_metrics(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Return the metrics (...) that confusion matrices (..., G, G) tell; NaN where undefined."""
    values = {}
    for metric in METRICS:
        if metric.from_confusion:
            values[metric.name] = metric.from_confusion(confusion)
    return values


def majority(train_grades: np.ndarray, grades: np.ndarray) -> dict[str, Any]:
    """Return what always answering train's most frequent grade scores on the test `grades`."""
    grade = int(np.bincount(train_grades, minlength=GRADES).argmax())
    constant = Predictions(
        grades,
        predicted=np.full_like(grades, grade),
        probabilities=np.tile(np.eye(GRADES)[grade], (len(grades), 1)),
        patients=np.arange(len(grades)).astype(str),
    )
    line: dict[str, Any] = {"grade": grade}
    for name, entry in point_values(constant).items():
        line[name] = entry["value"]
    return line


def short_scores(
    votes: np.ndarray, grades: np.ndarray, train_grades: np.ndarray
) -> dict[str, float]:
    """Return accuracy, majority accuracy and QWK of votes (N, G), for the log of a training.

    QWK is 0 where it is undefined: with one grade alone, nothing is shown to be learnt.
    """
    patients = np.arange(len(grades)).astype(str)
    values = point_values(Predictions(grades, votes.argmax(axis=1), votes, patients))
    return {
        "accuracy": values["accuracy"]["value"],
        "majority": majority(train_grades, grades)["accuracy"],
        "qwk": values["qwk"]["value"] or 0.0,
    }


# ---------------------------------------------------------------------------------------- intervals
def evaluate(predictions: Predictions, draws: int = 1000, seed: int = 0) -> Entries:
    """Return {name: {value, ci95: [low, high]}}: percentile bootstrap over patients, seeded.

    Draws in which a metric is undefined do not enter its interval; None where that leaves none.
    """
    values = point_values(predictions)
    samples = bootstrap(predictions, draw_patients(predictions.patients, draws, seed))
    for name, entry in values.items():
        entry["ci95"] = None
        if entry["value"] is None:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of a metric without a defined draw
            low, high = np.nanpercentile(samples[name], [2.5, 97.5])
        if not np.isnan(low):
            entry["ci95"] = [float(low), float(high)]
    return values


def draw_patients(patients: np.ndarray, draws: int, seed: int) -> Draws:
    """Draw as many patients as there are, with replacement, `draws` times.

    Patients rather than images, so that the two eyes of one do not count as independent.
    """
    _, patient_of_image = np.unique(patients, return_inverse=True)
    total = patient_of_image.max() + 1
    rng = np.random.default_rng(seed)
    # 16 bits are enough for counts, and make 1,000 draws of EyePACS' 26,788 patients 54 MB.
    counts = np.zeros((draws, total), np.uint16)
    for draw in range(draws):
        counts[draw] = np.bincount(rng.integers(total, size=total), minlength=total)
    return Draws(patient_of_image, counts)


def bootstrap(predictions: Predictions, draws: Draws) -> dict[str, np.ndarray]:
    """Return each metric's value in each draw, (R,); NaN where undefined."""
    samples = confusion_metrics(draw_confusions(predictions, draws))
    for metric in METRICS:
        if metric.from_draws:
            samples[metric.name] = metric.from_draws(predictions, draws)
    return samples


def draw_confusions(predictions: Predictions, draws: Draws) -> np.ndarray:
    """Return the confusion matrix of each draw, (R, G, G) float32; the truth in rows."""
    cells = np.zeros((draws.counts.shape[1], GRADES * GRADES), np.float32)  # (P, G G)
    cell = predictions.grades * GRADES + predictions.predicted
    np.add.at(cells, (draws.patient_of_image, cell), 1)
    # Whole numbers below 2 ** 24, which fp32 adds exactly in any order.
    tables = [count.astype(np.float32) @ cells for count in draws.counts]
    return np.stack(tables).reshape(-1, GRADES, GRADES)


# ------------------------------------------------------------------------------------ what is shown
def summarize(predictions: Predictions, train_grades: np.ndarray) -> dict[str, Any]:
    """Return what results.json says of predictions: majority line, metrics, confusion matrix.

    The confusion matrix has the truth in rows.
    """
    confusion = np.zeros((GRADES, GRADES), int)
    np.add.at(confusion, (predictions.grades, predictions.predicted), 1)
    return {
        "majority": majority(train_grades, predictions.grades),
        "metrics": evaluate(predictions),
        "confusion": confusion.tolist(),
    }


def print_summary(summary: dict[str, Any], title: str) -> None:
    """Print a summary below its title, after a blank line."""
    print("\n".join(["", title, *summary_lines(summary)]))


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """Return a summary as lines for people: every metric beside its majority line."""
    width = 1 + max(len(metric.title) for metric in METRICS)
    lines = [f"{'':{width}}{'value':>8}   {'95 % interval':16}{'majority':>8}"]
    for metric in METRICS:
        entry = summary["metrics"][metric.name]
        if entry["value"] is None:
            lines.append(f"{metric.title:{width}}{'-':>8}   ({entry['reason']})")
            continue
        interval = "-"
        if entry["ci95"]:
            interval = "{:.3f} to {:.3f}".format(*entry["ci95"])
        baseline = "-"
        if summary["majority"][metric.name] is not None:
            baseline = f"{summary['majority'][metric.name]:.3f}"
        value = f"{entry['value']:8.3f}"
        lines.append(f"{metric.title:{width}}{value}   {interval:16}{baseline:>8}")
    return lines


def plot_confusion(confusion: list[list[int]], path: Path) -> None:
    """Draw a confusion matrix as PNG: counts, shaded by the share of their row."""
    from matplotlib.figure import Figure

    table = np.array(confusion)
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(4.2, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="predicted grade", ylabel="grade")
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(table.shape):
        color = "black"
        if share[row, column] > 0.6:  # dark blue
            color = "white"
        axes.text(column, row, table[row, column], ha="center", va="center", color=color)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png")
