"""What a run needs of torch and its folder: processes, device, checkpoints, progress, stopping."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import inspect
import os
import pickle
import platform
import re
import shutil
import signal
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from utils import HERE, InputError, dump_options, log, split_log, write_atomic, write_record


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

    One process needs no group. NCCL serves CUDA, gloo the rest. Raises InputError when `device`
    (auto, cpu, cuda, mps) is not there.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    chosen = pick_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if world == 1:
        yield Processes(chosen)
        return
    backend = "nccl" if chosen.type == "cuda" and dist.is_nccl_available() else "gloo"
    patience = datetime.timedelta(hours=2)  # the others wait while the main process evaluates
    device_id = chosen if backend == "nccl" else None
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
    return wrapper(module, **{new if new in inspect.signature(wrapper).parameters else old: False})


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device for auto, cpu, cuda or mps; raises InputError when it is not there."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next((kind for kind, there in present.items() if there), "cpu")
    elif not present.get(name, True):
        raise InputError(f"--device {name}: torch finds no such device here; use --device auto")
    if name == "cuda" and local_rank >= torch.cuda.device_count():
        gpus = f"{torch.cuda.device_count()} GPUs: lower --nproc-per-node"
        raise InputError(f"{local_rank + 1} processes for {gpus}")
    return torch.device(name, local_rank) if name == "cuda" else torch.device(name)


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
            native = device.type == "cpu" and _has_bf16() and _survives_bf16()
        precision = "bf16" if native else "fp32"
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def _has_bf16() -> bool:
    """Say whether this CPU lists bf16 instructions; only Linux tells."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text(errors="ignore").split())
    except OSError:
        return False
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & flags)


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


# ------------------------------------------------------------------------------------------- files
def save_torch(state: dict[str, Any], path: Path) -> None:
    """Write tensors, numbers, strings, lists and dicts with torch.save, atomically."""
    write_atomic(path, lambda temporary: torch.save(state, temporary))


def load_torch(path: Path) -> dict[str, Any]:
    """Read a .pth file onto the CPU without running code from it.

    DINO's files hold an argparse.Namespace and numpy scalars beside the tensors: these types, and
    no others, are allowed. Raises InputError for missing, damaged or code-carrying files.
    """
    scalar = np._core.multiarray.scalar  # type: ignore[attr-defined]
    dtypes = [type(np.dtype(code)) for code in ("f8", "f4", "i8")]
    safe = [argparse.Namespace, scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *dtypes]
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch stores checksums but does not check them
                damaged = archive.testzip()
            if damaged:
                raise InputError(f"{path}: is damaged (checksum of {damaged}); take another copy")
        with torch.serialization.safe_globals(safe):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damage shows in whatever the bytes happen to mean
        if isinstance(error, InputError):
            raise
        refused = re.search(r"(?i)unsupported (?:global|class).*?(?=\. |\n|$)", str(error))
        if isinstance(error, pickle.UnpicklingError) and refused:
            raise InputError(
                f"{path}: holds more than weights and is refused, since loading it would run its "
                f"code ({refused[0]}); save its weights alone, where you trust it"
            ) from None
        raise InputError(
            f"{path}: no torch file, or a damaged one ({type(error).__name__}); take another copy"
        ) from None


def commit() -> str:
    """Return this checkout's commit, "-modified" where files differ; empty without git."""
    said = []
    for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain")):
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
        self, options: Any, data: str, resumable: tuple[str, ...], processes: Processes
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
        self, old: dict[str, Any], data: str, resumable: tuple[str, ...], resume: str
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
        flag = torch.tensor(float(self.seen), device=self.processes.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)
