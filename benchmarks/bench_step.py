"""How fast is a training step, and its parts, against the published recipe (baseline.py)?

    python -m benchmarks.bench_step --photographs FOLDER
    python -m benchmarks.bench_step --photographs FOLDER --device cuda

Each side takes its steps in a process of its own, in turn, on the same crops; data and colour are
not timed.

On a CPU the cases are ViT-Ti/16 at batch 8 and ViT-S/8 at batch 2 with 65,536 prototypes, in fp32
and, where the CPU has it, in bf16. The baseline also runs with the matrix products and the memory
handling that we chose. The loss is timed by itself, and so is the optimizer with clipping and
moving average. Where lightly is installed (requirements-bench.txt), its loss is a third side.

On CUDA the cases are ViT-S/16, S/8 and B/8 at batch 20, the baseline under autocast, and ours at
the largest batch that fits.

Each step stands beside the time that its matrix products take alone. The script writes
benchmarks/results/step-DEVICE.json.

Shapes: B batch, V views, K prototypes.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
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
from augment import CropBatch, color_views
from benchmarks import baseline, measure
from benchmarks.bench_data import dataset_of
from benchmarks.measure import Call, Side
from data import StepSampler
from utils import keep_freed_memory
from vision_transformer import ARCHS, IMAGENET_MEAN, IMAGENET_STD

# Each case: arch, patch size, batch size, precision of both sides.
CPU_CASES = (
    ("vit_tiny", 16, 8, "fp32"),
    ("vit_tiny", 16, 8, "bf16"),
    ("vit_small", 8, 2, "fp32"),
    ("vit_small", 8, 2, "bf16"),
)
CUDA_CASES = (
    ("vit_small", 16, 20, "bf16"),
    ("vit_small", 8, 20, "bf16"),
    ("vit_base", 8, 20, "bf16"),
)
STEPS = 1000  # of an epoch; far fewer are taken, so that schedules hardly move
MOMENTUM = 0.996
CLIP = 3.0


# ---------------------------------------------------------------------------------------- the step
# A function that returns a Call prepares what its side needs, which is not timed; the call is.


def batch_of_crops(folder: Path, options: SSRL.Options) -> CropBatch:
    """Return the crops of a batch on the device, as training makes them."""
    dataset = dataset_of(measure.photographs_in(folder), prepared=True, options=options)
    items = [dataset[0, i] for i in range(min(len(dataset), options.batch_size))]
    # With fewer photographs than a batch takes, their crops come several times.
    items = list(itertools.islice(itertools.cycle(items), options.batch_size))
    device = torch.device(options.device)
    return color_views(default_collate(items), device, IMAGENET_MEAN, IMAGENET_STD)


def split_views(batch: CropBatch, batch_size: int) -> list[Tensor]:
    """Return the crops of a batch one view after the other, each (B, 3, h, w), for the baseline."""
    views = []
    for crops in batch.crops:
        views += crops.split(batch_size)
    return views


def our_training(
    options: SSRL.Options, sampler: StepSampler | None = None
) -> tuple[SSRL.State, SSRL.Run]:
    """Return our training from scratch, in one process; nothing is written.

    Without a sampler an epoch has STEPS steps.
    """
    if sampler is None:
        sampler = StepSampler(STEPS * options.batch_size, options.batch_size)
    # The folder is where a run would save; only SSRL.train does that.
    processes = devices.Processes(devices.choose_device(options.device))
    return SSRL.build_run(options, processes, run_folder.RunFolder(Path()), sampler)


def plain_training(options: SSRL.Options) -> baseline.Training:
    """Return the baseline's networks, loss and optimizer, from scratch."""
    device = torch.device(options.device)
    student = _plain_network(options, options.drop_path).to(device)
    teacher = _plain_network(options, 0.0).to(device)
    # The teacher starts as the student's copy and gets no gradients.
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    loss = baseline.Loss(
        options.out_dim,
        2 + options.local_crops_number,
        (options.student_temp, options.teacher_temp),
    ).to(device)
    optimizer = baseline.build_optimizer(student)
    dtype = devices.autocast_dtype(options.precision, device)
    return baseline.Training(student, teacher, loss, optimizer, dtype=dtype)


def _plain_network(options: SSRL.Options, drop: float) -> baseline.Network:
    """Return the baseline's backbone and head of the size that the options name."""
    width, depth, heads = dimensions(options.arch)
    backbone = baseline.VisionTransformer(
        width, depth, heads, options.patch_size, options.global_crop_size, drop
    )
    return baseline.Network(
        backbone, baseline.Head(width, options.out_dim, options.head_hidden_dim)
    )


def dimensions(arch: str) -> tuple[int, int, int]:
    """Return width, depth and heads of one of our short names for a ViT."""
    changes = ARCHS[arch].changes
    return changes["embed_dim"], changes["depth"], changes["num_heads"]


def our_step(folder: Path, options: SSRL.Options) -> Call:
    """Return the call that takes SSRL's training step."""
    measure.start_as_ours(options.device)
    state, run = our_training(options)
    crops = batch_of_crops(folder, options)
    return lambda: SSRL.train_step(state, iter([crops]), run)


def published_step(folder: Path, options: SSRL.Options, *, as_ours: bool = False) -> Call:
    """Return the call that takes the baseline's training step.

    `as_ours` gives it our choice of matrix products and memory.
    """
    if as_ours:
        measure.start_as_ours(options.device)
    training = plain_training(options)
    views = split_views(batch_of_crops(folder, options), options.batch_size)
    return lambda: training.step(views)


# -------------------------------------------------------------------------------------- its update
def our_update(options: SSRL.Options) -> Call:
    """Return the call of our clipping, optimizer and moving average, on random gradients."""
    device = measure.start_as_ours(options.device)
    state, run = our_training(options)
    # A step takes the gradients away, so the same ones are given again: drawing takes longer.
    gradients = random_gradients(state.student)
    loss = torch.zeros((), device=device)

    def call() -> None:
        set_gradients(gradients)
        SSRL.apply_gradients(state, run, {"loss": loss})
        SSRL.update_teacher(state.teacher, state.student, MOMENTUM)

    return call


def published_update(options: SSRL.Options) -> Call:
    """Return the call of the baseline's."""
    training = plain_training(options)
    gradients = random_gradients(training.student)

    def call() -> None:
        set_gradients(gradients)
        baseline.clip_gradients(training.student, CLIP)
        training.optimizer.step()
        baseline.update_teacher(training.teacher, training.student, MOMENTUM)

    return call


Gradients = list[tuple[torch.nn.Parameter, Tensor]]


def random_gradients(network: torch.nn.Module) -> Gradients:
    """Return each parameter that trains with a random gradient for it."""
    pairs = []
    for parameter in network.parameters():
        if parameter.requires_grad:
            pairs.append((parameter, torch.randn_like(parameter)))
    return pairs


def set_gradients(gradients: Gradients) -> None:
    """Give each parameter its gradient, which the step before has taken away."""
    for parameter, gradient in gradients:
        parameter.grad = gradient


# ---------------------------------------------------------------------------------------- its loss
def random_logits(options: SSRL.Options) -> tuple[Tensor, Tensor]:
    """Return random logits: the student's (V, B, K), with gradient, and the teacher's (2, B, K)."""
    views = 2 + options.local_crops_number
    shape = (options.batch_size, options.out_dim)
    student = torch.randn(views, *shape, device=options.device, requires_grad=True)
    teacher = torch.randn(2, *shape, device=options.device)
    return student, teacher


def our_loss(options: SSRL.Options) -> Call:
    """Return the call of our loss, forward and backward, with what moves the centre."""
    keep_freed_memory()
    student, teacher = random_logits(options)
    center = torch.zeros(options.out_dim, device=options.device)

    def call() -> None:
        targets = losses.centered_probs(teacher, center, options.teacher_temp)
        losses.update_center(center, losses.batch_mean(teacher))
        losses.distillation_loss(student, targets, options.student_temp).backward()
        student.grad = None

    return call


def published_loss(options: SSRL.Options) -> Call:
    """Return the call of the baseline's."""
    student, teacher = random_logits(options)
    temps = (options.student_temp, options.teacher_temp)
    loss = baseline.Loss(options.out_dim, len(student), temps).to(options.device)

    def call() -> None:
        loss(student.flatten(0, 1), teacher.flatten(0, 1)).backward()
        student.grad = None

    return call


def lightly_loss(options: SSRL.Options) -> Call:
    """Return the call of lightly's."""
    # Imported here, since only those who compare with it have it.
    from lightly.loss import DINOLoss

    student, teacher = random_logits(options)
    temp = options.teacher_temp
    loss = DINOLoss(options.out_dim, temp, temp, 1, options.student_temp).to(options.device)

    def call() -> None:
        loss([*teacher], [*student], epoch=2).backward()
        student.grad = None

    return call


# ------------------------------------------------------------------------------------- its products
def flops_of(options: SSRL.Options) -> float:
    """Return the floating point operations of our step for one photograph, products alone.

    A multiplication with an addition counts as two; the backward pass costs twice the forward one.
    """
    width, _, _ = dimensions(options.arch)
    hidden = options.head_hidden_dim
    bottleneck = 256
    head = 2 * (width * hidden + hidden**2 + hidden * bottleneck + bottleneck * options.out_dim)

    # The student takes all crops forward and backward, the teacher the 2 global ones forward.
    global_crop = _backbone_flops(options, options.global_crop_size)
    local_crop = _backbone_flops(options, options.local_crop_size)
    crops = 2 + options.local_crops_number
    student = 2 * global_crop + options.local_crops_number * local_crop + crops * head
    teacher = 2 * global_crop + 2 * head
    return 3 * student + teacher


def _backbone_flops(options: SSRL.Options, side: int) -> float:
    """Return the operations of the backbone's forward pass for a crop of `side` pixels."""
    width, depth, _ = dimensions(options.arch)
    patches = (side // options.patch_size) ** 2
    tokens = patches + 1
    embedding = 2 * patches * 3 * options.patch_size**2 * width
    block = 24 * tokens * width**2 + 4 * tokens**2 * width
    # Of the last block only [CLS] is wanted: keys and values of all tokens, the rest of one.
    last_block = 4 * tokens * width**2 + 20 * width**2 + 4 * tokens * width
    return embedding + (depth - 1) * block + last_block


def products_alone(options: SSRL.Options) -> Call:
    """Return the call that makes as many operations as a step takes, in large square products.

    No step is faster.
    """
    device = measure.start_as_ours(options.device)
    side = 8192 if device.type == "cuda" else 2048
    dtype = devices.autocast_dtype(options.precision, device)
    a = torch.randn(side, side, device=device, dtype=dtype)
    products = options.batch_size * flops_of(options) / (2 * side**3)
    whole = int(products)
    rest = int((products - whole) * side)

    def call() -> None:
        for _ in range(whole):
            a @ a
        a @ a[:, :rest]

    return call


# ------------------------------------------------------------------------------------- comparisons
def compare_steps(folder: Path, options: SSRL.Options, rounds: int, threads: int) -> dict[str, Any]:
    """Return the times of both sides' steps; on a CPU the baseline's also with our choices."""
    # The third side says how much of the ratio is the code, and how much the choice of libraries.
    sides: dict[str, Side] = {"baseline": partial(published_step, folder, options)}
    if options.device == "cpu":
        as_ours = partial(published_step, folder, options, as_ours=True)
        sides["baseline, products and memory as ours"] = as_ours
    sides["ours"] = partial(our_step, folder, options)
    sides["products alone"] = partial(products_alone, options)
    times, memory = measure.alternate_apart(sides, rounds, threads, options.device)
    return {
        "GFLOP": round(options.batch_size * flops_of(options) / 1e9, 1),
        "peak_MB": memory,
        **measure.compare(times, options.batch_size),
    }


def find_largest_batch(
    folder: Path, options: SSRL.Options, products_alone_s: float
) -> dict[str, Any]:
    """Return the largest batch, of doublings of 20, that fits the GPU, its speed and memory.

    `products_alone_s` are the seconds that the matrix products of one photograph take.
    """
    result: dict[str, Any] = {}
    for doubling in range(8):
        batch_size = 20 * 2**doubling
        larger = replace(options, batch_size=batch_size)
        try:
            sides: dict[str, Side] = {"ours": partial(our_step, folder, larger)}
            times, memory = measure.alternate_apart(sides, 5, 1, options.device)
        except EOFError:  # the side ran out of memory, and said so
            break
        seconds = statistics.median(times["ours"])
        result = {
            "batch": batch_size,
            "images_per_s": round(batch_size / seconds, 1),
            "share_of_product_rate": round(batch_size * products_alone_s / seconds, 3),
            "memory_MB": memory["ours"],
        }
    return result


def compare_updates(options: SSRL.Options, rounds: int, threads: int) -> dict[str, Any]:
    """Return the times of both sides' clipping, optimizer and moving average."""
    sides = {"baseline": partial(published_update, options), "ours": partial(our_update, options)}
    times, _ = measure.alternate_apart(sides, rounds, threads, options.device)
    return measure.compare(times)


def compare_losses(options: SSRL.Options, rounds: int, threads: int) -> dict[str, Any]:
    """Return the times of all sides' loss."""
    sides = {"baseline": partial(published_loss, options), "ours": partial(our_loss, options)}
    if measure.has_lightly():
        sides["lightly"] = partial(lightly_loss, options)
    times, _ = measure.alternate_apart(sides, rounds, threads, options.device)
    return measure.compare(times)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photographs", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each side that count")
    parser.add_argument("--threads", type=int, default=1, help="threads of each side, on a CPU")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    device = devices.choose_device(arguments.device)
    devices.use_fast_matmul(device)
    base = SSRL.Options(init="none", device=arguments.device, freeze_last_layer=0)
    cases = CUDA_CASES if arguments.device == "cuda" else CPU_CASES
    name = f"step-{arguments.device}"
    measured: dict[str, SSRL.Options] = {}
    results: dict[str, Any] = {}
    for arch, patch_size, batch_size, precision in cases:
        if precision == "bf16" and devices.autocast_dtype("auto", device) is None:
            continue
        options = replace(
            base, arch=arch, patch_size=patch_size, batch_size=batch_size, precision=precision
        )
        case = f"{arch}/{patch_size} batch {batch_size} {precision}"
        results[case] = compare_steps(
            arguments.photographs, options, arguments.rounds, arguments.threads
        )
        measured[case] = options
        # Written after each case, since what follows may fail.
        measure.write_result(name, results)

    # The parts take little, so that more rounds are needed, and they can be had.
    options = replace(base, arch="vit_small", batch_size=20, precision="fp32")
    rounds = 4 * arguments.rounds
    updates = compare_updates(options, rounds, arguments.threads)
    results["clip, AdamW, moving average"] = updates
    results["loss, batch 20"] = compare_losses(options, rounds, arguments.threads)
    measure.write_result(name, results)

    if arguments.device == "cuda":
        for case, options in measured.items():
            products_alone_s = results[case]["products alone"]["median_s"]
            results[case]["largest"] = find_largest_batch(
                arguments.photographs, options, products_alone_s
            )
            measure.write_result(name, results)


if __name__ == "__main__":
    main()
