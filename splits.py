"""Splits to trust: by patient, copies of a photograph kept together, all that is doubtful listed.

Copies are told by what the retina shows, not by bytes: mirrors compress, resize and brighten files.
"""

import base64
import functools
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from manifest import Manifest, Record, check_leaks, some
from photographs import PhotographError, pad_square
from utils import InputError, log, sha256_of

CLOSE, ALIKE = 0.88, 0.84  # cosines of coarse and full signatures from which pictures are copies
SHOWN = 20  # lines of a list that the log shows
Pair = tuple[str, str, float]  # two photographs and how alike they are; 1: the same file


# ----------------------------------------------------------------------------------------- copies
def signature(picture: np.ndarray) -> np.ndarray:
    """Return what tells one retina from another in a picture: int8 (64, 64), 0 outside the fundus.

    Vessels and lesions against their local mean, without rim and surround, in which photographs of
    one camera are alike. Two are compared by their cosine, as `alike` does.
    """
    small = Image.fromarray(pad_square(picture)).resize((64, 64), Image.Resampling.BOX)
    grey = small.convert("L")
    light, mean = (
        np.asarray(i, np.float32) for i in (grey, grey.filter(ImageFilter.GaussianBlur(4)))
    )
    level = max(12, 0.25 * np.percentile(light, 60))
    inside = Image.fromarray(np.asarray(small).max(axis=2) > level).convert("L")
    away = (np.arange(64) - 31.5) ** 2
    away = away + away[:, None] < 830  # squared pixels from the middle: a disc of radius 29
    within = (np.asarray(inside.filter(ImageFilter.BoxBlur(4))) == 255) & away  # shrunk by 4
    detail = np.clip(light - mean, -12, 12) * within
    detail -= detail.sum() / max(1, within.sum()) * within
    return np.round(10 * detail).clip(-127, 127).astype(np.int8)


def coarse(look: np.ndarray) -> np.ndarray:
    """Return a signature at a quarter of its resolution, int8 (16, 16), to search by."""
    return look.reshape(16, 4, 16, 4).mean(axis=(1, 3)).round().astype(np.int8)


def alike(one: np.ndarray, other: np.ndarray) -> float:
    """Return the cosine of two signatures, -1 to 1; 0 where one of them shows no structure.

    Copies that were compressed, resized or brightened are above 0.84, other eyes below it.
    """
    a, b = (s.astype(np.float32).ravel() for s in (one, other))
    weak = min(np.abs(a).mean(), np.abs(b).mean()) < 2
    return 0.0 if weak else float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def find_alike(
    small: np.ndarray, full: Callable[[int], np.ndarray]
) -> Iterator[tuple[int, int, float]]:
    """Give the pairs (i, j, cosine), i < j, of pictures that are copies of each other.

    Candidates have alike coarse signatures, `small` (N, 256) int8; their full ones, `full(i)`,
    decide, since photographs of a fundus look alike from afar.
    """
    unit = small.astype(np.float32)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-6)
    rows, columns = 512, 2048  # a block that stays in the processor's cache
    block = np.empty((rows, columns), np.float32)
    for top in range(0, len(unit), rows):
        for left in range(top, len(unit), columns):
            a, b = unit[top : top + rows], unit[left : left + columns]
            cosines = np.matmul(a, b.T, out=block[: len(a), : len(b)])
            close = np.argwhere(cosines > CLOSE) if cosines.max() > CLOSE else ()
            for i, j in ((top + int(i), left + int(j)) for i, j in close):
                how = alike(full(i), full(j)) if i < j else 0.0
                if how > ALIKE:
                    yield i, j, how


def find_copies(
    facts: Mapping[str, dict[str, Any]], picture_of: Callable[[str], np.ndarray]
) -> list[Pair]:
    """Return the pairs of prepared photographs that show one picture.

    `facts` gives each photograph's coarse signature (base64) and its picture's sha256, by path;
    `picture_of` the picture, uint8 RGB, of the few whose signatures are close.
    """
    paths = [path for path, fact in facts.items() if "error" not in fact]
    looks = b"".join(base64.b64decode(facts[path]["signature"]) for path in paths)
    small = np.frombuffer(looks, np.int8).reshape(len(paths), -1)

    @functools.lru_cache(4096)
    def full(index: int) -> np.ndarray:
        try:
            return signature(picture_of(paths[index]))
        except PhotographError as error:
            raise InputError(f"{paths[index]}: {error}; repeat the command") from None

    found = {(paths[i], paths[j]): how for i, j, how in find_alike(small, full)}
    first: dict[str, str] = {}
    same = [(first.setdefault(facts[path]["sha256"], path), path) for path in paths]
    found |= {pair: 1.0 for pair in same if pair[0] != pair[1]}
    return [(*pair, how) for pair, how in sorted(found.items())]


def same_files(manifest: Manifest) -> list[tuple[str, str]]:
    """Return pairs of photographs that are one file, where no patients are known to tell copies.

    Only files of one size are read. Copies that were compressed or resized take prepare_data.py.
    """
    if manifest.prepared or len({r.patient for r in manifest.records}) < len(manifest.records):
        return []
    by_size: dict[int, list[str]] = defaultdict(list)
    for record in manifest.records:
        by_size[os.path.getsize(manifest.root / record.path)].append(record.path)
    paths = [path for same in by_size.values() if len(same) > 1 for path in same]
    digests = {path: sha256_of(manifest.root / path) for path in paths}
    first: dict[str, str] = {}
    pairs = [(first.setdefault(digest, path), path) for path, digest in digests.items()]
    pairs = [pair for pair in pairs if pair[0] != pair[1]]
    if pairs:
        told = f"{len(pairs)} photographs are copies: {some([' = '.join(p) for p in pairs])}"
        log.warning("data: %s; prepare_data.py finds changed copies too", told)
    return pairs


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
def count_splits(records: Sequence[Record]) -> dict[str, Any]:
    """Count each split's photographs, patients and grades, beside its majority line; say it."""
    splits = {}
    train = Counter(r.grade for r in records if r.split == "train" and r.grade is not None)
    for split in ("train", "val", "test"):
        rows = [record for record in records if record.split == split]
        grades = Counter(record.grade for record in rows)
        line = {"images": len(rows), "patients": len({record.patient for record in rows})}
        line |= {"by_grade": [grades[g] for g in range(5)], "without_grade": grades.pop(None, 0)}
        if train and grades:
            line["majority"] = round(grades[max(train, key=train.get)] / grades.total(), 4)
        splits[split] = line
        log.info("%s: %s", split, ", ".join(f"{name} {value}" for name, value in line.items()))
    return splits


def list_doubts(
    manifest: Manifest, facts: Mapping[str, dict[str, Any]], copies: Sequence[Pair]
) -> dict[str, list[dict[str, Any]]]:
    """Return lists of all that a person should look at, by name, and say how much there is of each.

    `manifest` is that of the prepared folder, `facts` are known by its records' sources. An entry
    holds `pictures`, paths in the folder, and `text`. `manifest.lists` are taken over.
    """
    by_source = {record.source: record for record in manifest.records}
    facts_of = {record.path: facts[record.source] for record in manifest.records}
    tests = {
        "doubtful_crops": lambda fact: fact["doubtful"],
        "near_black": lambda fact: fact["brightest"] <= 22,
        "blank": lambda fact: fact["contrast"] < 2,
        "truncated": lambda fact: fact["truncated"],
    }
    lists: dict[str, list[dict[str, Any]]] = {
        name: [_entry(path, path) for path, fact in facts_of.items() if is_so(fact)]
        for name, is_so in tests.items()
    }
    kinds = {
        "copies_of_other_patients": "patient",
        "copies_in_other_splits": "split",
        "copies_with_other_grades": "grade",
    }
    lists |= {name: [] for name in ("copies", *kinds)}
    if len({record.patient for record in manifest.records}) == len(manifest.records):
        kinds.pop("copies_of_other_patients")  # whose they are is not known
    for one, other, how in ((by_source[a], by_source[b], how) for a, b, how in copies):
        text = f"{one.path} = {other.path} ({how:.2f})"
        lists["copies"].append(_entry(text, one.path, other.path))
        for name, kind in kinds.items():
            values = getattr(one, kind), getattr(other, kind)
            if values[0] != values[1]:
                said = f"{text}: {values[0]}, {values[1]}"
                lists[name].append(_entry(said, one.path, other.path))
    bad = {path: fact["error"] for path, fact in facts.items() if "error" in fact}
    lists["unreadable"] = [_entry(f"{path} {error}") for path, error in bad.items()]
    for name, entries in lists.items():
        if entries:
            lines = [entry["text"] for entry in entries[:SHOWN]] + ["..."] * (len(entries) > SHOWN)
            log.info("\n  ".join([f"{name.replace('_', ' ')}: {len(entries)}", *lines]))
    for name, texts in manifest.lists.items():  # said already
        shown = [by_source[text].path if text in by_source else "" for text in texts]
        lists[name] = [_entry(t, *filter(None, [p])) for t, p in zip(texts, shown, strict=True)]
    return lists


def _entry(text: str, *pictures: str) -> dict[str, Any]:
    return {"text": text, "pictures": list(pictures)}
