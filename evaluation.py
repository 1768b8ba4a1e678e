"""What the evaluations share: weights and data opened, the protocol, cached features, results.

Every evaluation opens an `Evaluation`, grades its test sets by `evaluate_all`, and gets features
from a cache. What makes a backbone's features a grade is the scripts'.
Shapes: N images, D width, G grades.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data import DataOptions, PhotographDataset, View, graded, open_manifest
from devices import autocast_dtype, choose_device, use_fast_matmul
from features import (
    SEEN,
    Signatures,
    Signed,
    checksum_of,
    choose_view,
    extract_features,
    extract_handmade,
    seen_file,
)
from fundus import handmade, metrics, plots, tables
from fundus.copies import find_shared
from fundus.manifest import Manifest, Record, name_examples, read_manifest
from run_folder import versions
from utils import InputError, RunOptions, log, write_atomic, write_json
from vision_transformer import Backbone, BackboneSpec
from weights import BackboneOptions, Weights, load_backbone, read_weights

PAPER_SIZE = 224  # side in pixels of the published view

# Changes with what extraction returns or how: older caches are then made anew.
CACHE_VERSION = 3

# Options that say where things are, and how to compute; all others are settings of the protocol.
NOT_SETTINGS = {
    "pretrained",
    "checkpoint_key",
    "arch",
    "data",
    "test_data",
    "follow_links",
    "output_dir",
    "device",
    "workers",
    "overwrite",
    "debug",
    "allow_seen",
    "pictures",
}


# ------------------------------------------------------------------------------------------ options
@dataclass
class EvaluationOptions(BackboneOptions, DataOptions, RunOptions):
    """Options of every evaluation that grades."""

    protocol: Literal["whole", "paper"] = "whole"
    """The whole fundus in view and every choice made without the test split, or as published:
    docs/evaluation.md has both."""
    test_data: tuple[str, ...] = ()
    """Further sets to test on, all their graded photographs, nothing refitted."""
    folds: bool = False
    """Evaluate each of --data's manifest-fold-N.csv (prepare_data.py --folds) and all of them
    together, so that every photograph is tested once."""
    pictures: bool = True
    """Draw the confusion matrix, ROC, reliability and how features lie beside the numbers."""
    allow_seen: bool = False
    """Test even on photographs that the backbone was trained on, and name them in results.json."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folds and self.test_data:
            raise InputError("--folds: tests on its folds alone; leave --test-data out")
        if self.folds and self.protocol == "paper":
            raise InputError("--folds: the published protocol has none; leave one of them out")


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
    # Folds have the same photographs in other splits: features of all of them are cached together.
    together: tuple[Record, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """Every option that can change a number, as results.json holds it."""
        settings = {}
        for option in fields(self.options):
            if option.name not in NOT_SETTINGS:
                settings[option.name] = getattr(self.options, option.name)
        settings["image_size"] = self.image_size
        settings["precision"] = str(self.dtype or torch.float32).removeprefix("torch.")
        return json.loads(json.dumps(settings))  # tuples are lists in files

    @property
    def view(self) -> View:
        """How the backbone looks at photographs that are tested."""
        return choose_view(self.options.protocol, self.image_size)


@dataclass(frozen=True)
class GradedSet:
    """Photographs with grades that a method is tested on."""

    name: str  # of the results' folder inside the output; empty: the output itself
    manifest: Manifest
    records: list[Record]


@dataclass(frozen=True)
class Outcome:
    """What a method said of a test set, and what it learnt from."""

    test_set: GradedSet
    predictions: metrics.Predictions
    train_grades: np.ndarray
    # The same method on photographs that it did not learn from and that are not the test set.
    validation: metrics.Predictions | None = None
    validation_records: list[Record] = field(default_factory=list)
    # The second reading of a probe: thresholds of the expected grade, and the grades they give.
    thresholded: tuple[np.ndarray, np.ndarray] | None = None
    features: Tensor | None = None  # (N, D), for pictures
    details: dict[str, Any] = field(default_factory=dict)  # what else results.json says


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
    data = choose_data(options, weights)
    image_size = choose_image_size(options, weights.spec)
    manifest = open_manifest(data, follow_links=options.follow_links)

    device = choose_device(options.device)
    use_fast_matmul(device)
    dtype = autocast_dtype(options.precision, device)
    backbone = load_backbone(weights).to(device)
    return Evaluation(options, weights, backbone, dtype, output, manifest, image_size)


def choose_data(options: Any, weights: Weights) -> str:
    """Return what `--data` names, or else the data of the weights' run.

    Raises InputError where there is none, and where the run's folder is no longer there.
    """
    if options.data:
        return options.data
    data = weights.run_options.get("data", "")
    if not data:
        raise InputError(f"{weights.path}: belongs to no run that names its data; add --data")
    is_drawn = data.partition(":")[0] == "synthetic"
    if not is_drawn and not Path(data).expanduser().exists():
        raise InputError(
            f"{weights.path}: its run learned from {data}, which is not there (seen from "
            f"{Path.cwd()}); where the folder has moved, name it: --data FOLDER"
        )
    return data


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


def validation_records(evaluation: Evaluation) -> list[Record]:
    """Return the graded photographs of val; none where the published protocol learns from it."""
    if evaluation.options.protocol == "paper":
        return []
    return [record for record in evaluation.manifest.split("val") if record.grade is not None]


def open_test_sets(
    manifest: Manifest, others: Sequence[str], *, follow_links: bool = False
) -> list[GradedSet]:
    """Return the graded test split, and all graded photographs of each of `others`."""
    sets = [GradedSet("", manifest, graded(manifest, manifest.split("test"), "test"))]
    names = {""}
    for source in others:
        other = open_manifest(source, follow_links=follow_links)
        name = _free_name(other.root.resolve().name, names)
        names.add(name)
        sets.append(GradedSet(name, other, graded(other, other.records, source)))
    return sets


def _free_name(name: str, taken: set[str]) -> str:
    """Return the name, with -2, -3 and so on behind it where it is taken."""
    free = name
    number = 1
    while free in taken:
        number += 1
        free = f"{name}-{number}"
    return free


def open_folds(evaluation: Evaluation) -> list[Evaluation]:
    """Return the evaluation of each fold of its prepared folder, by the fold's manifest.

    Raises InputError where the folder has none.
    """
    root = evaluation.manifest.root
    files = sorted(root.glob("manifest-fold-*.csv"), key=lambda file: int(file.stem.split("-")[-1]))
    if not files:
        raise InputError(
            f"{root}: holds no manifest-fold-1.csv; expected what prepare_data.py --folds 5 writes"
        )
    opened = []
    for number, file in enumerate(files, 1):
        links = evaluation.options.follow_links
        manifest = read_manifest(root, file.name, follow_links=links)
        together = sorted(manifest.records, key=lambda record: record.path)
        fold = replace(
            evaluation,
            manifest=manifest,
            output=evaluation.output / f"fold-{number}",
            together=tuple(record for record in together if record.grade is not None),
        )
        opened.append(fold)
    return opened


# -------------------------------------------------------------------------- photographs seen before
def check_unseen(
    evaluation: Evaluation, sets: Sequence[GradedSet], learnt_from: Sequence[list[Record]]
) -> dict[str, list[str]]:
    """Return, by the set's name, the tested photographs that were learnt from.

    These are photographs that the run of the weights was trained on, and those whose grades the
    method uses, `learnt_from` (train and val): the same file, or a copy that was compressed or
    resized. Raises InputError, naming five, unless --allow-seen is given.
    """
    known = _known_photographs(evaluation, learnt_from)
    shared = {}
    for test_set in sets:
        shared[test_set.name] = _same_files(test_set, known)
    _refuse_seen(evaluation, shared)

    # Copies are found among what has to be extracted anyway; equal files cost nothing before that.
    looks = known.looks
    for records in learnt_from:
        if records:
            own = looks_of(evaluation, evaluation.manifest, records)
            looks = np.concatenate([looks, own])
    for test_set in sets:
        paths = [record.path for record in test_set.records]
        own = looks_of(evaluation, test_set.manifest, test_set.records)
        copies = {paths[i]: f"{paths[i]} = {known.paths[j]}" for i, j, _ in find_shared(own, looks)}
        for pair in shared[test_set.name]:
            copies.setdefault(pair.split(" = ")[0], pair)
        shared[test_set.name] = list(copies.values())
    _refuse_seen(evaluation, shared)
    return shared


def _known_photographs(evaluation: Evaluation, learnt_from: Sequence[list[Record]]) -> Signatures:
    """Return what the run remembers, then paths and checksums of `learnt_from`, without looks."""
    known = Signatures([], [], np.zeros((0, 4096), np.int8))
    file = evaluation.weights.run and seen_file(evaluation.weights.run)
    if file:
        known = Signatures.load(file)
    elif evaluation.weights.run:
        log.warning("%s: has no %s, so what it saw is not known", evaluation.weights.run, SEEN)
    paths = list(known.paths)
    checksums = list(known.sha256)
    for records in learnt_from:
        for record in records:
            paths.append(record.path)
            checksums.append(checksum_of(evaluation.manifest, record))
    return Signatures(paths, checksums, known.looks)


def _same_files(test_set: GradedSet, known: Signatures) -> list[str]:
    """Return "path = known path" of the tested photographs whose file is known."""
    path_of = dict(zip(known.sha256, known.paths, strict=True))
    same = []
    for record in test_set.records:
        checksum = checksum_of(test_set.manifest, record)
        if checksum in path_of:
            same.append(f"{record.path} = {path_of[checksum]}")
    return same


def _refuse_seen(evaluation: Evaluation, shared: dict[str, list[str]]) -> None:
    """Raise InputError where a test set shares photographs with training, unless allowed."""
    for name, pairs in shared.items():
        if pairs and not evaluation.options.allow_seen:
            raise InputError(
                f"{name or 'test split'}: {len(pairs)} of its photographs were seen in training "
                f"(tested = trained on): {name_examples(pairs)}; take them out of one of the two, "
                "or say --allow-seen, which results.json will show"
            )


# ---------------------------------------------------------------------------------- cached features
def cached_features(
    evaluation: Evaluation,
    manifest: Manifest,
    records: Sequence[Record],
    view: View,
    seed: int = 0,
    names: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Return the records' features, as extract_features does, from the cache if they are in it.

    `names` are those that are wanted; none means all. `seed` is that of random views. The cache
    lies beside the results, so that all evaluations of a run share it.
    """
    # The key holds all that features depend on, so that none are ever taken for others: weights and
    # how they are read (a file may hold two networks, or fit several architectures), photographs in
    # their order, view with its seed, precision. Devices and workers change them by rounding alone.
    weights = evaluation.weights
    origin = (weights.sha256, weights.network, weights.spec, view, seed, str(evaluation.dtype))

    def extract(rows: list[Record]) -> dict[str, Tensor]:
        signed = view
        if view == evaluation.view:  # random crops are not what copies are known by
            signed = Signed(view)
        return extract_features(
            evaluation.backbone,
            PhotographDataset(manifest, rows, signed, seed),
            evaluation.dtype,
            evaluation.options.workers,
            "features",
        )

    return _from_cache(evaluation, manifest, records, origin, extract, names)


def cached_handmade(
    evaluation: Evaluation, manifest: Manifest, records: Sequence[Record]
) -> dict[str, Tensor]:
    """Return the records' hand-made statistics `handmade` (N, F), and `look`, from the cache."""

    def extract(rows: list[Record]) -> dict[str, Tensor]:
        return extract_handmade(manifest, rows, evaluation.options.workers)

    origin = ("handmade", handmade.VERSION)
    return _from_cache(evaluation, manifest, records, origin, extract)


def looks_of(evaluation: Evaluation, manifest: Manifest, records: Sequence[Record]) -> np.ndarray:
    """Return the records' signatures (N, 4096) int8, from the features that are evaluated."""
    if getattr(evaluation.options, "features", "") == "handmade":
        return cached_handmade(evaluation, manifest, records)["look"].numpy()
    view = evaluation.view
    found = cached_features(evaluation, manifest, records, view, names=("look",))
    return found["look"].numpy()


def _from_cache(
    evaluation: Evaluation,
    manifest: Manifest,
    records: Sequence[Record],
    origin: tuple[Any, ...],
    extract: Callable[[list[Record]], dict[str, Tensor]],
    names: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Return features of the records by the cached file of their `origin`, made where missing."""
    rows = list(evaluation.together) or list(records)
    files = []
    for record in rows:
        files.append((record.path, record.sha256 or _stamp(manifest.root / record.path)))
    key = repr((CACHE_VERSION, origin, manifest.prepared, files))
    name = hashlib.sha256(key.encode()).hexdigest()[:24]
    path = _cache_folder(evaluation) / f"{name}.safetensors"

    features = {}
    if path.is_file():
        features = _read_cache(path, names)
    if not features:
        features = extract(rows)
        write_atomic(path, lambda temporary: save_file(features, temporary))
    if not evaluation.together:
        return features
    place = {record.path: number for number, record in enumerate(rows)}
    chosen = torch.tensor([place[record.path] for record in records], dtype=torch.int64)
    return {name: values[chosen] for name, values in features.items()}


def _cache_folder(evaluation: Evaluation) -> Path:
    """Return the folder of cached features: the run's, or inside a named --output-dir."""
    output = evaluation.output
    if evaluation.together:  # the output of a fold lies inside that of all
        output = output.parent
    if evaluation.options.output_dir:  # the folder above may hold anything
        return output / "features"
    return output.parent / "features"


def _read_cache(path: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Return the named features of a file, or all; nothing, with a warning, where it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in names or file.keys()}
    except (SafetensorError, OSError) as error:
        log.warning("%s: is damaged (%s); its features are made anew", path, error)
        return {}


def _stamp(path: Path) -> tuple[str, int, int]:
    """Return what tells a file without a checksum from others: where it is, size, time."""
    status = path.stat()
    return str(path.resolve()), status.st_size, status.st_mtime_ns


# ------------------------------------------------------------------------------------------ results
def check_results(evaluation: Evaluation, sets: Sequence[GradedSet], protocol: str) -> None:
    """Raise InputError if results of other weights, photographs or settings would be replaced.

    The message names the settings that differ. `--overwrite` replaces any.
    """
    if evaluation.options.overwrite:
        return
    for test_set in sets:
        path = evaluation.output / test_set.name / "results.json"
        if not path.is_file():
            continue
        difference = _difference(path, evaluation, test_set, protocol)
        if difference:
            raise InputError(
                f"{path}: holds results of other {difference}; "
                "name another --output-dir, or --overwrite them"
            )


def _difference(path: Path, evaluation: Evaluation, test_set: GradedSet, protocol: str) -> str:
    """Return in what results differ from those that would replace them; empty if in nothing."""
    weights = evaluation.weights
    try:
        old = json.loads(path.read_text("utf-8"))
        backbone = old["backbone"]
        data = old["data"]
        old_weights = (backbone["sha256"], backbone["network"], backbone["arch"])
        fingerprint = data["fingerprint"]
        old_data = (fingerprint, data.get("test_fingerprint", fingerprint))
        old_protocol = old["protocol"]
        old_settings = dict(old.get("settings", {}))
    except (ValueError, KeyError, TypeError, AttributeError):
        return "make (it is damaged, or not ours)"
    if old_weights != (weights.sha256, weights.network, weights.spec.arch):
        return "weights"
    if old_data != (evaluation.manifest.fingerprint, test_set.manifest.fingerprint):
        return "data"
    changed = []
    for name, value in evaluation.settings.items():
        if old_settings.get(name) != value:
            changed.append(f"{name} {old_settings.get(name)}, now {value}")
    if changed:
        return f"settings ({'; '.join(changed)})"
    if old_protocol != protocol:
        return f"protocol ({old_protocol})"
    return ""


# The method: it learns from the graded photographs of train and val, and grades the test sets.
Grade = Callable[[Evaluation, list[Record], list[Record], Sequence[GradedSet]], list[Outcome]]


def evaluate_all(evaluation: Evaluation, protocol: str, grade: Grade) -> None:
    """Grade the test split and each `--test-data`, or all folds, and write their results.

    Whatever may be at fault is asked before the work.
    """
    if evaluation.options.folds:
        evaluate_folds(evaluation, protocol, grade)
        return
    options = evaluation.options
    sets = open_test_sets(evaluation.manifest, options.test_data, follow_links=options.follow_links)
    check_results(evaluation, sets, protocol)
    training = training_records(evaluation)
    validation = validation_records(evaluation)
    shared = check_unseen(evaluation, sets, [training, validation])
    summaries = {}
    for outcome in grade(evaluation, training, validation, sets):
        name = outcome.test_set.name
        summary = write_results(evaluation, protocol, outcome, shared[name])
        summaries[name or "test"] = summary
    if len(summaries) > 1:
        print("\n".join(["", *tables.table_lines(summaries)]))


def evaluate_folds(evaluation: Evaluation, protocol: str, grade: Grade) -> None:
    """Grade each fold's test with a method that learnt from its train, then all folds together."""
    protocol = f"{protocol}, folds by patient"
    folds = open_folds(evaluation)
    everything = GradedSet("", evaluation.manifest, list(folds[0].together))
    check_results(evaluation, [everything], protocol)
    seen = []
    for fold in folds:
        tested = open_test_sets(fold.manifest, [])
        check_results(fold, tested, protocol)
        learnt_from = [training_records(fold), validation_records(fold)]
        seen.append(check_unseen(fold, tested, learnt_from)[""])

    outcomes = []
    entries = []
    by_fold = []
    for number, fold in enumerate(folds, 1):
        tested = open_test_sets(fold.manifest, [])
        (outcome,) = grade(fold, training_records(fold), validation_records(fold), tested)
        summary = write_results(fold, protocol, outcome, seen[number - 1])
        row = {"fold": number, "images": len(outcome.test_set.records)}
        for name, entry in summary["metrics"].items():
            row[name] = entry["value"]
        by_fold.append(row)
        entries.append(summary["metrics"])
        outcomes.append(outcome)
    means = metrics.mean_of_folds(entries)
    together = join_outcomes(everything, outcomes)
    together = replace(together, details={"by_fold": by_fold, "mean_of_folds": means})
    write_results(evaluation, protocol, together, [path for paths in seen for path in paths])
    print(tables.folds_line(means))


def join_outcomes(everything: GradedSet, outcomes: Sequence[Outcome]) -> Outcome:
    """Return the outcome of all folds together, each photograph graded by its own fold's method."""
    records: list[Record] = []
    validation_of: list[Record] = []
    for outcome in outcomes:
        records += outcome.test_set.records
        validation_of += outcome.validation_records
    thresholded = None
    if all(outcome.thresholded for outcome in outcomes):
        # Each fold has thresholds of its own, so that together there is a mean to look at alone.
        thresholds = np.mean([outcome.thresholded[0] for outcome in outcomes], axis=0)
        thresholded = (thresholds, np.concatenate([outcome.thresholded[1] for outcome in outcomes]))
    validation = None
    if all(outcome.validation for outcome in outcomes):
        validation = join_predictions([outcome.validation for outcome in outcomes])
    return Outcome(
        test_set=replace(everything, records=records),
        predictions=join_predictions([outcome.predictions for outcome in outcomes]),
        train_grades=np.concatenate([outcome.train_grades for outcome in outcomes]),
        validation=validation,
        validation_records=validation_of,
        thresholded=thresholded,
        features=None,  # of several methods, so that no picture would hold all
    )


def join_predictions(parts: Sequence[metrics.Predictions]) -> metrics.Predictions:
    """Return predictions of several sets of photographs as those of one."""
    return metrics.Predictions(
        np.concatenate([part.grades for part in parts]),
        np.concatenate([part.predicted for part in parts]),
        np.concatenate([part.probabilities for part in parts]),
        np.concatenate([part.patients for part in parts]),
    )


def write_results(
    evaluation: Evaluation, protocol: str, outcome: Outcome, seen: Sequence[str] = ()
) -> dict[str, Any]:
    """Print the metrics of a test; write results.json, predictions.csv, doubtful.csv, pictures.

    Returns what results.json says of predictions (metrics.summarize). `seen` are photographs of the
    test that were trained on, which --allow-seen let pass.
    """
    test_set = outcome.test_set
    output = evaluation.output / test_set.name
    summary = metrics.summarize(
        outcome.predictions, outcome.train_grades, outcome.validation, outcome.thresholded
    )
    title = f"{protocol}, {len(test_set.records)} test photographs, {output}"
    metrics.print_summary(summary, title)

    weights = evaluation.weights
    results: dict[str, Any] = {"protocol": protocol, "settings": evaluation.settings}
    results["data"] = tables.describe_data(evaluation.manifest, test_set.manifest, test_set.records)
    results.update(summary)
    results.update(outcome.details)
    if seen:
        results["seen"] = {"allowed": True, "photographs": list(seen)}
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

    grades = None
    if outcome.thresholded:
        grades = outcome.thresholded[1]
    table = tables.predictions_table(test_set.records, outcome.predictions, grades)
    write_text(output / "predictions.csv", table)
    records = list(test_set.records)
    probabilities = outcome.predictions.probabilities
    if outcome.validation is not None and outcome.validation_records:
        records += outcome.validation_records
        probabilities = np.concatenate([probabilities, outcome.validation.probabilities])
    write_text(output / "doubtful.csv", tables.doubts_table(records, probabilities))
    if evaluation.options.pictures:
        draw_pictures(output, outcome, summary)
    return summary


def write_text(path: Path, text: str) -> None:
    """Write a text, whole or not at all."""
    write_atomic(path, lambda temporary: temporary.write_text(text, "utf-8"))


def draw_pictures(output: Path, outcome: Outcome, summary: dict[str, Any]) -> None:
    """Draw the confusion matrix, ROC, reliability, and how the features lie."""
    predictions = outcome.predictions
    plots.plot_confusion(summary["confusion"], output / "confusion.png")
    score = predictions.referable_score
    plots.plot_roc(predictions.grades, score, output / "roc.png", summary["metrics"])
    plots.plot_reliability(summary["reliability"], output / "reliability.png")
    if outcome.features is not None:
        plots.plot_embedding(outcome.features.numpy(), predictions.grades, output / "embedding.png")
