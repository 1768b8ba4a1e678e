"""What the benchmarks share: photographs of a camera's size, timing in turn, results on disk."""

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
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import devices
import run_folder
from utils import InputError, keep_freed_memory

ROOT = Path(__file__).resolve().parents[1]
EYEPACS = (3504, 2336)  # width and height of EyePACS' most frequent camera, in pixels
CAMERA_FILE = 1_500_000  # bytes; a camera's JPEG of that size is not larger
SUFFIXES = (".jpg", ".jpeg", ".png")

# A side of a comparison is a function that prepares everything and returns the call to time.
Call = Callable[[], object]
Side = Callable[[], Call]


# ------------------------------------------------------------------------------------ photographs
def photographs_in(folder: Path) -> list[Path]:
    """Return the photographs of a folder; raises InputError when there are none."""
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not found:
        raise InputError(f"--photographs {folder}: holds no .jpg or .png photograph")
    return found


def enlarge(source: Path, target: Path, size: tuple[int, int] = EYEPACS, seed: int = 0) -> Path:
    """Write a photograph at `size` (width, height) as a JPEG of at most 1.5 MB, with grain.

    Smooth photographs decode too cheaply: grain makes those of EyePACS' size take 0.9 to 1.5 MB,
    as camera files do. Returns `target`.
    """
    rng = np.random.default_rng(seed)
    with Image.open(source) as image:
        large = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC))

    # The surround of the fundus stays black, as a camera leaves it.
    grain = rng.normal(0, 4, (*large.shape[:2], 1)).astype(np.float32)
    grainy = large + grain * (large > 12)
    picture = Image.fromarray(np.clip(grainy, 0, 255).astype(np.uint8))

    for quality in range(95, 60, -3):
        picture.save(target, quality=quality)
        if target.stat().st_size <= CAMERA_FILE:
            break
    return target


def has_lightly() -> bool:
    """Return whether lightly, the third side, is installed (requirements-bench.txt)."""
    return importlib.util.find_spec("lightly") is not None


# ----------------------------------------------------------------------------------------- timing
def start_as_ours(device_name: str) -> torch.device:
    """Set memory and matrix products up as our programs do when they start; return the device."""
    keep_freed_memory()
    device = devices.choose_device(device_name)
    devices.use_fast_matmul(device)
    return device


def timed(call: Call, device: torch.device | None = None) -> float:
    """Return the seconds that a call takes, what it starts on a GPU included."""
    waits_for_gpu = device is not None and device.type == "cuda"
    if waits_for_gpu:
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if waits_for_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def alternate_apart(
    sides: dict[str, Side], rounds: int, threads: int, device: str = "cpu"
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Time all sides in turn, `rounds` times, after one round that is not counted.

    Each side runs in a process of its own, which waits while another one works: its memory is then
    handled as the side's own program handles it. A side has to be picklable.

    Returns the seconds of each side, and the peak memory of each in MB, that of its start included;
    on CUDA it is the GPU's. Raises EOFError when a side ends before its time.
    """
    context = multiprocessing.get_context("spawn")
    start_method = multiprocessing.get_start_method()
    connections: dict[str, Connection] = {}
    times: dict[str, list[float]] = {name: [] for name in sides}
    memory: dict[str, float] = {}

    # Leaving the stack closes the connections, and a side whose connection is closed ends.
    with contextlib.ExitStack() as stack:
        for name, side in sides.items():
            ours, theirs = context.Pipe()
            connections[name] = stack.enter_context(ours)
            arguments = (theirs, side, threads, device, start_method)
            context.Process(target=_serve, args=arguments).start()
            theirs.close()
            ours.recv()  # "ready"

        for count in range(1 + rounds):
            for name, connection in connections.items():
                connection.send(True)
                seconds = connection.recv()
                is_warm = count > 0
                if is_warm:
                    times[name].append(seconds)

        for connection in connections.values():
            connection.send(False)
        for name, connection in connections.items():
            memory[name] = connection.recv()
    return times, memory


def _serve(
    connection: Connection, side: Side, threads: int, device: str, start_method: str
) -> None:
    """Time a side's call whenever asked to, and send the peak memory at the end."""
    # Spawning has set its own method here; loaders shall start their workers as in a program.
    multiprocessing.set_start_method(start_method, force=True)
    torch.set_num_threads(threads)
    call = side()
    connection.send("ready")
    with contextlib.suppress(EOFError):
        while connection.recv():
            connection.send(timed(call, torch.device(device)))
        connection.send(round(1000 * devices.peak_memory(torch.device(device)), 1))


# ---------------------------------------------------------------------------------------- results
def compare(times: dict[str, list[float]], images: int = 1) -> dict[str, Any]:
    """Return each side's median, least and largest seconds, and the ratios to the first side.

    The first side is the baseline: a ratio of 2 is twice as fast. Seconds are those of a call over
    `images`. `spread` is the least and largest ratio of a single round.
    """
    # The median, since a round may meet another program that wants the machine.
    results: dict[str, Any] = {}
    for name, seconds in times.items():
        results[name] = {
            "median_s": _four_digits(statistics.median(seconds) / images),
            "least_s": _four_digits(min(seconds) / images),
            "largest_s": _four_digits(max(seconds) / images),
        }

    base, *others = times
    for name in others:
        ratio = statistics.median(times[base]) / statistics.median(times[name])
        of_rounds = [a / b for a, b in zip(times[base], times[name], strict=True)]
        results[name]["ratio"] = round(ratio, 3)
        results[name]["spread"] = [round(min(of_rounds), 3), round(max(of_rounds), 3)]
    return results


def _four_digits(value: float) -> float:
    """Return a number rounded to four significant digits."""
    return float(f"{value:.4g}")


def megabytes(files: Sequence[Path]) -> list[float]:
    """Return the sizes of files in MB."""
    return [round(file.stat().st_size / 1e6, 2) for file in files]


def machine() -> dict[str, Any]:
    """Return what times depend on: processor, cores, threads, versions."""
    about: dict[str, Any] = {"cpu": _processor(), "cores": _cores()}
    about["threads"] = torch.get_num_threads()
    about.update(run_folder.versions())
    if has_lightly():
        about["lightly"] = importlib.metadata.version("lightly")
    return about


def _processor() -> str:
    """Return the processor's name, as Linux gives it or else as Python does."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="ignore")
    except OSError:
        text = ""
    model = re.search(r"model name\s*:\s*(.*)", text)
    if model:
        return model[1].strip()
    return platform.processor() or platform.machine()


def _cores() -> int | None:
    """Return how many cores this process may use, where that is known, else all there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def write_result(name: str, result: dict[str, Any]) -> None:
    """Print a result and write it to benchmarks/results/NAME.json, with the machine."""
    text = json.dumps({"machine": machine(), **result}, indent=2)

    # A list of numbers reads better on one line than on one line each.
    text = re.sub(r"\[[^][{}]*\]", lambda found: re.sub(r"\s+", " ", found[0]), text)
    print(text)
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text + "\n")
