"""Does a recipe hold from scratch? Train it with several seeds and draw how it went.

    python -m benchmarks.study_scratch --name real --data PREPARED \
        --config benchmarks/recipes/distillation_96px.yaml

For every seed the results say whether it held over the last half of training, and how the 15-NN
scores on the untrained and on the trained network, on the test split or on `--test-data`. The
script writes runs/study-NAME-SEED/, docs/scratch-NAME.png and
benchmarks/results/scratch-NAME.json. Options that this script does not know go to SSRL.py, to try a
change of the recipe.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
UNTRAINED = "checkpoint-0000.pth"  # what a run writes before its first step

# The quantities of a log that are drawn, one panel each, and their labels.
PANELS = {
    "loss": "loss / ln K",
    "teacher_entropy": "teacher entropy / ln K",
    "marginal_entropy": "marginal entropy / ln K",
    "rankme": "RankMe",
    "embedding_std": "embedding std",
    "knn_qwk": "k-NN QWK on val",
}

# {quantity: rows of (epoch, value)}, each an array (n, 2)
Curves = dict[str, np.ndarray]


# ----------------------------------------------------------------------------------------- one run
def train(seed: int, options: argparse.Namespace, more: list[str]) -> Path:
    """Train one seed with SSRL.py, `more` being further options of its; return the run's folder."""
    run = ROOT / "runs" / f"study-{options.name}-{seed}"
    command = [sys.executable, str(ROOT / "SSRL.py"), "--config", options.config]
    command += ["--data", options.data, "--seed", str(seed), "--output-dir", str(run)]
    subprocess.run(command + more, check=True)
    return run


def read_log(run: Path) -> tuple[dict[str, Any], Curves]:
    """Return a log's first line, and the curves of the quantities that are drawn."""
    # Steps and epochs write lines of their own, so that not every line has every quantity.
    text = (run / "log.jsonl").read_text("utf-8")
    first, *lines = [json.loads(line) for line in text.splitlines()]
    curves = {}
    for name in PANELS:
        rows = [(line["epoch"], line[name]) for line in lines if name in line]
        curves[name] = np.array(rows)
    return first, curves


def judge(curves: Curves, log_k: float) -> dict[str, Any]:
    """Say how a run fared over the last half of its epochs; `held` is true when all of it did.

    Whether a quantity falls or rises is the sign of a line fitted to that half. `log_k` is ln K,
    the loss of a network that has learned nothing.
    """
    # The first half does not count: a healthy run may dip before it rises.
    last_epoch = curves["rankme"][-1, 0]
    late = {}
    for name, rows in curves.items():
        if len(rows):
            late[name] = rows[rows[:, 0] >= last_epoch / 2]

    teacher_entropy = late["teacher_entropy"][:, 1]
    marginal_entropy = late["marginal_entropy"][:, 1]
    loss = late["loss"][:, 1]
    rankme = late["rankme"][:, 1]
    rankme_start = float(curves["rankme"][0, 1])
    is_spread = teacher_entropy.min() > 0.02 and teacher_entropy.max() < 0.98
    checks = {
        "teacher entropy in 0.02-0.98": is_spread,
        "marginal entropy above 0.5": marginal_entropy.min() > 0.5,
        "loss below ln K": loss.max() < log_k,
        "loss falling": slope(late["loss"]) < 0,
        "RankMe above the start's": rankme.min() > rankme_start,
        "RankMe rising": slope(late["rankme"]) > 0,
    }
    return {
        "held": all(checks.values()),
        "checks": {name: bool(passed) for name, passed in checks.items()},
        "loss_end": float(loss[-1]),
        "ln_K": log_k,
        "rankme_start": rankme_start,
        "rankme_end": float(rankme[-1]),
        "rankme_lowest": float(curves["rankme"][:, 1].min()),
    }


def slope(rows: np.ndarray) -> float:
    """Return the slope of the line fitted to rows (n, 2) of epoch and value."""
    return float(np.polyfit(rows[:, 0], rows[:, 1], 1)[0])


def score(run: Path, weights: str, test_data: str | None) -> dict[str, Any]:
    """Return metrics of the 15-NN on frozen features, and its majority line.

    `weights` names a kept checkpoint of the run; "" takes the trained backbone.
    """
    command = [sys.executable, str(ROOT / "eval_knn.py"), "--pretrained", str(run / weights)]
    command += ["--k", "15", "--overwrite"]
    if test_data:
        command += ["--test-data", test_data]
    subprocess.run(command, check=True)

    # Kept epochs have a folder of their own, and further test sets one inside it.
    folder = run / "knn"
    if weights:
        epoch = weights.removeprefix("checkpoint-").removesuffix(".pth")
        folder = run / f"knn-{epoch}"
    file = folder / "results.json"
    if test_data:
        file = next(folder.glob("*/results.json"), file)

    results = json.loads(file.read_text("utf-8"))
    metrics = results["metrics"]
    return {
        "accuracy": metrics["accuracy"],
        "qwk": metrics["qwk"],
        "referable_auroc": metrics["referable_auroc"],
        "images": results["data"]["test"]["images"],
        "majority": results["majority"],
    }


# ----------------------------------------------------------------------------------------- all runs
def draw(seeds: dict[int, Curves], log_k: float, title: str, path: Path) -> None:
    """Draw each quantity against the epoch, a line for each seed."""
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(2, 3).flat
    for axes, (name, label) in zip(panels, PANELS.items(), strict=True):
        for seed, curves in seeds.items():
            if len(curves[name]) == 0:
                continue
            epoch, value = curves[name].T
            if name == "loss":
                value = value / log_k
            axes.plot(epoch, value, label=f"seed {seed}")
        axes.set(xlabel="epoch", ylabel=label)
        axes.ticklabel_format(useOffset=False)
        if "entropy" in name:
            # The same scale in all studies, since it is the distance from 0 and 1 that counts.
            axes.set_ylim(0, 1.02)
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.savefig(path, dpi=90)


def gain_in_qwk(verdicts: list[dict[str, Any]]) -> dict[str, float]:
    """Return the mean over seeds, and its deviation, of what training adds to the 15-NN's QWK."""
    # By seed, since an untrained network already scores differently with each.
    gains = []
    for verdict in verdicts:
        trained = verdict["knn"]["trained"]["qwk"]["value"]
        untrained = verdict["knn"]["untrained"]["qwk"]["value"]
        gains.append(trained - untrained)
    return {"mean": float(np.mean(gains)), "std": float(np.std(gains, ddof=1))}


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Return this script's options, and those that are left for SSRL.py."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", required=True, help="name of the study")
    parser.add_argument("--data", required=True, help="prepared folder")
    parser.add_argument("--config", required=True, help="recipe")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="a run for each")
    parser.add_argument("--test-data", help="test the 15-NN on this, not on the test split")
    return parser.parse_known_args()


def main() -> None:
    """Train the seeds one after another, judge and draw them."""
    options, more = parse_arguments()
    seeds = {}
    verdicts = {}
    for seed in options.seeds:
        run = train(seed, options, more)
        first_line, seeds[seed] = read_log(run)
        log_k = math.log(first_line["options"]["out_dim"])
        verdict = judge(seeds[seed], log_k)
        verdict["knn"] = {
            "untrained": score(run, UNTRAINED, options.test_data),
            "trained": score(run, "", options.test_data),
        }
        print(json.dumps(verdict, indent=2))
        verdicts[f"seed {seed}"] = verdict

    # All seeds share the options and versions of the last one, but for the seed itself.
    versions = first_line["versions"]
    title = f"{options.name}: {options.config}, {len(seeds)} seeds, {versions['device']}"
    draw(seeds, log_k, title, ROOT / "docs" / f"scratch-{options.name}.png")
    verdicts["gain in QWK"] = gain_in_qwk(list(verdicts.values()))
    results = {
        "options": {**first_line["options"], "data": Path(options.data).name},
        "versions": versions,
        "verdicts": verdicts,
    }
    path = ROOT / "benchmarks" / "results" / f"scratch-{options.name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
