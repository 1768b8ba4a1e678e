"""What the design asks of the sources. Run with `python -m pytest tests/test_conventions.py`."""

import ast
import contextlib
import importlib
import io
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from conftest import child_environment

import utils

HERE = utils.HERE
TOP = sorted(HERE.glob("*.py"))
FUNDUS = sorted(HERE.glob("fundus/*.py"))
SCRIPTS = ("SSRL", "eval_knn", "eval_linear", "visualize_attention", "prepare_data")
SOURCES = [*TOP, *FUNDUS, *sorted(HERE.glob("t*/*.py")), *sorted(HERE.glob("benchmarks/*.py"))]
CONFIGS = sorted(HERE.glob("configs/*.yaml"))
RECIPES = sorted(HERE.glob("benchmarks/recipes/*.yaml"))
MAY_IMPORT = {
    "utils": (),
    "losses": (),
    "augment": ("utils",),
    "fundus": ("fundus", "utils"),
    "devices": ("utils",),
    "vision_transformer": ("utils",),
    "run_folder": ("devices", "utils"),
    "weights": ("vision_transformer", "run_folder", "utils"),
    "data": ("fundus", "augment", "devices", "utils"),
    "features": ("data", "augment", "vision_transformer", "fundus", "utils"),
    "evaluation": (
        "features",
        "data",
        "weights",
        "run_folder",
        "devices",
        "vision_transformer",
        "fundus",
        "utils",
    ),
}
LEFTOVERS = re.compile("|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK"]))


def name_of(path):
    return str(path.relative_to(HERE))


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path):
    """Names of the modules of ours that a file imports, at any place."""
    ours, found = {p.stem for p in TOP} | {"fundus", "tools", "tests", "benchmarks"}, set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found & ours


def functions(path):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(tree(path)) if isinstance(node, kinds)]


def length(node):
    return node.end_lineno - node.lineno + 1


# ------------------------------------------------------------------------------------------- layout


@pytest.mark.parametrize("path", [*TOP, *FUNDUS], ids=name_of)
def test_imports_go_one_way(path):
    if path.stem in SCRIPTS:
        forbidden = imports(path) & {*SCRIPTS, "tools", "tests", "benchmarks"}
    else:
        room = "fundus" if path in FUNDUS else path.stem
        assert room in MAY_IMPORT, f"{path.name} has no place in the design"
        forbidden = imports(path) - set(MAY_IMPORT[room])
    assert not forbidden


def test_tools_only_read_what_runs_wrote():
    """They may reckon with what was read (fundus), and never need a network or its library."""
    for path in HERE.glob("tools/*.py"):
        if path.name == "export.py":
            continue  # its subject is a network
        assert imports(path) <= {"tools", "fundus", "utils"}, path.name


def test_listing_is_the_table_of_contents():
    assert len(TOP) <= 16, [path.name for path in TOP]
    rooms = {name for name in (*SCRIPTS, *MAY_IMPORT) if name != "fundus"}
    assert {f"{name}.py" for name in rooms} == {path.name for path in TOP}


# A file is as long as its subject. These are one algorithm or one table each, with room for the
# next objective, network or name rule; one that outgrows this has two subjects.
LONG_FILES = {
    "SSRL.py": 900,
    "weights.py": 900,
    "vision_transformer.py": 700,
    "augment.py": 700,
    "evaluation.py": 700,
    "eval_linear.py": 750,
}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_lengths(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONG_FILES.get(path.name, 500) or path.parent.name == "tests"
    for node in functions(path):
        assert length(node) <= (80 if node.name == "main" else 60), node.name


@pytest.mark.parametrize("path", [*TOP, *FUNDUS], ids=name_of)
def test_public_names_have_docstrings(path):
    module = tree(path)
    assert ast.get_docstring(module)
    classes = [node for node in module.body if isinstance(node, ast.ClassDef)]
    holders = [module, *(node for node in classes if node.name[0] != "_")]
    kinds = (ast.FunctionDef, ast.ClassDef)
    members = [node for holder in holders for node in holder.body if isinstance(node, kinds)]
    long = [node for node in members if node.name[0] != "_" and length(node) > 8]
    assert not [node.name for node in long if not ast.get_docstring(node)]


@pytest.mark.parametrize("path", [*SOURCES, *CONFIGS, *RECIPES], ids=name_of)
def test_plain_text_without_leftovers(path):
    text = path.read_bytes().decode("ascii")
    assert not LEFTOVERS.search(text) and "\t" not in text and text.endswith("\n")


# ----------------------------------------------------------------------------- options and commands


def options_class(name):
    module = importlib.import_module(name)
    return getattr(module, "Options", None) or module.PrepareOptions


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_option_has_help(name, monkeypatch):
    """As --help shows it: words besides name, type and default."""
    monkeypatch.setenv("COLUMNS", "250")
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
        utils.parse(options_class(name), ["--help"])
    text = re.sub("[^\n -~]", " ", shown.getvalue())  # without the box
    entries = re.split(r"(?m)^\s*(?=-)", text)
    told = {flag: entry for entry in entries for flag in re.findall(r"--[\w-]+", entry)}
    for field in options_class(name).__dataclass_fields__:
        entry = told["--" + field.replace("_", "-")]
        values = r"\((default|required).*|--?[\w-]+|\{.*?\}|[A-Z]{2,}"
        assert re.search("[a-z]{4}", re.sub(values, " ", entry)), entry


def number_of(kind):
    """The type of number that an annotation holds, in a tuple or dict too; None for others."""
    if kind in (int, float):
        return kind
    inner = [number_of(part) for part in typing.get_args(kind) if part is not ...]
    return next((found for found in inner if found), None)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_number_among_the_options_has_bounds(name):
    """Finite ones, so that no number that cannot be reaches what is built from it."""
    hints = typing.get_type_hints(options_class(name), include_extras=True)
    bounded = 0
    for field, hint in hints.items():
        if number_of(typing.get_args(hint)[0] if hasattr(hint, "__metadata__") else hint):
            bounds = [m for m in getattr(hint, "__metadata__", ()) if isinstance(m, utils.Bounds)]
            assert len(bounds) == 1, field
            assert -1e12 < bounds[0].low < bounds[0].high < 1e12, field
            bounded += 1
    assert bounded >= 2


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_configs_name_a_command_that_exists(path):
    header = path.read_text(encoding="utf-8")
    named = re.findall(r"(\w+)\.py", header)
    assert named and {f"{name}.py" for name in named} <= {p.name for p in TOP}
    assert utils.parse(options_class(named[0]), ["--config", str(path)])[1] == path


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_recipes_of_studies_parse(path):
    assert utils.parse(options_class("SSRL"), ["--config", str(path)])[1] == path


def test_commands_of_the_readme_exist():
    if not (HERE / "README.md").is_file():
        pytest.skip("no README.md yet")
    text = (HERE / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"(?m)^\s*(?:\$ )?((?:python3?|torchrun|make)\b.*)$", text)
    assert any("SSRL.py" in command for command in commands)
    for command in commands:
        words = command.partition("#")[0].split()
        files = [w for w in words if re.fullmatch(r"(configs/)?[\w/]+\.(py|yaml)", w)]
        files += [w.replace(".", "/") + ".py" for w in words if w.startswith("tools.")]
        assert not [name for name in files if not (HERE / name).is_file()], command
        if words[0] == "make":
            targets = (HERE / "Makefile").read_text(encoding="utf-8")
            assert re.search(rf"(?m)^{words[1]}:", targets), command
        else:
            check_flags(words)


def check_flags(words):
    """Every flag of a README's command must be one of its script."""
    script = next((Path(w).stem for w in words if w.removesuffix(".py") in SCRIPTS), None)
    flags = words[words.index(f"{script}.py") + 1 :] if script else []
    known = set(options_class(script).__dataclass_fields__) | {"config"} if script else set()
    used = {w[2:].partition("=")[0].replace("-", "_") for w in flags if w.startswith("--")}
    assert used <= known, f"{script}.py has no {used - known}"


# ---------------------------------------------------------------------------------------- importing

QUIET = """
import logging, signal, sys
import numpy, torch
def state():
    numbers = torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist()
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    return numbers, handlers, logging.getLogger().handlers[:], torch.is_grad_enabled()
before = state()
import {modules}
assert state() == before
assert not torch.distributed.is_initialized() and not torch.cuda.is_initialized()
"""


def run_code(code, folder):
    environment = child_environment(PYTHONPATH=str(HERE), HOME=str(folder), TMPDIR=str(folder))
    command = [sys.executable, "-W", "ignore", "-c", code, "--nonsense"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_importing_does_nothing(tmp_path):
    done = run_code(QUIET.format(modules=", ".join(path.stem for path in TOP)), tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_preparing_and_options_load_no_torch(tmp_path):
    rooms = ", ".join(f"fundus.{path.stem}" for path in FUNDUS if path.stem != "__init__")
    code = f"import utils, prepare_data, {rooms}, sys; sys.exit('torch' in sys.modules)"
    assert run_code(code, tmp_path).returncode == 0
