"""Predictions of a method on graded photographs, seen by image, by patient, and by confidence.

Shapes: N images, P patients, G grades. Referable DR is grade 2 and above.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fundus.manifest import GRADES

REFERABLE = 2  # the first referable grade
BINS = 15  # of confidence; Guo et al. 2017 take as many


@dataclass(frozen=True)
class Predictions:
    """Predictions of one method on one test set; row i of all belongs to one image."""

    grades: np.ndarray  # (N,) int, the truth
    predicted: np.ndarray  # (N,) int
    probabilities: np.ndarray  # (N, G), rows summing to 1; kept as float64
    patients: np.ndarray  # (N,) str

    def __post_init__(self) -> None:
        # Sums of fp32 would tie scores that differ, and part those that tie.
        object.__setattr__(self, "probabilities", np.asarray(self.probabilities, np.float64))

    @property
    def referable(self) -> np.ndarray:
        """Which images are referable in truth, (N,) bool."""
        return self.grades >= REFERABLE

    @property
    def referable_score(self) -> np.ndarray:
        """The probability of referable DR, p2 + p3 + p4 in this order, (N,) float64."""
        shares = self.probabilities
        return shares[:, 2] + shares[:, 3] + shares[:, 4]

    @property
    def present(self) -> np.ndarray:
        """Which grades occur among the truth, (G,) bool."""
        return np.bincount(self.grades, minlength=GRADES) > 0

    @property
    def confusion(self) -> np.ndarray:
        """How many images of each grade got each answer, (G, G) int with the truth in rows."""
        table = np.zeros((GRADES, GRADES), int)
        np.add.at(table, (self.grades, self.predicted), 1)
        return table


def patient_level(predictions: Predictions) -> Predictions:
    """Return predictions with one row a patient, in the order of their sorted names.

    A patient is referred for the worse eye: the truth is the worst grade of the patient's images,
    the prediction the worst predicted one. The probabilities are those of the image with the
    highest p2 + p3 + p4, the first of equals; so a patient's score of referable DR is the highest
    of all images, and their most probable grade need not be the prediction.
    """
    names, patient_of_image = np.unique(predictions.patients, return_inverse=True)
    grades = np.zeros(len(names), predictions.grades.dtype)
    predicted = np.zeros(len(names), predictions.predicted.dtype)
    np.maximum.at(grades, patient_of_image, predictions.grades)
    np.maximum.at(predicted, patient_of_image, predictions.predicted)

    # By patient, then from the highest score down; the sort is stable, which keeps equals in order.
    order = np.lexsort((-predictions.referable_score, patient_of_image))
    _, firsts = np.unique(patient_of_image[order], return_index=True)
    probabilities = predictions.probabilities[order[firsts]]
    return Predictions(grades, predicted, probabilities, names)


# ----------------------------------------------------------------------------------- by confidence
def confidence_bins(shares: np.ndarray) -> np.ndarray:
    """Return the bin of each share (N,), 0 to 14: bin i holds i / 15 < share <= (i + 1) / 15.

    The bins of Guo et al. 2017 (arXiv 1706.04599, section 2); a share of 0 is in the first.
    """
    inner_edges = np.arange(1, BINS) / BINS
    return np.searchsorted(inner_edges, shares, side="left")


def confidences(predictions: Predictions) -> tuple[np.ndarray, np.ndarray]:
    """Return the highest probability of each image, (N,), and whether the prediction is right."""
    return predictions.probabilities.max(axis=1), predictions.predicted == predictions.grades


def reliability(predictions: Predictions) -> dict[str, list[dict[str, Any]]]:
    """Return how often what is predicted with some share comes true, in 15 equal bins.

    `confidence` holds the highest probability against whether the prediction is right, `referable`
    p2 + p3 + p4 against the truth. A bin is {low, high, images, predicted, observed}: the mean
    share and how often it came true, None in empty bins. Guo et al. 2017, arXiv 1706.04599.
    """
    shares, is_right = confidences(predictions)
    return {
        "confidence": _fill_bins(shares, is_right),
        "referable": _fill_bins(predictions.referable_score, predictions.referable),
    }


def _fill_bins(shares: np.ndarray, came_true: np.ndarray) -> list[dict[str, Any]]:
    """Return the bins of shares (N,) against whether each came true, (N,) bool."""
    bin_of_image = confidence_bins(shares)
    bins = []
    for number in range(BINS):
        inside = bin_of_image == number
        entry: dict[str, Any] = {
            "low": number / BINS,
            "high": (number + 1) / BINS,
            "images": int(inside.sum()),
            "predicted": None,
            "observed": None,
        }
        if inside.any():
            entry["predicted"] = float(shares[inside].mean())
            entry["observed"] = float(came_true[inside].mean())
        bins.append(entry)
    return bins
