"""The one internal form of a data set: photographs with grade, patient and split, on disk a csv.

`manifest.csv` holds one row for each photograph. Training and evaluation read that file, or the
Manifest that layouts.py makes of a data set as it was downloaded. No patient is in two splits.
"""

import csv
import hashlib
import io
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from utils import InputError, write_atomic

# Of the International Clinical Diabetic Retinopathy scale (Wilkinson et al., 2003):
# 0 no retinopathy, 1 mild, 2 moderate, 3 severe, 4 proliferative.
GRADES = 5

SPLITS = ("train", "val", "test")

# What data sets call their splits, in lower case.
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "val",
    "valid": "val",
    "validation": "val",
}

# The columns of manifest.csv that must be there; those after them may be missing.
REQUIRED_COLUMNS = ("path", "grade", "patient", "eye", "split")


@dataclass(frozen=True)
class Record:
    """One photograph; `path` is posix and relative to the manifest's root."""

    path: str
    grade: int | None
    patient: str
    eye: str  # "left", "right" or ""
    split: str  # one of SPLITS
    source: str = ""  # path of the photograph that this one was prepared from
    width: int | None = None  # of that photograph, like the height
    height: int | None = None
    sha256: str = ""


@dataclass(frozen=True)
class Manifest:
    """All photographs of a data set; those of a `prepared` one are cropped already.

    `notes` are sentences that a user should read. `lists` holds what the notes count, name by name.
    """

    root: Path
    records: tuple[Record, ...]
    prepared: bool
    layout: str
    notes: tuple[str, ...] = ()
    lists: dict[str, list[str]] = field(default_factory=dict)

    def split(self, name: str) -> list[Record]:
        """Return the records of a split."""
        return [record for record in self.records if record.split == name]

    @property
    def fingerprint(self) -> str:
        """The sha256 of what the rows say, whatever their order and wherever the folder lies."""
        # What cannot change a result is left out: the eye, and the source with its size.
        rows = []
        for record in self.records:
            grade = str(record.grade)
            rows.append((record.path, grade, record.patient, record.split, record.sha256))
        return hashlib.sha256(repr(sorted(rows)).encode()).hexdigest()


# ------------------------------------------------------------------------------------- manifest.csv


def read_manifest(
    folder: str | os.PathLike, name: str = "manifest.csv", *, follow_links: bool = False
) -> Manifest:
    """Return the manifest that the csv `name` in `folder` holds.

    Raises InputError, naming the row, for a row at fault, a photograph named twice, a file that is
    not there and, unless `follow_links`, a link out of the folder; and for patients that are in two
    splits.
    """
    root = Path(folder)
    records = []
    places: dict[str, str] = {}  # "FILE, row NUMBER" by path
    for where, row in read_csv(root / name, REQUIRED_COLUMNS):
        record = _parse_row(where, row)
        if record.path in places:
            raise InputError(f"{where}: {record.path} is in {places[record.path]} too; keep one")
        places[record.path] = where
        records.append(record)

    missing = check_files(root, places, follow_links=follow_links)
    if missing:
        raise InputError(
            f"{places[missing[0]]}: {len(missing)} of {len(places)} files are not there: "
            f"{name_examples(missing)}; copy them or drop their rows"
        )
    check_leaks(records, root / name)

    # A folder of prepare_data.py holds its report. Without one these are photographs as they are.
    if (root / "data_report.json").is_file():
        return Manifest(root, tuple(records), prepared=True, layout="prepared")
    return Manifest(root, tuple(records), prepared=False, layout="manifest")


def write_manifest(
    folder: str | os.PathLike, records: Iterable[Record], name: str = "manifest.csv"
) -> None:
    """Write the csv `name` into `folder`, whole or not at all."""
    # All rows become text first, so that a fault in one of them leaves the old file as it was.
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(column.name for column in fields(Record))
    writer.writerows(map(astuple, records))
    data = text.getvalue().encode()
    write_atomic(Path(folder) / name, lambda temporary: temporary.write_bytes(data))


def _parse_row(where: str, row: Mapping[str, str]) -> Record:
    """Return a row of the csv as a record; raise InputError for the first value at fault."""
    check_path(where, row["path"])
    grade = parse_grade(where, row["grade"])
    if not row["patient"]:
        raise InputError(
            f"{where}: patient is ''; expected a name (unknown: one for each photograph)"
        )
    eye = row["eye"].lower()
    if eye not in ("", "left", "right"):
        raise InputError(f"{where}: eye is {row['eye']!r}; expected left, right or nothing")
    split = SPLIT_WORDS.get(row["split"].lower())
    if split is None:
        raise InputError(f"{where}: split is {row['split']!r}; expected train, val or test")

    return Record(
        path=str(PurePosixPath(row["path"])),
        grade=grade,
        patient=row["patient"],
        eye=eye,
        split=split,
        source=row.get("source", ""),
        width=_parse_side(where, row, "width"),
        height=_parse_side(where, row, "height"),
        sha256=row.get("sha256", "").lower(),
    )


def _parse_side(where: str, row: Mapping[str, str], name: str) -> int | None:
    """Return a photograph's width or height in pixels, None where the csv does not say it."""
    text = row.get(name, "")
    if not text:
        return None
    if not re.fullmatch("[0-9]+", text):
        raise InputError(f"{where}: {name} is {text!r}; expected a whole number of pixels")
    return int(text)


# ------------------------------------------------------------------------------------------ any csv


def read_csv(file: Path, required: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """Return the rows of a csv as ("FILE, row NUMBER", {column: text}), without empty ones.

    Blanks around texts are taken off. Commas, semicolons and tabs all separate columns. Raises
    InputError for a file that is no such table, has no rows or lacks one of the `required` columns.
    """
    # "utf-8-sig" drops the mark with which Excel begins its files.
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read as UTF-8 csv ({error})") from None

    # Excel separates columns by semicolons where the decimal point is a comma.
    first_line = text.partition("\n")[0]
    delimiter = max(",;\t", key=first_line.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)

    # A stray quote is noticed at the end of the file, so the row in which it stands is remembered.
    rows = []
    start = 1
    try:
        header = _without_blanks(next(reader, []))
        start = reader.line_num + 1
        for cells in reader:
            rows.append((f"{file}, row {reader.line_num}", _without_blanks(cells)))
            start = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f'{file}, row {start}: {error}; a quote (") too many?') from None

    _check_header(file, header, required, first_line)

    # A row may end before its last columns; what is missing there is empty.
    missing_cells = [""] * len(header)
    named_rows = []
    for where, cells in rows:
        if any(cells):
            named_rows.append((where, dict(zip(header, cells + missing_cells, strict=False))))
    if not named_rows:
        raise InputError(f"{file}: no rows under its header; expected one per photograph")
    return named_rows


def _without_blanks(cells: Sequence[str]) -> list[str]:
    """Return texts without the blanks at their ends."""
    return [cell.strip() for cell in cells]


def _check_header(
    file: Path, header: Sequence[str], required: Sequence[str], first_line: str
) -> None:
    """Raise InputError where a required column is not there, or there more than once."""
    missing = [name for name in required if name not in header]
    if missing:
        raise InputError(
            f"{file}: no column {', '.join(missing)}; header {first_line[:200]!r}; "
            "the first line has to name the columns"
        )
    for name in required:
        if header.count(name) > 1:
            raise InputError(
                f"{file}: more than one column {name}; header {first_line[:200]!r}; keep one"
            )


def read_header(file: Path) -> list[str]:
    """Return the columns that a table's first line names."""
    with file.open(encoding="utf-8-sig", errors="replace") as lines:
        first_line = lines.readline().strip()
    return [name.strip() for name in re.split("[,;\t]", first_line) if name]


def parse_grade(where: str, text: str) -> int | None:
    """Return the grade that a table's cell says, None for an empty one.

    Spreadsheets write whole numbers as 2.0, which is taken too; InputError for all else.
    """
    if not text:
        return None
    if not is_grade(text):
        raise InputError(f"{where}: grade is {text!r}; expected 0, 1, 2, 3 or 4, or nothing")
    return int(text[0])


def is_grade(text: str) -> bool:
    """Return whether a cell holds a grade, as a number."""
    return bool(re.fullmatch(rf"[0-{GRADES - 1}](\.0*)?", text))


# -------------------------------------------------------------------------------------------- paths


def check_path(where: str, text: str) -> None:
    """Raise InputError, naming `where`, for a path that is none or may lead out of its folder."""
    # A path of Windows knows every way out of a folder: / and \, "..", C: and \\server.
    path = PureWindowsPath(text)
    if not path.parts or path.anchor or ".." in path.parts or "\0" in text:
        raise InputError(f"{where}: path is {text!r}; expected one inside the csv's folder")


def check_files(root: Path, places: Mapping[str, str], *, follow_links: bool = False) -> list[str]:
    """Return those of the paths below `root` that are no file.

    `places` says where each path stands in a table. Raises InputError, naming that place, for a
    link that leads out of `root`, unless `follow_links`: a manifest from elsewhere must not make us
    read private files.
    """
    # Each folder is listed once, which is faster than asking the disk for every single file.
    listings: dict[str, dict[str, os.DirEntry]] = {}
    outside: dict[str, bool] = {}
    missing = []
    for path, where in places.items():
        folder, _, name = path.rpartition("/")
        if folder not in listings:
            listings[folder] = _list_folder(root / folder)
            outside[folder] = not is_inside(root / folder, root)

        entry = listings[folder].get(name)
        leads_out = outside[folder]
        if entry is not None and entry.is_symlink():
            leads_out = leads_out or not is_inside(root / path, root)
        if leads_out and not follow_links:
            raise leads_out_error(f"{where}: {path}")

        # A disk may ignore case or compose accents, so that it has a file of this name although the
        # listing spells it in another way.
        is_file = entry.is_file() if entry else os.path.isfile(root / path)
        if not is_file:
            missing.append(path)
    return missing


def _list_folder(folder: Path) -> dict[str, os.DirEntry]:
    """Return what lies in a folder, by name; nothing where there is no such folder."""
    if not os.path.isdir(folder):
        return {}
    return {entry.name: entry for entry in os.scandir(folder)}


def leads_out_error(what: str) -> InputError:
    """Return the error for a link out of the data's folder."""
    return InputError(
        f"{what} is a link out of the folder; put the file there, or allow such links: "
        "--follow-links"
    )


def is_inside(path: Path, root: Path) -> bool:
    """Return whether a path, with all links followed, is at or below `root`."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def picture_paths(records: Iterable[Record], suffix: str = ".jpg") -> dict[str, str]:
    """Return where each photograph's prepared picture lies, by the photograph's path.

    It is images/<stem><suffix>, or, where stems collide, images/<folders>/<stem><suffix>, or, where
    these collide too (1.jpg and 1.png), images/<folders>/<name><suffix>.
    """
    candidates: dict[str, tuple[str, str, str]] = {}
    uses: Counter[str] = Counter()
    for record in records:
        path = PurePosixPath(record.path)
        names = (path.stem, str(path.with_suffix("")), str(path))
        candidates[str(path)] = names
        # Some disks ignore case, so 1.jpg and 1.JPG would be one file.
        uses.update({name.casefold() for name in names})

    pictures = {}
    for path, names in candidates.items():
        free = [name for name in names if uses[name.casefold()] == 1]
        chosen = free[0] if free else path
        pictures[path] = f"images/{chosen}{suffix}"
    return pictures


def picture_records(
    records: Iterable[Record], pictures: Mapping[str, str], facts: Mapping[str, Mapping[str, Any]]
) -> list[Record]:
    """Return the records of raw photographs as those of their prepared pictures.

    Both mappings are by the photograph's path: `pictures` gives its picture's path, `facts` the
    photograph's width and height and the picture's sha256.
    """
    prepared = []
    for record in records:
        known = {name: facts[record.path][name] for name in ("width", "height", "sha256")}
        prepared.append(replace(record, path=pictures[record.path], source=record.path, **known))
    return prepared


# ----------------------------------------------------------------------------------------- patients


def check_leaks(records: Iterable[Record], where: str | os.PathLike) -> None:
    """Raise InputError, naming `where`, if a patient's photographs are in more than one split."""
    splits = defaultdict(set)
    for record in records:
        splits[record.patient].add(record.split)
    leaks = []
    for patient, names in splits.items():
        if len(names) > 1:
            leaks.append(f"{patient} ({', '.join(sorted(names))})")
    if leaks:
        raise InputError(
            f"{where}: {len(leaks)} patients are in more than one split: {name_examples(leaks)}; "
            "keep each in one, or put all into train, to be split"
        )


def name_examples(names: Sequence[str]) -> str:
    """Return the first five names in one line, long ones shortened, "..." for those left out."""
    shown = []
    for name in names[:5]:
        if len(name) > 80:
            name = f"{name[:77]}..."
        shown.append(name)
    if len(names) > 5:
        shown.append("...")
    return ", ".join(shown)
