"""Open a data set: recognise how it lies on disk, read it, complete its splits.

`open_data` gives a Manifest, the one internal form. What each data set looks like is told by the
registry in adapters.py; a new one is an entry there.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from fundus.adapters import LAYOUTS, Layout, expected_data, expected_form
from fundus.listing import Found, Reading, scan_folder
from fundus.manifest import (
    GRADES,
    Manifest,
    Record,
    check_leaks,
    name_examples,
    read_header,
    read_manifest,
)
from fundus.splits import complete_splits
from utils import InputError

NO_PATIENTS = "patients are not published: each photograph counts as one"


def open_data(
    path: str | os.PathLike,
    layout: str = "auto",
    reading: Reading | None = None,
    linked: Callable[[Manifest], Iterable[tuple[str, str]]] | None = None,
) -> Manifest:
    """Return a data set with complete splits; `path` is a folder, or a csv in it.

    `layout` is one of adapters.LAYOUTS, or auto. `linked` finds the pairs of photographs that must
    stay in one split. Raises InputError for anything that is no data set, or one with a fault.
    """
    manifest = read_data(path, layout, reading or Reading())
    pairs = ()
    if linked is not None:
        pairs = linked(manifest)
    return complete_splits(manifest, pairs)


def read_data(path: str | os.PathLike, layout: str, reading: Reading) -> Manifest:
    """Return a data set in the splits in which it was published, in train where it has none."""
    root, csv_name = _find_root(Path(path).expanduser(), reading)
    if layout == "auto" and reading.path_column:
        layout = "csv"

    # A manifest.csv says all there is to say, unless --path-column asks for other columns of it.
    if layout == "auto" and csv_name.startswith("manifest") and (root / csv_name).is_file():
        return read_manifest(root, csv_name, follow_links=reading.follow_links)
    # Without manifest.csv it is half prepared, and would be read as a folder of photographs.
    if (root / "prepare.jsonl").is_file():
        raise InputError(f"{root}: its preparation is unfinished; repeat that prepare_data.py")

    found, chosen, records = _read_layout(scan_folder(root, reading, csv_name), layout)

    # Whoever reads a result must know how far patients were kept apart.
    if not chosen.has_patients:
        found.notes.append(NO_PATIENTS)
    _compare_with_published(found, chosen, records)
    if chosen.has_patients and not reading.patient_column:
        _note_lone_photographs(found, records)

    # Published splits may leak; those that we make ourselves cannot.
    check_leaks(records, root)
    notes = tuple(found.notes)
    return Manifest(root, tuple(records), False, chosen.name, notes, found.lists)


def _find_root(path: Path, reading: Reading) -> tuple[Path, str]:
    """Return the folder of a data set, and the name of the csv in it which describes it."""
    if path.suffix.lower() == ".csv" and path.is_file():
        if not path.name.startswith("manifest") and not reading.path_column:
            raise InputError(
                f"{path}: say which column holds the paths: prepare_data.py "
                f"--path-column NAME (of {name_examples(read_header(path))})"
            )
        return path.parent, path.name
    if not path.is_dir():
        raise InputError(f"{path}: is not a folder that exists; expected {expected_data()}")
    return path, "manifest.csv"


def _read_layout(found: Found, name: str) -> tuple[Found, Layout, list[Record]]:
    """Read a folder as the layout `name`, or for auto as the first that fits it.

    The listing that is returned has the notes of that layout.
    """
    if name == "auto":
        found, layout, records = _first_that_fits(found)
    else:
        layout = LAYOUTS[name]
        records = layout.read(found)

    # An option that changes nothing is a mistake of which the user should know.
    reading = found.reading
    if reading.path_column and layout.name != "csv":
        raise _no_use(found, layout, reading.path_column)
    if reading.grades and layout.name not in ("class_folders", "csv"):
        raise _no_use(found, layout, reading.grades)

    if not records:
        names = sorted(os.listdir(found.root))
        there = name_examples(names) or "nothing"
        # Any photograph would do for this layout, so it is not named as the one that was missed.
        if layout.name != "photographs":
            there = f"{there}, and no photographs of {layout.name}"
        raise InputError(f"{found.root}: found {there}; {expected_form(names)}")
    return found, layout, records


def _first_that_fits(found: Found) -> tuple[Found, Layout, list[Record]]:
    """Read a folder as the first layout whose adapter takes it; the last one takes any."""
    for layout in LAYOUTS.values():
        if layout.automatic:
            # What an adapter notes of a folder that it then leaves to the next one is void.
            own = replace(found, notes=list(found.notes), lists=dict(found.lists))
            records = layout.read(own)
            if records is not None:
                return own, layout, records
    raise AssertionError("a folder of photographs fits always")


def _no_use(found: Found, layout: Layout, value: object) -> InputError:
    """Return the error for an option that the layout does not use."""
    return InputError(f"{found.root}: is read as {layout.name}, which has no use for {value!r}")


def _compare_with_published(found: Found, layout: Layout, records: Sequence[Record]) -> None:
    """Note what was found of each split beside what the data set's authors publish.

    A difference is no error, since people take parts of data sets.
    """
    for split, published in layout.published.items():
        grades = Counter()
        for record in records:
            if split in (record.split, "all"):
                grades[record.grade] += 1
        counts = tuple(grades[grade] for grade in range(GRADES))
        comparison = ", as published"
        if counts != published:
            comparison = f"; published {sum(published)} {published}"
        found.notes.append(
            f"{split}: {grades.total()} photographs of grades 0-4 {counts}{comparison}"
        )


def _note_lone_photographs(found: Found, records: Sequence[Record]) -> None:
    """Note the photographs whose names tell no patient, where names could tell."""
    # A table, like that of Messidor-2, may have paired photographs whose names tell nothing.
    uses = Counter(record.patient for record in records)
    lone = []
    for record in records:
        if not record.eye and uses[record.patient] == 1:
            lone.append(record.path)
    if lone:
        found.notes.append(
            f"{len(lone)} photographs whose names tell no patient count as one patient each: "
            f"{name_examples(lone)}"
        )
