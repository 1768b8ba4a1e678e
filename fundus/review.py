"""What a person should look at in a data set: counts beside the majority line, all in doubt."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fundus.copies import Pair
from fundus.manifest import Manifest, Record
from utils import log

SHOWN = 20  # lines of a list that the log shows


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
