"""splits.py: patients in splits and folds. Run: pytest tests/test_splits.py"""

from collections import Counter, defaultdict
from pathlib import Path

import pytest
from helpers import assert_disjoint, splits_of

from fundus.manifest import Manifest, Record
from fundus.splits import complete_splits, fold_of_each, fold_splits, split_patients, take_fraction
from utils import InputError


def patients_with(grades, split="train"):
    """Two eyes for each patient; the worse one has the grade given."""
    records = []
    for patient, grade in enumerate(grades):
        better = grade if grade is None else patient % (grade + 1)
        for eye, value in (("left", better), ("right", grade)):
            records.append(Record(f"{patient}_{eye}.jpg", value, f"{split}{patient}", eye, split))
    return records


# The worse eye's grade of 1,005 patients, with EyePACS' shares; 40 are not graded.
COHORT = [0] * 700 + [1] * 71 + [2] * 143 + [3] * 21 + [4] * 30 + [None] * 40


def test_split_patients_is_disjoint_and_stratified_by_the_worse_eye():
    given = patients_with(COHORT)
    records = split_patients(given)
    assert [record.path for record in records] == [record.path for record in given]
    assert_disjoint(records)
    worse = defaultdict(list)
    for record in records[1::2]:  # the right eyes
        worse[record.grade].append(record.split)
    for grade, splits in worse.items():
        counts = Counter(splits)
        total = COHORT.count(grade)
        assert abs(counts["test"] - 0.2 * total) <= 1
        assert abs(counts["val"] - 0.08 * total) <= 1
    patients = splits_of(records)
    assert (len(patients["train"]), len(patients["val"]), len(patients["test"])) == (724, 80, 201)


def split_by_path(records):
    return {record.path: record.split for record in records}


def test_split_patients_depends_on_the_patients_alone():
    records = patients_with(COHORT)
    expected = split_by_path(split_patients(records))
    assert split_by_path(split_patients(records[::-1])) == expected
    assert split_by_path(split_patients(records, seed=1)) != expected
    fewer = split_by_path(split_patients(records[:-2]))
    moved = [path for path, split in fewer.items() if split != expected[path]]
    assert len(moved) < 0.1 * len(fewer)


def test_split_patients_keeps_what_is_given():
    given = patients_with(COHORT[:100]) + patients_with([1] * 30, "test")
    records = split_patients(given)
    assert splits_of(records)["test"] == {f"test{i}" for i in range(30)}
    assert len(splits_of(records)["val"]) == 10
    complete = split_patients(records)
    assert complete == records  # nothing is left to do
    only_test = patients_with([0, 1, 2], "test")
    assert split_patients(only_test) == only_test


def test_split_patients_makes_val_the_test_where_there_is_none():
    records = split_patients(patients_with(COHORT[:100]) + patients_with([1] * 30, "val"))
    assert splits_of(records)["test"] == {f"val{i}" for i in range(30)}
    assert len(splits_of(records)["val"]) == 10
    assert_disjoint(records)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_split_patients_of_few_patients_always_leaves_some_to_train(count):
    records = split_patients(patients_with([2] * count))
    assert splits_of(records)["train"]
    assert bool(splits_of(records)["test"]) == (count > 1)


def test_completing_a_manifest_says_what_was_made():
    records = tuple(patients_with([1] * 30))
    manifest = Manifest(Path(), records, False, "x", notes=("first",))
    complete = complete_splits(manifest)
    assert complete.notes == (
        "first",
        "test is made from 20 % of the patients: 12 photographs",
        "val is made from 10 % of train's patients: 4 photographs",
    )
    assert complete_splits(complete) == complete
    given = Manifest(Path(), (*records, *patients_with([1] * 5, "val")), False, "x")
    assert complete_splits(given).notes[0] == "test is made from val: 10 photographs"


def test_a_val_of_as_many_patients_as_the_one_that_became_test_is_noted():
    records = patients_with([0] * 100) + patients_with([0] * 10, split="val")
    notes = complete_splits(Manifest(Path(), tuple(records), False, "x")).notes
    assert [note.split(":")[0] for note in notes] == [
        "test is made from val",
        "val is made from 10 % of train's patients",
    ]


def test_split_patients_refuses_leaks():
    records = patients_with([0, 1]) + [Record("x.jpg", 0, "train1", "", "test")]
    with pytest.raises(InputError, match=r"train1 \(test, train\)"):
        split_patients(records)


def test_linked_photographs_stay_in_one_split():
    """Copies under two patients' names: their patients are never parted, whatever the cut."""
    records = [Record(f"{i}.jpg", i % 5, f"p{i}", "", "train") for i in range(200)]
    linked = [(f"{i}.jpg", f"{i + 100}.jpg") for i in range(0, 100, 2)] + [("0.jpg", "1.jpg")]
    for made in (split_patients(records, linked=linked), *fold_splits(records, 4, linked=linked)):
        where = split_by_path(made)
        assert all(where[one] == where[other] for one, other in linked)
        assert {"train", "val", "test"} == set(where.values())
    parted = split_by_path(split_patients(records))
    assert any(parted[one] != parted[other] for one, other in linked)


def test_folds_test_every_patient_once_and_are_stratified():
    records = []
    for number, split in enumerate(["train", "val", "test"] * 50):
        patient = f"p{number}"
        grade = number % 5
        records.append(Record(f"{number}_left.jpg", grade, patient, "left", split))
        records.append(Record(f"{number}_right.jpg", 0, patient, "right", split))
    folds = fold_splits(records, 5)
    tested = [{r.patient for r in fold if r.split == "test"} for fold in folds]
    assert sum(map(len, tested)) == len(set.union(*tested)) == 150
    for fold in folds:
        assert_disjoint(fold)
        worse = Counter(r.grade for r in fold if r.split == "test" and r.eye == "left")
        assert worse == dict.fromkeys(range(5), 6)
        assert {r.split for r in fold} == {"train", "val", "test"}
    for wrong in (1, 151):
        with pytest.raises(InputError, match=f"--folds {wrong}"):
            fold_splits(records, wrong)


# ------------------------------------------------------------------- folds and fractions of a probe


def test_folds_of_a_probe_are_by_patient_and_stratified():
    records = patients_with(COHORT)
    fold_of = fold_of_each(records, 5)
    folds_of_patient = defaultdict(set)
    by_grade = defaultdict(Counter)
    for record, fold in zip(records, fold_of, strict=True):
        folds_of_patient[record.patient].add(fold)
        if record.eye == "right":
            by_grade[record.grade][fold] += 1
    assert {len(folds) for folds in folds_of_patient.values()} == {1}
    for counts in by_grade.values():
        assert max(counts.values()) - min(counts.values()) <= 1
    assert Counter(fold_of_each(records[:6], 5)) == {0: 2, 1: 2, 2: 2}
    with pytest.raises(InputError, match="--folds 1"):
        fold_of_each(records[:2], 5)


def test_a_fraction_is_of_patients_of_every_stratum_and_other_for_each_seed():
    records = patients_with(COHORT)
    tenth = take_fraction(records, 0.1, seed=0)
    kept = [record.path for record in tenth]
    assert kept == [record.path for record in records if record.path in set(kept)]
    patients = {record.patient for record in tenth}
    assert len(patients) == 100
    assert len(tenth) == 200, "both eyes of each"
    worse = Counter(record.grade for record in tenth if record.eye == "right")
    for grade in range(5):
        assert abs(worse[grade] - 0.1 * COHORT.count(grade)) <= 1
    assert tenth == take_fraction(records, 0.1, seed=0)
    assert patients != {record.patient for record in take_fraction(records, 0.1, seed=1)}
    assert take_fraction(records, 1, seed=3) == records
    least = take_fraction(records, 1e-6, seed=0)
    assert len({record.patient for record in least}) == 5
