"""How fast is a training step, and its parts, against the published recipe (baseline.py)?

    python -m benchmarks.bench_step --photographs FOLDER
    python -m benchmarks.bench_step --photographs FOLDER --device cuda

Each side in a process of its own, in turn, on the same crops; data and colour are not timed. On the
CPU: ViT-Ti/16 at batch 8 and S/8 at batch 2, 65,536 prototypes, in fp32 and, where the CPU
has it, bf16; the baseline too with the matrix products and the memory handling that we chose; loss,
and optimizer with clipping and moving average, alone. On CUDA: S/16, S/8 and B/8 at batch 20, the
baseline under AMP, and ours at the largest batch that fits. Each beside the time that its products
of matrices take alone. Where lightly is installed its loss is a third side. Writes
benchmarks/results/step-DEVICE.json.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

import devices
import losses
import run_folder
import SSRL
from augment import color_views
from benchmarks import baseline, measure
from benchmarks.bench_data import dataset_of
from data import StepSampler
from utils import keep_freed_memory
from vision_transformer import ARCHS

CPU_CASES = (  # arch, patch, batch, precision of both sides
    ("vit_tiny", 16, 8, "fp32"),
    ("vit_tiny", 16, 8, "bf16"),
    ("vit_small", 8, 2, "fp32"),
    ("vit_small", 8, 2, "bf16"),
)
CUDA_CASES = tuple(
    (arch, patch, 20, "bf16")
    for arch, patch in (("vit_small", 16), ("vit_small", 8), ("vit_base", 8))
)
Call = Callable[[], object]


def crops_of(folder: Path, o: SSRL.Options) -> list[Tensor]:
    """Return the crops of a batch on the device, as training makes them."""
    dataset = dataset_of(measure.photographs_in(folder), prepared=True)
    batch = default_collate([dataset[0, i % len(dataset)] for i in range(o.batch_size)])
    return color_views(batch, torch.device(o.device), o.mean, o.std)


def our_step(folder: Path, o: SSRL.Options) -> Call:
    """Return SSRL's training step."""
    keep_freed_memory()  # as the program does when it starts
    device = devices.pick_device(o.device)
    sampler = StepSampler(1000 * o.batch_size, o.batch_size)
    folder_of_run = run_folder.RunFolder(Path())
    state, run = SSRL.build_run(o, devices.Processes(device), folder_of_run, sampler)
    crops = crops_of(folder, o)
    return lambda: SSRL.train_step(state, iter([crops]), run)


def plain_training(o: SSRL.Options) -> baseline.Training:
    """Return the baseline's networks, loss and optimizer, from scratch."""
    device, (dim, depth, heads) = torch.device(o.device), ARCHS[o.arch]
    networks = []
    for drop in (o.drop_path, 0.0):
        shape = (dim, depth, heads, o.patch_size, o.global_crop_size, drop)
        head = baseline.Head(dim, o.out_dim, o.head_hidden_dim)
        networks.append(baseline.Network(baseline.VisionTransformer(*shape), head).to(device))
    student, teacher = networks
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    temps = (o.student_temp, o.teacher_temp)
    loss = baseline.Loss(o.out_dim, 2 + o.local_crops_number, temps).to(device)
    dtype = devices.autocast_dtype(o.precision, device)
    return baseline.Training(student, teacher, loss, baseline.build_optimizer(student), dtype=dtype)


def plain_step(folder: Path, o: SSRL.Options, as_ours: bool = False) -> Call:
    """Return the baseline's training step, `as_ours` with our choice of products and memory."""
    if as_ours:
        keep_freed_memory()
        devices.pick_device(o.device)
    training, crops = plain_training(o), crops_of(folder, o)
    views = [view for size in crops for view in size.split(o.batch_size)]
    return lambda: training.step(views)


def our_update(o: SSRL.Options) -> Call:
    """Return our clipping, optimizer and moving average, on random gradients."""
    keep_freed_memory()
    device = devices.pick_device(o.device)
    sampler = StepSampler(1000, 1)
    folder_of_run = run_folder.RunFolder(Path())
    state, run = SSRL.build_run(o, devices.Processes(device), folder_of_run, sampler)
    fill, loss = random_gradients(state.student), torch.zeros((), device=device)

    def call() -> None:
        fill()
        SSRL.apply_gradients(state, run, loss)
        SSRL.update_teacher(state.teacher, state.student, 0.996)

    return call


def plain_update(o: SSRL.Options) -> Call:
    """Return the baseline's."""
    training = plain_training(o)
    fill = random_gradients(training.student)

    def call() -> None:
        fill()
        baseline.clip_gradients(training.student, 3.0)
        training.optimizer.step()
        baseline.update_teacher(training.teacher, training.student, 0.996)

    return call


def random_gradients(network: torch.nn.Module) -> Call:
    """Return what gives each parameter that trains its gradient again, always the same one."""
    grads = [(p, torch.randn_like(p)) for p in network.parameters() if p.requires_grad]

    def fill() -> None:
        for parameter, grad in grads:
            parameter.grad = grad

    return fill


def loss_of(side: str, o: SSRL.Options) -> Call:
    """Return a side's loss, forward and backward, with what moves the centre."""
    device = torch.device(o.device)
    if side == "ours":
        keep_freed_memory()
    views, shape = 2 + o.local_crops_number, (o.batch_size, o.out_dim)
    student = torch.randn(views, *shape, device=device, requires_grad=True)
    teacher, center = torch.randn(2, *shape, device=device), torch.zeros(o.out_dim, device=device)
    plain = baseline.Loss(o.out_dim, views, (o.student_temp, o.teacher_temp)).to(device)
    if side == "lightly":
        from lightly.loss import DINOLoss  # an extra

        theirs = DINOLoss(o.out_dim, o.teacher_temp, o.teacher_temp, 1, o.student_temp).to(device)

    def call() -> None:
        if side == "ours":
            targets = losses.centered_probs(teacher, center, o.teacher_temp)
            losses.update_center(center, losses.batch_mean(teacher))
            value = losses.distillation_loss(student, targets, o.student_temp)
        elif side == "lightly":
            value = theirs([*teacher], [*student], epoch=2)
        else:
            value = plain(student.flatten(0, 1), teacher.flatten(0, 1))
        value.backward()
        student.grad = None

    return call


def flops_of(o: SSRL.Options) -> float:
    """Return the floating point operations of our step for one photograph, products alone.

    A multiplication with an addition counts as two; the backward pass costs twice the forward one.
    """
    width, depth, _ = ARCHS[o.arch]

    def forward(side: int) -> float:
        patches = (side // o.patch_size) ** 2
        tokens = patches + 1
        block = 24 * tokens * width**2 + 4 * tokens**2 * width
        last = 4 * tokens * width**2 + 20 * width**2 + 4 * tokens * width  # [CLS] alone
        return 2 * patches * 3 * o.patch_size**2 * width + (depth - 1) * block + last

    hidden, bottleneck = o.head_hidden_dim, 256
    head = 2 * (width * hidden + hidden**2 + hidden * bottleneck + bottleneck * o.out_dim)
    whole, part = forward(o.global_crop_size), forward(o.local_crop_size)
    student = 2 * whole + o.local_crops_number * part + (2 + o.local_crops_number) * head
    return 3 * student + 2 * whole + 2 * head


def products_alone(o: SSRL.Options) -> Call:
    """Return as many operations as a step takes, in large square products: no step is faster."""
    keep_freed_memory()
    device = devices.pick_device(o.device)
    side = 8192 if device.type == "cuda" else 2048
    a = torch.randn(side, side, device=device, dtype=devices.autocast_dtype(o.precision, device))
    whole, rest = divmod(o.batch_size * flops_of(o) / (2 * side**3), 1)

    def call() -> None:
        for _ in range(int(whole)):
            a @ a
        a @ a[:, : int(rest * side)]

    return call


def largest_batch(folder: Path, o: SSRL.Options) -> dict[str, Any]:
    """Return the largest batch, of doublings of 20, that fits the GPU, its speed and memory."""
    found: dict[str, Any] = {}
    for batch in (20 * 2**n for n in range(8)):
        larger = replace(o, batch_size=batch)
        sides = {
            "products": partial(products_alone, larger),
            "ours": partial(our_step, folder, larger),
        }
        try:
            times, memory = measure.alternate_apart(sides, 5, 1, o.device)
        except EOFError:  # the side ran out of memory, and said so
            break
        middle = {name: statistics.median(seconds) for name, seconds in times.items()}
        found = {"batch": batch, "images_per_s": round(batch / middle["ours"], 1)}
        found["share_of_product_rate"] = round(middle["products"] / middle["ours"], 3)
        found["memory_MB"] = memory["ours"]
    return found


def step_case(folder: Path, o: SSRL.Options, rounds: int, threads: int) -> dict[str, Any]:
    """Time the steps of both sides; on a CPU the baseline also with what we chose for it."""
    sides: dict[str, Callable[[], Call]] = {"baseline": partial(plain_step, folder, o)}
    if o.device == "cpu":
        sides["baseline, products and memory as ours"] = partial(plain_step, folder, o, True)
    sides |= {"ours": partial(our_step, folder, o), "products alone": partial(products_alone, o)}
    times, memory = measure.alternate_apart(sides, rounds, threads, o.device)
    about = {"GFLOP": round(o.batch_size * flops_of(o) / 1e9, 1), "peak_MB": memory}
    return about | measure.compare(times, o.batch_size)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photographs", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each side that count")
    parser.add_argument("--threads", type=int, default=1, help="of each side, on a CPU")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    base = SSRL.Options(init="none", device=a.device, freeze_last_layer=0)
    results: dict[str, Any] = {}
    device = devices.pick_device(a.device)
    for arch, patch, batch, precision in CPU_CASES if a.device == "cpu" else CUDA_CASES:
        o = replace(base, arch=arch, patch_size=patch, batch_size=batch, precision=precision)
        if precision == "bf16" and devices.autocast_dtype("auto", device) is None:
            continue
        name = f"{arch}/{patch} batch {batch} {precision}"
        results[name] = step_case(a.photographs, o, a.rounds, a.threads)
        if a.device == "cuda":
            results[name]["largest"] = largest_batch(a.photographs, o)
        measure.write_result(f"step-{a.device}", results)  # what follows may fail
    o, often = replace(base, arch="vit_small", batch_size=20, precision="fp32"), 4 * a.rounds
    updates = {"baseline": partial(plain_update, o), "ours": partial(our_update, o)}
    times, _ = measure.alternate_apart(updates, often, a.threads, a.device)
    results["clip, AdamW, moving average"] = measure.compare(times)
    kinds = ["baseline", "ours"] + ["lightly"] * measure.has_lightly()
    both = {kind: partial(loss_of, kind, o) for kind in kinds}
    times, _ = measure.alternate_apart(both, often, a.threads, a.device)
    results["loss, batch 20"] = measure.compare(times)
    measure.write_result(f"step-{a.device}", results)


if __name__ == "__main__":
    main()
