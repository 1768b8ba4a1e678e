"""Read run folders for the report: evaluations, config and log, whatever state they are in.

A report must stand where a run was stopped, or where files are older than a field or damaged. So
nothing here trusts a file's shape: the getters return what is there in the form that is asked for,
or its absence.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils import InputError

# What the verdict speaks of, the first of these that a run has; else its first evaluation.
HEADLINES = ("linear", "linear-folds", "linear-fractions", "knn", "knn-folds")
# What the name of an evaluation that others are held against has between its dashes.
BASELINES = ("color", "handmade", "paper")


# ------------------------------------------------------------------------------------- the getters
def child(holder: Any, name: str) -> dict[str, Any]:
    """Return the object under a name, {} where there is none."""
    if isinstance(holder, dict) and isinstance(holder.get(name), dict):
        return holder[name]
    return {}


def children(holder: Any, name: str) -> list[Any]:
    """Return the list under a name, [] where there is none."""
    if isinstance(holder, dict) and isinstance(holder.get(name), list):
        return holder[name]
    return []


def number(value: Any) -> float | None:
    """Return a value that is a finite number as such, None for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:  # JSON's integers have no bounds
        return None
    if not math.isfinite(found):
        return None
    return found


def interval(value: Any) -> tuple[float, float] | None:
    """Return [low, high] as two numbers, None where it is no interval."""
    if not isinstance(value, list) or len(value) != 2:
        return None
    low = number(value[0])
    high = number(value[1])
    if low is None or high is None:
        return None
    return low, high


def words(value: Any) -> str:
    """Return a value as people read it: text as it is, all else as JSON, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return json.dumps(value)


# ---------------------------------------------------------------------------------------- what runs
@dataclass
class Evaluation:
    """One evaluation of a run: what its results.json says."""

    name: str  # its folder below the run: linear, knn/OTHER
    folder: Path
    results: dict[str, Any] = field(default_factory=dict)
    fault: str = ""  # why there are no results

    @property
    def protocol(self) -> str:
        """What the results say was done."""
        return words(self.results.get("protocol"))

    @property
    def is_baseline(self) -> bool:
        """Whether others are held against this one: its name has a part of BASELINES."""
        parts = self.name.split("/")[0].split("-")
        # Digits are an earlier state of the network: knn-0000.
        return any(part in BASELINES or part.isdigit() for part in parts)

    @property
    def whole(self) -> str:
        """The evaluation of which this one is a fold, "" where it is none."""
        above, _, name = self.name.rpartition("/")
        if name.startswith("fold-"):
            return above
        return ""

    @property
    def is_chosen_on_test(self) -> bool:
        """Whether something was chosen on the test photographs, which flatters the numbers."""
        return "best epoch on the test" in self.protocol


@dataclass
class Run:
    """A run folder: what it trained and how it was evaluated."""

    folder: Path
    evaluations: list[Evaluation]
    config: dict[str, Any]
    first: dict[str, Any]  # the log's first line: command, data, versions
    log: list[dict[str, Any]]  # its other lines
    faults: list[str]  # files that could not be read

    @property
    def name(self) -> str:
        """What people call the run."""
        return self.folder.resolve().name

    def find(self, name: str) -> Evaluation | None:
        """Return the evaluation of that name, None where the run has none with results."""
        for evaluation in self.evaluations:
            if evaluation.name == name and evaluation.results:
                return evaluation
        return None

    def headline(self) -> Evaluation | None:
        """Return the evaluation that the verdict speaks of, None where no results could be read."""
        for name in HEADLINES:
            found = self.find(name)
            if found:
                return found
        readable = [one for one in self.evaluations if one.results]
        for evaluation in readable:
            if not evaluation.is_baseline:
                return evaluation
        if readable:
            return readable[0]
        return None


def read_run(folder: Path) -> Run:
    """Return what a run folder holds.

    Raises InputError where there is no such folder, or nothing in it that a run writes.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name a run's, such as runs/demo")
    faults: list[str] = []
    evaluations = []
    for file in find_results(folder):
        evaluations.append(read_evaluation(file, file.parent.relative_to(folder).as_posix()))
    evaluations.sort(key=lambda one: (not one.is_baseline, one.name))
    config = read_config(folder / "config.yaml", faults)
    log = read_log(folder / "log.jsonl", faults)
    if not (evaluations or config or log or faults):
        raise InputError(
            f"{folder}: holds no run: no config.yaml, no log.jsonl, no */results.json; "
            "name the folder that SSRL.py or an evaluation wrote to"
        )

    first: dict[str, Any] = {}
    if log and "step" not in log[0]:
        first = log.pop(0)
    return Run(folder, evaluations, config, first, log, faults)


def find_results(folder: Path) -> list[Path]:
    """Return the results.json of all evaluations of a run."""
    # One level deeper lie results on further test sets and of folds: knn/OTHER, linear-folds/fold-1
    return sorted([*folder.glob("*/results.json"), *folder.glob("*/*/results.json")])


def read_evaluation(file: Path, name: str) -> Evaluation:
    """Return the evaluation whose results.json this is; its fault where that is unreadable."""
    evaluation = Evaluation(name, file.parent)
    try:
        results = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        evaluation.fault = f"results.json cannot be read ({short(error)})"
        return evaluation
    if not isinstance(results, dict) or not results:
        evaluation.fault = "results.json holds no results"
        return evaluation
    evaluation.results = results
    return evaluation


def read_config(file: Path, faults: list[str]) -> dict[str, Any]:
    """Return the options in a config.yaml, {} where there is none; appends to `faults`."""
    import yaml

    if not file.is_file():
        return {}
    try:
        config = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        faults.append(f"config.yaml cannot be read ({short(error)})")
        return {}
    if not isinstance(config, dict):
        faults.append("config.yaml holds no options")
        return {}
    return {str(name): value for name, value in config.items()}


def read_log(file: Path, faults: list[str]) -> list[dict[str, Any]]:
    """Return the objects in a log.jsonl, [] where there is none; appends to `faults`."""
    if not file.is_file():
        return []
    try:
        lines = file.read_text("utf-8", errors="replace").splitlines()
    except OSError as error:
        faults.append(f"log.jsonl cannot be read ({short(error)})")
        return []
    records = []
    damaged = 0
    for place, line in enumerate(lines):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            records.append(record)
        # A run that is stopped hard may leave its last line cut short, which is no fault.
        elif line.strip() and place < len(lines) - 1:
            damaged += 1
    if damaged:
        faults.append(f"log.jsonl: {damaged} damaged lines were left out")
    return records


def short(error: Exception) -> str:
    """Return what an error says, in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:160]


# ---------------------------------------------------------------------------- what belongs together
def identify_test_set(results: dict[str, Any]) -> tuple[str, str]:
    """Return what two results have in common if they are of one test set."""
    data = child(results, "data")
    # Only results on a further set name its fingerprint beside that of training.
    fingerprint = data.get("test_fingerprint", data.get("fingerprint"))
    return words(fingerprint), words(data.get("test"))


def is_stale(evaluation: Evaluation, run: Run) -> bool:
    """Return whether a further set was tested with other weights than the run's own test split."""
    # So it is when somebody trains again and repeats the evaluation, but without that set.
    own = run.find(evaluation.name.split("/")[0])
    if own is None:
        return False
    theirs = child(own.results, "backbone").get("sha256")
    return child(evaluation.results, "backbone").get("sha256") != theirs


def remarks(evaluation: Evaluation, run: Run) -> list[str]:
    """Return what a number must not be compared with others without knowing."""
    found = []
    if is_stale(evaluation, run):
        found.append("other weights")
    if evaluation.is_chosen_on_test:
        found.append("chosen on test")
    seen = children(child(evaluation.results, "seen"), "photographs")
    if seen:
        found.append(f"{len(seen)} test photograph{'s' * (len(seen) > 1)} seen before")
    return found
