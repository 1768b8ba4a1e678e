"""Where a program computes: its processes, device, precision and memory, and signals to stop it."""

from __future__ import annotations

import contextlib
import datetime
import inspect
import os
import re
import signal
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from utils import InputError


@dataclass(frozen=True)
class Processes:
    """The processes of this run and the device of this one."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            dist.barrier()

    def agree(self, value: int, what: str) -> None:
        """Raise InputError on all processes unless `value` is the same on all."""
        if self.world > 1:
            span = torch.tensor([value, -value], device=self.device)
            dist.all_reduce(span, op=dist.ReduceOp.MAX)
            if span[0] != -span[1]:
                raise InputError(f"the processes do not see the same {what}; share the folder")

    def union(self, values: set[int]) -> set[int]:
        """Return what any process has in its set."""
        if self.world == 1:
            return values
        sets: list[Any] = [None] * self.world
        dist.all_gather_object(sets, values)
        return set().union(*sets)

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the body in the main process, then in the others."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()


@contextlib.contextmanager
def process_group(device: str) -> Iterator[Processes]:
    """Join the processes that a launcher started (torchrun, torch.distributed.launch), if any.

    NCCL serves CUDA, gloo the rest. InputError when `device` (auto, cpu, cuda, mps) is not there.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    use_fast_matmul(chosen)
    if world == 1:
        yield Processes(chosen)
        return
    nccl = chosen.type == "cuda" and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"  # what the host asks waits for no GPU
    patience = datetime.timedelta(hours=2)  # the others wait while the main process evaluates
    device_id = chosen if nccl else None
    dist.init_process_group(backend, device_id=device_id, timeout=patience)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    try:
        yield Processes(chosen, rank, world)
    finally:
        dist.destroy_process_group()


def distribute(module: torch.nn.Module) -> torch.nn.parallel.DistributedDataParallel:
    """Wrap a module so that its gradients are averaged over processes; buffers are left alone."""
    wrapper = torch.nn.parallel.DistributedDataParallel
    new, old = "forward_sync_buffers", "broadcast_buffers"  # from torch 2.15 on, and before
    sync = new if new in inspect.signature(wrapper).parameters else old
    return wrapper(module, gradient_as_bucket_view=True, **{sync: False})


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device for auto, cpu, cuda or mps; raises InputError when it is not there."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next((kind for kind, there in present.items() if there), "cpu")
    elif not present.get(name, True):
        raise InputError(f"--device {name}: torch finds no such device here; use --device auto")
    if name != "cuda":
        return torch.device(name)
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise InputError(f"{local_rank + 1} processes for {count} GPUs: lower --nproc-per-node")
    return torch.device("cuda", local_rank)


def use_fast_matmul(device: torch.device) -> None:
    """Let oneDNN multiply fp32 matrices on a CPU, where it does so in full precision.

    torch asks MKL, which is slow on other makers' processors. Its switch for oneDNN allows bf16
    inside, which those with AMX would take: there, or where a product shows it, it stays off.
    """
    backend = torch.backends.mkldnn
    if device.type != "cpu" or not backend.is_available() or "amx_bf16" in _cpu_flags():
        return
    before = backend.matmul.fp32_precision
    backend.matmul.fp32_precision = "bf16"
    exact = torch.full((256, 256), 1 + 2.0**-12)  # bf16 has 8 bits
    if not (exact @ torch.eye(256)).equal(exact):
        backend.matmul.fp32_precision = before


def pick_device(name: str, local_rank: int = 0) -> torch.device:  # a name that callers are leaving
    device = choose_device(name, local_rank)
    use_fast_matmul(device)
    return device


def speed_up_matmul() -> None:  # a name that callers are leaving
    use_fast_matmul(torch.device("cpu"))


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the autocast dtype for a `--precision`, None for fp32.

    auto is bf16 on CUDA from compute capability 8.0 and on CPUs with native bf16, else fp32. Raises
    InputError for what the device cannot do.
    """
    if device.type == "cpu" and precision in ("fp16", "bf16"):
        if precision == "fp16" or not _survives_bf16():
            raise InputError(f"--precision {precision}: this CPU cannot; use auto or fp32")
    elif precision == "auto":
        if device.type == "cuda":
            native = torch.cuda.get_device_capability(device) >= (8, 0)
        else:
            listed = {"avx512_bf16", "amx_bf16", "bf16"} & _cpu_flags()
            native = device.type == "cpu" and listed and _survives_bf16()
        precision = "bf16" if native else "fp32"
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def _cpu_flags() -> set[str]:
    """Return what this CPU says it can; only Linux tells."""
    return set(_proc("cpuinfo").split())


def _proc(name: str) -> str:
    """Return what Linux tells under /proc; nothing where there is none."""
    try:
        return Path("/proc", name).read_text(errors="ignore")
    except OSError:
        return ""


def _survives_bf16() -> bool:
    """Let a child multiply in bf16: a virtual machine may list AMX and kill who uses it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the child forks only to multiply
        child = os.fork() if hasattr(os, "fork") else -1
    if child == 0:
        torch.set_num_threads(1)
        a = torch.ones(64, 64, dtype=torch.bfloat16)
        os._exit(int((a @ a)[0, 0] != 64))
    return child < 0 or os.waitpid(child, 0)[1] == 0


def peak_memory(device: torch.device) -> float:
    """Return the most GB that this process held: of a GPU, else of main memory (0: no Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 1e9
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 1e9
    held = re.search(r"VmHWM:\s*(\d+)", _proc("self/status"))
    return int(held[1]) * 1024 / 1e9 if held else 0.0


@contextlib.contextmanager
def memory_advice(options: Any) -> Iterator[None]:
    """Turn running out of memory into an InputError that names options with which it may fit."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's is the latter, on GPU and CPU
        short = r"(?i)out of memory|can't allocate memory|not enough memory|MemoryError"
        if not (isinstance(error, MemoryError) or re.search(short, str(error))):
            raise
        o, size = options, options.batch_size
        least = 2 if o.koleo_weight else 1
        part = next((n for n in range(2, size + 1) if size % n == 0 and size // n >= least), 0)
        alike = o.centering == "mean" and not (o.koleo_weight or o.use_bn_in_head)
        advice = f"--batch-size {size // part}" if part else ""
        if part and alike:
            advice += f" --accumulate {o.accumulate * part}, which makes the same steps"
        elif part:
            advice += ", which makes other steps"
        also = [advice, "" if o.checkpointing else "--checkpointing, slower", "smaller crops"]
        told = f"{'; or '.join(filter(None, also))}; in a new --output-dir or with --overwrite"
        raise InputError(f"--batch-size {size}: out of memory; try {told}") from error


class StopSignal:
    """Notes SIGTERM and SIGINT; the second one of a kind ends the program at once."""

    def __init__(self, processes: Processes) -> None:
        self.processes, self.seen = processes, False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: Any) -> None:
        self.seen = True
        signal.signal(number, signal.SIG_DFL)

    def agreed(self) -> bool:
        """Say whether any process was told to stop; all get the same answer at the same step."""
        if self.processes.world == 1:
            return self.seen
        flag = torch.tensor(float(self.seen))  # on the CPU: no wait for a GPU
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Return the context in which networks compute in `dtype`; None: in fp32, as they are."""
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def exchange_gradients(
    module: torch.nn.Module, *, now: bool
) -> contextlib.AbstractContextManager[None]:
    """Return a context whose backward passes exchange gradients among processes, or not yet.

    `module` is what `distribute` returned, or a plain one where there is one process.
    """
    if now or not isinstance(module, torch.nn.parallel.DistributedDataParallel):
        return contextlib.nullcontext()
    return module.no_sync()
