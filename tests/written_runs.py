"""Run folders as the scripts write them, made in no time, for tests of what reads them."""

import csv
import json

import numpy as np
import yaml

from fundus.manifest import GRADES
from fundus.metrics import Predictions, summarize

EYES = ("left", "right")


def draw_predictions(seed, patients=40, skill=0.5, eyes=1):
    """Return predictions whose grades are the same for all seeds, and whose answers are not."""
    truth = np.random.default_rng(1).integers(0, GRADES, patients).repeat(2)
    answers = np.random.default_rng(seed)
    logits = answers.normal(size=(len(truth), GRADES)) + skill * 3 * np.eye(GRADES)[truth]
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    names = np.array([f"p{patient}" for patient in range(patients)]).repeat(2)
    return Predictions(truth, shares.argmax(axis=1), shares, names)


def write_evaluation(folder, seed=0, *, skill=0.5, patients=40, **changed):
    """Write an evaluation's two main files; `changed` are fields of its results.json."""
    folder.mkdir(parents=True, exist_ok=True)
    predictions = draw_predictions(seed, patients, skill)
    images = len(predictions.grades)
    expected = (predictions.probabilities @ np.arange(GRADES)).round().astype(int)
    results = {"protocol": "linear probe, whole view", "settings": {"features": "backbone"}}
    counts = {"images": images, "patients": patients, "by_grade": [images, 0, 0, 0, 0]}
    results["data"] = {"path": "data", "fingerprint": "f", "train": counts, "test": counts}
    results |= summarize(
        predictions, predictions.grades, predictions, ([0.5, 1.5, 2.5, 3.5], expected)
    )
    results |= {"candidates": 13, "by_hyperparameter": [{"decay": 0.1, "log_loss": 1.25}]}
    results |= {"backbone": {"sha256": "w"}, "versions": {"torch": "2"}, "command": ["eval.py"]}
    results |= changed
    (folder / "results.json").write_text(json.dumps(results))

    with (folder / "predictions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        shares = [f"p{grade}" for grade in range(GRADES)]
        writer.writerow(["path", "patient", "eye", "grade", "prediction", *shares, "thresholded"])
        for place in range(images):
            patient = predictions.patients[place]
            eye = EYES[place % 2]
            row = [f"images/{patient}_{eye}.jpg", patient, eye, predictions.grades[place]]
            row += [predictions.predicted[place], *predictions.probabilities[place].tolist()]
            writer.writerow([*row, expected[place]])
    return predictions


def write_training(folder, epochs=3, collapse=None):
    """Write a run's config.yaml and log.jsonl, with ten steps an epoch and k-NN at its end."""
    folder.mkdir(parents=True, exist_ok=True)
    options = {"arch": "vit_nano", "epochs": epochs, "batch_size": 32, "data": "data"}
    (folder / "config.yaml").write_text(yaml.safe_dump(options))
    first = {"versions": {"device": "CPU", "torch": "2"}, "data": "f", "options": options}
    records = [{"command": ["SSRL.py", "--epochs", str(epochs)], **first}]
    for epoch in range(1, epochs + 1):
        for half in (0.5, 1.0):
            place = {"epoch": epoch - 1 + half, "step": int(10 * (epoch - 1 + half))}
            records.append({**place, "loss": 7 - epoch, "lr": 1e-3, "images_per_s": 160.0})
        scores = {"knn_accuracy": 0.5 + 0.1 * epoch, "knn_majority": 0.47, "knn_qwk": None}
        records.append({"epoch": epoch, "step": 10 * epoch, "rankme": 20.0 + epoch, **scores})
    if collapse:
        records[-1]["collapse"] = collapse
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
