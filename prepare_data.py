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
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from layouts import Reading, complete_splits, read_data
from manifest import Manifest, Record, fold_splits, picture_paths, write_manifest
from photographs import (
    Photograph,
    PhotographError,
    coarse,
    find_alike,
    open_photograph,
    read_photograph,
    signature,
    subtract_local_mean,
)
from utils import InputError, Stopped, check_options, log, run_main, write_atomic, write_json

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
        how = task.size, task.allow_truncated, task.keep_aspect
        picture, *found = read_photograph(task.source, *how)
    except PhotographError as error:
        return {"path": task.path, "error": str(error)}
    look, light = signature(picture), picture.mean(axis=2)
    h, w = (side // 4 for side in light.shape)
    tone = {"brightest": int(np.quantile(light, 0.99))}
    tone["contrast"] = round(float(light[h:-h, w:-w].std()), 1)  # of the middle, away from the rim
    buffer, image = io.BytesIO(), subtract_local_mean(picture) if task.graham else picture
    # Without chroma subsampling, since microaneurysms are small and red.
    options = {"quality": 95, "subsampling": 0} if task.image_format == "jpeg" else {}
    Image.fromarray(image).save(buffer, task.image_format, **options)
    data = buffer.getvalue()
    task.target.parent.mkdir(parents=True, exist_ok=True)
    temporary = task.target.with_name(f".{task.target.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, task.target)
    facts = {"path": task.path} | dict(zip(Photograph._fields[1:], found, strict=True))
    facts |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    status = task.source.stat()
    facts |= {"source_bytes": status.st_size, "source_ns": status.st_mtime_ns} | tone
    facts["signature"] = base64.b64encode(coarse(look).tobytes()).decode()
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
            made = f"made with --{name.replace('_', '-')} {entries[0].get(name)}"
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
    how = {n: getattr(options, n) for n in ("size", "keep_aspect", "graham", "image_format")}
    facts, cut = open_journal(out, how), options.allow_truncated
    tasks = [
        Task(p, manifest.root / p, out / to, **how, allow_truncated=cut)
        for p, to in pictures.items()
    ]
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


def find_copies(
    out: Path, pictures: dict[str, str], facts: dict[str, dict[str, Any]]
) -> list[tuple[str, str, float]]:
    """Return pairs of photographs that show one picture, and how alike they are (1: one file)."""
    paths = [path for path in pictures if "error" not in facts[path]]
    looks = b"".join(base64.b64decode(facts[path]["signature"]) for path in paths)
    small = np.frombuffer(looks, np.int8).reshape(len(paths), -1)
    full = functools.lru_cache(4096)(lambda i: signature(open_photograph(out / pictures[paths[i]])))
    found, first = {(paths[i], paths[j]): how for i, j, how in find_alike(small, full)}, {}
    same = [(first.setdefault(facts[path]["sha256"], path), path) for path in paths]
    found |= {pair: 1.0 for pair in same if pair[0] != pair[1]}
    return [(*pair, how) for pair, how in sorted(found.items())]


def count_splits(records: list[Record]) -> dict[str, Any]:
    """Count each split's photographs, patients and grades, beside its majority line; say it."""
    splits = {}
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
    return splits


def list_doubts(
    records: list[Record], facts: dict[str, dict[str, Any]], copies: list[tuple[str, str, float]]
) -> dict[str, list[str]]:
    """List all that a person should look at, and say how much of each there is."""
    by_source = {record.source: record for record in records}
    facts_of = {record.path: facts[record.source] for record in records}
    pairs = [(by_source[one], by_source[other], how) for one, other, how in copies]
    told = [f"{a.path} = {b.path} ({how:.2f})" for a, b, how in pairs]
    lists = {
        "doubtful_crops": [path for path, fact in facts_of.items() if fact["doubtful"]],
        "near_black": [path for path, fact in facts_of.items() if fact["brightest"] <= 22],
        "blank": [path for path, fact in facts_of.items() if fact["contrast"] < 2],
        "copies": told,
        "copies_of_other_patients": [],
        "copies_in_other_splits": [],
        "copies_with_other_grades": [],
        "left_out": [f"{path} {fact['error']}" for path, fact in facts.items() if "error" in fact],
    }
    for (one, other, _), text in zip(pairs, told, strict=True):
        for word, kind in (("of", "patient"), ("in", "split"), ("with", "grade")):
            values = getattr(one, kind), getattr(other, kind)
            if values[0] != values[1]:
                lists[f"copies_{word}_other_{kind}s"].append(f"{text}: {values[0]}, {values[1]}")
    for name, lines in lists.items():
        if lines:
            some = lines[:20] + ["..."] * (len(lines) > 20)
            log.info("\n  ".join([f"{name.replace('_', ' ')}: {len(lines)}", *some]))
    return lists


def main(options: PrepareOptions, config: Path | None = None) -> None:
    """Prepare a data set, or what is left of it to prepare, and say what was found."""
    columns = options.path_column, options.grade_column, options.patient_column
    manifest = read_data(options.source, options.layout, Reading(*columns, options.grades))
    out = Path(options.out).expanduser()
    if out.resolve().is_relative_to(manifest.root.resolve()):
        raise InputError(f"--out {out}: lies in --source, which is not written to; choose another")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    suffix = ".jpg" if options.image_format == "jpeg" else ".png"
    pictures = picture_paths(manifest.records, suffix)
    try:
        facts = prepare_folder(manifest, pictures, out, options)
    except KeyboardInterrupt:
        raise Stopped("what is finished is kept, the same command goes on") from None
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error})") from None
    facts = {path: facts[path] for path in pictures}
    good = tuple(record for record in manifest.records if "error" not in facts[record.path])
    copies = find_copies(out, pictures, facts)
    linked = [(one, other) for one, other, _ in copies]
    whole = complete_splits(replace(manifest, records=good), linked)
    for note in whole.notes:
        log.info("%s: %s", whole.layout, note)
    records = [in_folder(record, pictures, facts) for record in whole.records]
    about = {"layout": whole.layout, "size": options.size, "notes": whole.notes}
    about |= {"splits": count_splits(records)} | list_doubts(records, facts, copies)
    write_json(out / "data_report.json", about)
    folds = fold_splits(good, options.folds, linked=linked) if options.folds else []
    for number, fold in enumerate(folds, 1):
        rows = [in_folder(record, pictures, facts) for record in fold]
        write_manifest(out, rows, f"manifest-fold-{number}.csv")
    write_manifest(out, records)
    log.info("%d pictures in %s", len(records), out)
    bad = len(facts) - len(records)
    if bad >= BAD_SHARE * len(facts):
        raise InputError(
            f"{manifest.root}: {bad} of {len(facts)} photographs cannot be used, all others are "
            f"prepared; copy the bad ones again (see {out / 'data_report.json'}) and repeat"
        )


def in_folder(record: Record, pictures: dict[str, str], facts: dict[str, dict[str, Any]]) -> Record:
    """Return a raw photograph's record as that of its prepared picture."""
    more = {name: facts[record.path][name] for name in ("width", "height", "sha256")}
    return replace(record, path=pictures[record.path], source=record.path, **more)


if __name__ == "__main__":
    run_main(main, PrepareOptions)
