"""Whole runs: what they write, resuming, several processes, signals.

Run with `python -m pytest tests/test_ssrl_runs.py`. Two runs are equal when the losses in their
logs and every number of their checkpoints are.
"""

import json
import math
import operator
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import helpers
import pytest
import torch
from conftest import child_environment, tiny_flags
from PIL import Image
from safetensors.torch import load_file
from test_ssrl import flat, same

import SSRL
from features import Signatures
from fundus.manifest import read_manifest
from run_folder import load_torch
from utils import HERE, Diverged, InputError, Stopped
from weights import load_backbone, read_weights

pytestmark = pytest.mark.usefixtures("handlers")


def trained(folder, keys=("student", "teacher", "optimizer", "center", "step")):
    """Leaves of the newest checkpoint, and the loss of every step."""
    saved = load_torch(Path(folder) / "checkpoint.pth")
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    losses = {}
    for line in lines:
        for name in ("loss", "lesion", "local"):  # a run has one of them or several
            if name in line:
                losses[line["step"]] = line[name]
    return flat({key: saved[key] for key in keys}), losses


def assert_same_run(one, other):
    (weights, losses), (others, other_losses) = trained(one), trained(other)
    assert losses == other_losses and weights.keys() == others.keys()
    for name, value in weights.items():
        equal = torch.equal if torch.is_tensor(value) else operator.eq
        assert equal(value, others[name]), name


@pytest.fixture(scope="module")
def whole(prepared, tmp_path_factory):
    """The folder of a finished run of 10 steps with drop path, and its options."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    flags = tiny_flags(prepared, output_dir=folder, drop_path=0.1, knn_every=1, keep_every=1)
    options, _ = SSRL.utils.parse(SSRL.Options, flags)
    SSRL.main(options, None)
    return folder, options


def test_files_of_a_run(whole):
    folder, options = whole
    names = {"config.yaml", "log.jsonl", "checkpoint.pth", "backbone.safetensors", "crops.png"}
    names |= {"seen.npz"}
    names |= {f"checkpoint-{epoch:04d}.pth" for epoch in (0, 1, 2)} | {"checkpoint-best.pth"}
    assert names == {p.name for p in folder.iterdir() if not p.name.startswith("events")}
    saved = torch.load(folder / "checkpoint.pth", weights_only=True)
    allowed = (torch.Tensor, int, float, str, type(None))
    assert all(isinstance(leaf, allowed) for leaf in flat(saved).values())
    backbone, teacher = load_file(folder / "backbone.safetensors"), saved["teacher"]
    assert same(backbone, {k[9:]: v for k, v in teacher.items() if k.startswith("backbone.")})
    with Image.open(folder / "crops.png") as sheet:
        assert sheet.size == (4 * 32, 8 * 32)
    kept = [load_torch(folder / f"checkpoint-{epoch:04d}.pth")["step"] for epoch in (0, 1, 2)]
    assert kept == [0, 5, 10] and saved["step"] == 10
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines if "loss" in r] == list(range(1, 11))
    assert [r["epoch"] for r in lines if "rankme" in r] == [0, 1, 2]
    assert all(0 <= r["knn_accuracy"] <= 1 for r in lines if "rankme" in r)
    assert all(math.isfinite(v) for r in lines for v in r.values() if isinstance(v, float))


@pytest.mark.parametrize("said", [{"init": "{}"}, {"distill": "{}"}], ids=str)
def test_a_run_remembers_what_it_and_its_start_were_trained_on(whole, tiny, tmp_path, said):
    folder, options = whole
    own = read_manifest(options.data)
    seen = Signatures.load(folder / "seen.npz")
    assert seen.paths == [record.path for record in own.split("train")]
    assert seen.sha256 == [record.sha256 for record in own.split("train")]
    assert seen.looks.shape == (len(seen.paths), 64 * 64)
    assert seen.looks.any()

    other = helpers.draw_prepared(tmp_path / "other", seed=3)
    said = {name: value.format(folder) for name, value in said.items()}
    SSRL.main(tiny(data=str(other.root), output_dir="next", **said), None)
    both = Signatures.load(Path("next/seen.npz"))
    assert both.paths == [record.path for record in other.split("train")] + seen.paths


def test_finished_run_stays_as_it_is(whole, caplog):
    folder, options = whole
    before = {p.name: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.iterdir()}
    with caplog.at_level("INFO", logger="ssrl"):
        SSRL.main(options, None)
    assert "finished" in caplog.text
    assert before == {p.name: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.iterdir()}


@pytest.mark.parametrize(("stop", "workers"), [(3, 1), (5, 0), (7, 3)])
def test_stopped_and_resumed_is_uninterrupted(whole, tiny, monkeypatch, stop, workers):
    """Bit for bit, with another number of workers, in the middle of an epoch and at its end."""
    options = replace(whole[1], output_dir="run", save_minutes=1e9)
    real = SSRL.train_step

    def step_then_signal(state, *arguments):
        measured = real(state, *arguments)
        if state.step == stop:
            signal.raise_signal(signal.SIGTERM)
        return measured

    monkeypatch.setattr(SSRL, "train_step", step_then_signal)
    with pytest.raises(Stopped, match=f"step {stop}"):
        SSRL.main(options, None)
    assert load_torch(Path("run/checkpoint.pth"))["step"] == stop
    monkeypatch.setattr(SSRL, "train_step", real)
    SSRL.main(replace(options, workers=workers), None)
    assert_same_run("run", whole[0])


def test_a_run_that_looks_for_lesions_resumes_and_is_read_back(tiny, monkeypatch):
    """Bit for bit, statistics of batch norm and all; evaluations see whole photographs larger."""
    changed = {"stem": "conv", "lesion_weight": 1.0, "image_size": 64, "distillation_weight": 0.0}
    changed |= {"local_crops_number": 0, "save_minutes": 1e9}
    SSRL.main(tiny(output_dir="uninterrupted", **changed), None)
    real = SSRL.train_step

    def step_then_signal(state, *arguments):
        measured = real(state, *arguments)
        if state.step == 7:
            signal.raise_signal(signal.SIGTERM)
        return measured

    monkeypatch.setattr(SSRL, "train_step", step_then_signal)
    with pytest.raises(Stopped, match="step 7"):
        SSRL.main(tiny(**changed), None)
    monkeypatch.setattr(SSRL, "train_step", real)
    SSRL.main(tiny(workers=1, **changed), None)
    assert_same_run("run", "uninterrupted")

    weights = read_weights("run")
    assert (weights.spec.stem, weights.spec.image_size) == ("conv", 64)
    teacher = load_torch(Path("run/checkpoint.pth"))["teacher"]
    for name, value in load_backbone(weights).state_dict().items():
        assert torch.equal(value, teacher[f"backbone.{name}"])
    lines = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "lesion" in line] == list(range(1, 11))
    with pytest.raises(InputError, match="expected .*--stem conv"):
        SSRL.main(tiny(output_dir="next", init="run"), None)


@pytest.mark.parametrize(
    "changed, found, kept",
    [
        ({"log_every": 3}, 3, 0),
        ({"log_every": 100}, 5, 0),  # at the end of the epoch
        ({"log_every": 100, "save_minutes": 0.0}, 2, 1),  # each step is saved
    ],
    ids=["log", "epoch", "save"],
)
def test_what_a_gpu_tells_late_is_found_before_it_is_logged_or_saved(
    tiny, monkeypatch, changed, found, kept
):
    """A loss of step 2 that is not finite and is not asked for at once; an epoch has 5 steps."""
    o, finite, distill = tiny(**changed), SSRL.check_finite, []
    monkeypatch.setattr(SSRL, "check_finite", lambda v, step: len(v) == 1 or finite(v, step))
    real = SSRL.losses.distillation_loss

    def spoilt(*arguments):
        distill.append(None)
        return real(*arguments) * (float("nan") if len(distill) == 2 else 1)

    monkeypatch.setattr(SSRL.losses, "distillation_loss", spoilt)
    with pytest.raises(Diverged, match=f"step {found}"):
        SSRL.main(o, None)
    assert load_torch(Path("run/checkpoint.pth"))["step"] == kept
    assert not trained("run")[1]


def test_every_epoch_ends_with_a_line_of_the_log(tiny):
    """So a short trial shows its losses, and a collapse is judged by losses of that epoch."""
    SSRL.main(tiny(log_every=100, koleo_weight=0.1), None)
    lines = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines if "loss" in r and "koleo" in r] == [5, 10]


def test_what_cannot_start_writes_and_deletes_nothing(tiny):
    """Weights are read late, when data and folder have been found good."""
    Path("broken.pth").write_bytes(b"no weights")
    with pytest.raises(InputError, match="broken.pth"):
        SSRL.main(tiny(init="broken.pth"), None)
    assert not Path("run").exists()

    SSRL.main(tiny(epochs=1), None)
    before = {path.name: path.stat().st_mtime_ns for path in Path("run").iterdir()}
    with pytest.raises(InputError, match="broken.pth"):
        SSRL.main(tiny(init="broken.pth", overwrite=True), None)
    assert before == {path.name: path.stat().st_mtime_ns for path in Path("run").iterdir()}


def test_a_photograph_that_cannot_be_read_does_not_end_a_run(tiny, tmp_path, caplog):
    """Neither where training takes it, nor where it is looked at between epochs."""
    manifest = helpers.draw_prepared(tmp_path / "set", train=40, val=10, test=1)
    for split in ("train", "val"):
        path = tmp_path / "set" / manifest.split(split)[0].path
        path.write_bytes(path.read_bytes()[:50])
    SSRL.main(tiny(data=str(tmp_path / "set"), knn_every=1, max_bad=0.1), None)
    lines = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in lines if "knn_qwk" in r] == [0, 1, 2]
    assert "1 photographs cannot be read" in caplog.text
    with pytest.raises(InputError, match="damaged or cut off"):
        SSRL.main(tiny(data=str(tmp_path / "set"), max_bad=0.0, overwrite=True), None)


def test_compile_is_refused_on_a_cpu_before_anything_is_deleted(tiny):
    o = tiny(epochs=1)
    SSRL.main(o, None)
    before = sorted(p.name for p in Path("run").iterdir())
    with pytest.raises(InputError, match="--compile"):
        SSRL.main(replace(o, compile=True, overwrite=True), None)
    assert sorted(p.name for p in Path("run").iterdir()) == before


def test_more_epochs_continue_a_finished_run(tiny):
    o = tiny(epochs=1)
    SSRL.main(o, None)
    SSRL.main(replace(o, epochs=2), None)
    assert load_torch(Path("run/checkpoint.pth"))["step"] == 10


@pytest.mark.parametrize(
    "changed",
    [
        {"local_crops_number": 0},
        {"use_bn_in_head": True},
        {"patch_weight": 1.0},
        {"patch_weight": 1.0, "centering": "sinkhorn", "use_bn_in_head": True},
        {"lesion_weight": 1.0},
        {"lesion_weight": 1.0, "patch_weight": 1.0, "koleo_weight": 0.1, "stem": "conv"},
        {"local_weight": 1.0, "distillation_weight": 0.0, "local_crops_number": 0},
        {"local_weight": 1.0, "distill": "drawn", "patch_weight": 1.0},
    ],
    ids=str,
)
def test_variants_train(tiny, changed):
    SSRL.main(tiny(epochs=1, **changed), None)
    losses = trained("run")[1]
    assert len(losses) == 5 and all(map(math.isfinite, losses.values()))


# ------------------------------------------------------------------------- other processes, signals

SEVERAL = """
import contextlib, sys
sys.modules["torch.utils.tensorboard"] = None
import SSRL, devices, utils
with devices.process_group("cpu") as processes:
    devices.process_group = lambda device: contextlib.nullcontext(processes)
    for flags in open("runs.txt"):
        try:
            SSRL.main(utils.parse(SSRL.Options, flags.split())[0], None)
        except utils.InputError as error:
            print("refused:", error)
"""


@pytest.fixture(scope="module")
def launched(prepared, tmp_path_factory):
    """A folder in which two processes trained over gloo, and what they printed."""
    folder, lines = tmp_path_factory.mktemp("launched"), []
    flags = tiny_flags(prepared, epochs=1, output_dir=folder / "grown")
    SSRL.main(SSRL.utils.parse(SSRL.Options, flags)[0], None)  # begun by one process
    lines.append(tiny_flags(prepared, epochs=4, output_dir="grown"))
    for centering in ("mean", "sinkhorn"):
        changed = {"centering": centering, "batch_size": 4, "output_dir": centering}
        lines.append(tiny_flags(prepared, epochs=4, warmup_epochs=0, **changed))
    (folder / "runs.txt").write_text("\n".join(map(" ".join, lines)))
    (folder / "several.py").write_text(SEVERAL)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "several.py"]
    environment = child_environment(PYTHONPATH=str(HERE))
    done = subprocess.run(
        [sys.executable, *launcher], cwd=folder, env=environment, capture_output=True, timeout=200
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return folder, done.stdout.decode()


@pytest.mark.parametrize("centering", ["mean", "sinkhorn"])
def test_two_processes_are_one(launched, tiny, centering):
    """20 steps with the same global batch."""
    SSRL.main(tiny(epochs=4, warmup_epochs=0, centering=centering, output_dir="one"), None)
    (one, losses), (two, other_losses) = trained("one"), trained(launched[0] / centering)
    assert len(losses) == 20 and other_losses == pytest.approx(losses, rel=1e-4)
    for name, value in one.items():
        if name.startswith(("/student", "/teacher", "/center")):
            torch.testing.assert_close(two[name], value, atol=1e-4, rtol=1e-3, msg=name)


def test_another_global_batch_does_not_resume(launched):
    """The number of a step would mean other photographs, another epoch and learning rate."""
    folder, printed = launched
    assert "refused: grown" in printed
    assert load_torch(folder / "grown" / "checkpoint.pth")["step"] == 5


@pytest.mark.parametrize("whom", ["process", "group"])
def test_sigterm_saves_and_exits_75(prepared, tmp_path, whom):
    """To the process alone, and to its workers too, as schedulers and torchrun send it."""
    flags = tiny_flags(prepared, output_dir="run", epochs=2000, workers=2, save_minutes=1e9)
    code = "import sys; sys.modules['torch.utils.tensorboard'] = None; import SSRL, utils;"
    code += "utils.run_main(SSRL.main, SSRL.Options)"
    with subprocess.Popen(
        [sys.executable, "-c", code, *flags],
        cwd=tmp_path,
        env=child_environment(PYTHONPATH=str(HERE)),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as child:
        try:
            log, limit = tmp_path / "run" / "log.jsonl", time.monotonic() + 120
            while not (log.is_file() and '"loss"' in log.read_text()):
                assert child.poll() is None and time.monotonic() < limit, child.stderr.read()
                time.sleep(0.1)
            (os.kill if whom == "process" else os.killpg)(child.pid, signal.SIGTERM)
            message = child.communicate(timeout=60)[1]
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
    assert child.returncode == 75, message[-2000:]
    assert "Traceback" not in message and "saved" in message
    assert load_torch(tmp_path / "run" / "checkpoint.pth")["step"] > 0


def test_batch_larger_than_the_set_is_refused(tiny):
    with pytest.raises(InputError, match="--batch-size"):
        SSRL.main(tiny(batch_size=41), None)
    assert not Path("run").exists()
