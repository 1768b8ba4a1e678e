"""Does a recipe hold from scratch? Train it with several seeds and draw how it went.

    python -m benchmarks.study_scratch --name eyepacs960 --data DATA --config configs/scratch.yaml
    python -m benchmarks.study_scratch --name synthetic --data DRAWN --draw-seed 101 \
        --config configs/demo.yaml

`--draw-seed` draws 1,000 synthetic photographs of that seed into `--data` first, so that nothing is
tuned on those of `--data synthetic`. Writes runs/study-NAME-SEED/, docs/scratch-NAME.png and
benchmarks/results/scratch-NAME.json, which says for every seed whether it held over the last half
of training, and how the untrained and the trained network's 15-NN score on the test split, or on
`--test-data`. Further options go to SSRL.py, to try a change of the recipe.
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
PANELS = {
    "loss": "loss / ln K",
    "teacher_entropy": "teacher entropy / ln K",
    "marginal_entropy": "marginal entropy / ln K",
    "rankme": "RankMe",
    "embedding_std": "embedding std",
    "knn_qwk": "k-NN QWK on val",
}


def read_log(run: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return a log's first line and {quantity: (n, 2) epoch and value}."""
    first, *lines = map(json.loads, (run / "log.jsonl").read_text("utf-8").splitlines())
    found = {
        name: np.array([(line["epoch"], line[name]) for line in lines if name in line])
        for name in PANELS
    }
    return first, found


def judge(seen: dict[str, np.ndarray], log_k: float) -> dict[str, Any]:
    """Say how a run fared over the last half of its epochs; `held` is true when all of it did.

    Falling and rising are the sign of a line fitted to that half.
    """
    end = seen["rankme"][-1, 0]
    late = {name: rows[rows[:, 0] >= end / 2] for name, rows in seen.items() if len(rows)}
    slope = {name: float(np.polyfit(*late[name].T, 1)[0]) for name in ("loss", "rankme")}
    entropy, marginal = late["teacher_entropy"][:, 1], late["marginal_entropy"][:, 1]
    start, rank = float(seen["rankme"][0, 1]), late["rankme"][:, 1]
    checks = {
        "teacher entropy in 0.02-0.98": bool(entropy.min() > 0.02 and entropy.max() < 0.98),
        "marginal entropy above 0.5": bool(marginal.min() > 0.5),
        "loss below ln K": bool(late["loss"][:, 1].max() < log_k),
        "loss falling": slope["loss"] < 0,
        "RankMe above the start's": bool(rank.min() > start),
        "RankMe rising": slope["rankme"] > 0,
    }
    numbers = {"loss_end": float(late["loss"][-1, 1]), "ln_K": log_k, "rankme_start": start}
    numbers |= {"rankme_end": float(rank[-1]), "rankme_lowest": float(seen["rankme"][:, 1].min())}
    return {"held": all(checks.values()), "checks": checks} | numbers


def score(run: Path, weights: str, test_data: str | None) -> dict[str, Any]:
    """Return metrics of the 15-NN on frozen features of a run's weights, and its majority line."""
    folder = run / ("knn" if weights == "" else f"knn-{weights.split('-')[1].split('.')[0]}")
    command = [sys.executable, str(ROOT / "eval_knn.py"), "--pretrained", str(run / weights)]
    command += ["--k", "15", "--overwrite"] + (["--test-data", test_data] if test_data else [])
    subprocess.run(command, check=True)
    found = [p for p in folder.glob("*/results.json") if test_data] or [folder / "results.json"]
    results = json.loads(found[0].read_text("utf-8"))
    kept = {k: results["metrics"][k] for k in ("accuracy", "qwk", "referable_auroc")}
    return kept | {"images": results["data"]["test"]["images"], "majority": results["majority"]}


def draw(curves: list[dict[str, np.ndarray]], log_k: float, title: str, path: Path) -> None:
    """Draw each quantity against the epoch, a line for each seed."""
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    figure.suptitle(title)
    for axes, (name, label) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
        for seed, seen in enumerate(curves):
            if len(seen[name]):
                epoch, value = seen[name].T
                axes.plot(epoch, value / (log_k if name == "loss" else 1), label=f"seed {seed}")
        axes.set(xlabel="epoch", ylabel=label)
        axes.ticklabel_format(useOffset=False)
        if "entropy" in name:
            axes.set_ylim(0, 1.02)
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.savefig(path, dpi=90)


def main() -> None:
    """Train the seeds one after another, judge and draw them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", required=True, help="of the study")
    parser.add_argument("--data", required=True, help="prepared folder")
    parser.add_argument("--config", required=True, help="recipe")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--draw-seed", type=int, help="draw synthetic photographs of this seed")
    parser.add_argument("--test-data", help="test the 15-NN on this, not on the test split")
    o, more = parser.parse_known_args()
    if o.draw_seed is not None and not (Path(o.data) / "manifest.csv").is_file():
        code = "import data, pathlib, sys; data.draw_folder(pathlib.Path(sys.argv[1]), 1000, {})"
        command = [sys.executable, "-c", code.format(o.draw_seed), str(Path(o.data).resolve())]
        subprocess.run(command, cwd=ROOT, check=True)
    curves, verdicts, first = [], {}, {}
    for seed in o.seeds:
        run = ROOT / "runs" / f"study-{o.name}-{seed}"
        command = [sys.executable, str(ROOT / "SSRL.py"), "--config", o.config, "--data", o.data]
        command += ["--seed", str(seed), "--output-dir", str(run)]
        subprocess.run(command + more, check=True)
        first, seen = read_log(run)
        log_k = math.log(first["options"]["out_dim"])
        curves.append(seen)
        verdicts[f"seed {seed}"] = judge(seen, log_k)
        knn = {"untrained": score(run, "checkpoint-0000.pth", o.test_data)}
        verdicts[f"seed {seed}"]["knn"] = knn | {"trained": score(run, "", o.test_data)}
        print(json.dumps(verdicts[f"seed {seed}"], indent=2))
    versions = first["versions"]
    title = f"{o.name}: {o.config}, {len(o.seeds)} seeds, {versions['device']}"
    draw(curves, log_k, title, ROOT / "docs" / f"scratch-{o.name}.png")
    pairs = [verdict["knn"] for verdict in verdicts.values()]
    gains = [p["trained"]["qwk"]["value"] - p["untrained"]["qwk"]["value"] for p in pairs]
    verdicts["gain in QWK"] = {"mean": float(np.mean(gains)), "std": float(np.std(gains, ddof=1))}
    about = {
        "options": first["options"] | {"data": Path(o.data).name},
        "versions": versions,
        "verdicts": verdicts,
    }
    path = ROOT / "benchmarks" / "results" / f"scratch-{o.name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
