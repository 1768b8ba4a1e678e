"""The table of metrics: what each is called, its value, how draws give it, why it is undefined.

A further metric is an entry of METRICS, its functions and a test. scikit-learn computes the values;
draws.py has its own way, and the tests hold both against each other.
Shapes: N images, R draws of the bootstrap, G grades. Referable DR is grade 2 and above.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from fundus import draws as fast
from fundus.draws import Draws
from fundus.manifest import GRADES
from fundus.operating_points import (
    Group,
    OperatingPoint,
    Rate,
    Strata,
    both_sides,
    reason_without_both_sides,
)
from fundus.predictions import BINS, Predictions, confidence_bins, confidences

Entries = dict[str, dict[str, Any]]  # what results.json says of each metric, by its name


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
    return float(recalls(predictions)[predictions.present].mean())


def qwk(predictions: Predictions) -> float:
    """Return quadratic weighted kappa: 1 is agreement, 0 what chance would give."""
    kappa = _scikit().cohen_kappa_score(
        predictions.grades, predictions.predicted, labels=np.arange(GRADES), weights="quadratic"
    )
    return float(kappa)


def macro_f1(predictions: Predictions) -> float:
    """Return the mean F1 of the grades that occur in the truth, 0 to 1.

    It is f1_score(grades, predicted, labels=unique(grades), average="macro", zero_division=0).
    """
    score = _scikit().f1_score(
        predictions.grades,
        predictions.predicted,
        labels=np.unique(predictions.grades),
        average="macro",
        zero_division=0,
    )
    return float(score)


def macro_precision(predictions: Predictions) -> float:
    """Return the mean precision of the grades that occur in the truth, 0 if one is never predicted.

    It is precision_score(grades, predicted, labels=unique(grades), average="macro",
    zero_division=0).
    """
    score = _scikit().precision_score(
        predictions.grades,
        predictions.predicted,
        labels=np.unique(predictions.grades),
        average="macro",
        zero_division=0,
    )
    return float(score)


def macro_auroc(predictions: Predictions) -> float:
    """Return the mean over grades of the AUROC of each grade against all others."""
    auroc = _scikit().roc_auc_score(
        predictions.grades, predictions.probabilities, multi_class="ovr", labels=np.arange(GRADES)
    )
    return float(auroc)


def referable_auroc(predictions: Predictions) -> float:
    """Return the AUROC of referable DR by p2 + p3 + p4."""
    return float(_scikit().roc_auc_score(predictions.referable, predictions.referable_score))


def referable_ap(predictions: Predictions) -> float:
    """Return the average precision of referable DR by p2 + p3 + p4; chance gives its prevalence."""
    score = predictions.referable_score
    return float(_scikit().average_precision_score(predictions.referable, score))


def log_losses(predictions: Predictions) -> np.ndarray:
    """Return -log of the true grade's probability, (N,) nats.

    Shares are clipped to [e, 1 - e], e = 2.2e-16, as sklearn.metrics.log_loss does.
    """
    rows = np.arange(len(predictions.grades))
    share = predictions.probabilities[rows, predictions.grades]
    least = np.finfo(np.float64).eps
    return -np.log(share.clip(least, 1 - least))


def log_loss(predictions: Predictions) -> float:
    """Return the mean of log_losses: log_loss(grades, probabilities, labels=range(5))."""
    labels = np.arange(GRADES)
    return float(_scikit().log_loss(predictions.grades, predictions.probabilities, labels=labels))


def brier_losses(predictions: Predictions) -> np.ndarray:
    """Return the sum over grades of (probability - truth)^2, (N,), 0 to 2."""
    truth = np.eye(GRADES)[predictions.grades]
    return ((predictions.probabilities - truth) ** 2).sum(axis=1)


def brier(predictions: Predictions) -> float:
    """Return the mean of brier_losses (Brier 1950), 0 to 2: the sum over grades is not halved."""
    return float(brier_losses(predictions).mean())


def ece(predictions: Predictions) -> float:
    """Return the expected calibration error, 0 to 1, in 15 equal bins of the highest probability.

    The sum over bins of |share right - mean probability|, each by its share of the images: Guo et
    al. 2017, arXiv 1706.04599, equation 3.
    """
    shares, is_right = confidences(predictions)
    bin_of_image = confidence_bins(shares)
    gaps = np.bincount(bin_of_image, is_right - shares, minlength=BINS)
    return float(np.abs(gaps).sum() / len(shares))


# ------------------------------------------------------------------------- where they are undefined
def always_defined(_predictions: Predictions) -> str:
    """Return no reason: the metric has a value for any predictions."""
    return ""


def reason_without_two_grades(predictions: Predictions) -> str:
    """Return why kappa is 0 / 0: truth and prediction are one same grade."""
    answers = {*predictions.grades.tolist(), *predictions.predicted.tolist()}
    if len(answers) == 1:
        return "truth and prediction are one same grade throughout"
    return ""


def reason_without_all_grades(predictions: Predictions) -> str:
    """Return which grades do not occur, so that they cannot be told from the others."""
    absent = np.flatnonzero(~predictions.present)
    if len(absent):
        return f"no test image of grade {', '.join(map(str, absent))}"
    return ""


# ------------------------------------------------------------- the images that a metric stands on
def no_strata(_predictions: Predictions) -> Strata:
    """Return no groups: the metric stands on all images alike."""
    return {}


def all_grades(predictions: Predictions) -> Strata:
    """Return the images of each grade, for metrics that weigh grades alike."""
    return {f"of grade {grade}": predictions.grades == grade for grade in range(GRADES)}


# -------------------------------------------------------------------------------- kinds of metrics
@dataclass(frozen=True)
class Metric:
    """One number that is reported of predictions.

    Draws give it from confusion matrices alone, from what each image loses, or else from what is
    drawn: one of `from_confusion`, `losses` and `from_draws` is given.
    """

    name: str  # its key in results.json
    title: str  # its name for people
    group: Group
    value: Callable[[Predictions], float]  # asked only where it is defined
    from_confusion: Callable[[np.ndarray], np.ndarray] | None = None  # (..., G, G) -> (...)
    losses: Callable[[Predictions], np.ndarray] | None = None  # (N,), where it is their mean
    from_draws: Callable[[Predictions, Draws], np.ndarray] | None = None  # -> (R,)
    why_undefined: Callable[[Predictions], str] = always_defined  # the reason; "" where defined
    strata: Callable[[Predictions], Strata] = no_strata  # the groups of images that it stands on
    as_rate: Callable[[Predictions], Rate] | None = None  # where it is a share of images

    def entry(self, predictions: Predictions, _validation: Predictions | None) -> dict[str, Any]:
        """Return {value}, or {value: None, reason} where it is undefined."""
        reason = self.why_undefined(predictions)
        if reason:
            return {"value": None, "reason": reason}
        return {"value": self.value(predictions)}

    def rate(self, predictions: Predictions, _entry: dict[str, Any]) -> Rate | None:
        """Return the images that the metric is a share of, None where it is no share."""
        if self.as_rate is None:
            return None
        return self.as_rate(predictions)


# ---------------------------------------------------------------------------------------- the table
def all_images(predictions: Predictions) -> Rate:
    """Return the images whose grade is predicted, among all."""
    return predictions.predicted == predictions.grades, np.ones(len(predictions.grades), bool)


def recall_metric(grade: int) -> Metric:
    """Return the entry of one grade's recall."""

    def value(predictions: Predictions) -> float:
        return float(recalls(predictions)[grade])

    def from_confusion(confusion: np.ndarray) -> np.ndarray:
        return fast.confusion_recalls(confusion)[..., grade]

    def why_undefined(predictions: Predictions) -> str:
        if grade in predictions.grades:
            return ""
        return f"no test image of grade {grade}"

    def strata(predictions: Predictions) -> Strata:
        return {f"of grade {grade}": predictions.grades == grade}

    def as_rate(predictions: Predictions) -> Rate:
        return predictions.predicted == grade, predictions.grades == grade

    return Metric(
        f"recall_{grade}",
        f"recall of grade {grade}",
        "decision",
        value,
        from_confusion=from_confusion,
        why_undefined=why_undefined,
        strata=strata,
        as_rate=as_rate,
    )


METRICS: tuple[Metric | OperatingPoint, ...] = (
    Metric(
        "accuracy",
        "accuracy",
        "decision",
        accuracy,
        from_confusion=fast.confusion_accuracy,
        as_rate=all_images,
    ),
    Metric(
        "balanced_accuracy",
        "balanced accuracy",
        "decision",
        balanced_accuracy,
        from_confusion=fast.confusion_balanced_accuracy,
        strata=all_grades,
    ),
    Metric(
        "qwk",
        "QWK",
        "decision",
        qwk,
        from_confusion=fast.confusion_qwk,
        why_undefined=reason_without_two_grades,
        strata=both_sides,  # its variance is that of the few with referable DR
    ),
    Metric(
        "macro_f1",
        "macro F1",
        "decision",
        macro_f1,
        from_confusion=fast.confusion_macro_f1,
        strata=all_grades,
    ),
    Metric(
        "macro_precision",
        "macro precision",
        "decision",
        macro_precision,
        from_confusion=fast.confusion_macro_precision,
        strata=all_grades,
    ),
    Metric(
        "macro_auroc",
        "macro AUROC",
        "probability",
        macro_auroc,
        from_draws=fast.draw_macro_auroc,
        why_undefined=reason_without_all_grades,
        strata=all_grades,
    ),
    Metric(
        "referable_auroc",
        "referable AUROC",
        "probability",
        referable_auroc,
        from_draws=fast.draw_referable_auroc,
        why_undefined=reason_without_both_sides,
        strata=both_sides,
    ),
    Metric(
        "referable_ap",
        "referable AP",
        "probability",
        referable_ap,
        from_draws=fast.draw_referable_ap,
        why_undefined=reason_without_both_sides,
        strata=both_sides,
    ),
    OperatingPoint("specificity", 90),
    OperatingPoint("specificity", 95),
    OperatingPoint("sensitivity", 90),
    Metric("log_loss", "log loss", "probability", log_loss, losses=log_losses),
    Metric("brier", "Brier score", "probability", brier, losses=brier_losses),
    Metric("ece", "calibration error", "probability", ece, from_draws=fast.draw_ece),
    *map(recall_metric, range(GRADES)),
)
# Of a patient only the worst grade and the score of referable DR are defined.
PATIENT_METRICS = tuple(
    metric
    for metric in METRICS
    if metric.name not in ("macro_precision", "macro_auroc", "log_loss", "brier", "ece")
)
DECISIONS = tuple(metric for metric in METRICS if metric.group == "decision")


def point_values(
    predictions: Predictions,
    validation: Predictions | None = None,
    metrics: tuple[Metric | OperatingPoint, ...] = METRICS,
) -> Entries:
    """Return {name: {value}} of all metrics; an undefined one has value None and its reason.

    Operating points choose their threshold on `validation`, and have {threshold, achieved} too.
    """
    return {metric.name: metric.entry(predictions, validation) for metric in metrics}


def confusion_metrics(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Return the metrics (...) that confusion matrices (..., G, G) tell; NaN where undefined."""
    values = {}
    for metric in DECISIONS:
        values[metric.name] = metric.from_confusion(confusion)
    return values


def bootstrap(
    predictions: Predictions,
    draws: Draws,
    entries: Entries,
    metrics: tuple[Metric | OperatingPoint, ...] = METRICS,
) -> dict[str, np.ndarray]:
    """Return each metric's value in each draw, (R,); NaN where undefined.

    `entries` are their point values: operating points hold the thresholds named there, which come
    from validation, so that draws of the test do not move them. Metrics without value are left out.
    """
    confusions = fast.draw_confusions(predictions, draws)
    samples = {}
    for metric in metrics:
        entry = entries[metric.name]
        if entry["value"] is None:
            continue
        if isinstance(metric, OperatingPoint):
            hits, among = metric.rate(predictions, entry)
            samples[metric.name] = fast.draw_share(hits, among, draws)
        elif metric.from_confusion:
            samples[metric.name] = metric.from_confusion(confusions)
        elif metric.losses:
            samples[metric.name] = fast.draw_mean(metric.losses(predictions), draws)
        else:
            samples[metric.name] = metric.from_draws(predictions, draws)
    return samples
