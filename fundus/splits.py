"""Splits by patient: completed where a data set has none, and folds for cross-validation.

A patient's photographs are alike, so a patient in two splits makes every number too good. Copies of
a photograph under other patients' names are kept together as well.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from fundus.manifest import GRADES, Manifest, Record, check_leaks
from utils import InputError

# Of all patients, where a data set has neither test nor val; of train's, where it has no val.
TEST_SHARE = 0.2
VAL_SHARE = 0.1

# Takes the place of a grade, below all of them.
NOT_GRADED = -1


def complete_splits(manifest: Manifest, linked: Iterable[tuple[str, str]] = ()) -> Manifest:
    """Return the manifest with a test and a val split; its notes tell those that had to be made.

    `linked` are pairs of paths which show one picture, as in `split_patients`.
    """
    records = tuple(split_patients(manifest.records, linked=linked))
    origins = {"test": "20 % of the patients", "val": "10 % of train's patients"}
    if _paths_in(manifest.records, "val"):
        origins["test"] = "val"
    notes = list(manifest.notes)
    for split, origin in origins.items():
        paths = _paths_in(records, split)
        if paths != _paths_in(manifest.records, split):
            notes.append(f"{split} is made from {origin}: {len(paths)} photographs")
    return replace(manifest, records=records, notes=tuple(notes))


def split_patients(
    records: Sequence[Record], *, seed: int = 0, linked: Iterable[tuple[str, str]] = ()
) -> list[Record]:
    """Return the records with complete splits, always by patient, in strata of the worse eye.

    Without test, val becomes test, or else 20 % of the patients do. Without val, 10 % of train's
    patients become val. `linked` are pairs of paths which show one picture: their patients stay
    together. Raises InputError if a patient is in two splits already.
    """
    check_leaks(records, "splits")
    present = {record.split for record in records}
    groups = _group_patients(records, linked)
    if "test" not in present and "val" in present:
        records = _rename_split(records, "val", "test")
    elif "test" not in present:
        records = _cut(records, groups, "test", TEST_SHARE, seed)

    # A val that has just become test is missing as well.
    if "val" not in present or "test" not in present:
        records = _cut(records, groups, "val", VAL_SHARE, seed)
    return list(records)


def fold_splits(
    records: Sequence[Record], folds: int, *, linked: Iterable[tuple[str, str]] = ()
) -> list[list[Record]]:
    """Return the records once for each fold, which is their test; of the others 10 % become val.

    Every patient is in the test of one fold. Strata and `linked` are those of `split_patients`.
    Raises InputError for fewer than 2 folds, and for fewer patients (linked ones count as one) than
    folds.
    """
    records = [replace(record, split="train") for record in records]
    groups = _group_patients(records, linked)
    fold_of = _deal(records, groups, folds)
    made = []
    for fold in range(folds):
        tested = {group for group, own in fold_of.items() if own == fold}
        split = _move(records, groups, tested, "test")
        made.append(_cut(split, groups, "val", VAL_SHARE, seed=0))
    return made


def fold_of_each(records: Sequence[Record], folds: int) -> list[int]:
    """Return the fold of each record, 0 to `folds` - 1, by patient, in strata of the worse eye.

    There are fewer folds where there are fewer patients; InputError for a single one.
    """
    records = [replace(record, split="train") for record in records]
    groups = _group_patients(records, ())
    fold_of = _deal(records, groups, min(folds, len(groups)))
    return [fold_of[groups[record.patient]] for record in records]


def take_fraction(records: Sequence[Record], fraction: float, seed: int) -> list[Record]:
    """Return the records of a share of the patients, above 0 to 1, of each stratum the same.

    At least as many patients stay as there are grades: fewer teach nothing.
    """
    if fraction == 1:
        return list(records)
    records_of_all = [replace(record, split="train") for record in records]
    groups = _group_patients(records, ())
    share = max(fraction, min(1, GRADES / len(groups)))
    taken = _cut(records_of_all, groups, "val", share, seed)
    chosen = {record.path for record in taken if record.split == "val"}
    return [record for record in records if record.path in chosen]


def _deal(records: Sequence[Record], groups: Mapping[str, str], folds: int) -> dict[str, int]:
    """Return the fold of each group; raises InputError for fewer than 2 folds or groups."""
    order = []
    for stratum in _strata(records, groups, seed=0):
        order += stratum
    if not 2 <= folds <= len(order):
        raise InputError(f"--folds {folds}: expected 2 to {len(order)}, the number of patients")
    # Dealt out like cards, stratum after stratum, each fold has the same share of each.
    return {group: place % folds for place, group in enumerate(order)}


def _paths_in(records: Iterable[Record], split: str) -> set[str]:
    """Return the paths of a split's photographs."""
    return {record.path for record in records if record.split == split}


def _group_patients(records: Sequence[Record], linked: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the group of each patient: those whom pairs of paths link, named after the first."""
    # A forest: each patient points at one of its group that is earlier in the alphabet, the first
    # at itself.
    parent: dict[str, str] = {}
    patient_of: dict[str, str] = {}
    for record in records:
        parent[record.patient] = record.patient
        patient_of[record.path] = record.patient

    def first_of_group(patient: str) -> str:
        while parent[patient] != patient:
            patient = parent[patient]
        return patient

    for one, other in linked:
        tops = (first_of_group(patient_of[one]), first_of_group(patient_of[other]))
        parent[max(tops)] = min(tops)
    return {patient: first_of_group(patient) for patient in parent}


def _strata(records: Iterable[Record], groups: Mapping[str, str], seed: int) -> list[list[str]]:
    """Return train's groups in strata of the worst grade, each in a random order of `seed`."""
    worst: dict[str, int] = {}
    for record in records:
        if record.split == "train":
            grade = NOT_GRADED if record.grade is None else record.grade
            group = groups[record.patient]
            worst[group] = max(grade, worst.get(group, NOT_GRADED))

    # By hash, not by random numbers: any version of anything takes the same patients.
    def place(group: str) -> bytes:
        return hashlib.sha256(f"{seed} {group}".encode()).digest()

    strata = defaultdict(list)
    for group in sorted(worst, key=place):
        strata[worst[group]].append(group)
    return [strata[grade] for grade in sorted(strata)]


def _cut(
    records: Sequence[Record], groups: Mapping[str, str], split: str, share: float, seed: int
) -> list[Record]:
    """Return the records with `share` of train's groups, and of each stratum, moved to `split`."""
    # All strata evenly interleaved: any beginning of this order has the same share of each.
    places = []
    for stratum in _strata(records, groups, seed):
        for number, group in enumerate(stratum):
            places.append(((number + 0.5) / len(stratum), group))

    # One group at least, unless it is the only one: train must not be empty.
    count = 0
    if len(places) > 1:
        count = max(1, round(share * len(places)))
    moved = set()
    for _, group in sorted(places)[:count]:
        moved.add(group)
    return _move(records, groups, moved, split)


def _move(
    records: Iterable[Record], groups: Mapping[str, str], moved: set[str], split: str
) -> list[Record]:
    """Return the records with those of train that belong to the groups `moved` in `split`."""
    result = []
    for record in records:
        if record.split == "train" and groups[record.patient] in moved:
            record = replace(record, split=split)
        result.append(record)
    return result


def _rename_split(records: Iterable[Record], old: str, new: str) -> list[Record]:
    """Return the records with a split under another name."""
    result = []
    for record in records:
        if record.split == old:
            record = replace(record, split=new)
        result.append(record)
    return result
