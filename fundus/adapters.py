"""One small function for each data set as it is downloaded, and what each set publishes.

A new data set is one function and one entry in LAYOUTS. Other counts than PUBLISHED are told, since
people take parts.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import PurePosixPath

from fundus.listing import Found, grade_of_name, lone_records, named_records, stem_of
from fundus.manifest import SPLITS, Record, check_files, check_path, read_csv, read_header, some
from utils import InputError

EXPECTED = (
    "a prepared folder (manifest.csv), EyePACS, APTOS 2019, DDR, Messidor-2 or IDRiD as "
    "downloaded, class folders (train/0 ... train/4, test/0 ...) or any folder of photographs"
)
PUBLISHED = {  # photographs of grades 0 to 4 in each split, or in all
    "eyepacs": {"train": (25810, 2443, 5292, 873, 708), "test": (39533, 3762, 7861, 1214, 1206)},
    "aptos": {"train": (1805, 370, 999, 193, 295)},
    "ddr": {"all": (6266, 630, 4477, 236, 913)},
    "messidor2": {"test": (1017, 270, 347, 75, 35)},
    "idrid": {"train": (134, 20, 136, 74, 49), "test": (34, 5, 32, 19, 13)},
}


# Of EyePACS, black or without a fundus that scaling finds, as its users have reported.
KNOWN_BAD = """492_right 25313_right 27096_right 1986_left 32253_right 34689_left 43457_left
766_left 1557_left 18972_left 679_right 21345_left 21720_left 26064_right 42130_left"""


NO_PATIENTS = "patients are not published: each photograph counts as one"


def _eyepacs(found: Found) -> list[Record] | None:
    """EyePACS as Kaggle ships it, and mirrors with other suffixes or sub-folders."""
    files = {"train": "trainlabels.csv", "test": "retinopathy_solution.csv"}
    labelled = {split: found.tables[f] for split, f in files.items() if f in found.tables}
    if not labelled:
        return None
    items = []
    for split, file in labelled.items():
        inside = [p for p in found.photographs if split in p.lower().split("/")[:-1]]
        if len(labelled) == 1 and not inside:  # mirrors name the folder otherwise, or have none
            other = {"train": "test", "test": "train"}[split]
            inside = [p for p in found.photographs if other not in p.lower().split("/")[:-1]]
        items += found.join(inside, file, split, "image", "level")
    if not items:
        names = os.listdir(found.root)
        raise InputError(
            f"{found.root}: no photographs in {some([*labelled])}; {expected_form(names)}"
        )
    if "test" not in labelled:
        left = [p for p in found.photographs if "test" in p.lower().split("/")[:-1]]
        what = "photographs of test/ left out, their grades (retinopathy_solution.csv) are missing"
        found.tell(what, left)
    records = named_records(items)
    known = [r.path for r in records if PurePosixPath(r.path).stem in KNOWN_BAD.split()]
    found.tell("photographs are known to be black or unusable, and kept", known)
    return records


def _aptos(found: Found) -> list[Record] | None:
    """APTOS 2019: train.csv and train_images/; mirrors with a labelled valid.csv and test.csv."""
    items = []
    for name, file in found.tables.items():
        header = read_header(found.root / file)
        split = next((s for word, s in SPLITS.items() if re.match(word + r"(?![a-z])", name)), "")
        if "id_code" not in header or not split:
            continue
        inside = [
            p for p in found.photographs if re.search(rf"(^|/){split}[a-z]*_images/", p, re.I)
        ]
        if "diagnosis" in header:
            items += found.join(inside, file, split, "id_code", "diagnosis")
        else:
            found.tell(f"photographs of {file} left out, their grades are not published", inside)
    if items:
        found.notes.append(NO_PATIENTS)
    return lone_records(items) if items else None


def _ddr(found: Found) -> list[Record] | None:
    """DDR's grading part: train.txt, valid.txt, test.txt with `name grade` a line, 5 ungradable."""
    files = {word: found.tables.get(f"{word}.txt") for word in ("train", "valid", "test")}
    items: list[tuple] = []
    for word, file in files.items():
        text = (found.root / file).read_text("utf-8-sig", "replace") if file else ""
        if not re.match(r"\S.*\s\d+\s", text):  # any other list of that name
            continue
        lines = enumerate((line.rsplit(None, 1) for line in text.splitlines()), 1)
        rows = [(f"{found.root / file}, row {n}", *pair) for n, pair in lines if len(pair) == 2]
        inside = found.below(str(PurePosixPath(file).parent / word))
        items += found.match(inside, file, SPLITS[word], rows, {"5": "ungradable (grade 5)"})
    if items:
        found.notes.append(NO_PATIENTS)
    return lone_records(items) if items else None


def _messidor2(found: Found) -> list[Record] | None:
    """Messidor-2 with the adjudicated grades of messidor_data.csv; all of it is a test set."""
    file = found.tables.get("messidor_data.csv")
    columns = ("image_id", "adjudicated_dr_grade")
    if file is None or not {*columns} <= {*read_header(found.root / file)}:
        return None
    rows = read_csv(found.root / file, columns)
    gradable = {w: row.get("adjudicated_gradable", "1") not in ("0", "0.0") for w, row in rows}
    listed = [
        (w, row["image_id"], row["adjudicated_dr_grade"] if gradable[w] else "ungradable")
        for w, row in rows
    ]
    dropped = {"ungradable": "ungradable", "": "without a grade"}
    records = lone_records(found.match(found.photographs, file, "test", listed, dropped))
    pairs = found.tables.get("messidor-2.csv")  # ADCIS's own: the two eyes of each examination
    if pairs is None:
        found.notes.append(NO_PATIENTS + " (messidor-2.csv of the download pairs the eyes)")
        return records
    exam = {}
    lines = (found.root / pairs).read_text("utf-8-sig", "replace").splitlines()
    for number, line in enumerate(lines):
        exam |= {stem_of(n.strip()): f"exam {number}" for n in re.split("[;,\t]", line)}
    return [replace(r, patient=exam.get(stem_of(r.path), r.patient)) for r in records]


def _idrid(found: Found) -> list[Record] | None:
    """IDRiD's disease grading; train and test number their photographs alike, from 001."""
    items: list[tuple] = []
    for name, file in found.tables.items():
        match = re.search(r"disease grading.*(training|testing) labels\.csv", name)
        if match:
            base = str(PurePosixPath(file).parent.parent).removeprefix(".")
            inside = [p for p in found.below(base) if f"{match[1]} set/" in p.lower()]
            items += found.join(inside, file, SPLITS[match[1]], "Image name", "Retinopathy grade")
    if items:
        found.notes.append(NO_PATIENTS)
    return lone_records(items) if items else None


def csv_records(found: Found, name: str) -> list[Record]:
    """Any csv whose columns are named: paths relative to it, or names of photographs below it."""
    reading, files = found.reading, [name] if name in os.listdir(found.root) else []
    files = files or [file for name, file in found.tables.items() if name.endswith(".csv")]
    if len(files) != 1:
        raise InputError(f"{found.root}: holds {some(files) or 'no csv'}; name one as --source")
    if PurePosixPath(files[0]).name.lower().replace("_", "").startswith("samplesubmission"):
        raise InputError(f"{found.root / files[0]}: its grades are placeholders; name the real csv")
    columns = [c for c in (reading.path_column, reading.grade_column, reading.patient_column) if c]
    if not reading.path_column:
        raise InputError(f"{found.root / files[0]}: name the column of paths with --path-column")
    rows = read_csv(found.root / files[0], columns)
    listed = [(w, row[reading.path_column], row.get(reading.grade_column, "")) for w, row in rows]
    for where, path, _ in listed:
        check_path(where, path)
    # By path; where none of them is there, the names alone have to do, as in mirrors.
    there = {*found.photographs}
    key = next((_path_of for _, path, _ in listed if _path_of(path) in there), stem_of)
    places = {key(path): where for where, path, _ in listed}
    paths = [p for p in found.photographs if key is stem_of or p in places]
    check_files(found.root, {p: places[key(p)] for p in paths if key(p) in places})
    items = found.match(paths, files[0], "train", listed, key=key)
    if not reading.patient_column:
        return named_records(items)
    patients: dict[str, str] = {}
    for where, row in rows:
        name, patient = key(row[reading.path_column]), row[reading.patient_column]
        if patients.setdefault(name, patient) != patient:
            raise InputError(f"{where}: {name} has patient {patients[name]} further up; keep one")
    return [replace(r, patient=patients[key(r.path)] or r.patient) for r in lone_records(items)]


def _path_of(text: str) -> str:
    return str(PurePosixPath(text))


def _class_folders(found: Found) -> list[Record] | None:
    """`train/ test/ [val/]` with a folder per grade, or such folders alone."""
    root, parts = found.root, {path: path.split("/") for path in found.photographs}
    splits = {path: SPLITS.get(p[0].lower()) for path, p in parts.items() if p[2:]}
    depth = int(any(splits.values()))
    inside = [path for path, p in parts.items() if (splits.get(path) if depth else p[1:])]
    named = {name.casefold(): grade for name, grade in found.reading.grades.items()}
    names = sorted({parts[p][depth] for p in inside})
    grades = {name: named.get(name.casefold(), grade_of_name(name)) for name in names}
    unknown = [name for name, grade in grades.items() if grade is None]
    if not depth and len(unknown) == len(grades):
        return None
    if unknown:  # never by alphabetical order, which would give wrong grades in silence
        raise InputError(
            f"{root}: of the class folders {some([*grades])} these name no grade: {some(unknown)}"
            "; rename each to 0 (no DR), 1 (mild), 2 (moderate), 3 (severe) or 4 (proliferative), "
            f"or say it: prepare_data.py --grades {unknown[0]} 0 ..."
        )
    found.tell("photographs outside the class folders", sorted({*parts} - {*inside}))
    read = ", ".join(f"{n} = {g}" for n, g in grades.items())
    found.notes.append("folders read as grades: " + read)
    return named_records(
        (p, grades[parts[p][depth]], splits[p] if depth else "train") for p in inside
    )


def _photographs(found: Found) -> list[Record]:
    """Any folder with photographs at any depth; nothing is known of their grades."""
    root, parts = found.root, [path.split("/") for path in found.photographs]
    inner = {e.path for e in os.scandir(root) if os.path.isfile(f"{e.path}/manifest.csv")}
    inner |= {str(root / p[0]) for p in parts if p[3:] and p[1].lower() in SPLITS}
    deep = {p[1] for p in parts if p[2:]}
    if len(deep) > 1 and all(p[2:] and grade_of_name(p[1]) is not None for p in parts):
        inner |= {str(root / p[0]) for p in parts}
    if inner:
        raise InputError(f"{root}: is one level too high; give {' or '.join(sorted(inner))}")
    tables = [path for name, path in found.tables.items() if name.endswith(".csv")]
    found.tell("tables are not read; prepare_data.py --path-column would", tables)
    if any(name.startswith("samplesubmission") for name in found.tables):
        found.notes.append("sampleSubmission.csv is not read: its grades are placeholders, all 0")
    if parts:
        found.notes.append("no grades are known: enough for training, not for evaluation")
    return named_records(("/".join(p), None, SPLITS.get(p[0].lower(), "train")) for p in parts)


LAYOUTS = {
    "eyepacs": _eyepacs,
    "messidor2": _messidor2,
    "idrid": _idrid,
    "ddr": _ddr,
    "aptos": _aptos,
    "class_folders": _class_folders,
    "photographs": _photographs,
}


def expected_form(names: Iterable[str]) -> str:
    packed = any(re.search(r"\.(zip|7z|tar|tgz|gz|\d{3})$", name) for name in names)
    return "unpack the archives (parts: `7z x train.zip.001`)" if packed else f"expected {EXPECTED}"
