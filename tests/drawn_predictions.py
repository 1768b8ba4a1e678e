"""Predictions that tests of metrics and intervals share."""

import numpy as np

from fundus.manifest import GRADES
from fundus.predictions import Predictions


def predictions_of(grades, predicted):
    """Return predictions with 0.8 for the grade that is predicted; one image a patient."""
    shares = np.full((len(grades), GRADES), 0.2 / 4)
    shares[np.arange(len(grades)), predicted] = 0.8
    patients = np.arange(len(grades)).astype(str)
    return Predictions(np.array(grades), np.array(predicted), shares, patients)


def draw_predictions(count, seed=0, per_patient=1):
    """Return predictions that are right more often than not, with soft probabilities."""
    rng = np.random.default_rng(seed)
    grades = rng.choice(GRADES, count, p=[0.4, 0.15, 0.2, 0.15, 0.1])
    scores = rng.normal(size=(count, GRADES))
    scores[np.arange(count), grades] += 1.2
    shares = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    patients = (np.arange(count) // per_patient).astype(str)
    return Predictions(grades, shares.argmax(axis=1), shares, patients)


def select(predictions, rows):
    """Return the predictions of some rows."""
    return Predictions(
        predictions.grades[rows],
        predictions.predicted[rows],
        predictions.probabilities[rows],
        predictions.patients[rows],
    )
