"""What benchmarks share: photographs of a camera's size, alternating timing, results on disk."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import devices
import run_folder
from utils import InputError

ROOT = Path(__file__).resolve().parents[1]
EYEPACS = (3504, 2336)  # width and height of EyePACS' most frequent camera


def photographs_in(folder: Path) -> list[Path]:
    """Return the photographs of a folder; raises InputError when there are none."""
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not found:
        raise InputError(f"--photographs {folder}: holds no .jpg or .png photograph")
    return found


def enlarge(source: Path, target: Path, size: tuple[int, int] = EYEPACS, seed: int = 0) -> Path:
    """Write a photograph at `size` (width, height) as a JPEG, with grain; at most 1.5 MB.

    Smooth photographs decode too cheaply: grain makes those of EyePACS' size take 0.9 to 1.5 MB,
    as camera files do.
    """
    rng = np.random.default_rng(seed)
    with Image.open(source) as image:
        large = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC))
    grain = rng.normal(0, 4, (*large.shape[:2], 1)).astype(np.float32)
    noisy = Image.fromarray(np.clip(large + grain * (large > 12), 0, 255).astype(np.uint8))
    for quality in range(95, 60, -3):
        noisy.save(target, quality=quality)
        if target.stat().st_size <= 1_500_000:
            break
    return target


def has_lightly() -> bool:
    """Say whether lightly, the third side, is installed (requirements-bench.txt)."""
    return importlib.util.find_spec("lightly") is not None


def timed(call: Callable[[], object], device: torch.device | None = None) -> float:
    """Return the seconds that a call takes, what it starts on a GPU included."""
    wait = torch.cuda.synchronize if device and device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - began


def alternate(
    sides: dict[str, Callable[[], object]],
    rounds: int,
    device: torch.device | None = None,
    *,
    warm: bool = True,
) -> dict[str, list[float]]:
    """Time all sides, one after the other, `rounds` times; to `warm` up, once uncounted before."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for count in range(-warm, rounds):
        for name, call in sides.items():
            seconds = timed(call, device)
            if count >= 0:
                times[name].append(seconds)
    return times


def alternate_apart(
    sides: dict[str, Callable[[], Callable[[], object]]],
    rounds: int,
    threads: int,
    device: str = "cpu",
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """As `alternate`, each side in a process of its own that waits while another one works.

    A side is a picklable function that makes the call to time: memory is then handled as the side's
    own program handles it. Also returns the peak memory of each, with its start, in MB; on CUDA
    that of the GPU.
    """
    context, members = multiprocessing.get_context("spawn"), {}
    times: dict[str, list[float]] = {name: [] for name in sides}
    with contextlib.ExitStack() as stack:  # a process ends when nobody listens to it
        for name, make in sides.items():
            ours, theirs = context.Pipe()
            members[name] = stack.enter_context(ours)
            how = (theirs, make, threads, device, multiprocessing.get_start_method())
            context.Process(target=_serve, args=how).start()
            theirs.close()
            ours.recv()
        for count in range(-1, rounds):  # once uncounted, to warm up
            for name, connection in members.items():
                connection.send(True)
                seconds = connection.recv()
                if count >= 0:
                    times[name].append(seconds)
        for connection in members.values():
            connection.send(False)
        return times, {name: connection.recv() for name, connection in members.items()}


def _serve(
    connection: Connection,
    make: Callable[[], Callable[[], object]],
    threads: int,
    device: str,
    start: str,
) -> None:
    """Time a side's call whenever told to; then tell the peak memory."""
    multiprocessing.set_start_method(start, force=True)  # loaders begin as in a program's own
    torch.set_num_threads(threads)
    call = make()
    connection.send("ready")
    with contextlib.suppress(EOFError):
        while connection.recv():
            connection.send(timed(call, torch.device(device)))
        connection.send(round(1000 * devices.peak_memory(torch.device(device)), 1))


def compare(times: dict[str, list[float]], images: int = 1) -> dict[str, Any]:
    """Return each side's median, least and largest seconds, and the ratios to the first side.

    The first side is the baseline: a ratio of 2 is twice as fast. Seconds are those of a call over
    `images`. `spread` is the least and largest ratio of a single round.
    """
    base, *others = times
    told: dict[str, Any] = {
        name: {f: float(f"{of(seconds) / images:.4g}") for f, of in STATISTICS.items()}
        for name, seconds in times.items()
    }
    for name in others:
        single = [a / b for a, b in zip(times[base], times[name], strict=True)]
        middle = statistics.median(times[base]) / statistics.median(times[name])
        told[name]["ratio"] = round(middle, 3)
        told[name]["spread"] = [round(min(single), 3), round(max(single), 3)]
    return told


STATISTICS = {"median_s": statistics.median, "least_s": min, "largest_s": max}


def machine() -> dict[str, Any]:
    """Return what times depend on: processor, cores, threads, versions."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="ignore")
    except OSError:
        text = ""
    model = re.search(r"model name\s*:\s*(.*)", text)
    cpu = model[1].strip() if model else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    lightly = {"lightly": importlib.metadata.version("lightly")} if has_lightly() else {}
    about = {"cpu": cpu, "cores": cores, "threads": torch.get_num_threads()}
    return about | run_folder.versions() | lightly


def write_result(name: str, result: dict[str, Any]) -> None:
    """Print a result and write it to benchmarks/results/NAME.json, with the machine."""
    text = json.dumps({"machine": machine()} | result, indent=2)
    # lists of numbers on one line
    text = re.sub(r"\[[^][{}]*\]", lambda found: re.sub(r"\s+", " ", found[0]), text)
    print(text)
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text + "\n")
