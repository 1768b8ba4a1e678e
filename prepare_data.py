"""Bring a data set as downloaded into the form that training and evaluation read.

    python prepare_data.py --source RAW --out DATA

Crops every photograph to its fundus, pads it to a square and resizes it, on all cores. Writes
DATA/images/, DATA/manifest.csv, DATA/data_report.json (what was left out and why, crops in doubt,
copies) and DATA/prepare.jsonl, from which the same command goes on where it stopped.
"""

import base64
import contextlib
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from fundus import copies, photographs, review, splits
from fundus.layouts import read_data
from fundus.listing import Reading
from fundus.manifest import Manifest, Record, picture_paths, write_manifest
from utils import InputError, Stopped, check_options, log, run_main, write_atomic, write_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Layout = Literal[
    "auto", "eyepacs", "aptos", "ddr", "messidor2", "idrid", "class_folders", "photographs", "csv"
]
BAD_SHARE = 0.01  # of all photographs; from here on the data set itself is in doubt


@dataclass
class PrepareOptions:
    """What to prepare, where to, and how."""

    source: str
    """Data set as downloaded, class folders, a folder of photographs, or a csv (--path-column)."""
    out: str
    """Folder that receives the prepared pictures and their manifest."""
    size: int = 512
    """Side of the square pictures, in pixels."""
    layout: Layout = "auto"
    """How the data set lies on disk; auto tells by what is there."""
    path_column: str = ""
    """Of a csv that is no data set's own: the column of paths, relative to the csv, or of names."""
    grade_column: str = ""
    """Its column of grades."""
    patient_column: str = ""
    """Its column of patients; without it, names like <patient>_left tell them, or each is one."""
    grades: dict[str, int] = field(default_factory=dict)
    """Grades of class folders by name: --grades healthy 0 mild 1."""
    folds: int = 0
    """Write manifest-fold-1.csv and so on too, for cross-validation with this many folds."""
    image_format: Literal["jpeg", "png"] = "jpeg"
    """Of the pictures: JPEG of quality 95, or PNG, which loses nothing and is 5 times as large."""
    graham: bool = False
    """Subtract the local mean, so that lesions stand out (Graham, 2015)."""
    keep_aspect: bool = False
    """Keep the fundus' own sides, the longer one --size; readers pad it to a square."""
    workers: int = 0
    """Processes that prepare side by side (0: one for each core)."""
    allow_truncated: bool = False
    """Take cut-off JPEG files too; what is missing of them is grey."""
    debug: bool = False
    """Show the traceback of errors that are otherwise one message."""

    def __post_init__(self) -> None:
        check_options(self, "size", lambda v: 32 <= v <= 4096, "32 to 4096 pixels")
        check_options(self, "workers", lambda v: v >= 0, "0 (all cores) or more")
        check_options(self, "folds", lambda v: v == 0 or v > 1, "2 or more, or 0 for none")
        check_options(self, "grades", lambda v: {*v.values()} <= {*range(5)}, "names and 0 to 4")
        if (self.grade_column or self.patient_column) and not self.path_column:
            raise InputError("--path-column: --grade-column and --patient-column want it, too")


class Task(NamedTuple):
    """One photograph to prepare: its path in the data set, both files and how."""

    path: str
    source: Path
    target: Path
    size: int
    keep_aspect: bool = False
    graham: bool = False
    image_format: str = "jpeg"
    allow_truncated: bool = False


def prepare_photograph(task: Task) -> dict[str, Any]:
    """Write one picture and return its facts, or its "error" alone. Runs in the workers."""
    try:
        photograph, truncated = _read(task)
    except photographs.PhotographError as error:
        return {"path": task.path, "error": str(error)}
    picture = photograph.picture
    light = sum(np.moveaxis(picture.astype(np.uint16), 2, 0))  # three times the mean
    darker = np.cumsum(np.bincount(light.ravel()))  # pixels up to each value
    tone = {"brightest": int(np.searchsorted(darker, 0.99 * light.size)) // 3}
    h, w = (side // 4 for side in light.shape)  # of the middle, away from the rim:
    tone["contrast"] = round(float(light[h:-h, w:-w].std() / 3), 1)
    tone["signature"] = base64.b64encode(copies.coarse(copies.signature(picture))).decode()
    image = photographs.subtract_local_mean(picture) if task.graham else picture
    # Without chroma subsampling, since microaneurysms are small and red.
    options = {"quality": 95, "subsampling": 0} if task.image_format == "jpeg" else {}
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, task.image_format, **options)
    task.target.parent.mkdir(parents=True, exist_ok=True)
    temporary = task.target.with_name(f".{task.target.name}.tmp")
    temporary.write_bytes(buffer.getvalue())
    os.replace(temporary, task.target)
    facts = {"path": task.path, "truncated": truncated}
    facts |= dict(zip(photographs.Photograph._fields[1:], photograph[1:], strict=True))
    facts["sha256"] = hashlib.sha256(buffer.getvalue()).hexdigest()
    return facts | tone | _stamp(task.source, "source") | _stamp(task.target, "target")


def _read(task: Task) -> tuple[photographs.Photograph, bool]:
    """Read a task's photograph; say whether it is cut off, which `allow_truncated` lets pass."""
    try:
        return photographs.read_photograph(task.source, task.size, False, task.keep_aspect), False
    except photographs.PhotographError:
        if not task.allow_truncated:
            raise
        return photographs.read_photograph(task.source, task.size, True, task.keep_aspect), True


def _stamp(path: Path, name: str) -> dict[str, int]:
    """Return size and time of a file, by which it is known to be unchanged."""
    try:
        status = path.stat()
    except OSError:
        return {f"{name}_bytes": -1}
    return {f"{name}_bytes": status.st_size, f"{name}_ns": status.st_mtime_ns}


def prepare_photographs(tasks: list[Task], workers: int) -> Iterator[dict[str, Any]]:
    """Give the facts of each task as it is finished, in any order."""
    if workers == 1 or len(tasks) < 2:
        yield from map(prepare_photograph, tasks)
        return
    waiting, pending = iter(tasks), set()
    spawn = multiprocessing.get_context("spawn")  # forking a process that has threads can hang
    pool = ProcessPoolExecutor(min(workers, len(tasks)), spawn, initializer=_start_worker)
    try:
        while True:
            for task in itertools.islice(waiting, 4 * workers - len(pending)):
                pending.add(pool.submit(prepare_photograph, task))
            if not pending:
                return
            finished, pending = wait(pending, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in finished)
    except BrokenProcessPool:
        what = "a worker process was killed, most likely for lack of memory"
        raise InputError(f"{what}: repeat the command with fewer --workers, it goes on") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends its workers itself

    def follow_parent() -> None:  # even where that was killed
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


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


def open_journal(out: Path, how: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what an earlier run finished in `out`, by photograph.

    Raises InputError for a folder of other content, or prepared with other options than `how`.
    """
    file = out / "prepare.jsonl"
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    entries = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):  # the line at which it was stopped, or damage
            entries.append(json.loads(line))
    entries = [entry for entry in entries if isinstance(entry, dict)]
    made = [entry for entry in entries if "size" in entry]
    if not made and ((out / "manifest.csv").exists() or (out / "images").exists()):
        raise InputError(f"--out {out}: holds other data; give a new folder")
    for name, value in how.items() if made else ():
        if made[0].get(name) != value:
            was = f"{name.replace('_', '-')} = {made[0].get(name)}, not {value}"
            raise InputError(f"--out {out}: was made with {was}; give a new folder")
    done = {entry["path"]: entry for entry in entries if "path" in entry}
    text = "".join(json.dumps(entry) + "\n" for entry in [how, *done.values()])
    write_atomic(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return done


def is_finished(task: Task, entry: dict[str, Any]) -> bool:
    """Whether the journal's `entry` still holds for the photograph and its picture."""
    now = _stamp(task.source, "source") | _stamp(task.target, "target")
    return now.items() <= entry.items() and (task.allow_truncated or not entry["truncated"])


def prepare_folder(
    manifest: Manifest, pictures: dict[str, str], out: Path, options: PrepareOptions
) -> dict[str, dict[str, Any]]:
    """Prepare what is not finished; return the facts of each photograph, by its path.

    Raises InputError when most of what is finished in `out` is of other photographs.
    """
    how = {n: getattr(options, n) for n in ("size", "keep_aspect", "graham", "image_format")}
    facts = open_journal(out, how)
    tasks = [
        Task(path, manifest.root / path, out / to, **how, allow_truncated=options.allow_truncated)
        for path, to in pictures.items()
    ]
    again = [task for task in tasks if task.path in facts]
    ours = sum(_stamp(t.source, "source").items() <= facts[t.path].items() for t in again)
    if 2 * ours < len(facts):
        few = f"of {len(facts)} photographs prepared in it, {ours} are those of --source"
        raise InputError(f"--out {out}: {few}; give a new folder")
    tasks = [task for task in tasks if not is_finished(task, facts.get(task.path, {}))]
    done, told = len(pictures) - len(tasks), time.monotonic()
    workers = options.workers or os.cpu_count() or 1
    log.info("%d photographs, %d of them finished; %d processes", len(pictures), done, workers)
    with (
        contextlib.closing(prepare_photographs(tasks, workers)) as finished,
        (out / "prepare.jsonl").open("a", encoding="utf-8") as journal,
        tqdm(total=len(pictures), initial=done, desc="prepare", disable=None) as bar,
    ):
        for entry in finished:
            facts[entry["path"]] = entry
            if "error" not in entry:
                journal.write(json.dumps(entry) + "\n")
                journal.flush()
            done += 1
            bar.update()
            if bar.disable and time.monotonic() - told > 30:
                told = time.monotonic()
                log.info("%d of %d photographs", done, len(pictures))
    return {path: facts[path] for path in pictures}


def read_source(options: PrepareOptions) -> Manifest:
    """Read what is to be prepared and say what it is; raises InputError before any work is done."""
    columns = options.path_column, options.grade_column, options.patient_column
    manifest = read_data(options.source, options.layout, Reading(*columns, options.grades))
    root, out = manifest.root.resolve(), Path(options.out).expanduser().resolve()
    if manifest.prepared:
        raise InputError(f"--source {root}: is prepared already; give it to training as --data")
    if out.is_relative_to(root) or root.is_relative_to(out):
        raise InputError(f"--out {out}: and --source lie in each other; choose a folder beside it")
    patients = len({record.patient for record in manifest.records})
    if options.folds > patients:
        raise InputError(f"--folds {options.folds}: expected 2 to {patients}, as many as patients")
    for note in manifest.notes:
        log.info("%s: %s", manifest.layout, note)
    return manifest


def prepare(manifest: Manifest, out: Path, options: PrepareOptions) -> None:
    """Prepare a data set into `out`: pictures, manifest, folds, report."""
    pictures = picture_paths(manifest.records, f".{options.image_format}".replace("jpeg", "jpg"))
    facts = prepare_folder(manifest, pictures, out, options)
    good = tuple(record for record in manifest.records if "error" not in facts[record.path])

    def picture_of(path: str) -> np.ndarray:
        if not options.graham:
            return photographs.open_photograph(out / pictures[path])
        raw = manifest.root / path  # Graham's pictures show too little of what tells eyes apart
        return photographs.load_photograph(raw, options.size, options.allow_truncated)

    same = copies.find_copies(facts, picture_of)
    linked = [(one, other) for one, other, _ in same]
    whole = splits.complete_splits(replace(manifest, records=good), linked)
    for note in whole.notes[len(manifest.notes) :]:
        log.info("%s: %s", whole.layout, note)
    records = tuple(in_folder(record, pictures, facts) for record in whole.records)
    about = {"layout": whole.layout, "size": options.size, "notes": whole.notes}
    about |= {"splits": review.count_splits(records)}
    about["doubts"] = review.list_doubts(replace(whole, records=records), facts, same)
    write_json(out / "data_report.json", about)
    for old in out.glob("manifest-fold-*.csv"):
        old.unlink()
    write_manifest(out, records)
    folds = splits.fold_splits(good, options.folds, linked=linked) if options.folds else []
    for n, fold in enumerate(folds, 1):
        write_manifest(out, [in_folder(r, pictures, facts) for r in fold], f"manifest-fold-{n}.csv")
    also = f", and {len(folds)} manifest-fold-N.csv" * bool(folds)
    log.info("%d pictures in %s%s", len(records), out, also)
    if (bad := len(facts) - len(records)) >= BAD_SHARE * len(facts):
        raise InputError(
            f"{manifest.root}: {bad} of {len(facts)} photographs cannot be used, all others are "
            f"prepared; copy the bad ones again (see {out / 'data_report.json'}) and repeat"
        )


def in_folder(record: Record, pictures: dict[str, str], facts: dict[str, dict[str, Any]]) -> Record:
    """Return a raw photograph's record as that of its prepared picture."""
    more = {name: facts[record.path][name] for name in ("width", "height", "sha256")}
    return replace(record, path=pictures[record.path], source=record.path, **more)


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
