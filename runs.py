"""What a run needs of torch and its folder: processes, device, checkpoints, progress, stopping."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.metadata
import inspect
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from utils import HERE, InputError, dump_options, log, split_log, write_atomic, write_record
from weights import load_torch


# ------------------------------------------------------------------------------- processes, device
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
    chosen = pick_device(device, int(os.environ.get("LOCAL_RANK", "0")))
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


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device for auto, cpu, cuda or mps; raises InputError when it is not there."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next((kind for kind, there in present.items() if there), "cpu")
    elif not present.get(name, True):
        raise InputError(f"--device {name}: torch finds no such device here; use --device auto")
    if name == "cpu":
        speed_up_matmul()
    if name == "cuda" and local_rank >= (count := torch.cuda.device_count()):
        raise InputError(f"{local_rank + 1} processes for {count} GPUs: lower --nproc-per-node")
    return torch.device(name, local_rank) if name == "cuda" else torch.device(name)


def speed_up_matmul() -> None:
    """Let oneDNN multiply fp32 matrices on this CPU, where it does so in full precision.

    torch asks MKL, which is slow on other makers' processors. Its switch for oneDNN allows bf16
    inside, which those with AMX would take: there, or where a product shows it, it stays off.
    """
    backend = torch.backends.mkldnn
    if not backend.is_available() or "amx_bf16" in _cpu_flags():
        return
    before, backend.matmul.fp32_precision = backend.matmul.fp32_precision, "bf16"
    exact = torch.full((256, 256), 1 + 2.0**-12)  # bf16 has 8 bits
    if not (exact @ torch.eye(256)).equal(exact):
        backend.matmul.fp32_precision = before


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


def commit() -> str:
    """Return this checkout's commit, "-modified" where files differ; empty without git."""
    said = []
    status = ("status", "--porcelain", "--", str(HERE), ":!benchmarks/results")
    for arguments in (("rev-parse", "HEAD"), status):
        try:
            command = ["git", "-C", str(HERE), *arguments]
            run = subprocess.run(command, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.SubprocessError):
            return ""
        said.append(run.stdout.strip())
    return said[0] + ("-modified" if said[1] else "")


def versions() -> dict[str, str]:
    """Return what a result depends on: Python, libraries, machine and this checkout's commit."""
    names = ["torch", "torchvision", "timm", "numpy", "pillow", "scikit-learn"]
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
        "device": cuda or f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "commit": commit(),
    }


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


# -------------------------------------------------------------------------- folder, progress, stop
class RunFolder:
    """A training run's folder: what may continue in it, and its log.jsonl."""

    def __init__(self, path: Path) -> None:
        self.path, self.data = path, ""  # fingerprint
        self.options: dict[str, Any] = {}

    @classmethod
    def of(cls, options: Any, config: Path | None, default: str) -> RunFolder:
        """Return `--output-dir`, else runs/<config name>; a run's own config names a new folder."""
        if options.output_dir:
            return cls(Path(options.output_dir))
        if not config or config.name != "config.yaml":
            return cls(Path("runs") / (config.stem if config else default))
        base, count = config.resolve().parent.name, 2
        while (Path("runs") / f"{base}-{count}").exists():
            count += 1
        return cls(Path("runs") / f"{base}-{count}")

    def open(
        self, options: Any, data: str, resumable: Sequence[str], processes: Processes
    ) -> dict[str, Any] | None:
        """Return the checkpoint to continue from, None for a fresh start, whose config is written.

        Raises InputError when the folder holds a run of other options or data, naming them, unless
        `--overwrite` clears it.
        """
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(options).items()}
        ignored = ("output_dir", "overwrite", "resume", "debug")
        self.options = {k: v for k, v in plain.items() if k not in ignored}
        self.options["processes"] = processes.world  # with the batch size it makes the step
        self.data = data
        saved, record = None, self.path / "log.jsonl"
        with processes.main_first():
            if options.overwrite and processes.is_main and self.path.is_dir():
                self._clear()
        if (self.path / "checkpoint.pth").is_file():
            saved = load_torch(self.path / "checkpoint.pth")
            defaults = {field.name: field.default for field in dataclasses.fields(options)}
            self._compare(defaults | saved["options"], saved["data"], resumable, options.resume)
        processes.agree(saved["step"] if saved else -1, f"the step of {self.path}/checkpoint.pth")
        told, lost = split_log(record, saved["step"] if saved else 0)
        if lost and not saved:
            raise InputError(
                f"{self.path} holds a run without its checkpoint.pth, which it needs to go on; "
                "give another --output-dir, or --overwrite to start anew in it"
            )
        told = told if saved else ""
        if processes.is_main and record.is_file() and record.read_text("utf-8") != told:
            write_atomic(record, lambda temporary: temporary.write_text(told, "utf-8"))
        text, config = dump_options(options), self.path / "config.yaml"
        if processes.is_main and not (config.is_file() and config.read_text() == text):
            write_atomic(config, lambda temporary: temporary.write_text(text))
        if processes.is_main and saved is None:
            first = {"command": sys.argv, "data": data, "versions": versions()}
            write_record(self.path, first | {"options": self.options})
        return saved

    def _clear(self) -> None:
        """Delete the folder, if it is a run's or empty: `--overwrite` on any other is a mistake."""
        ours = all((self.path / name).is_file() for name in ("config.yaml", "log.jsonl"))
        if any(self.path.iterdir()) and not ours:
            raise InputError(f"--overwrite: {self.path} holds no run (config.yaml); name another")
        shutil.rmtree(self.path)

    def _compare(
        self, old: dict[str, Any], data: str, resumable: Sequence[str], resume: str
    ) -> None:
        old = {k: list(v) if isinstance(v, tuple) else v for k, v in old.items()}
        new = self.options
        changed = {k: f"{old.get(k)} -> {new[k]}" for k in new if old.get(k) != new[k]}
        if changed.get("epochs") and new["epochs"] > old["epochs"]:
            log.info("resume: epochs %s", changed.pop("epochs"))
        for name in resumable:
            if name in changed:
                log.info("resume: %s %s", name, changed.pop(name))
        if data != self.data:
            changed["data"] = "other photographs, grades or splits"
        elif changed.pop("data", None):
            log.info("resume: the same data at %s", new["data"])
        if resume == "never":
            changed["resume"] = "never, and a run is there"
        if changed:
            listed = "; ".join(f"{k}: {v}" for k, v in changed.items())
            raise InputError(
                f"{self.path} holds another run ({listed}); "
                "give another --output-dir, or --overwrite to start anew in it"
            )


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
