"""Does the fast step learn what the published recipe (baseline.py) learns?

    python -m benchmarks.check_loss --data DATA

DATA is a prepared folder of real photographs. Both sides start from the same weights and take the
same crops, the same schedules and the same samples dropped.

First, ViT-Ti/16 with 65,536 prototypes takes 50 steps of 8 photographs in fp32: the result is the
largest difference of the two losses. Then a small ViT trains over three seeds, ours in bf16 and the
baseline in fp32: the result is the difference of their losses, from the step on at which the
baseline's has fallen by a nat, against its standard error.

The script writes benchmarks/results/loss.json and docs/loss.png, and fails where losses differ by
more than 0.001, or by two standard errors.
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import data
import devices
import SSRL
from augment import MultiCrop, color_views
from benchmarks import baseline, measure
from benchmarks.bench_step import our_training, plain_training, split_views
from fundus.manifest import Manifest, read_manifest
from vision_transformer import IMAGENET_MEAN, IMAGENET_STD

CPU = torch.device("cpu")
SEEDS = (0, 1, 2)

# {"baseline": a loss for each step, "ours": the same}
Losses = dict[str, list[float]]


# -------------------------------------------------------------------------------------- both sides
def train_both(manifest: Manifest, options: SSRL.Options, steps: int) -> Losses:
    """Train both sides side by side; return the loss of every step."""
    records = manifest.split("train")
    dataset = data.PhotographDataset(manifest, records, MultiCrop(options), options.seed)
    sampler = data.StepSampler(len(records), options.batch_size, seed=options.seed)

    # At least 10 epochs, so that the schedules hardly move over the first few steps.
    epochs = max(10, math.ceil(steps / sampler.steps_per_epoch))
    options = replace(options, epochs=epochs)
    state, run = our_training(options, sampler)
    plain = plain_training(replace(options, precision="fp32"))

    # Both sides start from our random weights.
    plain.student.load_state_dict(state.student.state_dict())
    plain.teacher.load_state_dict(state.teacher.state_dict())

    sampler.set_range(0, steps)
    losses: Losses = {"baseline": [], "ours": []}
    loader = data.training_loader(dataset, sampler, options.workers, CPU)
    for batch in tqdm(loader, total=steps, disable=None):
        crops = color_views(batch, CPU, IMAGENET_MEAN, IMAGENET_STD)

        # Each side with its own matrix products: ours by oneDNN, the baseline's by torch's default.
        devices.use_fast_matmul(CPU)
        follow_schedules(plain, run, state.step)
        seed = seed_of_step(options, state.step)
        result = SSRL.train_step(state, iter([crops]), run)
        losses["ours"].append(float(result.terms["loss"]))

        torch.backends.mkldnn.matmul.fp32_precision = "none"
        torch.manual_seed(seed)  # so that stochastic depth drops the same samples
        losses["baseline"].append(plain.step(split_views(crops, options.batch_size)))
    return losses


def follow_schedules(plain: baseline.Training, run: SSRL.Run, step: int) -> None:
    """Give the baseline what our schedules say for a step."""
    schedules = run.schedules(step)
    plain.lr = schedules.lr
    plain.weight_decay = schedules.weight_decay
    plain.momentum = schedules.momentum


def seed_of_step(options: SSRL.Options, step: int) -> int:
    """Return the seed that SSRL.train_step sets for stochastic depth, in a single process."""
    return (options.seed * 1_000_003 + step) * 1024


# ------------------------------------------------------------------------------------- comparisons
def compare_in_fp32(
    manifest: Manifest, options: SSRL.Options, steps: int
) -> tuple[dict[str, Any], Losses]:
    """Return the largest difference of the losses, and the losses."""
    options = replace(
        options, arch="vit_tiny", patch_size=16, batch_size=8, precision="fp32", lr=0.005
    )
    losses = train_both(manifest, options, steps)
    differences = []
    for baseline_loss, our_loss in zip(losses["baseline"], losses["ours"], strict=True):
        differences.append(abs(baseline_loss - our_loss))
    result = {
        "steps": steps,
        "largest_difference": max(differences),
        "first_loss": losses["ours"][0],
        "last_loss": losses["ours"][-1],
    }
    return result, losses


def compare_in_bf16(
    manifest: Manifest, options: SSRL.Options, steps: int
) -> tuple[dict[str, Any], Losses]:
    """Return the difference of the mean losses with its standard error, and one seed's losses."""
    options = replace(
        options,
        arch="vit_nano",
        patch_size=8,
        batch_size=16,
        precision="bf16",
        global_crop_size=64,
        local_crop_size=32,
        out_dim=1024,
        head_hidden_dim=512,
        # A loss falls in few steps where the teacher follows and views differ little.
        momentum_teacher=0.9,
        color_strength=0.0,
        local_crops_scale=(0.4, 1.0),
        blur_sigma=(0.1, 0.2),
        lr=0.016,
    )
    runs = []
    fallen_at = []
    mean_losses: Losses = {"baseline": [], "ours": []}
    for seed in SEEDS:
        losses = train_both(manifest, replace(options, seed=seed), steps)
        # Before that step both losses are near ln K, whatever the code does.
        first_step = first_fallen(losses["baseline"])
        for side, values in mean_losses.items():
            values.append(statistics.mean(losses[side][first_step:]))
        runs.append(losses)
        fallen_at.append(first_step)

    # The spread over seeds of each side, and that of the differences of equal seeds.
    ours = mean_losses["ours"]
    plain = mean_losses["baseline"]
    variance = statistics.variance(plain) / len(SEEDS) + statistics.variance(ours) / len(SEEDS)
    pairs = [a - b for a, b in zip(ours, plain, strict=True)]
    result = {
        "steps": steps,
        "seeds": len(SEEDS),
        "fallen_by_a_nat_at_step": fallen_at,
        "mean_losses_since": mean_losses,
        "difference": statistics.mean(ours) - statistics.mean(plain),
        "standard_error": variance**0.5,
        "standard_error_of_pairs": statistics.stdev(pairs) / len(SEEDS) ** 0.5,
    }
    return result, runs[0]


def first_fallen(losses: list[float]) -> int:
    """Return the first step at which a loss has fallen by a nat; raises ValueError if none."""
    for step, loss in enumerate(losses):
        if loss < losses[0] - 1:
            return step
    raise ValueError("the baseline's loss never fell by a nat: compare over more --long steps")


def draw(comparisons: dict[str, Losses], path: Path) -> None:
    """Draw both sides' losses of each comparison, given by its title."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    panels = figure.subplots(1, len(comparisons))
    for axes, (title, losses) in zip(panels, comparisons.items(), strict=True):
        axes.plot(losses["baseline"], "-", label="baseline", linewidth=1.2)
        axes.plot(losses["ours"], "--", label="ours", linewidth=1.2)
        axes.set(title=title, xlabel="step", ylabel="loss (nats)")
        axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="prepared folder")
    parser.add_argument("--steps", type=int, default=50, help="steps of the comparison in fp32")
    parser.add_argument("--long", type=int, default=80, help="steps of that in bf16")
    arguments = parser.parse_args()

    manifest = read_manifest(arguments.data)
    options = SSRL.Options(
        init="none", device="cpu", warmup_epochs=0, freeze_last_layer=0, workers=1
    )
    fp32, fp32_losses = compare_in_fp32(manifest, options, arguments.steps)
    bf16, bf16_losses = compare_in_bf16(manifest, options, arguments.long)
    measure.write_result("loss", {"fp32": fp32, "bf16": bf16})
    comparisons = {
        "fp32, ViT-Ti/16, 65,536 prototypes": fp32_losses,
        "ours in bf16, baseline in fp32": bf16_losses,
    }
    draw(comparisons, measure.ROOT / "docs" / "loss.png")

    is_same = fp32["largest_difference"] < 1e-3
    is_alike = abs(bf16["difference"]) < 2 * bf16["standard_error"]
    if not (is_same and is_alike):
        raise SystemExit("the losses are not those of the published recipe")


if __name__ == "__main__":
    main()
