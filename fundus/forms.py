"""Forms in which photographs lie that belong to no data set: class folders, any folder, any csv.

Each function reads a folder for the registry in adapters.py.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath

from fundus.listing import (
    Found,
    Labelled,
    TableRow,
    grade_of_name,
    lone_records,
    named_records,
    stem_of,
)
from fundus.manifest import SPLIT_WORDS, Record, check_path, is_grade, name_examples, read_csv
from utils import InputError

# What tables write where a grade is not known, and how a label stands for "ungradable".
NOT_KNOWN = {"", "na", "n/a", "nan", "none", "null", "unknown"}
UNGRADABLE = "ungradable"

# Names under which a table's column says the split, in lower case.
SPLIT_COLUMNS = ("split", "set", "subset", "partition")


# ------------------------------------------------------------------------------------ class folders


def read_class_folders(found: Found) -> list[Record] | None:
    """Return the photographs of class folders, below `train/ test/ [val/]` or alone.

    None where no folder names a grade; InputError where only some of them do.
    """
    split_of, class_of = _split_and_class(found.photographs)

    # What the user says of a name (--grades) counts before what the name itself says.
    named = found.reading.named
    grade_of = {}
    unknown = []
    for name in sorted(set(class_of.values())):
        if name.casefold() in named:
            grade_of[name] = named[name.casefold()]
            continue
        grade_of[name] = grade_of_name(name)
        if grade_of[name] is None:
            unknown.append(name)
    if not split_of and len(unknown) == len(grade_of):
        return None

    # Alphabetical order would give each folder some grade, and wrong ones in silence.
    if unknown:
        raise InputError(
            f"{found.root}: of the class folders {name_examples(list(grade_of))} these name no "
            f"grade: {name_examples(unknown)}; rename each to 0 (no DR), 1 (mild), 2 (moderate), "
            "3 (severe) or 4 (proliferative), "
            f"or say it: prepare_data.py --grades {unknown[0]} 0 ..."
        )

    outside = sorted(set(found.photographs) - set(class_of))
    found.add_note("photographs outside the class folders", outside)
    _refuse_unused(found, set(grade_of), "class folders")
    # A folder that is called "mild" is of the scale; one that is called 1 may mean anything.
    if not named and all(name.isdecimal() for name in grade_of):
        refuse_two_classes(str(found.root), "class folders", set(grade_of.values()))
    _note_labels(found, "folders", grade_of)
    photographs = []
    left_out = []
    for path, name in class_of.items():
        if grade_of[name] is None:
            left_out.append(path)
        else:
            photographs.append(Labelled(path, grade_of[name], split_of.get(path, "train")))
    found.add_note("photographs left out, ungradable", left_out)
    return named_records(photographs)


def _note_labels(found: Found, what: str, grade_of: Mapping[str, int | None]) -> None:
    """Note how labels in words are read."""
    read_as = []
    for name, grade in grade_of.items():
        read_as.append(f"{name} = {UNGRADABLE if grade is None else grade}")
    if read_as:
        found.notes.append(f"{what} read as grades: {', '.join(read_as)}")


def _refuse_unused(found: Found, labels: set[str], what: str) -> None:
    """Raise InputError where --grades names a label that is not there: a slip, most likely."""
    present = {label.casefold() for label in labels}
    unused = [name for name in found.reading.grades if name.casefold() not in present]
    if unused:
        raise InputError(
            f"{found.root}: --grades {unused[0]}: is none of the {what} "
            f"({name_examples(sorted(labels))})"
        )


def refuse_two_classes(where: str, what: str, grades: set[int]) -> None:
    """Raise InputError for labels of 0 and 1 alone: they may mean any two classes.

    Taken for grades, "referable" would be mild retinopathy, and every number of referable DR wrong.
    """
    if grades and max(grades) == 1:
        raise InputError(
            f"{where}: {what}: the labels are 0 and 1 alone, which may be two classes of any kind; "
            "expected grades 0 to 4; say what they mean: prepare_data.py --grades 0 0 1 2 where 1 "
            "is referable DR, --grades 0 0 1 1 where it is mild DR"
        )


def _split_and_class(paths: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the split and the class folder of each photograph that is in one, by path."""
    split_of = {}
    for path in paths:
        folders = path.split("/")[:-1]
        if len(folders) >= 2 and folders[0].lower() in SPLIT_WORDS:
            split_of[path] = SPLIT_WORDS[folders[0].lower()]

    # With split folders at the top, classes are one level deeper, and all else is left out.
    class_of = {}
    for path in paths:
        folders = path.split("/")[:-1]
        if path in split_of:
            class_of[path] = folders[1]
        elif folders and not split_of:
            class_of[path] = folders[0]
    return split_of, class_of


# --------------------------------------------------------------------------------------- any folder


def read_photographs(found: Found) -> list[Record]:
    """Return all photographs at any depth, of whose grades nothing is known.

    Raises InputError for the folder above a data set.
    """
    data_sets = _data_sets_below(found)
    if data_sets:
        raise InputError(f"{found.root}: is one level too high; give {' or '.join(data_sets)}")

    # Grades in a table of another form would be lost in silence.
    found.add_note("tables are not read; prepare_data.py --path-column would", found.csv_files())
    if any(name.startswith("samplesubmission") for name in found.tables):
        found.notes.append("sampleSubmission.csv is not read: its grades are placeholders, all 0")
    if found.photographs:
        found.notes.append("no grades are known: enough for training, not for evaluation")
    photographs = []
    for path in found.photographs:
        top = path.split("/")[0].lower()
        photographs.append(Labelled(path, None, SPLIT_WORDS.get(top, "train")))
    return named_records(photographs)


def _data_sets_below(found: Found) -> list[str]:
    """Return the folders in the root that look like the data set which the user meant.

    Read from the root, their photographs would lose their grades without an error.
    """
    data_sets = set()
    for entry in os.scandir(found.root):
        if os.path.isfile(f"{entry.path}/manifest.csv"):
            data_sets.add(entry.path)

    # NAME/train/2/1.jpg are class folders in splits, NAME/2/1.jpg class folders alone.
    tops = set()
    classes = set()
    all_in_classes = True
    for path in found.photographs:
        folders = path.split("/")[:-1]
        if len(folders) < 2:
            all_in_classes = False
            continue
        top = str(found.root / folders[0])
        tops.add(top)
        classes.add(folders[1])
        if len(folders) >= 3 and folders[1].lower() in SPLIT_WORDS:
            data_sets.add(top)
    if any(grade_of_name(name) is None for name in classes):
        all_in_classes = False
    if len(classes) > 1 and all_in_classes:
        data_sets |= tops
    return sorted(data_sets)


# ------------------------------------------------------------------------------------------ any csv


def read_csv_file(found: Found) -> list[Record]:
    """Return the photographs of a csv, as the columns that `found.reading` names say.

    Paths are relative to the csv, or they are names of photographs below it. Raises InputError for
    a csv or a row that cannot be used.
    """
    reading = found.reading
    file = _choose_csv(found)
    columns = [reading.path_column]
    for column in (reading.grade_column, reading.patient_column, reading.split_column):
        if column:
            columns.append(column)
    table = read_csv(found.root / file, columns)
    grades = _read_labels(found, file, table)
    rows = []
    for (where, row), grade in zip(table, grades, strict=True):
        check_path(where, row[reading.path_column])
        rows.append(TableRow(where, row[reading.path_column], grade))

    # Rows go by path. Where none of the paths is there, as in mirrors, names alone have to do.
    photographs = set(found.photographs)
    key = stem_of
    if any(_path_of(row.name) in photographs for row in rows):
        key = _path_of
    labelled = _match_csv(found, file, rows, key)
    if not reading.grades:
        present = {photograph.grade for photograph in labelled if photograph.grade is not None}
        refuse_two_classes(str(found.root / file), f"column {reading.grade_column}", present)

    # A published split stays as it is.
    split_of = _read_splits(found, file, table, key)
    labelled = [one._replace(split=split_of.get(key(one.path), one.split)) for one in labelled]
    if not reading.patient_column:
        return named_records(labelled)

    # Two rows may name one photograph, but not two patients for it.
    patient_of: dict[str, str] = {}
    for where, row in table:
        name = key(row[reading.path_column])
        patient = row[reading.patient_column]
        if patient_of.setdefault(name, patient) != patient:
            raise InputError(f"{where}: {name} has patient {patient_of[name]} further up; keep one")
    records = []
    for record in lone_records(labelled):
        patient = patient_of[key(record.path)] or record.patient
        records.append(replace(record, patient=patient))
    return records


def _read_labels(found: Found, file: str, table: Sequence[tuple[str, dict[str, str]]]) -> list[str]:
    """Return the grade of each row of a csv as text, empty where it is not known, or UNGRADABLE.

    Raises InputError, naming the row, for a label that says no grade.
    """
    reading = found.reading
    named = reading.named
    texts = []
    labels = set()
    in_words: dict[str, int | None] = {}
    for where, row in table:
        label = row.get(reading.grade_column, "")
        labels.add(label)
        # What the user says of a label (--grades) counts before what the label itself says.
        if label.casefold() in named:
            grade = named[label.casefold()]
            in_words[label] = grade
        elif label.casefold() in NOT_KNOWN:
            texts.append("")
            continue
        elif is_grade(label):
            texts.append(label)
            continue
        else:
            grade = grade_of_name(label)
            if grade is None:
                raise InputError(
                    f"{where}: grade is {label!r}; expected 0, 1, 2, 3 or 4, or nothing; say what "
                    f"it means: prepare_data.py --grades {label!r} 0, or {label!r} {UNGRADABLE}"
                )
            in_words[label] = grade
        texts.append(UNGRADABLE if grade is None else str(grade))
    _refuse_unused(found, labels, f"labels of column {reading.grade_column}")
    _note_labels(found, "labels", in_words)
    return texts


def _read_splits(
    found: Found, file: str, table: Sequence[tuple[str, dict[str, str]]], key: Callable[[str], str]
) -> dict[str, str]:
    """Return the split of each row by the key of its path; nothing where no column says it.

    The column is the one that the user named, else one of SPLIT_COLUMNS that holds splits alone.
    Raises InputError, naming the row, where a named column holds anything else, and for a
    photograph in two splits.
    """
    reading = found.reading
    column = reading.split_column
    if not column:
        header = table[0][1]
        usual = [name for name in header if name.casefold() in SPLIT_COLUMNS]
        if not usual:
            return {}
        column = usual[0]

    split_of: dict[str, str] = {}
    for where, row in table:
        split = SPLIT_WORDS.get(row[column].casefold())
        if split is None and not reading.split_column:
            found.notes.append(
                f"column {column} of {file} is not read as splits: it holds {row[column]!r}"
            )
            return {}
        if split is None:
            raise InputError(f"{where}: {column} is {row[column]!r}; expected train, val or test")
        name = key(row[reading.path_column])
        if split_of.setdefault(name, split) != split:
            raise InputError(f"{where}: {name} is in {split_of[name]} further up; keep one")
    found.notes.append(f"splits are those of column {column} of {file}")
    return split_of


def _match_csv(
    found: Found, file: str, rows: Sequence[TableRow], key: Callable[[str], str]
) -> list[Labelled]:
    """Return the photographs that the rows grade."""
    named = {key(row.name) for row in rows}
    candidates = []
    for path in found.photographs:
        # A csv of paths may be about a part of the folder. By names alone, photographs of other
        # folders could be meant as well, so all of them have to be told apart.
        if key(path) in named or key is stem_of:
            candidates.append(path)
    dropped = {UNGRADABLE: UNGRADABLE}
    return found.match(candidates, file, "train", rows, dropped=dropped, key=key)


def _choose_csv(found: Found) -> str:
    """Return the csv that the user named, or else the only one there is, relative to the root."""
    files = found.csv_files()
    if found.csv_name in os.listdir(found.root):
        files = [found.csv_name]
    if len(files) != 1:
        there = name_examples(files) or "no csv"
        raise InputError(f"{found.root}: holds {there}; name one as --source")

    # Kaggle's sampleSubmission.csv has the columns of a table of grades, all of them 0.
    name = PurePosixPath(files[0]).name.lower().replace("_", "")
    if name.startswith("samplesubmission"):
        raise InputError(f"{found.root / files[0]}: its grades are placeholders; name the real csv")
    if not found.reading.path_column:
        raise InputError(f"{found.root / files[0]}: name the column of paths with --path-column")
    return files[0]


def _path_of(text: str) -> str:
    """Return a path as listings spell it: ./a//b.jpg is a/b.jpg."""
    return str(PurePosixPath(text))
