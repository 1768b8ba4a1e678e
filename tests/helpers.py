"""What several tests share: a small prepared folder, a small backbone, an evaluation of both."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from evaluation import Evaluation
from fundus.manifest import GRADES, Manifest, Record, read_manifest, write_manifest
from vision_transformer import Backbone, BackboneSpec
from weights import Weights, load_backbone

PICO = BackboneSpec("vit_pico", 16, 32)


# ----------------------------------------------------------------------------- data and backbones
def draw_prepared(
    folder: Path, train: int = 20, val: int = 10, test: int = 10, seed: int = 0
) -> Manifest:
    """Write a prepared folder of noisy 40 px pictures whose colour goes with the grade.

    Grades go round 0-4; two consecutive rows of a split are two eyes of one patient. Another seed
    makes other photographs.
    """
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    records = []
    for split, count in (("train", train), ("val", val), ("test", test)):
        for number in range(count):
            name = f"{split}{number}"
            grade = number % GRADES
            color = np.array([40 * grade + 20, 200 - 30 * grade, 60])
            pixels = color + rng.integers(-15, 16, (40, 40, 3))
            picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            picture.save(folder / "images" / f"{name}.png")

            # Names stand for checksums, so that the files need not be read; seeds must differ.
            checksum = name
            if seed:
                checksum = f"{name}-{seed}"
            record = Record(
                path=f"images/{name}.png",
                grade=grade,
                patient=f"{split}-{number // 2}",
                eye=("left", "right")[number % 2],
                split=split,
                sha256=checksum,
            )
            records.append(record)
    write_manifest(folder, records)
    (folder / "data_report.json").write_text("{}")  # what prepared folders have
    return read_manifest(folder)


def regraded(manifest: Manifest, split: str, grade: int) -> Manifest:
    """Return the manifest with all grades of a split replaced."""
    records = []
    for record in manifest.records:
        if record.split == split:
            record = replace(record, grade=grade)
        records.append(record)
    return replace(manifest, records=tuple(records))


def pico(seed: int = 0, spec: BackboneSpec = PICO) -> Backbone:
    """Return a backbone whose parameters are all random, in evaluation mode."""
    torch.manual_seed(seed)
    backbone = Backbone(spec).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return backbone


def evaluation(options: Any, manifest: Manifest, output: Path, seed: int = 0) -> Evaluation:
    """Return what open_evaluation gives for a random backbone, without a run folder."""
    state = pico(seed).state_dict()
    weights = Weights(state, PICO, f"pico{seed}.pth", f"sha-{seed}", None, {})
    return Evaluation(
        options,
        weights,
        load_backbone(weights),
        dtype=None,
        output=output,
        manifest=manifest,
        image_size=PICO.image_size,
    )


# ---------------------------------------------------------------------------- folders and records
def touch(root: Path, *paths: str) -> None:
    """Make empty files, and the folders that they lie in."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def by_path(manifest: Manifest) -> dict[str, Record]:
    """Return the manifest's records by their path."""
    return {record.path: record for record in manifest.records}


def splits_of(records: list[Record]) -> dict[str, set[str]]:
    """Return the patients of each split."""
    patients: dict[str, set[str]] = {"train": set(), "val": set(), "test": set()}
    for record in records:
        patients[record.split].add(record.patient)
    return patients


def assert_disjoint(records: list[Record]) -> None:
    """Fail if a patient is in more than one split."""
    everyone = {record.patient for record in records}
    in_splits = sum(len(patients) for patients in splits_of(records).values())
    assert in_splits == len(everyone)
