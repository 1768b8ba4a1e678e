"""Tabulate what runs have scored, out of their folders.

    python -m tools.report --table RUN [RUN ...]

Reads RUN/*/results.json and nothing else of the project: a folder copied from elsewhere will do.
A row for each evaluation, below the majority line of its test set; brackets hold 95 % intervals.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

# The columns: a metric's name in results.json, and its title.
COLUMNS = {
    "accuracy": "accuracy",
    "qwk": "QWK",
    "balanced_accuracy": "balanced accuracy",
    "macro_auroc": "macro AUROC",
    "referable_auroc": "referable AUROC",
}


def read_results(run: Path) -> dict[str, dict[str, Any]]:
    """Return the results of a run folder by the evaluation's name, its baselines first.

    The program ends with a message where the folder holds none.
    """
    # One level deeper lie the results on further test sets: knn/OTHER/results.json.
    files = [*run.glob("*/results.json"), *run.glob("*/*/results.json")]
    if not files:
        message = "no */results.json there; run eval_knn.py or eval_linear.py on it first"
        print(f"{run}: {message}", file=sys.stderr)
        sys.exit(2)
    results = {}
    for file in files:
        name = file.parent.relative_to(run).as_posix()
        results[name] = json.loads(file.read_text("utf-8"))
    return dict(sorted(results.items(), key=row_order))


def row_order(evaluation: tuple[str, Any]) -> tuple[bool, str]:
    """Return the place of an evaluation and its results in the table."""
    name = evaluation[0]
    # A dash marks what the others are held against: an earlier state of the network (knn-0000),
    # other features (linear-color), the published protocol (knn-paper).
    is_baseline = "-" in name
    return not is_baseline, name


def tabulate(runs: list[Path]) -> list[list[str]]:
    """Return the table as rows of cells, its header first."""
    table = [["evaluation", "n", *COLUMNS.values()]]
    shown_sets = set()
    for run in runs:
        evaluations = read_results(run)
        for name, results in evaluations.items():
            # Evaluations of one set have one majority line; it stands above the first of them.
            test_set = identify_test_set(results)
            if test_set not in shown_sets:
                shown_sets.add(test_set)
                table.append(majority_row(results))

            title = f"{run.name}/{name}"
            if is_stale(name, evaluations):
                title += " (other weights)"
            if "best epoch on the test" in results["protocol"]:
                title += " (chosen on test)"
            table.append(score_row(title, results))
    return table


def identify_test_set(results: dict[str, Any]) -> tuple[str, str, int]:
    """Return what two results have in common if one majority line holds for both."""
    data = results["data"]
    # Only results on a further set name its fingerprint beside that of training.
    fingerprint = data.get("test_fingerprint", data["fingerprint"])
    return fingerprint, str(data["test"]), results["majority"]["grade"]


def is_stale(name: str, evaluations: dict[str, dict[str, Any]]) -> bool:
    """Return whether a further set was tested with other weights than the run's own test split."""
    # So it is when somebody trains again and repeats the evaluation, but without that set.
    own = evaluations.get(name.split("/")[0])
    if own is None:
        return False
    return evaluations[name]["backbone"]["sha256"] != own["backbone"]["sha256"]


def majority_row(results: dict[str, Any]) -> list[str]:
    """Return the row of always answering the most frequent grade of training."""
    line = results["majority"]
    row = [f"always grade {line['grade']}", str(results["data"]["test"]["images"])]
    for metric in COLUMNS:
        row.append(cell(line.get(metric)))
    return row


def score_row(title: str, results: dict[str, Any]) -> list[str]:
    """Return the row of an evaluation."""
    row = [title, str(results["data"]["test"]["images"])]
    for metric in COLUMNS:
        # Results may be older than a column.
        entry = results["metrics"].get(metric, {})
        row.append(cell(entry.get("value"), entry.get("ci95")))
    return row


def cell(value: float | None, interval: list[float] | None = None) -> str:
    """Return a metric with its interval, a dash where there is none."""
    if value is None:
        return "-"
    if not interval:
        return f"{value:.3f}"
    low, high = interval
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def print_table(table: list[list[str]]) -> None:
    """Print rows of cells in columns as wide as their widest cell, a line below the header."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    header, *rows = table
    rule = ["-" * width for width in widths]
    for row in (header, rule, *rows):
        padded = map(str.ljust, row, widths)
        # The last column's blanks would be a nuisance in what people paste.
        print("  ".join(padded).rstrip())


def main() -> None:
    """Print the table of the runs named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--table",
        nargs="+",
        type=Path,
        required=True,
        metavar="RUN",
        help="run folders to tabulate",
    )
    print_table(tabulate(parser.parse_args().table))


if __name__ == "__main__":
    main()
