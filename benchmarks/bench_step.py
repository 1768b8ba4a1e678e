"""How fast is a training step, and its parts, against the published recipe (baseline.py)?

    python -m benchmarks.bench_step --photographs FOLDER

Both sides start from the same weights and take the same crops; data and colour are not timed. On
the CPU: ViT-Ti/16 at batch 8 and ViT-S/8 at batch 2 in fp32, Ti/16 with both in bf16 where the CPU
has it, and optimizer with clipping and moving average alone. `--device cuda`: S/16, S/8 and B/8 at
batch 20, the baseline under AMP, their memory, and the largest batch that fits. Prints medians,
spread and ratios; writes benchmarks/results/step-DEVICE.json.
"""

from __future__ import annotations

import argparse
import gc
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

import runs
import SSRL
from augment import MultiCrop
from benchmarks import baseline, measure
from data import PhotographDataset, StepSampler
from manifest import Manifest, Record
from vision_transformer import ARCHS

CPU_CASES = (  # arch, patch, batch, precision of both sides
    ("vit_tiny", 16, 8, "fp32"),
    ("vit_small", 8, 2, "fp32"),
    ("vit_tiny", 16, 8, "bf16"),
)
CUDA_CASES = (("vit_small", 16, 20), ("vit_small", 8, 20), ("vit_base", 8, 20))


def dataset_of(paths: list[Path]) -> PhotographDataset:
    """Return photographs as they are, cut as training cuts them."""
    records = [Record(p.name, None, p.stem, "", "train") for p in paths]
    manifest = Manifest(paths[0].parent, tuple(records), True, "benchmark")
    return PhotographDataset(manifest, records, MultiCrop())


@dataclass(frozen=True)
class FixedRun(SSRL.Run):
    """A run whose crops are ready."""

    crops: tuple[Tensor, ...] = ()

    def views(self, batch: dict[str, Tensor]) -> list[Tensor]:
        return list(self.crops)


class Ours:
    """SSRL.train_step on crops that are ready."""

    def __init__(self, o: SSRL.Options, batch: dict[str, Tensor]) -> None:
        processes = runs.Processes(runs.pick_device(o.device))
        sampler = StepSampler(1000 * o.batch_size, o.batch_size)
        folder = runs.RunFolder(Path())
        self.state, run = SSRL.build_run(o, processes, folder, sampler)
        values = {f.name: getattr(run, f.name) for f in fields(run)}
        self.run, self.batch = FixedRun(**values, crops=tuple(run.views(batch))), batch

    def __call__(self) -> Tensor:
        return SSRL.train_step(self.state, iter([self.batch]), self.run)["loss"]


def plain(ours: Ours, dtype: torch.dtype | None) -> tuple[baseline.Training, list[Tensor]]:
    """Return the baseline from the weights that `ours` has now, and the same crops."""
    o, device = ours.run.options, ours.run.processes.device
    dim, depth, heads = ARCHS[o.arch]
    networks = []
    for network, drop in ((ours.state.student, o.drop_path), (ours.state.teacher, 0.0)):
        backbone = baseline.VisionTransformer(
            dim, depth, heads, o.patch_size, o.global_crop_size, drop
        )
        copy = baseline.Network(backbone, baseline.Head(dim, o.out_dim, o.head_hidden_dim))
        copy.load_state_dict(network.state_dict())
        networks.append(copy.to(device))
    student, teacher = networks
    teacher.requires_grad_(False)
    views, temps = 2 + o.local_crops_number, (o.student_temp, o.teacher_temp)
    loss = baseline.Loss(o.out_dim, views, temps).to(device)
    optimizer = baseline.build_optimizer(student)
    training = baseline.Training(student, teacher, loss, optimizer, dtype=dtype)
    whole, part = ours.run.crops
    return training, [*whole.chunk(2), *part.chunk(o.local_crops_number)]


def step_case(
    dataset: PhotographDataset, o: SSRL.Options, rounds: int, dtype: torch.dtype | None
) -> dict[str, Any]:
    """Time the steps of both sides; `dtype` is the baseline's autocast."""
    keys = [(0, i % len(dataset)) for i in range(o.batch_size)]
    ours = Ours(o, default_collate([dataset[key] for key in keys]))
    training, crops = plain(ours, dtype)
    sides = {"baseline": lambda: training.step(crops), "ours": ours}
    device = ours.run.processes.device
    return measure.compare(measure.alternate(sides, rounds, device), o.batch_size)


def update_case(dataset: PhotographDataset, o: SSRL.Options, rounds: int) -> dict[str, Any]:
    """Time clipping, optimizer and moving average alone, on random gradients."""
    ours = Ours(o, default_collate([dataset[0, 0]]))
    training, _ = plain(ours, None)
    state, run = ours.state, ours.run
    grads = {n: torch.randn_like(p) for n, p in state.student.named_parameters() if p.requires_grad}

    def fill(network: torch.nn.Module) -> None:
        for name, parameter in network.named_parameters():
            parameter.grad = grads.get(name)

    def published() -> None:
        fill(training.student)
        baseline.clip_gradients(training.student, 3.0)
        training.optimizer.step()
        baseline.update_teacher(training.teacher, training.student, 0.996)

    def fast() -> None:
        fill(state.student)
        SSRL.apply_gradients(state, run)
        SSRL.update_teacher(state.teacher, state.student, 0.996)

    sides = {"baseline": published, "ours": fast}
    return measure.compare(measure.alternate(sides, rounds, run.processes.device))


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photographs", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each side that count")
    parser.add_argument("--threads", type=int, default=0, help="of both sides; 0: torch's choice")
    a = parser.parse_args()
    torch.set_num_threads(a.threads or torch.get_num_threads())
    dataset = dataset_of(measure.photographs_in(a.photographs))
    base = SSRL.Options(init="none", device=a.device, freeze_last_layer=0)
    results = {}
    for arch, patch, batch, precision in CPU_CASES:
        o = replace(base, arch=arch, patch_size=patch, batch_size=batch, precision=precision)
        dtype = runs.autocast_dtype(precision, torch.device(a.device))
        results[f"{arch}/{patch} batch {batch} {precision}"] = step_case(
            dataset, o, a.rounds, dtype
        )
        gc.collect()
    o = replace(base, arch="vit_small", precision="fp32")
    results["clip, AdamW, moving average"] = update_case(dataset, o, 4 * a.rounds)
    measure.write_result(f"step-{a.device}", results)


if __name__ == "__main__":
    main()
