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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path, PurePosixPath, PureWindowsPath

from utils import InputError, write_atomic

SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= {"val": "val", "valid": "val", "validation": "val"}
SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")
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
    _check_files(root, rows)
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
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count))
        header = [name.strip() for name in next(reader, [])]
        rows = [(f"{file}, row {reader.line_num}", [c.strip() for c in cells]) for cells in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{file}: cannot be read as UTF-8 csv ({error})") from None
    missing = [name for name in required if name not in header]
    if missing:
        raise InputError(f"{file}: no column {', '.join(missing)}; its header is {first[:200]!r}")
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


def _check_files(root: Path, rows: dict[str, str]) -> None:
    """Every path must be a file under root, links included; one listing per folder is fast."""
    listings: dict[str, dict[str, os.DirEntry]] = {}
    real_root, missing = os.path.realpath(root), []
    for path, where in rows.items():
        folder, _, name = path.rpartition("/")
        entry = listings.get(folder, {}).get(name)
        checked = folder in listings and not (entry and entry.is_symlink())
        if not checked and not Path(os.path.realpath(root / path)).is_relative_to(real_root):
            raise InputError(f"{where}: {path} is a link out of the folder; put the file there")
        if folder not in listings:
            there = os.path.isdir(root / folder)
            listings[folder] = {e.name: e for e in os.scandir(root / folder)} if there else {}
            entry = listings[folder].get(name)
        # A disk that ignores case or composes accents finds what its listing spells otherwise.
        if not (entry.is_file() if entry else os.path.isfile(root / path)):
            missing.append(path)
    if missing:
        n = f"{len(missing)} of {len(rows)} files are not there"
        raise InputError(f"{rows[missing[0]]}: {n}: {some(missing)}; copy them or drop their rows")


def picture_paths(records: tuple[Record, ...], suffix: str = ".jpg") -> dict[str, str]:
    """Each photograph's picture: images/<stem><suffix>, with its folders where stems collide."""
    paths = [PurePosixPath(record.path) for record in records]
    names = [(path.stem, str(path.with_suffix("")), str(path)) for path in paths]
    # Some disks ignore case, so 1.jpg and 1.JPG are one.
    times = [Counter(name.casefold() for name in column) for column in zip(*names, strict=True)]
    pictures = {}
    for row in names:
        free = [name for name, t in zip(row, times, strict=True) if t[name.casefold()] == 1]
        pictures[row[-1]] = f"images/{(free or row)[0]}{suffix}"
    return pictures


def check_leaks(records: Iterable[Record], where) -> None:
    splits = defaultdict(set)
    for record in records:
        splits[record.patient].add(record.split)
    leaks = [f"{patient} ({', '.join(sorted(s))})" for patient, s in splits.items() if len(s) > 1]
    if leaks:
        what = f"{len(leaks)} patients are in more than one split: {some(leaks)}"
        raise InputError(f"{where}: {what}; keep each in one, or put all into train, to be split")


def split_patients(
    records: Sequence[Record], *, seed: int = 0, linked: Iterable[tuple[str, str]] = ()
) -> list[Record]:
    """Complete the splits, always by patient, in strata of the patient's worse eye (or no grade).

    Without test, val becomes test, or else 20 % of the patients do; without val, 10 % of train's
    patients become val. `linked` are pairs of paths, of one picture: their patients stay together.
    Raises InputError if a patient is in two splits already.
    """
    check_leaks(records, "splits")
    present = {record.split for record in records}
    groups = _groups(records, linked)
    if "test" not in present and "val" in present:
        records = [replace(r, split="test") if r.split == "val" else r for r in records]
    elif "test" not in present:
        records = _cut(records, groups, "test", 0.2, seed)
    if not {"val", "test"} <= present:
        records = _cut(records, groups, "val", 0.1, seed)
    return list(records)


def fold_splits(
    records: Sequence[Record], folds: int, *, linked: Iterable[tuple[str, str]] = ()
) -> list[list[Record]]:
    """Return the records once for each fold, which is their test; of the others 10 % become val.

    Every group of patients is in the test of one fold; strata and `linked` as in `split_patients`.
    Raises InputError for fewer than 2 folds or fewer groups than folds.
    """
    records = [replace(r, split="train") for r in records]
    groups = _groups(records, linked)
    order = [group for stratum in _strata(records, groups, 0) for group in stratum]
    if not 2 <= folds <= len(order):
        raise InputError(f"--folds {folds}: expected 2 to {len(order)}, the number of patients")
    made = []
    for fold in range(folds):
        held = set(order[fold::folds])  # dealt out stratum by stratum
        split = [replace(r, split="test") if groups[r.patient] in held else r for r in records]
        made.append(_cut(split, groups, "val", 0.1, 0))
    return made


def _groups(records: Sequence[Record], linked: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The group of each patient, named after its first: patients whom pairs of paths link."""
    patient = {record.path: record.patient for record in records}
    group = {record.patient: record.patient for record in records}

    def top(name: str) -> str:
        while group[name] != name:
            name = group[name]
        return name

    for one, other in linked:
        first, second = sorted((top(patient[one]), top(patient[other])))
        group[second] = first
    return {name: top(name) for name in group}


def _strata(records: Iterable[Record], groups: dict[str, str], seed: int) -> list[list[str]]:
    """Train's groups in a random order of `seed`, by the worst grade in each (or none)."""
    worse: dict[str, int] = {}
    for record in records:
        if record.split == "train":
            grade, group = -1 if record.grade is None else record.grade, groups[record.patient]
            worse[group] = max(grade, worse.get(group, -1))
    strata = defaultdict(list)
    # By hash, not by random numbers: any version of anything takes the same patients.
    for group in sorted(worse, key=lambda g: hashlib.sha256(f"{seed} {g}".encode()).digest()):
        strata[worse[group]].append(group)
    return [strata[grade] for grade in sorted(strata)]


def _cut(
    records: Sequence[Record], groups: dict[str, str], name: str, share: float, seed: int
) -> list[Record]:
    """Move `share` of train's groups to the split `name`, the same share of each stratum."""
    strata = _strata(records, groups, seed)
    # All strata evenly interleaved: any beginning of this order has the same share of each.
    order = sorted(((i + 0.5) / len(s), s[i]) for s in strata for i in range(len(s)))
    number = max(1, round(share * len(order))) if len(order) > 1 else 0
    moved = {group for _, group in order[:number]}
    inside = (r.split == "train" and groups[r.patient] in moved for r in records)
    return [replace(r, split=name) if i else r for r, i in zip(records, inside, strict=True)]


def match_rows(
    file: Path,
    rows: list[tuple[str, str, str]],
    paths: list[str],
    dropped: dict[str, str],
    tell: Callable[[str, list[str]], None],
    key: Callable[[str], str],
) -> dict[str, int | None]:
    """Match a table's rows (where, name, grade) with photographs; return {path: grade}.

    Both go by their `key`, `stem_of` mostly, since mirrors change folders, suffixes and case. What
    has no partner is told; so are rows whose grade is one of `dropped`, which are left out, under
    what it says. Raises InputError, naming file and row, for other grades than 0-4, and for a name
    with two.
    """
    by_stem: dict[str, str] = {}
    for path in paths:
        if by_stem.setdefault(key(path), path) != path:
            twice = by_stem[key(path)]
            raise InputError(f"{file}: {twice} and {path} have the same name; keep one")
    grades: dict[str, int | None] = {}
    for where, text, grade in rows:
        stem = key(text)
        value = grade if grade in dropped else _grade(where, grade)
        if grades.setdefault(stem, value) != value:
            raise InputError(f"{where}: {stem} has level {grades[stem]} further up; keep one")
    tell(
        f"photographs without a row in {file.name}",
        [by_stem[s] for s in by_stem if s not in grades],
    )
    tell(f"rows of {file.name} without photograph", [s for s in grades if s not in by_stem])
    for text, what in dropped.items():
        tell(f"photographs left out, {what}", [s for s, g in grades.items() if g == text])
    kept = ((path, grades[stem]) for stem, path in by_stem.items() if stem in grades)
    return {path: grade for path, grade in kept if grade not in dropped}


def stem_of(name: str) -> str:
    """A photograph's name without folders, suffix and case."""
    stem, suffix = os.path.splitext(PurePosixPath(name.replace("\\", "/")).name.casefold())
    return stem + suffix * (suffix not in SUFFIXES)


def _grade(where: str, text: str) -> int | None:
    if not re.fullmatch(GRADE, text):
        raise InputError(f"{where}: level is {text!r}; expected 0, 1, 2, 3 or 4")
    return int(text[0]) if text else None


def named_records(items: Iterable[tuple[str, int | None, str]]) -> list[Record]:
    """Records of (path, grade, split); patients are named <patient>_<left|right>, else by stem."""
    records = []
    for record in lone_records(items):
        match = re.fullmatch("(.+)_(left|right)", PurePosixPath(record.path).stem, re.IGNORECASE)
        patient, eye = (match[1], match[2].lower()) if match else (record.patient, "")
        records.append(replace(record, patient=patient, eye=eye))
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


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + ", ..." * (len(names) > 5)
