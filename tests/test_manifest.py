"""manifest.csv in and out, its faults, and how patients are split.

Run with `python -m pytest tests/test_manifest.py`.
"""

import os
import re
from collections import Counter, defaultdict
from dataclasses import replace

import pytest
from helpers import assert_disjoint, splits_of, touch

from layouts import open_data
from manifest import (
    Manifest,
    Record,
    fold_splits,
    picture_paths,
    read_manifest,
    split_patients,
    write_manifest,
)
from utils import InputError

# ---------------------------------------------------------------------------------------- manifest

ROWS = [
    Record(
        "images/1_left.jpg", 0, "1", "left", "train", "train/1_left.jpeg", 4752, 3168, "ab" * 32
    ),
    Record("images/1_right.jpg", None, "1", "right", "train"),
    Record("images/a, b.jpg", 4, "\u00e9", "", "val"),
    Record("images/c.jpg", 2, "c", "", "test"),
]


def make_manifest(root, rows=ROWS):
    touch(root, *(record.path for record in rows))
    write_manifest(root, rows)


def test_manifest_round_trip(tmp_path):
    make_manifest(tmp_path)
    for manifest in (read_manifest(tmp_path), open_data(tmp_path / "manifest.csv")):
        assert manifest.records == tuple(ROWS)
        assert (manifest.root, manifest.prepared) == (tmp_path, False)
    assert sorted(os.listdir(tmp_path)) == ["images", "manifest.csv"]
    (tmp_path / "data_report.json").touch()  # by which prepared folders are known
    assert read_manifest(tmp_path).prepared


def test_fingerprint_depends_on_rows_and_not_on_place_or_order(tmp_path):
    one = Manifest(tmp_path, tuple(ROWS), True, "prepared")
    assert (
        Manifest(tmp_path / "x", tuple(ROWS[::-1]), False, "eyepacs").fingerprint == one.fingerprint
    )
    changes = {"path": "x", "grade": 1, "patient": "x", "split": "test", "sha256": "0"}
    for name, value in changes.items():
        rows = (replace(ROWS[0], **{name: value}), *ROWS[1:])
        assert Manifest(tmp_path, rows, True, "prepared").fingerprint != one.fingerprint
    assert len(one.fingerprint) == 64


def test_failed_writing_keeps_the_old_manifest(tmp_path):
    make_manifest(tmp_path)
    with pytest.raises(TypeError):
        write_manifest(tmp_path, [*ROWS, None])
    assert read_manifest(tmp_path).records == tuple(ROWS)
    assert sorted(os.listdir(tmp_path)) == ["images", "manifest.csv"]


def write_csv(root, *lines, header="path,grade,patient,eye,split"):
    touch(root, "a.jpg", "b.jpg")
    (root / "manifest.csv").write_text("\n".join([header, *lines]))


def test_manifest_by_hand(tmp_path):
    header = "split,eye,patient,grade,path,comment"
    write_csv(tmp_path, "Train,LEFT,p,2.0,./a.jpg,x", ",,,,,", "testing,,q,,b.jpg", header=header)
    manifest = read_manifest(tmp_path)
    assert manifest.records == (
        Record("a.jpg", 2, "p", "left", "train"),
        Record("b.jpg", None, "q", "", "test"),
    )
    assert not manifest.prepared  # raw photographs, still to be cropped
    (tmp_path / "manifest.csv").write_text(
        "path,grade,patient,eye,split\na.jpg,0,p,,train\nb.jpg,0,q,,train\n"
    )
    assert len(open_data(tmp_path).split("test")) == 1


@pytest.mark.parametrize(
    "row, fault",
    [
        ("a.jpg,5,p,,train", "grade is '5'; expected 0, 1, 2, 3, 4"),
        ("a.jpg,2.5,p,,train", "grade is '2.5'"),
        ("a.jpg,nan,p,,train", "grade is 'nan'"),
        ("a.jpg,-0,p,,train", "grade is '-0'"),
        ("a.jpg,mild,p,,train", "grade is 'mild'"),
        ("a.jpg,1,,,train", "patient is ''"),
        ("a.jpg,1,p,both,train", "eye is 'both'"),
        ("a.jpg,1,p,,dev", "split is 'dev'; expected train, val or test"),
        ("a.jpg,1,p", "split is ''"),
        (",1,p,,train", "path is ''"),
        ("/etc/passwd,1,p,,train", "path is '/etc/passwd'"),
        ("../a.jpg,1,p,,train", "path is"),
        ("x/../../a.jpg,1,p,,train", "path is"),
        ("..\\a.jpg,1,p,,train", "path is"),
        ("C:/a.jpg,1,p,,train", "path is"),
        ("\\\\server\\a.jpg,1,p,,train", "path is"),
        ("a\0.jpg,1,p,,train", "path is"),
        ("b.jpg,1,q,,train", "b.jpg is in .*manifest.csv, row 2 too"),
        ("./b.jpg,1,q,,train", "b.jpg is in .*manifest.csv, row 2 too"),
        ("none.jpg,1,q,,train", "1 of 2 files are not there: none.jpg"),
        ("x/none.jpg,1,q,,train", "1 of 2 files are not there: x/none.jpg"),
        ("folder.jpg,1,q,,train", "1 of 2 files are not there: folder.jpg"),
    ],
)
def test_every_fault_names_the_file_and_row(tmp_path, row, fault):
    (tmp_path / "folder.jpg").mkdir()
    write_csv(tmp_path, "b.jpg,0,q,,train", row)
    with pytest.raises(InputError, match=rf"manifest\.csv, row 3: {fault}".replace("\\a", ".a")):
        read_manifest(tmp_path)


def test_rows_are_numbered_as_an_editor_does(tmp_path):
    write_csv(tmp_path, "", 'a.jpg,0,"two', 'lines",,train', "b.jpg,9,q,,train")
    with pytest.raises(InputError, match="row 5: grade is '9'"):
        read_manifest(tmp_path)


def test_faults_of_the_whole_csv(tmp_path):
    write_csv(tmp_path, "a.jpg,0", header="path,grade")
    with pytest.raises(InputError, match="no column patient, eye, split"):
        read_manifest(tmp_path)
    write_csv(tmp_path)
    with pytest.raises(InputError, match="no rows"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.csv").write_bytes("path,grade".encode("utf-16"))
    with pytest.raises(InputError, match="UTF-8"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("where", ["file", "folder"])
def test_links_out_of_the_folder_are_refused(tmp_path, where):
    touch(tmp_path / "secret", "s.jpg")
    root = tmp_path / "data"
    root.mkdir()
    write_csv(root, "b.jpg,0,q,,train", ("s.jpg" if where == "file" else "f/s.jpg") + ",0,p,,train")
    if where == "file":
        os.symlink(tmp_path / "secret" / "s.jpg", root / "s.jpg")
    else:
        os.symlink(tmp_path / "secret", root / "f")
    with pytest.raises(InputError, match="row 3: .*s.jpg is a link out of the folder"):
        read_manifest(root)


def test_links_within_the_folder_are_fine(tmp_path):
    write_csv(tmp_path, "b.jpg,0,q,,train", "s.jpg,0,p,,train")
    os.symlink(tmp_path / "a.jpg", tmp_path / "s.jpg")
    assert len(read_manifest(tmp_path).records) == 2


def test_leaks_in_a_manifest_are_refused_with_five_examples(tmp_path):
    rows = [Record(f"{i}{s}.jpg", 0, f"p{i}", "", s) for i in range(8) for s in ("train", "val")]
    make_manifest(tmp_path, rows)
    with pytest.raises(InputError, match="8 patients are in more than one split") as caught:
        read_manifest(tmp_path)
    assert str(caught.value).count("(train, val)") == 5
    assert "manifest.csv" in str(caught.value) and "keep each in one" in str(caught.value)


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


def test_all_of_50_planted_leaks_are_counted(tmp_path):
    records = [Record(f"{i}.jpg", i % 5, f"p{i}", "left", "train") for i in range(300)]
    records += [Record(f"t{i}.jpg", i % 5, f"q{i}", "left", "test") for i in range(50)]
    records += [Record(f"l{i}.jpg", i % 5, f"p{6 * i}", "right", "test") for i in range(50)]
    touch(tmp_path, *(record.path for record in records))
    write_manifest(tmp_path, records)
    with pytest.raises(InputError, match="50 patients are in more than one split") as caught:
        read_manifest(tmp_path)
    told = re.findall(r"(p[0-9]+) \(test, train\)", str(caught.value))
    assert len(told) == 5 and all(int(name[1:]) % 6 == 0 for name in told)
    assert "keep each in one, or put all into train" in str(caught.value)


def test_pictures_never_share_a_file():
    class Row:
        def __init__(self, path):
            self.path = path

    paths = [
        "train/0/1.png",
        "test/0/1.png",
        "train/1/1.PNG",
        "a/x.jpg",
        "a/X.png",
        "a/x.tif",
        "y.jpg",
    ]
    pictures = picture_paths(tuple(map(Row, paths)))
    assert pictures["y.jpg"] == "images/y.jpg"
    assert pictures["train/0/1.png"] == "images/train/0/1.jpg"
    assert pictures["test/0/1.png"] == "images/test/0/1.jpg"
    assert len({picture.casefold() for picture in pictures.values()}) == len(paths)
