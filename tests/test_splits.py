"""splits.py: patients, folds, copies and what is in doubt. Run: pytest tests/test_splits.py"""

import io
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_disjoint, splits_of
from PIL import Image

from fundus.copies import alike, coarse, find_alike, signature
from fundus.manifest import Manifest, Record
from fundus.photographs import crop_square, find_fundus
from fundus.review import list_doubts
from fundus.splits import fold_splits, split_patients
from fundus.synthetic import DrawnEye, draw_photograph
from utils import InputError

# ------------------------------------------------------------------------------------------ splits


def patients_with(grades, split="train"):
    """Two eyes for each patient; the worse one has the grade given."""
    records = []
    for patient, grade in enumerate(grades):
        better = grade if grade is None else patient % (grade + 1)
        for eye, value in (("left", better), ("right", grade)):
            records.append(Record(f"{patient}_{eye}.jpg", value, f"{split}{patient}", eye, split))
    return records


GRADES = [0] * 700 + [1] * 71 + [2] * 143 + [3] * 21 + [4] * 30 + [None] * 40


def test_split_patients_is_disjoint_and_stratified_by_the_worse_eye():
    records = split_patients(patients_with(GRADES))
    assert [record.path for record in records] == [r.path for r in patients_with(GRADES)]
    assert_disjoint(records)
    worse = defaultdict(list)
    for record in records[1::2]:  # the right eyes
        worse[record.grade].append(record.split)
    for grade, splits in worse.items():
        counts, total = Counter(splits), GRADES.count(grade)
        assert abs(counts["test"] - 0.2 * total) <= 1
        assert abs(counts["val"] - 0.08 * total) <= 1
    patients = {name: len(p) for name, p in splits_of(records).items()}
    assert patients == {"test": 201, "val": 80, "train": 724}


def test_split_patients_depends_on_the_patients_alone():
    records = patients_with(GRADES)
    one = {r.path: r.split for r in split_patients(records)}
    assert {r.path: r.split for r in split_patients(records[::-1])} == one
    assert {r.path: r.split for r in split_patients(records, seed=1)} != one
    fewer = {r.path: r.split for r in split_patients(records[:-2])}
    assert sum(one[path] != split for path, split in fewer.items()) < 0.1 * len(fewer)


def test_split_patients_keeps_what_is_given():
    given = patients_with(GRADES[:100]) + patients_with([1] * 30, "test")
    records = split_patients(given)
    assert splits_of(records)["test"] == {f"test{i}" for i in range(30)}
    assert len(splits_of(records)["val"]) == 10
    complete = split_patients(records)
    assert complete == records  # nothing is left to do
    only_test = patients_with([0, 1, 2], "test")
    assert split_patients(only_test) == only_test


def test_split_patients_makes_val_the_test_where_there_is_none():
    records = split_patients(patients_with(GRADES[:100]) + patients_with([1] * 30, "val"))
    assert splits_of(records)["test"] == {f"val{i}" for i in range(30)}
    assert len(splits_of(records)["val"]) == 10
    assert_disjoint(records)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_split_patients_of_few_patients_always_leaves_some_to_train(count):
    records = split_patients(patients_with([2] * count))
    assert splits_of(records)["train"]
    assert bool(splits_of(records)["test"]) == (count > 1)


def test_split_patients_refuses_leaks():
    records = patients_with([0, 1]) + [Record("x.jpg", 0, "train1", "", "test")]
    with pytest.raises(InputError, match=r"train1 \(test, train\)"):
        split_patients(records)


def test_linked_photographs_stay_in_one_split():
    """Copies under two patients' names: their patients are never parted, whatever the cut."""
    records = [Record(f"{i}.jpg", i % 5, f"p{i}", "", "train") for i in range(200)]
    linked = [(f"{i}.jpg", f"{i + 100}.jpg") for i in range(0, 100, 2)] + [("0.jpg", "1.jpg")]
    for made in (split_patients(records, linked=linked), *fold_splits(records, 4, linked=linked)):
        where = {record.path: record.split for record in made}
        assert all(where[one] == where[other] for one, other in linked)
        assert {"train", "val", "test"} == set(where.values())
    parted = {r.path: r.split for r in split_patients(records)}
    assert any(parted[one] != parted[other] for one, other in linked)


def test_folds_test_every_patient_once_and_are_stratified():
    records = [
        Record(f"{i}_{eye}.jpg", i % 5 if eye == "left" else 0, f"p{i}", eye, split)
        for i, split in enumerate(["train", "val", "test"] * 50)
        for eye in ("left", "right")
    ]
    folds = fold_splits(records, 5)
    tested = [{r.patient for r in fold if r.split == "test"} for fold in folds]
    assert sum(map(len, tested)) == len(set.union(*tested)) == 150
    for fold in folds:
        assert_disjoint(fold)
        worse = Counter(r.grade for r in fold if r.split == "test" and r.eye == "left")
        assert all(count == 6 for count in worse.values()) and len(worse) == 5
        assert {r.split for r in fold} == {"train", "val", "test"}
    for wrong in (1, 151):
        with pytest.raises(InputError, match=f"--folds {wrong}"):
            fold_splits(records, wrong)


# -------------------------------------------------------------------------------- pictures compared


def eye(seed, size=256):
    """A drawn fundus, cropped and square."""
    frame, _ = draw_photograph(DrawnEye("p", "left", seed % 5, (31, seed, 0)), size)
    return crop_square(frame, find_fundus(frame), size)


def encoded(picture, **how):
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", **how)
    return np.array(Image.open(buffer))


def test_copies_are_alike_and_other_eyes_are_not():
    eyes = [eye(seed) for seed in range(8)]
    looks = [signature(picture) for picture in eyes]
    for picture, look in zip(eyes, looks, strict=True):
        small = np.array(Image.fromarray(picture).resize((128, 128), Image.Resampling.LANCZOS))
        bright = (picture * 1.15).clip(0, 255).astype(np.uint8)
        for copy in (encoded(picture, quality=50), small, bright):
            assert alike(look, signature(copy)) > 0.84
        assert alike(look, look) == pytest.approx(1)
    others = [alike(a, b) for i, a in enumerate(looks) for b in looks[:i]]
    assert max(others) < 0.6
    dark = signature(np.zeros((64, 64, 3), np.uint8))
    assert not dark.any() and alike(dark, dark) == alike(dark, looks[0]) == 0


def test_coarse_signature_is_the_mean_of_blocks():
    look = signature(eye(1))
    found = coarse(look)
    assert (found.shape, found.dtype) == ((16, 16), np.int8)
    for y, x in ((0, 0), (7, 3), (15, 15)):
        block = [int(look[4 * y + i, 4 * x + j]) for i in range(4) for j in range(4)]
        assert abs(found[y, x] - sum(block) / 16) <= 0.5


def test_pairs_far_apart_in_the_list_are_found_as_by_looking_at_all():
    """2,200 signatures are searched in blocks of 512 by 2,048; all pairs are looked at here."""
    rng = np.random.default_rng(0)
    looks = rng.integers(-60, 60, (2200, 64, 64)).astype(np.int8)
    pairs = [(3, 9), (5, 600), (511, 512), (0, 2199), (2047, 2048), (700, 701)]
    for one, other in pairs:
        noise = rng.integers(-9, 10, (64, 64))
        looks[other] = (looks[one] + noise).clip(-127, 127)
    small = np.stack([coarse(look) for look in looks]).reshape(len(looks), -1)
    found = {(i, j) for i, j, _ in find_alike(small, looks.__getitem__)}
    unit = looks.reshape(len(looks), -1).astype(np.float32)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    every = {tuple(map(int, pair)) for pair in np.argwhere(np.triu(unit @ unit.T, 1) > 0.84)}
    assert found == every == {*pairs}


def test_pictures_almost_without_structure_are_no_copies():
    rng = np.random.default_rng(0)
    flat = np.full((256, 256, 3), 90, np.uint8)
    look = signature(flat + rng.integers(0, 2, flat.shape, dtype=np.uint8))
    assert look.any() and alike(look, look) == 0


def test_doubts_by_hand(caplog):
    names = "abcdef"
    records = tuple(
        Record(f"images/{n}.jpg", i % 2, f"p{i // 2}", "left", "train" if i < 4 else "test", n)
        for i, n in enumerate(names)
    )
    good = {"doubtful": False, "brightest": 200, "contrast": 30.0, "truncated": False}
    facts = {name: dict(good) for name in names} | {"bad": {"error": "is empty"}}
    facts["a"]["doubtful"] = facts["c"]["truncated"] = True
    facts["b"] |= {"brightest": 22, "contrast": 1.9}
    copies = [("a", "c", 0.9), ("c", "d", 1.0), ("d", "f", 1.0)]
    manifest = Manifest(Path(), records, True, "x", lists={"known": ["b"], "rows": ["lost"]})
    with caplog.at_level("INFO", logger="ssrl"):
        lists = list_doubts(manifest, facts, copies)
    told = {n: [e["text"].replace("images/", "") for e in found] for n, found in lists.items()}
    assert told == {
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
    assert lists["known"][0]["pictures"] == ["images/b.jpg"] and not lists["rows"][0]["pictures"]
    assert "near black: 1" in caplog.text and "unreadable: 1" in caplog.text
    alone = replace(manifest, records=tuple(replace(r, patient=r.source) for r in records))
    assert not list_doubts(alone, facts, copies)["copies_of_other_patients"]  # nobody is known
