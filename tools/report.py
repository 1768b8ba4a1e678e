"""Report what runs have scored and how they were trained, out of their folders.

    python -m tools.report RUN [RUN ...] [--out PAGE.html]      one self-contained page
    python -m tools.report --table RUN [RUN ...]                 a table of text
    python -m tools.report --compare A B [--out PAGE.html]       paired differences

Reads what runs wrote and nothing else; a folder copied from elsewhere will do. The page is
RUN/report.html, or report.html beside the first of several runs. It embeds pictures, photographs
among them: who may see it depends on the data set's rules. A and B are evaluations (RUN/linear) of
the same test photographs; commas part those that differ by seed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.report_compare import (
    NO_POINTS,
    Comparison,
    compare,
    comparison_header,
    comparison_rows,
    split_folders,
)
from tools.report_page import comparison_page, page
from tools.report_runs import find_results, read_run
from tools.report_table import print_table, table_rows, text_table
from utils import InputError, write_atomic


def make_table(folders: list[Path]) -> list[list[str]]:
    """Return the table of the runs as rows of text; InputError where one has no results."""
    runs = []
    for folder in folders:
        if not find_results(folder):
            raise InputError(
                f"{folder}: no */results.json there; run eval_knn.py or eval_linear.py on it first"
            )
        runs.append(read_run(folder))
    return text_table(table_rows(runs))


def write_page(folders: list[Path], out: Path | None) -> Path:
    """Write the page of the runs, and return where it is."""
    runs = [read_run(folder) for folder in folders]
    if out is None:
        out = folders[0] / "report.html"
        if len(folders) > 1:
            out = folders[0].resolve().parent / "report.html"
    write_text(out, page(runs))
    return out


def write_text(out: Path, text: str) -> None:
    """Write a page; InputError where that is not allowed or possible."""
    try:
        write_atomic(out, lambda path: path.write_text(text, "utf-8"))
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror})") from None


def print_comparison(found: Comparison) -> None:
    """Print the differences, a table for each reading."""
    print(f"A: {found.name_a}\nB: {found.name_b}")
    print(f"{found.images} test photographs of {found.patients} patients, drawn for both at once")
    for title, entries in found.parts.items():
        print(f"\n{title}")
        print_table([comparison_header(), *comparison_rows(entries)])
    print(f"\n{NO_POINTS}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's values; ends the program where they do not go together."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--out", type=Path, help="the page; RUN/report.html by default")
    parser.add_argument("--table", action="store_true", help="print a table, and write no page")
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="differences of two evaluations' folders; commas between seeds: a-0/linear,a-1/linear",
    )
    options = parser.parse_args(arguments)
    if options.compare and (options.runs or options.table):
        parser.error("--compare takes two evaluations, and no runs or --table beside them")
    if not options.compare and not options.runs:
        parser.error("name a run folder, such as runs/demo")
    if options.table and options.out:
        parser.error("--table prints, and --out is for a page: leave one of them out")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, compare two evaluations, or write the page and print where it is."""
    options = parse_arguments(arguments)
    try:
        if options.compare:
            a, b = options.compare
            found = compare(split_folders(a), split_folders(b))
            print_comparison(found)
            if options.out:
                write_text(options.out, comparison_page(found))
                print(options.out)
        elif options.table:
            print_table(make_table(options.runs))
        else:
            print(write_page(options.runs, options.out))
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
