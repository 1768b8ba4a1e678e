"""Processes, devices, precision, memory, signals. Run: `python -m pytest tests/test_devices.py`."""

import os
import signal
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

import devices
import SSRL
from devices import Processes
from utils import InputError

CPU = torch.device("cpu")
ONE = Processes(CPU)


@dataclass
class TrainingOptions:
    """The options of a training that memory_advice reads."""

    batch_size: int = 8
    accumulate: int = 1
    checkpointing: bool = False
    smallest_batch: int = 1
    compares_photographs: bool = False


# ------------------------------------------------------------------------------------------ device


def test_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert devices.choose_device("auto") == CPU
    assert devices.choose_device("cpu") == CPU
    for name in ("cuda", "mps"):
        with pytest.raises(InputError, match=f"--device {name}"):
            devices.choose_device(name)


def test_auto_takes_cuda_then_mps(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert devices.choose_device("auto") == torch.device("mps")
    assert devices.choose_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert devices.choose_device("auto", 2) == torch.device("cuda", 2)
    assert devices.choose_device("cuda", 2) == torch.device("cuda", 2)
    assert devices.choose_device("mps", 2) == torch.device("mps")


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(InputError, match="4 processes for 3 GPUs"):
        devices.choose_device("cuda", 3)


def test_choosing_changes_nothing(matmul_switch):
    devices.choose_device("auto")
    devices.choose_device("cpu")
    assert matmul_switch.fp32_precision == "none"


# ----------------------------------------------------------------------------------- precision


@pytest.mark.parametrize(
    ("is_listed", "survives", "precision", "expected"),
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
def test_precision_on_a_cpu(monkeypatch, is_listed, survives, precision, expected):
    flags = {"fma"}
    if is_listed:
        flags.add("avx512_bf16")
    monkeypatch.setattr(devices, "_cpu_flags", lambda: flags)
    monkeypatch.setattr(devices, "_survives_bf16", lambda: survives)
    if expected is InputError:
        with pytest.raises(InputError, match=f"--precision {precision}"):
            devices.autocast_dtype(precision, CPU)
    else:
        assert devices.autocast_dtype(precision, CPU) is expected


@pytest.mark.parametrize(
    ("capability", "precision", "expected"),
    [
        ((7, 5), "auto", None),
        ((8, 0), "auto", torch.bfloat16),
        ((9, 0), "auto", torch.bfloat16),
        ((7, 0), "fp16", torch.float16),
        ((9, 0), "bf16", torch.bfloat16),
        ((9, 0), "fp32", None),
    ],
)
def test_precision_on_cuda(monkeypatch, capability, precision, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert devices.autocast_dtype(precision, torch.device("cuda", 0)) is expected


def test_precision_on_a_mac():
    assert devices.autocast_dtype("auto", torch.device("mps")) is None
    assert devices.autocast_dtype("fp16", torch.device("mps")) is torch.float16


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a child is needed")
def test_a_child_that_is_killed_does_not_survive_bf16(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda _: os.kill(os.getpid(), signal.SIGKILL))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not devices._survives_bf16()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a child is needed")
def test_a_child_whose_product_fails_ends_there(monkeypatch, tmp_path):
    def fail(_threads):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(torch, "set_num_threads", fail)
    parent = os.getpid()
    try:
        survives = devices._survives_bf16()
    finally:
        if os.getpid() != parent:  # the child came back, as a second parent
            (tmp_path / "came_back").touch()
            os._exit(1)
    assert not survives
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a child is needed")
@pytest.mark.parametrize("value", [1.0, 2.0])
def test_a_child_tells_whether_its_product_is_right(monkeypatch, value):
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, dtype: value * ones(*shape))
    assert devices._survives_bf16() == (value == 1.0)


def test_autocast_computes_in_the_dtype():
    weight = torch.ones(4, 4)
    with devices.autocast(CPU, torch.bfloat16):
        assert (weight @ weight).dtype is torch.bfloat16
    with devices.autocast(CPU, None):
        assert (weight @ weight).dtype is torch.float32


# ------------------------------------------------------------------------------------------ matmul


@pytest.fixture
def matmul_switch():
    """torch's switch for oneDNN, off as before any test; put back as it was."""
    switch = torch.backends.mkldnn.matmul
    before = switch.fp32_precision
    switch.fp32_precision = "none"
    yield switch
    switch.fp32_precision = before


def test_fast_matmul_is_that_of_fp32(matmul_switch):
    """Held against float64, with numbers that bf16 could not hold."""
    devices.use_fast_matmul(CPU)
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(300, 400, generator=generator) + 1
    b = torch.rand(300, 400, generator=generator) + 1
    expected = a.double() @ b.double().T
    for found in (a @ b.T, torch.nn.functional.linear(a, b), torch.bmm(a[None], b.T[None])[0]):
        assert ((found - expected).abs() / expected).max() < 5e-6
    in_bf16 = a.bfloat16().float() @ b.T
    assert ((in_bf16 - expected).abs() / expected).max() > 1e-4


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="there is no oneDNN")
def test_fast_matmul_is_used_where_products_are_exact(matmul_switch, monkeypatch):
    monkeypatch.setattr(devices, "_cpu_flags", lambda: {"avx2"})
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: a)  # times the identity
    devices.use_fast_matmul(CPU)
    assert matmul_switch.fp32_precision == "bf16"


def test_matmul_stays_as_it_is_with_amx(matmul_switch, monkeypatch):
    monkeypatch.setattr(devices, "_cpu_flags", lambda: {"avx512f", "amx_bf16"})
    devices.use_fast_matmul(CPU)
    assert matmul_switch.fp32_precision == "none"


def test_matmul_stays_as_it_is_where_products_are_rounded(matmul_switch, monkeypatch):
    monkeypatch.setattr(devices, "_cpu_flags", lambda: {"avx512f"})
    product = torch.Tensor.__matmul__

    def rounded(a, b):
        return product(a.bfloat16(), b.bfloat16()).float()

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    devices.use_fast_matmul(CPU)
    assert matmul_switch.fp32_precision == "none"


def test_matmul_stays_as_it_is_for_other_devices(matmul_switch, monkeypatch):
    monkeypatch.setattr(devices, "_cpu_flags", lambda: {"avx2"})
    for name in ("cuda", "mps"):
        devices.use_fast_matmul(torch.device(name))
    assert matmul_switch.fp32_precision == "none"


# ------------------------------------------------------------------------------------------ memory


def test_peak_memory_grows_with_what_is_held():
    before = devices.peak_memory(CPU)
    held = np.ones(int(before * 1e9 / 8) + 20_000_000)
    after = devices.peak_memory(CPU)
    assert after - 0.16 > before > 0.05 and len(held)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        MemoryError("Unable to allocate 36.0 MiB for an array"),
        RuntimeError("Caught MemoryError in DataLoader worker process 0."),
    ],
    ids=str,
)
def test_out_of_memory_is_one_message(error):
    with pytest.raises(InputError) as caught, devices.memory_advice(TrainingOptions(20)):
        raise error
    assert str(caught.value) == (
        "--batch-size 20: out of memory; try --batch-size 10 --accumulate 2, which makes the same "
        "steps; or --checkpointing, slower; or smaller crops; in a new --output-dir or with "
        "--overwrite"
    )
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    ("changed", "advice"),
    [
        (
            {"batch_size": 15, "accumulate": 2},
            "--batch-size 5 --accumulate 6, which makes the same",
        ),
        ({"batch_size": 7}, "--batch-size 1 --accumulate 7, which makes the same"),
        ({"batch_size": 1}, "--checkpointing"),
        ({"batch_size": 20, "centering": "sinkhorn"}, "--batch-size 10, which makes other"),
        ({"batch_size": 20, "patch_weight": 1.0}, "--batch-size 10, which makes other"),
        ({"batch_size": 20, "use_bn_in_head": True}, "--batch-size 10, which makes other"),
        ({"batch_size": 7, "use_bn_in_head": True}, "--batch-size 1, which makes other"),
        ({"batch_size": 20, "koleo_weight": 0.1}, "--batch-size 10, which makes other"),
        ({"batch_size": 9, "koleo_weight": 0.1}, "--batch-size 3, which makes other"),
        ({"batch_size": 7, "koleo_weight": 0.1}, "--checkpointing"),
        ({"batch_size": 2, "koleo_weight": 0.1}, "--checkpointing"),
    ],
    ids=str,
)
def test_advice_is_what_the_losses_take(changed, advice):
    options = SSRL.Options(**{"batch_size": 8, **changed})
    with pytest.raises(InputError) as caught, devices.memory_advice(options):
        raise MemoryError
    assert f"; try {advice}" in str(caught.value)


def test_what_is_done_already_is_no_advice():
    options = TrainingOptions(20, checkpointing=True)
    with pytest.raises(InputError) as caught, devices.memory_advice(options):
        torch.empty(10**15)
    assert "--checkpointing" not in str(caught.value)


def test_other_errors_are_no_matter_of_memory():
    with pytest.raises(RuntimeError, match="shape"), devices.memory_advice(TrainingOptions()):
        torch.zeros(2).view(3)


# --------------------------------------------------------------------------------------- processes


def agree_worker(rank: int, folder: str) -> None:
    """One process of two: what both see, what they see otherwise, what any of them sees."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    processes = Processes(CPU, rank, 2)
    processes.agree(7, "step")
    with pytest.raises(InputError, match="do not see the same step"):
        processes.agree(7 * rank - 1, "step")
    assert processes.union({rank, 7}) == {0, 1, 7}
    Path(folder, f"done{rank}").touch()
    dist.destroy_process_group()


def test_processes_that_see_different_checkpoints_all_refuse(tmp_path):
    torch.multiprocessing.spawn(agree_worker, (str(tmp_path),), nprocs=2)
    assert {"done0", "done1"} <= {path.name for path in tmp_path.iterdir()}


def test_stop_signal_is_noted_and_the_second_ends(handlers):
    stop = devices.StopSignal(ONE)
    assert not stop.agreed()
    signal.raise_signal(signal.SIGTERM)
    assert stop.agreed()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) != signal.SIG_DFL


def test_one_process_has_nothing_to_exchange():
    module = torch.nn.Linear(2, 2)
    for now in (True, False):
        with devices.exchange_gradients(module, now=now):
            module(torch.ones(2)).sum().backward()
    assert torch.equal(module.bias.grad, torch.full((2,), 2.0))


def gradient_worker(rank: int, folder: str) -> None:
    """One process of two: its gradients before and after they are exchanged."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    wrapped = devices.distribute(torch.nn.Linear(2, 1, bias=False))
    weight = wrapped.module.weight
    images = torch.full((1, 2), 1.0 + rank)
    with devices.exchange_gradients(wrapped, now=False):
        wrapped(images).sum().backward()
    assert torch.equal(weight.grad, images)  # this process's own
    with devices.exchange_gradients(wrapped, now=True):
        wrapped(images).sum().backward()
    assert torch.equal(weight.grad, torch.full((1, 2), 3.0))  # the mean of 2 and 4
    Path(folder, f"done{rank}").touch()
    dist.destroy_process_group()


def test_gradients_are_exchanged_once_a_step(tmp_path):
    torch.multiprocessing.spawn(gradient_worker, (str(tmp_path),), nprocs=2)
    assert {"done0", "done1"} <= {path.name for path in tmp_path.iterdir()}
