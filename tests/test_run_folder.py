"""Run folders, checkpoints, log, progress. Run with `python -m pytest tests/test_run_folder.py`."""

import argparse
import collections
import io
import json
import os
import pathlib
import pickle
import random
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

import run_folder
import utils
from devices import Processes
from run_folder import Progress, RunFolder, load_torch, save_torch
from utils import InputError, RunOptions

ONE = Processes(torch.device("cpu"))
RESUMABLE = ("workers", "device", "log_every")


@dataclass
class TrainingOptions(RunOptions):
    """A few options, of the kinds that a training has."""

    data: str = "photographs"
    arch: str = "vit_small"
    epochs: int = 2
    lr: float = 0.5
    scale: tuple[float, float] = (0.4, 1.0)
    mean: tuple[float, ...] = ()
    koleo_weight: float = 0.0
    log_every: int = 10
    resume: Literal["auto", "never"] = "auto"


@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder, "versions", dict)
    return TrainingOptions(output_dir="run", workers=0)


def open_folder(options, fingerprint="d1"):
    """Do what a training does before its first step."""
    folder = RunFolder.choose(options, None, "x")
    if options.overwrite:
        folder.clear(ONE)
    checkpoint = folder.find_checkpoint(options, fingerprint, RESUMABLE, ONE)
    folder.begin(options, fingerprint, checkpoint, ONE)
    return folder, checkpoint


def stop_in(options, fingerprint="d1", step=3):
    """Leave a run folder as a stopped run does."""
    folder, checkpoint = open_folder(options, fingerprint)
    assert checkpoint is None
    content = {"step": step, "options": folder.options, "data": folder.fingerprint}
    save_torch(content, folder.path / "checkpoint.pth")
    return folder.path


def resumed_step(options, fingerprint="d1"):
    """Open the folder again; the step from which it goes on, None for a fresh start."""
    _, checkpoint = open_folder(options, fingerprint)
    return checkpoint and checkpoint["step"]


def change_saved_options(folder, **changed):
    """Change options in a checkpoint, as a run of another version had them; None: it had none."""
    saved = load_torch(folder / "checkpoint.pth")
    for name, value in changed.items():
        saved["options"][name] = value
        if value is None:
            del saved["options"][name]
    save_torch(saved, folder / "checkpoint.pth")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --------------------------------------------------------------------------- what may be continued


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"workers": 3},
        {"device": "cpu"},
        {"log_every": 7},
        {"data": "the/same/elsewhere"},
        {"epochs": 3},
        {"epochs": 3, "workers": 3, "debug": True},
    ],
    ids=str,
)
def test_resumes(options, changed, caplog):
    caplog.set_level("INFO", logger="ssrl")
    folder = stop_in(options)
    (folder / "kept").touch()
    assert resumed_step(replace(options, **changed)) == 3
    assert (folder / "kept").exists()
    for name in changed.keys() - {"debug"}:
        assert f"resume: {name} " in caplog.text or "the same data at the/same" in caplog.text


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"lr": 0.1}, "(lr: 0.5 -> 0.1)"),
        ({"epochs": 1}, "(epochs: 2 -> 1)"),
        ({"epochs": 3, "lr": 0.1}, "(lr: 0.5 -> 0.1)"),
        ({"scale": (0.5, 1.0)}, "(scale: [0.4, 1.0] -> [0.5, 1.0])"),
        ({"seed": 1, "arch": "vit_nano"}, "(seed: 0 -> 1; arch: vit_small -> vit_nano)"),
        ({"resume": "never"}, "(resume: never, and a run is there)"),
    ],
    ids=str,
)
def test_other_options_are_refused_and_listed(options, changed, expected):
    folder = stop_in(options)
    before = contents(folder)
    with pytest.raises(InputError) as caught:
        resumed_step(replace(options, **changed))
    found = str(caught.value)
    for words in ("run holds another run", "--output-dir", "--overwrite"):
        assert words in found
    assert set(expected[1:-1].split("; ")) == set(found.partition("(")[2].split(")")[0].split("; "))
    assert contents(folder) == before


def test_another_number_of_processes_makes_another_step(options):
    stop_in(options)
    folder = RunFolder.choose(options, None, "x")

    class TwoProcesses(Processes):
        def agree(self, value, what):
            pass

    two = TwoProcesses(torch.device("cpu"), rank=0, world=2)
    with pytest.raises(InputError, match="processes: 1 -> 2"):
        folder.find_checkpoint(options, "d1", RESUMABLE, two)


def test_other_photographs_are_refused(options):
    stop_in(options, fingerprint="d1")
    with pytest.raises(InputError, match=r"\(data: other photographs, grades or splits\)"):
        resumed_step(options, fingerprint="d2")


def test_looking_for_a_checkpoint_writes_nothing(options):
    folder = stop_in(options)
    (folder / "log.jsonl").write_text('{"step": 9}\n{"st')
    (folder / "config.yaml").unlink()
    before = contents(folder)
    found = RunFolder.choose(options, None, "x")
    assert found.find_checkpoint(options, "d1", RESUMABLE, ONE)["step"] == 3
    assert contents(folder) == before
    absent = RunFolder(Path("absent"))
    assert absent.find_checkpoint(options, "d1", RESUMABLE, ONE) is None
    assert not absent.path.exists()


def test_processes_are_asked_whether_they_see_the_same_step(options):
    asked = []

    class Asked(Processes):
        def agree(self, value, what):
            asked.append((value, what))

    asking = Asked(torch.device("cpu"))
    folder = RunFolder.choose(options, None, "x")
    folder.find_checkpoint(options, "d1", RESUMABLE, asking)
    stop_in(options)
    folder.find_checkpoint(options, "d1", RESUMABLE, asking)
    assert asked == [(-1, "the step of run/checkpoint.pth"), (3, "the step of run/checkpoint.pth")]


def test_an_option_that_came_later_has_its_default(options):
    folder = stop_in(options)
    change_saved_options(folder, koleo_weight=None, mean=None)
    assert resumed_step(options) == 3
    with pytest.raises(InputError, match="koleo_weight: 0.0 -> 0.1"):
        resumed_step(replace(options, koleo_weight=0.1))


def test_an_option_that_is_no_more_is_not_compared(options):
    folder = stop_in(options)
    change_saved_options(folder, jitter=0.3)
    assert resumed_step(options) == 3


def test_an_option_that_is_left_open_is_not_compared(options):
    folder = stop_in(replace(options, mean=(0.1, 0.2, 0.3)))
    opened, checkpoint = open_folder(options)
    assert checkpoint["step"] == 3
    assert opened.options["mean"] == [0.1, 0.2, 0.3]  # for the checkpoints to come
    again, _ = utils.parse(TrainingOptions, ["--config", str(folder / "config.yaml")])
    assert again.mean == (0.1, 0.2, 0.3), "so that --config repeats the run"
    with pytest.raises(InputError, match=r"mean: \[0.1, 0.2, 0.3\] -> \[0.5\]"):
        resumed_step(replace(options, mean=(0.5,)))


def test_old_checkpoints_may_hold_tuples(options):
    folder = stop_in(options)
    change_saved_options(folder, scale=(0.4, 1.0))
    assert resumed_step(options) == 3


# ----------------------------------------------------------------------------------- files of a run


def test_overwrite_starts_anew(options):
    folder = stop_in(options)
    (folder / "old.png").touch()
    assert resumed_step(replace(options, overwrite=True, lr=0.1), fingerprint="d2") is None
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "log.jsonl"]


def test_overwrite_spares_a_folder_that_is_no_run(options):
    precious = Path("run/thesis.txt")
    precious.parent.mkdir()
    precious.write_text("three years")
    with pytest.raises(InputError, match="--overwrite: run holds no run"):
        resumed_step(replace(options, overwrite=True))
    assert precious.read_text() == "three years"


def test_overwrite_takes_an_empty_folder_and_none_at_all(options):
    assert resumed_step(replace(options, overwrite=True, output_dir="absent")) is None
    Path("empty").mkdir()
    assert resumed_step(replace(options, overwrite=True, output_dir="empty")) is None


def test_only_the_main_process_clears_and_writes(options, monkeypatch):
    folder = stop_in(options)
    before = contents(folder)
    monkeypatch.setattr(Processes, "barrier", lambda self: None)
    second = Processes(torch.device("cpu"), rank=1, world=1)
    RunFolder(folder).clear(second)
    opened = RunFolder(folder)
    opened.begin(replace(options, lr=0.1), "d2", None, second)
    assert contents(folder) == before
    assert (opened.options["lr"], opened.fingerprint) == (0.1, "d2")


def test_fresh_folder_says_how_it_came_about(options):
    folder = stop_in(options, fingerprint="fingerprint")
    first = json.loads((folder / "log.jsonl").read_text().splitlines()[0])
    assert first["data"] == "fingerprint"
    assert first["options"]["lr"] == 0.5 and first["options"]["processes"] == 1
    assert {"command", "versions"} <= first.keys()
    again, _ = utils.parse(TrainingOptions, ["--config", str(folder / "config.yaml")])
    assert again == replace(options, output_dir="")


def test_a_run_without_its_checkpoint_is_not_started_over(options):
    folder = stop_in(options)
    (folder / "checkpoint.pth").unlink()
    assert resumed_step(replace(options, lr=0.1)) is None  # it had come to no step
    first, *more = (folder / "log.jsonl").read_text().splitlines()
    assert json.loads(first)["options"]["lr"] == 0.1 and not more
    with (folder / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": 4, "loss": 1.0}) + "\n")
    with pytest.raises(InputError, match="without its checkpoint.pth"):
        resumed_step(options)
    assert resumed_step(replace(options, overwrite=True)) is None


def test_a_file_in_the_place_of_a_folder(options):
    Path("taken").touch()
    with pytest.raises(InputError, match="taken: is no folder but a file"):
        resumed_step(replace(options, output_dir="taken"))


def test_log_goes_back_to_the_checkpoint(options):
    """A crash after step 5 with the state saved at 3, in the middle of a line."""
    log = stop_in(options, step=3) / "log.jsonl"
    first = log.read_text()
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, 6)]
    log.write_text(first + "".join(lines) + '{"step": 6, "lo')
    assert resumed_step(options) == 3
    assert log.read_text() == first + "".join(lines[:3])


def test_a_line_that_lost_only_its_end_is_ended(options):
    """The next record must not follow on the same line."""
    log = stop_in(options, step=3) / "log.jsonl"
    first = log.read_text()
    log.write_text(first + '{"step": 3}')
    assert resumed_step(options) == 3
    assert log.read_text() == first + '{"step": 3}\n'


def test_config_tells_the_epochs_that_a_resumed_run_has(options):
    folder = stop_in(options)
    assert resumed_step(replace(options, epochs=5)) == 3
    again, _ = utils.parse(TrainingOptions, ["--config", str(folder / "config.yaml")])
    assert again.epochs == 5


def test_names_of_folders(options, tmp_path):
    options = replace(options, output_dir="")
    named = replace(options, output_dir="a/b")
    assert RunFolder.choose(named, None, "x").path == Path("a/b")
    assert RunFolder.choose(options, None, "eyepacs").path == Path("runs/eyepacs")
    assert RunFolder.choose(options, Path("configs/demo.yaml"), "x").path == Path("runs/demo")

    config = tmp_path / "runs" / "first" / "config.yaml"
    config.parent.mkdir(parents=True)
    relative = Path("runs/first/config.yaml")
    assert RunFolder.choose(options, relative, "x").path == Path("runs/first-2")
    Path("runs/first-2").mkdir()
    assert RunFolder.choose(options, config, "x").path == Path("runs/first-3")


# ------------------------------------------------------------------------------------- torch files


def written(path, content):
    """Write with torch.save, as DINO does."""
    torch.save(content, path)
    return path


def pickled_under(names, content, path):
    """Write a torch file in which classes have other names, as other Pythons give them."""
    torch.save(content, path)
    changed = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(changed, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                for before, after in names.items():
                    assert before in data
                    data = data.replace(before, after)
            new.writestr(entry, data)
    path.write_bytes(changed.getvalue())
    return path


ARGUMENTS = argparse.Namespace(output_dir=pathlib.PosixPath("runs/dino"), epochs=100)


@pytest.mark.skipif(os.name != "posix", reason="another system cannot make such a path")
@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_paths_among_the_arguments_of_dino(tmp_path, module):
    content = {"student": {"w": torch.ones(2)}, "args": ARGUMENTS}
    names = {b"cpathlib\nPosixPath\n": f"c{module}\nPosixPath\n".encode()}
    found = load_torch(pickled_under(names, content, tmp_path / "dino.pth"))
    assert found["args"].output_dir == pathlib.PurePosixPath("runs/dino")
    assert found["args"].epochs == 100
    assert torch.equal(found["student"]["w"], torch.ones(2))


@pytest.mark.skipif(os.name != "posix", reason="another system cannot make such a path")
@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_paths_of_windows(tmp_path, module):
    names = {b"cpathlib\nPosixPath\n": f"c{module}\nWindowsPath\n".encode()}
    content = {"args": argparse.Namespace(output_dir=pathlib.PosixPath("runs"))}
    found = load_torch(pickled_under(names, content, tmp_path / "dino.pth"))
    assert found["args"].output_dir == pathlib.PureWindowsPath("runs")


def test_pure_paths_and_ordered_dicts(tmp_path):
    content = collections.OrderedDict(
        posix=pathlib.PurePosixPath("a/b"), windows=pathlib.PureWindowsPath("C:\\a")
    )
    assert load_torch(written(tmp_path / "pure.pth", content)) == content


@pytest.mark.parametrize("value", [np.float64(0.5), np.float32(0.5), np.int64(3)], ids=repr)
def test_numpy_scalars(tmp_path, value):
    assert load_torch(written(tmp_path / "scalar.pth", {"best": value}))["best"] == value


class Code:
    """Runs a command when it is unpickled the usual way."""

    def __reduce__(self):
        return os.system, ("touch ran",)


class OtherClass:
    """A class of ours: harmless, and not allowed all the same."""


class Unlink:
    """Asks a method of a path, which would delete a file."""

    def __reduce__(self):
        return pathlib.Path.unlink, (pathlib.PurePosixPath("victim"),)


@pytest.mark.parametrize(
    "content",
    [
        Code(),
        OtherClass(),
        Unlink(),
        collections.ChainMap({"a": 1}),
        {"args": argparse.Namespace(hook=Code())},
        {"path": pathlib.PurePosixPath("a"), "function": os.remove},
    ],
    ids=["command", "class", "method", "mapping", "nested", "function"],
)
def test_code_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    Path("victim").touch()
    path = written(Path("evil.pth"), content)
    with pytest.raises(InputError, match="evil.pth: holds more than weights and is refused"):
        load_torch(path)
    assert not Path("ran").exists() and Path("victim").exists()


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("ran.txt"),)


def test_code_in_a_file_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"teacher": {"w": torch.ones(2)}, "args": Evil()}, "new.pth")
    torch.save({"args": Evil()}, "old.pth", _use_new_zipfile_serialization=False)
    Path("plain.pth").write_bytes(pickle.dumps(Evil()))
    for name in ("new.pth", "old.pth", "plain.pth"):
        with pytest.raises(InputError, match=name):
            load_torch(Path(name))
    assert not Path("ran.txt").exists()
    torch.load("new.pth", weights_only=False)
    assert Path("ran.txt").exists()  # it would have


def test_files_of_dino_load(tmp_path):
    arguments = argparse.Namespace(arch="vit_small", lr=5e-4, scale=(0.4, 1.0), clip=None)
    content = {
        "student": {"module.w": torch.arange(3.0)},
        "args": arguments,
        "epoch": 3,
        "loss": np.float64(1.5),
        "accuracy": np.float32(0.5),
        "count": np.int64(4),
    }
    path = tmp_path / "dino.pth"
    torch.save(content, path)
    older = tmp_path / "older.pth"  # as numpy 1 names its scalars
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(older, "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name).replace(b"numpy._core.", b"numpy.core."))
    torch.save(content, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    for file in (path, older, tmp_path / "legacy.pth"):
        loaded = load_torch(file)
        assert loaded["args"] == arguments and loaded["epoch"] == 3
        assert (loaded["loss"], loaded["accuracy"], loaded["count"]) == (1.5, 0.5, 4)
        torch.testing.assert_close(loaded["student"]["module.w"], torch.arange(3.0))


@pytest.mark.parametrize("kept", [0, 4, 100, 600, -1])
def test_cut_off_files_are_named(tmp_path, kept):
    path = tmp_path / "cut.pth"
    torch.save({"w": torch.arange(200.0)}, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match="cut.pth"):
        load_torch(path)


@pytest.mark.parametrize("text", ["<!DOCTYPE html>", "version https://git-lfs.github.com/spec/v1"])
def test_what_is_no_weights_is_not_called_dangerous(tmp_path, text):
    path = tmp_path / "page.pth"
    path.write_text(text)
    with pytest.raises(InputError, match="page.pth") as caught:
        load_torch(path)
    assert "run its code" not in str(caught.value)


def test_missing_file_and_folder_are_named(tmp_path):
    for path in (tmp_path / "absent.pth", tmp_path):
        with pytest.raises(InputError, match=path.name):
            load_torch(path)


def test_flipped_bits_are_found(tmp_path):
    path, rng = tmp_path / "flipped.pth", random.Random(0)
    tensor = torch.arange(50.0)
    torch.save({"w": tensor, "step": 3}, path)
    good = path.read_bytes()
    refused = 0
    for _ in range(400):
        data = bytearray(good)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            loaded = load_torch(path)
        except InputError as error:
            assert "flipped.pth" in str(error)
            refused += 1
        else:  # a bit that means nothing
            assert loaded["step"] == 3 and torch.equal(loaded["w"], tensor)
    assert refused > 50


def test_failing_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    save_torch({"step": 1}, path)

    def full(state, target):
        Path(target).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError):
        save_torch({"step": 2}, path)
    assert load_torch(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pth"]


# ------------------------------------------------------------------------------------- the progress


@pytest.fixture
def no_events(monkeypatch):
    """TensorBoard as if it were not installed: seconds to import."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)


def log_lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


class Clock:
    """A clock that stands still unless it is moved."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(run_folder, "time", clock)
    return clock


def test_progress_writes_json_lines(tmp_path, no_events):
    progress = Progress(tmp_path, 2, 6, 8, is_main=True)
    progress.count_step(3, 0.0)
    progress.count_step(4, 0.0)
    progress.log_interval({"lr": 0.1, "loss": torch.tensor(2.0), "skipped": 1}, 2.0)
    progress.count_step(5, 0.0)
    progress.record({"rankme": 3.5})
    progress.close()
    first, second = log_lines(tmp_path)
    assert list(first) == ["step", "epoch", "lr", "loss", "skipped", "images_per_s", "data_wait"]
    assert (first["step"], first["epoch"], first["lr"]) == (4, 2.0, 0.1)
    assert (first["loss"], first["skipped"]) == (2.0, 1)
    assert first["images_per_s"] > 0 and first["data_wait"] == 0
    assert second == {"step": 5, "rankme": 3.5}
    assert progress.latest == {name: first[name] for name in first if name != "step"}


def test_speed_is_that_of_the_interval(tmp_path, no_events, clock):
    """3 steps of 8 images in 6 seconds; then 1 in 2, while 100 others do not count."""
    progress = Progress(tmp_path, 0, 9, 8, is_main=True)
    for step in (1, 2, 3):
        clock.now += 2
        progress.count_step(step, 0.5)
    progress.log_interval({"loss": 1.0}, 0.5)
    clock.now += 1
    with progress.not_counted():
        clock.now += 100
    clock.now += 1
    progress.count_step(4, 1.5)
    progress.log_interval({"loss": 1.0}, 0.5)
    first, second = log_lines(tmp_path)
    assert (first["images_per_s"], first["data_wait"]) == (4.0, 0.25)
    assert (second["images_per_s"], second["data_wait"]) == (4.0, 0.75)


def test_lines_are_shown_twice_a_minute_and_at_the_end_of_epochs(
    tmp_path, no_events, clock, caplog
):
    caplog.set_level("INFO", logger="ssrl")
    progress = Progress(tmp_path, 0, 100, 8, is_main=True)
    assert progress._bar.disable  # the tests' output is no terminal
    for step in range(1, 5):
        clock.now += 16
        progress.count_step(step, 0.0)
        progress.log_interval({"loss": 2.0, "other": 3.0}, step / 4)
    progress.record({"rankme": 3.5, "epoch": 1})
    shown = [record.getMessage() for record in caplog.records]
    speed = "images_per_s 0.5, data_wait 0"
    assert shown == [
        f"step 1/100: epoch 0.25, loss 2, {speed}, 1584 s left",
        f"step 3/100: epoch 0.75, loss 2, {speed}, 1552 s left",
        "step 4/100: rankme 3.5, 1536 s left",
    ]


def test_scores_stay_beside_the_bar(tmp_path, no_events, monkeypatch):
    shown = []
    progress = Progress(tmp_path, 0, 100, 8, is_main=True)
    monkeypatch.setattr(progress._bar, "set_postfix_str", shown.append)
    scores = {"knn_accuracy": 0.5, "knn_majority": 0.25, "knn_qwk": 0.125}
    progress.record({"rankme": 3.5} | scores)
    progress.record({"loss": 2.0})
    assert shown == ["loss 2, val k-NN 0.500 (majority 0.250), qwk 0.125"]


def test_an_undefined_qwk_is_shown_as_a_dash(tmp_path, no_events, monkeypatch, caplog):
    shown = []
    progress = Progress(tmp_path, 0, 100, 8, is_main=True)
    monkeypatch.setattr(progress._bar, "set_postfix_str", shown.append)
    scores = {"knn_accuracy": 0.5, "knn_majority": 0.25, "knn_qwk": None}
    with caplog.at_level("INFO"):
        progress.record({"rankme": 3.5} | scores)
    progress.record({"loss": 2.0})
    assert shown == ["loss 2, val k-NN 0.500 (majority 0.250), qwk -"]
    assert "knn_majority 0.25, knn_qwk -" in caplog.text
    line = json.loads((tmp_path / "log.jsonl").read_text("utf-8").splitlines()[0])
    assert line["knn_qwk"] is None


def test_numbers_go_to_tensorboard_where_it_is_installed(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder):
            written.append(folder)

        def add_scalar(self, *scalar):
            written.append(scalar)

        def close(self):
            written.append("closed")

    tensorboard = type(sys)("tensorboard")
    tensorboard.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    progress = Progress(tmp_path, 0, 6, 8, is_main=True)
    progress.count_step(1, 0.0)
    progress.record({"loss": 2.0, "skipped": 1, "collapse": "none"})
    progress.close()
    assert written == [str(tmp_path), ("loss", 2.0, 1), "closed"]


def test_only_the_main_process_writes(tmp_path):
    progress = Progress(tmp_path, 0, 6, 8, is_main=False)
    progress.count_step(1, 0.0)
    progress.log_interval({"loss": 1.0}, 0.1)
    progress.record({"rankme": 3.5})
    progress.close()
    assert not list(tmp_path.iterdir())
    assert progress.latest["loss"] == 1.0


# ------------------------------------------------------------------------------------- the versions


def test_versions_tell_the_libraries():
    began = time.monotonic()
    found = run_folder.versions()
    assert time.monotonic() - began < 30
    assert torch.__version__.startswith(found["torch"])
    assert {"python", "timm", "numpy", "device", "commit"} <= found.keys()
    json.dumps(found)


def test_commit_tells_whether_files_differ(tmp_path, monkeypatch):
    environment = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(run_folder, "HERE", tmp_path)
    assert run_folder.commit() == ""  # no checkout

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        answer = subprocess.run(command, check=True, capture_output=True, text=True)
        return answer.stdout.strip()

    (tmp_path / "file").write_text("one")
    git("init", "-q")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    head = git("rev-parse", "HEAD")
    assert run_folder.commit() == head
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "new.json").touch()
    assert run_folder.commit() == head
    (tmp_path / "file").write_text("two")
    assert run_folder.commit() == f"{head}-modified"
    monkeypatch.setenv("PATH", "")
    assert run_folder.commit() == ""  # no git
