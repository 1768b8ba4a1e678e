"""Grade photographs by their nearest neighbours among frozen features.

    python eval_knn.py --k 15                                   # the newest run, on its own data
    python eval_knn.py --pretrained runs/NAME --k 5 10 15 20 --test-data OTHER
    python eval_knn.py --pretrained runs/NAME --features handmade

Weighted k-NN on the teacher's l2-normalised [CLS] (arXiv 2104.14294). Training photographs vote,
test photographs are graded. Writes RUN/knn/: results.json, predictions.csv, doubtful.csv, pictures.
Shapes: N test photographs, M that vote, D width, G grades.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.nn import functional as F

from data import PhotographDataset, grades_of, patients_of
from evaluation import (
    Evaluation,
    EvaluationOptions,
    GradedSet,
    Outcome,
    cached_features,
    cached_handmade,
    evaluate_all,
    open_evaluation,
    training_records,
)
from features import knn_predict
from fundus import metrics, plots
from fundus.manifest import Manifest, Record
from utils import Bounds, InputError, run_main

HEADLINE = 15  # the paper's k

SHOWN = 8  # test photographs whose neighbours are drawn
SHOWN_NEIGHBOURS = 5  # of each

Neighbours = Annotated[tuple[int, ...], Bounds(1, 1_000_000), tyro.conf.arg(aliases=("--nb-knn",))]


# ------------------------------------------------------------------------------------------ options
@dataclass
class Options(EvaluationOptions):
    """Weighted k-NN on frozen features."""

    k: Neighbours = (5, 10, 15, 20)
    """Numbers of neighbours; the headline is that of 15, or of the last one without 15."""
    temperature: Annotated[float, Bounds(1e-3, 100)] = 0.07
    """Votes are weighted by exp(cosine similarity / temperature)."""
    features: Literal["backbone", "handmade"] = "backbone"
    """Among what neighbours are looked for; handmade are statistics of the fundus, each in its
    standard deviations among the training photographs: what a backbone must beat."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.protocol == "paper" and self.features != "backbone":
            raise InputError("--features: expected none, since --protocol paper is on [CLS]")
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
    if options.features == "handmade":
        return f"{options.headline}-NN, on hand-made statistics"
    return f"{options.headline}-NN, whole view of {image_size} px"


# ------------------------------------------------------------------------------------- nearest ones
def extract(evaluation: Evaluation, manifest: Manifest, records: Sequence[Record]) -> Tensor:
    """Return the last block's [CLS] of records, or their hand-made statistics: (N, D)."""
    if evaluation.options.features == "handmade":
        return cached_handmade(evaluation, manifest, records)["handmade"]
    found = cached_features(evaluation, manifest, records, evaluation.view, names=("cls",))
    return found["cls"][:, -1]


class Scale(NamedTuple):
    """What features are measured by before they are compared."""

    center: Tensor  # (D,)
    spread: Tensor  # (D,)

    @classmethod
    def of(cls, bank: Tensor, features: str) -> Scale:
        """Return the mean and deviation of each statistic; embeddings (M, D) stay as they are."""
        if features == "backbone":
            return cls(torch.zeros(bank.shape[1]), torch.ones(bank.shape[1]))
        # Hand-made statistics have units of their own, and the largest would hide the others.
        spread = bank.std(dim=0, correction=0)
        return cls(bank.mean(dim=0), torch.where(spread > 0, spread, 1.0))

    def apply(self, features: Tensor) -> Tensor:
        """Return features (N, D) in these units."""
        return (features - self.center) / self.spread


def predict(votes: Tensor, records: Sequence[Record]) -> metrics.Predictions:
    """Return the predictions for records that votes (N, G) make."""
    probabilities = votes.numpy()
    predicted = probabilities.argmax(axis=1)
    return metrics.Predictions(grades_of(records), predicted, probabilities, patients_of(records))


def score_each_k(votes: dict[int, Tensor], records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return the metrics of every k without intervals; `votes` are {k: (N, G)} for the records."""
    by_k = []
    for k, shares in votes.items():
        row: dict[str, Any] = {"k": k}
        for name, entry in metrics.point_values(predict(shares, records)).items():
            row[name] = entry["value"]
        by_k.append(row)
    return by_k


def grade(
    evaluation: Evaluation,
    training: list[Record],
    validation: list[Record],
    sets: Sequence[GradedSet],
) -> list[Outcome]:
    """Let the training photographs vote on the test sets, and on val, which thresholds need."""
    options = evaluation.options
    headline = options.headline
    # Test sets share one bank of voters, whose features are extracted once.
    voter_grades = grades_of(training)
    found = extract(evaluation, evaluation.manifest, training)
    scale = Scale.of(found, options.features)
    bank = scale.apply(found)

    def votes_on(queries: Tensor, ks: Sequence[int]) -> dict[int, Tensor]:
        grades = torch.from_numpy(voter_grades)
        return knn_predict(bank, grades, queries, ks, options.temperature)

    on_validation = None
    if validation:
        asked = scale.apply(extract(evaluation, evaluation.manifest, validation))
        on_validation = predict(votes_on(asked, [headline])[headline], validation)

    outcomes = []
    for test_set in sets:
        queries = scale.apply(extract(evaluation, test_set.manifest, test_set.records))
        votes = votes_on(queries, options.k)
        by_k = score_each_k(votes, test_set.records)
        outcome = Outcome(
            test_set,
            predict(votes[headline], test_set.records),
            voter_grades,
            validation=on_validation,
            validation_records=validation,
            features=queries,
            details={"by_k": by_k},
        )
        outcomes.append(outcome)
        for row in by_k:
            qwk = "-" if row["qwk"] is None else f"{row['qwk']:.4f}"
            print(f"k {row['k']:3}: accuracy {row['accuracy']:.4f}, qwk {qwk}")
        if options.pictures:
            output = evaluation.output / test_set.name
            line = metrics.majority(voter_grades, outcome.predictions.grades)
            if len(by_k) > 1:
                plots.plot_k(by_k, output / "k.png", line)
            picture = output / "neighbours.png"
            draw_neighbours(evaluation, training, bank, test_set, queries, picture)
    return outcomes


def draw_neighbours(
    evaluation: Evaluation,
    training: list[Record],
    bank: Tensor,
    test_set: GradedSet,
    queries: Tensor,
    path: Path,
) -> None:
    """Draw some test photographs, of every grade in turn, beside their nearest neighbours."""
    asked = spread_over_grades(test_set.records, SHOWN)
    similarity = F.normalize(queries[asked], dim=1) @ F.normalize(bank, dim=1).T
    nearest = similarity.topk(min(SHOWN_NEIGHBOURS, len(training)), dim=1)
    tested = PhotographDataset(test_set.manifest, test_set.records, evaluation.view)
    voters = PhotographDataset(evaluation.manifest, training, evaluation.view)
    rows = []
    for number, cosines, places in zip(asked, *nearest, strict=True):
        neighbours = []
        for cosine, place in zip(cosines.tolist(), places.tolist(), strict=True):
            picture = picture_of(voters, place)
            neighbours.append(plots.Neighbour(picture, training[place].grade, cosine))
        record = test_set.records[number]
        title = Path(record.path).name
        rows.append(plots.Query(picture_of(tested, number), record.grade, title, neighbours))
    plots.plot_neighbours(rows, path)


def spread_over_grades(records: Sequence[Record], count: int) -> list[int]:
    """Return the places of up to `count` records, one of each grade in turn."""
    chosen: list[int] = []
    grades = grades_of(records)
    places = [list(np.flatnonzero(grades == grade)) for grade in sorted(set(grades.tolist()))]
    while len(chosen) < min(count, len(records)):
        for of_grade in places:
            if of_grade and len(chosen) < count:
                chosen.append(int(of_grade.pop(0)))
    return chosen


def picture_of(dataset: PhotographDataset, number: int) -> np.ndarray:
    """Return what the backbone sees of a photograph, uint8 RGB (h, w, 3)."""
    return dataset[number]["image"].permute(1, 2, 0).numpy()


# -------------------------------------------------------------------------------------- the program
def check_neighbours(options: Options, voters: int) -> None:
    """Raise InputError where more neighbours are asked for than there are photographs that vote."""
    if max(options.k) > voters:
        raise InputError(
            f"--k {max(options.k)}: there are {voters} graded photographs that vote; "
            "expected 1 to that"
        )


def main(options: Options, config: Path | None) -> None:
    """Grade the test split and every `--test-data`, or every fold."""
    kind = "knn"
    if options.protocol == "paper":
        kind += "-paper"
    if options.features != "backbone":
        kind += f"-{options.features}"
    if options.folds:
        kind += "-folds"
    evaluation = open_evaluation(options, kind)
    check_neighbours(options, len(training_records(evaluation)))
    evaluate_all(evaluation, name_protocol(options, evaluation.image_size), grade)


if __name__ == "__main__":
    run_main(main, Options)
