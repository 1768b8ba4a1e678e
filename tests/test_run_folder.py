"""Checkpoints, run folders, devices, progress. Run with `python -m pytest tests/test_runs.py`."""

import io
import json
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from conftest import tiny_values

import devices
import run_folder
import SSRL
import utils
from devices import Processes
from run_folder import RunFolder, load_torch, save_torch
from utils import InputError

ONE = Processes(torch.device("cpu"))


@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder, "versions", dict)
    return SSRL.Options(**tiny_values("photographs"))


def stop_in(o, data="d1", step=3):
    """Leave a run folder as a stopped run does."""
    folder = RunFolder.of(o, None, "x")
    assert folder.open(o, data, SSRL.RESUMABLE, ONE) is None
    content = {"step": step, "options": folder.options, "data": folder.data}
    save_torch(content, folder.path / "checkpoint.pth")
    return folder.path


def reopen(o, data="d1"):
    return RunFolder.of(o, None, "x").open(o, data, SSRL.RESUMABLE, ONE)


# --------------------------------------------------------------------------- what may be continued


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"workers": 3},
        {"device": "auto"},
        {"log_every": 7},
        {"save_minutes": 1.0},
        {"keep_every": 5},
        {"knn_every": 5},
        {"data": "the/same/elsewhere"},
        {"epochs": 3},
        {"epochs": 3, "workers": 3, "debug": True},
    ],
    ids=str,
)
def test_resumes(options, changed):
    folder = stop_in(options)
    (folder / "kept").touch()
    assert reopen(replace(options, **changed))["step"] == 3
    assert (folder / "kept").exists()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"lr": 0.1}, ["lr: 0.0005 -> 0.1"]),
        ({"epochs": 1}, ["epochs: 2 -> 1"]),
        ({"epochs": 3, "batch_size": 4}, ["batch_size: 8 -> 4"]),
        ({"global_crops_scale": (0.5, 1.0)}, ["global_crops_scale"]),
        ({"seed": 1, "arch": "vit_nano"}, ["seed: 0 -> 1", "arch: vit_pico -> vit_nano"]),
        ({"resume": "never"}, ["never"]),
    ],
    ids=str,
)
def test_other_options_are_refused_and_listed(options, changed, told):
    folder = stop_in(options)
    with pytest.raises(InputError) as caught:
        reopen(replace(options, **changed))
    message = str(caught.value)
    assert not [words for words in [*told, "run", "--overwrite"] if words not in message], message
    assert load_torch(folder / "checkpoint.pth")["step"] == 3


def test_other_photographs_are_refused(options):
    stop_in(options, data="d1")
    with pytest.raises(InputError, match="data: "):
        reopen(options, data="d2")


def test_overwrite_starts_anew(options):
    folder = stop_in(options)
    (folder / "old.png").touch()
    assert reopen(replace(options, overwrite=True, lr=0.1), data="d2") is None
    assert sorted(p.name for p in folder.iterdir()) == ["config.yaml", "log.jsonl"]


def test_overwrite_spares_a_folder_that_is_no_run(options):
    precious = Path("run/thesis.txt")
    precious.parent.mkdir()
    precious.write_text("three years")
    with pytest.raises(InputError, match="run"):
        reopen(replace(options, overwrite=True))
    assert precious.read_text() == "three years"


def test_fresh_folder_says_how_it_came_about(options):
    folder = stop_in(options, data="fingerprint")
    first = json.loads((folder / "log.jsonl").read_text().splitlines()[0])
    assert first["data"] == "fingerprint" and {"command", "versions"} <= first.keys()
    assert utils.parse(SSRL.Options, ["--config", str(folder / "config.yaml")])[0] == replace(
        options, output_dir=""
    )


def test_a_run_without_its_checkpoint_is_not_started_over(options):
    folder = stop_in(options)
    (folder / "checkpoint.pth").unlink()
    reopen(replace(options, lr=0.1))  # it had come to no step
    first, *more = (folder / "log.jsonl").read_text().splitlines()
    assert json.loads(first)["options"]["lr"] == 0.1 and not more
    with (folder / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": 4, "loss": 1.0}) + "\n")
    with pytest.raises(InputError, match="without its checkpoint.pth"):
        reopen(options)
    assert reopen(replace(options, overwrite=True)) is None


def test_an_option_that_came_later_has_its_default(options):
    folder = stop_in(options)
    saved = load_torch(folder / "checkpoint.pth")
    del saved["options"]["koleo_weight"]
    save_torch(saved, folder / "checkpoint.pth")
    assert reopen(options)["step"] == 3
    with pytest.raises(InputError, match="koleo_weight: 0.0 -> 0.1"):
        reopen(replace(options, koleo_weight=0.1))


def test_a_file_in_the_place_of_a_folder(options):
    Path("taken").touch()
    with pytest.raises(InputError, match="taken: is no folder but a file"):
        reopen(replace(options, output_dir="taken"))


def test_log_goes_back_to_the_checkpoint(options):
    """A crash after step 5 with the state saved at 3, in the middle of a line."""
    log = stop_in(options, step=3) / "log.jsonl"
    first = log.read_text()
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, 6)]
    log.write_text(first + "".join(lines) + '{"step": 6, "lo')
    reopen(options)
    assert log.read_text() == first + "".join(lines[:3])


def test_config_tells_the_epochs_that_a_resumed_run_has(options):
    folder = stop_in(options)
    reopen(replace(options, epochs=5))
    again = utils.parse(SSRL.Options, ["--config", str(folder / "config.yaml")])[0]
    assert again.epochs == 5


def test_names_of_folders(options, tmp_path):
    o = replace(options, output_dir="")
    assert RunFolder.of(replace(o, output_dir="a/b"), None, "x").path == Path("a/b")
    assert RunFolder.of(o, None, "eyepacs").path == Path("runs/eyepacs")
    assert RunFolder.of(o, Path("configs/demo.yaml"), "x").path == Path("runs/demo")
    config = tmp_path / "runs" / "first" / "config.yaml"
    config.parent.mkdir(parents=True)
    assert RunFolder.of(o, Path("runs/first/config.yaml"), "x").path == Path("runs/first-2")
    Path("runs/first-2").mkdir()
    assert RunFolder.of(o, config, "x").path == Path("runs/first-3")


# ----------------------------------------------------------------------------- device and precision


def test_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert devices.pick_device("auto") == devices.pick_device("cpu") == torch.device("cpu")
    for name in ("cuda", "mps"):
        with pytest.raises(InputError, match=f"--device {name}"):
            devices.pick_device(name)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert devices.pick_device("auto") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(InputError, match="4 processes for 3 GPUs"):
        devices.pick_device("cuda", 3)
    assert (
        devices.pick_device("auto", 2) == devices.pick_device("cuda", 2) == torch.device("cuda", 2)
    )


@pytest.mark.parametrize(
    ("lists", "survives", "precision", "expected"),
    [
        (True, True, "auto", torch.bfloat16),
        (False, True, "auto", None),
        (True, False, "auto", None),
        (True, True, "fp32", None),
        (False, True, "bf16", torch.bfloat16),
        (True, False, "bf16", InputError),
        (True, True, "fp16", InputError),
    ],
)
def test_precision_on_a_cpu(monkeypatch, lists, survives, precision, expected):
    monkeypatch.setattr(devices, "_cpu_flags", lambda: {"fma", "avx512_bf16"} if lists else {"fma"})
    monkeypatch.setattr(devices, "_survives_bf16", lambda: survives)
    if expected is InputError:
        with pytest.raises(InputError, match=f"--precision {precision}"):
            devices.autocast_dtype(precision, torch.device("cpu"))
    else:
        assert devices.autocast_dtype(precision, torch.device("cpu")) is expected


@pytest.fixture
def matmul_switch():
    """torch's switch for oneDNN, as it was."""
    switch = torch.backends.mkldnn.matmul
    before, switch.fp32_precision = switch.fp32_precision, "none"
    yield switch
    switch.fp32_precision = before


def test_matmul_that_was_sped_up_is_that_of_fp32(matmul_switch):
    """Held against float64, with numbers that bf16 could not hold."""
    devices.speed_up_matmul()
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(300, 400, generator=generator) + 1 for _ in range(2))
    expected = a.double() @ b.double().T
    for found in (a @ b.T, torch.nn.functional.linear(a, b), torch.bmm(a[None], b.T[None])[0]):
        assert ((found - expected).abs() / expected).max() < 5e-6
    assert ((a.bfloat16().float() @ b.T - expected).abs() / expected).max() > 1e-4


@pytest.mark.parametrize("reason", ["amx", "rounds"])
def test_matmul_stays_where_speed_would_cost_precision(matmul_switch, monkeypatch, reason):
    flags = {"avx512f", "amx_bf16"} if reason == "amx" else {"avx512f"}
    monkeypatch.setattr(devices, "_cpu_flags", lambda: flags)
    if reason == "rounds":  # as a product in bf16 does
        product = torch.Tensor.__matmul__
        rounded = lambda a, b: product(a.bfloat16(), b.bfloat16()).float()  # noqa: E731
        monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    devices.speed_up_matmul()
    assert matmul_switch.fp32_precision == "none"


# ------------------------------------------------------------------------------------------- memory
def test_peak_memory_grows_with_what_is_held():
    before = devices.peak_memory(torch.device("cpu"))
    held = np.ones(int(before * 1e9 / 8) + 20_000_000)
    after = devices.peak_memory(torch.device("cpu"))
    assert after - 0.16 > before > 0.05 and len(held)


@pytest.mark.parametrize(
    ("batch", "accumulate", "centering", "told"),
    [
        (20, 1, "mean", "--batch-size 10 --accumulate 2, which makes the same steps"),
        (15, 2, "mean", "--batch-size 5 --accumulate 6"),
        (7, 1, "mean", "--batch-size 1 --accumulate 7"),
        (1, 1, "mean", "try --checkpointing"),
        (20, 1, "sinkhorn", "--batch-size 10, which makes other steps"),
    ],
)
def test_out_of_memory_is_told_with_what_may_fit(options, batch, accumulate, centering, told):
    o = replace(options, batch_size=batch, accumulate=accumulate, centering=centering)
    errors = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")]
    errors += [MemoryError, MemoryError("Unable to allocate 36.0 MiB for an array")]
    errors += [RuntimeError("Caught MemoryError in DataLoader worker process 0.")]
    for error in errors if batch == 20 else errors[:1]:
        named = pytest.raises(InputError, match=f"--batch-size {batch}: out of memory")
        with named as caught, devices.memory_advice(o):
            raise error
        assert told in str(caught.value) and "--checkpointing" in str(caught.value)
        assert "new --output-dir or with --overwrite" in str(caught.value)
    with pytest.raises(InputError) as caught, devices.memory_advice(replace(o, checkpointing=True)):
        torch.empty(10**15)
    assert "--checkpointing" not in str(caught.value)


@pytest.mark.parametrize("batch, part", [(20, 10), (9, 3), (7, 0), (2, 0)])
def test_advice_is_what_koleo_and_batch_norm_take(options, batch, part):
    o = replace(options, batch_size=batch, koleo_weight=0.1, use_bn_in_head=True)
    with pytest.raises(InputError) as caught, devices.memory_advice(o):
        raise MemoryError
    advice = re.findall(r"try --batch-size (\d+), which makes other steps", str(caught.value))
    assert advice == ([str(part)] if part else []) and "--accumulate" not in str(caught.value)


def test_other_errors_are_no_matter_of_memory(options):
    with pytest.raises(RuntimeError, match="shape"), devices.memory_advice(options):
        torch.zeros(2).view(3)


@pytest.mark.parametrize(
    ("capability", "precision", "expected"),
    [
        ((7, 5), "auto", None),
        ((8, 0), "auto", torch.bfloat16),
        ((9, 0), "auto", torch.bfloat16),
        ((7, 0), "fp16", torch.float16),
        ((9, 0), "fp32", None),
    ],
)
def test_precision_on_cuda(monkeypatch, capability, precision, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert devices.autocast_dtype(precision, torch.device("cuda", 0)) is expected


# -------------------------------------------------------------------------------------- signals


def agree_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    processes = Processes(torch.device("cpu"), rank, 2)
    processes.agree(7, "step")
    with pytest.raises(InputError, match="do not see the same step"):
        processes.agree(7 * rank - 1, "step")
    Path(folder, f"refused{rank}").touch()
    dist.destroy_process_group()


def test_processes_that_see_different_checkpoints_all_refuse(tmp_path):
    torch.multiprocessing.spawn(agree_worker, (str(tmp_path),), nprocs=2)
    assert {"refused0", "refused1"} <= {path.name for path in tmp_path.iterdir()}


def test_stop_signal_is_noted_and_the_second_ends(handlers):
    stop = devices.StopSignal(ONE)
    assert not stop.agreed()
    signal.raise_signal(signal.SIGTERM)
    assert stop.agreed()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) != signal.SIG_DFL


def test_versions_tell_the_libraries():
    began = time.monotonic()
    told = run_folder.versions()
    assert told["torch"] == torch.__version__.split("+")[0] or told["torch"] == torch.__version__
    assert {"python", "timm", "numpy", "device", "commit"} <= told.keys()
    assert time.monotonic() - began < 30
    json.dump(told, io.StringIO())
