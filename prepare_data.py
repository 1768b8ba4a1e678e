"""Bring a data set as downloaded into the form that training and evaluation read.

    python prepare_data.py --source RAW --out DATA

Crops every photograph to its fundus, pads it to a square and resizes it, on all cores. Writes
DATA/images/, DATA/manifest.csv, DATA/data_report.json (what was left out and why, crops in doubt,
copies) and DATA/prepare.jsonl, from which the same command goes on where it stopped.
"""

import base64
import contextlib
import functools
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from PIL import Image
from tqdm import tqdm

from fundus import copies, photographs, review, splits
from fundus.adapters import LayoutName, layout_help
from fundus.layouts import read_data
from fundus.listing import Reading
from fundus.manifest import Manifest, picture_paths, picture_records, write_manifest
from fundus.review import Facts
from utils import (
    Bounds,
    InputError,
    Stopped,
    check_bounds,
    flag_of,
    log,
    run_main,
    write_atomic,
    write_json,
)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Of all photographs. From here on the data set itself is in doubt, not single files of it.
BAD_SHARE = 0.01


GradeWord = Literal["0", "1", "2", "3", "4", "ungradable"]


@dataclass
class PrepareOptions:
    """Prepare a data set once: check it, crop every photograph to its fundus, resize, split."""

    source: str
    """Data set as downloaded, class folders, a folder of photographs, or a csv (--path-column)."""
    out: str
    """Folder that receives the prepared pictures and their manifest."""
    size: Annotated[int, Bounds(32, 4096)] = 512
    """Side of the square pictures, in pixels."""
    # The help text follows from the registry of data sets, so it cannot be a docstring.
    layout: Annotated[LayoutName, tyro.conf.arg(help=layout_help())] = "auto"
    path_column: str = ""
    """Read a csv of your own: its column of paths, relative to the csv, or of names alone."""
    grade_column: str = ""
    """Column of grades in the csv that --path-column reads; without it nothing is graded."""
    patient_column: str = ""
    """Column of patients in the csv that --path-column reads. Without it names such as 10_left and
    10_right tell the patient, and any other photograph counts as one of its own."""
    split_column: str = ""
    """Column of splits (train, val, test) in the csv that --path-column reads. Without it a column
    named split, set, subset or partition is taken, or the splits are made by patient."""
    grades: dict[str, GradeWord] = field(default_factory=dict)
    """Grades of class folders, or of a csv's labels, by name: --grades healthy 0 mild 1. What is
    ungradable is left out: --grades 5 ungradable."""
    follow_links: bool = False
    """Follow links that lead out of --source, as to another disk."""
    folds: Annotated[int, Bounds(0, 1000)] = 0
    """Also write manifest-fold-1.csv and so on, for cross-validation with this many folds."""
    image_format: Literal["jpeg", "png"] = "jpeg"
    """File format of the pictures: JPEG of quality 95, or PNG, exact and 5 times as large."""
    graham: bool = False
    """Subtract the local mean, so that lesions stand out (Graham, 2015)."""
    keep_aspect: bool = False
    """Leave out the padding: the longer side of a picture is --size, readers pad it to a square."""
    workers: Annotated[int, Bounds(0, 1024)] = 0
    """Processes that prepare photographs side by side; 0: one for each core."""
    allow_truncated: bool = False
    """Take cut-off JPEG files too; what is missing of them is grey."""
    debug: bool = False
    """Show the traceback of errors that are otherwise one message."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.folds == 1:
            raise InputError("--folds 1: expected 2 or more, or 0 for none")
        if not self.path_column:
            for name in ("grade_column", "patient_column", "split_column"):
                if getattr(self, name):
                    raise InputError(f"{flag_of(name)}: needs --path-column as well")


# ----------------------------------------------------------------------------------- one photograph


@dataclass(frozen=True)
class Task:
    """One photograph to prepare: its path in the data set, both files and how."""

    path: str
    source: Path
    target: Path
    size: int
    _: KW_ONLY
    keep_aspect: bool = False
    graham: bool = False
    image_format: str = "jpeg"
    allow_truncated: bool = False


def prepare_photograph(task: Task) -> Facts:
    """Write one picture and return its facts, or its "error" alone. Runs in the workers."""
    try:
        photograph, truncated = _read(task)
    except photographs.PhotographError as error:
        return {"path": task.path, "error": str(error)}

    # Facts are about the picture as photographed: Graham's way hides how bright it was.
    picture = photograph.picture
    image = photographs.subtract_local_mean(picture) if task.graham else picture
    data = _encode(image, task.image_format)
    _write_picture(task.target, data)
    look = copies.coarse(copies.signature(picture))
    return {
        "path": task.path,
        "truncated": truncated,
        "box": photograph.box,
        "doubtful": photograph.doubtful,
        "width": photograph.width,
        "height": photograph.height,
        "sha256": hashlib.sha256(data).hexdigest(),
        "brightest": review.brightest(picture),
        "contrast": review.contrast(picture),
        "signature": base64.b64encode(look).decode(),
        **_stamp(task.source, "source"),
        **_stamp(task.target, "target"),
    }


def _read(task: Task) -> tuple[photographs.Photograph, bool]:
    """Return a task's photograph and whether it is cut off, which `allow_truncated` lets pass."""
    read = functools.partial(
        photographs.read_photograph, task.source, task.size, keep_aspect=task.keep_aspect
    )
    try:
        return read(allow_truncated=False), False
    except photographs.PhotographError:
        if not task.allow_truncated:
            raise
        return read(allow_truncated=True), True


def _encode(image: np.ndarray, image_format: str) -> bytes:
    """Return a picture, uint8 RGB (H, W, 3), as the bytes of a JPEG or PNG file."""
    buffer = io.BytesIO()
    if image_format == "jpeg":
        # Without chroma subsampling, since microaneurysms are small and red.
        Image.fromarray(image).save(buffer, "jpeg", quality=95, subsampling=0)
    else:
        Image.fromarray(image).save(buffer, image_format)
    return buffer.getvalue()


def _write_picture(target: Path, data: bytes) -> None:
    """Write a picture whole or not at all, without waiting for the disk as write_atomic does."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, target)


def _stamp(path: Path, name: str) -> dict[str, int]:
    """Return size and time of a file, by which it is known to be unchanged."""
    try:
        status = path.stat()
    except OSError:
        return {f"{name}_bytes": -1}
    return {f"{name}_bytes": status.st_size, f"{name}_ns": status.st_mtime_ns}


# --------------------------------------------------------------------------------- many photographs


def prepare_photographs(tasks: Sequence[Task], workers: int) -> Iterator[Facts]:
    """Give the facts of each task as it is finished, in any order.

    Raises InputError when the system kills a worker.
    """
    if workers == 1 or len(tasks) < 2:
        yield from map(prepare_photograph, tasks)
        return

    # Forking a process that has threads can hang, so workers start afresh.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(tasks)), spawn, initializer=_start_worker)
    waiting = iter(tasks)
    pending = set()
    try:
        while True:
            # A few for each worker are enough to keep it busy, and soon called off.
            for task in itertools.islice(waiting, 4 * workers - len(pending)):
                pending.add(pool.submit(prepare_photograph, task))
            if not pending:
                return
            finished, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in finished:
                yield future.result()
    except BrokenProcessPool:
        raise InputError(
            "a worker process was killed, most likely for lack of memory: "
            "repeat the command with fewer --workers, it goes on"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Make a worker end with the main process, and not by itself on Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    # A main process that is killed cannot end its workers; they would wait for tasks for ever.
    def follow_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


# -------------------------------------------------------------------------------------- the journal


def open_journal(out: Path, settings: Mapping[str, Any]) -> dict[str, Facts]:
    """Return the facts of what an earlier run finished in `out`, by photograph.

    DATA/prepare.jsonl begins with the settings, which are the same for all pictures; then comes a
    line for each picture. It is rewritten here without lines that are damaged or superseded.
    Raises InputError for a folder of other content, or prepared with other settings.
    """
    file = out / "prepare.jsonl"
    entries = _read_journal(file)
    # Only the settings name a size: the entries of photographs have a width and a height.
    earlier = [entry for entry in entries if "size" in entry]
    if earlier:
        for name, value in settings.items():
            if earlier[0].get(name) != value:
                was = f"{name.replace('_', '-')} = {earlier[0].get(name)}, not {value}"
                raise InputError(f"--out {out}: was made with {was}; give a new folder")
    elif (out / "manifest.csv").exists() or (out / "images").exists():
        raise InputError(f"--out {out}: holds other data; give a new folder")

    finished = {}
    for entry in entries:
        if "path" in entry:
            finished[entry["path"]] = entry
    lines = [json.dumps(entry) + "\n" for entry in (settings, *finished.values())]
    write_atomic(file, lambda temporary: temporary.write_text("".join(lines), encoding="utf-8"))
    return finished


def _read_journal(file: Path) -> list[dict[str, Any]]:
    """Return the lines of a journal that are whole; none where there is no such file."""
    if not file.is_file():
        return []
    entries = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        # The line at which a run was stopped is cut off; a disk may have damaged others.
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict):
                entries.append(entry)
    return entries


def is_finished(task: Task, entry: Facts) -> bool:
    """Return whether the journal's `entry` still holds for the photograph and its picture."""
    stamps = _stamp(task.source, "source") | _stamp(task.target, "target")
    return _agrees(stamps, entry) and (task.allow_truncated or not entry["truncated"])


def _agrees(stamp: Facts, entry: Facts) -> bool:
    """Return whether a journal's entry says of a file what its `stamp` says."""
    return all(name in entry and entry[name] == value for name, value in stamp.items())


# --------------------------------------------------------------------------------------- the folder


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Make `out` if need be and keep other processes from preparing into it; not on Windows.

    Raises InputError when it is taken, and for whatever cannot be written meanwhile.
    """
    with contextlib.ExitStack() as stack:
        try:
            out.mkdir(parents=True, exist_ok=True)
            if fcntl:
                handle = os.open(out, os.O_RDONLY)
                stack.callback(os.close, handle)
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise InputError(f"--out {out}: another process prepares into it; wait") from None
        except OSError as error:
            raise InputError(f"--out {out}: cannot be written ({error})") from None


def read_source(options: PrepareOptions) -> Manifest:
    """Return what is to be prepared and log its notes; InputError before any work is done."""
    grades = {}
    for name, word in options.grades.items():
        grades[name] = None if word == "ungradable" else int(word)
    reading = Reading(
        options.path_column,
        options.grade_column,
        options.patient_column,
        grades,
        options.split_column,
        options.follow_links,
    )
    manifest = read_data(options.source, options.layout, reading)
    root = manifest.root.resolve()
    out = Path(options.out).expanduser().resolve()
    if manifest.prepared:
        raise InputError(f"--source {root}: is prepared already; give it to training as --data")
    if out.is_relative_to(root) or root.is_relative_to(out):
        raise InputError(f"--out {out}: and --source lie in each other; choose a folder beside it")
    # Too many folds would else be noticed after hours of work.
    patients = len({record.patient for record in manifest.records})
    if options.folds > patients:
        raise InputError(f"--folds {options.folds}: expected 2 to {patients}, as many as patients")
    for note in manifest.notes:
        log.info("%s: %s", manifest.layout, note)
    return manifest


def prepare_folder(
    manifest: Manifest, pictures: Mapping[str, str], out: Path, options: PrepareOptions
) -> dict[str, Facts]:
    """Prepare what is not finished; return the facts of each photograph, by its path.

    Raises InputError when most of what is finished in `out` is of other photographs.
    """
    settings = {
        "size": options.size,
        "keep_aspect": options.keep_aspect,
        "graham": options.graham,
        "image_format": options.image_format,
    }
    facts = open_journal(out, settings)
    tasks = []
    unfinished = []
    for path, picture in pictures.items():
        source = manifest.root / path
        target = out / picture
        task = Task(path, source, target, **settings, allow_truncated=options.allow_truncated)
        tasks.append(task)
        if not is_finished(task, facts.get(path, {})):
            unfinished.append(task)
    refuse_other_photographs(tasks, facts, out)

    # The journal grows picture by picture, so that a stop costs only the pictures in hand.
    done = len(tasks) - len(unfinished)
    workers = options.workers or os.cpu_count() or 1
    log.info("%d photographs, %d of them finished; %d processes", len(tasks), done, workers)
    last_message = time.monotonic()
    with (
        contextlib.closing(prepare_photographs(unfinished, workers)) as finished,
        (out / "prepare.jsonl").open("a", encoding="utf-8") as journal,
        tqdm(total=len(tasks), initial=done, desc="prepare", disable=None) as bar,
    ):
        for entry in finished:
            facts[entry["path"]] = entry
            # A photograph that cannot be used is tried again the next time.
            if "error" not in entry:
                journal.write(json.dumps(entry) + "\n")
                journal.flush()
            done += 1
            bar.update()
            # Where there is no terminal the bar is silent.
            if bar.disable and time.monotonic() - last_message > 30:
                last_message = time.monotonic()
                log.info("%d of %d photographs", done, len(tasks))
    return {path: facts[path] for path in pictures}


def refuse_other_photographs(tasks: Sequence[Task], facts: Mapping[str, Facts], out: Path) -> None:
    """Raise InputError when fewer than half of the facts are about the photographs of the tasks."""
    ours = 0
    for task in tasks:
        if task.path in facts:
            ours += _agrees(_stamp(task.source, "source"), facts[task.path])
    if 2 * ours < len(facts):
        few = f"of {len(facts)} photographs prepared in it, {ours} are those of --source"
        raise InputError(f"--out {out}: {few}; give a new folder")


def prepare(manifest: Manifest, out: Path, options: PrepareOptions) -> None:
    """Prepare a data set into `out`: pictures, report, manifest and folds."""
    suffix = ".jpg" if options.image_format == "jpeg" else ".png"
    pictures = picture_paths(manifest.records, suffix)
    facts = prepare_folder(manifest, pictures, out, options)
    good = tuple(record for record in manifest.records if "error" not in facts[record.path])

    def picture_of(path: str) -> np.ndarray:
        if not options.graham:
            return photographs.open_photograph(out / pictures[path])
        # Graham's pictures show too little of what tells eyes apart.
        return photographs.load_photograph(
            manifest.root / path, options.size, allow_truncated=options.allow_truncated
        )

    # Copies come before splits, which keep them together.
    pairs = copies.find_copies(facts, picture_of)
    linked = [(one, other) for one, other, _ in pairs]
    whole = splits.complete_splits(replace(manifest, records=good), linked)
    for note in whole.notes[len(manifest.notes) :]:
        log.info("%s: %s", whole.layout, note)

    # The report comes before the manifest: a folder with a manifest is complete.
    records = picture_records(whole.records, pictures, facts)
    prepared = replace(whole, records=tuple(records))
    report = review.build_report(prepared, facts, pairs, options.size)
    write_json(out / "data_report.json", report)
    for old_fold in out.glob("manifest-fold-*.csv"):
        old_fold.unlink()
    write_manifest(out, records)
    log.info("%d pictures in %s", len(records), out)
    if options.folds:
        folds = splits.fold_splits(good, options.folds, linked=linked)
        for number, fold in enumerate(folds, 1):
            name = f"manifest-fold-{number}.csv"
            write_manifest(out, picture_records(fold, pictures, facts), name)
        log.info("%d folds in manifest-fold-N.csv", len(folds))

    bad = len(facts) - len(records)
    if bad >= BAD_SHARE * len(facts):
        raise InputError(
            f"{manifest.root}: {bad} of {len(facts)} photographs cannot be used, all others are "
            f"prepared; copy the bad ones again (see {out / 'data_report.json'}) and repeat"
        )


def main(options: PrepareOptions, config: Path | None = None) -> None:
    """Prepare a data set, or what is left of it to prepare, and say what was found."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    out = Path(options.out).expanduser()
    try:
        manifest = read_source(options)
        with locked(out):
            prepare(manifest, out, options)
    except KeyboardInterrupt:
        raise Stopped("what is finished is kept, the same command goes on") from None


if __name__ == "__main__":
    run_main(main, PrepareOptions)
