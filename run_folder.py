"""A training run's folder: what may continue in it, its torch files, its log and its progress."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import pathlib
import pickle
import platform
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from devices import Processes
from utils import HERE, InputError, dump_options, log, plain_options, write_atomic

LIBRARIES = ("torch", "torchvision", "timm", "numpy", "pillow", "scikit-learn")
START_ANEW = "give another --output-dir, or --overwrite to start anew in it"


# ------------------------------------------------------------------------------------- the versions
def commit() -> str:
    """Return the commit of this checkout, or "" where git does not know it.

    "-modified" follows where files differ from it. Results of benchmarks do not count: whoever
    measures writes them.
    """
    head = _ask_git("rev-parse", "HEAD")
    changes = _ask_git("status", "--porcelain", "--", str(HERE), ":!benchmarks/results")
    if head is None or changes is None:
        return ""
    if changes:
        return head + "-modified"
    return head


def _ask_git(*arguments: str) -> str | None:
    """Return what git prints about this checkout, None where git is missing or hangs."""
    command = ["git", "-C", str(HERE), *arguments]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def versions() -> dict[str, str]:
    """Return what a result depends on: Python, libraries, hardware and this checkout's commit."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        found[name] = importlib.metadata.version(name)
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    else:
        found["device"] = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    found["commit"] = commit()
    return found


# --------------------------------------------------------------------------------------- the folder
class RunFolder:
    """A training run's folder: where it is, what may continue in it, how its files begin.

    A run calls `choose`, `clear` where --overwrite is given, `find_checkpoint`, and `begin`.
    `options` and `fingerprint` are what `begin` was given: they go into every checkpoint, so that
    `find_checkpoint` can compare them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.options: dict[str, Any] = {}
        self.fingerprint = ""  # of the photographs, grades and splits

    @classmethod
    def choose(cls, options: Any, config: Path | None, default: str) -> RunFolder:
        """Return the folder `--output-dir`, else runs/<name of the config, or `default`>.

        The config.yaml of a run repeats that run in a new folder: runs/<its folder>-2, -3, ...
        """
        if options.output_dir:
            return cls(Path(options.output_dir))
        if config is None:
            return cls(Path("runs", default))
        if config.name != "config.yaml":
            return cls(Path("runs", config.stem))
        repeated = config.resolve().parent.name
        count = 2
        while Path("runs", f"{repeated}-{count}").exists():
            count += 1
        return cls(Path("runs", f"{repeated}-{count}"))

    def clear(self, processes: Processes) -> None:
        """Delete the folder in the main process, while the others wait.

        Raises InputError when the folder holds something but no run: naming it is a mistake then.
        """
        with processes.main_first():
            if not processes.is_main or not self.path.is_dir():
                return
            is_run = (self.path / "config.yaml").is_file() and (self.path / "log.jsonl").is_file()
            if any(self.path.iterdir()) and not is_run:
                raise InputError(
                    f"--overwrite: {self.path} holds no run (config.yaml); name another"
                )
            shutil.rmtree(self.path)

    def find_checkpoint(
        self, options: Any, fingerprint: str, resumable: Sequence[str], processes: Processes
    ) -> dict[str, Any] | None:
        """Return the checkpoint from which the run goes on, None for a fresh start; writes nothing.

        The options named in `resumable` may differ from the checkpoint's, and --epochs may be
        higher. Raises InputError, naming what differs, when the folder holds a run of other options
        or photographs, a run without its checkpoint, or when not all processes see the same file.
        """
        file = self.path / "checkpoint.pth"
        checkpoint = None
        step = -1
        if file.is_file():
            checkpoint = load_torch(file)
            step = checkpoint["step"]
            # a run from before an option existed ran as the option's default does
            old = _defaults(options) | checkpoint["options"]
            changed = _list_changes(_as_lists(old), _run_options(options, processes), resumable)
            if fingerprint != checkpoint["data"]:
                changed["data"] = "other photographs, grades or splits"
            elif changed.pop("data", None):
                log.info("resume: the same data at %s", options.data)
            if options.resume == "never":
                changed["resume"] = "never, and a run is there"
            if changed:
                listed = "; ".join(f"{name}: {change}" for name, change in changed.items())
                raise InputError(f"{self.path} holds another run ({listed}); {START_ANEW}")
        processes.agree(step, f"the step of {file}")
        if checkpoint is None:
            _, later = split_log(self.path / "log.jsonl", 0)
            if later:  # steps were taken, and starting over would hide that they are lost
                raise InputError(
                    f"{self.path} holds a run without its checkpoint.pth, which it needs to go on; "
                    f"{START_ANEW}"
                )
        return checkpoint

    def begin(
        self,
        options: Any,
        fingerprint: str,
        checkpoint: dict[str, Any] | None,
        processes: Processes,
    ) -> None:
        """Note options and data for the run's checkpoints; the main process readies the files.

        It cuts from log.jsonl what came after the checkpoint, writes config.yaml, and on a fresh
        start the log's first line: command, fingerprint of the data, versions and options.
        """
        self.fingerprint = fingerprint
        self.options = _run_options(options, processes)
        if checkpoint:
            for name, value in self.options.items():
                if value == []:  # left open: the run goes on with what it began with
                    self.options[name] = checkpoint["options"].get(name, value)
        if not processes.is_main:
            return

        record = self.path / "log.jsonl"
        kept = ""
        if checkpoint:
            kept, _ = split_log(record, checkpoint["step"])
        if record.is_file() and record.read_text("utf-8") != kept:
            write_atomic(record, lambda temporary: temporary.write_text(kept, "utf-8"))

        config = self.path / "config.yaml"
        text = dump_options(options)
        if not config.is_file() or config.read_text("utf-8") != text:
            write_atomic(config, lambda temporary: temporary.write_text(text, "utf-8"))

        if checkpoint is None:
            first = {"command": sys.argv, "data": fingerprint, "versions": versions()}
            first["options"] = self.options
            write_record(self.path, first)

    # ---- names that callers are leaving
    of = choose

    @property
    def data(self) -> str:
        return self.fingerprint

    def open(
        self, options: Any, data: str, resumable: Sequence[str], processes: Processes
    ) -> dict[str, Any] | None:
        if options.overwrite:
            self.clear(processes)
        checkpoint = self.find_checkpoint(options, data, resumable, processes)
        self.begin(options, data, checkpoint, processes)
        return checkpoint


def _run_options(options: Any, processes: Processes) -> dict[str, Any]:
    """Return the options that make a run what it is, with its number of processes."""
    named = plain_options(options)
    named["processes"] = processes.world  # with the batch size it makes the step
    return named


def _defaults(options: Any) -> dict[str, Any]:
    """Return the default of every option that has one."""
    defaults = {}
    for field in dataclasses.fields(options):
        if field.default is not dataclasses.MISSING:
            defaults[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = field.default_factory()
    return defaults


def _as_lists(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values with lists for tuples, as `plain_options` does."""
    plain = {}
    for name, value in values.items():
        plain[name] = list(value) if isinstance(value, tuple) else value
    return plain


def _list_changes(
    old: dict[str, Any], new: dict[str, Any], resumable: Sequence[str]
) -> dict[str, str]:
    """Return "old -> new" of each option that keeps a run from going on; log those that do not."""
    changed = {}
    for name, value in new.items():
        if value == [] or old.get(name) == value:  # an empty list leaves the option open
            continue
        change = f"{old.get(name)} -> {value}"
        if name in resumable or (name == "epochs" and value > old["epochs"]):
            log.info("resume: %s %s", name, change)
        else:
            changed[name] = change
    return changed


# ------------------------------------------------------------------------------------- torch files
def save_torch(state: dict[str, Any], path: Path) -> None:
    """Write tensors, numbers, strings, lists and dicts with torch.save, atomically."""
    write_atomic(path, lambda temporary: torch.save(state, temporary))


def load_torch(path: Path) -> dict[str, Any]:
    """Read a .pth file onto the CPU without running code from it.

    Beside tensors and plain values it may hold what DINO's files do, and no more: an
    argparse.Namespace, numpy scalars, and paths, which become pure ones. Raises InputError for
    missing, damaged or code-carrying files.
    """
    try:
        _check_checksums(path)
        with torch.serialization.safe_globals(_allowed_types()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # damage shows in whatever the bytes happen to mean
        refused = re.search(r"(?i)unsupported (?:global|class).*?(?=\. |\n|$)", str(error))
        if isinstance(error, pickle.UnpicklingError) and refused:
            raise InputError(
                f"{path}: holds more than weights and is refused, since loading it would run its "
                f"code ({refused[0]}); save its weights alone, where you trust it"
            ) from None
        raise InputError(
            f"{path}: no torch file, or a damaged one ({type(error).__name__}); take another copy"
        ) from None


def _check_checksums(path: Path) -> None:
    """Raise InputError for a damaged zip file: torch stores checksums but does not check them."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged:
        raise InputError(f"{path}: is damaged (checksum of {damaged}); take another copy")


def _allowed_types() -> list[Any]:
    """Return what torch's reader may build besides its own types: types, or (type, name in file).

    None of them does anything when it is built.
    """
    scalar = np._core.multiarray.scalar  # type: ignore[attr-defined]
    allowed: list[Any] = [argparse.Namespace, scalar, np.dtype]
    allowed.append((scalar, "numpy.core.multiarray.scalar"))  # its name before numpy 2
    for code in ("f8", "f4", "i8"):
        allowed.append(type(np.dtype(code)))

    # A path of the other operating system cannot be made here, a pure one can. Python 3.13 calls
    # the module pathlib._local.
    for module in ("pathlib", "pathlib._local"):
        for system, pure in (
            ("Posix", pathlib.PurePosixPath),
            ("Windows", pathlib.PureWindowsPath),
        ):
            allowed.append((pure, f"{module}.{system}Path"))
            allowed.append((pure, f"{module}.Pure{system}Path"))
    return allowed


# ------------------------------------------------------------------------------------- the log
def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Append one JSON object to a run's log.jsonl."""
    with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def split_log(path: Path, step: int) -> tuple[str, str]:
    """Return the lines of a log up to `step`, and those of later steps; ("", "") without a file.

    A crash loses the steps since the last checkpoint; the resumed run takes and logs them again. A
    last line that the crash cut short is in neither part.
    """
    kept = []
    later = []
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record.get("step", 0) > step:
            later.append(line + "\n")
        else:
            kept.append(line + "\n")
    return "".join(kept), "".join(later)


class Progress:
    """Shows and logs the course of a training: a bar on a terminal, lines elsewhere.

    The main process also writes log.jsonl, and TensorBoard's events where that is installed.
    """

    SHOWN = (
        *("epoch", "loss", "lr", "images_per_s", "data_wait", "memory_gb"),
        *("rankme", "knn_accuracy", "knn_majority", "knn_qwk"),
    )
    SECONDS_BETWEEN_LINES = 30

    def __init__(
        self, folder: Path, start: int, total: int, batch: int, main=None, *, is_main: bool = False
    ) -> None:
        if main is not None:
            is_main = main
        self.folder = folder
        self.total = total  # steps
        self.batch = batch  # images of a step, over all processes
        self.is_main = is_main
        self.step = start
        self.latest: dict[str, Any] = {}  # what `log_interval` wrote last

        # of the interval since then
        self._steps = 0
        self._waited = 0.0  # seconds that steps waited for data
        self._began = time.monotonic()

        self._line_shown = 0.0
        self._knn = ""  # the last scores, shown until there are new ones
        # None: a bar only where the output is a terminal
        self._bar = tqdm(total=total, initial=start, unit="step", disable=None if is_main else True)
        self._events = None
        if is_main:
            with contextlib.suppress(ImportError):  # TensorBoard is an extra, slow to import
                from torch.utils.tensorboard import SummaryWriter

                self._events = SummaryWriter(str(folder))

    def count_step(self, step: int, waited: float) -> None:
        """Count one step: `step` have been taken; this one waited `waited` seconds for its data."""
        self.step = step
        self._steps += 1
        self._waited += waited
        self._bar.update()

    def log_interval(self, values: dict[str, Any], epoch: float) -> None:
        """Write what was measured over the steps since the last call, and their speed.

        `values` are numbers and scalar tensors by name, "loss" among them. Adds `images_per_s`, and
        `data_wait`, the share of the time that steps waited for data.
        """
        spent = time.monotonic() - self._began
        record: dict[str, Any] = {"epoch": epoch}
        for name, value in values.items():
            record[name] = value.item() if isinstance(value, torch.Tensor) else value
        record["images_per_s"] = self.batch * self._steps / spent
        record["data_wait"] = self._waited / spent
        self.latest = record
        self.record(record)
        self._steps = 0
        self._waited = 0.0
        self._began = time.monotonic()

    def record(self, values: dict[str, Any]) -> None:
        """Write values of this step to log.jsonl and TensorBoard, and show the main ones."""
        if not self.is_main:
            return
        write_record(self.folder, {"step": self.step} | values)
        numbers = {name: value for name, value in values.items() if isinstance(value, float)}
        if self._events:
            for name, value in numbers.items():
                self._events.add_scalar(name, value, self.step)

        shown = ", ".join(f"{name} {numbers[name]:.4g}" for name in self.SHOWN if name in numbers)
        if "knn_qwk" in values:
            text = ", val k-NN {knn_accuracy:.3f} (majority {knn_majority:.3f}), qwk {knn_qwk:.3f}"
            self._knn = text.format(**values)
        if "loss" in values:
            self._bar.set_postfix_str(shown + self._knn)
        if self._bar.disable:
            self._show_line(shown, always="rankme" in values)

    def _show_line(self, text: str, *, always: bool) -> None:
        """Print a line where no bar is: every half minute, and at the end of every epoch."""
        now = time.monotonic()
        if not always and now - self._line_shown <= self.SECONDS_BETWEEN_LINES:
            return
        self._line_shown = now
        speed = self.latest.get("images_per_s", 0.0)
        if speed:
            left = (self.total - self.step) * self.batch / speed
            if left:
                text += f", {left:.0f} s left"
        log.info("step %d/%d: %s", self.step, self.total, text)

    @contextlib.contextmanager
    def not_counted(self) -> Iterator[None]:
        """Leave the time of the body out of the speed, which is that of training alone."""
        began = time.monotonic()
        yield
        self._began += time.monotonic() - began

    def close(self) -> None:
        """End the bar and TensorBoard's file."""
        self._bar.close()
        if self._events:
            self._events.close()

    # ---- names that callers are leaving
    def update(self, measured: dict[str, Any], epoch: float) -> None:
        measured = dict(measured)
        self.count_step(measured["step"], measured.pop("waited"))
        if "teacher_entropy" in measured:
            self.log_interval(measured, epoch)

    @property
    def since(self) -> float:
        return self._began

    @since.setter
    def since(self, value: float) -> None:
        self._began = value
