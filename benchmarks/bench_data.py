"""How fast do photographs become crops, against the published recipe (baseline.py)?

    python -m benchmarks.bench_data --photographs FOLDER

FOLDER's photographs (IDRiD's, say) are enlarged to EyePACS' size, 3,504 x 2,336, with grain. One
core and one thread then read them, cut 2 x 224 and 6 x 96 pixels, colour and normalise them: from
those originals, and from what prepare_data.py makes of them at 1,024 and 512 px. Then loaders with
2 workers do it. Each side runs in a process of its own, in turn. Where lightly is installed
(requirements-bench.txt), its DINOTransform is a third side.

The script writes benchmarks/results/data.json.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate

from augment import MultiCrop, MultiCropOptions, color_views
from benchmarks import baseline, measure
from benchmarks.measure import Call, Side
from data import PhotographDataset, StepSampler, training_loader
from fundus.manifest import Manifest, Record
from prepare_data import Task, prepare_photograph
from utils import keep_freed_memory
from vision_transformer import IMAGENET_MEAN, IMAGENET_STD

CPU = torch.device("cpu")
COLOR_ON_GPU = "ours, colour left to a GPU"
LOADED = 512  # photographs that a loader gives in one round
LOADER_BATCH = 8


def dataset_of(
    paths: list[Path], *, prepared: bool, options: MultiCropOptions | None = None
) -> PhotographDataset:
    """Return the training set of photographs as downloaded, or of prepared pictures.

    Its crops are those of SSRL.py's defaults where no options are given.
    """
    records = [Record(path.name, None, path.stem, "", "train") for path in paths]
    manifest = Manifest(paths[0].parent, tuple(records), prepared=prepared, layout="benchmark")
    return PhotographDataset(manifest, records, MultiCrop(options or MultiCropOptions()))


# ------------------------------------------------------------------------------------------ sides
# Each function prepares what its side needs, which is not timed, and returns the call that is.


def our_crops(paths: list[Path], *, prepared: bool, color: bool) -> Call:
    """Return the call that makes the crops of all photographs once.

    Without `color` they stay as the workers make them, for a GPU to colour.
    """
    keep_freed_memory()  # as the program does when it starts
    dataset = dataset_of(paths, prepared=prepared)

    def call() -> None:
        # A batch is one photograph, so that a round's time is that of all photographs, one by one.
        batches = (default_collate([dataset[0, i]]) for i in range(len(paths)))
        if color:
            color_all(batches)
        else:
            take_all(batches)

    return call


def published_crops(paths: list[Path]) -> Call:
    """Return the call that does the same in the published way."""
    dataset = baseline.Photographs(paths, baseline.MultiCrop())
    return lambda: take_all(dataset[i] for i in range(len(paths)))


def lightly_crops(paths: list[Path]) -> Call:
    """Return the call that does the same with lightly's transform."""
    # Imported here, since only those who compare with it have it.
    from lightly.transforms import DINOTransform

    # The scales are the paper's, as on the other sides.
    transform = DINOTransform(global_crop_scale=(0.4, 1.0), local_crop_scale=(0.05, 0.4))
    dataset = baseline.Photographs(paths, transform)
    return lambda: take_all(dataset[i] for i in range(len(paths)))


def our_loader(paths: list[Path]) -> Call:
    """Return the call that loads LOADED photographs with 2 workers, and starts and ends them."""
    keep_freed_memory()
    dataset = dataset_of(repeat(paths, LOADED), prepared=True)

    # Starting and ending the workers is part of the call, as on the other side.
    def call() -> None:
        sampler = StepSampler(LOADED, LOADER_BATCH)
        sampler.set_range(0, LOADED // LOADER_BATCH)
        color_all(training_loader(dataset, sampler, 2, CPU))

    return call


def published_loader(paths: list[Path]) -> Call:
    """Return the call that does the same in the published way."""
    dataset = baseline.Photographs(repeat(paths, LOADED), baseline.MultiCrop())

    def call() -> None:
        take_all(DataLoader(dataset, LOADER_BATCH, shuffle=True, num_workers=2, drop_last=True))

    return call


def repeat(paths: list[Path], count: int) -> list[Path]:
    """Return `count` paths, the same ones again and again."""
    return [paths[i % len(paths)] for i in range(count)]


def color_all(batches: Iterable[dict[str, torch.Tensor]]) -> None:
    """Take all batches and finish each as SSRL.train does: colour, blur, normalisation."""
    for batch in batches:
        color_views(batch, CPU, IMAGENET_MEAN, IMAGENET_STD)


def take_all(batches: Iterable[Any]) -> None:
    """Take all batches."""
    for _ in batches:
        pass


# ------------------------------------------------------------------------------------- comparisons
def write_sources(photographs: list[Path], folder: Path) -> dict[str, list[Path]]:
    """Write the photographs enlarged, and prepared at 1,024 and 512 px; return all their paths."""
    sources: dict[str, list[Path]] = {"originals": [], "1024": [], "512": []}
    for name in sources:
        (folder / name).mkdir()
    for i, photograph in enumerate(photographs):
        original = measure.enlarge(photograph, folder / "originals" / f"{i}.jpg", seed=i)
        sources["originals"].append(original)
        for size in (1024, 512):
            picture = folder / str(size) / f"{i}.jpg"
            prepare_photograph(Task(photograph.name, original, picture, size))
            sources[str(size)].append(picture)
    return sources


def time_one_core(paths: list[Path], rounds: int, *, prepared: bool) -> dict[str, list[float]]:
    """Return the seconds that each side takes for all photographs, in turn."""
    sides: dict[str, Side] = {
        "baseline": partial(published_crops, paths),
        "ours": partial(our_crops, paths, prepared=prepared, color=True),
        COLOR_ON_GPU: partial(our_crops, paths, prepared=prepared, color=False),
    }
    # Who installs only what the project needs goes without the third side.
    if measure.has_lightly():
        sides["lightly"] = partial(lightly_crops, paths)
    times, _ = measure.alternate_apart(sides, rounds, threads=1)
    return times


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photographs", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each side that count")
    options = parser.parse_args()
    torch.set_num_threads(1)
    photographs = measure.photographs_in(options.photographs)
    count = len(photographs)

    with tempfile.TemporaryDirectory() as folder:
        sources = write_sources(photographs, Path(folder))
        originals = time_one_core(sources["originals"], options.rounds, prepared=False)
        middle = time_one_core(sources["1024"], options.rounds, prepared=True)
        prepared = time_one_core(sources["512"], options.rounds, prepared=True)

        # What the published recipe reads, as downloaded, against what ours reads.
        mixed = {
            "baseline": originals["baseline"],
            "ours": prepared["ours"],
            COLOR_ON_GPU: prepared[COLOR_ON_GPU],
        }
        loaders = {
            "baseline": partial(published_loader, sources["1024"]),
            "ours": partial(our_loader, sources["1024"]),
        }
        loaded, _ = measure.alternate_apart(loaders, rounds=3, threads=1)
        result = {
            "source_MB": measure.megabytes(sources["originals"]),
            "originals": measure.compare(originals, count),
            "1024 px": measure.compare(middle, count),
            "prepared": measure.compare(prepared, count),
            "ours prepared, baseline on originals": measure.compare(mixed, count),
            "loader, 2 workers, 1024 px": measure.compare(loaded, LOADED),
        }
    measure.write_result("data", result)


if __name__ == "__main__":
    main()
