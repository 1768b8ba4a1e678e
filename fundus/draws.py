"""Draws of patients, and the value of every metric in each of them.

scikit-learn is too slow for a thousand values of twenty metrics. Here a metric comes from sums over
patients, which a draw weighs, or from scores that are sorted once for all draws.
Shapes: N images, P patients, R draws, B of them at a time, S distinct scores of
positives, G grades.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from fundus.manifest import GRADES
from fundus.predictions import BINS, Predictions, confidence_bins, confidences

CELLS = 200_000  # draws x images at once: few enough to stay in a processor's cache


@dataclass(frozen=True)
class Draws:
    """The bootstrap's draws of patients, with replacement and with all images of a patient."""

    patient_of_image: np.ndarray  # (N,) int, 0 to P - 1
    counts: np.ndarray  # (R, P) uint16, how often each draw holds each patient

    def image_counts(self, order: np.ndarray) -> Iterator[np.ndarray]:
        """Give how often draws hold the images in some order (N,), (B, N) uint16, B at a time."""
        patients = self.patient_of_image[order]
        size = max(1, CELLS // len(order))
        for first in range(0, len(self.counts), size):
            yield self.counts[first : first + size][:, patients]

    def patient_sums(self, values: np.ndarray) -> np.ndarray:
        """Return the sums over each patient's images, (P, ...), of values (N, ...)."""
        sums = np.zeros((self.counts.shape[1], *values.shape[1:]))
        np.add.at(sums, self.patient_of_image, values)
        return sums

    def draw_sums(self, values: np.ndarray) -> np.ndarray:
        """Return the sums over the images of each draw, (R, C) float64, of values (N, C)."""
        return self.weigh_patients(self.patient_sums(values))

    def weigh_patients(self, sums: np.ndarray) -> np.ndarray:
        """Return each draw's total, (R, C) float64, of sums over patients (P, C)."""
        # One draw at a time: as float64 all of them would take 214 MB at EyePACS' 26,788 patients.
        return np.stack([count.astype(np.float64) @ sums for count in self.counts])


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


# ----------------------------------------------------------------------------- from confusion alone
def draw_confusions(predictions: Predictions, draws: Draws) -> np.ndarray:
    """Return the confusion matrix of each draw, (R, G, G) float64; the truth in rows."""
    cell = predictions.grades * GRADES + predictions.predicted
    cells = np.eye(GRADES * GRADES)[cell]  # (N, G G)
    return draws.draw_sums(cells).reshape(-1, GRADES, GRADES)


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
    return _mean_of_present(confusion, confusion_recalls(confusion))


def confusion_macro_f1(confusion: np.ndarray) -> np.ndarray:
    """Return the mean F1 of the grades that occur in the truth, (...)."""
    right = np.diagonal(confusion, axis1=-2, axis2=-1)
    both = confusion.sum(axis=-1) + confusion.sum(axis=-2)
    with np.errstate(divide="ignore", invalid="ignore"):
        return _mean_of_present(confusion, 2 * right / both)


def confusion_macro_precision(confusion: np.ndarray) -> np.ndarray:
    """Return the mean precision of the grades that occur in the truth, (...).

    It is 0 for a grade that is never predicted.
    """
    right = np.diagonal(confusion, axis1=-2, axis2=-1)
    predicted = confusion.sum(axis=-2)
    return _mean_of_present(confusion, right / np.maximum(predicted, 1))


def _mean_of_present(confusion: np.ndarray, of_grades: np.ndarray) -> np.ndarray:
    """Return the mean of values (..., G) over the grades that occur in the truth, (...)."""
    present = confusion.sum(axis=-1) > 0
    return np.where(present, of_grades, 0).sum(axis=-1) / present.sum(axis=-1)


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


# ------------------------------------------------------------------------------- from sorted scores
def draw_macro_auroc(predictions: Predictions, draws: Draws) -> np.ndarray:
    """Return the macro AUROC of each draw, (R,); NaN for draws that lack a grade."""
    aurocs = []
    for grade in range(GRADES):
        share = predictions.probabilities[:, grade]
        aurocs.append(draw_by_score(share, predictions.grades == grade, draws, auroc_by_score))
    return np.mean(aurocs, axis=0)


def draw_referable_auroc(predictions: Predictions, draws: Draws) -> np.ndarray:
    """Return the AUROC of referable DR of each draw, (R,); NaN for draws of one side alone."""
    score = predictions.referable_score
    return draw_by_score(score, predictions.referable, draws, auroc_by_score)


def draw_referable_ap(predictions: Predictions, draws: Draws) -> np.ndarray:
    """Return the average precision of referable DR of each draw; NaN for draws of one side."""
    score = predictions.referable_score
    return draw_by_score(score, predictions.referable, draws, ap_by_score)


@dataclass(frozen=True)
class ByScore:
    """What B draws hold of each of the S distinct scores that positives have, rising."""

    positive: np.ndarray  # (B, S), positives with the score
    lower: np.ndarray  # (B, S), images with a lower score
    upto: np.ndarray  # (B, S), images with the score or a lower one
    images: np.ndarray  # (B, 1)


def draw_by_score(
    score: np.ndarray, truth: np.ndarray, draws: Draws, metric: Callable[[ByScore], np.ndarray]
) -> np.ndarray:
    """Return a metric of scores (N,) against truth (N,) bool in each draw, (R,).

    The scores are sorted once, since draws only weigh images. At least one image is positive.
    """
    order = np.argsort(score, kind="stable")
    rising = score[order]
    (places,) = np.nonzero(truth[order])  # of the positives
    scores, firsts = np.unique(rising[places], return_index=True)
    begins = np.searchsorted(rising, scores, side="left")
    ends = np.searchsorted(rising, scores, side="right")
    values = []
    for counts in draws.image_counts(order):
        before = np.zeros((len(counts), len(order) + 1), np.int32)
        np.cumsum(counts, axis=1, out=before[:, 1:])
        positive = np.add.reduceat(counts[:, places], firsts, axis=1, dtype=np.int64)
        held = ByScore(positive, before[:, begins], before[:, ends], before[:, -1:])
        values.append(metric(held))
    return np.concatenate(values)


def auroc_by_score(held: ByScore) -> np.ndarray:
    """Return the AUROC (B,) of draws; NaN where a side is empty."""
    upto = np.cumsum(held.positive, axis=1)
    positives = upto[:, -1]
    pairs = positives * (held.images[:, 0] - positives)
    # The AUROC is the share of pairs in which the positive has the higher score; a tie counts half.
    below = held.lower - (upto - held.positive)
    tied = held.upto - held.lower - held.positive
    with np.errstate(invalid="ignore"):
        return (held.positive * (below + tied / 2)).sum(axis=1) / pairs


def ap_by_score(held: ByScore) -> np.ndarray:
    """Return the average precision (B,) of draws; NaN where a side is empty.

    It is the mean over positives of the precision at their own score, as scikit-learn's
    average_precision_score.
    """
    positives = held.positive.sum(axis=1)
    is_one_sided = (positives == 0) | (positives == held.images[:, 0])
    found = np.cumsum(held.positive[:, ::-1], axis=1)[:, ::-1]  # with the score or a higher one
    named = held.images - held.lower
    # Where no such image is drawn, nothing is found either, and nothing is weighed.
    precision = found / np.maximum(named, 1)
    with np.errstate(invalid="ignore"):
        value = (held.positive * precision).sum(axis=1) / positives
    return np.where(is_one_sided, np.nan, value)


# ------------------------------------------------------------------------- from sums over patients
def draw_mean(values: np.ndarray, draws: Draws) -> np.ndarray:
    """Return the mean of values (N,) over the images of each draw, (R,)."""
    sums = draws.draw_sums(np.stack([values, np.ones(len(values))], axis=1))
    return sums[:, 0] / sums[:, 1]


def draw_share(hits: np.ndarray, among: np.ndarray, draws: Draws) -> np.ndarray:
    """Return the share of hits (N,) bool among images (N,) bool in each draw; NaN among none."""
    sums = draws.draw_sums(np.stack([hits & among, among], axis=1).astype(np.float64))
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums[:, 0] / sums[:, 1]


def draw_ece(predictions: Predictions, draws: Draws) -> np.ndarray:
    """Return the expected calibration error of each draw, (R,)."""
    shares, is_right = confidences(predictions)
    gaps = np.zeros((len(shares), BINS + 1))
    gaps[np.arange(len(shares)), confidence_bins(shares)] = is_right - shares
    gaps[:, BINS] = 1
    sums = draws.draw_sums(gaps)
    return np.abs(sums[:, :BINS]).sum(axis=1) / sums[:, BINS]
