"""What do the parts cost that decide how data and step are written? One thread, one process.

    python -m benchmarks.bench_parts --photographs FOLDER

The script measures three things, each as a median:

- milliseconds of reading an original of EyePACS' size and a prepared picture, of finding the
  fundus, of cutting and of colouring crops;
- milliseconds of attention, forward and backward, by torch's fused kernel and by two products, in
  fp32 and, where the CPU has it, in bf16;
- the rate of fp32 products by torch's default and by what devices.use_fast_matmul chooses.

It writes benchmarks/results/parts.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
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
from benchmarks.measure import Call
from fundus import photographs
from prepare_data import Task, prepare_photograph
from utils import keep_freed_memory

CPU = torch.device("cpu")
SIZE = 512  # side of a prepared picture in pixels
ATTENTIONS = ((37, 48), (197, 16), (785, 4))  # tokens, images


def median_ms(call: Call, rounds: int = 15) -> float:
    """Return the median milliseconds of a call, after one that is not counted."""
    call()
    return round(1000 * statistics.median(measure.timed(call) for _ in range(rounds)), 2)


def mean_ms(part: Callable[[Any], object], inputs: Sequence[Any]) -> float:
    """Return the milliseconds that `part` takes for one of its inputs, over all of them."""

    def call() -> None:
        for item in inputs:
            part(item)

    return round(median_ms(call, rounds=5) / len(inputs), 2)


# ------------------------------------------------------------------------------------ of the data
def data_parts(sources: list[Path], folder: Path) -> dict[str, float]:
    """Return the milliseconds of what brings a photograph in."""
    originals = []
    prepared = []
    for i, source in enumerate(sources):
        original = folder / f"original{i}.jpg"
        picture = folder / f"prepared{i}.jpg"
        measure.enlarge(source, original, seed=i)
        prepare_photograph(Task(source.name, original, picture, SIZE))
        originals.append(original)
        prepared.append(picture)

    # Each part starts from what the part before it has made.
    dataset = dataset_of(prepared, prepared=True)
    decoded = []
    pictures = []
    batches = []
    for i, original in enumerate(originals):
        decoded.append(photographs.open_photograph(original, min_side=SIZE))
        pictures.append(torch.from_numpy(dataset.read(i)).permute(2, 0, 1))
        batches.append(default_collate([dataset[0, i]]))

    # What the decoder alone takes, of the smallest size that is large enough.
    def decode(path: Path) -> None:
        with Image.open(path) as image:
            image.draft(None, (SIZE, SIZE))
            image.load()

    def read(path: Path) -> None:
        photographs.open_photograph(path, min_side=SIZE)

    def cut(picture: torch.Tensor) -> None:
        dataset.view(picture, (0,))

    def color(batch: dict[str, torch.Tensor]) -> None:
        color_views(batch, CPU, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))

    return {
        "original, JPEG alone, at a quarter": mean_ms(decode, originals),
        "original, as an array": mean_ms(read, originals),
        "original, fundus found": mean_ms(photographs.find_fundus, decoded),
        "prepared, as an array": mean_ms(photographs.open_photograph, prepared),
        "prepared, 8 crops cut": mean_ms(cut, pictures),
        "colour and blur of 8 crops": mean_ms(color, batches),
    }


# ------------------------------------------------------------------------------------- of the step
def attention_parts(dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Return what attention of ViT-S takes, forward and backward, for each number of tokens."""
    results = {}
    for tokens, images in ATTENTIONS:
        results[f"{tokens} tokens, {images} images"] = time_attention(tokens, images, dtype)
    return results


def time_attention(tokens: int, images: int, dtype: torch.dtype) -> dict[str, float]:
    """Return the milliseconds by the fused kernel and by two products, and their ratio."""
    shape = (images, 6, tokens, 64)  # (B, H, N, D / H)
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))
    slope = torch.randn(shape, dtype=dtype)

    def fused() -> None:
        F.scaled_dot_product_attention(q, k, v).backward(slope)

    def products() -> None:
        weights = (q * 64**-0.5 @ k.transpose(2, 3)).softmax(-1)
        (weights @ v).backward(slope)

    # Each call adds its gradients to those of the call before, which costs both the same.
    fused_ms = median_ms(fused, rounds=7)
    products_ms = median_ms(products, rounds=7)
    return {
        "fused_ms": fused_ms,
        "products_ms": products_ms,
        "fused_takes_times": round(fused_ms / products_ms, 1),
    }


def gflops() -> float:
    """Return the rate of an fp32 product of ViT-S' size, in GFLOP/s."""
    # The first layer of its MLP, over 16 images of 197 tokens.
    a = torch.randn(3152, 384)
    b = torch.randn(1536, 384)
    return round(2 * 3152 * 384 * 1536 / 1e6 / median_ms(lambda: F.linear(a, b)))


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photographs", type=Path, required=True, help="folder of photographs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()

    # The order matters: what use_fast_matmul changes stays changed.
    rates = {"torch's default": gflops()}
    devices.use_fast_matmul(CPU)
    rates["ours"] = gflops()
    results: dict[str, Any] = {"fp32 products, GFLOP/s": rates}
    with tempfile.TemporaryDirectory() as folder:
        sources = measure.photographs_in(options.photographs)
        results["data, ms"] = data_parts(sources, Path(folder))
    results["attention, fp32"] = attention_parts(torch.float32)
    if devices.autocast_dtype("auto", CPU) is torch.bfloat16:
        results["attention, bf16"] = attention_parts(torch.bfloat16)
    measure.write_result("parts", results)


if __name__ == "__main__":
    main()
