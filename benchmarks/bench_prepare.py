"""How fast is preparing, against full decoding and a bicubic resize with Pillow?

    python -m benchmarks.bench_prepare --photographs FOLDER

Enlarges FOLDER's photographs (IDRiD's, say) to EyePACS' size, 3,504 x 2,336, with grain, so that
they cost what camera JPEGs do (0.9-1.5 MB); smooth drawings would decode too cheaply. Then, on one
core, alternating: prepare_data's worker, and Pillow. Also: likeness of both pictures, a worker's
peak memory, two processes against one, and what EyePACS' 88,702 photographs cost at start and when
all of them are prepared already. Prints it and writes benchmarks/results/prepare.json.
"""

from __future__ import annotations

import argparse
import base64
import functools
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import prepare_data
from benchmarks import measure
from fundus.copies import find_copies
from fundus.manifest import Record, read_manifest, write_manifest
from fundus.photographs import Box, find_fundus, open_photograph, pad_square, read_photograph
from prepare_data import PrepareOptions, Task, prepare_photograph
from utils import keep_freed_memory

SIZE, ROWS = 512, 88_702


def with_pillow(path: Path, box: Box | None = None) -> np.ndarray:
    """Return what prepare_photograph would, by full decoding and a bicubic resize."""
    image = open_photograph(path)
    box = box or find_fundus(image)
    square = pad_square(image[box.top : box.bottom, box.left : box.right])
    return np.asarray(Image.fromarray(square).resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def save_with_pillow(path: Path, target: Path) -> None:
    """Prepare one photograph with Pillow, JPEG included."""
    Image.fromarray(with_pillow(path)).save(target, quality=95, subsampling=0)


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of two uint8 pictures in dB."""
    return 10 * np.log10(255**2 / np.mean((one.astype(float) - other.astype(float)) ** 2))


def pillow_side(sources: list[Path], target: Path) -> Callable[[], None]:
    """Return what prepares all sources with Pillow."""

    def call() -> None:
        for source in sources:
            save_with_pillow(source, target)

    return call


def our_side(sources: list[Path], target: Path) -> Callable[[], None]:
    """Return what prepares all sources as a worker does."""
    keep_freed_memory()  # as the program does when it starts

    def call() -> None:
        for source in sources:
            assert "error" not in prepare_photograph(Task(source.name, source, target, SIZE))

    return call


def one_core(sources: list[Path], folder: Path, rounds: int) -> dict[str, Any]:
    """Time both sides on all photographs, in turn."""
    sides = {
        "pillow": functools.partial(pillow_side, sources, folder / "pillow.jpg"),
        "ours": functools.partial(our_side, sources, folder / "ours.jpg"),
    }
    return measure.compare(measure.alternate_apart(sides, rounds, 1)[0], len(sources))


POOL = """
import json, sys, time
from pathlib import Path
from prepare_data import Task, prepare_photographs
from utils import keep_freed_memory
keep_freed_memory()
sources, rounds = [Path(p) for p in sys.argv[2:]], int(sys.argv[1])
tasks = [Task(f"{i}", s, s.with_name(f"{i}-out.jpg"), 512) for i, s in enumerate(24 * sources)]
times = {1: [], 2: []}
for _ in range(rounds):
    for workers in times:
        began = time.perf_counter()
        assert all("error" not in fact for fact in prepare_photographs(tasks, workers))
        times[workers].append(time.perf_counter() - began)
print(json.dumps({f"processes: {n}": seconds for n, seconds in times.items()}))
"""


def side_by_side(sources: list[Path], rounds: int) -> dict[str, Any]:
    """Time the pool over 24 times the photographs with 1 and 2 processes, their start included.

    In a program of its own: what this one has imported, each process would import too.
    """
    command = [sys.executable, "-c", POOL, str(rounds), *map(str, sources)]
    said = subprocess.run(command, cwd=measure.ROOT, capture_output=True, check=True)
    return measure.compare(json.loads(said.stdout), 24 * len(sources))


def worker_memory(photographs: list[Path], folder: Path) -> float:
    """Return the peak memory in MB of a fresh process that prepares them all (Linux)."""
    code = (
        "import re, sys; from pathlib import Path; import prepare_data as p, utils; "
        "utils.keep_freed_memory(); "
        f"made = [p.Task('a', Path(s), Path(sys.argv[1]), {SIZE}) for s in sys.argv[2:]]; "
        "assert all('sha256' in p.prepare_photograph(task) for task in made); "
        "said = Path('/proc/self/status').read_text(); "
        "print(int(re.search('VmHWM:[^0-9]*([0-9]+)', said)[1]) / 1024)"
    )
    command = [sys.executable, "-c", code, str(folder / "peak.jpg"), *map(str, photographs)]
    return float(subprocess.run(command, cwd=measure.ROOT, capture_output=True, check=True).stdout)


def large_manifest(folder: Path) -> dict[str, float]:
    """Return the seconds that reading 88,702 rows takes, and looking for copies among them."""
    (folder / "images").mkdir(parents=True)
    rng, records, facts = np.random.default_rng(0), [], {}
    for number in range(ROWS):
        path, patient = f"images/{number}.jpg", f"p{number // 2}"
        (folder / path).touch()
        records.append(Record(path, number % 5, patient, "", "train", sha256=f"{number:064x}"))
        look = rng.integers(-60, 60, (16, 16), dtype=np.int8)
        facts[path] = {"sha256": f"{number}", "signature": base64.b64encode(look).decode()}
    write_manifest(folder, records)
    return {
        "read_manifest_s": measure.timed(lambda: read_manifest(folder)),
        "find_copies_s": measure.timed(lambda: find_copies(facts, open_photograph)),  # none is near
    }


def finished_again(picture: Path, folder: Path) -> float:
    """Return the seconds that the command takes on 88,702 photographs which are all prepared."""
    source, out, rng = folder / "source", folder / "out", np.random.default_rng(0)
    (source / "train").mkdir(parents=True)
    (out / "images").mkdir(parents=True)
    how = {"size": SIZE, "keep_aspect": False, "graham": False, "image_format": "jpeg"}
    fact = prepare_photograph(Task("", picture, folder / "one.jpg", SIZE))
    lines, rows = [how], ["image,level"]
    for number in range(ROWS):
        name = f"{number // 2}_{('left', 'right')[number % 2]}"
        raw, made = source / "train" / f"{name}.jpeg", out / "images" / f"{name}.jpg"
        raw.touch()
        made.touch()
        look = base64.b64encode(rng.integers(-60, 60, (16, 16), dtype=np.int8)).decode()
        mine = {"path": f"train/{name}.jpeg", "sha256": f"{number:064x}", "signature": look}
        for path, end in ((raw, "source"), (made, "target")):
            mine |= {f"{end}_bytes": 0, f"{end}_ns": path.stat().st_mtime_ns}
        lines.append(fact | mine)
        rows.append(f"{name},{number % 5}")
    (out / "prepare.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (source / "trainLabels.csv").write_text("\n".join(rows) + "\n")
    options = PrepareOptions(str(source), str(out), size=SIZE)
    return measure.timed(lambda: prepare_data.main(options))


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photographs", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--rounds", type=int, default=3, help="of all photographs on each side")
    o = parser.parse_args()
    logging.getLogger("ssrl").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        names = measure.photographs_in(o.photographs)
        sources = [measure.enlarge(p, folder / f"{i}.jpg", seed=i) for i, p in enumerate(names)]
        found = [(read_photograph(source, SIZE), source) for source in sources]
        likeness = [psnr(f.picture, with_pillow(s, f.box)) for f, s in found]  # of the same crop
        measure.write_result(
            "prepare",
            {
                "source_MB": [round(s.stat().st_size / 1e6, 2) for s in sources],
                "one core": one_core(sources, folder, o.rounds),
                "side by side": side_by_side(sources, o.rounds),
                "psnr_dB": [round(min(likeness), 2), round(float(np.median(likeness)), 2)],
                "worker_peak_MB": round(worker_memory(sources, folder), 1),
                "rows": ROWS,
                **large_manifest(folder / "large"),
                "finished_again_s": finished_again(sources[0], folder / "again"),
            },
        )


if __name__ == "__main__":
    main()
