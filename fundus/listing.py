"""What lies in a folder as downloaded, and what its names say of grades and eyes."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from fundus.manifest import GRADE, Record, read_csv, some
from utils import InputError

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".tif", ".tiff", ".bmp", ".webp")
EYE = "(.+)[-_ ](left|right|os|od|l|r)"


@dataclass(frozen=True)
class Reading:
    """How to read a data set that no adapter knows: columns of a csv, grades of class folders."""

    path_column: str = ""
    grade_column: str = ""
    patient_column: str = ""
    grades: dict[str, int] = field(default_factory=dict)  # by the class folder's name


@dataclass
class Found:
    """A folder's listing, which adapters look at, and the notes that they leave."""

    root: Path
    photographs: list[str]  # posix paths relative to root, sorted
    tables: dict[str, str]  # .csv and .txt files: path by lower-case name, the uppermost of each
    reading: Reading
    notes: list[str] = field(default_factory=list)
    lists: dict[str, list[str]] = field(default_factory=dict)

    def tell(self, what: str, names: Sequence[str]) -> None:
        """Note how many there are of something, with five examples; nothing where there is none."""
        if names:
            self.notes.append(f"{len(names)} {what}: {some(names)}")
            self.lists[what] = list(names)

    def join(self, paths: list[str], file: str, split: str, image: str, grade: str) -> list[tuple]:
        """Match photographs with a csv's columns `image` and `grade`: (path, grade, split)."""
        rows = read_csv(self.root / file, (image, grade))
        return self.match(paths, file, split, [(w, row[image], row[grade]) for w, row in rows])

    def match(
        self, paths: list[str], file: str, split: str, rows: list, dropped: Any = (), key=None
    ) -> list[tuple]:
        """Match photographs with a table's rows (where, name, grade): (path, grade, split).

        Both go by their `key`, `stem_of` mostly, since mirrors change folders, suffixes and case.
        What has no partner is told; so are rows whose grade is one of `dropped`, which are left
        out, under what it says. Raises InputError, naming file and row, for other grades than 0-4,
        and for a name with two.
        """
        by_name: dict[str, str] = {}
        key, dropped = key or stem_of, dict(dropped)
        for path in paths:
            if by_name.setdefault(key(path), path) != path:
                twice = f"{by_name[key(path)]} and {path} have the same name"
                raise InputError(f"{self.root / file}: {twice}; keep one")
        grades: dict[str, Any] = {}
        for where, text, grade in rows:
            name, value = key(text), grade if grade in dropped else _grade(where, grade)
            if grades.setdefault(name, value) != value:
                raise InputError(f"{where}: {name} has grade {grades[name]} further up; keep one")
        lone = [path for name, path in by_name.items() if name not in grades]
        self.tell(f"photographs without a row in {PurePosixPath(file).name}", lone)
        missing = [name for name in grades if name not in by_name]
        self.tell(f"rows of {PurePosixPath(file).name} without photograph", missing)
        for text, what in dropped.items():
            left = [name for name, grade in grades.items() if grade == text]
            self.tell(f"photographs left out, {what}", left)
        both = ((path, grades[name]) for name, path in by_name.items() if name in grades)
        return [(path, grade, split) for path, grade in both if grade not in dropped]

    def below(self, folder: str) -> list[str]:
        """Return the photographs under a folder, "" for all."""
        return [p for p in self.photographs if not folder or p.startswith(folder + "/")]


def stem_of(name: str) -> str:
    """A photograph's name without folders, suffix and case."""
    stem, suffix = os.path.splitext(PurePosixPath(name.replace("\\", "/")).name.casefold())
    return stem + suffix * (suffix not in SUFFIXES)


def _grade(where: str, text: str) -> int | None:
    if not re.fullmatch(GRADE, text):
        raise InputError(f"{where}: grade is {text!r}; expected 0, 1, 2, 3 or 4")
    return int(text[0]) if text else None


def named_records(items: Iterable[tuple[str, int | None, str]]) -> list[Record]:
    """Records of (path, grade, split); patients are named <patient>_<left|right>, else by stem.

    Also -left, _OS or _l, and so on (oculus sinister, dexter).
    """
    records = []
    for record in lone_records(items):
        match = re.fullmatch(EYE, PurePosixPath(record.path).stem, re.IGNORECASE)
        sides = {"l": "left", "os": "left", "r": "right", "od": "right"}
        eye = match[2].lower() if match else ""
        patient = match[1] if match else record.patient
        records.append(replace(record, patient=patient, eye=sides.get(eye, eye)))
    return records


def lone_records(items: Iterable[tuple[str, int | None, str]]) -> list[Record]:
    """Records of (path, grade, split), each photograph its own patient."""
    items = [(PurePosixPath(path), grade, split) for path, grade, split in items]
    times = Counter(path.stem for path, _, _ in items)
    # A stem that occurs twice (0/1.jpg, 1/1.jpg) is numbering, no patient: take the path.
    names = [p.stem if times[p.stem] == 1 else str(p.with_suffix("")) for p, _, _ in items]
    both = zip(items, names, strict=True)
    return [Record(str(p), grade, name, "", split) for (p, grade, split), name in both]


def grade_of_name(name: str) -> int | None:
    """The grade that a folder's name says: 2, grade_2, Moderate, "2 - moderate NPDR"; or None."""
    text = re.sub("[^a-z0-9]", "", name.lower())
    words = ("no|noapparent|normal", "mild", "moderate", "severe", "p(?=dr)|proliferat(e|ive)")
    disease = "(npdr|(nonproliferative)?(dr|(diabetic)?retinopathy)?)"
    for grade, word in enumerate(words):
        if re.fullmatch(f"(grade|class|level)?({grade}|{grade}?({word}){disease})", text):
            return grade
    return None


def scan_folder(root: Path, reading: Reading) -> Found:
    """List photographs and tables at any depth, by posix paths; links are followed."""

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror})")

    photographs, tables, others, seen = [], [], [], set()
    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)  # a link back up would never end
        folders[:] = [f for f in folders if real not in seen and f[0] != "." and f != "__MACOSX"]
        prefix = Path(folder).relative_to(root)
        shown = [n for n in names if n[0] != "." and real not in seen]
        paths = [(n.lower(), (prefix / n).as_posix()) for n in shown]
        photographs += [path for name, path in paths if name.endswith(SUFFIXES)]
        tables += [path for name, path in paths if name.endswith((".csv", ".txt"))]
        known = (*SUFFIXES, ".csv", ".txt")
        others += [os.path.splitext(name)[1] for name, _ in paths if not name.endswith(known)]
        seen.add(real)
    tables.sort(key=lambda path: (-path.count("/"), path))
    by_name = {PurePosixPath(path).name.lower(): path for path in tables}  # the uppermost stays
    odd = [path for path in photographs if path != path.encode("utf-8", "replace").decode()]
    if odd:
        raise InputError(f"{root}: {ascii(odd[0])} is no name in UTF-8; rename the file")
    counts = sorted((-n, kind or "without suffix") for kind, n in Counter(others).items())
    kinds = ", ".join(f"{-n} {kind}" for n, kind in counts)
    notes = [f"files that are not read: {kinds}"] if kinds else []
    return Found(root, sorted(photographs), by_name, reading, notes)
