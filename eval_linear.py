"""Grade photographs by a linear probe on frozen features.

    python eval_linear.py --pretrained runs/NAME
    python eval_linear.py --pretrained runs/NAME --protocol paper

Features are extracted once; every learning rate and weight decay is trained on them at once. Epoch
and setting are chosen on val, the test split is used once. Writes RUN/linear/: results.json,
predictions.csv, confusion.png, head.safetensors.
Shapes: B batch, N photographs, S settings, F features, D width, G grades.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from augment import ProbeView, ViewOptions
from data import DataOptions, PhotographDataset, View, graded, grades_of, patients_of
from evaluation import (
    Evaluation,
    cached_features,
    check_results,
    open_evaluation,
    open_test_sets,
    training_records,
    write_results,
)
from features import N_BLOCKS, choose_view, extract_features
from fundus import metrics
from fundus.manifest import GRADES, Manifest, Record
from utils import (
    Bounds,
    InputError,
    RunOptions,
    cosine_schedule,
    flag_of,
    log,
    run_main,
    write_atomic,
)
from weights import BackboneOptions

# More than there can be views or epochs, so that two seeds have no crop in common.
SEED_STRIDE = 100_003

Rows = list[dict[str, Any]]  # of results.json: one for each setting
Rates = Annotated[tuple[float, ...], Bounds(1e-9, 1000)]
Decays = Annotated[tuple[float, ...], Bounds(0, 1000)]

# The published evaluation's own values, and the options that it leaves no choice in.
PAPER_LR = 0.001 * 25 / 256
PAPER_BATCH = 25
PAPER_FIXES = (
    "lr",
    "weight_decay",
    "image_size",
    "features",
    "batch_size",
    "select",
    "views",
    "flip_vertical",
    "rotation",
)


# ------------------------------------------------------------------------------------------ options
@dataclass
class Options(BackboneOptions, ViewOptions, DataOptions, RunOptions):
    """Linear probe on frozen features."""

    lr: Rates = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)
    """Peak learning rates of the sweep."""
    weight_decay: Decays = (0.0, 1e-4, 1e-2)
    """Weight decays of the sweep."""
    epochs: Annotated[int, Bounds(1, 100_000)] = 100
    """Passes over the training features."""
    batch_size: Annotated[int, Bounds(1, 10_000_000)] = 256
    """Photographs of a step."""
    select: Literal["qwk", "accuracy", "balanced_accuracy"] = "qwk"
    """What the best setting and epoch are best at, on val."""
    features: Literal["backbone", "color"] = "backbone"
    """What the probe sees; color is the mean and deviation of RGB alone, the least that a backbone
    must beat."""
    views: Annotated[int, Bounds(0, 100_000)] = 0
    """Random crops of each training photograph to fit on, one an epoch, made and cached once; 0:
    the whole view alone."""
    protocol: Literal["whole", "paper"] = "whole"
    """The whole fundus, or the published one: random crops, one setting, best epoch on test."""
    test_data: tuple[str, ...] = ()
    """Further sets to test on, all their graded photographs, nothing refitted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.views > self.epochs:
            raise InputError(f"--views {self.views}: expected 0 to --epochs {self.epochs}")
        if self.protocol == "paper":
            changed = []
            for field in fields(self):
                is_changed = getattr(self, field.name) != field.default
                if field.name in PAPER_FIXES and is_changed:
                    changed.append(flag_of(field.name))
            if changed:
                raise InputError(f"--protocol paper fixes {', '.join(changed)}; leave them out")
        if self.views == 0:
            for field in fields(ViewOptions):
                if getattr(self, field.name) != field.default:
                    raise InputError(f"{flag_of(field.name)}: is about --views, which are none")

    @property
    def criterion(self) -> str:
        """What the best epoch is best at; the published code keeps the most accurate one."""
        if self.protocol == "paper":
            return "accuracy"
        return self.select


def name_protocol(options: Options, image_size: int) -> str:
    """Return what results.json calls the evaluation."""
    name = f"linear probe, whole view of {image_size} px, epoch and setting chosen on val"
    if options.protocol == "paper":
        name = "linear probe, the paper's: best epoch on the test split"
    if options.features == "color":
        name += ", on colour alone"
    if options.views:
        name += f", fitted on {options.views} random crops of each photograph"
    return name


# ---------------------------------------------------------------------------------------- the probe
class LinearHead(NamedTuple):
    """One linear classifier of features."""

    weight: Tensor  # (F, G)
    bias: Tensor  # (G,)


class Probes:
    """Linear classifiers of S settings, trained at once by SGD with momentum 0.9 on cross-entropy.

    They read the same features, so their logits are one product of matrices and so are their
    gradients, X^T (softmax - truth) / B: 24 settings take the time of a few. Nothing else couples
    them, so each ends where torch.optim.SGD would bring it alone.
    """

    def __init__(self, width: int, settings: list[tuple[float, float]], seed: int) -> None:
        count = len(settings)
        # All begin at the same weights, so that settings differ in nothing else.
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(width, 1, GRADES, generator=generator) * 0.01
        self.weight = start.repeat(1, count, 1)  # (F, S, G)
        self.bias = torch.zeros(count, GRADES)
        self.weight_velocity = torch.zeros_like(self.weight)
        self.bias_velocity = torch.zeros_like(self.bias)
        rates, decays = torch.tensor(settings).T
        self.lr = rates.unsqueeze(1)  # (S, 1)
        self.decay = decays.unsqueeze(1)  # (S, 1)

    def logits(self, features: Tensor) -> Tensor:
        """Return (B, S, G) for features (B, F)."""
        product = features @ self.weight.flatten(1)
        return product.view(len(features), *self.bias.shape) + self.bias

    def step(self, features: Tensor, grades: Tensor, scale: float) -> None:
        """Take one step on features (B, F) and grades (B,), at `scale` times each peak lr."""
        error = self.logits(features).softmax(dim=2)  # (B, S, G)
        error[torch.arange(len(features)), :, grades] -= 1
        error /= len(features)
        weight_slope = (features.T @ error.flatten(1)).view_as(self.weight)
        weight_slope = weight_slope + self.decay * self.weight
        bias_slope = error.sum(dim=0)  # biases are not decayed

        self.weight_velocity.mul_(0.9).add_(weight_slope)
        self.weight.sub_(scale * self.lr * self.weight_velocity)
        self.bias_velocity.mul_(0.9).add_(bias_slope)
        self.bias.sub_(scale * self.lr * self.bias_velocity)


class BestEpochs:
    """The best epoch of every setting so far, and the probes as they were then.

    The best has the highest criterion; of equals the one with the lower loss.
    """

    def __init__(self, probes: Probes, settings: list[tuple[float, float]], criterion: str) -> None:
        self.criterion = criterion
        self.rows: Rows = []
        for lr, decay in settings:
            self.rows.append({"lr": lr, "weight_decay": decay})
        self.ranks = [(-2.0, 0.0)] * len(settings)  # below any score
        self.weight = torch.zeros_like(probes.weight)
        self.bias = torch.zeros_like(probes.bias)

    def update(self, probes: Probes, epoch: int, held: Tensor, truth: np.ndarray) -> None:
        """Judge the probes after an epoch by held-out features (N, F) and their grades (N,)."""
        logits = probes.logits(held)  # (N, S, G)
        scores = score_settings(logits, truth, self.criterion)
        rows = torch.arange(len(truth))
        likelihoods = logits.log_softmax(dim=2)[rows, :, torch.from_numpy(truth)]  # (N, S)
        losses = -likelihoods.mean(dim=0)

        for setting, score in enumerate(scores.tolist()):
            loss = float(losses[setting])
            rank = (score, -loss)
            # A setting that diverged may still have a score, of no meaning.
            if not math.isfinite(loss) or rank <= self.ranks[setting]:
                continue
            self.ranks[setting] = rank
            self.rows[setting].update({"epoch": epoch, self.criterion: score, "loss": loss})
            self.weight[:, setting] = probes.weight[:, setting]
            self.bias[setting] = probes.bias[setting]

    def winner(self) -> int:
        """Return the best setting of all; raises InputError if every one diverged."""
        best = max(range(len(self.ranks)), key=self.ranks.__getitem__)
        if "epoch" not in self.rows[best]:
            rates = dict.fromkeys(str(row["lr"]) for row in self.rows)
            raise InputError(f"--lr {' '.join(rates)}: all diverged; give smaller ones")
        return best


def score_settings(logits: Tensor, truth: np.ndarray, criterion: str) -> np.ndarray:
    """Return a metric of each setting (S,) by its logits (N, S, G); -1 where it is undefined."""
    predicted = logits.argmax(dim=2).T.numpy()  # (S, N)
    confusion = np.zeros((len(predicted), GRADES, GRADES))
    for setting, grades in enumerate(predicted):
        np.add.at(confusion[setting], (truth, grades), 1)
    return np.nan_to_num(metrics.confusion_metrics(confusion)[criterion], nan=-1.0)


def train_epoch(
    probes: Probes, features: Tensor, grades: Tensor, epoch: int, options: Options
) -> None:
    """Pass once over features (N, F) in the epoch's own order."""
    batch = options.batch_size
    if options.protocol == "paper":
        batch = PAPER_BATCH
    rng = np.random.default_rng((options.seed, epoch))
    order = torch.from_numpy(rng.permutation(len(features)))
    chunks = order.split(batch)
    for number, rows in enumerate(chunks):
        progress = epoch + number / len(chunks)
        scale = cosine_schedule(progress, options.epochs, 1.0, 0.0)
        probes.step(features[rows], grades[rows], scale)


def fit(
    train: Iterator[Tensor],
    grades: Tensor,
    held_out: Tensor,
    truth: np.ndarray,
    options: Options,
    settings: list[tuple[float, float]],
) -> tuple[LinearHead, Rows]:
    """Train all settings; return the best head, and each setting's row of results.json.

    `train` gives the features (N, F) of each epoch, whose grades are `grades` (N,). `held_out` and
    `truth` are those that the choice is made on: val, or the test split in the paper's protocol.
    """
    probes = Probes(held_out.shape[1], settings, options.seed)
    best = BestEpochs(probes, settings, options.criterion)
    for epoch in tqdm(range(options.epochs), desc="linear probe", disable=None):
        train_epoch(probes, next(train), grades, epoch, options)
        best.update(probes, epoch + 1, held_out, truth)

    winner = best.winner()
    for setting, row in enumerate(best.rows):
        row["chosen"] = setting == winner
    return LinearHead(best.weight[:, winner], best.bias[winner]), best.rows


# ------------------------------------------------------------------------------------- its features
def probe_input(features: dict[str, Tensor], options: Options) -> Tensor:
    """Return what the probe sees of extracted features, (N, F) fp32.

    [CLS] of the last 4 blocks for tiny and small backbones, the last one and the mean patch token
    for base and large (arXiv 2104.14294, appendix F.2); the paper takes 4 for all.
    """
    if options.features == "color":
        return features["color"]
    # Any ViT of timm may come here, whatever its name, so its width tells its size: of the short
    # names base (768) and large (1024) are this wide, and no other.
    cls_tokens = features["cls"]  # (N, 4, D)
    is_large = cls_tokens.shape[2] >= 768
    if options.protocol == "paper" or not is_large:
        return cls_tokens.flatten(1)
    return torch.cat([cls_tokens[:, -1], features["patch"]], dim=1)


def extract_input(
    evaluation: Evaluation, manifest: Manifest, records: list[Record], view: View, seed: int = 0
) -> Tensor:
    """Return what the probe sees of records, (N, F); `seed` is that of random views."""
    features = cached_features(evaluation, manifest, records, view, seed)
    return probe_input(features, evaluation.options)


def fit_whole(evaluation: Evaluation, records: list[Record]) -> tuple[LinearHead, Rows]:
    """Fit on cached features of the whole view, or of `--views`, standardised; choose on val.

    The head that is returned takes features as they are extracted.
    """
    options = evaluation.options
    manifest = evaluation.manifest
    val = graded(manifest, manifest.split("val"), "val")
    whole_view = choose_view(options.protocol, evaluation.image_size)
    views = [(whole_view, 0)]
    if options.views:
        crop = ProbeView(evaluation.image_size, options.flip_vertical, options.rotation)
        start = options.seed * SEED_STRIDE
        views = [(crop, start + number) for number in range(options.views)]

    first_view, first_seed = views[0]
    first = extract_input(evaluation, manifest, records, first_view, first_seed)
    held_out = extract_input(evaluation, manifest, val, whole_view)
    mean = first.mean(dim=0)
    std = first.std(dim=0).clamp(min=1e-6)

    def epochs() -> Iterator[Tensor]:
        for view, seed in itertools.cycle(views):
            features = first
            if len(views) > 1:
                # One view at a time is in memory, since ten of a large set may fill it.
                features = extract_input(evaluation, manifest, records, view, seed)
            yield (features - mean) / std

    settings = list(itertools.product(options.lr, options.weight_decay))
    grades = torch.from_numpy(grades_of(records))
    held_out = (held_out - mean) / std
    head, rows = fit(epochs(), grades, held_out, grades_of(val), options, settings)

    # w ((x - mean) / std) + b = (w / std) x + (b - mean w / std): whoever uses the head needs to
    # know nothing of the standardisation.
    weight = head.weight / std.unsqueeze(1)
    return LinearHead(weight, head.bias - mean @ weight), rows


def fit_paper(evaluation: Evaluation, records: list[Record]) -> tuple[LinearHead, Rows]:
    """Fit as published: fresh random crops each epoch, lr 0.001 * 25 / 256, best epoch on test."""
    log.info("protocol of the paper: the epoch is chosen on the test split, which flatters it")
    options = evaluation.options
    manifest = evaluation.manifest

    def epochs() -> Iterator[Tensor]:
        # Not cached: every epoch has crops of its own, which nobody asks for again.
        for epoch in range(options.epochs):
            seed = options.seed * SEED_STRIDE + epoch
            dataset = PhotographDataset(manifest, records, ProbeView(), seed)
            title = f"epoch {epoch + 1}"
            features = extract_features(
                evaluation.backbone, dataset, evaluation.dtype, options.workers, title
            )
            yield probe_input(features, options)

    test = graded(manifest, manifest.split("test"), "test")
    view = choose_view(options.protocol, evaluation.image_size)
    held_out = extract_input(evaluation, manifest, test, view)
    grades = torch.from_numpy(grades_of(records))
    return fit(epochs(), grades, held_out, grades_of(test), options, [(PAPER_LR, 0.0)])


def evaluate(head: LinearHead, features: Tensor, records: list[Record]) -> metrics.Predictions:
    """Return the head's predictions for records by their features (N, F)."""
    probabilities = (features @ head.weight + head.bias).softmax(dim=1).numpy()
    predicted = probabilities.argmax(axis=1)
    return metrics.Predictions(grades_of(records), predicted, probabilities, patients_of(records))


def save_head(evaluation: Evaluation, head: LinearHead) -> None:
    """Write head.safetensors: weight (G, F) and bias (G,), and what input they belong to."""
    options = evaluation.options
    about = {
        "backbone": evaluation.weights.sha256,
        "spec": asdict(evaluation.weights.spec),
        "features": options.features,
        "protocol": options.protocol,
        "blocks": N_BLOCKS,
        "image_size": evaluation.image_size,
    }
    metadata = {"ssrl": json.dumps(about)}
    tensors = {"weight": head.weight.T.contiguous(), "bias": head.bias.contiguous()}
    path = evaluation.output / "head.safetensors"
    write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


# -------------------------------------------------------------------------------------- the program
def main(options: Options, config: Path | None) -> None:
    """Fit the probe, grade the test split and every `--test-data`."""
    kind = "linear"
    if options.protocol == "paper":
        kind += "-paper"
    if options.features == "color":
        kind += "-color"
    evaluation = open_evaluation(options, kind)

    # All that may be at fault is asked before the work, so that a fault costs none.
    sets = open_test_sets(evaluation.manifest, options.test_data)
    protocol = name_protocol(options, evaluation.image_size)
    check_results(evaluation, sets, protocol)

    records = training_records(evaluation)
    if options.protocol == "paper":
        head, rows = fit_paper(evaluation, records)
    else:
        head, rows = fit_whole(evaluation, records)
    save_head(evaluation, head)

    view = choose_view(options.protocol, evaluation.image_size)
    for test_set in sets:
        features = extract_input(evaluation, test_set.manifest, test_set.records, view)
        predictions = evaluate(head, features, test_set.records)
        details = {"by_hyperparameter": rows}
        write_results(evaluation, protocol, test_set, predictions, grades_of(records), details)


if __name__ == "__main__":
    run_main(main, Options)
