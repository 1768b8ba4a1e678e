"""What lies in a folder as downloaded, and what its names say of grades and eyes."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from fundus.manifest import Record, is_inside, leads_out_error, name_examples, parse_grade, read_csv
from utils import InputError

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".tif", ".tiff", ".bmp", ".webp")
TABLES = (".csv", ".txt")

# Names like 10_left, 10-OD and "10 l" tell the patient and the eye (oculus sinister, dexter).
# Letters may be of any case.
NAME_WITH_EYE = "(?ai)(.+)[-_ ](left|right|os|od|l|r)"
EYES = {"left": "left", "os": "left", "l": "left", "right": "right", "od": "right", "r": "right"}


@dataclass(frozen=True)
class Reading:
    """How to read a data set that no adapter knows: a csv's columns, what its labels mean."""

    path_column: str = ""
    grade_column: str = ""
    patient_column: str = ""
    # By the folder's name or the label; None leaves out what cannot be graded.
    grades: dict[str, int | None] = field(default_factory=dict)
    split_column: str = ""
    follow_links: bool = False  # that lead out of the data set's folder

    @property
    def named(self) -> dict[str, int | None]:
        """The grades by name, in lower case."""
        return {name.casefold(): grade for name, grade in self.grades.items()}


class TableRow(NamedTuple):
    """What a row of labels says; `where` is "FILE, row NUMBER"."""

    where: str
    name: str
    grade: str


class Labelled(NamedTuple):
    """A photograph with its grade (None: not known) and its split."""

    path: str
    grade: int | None
    split: str


# -------------------------------------------------------------------------------------------- names


def stem_of(name: str) -> str:
    """Return a photograph's name without folders, suffix and case, which mirrors change.

    Folders may be separated as on Windows.
    """
    last = PurePosixPath(name.replace("\\", "/")).name.casefold()
    stem, suffix = os.path.splitext(last)
    # Names with dots in them ("scan.v2") have no suffix to lose.
    return stem if suffix in SUFFIXES else last


def grade_of_name(name: str) -> int | None:
    """Return the grade that a folder's name says, or None.

    Understood are the number (2, grade_2), ICDR's words (Moderate, moderate_DR) and both
    ("2 - moderate NPDR").
    """
    # Without blanks, dashes and underscores there are few ways left to write a grade.
    text = re.sub("[^a-z0-9]", "", name.lower())
    words = ("no|noapparent|normal", "mild", "moderate", "severe", "p(?=dr)|proliferat(e|ive)")
    disease = "(npdr|(nonproliferative)?(dr|(diabetic)?retinopathy)?)"
    for grade, word in enumerate(words):
        if re.fullmatch(f"(grade|class|level)?({grade}|{grade}?({word}){disease})", text):
            return grade
    return None


def named_records(photographs: Iterable[Labelled]) -> list[Record]:
    """Return a record for each photograph, its patient and eye as NAME_WITH_EYE tells them.

    Photographs with other names are each their own patient.
    """
    records = []
    for record in lone_records(photographs):
        match = re.fullmatch(NAME_WITH_EYE, PurePosixPath(record.path).stem)
        if match:
            eye = EYES[match[2].lower()]
            record = Record(record.path, record.grade, match[1], eye, record.split)
        records.append(record)
    return records


def lone_records(photographs: Iterable[Labelled]) -> list[Record]:
    """Return a record for each photograph, each its own patient, named by the photograph's stem."""
    photographs = list(photographs)
    uses: Counter[str] = Counter()
    for photograph in photographs:
        uses[PurePosixPath(photograph.path).stem] += 1
    records = []
    for photograph in photographs:
        path = PurePosixPath(photograph.path)
        patient = path.stem
        # A stem that occurs twice (0/1.jpg, 1/1.jpg) is numbering, no patient: take the path.
        if uses[patient] > 1:
            patient = str(path.with_suffix(""))
        records.append(Record(str(path), photograph.grade, patient, "", photograph.split))
    return records


# ------------------------------------------------------------------------------- a folder's content


@dataclass
class Found:
    """A folder's listing, which adapters read, and the notes that they leave for the user."""

    root: Path
    photographs: list[str]  # posix paths relative to root, sorted
    tables: dict[str, str]  # path of each .csv and .txt by its lower-case name, nearest to root
    reading: Reading
    csv_name: str  # the csv in root that the user named; manifest.csv where a folder was named
    notes: list[str] = field(default_factory=list)
    lists: dict[str, list[str]] = field(default_factory=dict)

    def add_note(self, what: str, names: Sequence[str]) -> None:
        """Note how many there are of something, with five examples; nothing where there is none."""
        if names:
            self.notes.append(f"{len(names)} {what}: {name_examples(names)}")
            self.lists[what] = list(names)

    def below(self, folder: str) -> list[str]:
        """Return the photographs below a folder; "." is the root."""
        if folder == ".":
            return list(self.photographs)
        return [path for path in self.photographs if path.startswith(f"{folder}/")]

    def csv_files(self) -> list[str]:
        """Return the csv tables; of several with one name the one nearest to the root."""
        return [path for name, path in self.tables.items() if name.endswith(".csv")]

    def join(
        self, paths: Sequence[str], file: str, split: str, name_column: str, grade_column: str
    ) -> list[Labelled]:
        """Return the photographs that a csv grades, matched by their names, as `match` does."""
        rows = []
        for where, row in read_csv(self.root / file, (name_column, grade_column)):
            rows.append(TableRow(where, row[name_column], row[grade_column]))
        return self.match(paths, file, split, rows)

    def match(
        self,
        paths: Sequence[str],
        file: str,
        split: str,
        rows: Sequence[TableRow],
        *,
        dropped: Mapping[str, str] | None = None,
        key: Callable[[str], str] = stem_of,
    ) -> list[Labelled]:
        """Return those of the photographs `paths` that the rows of a table grade, in their order.

        A photograph belongs to the row with the same `key` of its name. What has no partner is
        noted. Rows whose grade is one of `dropped` are left out, and noted with the reason that
        `dropped` gives. Raises InputError, naming file and row, for any other grade than 0 to 4 and
        for a name with two photographs or two grades.
        """
        dropped = dropped or {}
        table = PurePosixPath(file).name
        path_of = self._paths_by_key(paths, file, key)
        grade_of = _grades_by_key(rows, dropped, key)

        # Mirrors lack photographs and tables lack rows; the user must see how many, and which.
        lone = [path for name, path in path_of.items() if name not in grade_of]
        self.add_note(f"photographs without a row in {table}", lone)
        missing = [name for name in grade_of if name not in path_of]
        self.add_note(f"rows of {table} without photograph", missing)
        for text, reason in dropped.items():
            left_out = [name for name, grade in grade_of.items() if grade == text]
            self.add_note(f"photographs left out, {reason}", left_out)

        matched = []
        for name, path in path_of.items():
            if name in grade_of and grade_of[name] not in dropped:
                matched.append(Labelled(path, grade_of[name], split))
        return matched

    def _paths_by_key(
        self, paths: Sequence[str], file: str, key: Callable[[str], str]
    ) -> dict[str, str]:
        """Return the photographs by key; InputError where two of them have the same one."""
        path_of: dict[str, str] = {}
        for path in paths:
            other = path_of.setdefault(key(path), path)
            if other != path:
                raise InputError(
                    f"{self.root / file}: {other} and {path} have the same name; keep one"
                )
        return path_of


def _grades_by_key(
    rows: Sequence[TableRow], dropped: Mapping[str, str], key: Callable[[str], str]
) -> dict[str, int | str | None]:
    """Return each row's grade by key, the text itself where it is one of `dropped`."""
    grade_of: dict[str, int | str | None] = {}
    for row in rows:
        name = key(row.name)
        grade = row.grade
        if grade not in dropped:
            grade = parse_grade(row.where, row.grade)
        if grade_of.setdefault(name, grade) != grade:
            raise InputError(f"{row.where}: {name} has grade {grade_of[name]} further up; keep one")
    return grade_of


def scan_folder(root: Path, reading: Reading, csv_name: str) -> Found:
    """Return the photographs and tables below `root`, at any depth.

    Hidden files and folders are passed over, as is __MACOSX, which archives made on a Mac hold.
    Links inside `root` are followed, and those out of it where `reading` says so. Files of other
    kinds are counted in a note. Raises InputError for folders that cannot be read, names that are
    no UTF-8 and links out of `root`.
    """
    photographs = []
    tables = []
    others: Counter[str] = Counter()
    for path in _walk(root, follow_links=reading.follow_links):
        name = path.lower()
        if name.endswith(SUFFIXES):
            photographs.append(path)
        elif name.endswith(TABLES) and (root / path).is_file():  # a link may lead nowhere
            tables.append(path)
        else:
            others[os.path.splitext(name)[1] or "without suffix"] += 1

    # Of several tables with one name the first one stays, nearest to the root: copies lie deeper.
    path_of_table: dict[str, str] = {}
    for path in sorted(tables, key=_depth):
        path_of_table.setdefault(PurePosixPath(path).name.lower(), path)

    # Such a name cannot be written into manifest.csv.
    for path in photographs:
        if path != path.encode("utf-8", "replace").decode():
            raise InputError(f"{root}: {ascii(path)} is no name in UTF-8; rename the file")

    notes = []
    if others:
        counts = []
        for kind in sorted(others, key=lambda kind: (-others[kind], kind)):
            counts.append(f"{others[kind]} {kind}")
        notes.append(f"files that are not read: {', '.join(counts)}")
    return Found(root, sorted(photographs), path_of_table, reading, csv_name, notes)


def _depth(path: str) -> tuple[int, str]:
    """Return how deep a file lies, and its path, to put files in order by."""
    return path.count("/"), path


def _walk(root: Path, *, follow_links: bool) -> Iterable[str]:
    """Give the path of every file below `root`, posix and relative to it.

    Raises InputError for a folder, photograph or table that is a link out of `root`, unless
    `follow_links`. A link that leads nowhere is as harmless as a file that cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror})")

    visited = set()
    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        # A link back up would never end, so each folder is visited once.
        real = os.path.realpath(folder)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        if not follow_links and not is_inside(Path(folder), root):
            raise leads_out_error(folder)
        # os.walk goes on into the folders that are left in its own list.
        folders[:] = [name for name in folders if name[0] != "." and name != "__MACOSX"]
        below_root = Path(folder).relative_to(root)
        for name in names:
            if name[0] == ".":
                continue
            path = Path(folder, name)
            is_read = name.lower().endswith((*SUFFIXES, *TABLES))
            is_link = is_read and path.is_symlink() and path.exists()
            if is_link and not follow_links and not is_inside(path, root):
                raise leads_out_error(str(path))
            yield (below_root / name).as_posix()
