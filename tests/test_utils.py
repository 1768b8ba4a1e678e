"""Options, errors, files and schedules. Run with `python -m pytest tests/test_utils.py`."""

import contextlib
import importlib
import io
import math
import os
import platform
import re
import stat
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from typing import Annotated, Literal

import numpy as np
import pytest
import torch
from conftest import child_environment
from timm.scheduler import CosineLRScheduler

import utils
from utils import HERE, Bounds, InputError, RunOptions, cosine_schedule, linear_schedule, parse


@dataclass
class EveryType(RunOptions):
    """Options of every type that the scripts use."""

    data: str = ""
    lr: float = 0.5
    batch_size: int = 64
    scale: tuple[float, float] = (0.1, 1.0)
    k: tuple[int, ...] = (5, 10)
    flip: bool = False
    keep: bool = True
    mode: Literal["mean", "sinkhorn"] = "mean"


@dataclass
class Needy:
    """Options of which one has no default, and no number has bounds."""

    source: str
    size: int = 5
    speed: float = 1.0


@dataclass
class Bounded:
    """Options with bounds, of every type that holds numbers."""

    epochs: Annotated[int, Bounds(1, 100_000)] = 100
    lr: Annotated[float, Bounds(0, 0.5)] = 0.1
    k: Annotated[tuple[int, ...], Bounds(1, 20)] = (5,)
    mean: Annotated[tuple[float, ...], Bounds(0, 1)] = ()
    grades: Annotated[dict[str, int], Bounds(0, 4)] = field(default_factory=dict)
    name: str = "x"
    flip: bool = True

    def __post_init__(self):
        utils.check_bounds(self)


def options_of(script):
    """The options class of a script, whose import takes seconds: only where a test needs it."""
    return importlib.import_module(script).Options


def yaml_file(tmp_path, text):
    path = tmp_path / "options.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(options_class, argv, **kwargs):
    """What the user reads when options are refused, in one line without boxes, and the code."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        try:
            parse(options_class, [str(word) for word in argv], **kwargs)
        except SystemExit as end:
            text = re.sub("[^!-~]|-{3,}", " ", shown.getvalue())
            return " ".join(text.split()), end.code
        except InputError as error:
            return str(error), 2
    raise AssertionError(f"{argv} was accepted")


# ------------------------------------------------------------------------------------------ parse


def test_defaults_then_yaml_then_flags(tmp_path):
    path = yaml_file(tmp_path, "lr: 1e-3\nbatch_size: 8\nscale: [0.2, 0.7]\nkeep: false\nk: 3\n")
    options, used = parse(EveryType, ["--config", str(path), "--batch-size", "9", "--flip"])
    assert used == path
    assert (options.lr, options.batch_size, options.scale) == (1e-3, 9, (0.2, 0.7))
    assert (options.keep, options.flip, options.k, options.mode) == (False, True, (3,), "mean")
    assert parse(EveryType, [])[0].lr == 0.5 and parse(EveryType, [])[1] is None


@pytest.mark.parametrize("argv", [["--batch-size", "9"], ["--batch_size", "9"], ["--batch_size=9"]])
def test_both_spellings_of_a_name(argv):
    assert parse(EveryType, argv)[0].batch_size == 9


def test_last_value_wins(tmp_path):
    path = yaml_file(tmp_path, "k: [1, 2, 3]\nflip: true\n")
    argv = ["--lr", "1", "--k", "4", "--lr", "2", "--config", str(path), "--k", "7", "8"]
    options = parse(EveryType, [*argv, "--no-flip"])[0]
    assert (options.lr, options.k, options.flip) == (2.0, (7, 8), False)


@pytest.mark.parametrize("value", ["1e-3", "-1e-3", "1E4", "3", ".5"])
def test_numbers_in_yaml_are_numbers(tmp_path, value):
    path = yaml_file(tmp_path, f"lr: {value}\n")
    assert parse(EveryType, ["--config", str(path)])[0].lr == float(value)


@pytest.mark.parametrize(
    ("script", "argv", "name", "value"),
    [
        ("SSRL", ["--data_path", "d"], "data", "d"),
        ("SSRL", ["--data-path=d"], "data", "d"),
        ("SSRL", ["--batch_size_per_gpu", "7"], "batch_size", 7),
        ("SSRL", ["--saveckp_freq", "7"], "keep_every", 7),
        ("SSRL", ["--num_workers", "7"], "workers", 7),
        ("SSRL", ["--checkpoint_key", "student"], "checkpoint_key", "student"),
        ("eval_knn", ["--nb_knn", "7", "9"], "k", (7, 9)),
        ("eval_knn", ["--pretrained_weights", "w"], "pretrained", "w"),
        ("eval_linear", ["--pretrained_weights", "w"], "pretrained", "w"),
        ("eval_linear", ["--checkpoint_key", "student"], "checkpoint_key", "student"),
        ("visualize_attention", ["--image_path", "i"], "image", ("i",)),
    ],
)
def test_spellings_of_dino(script, argv, name, value):
    assert getattr(parse(options_of(script), argv)[0], name) == value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lr: 1\nlr: 2\n", ["line 2", "lr", "twice"]),
        ("batch_size: 1\nbatch-size: 2\n", ["line 2", "batch_size", "twice"]),
        ("lr: 1\nbatchsize: 2\n", ["line 2", "'batchsize'", "'batch_size'"]),
        ("lr: fast\n", ["lr", "fast", "options.yaml"]),
        ("batch_size: 1.5\n", ["batch-size", "1.5", "options.yaml"]),
        ("mode: median\n", ["mode", "median", "options.yaml"]),
        ("flip: 1\n", ["flip", "true or false"]),
        ("flip: [true, false]\n", ["flip", "true or false"]),
        ("scale: [0.5]\n", ["scale", "options.yaml"]),
        ("lr: {a: 1}\n", ["line 1", "lr"]),
        ("k: []\n", ["--k"]),
        ("- lr\n- 1\n", ["option: value"]),
        ("lr\n", ["option: value"]),
        ("lr: [1\n", ["YAML"]),
        ("lr: !!python/object/apply:os.getcwd []\n", ["lr"]),
    ],
)
def test_faults_of_the_yaml(tmp_path, text, expected):
    path = yaml_file(tmp_path, text)
    message, code = refusal(EveryType, ["--config", path])
    assert code == 2
    for words in expected:
        assert words in message


def test_empty_yaml_is_the_defaults(tmp_path):
    assert parse(EveryType, ["--config", str(yaml_file(tmp_path, "# nothing\n"))])[0] == EveryType()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--bath-size", "3"], "--batch-size"),
        (["--lr", "fast"], "fast"),
        (["--batch-size", "1.5"], "1.5"),
        (["--mode", "median"], "sinkhorn"),
        (["--k"], "--k"),
        (["--scale", "1"], "--scale"),
        (["--workers", "-1"], "--workers -1: expected a whole number from 0 to 1024"),
        (["--num-workers", "1e22"], "--workers 1e22: expected a whole number from 0 to 1024"),
        (["--config"], "--config"),
        (["--config", "--lr"], "--config"),
        (["--config", "absent.yaml"], "absent.yaml"),
    ],
)
def test_faults_of_flags(argv, expected):
    message, code = refusal(EveryType, argv)
    assert code == 2
    assert expected in message


@pytest.mark.parametrize(
    "argv", [["--local-rank=1"], ["--local-rank", "1"], ["--local_rank", "1"], ["--local_rank=1"]]
)
def test_launchers_local_rank_is_ignored(argv):
    assert parse(EveryType, [*argv, "--lr", "3"])[0].lr == 3.0
    assert parse(EveryType, ["--lr", "3", *argv])[0].lr == 3.0


def test_default_config_stands_in_for_config_and_data(tmp_path):
    path = yaml_file(tmp_path, "lr: 7\n")
    assert parse(EveryType, [], default_config=path) == (EveryType(lr=7.0), path)
    for argv in (["--data", "d"], ["--data=d"]):
        assert parse(EveryType, argv, default_config=path) == (EveryType(data="d"), None)
    other = tmp_path / "other.yaml"
    other.write_text("batch_size: 3\n")
    assert parse(EveryType, [f"--config={other}"], default_config=path) == (
        EveryType(batch_size=3),
        other,
    )


def test_where_an_option_was_given_shows_what_it_is_meant_for(tmp_path):
    training = options_of("SSRL")
    path = str(yaml_file(tmp_path, "lr: 7\nbatch_size: 3\n"))
    for argv, meant in (
        ([], True),  # both are defaults
        (["--seed", "1"], False),
        (["--lr", "7"], True),
        (["--lr=7", "--seed", "1"], True),
        (["--config", path], True),
        (["--config", path, "--seed", "1"], False),
        (["--config", path, "--seed", "1", "--lr", "2"], True),
    ):
        options = parse(training, argv)[0]
        assert options.is_meant_for("lr", "seed") is meant, argv
    options = parse(training, ["--batch_size", "3", "--num-workers", "1"])[0]
    assert not options.is_meant_for("lr", "batch_size"), "with either spelling of a name"
    assert training(seed=1).is_meant_for("lr", "seed"), "made in Python"


def test_yaml_may_leave_required_options_to_flags(tmp_path):
    path = yaml_file(tmp_path, "size: 7\n")
    assert parse(Needy, ["--config", str(path), "--source", "s"])[0] == Needy("s", 7)


@pytest.mark.parametrize("script", ["SSRL", "eval_knn", "eval_linear"])
def test_dumped_options_read_back(tmp_path, script):
    options_class = options_of(script)
    changed = {"seed": 3, "overwrite": True, "workers": 5, "data": "a b: c", "lr": 1e-7}
    if script == "eval_linear":
        changed["lr"] = (1e-7, 3.0)
    known = options_class.__dataclass_fields__
    values = {name: value for name, value in changed.items() if name in known}
    options = options_class(**values, output_dir="elsewhere")
    text = utils.dump_options(options)
    assert "output_dir" not in text and "overwrite" not in text  # a repetition deletes nothing
    back = parse(options_class, ["--config", str(yaml_file(tmp_path, text))])[0]
    assert asdict(back) == asdict(options) | {"output_dir": "", "overwrite": False}


def test_options_left_open_are_not_dumped(tmp_path):
    text = utils.dump_options(Bounded(epochs=3))
    assert "mean" not in text
    assert "k:\n- 5\n" in text
    path = yaml_file(tmp_path, text.replace("grades: {}\n", ""))
    assert parse(Bounded, ["--config", str(path)])[0] == Bounded(epochs=3)
    assert "mean:\n- 0.5\n" in utils.dump_options(Bounded(mean=(0.5,)))
    assert "k: []\n" in utils.dump_options(Bounded(k=()))  # reading must not take the default


@pytest.mark.parametrize("path", sorted((HERE / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_configs_parse(path):
    named = re.findall(r"(\w+)\.py", path.read_text(encoding="utf-8"))
    assert parse(options_of(named[0]), ["--config", str(path)])[1] == path


# ------------------------------------------------------------------------------------------ bounds


@pytest.mark.parametrize(
    "allowed",
    [
        {"epochs": 1},
        {"epochs": 100_000},
        {"epochs": np.int64(7)},
        {"lr": 0},
        {"lr": 0.5},
        {"k": (1, 20)},
        {"k": ()},
        {"mean": (0.0, 1)},
        {"grades": {"none": 0, "proliferative": 4}},
    ],
    ids=str,
)
def test_limits_themselves_are_allowed(allowed):
    Bounded(**allowed)


WHOLE = "expected a whole number from"


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        ({"epochs": 0}, f"--epochs 0: {WHOLE} 1 to 100000"),
        ({"epochs": 100_001}, f"--epochs 100001: {WHOLE} 1 to 100000"),
        ({"epochs": 1.5}, f"--epochs 1.5: {WHOLE} 1 to 100000"),
        ({"epochs": "ten"}, f"--epochs ten: {WHOLE} 1 to 100000"),
        ({"epochs": None}, f"--epochs None: {WHOLE} 1 to 100000"),
        ({"epochs": math.nan}, f"--epochs nan: {WHOLE} 1 to 100000"),
        ({"epochs": 10**5000}, f"--epochs with thousands of digits: {WHOLE} 1 to 100000"),
        ({"lr": -1e-9}, "--lr -1e-09: expected a number from 0 to 0.5"),
        ({"lr": math.inf}, "--lr inf: expected a number from 0 to 0.5"),
        ({"lr": -math.inf}, "--lr -inf: expected a number from 0 to 0.5"),
        ({"lr": math.nan}, "--lr nan: expected a number from 0 to 0.5"),
        ({"lr": "fast"}, "--lr fast: expected a number from 0 to 0.5"),
        ({"k": (5, 21)}, f"--k 21: {WHOLE} 1 to 20"),
        ({"k": (0, 5)}, f"--k 0: {WHOLE} 1 to 20"),
        ({"mean": (0.5, math.nan)}, "--mean nan: expected a number from 0 to 1"),
        ({"grades": {"none": 0, "worst": 5}}, f"--grades 5: {WHOLE} 0 to 4"),
        ({"grades": {"none": -1}}, f"--grades -1: {WHOLE} 0 to 4"),
    ],
    ids=lambda value: str(value)[:40] if value != {"epochs": 10**5000} else "long",
)
def test_numbers_outside_their_bounds_are_refused(refused, message):
    with pytest.raises(InputError) as caught:
        Bounded(**refused)
    assert str(caught.value) == message


def test_the_seed_has_the_bounds_of_32_bits():
    RunOptions(seed=2**32 - 1)
    with pytest.raises(InputError, match="--seed -1: expected a whole number from 0 to 4294967295"):
        RunOptions(seed=-1)


@pytest.mark.parametrize(
    "argv",
    [
        ["--epochs", "1e22"],
        ["--epochs", "inf"],
        ["--epochs", "nan"],
        ["--epochs=1.5"],
        ["--epochs", "9" * 5000],
        ["--k", "5", "1e22"],
        ["--k", "5", "9" * 5000],
        ["--lr", "inf"],
        ["--lr", "nan"],
        ["--lr", "9" * 5000],
        ["--mean", "0.5", "fast"],
        ["--grades", "none", "0", "worst", "1e22"],
    ],
    ids=lambda argv: " ".join(argv)[:30],
)
def test_numbers_that_are_none_are_refused_with_flag_and_limits(tmp_path, argv):
    limits = {"epochs": "1 to 100000", "k": "1 to 20", "lr": "0 to 0.5", "mean": "0 to 1"}
    limits["grades"] = "0 to 4"
    name = argv[0].partition("=")[0].removeprefix("--")
    message, code = refusal(Bounded, argv)
    assert code == 2
    assert message.count(f"--{name} ") == 1
    assert f"number from {limits[name]}" in message
    assert len(message) < 400 and "Traceback" not in message

    values = " ".join(argv).partition(" ")[2].split() or argv[0].split("=")[1:]
    if name != "grades":  # what is in a file is read by the same parser
        path = yaml_file(tmp_path, f"{name}: [{', '.join(values)}]\n")
        message, code = refusal(Bounded, ["--config", path])
        assert code == 2
        assert f"number from {limits[name]}" in message and "options.yaml" in message


def test_numbers_without_bounds_are_numbers_all_the_same():
    assert refusal(Needy, ["--source", "s", "--size", "1e22"]) == (
        "--size 1e22: expected a whole number",
        2,
    )
    assert refusal(Needy, ["--source", "s", "--speed", "fast"]) == (
        "--speed fast: expected a number",
        2,
    )


# ------------------------------------------------------------------------------ options of training


@pytest.mark.parametrize(
    "changed",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"log_every": 0},
        {"patch_size": -1},
        {"seed": -1},
        {"rotation": -5.0},
        {"local_crops_number": -1},
        {"global_crops_scale": (0.5, 0.4)},
        {"local_crops_scale": (0.0, 0.4)},
        {"blur_sigma": (0.1, 3.0)},
        {"warmup_epochs": 200},
        {"momentum_teacher": 1.5},
        {"teacher_temp": 0.0},
        {"std": (0.0, 1.0, 1.0)},
        {"workers": -1},
    ],
    ids=str,
)
def test_training_options_out_of_range(changed):
    with pytest.raises(InputError, match="--" + next(iter(changed)).replace("_", "-")):
        options_of("SSRL")(**changed)


# ------------------------------------------------------------------------------------------- files


def test_write_atomic_keeps_the_old_file(tmp_path):
    path = tmp_path / "folder" / "file.txt"
    utils.write_atomic(path, lambda temporary: temporary.write_text("old"))

    def fail(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        utils.write_atomic(path, fail)
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]
    assert path.read_text() == "old"
    utils.write_atomic(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new"
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError):
        utils.write_json(tmp_path / "a.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())


FAULTS = """
import resource, sys, utils
if sys.argv[1] == "kept":
    utils.keep_freed_memory()
def fill():
    for _ in range(50):
        bytearray(40_000_000)
fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that is asked")
def test_freed_memory_is_used_again():
    """Page faults of 50 arrays of 40 MB; a child of a process that keeps memory keeps it, too."""
    environment = child_environment(PYTHONPATH=str(HERE))
    for name in list(environment):
        if name.startswith("MALLOC_"):
            del environment[name]
    inherited = {"MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_MMAP_MAX_": "0"}
    faults = {}
    for name, changed in (("given back", {}), ("kept", {}), ("child", inherited)):
        command = [sys.executable, "-c", FAULTS, name]
        done = subprocess.run(command, env=environment | changed, capture_output=True, check=True)
        faults[name] = int(done.stdout)
    assert faults["given back"] > 900, faults
    assert max(faults["kept"], faults["child"]) < 90, faults


def test_children_are_told_to_keep_memory(monkeypatch):
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_"):
        monkeypatch.setenv(name, "gone")
        monkeypatch.delenv(name)
    utils.keep_freed_memory()
    assert os.environ["MALLOC_MMAP_MAX_"] == "0"
    assert os.environ["MALLOC_TRIM_THRESHOLD_"] == str(2**31 - 1)


SCRIPT = """
import sys
from dataclasses import dataclass
import utils
@dataclass
class Options(utils.RunOptions):
    kind: str = ""
def main(options, config):
    if options.kind:
        raise getattr(utils, options.kind, ZeroDivisionError)("the reason")
utils.run_main(main, Options)
"""


@pytest.mark.parametrize(
    ("kind", "code"),
    [("", 0), ("InputError", 2), ("Diverged", 3), ("Stopped", 75), ("Bug", 1), ("--bad", 2)],
)
def test_exit_codes(kind, code):
    argv = ["--kind", kind]
    if kind == "--bad":
        argv = ["--bad"]
    command = [sys.executable, "-c", SCRIPT, *argv]
    environment = child_environment(PYTHONPATH=str(HERE))
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert ("Traceback" in done.stderr) == (code == 1)
    if kind in ("InputError", "Diverged", "Stopped"):
        assert done.stderr == f"{kind}: the reason\n"


@pytest.mark.parametrize("by", ["flag", "file"])
def test_debug_shows_the_traceback(by, tmp_path):
    flags = ["--debug"]
    if by == "file":
        flags = ["--config", str(yaml_file(tmp_path, "debug: true\n"))]
    command = [sys.executable, "-c", SCRIPT, "--kind", "InputError", *flags]
    environment = child_environment(PYTHONPATH=str(HERE))
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "Traceback" in done.stderr and "the reason" in done.stderr


# --------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_cosine_schedule_equals_timm(warmup):
    total, start, end = 40, 0.5, 0.01
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=start)
    expected = CosineLRScheduler(
        optimizer, total - warmup, end, warmup_t=warmup, warmup_lr_init=0.0, warmup_prefix=True
    )
    for step in range(total):
        value = cosine_schedule(step, total, start, end, warmup)
        assert value == pytest.approx(expected._get_lr(step)[0], rel=1e-9, abs=1e-12), step


def test_cosine_schedule_by_hand():
    assert cosine_schedule(0, 10, 0.04, 0.4) == pytest.approx(0.04)
    assert cosine_schedule(5, 10, 0.04, 0.4) == pytest.approx(0.22)
    assert cosine_schedule(10, 10, 0.04, 0.4) == pytest.approx(0.4)
    assert cosine_schedule(12, 10, 0.04, 0.4) == pytest.approx(0.4)
    assert cosine_schedule(0, 10, 3.0, 1.0, 4) == 0.0
    assert cosine_schedule(2, 10, 3.0, 1.0, 4) == pytest.approx(1.5)
    assert cosine_schedule(4, 10, 3.0, 1.0, 4) == pytest.approx(3.0)
    assert cosine_schedule(6, 10, 3.0, 1.0, 4) == pytest.approx(1 + (1 + math.cos(math.pi / 3)))
    assert cosine_schedule(3, 3, 3.0, 1.0, 3) in (1.0, 3.0)  # nothing but warm-up: no division by 0


def test_linear_schedule_equals_numpy():
    steps = np.arange(12)
    values = [linear_schedule(int(step), 8, 0.04, 0.07) for step in steps]
    np.testing.assert_allclose(values, np.interp(steps, [0, 8], [0.04, 0.07]), rtol=1e-12)
    assert linear_schedule(0, 0, 0.04, 0.07) == 0.07
