"""What a person should look at in a data set: what is doubtful, and counts of each grade."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fundus.copies import Pair
from fundus.manifest import GRADES, SPLITS, Manifest, Record
from utils import log

SHOWN = 20  # lines of a list that the log shows

# In grey levels of 255. In a near-black picture 99 % of the pixels are at or below the first; in a
# blank one the standard deviation of the middle is below the second.
NEAR_BLACK = 22
BLANK = 2

Facts = dict[str, Any]  # what prepare_data.py found out about one photograph
Entry = dict[str, Any]  # of a list of doubts: `text`, and `pictures`, paths in the prepared folder


# --------------------------------------------------------------------------------- how bright it is


def brightest(picture: np.ndarray) -> int:
    """Return the grey level (0 to 255) that 99 % of a picture's pixels do not exceed."""
    sums = _channel_sums(picture)
    pixels_up_to = np.cumsum(np.bincount(sums.ravel()))
    return int(np.searchsorted(pixels_up_to, 0.99 * sums.size)) // 3


def contrast(picture: np.ndarray) -> float:
    """Return the standard deviation of grey in a picture's middle half, away from the rim."""
    sums = _channel_sums(picture)
    height = sums.shape[0] // 4
    width = sums.shape[1] // 4
    middle = sums[height:-height, width:-width]
    return round(float(middle.std() / 3), 1)


def _channel_sums(picture: np.ndarray) -> np.ndarray:
    """Return red + green + blue, three times the grey level, of uint8 (H, W, 3): uint16 (H, W)."""
    # Channel by channel, since numpy is ten times as slow at summing over an axis of three.
    sums = picture[..., 0].astype(np.uint16)
    sums += picture[..., 1]
    sums += picture[..., 2]
    return sums


# -------------------------------------------------------------------------------- counts and doubts


def build_report(
    manifest: Manifest, facts: Mapping[str, Facts], copies: Sequence[Pair], size: int
) -> dict[str, Any]:
    """Return what data_report.json holds about a prepared folder, and log it.

    `manifest` is that of the prepared folder, `facts` are known by its records' sources.
    """
    return {
        "layout": manifest.layout,
        "size": size,
        "notes": manifest.notes,
        "splits": count_splits(manifest.records),
        "doubts": list_doubts(manifest, facts, copies),
    }


def count_splits(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """Return each split's photographs, patients and grades, beside its majority line, and log it.

    The majority line is the accuracy of always answering train's most frequent grade.
    """
    train_grades: Counter[int] = Counter()
    for record in records:
        if record.split == "train" and record.grade is not None:
            train_grades[record.grade] += 1

    splits = {}
    for split in SPLITS:
        rows = [record for record in records if record.split == split]
        by_grade = [0] * GRADES
        without_grade = 0
        for record in rows:
            if record.grade is None:
                without_grade += 1
            else:
                by_grade[record.grade] += 1

        counts: dict[str, Any] = {
            "images": len(rows),
            "patients": len({record.patient for record in rows}),
            "by_grade": by_grade,
            "without_grade": without_grade,
        }
        # A split without grades, or a train without them, has no majority line.
        if train_grades and sum(by_grade) > 0:
            most_frequent = max(train_grades, key=train_grades.get)
            counts["majority"] = round(by_grade[most_frequent] / sum(by_grade), 4)
        splits[split] = counts
        log.info("%s: %s", split, ", ".join(f"{name} {value}" for name, value in counts.items()))
    return splits


def list_doubts(
    manifest: Manifest, facts: Mapping[str, Facts], copies: Sequence[Pair]
) -> dict[str, list[Entry]]:
    """Return lists of all that a person should look at, by name, and log how much there is of each.

    The arguments are those of `build_report`. What notes count (`manifest.lists`) is taken over.
    """
    # Facts and copies go by the photograph, lists name its picture.
    by_source = {record.source: record for record in manifest.records}
    lists = _doubtful_pictures(manifest, facts)
    lists |= _doubtful_copies(by_source, copies)
    lists["unreadable"] = []
    for path, fact in facts.items():
        if "error" in fact:
            lists["unreadable"].append(_entry(f"{path} {fact['error']}"))
    for name, entries in lists.items():
        _log_list(name, entries)

    # What the notes count has been logged with them, before the work began.
    for name, texts in manifest.lists.items():
        lists[name] = []
        for text in texts:
            entry = _entry(text)
            if text in by_source:
                entry["pictures"].append(by_source[text].path)
            lists[name].append(entry)
    return lists


def _doubtful_pictures(manifest: Manifest, facts: Mapping[str, Facts]) -> dict[str, list[Entry]]:
    """Return the pictures that may show no gradable fundus, by what is odd about them."""
    lists = {"doubtful_crops": [], "near_black": [], "blank": [], "truncated": []}
    for record in manifest.records:
        fact = facts[record.source]
        entry = _entry(record.path, record.path)
        if fact["doubtful"]:
            lists["doubtful_crops"].append(entry)
        if fact["brightest"] <= NEAR_BLACK:
            lists["near_black"].append(entry)
        if fact["contrast"] < BLANK:
            lists["blank"].append(entry)
        if fact["truncated"]:
            lists["truncated"].append(entry)
    return lists


def _doubtful_copies(
    by_source: Mapping[str, Record], copies: Sequence[Pair]
) -> dict[str, list[Entry]]:
    """Return the pairs of copies, and again those that differ in patient, split or grade."""
    lists = {
        "copies": [],
        "copies_of_other_patients": [],
        "copies_in_other_splits": [],
        "copies_with_other_grades": [],
    }
    # Where each photograph is its own patient, it is not known whose they are.
    patients = {record.patient for record in by_source.values()}
    knows_patients = len(patients) < len(by_source)

    for source, other_source, cosine in copies:
        one = by_source[source]
        other = by_source[other_source]
        text = f"{one.path} = {other.path} ({cosine:.2f})"
        lists["copies"].append(_entry(text, one.path, other.path))

        if knows_patients and one.patient != other.patient:
            entry = _entry(f"{text}: {one.patient}, {other.patient}", one.path, other.path)
            lists["copies_of_other_patients"].append(entry)
        if one.split != other.split:
            entry = _entry(f"{text}: {one.split}, {other.split}", one.path, other.path)
            lists["copies_in_other_splits"].append(entry)
        if one.grade != other.grade:
            entry = _entry(f"{text}: {one.grade}, {other.grade}", one.path, other.path)
            lists["copies_with_other_grades"].append(entry)
    return lists


def _log_list(name: str, entries: Sequence[Entry]) -> None:
    """Log how long a list is, and its first lines; nothing for an empty one."""
    if not entries:
        return
    lines = [f"{name.replace('_', ' ')}: {len(entries)}"]
    for entry in entries[:SHOWN]:
        lines.append(entry["text"])
    if len(entries) > SHOWN:
        lines.append("...")
    log.info("\n  ".join(lines))


def _entry(text: str, *pictures: str) -> Entry:
    """Return one entry of a list of doubts."""
    return {"text": text, "pictures": list(pictures)}
