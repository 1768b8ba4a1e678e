"""manifest.py: manifest.csv in and out, its faults, and what its paths become.

Run with `python -m pytest tests/test_manifest.py`.
"""

import os
import re
from dataclasses import replace

import pytest
from helpers import touch

from fundus.layouts import open_data
from fundus.manifest import (
    Manifest,
    Record,
    picture_paths,
    picture_records,
    read_manifest,
    write_manifest,
)
from utils import InputError

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
        ("a.jpg,5,p,,train", "grade is '5'; expected 0, 1, 2, 3 or 4"),
        ("a.jpg,2.5,p,,train", "grade is '2.5'"),
        ("a.jpg,nan,p,,train", "grade is 'nan'"),
        ("a.jpg,-0,p,,train", "grade is '-0'"),
        ("a.jpg,mild,p,,train", "grade is 'mild'"),
        ("a.jpg,1,,,train", "patient is ''"),
        ("a.jpg,1,p,both,train", "eye is 'both'"),
        ("a.jpg,1,p,,dev", "split is 'dev'; expected train, val or test"),
        ("a.jpg,1,p", "split is ''"),
        ("a.jpg,1,p,,train,,1e3", "width is '1e3'; expected a whole number"),
        ("a.jpg,1,p,,train,,,-5", "height is '-5'; expected a whole number"),
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
    header = "path,grade,patient,eye,split,source,width,height"
    write_csv(tmp_path, "b.jpg,0,q,,train", row, header=header)
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


def test_all_of_50_planted_leaks_are_counted(tmp_path):
    records = [Record(f"{i}.jpg", i % 5, f"p{i}", "left", "train") for i in range(300)]
    records += [Record(f"t{i}.jpg", i % 5, f"q{i}", "left", "test") for i in range(50)]
    records += [Record(f"l{i}.jpg", i % 5, f"p{6 * i}", "right", "test") for i in range(50)]
    touch(tmp_path, *(record.path for record in records))
    write_manifest(tmp_path, records)
    with pytest.raises(InputError, match="50 patients are in more than one split") as caught:
        read_manifest(tmp_path)
    named = re.findall(r"p([0-9]+) \(test, train\)", str(caught.value))
    assert len(named) == 5
    assert all(int(number) % 6 == 0 for number in named)
    assert "keep each in one, or put all into train" in str(caught.value)


def pictures_of(*paths):
    return picture_paths([Record(path, 0, path, "", "train") for path in paths])


def test_pictures_never_share_a_file():
    paths = ("train/0/1.png", "test/0/1.png", "train/1/1.PNG", "a/x.jpg", "a/X.png", "a/x.tif")
    pictures = pictures_of(*paths, "y.jpg")
    assert pictures["y.jpg"] == "images/y.jpg"
    assert pictures["train/0/1.png"] == "images/train/0/1.jpg"
    assert pictures["test/0/1.png"] == "images/test/0/1.jpg"
    assert len({picture.casefold() for picture in pictures.values()}) == len(paths) + 1


def test_pictures_whose_names_meet_in_other_ways_share_no_file():
    paths = ("1.jpg", "1.png", "sub/1.jpg.jpeg", "sub/1.png", "2.jpg", "sub/2.jpg.png")
    pictures = pictures_of(*paths)
    assert len({picture.casefold() for picture in pictures.values()}) == len(paths)


def test_records_of_pictures_keep_what_is_known_of_the_photograph():
    raw = Record("train/1_left.jpeg", 3, "1", "left", "val")
    facts = {raw.path: {"width": 300, "height": 200, "sha256": "ab", "truncated": False}}
    (record,) = picture_records([raw], {raw.path: "images/1_left.jpg"}, facts)
    expected = Record(
        "images/1_left.jpg", 3, "1", "left", "val", "train/1_left.jpeg", 300, 200, "ab"
    )
    assert record == expected


@pytest.mark.parametrize("row", [2, 9])
def test_a_stray_quote_names_its_row(tmp_path, row):
    rows = [f"{number}.jpg,0,{number},,train" for number in range(50)]
    rows[row - 2] = '"' + rows[row - 2]  # rows are counted from 1, the first is the header
    write_csv(tmp_path, *rows)
    with pytest.raises(InputError, match=rf"manifest\.csv, row {row}: .*quote"):
        read_manifest(tmp_path)


def test_a_column_named_twice_is_refused(tmp_path):
    (tmp_path / "manifest.csv").write_text("path,grade,grade,patient,eye,split\na,1,2,p,,train\n")
    with pytest.raises(InputError, match="more than one column grade"):
        read_manifest(tmp_path)


def test_a_linked_folder_is_refused_whatever_its_first_file_is(tmp_path):
    data, secret = tmp_path / "data", tmp_path / "secret"
    touch(data, "a.png")
    touch(secret, "s.png")
    os.symlink(data / "a.png", secret / "back.png")  # a way back in
    os.symlink(secret, data / "f")
    for names in (["f/back.png", "f/s.png"], ["f/s.png"]):
        write_manifest(data, [Record(name, 0, name, "", "train") for name in names])
        with pytest.raises(InputError, match=r"row 2: f/.* is a link out"):
            read_manifest(data)


def test_missing_files_of_a_large_manifest_are_named(tmp_path):
    records = [Record(f"{i % 3}/{i}.jpg", 0, f"p{i}", "", "train") for i in range(1000)]
    touch(tmp_path, *(r.path for r in records if r.path != "1/901.jpg"))
    write_manifest(tmp_path, records)
    with pytest.raises(InputError, match=r"row 903: 1 of 1000 files are not there: 1/901\.jpg"):
        read_manifest(tmp_path)


def test_long_names_are_shortened_in_messages(tmp_path):
    records = [Record("x" * 300 + ".jpg", 0, "p", "", "train")]
    write_manifest(tmp_path, records)
    with pytest.raises(InputError) as caught:
        read_manifest(tmp_path)
    assert "x" * 77 + "..." in str(caught.value) and "x" * 78 not in str(caught.value)
