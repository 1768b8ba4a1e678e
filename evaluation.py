"""What the evaluations share: weights and data opened, the protocol, cached features, results.

Every evaluation opens an `Evaluation`, asks it for features, and writes the results of each
`GradedSet` into a folder of its own. What makes a backbone's features a grade is the scripts'.
Shapes: N images, G grades.
"""

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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data import PhotographDataset, View, graded, grades_of, open_manifest
from devices import autocast_dtype, choose_device, use_fast_matmul
from features import extract_features
from fundus import metrics
from fundus.manifest import GRADES, Manifest, Record
from run_folder import versions
from utils import InputError, log, sha256_of, write_atomic, write_json
from vision_transformer import Backbone, BackboneSpec
from weights import Weights, load_backbone, read_weights

PAPER_SIZE = 224  # side in pixels of the published view


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation starts from: frozen weights on their device, photographs, output."""

    options: Any  # the script's
    weights: Weights
    backbone: Backbone
    dtype: torch.dtype | None  # of autocast; None is fp32
    output: Path
    manifest: Manifest
    image_size: int  # side in pixels of what the backbone sees


@dataclass(frozen=True)
class GradedSet:
    """Photographs with grades that a method is tested on."""

    name: str  # of the results' folder inside the output; empty: the output itself
    manifest: Manifest
    records: list[Record]


# ---------------------------------------------------------------------------- weights and their run
def newest_run(folder: Path = Path("runs")) -> Path:
    """Return the run with the newest backbone.safetensors; raises InputError if there is none."""
    files = sorted(folder.glob("*/backbone.safetensors"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise InputError(
            f"no trained run under {folder}/: make one with `python SSRL.py`, or name weights with "
            "--pretrained"
        )
    return files[-1].parent


def open_weights(options: Any, kind: str) -> tuple[Weights, Path]:
    """Return the weights that `--pretrained` names, and the folder that receives the results.

    Without `--pretrained` they are the newest run's under runs/. The folder is the run's `kind`
    (knn, linear, attention); a kept epoch writes beside it, into `knn-0040`.
    """
    source = options.pretrained or str(newest_run())
    weights = read_weights(source, options.checkpoint_key, arch=options.arch)
    log.info("weights: %s, %s/%d", weights.path, weights.spec.arch, weights.spec.patch_size)
    if options.output_dir:
        return weights, Path(options.output_dir)

    stem = Path(weights.path.replace(":", "-")).stem  # Windows has no colon in names, as timm: has
    if weights.run is None:
        # The checksum keeps apart the many files that are called checkpoint.pth.
        return weights, Path("runs") / f"{stem}-{weights.sha256[:8]}" / kind
    if stem.startswith("checkpoint-"):
        kind = f"{kind}-{stem.removeprefix('checkpoint-')}"
    return weights, weights.run / kind


def open_evaluation(options: Any, kind: str) -> Evaluation:
    """Return weights on their device, data (the run's own unless named) and output folder.

    Raises InputError without data, and for an image size that the patch size does not divide.
    """
    weights, output = open_weights(options, kind)
    data = options.data or weights.run_options.get("data", "")
    if not data:
        raise InputError(f"{weights.path}: belongs to no run that names its data; add --data")
    image_size = choose_image_size(options, weights.spec)
    manifest = open_manifest(data)

    device = choose_device(options.device)
    use_fast_matmul(device)
    dtype = autocast_dtype(options.precision, device)
    backbone = load_backbone(weights).to(device)
    return Evaluation(options, weights, backbone, dtype, output, manifest, image_size)


# ------------------------------------------------------------------------------------- the protocol
def choose_image_size(options: Any, spec: BackboneSpec) -> int:
    """Return the side in pixels of what the backbone sees: the user's, the paper's or its own.

    Raises InputError where the patch size does not divide it.
    """
    patch = spec.patch_size
    if options.protocol == "paper":
        if PAPER_SIZE % patch:
            raise InputError(
                f"--protocol paper: its view of {PAPER_SIZE} px is no multiple of patch {patch}"
            )
        return PAPER_SIZE
    size = options.image_size or spec.image_size
    if size % patch:
        near = max(1, round(size / patch)) * patch
        raise InputError(
            f"--image-size {size}: expected a multiple of the patch size {patch}, such as {near}"
        )
    return size


def training_records(evaluation: Evaluation) -> list[Record]:
    """Return the graded photographs of train; the published protocol learns from val too."""
    manifest = evaluation.manifest
    records = graded(manifest, manifest.split("train"), "train")
    if evaluation.options.protocol == "paper":
        records += [record for record in manifest.split("val") if record.grade is not None]
    return records


def open_test_sets(manifest: Manifest, others: Sequence[str]) -> list[GradedSet]:
    """Return the graded test split, and all graded photographs of each of `others`.

    Raises InputError when another set shares a file with this one's training or validation, as
    checksums tell, which are computed where a manifest has none.
    """
    sets = [GradedSet("", manifest, graded(manifest, manifest.split("test"), "test"))]
    if not others:
        return sets

    # Read only now, since where a manifest has no checksums every file is.
    learnt_from = set()
    for record in manifest.records:
        if record.split != "test":
            learnt_from.add(_checksum(manifest, record))

    names = {""}
    for source in others:
        other = open_manifest(source)
        shared = [r.path for r in other.records if _checksum(other, r) in learnt_from]
        if shared:
            raise InputError(
                f"--test-data {source}: {len(shared)} photographs are also in the training data, "
                f"the first {shared[0]}; take them out of one of the two"
            )
        name = _free_name(other.root.resolve().name, names)
        names.add(name)
        sets.append(GradedSet(name, other, graded(other, other.records, source)))
    return sets


def _checksum(manifest: Manifest, record: Record) -> str:
    """Return the SHA-256 of a record's file."""
    return record.sha256 or sha256_of(manifest.root / record.path)


def _free_name(name: str, taken: set[str]) -> str:
    """Return the name, with -2, -3 and so on behind it where it is taken."""
    free = name
    number = 1
    while free in taken:
        number += 1
        free = f"{name}-{number}"
    return free


# ---------------------------------------------------------------------------------- cached features
def cached_features(
    evaluation: Evaluation, manifest: Manifest, records: list[Record], view: View, seed: int = 0
) -> dict[str, Tensor]:
    """Return the records' features, as extract_features does, from the cache if they are in it.

    The cache lies beside the results, so that all evaluations of a run share it. `seed` is that of
    random views.
    """
    weights = evaluation.weights
    files = []
    for record in records:
        files.append((record.path, record.sha256 or _stamp(manifest.root / record.path)))

    # The key holds all that features depend on, so that none are ever taken for others: weights and
    # how they are read (a file may hold two networks, or fit several architectures), photographs in
    # their order, view with its seed, precision. Devices and workers change them by rounding alone.
    key = (
        weights.sha256,
        weights.network,
        weights.spec,
        manifest.fingerprint,
        files,
        view,
        seed,
        str(evaluation.dtype),
    )
    name = hashlib.sha256(repr(key).encode()).hexdigest()[:24]
    folder = evaluation.output.parent
    if evaluation.options.output_dir:  # the folder above may hold anything
        folder = evaluation.output
    path = folder / "features" / f"{name}.safetensors"

    if path.is_file():
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            log.warning("%s: is damaged (%s); its features are made anew", path, error)
    dataset = PhotographDataset(manifest, records, view, seed)
    features = extract_features(
        evaluation.backbone, dataset, evaluation.dtype, evaluation.options.workers, "features"
    )
    write_atomic(path, lambda temporary: save_file(features, temporary))
    return features


def _stamp(path: Path) -> tuple[str, int, int]:
    """Return what tells a file without a checksum from others: where it is, size, time."""
    status = path.stat()
    return str(path.resolve()), status.st_size, status.st_mtime_ns


# ------------------------------------------------------------------------------------------ results
def check_results(evaluation: Evaluation, sets: Sequence[GradedSet], protocol: str) -> None:
    """Raise InputError if results of other weights, photographs or protocol would be replaced.

    5-NN and 15-NN count as one protocol, so that `--k` may change. `--overwrite` replaces any.
    """
    if evaluation.options.overwrite:
        return
    for test_set in sets:
        path = evaluation.output / test_set.name / "results.json"
        if path.is_file() and not _is_repeated(path, evaluation, test_set, protocol):
            raise InputError(
                f"{path}: holds results of other weights, other data or another protocol; "
                "name another --output-dir, or --overwrite them"
            )


def _is_repeated(path: Path, evaluation: Evaluation, test_set: GradedSet, protocol: str) -> bool:
    """Return whether a results.json is of these weights, data and protocol."""
    try:
        old = json.loads(path.read_text("utf-8"))
        backbone = old["backbone"]
        data = old["data"]
        theirs = (
            backbone["sha256"],
            backbone["network"],
            backbone["arch"],
            data["fingerprint"],
            data.get("test_fingerprint", data["fingerprint"]),
            _without_number(old["protocol"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return False  # damaged, or not ours
    ours = (
        evaluation.weights.sha256,
        evaluation.weights.network,
        evaluation.weights.spec.arch,
        evaluation.manifest.fingerprint,
        test_set.manifest.fingerprint,
        _without_number(protocol),
    )
    return theirs == ours


def _without_number(protocol: str) -> str:
    """Return a protocol without the number of neighbours that it begins with ("-NN, whole ...")."""
    return re.sub(r"^\d+", "", protocol)


def write_results(
    evaluation: Evaluation,
    protocol: str,
    test_set: GradedSet,
    predictions: metrics.Predictions,
    train_grades: np.ndarray,
    details: dict[str, Any],
) -> None:
    """Print the metrics of a test; write results.json, predictions.csv and confusion.png.

    `details` is what results.json says beside that: `by_k`, `by_hyperparameter`.
    """
    output = evaluation.output / test_set.name
    summary = metrics.summarize(predictions, train_grades)
    title = f"{protocol}, {len(test_set.records)} test photographs, {output}"
    metrics.print_summary(summary, title)
    metrics.plot_confusion(summary["confusion"], output / "confusion.png")

    weights = evaluation.weights
    results = {"protocol": protocol, "data": describe_data(evaluation.manifest, test_set)}
    results.update(summary)
    results.update(details)
    results["backbone"] = {
        "path": weights.path,
        "sha256": weights.sha256,
        "network": weights.network,
        "arch": weights.spec.arch,
        "patch_size": weights.spec.patch_size,
    }
    results["versions"] = versions()
    results["command"] = sys.argv
    write_json(output / "results.json", results)

    table = predictions_table(test_set.records, predictions)
    write_atomic(output / "predictions.csv", lambda path: path.write_text(table, "utf-8"))


def describe_data(manifest: Manifest, test_set: GradedSet) -> dict[str, Any]:
    """Return what results.json says of the data: path, fingerprint, each split's counts.

    Train and val are the manifest's; the test may be on another set.
    """
    about: dict[str, Any] = {"path": manifest.root.name, "fingerprint": manifest.fingerprint}
    if test_set.manifest is not manifest:
        about["test_path"] = test_set.manifest.root.name
        about["test_fingerprint"] = test_set.manifest.fingerprint
    about["train"] = _count(manifest.split("train"))
    about["val"] = _count(manifest.split("val"))
    about["test"] = _count(test_set.records)
    return about


def _count(records: Sequence[Record]) -> dict[str, Any]:
    """Return the numbers of images, of patients, and of images of each grade."""
    grades = grades_of([record for record in records if record.grade is not None])
    return {
        "images": len(records),
        "patients": len({record.patient for record in records}),
        "by_grade": np.bincount(grades, minlength=GRADES).tolist(),
    }


def predictions_table(records: Sequence[Record], predictions: metrics.Predictions) -> str:
    """Return predictions as csv, a row a photograph, from which every metric can be recomputed."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    shares = [f"p{grade}" for grade in range(GRADES)]
    writer.writerow(["path", "patient", "eye", "grade", "prediction", *shares])
    rows = zip(records, predictions.predicted, predictions.probabilities, strict=True)
    for record, predicted, probabilities in rows:
        # Nine digits tell any two fp32 numbers apart.
        digits = [f"{share:.9g}" for share in probabilities]
        writer.writerow([record.path, record.patient, record.eye, record.grade, predicted, *digits])
    return text.getvalue()
