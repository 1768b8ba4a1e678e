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

METRICS = {
    "accuracy": "accuracy",
    "qwk": "QWK",
    "balanced_accuracy": "balanced acc.",
    "macro_auroc": "macro AUROC",
    "referable_auroc": "referable AUROC",
}


def read_results(run: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return (evaluation, results) of a run folder, baselines first; exits without any."""
    files = sorted(run.glob("*/results.json")) + sorted(run.glob("*/*/results.json"))
    if not files:
        sys.exit(f"{run}: no */results.json there; run eval_knn.py or eval_linear.py on it first")
    rows = [(f.parent.relative_to(run).as_posix(), json.loads(f.read_text("utf-8"))) for f in files]
    return sorted(rows, key=lambda row: ("-" not in row[0], row[0]))


def cell(entry: dict[str, Any]) -> str:
    """Return a metric with its interval, a dash where it is undefined."""
    if entry["value"] is None:
        return "-"
    if not entry.get("ci95"):
        return f"{entry['value']:.3f}"
    return "{:.3f} [{:.3f}, {:.3f}]".format(entry["value"], *entry["ci95"])


def tabulate(runs: list[Path]) -> list[list[str]]:
    """Return the table as rows of cells, its header first."""
    table = [["evaluation", "n", *METRICS.values()]]
    told = set()
    for run in runs:
        evaluations = read_results(run)
        weights = {name: results["backbone"]["sha256"] for name, results in evaluations}
        for name, results in evaluations:
            data = results["data"]
            fingerprint = data.get("test_fingerprint", data["fingerprint"])
            test_set = fingerprint, str(data["test"]), results["majority"]["grade"]
            images = str(data["test"]["images"])
            if test_set not in told:
                told.add(test_set)
                line = results["majority"]
                values = [cell({"value": line[metric]}) for metric in METRICS]
                table.append([f"always grade {line['grade']}", images, *values])
            values = [cell(results["metrics"][metric]) for metric in METRICS]
            stale = weights[name] != weights.get(name.split("/")[0], weights[name])
            title = f"{run.name}/{name}" + " (other weights)" * stale
            title += " (chosen on test)" * ("best epoch on the test" in results["protocol"])
            table.append([title, images, *values])
    return table


def main() -> None:
    """Print the table of the runs named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", nargs="+", type=Path, required=True, metavar="RUN")
    table = tabulate(parser.parse_args().table)
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    for number, row in enumerate(table):
        print(
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        )
        if number == 0:
            print("  ".join("-" * width for width in widths))


if __name__ == "__main__":
    main()
