"""Grade photographs by a linear probe on frozen features.

    python eval_linear.py --pretrained runs/NAME
    python eval_linear.py --pretrained runs/NAME --features handmade
    python eval_linear.py --pretrained runs/NAME --protocol paper

Features are extracted once; every weight decay is fitted on them in every fold at once. The decay
is chosen by log-loss over folds of train and val by patient; temperature and thresholds of the
expected grade are fitted on the same folds; the test split is used once. Writes RUN/linear/:
results.json, predictions.csv, doubtful.csv, pictures, head.safetensors.
Shapes: B batch, N photographs, K folds, S decays, F features, D width, G grades.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from augment import ProbeView, ViewOptions
from data import PhotographDataset, View, grades_of, patients_of
from evaluation import (
    Evaluation,
    EvaluationOptions,
    GradedSet,
    Outcome,
    cached_features,
    cached_handmade,
    evaluate_all,
    open_evaluation,
)
from features import N_BLOCKS, extract_features
from fundus import metrics, plots, readings
from fundus.manifest import GRADES, Manifest, Record
from fundus.splits import fold_of_each, take_fraction
from utils import Bounds, InputError, cosine_schedule, flag_of, log, run_main, write_atomic

# More than there can be views or epochs, so that two seeds have no crop in common.
SEED_STRIDE = 100_003

Rows = list[dict[str, Any]]  # of results.json: one for each setting
Decays = Annotated[tuple[float, ...], Bounds(1e-9, 1e6)]
Fractions = Annotated[tuple[float, ...], Bounds(1e-6, 1)]

NEGLIGIBLE_GAIN = 1e-8  # nats: probes that a step can bring no further have converged
ROWS = 4096  # photographs whose errors are in memory at once

# The published evaluation's own values, and the options that it leaves no choice in.
PAPER_LR = 0.001 * 25 / 256
PAPER_BATCH = 25
PAPER_FIXES = (
    "weight_decay",
    "image_size",
    "features",
    "readout",
    "choice_folds",
    "fractions",
    "views",
    "flip_vertical",
    "rotation",
)


# ------------------------------------------------------------------------------------------ options
@dataclass
class Options(ViewOptions, EvaluationOptions):
    """Linear probe on frozen features."""

    weight_decay: Decays = (
        *(1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1),
        *(0.3, 1.0, 3.0, 10.0, 30.0, 100.0),
    )
    """Weight decays of the sweep, each 1 / (C N) for scikit-learn's C and N photographs."""
    epochs: Annotated[int, Bounds(1, 100_000)] = 300
    """Passes over the training features at most; without --views a fit ends when it has
    converged."""
    choice_folds: Annotated[int, Bounds(2, 100)] = 5
    """Folds of train and val, by patient, over which the weight decay is chosen by log-loss."""
    features: Literal["backbone", "color", "handmade"] = "backbone"
    """What the probe sees; color is the mean and deviation of RGB alone, handmade are statistics
    of the fundus (docs/evaluation.md): what a backbone must beat."""
    readout: Literal["cls", "tokens"] = "cls"
    """What is read of a backbone: [CLS] of the last blocks, or with it mean, standard deviation and
    largest values of the patch tokens."""
    views: Annotated[int, Bounds(0, 100_000)] = 0
    """Random crops of each training photograph to fit on, one an epoch, made and cached once; 0:
    the whole view alone."""
    fractions: Fractions = ()
    """Shares of the training patients to fit on as well, for example 0.01 0.1 1; each with
    --fraction-seeds draws of patients."""
    fraction_seeds: Annotated[int, Bounds(1, 1000)] = 5
    """Draws of patients for each of --fractions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.views > self.epochs:
            raise InputError(f"--views {self.views}: expected 0 to --epochs {self.epochs}")
        fixed = self._changed(PAPER_FIXES)
        if self.protocol == "paper" and fixed:
            raise InputError(f"--protocol paper fixes {', '.join(fixed)}; leave them out")
        about_views = self._changed([field.name for field in fields(ViewOptions)])
        if self.views == 0 and about_views:
            raise InputError(f"{about_views[0]}: is about --views, which are none")
        about_backbone = self._changed(["readout", "views"])
        if self.features != "backbone" and about_backbone:
            raise InputError(f"{about_backbone[0]}: is about --features backbone alone")
        if self.fractions and self.folds:
            raise InputError("--fractions: leave --folds out; each is a protocol of its own")

    def _changed(self, names: Sequence[str]) -> list[str]:
        """Return the flags of those of the options that are not as by default."""
        changed = []
        for field in fields(self):
            if field.name in names and getattr(self, field.name) != field.default:
                changed.append(flag_of(field.name))
        return changed


def name_protocol(options: Options, image_size: int) -> str:
    """Return what results.json calls the evaluation."""
    if options.protocol == "paper":
        return "linear probe, the paper's: best epoch on the test split"
    seen = {
        "backbone": f"whole view of {image_size} px",
        "color": "on colour alone",
        "handmade": "on hand-made statistics",
    }
    name = f"linear probe, {seen[options.features]}, chosen by log-loss over patient folds"
    if options.readout == "tokens":
        name += ", patch tokens too"
    if options.views:
        name += f", fitted on {options.views} random crops of each photograph"
    return name


# ---------------------------------------------------------------------------------------- the probe
class LinearHead(NamedTuple):
    """One linear classifier of features."""

    weight: Tensor  # (F, G)
    bias: Tensor  # (G,)

    def logits(self, features: Tensor) -> np.ndarray:
        """Return the logits (N, G) float64 of features (N, F)."""
        # In double, so that a confident probe still tells photographs apart.
        product = features.double() @ self.weight.double() + self.bias.double()
        return product.numpy()


class Probes:
    """Linear classifiers, fitted at once to the mean cross-entropy with weight decay.

    There is one for each group of photographs and decay: group k below K learns from all
    photographs but those of fold k, the last one from all. They read the same features, so their
    logits are one product of matrices and so are their gradients, X^T (softmax - truth) / N.
    Nothing else couples them.

    The steps need no learning rate. The curvature of cross-entropy is nowhere above half of the
    features' second moments (Boehning, "Multinomial logistic regression algorithm", 1992). Features
    come uncorrelated here (`Rotation`), so that this bound is one number for each of them, and a
    step of its inverse never overshoots. Nesterov's momentum (1983) is added, and begins anew for a
    probe whenever it points uphill (O'Donoghue and Candes, arXiv 1204.3982).
    """

    def __init__(self, spread: Tensor, decays: Sequence[float], learns: Tensor) -> None:
        """`spread` (F,) are the features' variances; `learns` (N, K + 1) is 1 where a group learns.

        Each probe begins at the grades' shares, where one of features that tell nothing ends.
        """
        groups = learns.shape[1]
        self.learns = learns
        self.weight = torch.zeros(len(spread), groups, len(decays), GRADES)  # (F, K + 1, S, G)
        self.bias = torch.zeros(groups, len(decays), GRADES)
        self.last_weight = self.weight
        self.last_bias = self.bias
        self.steps = torch.zeros(groups, len(decays), 1)  # since the momentum began

        # A group that learns from n of N photographs has at most N / n times the moments of all.
        self.count = learns.sum(dim=0).clamp(min=1)  # (K + 1,)
        share = (len(learns) / self.count).view(-1, 1, 1)
        # The decay is that of the probe of all photographs. Fewer have more of it, since what is
        # held fixed is scikit-learn's C: the weight of the sum of losses, not of their mean.
        self.decay = torch.tensor(decays).unsqueeze(1) * share  # (K + 1, S, 1)
        self.weight_step = 1 / (0.5 * spread.view(-1, 1, 1, 1) * share + self.decay)
        self.bias_step = 1 / (0.5 * share)

    def start_at(self, grades: Tensor) -> None:
        """Set the biases to the logarithms of the grades' shares in each group."""
        # One more of each grade, since a share of 0 has no logarithm.
        counts = self.learns.T @ F.one_hot(grades, GRADES).float() + 1  # (K + 1, G)
        shares = counts / counts.sum(dim=1, keepdim=True)
        self.bias = shares.log().unsqueeze(1).expand_as(self.bias).contiguous()
        self.last_bias = self.bias

    def logits(self, features: Tensor, group: int = -1) -> Tensor:
        """Return one group's logits (B, S, G) of features (B, F)."""
        weight = self.weight[:, group]
        product = features @ weight.flatten(1)
        return product.view(len(features), *weight.shape[1:]) + self.bias[group]

    def step(self, features: Tensor, grades: Tensor) -> float:
        """Take one step by the gradient over all features (N, F) and grades (N,).

        Returns by how many nats the step may still have lowered a probe's loss, the most of all.
        """
        momentum = self.steps / (self.steps + 3)
        weight = self.weight + momentum * (self.weight - self.last_weight)
        bias = self.bias + momentum * (self.bias - self.last_bias)
        weight_slope = self.decay * weight
        bias_slope = torch.zeros_like(bias)  # biases are not decayed
        for rows in torch.arange(len(features)).split(ROWS):
            product = features[rows] @ weight.flatten(1)
            error = (product.view(len(rows), *bias.shape) + bias).softmax(dim=3)
            error[torch.arange(len(rows)), :, :, grades[rows]] -= 1
            error *= (self.learns[rows] / self.count)[:, :, None, None]
            weight_slope += (features[rows].T @ error.flatten(1)).view_as(weight)
            bias_slope += error.sum(dim=0)

        self.last_weight = self.weight
        self.last_bias = self.bias
        self.weight = weight - self.weight_step * weight_slope
        self.bias = bias - self.bias_step * bias_slope

        uphill = (weight_slope * (self.weight - self.last_weight)).sum(dim=(0, 3))
        uphill += (bias_slope * (self.bias - self.last_bias)).sum(dim=2)
        self.steps = torch.where(uphill.unsqueeze(2) > 0, 0.0, self.steps + 1)
        gain = (weight_slope**2 * self.weight_step).sum(dim=(0, 3))
        gain += (bias_slope**2 * self.bias_step).sum(dim=2)
        return float(gain.max())


class Rotation:
    """Standardised features, turned so that they are uncorrelated: by their principal components.

    A turn changes neither the logits that probes can reach nor the length of their weights, which
    decay is about, but it makes their fit a matter of a few dozen steps.
    """

    def __init__(self, parts: Iterable[Tensor]) -> None:
        """`parts` are features (N, F) of the same photographs, seen in one or several views."""
        first = None
        total = 0
        for features in parts:
            if first is None:
                self.mean = features.mean(dim=0)
                self.std = features.std(dim=0).clamp(min=1e-6)
                first = (features - self.mean) / self.std
                moments = first.T.double() @ first.double()
            else:
                further = ((features - self.mean) / self.std).double()
                moments += further.T @ further
            total += len(features)
        values, vectors = torch.linalg.eigh(moments / total)
        # With fewer photographs than features, the rest of the directions hold rounding alone.
        is_used = values > 1e-6 * values[-1]
        self.basis = vectors[:, is_used].float()  # (F, at most F)
        self.spread = values[is_used].float()

    def turn(self, features: Tensor) -> Tensor:
        """Return features (N, F) standardised and turned."""
        return ((features - self.mean) / self.std) @ self.basis

    def turn_back(self, head: LinearHead) -> LinearHead:
        """Return the head of turned features as one of features as they are extracted."""
        # w (x - mean) / std + b = (w / std) x + (b - mean w / std): whoever uses the head needs to
        # know nothing of the standardisation.
        weight = (self.basis @ head.weight) / self.std.unsqueeze(1)
        return LinearHead(weight, head.bias - self.mean @ weight)


# ----------------------------------------------------------------------------- choice among probes
@dataclass(frozen=True)
class Fit:
    """A fitted probe: its head, and what was seen on photographs that it did not learn from."""

    head: LinearHead
    held_out: np.ndarray  # (N, G) float64 logits, out of fold
    rows: Rows


def fit(
    train: Iterator[Tensor],
    whole: Tensor,
    spread: Tensor,
    grades: Tensor,
    fold_of: Tensor,
    options: Options,
) -> Fit:
    """Fit all decays in all folds at once; return the probe of the decay with the lowest log-loss.

    `train` gives the features (N, F) of each epoch, `whole` (N, F) are those that probes are judged
    on, `spread` (F,) their variances. `fold_of` (N,) int64 says from which fold's probe a
    photograph is held out: each is judged once, by a probe that has not learnt from it. Only the
    last epoch is judged: a probe that has converged depends on its decay and on nothing else.
    Raises InputError where no loss is finite.
    """
    folds = int(fold_of.max()) + 1
    learns = torch.ones(len(grades), folds + 1)
    learns[torch.arange(len(grades)), fold_of] = 0
    probes = Probes(spread, options.weight_decay, learns)
    probes.start_at(grades)
    for _ in tqdm(range(options.epochs), desc="linear probe", disable=None):
        gain = probes.step(next(train), grades)
        if gain < NEGLIGIBLE_GAIN and not options.views:
            break

    held_out = torch.zeros(len(grades), len(options.weight_decay), GRADES)
    for fold in range(folds):
        rows = (fold_of == fold).nonzero().flatten()
        held_out[rows] = probes.logits(whole[rows], fold)
    rows, best = judge(held_out, grades, options.weight_decay)
    head = LinearHead(probes.weight[:, -1, best], probes.bias[-1, best])
    return Fit(head, held_out[:, best].double().numpy(), rows)


def judge(held_out: Tensor, grades: Tensor, decays: Sequence[float]) -> tuple[Rows, int]:
    """Return each decay's row of results.json, and the place of the decay with the lowest loss.

    `held_out` (N, S, G) are logits of photographs that the probes have not learnt from.
    """
    likelihoods = held_out.log_softmax(dim=2)[torch.arange(len(grades)), :, grades]  # (N, S)
    losses = -likelihoods.mean(dim=0)
    accuracies = (held_out.argmax(dim=2) == grades.unsqueeze(1)).float().mean(dim=0)
    if not losses.isfinite().any():
        raise InputError(
            "linear probe: no weight decay gave a finite loss; do features reach 1e18? "
            "--precision fp32 may help"
        )
    best = int(losses.nan_to_num(nan=math.inf).argmin())
    rows: Rows = []
    for setting, decay in enumerate(decays):
        loss = float(losses[setting])
        row = {
            "weight_decay": decay,
            "log_loss": loss if math.isfinite(loss) else None,
            "accuracy": float(accuracies[setting]),
            "chosen": setting == best,
        }
        rows.append(row)
    return rows, best


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return logits (N, G) as probabilities, float64."""
    return torch.from_numpy(logits).double().softmax(dim=1).numpy()


@dataclass(frozen=True)
class Calibration:
    """How a probe's logits become grades, fitted on photographs that it did not learn from."""

    temperature: float
    thresholds: np.ndarray  # (G - 1,) of the expected grade

    @classmethod
    def of(cls, logits: np.ndarray, grades: np.ndarray) -> Calibration:
        """Fit temperature, then thresholds, on out-of-fold logits (N, G) and grades (N,)."""
        temperature = readings.fit_temperature(logits, grades)
        expected = readings.expected_grade(softmax(logits / temperature))
        return cls(temperature, readings.fit_thresholds(expected, grades))

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Return calibrated probabilities (N, G)."""
        return softmax(logits / self.temperature)

    def thresholded(self, probabilities: np.ndarray) -> np.ndarray:
        """Return the grades (N,) that the thresholds of the expected grade give."""
        return readings.read_thresholds(readings.expected_grade(probabilities), self.thresholds)


# ------------------------------------------------------------------------------------- its features
def probe_input(features: dict[str, Tensor], options: Options) -> Tensor:
    """Return what the probe sees of extracted features, (N, F) fp32.

    [CLS] of the last 4 blocks for tiny and small backbones, the last one and the mean patch token
    for base and large (arXiv 2104.14294, appendix F.2); the paper takes 4 for all. The readout of
    tokens is [CLS] of the last 4 blocks with mean, deviation and largest values of patch tokens.
    """
    if options.features != "backbone":
        return features[options.features]
    cls_tokens = features["cls"]  # (N, 4, D)
    if options.readout == "tokens":
        tokens = [features["patch"], features["patch_std"], features["patch_top"]]
        return torch.cat([cls_tokens.flatten(1), *tokens], dim=1)
    # Any ViT of timm may come here, whatever its name, so its width tells its size: of the short
    # names base (768) and large (1024) are this wide, and no other.
    is_large = cls_tokens.shape[2] >= 768
    if options.protocol == "paper" or not is_large:
        return cls_tokens.flatten(1)
    return torch.cat([cls_tokens[:, -1], features["patch"]], dim=1)


def extract_input(
    evaluation: Evaluation,
    manifest: Manifest,
    records: Sequence[Record],
    view: View | None = None,
    seed: int = 0,
) -> Tensor:
    """Return what the probe sees of records, (N, F), in the evaluation's own view or another."""
    if evaluation.options.features == "handmade":
        return cached_handmade(evaluation, manifest, records)["handmade"]
    features = cached_features(evaluation, manifest, records, view or evaluation.view, seed)
    return probe_input(features, evaluation.options)


def extract_of_all(
    evaluation: Evaluation, splits: Sequence[list[Record]], view: View | None = None, seed: int = 0
) -> Tensor:
    """Return what the probe sees of several splits' records, one after the other, (N, F)."""
    parts = []
    for records in splits:
        if records:
            parts.append(extract_input(evaluation, evaluation.manifest, records, view, seed))
    return torch.cat(parts)


def fit_whole(evaluation: Evaluation, splits: Sequence[list[Record]], learnt: list[Record]) -> Fit:
    """Fit on cached features of the whole view, or of `--views`, standardised.

    `splits` are the training photographs as their features are cached, `learnt` those of them that
    the probe may learn from. The head that is returned takes features as they are extracted.
    """
    options = evaluation.options
    # Of a fraction of the patients, features are those rows of the whole cache.
    place: dict[str, int] = {}
    for records in splits:
        for record in records:
            place[record.path] = len(place)
    chosen = torch.tensor([place[record.path] for record in learnt])

    views: list[tuple[View | None, int]] = [(None, 0)]
    if options.views:
        crop = ProbeView(evaluation.image_size, options.flip_vertical, options.rotation)
        start = options.seed * SEED_STRIDE
        views = [(crop, start + number) for number in range(options.views)]

    def features_of(view: View | None, seed: int) -> Tensor:
        return extract_of_all(evaluation, splits, view, seed)[chosen]

    # One view at a time is in memory, since ten of a large set may fill it.
    seen = [(None, 0)]
    if options.views:
        seen += views
    rotation = Rotation(features_of(*view) for view in seen)
    whole = rotation.turn(features_of(None, 0))

    def epochs() -> Iterator[Tensor]:
        for view, seed in itertools.cycle(views):
            if view is None:
                yield whole
            else:
                yield rotation.turn(features_of(view, seed))

    grades = torch.from_numpy(grades_of(learnt))
    fold_of = torch.tensor(fold_of_each(learnt, options.choice_folds))
    found = fit(epochs(), whole, rotation.spread, grades, fold_of, options)
    return replace(found, head=rotation.turn_back(found.head))


# ----------------------------------------------------------------------------- the paper's protocol
def fit_paper(
    evaluation: Evaluation, records: list[Record], test: GradedSet
) -> tuple[LinearHead, Rows]:
    """Fit as published: fresh random crops each epoch, lr 0.001 * 25 / 256, best epoch on test.

    The best epoch is the most accurate one; of equals the one with the lower loss.
    """
    log.info("protocol of the paper: the epoch is chosen on the test split, which flatters it")
    options = evaluation.options
    held_out = extract_input(evaluation, test.manifest, test.records)
    truth = torch.from_numpy(grades_of(test.records))
    grades = torch.from_numpy(grades_of(records))
    # As published: normal weights of deviation 0.01 and SGD (DINO's linear evaluation).
    linear = nn.Linear(held_out.shape[1], GRADES)
    generator = torch.Generator().manual_seed(options.seed)
    nn.init.normal_(linear.weight, 0.0, 0.01, generator=generator)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.SGD(linear.parameters(), PAPER_LR, momentum=0.9)

    best = (-1.0, 0.0)
    row: dict[str, Any] = {"lr": PAPER_LR, "chosen": True}
    head = _head_of(linear)
    for epoch in range(options.epochs):
        # Not cached: every epoch has crops of its own, which nobody asks for again.
        seed = options.seed * SEED_STRIDE + epoch
        dataset = PhotographDataset(evaluation.manifest, records, ProbeView(), seed)
        title = f"epoch {epoch + 1}"
        features = extract_features(
            evaluation.backbone, dataset, evaluation.dtype, options.workers, title
        )
        train = probe_input(features, options)
        order = np.random.default_rng((options.seed, epoch)).permutation(len(train))
        chunks = torch.from_numpy(order).split(PAPER_BATCH)
        for number, rows in enumerate(chunks):
            progress = epoch + number / len(chunks)
            optimizer.param_groups[0]["lr"] = cosine_schedule(
                progress, options.epochs, PAPER_LR, 0.0
            )
            optimizer.zero_grad()
            F.cross_entropy(linear(train[rows]), grades[rows]).backward()
            optimizer.step()

        with torch.inference_mode():
            logits = linear(held_out)
        accuracy = float((logits.argmax(dim=1) == truth).float().mean())
        loss = float(F.cross_entropy(logits, truth))
        if math.isfinite(loss) and (accuracy, -loss) > best:
            best = (accuracy, -loss)
            row.update(epoch=epoch + 1, accuracy=accuracy, log_loss=loss)
            head = _head_of(linear)
    return head, [row]


def _head_of(linear: nn.Linear) -> LinearHead:
    """Return a copy of a layer as a head."""
    return LinearHead(linear.weight.detach().T.clone(), linear.bias.detach().clone())


# --------------------------------------------------------------------------------------- the grades
def grade(
    evaluation: Evaluation,
    training: list[Record],
    validation: list[Record],
    sets: Sequence[GradedSet],
) -> list[Outcome]:
    """Fit the probe and grade the test sets."""
    if evaluation.options.protocol == "paper":
        head, rows = fit_paper(evaluation, training, sets[0])
        save_head(evaluation, head, None)
        details = {"by_hyperparameter": rows, "candidates": evaluation.options.epochs}
        outcomes = []
        for test_set in sets:
            features = extract_input(evaluation, test_set.manifest, test_set.records)
            predictions = predict(softmax(head.logits(features)), test_set.records)
            outcomes.append(
                Outcome(
                    test_set, predictions, grades_of(training), features=features, details=details
                )
            )
        return outcomes

    splits = [training, validation]
    learnt = [*training, *validation]
    outcomes = grade_by(evaluation, splits, learnt, sets)
    if evaluation.options.fractions:
        by_fraction = grade_fractions(evaluation, splits, learnt, sets[0])
        outcomes[0].details["by_fraction"] = by_fraction
        if evaluation.options.pictures:
            plots.plot_fractions(by_fraction, evaluation.output / "fractions.png")
    return outcomes


def grade_by(
    evaluation: Evaluation,
    splits: Sequence[list[Record]],
    learnt: list[Record],
    sets: Sequence[GradedSet],
) -> list[Outcome]:
    """Fit on the photographs `learnt` of the splits, keep the head, grade the test sets."""
    found = fit_whole(evaluation, splits, learnt)
    calibration = Calibration.of(found.held_out, grades_of(learnt))
    out_of_fold = predict(calibration.probabilities(found.held_out), learnt)
    save_head(evaluation, found.head, calibration)

    outcomes = []
    for test_set in sets:
        features = extract_input(evaluation, test_set.manifest, test_set.records)
        probabilities = calibration.probabilities(found.head.logits(features))
        grades = calibration.thresholded(probabilities)
        outcomes.append(
            Outcome(
                test_set,
                predict(probabilities, test_set.records),
                grades_of(learnt),
                validation=out_of_fold,
                validation_records=learnt,
                thresholded=(calibration.thresholds, grades),
                features=features,
                details={
                    "candidates": len(found.rows),
                    "temperature": calibration.temperature,
                    "by_hyperparameter": found.rows,
                },
            )
        )
    return outcomes


def predict(probabilities: np.ndarray, records: Sequence[Record]) -> metrics.Predictions:
    """Return predictions of the most probable grade for records by probabilities (N, G)."""
    predicted = probabilities.argmax(axis=1)
    return metrics.Predictions(grades_of(records), predicted, probabilities, patients_of(records))


def grade_fractions(
    evaluation: Evaluation,
    splits: Sequence[list[Record]],
    learnt: list[Record],
    test_set: GradedSet,
) -> Rows:
    """Return a row for each share of the training patients: mean and spread over draws of them."""
    options = evaluation.options
    features = extract_input(evaluation, test_set.manifest, test_set.records)
    rows: Rows = []
    for fraction in options.fractions:
        scores: dict[str, list[float]] = {}
        counts = []
        for seed in range(options.fraction_seeds):
            records = take_fraction(learnt, fraction, seed)
            counts.append((len({record.patient for record in records}), len(records)))
            found = fit_whole(evaluation, splits, records)
            calibration = Calibration.of(found.held_out, grades_of(records))
            probabilities = calibration.probabilities(found.head.logits(features))
            predictions = predict(probabilities, test_set.records)
            values = metrics.point_values(predictions)
            thresholded = replace(predictions, predicted=calibration.thresholded(probabilities))
            values["thresholded_qwk"] = metrics.point_values(thresholded)["qwk"]
            for name, entry in values.items():
                if entry["value"] is not None:
                    scores.setdefault(name, []).append(entry["value"])
        patients, images = np.mean(counts, axis=0)
        row = {
            "fraction": fraction,
            "patients": round(float(patients)),
            "images": round(float(images)),
            "seeds": options.fraction_seeds,
        }
        for name, values in scores.items():
            deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
            row[name] = {"mean": float(np.mean(values)), "sd": deviation, "values": values}
        log.info(
            "fraction %g, %d patients: qwk of thresholds %.3f, referable AUROC %.3f",
            fraction,
            patients,
            row["thresholded_qwk"]["mean"],
            row["referable_auroc"]["mean"],
        )
        rows.append(row)
    return rows


def save_head(evaluation: Evaluation, head: LinearHead, calibration: Calibration | None) -> None:
    """Write head.safetensors: weight (G, F) and bias (G,), and what input they belong to.

    A calibrated head is divided by its temperature, so that softmax of its logits is calibrated.
    """
    options = evaluation.options
    about = {
        "backbone": evaluation.weights.sha256,
        "spec": asdict(evaluation.weights.spec),
        "features": options.features,
        "readout": options.readout,
        "protocol": options.protocol,
        "blocks": N_BLOCKS,
        "image_size": evaluation.image_size,
    }
    temperature = 1.0
    if calibration:
        temperature = calibration.temperature
        about["thresholds"] = calibration.thresholds.tolist()
    metadata = {"ssrl": json.dumps(about)}
    weight = (head.weight.T / temperature).contiguous()
    tensors = {"weight": weight, "bias": (head.bias / temperature).contiguous()}
    path = evaluation.output / "head.safetensors"
    write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


# -------------------------------------------------------------------------------------- the program
def main(options: Options, config: Path | None) -> None:
    """Fit the probe, grade the test split and every `--test-data`, or every fold."""
    kind = "linear"
    if options.protocol == "paper":
        kind += "-paper"
    if options.features != "backbone":
        kind += f"-{options.features}"
    if options.readout != "cls":
        kind += f"-{options.readout}"
    if options.folds:
        kind += "-folds"
    if options.fractions:
        kind += "-fractions"
    evaluation = open_evaluation(options, kind)
    evaluate_all(evaluation, name_protocol(options, evaluation.image_size), grade)


if __name__ == "__main__":
    run_main(main, Options)
