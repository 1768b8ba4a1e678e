"""Count in Python files what makes code easy or hard to read, and print it as a table.

    python -m tools.style_facts
    python -m tools.style_facts SSRL.py fundus
    python -m tools.style_facts --repo /some/other/checkout src/package

Without FILES the table covers the Python files at the top of `--repo` (default: this project) and
those of its folder `fundus/`. A FILE may be a folder, which stands for all Python files below it;
hidden folders such as .venv are left out.
The tool only reads the files, so it measures any code base. A file that is not valid Python is
named below the table and left out. Every file has a row, and the last row is the total.

The columns:

code        Lines that hold code. Blank lines, lines that hold only a comment, and docstrings are
            left out. A docstring is any statement that is nothing but a string, so the help text
            below an option counts as one. A call spread over three lines counts as three.
alone %     Lines that hold nothing but a comment (`#`), in % of all lines that are not blank. The
            lines of docstrings are part of those 100 %, and none of them is a comment. Licence
            headers, rulers between sections and remarks to other tools count as comments.
behind %    Lines that hold code and a comment behind it, in % of the same lines.
comments %  Lines that carry a comment (alone or behind code), in % of the same lines.
packed      Assignments with a tuple written out on both sides (`a, b = x, y`), per 1,000 lines of
            code. Unpacking one value (`a, b = f()`) is not counted.
inline if   Conditional expressions (`x if c else y`), per 1,000 lines of code.
compr.      List, set and dict comprehensions and generator expressions, per 1,000 lines of code.
            One that stands inside another is counted by itself; several `for` in one are one.
longest     Lines of the longest function, from its `def` (decorators left out) to its end, and its
            name. Blank lines, comments and functions inside it are part of it.
"""

from __future__ import annotations

import argparse
import ast
import io
import sys
import tokenize
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
HEADER = (
    "file",
    "code",
    "alone %",
    "behind %",
    "comments %",
    "packed",
    "inline if",
    "compr.",
    "longest function",
)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)

# Tokens that shape a line without being part of its code.
LAYOUT_TOKENS = {
    tokenize.ENCODING,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


@dataclass
class Facts:
    """The counts of one file, or of several together."""

    # Counts rather than rates, so that the total weighs a file by its length.
    code_lines: int = 0
    filled_lines: int = 0  # all that are not blank
    comments_alone: int = 0
    comments_behind: int = 0
    packed_assignments: int = 0
    conditional_expressions: int = 0
    comprehensions: int = 0
    longest_lines: int = 0
    longest_name: str = ""  # empty without functions

    def percent(self, count: int) -> float:
        """Return a number of lines in % of the lines that are not blank."""
        if self.filled_lines == 0:
            return 0.0
        return 100 * count / self.filled_lines

    def per_thousand(self, count: int) -> float:
        """Return a count per 1,000 lines of code."""
        if self.code_lines == 0:
            return 0.0
        return 1000 * count / self.code_lines


def measure(source: str) -> Facts:
    """Return the facts of a file's text.

    Raises SyntaxError, ValueError, tokenize.TokenError or RecursionError where the text is not
    Python that this interpreter reads.
    """
    with warnings.catch_warnings():
        # Old code holds invalid escapes ("\d"), which are no business of this tool.
        warnings.simplefilter("ignore")
        tree = ast.parse(source)

    facts = Facts()
    count_lines(source, tree, facts)
    count_expressions(tree, facts)
    find_longest_function(tree, "", facts)
    return facts


def count_lines(source: str, tree: ast.Module, facts: Facts) -> None:
    """Fill in the numbers of lines: all that are not blank, those with code, with comments."""
    docstrings = docstring_lines(tree)

    # Tokens rather than text tell a comment from a `#` that stands in a string.
    code: set[int] = set()
    comments: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        first = token.start[0]
        last = token.end[0]
        if token.type == tokenize.COMMENT:
            comments.add(first)
        elif token.type == tokenize.STRING and first in docstrings:
            # Other tokens of that line make it code all the same: `def f(): "docstring"`.
            continue
        elif token.type not in LAYOUT_TOKENS:
            code.update(range(first, last + 1))

    # A string over several lines may hold blank ones; they are blank lines like any other.
    blank = set()
    text_lines = source.split("\n")
    for number, line in enumerate(text_lines, start=1):
        if not line.strip():
            blank.add(number)

    facts.filled_lines = len(text_lines) - len(blank)
    facts.code_lines = len(code - blank)
    facts.comments_alone = len(comments - code)
    facts.comments_behind = len(comments & code)


def docstring_lines(tree: ast.Module) -> set[int]:
    """Return the numbers of the lines on which a statement stands that is nothing but a string."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        is_constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_constant and isinstance(node.value.value, str):
            lines.update(range(node.lineno, node.end_lineno + 1))
    return lines


def count_expressions(tree: ast.Module, facts: Facts) -> None:
    """Fill in the numbers of packed assignments, conditional expressions, comprehensions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            # `a = b, c = 1, 2` is one assignment with two targets.
            if any(isinstance(target, ast.Tuple) for target in node.targets):
                facts.packed_assignments += 1
        elif isinstance(node, ast.IfExp):
            facts.conditional_expressions += 1
        elif isinstance(node, COMPREHENSIONS):
            facts.comprehensions += 1


def find_longest_function(node: ast.AST, prefix: str, facts: Facts) -> None:
    """Fill in the longest function below a node; `prefix` names the classes around it."""
    for child in ast.iter_child_nodes(node):
        name = prefix
        if isinstance(child, (*FUNCTIONS, ast.ClassDef)):
            name = f"{prefix}.{child.name}".lstrip(".")
        if isinstance(child, FUNCTIONS):
            # `lineno` is the line of `def`; the decorators above it have their own.
            length = child.end_lineno - child.lineno + 1
            if length > facts.longest_lines:
                facts.longest_lines = length
                facts.longest_name = name
        # Functions also stand inside functions, classes and `if`s.
        find_longest_function(child, name, facts)


def add_up(rows: dict[str, Facts]) -> Facts:
    """Return the facts of all files together; its longest function is named with its file."""
    total = Facts()
    for name, facts in rows.items():
        total.code_lines += facts.code_lines
        total.filled_lines += facts.filled_lines
        total.comments_alone += facts.comments_alone
        total.comments_behind += facts.comments_behind
        total.packed_assignments += facts.packed_assignments
        total.conditional_expressions += facts.conditional_expressions
        total.comprehensions += facts.comprehensions
        if facts.longest_lines > total.longest_lines:
            total.longest_lines = facts.longest_lines
            total.longest_name = f"{name}: {facts.longest_name}"
    return total


def python_files(repo: Path, names: Sequence[str]) -> list[Path]:
    """Return the files that are asked for, those of a folder in alphabetical order.

    Raises FileNotFoundError where a name is neither a file nor a folder, and where a name stands
    for no Python file.
    """
    if not names:
        # Tests, tools and benchmarks are left out: what runs is at the top and in fundus/.
        files = sorted(repo.glob("*.py")) + sorted(repo.glob("fundus/*.py"))
        if not files:
            raise FileNotFoundError(f"{repo}: no Python files at its top; name files or folders")
        return files

    files = []
    for name in names:
        path = repo / name
        if path.is_dir():
            below = files_below(path)
            if not below:
                raise FileNotFoundError(f"{path}: no Python files below this folder")
            files += below
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"{path}: no such file or folder")
    # A file that is named twice, by itself and by its folder, is counted once.
    return list(dict.fromkeys(files))


def files_below(folder: Path) -> list[Path]:
    """Return the Python files of a folder and its subfolders that are not hidden."""
    files = []
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).parts
        if not any(part.startswith(".") for part in parts):
            files.append(path)
    return files


def measure_files(repo: Path, files: Sequence[Path]) -> tuple[dict[str, Facts], dict[str, str]]:
    """Return the facts of each file that can be read, and the reason for each that cannot."""
    rows = {}
    skipped = {}
    for path in files:
        # A file elsewhere, named by its whole path, keeps that name.
        name = str(path)
        if path.is_relative_to(repo):
            name = path.relative_to(repo).as_posix()
        try:
            # tokenize.open reads the encoding that the file declares.
            with tokenize.open(path) as file:
                rows[name] = measure(file.read())
        except (OSError, SyntaxError, ValueError, tokenize.TokenError, RecursionError) as error:
            skipped[name] = f"{type(error).__name__}: {error}"
    return rows, skipped


def table_row(name: str, facts: Facts) -> list[str]:
    """Return the cells of a row."""
    longest = "-"
    if facts.longest_name:
        longest = f"{facts.longest_lines} {facts.longest_name}"
    return [
        name,
        str(facts.code_lines),
        f"{facts.percent(facts.comments_alone):.1f}",
        f"{facts.percent(facts.comments_behind):.1f}",
        f"{facts.percent(facts.comments_alone + facts.comments_behind):.1f}",
        f"{facts.per_thousand(facts.packed_assignments):.1f}",
        f"{facts.per_thousand(facts.conditional_expressions):.1f}",
        f"{facts.per_thousand(facts.comprehensions):.1f}",
        longest,
    ]


def print_table(rows: dict[str, Facts]) -> None:
    """Print a row for each file and the total, with names to the left and numbers to the right."""
    table = [list(HEADER)]
    for name, facts in rows.items():
        table.append(table_row(name, facts))
    table.append(table_row("total", add_up(rows)))

    # The last column ends with names of any length, so it is not padded.
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        first = cells[0].ljust(widths[0])
        numbers = []
        for cell, width in zip(cells[1:-1], widths[1:-1], strict=True):
            numbers.append(cell.rjust(width))
        print("  ".join([first, *numbers, cells[-1]]))


def main() -> None:
    """Print the table of the files asked for, and name the files that were skipped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", metavar="FILES", help="files or folders in the repo")
    parser.add_argument("--repo", type=Path, default=PROJECT, help="root of a checkout")
    options = parser.parse_args()

    if not options.repo.is_dir():
        parser.error(f"--repo {options.repo}: no such folder")
    try:
        files = python_files(options.repo, options.files)
    except FileNotFoundError as error:
        parser.error(str(error))

    # What was skipped goes to stderr, so that the table alone can be piped on.
    rows, skipped = measure_files(options.repo, files)
    print_table(rows)
    for name, reason in skipped.items():
        print(f"skipped {name}: {reason}", file=sys.stderr)


if __name__ == "__main__":
    main()
