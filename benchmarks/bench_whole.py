"""How long does an evaluation of EyePACS take from cached features, and in how much memory?

    python -m benchmarks.bench_whole

The features are random and of EyePACS' size: [CLS] of four blocks of a ViT-S of 35,126 training
and 53,576 test photographs of 44,351 patients, with the signatures that find copies. The k-NN and
the linear probe run as the scripts run them, each in a process of its own: search for copies, fit
in all folds, calibration, every metric with its interval, results and pictures. What is left out is
the extraction, which a backbone takes hours for on a CPU, and the pictures of neighbours.

The script writes benchmarks/results/whole.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import devices
import eval_knn
import eval_linear
import evaluation
from benchmarks import measure
from benchmarks.bench_eval import BLOCKS, TEST, TRAIN, WIDTH
from fundus.manifest import Manifest, Record
from vision_transformer import Backbone, BackboneSpec
from weights import Weights

# EyePACS' prevalences, and the share of training patients who become val.
SHARES = (0.735, 0.07, 0.151, 0.025, 0.019)
VAL_SHARE = 0.1


# --------------------------------------------------------------------------------- the photographs
def records_of(count: int, split: str) -> list[Record]:
    """Return records of two eyes a patient, whose files are never read."""
    rng = np.random.default_rng(len(split))
    grades = rng.choice(len(SHARES), count, p=np.array(SHARES) / sum(SHARES))
    records = []
    for number, grade in enumerate(grades.tolist()):
        patient = number // 2
        side = split
        if split == "train" and patient < VAL_SHARE * count / 2:
            side = "val"
        name = f"{split}{patient}_{('left', 'right')[number % 2]}"
        records.append(Record(f"{name}.jpg", grade, f"{split}{patient}", "left", side, sha256=name))
    return records


def open_drawn(folder: Path, options: Any, kind: str) -> evaluation.Evaluation:
    """Return the evaluation of a small backbone that never runs, on photographs that are not."""
    records = [*records_of(TRAIN, "train"), *records_of(TEST, "test")]
    manifest = Manifest(folder, tuple(records), prepared=True, layout="prepared")
    spec = BackboneSpec("vit_pico", 16, 32)
    weights = Weights({}, spec, "drawn", "0" * 64)
    backbone = Backbone(spec)
    return evaluation.Evaluation(
        options, weights, backbone, None, folder / "run" / kind, manifest, spec.image_size
    )


def draw_features(_backbone: Any, dataset: Any, *_: Any) -> dict[str, torch.Tensor]:
    """Return what extract_features would of as many photographs: five overlapping clouds."""
    count = len(dataset)
    grades = torch.tensor([record.grade for record in dataset.records])
    generator = torch.Generator().manual_seed(count)
    middles = torch.randn(len(SHARES), BLOCKS * WIDTH, generator=torch.Generator().manual_seed(0))
    cls = torch.randn(count, BLOCKS * WIDTH, generator=generator) + 0.03 * middles[grades]
    looks = torch.randint(-120, 121, (count, 4096), generator=generator, dtype=torch.int8)
    return {"cls": cls.view(count, BLOCKS, WIDTH), "patch": cls[:, :WIDTH].clone(), "look": looks}


# ------------------------------------------------------------------------------------- the programs
def run_stage(stage: str, folder: Path) -> dict[str, float]:
    """Fill the cache ("extract"), or evaluate from it; return seconds and peak memory in GB."""
    common = {"workers": 0, "device": "cpu", "precision": "fp32"}
    if stage == "knn":
        options: Any = eval_knn.Options(**common, pictures=False)
        module: Any = eval_knn
    else:
        options = eval_linear.Options(**common)
        module = eval_linear
    measure.start_as_ours("cpu")
    opened = open_drawn(folder, options, stage)
    if stage == "extract":
        evaluation.extract_features = draw_features
        for split in ("train", "val", "test"):
            records = opened.manifest.split(split)
            evaluation.cached_features(opened, opened.manifest, records, opened.view)
        return {}

    evaluation.extract_features = None  # all has to come from the cache
    began = time.perf_counter()
    protocol = module.name_protocol(options, opened.image_size)
    evaluation.evaluate_all(opened, protocol, module.grade)
    return {
        "seconds": round(time.perf_counter() - began, 1),
        "peak_GB": round(devices.peak_memory(torch.device("cpu")), 2),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=("extract", "knn", "linear"), help="for itself")
    parser.add_argument("--folder", type=Path, help="for itself")
    asked = parser.parse_args()
    if asked.stage:
        found = run_stage(asked.stage, asked.folder)
        print(json.dumps(found))
        return

    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for stage in ("extract", "knn", "linear"):
            command = [sys.executable, "-m", "benchmarks.bench_whole", "--stage", stage]
            command += ["--folder", folder]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            if found:
                results[stage] = found
    seconds = sum(found["seconds"] for found in results.values())
    results["together"] = {"seconds": round(seconds, 1)}
    measure.write_result("whole", results)


if __name__ == "__main__":
    main()
