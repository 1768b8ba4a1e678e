"""Bring a data set as downloaded into the form that training and evaluation read.

    python prepare_data.py --source RAW --out DATA

Crops every photograph to its fundus, pads it to a square and resizes it, on all cores. Writes
DATA/images/*.jpg, DATA/manifest.csv, DATA/data_report.json (what was left out and why, crops in
doubt, duplicates) and DATA/prepare.jsonl, from which the same command goes on where it stopped.
"""

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
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from layouts import Manifest, Record, open_data, write_manifest
from photographs import Photograph, PhotographError, read_photograph
from utils import InputError, Stopped, log, run_main, write_atomic, write_json

BAD_SHARE = 0.01  # of all photographs; from here on the data set itself is in doubt


@dataclass
class PrepareOptions:
    """What to prepare, where to, and how."""

    source: str
    """Data set as downloaded: EyePACS, class folders, a manifest.csv or just photographs."""
    out: str
    """Folder that receives the prepared pictures and their manifest."""
    size: int = 512
    """Side of the square pictures, in pixels."""
    workers: int = 0
    """Processes that prepare side by side (0: one for each core)."""
    allow_truncated: bool = False
    """Take cut-off JPEG files too; what is missing of them is grey."""
    debug: bool = False
    """Show the traceback of errors that are otherwise one message."""

    def __post_init__(self) -> None:
        if not 32 <= self.size <= 4096:
            raise InputError(f"--size {self.size}: expected 32 to 4096 pixels")
        if self.workers < 0:
            raise InputError(f"--workers {self.workers}: expected 0 (all cores) or more")


class Task(NamedTuple):
    """One photograph to prepare: its path in the data set, both files and how."""

    path: str
    source: Path
    target: Path
    size: int
    allow_truncated: bool


def prepare_photograph(task: Task) -> dict[str, Any]:
    """Write one picture and return its facts, or its "error" alone. Runs in the workers."""
    try:
        picture, *found = read_photograph(task.source, task.size, task.allow_truncated)
    except PhotographError as error:
        return {"path": task.path, "error": str(error)}
    buffer = io.BytesIO()
    # Without chroma subsampling, since microaneurysms are small and red.
    Image.fromarray(picture).save(buffer, "JPEG", quality=95, subsampling=0)
    data = buffer.getvalue()
    task.target.parent.mkdir(parents=True, exist_ok=True)
    temporary = task.target.with_name(f".{task.target.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, task.target)
    facts = {"path": task.path} | dict(zip(Photograph._fields[1:], found, strict=True))
    facts |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    status = task.source.stat()
    facts |= {"source_bytes": status.st_size, "source_ns": status.st_mtime_ns}
    return facts | {"allow_truncated": task.allow_truncated}


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


def picture_paths(records: tuple[Record, ...]) -> dict[str, str]:
    """Each photograph's picture: images/<stem>.jpg, with its folders too where stems collide."""
    paths = [PurePosixPath(record.path) for record in records]
    names = [(path.stem, str(path.with_suffix("")), str(path)) for path in paths]
    # Some disks ignore case, so 1.jpg and 1.JPG are one.
    times = [Counter(name.casefold() for name in column) for column in zip(*names, strict=True)]
    pictures = {}
    for row in names:
        free = [name for name, t in zip(row, times, strict=True) if t[name.casefold()] == 1]
        pictures[row[-1]] = f"images/{(free or row)[0]}.jpg"
    return pictures


def open_journal(out: Path, how: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Make `out` if need be; return what an earlier run finished in it, by photograph.

    Raises InputError for other data, or what was prepared with other options than `how`.
    """
    file = out / "prepare.jsonl"
    entries = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        with contextlib.suppress(ValueError):  # the line at which it was stopped
            entries.append(json.loads(line))
    if not entries and ((out / "manifest.csv").exists() or (out / "images").exists()):
        raise InputError(f"--out {out}: holds other data; give a new folder")
    for name, value in how.items() if entries else ():
        if entries[0].get(name) != value:
            made = f"made with --{name} {entries[0].get(name)}"
            raise InputError(f"--out {out}: {made}; give a new folder")
    done = {entry["path"]: entry for entry in entries[1:]}
    text = "".join(json.dumps(entry) + "\n" for entry in [how, *done.values()])
    write_atomic(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return done


def is_finished(task: Task, entry: dict[str, Any] | None) -> bool:
    """Whether the journal's `entry` still holds for the photograph and its picture."""
    with contextlib.suppress(OSError):
        status = task.source.stat()
        now = {"source_bytes": status.st_size, "source_ns": status.st_mtime_ns}
        now["bytes"] = task.target.stat().st_size
        if entry is None or entry != entry | now:
            return False
        return task.allow_truncated or not entry["allow_truncated"]  # a cut-off one may be in it
    return False


def prepare_folder(
    manifest: Manifest, pictures: dict[str, str], out: Path, options: PrepareOptions
) -> dict[str, dict[str, Any]]:
    """Prepare what is not finished; return the facts of each photograph, by its path."""
    facts = open_journal(out, {"size": options.size})
    how = options.size, options.allow_truncated
    tasks = [Task(path, manifest.root / path, out / to, *how) for path, to in pictures.items()]
    tasks = [task for task in tasks if not is_finished(task, facts.get(task.path))]
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
    return facts


def summarise(records: list[Record], facts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Count what there is and say it aloud, with all that a person should look at."""
    same, splits = defaultdict(list), {}
    train = Counter(r.grade for r in records if r.split == "train" and r.grade is not None)
    for split in ("train", "val", "test"):
        rows = [record for record in records if record.split == split]
        grades = Counter(record.grade for record in rows)
        line = {"images": len(rows), "patients": len({record.patient for record in rows})}
        line |= {"by_grade": [grades[g] for g in range(5)], "without_grade": grades.pop(None, 0)}
        if train and grades:
            line["majority"] = round(grades[max(train, key=train.get)] / grades.total(), 4)
        splits[split] = line
        log.info("%s: %s", split, ", ".join(f"{name} {value}" for name, value in line.items()))
    for record in records:
        same[record.sha256].append(record.path)
    lists = {
        "doubtful_crops": [record.path for record in records if facts[record.source]["doubtful"]],
        "duplicates": [" = ".join(paths) for paths in same.values() if len(paths) > 1],
        "left_out": [f"{path} {fact['error']}" for path, fact in facts.items() if "error" in fact],
    }
    for name, lines in lists.items():
        if lines:
            some = lines[:20] + ["..."] * (len(lines) > 20)
            log.info("\n  ".join([f"{name.replace('_', ' ')}: {len(lines)}", *some]))
    return {"splits": splits} | lists


def main(options: PrepareOptions, config: Path | None = None) -> None:
    """Prepare a data set, or what is left of it to prepare, and say what was found."""
    manifest, out = open_data(options.source), Path(options.out).expanduser()
    if out.resolve().is_relative_to(manifest.root.resolve()):
        raise InputError(f"--out {out}: lies in --source, which is not written to; choose another")
    for note in manifest.notes:
        log.info("%s: %s", manifest.layout, note)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    pictures = picture_paths(manifest.records)
    try:
        facts = prepare_folder(manifest, pictures, out, options)
    except KeyboardInterrupt:
        raise Stopped("what is finished is kept, the same command goes on") from None
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error})") from None
    facts = {path: facts[path] for path in pictures}
    good = [record for record in manifest.records if "error" not in facts[record.path]]
    more = [{n: facts[r.path][n] for n in ("width", "height", "sha256")} for r in good]
    both = zip(good, more, strict=True)
    records = [replace(r, path=pictures[r.path], source=r.path, **m) for r, m in both]
    about = {"layout": manifest.layout, "size": options.size, "notes": manifest.notes}
    write_json(out / "data_report.json", about | summarise(records, facts))
    write_manifest(out, records)
    log.info("%d pictures in %s", len(records), out)
    bad = len(facts) - len(records)
    if bad >= BAD_SHARE * len(facts):
        raise InputError(
            f"{manifest.root}: {bad} of {len(facts)} photographs cannot be used, all others are "
            f"prepared; copy the bad ones again (see {out / 'data_report.json'}) and repeat"
        )


if __name__ == "__main__":
    run_main(main, PrepareOptions)
