"""Frozen features: extracted once, cached, and judged. Shared by k-NN, linear probe and training.

Shapes: N images, M bank images, D width, G = 5 grades.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from augment import WholeView
from data import PhotographDataset, evaluation_loader, grades_of
from fundus import metrics
from fundus.manifest import GRADES, Manifest, Record
from utils import InputError, log
from vision_transformer import Backbone

N_BLOCKS = 4  # the most that any protocol reads


@torch.inference_mode()
def extract_features(
    backbone: Backbone,
    dataset: PhotographDataset,
    dtype: torch.dtype | None = None,
    workers: int = 0,
    title: str | None = None,
) -> dict[str, Tensor]:
    """Return frozen features of a dataset's images, in its order, as fp32 on the CPU.

    `cls` (N, 4, D): normed [CLS] of the last 4 blocks (fewer where there are fewer), the last one
    last; `patch` (N, D): mean patch token of the last; `color` (N, 6): the input's RGB mean and
    standard deviation, 0 to 1, against which features are held. `title` shows a progress bar.
    """
    device, found, training = backbone.device, [], backbone.training
    backbone.eval()
    batches = evaluation_loader(dataset, 64, workers)
    total = -(-len(dataset) // 64)
    for batch in tqdm(batches, desc=title, total=total, disable=None if title else True):
        images = batch["image"].to(device)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            cls_tokens, patch = backbone.frozen_features(backbone.normalize(images), N_BLOCKS)
        pixels = images.float().flatten(2) / 255
        color = torch.cat([pixels.mean(dim=2), pixels.std(dim=2)], dim=1)
        found.append([v.float().cpu() for v in (cls_tokens, patch, color)])
    backbone.train(training)
    names = ("cls", "patch", "color")
    return {name: torch.cat(v) for name, v in zip(names, zip(*found, strict=True), strict=True)}


def knn_predict(
    bank: Tensor, bank_grades: Tensor, queries: Tensor, ks: Iterable[int], temperature: float = 0.07
) -> dict[int, Tensor]:
    """Return {k: votes (N, G)} of the weighted k-NN classifier, rows summing to 1.

    `bank` (M, D) and `queries` (N, D) are l2-normalised here; `bank_grades` (M,) int64. The k most
    cosine-similar bank images vote with exp(similarity / temperature) (Wu et al., arXiv 1805.01978,
    section 3.4, as DINO uses it). One search of the largest k serves all, in chunks of queries.
    Raises InputError when a k is not in 1..M.
    """
    ks = list(dict.fromkeys(ks))
    for k in ks:
        if not 1 <= k <= len(bank):
            raise InputError(
                f"--k {k}: there are {len(bank)} graded training images; use 1 to that"
            )
    bank = torch.nn.functional.normalize(bank, dim=1)
    queries = torch.nn.functional.normalize(queries, dim=1)
    votes: dict[int, list[Tensor]] = {k: [] for k in ks}
    for chunk in queries.split(2048):
        similarity, nearest = (chunk @ bank.T).topk(max(ks), dim=1)
        weight = torch.exp((similarity - similarity[:, :1]) / temperature)  # the scale cancels
        ballots = torch.nn.functional.one_hot(bank_grades[nearest], GRADES)
        ballots = ballots * weight.unsqueeze(2)  # (N, k, G)
        for k in ks:
            summed = ballots[:, :k].sum(dim=1)
            votes[k].append(summed / summed.sum(dim=1, keepdim=True))
    return {k: torch.cat(parts) for k, parts in votes.items()}


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
    unit = torch.nn.functional.normalize(features, dim=1)
    return float(unit.std(dim=0).mean() * features.shape[1] ** 0.5)


def name_collapse(measured: dict[str, float], prototypes: int) -> str:
    """Name the collapse that measurements show and what to change; empty when healthy.

    `measured` holds `loss` (nats), `teacher_entropy` and `marginal_entropy` as
    `losses.target_entropies` returns them, `embedding_std` and `rankme` of frozen features. Both of
    the last are needed: embeddings spread along one line have a healthy standard deviation.
    """
    remedy = "try --use-bn-in-head, --centering sinkhorn"
    if measured["teacher_entropy"] > 0.98 and abs(measured["loss"] - math.log(prototypes)) < 0.05:
        return f"uniform: every target is flat, loss = ln K; {remedy} or a lower --teacher-temp"
    if measured["marginal_entropy"] < 0.05:
        return f"one prototype: all photographs get the same target; {remedy} or a lower --lr"
    if measured["embedding_std"] < 0.05 or measured["rankme"] < 2:
        return f"low rank: all embeddings lie along few directions; {remedy}"
    return ""


class Monitor:
    """Photographs at which training looks between epochs: up to 256 fixed ones, and val's."""

    def __init__(self, manifest: Manifest, dtype: torch.dtype | None, workers: int) -> None:
        self.manifest, self.how = manifest, (dtype, workers)
        records = manifest.split("train")
        self.fixed = records[:: max(1, len(records) // 256)][:256]
        splits = (manifest.split(name) for name in ("train", "val"))
        self.graded = [[r for r in split if r.grade is not None] for split in splits]

    def embeddings(self, backbone: Backbone, records: list[Record]) -> Tensor:
        """Return the normed [CLS] (N, D) of records, the whole photograph in view."""
        dataset = PhotographDataset(self.manifest, records, WholeView(backbone.spec.image_size))
        return extract_features(backbone, dataset, *self.how)["cls"][:, -1]

    def look(
        self, backbone: Backbone, epoch: int, options: Any, latest: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return RankMe and the like of fixed photographs, k-NN when due; warn of a collapse.

        `options` are training's; `latest` are its last measurements, none before the first step.
        """
        fixed = self.embeddings(backbone, self.fixed)
        record: dict[str, Any] = {
            "epoch": epoch,
            "rankme": rankme(fixed),
            "embedding_std": embedding_std(fixed),
        }
        if latest:
            collapse = name_collapse(latest | record, options.out_dim)
            if collapse:
                log.warning("epoch %d: collapse, %s", epoch, collapse)
                record["collapse"] = collapse
        every = options.knn_every
        is_due = every > 0 and (epoch % every == 0 or epoch == options.epochs)
        if is_due and all(self.graded):
            scores = metrics.brief(*self.knn_votes(backbone))
            for name, value in scores.items():
                record[f"knn_{name}"] = value
        return record

    def knn_votes(self, backbone: Backbone) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """Return the 15-NN's votes (N, G) on val, val's grades (N,) and train's (M,).

        Fewer neighbours vote if train has fewer.
        """
        bank, val = (self.embeddings(backbone, split) for split in self.graded)
        known, truth = (grades_of(split) for split in self.graded)
        votes = knn_predict(bank, torch.from_numpy(known), val, [min(15, len(bank))])
        return *votes.values(), truth, known


# ------------------------------------------------------------------- what evaluation scripts share
