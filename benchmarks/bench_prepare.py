"""How fast is preparing, against full decoding and a bicubic resize with Pillow?

    python -m benchmarks.bench_prepare --photographs FOLDER

Enlarges FOLDER's photographs (IDRiD's, say) to EyePACS' size, 3,504 x 2,336, with grain, so that
they cost what camera JPEGs do (0.9-1.5 MB); smooth drawings would decode too cheaply. Then, on one
core, alternating: prepare_data's worker, and Pillow. Also: likeness of both pictures, a worker's
peak memory, and what a manifest of EyePACS' 88,702 rows costs at start. Prints medians, spread and
ratio; writes benchmarks/results/prepare.json.
"""

from __future__ import annotations

import argparse
import base64
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

from manifest import Record, read_manifest, write_manifest
from photographs import Box, find_fundus, open_photograph, pad_square, read_photograph
from prepare_data import Task, prepare_photograph
from splits import find_copies

ROOT = Path(__file__).resolve().parents[1]
WIDTH, HEIGHT, SIZE, ROWS = 3504, 2336, 512, 88_702


def enlarge(source: Path, target: Path, seed: int) -> None:
    """Write a photograph at EyePACS' size, with grain, as a JPEG of 0.9-1.5 MB."""
    rng = np.random.default_rng(seed)
    with Image.open(source) as image:
        large = image.convert("RGB").resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    grain = rng.normal(0, 4, (HEIGHT, WIDTH, 1)).astype(np.float32)
    noisy = np.clip(np.asarray(large) + grain * (np.asarray(large) > 12), 0, 255)
    for quality in range(95, 60, -3):
        Image.fromarray(noisy.astype(np.uint8)).save(target, quality=quality)
        if target.stat().st_size <= 1_500_000:
            return


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


def timed(call: Callable[[], object]) -> float:
    """Return the seconds that a call took."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def peak_memory(photograph: Path, folder: Path) -> float:
    """Return the peak memory in MB of a fresh process that prepares one photograph (Linux)."""
    code = (
        "import re, sys; from pathlib import Path; import prepare_data as p; "
        f"p.prepare_photograph(p.Task('a', Path(sys.argv[1]), Path(sys.argv[2]), {SIZE})); "
        "said = Path('/proc/self/status').read_text(); "
        "print(int(re.search('VmHWM:[^0-9]*([0-9]+)', said)[1]) / 1024)"
    )
    command = [sys.executable, "-c", code, str(photograph), str(folder / "peak.jpg")]
    return float(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)


def large_manifest(folder: Path) -> dict[str, float]:
    """Return the seconds that reading 88,702 rows takes, and looking for copies among them."""
    (folder / "images").mkdir()
    rng, records, facts = np.random.default_rng(0), [], {}
    for number in range(ROWS):
        path, patient = f"images/{number}.jpg", f"p{number // 2}"
        (folder / path).touch()
        records.append(Record(path, number % 5, patient, "", "train", sha256=f"{number:064x}"))
        look = rng.integers(-60, 60, (16, 16), dtype=np.int8)
        facts[path] = {"sha256": f"{number}", "signature": base64.b64encode(look).decode()}
    write_manifest(folder, records)
    return {
        "read_manifest_s": timed(lambda: read_manifest(folder)),
        "find_copies_s": timed(
            lambda: find_copies(facts, lambda path: open_photograph(folder / path))
        ),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photographs", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--rounds", type=int, default=3, help="of all photographs on each side")
    o = parser.parse_args()
    names = sorted(p for p in o.photographs.iterdir() if p.suffix.lower() in (".jpg", ".png"))
    ours, pillow = [], []
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        sources = [folder / f"{number}.jpg" for number in range(len(names))]
        for number, (name, source) in enumerate(zip(names, sources, strict=True)):
            enlarge(name, source, number)
        found = [read_photograph(source, SIZE) for source in sources]
        both = zip(found, sources, strict=True)
        likeness = [psnr(f.picture, with_pillow(s, f.box)) for f, s in both]  # of the same crop
        for _ in range(o.rounds):
            for source in sources:
                task = Task(source.name, source, folder / "out.jpg", SIZE)
                ours.append(timed(lambda t=task: prepare_photograph(t)))
                pillow.append(timed(lambda s=source: save_with_pillow(s, folder / "pillow.jpg")))
        result = {
            "source_MB": [round(s.stat().st_size / 1e6, 2) for s in sources],
            "ours_s": [statistics.median(ours), min(ours), max(ours)],
            "pillow_s": [statistics.median(pillow), min(pillow), max(pillow)],
            "ratio_of_medians": statistics.median(pillow) / statistics.median(ours),
            "psnr_dB": [min(likeness), statistics.median(likeness)],
            "worker_peak_MB": peak_memory(sources[0], folder),
            "rows": ROWS,
            **large_manifest(folder),
            "peak_MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "versions": {n: version(n) for n in ("pillow", "numpy")}
            | {"python": platform.python_version()},
            "machine": f"{platform.machine()} CPU, one core a photograph",
        }
    path = ROOT / "benchmarks" / "results" / "prepare.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
