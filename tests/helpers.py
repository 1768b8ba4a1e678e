"""What several tests of evaluation share: a small prepared folder, a small backbone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from evaluation import Evaluation
from fundus.manifest import Manifest, Record, read_manifest, write_manifest
from vision_transformer import Backbone, BackboneSpec
from weights import Weights, load_backbone

PICO = BackboneSpec("vit_pico", 16, 32)


def draw_prepared(
    folder: Path, train: int = 20, val: int = 10, test: int = 10, seed: int = 0
) -> Manifest:
    """Write a prepared folder of noisy 40 px pictures whose colour goes with the grade.

    Grades go round 0-4; two consecutive rows of a split are two eyes of one patient. Another seed
    makes other photographs.
    """
    rng, records = np.random.default_rng(seed), []
    (folder / "images").mkdir(parents=True)
    for split, count in (("train", train), ("val", val), ("test", test)):
        for i in range(count):
            grade, eye = i % 5, ("left", "right")[i % 2]
            path = f"images/{split}{i}.png"
            base = np.array([40 * grade + 20, 200 - 30 * grade, 60])
            noise = rng.integers(-15, 16, (40, 40, 3))
            Image.fromarray((base + noise).clip(0, 255).astype(np.uint8)).save(folder / path)
            patient = f"{split}-{i // 2}"
            checksum = f"{split}{i}" + (f"-{seed}" if seed else "")
            records.append(Record(path, grade, patient, eye, split, sha256=checksum))
    write_manifest(folder, records)
    (folder / "data_report.json").write_text("{}")  # what prepared folders have
    return read_manifest(folder)


def regraded(manifest: Manifest, split: str, grade: int) -> Manifest:
    """Return the manifest with all grades of a split replaced."""
    return replace(
        manifest,
        records=tuple(replace(r, grade=grade) if r.split == split else r for r in manifest.records),
    )


def pico(seed: int = 0, spec: BackboneSpec = PICO) -> Backbone:
    """Return a backbone whose parameters are all random, in evaluation mode."""
    torch.manual_seed(seed)
    backbone = Backbone(spec).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return backbone


def evaluation(options, manifest: Manifest, output: Path, seed: int = 0) -> Evaluation:
    """Return what open_evaluation gives for a random backbone, without a run folder."""
    backbone = pico(seed)
    weights = Weights(backbone.state_dict(), PICO, f"pico{seed}.pth", f"sha-{seed}", None, {})
    frozen = load_backbone(weights)
    return Evaluation(options, weights, frozen, None, output, manifest, PICO.image_size)


def touch(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def by_path(manifest):
    return {record.path: record for record in manifest.records}


def splits_of(records):
    return {
        name: {r.patient for r in records if r.split == name} for name in ("train", "val", "test")
    }


def assert_disjoint(records):
    patients = splits_of(records)
    total = len({record.patient for record in records})
    assert sum(map(len, patients.values())) == total
