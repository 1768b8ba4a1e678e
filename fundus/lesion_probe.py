"""Do patch tokens tell lesions? One logistic unit a class, on tokens and on colour alone.

Every photograph is scored by a probe that saw none of its patient. The line to beat is chance,
which is the share of patches that hold a lesion, and then the same probe on the patches' colour.

Shapes: N photographs, P patches of one, D features of a patch.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fundus.lesion_scores import mean_intervals

FOLDS = 5
C = 0.1  # scikit-learn's inverse strength of the penalty, on standardised features
MAX_PATCHES = 200  # of a photograph that a probe is fitted on, with a lesion and as many without
MAX_ITERATIONS = 1000

SETTINGS = {
    "folds": FOLDS,
    "C": C,
    "class_weight": "balanced",
    "patches_a_photograph": {"with": MAX_PATCHES, "without": MAX_PATCHES},
}


def patch_colors(picture: np.ndarray, patch: int, counted: np.ndarray) -> np.ndarray:
    """Return the colour of counted patches, (P, 6): their mean RGB, and that of all of them.

    `picture` is uint8 (S, S, 3), `counted` bool over all patches. The second half is the same for
    all patches of a photograph: it lets a probe see that one is darker than its surround.
    """
    padding = -picture.shape[0] % patch
    padded = np.pad(picture, ((0, padding), (0, padding), (0, 0))).astype(np.float32)
    grid = padded.shape[0] // patch
    means = padded.reshape(grid, patch, grid, patch, 3).mean(axis=(1, 3)).reshape(-1, 3)
    means = means[counted] / 255
    whole = np.broadcast_to(means.mean(axis=0), means.shape)
    return np.concatenate([means, whole], axis=1)


def probe_patches(
    features: Sequence[np.ndarray], truth: Sequence[np.ndarray], patients: np.ndarray, seed: int
) -> list[np.ndarray]:
    """Return out-of-fold scores (P,) of each photograph's patches for holding a lesion.

    `features` are (P, D) and `truth` bool (P,), photograph by photograph; `why_unfit` must have
    found no fault in them.
    """
    fold_of = deal_folds(patients, _with_lesion(truth, patients), seed)
    folds = np.array([fold_of[patient] for patient in patients])

    scores: list[np.ndarray] = [np.zeros(0)] * len(features)
    for fold in range(max(folds) + 1):
        rows, labels = _sample(features, truth, np.flatnonzero(folds != fold), seed)
        weights, bias = _fit(rows, labels)
        for number in np.flatnonzero(folds == fold):
            scores[number] = features[number].astype(np.float32) @ weights + bias
    return scores


def why_unfit(truth: Sequence[np.ndarray], patients: np.ndarray) -> str:
    """Return why no probe can be fitted out of fold; empty where one can."""
    count = len(_with_lesion(truth, patients))
    if count < 2:
        return f"{count} patients with a patch that holds it; a probe needs 2"
    without = {patient for patient, held in zip(patients, truth, strict=True) if not held.all()}
    if len(without) < 2:
        return f"{len(without)} patients with a patch that does not hold it; a probe needs 2"
    return ""


def _with_lesion(truth: Sequence[np.ndarray], patients: np.ndarray) -> set[str]:
    """Return the patients with a patch that holds a lesion."""
    return {str(patient) for patient, held in zip(patients, truth, strict=True) if held.any()}


def deal_folds(patients: np.ndarray, with_lesion: set[str], seed: int) -> dict[str, int]:
    """Return each patient's fold: those with a lesion dealt out first, so that each fold has some.

    There are FOLDS, or as many as patients with a lesion where those are fewer.
    """
    rng = np.random.default_rng((seed, 2))
    first = sorted(with_lesion)
    rest = sorted(set(patients.tolist()) - with_lesion)
    order = [*rng.permutation(first), *rng.permutation(rest)]
    folds = min(FOLDS, len(first))
    return {str(patient): number % folds for number, patient in enumerate(order)}


def _sample(
    features: Sequence[np.ndarray], truth: Sequence[np.ndarray], numbers: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return rows and labels to fit on: up to MAX_PATCHES of either kind from each photograph."""
    rows = []
    labels = []
    for number in numbers:
        # Of the photograph alone, so that folds take the same patches of it.
        rng = np.random.default_rng((seed, 3, int(number)))
        for label in (True, False):
            places = np.flatnonzero(truth[number] == label)
            if len(places) > MAX_PATCHES:
                places = rng.choice(places, MAX_PATCHES, replace=False)
            rows.append(features[number][places].astype(np.float32))
            labels.append(np.full(len(places), label))
    return np.concatenate(rows), np.concatenate(labels)


def _fit(rows: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, float]:
    """Return weights (D,) and bias of a logistic unit, for features as they come."""
    from sklearn.linear_model import LogisticRegression

    mean = rows.mean(axis=0)
    std = np.maximum(rows.std(axis=0), 1e-6)
    unit = LogisticRegression(C=C, class_weight="balanced", max_iter=MAX_ITERATIONS)
    unit.fit((rows - mean) / std, labels)
    weights = unit.coef_[0] / std
    return weights, float(unit.intercept_[0] - weights @ mean)


# ----------------------------------------------------------------------------------------- results
def precision_of(scores: np.ndarray, truth: np.ndarray) -> float:
    """Return the average precision of scores (P,); NaN where no patch holds a lesion."""
    from sklearn.metrics import average_precision_score

    if not truth.any():
        return float("nan")
    return float(average_precision_score(truth, scores))


def evaluate_probes(
    features: dict[str, Sequence[np.ndarray]],
    truth: Sequence[np.ndarray],
    patients: np.ndarray,
    draws: int,
    seed: int,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return what lesions.json says of one class' probes, and their precisions (N,) by name.

    `features` are the patches' by the probe's name. `ap` is the mean over photographs with a
    lesion, as that of attention; `ap_pooled` is of all patches of all photographs together.
    """
    sizes = np.array([len(held) for held in truth])
    counts = np.array([held.sum() for held in truth])
    has_any = counts > 0
    summary: dict[str, Any] = {
        "photographs": int(has_any.sum()),
        "patches": int(sizes.sum()),
        "lesion_patches": int(counts.sum()),
    }
    if has_any.any():
        summary["prevalence"] = float((counts / sizes)[has_any].mean())
        summary["prevalence_pooled"] = float(counts.sum() / sizes.sum())

    precisions: dict[str, np.ndarray] = {}
    reason = why_unfit(truth, patients)
    if reason:
        summary["reason"] = reason
        return summary, precisions

    everything = np.concatenate(truth)
    for name, rows in features.items():
        scores = probe_patches(rows, truth, patients, seed)
        of_each = []
        for values, held in zip(scores, truth, strict=True):
            of_each.append(precision_of(values, held))
        precisions[name] = np.array(of_each)
        entry = _mean_entry(precisions[name], patients, draws, seed)
        entry["ap_pooled"] = precision_of(np.concatenate(scores), everything)
        summary[name] = entry

    gain = precisions["tokens"] - precisions["color"]
    summary["tokens_over_color"] = _mean_entry(gain, patients, draws, seed)
    return summary, precisions


def _mean_entry(values: np.ndarray, patients: np.ndarray, draws: int, seed: int) -> dict[str, Any]:
    """Return the mean of values (N,) that are defined, and its interval."""
    interval = mean_intervals(values[:, None], patients, draws, seed)[0]
    return {"ap": float(np.nanmean(values)), "ci95": interval}
