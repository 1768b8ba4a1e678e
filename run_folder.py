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
SECONDS_BETWEEN_LINES = 30
# What a training shows on its bar or lines; its log holds more.
SHOWN = (
    "epoch",
    "loss",
    "lesion",
    "lr",
    "images_per_s",
    "data_wait",
    "memory_gb",
    "rankme",
    "knn_accuracy",
    "knn_majority",
    "knn_qwk",
)
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
        is_run = (self.path / "config.yaml").is_file() and (self.path / "log.jsonl").is_file()
        with processes.main_first():
            if processes.is_main and self.path.is_dir():
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
        if file.is_file():
            checkpoint = load_torch(file)
            self._check_same_run(checkpoint, options, fingerprint, resumable, processes)
            processes.agree(checkpoint["step"], f"the step of {file}")
            return checkpoint

        # Another process may see a checkpoint: then the folder is not shared.
        processes.agree(-1, f"the step of {file}")
        # The log may tell of steps whose state is lost. Starting over would hide that.
        _, later = split_log(self.path / "log.jsonl", 0)
        if later:
            raise InputError(
                f"{self.path} holds a run without its checkpoint.pth, which it needs to go on; "
                f"{START_ANEW}"
            )
        return None

    def _check_same_run(
        self,
        checkpoint: dict[str, Any],
        options: Any,
        fingerprint: str,
        resumable: Sequence[str],
        processes: Processes,
    ) -> None:
        """Raise InputError when the checkpoint's run differs in what must not differ."""
        # A run from before an option existed ran as the option's default does.
        old = _as_lists(_defaults(options) | checkpoint["options"])
        changed = _list_changes(old, _run_options(options, processes), resumable)

        # Photographs count by what they are, not by where they lie.
        if fingerprint != checkpoint["data"]:
            changed["data"] = "other photographs, grades or splits"
        elif changed.pop("data", None):
            log.info("resume: the same data at %s", options.data)
        if options.resume == "never":
            changed["resume"] = "never, and a run is there"
        if changed:
            listed = "; ".join(f"{name}: {change}" for name, change in changed.items())
            raise InputError(f"{self.path} holds another run ({listed}); {START_ANEW}")

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
        if checkpoint:
            options = _with_kept_values(options, checkpoint["options"])
        self.fingerprint = fingerprint
        self.options = _run_options(options, processes)
        if not processes.is_main:
            return

        # The steps after the checkpoint will be taken, and logged, again.
        log_file = self.path / "log.jsonl"
        kept = ""
        if checkpoint:
            kept, _ = split_log(log_file, checkpoint["step"])
        if log_file.is_file() and log_file.read_text("utf-8") != kept:
            write_atomic(log_file, lambda temporary: temporary.write_text(kept, "utf-8"))

        # A resumed run may have more epochs or other workers than config.yaml says.
        config = self.path / "config.yaml"
        text = dump_options(options)
        if not config.is_file() or config.read_text("utf-8") != text:
            write_atomic(config, lambda temporary: temporary.write_text(text, "utf-8"))

        if checkpoint is None:
            first = {"command": sys.argv, "data": fingerprint, "versions": versions()}
            first["options"] = self.options
            write_record(self.path, first)


def _with_kept_values(options: Any, kept: dict[str, Any]) -> Any:
    """Return the options; those that are left open have the values that the run began with."""
    changes = {}
    for name, value in plain_options(options).items():
        if value == [] and kept.get(name):
            changes[name] = tuple(kept[name])
    return dataclasses.replace(options, **changes)


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
        if isinstance(value, tuple):
            value = list(value)
        plain[name] = value
    return plain


def _list_changes(
    old: dict[str, Any], new: dict[str, Any], resumable: Sequence[str]
) -> dict[str, str]:
    """Return "old -> new" of each option that keeps a run from going on; log those that do not."""
    changed = {}
    for name, value in new.items():
        # An empty list leaves an option open: it keeps the value that the run began with.
        if value == [] or old.get(name) == value:
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
    except Exception as error:
        # Damage shows in whatever error the bytes happen to make. A file that torch refuses for its
        # code is told from a damaged one by torch's message alone.
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

    # A path of the other operating system cannot be made here, a pure one can, and it touches no
    # file. Python 3.13 calls the module pathlib._local.
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
    if not path.is_file():
        return "", ""
    kept = []
    later = []
    for line in path.read_text("utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # cut short
        # The first line, from before any step, names none.
        if record.get("step", 0) > step:
            later.append(line + "\n")
        else:
            kept.append(line + "\n")
    return "".join(kept), "".join(later)


def _list_shown(values: dict[str, Any]) -> str:
    """Return the main ones of measured values as text; a dash stands for an undefined one."""
    parts = []
    for name in SHOWN:
        value = values.get(name)
        if isinstance(value, float):
            parts.append(f"{name} {value:.4g}")
        elif name in values and value is None:
            parts.append(f"{name} -")
    return ", ".join(parts)


class Progress:
    """Shows and logs the course of a training: a bar on a terminal, lines elsewhere.

    The main process also writes log.jsonl, and TensorBoard's events where that is installed.
    """

    def __init__(self, folder: Path, start: int, total: int, batch: int, *, is_main: bool) -> None:
        self.folder = folder
        self.total = total  # steps
        self.batch = batch  # images of a step, over all processes
        self.is_main = is_main
        self.step = start
        self.latest: dict[str, Any] = {}  # what `log_interval` wrote last

        # What is counted since then.
        self._steps = 0
        self._waited = 0.0  # seconds that steps waited for data
        self._began = time.monotonic()

        self._line_shown = 0.0
        self._knn = ""
        # To tqdm, None means a bar where the output is a terminal.
        hide_bar = None
        if not is_main:
            hide_bar = True
        self._bar = tqdm(total=total, initial=start, unit="step", disable=hide_bar)
        self._events = None
        if is_main:
            # TensorBoard is an extra, and takes seconds to import.
            with contextlib.suppress(ImportError):
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

        `values` are numbers and scalar tensors by name, "lr" among them. Adds `images_per_s`, and
        `data_wait`, the share of the time that steps waited for data.
        """
        spent = time.monotonic() - self._began
        record: dict[str, Any] = {"epoch": epoch}
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                value = value.item()
            record[name] = value
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
        # Counts and words make no curve, and are not shown.
        numbers = {name: value for name, value in values.items() if isinstance(value, float)}
        if self._events:
            for name, value in numbers.items():
                self._events.add_scalar(name, value, self.step)

        shown = _list_shown(values)
        # The scores of an epoch stay beside the bar until there are new ones.
        if "knn_qwk" in values:
            qwk = "-"
            if values["knn_qwk"] is not None:
                qwk = f"{values['knn_qwk']:.3f}"
            text = ", val k-NN {knn_accuracy:.3f} (majority {knn_majority:.3f}), qwk "
            self._knn = text.format(**values) + qwk
        if "loss" in values or "lesion" in values:
            self._bar.set_postfix_str(shown + self._knn)
        if self._bar.disable:
            self._show_line(shown, always="rankme" in values)

    def _show_line(self, text: str, *, always: bool) -> None:
        """Print a line where no bar is: every half minute, and at the end of every epoch."""
        now = time.monotonic()
        if not always and now - self._line_shown <= SECONDS_BETWEEN_LINES:
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
