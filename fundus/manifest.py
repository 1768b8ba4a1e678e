"""The one internal form of a data set: photographs with grade, patient and split, on disk a csv.

`manifest.csv` holds a row for each photograph; whatever reads photographs reads it, or a Manifest
that layouts.py made of a data set as it was downloaded. Splits never share a patient.
"""

import csv
import hashlib
import io
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path, PurePosixPath, PureWindowsPath

from utils import InputError, write_atomic

SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= {"val": "val", "valid": "val", "validation": "val"}
GRADES = 5  # of the ICDR scale: 0 none, 1 mild, 2 moderate, 3 severe, 4 proliferative
GRADE = r"([0-4])(\.0*)?|"  # nothing: not graded


@dataclass(frozen=True)
class Record:
    """One photograph; `path` is posix and relative to the manifest's root."""

    path: str
    grade: int | None
    patient: str
    eye: str  # "left", "right" or ""
    split: str  # "train", "val" or "test"
    source: str = ""
    width: int | None = None  # of the photograph as downloaded, like the height
    height: int | None = None
    sha256: str = ""


@dataclass(frozen=True)
class Manifest:
    """All photographs of a data set; `prepared` ones are cropped, `notes` are to be said aloud."""

    root: Path
    records: tuple[Record, ...]
    prepared: bool
    layout: str
    notes: tuple[str, ...] = ()
    lists: dict[str, list[str]] = field(default_factory=dict)  # what notes count, name by name

    def split(self, name: str) -> list[Record]:
        return [record for record in self.records if record.split == name]

    @property
    def fingerprint(self) -> str:
        """sha256 of what the rows say, whatever their order and wherever the folder lies."""
        rows = sorted((r.path, str(r.grade), r.patient, r.split, r.sha256) for r in self.records)
        return hashlib.sha256(repr(rows).encode()).hexdigest()


def read_manifest(folder, name: str = "manifest.csv") -> Manifest:
    """Read and check a manifest in `folder`; every fault is an InputError naming its row."""
    root, records, rows = Path(folder), [], {}
    for where, row in read_csv(root / name, [f.name for f in fields(Record)[:5]]):
        record = _parse_row(where, row)
        if record.path in rows:
            raise InputError(f"{where}: {record.path} is in {rows[record.path]} too; keep one")
        rows[record.path] = where
        records.append(record)
    missing = check_files(root, rows)
    if missing:
        n = f"{len(missing)} of {len(rows)} files are not there"
        raise InputError(f"{rows[missing[0]]}: {n}: {some(missing)}; copy them or drop their rows")
    check_leaks(records, root / name)
    # What prepare_data.py leaves beside it; without that, a list of photographs as they are.
    prepared = (root / "data_report.json").is_file()
    return Manifest(root, tuple(records), prepared, "prepared" if prepared else "manifest")


def write_manifest(folder, records: Iterable[Record], name: str = "manifest.csv") -> None:
    """Write a manifest into `folder`, whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in fields(Record))
    writer.writerows(astuple(record) for record in records)
    data = text.getvalue().encode()
    write_atomic(Path(folder) / name, lambda temporary: temporary.write_bytes(data))


def read_csv(file: Path, required: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """Rows as ("FILE, row NUMBER", {column: text}); blanks around texts are taken off."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        first = text.partition("\n")[0]
        delimiter = max(",;\t", key=first.count)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read as UTF-8 csv ({error})") from None
    rows, began = [], 1  # a stray quote is noticed at the end of the file
    try:
        header = [name.strip() for name in next(reader, [])]
        for cells in reader:
            rows.append((f"{file}, row {reader.line_num}", [cell.strip() for cell in cells]))
            began = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f'{file}, row {began}: {error}; a quote (") too many?') from None
    for what, wrong in (("no", 0), ("two of", 2)):
        names = [name for name in required if header.count(name) == wrong]
        if names:
            raise InputError(f"{file}: {what} column {', '.join(names)}; header {first[:200]!r}")
    if not any(any(cells) for _, cells in rows):
        raise InputError(f"{file}: no rows under its header; expected one per photograph")
    pad = [""] * len(header)
    return [(w, dict(zip(header, cells + pad, strict=False))) for w, cells in rows if any(cells)]


def read_header(file: Path) -> list[str]:
    """The columns that a table's first line names."""
    with file.open(encoding="utf-8-sig", errors="replace") as lines:
        return [name.strip() for name in re.split("[,;\t]", lines.readline().strip()) if name]


def check_path(where: str, text: str) -> None:
    """Raise InputError, naming `where`, for a path that is none or may lead out of its folder."""
    path = PureWindowsPath(text)  # it knows every way out of a folder
    if not path.parts or path.anchor or ".." in path.parts or "\0" in text:
        raise InputError(f"{where}: path is {text!r}; expected one inside the csv's folder")


def _parse_row(where: str, row: dict[str, str]) -> Record:
    check_path(where, row["path"])
    split, eye = SPLITS.get(row["split"].lower()), row["eye"].lower()
    sizes = [row.get(name, "") for name in ("width", "height")]
    for name, value, good, expected in (
        ("grade", row["grade"], re.fullmatch(GRADE, row["grade"]), "0, 1, 2, 3, 4, or nothing"),
        ("patient", row["patient"], row["patient"], "a name (unknown: one for each photograph)"),
        ("eye", row["eye"], eye in ("", "left", "right"), "left, right or nothing"),
        ("split", row["split"], split, "train, val or test"),
        ("width, height", sizes, re.fullmatch("[0-9]*", "".join(sizes)), "whole numbers"),
    ):
        if not good:
            raise InputError(f"{where}: {name} is {value!r}; expected {expected}")
    name, grade = str(PurePosixPath(row["path"])), int(row["grade"][0]) if row["grade"] else None
    width, height = (int(size) if size else None for size in sizes)
    rest = row.get("source", ""), width, height, row.get("sha256", "").lower()
    return Record(name, grade, row["patient"], eye, split, *rest)


def check_files(root: Path, rows: dict[str, str]) -> list[str]:
    """Return those of the paths that are no file; raise InputError for links out of `root`.

    `rows` says where each path stands. One listing per folder makes it fast.
    """
    listings: dict[str, dict[str, os.DirEntry]] = {}
    missing, outside, real_root = [], set(), os.path.realpath(root)
    for path, where in rows.items():
        folder, _, name = path.rpartition("/")
        if folder not in listings:
            there = os.path.isdir(root / folder)
            listings[folder] = {e.name: e for e in os.scandir(root / folder)} if there else {}
            if not Path(os.path.realpath(root / folder)).is_relative_to(real_root):
                outside.add(folder)
        entry = listings[folder].get(name)
        linked = entry and entry.is_symlink() and os.path.realpath(root / path)
        if folder in outside or (linked and not Path(linked).is_relative_to(real_root)):
            raise InputError(f"{where}: {path} is a link out of the folder; put the file there")
        # A disk that ignores case or composes accents finds what its listing spells otherwise.
        if not (entry.is_file() if entry else os.path.isfile(root / path)):
            missing.append(path)
    return missing


def picture_paths(records: Iterable[Record], suffix: str = ".jpg") -> dict[str, str]:
    """Each photograph's picture: images/<stem><suffix>, with its folders where stems collide."""
    paths = [PurePosixPath(record.path) for record in records]
    names = [(path.stem, str(path.with_suffix("")), str(path)) for path in paths]
    # Some disks ignore case, so 1.jpg and 1.JPG are one.
    times = Counter(name.casefold() for row in names for name in {*row})
    pictures = {}
    for row in names:
        free = [name for name in row if times[name.casefold()] == 1]
        pictures[row[-1]] = f"images/{(free or row)[0 if free else -1]}{suffix}"
    return pictures


def check_leaks(records: Iterable[Record], where) -> None:
    splits = defaultdict(set)
    for record in records:
        splits[record.patient].add(record.split)
    leaks = [f"{patient} ({', '.join(sorted(s))})" for patient, s in splits.items() if len(s) > 1]
    if leaks:
        what = f"{len(leaks)} patients are in more than one split: {some(leaks)}"
        raise InputError(f"{where}: {what}; keep each in one, or put all into train, to be split")


# ----------------------------------------------------------------------- folders as downloaded


def some(names: Sequence[str]) -> str:
    short = (name if len(name) <= 80 else f"{name[:77]}..." for name in names[:5])
    return ", ".join(short) + ", ..." * (len(names) > 5)
