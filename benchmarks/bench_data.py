"""How fast do photographs become crops, against the published recipe (baseline.py)?

    python -m benchmarks.bench_data --photographs FOLDER

FOLDER's photographs (IDRiD's, say) are enlarged to EyePACS' size, 3,504 x 2,336, with grain. On one
core and one thread, each side in a process of its own, in turn: reading, cutting 2 x 224 and 6 x 96
pixels, colour and normalisation, from those originals and from what prepare_data.py makes of them
at 1,024 and 512 px. Then loaders with 2 workers. Where lightly is installed
(requirements-bench.txt), its DINOTransform is a third side. Writes benchmarks/results/data.json.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate

from augment import MultiCrop, color_views
from benchmarks import baseline, measure
from data import PhotographDataset, StepSampler, training_loader
from fundus.manifest import Manifest, Record
from prepare_data import Task, prepare_photograph
from utils import keep_freed_memory
from vision_transformer import IMAGENET_MEAN, IMAGENET_STD

CPU = torch.device("cpu")
Call = Callable[[], None]


def dataset_of(paths: list[Path], prepared: bool) -> PhotographDataset:
    """Return the training set of photographs as downloaded, or of prepared pictures."""
    records = [Record(p.name, None, p.stem, "", "train") for p in paths]
    manifest = Manifest(paths[0].parent, tuple(records), prepared, "benchmark")
    return PhotographDataset(manifest, records, MultiCrop())


def colored(batches: Iterable[dict[str, torch.Tensor]]) -> None:
    """Take all batches and finish each as SSRL.train does: colour, blur, normalisation."""
    for batch in batches:
        color_views(batch, CPU, IMAGENET_MEAN, IMAGENET_STD)


def our_crops(paths: list[Path], prepared: bool, color: bool = True) -> Call:
    """Return what makes the crops of all photographs once, without colour for a GPU to do."""
    keep_freed_memory()  # as the program does when it starts
    ours = dataset_of(paths, prepared)

    def call() -> None:
        batches = (default_collate([ours[0, i]]) for i in range(len(paths)))
        colored(batches if color else ())
        drain(batches)

    return call


def plain_crops(paths: list[Path]) -> Call:
    """Return what does the same as published."""
    plain = baseline.Photographs(paths, baseline.MultiCrop())
    return lambda: drain(plain[i] for i in range(len(paths)))


def lightly_crops(paths: list[Path]) -> Call:
    """Return what does the same with lightly's transform."""
    from lightly.transforms import DINOTransform  # an extra

    transform = DINOTransform(global_crop_scale=(0.4, 1.0), local_crop_scale=(0.05, 0.4))
    plain = baseline.Photographs(paths, transform)
    return lambda: drain(plain[i] for i in range(len(paths)))


def our_loader(paths: list[Path], images: int, batch: int) -> Call:
    """Return what loads `images` photographs with 2 workers, their start and end included."""
    keep_freed_memory()
    ours = dataset_of([paths[i % len(paths)] for i in range(images)], prepared=True)

    def call() -> None:
        sampler = StepSampler(images, batch)
        sampler.set_range(0, images // batch)
        colored(training_loader(ours, sampler, 2, CPU))

    return call


def plain_loader(paths: list[Path], images: int, batch: int) -> Call:
    """Return what does the same as published."""
    plain = baseline.Photographs(
        [paths[i % len(paths)] for i in range(images)], baseline.MultiCrop()
    )
    return lambda: drain(DataLoader(plain, batch, shuffle=True, num_workers=2, drop_last=True))


def drain(batches: Iterable[Any]) -> None:
    """Take all batches."""
    for _ in batches:
        pass


def one_core(paths: list[Path], prepared: bool, rounds: int) -> dict[str, list[float]]:
    """Time all sides on all photographs, in turn."""
    sides: dict[str, Callable[[], Call]] = {
        "baseline": partial(plain_crops, paths),
        "ours": partial(our_crops, paths, prepared),
        "ours, colour left to a GPU": partial(our_crops, paths, prepared, False),
    }
    if measure.has_lightly():
        sides["lightly"] = partial(lightly_crops, paths)
    return measure.alternate_apart(sides, rounds, 1)[0]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photographs", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--rounds", type=int, default=7, help="of all photographs on each side")
    o = parser.parse_args()
    torch.set_num_threads(1)
    found = measure.photographs_in(o.photographs)
    with tempfile.TemporaryDirectory() as text:
        folders = [Path(text, name) for name in ("originals", "1024", "512")]
        for folder in folders:
            folder.mkdir()
        originals, middle, prepared = ([f / f"{i}.jpg" for i in range(len(found))] for f in folders)
        for i, path in enumerate(found):
            measure.enlarge(path, originals[i], seed=i)
            prepare_photograph(Task(path.name, originals[i], middle[i], 1024))
            prepare_photograph(Task(path.name, originals[i], prepared[i], 512))
        times = {
            "originals": one_core(originals, False, o.rounds),
            "1024 px": one_core(middle, True, o.rounds),
            "prepared": one_core(prepared, True, o.rounds),
        }
        mixed = {"baseline": times["originals"]["baseline"], "ours": times["prepared"]["ours"]}
        mixed["ours, colour left to a GPU"] = times["prepared"]["ours, colour left to a GPU"]
        result: dict[str, Any] = {
            "source_MB": [round(p.stat().st_size / 1e6, 2) for p in originals]
        }
        result |= {name: measure.compare(sides, len(found)) for name, sides in times.items()}
        result["ours prepared, baseline on originals"] = measure.compare(mixed, len(found))
        images, batch = 512, 8
        loaders = {
            "baseline": partial(plain_loader, middle, images, batch),
            "ours": partial(our_loader, middle, images, batch),
        }
        loaded, _ = measure.alternate_apart(loaders, 3, 1)
        result["loader, 2 workers, 1024 px"] = measure.compare(loaded, images)
    measure.write_result("data", result)


if __name__ == "__main__":
    main()
