"""The table of what runs have scored: a row an evaluation, below the majority line of its test set.

Rows hold entries of results.json, which print as text here and become html in report_page.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tools.report_runs import (
    Evaluation,
    Run,
    child,
    identify_test_set,
    interval,
    number,
    remarks,
    words,
)

# The columns: a metric's name in results.json, and its title.
COLUMNS = {
    "accuracy": "accuracy",
    "qwk": "QWK",
    "balanced_accuracy": "balanced accuracy",
    "macro_auroc": "macro AUROC",
    "referable_auroc": "referable AUROC",
}


@dataclass(frozen=True)
class Row:
    """One row: what is scored, on how many test photographs, and the entry of each metric."""

    title: str
    images: str
    entries: dict[str, Any]
    evaluation: Evaluation | None = None  # None for a majority line


def table_rows(runs: list[Run]) -> list[Row]:
    """Return the rows of all evaluations, baselines first, but for the folds of one."""
    rows = []
    shown_sets = set()
    for run in runs:
        for evaluation in run.evaluations:
            if evaluation.whole and run.find(evaluation.whole):
                continue
            # Evaluations of one set have one majority line; it stands above the first of them.
            results = evaluation.results
            test_set = (*identify_test_set(results), words(child(results, "majority").get("grade")))
            if results and test_set not in shown_sets:
                shown_sets.add(test_set)
                rows.append(majority_row(results))
            rows.append(score_row(evaluation, run))
    return rows


def majority_row(results: dict[str, Any]) -> Row:
    """Return the row of always answering the most frequent grade of training."""
    line = child(results, "majority")
    entries = {name: {"value": value} for name, value in line.items()}
    title = f"always grade {words(line.get('grade')) or '?'}"
    return Row(title, count_images(results), entries)


def score_row(evaluation: Evaluation, run: Run) -> Row:
    """Return the row of an evaluation; what limits it stands behind its name."""
    title = f"{run.name}/{evaluation.name}"
    for remark in remarks(evaluation, run):
        title += f" ({remark})"
    if evaluation.fault:
        title += f" ({evaluation.fault})"
    results = evaluation.results
    return Row(title, count_images(results), child(results, "metrics"), evaluation)


def count_images(results: dict[str, Any]) -> str:
    """Return the number of test photographs, a dash where it is not known."""
    return words(child(child(results, "data"), "test").get("images")) or "-"


def cell(entry: Any) -> str:
    """Return a metric's entry with its interval, a dash where it has no value."""
    if not isinstance(entry, dict):
        return "-"
    value = number(entry.get("value"))
    if value is None:
        return "-"
    limits = interval(entry.get("ci95"))
    if not limits:
        return f"{value:.3f}"
    return f"{value:.3f} [{limits[0]:.3f}, {limits[1]:.3f}]"


def text_table(rows: list[Row]) -> list[list[str]]:
    """Return the table as rows of text, its header first."""
    table = [["evaluation", "n", *COLUMNS.values()]]
    for row in rows:
        # Results may be older than a column.
        cells = [cell(row.entries.get(name)) for name in COLUMNS]
        table.append([row.title, row.images, *cells])
    return table


def print_table(table: list[list[str]]) -> None:
    """Print rows of cells in columns as wide as their widest cell, a line below the header."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    header, *rows = table
    rule = ["-" * width for width in widths]
    for row in (header, rule, *rows):
        padded = map(str.ljust, row, widths)
        # The last column's blanks would be a nuisance in what people paste.
        print("  ".join(padded).rstrip())
