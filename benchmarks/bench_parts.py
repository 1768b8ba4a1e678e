"""What do the parts cost that decide how data and step are written? One thread, one process.

    python -m benchmarks.bench_parts --photographs FOLDER

Milliseconds of reading an original of EyePACS' size and a prepared picture, finding the fundus,
cutting and colouring crops; torch's fused attention beside two products, forward and backward, fp32
and, where the CPU has it, bf16; fp32 products by torch's default and by what
devices.speed_up_matmul chooses. Medians; writes benchmarks/results/parts.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import default_collate

import devices
from augment import color_views
from benchmarks import measure
from benchmarks.bench_data import dataset_of
from fundus import photographs
from prepare_data import Task, prepare_photograph
from utils import keep_freed_memory

CPU = torch.device("cpu")
ATTENTIONS = ((37, 48), (197, 16), (785, 4))  # tokens, images


def median_ms(call: Callable[[], object], rounds: int = 15) -> float:
    """Return the median milliseconds of a call."""
    call()
    return round(1000 * statistics.median(measure.timed(call) for _ in range(rounds)), 2)


def data_parts(found: list[Path], folder: Path) -> dict[str, float]:
    """Time what brings a photograph in, over all of them."""
    large, small = ([folder / f"{name}{i}.jpg" for i in range(len(found))] for name in "ab")
    for i, path in enumerate(found):
        measure.enlarge(path, large[i], seed=i)
        prepare_photograph(Task(path.name, large[i], small[i], 512))
    decoded = [photographs.open_photograph(p, min_side=512) for p in large]
    dataset = dataset_of(small, prepared=True)
    pictures = [torch.from_numpy(dataset.read(i)).permute(2, 0, 1) for i in range(len(small))]
    batches = [default_collate([dataset[0, i]]) for i in range(len(small))]

    def draft(path: Path) -> None:
        with Image.open(path) as image:
            image.draft(None, (512, 512))
            image.load()

    parts: dict[str, tuple[Callable[[Any], object], list[Any]]] = {
        "original, JPEG alone, at a quarter": (draft, large),
        "original, as an array": (lambda p: photographs.open_photograph(p, min_side=512), large),
        "original, fundus found": (photographs.find_fundus, decoded),
        "prepared, as an array": (photographs.open_photograph, small),
        "prepared, 8 crops cut": (lambda p: dataset.view(p, (0,)), pictures),
        "colour and blur of 8 crops": (
            lambda b: color_views(b, CPU, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)),
            batches,
        ),
    }
    told = {}
    for name, (part, inputs) in parts.items():
        whole = median_ms(lambda part=part, inputs=inputs: [part(x) for x in inputs], 5)
        told[name] = round(whole / len(inputs), 2)
    return told


def attention_parts(dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Time attention of ViT-S, forward and backward, by the fused kernel and by two products."""
    told = {}
    for tokens, images in ATTENTIONS:
        shape = (images, 6, tokens, 64)
        q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))
        slope = torch.randn(shape, dtype=dtype)

        def products(q=q, k=k, v=v, slope=slope) -> None:
            ((q * 64**-0.5 @ k.transpose(2, 3)).softmax(-1) @ v).backward(slope)

        def fused(q=q, k=k, v=v, slope=slope) -> None:
            F.scaled_dot_product_attention(q, k, v).backward(slope)

        both = {"fused_ms": median_ms(fused, 7), "products_ms": median_ms(products, 7)}
        ratio = round(both["fused_ms"] / both["products_ms"], 1)
        told[f"{tokens} tokens, {images} images"] = both | {"fused_takes_times": ratio}
    return told


def gflops() -> float:
    """Return the rate of an fp32 product of ViT-S' size, in GFLOP/s."""
    a, b = torch.randn(3152, 384), torch.randn(1536, 384)
    return round(2 * 3152 * 384 * 1536 / 1e6 / median_ms(lambda: F.linear(a, b)))


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photographs", type=Path, required=True, help="folder of photographs")
    a = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    results: dict[str, Any] = {"fp32 products, GFLOP/s": {"torch's default": gflops()}}
    devices.speed_up_matmul()
    results["fp32 products, GFLOP/s"]["ours"] = gflops()
    with tempfile.TemporaryDirectory() as folder:
        results["data, ms"] = data_parts(measure.photographs_in(a.photographs), Path(folder))
    results["attention, fp32"] = attention_parts(torch.float32)
    if devices.autocast_dtype("auto", CPU) is torch.bfloat16:
        results["attention, bf16"] = attention_parts(torch.bfloat16)
    measure.write_result("parts", results)


if __name__ == "__main__":
    main()
