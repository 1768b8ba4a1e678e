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
import numbers
import os
import sys
import tempfile
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar

import tyro
import yaml
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

log = logging.getLogger("ssrl")
HERE = Path(__file__).resolve().parent  # of the checkout: where configs/ lies
DATA_FLAGS = {"--data", "--data-path"}
# Where an option's value comes from; each overrides those before it.
BY_DEFAULT = 0
IN_CONFIG = 1
IN_COMMAND = 2
OF_ONE_CALL = ("output_dir", "overwrite", "resume", "debug")  # they do not describe a run
Options = TypeVar("Options")


class InputError(ValueError):
    """What a user can mend: the message says what, where, what was expected and how to mend it."""


class Diverged(RuntimeError):
    """Training reached a state from which it cannot go on (exit code 3)."""


class Stopped(RuntimeError):
    """A signal ended the run and its state is saved (exit code 75)."""


EXIT_CODES = {InputError: 2, Diverged: 3, Stopped: 75}


@dataclass(frozen=True)
class Bounds:
    """Least and largest value that an option takes, both allowed; of a list, each value's.

    Written beside the field: `epochs: Annotated[int, Bounds(1, 100_000)] = 100`.
    """

    low: float
    high: float


ANY_NUMBER = Bounds(-math.inf, math.inf)  # of a field without Bounds


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
    """Processes that load photographs for each one that computes; 0: it loads them itself."""
    seed: Annotated[int, Bounds(0, 2**32 - 1)] = 0
    """Seed of everything random. Splits do not depend on it."""
    overwrite: bool = False
    """Replace results that an earlier run left in the output folder."""
    debug: bool = False
    """Show the traceback of errors that are otherwise one message."""

    # Where `parse` found each flag: IN_CONFIG or IN_COMMAND. Without an annotation, since dataclass
    # makes an option of whatever has one.
    given = MappingProxyType({})

    def __post_init__(self) -> None:
        check_bounds(self)

    def is_meant_for(self, name: str, other: str) -> bool:
        """Return whether `name` was given where `other` was, or in a place that overrides it.

        Places are defaults < config < command: a config's --arch says nothing about the --init of a
        command. Options made in Python are all meant for each other.
        """
        place = self.given.get(flag_of(name), BY_DEFAULT)
        return place >= self.given.get(flag_of(other), BY_DEFAULT)


# --------------------------------------------------------------------------------- reading options
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
    if argv is None:
        argv = sys.argv[1:]
    # These two are no options of a script: the parser would refuse them.
    arguments, _ = _drop_option(argv, "--local-rank")
    arguments, config = _drop_option(arguments, "--config")
    given = _flags_in(arguments)

    # Whoever names data does not want the default config, which is a demonstration.
    path = None
    if config:
        path = Path(config)
    elif not given & DATA_FLAGS:
        path = default_config
    from_file = []
    if path:
        from_file = _yaml_flags(options_class, path)

    # One parser reads both. The file's flags come first, since the last value of a flag wins.
    words = from_file + arguments
    about = (
        f"{options_class.__doc__}\n--config FILE takes options from a YAML file; flags override it."
    )
    registry = ConstructorRegistry()
    registry.primitive_rule(_keep_unreadable_number)
    try:
        options = tyro.cli(options_class, args=words, description=about, registry=registry)
    except SystemExit as end:
        if from_file and end.code:
            print(f"Options that are not in the command come from {path}", file=sys.stderr)
        raise
    # Classes that do not inherit RunOptions may not have checked by themselves.
    check_bounds(options)
    _refuse_empty_lists(options, given)
    options.given = dict.fromkeys(_flags_in(from_file), IN_CONFIG)
    options.given |= dict.fromkeys(given, IN_COMMAND)
    return options, path


def _flags_in(words: list[str]) -> set[str]:
    """Return the flags among a command's words, with dashes: "--batch-size"."""
    flags = set()
    for word in words:
        if word.startswith("--"):
            flags.add(word.partition("=")[0].replace("_", "-"))
    return flags


def flag_of(name: str) -> str:
    """Return the flag of an option: "--batch-size" for "batch_size"."""
    return "--" + name.replace("_", "-")


def _refuse_empty_lists(options: Any, given: set[str]) -> None:
    """Raise InputError for a list without values: `--k` alone is a slip.

    An option that is empty by default may stay so, where its flag is not `given`.
    """
    for field in dataclasses.fields(options):
        flag = flag_of(field.name)
        is_left_open = field.default == () and flag not in given
        if getattr(options, field.name) == () and not is_left_open:
            raise InputError(f"{flag} has no value: give at least one, separated by blanks")


def _drop_option(arguments: list[str], name: str) -> tuple[list[str], str | None]:
    """Take `name` and its value out of the arguments; the name may have dashes or underscores."""
    kept = []
    value = None
    words = iter(arguments)
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


def _keep_unreadable_number(type_info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Keep the text of what should be a number and is none, as tyro's rule for numbers.

    `check_bounds` then refuses it and says which numbers the option takes, which tyro cannot know.
    """
    kind = type_info.type
    if kind not in (int, float):
        return None

    def read(words: list[str]) -> float | str:
        try:
            return kind(words[0])
        except ValueError:  # also for integers of more than 4,300 digits
            return words[0]

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=kind.__name__.upper(),
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, (int, float)),
        str_from_instance=lambda value: [str(value)],
    )


def _yaml_flags(options_class: type, path: Path) -> list[str]:
    """Turn a YAML mapping into flags; scalars stay text, so that the one parser types them."""
    types = typing.get_type_hints(options_class)
    flags: list[str] = []
    names: set[str] = set()
    for name, texts, place in _yaml_items(path):
        if name not in types:
            message = f"{place}unknown option {name!r}"
            for near in difflib.get_close_matches(name, types, 1):
                message += f"; did you mean {near!r}?"
            raise InputError(message)
        if name in names:
            raise InputError(f"{place}{name!r} is given twice; keep one")
        names.add(name)

        flag = flag_of(name)
        if types[name] is not bool:
            flags += [flag, *texts]
        elif texts == ["true"]:
            flags.append(flag)
        elif texts == ["false"]:
            flags.append(flag.replace("--", "--no-", 1))
        else:
            raise InputError(f"{place}{name!r} must be true or false, not {' '.join(texts)}")
    return flags


def _yaml_items(path: Path) -> Iterator[tuple[str, list[str], str]]:
    """Give name, values as text and place ("file, line n: ") of a YAML mapping's entries."""
    try:
        # Scalars stay as they are written: YAML itself reads 1e-3 as text, no as false, 12:30 as
        # 750. Nodes tell their line, and a name that is given twice.
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except OSError as error:
        raise InputError(f"--config {path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path}: is not YAML ({error})") from None
    if root is None:  # nothing but comments
        return
    if not isinstance(root, yaml.MappingNode):
        raise InputError(f"--config {path}: expected lines of the form `option: value`")

    for key, node in root.value:
        place = f"{path}, line {key.start_mark.line + 1}: "
        values = [node]
        if isinstance(node, yaml.SequenceNode):
            values = node.value
        texts = []
        for value in values:
            if not isinstance(value, yaml.ScalarNode):
                raise InputError(f"{place}{key.value!r} must be a value or a list of values")
            texts.append(value.value)
        yield str(key.value).replace("-", "_"), texts, place


# ------------------------------------------------------------------- checking and writing options
def check_bounds(options: Any) -> None:
    """Raise InputError for the first number among the options that is outside its Bounds.

    NaN is outside any, and text is no number, with Bounds or without. The values of a list and of a
    dict are checked one by one. Checks that compute with the options come after this one.
    """
    hints = typing.get_type_hints(type(options), include_extras=True)
    for field in dataclasses.fields(options):
        number_type = _number_type(hints[field.name])
        if number_type is None:
            continue
        bounds = _bounds_of(hints[field.name])
        for value in _values_of(getattr(options, field.name)):
            # Every comparison with NaN is false, so it is asked what fits, not what is outside.
            fits = isinstance(value, number_type) and bounds.low <= value <= bounds.high
            if not fits:
                expected = _expected_text(number_type, bounds)
                raise InputError(f"{flag_of(field.name)} {shorten(value)}: expected {expected}")


def _number_type(hint: Any) -> type | None:
    """Return which numbers a field holds, itself or in a list or dict; None if none."""
    # Annotated[tuple[int, ...], Bounds(1, 9)] -> tuple[int, ...] -> int
    if typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    types = (hint, *typing.get_args(hint))
    if float in types:
        return numbers.Real
    if int in types:
        return numbers.Integral
    return None


def _bounds_of(hint: Any) -> Bounds:
    """Return the Bounds that stand beside a field."""
    for note in getattr(hint, "__metadata__", ()):
        if isinstance(note, Bounds):
            return note
    return ANY_NUMBER


def _values_of(value: Any) -> list[Any]:
    """Return the values of a dict or a list, or the one value."""
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, (tuple, list)):
        return list(value)
    return [value]


def _expected_text(number_type: type, bounds: Bounds) -> str:
    """Return which numbers an option takes, for a message."""
    text = "a number"
    if number_type is numbers.Integral:
        text = "a whole number"
    if bounds == ANY_NUMBER:
        return text
    return f"{text} from {_limit_text(bounds.low)} to {_limit_text(bounds.high)}"


def _limit_text(limit: float) -> str:
    """Return a limit as it is typed: 4294967295 and 0.05."""
    # without commas between thousands: tyro breaks the lines of its messages there
    if float(limit).is_integer() and abs(limit) < 1e15:
        return str(int(limit))
    return f"{limit:g}"


def shorten(value: Any) -> str:
    """Return a value's text for a message, at most 60 characters of it."""
    try:
        text = str(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "with thousands of digits"
    if len(text) <= 60:
        return text
    return f"{text[:40]}... ({len(text)} characters)"


def plain_options(options: Any) -> dict[str, Any]:
    """Return the options that describe a run, lists for tuples; without those of one call alone."""
    plain = {}
    for field in dataclasses.fields(options):
        name = field.name
        value = getattr(options, name)
        if isinstance(value, tuple):  # YAML and JSON know lists alone
            value = list(value)
        if name not in OF_ONE_CALL:
            plain[name] = value
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


# ------------------------------------------------------------------------------------- the program
def run_main(main: Any, options_class: type, *, default_config: Path | None = None) -> None:
    """Run `main(options, config file or None)` as a program; known errors are one message."""
    setup_log()
    keep_freed_memory()
    debug = "--debug" in sys.argv  # for errors of the options themselves
    try:
        options, config = parse(options_class, default_config=default_config)
        debug = options.debug
        main(options, config)
    except tuple(EXIT_CODES) as error:
        if debug:
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(EXIT_CODES[type(error)])


def setup_log() -> None:
    """Print log records of this program as plain lines, of the main process alone."""
    # Force: a library that was imported may have set up the log for itself
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stdout, force=True)
    level = logging.INFO
    if os.environ.get("RANK", "0") != "0":  # set by launchers of several processes
        level = logging.ERROR
    log.setLevel(level)


def keep_freed_memory() -> None:
    """Let this process, and those it starts, keep freed memory for what they allocate next.

    glibc gives large arrays back to the system at once; every photograph, and every step on a CPU,
    then waits for new pages, a tenth of its time. No other C library is asked.
    """
    # The numbers are M_TRIM_THRESHOLD and M_MMAP_MAX of glibc's malloc.h
    _set_malloc("MALLOC_TRIM_THRESHOLD_", -1, 2**31 - 1)
    _set_malloc("MALLOC_MMAP_MAX_", -4, 0)


def _set_malloc(variable: str, number: int, value: int) -> None:
    """Set one of glibc's settings, in this process and through the environment in its children."""
    os.environ.setdefault(variable, str(value))
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(number, value)


# ------------------------------------------------------------------------------------------- files
def write_atomic(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it: whole or not at all.

    Makes the folder where it is missing; raises InputError where a file is in its place.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{path.parent}: is no folder but a file; name another") from None

    # In the same folder, since renaming is atomic within one file system only.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        # Without this a power cut after the renaming may leave the new name on an empty file.
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        # Files of mkstemp are private, but results are for the group, as far as the umask allows.
        # Python tells the umask only while setting it.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:  # Ctrl-C, too, leaves no temporary file behind
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; raises ValueError for NaN and infinities, since JSON has none."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --------------------------------------------------------------------------------------- schedules
# Pure functions of the step: they keep no state, so that a resumed run continues by arithmetic.
def cosine_schedule(
    step: float, total: float, start: float, end: float, warmup: float = 0
) -> float:
    """Return the value at `step`: linear from 0 to `start` over `warmup`, then cosine to `end`.

    At `total` it is `end`, and after it.
    """
    if step < warmup:
        return start * step / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def linear_schedule(step: float, total: float, start: float, end: float) -> float:
    """Return the value at `step`: linear from `start` to `end` over `total` steps, then `end`."""
    if step >= total:
        return end
    return start + (end - start) * step / total
