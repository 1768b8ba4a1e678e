"""Frozen features: extracted once, cached, and judged. Shared by k-NN, linear probe and training.

Shapes: N images, M bank images, D width, G = 5 grades.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from augment import WholeView
from data import (
    GRADES,
    Manifest,
    PhotographDataset,
    Record,
    View,
    evaluation_loader,
    graded,
    grades_of,
    open_manifest,
)
from runs import autocast_dtype, pick_device, versions
from utils import InputError, log, sha256_of, write_atomic, write_json
from vision_transformer import Backbone
from weights import Weights, load_backbone, read_weights

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
    device, found, training = backbone.cls_token.device, [], backbone.training
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


class Watched:
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

    def knn(self, backbone: Backbone) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """Return the 15-NN's votes (N, G) on val, val's grades (N,) and train's (M,).

        Fewer neighbours vote if train has fewer.
        """
        bank, val = (self.embeddings(backbone, split) for split in self.graded)
        known, truth = (grades_of(split) for split in self.graded)
        votes = knn_predict(bank, torch.from_numpy(known), val, [min(15, len(bank))])
        return *votes.values(), truth, known


# ------------------------------------------------------------------- what evaluation scripts share


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation starts from: frozen weights on their device, photographs, output."""

    options: Any
    weights: Weights
    backbone: Backbone
    dtype: torch.dtype | None
    output: Path
    manifest: Manifest
    image_size: int


def test_sets(
    manifest: Manifest, others: Sequence[str]
) -> dict[str, tuple[Manifest, list[Record]]]:
    """Return the graded test split under the name "", and all graded photographs of `others`.

    Raises InputError when another set shares a file with this one's training or validation, told by
    checksums, which are computed where a manifest has none.
    """
    sets = {"": (manifest, graded(manifest, manifest.split("test"), "test"))}
    used = [r for r in manifest.records if r.split != "test"]
    known = {_checksum(manifest, r) for r in used} if others else set()
    for data in others:
        other = open_manifest(data)
        shared = [r.path for r in other.records if _checksum(other, r) in known]
        if shared:
            raise InputError(
                f"--test-data {data}: {len(shared)} photographs are also in the training data, the "
                f"first {shared[0]}; take them out of one of the two"
            )
        base = name = other.root.resolve().name
        count = 2
        while name in sets:
            name, count = f"{base}-{count}", count + 1
        sets[name] = (other, graded(other, other.records, data))
    return sets


def _checksum(manifest: Manifest, record: Record) -> str:
    return record.sha256 or sha256_of(manifest.root / record.path)


def describe(manifest: Manifest, test: Manifest, records: Sequence[Record]) -> dict[str, Any]:
    """Return what results.json says of the data: path, fingerprint, each split's counts.

    Train and val are the manifest's; `test` may be another set, `records` are those tested on.
    """
    splits = {name: manifest.split(name) for name in ("train", "val")} | {"test": records}
    counts = {}
    for name, rows in splits.items():
        grades = np.bincount([r.grade for r in rows if r.grade is not None], minlength=GRADES)
        patients = len({r.patient for r in rows})
        counts[name] = {"images": len(rows), "patients": patients, "by_grade": grades.tolist()}
    path = {"path": manifest.root.name, "fingerprint": manifest.fingerprint}
    if test is not manifest:
        path |= {"test_path": test.root.name, "test_fingerprint": test.fingerprint}
    return path | counts


def newest_run(folder: Path = Path("runs")) -> Path:
    """Return the run with the newest backbone.safetensors; raises InputError if there is none."""
    found = sorted(folder.glob("*/backbone.safetensors"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise InputError(
            f"no trained run under {folder}/: make one with `python SSRL.py`, or name weights with "
            "--pretrained"
        )
    return found[-1].parent


def open_weights(options: Any, kind: str) -> tuple[Weights, Path]:
    """Resolve `--pretrained` and the output folder: the run's `kind` (knn, linear, attention).

    Without `--pretrained` the newest run under runs/. A kept epoch writes beside: `knn-0040`.
    """
    weights = read_weights(options.pretrained or str(newest_run()), options.checkpoint_key)
    log.info("weights: %s, %s/%d", weights.path, weights.spec.arch, weights.spec.patch_size)
    stem = Path(weights.path.replace(":", "-")).stem  # timm:NAME
    if weights.run and stem.startswith("checkpoint-"):
        kind = f"{kind}-{stem.removeprefix('checkpoint-')}"
    folder = weights.run or Path("runs") / f"{stem}-{weights.sha256[:8]}"
    return weights, Path(options.output_dir) if options.output_dir else folder / kind


def open_evaluation(options: Any, kind: str) -> Evaluation:
    """Resolve weights, data (the run's own unless named), device and output folder.

    Raises InputError without data, and for an image size that the patch size does not divide.
    """
    weights, output = open_weights(options, kind)
    data = options.data or weights.run_options.get("data", "")
    if not data:
        raise InputError(f"{weights.path}: belongs to no run that names its data; add --data")
    manifest = open_manifest(data)
    device = pick_device(options.device)
    dtype = autocast_dtype(options.precision, device)
    patch, size = weights.spec.patch_size, options.image_size or weights.spec.image_size
    if size < 1 or size % patch:
        raise InputError(f"--image-size {size}: expected a multiple of the patch size {patch}")
    if options.protocol == "paper" and 224 % patch:
        raise InputError(f"--protocol paper: its view of 224 px is no multiple of patch {patch}")
    backbone = load_backbone(weights)
    return Evaluation(options, weights, backbone.to(device), dtype, output, manifest, size)


def check_results(
    e: Evaluation, sets: dict[str, tuple[Manifest, list[Record]]], protocol: str
) -> None:
    """Raise InputError if writing the results of `sets` (test_sets) would replace others.

    Others are those of other weights, other photographs or another protocol, in which the number of
    neighbours that it begins with does not count. `--overwrite` lets them be replaced.
    """
    for name, (manifest, _) in sets.items() if not e.options.overwrite else ():
        there, ours = e.output / name / "results.json", [e.weights.sha256, e.weights.network]
        if not there.is_file():
            continue
        ours += [e.manifest.fingerprint, manifest.fingerprint]
        try:
            old = json.loads(there.read_text("utf-8"))
            theirs = [old["backbone"]["sha256"], old["backbone"]["network"]]
            theirs.append(old["data"]["fingerprint"])
            theirs.append(old["data"].get("test_fingerprint", theirs[-1]))
            kind, other = (re.sub(r"^\d+", "", text) for text in (protocol, old["protocol"]))
            same = theirs == ours and kind == other
        except (ValueError, KeyError, TypeError, AttributeError):
            same = False  # damaged, or not ours
        if not same:
            raise InputError(
                f"{there}: holds results of other weights, other data or another protocol; "
                "name another --output-dir, or --overwrite them"
            )


def cached_features(
    e: Evaluation, manifest: Manifest, records: list[Record], view: View, seed: int = 0
) -> dict[str, Tensor]:
    """Return the records' features, from the cache beside the results where they are in it.

    Keyed by weights, photographs, view and precision; random views by their `seed`, too.
    """
    rows = [(r.path, r.sha256 or _stamp(manifest.root / r.path)) for r in records]
    w, how = e.weights, (view, seed, str(e.dtype))
    key = (w.sha256, w.network, manifest.fingerprint, rows, how)
    name = hashlib.sha256(repr(key).encode()).hexdigest()[:24]
    beside = e.output if e.options.output_dir else e.output.parent
    path = beside / "features" / f"{name}.safetensors"
    if not path.is_file():
        dataset = PhotographDataset(manifest, records, view, seed)
        found = extract_features(e.backbone, dataset, e.dtype, e.options.workers, "features")
        write_atomic(path, lambda temporary: save_file(found, temporary))
    return load_file(path)


def _stamp(path: Path) -> tuple[str, int, int]:
    """Return what tells a file without a checksum from others: where it is, size, time."""
    status = path.stat()
    return str(path.resolve()), status.st_size, status.st_mtime_ns


def write_results(
    e: Evaluation, output: Path, tested: list[Record], shares: np.ndarray, results: dict[str, Any]
) -> None:
    """Write results.json and predictions.csv of a test.

    `shares` (N, G) are the probabilities of the `tested` records' grades; `results` what
    results.json says beside the weights, versions and command.
    """
    w = e.weights
    backbone = {"path": w.path, "sha256": w.sha256, "network": w.network}
    backbone |= {"arch": w.spec.arch, "patch_size": w.spec.patch_size}
    ending = {"backbone": backbone, "versions": versions(), "command": sys.argv}
    write_json(output / "results.json", results | ending)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["path", "patient", "eye", "grade", "prediction", "p0", "p1", "p2", "p3", "p4"])
    for r, share in zip(tested, shares, strict=True):
        row = [r.path, r.patient, r.eye, r.grade, share.argmax(), *(f"{v:.9g}" for v in share)]
        rows.writerow(row)
    write_atomic(output / "predictions.csv", lambda path: path.write_text(text.getvalue(), "utf-8"))
