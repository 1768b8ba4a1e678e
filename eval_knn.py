"""Grade photographs by their nearest neighbours among frozen features.

    python eval_knn.py --k 15                                   # the newest run, on its own data
    python eval_knn.py --pretrained runs/NAME --k 5 10 15 20 --test-data OTHER

Weighted k-NN on the teacher's l2-normalised [CLS] (arXiv 2104.14294). Training photographs vote,
test photographs are graded. Writes RUN/knn/: results.json, predictions.csv, confusion.png.
Shapes: N test photographs, M that vote, D width, G grades.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from data import DataOptions, grades_of, patients_of
from evaluation import (
    Evaluation,
    cached_features,
    check_results,
    open_evaluation,
    open_test_sets,
    training_records,
    write_results,
)
from features import choose_view, knn_predict
from fundus import metrics
from fundus.manifest import Manifest, Record
from utils import Bounds, InputError, RunOptions, run_main
from weights import BackboneOptions

HEADLINE = 15  # the paper's k

Neighbours = Annotated[tuple[int, ...], Bounds(1, 1_000_000), tyro.conf.arg(aliases=("--nb-knn",))]


# ------------------------------------------------------------------------------------------ options
@dataclass
class Options(BackboneOptions, DataOptions, RunOptions):
    """Weighted k-NN on frozen features."""

    k: Neighbours = (5, 10, 15, 20)
    """Numbers of neighbours; the headline is that of 15, or of the last one without 15."""
    temperature: Annotated[float, Bounds(1e-3, 100)] = 0.07
    """Votes are weighted by exp(cosine similarity / temperature)."""
    protocol: Literal["whole", "paper"] = "whole"
    """The whole fundus in view, or the published one: resize to 256, middle 224, val votes too."""
    test_data: tuple[str, ...] = ()
    """Further sets to test on, all their graded photographs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # Refused rather than ignored, so that no number is taken for another size's.
        if self.protocol == "paper" and self.image_size:
            raise InputError(
                f"--image-size {self.image_size}: expected none, since --protocol paper has its own"
            )

    @property
    def headline(self) -> int:
        """The k whose numbers stand for the evaluation."""
        if HEADLINE in self.k:
            return HEADLINE
        return self.k[-1]


def name_protocol(options: Options, image_size: int) -> str:
    """Return what results.json calls the evaluation."""
    if options.protocol == "paper":
        return f"{options.headline}-NN, the paper's view (256, middle 224)"
    return f"{options.headline}-NN, whole view of {image_size} px"


# ------------------------------------------------------------------------------------- nearest ones
def extract_cls(evaluation: Evaluation, manifest: Manifest, records: list[Record]) -> Tensor:
    """Return the last block's [CLS] of records, (N, D)."""
    view = choose_view(evaluation.options.protocol, evaluation.image_size)
    return cached_features(evaluation, manifest, records, view)["cls"][:, -1]


def evaluate(
    votes: dict[int, Tensor], records: list[Record], headline: int
) -> tuple[metrics.Predictions, list[dict[str, Any]]]:
    """Return the headline's predictions, and the metrics of every k without intervals.

    `votes` are {k: (N, G)}, as knn_predict returns them for the records.
    """
    predictions = {}
    by_k = []
    for k, shares in votes.items():
        probabilities = shares.numpy()
        predicted = probabilities.argmax(axis=1)
        predictions[k] = metrics.Predictions(
            grades_of(records), predicted, probabilities, patients_of(records)
        )
        row: dict[str, Any] = {"k": k}
        for name, entry in metrics.point_values(predictions[k]).items():
            row[name] = entry["value"]
        by_k.append(row)
    return predictions[headline], by_k


# -------------------------------------------------------------------------------------- the program
def main(options: Options, config: Path | None) -> None:
    """Grade the test split, and every `--test-data`."""
    kind = "knn"
    if options.protocol == "paper":
        kind += "-paper"
    evaluation = open_evaluation(options, kind)

    # All that may be at fault is asked before the work, so that a fault costs none.
    sets = open_test_sets(evaluation.manifest, options.test_data)
    protocol = name_protocol(options, evaluation.image_size)
    check_results(evaluation, sets, protocol)
    voters = training_records(evaluation)
    if max(options.k) > len(voters):
        raise InputError(
            f"--k {max(options.k)}: there are {len(voters)} graded photographs that vote; "
            "expected 1 to that"
        )

    # Test sets share one bank of voters, whose features are extracted once.
    voter_grades = grades_of(voters)
    bank = extract_cls(evaluation, evaluation.manifest, voters)

    for test_set in sets:
        queries = extract_cls(evaluation, test_set.manifest, test_set.records)
        votes = knn_predict(
            bank, torch.from_numpy(voter_grades), queries, options.k, options.temperature
        )
        predictions, by_k = evaluate(votes, test_set.records, options.headline)
        write_results(evaluation, protocol, test_set, predictions, voter_grades, {"by_k": by_k})
        for row in by_k:
            print(f"k {row['k']:3}: accuracy {row['accuracy']:.4f}, qwk {row['qwk'] or 0:.4f}")


if __name__ == "__main__":
    run_main(main, Options)
