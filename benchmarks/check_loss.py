"""Does the fast step learn what the published recipe (baseline.py) learns?

    python -m benchmarks.check_loss --data DATA

On a prepared folder of real photographs, both sides from the same weights, on the same crops, with
the same schedules and the same samples dropped. First ViT-Ti/16 with 65,536 prototypes, 50 steps of
8 photographs in fp32: the largest difference of their losses. Then ours in bf16 against the
baseline in fp32, a small ViT over three seeds: the difference of their losses, from the step on at
which the baseline's has fallen by a nat, against its standard error. Fails where losses differ by
more than 0.001, or by two standard errors. Writes benchmarks/results/loss.json and docs/loss.png.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
from tqdm import tqdm

import data
import devices
import run_folder
import SSRL
from augment import MultiCrop, color_views
from benchmarks import measure
from benchmarks.bench_step import plain_training
from fundus.manifest import Manifest, read_manifest

CPU = torch.device("cpu")
SEEDS = (0, 1, 2)


def both_losses(manifest: Manifest, o: SSRL.Options, steps: int) -> dict[str, list[float]]:
    """Train both sides side by side; return the loss of every step."""
    records = manifest.split("train")
    crops = MultiCrop(**{name: getattr(o, name) for name in MultiCrop.__dataclass_fields__})
    dataset = data.PhotographDataset(manifest, records, crops, o.seed)
    sampler = data.StepSampler(len(records), o.batch_size, seed=o.seed)
    # an epoch's schedules hardly move; single losses, not those averaged for the log
    o = replace(o, epochs=max(10, -(-steps // sampler.steps_per_epoch)), log_every=steps + 1)
    state, run = SSRL.build_run(o, devices.Processes(CPU), run_folder.RunFolder(Path()), sampler)
    plain = plain_training(replace(o, precision="fp32"))
    plain.student.load_state_dict(state.student.state_dict())
    plain.teacher.load_state_dict(state.teacher.state_dict())
    sampler.set_range(0, steps)
    losses: dict[str, list[float]] = {"baseline": [], "ours": []}
    switch = torch.backends.mkldnn.matmul
    for batch in tqdm(
        data.training_loader(dataset, sampler, o.workers, CPU), total=steps, disable=None
    ):
        views = color_views(batch, CPU, o.mean, o.std)
        now = run.schedule(state.step)
        plain.lr, plain.weight_decay, plain.momentum = (
            now[name] for name in ("lr", "weight_decay", "momentum")
        )
        devices.speed_up_matmul()
        losses["ours"].append(float(SSRL.train_step(state, iter([views]), run)["loss"]))
        switch.fp32_precision = "none"  # torch's default
        torch.manual_seed((o.seed * 1_000_003 + state.step - 1) * 1024)  # as train_step seeds
        losses["baseline"].append(plain.step([v for s in views for v in s.split(o.batch_size)]))
    return losses


def in_fp32(manifest: Manifest, o: SSRL.Options, steps: int) -> tuple[dict[str, Any], Any]:
    """Return the largest difference of the losses, and the losses."""
    o = replace(o, arch="vit_tiny", patch_size=16, batch_size=8, precision="fp32", lr=0.005)
    found = both_losses(manifest, o, steps)
    apart = [abs(a - b) for a, b in zip(found["baseline"], found["ours"], strict=True)]
    told = {"steps": steps, "largest_difference": max(apart), "first_loss": found["ours"][0]}
    return told | {"last_loss": found["ours"][-1]}, found


def in_bf16(manifest: Manifest, o: SSRL.Options, steps: int) -> tuple[dict[str, Any], Any]:
    """Return the difference of the mean losses with its standard error, and the losses."""
    o = replace(o, arch="vit_nano", patch_size=8, batch_size=16, precision="bf16")
    o = replace(o, global_crop_size=64, local_crop_size=32, out_dim=1024, head_hidden_dim=512)
    # what lets a loss fall in few steps: a teacher that follows, views that differ little
    o = replace(o, momentum_teacher=0.9, color_strength=0.0, local_crops_scale=(0.4, 1.0))
    o = replace(o, blur_sigma=(0.1, 0.2), lr=0.016)
    found = [both_losses(manifest, replace(o, seed=seed), steps) for seed in SEEDS]
    begins = [
        next(i for i, v in enumerate(f["baseline"]) if v < f["baseline"][0] - 1) for f in found
    ]
    ends = {
        side: [statistics.mean(f[side][begin:]) for f, begin in zip(found, begins, strict=True)]
        for side in ("baseline", "ours")
    }
    difference = statistics.mean(ends["ours"]) - statistics.mean(ends["baseline"])
    error = sum(statistics.variance(values) / len(SEEDS) for values in ends.values()) ** 0.5
    pairs = [a - b for a, b in zip(ends["ours"], ends["baseline"], strict=True)]
    paired = statistics.stdev(pairs) / len(SEEDS) ** 0.5  # of equal seeds' differences
    told = {"steps": steps, "seeds": len(SEEDS), "fallen_by_a_nat_at_step": begins}
    told |= {"mean_losses_since": ends, "difference": difference, "standard_error": error}
    return told | {"standard_error_of_pairs": paired}, found[0]


def draw(curves: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Draw both sides' losses of each comparison."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(9, 3.2), layout="constrained")
    for axis, (title, sides) in zip(axes, curves.items(), strict=True):
        for name, style in (("baseline", "-"), ("ours", "--")):
            axis.plot(sides[name], style, label=name, linewidth=1.2)
        axis.set(title=title, xlabel="step", ylabel="loss (nats)")
        axis.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="prepared folder")
    parser.add_argument("--steps", type=int, default=50, help="of the comparison in fp32")
    parser.add_argument("--long", type=int, default=80, help="steps of that in bf16")
    a = parser.parse_args()
    manifest = read_manifest(a.data)
    o = SSRL.Options(init="none", device="cpu", warmup_epochs=0, freeze_last_layer=0, workers=1)
    exact, one = in_fp32(manifest, o, a.steps)
    rough, other = in_bf16(manifest, o, a.long)
    measure.write_result("loss", {"fp32": exact, "bf16": rough})
    titles = "fp32, ViT-Ti/16, 65,536 prototypes", "ours in bf16, baseline in fp32"
    draw(dict(zip(titles, (one, other), strict=True)), measure.ROOT / "docs" / "loss.png")
    same = exact["largest_difference"] < 1e-3
    alike = abs(rough["difference"]) < 2 * rough["standard_error"]
    if not (same and alike):
        raise SystemExit("the losses are not those of the published recipe")


if __name__ == "__main__":
    main()
