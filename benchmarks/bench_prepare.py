"""How fast is preparing, against full decoding and a bicubic resize with Pillow?

    python -m benchmarks.bench_prepare --photographs FOLDER

FOLDER's photographs (IDRiD's, say) are enlarged to EyePACS' size, 3,504 x 2,336, with grain, so
that they cost what camera JPEGs do (0.9 to 1.5 MB); smooth drawings would decode too cheaply. On
one core, prepare_data's worker and Pillow then prepare them in turn. The script also measures

- how alike both sides' pictures are,
- a worker's peak memory,
- two processes against one,
- what EyePACS' 88,702 photographs cost at the start, and when all of them are prepared already.

It writes benchmarks/results/prepare.json.
"""

from __future__ import annotations

import argparse
import base64
import json
import logging
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import prepare_data
from benchmarks import measure
from benchmarks.measure import Call
from fundus.copies import find_copies
from fundus.manifest import GRADES, Record, read_manifest, write_manifest
from fundus.photographs import Box, find_fundus, open_photograph, pad_square, read_photograph
from prepare_data import PrepareOptions, Task, prepare_photograph
from utils import keep_freed_memory

SIZE = 512  # side of a prepared picture in pixels
ROWS = 88_702  # photographs of EyePACS
REPEATS = 24  # times that the pool prepares each photograph

# The pool in a program of its own: what this one has imported, each of its processes would import.
POOL_PROGRAM = """
import json, sys, time
from pathlib import Path
from prepare_data import Task, prepare_photographs
from utils import keep_freed_memory

keep_freed_memory()
rounds, size, repeats = map(int, sys.argv[1:4])
tasks = []
for number, source in enumerate(repeats * sys.argv[4:]):
    source = Path(source)
    tasks.append(Task(str(number), source, source.with_name(f"{number}-out.jpg"), size))

times = {1: [], 2: []}
for _ in range(rounds):
    for workers in times:
        began = time.perf_counter()
        for fact in prepare_photographs(tasks, workers):
            assert "error" not in fact
        times[workers].append(time.perf_counter() - began)
print(json.dumps({f"processes: {workers}": seconds for workers, seconds in times.items()}))
"""

# A worker's work in a fresh process, whose peak Linux tells in kB.
MEMORY_PROGRAM = """
import re, sys
from pathlib import Path
import prepare_data, utils

utils.keep_freed_memory()
for source in sys.argv[3:]:
    task = prepare_data.Task("a", Path(source), Path(sys.argv[1]), int(sys.argv[2]))
    assert "sha256" in prepare_data.prepare_photograph(task)
status = Path("/proc/self/status").read_text()
print(int(re.search("VmHWM:[^0-9]*([0-9]+)", status)[1]) / 1024)
"""


def run_program(program: str, *arguments: object) -> str:
    """Run a program in a Python of its own and return what it prints."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    answer = subprocess.run(command, cwd=measure.ROOT, capture_output=True, check=True, text=True)
    return answer.stdout


# ------------------------------------------------------------------------------------------ sides
# Each side prepares what it needs, which is not timed, and returns the call that is.


def with_pillow(path: Path, box: Box | None = None) -> np.ndarray:
    """Return what prepare_photograph would, by full decoding and a bicubic resize.

    The fundus is looked for where its box is not given. Returns uint8 RGB (SIZE, SIZE, 3).
    """
    # Without `min_side` the JPEG is decoded whole, where our worker decodes it at a fraction.
    image = open_photograph(path)
    if box is None:
        box = find_fundus(image)
    square = pad_square(image[box.top : box.bottom, box.left : box.right])
    return np.asarray(Image.fromarray(square).resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def pillow_side(sources: list[Path], target: Path) -> Call:
    """Return the call that prepares all sources with Pillow, JPEG included."""

    def call() -> None:
        for source in sources:
            picture = Image.fromarray(with_pillow(source))
            picture.save(target, quality=95, subsampling=0)

    return call


def our_side(sources: list[Path], target: Path) -> Call:
    """Return the call that prepares all sources as a worker does."""
    keep_freed_memory()  # as the program does when it starts

    def call() -> None:
        for source in sources:
            facts = prepare_photograph(Task(source.name, source, target, SIZE))
            assert "error" not in facts, facts

    return call


# ---------------------------------------------------------------------------- of a few photographs
def time_one_core(sources: list[Path], folder: Path, rounds: int) -> dict[str, Any]:
    """Return the times of both sides for one photograph, in turn over all of them."""
    sides = {
        "pillow": partial(pillow_side, sources, folder / "pillow.jpg"),
        "ours": partial(our_side, sources, folder / "ours.jpg"),
    }
    times, _ = measure.alternate_apart(sides, rounds, threads=1)
    return measure.compare(times, len(sources))


def time_side_by_side(sources: list[Path], rounds: int) -> dict[str, Any]:
    """Return the times of the pool with 1 and 2 processes, their start included."""
    printed = run_program(POOL_PROGRAM, rounds, SIZE, REPEATS, *sources)
    return measure.compare(json.loads(printed), REPEATS * len(sources))


def worker_memory(sources: list[Path], folder: Path) -> float:
    """Return the peak memory in MB of a fresh process that prepares them all (Linux)."""
    return float(run_program(MEMORY_PROGRAM, folder / "peak.jpg", SIZE, *sources))


def likeness(source: Path) -> float:
    """Return the peak signal-to-noise ratio in dB of both sides' pictures of the same crop."""
    ours = read_photograph(source, SIZE)
    # Pixels can be compared only where both sides cut the same box.
    theirs = with_pillow(source, ours.box)
    error = np.mean((ours.picture.astype(float) - theirs.astype(float)) ** 2)
    return 10 * np.log10(255**2 / error)


# ------------------------------------------------------------------------ of as many as EyePACS has
def random_signature(rng: np.random.Generator) -> str:
    """Return a signature in base64 as prepare_photograph gives it, like no other one."""
    return base64.b64encode(rng.integers(-60, 60, (16, 16), dtype=np.int8)).decode()


def large_manifest(folder: Path) -> dict[str, float]:
    """Return the seconds that reading 88,702 rows takes, and looking for copies among them."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    records = []
    facts = {}
    for number in range(ROWS):
        path = f"images/{number}.jpg"
        patient = f"p{number // 2}"
        (folder / path).touch()
        records.append(Record(path, number % GRADES, patient, "", "train", sha256=f"{number:064x}"))
        facts[path] = {"sha256": str(number), "signature": random_signature(rng)}
    write_manifest(folder, records)

    # No two signatures are near, so that no picture is opened.
    return {
        "read_manifest_s": measure.timed(lambda: read_manifest(folder)),
        "find_copies_s": measure.timed(lambda: find_copies(facts, open_photograph)),
    }


def time_finished_again(picture: Path, folder: Path) -> float:
    """Return the seconds that the command takes on 88,702 photographs which are all prepared."""
    source = folder / "source"
    out = folder / "out"
    (source / "train").mkdir(parents=True)
    (out / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)

    # EyePACS as downloaded, of empty files, and the journal of a run that has prepared it.
    settings = {"size": SIZE, "keep_aspect": False, "graham": False, "image_format": "jpeg"}
    one_picture = prepare_photograph(Task("", picture, folder / "one.jpg", SIZE))
    journal = [json.dumps(settings)]
    labels = ["image,level"]
    for number in range(ROWS):
        eye = ("left", "right")[number % 2]
        name = f"{number // 2}_{eye}"
        original = source / "train" / f"{name}.jpeg"
        prepared = out / "images" / f"{name}.jpg"
        original.touch()
        prepared.touch()
        facts = {
            **one_picture,
            "path": f"train/{name}.jpeg",
            "sha256": f"{number:064x}",
            "signature": random_signature(rng),
            "source_bytes": 0,
            "source_ns": original.stat().st_mtime_ns,
            "target_bytes": 0,
            "target_ns": prepared.stat().st_mtime_ns,
        }
        journal.append(json.dumps(facts))
        labels.append(f"{name},{number % GRADES}")
    (out / "prepare.jsonl").write_text("\n".join(journal) + "\n")
    (source / "trainLabels.csv").write_text("\n".join(labels) + "\n")

    # The command reads all rows and compares all files with the journal, and prepares nothing.
    options = PrepareOptions(str(source), str(out), size=SIZE)
    return measure.timed(lambda: prepare_data.main(options))


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photographs", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each side that count")
    options = parser.parse_args()
    # What prepare_data.py says of the empty files would fill the terminal.
    logging.getLogger("ssrl").setLevel(logging.ERROR)
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = []
        for i, photograph in enumerate(measure.photographs_in(options.photographs)):
            sources.append(measure.enlarge(photograph, folder / f"{i}.jpg", seed=i))
        alike = [likeness(source) for source in sources]
        results = {
            "source_MB": measure.megabytes(sources),
            "one core": time_one_core(sources, folder, options.rounds),
            "side by side": time_side_by_side(sources, options.rounds),
            "psnr_dB": [round(min(alike), 2), round(float(np.median(alike)), 2)],
            "worker_peak_MB": round(worker_memory(sources, folder), 1),
            "rows": ROWS,
            **large_manifest(folder / "large"),
            "finished_again_s": time_finished_again(sources[0], folder / "again"),
        }
        measure.write_result("prepare", results)


if __name__ == "__main__":
    main()
