"""Frozen features of photographs, and what is read off them: k-NN votes, RankMe, signs of collapse.

The evaluations and training share what is here. Nothing here writes files; evaluation.py does.
Shapes: B batch, N images, M bank images, D width, G grades.
"""

from __future__ import annotations

import itertools
import math
import zipfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from augment import PaperView, WholeView
from data import READABLE, PhotographDataset, View, evaluation_loader, grades_of
from fundus import handmade, metrics
from fundus.copies import signature
from fundus.manifest import GRADES, Manifest, Record
from utils import InputError, log, sha256_of, write_atomic
from vision_transformer import Backbone, Tokens

N_BLOCKS = 4  # whose [CLS] is kept: the most that any protocol reads
BATCH = 64  # photographs that go through the backbone at once
QUERIES = 2048  # photographs that look for neighbours at once, which bounds the memory

SEEN = "seen.npz"  # in a run folder: signatures of the photographs that it was trained on

WATCHED = 256  # photographs at most whose embeddings training looks at between epochs
NEIGHBOURS = 15  # that vote on val while training, as in the evaluation's headline


# --------------------------------------------------------------------------------------- extraction
def choose_view(protocol: str, image_size: int) -> View:
    """Return how frozen backbones look at photographs: whole, or as published ("paper")."""
    if protocol == "paper":
        return PaperView()
    return WholeView(image_size)


@torch.inference_mode()
def extract_features(
    backbone: Backbone,
    dataset: PhotographDataset,
    dtype: torch.dtype | None = None,
    workers: int = 0,
    title: str | None = None,
) -> dict[str, Tensor]:
    """Return frozen features of a dataset's images, in its order, as fp32 on the CPU.

    They are those of vision_transformer.FrozenFeatures by their names (`cls` of the last 4 blocks),
    and `color` (N, 6): the input's RGB mean and standard deviation, 0 to 1, against which features
    are held. `title` shows a progress bar. Where the dataset's view gives it, also `look` (N, 4096)
    int8, each photograph's signature. Of a dataset that replaces photographs, also `bad` (N,)
    int64, as its items say it. Raises InputError, naming the photograph, where a feature is not
    finite.
    """
    hidden = None  # a bar on terminals alone
    if not title:
        hidden = True
    total = math.ceil(len(dataset) / BATCH)
    batches = tqdm(
        evaluation_loader(dataset, BATCH, workers), desc=title, total=total, disable=hidden
    )

    device = backbone.device
    was_training = backbone.training
    backbone.eval()
    parts = defaultdict(list)
    for batch in batches:
        images = batch["image"].to(device)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            found = backbone.frozen_features(backbone.normalize(images), N_BLOCKS)
        for name, values in found._asdict().items():
            parts[name].append(values.float().cpu())

        pixels = images.float().flatten(2) / 255
        color = torch.cat([pixels.mean(dim=2), pixels.std(dim=2)], dim=1)
        parts["color"].append(color.cpu())  # (B, 6)
        if "look" in batch:
            parts["look"].append(batch["look"])
        if dataset.max_bad:
            parts["bad"].append(batch["bad"])
    backbone.train(was_training)
    features = {name: torch.cat(pieces) for name, pieces in parts.items()}
    check_finite(features, dataset.records)
    return features


class FrozenTeacher(nn.Module):
    """A network of any kind that stays as it is; what it makes of crops are a student's targets.

    `network` is a Backbone, or another network of timm that gives a map (weights.open_frozen). The
    crops are of `crop_size` pixels, and the student cuts them into `grid` x `grid` patches. Raises
    InputError where the network cannot look at such crops.
    """

    def __init__(self, network: nn.Module, crop_size: int, grid: int) -> None:
        super().__init__()
        self.network = network
        self.grid = grid
        self.is_backbone = isinstance(network, Backbone)
        look = vars(network.spec) if self.is_backbone else network.pretrained_cfg
        self.register_buffer("mean", torch.tensor(look["mean"]).view(3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(look["std"]).view(3, 1, 1) * 255)

        # Some networks take images of one size alone. One look tells, and how much they say.
        try:
            tokens = self(torch.zeros(1, 3, crop_size, crop_size, dtype=torch.uint8))
        except (AssertionError, RuntimeError) as error:
            raise InputError(
                f"--distill: the network cannot look at crops of {crop_size} pixels ({error}); "
                "take another network or --global-crop-size"
            ) from None
        self.widths = tokens.embedding.shape[1], tokens.patches.shape[2]

    @torch.no_grad()
    def forward(self, crops: Tensor) -> Tokens:
        """Return what the network makes of uint8 crops (B, 3, h, w), in the student's patches.

        A network of convolutions has no [CLS]: mean and maximum of its last map stand for it.
        """
        images = (crops - self.mean) / self.std
        if self.is_backbone:
            # As many patches as the student has, each of the network's own size.
            side = self.grid * self.network.spec.patch_size
            if side != images.shape[-1]:
                images = F.interpolate(images, side, mode="bicubic", antialias=True)
            return self.network.all_tokens(images)
        (features,) = self.network.forward_intermediates(
            images, indices=1, intermediates_only=True, output_fmt="NCHW"
        )
        features = features.float()  # torch resizes no bf16 on a CPU
        embedding = torch.cat([features.mean(dim=(2, 3)), features.amax(dim=(2, 3))], dim=1)
        patches = F.interpolate(features, (self.grid, self.grid), mode="bilinear", antialias=True)
        return Tokens(embedding, patches.flatten(2).transpose(1, 2))


def check_finite(features: dict[str, Tensor], records: list[Record]) -> None:
    """Raise InputError, naming the first photograph, where a feature of it is not finite."""
    for name, values in features.items():
        is_finite = values.reshape(len(records), -1).isfinite().all(dim=1)
        bad = (~is_finite).nonzero().flatten().tolist()
        if not bad:
            continue
        # Left alone it would be graded 0, as NaN wins no comparison, and mostly rightly so.
        raise InputError(
            f"{records[bad[0]].path}: its features ({name}) are not finite, like those of "
            f"{len(bad)} photographs of {len(records)}; expected finite ones: are the weights "
            "damaged, or does --precision fp32 help?"
        )


class Signed:
    """A view that gives the photograph's signature, by which copies are found, beside its image."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.min_side = getattr(view, "min_side", None)

    def __call__(self, photograph: Tensor, key: tuple[int, ...]) -> dict[str, Tensor]:
        return self.view(photograph, key) | sign(photograph, key)


def sign(photograph: Tensor, _key: tuple[int, ...]) -> dict[str, Tensor]:
    """Return a photograph's (3, h, w) signature alone, `look` (4096,) int8 (copies.signature)."""
    look = signature(photograph.permute(1, 2, 0).numpy())
    return {"look": torch.from_numpy(look.ravel())}


class HandmadeView:
    """A view that gives a photograph's hand-made statistics, `handmade` (F,), and `look`."""

    def __call__(self, photograph: Tensor, key: tuple[int, ...]) -> dict[str, Tensor]:
        picture = WholeView(handmade.SIDE)(photograph, key)["image"].permute(1, 2, 0).numpy()
        statistics = torch.from_numpy(handmade.handmade_features(picture))
        return {"handmade": statistics} | sign(photograph, key)


def extract_handmade(manifest: Manifest, records: list[Record], workers: int) -> dict[str, Tensor]:
    """Return the records' hand-made statistics `handmade` (N, F) fp32, and `look` (N, 4096)."""
    dataset = PhotographDataset(manifest, records, HandmadeView())
    total = math.ceil(len(dataset) / BATCH)
    parts = defaultdict(list)
    batches = evaluation_loader(dataset, BATCH, workers)
    for batch in tqdm(batches, desc="statistics", total=total, disable=None):
        for name in ("handmade", "look"):
            parts[name].append(batch[name])
    features = {name: torch.cat(pieces) for name, pieces in parts.items()}
    check_finite(features, records)
    return features


@dataclass(frozen=True)
class Signatures:
    """By what photographs are known again: the checksum of the file, and what the retina shows."""

    paths: list[str]
    sha256: list[str]
    looks: np.ndarray  # (N, 4096) int8, see copies.signature

    def save(self, path: Path) -> None:
        """Write the signatures into one file, whole or not at all."""

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                np.savez_compressed(file, paths=self.paths, sha256=self.sha256, looks=self.looks)

        write_atomic(path, write)

    @classmethod
    def load(cls, path: Path) -> Signatures:
        """Return what `save` wrote; raises InputError where that cannot be read."""
        try:
            with np.load(path) as arrays:
                return cls(arrays["paths"].tolist(), arrays["sha256"].tolist(), arrays["looks"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(
                f"{path}: cannot be read ({error}); it says what the run was trained on; "
                "restore it, or take weights alone (backbone.safetensors, copied elsewhere)"
            ) from None

    def joined(self, other: Signatures) -> Signatures:
        """Return these and the others."""
        looks = np.concatenate([self.looks, other.looks])
        return Signatures(self.paths + other.paths, self.sha256 + other.sha256, looks)


def seen_file(weights: Path) -> Path | None:
    """Return the file that says what weights were trained on, beside them or in their run folder.

    None where there is none: runs of others have none, and what they saw is not known.
    """
    for folder in (weights, weights.parent):
        if (folder / SEEN).is_file():
            return folder / SEEN
    return None


def sign_photographs(
    manifest: Manifest, records: list[Record], workers: int, max_bad: float = 0.0
) -> Signatures:
    """Return the records' signatures; those of unreadable photographs are their substitutes'."""
    dataset = PhotographDataset(manifest, records, sign, max_bad=max_bad)
    batches = evaluation_loader(dataset, BATCH, workers)
    total = math.ceil(len(dataset) / BATCH)
    looks = []
    for batch in tqdm(batches, desc="signatures", total=total, disable=None):
        looks.append(batch["look"].numpy())
    checksums = [checksum_of(manifest, record) for record in records]
    return Signatures([record.path for record in records], checksums, np.concatenate(looks))


def checksum_of(manifest: Manifest, record: Record) -> str:
    """Return the SHA-256 of a record's file, which is read where the manifest does not say it."""
    return record.sha256 or sha256_of(manifest.root / record.path)


# --------------------------------------------------------------------------------------------- k-NN
def knn_predict(
    bank: Tensor, bank_grades: Tensor, queries: Tensor, ks: Iterable[int], temperature: float = 0.07
) -> dict[int, Tensor]:
    """Return {k: votes (N, G) float64} of the weighted k-NN classifier, rows summing to 1.

    `bank` (M, D) and `queries` (N, D) are l2-normalised here; `bank_grades` (M,) int64. The k most
    cosine-similar bank images vote with exp(similarity / temperature) (Wu et al., arXiv 1805.01978,
    section 3.4, as DINO uses it). Raises InputError when a k is not in 1..M.
    """
    ks = list(dict.fromkeys(ks))
    for k in ks:
        if not 1 <= k <= len(bank):
            raise InputError(
                f"--k {k}: there are {len(bank)} graded training images; use 1 to that"
            )

    bank = F.normalize(bank, dim=1)
    queries = F.normalize(queries, dim=1)
    votes = defaultdict(list)
    for chunk in queries.split(QUERIES):
        # One search serves every k: neighbours come sorted, so the nearest k are the first k.
        similarity, nearest = (chunk @ bank.T).topk(max(ks), dim=1)
        # Divided by the nearest one's, weights stay finite at any temperature; shares are the same.
        weight = torch.exp((similarity - similarity[:, :1]).double() / temperature)
        ballots = F.one_hot(bank_grades[nearest], GRADES) * weight.unsqueeze(2)  # (N, k, G)
        for k in ks:
            votes[k].append(_exact_shares(ballots[:, :k].sum(dim=1)))
    return {k: torch.cat(shares) for k, shares in votes.items()}


def _exact_shares(votes: Tensor) -> Tensor:
    """Return votes (N, G) float64 as shares whose sums over any grades are exact, and 1 over all.

    Photographs with equal votes tie so in every sum, where rounding would put them in some order.
    """
    # Multiples of 2^-40 up to 1 have at most 41 bits, so that float64 adds them without rounding.
    steps = torch.round(votes / votes.sum(dim=1, keepdim=True) * 2**40)
    largest = steps.argmax(dim=1, keepdim=True)
    missing = 2**40 - steps.sum(dim=1, keepdim=True)
    return steps.scatter_add(1, largest, missing) / 2**40


# ------------------------------------------------------------------------------- how embeddings lie
def rankme(features: Tensor) -> float:
    """Return RankMe, exp of the entropy of the normalised singular values of features (N, D).

    The effective number of directions in use, 1 to min(N, D). arXiv 2210.02885, equation 3.
    """
    values = torch.linalg.svdvals(features.double())
    return float(torch.special.entr(values / values.sum()).sum().exp())


def embedding_std(features: Tensor) -> float:
    """Return the mean standard deviation of l2-normalised features (N, D) times sqrt(D).

    Near 1 for directions spread evenly, near 0 when all images have one embedding.
    """
    unit = F.normalize(features, dim=1)
    return float(unit.std(dim=0).mean() * features.shape[1] ** 0.5)


def name_collapse(measured: dict[str, float], prototypes: int) -> str:
    """Name the collapse that measurements show and what to change; empty when healthy.

    `measured` holds `loss` (nats), `teacher_entropy` and `marginal_entropy` as
    `losses.target_entropies` returns them, where there is self-distillation, `embedding_std` and
    `rankme` of frozen features. Both of the last are needed: embeddings spread along one line have
    a healthy standard deviation.
    """
    remedy = "try --use-bn-in-head, --centering sinkhorn"
    if "teacher_entropy" in measured:
        # Flat targets alone are how every training begins; with a loss of ln K nothing was learnt.
        is_flat = measured["teacher_entropy"] > 0.98
        if is_flat and abs(measured["loss"] - math.log(prototypes)) < 0.05:
            return f"uniform: every target is flat, loss = ln K; {remedy} or a lower --teacher-temp"
        if measured["marginal_entropy"] < 0.05:
            return f"one prototype: all photographs get the same target; {remedy} or a lower --lr"
    if measured["embedding_std"] < 0.05 or measured["rankme"] < 2:
        return f"low rank: all embeddings lie along few directions; {remedy}"
    return ""


class Monitor:
    """Photographs that training looks at between epochs.

    `fixed` are up to 256 of train, spread over it, with grades or without. `graded` are all graded
    ones of train and of val. Where training goes on without unreadable photographs (`max_bad` above
    0), so does this: they are left out.
    """

    def __init__(
        self, manifest: Manifest, dtype: torch.dtype | None, workers: int, max_bad: float = 0.0
    ) -> None:
        self.manifest = manifest
        self.dtype = dtype
        self.workers = workers
        self.max_bad = max_bad
        train = manifest.split("train")
        spacing = max(1, len(train) // WATCHED)
        self.fixed = train[::spacing][:WATCHED]
        self.graded: list[list[Record]] = []
        for split in (train, manifest.split("val")):
            self.graded.append([record for record in split if record.grade is not None])

    def embeddings(self, backbone: Backbone, records: list[Record]) -> tuple[Tensor, list[Record]]:
        """Return the normed [CLS] (N, D) of the records that can be read, and these records.

        The whole photograph is in view.
        """
        view = WholeView(backbone.spec.image_size)
        dataset = PhotographDataset(self.manifest, records, view, max_bad=self.max_bad)
        features = extract_features(backbone, dataset, self.dtype, self.workers)
        cls_tokens = features["cls"][:, -1]
        if not self.max_bad:
            return cls_tokens, records
        is_readable = features["bad"] == READABLE
        readable = list(itertools.compress(records, is_readable.tolist()))
        if len(readable) < len(records):
            message = "%d photographs cannot be read; RankMe and k-NN leave them out"
            log.warning(message, len(records) - len(readable))
        return cls_tokens[is_readable], readable

    def look(
        self, backbone: Backbone, epoch: int, options: Any, latest: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return RankMe and the like of fixed photographs, k-NN when due; warn of a collapse.

        `options` are training's; `latest` are its last measurements, none before the first step.
        """
        fixed, _ = self.embeddings(backbone, self.fixed)
        record: dict[str, Any] = {
            "epoch": epoch,
            "rankme": rankme(fixed),
            "embedding_std": embedding_std(fixed),
        }
        # Without self-distillation nothing asks for more directions than lesions have kinds.
        if latest and options.distillation_weight:
            collapse = name_collapse(latest | record, options.out_dim)
            if collapse:
                log.warning("epoch %d: collapse, %s", epoch, collapse)
                record["collapse"] = collapse

        every = options.knn_every
        is_due = every > 0 and (epoch % every == 0 or epoch == options.epochs)
        # Without grades in train nobody can vote, without grades in val no vote can be judged.
        if is_due and all(self.graded):
            votes, grades, train_grades = self.knn_votes(backbone)
            scores = metrics.short_scores(votes.numpy(), grades, train_grades)
            for name, value in scores.items():
                record[f"knn_{name}"] = value
        return record

    def knn_votes(self, backbone: Backbone) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """Return the 15-NN's votes (N, G) on val, val's grades (N,) and train's (M,).

        Fewer neighbours vote if train has fewer.
        """
        bank, train = self.embeddings(backbone, self.graded[0])
        queries, val = self.embeddings(backbone, self.graded[1])
        train_grades = grades_of(train)
        k = min(NEIGHBOURS, len(train))
        votes = knn_predict(bank, torch.from_numpy(train_grades), queries, [k])
        return votes[k], grades_of(val), train_grades
