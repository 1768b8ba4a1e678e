"""How each data set lies on disk: its photographs, grades, patients and splits.

`open_data` recognises a folder and gives a Manifest, the one internal form. A new data set is one
function and one entry in adapters.LAYOUTS.
"""

import os
from collections import Counter
from pathlib import Path

from fundus.adapters import EXPECTED, LAYOUTS, NO_PATIENTS, PUBLISHED, csv_records, expected_form
from fundus.listing import Found, Reading, scan_folder
from fundus.manifest import Manifest, Record, check_leaks, read_header, read_manifest, some
from fundus.splits import complete_splits
from utils import InputError


def open_data(path, layout: str = "auto", reading=None, linked=None) -> Manifest:
    """Recognise a data set (EXPECTED, else InputError), read it, and complete its splits.

    `path` is a folder, or a csv in it; `linked` gives pairs of photographs not to be parted.
    """
    manifest = read_data(path, layout, reading or Reading())
    return complete_splits(manifest, linked(manifest) if linked else ())


def read_data(path, layout: str, reading: Reading) -> Manifest:
    """Read a data set with the splits that it has been published with, train where it has none."""
    root, name = Path(path).expanduser(), "manifest.csv"
    if root.suffix.lower() == ".csv" and root.is_file():
        root, name = root.parent, root.name
        if not (name.startswith("manifest") or reading.path_column):
            raise InputError(
                f"{path}: say which column holds the paths: prepare_data.py "
                f"--path-column NAME (of {some(read_header(root / name))})"
            )
    if not root.is_dir():
        raise InputError(f"{root}: is not a folder that exists; expected {EXPECTED}")
    layout = "csv" if layout == "auto" and reading.path_column else layout
    if layout == "auto" and (root / name).is_file() and name.startswith("manifest"):
        return read_manifest(root, name)
    if (root / "prepare.jsonl").is_file():
        raise InputError(f"{root}: its preparation is unfinished; repeat that prepare_data.py")
    found = scan_folder(root, reading)
    layout, records = _choose(found, layout, name)
    _compare(found, layout, records)
    if not (NO_PATIENTS in "".join(found.notes) or reading.patient_column):
        lone = [record.path for record in records if not record.eye]
        what = f"{len(lone)} photographs whose names tell no patient count as one patient each"
        found.notes += [f"{what}: {some(lone)}"] if lone else []
    check_leaks(records, root)
    return Manifest(root, tuple(records), False, layout, tuple(found.notes), found.lists)


def _choose(found: Found, layout: str, name: str) -> tuple[str, list[Record]]:
    """Read a folder as `layout`, or as the first that fits it; `name` is the csv's."""
    root, reading = found.root, found.reading
    if layout == "csv":
        records = csv_records(found, name)
    elif layout == "auto":
        read = ((key, adapter(found)) for key, adapter in LAYOUTS.items())
        layout, records = next(pair for pair in read if pair[1] is not None)
    else:
        records = LAYOUTS[layout](found) or []
    for given, used in ((reading.path_column, "csv"), (reading.grades, "class_folders")):
        if given and layout != used:
            raise InputError(f"{root}: is read as {layout}, which has no use for {given!r}")
    if not records:
        names = sorted(os.listdir(root))
        what = "" if layout == "photographs" else f", and no photographs of {layout}"
        raise InputError(f"{root}: found {some(names) or 'nothing'}{what}; {expected_form(names)}")
    return layout, records


def _compare(found: Found, layout: str, records: list[Record]) -> None:
    """Note what was found of each split beside what the data set publishes."""
    for split, expected in PUBLISHED.get(layout, {}).items():
        rows = [r for r in records if split in (r.split, "all")]
        counts = tuple(Counter(r.grade for r in rows)[grade] for grade in range(5))
        note = f"{split}: {len(rows)} photographs of grades 0-4 {counts}"
        more = f"; published {sum(expected)} {expected}" if counts != expected else ", as published"
        found.notes.append(note + more)


# ---------------------------------------------------------------------------------------- adapters


# ----------------------------------------------------------------------------------------- folders
