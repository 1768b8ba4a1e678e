"""What the evaluations share: weights and data opened, the cache of features, results written."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data import PhotographDataset, View, graded, open_manifest
from devices import autocast_dtype, pick_device
from features import extract_features
from fundus.manifest import GRADES, Manifest, Record
from run_folder import versions
from utils import InputError, log, sha256_of, write_atomic, write_json
from vision_transformer import Backbone
from weights import Weights, load_backbone, read_weights


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
