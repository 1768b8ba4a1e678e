"""Which given grades are doubtful, by what a probe says of photographs that it has not learnt from.

Confident learning (Northcutt et al. 2021, arXiv 1911.00068) asks of every grade how sure a probe is
of it where it is given, on average. A photograph that is at least as sure of another grade as the
photographs of that grade are of it themselves is counted there.
Shapes: N images, G grades.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Doubt:
    """A photograph whose grade is doubtful; its fields are the columns of doubtful.csv."""

    path: str
    patient: str
    grade: int  # as given
    likely: int  # the grade that the probe holds for right
    confidence: float  # the probability of the likely grade
    share: float  # the probability of the given grade


def class_confidence(grades: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return the mean probability of each grade over the photographs given it, (G,) float64.

    `grades` (N,) int, `probabilities` (N, G). A grade that does not occur gets infinity: nothing
    says how sure one would have to be of it. These are the thresholds of Northcutt et al. 2021.
    """
    means = np.full(probabilities.shape[1], np.inf)
    for grade in range(len(means)):
        given = grades == grade
        if given.any():
            means[grade] = probabilities[given, grade].mean(dtype=np.float64)
    return means


def doubtful_labels(
    grades: np.ndarray, probabilities: np.ndarray, paths: Sequence[str], patients: Sequence[str]
) -> list[Doubt]:
    """Return the photographs whose given grade is doubtful, the worst first.

    `grades` (N,) int, `probabilities` (N, G) of a probe that has learnt from none of these
    photographs. The likely grade is the most probable one of those that reach the mean of their
    class (class_confidence): so Northcutt et al. 2021 fill their confident joint. It makes a doubt
    if it is another than the given one and more probable. Worst is where it is so by the largest
    margin, by which they prune, too; paths order what is equal. Raises ValueError where the inputs
    are not of one length or probabilities are not finite.
    """
    probabilities = np.asarray(probabilities, np.float64)
    if not len(grades) == len(probabilities) == len(paths) == len(patients):
        raise ValueError("grades, probabilities, paths and patients: expected one length")
    if not np.isfinite(probabilities).all():
        raise ValueError("probabilities: expected finite numbers")

    means = class_confidence(grades, probabilities)
    confident = np.where(probabilities >= means, probabilities, -np.inf)
    likely = confident.argmax(axis=1)  # the given grade or any where none is confident
    rows = np.arange(len(grades))
    confidence = confident[rows, likely]  # -inf where none is
    share = probabilities[rows, grades]

    doubts = []
    for row in np.flatnonzero(confidence > share):
        doubts.append(
            Doubt(
                path=paths[row],
                patient=patients[row],
                grade=int(grades[row]),
                likely=int(likely[row]),
                confidence=float(confidence[row]),
                share=float(share[row]),
            )
        )
    return sorted(doubts, key=lambda doubt: (doubt.share - doubt.confidence, doubt.path))
