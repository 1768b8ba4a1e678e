"""Options, errors, files and schedules. Run with `python -m pytest tests/test_utils.py`."""

import contextlib
import importlib
import io
import json
import math
import os
import platform
import re
import stat
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import pytest
import torch
from conftest import child_environment
from timm.scheduler import CosineLRScheduler

import eval_knn
import eval_linear
import run_folder
import SSRL
import utils
import visualize_attention
from utils import HERE, InputError, RunOptions, cosine_schedule, linear_schedule, parse


@dataclass
class Some(RunOptions):
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
    """Options of which one has no default."""

    source: str
    size: int = 5


def yaml_file(tmp_path, text):
    path = tmp_path / "some.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(options_class, argv, **kwargs):
    """What the user reads when options are refused, in one line without boxes, and the code."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        try:
            parse(options_class, [str(word) for word in argv], **kwargs)
        except SystemExit as end:
            return " ".join(re.sub("[^!-~]", " ", shown.getvalue()).split()), end.code
        except InputError as error:
            return str(error), 2
    raise AssertionError(f"{argv} was accepted")


# ------------------------------------------------------------------------------------------ parse


def test_defaults_then_yaml_then_flags(tmp_path):
    path = yaml_file(tmp_path, "lr: 1e-3\nbatch_size: 8\nscale: [0.2, 0.7]\nkeep: false\nk: 3\n")
    options, used = parse(Some, ["--config", str(path), "--batch-size", "9", "--flip"])
    assert used == path
    assert (options.lr, options.batch_size, options.scale) == (1e-3, 9, (0.2, 0.7))
    assert (options.keep, options.flip, options.k, options.mode) == (False, True, (3,), "mean")
    assert parse(Some, [])[0].lr == 0.5 and parse(Some, [])[1] is None


@pytest.mark.parametrize("argv", [["--batch-size", "9"], ["--batch_size", "9"], ["--batch_size=9"]])
def test_both_spellings_of_a_name(argv):
    assert parse(Some, argv)[0].batch_size == 9


def test_last_value_wins(tmp_path):
    path = yaml_file(tmp_path, "k: [1, 2, 3]\nflip: true\n")
    argv = ["--lr", "1", "--k", "4", "--lr", "2", "--config", str(path), "--k", "7", "8"]
    options = parse(Some, [*argv, "--no-flip"])[0]
    assert (options.lr, options.k, options.flip) == (2.0, (7, 8), False)


@pytest.mark.parametrize("value", ["1e-3", "-1e-3", "1E4", "3", ".5"])
def test_numbers_in_yaml_are_numbers(tmp_path, value):
    path = yaml_file(tmp_path, f"lr: {value}\n")
    assert parse(Some, ["--config", str(path)])[0].lr == float(value)


@pytest.mark.parametrize(
    ("options_class", "argv", "name", "value"),
    [
        (SSRL.Options, ["--data_path", "d"], "data", "d"),
        (SSRL.Options, ["--data-path=d"], "data", "d"),
        (SSRL.Options, ["--batch_size_per_gpu", "7"], "batch_size", 7),
        (SSRL.Options, ["--saveckp_freq", "7"], "keep_every", 7),
        (SSRL.Options, ["--num_workers", "7"], "workers", 7),
        (SSRL.Options, ["--checkpoint_key", "student"], "checkpoint_key", "student"),
        (eval_knn.Options, ["--nb_knn", "7", "9"], "k", (7, 9)),
        (eval_knn.Options, ["--pretrained_weights", "w"], "pretrained", "w"),
        (eval_linear.Options, ["--pretrained_weights", "w"], "pretrained", "w"),
        (eval_linear.Options, ["--checkpoint_key", "student"], "checkpoint_key", "student"),
        (visualize_attention.Options, ["--image_path", "i"], "image", ("i",)),
    ],
)
def test_spellings_of_dino(options_class, argv, name, value):
    assert getattr(parse(options_class, argv)[0], name) == value


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("lr: 1\nlr: 2\n", ["line 2", "lr", "twice"]),
        ("batch_size: 1\nbatch-size: 2\n", ["line 2", "batch_size", "twice"]),
        ("lr: 1\nbatchsize: 2\n", ["line 2", "'batchsize'", "'batch_size'"]),
        ("lr: fast\n", ["lr", "fast", "some.yaml"]),
        ("batch_size: 1.5\n", ["batch-size", "1.5", "some.yaml"]),
        ("mode: median\n", ["mode", "median", "some.yaml"]),
        ("flip: 1\n", ["flip", "true or false"]),
        ("flip: [true, false]\n", ["flip", "true or false"]),
        ("scale: [0.5]\n", ["scale", "some.yaml"]),
        ("lr: {a: 1}\n", ["line 1", "lr"]),
        ("k: []\n", ["--k"]),
        ("- lr\n- 1\n", ["option: value"]),
        ("lr\n", ["option: value"]),
        ("lr: [1\n", ["YAML"]),
        ("lr: !!python/object/apply:os.getcwd []\n", ["lr"]),
    ],
)
def test_faults_of_the_yaml(tmp_path, text, told):
    path = yaml_file(tmp_path, text)
    message, code = refusal(Some, ["--config", path])
    assert code == 2 and not [word for word in told if word not in message], message


def test_empty_yaml_is_the_defaults(tmp_path):
    assert parse(Some, ["--config", str(yaml_file(tmp_path, "# nothing\n"))])[0] == Some()


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--bath-size", "3"], "--batch-size"),
        (["--lr", "fast"], "fast"),
        (["--batch-size", "1.5"], "1.5"),
        (["--mode", "median"], "sinkhorn"),
        (["--k"], "--k"),
        (["--scale", "1"], "--scale"),
        (["--workers", "-1"], "0 or more"),
        (["--config"], "--config"),
        (["--config", "--lr"], "--config"),
        (["--config", "absent.yaml"], "absent.yaml"),
    ],
)
def test_faults_of_flags(argv, told):
    message, code = refusal(Some, argv)
    assert code == 2 and told in message


@pytest.mark.parametrize(
    "argv", [["--local-rank=1"], ["--local-rank", "1"], ["--local_rank", "1"], ["--local_rank=1"]]
)
def test_launchers_local_rank_is_ignored(argv):
    assert parse(Some, [*argv, "--lr", "3"])[0].lr == 3.0
    assert parse(Some, ["--lr", "3", *argv])[0].lr == 3.0


def test_default_config_stands_in_for_config_and_data(tmp_path):
    path = yaml_file(tmp_path, "lr: 7\n")
    assert parse(Some, [], default_config=path) == (Some(lr=7.0), path)
    for argv in (["--data", "d"], ["--data=d"]):
        assert parse(Some, argv, default_config=path) == (Some(data="d"), None)
    other = tmp_path / "other.yaml"
    other.write_text("batch_size: 3\n")
    assert parse(Some, [f"--config={other}"], default_config=path) == (Some(batch_size=3), other)


def test_yaml_may_leave_required_options_to_flags(tmp_path):
    path = yaml_file(tmp_path, "size: 7\n")
    assert parse(Needy, ["--config", str(path), "--source", "s"])[0] == Needy("s", 7)


@pytest.mark.parametrize("options_class", [SSRL.Options, eval_knn.Options, eval_linear.Options])
def test_dumped_options_read_back(tmp_path, options_class):
    changed = {"seed": 3, "overwrite": True, "workers": 5, "data": "a b: c", "lr": 1e-7}
    names = {f for f in options_class.__dataclass_fields__}
    values = {k: v for k, v in changed.items() if k in names}
    if options_class is eval_linear.Options:
        values["lr"] = (1e-7, 3.0)
    options = options_class(**values, output_dir="elsewhere")
    text = utils.dump_options(options)
    assert "output_dir" not in text and "overwrite" not in text  # a repetition deletes nothing
    back = parse(options_class, ["--config", str(yaml_file(tmp_path, text))])[0]
    assert asdict(back) == asdict(options) | {"output_dir": "", "overwrite": False}


@pytest.mark.parametrize("path", sorted((HERE / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_configs_parse(path):
    named = re.findall(r"(\w+)\.py", path.read_text(encoding="utf-8"))
    script = importlib.import_module(named[0] if named else "SSRL")
    assert parse(script.Options, ["--config", str(path)])[1] == path


# ------------------------------------------------------------------------------ options of training


@pytest.mark.parametrize(
    "changed",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"log_every": 0},
        {"patch_size": 0},
        {"patch_size": 15},
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
        SSRL.Options(**changed)


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
    faults, environment = {}, child_environment(PYTHONPATH=str(HERE))
    environment = {k: v for k, v in environment.items() if not k.startswith("MALLOC_")}
    kept = {"MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_MMAP_MAX_": "0"}
    for name, also in (("given back", {}), ("kept", {}), ("child", kept)):
        command = [sys.executable, "-c", FAULTS, name]
        done = subprocess.run(command, env=environment | also, capture_output=True, check=True)
        faults[name] = int(done.stdout)
    assert faults["given back"] > 900 > 10 * max(faults["kept"], faults["child"]), faults


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
def main(o, config):
    if o.kind:
        raise getattr(utils, o.kind, ZeroDivisionError)("the reason")
utils.run_main(main, Options)
"""


@pytest.mark.parametrize(
    ("kind", "code"),
    [("", 0), ("InputError", 2), ("Diverged", 3), ("Stopped", 75), ("Bug", 1), ("--bad", 2)],
)
def test_exit_codes(kind, code):
    argv = [kind] if kind == "--bad" else ["--kind", kind] if kind else []
    command = [sys.executable, "-c", SCRIPT, *argv]
    environment = child_environment(PYTHONPATH=str(HERE))
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert ("Traceback" in done.stderr) == (code == 1)
    if kind in ("InputError", "Diverged", "Stopped"):
        assert done.stderr == f"{kind}: the reason\n"


@pytest.mark.parametrize("by", ["flag", "file"])
def test_debug_shows_the_traceback(by, tmp_path):
    (tmp_path / "o.yaml").write_text("debug: true\n")
    flags = ["--debug"] if by == "flag" else ["--config", str(tmp_path / "o.yaml")]
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


# ---------------------------------------------------------------------------------------- progress


def test_progress_writes_json_lines(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    progress = run_folder.Progress(tmp_path, 2, 6, 8, main=True)
    for step, loss in ((3, 4.0), (4, 2.0), (5, 7.0)):
        measured = {"step": step, "loss": torch.tensor(loss), "lr": 0.1, "waited": 0.0}
        spread = {"teacher_entropy": 0.5, "marginal_entropy": 0.6}
        progress.update(measured | (spread if step == 4 else {}), step / 2)
    progress.record({"rankme": 3.5})
    progress.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 5]
    assert lines[0]["loss"] == 2.0 and lines[0]["epoch"] == 2.0 and lines[0]["lr"] == 0.1
    assert lines[0]["images_per_s"] > 0 and lines[0]["data_wait"] == 0
    assert lines[1] == {"step": 5, "rankme": 3.5}


def test_only_the_main_process_writes(tmp_path):
    progress = run_folder.Progress(tmp_path, 0, 6, 8, main=False)
    progress.record({"rankme": 3.5})
    progress.close()
    assert not list(tmp_path.iterdir())
