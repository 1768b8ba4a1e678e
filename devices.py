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


# --------------------------------------------------------------------------------------- processes
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
        if self.world == 1:
            return
        # One exchange for both ends: the largest of -value is minus the smallest value.
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

    NCCL serves CUDA, gloo the rest. Raises InputError when `device` (auto, cpu, cuda, mps) is not
    there.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    use_fast_matmul(chosen)
    if world == 1:
        yield Processes(chosen)
        return

    # The others wait for the main process while it evaluates, longer than NCCL's ten minutes.
    patience = datetime.timedelta(hours=2)
    if chosen.type == "cuda" and dist.is_nccl_available():
        # Tensors on the CPU go by gloo, so that what the host asks waits for no GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=chosen, timeout=patience)
    else:
        dist.init_process_group("gloo", timeout=patience)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    try:
        yield Processes(chosen, rank, world)
    finally:
        dist.destroy_process_group()


def distribute(module: torch.nn.Module) -> torch.nn.parallel.DistributedDataParallel:
    """Wrap a module so that its gradients are averaged over processes; buffers are left alone."""
    wrapper = torch.nn.parallel.DistributedDataParallel
    sync_buffers = "broadcast_buffers"
    if "forward_sync_buffers" in inspect.signature(wrapper).parameters:
        sync_buffers = "forward_sync_buffers"  # its name from torch 2.15 on
    return wrapper(module, gradient_as_bucket_view=True, **{sync_buffers: False})


def exchange_gradients(
    module: torch.nn.Module, *, now: bool
) -> contextlib.AbstractContextManager[None]:
    """Return a context whose backward passes exchange gradients among processes, or not yet.

    `module` is what `distribute` returned, or a plain one where there is one process.
    """
    if now or not isinstance(module, torch.nn.parallel.DistributedDataParallel):
        return contextlib.nullcontext()
    return module.no_sync()


class StopSignal:
    """Notes SIGTERM and SIGINT; the second one of a kind ends the program at once."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.received = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: Any) -> None:
        """Note a signal, and give the next one of its kind its usual effect."""
        self.received = True
        signal.signal(number, signal.SIG_DFL)

    def agreed(self) -> bool:
        """Return whether any process received one; all get the same answer at the same step."""
        if self.processes.world == 1:
            return self.received
        flag = torch.tensor(float(self.received))  # on the CPU: no wait for a GPU
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)


# ---------------------------------------------------------------------------- device and precision
def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device for auto, cpu, cuda or mps.

    Raises InputError when it is not there, or when there are more processes than GPUs.
    """
    has_cuda = torch.cuda.is_available()
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cpu"
        if has_cuda:
            name = "cuda"
        elif has_mps:
            name = "mps"
    if (name == "cuda" and not has_cuda) or (name == "mps" and not has_mps):
        raise InputError(f"--device {name}: torch finds no such device here; use --device auto")
    if name != "cuda":
        return torch.device(name)

    count = torch.cuda.device_count()
    if local_rank >= count:
        raise InputError(f"{local_rank + 1} processes for {count} GPUs: lower --nproc-per-node")
    return torch.device("cuda", local_rank)


def use_fast_matmul(device: torch.device) -> None:
    """Let oneDNN multiply fp32 matrices on a CPU, where it does so in full precision.

    By itself torch asks MKL, which is slow on processors of other makers than Intel. It asks oneDNN
    only where products may be rounded to bf16 inside (`fp32_precision`). oneDNN makes use of that
    permission on processors with AMX alone; on all others its products are fp32 in full, and only
    there is the permission given.
    """
    backend = torch.backends.mkldnn
    if device.type != "cpu" or not backend.is_available() or "amx_bf16" in _cpu_flags():
        return
    before = backend.matmul.fp32_precision
    backend.matmul.fp32_precision = "bf16"

    # The flags may not tell the whole truth. A number that needs 13 bits shows whether a product
    # is rounded to bf16, which has 8.
    exact = torch.full((256, 256), 1 + 2.0**-12)
    if not (exact @ torch.eye(256)).equal(exact):
        backend.matmul.fp32_precision = before


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the dtype of autocast for a `--precision`, None for fp32.

    auto is bf16 on CUDA from compute capability 8.0 and on CPUs with native bf16, else fp32. Raises
    InputError for what the device cannot do.
    """
    if precision == "auto":
        return torch.bfloat16 if _has_native_bf16(device) else None
    if precision == "fp32":
        return None
    if device.type == "cpu" and (precision == "fp16" or not _survives_bf16()):
        raise InputError(f"--precision {precision}: this CPU cannot; use auto or fp32")
    return {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Return the context in which networks compute in `dtype`; None: in fp32, as they are."""
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def _has_native_bf16(device: torch.device) -> bool:
    """Return whether the device multiplies in bf16 itself; elsewhere bf16 is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        listed = {"avx512_bf16", "amx_bf16", "bf16"} & _cpu_flags()
        return bool(listed) and _survives_bf16()
    return False


def _survives_bf16() -> bool:
    """Return whether a child that multiplies in bf16 lives to tell the right product.

    A virtual machine may list AMX among the processor's flags and kill the process that uses it.
    """
    if not hasattr(os, "fork"):
        return True
    with warnings.catch_warnings():
        # Python warns of forking a process that has threads, since the child has none of them. This
        # one multiplies once, on one thread, and ends.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        is_right = False
        try:
            torch.set_num_threads(1)
            ones = torch.ones(64, 64, dtype=torch.bfloat16)
            is_right = bool((ones @ ones)[0, 0] == 64)
        finally:  # whatever happens, the child must not go on as a second parent
            os._exit(int(not is_right))
    _, status = os.waitpid(child, 0)
    return status == 0


def _cpu_flags() -> set[str]:
    """Return what this CPU says it can; nothing where the system is not Linux."""
    return set(_read_proc("cpuinfo").split())


def _read_proc(name: str) -> str:
    """Return what Linux writes under /proc; nothing on other systems."""
    try:
        return Path("/proc", name).read_text(errors="ignore")
    except OSError:
        return ""


# ------------------------------------------------------------------------------------------ memory
def peak_memory(device: torch.device) -> float:
    """Return the most GB that this process held: of a GPU, else of main memory (0: no Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 1e9
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 1e9
    held = re.search(r"VmHWM:\s*(\d+)", _read_proc("self/status"))
    if held is None:
        return 0.0
    return int(held[1]) * 1024 / 1e9


@contextlib.contextmanager
def memory_advice(options: Any) -> Iterator[None]:
    """Turn running out of memory into an InputError that names options with which it may fit.

    `options` are those of SSRL.py.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch raises the latter, on GPU and CPU
        shortage = r"(?i)out of memory|can't allocate memory|not enough memory|MemoryError"
        if not isinstance(error, MemoryError) and not re.search(shortage, str(error)):
            raise
        # What changes least comes first: a smaller batch may make the very same steps.
        advice = []
        smaller_batch = _smaller_batch(options)
        if smaller_batch:
            advice.append(smaller_batch)
        if not options.checkpointing:
            advice.append("--checkpointing, slower")
        advice.append("smaller crops")
        raise InputError(
            f"--batch-size {options.batch_size}: out of memory; try {'; or '.join(advice)}; "
            "in a new --output-dir or with --overwrite"
        ) from error


def _smaller_batch(options: Any) -> str:
    """Return flags that spread a step over more micro-batches; "" where the batch has no parts."""
    size = options.batch_size
    most_parts = size // options.smallest_batch
    divisors = [parts for parts in range(2, most_parts + 1) if size % parts == 0]
    if not divisors:
        return ""

    parts = divisors[0]
    advice = f"--batch-size {size // parts}"
    if options.compares_photographs:
        return f"{advice}, which makes other steps"
    return f"{advice} --accumulate {options.accumulate * parts}, which makes the same steps"
