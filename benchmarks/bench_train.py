"""How fast does training go, data and all, against the published recipe (baseline.py)?

    python -m benchmarks.bench_train --photographs FOLDER
    python -m benchmarks.bench_train --photographs FOLDER --device cuda --workers 8

FOLDER's photographs (IDRiD's, say) are enlarged to EyePACS' size, 3,504 x 2,336, with grain. Whole
epochs of ViT-Ti/16 (on CUDA S/16) with 65,536 prototypes, each side in a process of its own, in
turn: the recipe as published, in fp32 from those originals; ours in fp32 from the same; ours as it
is shipped, bf16 where the hardware has it, from the prepared 512-px folder. Then ours alone against
crop size and batch, and SSRL.py itself with 1 and 2 processes. Writes results/train-DEVICE.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

import data
import devices
import run_folder
import SSRL
from augment import color_views
from benchmarks import baseline, measure
from benchmarks.bench_data import dataset_of
from benchmarks.bench_step import plain_training
from fundus.manifest import Record, write_manifest
from prepare_data import Task, prepare_photograph
from utils import keep_freed_memory

Call = Callable[[], object]


def our_epochs(
    paths: list[Path], prepared: bool, o: SSRL.Options, told: Path | None = None
) -> Call:
    """Return what trains an epoch as SSRL.train does, but for saving and looking at the teacher.

    The share of the last epoch that was spent waiting for data is written into `told`.
    """
    keep_freed_memory()
    device, dataset = devices.pick_device(o.device), dataset_of(paths, prepared)
    sampler = data.StepSampler(len(paths), o.batch_size)
    folder = run_folder.RunFolder(Path())
    state, run = SSRL.build_run(o, devices.Processes(device), folder, sampler)

    def call() -> None:
        sampler.set_range(state.step, state.step + sampler.steps_per_epoch)
        loader = data.training_loader(dataset, sampler, o.workers, device)
        batches = data.ahead((color_views(b, device, o.mean, o.std) for b in loader), device)
        waits = []
        seconds = measure.timed(lambda: waits.extend(epoch(batches)), device)
        state.losses.clear()
        if told:
            told.write_text(json.dumps(sum(waits[1:]) / seconds))  # the first is the loader's start

    def epoch(batches: Any) -> list[float]:
        steps = range(sampler.steps_per_epoch)
        return [SSRL.train_step(state, batches, run)["waited"] for _ in steps]

    return call


def plain_epochs(paths: list[Path], o: SSRL.Options) -> Call:
    """Return what trains an epoch as published."""
    training = plain_training(o)
    photographs = baseline.Photographs(paths, baseline.MultiCrop())
    how = {"num_workers": o.workers, "drop_last": True, "pin_memory": o.device == "cuda"}
    loader = DataLoader(photographs, o.batch_size, shuffle=True, **how)

    def call() -> None:
        for crops in loader:
            training.step([crop.to(o.device, non_blocking=True) for crop in crops])

    return call


def against_published(
    folders: dict[str, list[Path]], o: SSRL.Options, rounds: int, threads: int
) -> dict[str, Any]:
    """Time epochs of the three sides; also their peak memory, and the share of waiting for data."""
    originals, prepared = folders["originals"], folders["prepared"]
    plain = replace(o, precision="bf16" if o.device == "cuda" else "fp32")  # AMP on a GPU
    with tempfile.NamedTemporaryFile("r") as told:
        shipped = partial(our_epochs, prepared, True, replace(o, precision="auto"), Path(told.name))
        sides: dict[str, Callable[[], Call]] = {
            "baseline, originals": partial(plain_epochs, originals, plain),
            "ours, originals": partial(our_epochs, originals, False, plain),
            "ours as shipped, prepared": shipped,
        }
        times, memory = measure.alternate_apart(sides, rounds, threads, o.device)
        waited = json.load(told)
    return {
        "data_wait_as_shipped": round(waited, 4),
        "peak_MB": memory,
        **measure.compare(times, len(originals)),
    }


def by_size(paths: list[Path], o: SSRL.Options, threads: int) -> dict[str, Any]:
    """Time ours as shipped against crop size and batch."""
    cases = {"96/48 px, batch 8": (96, 48, 8), "224/96 px, batch 2": (224, 96, 2)}
    cases |= {"224/96 px, batch 8": (224, 96, 8), "224/96 px, batch 24": (224, 96, 24)}
    sides = {}
    for name, (whole, part, batch) in cases.items():
        sized = replace(o, precision="auto", batch_size=batch, global_crop_size=whole)
        sides[name] = partial(our_epochs, paths, True, replace(sized, local_crop_size=part))
    times, memory = measure.alternate_apart(sides, 2, threads, o.device)
    found = measure.compare(times, len(paths))
    rates = {name: {"images_per_s": round(1 / found[name]["median_s"], 2)} for name in cases}
    return {name: rate | {"peak_MB": memory[name]} for name, rate in rates.items()}


def by_processes(folder: Path, o: SSRL.Options, device: str) -> dict[str, Any]:
    """Return the images/s that SSRL.py logs with 1 and 2 processes (GPUs: 1, and all there are)."""
    gpus = torch.cuda.device_count()
    found = {}
    for world in (1, 2) if device == "cpu" else sorted({1, gpus}):
        output = folder / f"processes-{world}"
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={world}"]
        command += [str(measure.ROOT / "SSRL.py"), "--data", str(folder), "--init", "none"]
        command += ["--arch", o.arch, "--batch-size", str(o.batch_size), "--epochs", "3"]
        command += ["--warmup-epochs", "0", "--log-every", "2", "--keep-every", "0"]
        command += ["--device", device, "--output-dir", str(output), "--workers", "1"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, env=environment, check=True, capture_output=True)
        lines = map(json.loads, (output / "log.jsonl").read_text().splitlines())
        rates = sorted(line["images_per_s"] for line in lines if "images_per_s" in line)
        found[f"processes: {world}"] = {"images_per_s": round(rates[len(rates) // 2], 2)}
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photographs", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute")
    parser.add_argument("--rounds", type=int, default=3, help="epochs of each side that count")
    parser.add_argument("--threads", type=int, default=1, help="of each side, on a CPU")
    parser.add_argument("--workers", type=int, default=1, help="of each side's loader")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    arch, batch, count = ("vit_small", 20, 960) if a.device == "cuda" else ("vit_tiny", 8, 48)
    o = SSRL.Options(init="none", device=a.device, arch=arch, batch_size=batch, workers=a.workers)
    o = replace(o, freeze_last_layer=0, warmup_epochs=0)
    found = measure.photographs_in(a.photographs)
    with tempfile.TemporaryDirectory() as text:
        folders = {name: [] for name in ("originals", "prepared")}
        for name in folders:
            Path(text, name, "images").mkdir(parents=True)
        for i in range(count):
            large, small = (Path(text, name, "images", f"{i}_left.jpg") for name in folders)
            if i < len(found):
                measure.enlarge(found[i], large, seed=i)
                prepare_photograph(Task(large.name, large, small, 512))
            else:  # the same photographs again
                for path in (large, small):
                    path.symlink_to(path.with_name(f"{i % len(found)}_left.jpg"))
            folders["originals"].append(large)
            folders["prepared"].append(small)
        results = {"against published": against_published(folders, o, a.rounds, a.threads)}
        results["ours as shipped, by size"] = by_size(folders["prepared"], o, a.threads)
        root = Path(text, "prepared")
        write_manifest(
            root,
            [Record(f"images/{i}_left.jpg", None, f"{i}", "left", "train") for i in range(count)],
        )
        (root / "data_report.json").write_text("{}")
        results["SSRL.py, by processes"] = by_processes(root, o, a.device)
    measure.write_result(f"train-{a.device}", results)


if __name__ == "__main__":
    main()
