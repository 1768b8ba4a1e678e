"""Splits to trust: by patient, copies of a photograph kept together, all that is doubtful listed.

Copies are told by what the retina shows, not by bytes: mirrors compress, resize and brighten files.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from fundus.manifest import Manifest, Record, check_leaks
from utils import InputError

# ----------------------------------------------------------------------------------------- copies


# ----------------------------------------------------------------------------------------- splits
def complete_splits(manifest: Manifest, linked: Iterable[tuple[str, str]] = ()) -> Manifest:
    """Return the manifest with a test and a val split; notes tell those that had to be made."""
    before = Counter(record.split for record in manifest.records)
    records = tuple(split_patients(manifest.records, linked=linked))
    after = Counter(record.split for record in records)
    origin, notes = "val" if before["val"] else "20 % of the patients", list(manifest.notes)
    for split, how in (("test", origin), ("val", "10 % of train's patients")):
        if after[split] != before[split]:
            notes.append(f"{split} is made from {how}: {after[split]} photographs")
    return replace(manifest, records=records, notes=tuple(notes))


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


# ----------------------------------------------------------------------------- counts and doubts
