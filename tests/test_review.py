"""review.py: counts, and what is in doubt in a data set. Run: pytest tests/test_review.py"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fundus.manifest import Manifest, Record
from fundus.review import brightest, contrast, count_splits, list_doubts

# --------------------------------------------------------------------------------- how bright it is


def test_brightest_is_what_99_percent_of_the_pixels_do_not_exceed():
    picture = np.full((20, 20, 3), 20, np.uint8)
    picture[0, :4] = 250  # 1 % of the pixels
    assert brightest(picture) == 20
    picture[0, :5] = 250
    assert brightest(picture) == 250
    picture[:] = (30, 0, 0)
    assert brightest(picture) == 10  # the mean of the channels


def test_contrast_is_of_the_middle_alone():
    picture = np.zeros((40, 80, 3), np.uint8)
    picture[:10] = 255
    assert contrast(picture) == 0
    picture[10:30, 20:40] = 60  # half of the middle
    assert contrast(picture) == 30
    picture[10:30, 20:40] = (60, 0, 0)
    assert contrast(picture) == 10


# -------------------------------------------------------------------------------- counts and doubts


def test_splits_are_counted_beside_the_majority_line():
    """Grade 2 is train's most frequent; one of three graded test photographs has it."""
    rows = [("a", 2, "train"), ("a", 2, "train"), ("b", 0, "train"), ("c", None, "train")]
    rows += [("d", 2, "test"), ("d", 4, "test"), ("e", 0, "test"), ("f", None, "val")]
    records = []
    for number, (patient, grade, split) in enumerate(rows):
        records.append(Record(f"{number}.jpg", grade, patient, "", split))
    counts = count_splits(records)
    assert counts["train"] == {
        "images": 4,
        "patients": 3,
        "by_grade": [1, 0, 2, 0, 0],
        "without_grade": 1,
        "majority": pytest.approx(0.6667),
    }
    assert counts["test"]["by_grade"] == [1, 0, 1, 0, 1]
    assert counts["test"]["majority"] == pytest.approx(0.3333)
    assert counts["val"] == {
        "images": 1,
        "patients": 1,
        "by_grade": [0, 0, 0, 0, 0],
        "without_grade": 1,
    }
    ungraded = count_splits([replace(record, grade=None) for record in records])
    assert all("majority" not in line for line in ungraded.values())


def doubtful_data():
    """Return six pictures of three patients, their facts, and three pairs of copies."""
    records = []
    for number, name in enumerate("abcdef"):
        split = "train" if number < 4 else "test"
        patient = f"p{number // 2}"
        records.append(Record(f"images/{name}.jpg", number % 2, patient, "left", split, name))
    facts = {"bad": {"error": "is empty"}}
    for name in "abcdef":
        facts[name] = {
            "doubtful": name == "a",
            "truncated": name == "c",
            "brightest": 22 if name == "b" else 23,
            "contrast": 1.9 if name == "b" else 2.0,
        }
    copies = [("a", "c", 0.9), ("c", "d", 1.0), ("d", "f", 1.0)]
    lists = {"known": ["b"], "rows": ["lost"]}
    return Manifest(Path(), tuple(records), True, "x", lists=lists), facts, copies


def test_doubts_by_hand(caplog):
    manifest, facts, copies = doubtful_data()
    with caplog.at_level("INFO", logger="ssrl"):
        lists = list_doubts(manifest, facts, copies)
    texts = {}
    for name, entries in lists.items():
        texts[name] = [entry["text"].replace("images/", "") for entry in entries]
    assert texts == {
        "doubtful_crops": ["a.jpg"],
        "near_black": ["b.jpg"],
        "blank": ["b.jpg"],
        "truncated": ["c.jpg"],
        "copies": ["a.jpg = c.jpg (0.90)", "c.jpg = d.jpg (1.00)", "d.jpg = f.jpg (1.00)"],
        "copies_of_other_patients": [
            "a.jpg = c.jpg (0.90): p0, p1",
            "d.jpg = f.jpg (1.00): p1, p2",
        ],
        "copies_in_other_splits": ["d.jpg = f.jpg (1.00): train, test"],
        "copies_with_other_grades": ["c.jpg = d.jpg (1.00): 0, 1"],
        "unreadable": ["bad is empty"],
        "known": ["b"],
        "rows": ["lost"],
    }
    assert lists["copies"][0]["pictures"] == ["images/a.jpg", "images/c.jpg"]
    assert lists["near_black"][0]["pictures"] == ["images/b.jpg"]
    assert lists["known"][0]["pictures"] == ["images/b.jpg"]
    assert not lists["rows"][0]["pictures"]
    assert not lists["unreadable"][0]["pictures"]
    assert "near black: 1\n  images/b.jpg" in caplog.text
    assert "unreadable: 1" in caplog.text


def test_copies_are_of_other_patients_only_where_patients_are_known():
    manifest, facts, copies = doubtful_data()
    alone = tuple(replace(record, patient=record.source) for record in manifest.records)
    lists = list_doubts(replace(manifest, records=alone), facts, copies)
    assert not lists["copies_of_other_patients"]
    assert len(lists["copies"]) == 3


def test_the_log_shows_the_first_20_lines_of_a_list(caplog):
    facts = {f"{number}.jpg": {"error": "is empty"} for number in range(25)}
    with caplog.at_level("INFO", logger="ssrl"):
        lists = list_doubts(Manifest(Path(), (), True, "x"), facts, [])
    assert len(lists["unreadable"]) == 25
    assert "unreadable: 25" in caplog.text
    assert "19.jpg is empty\n  ..." in caplog.text
    assert "20.jpg" not in caplog.text
