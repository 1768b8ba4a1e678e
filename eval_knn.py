"""Grade photographs by their nearest neighbours among frozen features.

    python eval_knn.py --k 15                                   # the newest run, on its own data
    python eval_knn.py --pretrained runs/NAME --k 5 10 15 20 --test-data OTHER

Weighted k-NN on the teacher's l2-normalised [CLS] (arXiv 2104.14294). Training photographs vote,
test photographs are graded. Writes RUN/knn/: results.json, predictions.csv, confusion.png.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from augment import PaperView, WholeView
from data import DataOptions, graded, grades_of, patients_of
from evaluation import (
    cached_features,
    check_results,
    describe,
    open_evaluation,
    test_sets,
    write_results,
)
from features import knn_predict
from fundus import metrics
from fundus.manifest import Record
from utils import RunOptions, check_options, run_main
from weights import BackboneOptions

HEADLINE = 15  # the paper's k


@dataclass
class Options(BackboneOptions, DataOptions, RunOptions):
    """Weighted k-NN on frozen features."""

    k: Annotated[tuple[int, ...], tyro.conf.arg(aliases=("--nb-knn",))] = (5, 10, 15, 20)
    """Numbers of neighbours; the headline is 15's, or the last one's."""
    temperature: float = 0.07
    """Votes are weighted by exp(cosine similarity / temperature)."""
    protocol: Literal["whole", "paper"] = "whole"
    """The whole fundus in view, or the published one: resize to 256, middle 224, val votes too."""
    test_data: tuple[str, ...] = ()
    """Further sets to test on, all their graded photographs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self, "temperature", lambda v: v > 0, "above 0")
        check_options(self, "k", lambda v: v and min(v) > 0, "numbers from 1")
        if self.protocol == "paper":
            check_options(self, "image_size", lambda v: not v, "none with --protocol paper")


def evaluate(
    votes: dict[int, torch.Tensor], records: list[Record], headline: int
) -> tuple[metrics.Predictions, list[dict[str, Any]]]:
    """Return the headline's predictions, and every k's metrics without intervals."""
    predictions, by_k = {}, []
    for k, shares in votes.items():
        truth, patients = grades_of(records), patients_of(records)
        table = shares.numpy()
        predictions[k] = metrics.Predictions(truth, table.argmax(1), table, patients)
        values = metrics.point_values(predictions[k])
        by_k.append({"k": k} | {name: entry["value"] for name, entry in values.items()})
    return predictions[headline], by_k


def main(o: Options, config: Path | None) -> None:
    """Grade the test split, and every `--test-data`."""
    e = open_evaluation(o, "knn" if o.protocol == "whole" else "knn-paper")
    sets = test_sets(e.manifest, o.test_data)  # before the work, so that a fault costs none
    headline = HEADLINE if HEADLINE in o.k else o.k[-1]
    protocol = f"{headline}-NN, {o.protocol} view of {e.image_size} px"
    if o.protocol == "paper":
        protocol = f"{headline}-NN, the paper's view (256, middle 224)"
    check_results(e, sets, protocol)
    view = WholeView(e.image_size) if o.protocol == "whole" else PaperView()
    voters = graded(e.manifest, e.manifest.split("train"), "train")
    if o.protocol == "paper":
        voters += [r for r in e.manifest.split("val") if r.grade is not None]
    bank = cached_features(e, e.manifest, voters, view)["cls"][:, -1]
    for name, (manifest, records) in sets.items():
        queries = cached_features(e, manifest, records, view)["cls"][:, -1]
        bank_grades = torch.from_numpy(grades_of(voters))
        votes = knn_predict(bank, bank_grades, queries, o.k, o.temperature)
        predictions, by_k = evaluate(votes, records, headline)
        data = describe(e.manifest, manifest, records)
        output = e.output / name
        summary = metrics.report(predictions, grades_of(voters), output, protocol)
        results = {"protocol": protocol, "data": data, **summary, "by_k": by_k}
        write_results(e, output, records, predictions.probabilities, results)
        for row in by_k:
            print(f"k {row['k']:3}: accuracy {row['accuracy']:.4f}, qwk {row['qwk'] or 0:.4f}")


if __name__ == "__main__":
    run_main(main, Options)
