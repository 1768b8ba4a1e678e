"""What do hand-made statistics tell of a grade, and how much of it does a linear probe read?

    python -m benchmarks.study_handmade --data FOLDER [FOLDER ...]

Each FOLDER is one of prepare_data.py. Where it has manifest-fold-N.csv every photograph is tested
once, by patient; else its test split is. Three methods learn from the same photographs: the linear
probe on hand-made statistics, gradient boosting on the same numbers, and the linear probe on mean
colours. The first one is close to the second where the statistics are made for a linear probe.

The script writes benchmarks/results/handmade.json: each method's referable AUROC, QWK and log-loss
with intervals over patients, and the milliseconds that a photograph's statistics take on one core.
Shapes: N photographs, F statistics, G grades.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from augment import WholeView
from benchmarks import measure
from data import PhotographDataset, grades_of, open_manifest, patients_of
from eval_linear import Calibration, Options, Rotation, fit, softmax
from features import extract_handmade
from fundus import metrics
from fundus.handmade import SIDE, handmade_features
from fundus.manifest import GRADES, Manifest, Record, read_manifest
from fundus.splits import fold_of_each

SHOWN = ("referable_auroc", "qwk", "log_loss")
TIMED = 40  # photographs

# Learns from features (N, F) and records; returns what it makes of others (M, F): (M, G).
Method = Callable[[torch.Tensor, list[Record], torch.Tensor], np.ndarray]


def linear(features: torch.Tensor, records: list[Record], asked: torch.Tensor) -> np.ndarray:
    """Return the linear probe's calibrated probabilities, as eval_linear.py fits it."""
    rotation = Rotation([features])
    turned = rotation.turn(features)
    grades = torch.from_numpy(grades_of(records))
    fold_of = torch.tensor(fold_of_each(records, 5))
    found = fit(itertools.repeat(turned), turned, rotation.spread, grades, fold_of, Options())
    calibration = Calibration.of(found.held_out, grades_of(records))
    return calibration.probabilities(rotation.turn_back(found.head).logits(asked))


def boosting(features: torch.Tensor, records: list[Record], asked: torch.Tensor) -> np.ndarray:
    """Return the probabilities of gradient boosting, calibrated out of fold by temperature."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    def probabilities(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
        model = HistGradientBoostingClassifier(
            learning_rate=0.05, max_iter=150, max_leaf_nodes=8, l2_regularization=1.0
        )
        model.fit(features.numpy()[rows], grades[rows])
        shares = np.full((len(others), GRADES), 1e-6)
        shares[:, model.classes_] += model.predict_proba(others)
        return shares / shares.sum(axis=1, keepdims=True)

    grades = grades_of(records)
    fold_of = np.array(fold_of_each(records, 5))
    held_out = np.zeros((len(records), GRADES))
    for fold in range(fold_of.max() + 1):
        others = fold_of == fold
        held_out[others] = probabilities(~others, features.numpy()[others])
    calibration = Calibration.of(np.log(held_out), grades)
    found = probabilities(np.ones(len(records), bool), asked.numpy())
    return softmax(np.log(found) / calibration.temperature)


METHODS: dict[str, tuple[str, Method]] = {
    "hand-made, linear probe": ("handmade", linear),
    "hand-made, gradient boosting": ("handmade", boosting),
    "colours, linear probe": ("color", linear),
}


def features_of(manifest: Manifest, records: list[Record]) -> dict[str, torch.Tensor]:
    """Return hand-made statistics and mean colours of records by their kind, (N, F) each."""
    dataset = PhotographDataset(manifest, records, WholeView(SIDE))
    colors = []
    for number in range(len(dataset)):
        pixels = dataset[number]["image"].float().flatten(1) / 255
        colors.append(torch.cat([pixels.mean(dim=1), pixels.std(dim=1)]))
    found = extract_handmade(manifest, records, workers=2)
    return {"handmade": found["handmade"], "color": torch.stack(colors)}


def open_folds(folder: str) -> list[Manifest]:
    """Return a data set's folds, or itself where it has none."""
    files = sorted(Path(folder).glob("manifest-fold-*.csv"))
    if not files:
        return [open_manifest(folder)]
    return [read_manifest(folder, file.name) for file in files]


def study(folder: str) -> dict[str, Any]:
    """Return what each method scores on a data set, all of its folds together."""
    folds = open_folds(folder)
    everything = [record for record in folds[0].records if record.grade is not None]
    features = features_of(folds[0], everything)
    place = {record.path: number for number, record in enumerate(everything)}
    results: dict[str, Any] = {"photographs": len(everything)}
    for name, (kind, method) in METHODS.items():
        tested: list[Record] = []
        shares = []
        for manifest in folds:
            graded = [record for record in manifest.records if record.grade is not None]
            learnt = [record for record in graded if record.split != "test"]
            asked = [record for record in graded if record.split == "test"]
            rows = torch.tensor([place[record.path] for record in learnt])
            others = torch.tensor([place[record.path] for record in asked])
            shares.append(method(features[kind][rows], learnt, features[kind][others]))
            tested += asked
        found = np.concatenate(shares)
        predictions = metrics.Predictions(
            grades_of(tested), found.argmax(axis=1), found, patients_of(tested)
        )
        entries = metrics.evaluate(predictions)
        results[name] = {metric: entries[metric] for metric in SHOWN}
        results["tested"] = len(tested)
    return results


def time_statistics(folder: str) -> dict[str, float]:
    """Return the milliseconds that the statistics of a photograph take on one core."""
    manifest = open_folds(folder)[0]
    dataset = PhotographDataset(manifest, list(manifest.records[:TIMED]), WholeView(SIDE))
    pictures = [dataset[i]["image"].permute(1, 2, 0).numpy() for i in range(len(dataset))]
    handmade_features(pictures[0])
    times = []
    for picture in pictures:
        began = time.perf_counter()
        handmade_features(picture)
        times.append(1000 * (time.perf_counter() - began))
    return {"median_ms": round(float(np.median(times)), 1), "largest_ms": round(max(times), 1)}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", required=True, help="prepared folders")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"time of one photograph": time_statistics(options.data[0])}
    for folder in options.data:
        results[Path(folder).name] = study(folder)
    measure.write_result("handmade", results)


if __name__ == "__main__":
    main()
