"""How well do frozen features grade, which recipe teaches them best, and how soon?

    python -m benchmarks.study_quality --name drawn --configs configs/drawn.yaml \
        --data EYEPACS --folds --also IDRID --test-data IDRID APTOS

Trains every config with every seed, for its own epochs or, with `--minutes`, for the same minutes:
the epochs that these take are then found by one epoch of trial on this machine, so that learning
rates end where they should. Recipes without
`data` of their own learn from the training split of `--data`. Then k-NN and linear probe judge the
frozen network, beside the untrained one, mean colours and hand-made statistics:

- on the test split of `--data`, or by `--folds` on all of it,
- on `--test-data`, with what was fitted on `--data`,
- on the test splits of `--also`, with probes of their own.

`--vary data synthetic:250@512 synthetic:500@512` makes a recipe of each value of an option.
Some epochs on the way are judged by k-NN on the first. Writes runs/quality-NAME/,
docs/quality-NAME.png and benchmarks/results/quality-NAME.json, and prints the table. What is there
already is not made again, so that a study that was stopped goes on. Options that this script does
not know go to SSRL.py, to try a change of the recipes.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.figure import Figure

from data import open_manifest
from SSRL import Options
from tools.report_compare import compare

ROOT = Path(__file__).resolve().parents[1]
SHOWN = ("qwk", "referable_auroc")
HANDMADE = "hand-made"
UNTRAINED = "checkpoint-0000.pth"  # what a run writes before its first step


@dataclass(frozen=True)
class TestSet:
    """Photographs that features are judged on."""

    name: str
    title: str  # in the table: what is tested, and what the probe was fitted on
    options: tuple[str, ...]  # of the evaluations
    inside: str = ""  # where in an evaluation's folder the results lie


@dataclass(frozen=True)
class Recipe:
    """What is trained: a config, and a change of it."""

    config: Path
    name: str
    changed: tuple[str, ...] = ()  # options of SSRL.py

    @property
    def settings(self) -> dict[str, Any]:
        """The options that the config sets."""
        return yaml.safe_load(self.config.read_text(encoding="utf-8"))

    def data(self, study: Study) -> str:
        """What it learns from."""
        if "--data" in self.changed:
            return self.changed[self.changed.index("--data") + 1]
        return self.settings.get("data", study.data)


@dataclass(frozen=True)
class Study:
    """What is studied, and where it lies."""

    name: str
    data: str
    minutes: float | None  # of each training; None: as long as the recipe says
    test_sets: tuple[TestSet, ...]  # the first one is that of the curve
    more: tuple[str, ...] = ()  # options of SSRL.py
    jobs: int = 1  # trainings, or evaluations, at a time
    points: int = 5  # epochs of a run that its curve shows, beside the untrained one

    @property
    def folder(self) -> Path:
        """Where the runs lie."""
        return ROOT / "runs" / f"quality-{self.name}"


def list_test_sets(
    data: str, *, folds: bool, also: Sequence[str], test_data: Sequence[str]
) -> tuple[TestSet, ...]:
    """Return the sets that features are judged on, that of `data` first."""
    own = Path(data).name
    options: tuple[str, ...] = ("--data", data)
    found = [TestSet(own, f"{own}, test", options)]
    if folds:
        found = [TestSet(own, f"{own}, all by folds", (*options, "--folds"))]
    for folder in also:
        name = Path(folder).name
        found.append(TestSet(name, f"{name}, test", ("--data", folder)))
    for folder in test_data:
        name = Path(folder).name
        title = f"{name}, fitted on {own}"
        found.append(
            TestSet(f"{name}-by-{own}", title, (*options, "--test-data", folder), inside=name)
        )
    return tuple(found)


def call(script: str, *options: str) -> None:
    """Run one of the programs; raises CalledProcessError where it fails."""
    subprocess.run([sys.executable, str(ROOT / script), *options], check=True, cwd=ROOT)


# ---------------------------------------------------------------------------------------- training
def list_recipes(configs: Sequence[Path], vary: Sequence[str]) -> list[Recipe]:
    """Return what is trained: the configs or, with `vary`, each with each value of an option.

    `vary` is the option's name, then its values.
    """
    recipes = []
    for config in configs:
        if not vary:
            recipes.append(Recipe(config, config.stem))
        for value in vary[1:]:
            flag = "--" + vary[0].removeprefix("--")
            name = f"{config.stem}, {vary[0]} {value}"
            recipes.append(Recipe(config, name, (flag, value)))
    return recipes


def train(study: Study, recipe: Recipe, seed: int) -> Path:
    """Train a recipe for its own epochs or the study's minutes; return the run's folder."""
    run = study.folder / f"{folder_name(recipe)}-{seed}"
    options = [*list_options(study, recipe), "--seed", str(seed)]
    if study.minutes is None:
        epochs = recipe.settings.get("epochs", Options.epochs)
    else:
        epochs = count_epochs(study, recipe)
        # A warm-up that is longer than a fifth of a short training would leave little of it.
        warmup = max(1, epochs // 10)
        options += ["--epochs", str(epochs), "--warmup-epochs", str(warmup)]
    kept = max(1, epochs // study.points)
    call("SSRL.py", *options, "--keep-every", str(kept), "--output-dir", str(run))
    return run


def folder_name(recipe: Recipe) -> str:
    """Return a recipe's name as that of a folder."""
    return re.sub(r"[^\w.-]+", "-", recipe.name)


def list_options(study: Study, recipe: Recipe) -> list[str]:
    """Return the options of SSRL.py that all trainings of a recipe share."""
    options = ["--config", str(recipe.config), "--knn-every", "0"]
    return [*options, *study.more, "--data", recipe.data(study), *recipe.changed]


def count_epochs(study: Study, recipe: Recipe) -> int:
    """Return how many epochs the study's minutes hold, by one epoch of trial."""
    trial = study.folder / f"{folder_name(recipe)}-trial"
    short = ["--epochs", "1", "--warmup-epochs", "0", "--keep-every", "0"]
    call("SSRL.py", *list_options(study, recipe), *short, "--output-dir", str(trial))
    measured = [line for line in read_log(trial) if "images_per_s" in line]
    # The first lines have the start of the workers in them.
    speed = measured[-1]["images_per_s"]
    images = round(measured[-1]["step"] * _step_size(trial))
    return max(1, round(60 * study.minutes * speed / images))


def _step_size(run: Path) -> int:
    """Return how many photographs a step of a run takes."""
    options = read_log(run)[0]["options"]
    return options["batch_size"] * options["accumulate"] * options["processes"]


def read_log(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log."""
    text = (run / "log.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


# -------------------------------------------------------------------------------------- evaluation
@dataclass(frozen=True)
class Evaluation:
    """A run of one of the evaluations on a test set."""

    test_set: TestSet
    kind: str  # "knn" or "linear"
    weights: Path
    name: str  # of the folder that receives it, but for the test set
    options: tuple[str, ...] = ()

    @property
    def output(self) -> Path:
        """Where it is written: beside its weights unless `name` is a path of its own."""
        folder = self.weights if self.weights.is_dir() else self.weights.parent
        return folder / f"{self.name}-{self.test_set.name}"

    @property
    def results(self) -> Path:
        """Where its results.json lies."""
        return self.output / self.test_set.inside


@dataclass(frozen=True)
class Line:
    """A row of the table: a method on a test set, evaluated for each seed."""

    name: str
    evaluations: tuple[Evaluation, ...]

    @property
    def test_set(self) -> TestSet:
        """What it is tested on."""
        return self.evaluations[0].test_set

    @property
    def title(self) -> str:
        """How it is evaluated."""
        return {"knn": "15-NN", "linear": "linear"}[self.evaluations[0].kind]

    @property
    def folders(self) -> list[Path]:
        """The folders of its results, one a seed."""
        return [one.results for one in self.evaluations]


def list_lines(study: Study, test_set: TestSet, runs: dict[str, list[Path]]) -> list[Line]:
    """Return a test set's lines of the table: recipes, their untrained networks, and no network."""
    lines = []
    for name, folders in runs.items():
        for kind in ("knn", "linear"):
            trained = [Evaluation(test_set, kind, run, f"{kind}-end") for run in folders]
            before = [
                Evaluation(test_set, kind, run / UNTRAINED, f"{kind}-start") for run in folders
            ]
            lines.append(Line(name, tuple(trained)))
            lines.append(Line(f"{name}, untrained", tuple(before)))

    # These need no network; any of the runs tells which photographs are meant.
    run = next(iter(runs.values()))[0]
    for kind, features in (("knn", "handmade"), ("linear", "handmade"), ("linear", "color")):
        folder = str(study.folder / "none" / f"{kind}-{features}")
        none = Evaluation(test_set, kind, run, folder, ("--features", features))
        lines.append(Line(HANDMADE if features == "handmade" else "mean colours", (none,)))
    return lines


def evaluate(study: Study, evaluation: Evaluation) -> None:
    """Run an evaluation, unless its results are there."""
    if (evaluation.results / "results.json").is_file():
        return
    # One cache for all, since its files are named by weights and photographs.
    cache = study.folder / "features"
    cache.mkdir(exist_ok=True)
    output = evaluation.output
    output.mkdir(parents=True, exist_ok=True)
    if not (output / "features").exists():
        (output / "features").symlink_to(cache)
    options = evaluation.options
    if evaluation.kind == "knn":
        options = (*options, "--k", "15")
    call(
        f"eval_{evaluation.kind}.py",
        *("--pretrained", str(evaluation.weights), *evaluation.test_set.options),
        *("--output-dir", str(output), *options, "--no-pictures", "--allow-seen"),
    )


def evaluate_all(study: Study, lines: Sequence[Line]) -> None:
    """Run all evaluations of these lines."""
    for kind in ("knn", "linear"):  # the second finds the features that the first one kept
        wanted = [one for line in lines for one in line.evaluations if one.kind == kind]
        side_by_side(study, lambda one: evaluate(study, one), wanted)


def side_by_side(study: Study, do: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """Return what `do` makes of the items, as many at a time as the study's jobs."""
    with ThreadPoolExecutor(study.jobs) as pool:
        return list(pool.map(do, items))


def tabulate(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Return a row for each line of a test set, with the paired difference from hand-made."""
    handmade = {line.title: line for line in lines if line.name == HANDMADE}
    rows = []
    for line in lines:
        found = [json.loads((one / "results.json").read_text("utf-8")) for one in line.folders]
        row: dict[str, Any] = {"test": line.test_set.title, "method": line.name}
        row |= {"evaluation": line.title, "images": found[0]["data"]["test"]["images"]}
        comparison = compare(line.folders, handmade[line.title].folders, SHOWN)
        differences = next(iter(comparison.parts.values()))
        for metric in SHOWN:
            row[metric] = [one["metrics"][metric]["value"] for one in found]
            row[f"{metric}_ci95"] = [one["metrics"][metric].get("ci95") for one in found]
            row[f"{metric}_beyond_handmade"] = differences[metric]
        rows.append(row)
    return rows


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table in Markdown: means over seeds, and differences with their intervals."""
    print("| test | method | evaluation | QWK | referable AUROC | AUROC - hand-made |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        cells = [row["test"], row["method"], row["evaluation"]]
        for metric in SHOWN:
            values = np.array(row[metric], dtype=float)
            text = f"{values.mean():.3f}"
            if len(values) > 1:
                text += f" (sd {values.std(ddof=1):.3f})"
            cells.append(text)
        difference = row["referable_auroc_beyond_handmade"]
        text = "-"
        if row["method"] != HANDMADE and difference.get("ci95"):
            low, high = difference["ci95"]
            text = f"{difference['value']:+.3f} [{low:+.3f}, {high:+.3f}]"
        cells.append(text)
        print("| " + " | ".join(cells) + " |")


# ------------------------------------------------------------------------------------------- curve
def read_curve(study: Study, run: Path) -> list[dict[str, float]]:
    """Return minutes and the k-NN's numbers on the first test set, of a run's kept epochs."""
    lines = read_log(run)
    seconds_of_epoch = _seconds_of_epoch(run, lines)
    checkpoints = sorted(run.glob("checkpoint-[0-9]*.pth"))
    epochs = [int(one.stem.removeprefix("checkpoint-")) for one in checkpoints]
    evaluations = [
        Evaluation(study.test_sets[0], "knn", checkpoint, f"knn-{epoch:04d}")
        for checkpoint, epoch in zip(checkpoints, epochs, strict=True)
    ]
    side_by_side(study, lambda one: evaluate(study, one), evaluations)
    points = []
    for epoch, evaluation in zip(epochs, evaluations, strict=True):
        metrics = json.loads((evaluation.results / "results.json").read_text("utf-8"))["metrics"]
        point = {"minutes": epoch * seconds_of_epoch / 60}
        for metric in SHOWN:
            point[metric] = metrics[metric]["value"]
        points.append(point)
    return points


def _seconds_of_epoch(run: Path, lines: Sequence[dict[str, Any]]) -> float:
    """Return the median seconds of a run's epochs, of its steps alone."""
    speeds = [line["images_per_s"] for line in lines if "images_per_s" in line]
    measured = [line for line in lines if "images_per_s" in line]
    steps_per_epoch = measured[-1]["step"] / measured[-1]["epoch"]
    return steps_per_epoch * _step_size(run) / float(np.median(speeds))


def draw(study: Study, curves: dict[str, list[list[dict[str, float]]]], path: Path) -> None:
    """Draw the k-NN's numbers against minutes, a colour a recipe, a line a seed."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    figure.suptitle(f"{study.name}: 15-NN on frozen features of {Path(study.data).name}")
    panels = figure.subplots(1, 2)
    for number, (name, seeds) in enumerate(curves.items()):
        for seed, points in enumerate(seeds):
            minutes = [point["minutes"] for point in points]
            label = name if seed == 0 else None
            for axes, metric in zip(panels, SHOWN, strict=True):
                values = [point[metric] for point in points]
                axes.plot(minutes, values, f"C{number}o-", markersize=3, label=label)
    for axes, label in zip(panels, ("QWK", "referable AUROC"), strict=True):
        axes.set(xlabel="minutes of training", ylabel=label)
        axes.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(path, dpi=90)


# ----------------------------------------------------------------------------------------- program
def parse_arguments() -> tuple[Study, argparse.Namespace]:
    """Return the study, and what it goes over."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", required=True, help="name of the study")
    parser.add_argument("--data", required=True, help="prepared folder with grades")
    parser.add_argument("--configs", nargs="+", type=Path, required=True, help="recipes")
    parser.add_argument("--minutes", type=float, help="of each training; else the recipe's epochs")
    parser.add_argument(
        "--vary", nargs="+", default=[], help="an option of SSRL.py and values; a recipe for each"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="a run for each")
    parser.add_argument("--jobs", type=int, default=1, help="trainings or evaluations at a time")
    parser.add_argument("--points", type=int, default=5, help="of a run's curve")
    parser.add_argument("--test-data", nargs="+", default=[], help="further sets, nothing refitted")
    parser.add_argument("--also", nargs="+", default=[], help="further sets, fitted on their own")
    parser.add_argument(
        "--folds", action="store_true", help="test all of --data, for recipes with own data"
    )
    options, more = parser.parse_known_args()
    if options.minutes is not None and options.jobs > 1:
        parser.error("--minutes: a trial alone says nothing about the speed of several at a time")
    has_data = ["data" in Recipe(one, one.stem).settings for one in options.configs]
    if options.folds and not all(has_data):
        parser.error(
            "--folds: a recipe that learns from --data would have seen the test photographs"
        )
    test_sets = list_test_sets(
        options.data, folds=options.folds, also=options.also, test_data=options.test_data
    )
    study = Study(
        options.name,
        options.data,
        options.minutes,
        test_sets,
        tuple(more),
        options.jobs,
        options.points,
    )
    return study, options


def main() -> None:
    """Train, judge, draw, write."""
    study, options = parse_arguments()
    study.folder.mkdir(parents=True, exist_ok=True)
    recipes = list_recipes(options.configs, options.vary)
    for recipe in recipes:
        open_manifest(recipe.data(study))  # drawn once, for all seeds
    if study.minutes is not None:
        # All trials come first, close in time, so that a machine that others load treats all alike.
        for recipe in recipes:
            print(f"{recipe.name}: {count_epochs(study, recipe)} epochs")
    planned = [(recipe, seed) for recipe in recipes for seed in options.seeds]
    folders = side_by_side(study, lambda one: train(study, *one), planned)
    runs: dict[str, list[Path]] = {}
    for (recipe, _), folder in zip(planned, folders, strict=True):
        runs.setdefault(recipe.name, []).append(folder)
    rows = []
    for test_set in study.test_sets:
        lines = list_lines(study, test_set, runs)
        evaluate_all(study, lines)
        rows += tabulate(lines)
    curves = {}
    for name, folders in runs.items():
        curves[name] = [read_curve(study, run) for run in folders]
    draw(study, curves, ROOT / "docs" / f"quality-{study.name}.png")

    first_line = read_log(next(iter(runs.values()))[0])[0]
    results = {
        "minutes": study.minutes,
        "jobs": study.jobs,
        "seeds": options.seeds,
        "versions": first_line["versions"],
        "rows": rows,
        "curves": curves,
    }
    path = ROOT / "benchmarks" / "results" / f"quality-{study.name}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    print_table(rows)


if __name__ == "__main__":
    main()
