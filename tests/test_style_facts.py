"""The counts of tools/style_facts.py on texts that are worked out by hand.

Run with `python -m pytest tests/test_style_facts.py`.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tools import style_facts

ROOT = Path(__file__).resolve().parents[1]

# 12 lines are not blank: 3 of docstrings, 2 of comments alone, 7 of code, 2 of those with a comment
LINES = '''"""The module's docstring.

Its second paragraph.  # no comment
"""

# A comment alone.
SIZE = 1  # a comment behind

class Options:
    size: int = 1
    """The help text of an option."""

    def area(self):  # a comment behind
        "A docstring of one line."
        # A comment alone.
        text = """a string

        # of three lines, of which one is blank"""
        return text
'''


def test_lines_by_hand():
    facts = style_facts.measure(LINES)
    assert facts.code_lines == 7
    assert facts.filled_lines == 5 + 2 + 7
    assert facts.comments_alone == 2
    assert facts.comments_behind == 2
    assert facts.percent(facts.comments_alone) == pytest.approx(100 * 2 / 14)


@pytest.mark.parametrize(
    "source, code_lines",
    [
        ("", 0),
        ("\n\n", 0),
        ("# alone\n", 0),
        ("def f(): 'a docstring on a line of code'\n", 1),
        ("call(\n    1,\n\n    # alone\n    2,\n)\n", 4),
        ("x = 1 + \\\n    2\n", 2),
        ("'''doc\nstring'''; x = 'text'\n", 1),
        ("x = f'''{1}\n\ntext'''\n", 2),
        ("x = 1", 1),
    ],
)
def test_code_lines_by_hand(source, code_lines):
    assert style_facts.measure(source).code_lines == code_lines


@pytest.mark.parametrize(
    "source, packed",
    [
        ("a, b = 1, 2", 1),
        ("(a, b) = (b, a)", 1),
        ("self.a, (b, c) = 1, f()", 1),
        ("x = a, b = 1, 2", 1),
        ("a, b = f()", 0),
        ("a = 1, 2", 0),
        ("a, b = (x for x in y)", 0),
        ("a, b = (1, 2) if x else (3, 4)", 0),
        ("for a, b in ((1, 2), (3, 4)): pass", 0),
    ],
)
def test_packed_assignments_by_hand(source, packed):
    assert style_facts.measure(source).packed_assignments == packed


@pytest.mark.parametrize(
    "source, number",
    [
        ("x = 1 if y else 2", 1),
        ("x = 1 if y else 2 if z else 3", 2),
        ("f(lambda: 1 if y else 2)", 1),
        ("if y: x = 1", 0),
        ("x = [y for y in z if y]", 0),
    ],
)
def test_conditional_expressions_by_hand(source, number):
    assert style_facts.measure(source).conditional_expressions == number


@pytest.mark.parametrize(
    "source, number",
    [
        ("[x for x in y]", 1),
        ("{x for x in y}", 1),
        ("{x: 1 for x in y}", 1),
        ("sum(x for x in y)", 1),
        ("[x for row in y for x in row]", 1),
        ("[[x for x in row] for row in y]", 2),
        ("for x in y: pass", 0),
    ],
)
def test_comprehensions_by_hand(source, number):
    assert style_facts.measure(source).comprehensions == number


def test_longest_function_by_hand():
    source = """
@decorator
def short():
    return 1

class Network:
    async def forward(
        self,
    ):
        def inner():
            return 1

        return inner
"""
    facts = style_facts.measure(source)
    assert (facts.longest_lines, facts.longest_name) == (7, "Network.forward")
    short, _, _ = source.partition("class")
    facts = style_facts.measure(short)
    assert (facts.longest_lines, facts.longest_name) == (2, "short")
    nested = "def f():\n    def g():\n        pass\n    if x:\n        def h(): pass\n"
    assert style_facts.measure(nested).longest_name == "f"


def test_rates_are_per_thousand_lines_of_code_and_files_add_up():
    packed = style_facts.measure("# why\na, b = 1, 2\n\n\ndef f():\n    return 1\n")
    plain = style_facts.measure("x = 1\ny = 1 if x else 2\n" + "z = [x for x in y]\n" * 5)
    total = style_facts.add_up({"packed.py": packed, "plain.py": plain})
    assert packed.per_thousand(packed.packed_assignments) == pytest.approx(1000 / 3)
    assert total.code_lines == 10
    row = style_facts.table_row("both", total)
    share = f"{100 / 11:.1f}"
    rates = ["100.0", "100.0", "500.0"]
    assert row == ["both", "10", share, "0.0", share, *rates, "2 packed.py: f"]
    assert style_facts.table_row("empty", style_facts.measure(""))[1:8] == ["0"] + ["0.0"] * 6


def run(*arguments):
    command = [sys.executable, "-m", "tools.style_facts", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_another_code_base(tmp_path):
    """Files that are not Python are named and skipped; FILES may be folders."""
    (tmp_path / "package" / "inner").mkdir(parents=True)
    (tmp_path / "package" / ".hidden").mkdir()
    (tmp_path / "top.py").write_text("a, b = 1, 2\n")
    (tmp_path / "package" / "old.py").write_text("print 1\n")
    (tmp_path / "package" / "latin.py").write_bytes(b"# \xe9\n")
    (tmp_path / "package" / "zero.py").write_bytes(b"x = 1\0\n")
    (tmp_path / "package" / ".hidden" / "no.py").write_text("x = 1\n")
    inner = tmp_path / "package" / "inner" / "good.py"
    inner.write_bytes("# -*- coding: latin-1 -*-\nx = '\\d\u00e9'\r\n".encode("latin-1"))

    top = run("--repo", tmp_path)
    assert top.returncode == 0
    assert [line.split()[0] for line in top.stdout.splitlines()] == ["file", "top.py", "total"]

    below = run("--repo", tmp_path, "package", "top.py")
    assert below.returncode == 0
    names = [line.split()[0] for line in below.stdout.splitlines()]
    assert names == ["file", "package/inner/good.py", "top.py", "total"]
    assert below.stdout.splitlines()[1].split()[1:5] == ["1", "50.0", "0.0", "50.0"]
    skipped = [line.split(":")[0] for line in below.stderr.splitlines()]
    assert skipped == [f"skipped package/{name}.py" for name in ("latin", "old", "zero")]


def test_what_is_not_there_is_an_error(tmp_path):
    for arguments in (["--repo", tmp_path / "none"], ["--repo", tmp_path], ["none.py"]):
        answer = run(*arguments)
        assert answer.returncode == 2
        assert "no " in answer.stderr and "Traceback" not in answer.stderr


def test_this_project_is_measured_without_arguments():
    answer = run()
    assert answer.returncode == 0 and not answer.stderr
    rows = answer.stdout.splitlines()
    assert any(row.startswith("SSRL.py ") for row in rows)
    assert any(row.startswith("fundus/manifest.py ") for row in rows)
