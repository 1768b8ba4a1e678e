"""Options, errors, log, files and schedules: the same for every script.

Nothing here knows about fundus photographs, vision transformers or torch, which would make the
processes that prepare data large; devices.py and run_folder.py hold what a run needs of torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import difflib
import hashlib
import json
import logging
import math
import os
import sys
import tempfile
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
import yaml

log = logging.getLogger("ssrl")
HERE = Path(__file__).resolve().parent  # of the checkout: where configs/ lies
DATA_FLAGS = {"--data", "--data-path"}
OF_ONE_CALL = ("output_dir", "overwrite", "resume", "debug")  # they do not describe a run
Options = TypeVar("Options")


class InputError(ValueError):
    """What a user can mend: the message says what, where, what was expected and how to mend it."""


class Diverged(RuntimeError):
    """Training reached a state from which it cannot go on (exit code 3)."""


class Stopped(RuntimeError):
    """A signal ended the run and its state is saved (exit code 75)."""


@dataclass(frozen=True)
class Bounds:
    """Least and largest value that an option takes, both allowed; of a list, each value's.

    Written beside the field: `epochs: Annotated[int, Bounds(1, 100_000)] = 100`.
    """

    low: float
    high: float


@dataclass
class RunOptions:
    """Options of every script."""

    output_dir: str = ""
    """Folder that receives all results; empty: runs/<name of the config>, or the weights' run."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto takes CUDA, then MPS, then the CPU."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the networks; auto is bf16 where the hardware has it, else fp32."""
    workers: Annotated[int, Bounds(0, 1024), tyro.conf.arg(aliases=("--num-workers",))] = (
        dataclasses.field(default_factory=lambda: min(8, os.cpu_count() or 1))
    )
    """Processes that load photographs, for each training process; 0: none beside it."""
    seed: Annotated[int, Bounds(0, 2**32 - 1)] = 0
    """Seed of everything random. Splits do not depend on it."""
    overwrite: bool = False
    """Replace results that an earlier run left in the output folder."""
    debug: bool = False
    """Show the traceback of errors that are otherwise one message."""

    def __post_init__(self) -> None:
        check_bounds(self)


# ----------------------------------------------------------------------------------------- options
def parse(
    options_class: type[Options],
    argv: list[str] | None = None,
    *,
    default_config: Path | None = None,
) -> tuple[Options, Path | None]:
    """Read options: dataclass defaults < YAML of `--config` < flags, the last value of a flag wins.

    `--local-rank` of torch.distributed.launch is accepted and ignored (LOCAL_RANK says the same).
    `default_config` is used when neither `--config` nor `--data` is given. Returns the options and
    the config file used, if any. Raises InputError for faults of the YAML file and for empty lists;
    faults of flags end the program with exit code 2, after a message naming the nearest known one.
    """
    arguments = _drop_option(list(sys.argv[1:] if argv is None else argv), "--local-rank")[0]
    arguments, config = _drop_option(arguments, "--config")
    named = {word.partition("=")[0].replace("_", "-") for word in arguments}
    path = Path(config) if config else None if named & DATA_FLAGS else default_config
    flags = _yaml_flags(options_class, path) if path else []
    about = (
        f"{options_class.__doc__}\n--config FILE takes options from a YAML file; flags override it."
    )
    try:
        options = tyro.cli(options_class, args=flags + arguments, description=about)
    except SystemExit as end:
        if flags and end.code:
            print(f"Options that are not in the command come from {path}", file=sys.stderr)
        raise
    for field in dataclasses.fields(options):
        flag = "--" + field.name.replace("_", "-")
        if getattr(options, field.name) == () and (field.default != () or flag in named):
            raise InputError(f"{flag} has no value: give at least one, separated by blanks")
    return options, path


def _drop_option(arguments: list[str], name: str) -> tuple[list[str], str | None]:
    """Take `name` and its value out of the arguments, both spellings of its dashes."""
    kept, value, words = [], None, iter(arguments)
    for word in words:
        flag, equals, attached = word.partition("=")
        if flag.replace("_", "-") != name:
            kept.append(word)
        elif equals:
            value = attached
        else:
            value = next(words, None)
            if value is None or value.startswith("--"):
                raise InputError(f"{name} needs a value after it")
    return kept, value


def _yaml_flags(options_class: type, path: Path) -> list[str]:
    """Turn a YAML mapping into flags; scalars stay text, so that the one parser types them."""
    types = typing.get_type_hints(options_class)
    flags: dict[str, list[str]] = {}
    for key, texts, where in _yaml_items(path):
        flag = key.replace("_", "-")
        if key not in types:
            near = difflib.get_close_matches(key, types, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"{where}unknown option {key!r}{hint}")
        if key in flags:
            raise InputError(f"{where}{key!r} is given twice; keep one")
        if types[key] is not bool:
            flags[key] = [f"--{flag}", *texts]
        elif texts in (["true"], ["false"]):
            flags[key] = [f"--{flag}" if texts == ["true"] else f"--no-{flag}"]
        else:
            raise InputError(f"{where}{key!r} must be true or false, not {' '.join(texts)}")
    return [word for words in flags.values() for word in words]


def _yaml_items(path: Path) -> typing.Iterator[tuple[str, list[str], str]]:
    """Give key, values as text and place ("file, line n: ") of a YAML mapping's entries."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except OSError as error:
        raise InputError(f"--config {path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path}: is not YAML ({error})") from None
    if root is not None and not isinstance(root, yaml.MappingNode):
        raise InputError(f"--config {path}: expected lines of the form `option: value`")
    for key, node in root.value if root else []:
        where = f"{path}, line {key.start_mark.line + 1}: "
        values = node.value if isinstance(node, yaml.SequenceNode) else [node]
        if not all(isinstance(value, yaml.ScalarNode) for value in values):
            raise InputError(f"{where}{key.value!r} must be a value or a list of values")
        yield str(key.value).replace("-", "_"), [value.value for value in values], where


def plain_options(options: Any) -> dict[str, Any]:
    """Return the options that describe a run, lists for tuples; without those of one call alone."""
    plain = {}
    for name, value in vars(options).items():
        if name not in OF_ONE_CALL:
            plain[name] = list(value) if isinstance(value, tuple) else value
    return plain


def dump_options(options: Any) -> str:
    """Return the options as YAML that `--config` reads back; without those of one call alone.

    An option left open, empty as by default, is left out: YAML's empty list is refused on reading.
    """
    plain = plain_options(options)
    for field in dataclasses.fields(options):
        if field.default == () and plain.get(field.name) == []:
            del plain[field.name]
    return yaml.safe_dump(plain, sort_keys=False)


EXIT_CODES = {InputError: 2, Diverged: 3, Stopped: 75}


def run_main(main: Any, options_class: type, *, default_config: Path | None = None) -> None:
    """Run `main(options, config file or None)` as a program; known errors are one message."""
    setup_log()
    keep_freed_memory()
    options = None
    try:
        options, config = parse(options_class, default_config=default_config)
        main(options, config)
    except tuple(EXIT_CODES) as error:
        if options.debug if options else "--debug" in sys.argv:
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(EXIT_CODES[type(error)])


def check_bounds(options: Any) -> None:
    """Raise InputError for the first number among the options that is outside its Bounds.

    NaN is outside any. A dict's values and a list's are checked one by one.
    """
    hints = typing.get_type_hints(type(options), include_extras=True)
    for field in dataclasses.fields(options):
        bounds = [m for m in getattr(hints[field.name], "__metadata__", ()) if type(m) is Bounds]
        if not bounds:
            continue
        value = getattr(options, field.name)
        numbers = [value]
        if isinstance(value, dict):
            numbers = list(value.values())
        elif isinstance(value, (tuple, list)):
            numbers = list(value)
        low, high = bounds[0].low, bounds[0].high
        for number in numbers:
            if not low <= number <= high:
                flag = "--" + field.name.replace("_", "-")
                raise InputError(f"{flag} {number}: expected {low:g} to {high:g}")


def check_options(options: Any, names: str, fits: Any, expected: str) -> None:
    """Raise InputError for the first of the options `names` whose value does not fit."""
    for name in names.split():
        if not fits(getattr(options, name)):
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag} {getattr(options, name)}: expected {expected}")


def setup_log() -> None:
    """Print log records of this program as plain lines, of the main process alone."""
    main_process = int(os.environ.get("RANK", "0")) == 0
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stdout, force=True)
    log.setLevel(logging.INFO if main_process else logging.ERROR)


def keep_freed_memory() -> None:
    """Let this process, and those it starts, keep freed memory for what they allocate next.

    glibc gives large arrays back to the system at once; every photograph, and every step on a CPU,
    then waits for new pages, a tenth of its time. No other C library is asked.
    """
    for name, number, value in (("TRIM_THRESHOLD", -1, 2**31 - 1), ("MMAP_MAX", -4, 0)):
        os.environ.setdefault(f"MALLOC_{name}_", str(value))  # for processes to come
        with contextlib.suppress(OSError, AttributeError, TypeError):
            ctypes.CDLL(None).mallopt(number, value)


# --------------------------------------------------------------------------------------- run files
def write_atomic(path: Path, write: typing.Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename: whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{path.parent}: is no folder but a file; name another") from None
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's files are private; results are for the group
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; NaN and infinities are refused, since JSON has none."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --------------------------------------------------------------------------------------- schedules
def cosine_schedule(
    step: float, total: float, start: float, end: float, warmup: float = 0
) -> float:
    """Return the value at `step`: linear from 0 to `start` over `warmup`, then cosine to `end`.

    Pure: needs no state, so that a resumed run continues by arithmetic. At `total` it is `end`.
    """
    if step < warmup:
        return start * step / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def linear_schedule(step: float, total: float, start: float, end: float) -> float:
    """Return the value at `step`: linear from `start` to `end` over `total` steps, then `end`."""
    return end if step >= total else start + (end - start) * step / total
