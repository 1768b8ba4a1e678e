"""Referable DR told by a threshold of its score that validation chooses.

Shapes: N images. Referable DR is grade 2 and above.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fundus.predictions import REFERABLE, Predictions

Rate = tuple[np.ndarray, np.ndarray]  # hits (N,) bool, and the images they are a share of (N,) bool
Strata = dict[str, np.ndarray]  # groups of images (N,) bool, by what results.json calls them

# What a metric depends on: the predicted grades; the probabilities; or a score's threshold that is
# chosen on validation.
Group = Literal["decision", "probability", "operating point"]


def reason_without_both_sides(predictions: Predictions) -> str:
    """Return that there is nothing to tell apart: all images are referable, or none."""
    if predictions.referable.all() or not predictions.referable.any():
        return f"all test images on one side of grade {REFERABLE}"
    return ""


def both_sides(predictions: Predictions) -> Strata:
    """Return the images with and without referable DR."""
    truth = predictions.referable
    return {"with referable DR": truth, "without referable DR": ~truth}


@dataclass(frozen=True)
class OperatingPoint:
    """Sensitivity or specificity for referable DR, where validation says that the other is enough.

    An image counts as referable from a score p2 + p3 + p4 >= threshold. The threshold is one of
    validation's scores: the lowest whose specificity on validation is at least `percent`, or the
    highest whose sensitivity is.
    """

    held: Literal["sensitivity", "specificity"]  # what validation holds at `percent`
    percent: int
    group: Group = "operating point"

    @property
    def told(self) -> str:
        """What is told of the test: the other of the two."""
        if self.held == "specificity":
            return "sensitivity"
        return "specificity"

    @property
    def name(self) -> str:
        """Its key in results.json."""
        return f"{self.told}_at_{self.percent}_{self.held}"

    @property
    def title(self) -> str:
        """Its name for people."""
        return f"{self.told} at {self.percent} % {self.held}"

    def why_undefined(self, predictions: Predictions) -> str:
        """Return the reason that the test set gives; "" where it gives none."""
        return reason_without_both_sides(predictions)

    def strata(self, predictions: Predictions) -> Strata:
        """Return the images with and without referable DR."""
        return both_sides(predictions)

    def threshold(self, validation: Predictions) -> float | None:
        """Return the score from which an image counts as referable, None where no score will do.

        None where all images of validation are on one side, or where more of those without
        referable DR than may be have the highest score of all.
        """
        if reason_without_both_sides(validation):
            return None
        score = validation.referable_score
        truth = validation.referable
        choices = np.unique(score)  # rising
        if self.held == "specificity":
            below = np.searchsorted(np.sort(score[~truth]), choices, side="left")
            enough = np.flatnonzero(100 * below >= self.percent * (~truth).sum())
            if not len(enough):
                return None
            return float(choices[enough[0]])
        missed = np.searchsorted(np.sort(score[truth]), choices, side="left")
        enough = np.flatnonzero(100 * (truth.sum() - missed) >= self.percent * truth.sum())
        return float(choices[enough[-1]])

    def entry(self, predictions: Predictions, validation: Predictions | None) -> dict[str, Any]:
        """Return {value, threshold, achieved}, or {value: None, reason}.

        `achieved` is on the test itself what the threshold holds on validation.
        """
        reason = self.why_undefined(predictions)
        threshold = None
        if validation is None:
            reason = "no validation predictions to choose the threshold on"
        elif not reason:
            threshold = self.threshold(validation)
            if threshold is None:
                reason = f"no threshold with {self.percent} % {self.held} on validation"
        if reason:
            return {"value": None, "reason": reason}
        return {
            "value": _share(self._hits(self.told, predictions, threshold)),
            "threshold": threshold,
            "achieved": _share(self._hits(self.held, predictions, threshold)),
        }

    def rate(self, predictions: Predictions, entry: dict[str, Any]) -> Rate:
        """Return the images that the value is a share of, at the threshold of its entry."""
        return self._hits(self.told, predictions, entry["threshold"])

    def _hits(self, what: str, predictions: Predictions, threshold: float) -> Rate:
        """Return which images count as they should, and the images of the side in question."""
        is_named = predictions.referable_score >= threshold
        if what == "sensitivity":
            return is_named, predictions.referable
        return ~is_named, ~predictions.referable


def _share(rate: Rate) -> float:
    """Return the share of hits among the images in question."""
    hits, among = rate
    return float(hits[among].mean())
