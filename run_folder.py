"""A run's folder: what may continue in it, its torch files, its log and progress, versions."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import pickle
import platform
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from devices import Processes
from utils import HERE, InputError, dump_options, log, write_atomic


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


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Append one JSON object to a run's log.jsonl."""
    with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def split_log(path: Path, step: int) -> tuple[str, str]:
    """Return what a JSON-lines log says up to `step`, and what of later steps.

    A crash loses the steps since the last checkpoint; the resumed run takes and logs them again. A
    last line that was cut short is in neither.
    """
    parts: tuple[list[str], list[str]] = [], []
    for line in path.read_text("utf-8").splitlines(keepends=True) if path.is_file() else ():
        with contextlib.suppress(ValueError):
            parts[json.loads(line).get("step", 0) > step].append(line)
    return "".join(parts[0]), "".join(parts[1])


class Progress:
    """Tells a training's course: a bar on a terminal, lines elsewhere, log.jsonl, TensorBoard."""

    def __init__(self, folder: Path, start: int, total: int, batch: int, main: bool) -> None:
        self.folder, self.batch, self.main = folder, batch, main
        self.bar = tqdm(total=total, initial=start, unit="step", disable=None if main else True)
        self.step, self.total = start, total
        self.steps, self.waited, self.since, self.said, self.knn = 0, 0.0, time.monotonic(), 0.0, ""
        self.latest: dict[str, Any] = {}  # the last measurements written
        self.events = None
        if main:
            with contextlib.suppress(ImportError):  # TensorBoard is an extra
                from torch.utils.tensorboard import SummaryWriter

                self.events = SummaryWriter(str(folder))

    def update(self, measured: dict[str, Any], epoch: float) -> None:
        """Count one step; measurements that come with an entropy are written down."""
        self.step = measured["step"]
        self.steps += 1
        self.waited += measured.pop("waited")
        self.bar.update()
        if "teacher_entropy" not in measured:
            return
        spent = time.monotonic() - self.since
        self.latest = {"epoch": epoch} | measured | {"loss": float(measured["loss"])}
        self.latest["images_per_s"] = self.batch * self.steps / spent
        self.latest["data_wait"] = self.waited / spent
        self.record(self.latest)
        self.steps, self.waited, self.since = 0, 0.0, time.monotonic()

    def record(self, record: dict[str, Any]) -> None:
        """Write a record to log.jsonl and TensorBoard, and show its main numbers."""
        if not self.main:
            return
        began = time.monotonic()
        write_record(self.folder, {"step": self.step} | record)
        numbers = {k: v for k, v in record.items() if isinstance(v, float)}
        for name, value in numbers.items() if self.events else ():
            self.events.add_scalar(name, value, self.step)
        shown = "epoch loss lr images_per_s data_wait memory_gb rankme knn_accuracy knn_majority"
        names = [*shown.split(), "knn_qwk"]
        text = ", ".join(f"{k} {numbers[k]:.4g}" for k in names if k in numbers)
        if "knn_qwk" in record:
            said = ", val k-NN {knn_accuracy:.3f} (majority {knn_majority:.3f}), qwk {knn_qwk:.3f}"
            self.knn = said.format(**record)
        if "loss" in record:
            self.bar.set_postfix_str(text + self.knn)
        if self.bar.disable and ("rankme" in record or began - self.said > 30):
            self.said = began
            speed = self.latest.get("images_per_s", 0.0)
            left = (self.total - self.step) * self.batch / speed if speed else 0.0
            text += f", {left:.0f} s left" * bool(left)
            log.info("step %d/%d: %s", self.step, self.total, text)

    def close(self) -> None:
        """End the bar and the event file."""
        self.bar.close()
        if self.events:
            self.events.close()
