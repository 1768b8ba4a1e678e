"""Grade photographs by a linear probe on frozen features.

    python eval_linear.py --pretrained runs/NAME
    python eval_linear.py --pretrained runs/NAME --protocol paper

Features are extracted once; every learning rate and weight decay is trained on them at once. Epoch
and setting are chosen on val, the test split is used once. Writes RUN/linear/: results.json,
predictions.csv, confusion.png, head.safetensors. Shapes: S settings, F features, G = 5 grades.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from augment import PaperView, ProbeView, WholeView
from data import DataOptions, PhotographDataset, graded, grades_of, patients_of
from evaluation import (
    Evaluation,
    cached_features,
    check_results,
    describe,
    open_evaluation,
    test_sets,
    write_results,
)
from features import N_BLOCKS, extract_features
from fundus import metrics
from fundus.manifest import GRADES, Record
from utils import (
    InputError,
    RunOptions,
    check_options,
    cosine_schedule,
    log,
    run_main,
    write_atomic,
)
from weights import BackboneOptions

PAPER_LR, PAPER_BATCH = 0.001 * 25 / 256, 25


@dataclass
class Options(BackboneOptions, DataOptions, RunOptions):
    """Linear probe on frozen features."""

    lr: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)
    """Peak learning rates of the sweep."""
    weight_decay: tuple[float, ...] = (0.0, 1e-4, 1e-2)
    """Weight decays of the sweep."""
    epochs: int = 100
    """Passes over the training features."""
    batch_size: int = 256
    """Photographs of a step."""
    select: Literal["qwk", "accuracy", "balanced_accuracy"] = "qwk"
    """What the best setting and epoch are best at, on val."""
    features: Literal["backbone", "color"] = "backbone"
    """color: mean and deviation of RGB alone, the least that a backbone must beat."""
    views: int = 0
    """Random crops of each training photograph to fit on, one an epoch, made and cached once; 0:
    the whole view alone."""
    protocol: Literal["whole", "paper"] = "whole"
    """The whole fundus, or the published one: random crops, one setting, best epoch on test."""
    test_data: tuple[str, ...] = ()
    """Further sets to test on, all their graded photographs, nothing refitted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self, "epochs batch_size", lambda v: v >= 1, "1 or more")
        check_options(self, "views", lambda v: 0 <= v <= self.epochs, "0 to --epochs")
        check_options(self, "lr", lambda v: all(0 < x < np.inf for x in v), "numbers above 0")
        check_options(self, "weight_decay", lambda v: all(0 <= x < np.inf for x in v), "0 or more")
        if self.protocol == "paper":
            fixed = (
                "lr",
                "weight_decay",
                "image_size",
                "features",
                "batch_size",
                "select",
                "views",
            )
            plain = {f.name: f.default for f in fields(self)}
            changed = [n for n in fixed if getattr(self, n) != plain[n]]
            if changed:
                raise InputError(f"--protocol paper fixes {', '.join(changed)}; leave them out")
            self.select = "accuracy"  # what the published code keeps the best epoch of


def probe_input(found: dict[str, Tensor], arch: str, o: Options) -> Tensor:
    """Return what the probe sees of extracted features, (N, F) fp32.

    [CLS] of the last 4 blocks for tiny and small backbones, the last one and the mean patch token
    for base and large (arXiv 2104.14294, appendix F.2); the paper takes 4 for all.
    """
    if o.features == "color":
        return found["color"]
    if o.protocol == "paper" or arch not in ("vit_base", "vit_large"):
        return found["cls"].flatten(1)
    return torch.cat([found["cls"][:, -1], found["patch"]], dim=1)


class Probes:
    """Linear classifiers of S settings, trained at once by SGD with momentum 0.9 on cross-entropy.

    Their logits are one product, and so are their gradients: X^T (softmax - truth) / B.
    """

    def __init__(self, width: int, settings: list[tuple[float, float]], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        count = len(settings)
        weight = torch.randn(width, 1, GRADES, generator=generator) * 0.01
        self.weight = weight.repeat(1, count, 1)  # (F, S, G)
        self.bias = torch.zeros(count, GRADES)
        self.lr, self.decay = torch.tensor(settings).T.unsqueeze(2)  # (S, 1) each
        self.velocity = torch.zeros_like(self.weight), torch.zeros_like(self.bias)

    def logits(self, x: Tensor) -> Tensor:
        """Return (B, S, G) for features (B, F)."""
        return (x @ self.weight.flatten(1)).view(len(x), *self.bias.shape) + self.bias

    def step(self, x: Tensor, grades: Tensor, scale: float) -> None:
        """Take one step on features (B, F) and grades (B,), at `scale` times each peak lr."""
        error = self.logits(x).softmax(dim=2)  # (B, S, G)
        error[torch.arange(len(x)), :, grades] -= 1
        error /= len(x)
        slope = (x.T @ error.flatten(1)).view_as(self.weight) + self.decay * self.weight
        for value, velocity, grad in zip(
            (self.weight, self.bias), self.velocity, (slope, error.sum(0)), strict=True
        ):
            velocity.mul_(0.9).add_(grad)
            value.sub_(scale * self.lr * velocity)


def train_epoch(probes: Probes, x: Tensor, grades: Tensor, epoch: int, o: Options) -> None:
    """Pass once over features (N, F) in the epoch's own order."""
    batch = PAPER_BATCH if o.protocol == "paper" else o.batch_size
    order = torch.from_numpy(np.random.default_rng((o.seed, epoch)).permutation(len(x)))
    chunks = order.split(batch)
    for number, rows in enumerate(chunks):
        progress = epoch + number / len(chunks)
        probes.step(x[rows], grades[rows], cosine_schedule(progress, o.epochs, 1.0, 0.0))


def fit(
    train: Iterator[Tensor],
    grades: Tensor,
    held: Tensor,
    truth: np.ndarray,
    o: Options,
    settings: list[tuple[float, float]],
) -> tuple[Tensor, Tensor, list[dict[str, Any]]]:
    """Train all settings; return the best weight (F, G), bias (G,) and every setting's best epoch.

    `train` gives the features of each epoch; `held` and `truth` are those that the choice is made
    on: val, or the test split in the paper's protocol. The best has the highest `--select`; of
    equals the one with the lower loss.
    """
    first = next(train)
    probes = Probes(first.shape[1], settings, o.seed)
    best: list[dict[str, Any]] = [{"lr": lr, "weight_decay": decay} for lr, decay in settings]
    ranks = [(-2.0, 0.0)] * len(settings)  # below any score
    kept = torch.zeros_like(probes.weight), torch.zeros_like(probes.bias)
    for epoch in tqdm(range(o.epochs), desc="linear probe", disable=None):
        train_epoch(probes, first if epoch == 0 else next(train), grades, epoch, o)
        logits = probes.logits(held)
        confusion = np.zeros((len(settings), GRADES, GRADES))
        chosen = logits.argmax(dim=2).T.numpy()
        for setting, predicted in enumerate(chosen):
            np.add.at(confusion[setting], (truth, predicted), 1)
        scores = metrics.confusion_metrics(confusion)
        rows = logits.log_softmax(dim=2)[torch.arange(len(truth)), :, torch.from_numpy(truth)]
        loss = -rows.mean(dim=0)
        for s, score in enumerate(np.nan_to_num(scores[o.select], nan=-1.0).tolist()):
            rank = (score, -float(loss[s]))
            if torch.isfinite(loss[s]) and rank > ranks[s]:
                ranks[s] = rank
                best[s] |= {"epoch": epoch + 1, o.select: score, "loss": float(loss[s])}
                kept[0][:, s], kept[1][s] = probes.weight[:, s], probes.bias[s]
    winner = max(range(len(settings)), key=ranks.__getitem__)
    if "epoch" not in best[winner]:
        raise InputError(f"--lr {' '.join(map(str, o.lr))}: all diverged; give smaller ones")
    rows = [row | {"chosen": s == winner} for s, row in enumerate(best)]
    return kept[0][:, winner], kept[1][winner], rows


def fit_whole(e: Evaluation, o: Options, records: list[Record]) -> tuple[Tensor, Tensor, list[Any]]:
    """Fit on cached features of the whole view, or of `--views`, standardised; choose on val.

    The standardisation is folded into the weight (F, G) and bias (G,) returned.
    """
    whole, crop = WholeView(e.image_size), ProbeView(e.image_size)
    val = graded(e.manifest, e.manifest.split("val"), "val")

    def features_of(rows: list[Record], view: Any, seed: int = 0) -> Tensor:
        found = cached_features(e, e.manifest, rows, view, seed)
        return probe_input(found, e.weights.spec.arch, o)

    sources = [(crop, o.seed * 100_003 + number) for number in range(o.views)] or [(whole, 0)]
    first, held = features_of(records, *sources[0]), features_of(val, whole)
    mean, std = first.mean(dim=0), first.std(dim=0).clamp(min=1e-6)

    def epochs() -> Iterator[Tensor]:  # one view at a time, since ten may fill the memory
        if len(sources) == 1:
            yield from itertools.repeat((first - mean) / std)
        for view, seed in itertools.cycle(sources):
            yield (features_of(records, view, seed) - mean) / std

    settings = [(lr, decay) for lr in o.lr for decay in o.weight_decay]
    grades, truth = torch.from_numpy(grades_of(records)), grades_of(val)
    weight, bias, rows = fit(epochs(), grades, (held - mean) / std, truth, o, settings)
    weight = weight / std.unsqueeze(1)
    return weight, bias - mean @ weight, rows


def fit_paper(e: Evaluation, o: Options, records: list[Record]) -> tuple[Tensor, Tensor, list[Any]]:
    """Fit as published: fresh random crops each epoch, lr 0.001 * 25 / 256, best epoch on test."""
    arch, test = e.weights.spec.arch, graded(e.manifest, e.manifest.split("test"), "test")

    def epochs() -> Iterator[Tensor]:
        for epoch in range(o.epochs):
            dataset = PhotographDataset(e.manifest, records, ProbeView(), o.seed * 100_003 + epoch)
            found = extract_features(e.backbone, dataset, e.dtype, o.workers, f"epoch {epoch + 1}")
            yield probe_input(found, arch, o)

    held = probe_input(cached_features(e, e.manifest, test, PaperView()), arch, o)
    grades = torch.from_numpy(grades_of(records))
    return fit(epochs(), grades, held, grades_of(test), o, [(PAPER_LR, 0.0)])


def save_head(e: Evaluation, o: Options, weight: Tensor, bias: Tensor) -> None:
    """Write head.safetensors: weight (G, F) and bias (G,), and what input they belong to."""
    about = {
        "backbone": e.weights.sha256,
        "spec": asdict(e.weights.spec),
        "features": o.features,
        "protocol": o.protocol,
        "blocks": N_BLOCKS,
        "image_size": 224 if o.protocol == "paper" else e.image_size,
    }
    tensors = {"weight": weight.T.contiguous(), "bias": bias.contiguous()}
    meta = {"ssrl": json.dumps(about)}
    write_atomic(
        e.output / "head.safetensors", lambda path: save_file(tensors, path, metadata=meta)
    )


def main(o: Options, config: Path | None) -> None:
    """Fit the probe, grade the test split and every `--test-data`."""
    kind = "linear" + "-paper" * (o.protocol == "paper") + "-color" * (o.features == "color")
    e = open_evaluation(o, kind)
    sets = test_sets(e.manifest, o.test_data)  # before the work, so that a fault costs none
    protocol = f"linear probe, whole view of {e.image_size} px, epoch and setting chosen on val"
    if o.protocol == "paper":
        protocol = "linear probe, the paper's: best epoch on the test split"
    protocol += ", on colour alone" * (o.features == "color")
    protocol += f", fitted on {o.views} random crops of each photograph" * (o.views > 0)
    check_results(e, sets, protocol)
    records = graded(e.manifest, e.manifest.split("train"), "train")
    if o.protocol == "paper":
        records += [r for r in e.manifest.split("val") if r.grade is not None]
        log.info("protocol of the paper: the epoch is chosen on the test split, which flatters it")
    weight, bias, rows = (fit_paper if o.protocol == "paper" else fit_whole)(e, o, records)
    save_head(e, o, weight, bias)
    view = PaperView() if o.protocol == "paper" else WholeView(e.image_size)
    for name, (manifest, tested) in sets.items():
        found = cached_features(e, manifest, tested, view)
        shares = (probe_input(found, e.weights.spec.arch, o) @ weight + bias).softmax(1).numpy()
        p = metrics.Predictions(grades_of(tested), shares.argmax(1), shares, patients_of(tested))
        data = describe(e.manifest, manifest, tested)
        output = e.output / name
        summary = metrics.report(p, grades_of(records), output, protocol)
        results = {"protocol": protocol, "data": data, **summary, "by_hyperparameter": rows}
        write_results(e, output, tested, shares, results)


if __name__ == "__main__":
    run_main(main, Options)
