"""How each data set lies on disk: its photographs, grades, patients and splits.

`open_data` recognises a folder and gives a Manifest, the one internal form; `write_manifest` keeps
it as `manifest.csv`. A new data set is one function and one entry in LAYOUTS.
"""

import csv
import hashlib
import io
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path, PurePosixPath, PureWindowsPath

from utils import InputError, write_atomic

SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= {"val": "val", "valid": "val", "validation": "val"}
GRADE = r"([0-4])(\.0*)?|"  # nothing: not graded
EXPECTED = """a prepared folder (manifest.csv), EyePACS as downloaded (train/ and trainLabels.csv),
class folders (train/0 ... train/4, test/0 ...) or any folder of photographs"""


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
    """All photographs of a data set; `prepared` ones are square, `notes` are to be said aloud."""

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


def open_data(path) -> Manifest:
    """Recognise a folder (EXPECTED, else InputError) and read its records, splits completed."""
    root = Path(path).expanduser()
    root = root.parent if root.name == "manifest.csv" else root
    if not root.is_dir():
        raise InputError(f"{root}: is not a folder that exists; expected {EXPECTED}")
    notes: list[str] = []
    if (root / "manifest.csv").is_file():
        manifest = read_manifest(root)
    else:
        paths = _scan(root)
        read = ((layout, adapter(root, paths, notes)) for layout, adapter in LAYOUTS.items())
        layout, records = next(pair for pair in read if pair[1] is not None)
        manifest = Manifest(root, tuple(records), False, layout)
    _check_leaks(manifest.records, root)
    before = Counter(record.split for record in manifest.records)
    records = tuple(split_patients(manifest.records))
    after = Counter(record.split for record in records)
    origin = "val" if before["val"] else "20 % of the patients"
    for split, how in (("test", origin), ("val", "10 % of train's patients")):
        if after[split] != before[split]:
            notes.append(f"{split} is made from {how}: {after[split]} photographs")
    return replace(manifest, records=records, notes=tuple(notes))


def read_manifest(folder) -> Manifest:
    """Read and check `manifest.csv` in `folder`; every fault is an InputError naming its row."""
    root, records, rows = Path(folder), [], {}
    for where, row in _read_csv(root / "manifest.csv", [f.name for f in fields(Record)[:5]]):
        record = _parse_row(where, row)
        if record.path in rows:
            raise InputError(f"{where}: {record.path} is in {rows[record.path]} too; keep one")
        rows[record.path] = where
        records.append(record)
    _check_files(root, rows)
    _check_leaks(records, root / "manifest.csv")
    # What prepare_data.py leaves beside it; without that, a list of photographs as they are.
    prepared = (root / "data_report.json").is_file()
    return Manifest(root, tuple(records), prepared, "prepared" if prepared else "manifest")


def write_manifest(folder, records: Iterable[Record]) -> None:
    """Write `manifest.csv` into `folder`, whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in fields(Record))
    writer.writerows(astuple(record) for record in records)
    data = text.getvalue().encode()
    write_atomic(Path(folder) / "manifest.csv", lambda temporary: temporary.write_bytes(data))


def _read_csv(file: Path, required: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
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


def _parse_row(where: str, row: dict[str, str]) -> Record:
    path = PureWindowsPath(row["path"])  # it knows every way out of a folder
    outside = path.anchor or ".." in path.parts or "\0" in row["path"]
    split, eye = SPLITS.get(row["split"].lower()), row["eye"].lower()
    sizes = [row.get(name, "") for name in ("width", "height")]
    for name, value, good, expected in (
        ("path", row["path"], path.parts and not outside, "one inside the csv's folder"),
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
        raise InputError(f"{rows[missing[0]]}: {n}: {_some(missing)}; copy them or drop their rows")


def _check_leaks(records: Iterable[Record], where) -> None:
    splits = defaultdict(set)
    for record in records:
        splits[record.patient].add(record.split)
    leaks = [f"{patient} ({', '.join(sorted(s))})" for patient, s in splits.items() if len(s) > 1]
    if leaks:
        what = f"{len(leaks)} patients are in more than one split: {_some(leaks)}"
        raise InputError(f"{where}: {what}; keep each in one, or put all into train, to be split")


def split_patients(records: Sequence[Record], *, seed: int = 0) -> list[Record]:
    """Complete the splits, always by patient, in strata of the patient's worse eye (or no grade).

    Without test, val becomes test, or else 20 % of the patients do; without val, 10 % of train's
    patients become val. Raises InputError if a patient is in two splits already.
    """
    _check_leaks(records, "splits")
    present = {record.split for record in records}
    if "test" not in present and "val" in present:
        records = [replace(r, split="test") if r.split == "val" else r for r in records]
    elif "test" not in present:
        records = _cut(records, "test", 0.2, seed)
    if not {"val", "test"} <= present:
        records = _cut(records, "val", 0.1, seed)
    return list(records)


def _cut(records: Sequence[Record], name: str, share: float, seed: int) -> list[Record]:
    """Move `share` of train's patients to the split `name`, the same share of each stratum."""
    worse: dict[str, int] = {}
    for record in records:
        if record.split == "train":
            grade = -1 if record.grade is None else record.grade
            worse[record.patient] = max(grade, worse.get(record.patient, -1))
    strata = defaultdict(list)
    # By hash, not by random numbers: any version of anything takes the same patients.
    for patient in sorted(worse, key=lambda p: hashlib.sha256(f"{seed} {p}".encode()).digest()):
        strata[worse[patient]].append(patient)
    # All strata evenly interleaved: any beginning of this order has the same share of each.
    order = sorted(((i + 0.5) / len(s), s[i]) for s in strata.values() for i in range(len(s)))
    number = max(1, round(share * len(order))) if len(order) > 1 else 0
    moved = {patient for _, patient in order[:number]}
    return [replace(r, split=name) if r.patient in moved else r for r in records]


def _eyepacs(root: Path, paths: list[str], notes: list[str]) -> list[Record] | None:
    """EyePACS as Kaggle ships it, and mirrors with other suffixes or sub-folders."""
    names = {name.lower(): name for name in os.listdir(root)}
    files = {"train": "trainlabels.csv", "test": "retinopathy_solution.csv"}
    labelled = {split: root / names[file] for split, file in files.items() if file in names}
    if not labelled:
        return None
    inside = {split: [p for p in paths if p.lower().startswith(f"{split}/")] for split in files}
    join = (_join(inside[split], file, split, notes) for split, file in labelled.items())
    items = [item for joined in join for item in joined]
    if not items:
        raise InputError(f"{root}: no photographs in {_some([*labelled])}; {_expected(names)}")
    if "test" not in labelled:
        what = "photographs of test/ left out, their grades (retinopathy_solution.csv) are missing"
        _tell(notes, what, inside["test"])
    return _records(items)


def _join(paths: list[str], file: Path, split: str, notes: list[str]) -> list[tuple]:
    """Join photographs and a csv's rows by stem; what has no partner is told."""
    by_stem: dict[str, str] = {}
    for path in paths:
        stem = PurePosixPath(path).stem.casefold()
        if by_stem.setdefault(stem, path) != path:
            raise InputError(f"{file}: {by_stem[stem]} and {path} have the same name; keep one")
    grades: dict[str, int | None] = {}
    for where, row in _read_csv(file, ("image", "level")):
        stem, suffix = os.path.splitext(row["image"].casefold())
        stem, grade = stem + suffix * (suffix not in SUFFIXES), row["level"]
        if not re.fullmatch(GRADE, grade):
            raise InputError(f"{where}: level is {grade!r}; expected 0, 1, 2, 3 or 4")
        grade = int(grade[0]) if grade else None
        if grades.setdefault(stem, grade) != grade:
            raise InputError(f"{where}: {stem} has level {grades[stem]} further up; keep one")
    lonely = [path for stem, path in by_stem.items() if stem not in grades]
    _tell(notes, f"photographs without a row in {file.name}", lonely)
    _tell(notes, f"rows of {file.name} without photograph", [s for s in grades if s not in by_stem])
    return [(path, grades[stem], split) for stem, path in by_stem.items() if stem in grades]


def _class_folders(root: Path, paths: list[str], notes: list[str]) -> list[Record] | None:
    """`train/ test/ [val/]` with a folder per grade, or such folders alone."""
    parts = {path: path.split("/") for path in paths}
    splits = {path: SPLITS.get(p[0].lower()) for path, p in parts.items() if p[2:]}
    depth = int(any(splits.values()))
    inside = [path for path, p in parts.items() if (splits.get(path) if depth else p[1:])]
    grades = {name: _grade_of_name(name) for name in sorted({parts[p][depth] for p in inside})}
    unknown = [name for name, grade in grades.items() if grade is None]
    if not depth and len(unknown) == len(grades):
        return None
    if unknown:  # never by alphabetical order, which would give wrong grades in silence
        raise InputError(
            f"{root}: of the class folders {_some([*grades])} these name no grade: {_some(unknown)}"
            "; rename each to 0 (no DR), 1 (mild), 2 (moderate), 3 (severe) or 4 (proliferative)"
        )
    _tell(notes, "photographs outside the class folders", sorted({*paths} - {*inside}))
    notes.append("folders read as grades: " + ", ".join(f"{n} = {g}" for n, g in grades.items()))
    return _records((p, grades[parts[p][depth]], splits[p] if depth else "train") for p in inside)


def _grade_of_name(name: str) -> int | None:
    """The grade that a folder's name says: 2, grade_2, Moderate, "2 - moderate NPDR"; or None."""
    text = re.sub("[^a-z0-9]", "", name.lower())
    words = ("no|noapparent|normal", "mild", "moderate", "severe", "p(?=dr)|proliferat(e|ive)")
    disease = "(npdr|(nonproliferative)?(dr|(diabetic)?retinopathy)?)"
    for grade, word in enumerate(words):
        if re.fullmatch(f"(grade|class|level)?({grade}|{grade}?({word}){disease})", text):
            return grade
    return None


def _photographs(root: Path, paths: list[str], notes: list[str]) -> list[Record]:
    """Any folder with photographs at any depth; nothing is known of their grades."""
    parts = [path.split("/") for path in paths]
    signs = ("manifest.csv", "trainLabels.csv", "retinopathy_solution.csv")
    inner = {e.path for e in os.scandir(root) for s in signs if os.path.isfile(f"{e.path}/{s}")}
    inner |= {str(root / p[0]) for p in parts if p[3:] and p[1].lower() in SPLITS}
    if inner:
        raise InputError(f"{root}: is one level too high; give {' or '.join(sorted(inner))}")
    if not paths:
        names = sorted(os.listdir(root))
        raise InputError(f"{root}: found {_some(names) or 'nothing'}; {_expected(names)}")
    notes.append("no grades are known: enough for training, not for evaluation")
    return _records(("/".join(p), None, SPLITS.get(p[0].lower(), "train")) for p in parts)


LAYOUTS = {"eyepacs": _eyepacs, "class folders": _class_folders, "photographs": _photographs}


def _records(items: Iterable[tuple[str, int | None, str]]) -> list[Record]:
    """Records of (path, grade, split); patients are named <patient>_<left|right>, else by stem."""
    items = [(PurePosixPath(path), grade, split) for path, grade, split in items]
    times = Counter(path.stem for path, _, _ in items)
    records = []
    for path, grade, split in items:
        match = re.fullmatch("(.+)_(left|right)", path.stem, re.IGNORECASE)
        # A stem that occurs twice (0/1.jpg, 1/1.jpg) is numbering, no patient: take the path.
        alone = path.stem if times[path.stem] == 1 else str(path.with_suffix(""))
        patient, eye = (match[1], match[2].lower()) if match else (alone, "")
        records.append(Record(str(path), grade, patient, eye, split))
    return records


def _scan(root: Path) -> list[str]:
    """Photographs at any depth, as sorted posix paths relative to root; links are followed."""

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror})")

    found, seen = [], set()
    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)  # a link back up would never end
        folders[:] = [f for f in folders if real not in seen and f[0] != "." and f != "__MACOSX"]
        prefix = Path(folder).relative_to(root)
        photographs = [n for n in names if n.lower().endswith(SUFFIXES) and n[0] != "."]
        found += [(prefix / name).as_posix() for name in photographs if real not in seen]
        seen.add(real)
    return sorted(found)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + ", ..." * (len(names) > 5)


def _tell(notes: list[str], what: str, names: Sequence[str]) -> None:
    if names:
        notes.append(f"{len(names)} {what}: {_some(names)}")


def _expected(names: Iterable[str]) -> str:
    packed = any(re.search(r"\.(zip|7z|tar|tgz|gz|\d{3})$", name) for name in names)
    return "unpack the archives (parts: `7z x train.zip.001`)" if packed else f"expected {EXPECTED}"
