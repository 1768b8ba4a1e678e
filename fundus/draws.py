"""Draws of patients, and the value of every metric in each of them.

scikit-learn is too slow for a thousand values of twenty metrics. Here a metric comes from sums over
patients, which a draw weighs, or from scores that are sorted once for all draws.
Shapes: N images, P patients, R draws, G grades.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fundus.manifest import GRADES
from fundus.predictions import BINS, Predictions, confidence_bins, confidences


@dataclass(frozen=True)
class Draws:
    """The bootstrap's draws of patients, with replacement and with all images of a patient."""

    patient_of_image: np.ndarray  # (N,) int, 0 to P - 1
    counts: np.ndarray  # (R, P) uint16, how often each draw holds each patient

    def image_weights(self) -> Iterator[np.ndarray]:
        """Give how often each draw holds each image, (N,) float64, draw by draw."""
        for count in self.counts:
            yield count.astype(np.float64)[self.patient_of_image]

    def patient_sums(self, values: np.ndarray) -> np.ndarray:
        """Return the sums over each patient's images, (P, ...), of values (N, ...)."""
        sums = np.zeros((self.counts.shape[1], *values.shape[1:]))
        np.add.at(sums, self.patient_of_image, values)
        return sums

    def draw_sums(self, values: np.ndarray) -> np.ndarray:
        """Return the sums over the images of each draw, (R, C) float64, of values (N, C)."""
        sums = self.patient_sums(values)
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
        ranks = dense_ranks(predictions.probabilities[:, grade])
        truth = predictions.grades == grade
        aurocs.append([weighted_auroc(ranks, truth, weight) for weight in draws.image_weights()])
    return np.mean(aurocs, axis=0)


def draw_referable_auroc(predictions: Predictions, draws: Draws) -> np.ndarray:
    """Return the AUROC of referable DR of each draw, (R,); NaN for draws of one side alone."""
    ranks = dense_ranks(predictions.referable_score)
    truth = predictions.referable
    return np.array([weighted_auroc(ranks, truth, weight) for weight in draws.image_weights()])


def draw_referable_ap(predictions: Predictions, draws: Draws) -> np.ndarray:
    """Return the average precision of referable DR of each draw; NaN for draws of one side."""
    ranks = dense_ranks(predictions.referable_score)
    truth = predictions.referable
    return np.array([weighted_ap(ranks, truth, weight) for weight in draws.image_weights()])


def dense_ranks(score: np.ndarray) -> np.ndarray:
    """Return the place of each score (N,) among the distinct ones, from 0 for the lowest."""
    return np.unique(score, return_inverse=True)[1]


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


def weighted_ap(ranks: np.ndarray, truth: np.ndarray, weight: np.ndarray) -> float:
    """Return the average precision of weighted samples from their scores' dense ranks.

    Arguments as of weighted_auroc. The mean over positives of the precision at their own score, as
    scikit-learn's average_precision_score; NaN if a side has no weight.
    """
    positive = np.bincount(ranks, weight * truth)[::-1]  # from the highest score down
    every = np.bincount(ranks, weight)[::-1]
    total = positive.sum()
    if not total or total == every.sum():
        return float("nan")
    found = np.cumsum(positive)
    named = np.cumsum(every)
    # Before the first score that is drawn, nothing is found among nothing.
    precision = found / np.maximum(named, 1)
    return float(positive @ precision / total)


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
