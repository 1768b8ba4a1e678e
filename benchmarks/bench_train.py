"""How fast does training go, data and all, against the published recipe (baseline.py)?

    python -m benchmarks.bench_train --photographs FOLDER
    python -m benchmarks.bench_train --photographs FOLDER --device cuda --workers 8

FOLDER's photographs (IDRiD's, say) are enlarged to EyePACS' size, 3,504 x 2,336, with grain. Each
side trains whole epochs of ViT-Ti/16 (on CUDA S/16) with 65,536 prototypes in a process of its own,
in turn:

- the recipe as published, in fp32 from those originals;
- ours in fp32 from the same;
- ours as it is shipped, bf16 where the hardware has it, from the prepared 512-px folder.

Then ours alone is timed against crop size and batch, and SSRL.py itself with 1 and 2 processes. The
script writes benchmarks/results/train-DEVICE.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

import data
import SSRL
from benchmarks import baseline, measure
from benchmarks.bench_data import dataset_of
from benchmarks.bench_step import our_training, plain_training
from benchmarks.measure import Call, Side
from fundus.manifest import Record, write_manifest
from prepare_data import Task, prepare_photograph

# Each case of ours alone: sides of a global and a local crop in pixels, batch size.
SIZES = ((96, 48, 8), (224, 96, 2), (224, 96, 8), (224, 96, 24))


# ------------------------------------------------------------------------------------------- sides
# Each prepares data and networks, which is not timed, and returns the call that trains an epoch.


def our_epochs(
    paths: list[Path], options: SSRL.Options, *, prepared: bool, wait_file: Path | None = None
) -> Call:
    """Return the call that trains an epoch as SSRL.train does, but saves nothing.

    It does not look at the teacher either. The share of the last epoch's time that was spent
    waiting for data is written into `wait_file`.
    """
    device = measure.start_as_ours(options.device)
    dataset = dataset_of(paths, prepared=prepared, options=options)
    sampler = data.StepSampler(len(paths), options.batch_size)
    state, run = our_training(options, sampler)
    waits: list[float] = []

    def epoch(batches: Any) -> None:
        for _ in range(sampler.steps_per_epoch):
            result = SSRL.train_step(state, batches, run)
            waits.append(result.waited)
            # The numbers for the log are part of training, as in SSRL.train.
            if state.step % options.log_every == 0:
                SSRL.summarize_steps(state, run, result)

    def call() -> None:
        waits.clear()
        sampler.set_range(state.step, state.step + sampler.steps_per_epoch)
        batches = SSRL.load_batches(state, run, dataset)
        seconds = measure.timed(lambda: epoch(batches), device)
        if wait_file is not None:
            # The first wait is the loader's start, which a training has once and not every epoch.
            wait_file.write_text(json.dumps(sum(waits[1:]) / seconds))

    return call


def published_epochs(paths: list[Path], options: SSRL.Options) -> Call:
    """Return the call that trains an epoch as published."""
    training = plain_training(options)
    photographs = baseline.Photographs(paths, baseline.MultiCrop())
    loader = DataLoader(
        photographs,
        options.batch_size,
        shuffle=True,
        num_workers=options.workers,
        drop_last=True,
        pin_memory=options.device == "cuda",
    )

    def call() -> None:
        for crops in loader:
            training.step([crop.to(options.device, non_blocking=True) for crop in crops])

    return call


# ------------------------------------------------------------------------------------- comparisons
def compare_with_published(
    folders: dict[str, list[Path]], options: SSRL.Options, rounds: int, threads: int
) -> dict[str, Any]:
    """Return the times of the three sides' epochs, their memory, and the share of waiting."""
    originals = folders["originals"]
    same_precision = replace(options, precision="fp32")
    if options.device == "cuda":
        # The published code trains under autocast there.
        same_precision = replace(options, precision="bf16")
    shipped = replace(options, precision="auto")

    with tempfile.NamedTemporaryFile("r") as wait_file:
        sides: dict[str, Side] = {
            "baseline, originals": partial(published_epochs, originals, same_precision),
            "ours, originals": partial(our_epochs, originals, same_precision, prepared=False),
            "ours as shipped, prepared": partial(
                our_epochs,
                folders["prepared"],
                shipped,
                prepared=True,
                wait_file=Path(wait_file.name),
            ),
        }
        times, memory = measure.alternate_apart(sides, rounds, threads, options.device)
        waited = json.load(wait_file)
    return {
        "data_wait_as_shipped": round(waited, 4),
        "peak_MB": memory,
        **measure.compare(times, len(originals)),
    }


def time_by_size(paths: list[Path], options: SSRL.Options, threads: int) -> dict[str, Any]:
    """Return the speed and memory of ours as shipped for each crop size and batch."""
    # All cases in one comparison, so that they meet the same state of the machine.
    sides = {}
    for global_crop, local_crop, batch_size in SIZES:
        sized = replace(
            options,
            precision="auto",
            batch_size=batch_size,
            global_crop_size=global_crop,
            local_crop_size=local_crop,
        )
        name = f"{global_crop}/{local_crop} px, batch {batch_size}"
        sides[name] = partial(our_epochs, paths, sized, prepared=True)

    times, memory = measure.alternate_apart(sides, 2, threads, options.device)
    seconds = measure.compare(times, len(paths))
    results = {}
    for name in sides:
        rate = round(1 / seconds[name]["median_s"], 2)
        results[name] = {"images_per_s": rate, "peak_MB": memory[name]}
    return results


def time_by_processes(folder: Path, options: SSRL.Options) -> dict[str, Any]:
    """Return the images/s that SSRL.py logs with 1 and 2 processes (GPUs: 1, and all there are)."""
    worlds = [1, 2]
    if options.device == "cuda":
        worlds = sorted({1, torch.cuda.device_count()})
    results = {}
    for world in worlds:
        run = folder / f"processes-{world}"
        train_under_torchrun(folder, run, options, world)
        rates = []
        for line in (run / "log.jsonl").read_text().splitlines():
            entry = json.loads(line)
            if "images_per_s" in entry:
                rates.append(entry["images_per_s"])
        # The median, since the first interval holds the start of the workers.
        rates.sort()
        results[f"processes: {world}"] = {"images_per_s": round(rates[len(rates) // 2], 2)}
    return results


def train_under_torchrun(folder: Path, run: Path, options: SSRL.Options, world: int) -> None:
    """Run SSRL.py for 3 epochs in `world` processes of one thread and one worker each."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={world}"]
    command += [str(measure.ROOT / "SSRL.py"), "--data", str(folder), "--init", "none"]
    command += ["--arch", options.arch, "--batch-size", str(options.batch_size), "--epochs", "3"]
    command += ["--warmup-epochs", "0", "--log-every", "2", "--keep-every", "0"]
    command += ["--device", options.device, "--output-dir", str(run), "--workers", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, capture_output=True)


# -------------------------------------------------------------------------------------- their data
def write_data(photographs: list[Path], folder: Path, count: int) -> dict[str, list[Path]]:
    """Write `count` photographs as originals and prepared, and return their paths.

    There are as many patients. The prepared ones are a data set that SSRL.py takes.
    """
    folders: dict[str, list[Path]] = {"originals": [], "prepared": []}
    for name in folders:
        (folder / name / "images").mkdir(parents=True)
    for i in range(count):
        original = folder / "originals" / "images" / f"{i}_left.jpg"
        prepared = folder / "prepared" / "images" / f"{i}_left.jpg"
        if i < len(photographs):
            measure.enlarge(photographs[i], original, seed=i)
            prepare_photograph(Task(original.name, original, prepared, 512))
        else:
            # The same photographs again, as links to their files.
            first = f"{i % len(photographs)}_left.jpg"
            original.symlink_to(original.with_name(first))
            prepared.symlink_to(prepared.with_name(first))
        folders["originals"].append(original)
        folders["prepared"].append(prepared)

    # Without grades: self-supervised training reads none.
    records = []
    for i in range(count):
        records.append(Record(f"images/{i}_left.jpg", None, str(i), "left", "train"))
    write_manifest(folder / "prepared", records)
    # A folder counts as prepared, and is not cropped again, when it holds this report.
    (folder / "prepared" / "data_report.json").write_text("{}")
    return folders


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photographs", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each side that count")
    parser.add_argument("--threads", type=int, default=1, help="threads of each side, on a CPU")
    parser.add_argument("--workers", type=int, default=1, help="workers of each side's loader")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    # On a CPU all is small enough for a few minutes.
    arch = "vit_tiny"
    batch_size = 8
    count = 48
    if arguments.device == "cuda":
        arch = "vit_small"
        batch_size = 20
        count = 960
    options = SSRL.Options(
        init="none",
        device=arguments.device,
        arch=arch,
        batch_size=batch_size,
        workers=arguments.workers,
        freeze_last_layer=0,
        warmup_epochs=0,
    )

    photographs = measure.photographs_in(arguments.photographs)
    with tempfile.TemporaryDirectory() as name:
        folders = write_data(photographs, Path(name), count)
        against_published = compare_with_published(
            folders, options, arguments.rounds, arguments.threads
        )
        results = {
            "against published": against_published,
            "ours as shipped, by size": time_by_size(
                folders["prepared"], options, arguments.threads
            ),
            "SSRL.py, by processes": time_by_processes(Path(name, "prepared"), options),
        }
    measure.write_result(f"train-{arguments.device}", results)


if __name__ == "__main__":
    main()
