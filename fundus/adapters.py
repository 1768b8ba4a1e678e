"""Every data set that is understood: how it lies on disk, and what its authors publish.

A new data set is one function, which reads it, and one entry in DATA_SETS. The choices and the help
of --layout, the messages that say what was expected and the table in docs/data.md follow from that.
Class folders, any folder of photographs and any csv are read by forms.py.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Literal

from fundus.forms import read_class_folders, read_csv_file, read_photographs
from fundus.listing import Found, TableRow, lone_records, named_records, stem_of
from fundus.manifest import SPLIT_WORDS, Record, name_examples, read_csv, read_header
from utils import InputError


@dataclass(frozen=True)
class Layout:
    """One entry of the registry: a way in which photographs lie on disk."""

    name: str
    """What --layout takes."""
    title: str
    """What people call it."""
    read: Callable[[Found], list[Record] | None]
    """The adapter: returns the photographs of a folder, None for a folder of another form."""
    published: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """How many photographs of each grade its authors count, by split; "all": in all splits."""
    has_patients: bool = True
    """Whether it can be known which photographs are of one patient."""
    automatic: bool = True
    """Whether --layout auto tries it."""


# -------------------------------------------------------------------------- data sets as downloaded

# Of EyePACS, black or without a fundus that can be found, as its users have reported.
KNOWN_BAD = """492_right 25313_right 27096_right 1986_left 32253_right 34689_left 43457_left
766_left 1557_left 18972_left 679_right 21345_left 21720_left 26064_right 42130_left"""


def _read_eyepacs(found: Found) -> list[Record] | None:
    """Read EyePACS as Kaggle ships it, and mirrors with other suffixes or sub-folders."""
    tables = {}
    for split, name in (("train", "trainlabels.csv"), ("test", "retinopathy_solution.csv")):
        if name in found.tables:
            tables[split] = found.tables[name]
    if not tables:
        return None

    photographs = []
    for split, file in tables.items():
        inside, _ = _part_by_folder(found.photographs, split)
        # Mirrors of one half name the folder otherwise (resized_train/), or have none.
        if len(tables) == 1 and not inside:
            other = "test" if split == "train" else "train"
            _, inside = _part_by_folder(found.photographs, other)
        photographs += found.join(inside, file, split, "image", "level")
    if not photographs:
        examples = name_examples(list(tables))
        form = expected_form(os.listdir(found.root))
        raise InputError(f"{found.root}: no photographs in {examples}; {form}")

    # The grades of the test photographs came after the competition, in a file of their own.
    if "test" not in tables:
        left_out, _ = _part_by_folder(found.photographs, "test")
        what = "photographs of test/ left out, their grades (retinopathy_solution.csv) are missing"
        found.add_note(what, left_out)

    # Kept as in the paper, so that counts stay the published ones.
    records = named_records(photographs)
    stems = set(KNOWN_BAD.split())
    known_bad = []
    for record in records:
        if PurePosixPath(record.path).stem in stems:
            known_bad.append(record.path)
    found.add_note("photographs are known to be black or unusable, and kept", known_bad)
    return records


def _part_by_folder(paths: Sequence[str], name: str) -> tuple[list[str], list[str]]:
    """Return the paths that lie in a folder `name` at any depth, and the others."""
    inside = []
    outside = []
    for path in paths:
        folders = path.lower().split("/")[:-1]
        if name in folders:
            inside.append(path)
        else:
            outside.append(path)
    return inside, outside


def _read_aptos(found: Found) -> list[Record] | None:
    """Read APTOS 2019, and mirrors in which valid.csv and test.csv have grades as well."""
    photographs = []
    for name, file in found.tables.items():
        # Names of the tables begin with the split's: train.csv, train_1.csv, valid.csv.
        word = re.match("[a-z]*", name)[0]
        if word not in SPLIT_WORDS:
            continue
        header = read_header(found.root / file)
        if "id_code" not in header:
            continue
        split = SPLIT_WORDS[word]
        folder = re.compile(rf"(^|/){split}[a-z]*_images/", re.IGNORECASE)
        inside = [path for path in found.photographs if folder.search(path)]
        if "diagnosis" in header:
            photographs += found.join(inside, file, split, "id_code", "diagnosis")
        else:  # Kaggle's own test.csv
            what = f"photographs of {file} left out, their grades are not published"
            found.add_note(what, inside)
    return lone_records(photographs) or None


def _read_ddr(found: Found) -> list[Record] | None:
    """Read DDR's grading part: lists with `name grade` a line, in which 5 is ungradable."""
    photographs = []
    for word in ("train", "valid", "test"):
        file = found.tables.get(f"{word}.txt")
        if file is None:
            continue
        text = (found.root / file).read_text("utf-8-sig", "replace")
        # Other data sets have lists of these names too, without grades.
        first_line = text.partition("\n")[0]
        if not re.fullmatch(r"\S.*\s\d+\s*", first_line):
            continue
        rows = []
        for number, line in enumerate(text.splitlines(), 1):
            cells = line.rsplit(None, 1)  # names may have blanks in them
            if len(cells) == 2:
                rows.append(TableRow(f"{found.root / file}, row {number}", *cells))
        inside = found.below(str(PurePosixPath(file).parent / word))
        dropped = {"5": "ungradable (grade 5)"}
        photographs += found.match(inside, file, SPLIT_WORDS[word], rows, dropped=dropped)
    return lone_records(photographs) or None


def _read_messidor2(found: Found) -> list[Record] | None:
    """Read Messidor-2 with the adjudicated grades of messidor_data.csv; all of it is a test set."""
    file = found.tables.get("messidor_data.csv")
    if file is None:
        return None
    # A mirror of prepared photographs has renamed the columns of names and grades.
    header = read_header(found.root / file)
    for columns in (("image_id", "adjudicated_dr_grade"), ("id_code", "diagnosis")):
        if set(columns) <= set(header):
            break
    else:
        return None

    # Its grades are of Google's graders; the ungradable ones have a flag of their own.
    name_column, grade_column = columns
    rows = []
    for where, row in read_csv(found.root / file, columns):
        grade = row[grade_column]
        if row.get("adjudicated_gradable", "1") in ("0", "0.0"):
            grade = "ungradable"
        rows.append(TableRow(where, row[name_column], grade))
    dropped = {"ungradable": "ungradable", "": "without a grade"}
    photographs = found.match(found.photographs, file, "test", rows, dropped=dropped)
    records = lone_records(photographs)

    # ADCIS ships a table of its own, with the two eyes of each examination in a line.
    pairs = found.tables.get("messidor-2.csv")
    if pairs is None:
        found.notes.append(
            "messidor-2.csv of the download, which pairs the eyes of each patient, is not there"
        )
        return records
    examination_of = {}
    lines = (found.root / pairs).read_text("utf-8-sig", "replace").splitlines()
    for number, line in enumerate(lines):
        for name in re.split("[;,\t]", line):
            examination_of[stem_of(name.strip())] = f"exam {number}"
    paired = []
    for record in records:
        patient = examination_of.get(stem_of(record.path), record.patient)
        paired.append(replace(record, patient=patient))
    return paired


def _read_idrid(found: Found) -> list[Record] | None:
    """Read IDRiD's disease grading; train and test number their photographs alike, from 001."""
    photographs = []
    for name, file in found.tables.items():
        match = re.search(r"disease grading.*(training|testing) labels\.csv", name)
        if match is None:
            continue
        # "1. Original Images" lies beside "2. Groundtruths", which holds the tables.
        part = PurePosixPath(file).parent.parent
        folder = f"{match[1]} set/"
        inside = [path for path in found.below(str(part)) if folder in path.lower()]
        split = SPLIT_WORDS[match[1]]
        photographs += found.join(inside, file, split, "Image name", "Retinopathy grade")
    return lone_records(photographs) or None


# ------------------------------------------------------------------------------------- the registry

# In the order in which --layout auto tries them. Both groups become one registry below.
DATA_SETS = (
    Layout(
        "eyepacs",
        "EyePACS",
        _read_eyepacs,
        published={"train": (25810, 2443, 5292, 873, 708), "test": (39533, 3762, 7861, 1214, 1206)},
    ),
    Layout(
        "messidor2", "Messidor-2", _read_messidor2, published={"test": (1017, 270, 347, 75, 35)}
    ),
    Layout(
        "idrid",
        "IDRiD",
        _read_idrid,
        published={"train": (134, 20, 136, 74, 49), "test": (34, 5, 32, 19, 13)},
        has_patients=False,
    ),
    Layout(
        "ddr", "DDR", _read_ddr, published={"all": (6266, 630, 4477, 236, 913)}, has_patients=False
    ),
    Layout(
        "aptos",
        "APTOS 2019",
        _read_aptos,
        published={"train": (1805, 370, 999, 193, 295)},
        has_patients=False,
    ),
)
FORMS = (
    Layout("class_folders", "class folders (train/0 ... train/4, test/0 ...)", read_class_folders),
    Layout("photographs", "any folder of photographs", read_photographs),
    Layout("csv", "a csv with --path-column", read_csv_file, automatic=False),
)
LAYOUTS = {layout.name: layout for layout in (*DATA_SETS, *FORMS)}
LayoutName = Literal[("auto", *LAYOUTS)]


def one_of(layouts: Sequence[Layout]) -> str:
    """Return the titles of layouts as a person lists them: "a, b or c"."""
    titles = [layout.title for layout in layouts]
    return f"{', '.join(titles[:-1])} or {titles[-1]}"


def expected_data() -> str:
    """Return what a user may give as a data set, as the end of "expected ..."."""
    return f"a prepared folder (manifest.csv), {one_of(DATA_SETS)} as downloaded, {one_of(FORMS)}"


def expected_form(names: Iterable[str]) -> str:
    """Return what to do about a folder that holds `names` and no data set that is understood."""
    if any(re.search(r"\.(zip|7z|tar|tgz|gz|\d{3})$", name) for name in names):
        return "unpack the archives (parts: `7z x train.zip.001`)"
    return f"expected {expected_data()}"


def layout_help() -> str:
    """Return the help text of --layout."""
    entries = [f"{layout.name}: {layout.title}" for layout in LAYOUTS.values()]
    return (
        "How the data set lies on disk. auto takes the first of these forms that fits. "
        f"{'; '.join(entries)}."
    )


def layout_table() -> str:
    """Return the table of docs/data.md as markdown: a row for each layout."""
    lines = [
        "| `--layout` | data set | graded photographs, as published | patients |",
        "|---|---|---|---|",
    ]
    for layout in LAYOUTS.values():
        totals = [f"{split} {sum(counts):,}" for split, counts in layout.published.items()]
        patients = "from names or a table" if layout.has_patients else "not published"
        lines.append(
            f"| `{layout.name}` | {layout.title} | {', '.join(totals) or '-'} | {patients} |"
        )
    return "\n".join(lines)
