"""listing.py: what is found in a folder, and what names say. Run: pytest tests/test_listing.py"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import assert_disjoint, by_path, touch

from fundus.layouts import open_data
from fundus.listing import Found, Labelled, Reading, TableRow, grade_of_name, stem_of
from fundus.manifest import Record, write_manifest
from utils import InputError


def test_grade_of_name():
    names = {
        "2": 2,
        "grade_2": 2,
        "Level 3": 3,
        "No_DR": 0,
        "no apparent retinopathy": 0,
        "Moderate": 2,
        "2 - moderate NPDR": 2,
        "Mild non-proliferative diabetic retinopathy": 1,
        "Proliferate_DR": 4,
        "PDR": 4,
        "5": None,
        "1 - moderate": None,
        "very severe": None,
        "train": None,
    }
    assert {name: grade_of_name(name) for name in names} == names


def test_matching_notes_what_has_no_partner_and_what_is_dropped():
    found = Found(Path("root"), [], {}, Reading(), "manifest.csv")
    paths = ["a/1.jpg", "a/2.jpg", "a/3.jpg", "a/4.jpg"]
    rows = [TableRow("row 1", "1.PNG", "2"), TableRow("row 2", "2", "bad")]
    rows += [TableRow("row 3", "3", ""), TableRow("row 4", "9", "4.0")]
    dropped = {"bad": "ungradable"}
    matched = found.match(paths, "labels.csv", "val", rows, dropped=dropped)
    assert matched == [Labelled("a/1.jpg", 2, "val"), Labelled("a/3.jpg", None, "val")]
    assert found.lists == {
        "photographs without a row in labels.csv": ["a/4.jpg"],
        "rows of labels.csv without photograph": ["9"],
        "photographs left out, ungradable": ["2"],
    }
    assert found.notes[0] == "1 photographs without a row in labels.csv: a/4.jpg"
    with pytest.raises(InputError, match="row 5: 1 has grade 2 further up"):
        found.match(
            paths, "labels.csv", "val", [*rows, TableRow("row 5", "1", "3")], dropped=dropped
        )


def test_stem_of():
    names = {
        "a/b/10_LEFT.jpeg": "10_left",
        "C:\\x\\10_left.PNG": "10_left",
        "IM004832": "im004832",
        "20051020_43808_0100_PP.png": "20051020_43808_0100_pp",
        "scan.v2": "scan.v2",  # no suffix of a photograph
        "x.jpg.jpeg": "x.jpg",
    }
    assert {name: stem_of(name) for name in names} == names


@pytest.mark.parametrize("left, right", [("_OS", "_OD"), ("-left", "-right"), (" L", " R")])
def test_eyes_have_many_names_and_stay_with_their_patient(tmp_path, left, right):
    touch(tmp_path, *(f"p{i}{eye}.png" for i in range(20) for eye in (left, right)))
    records = open_data(tmp_path).records
    assert len({r.patient for r in records}) == 20
    assert {r.eye for r in records if left in r.path} == {"left"}
    assert_disjoint(records)


def test_numbering_per_folder_is_not_taken_for_patients(tmp_path):
    touch(tmp_path, "train/0/1.png", "train/2/1.png", "test/0/1.png", "test/2/2.png")
    patients = {record.path: record.patient for record in open_data(tmp_path).records}
    assert len(set(patients.values())) == 4
    assert patients["test/2/2.png"] == "2"


def test_links_do_not_go_round(tmp_path):
    touch(tmp_path / "data", "own/a.png", "own/b.png")
    os.symlink(tmp_path / "data", tmp_path / "data" / "back")
    assert len(open_data(tmp_path / "data").records) == 2


@pytest.mark.parametrize("layout", ["photographs", "class_folders", "csv", "manifest"])
@pytest.mark.parametrize("linked", ["folder", "file"])
def test_links_out_of_the_folder_take_an_option(tmp_path, layout, linked):
    """The same in all layouts; the data's folder itself may be a link."""
    touch(tmp_path / "disk", "a.png", "b.png")
    real = tmp_path / "real"
    (real / "train").mkdir(parents=True)
    if linked == "folder":
        os.symlink(tmp_path / "disk", real / "train" / "2")
    else:
        (real / "train" / "2").mkdir()
        for name in ("a.png", "b.png"):
            os.symlink(tmp_path / "disk" / name, real / "train" / "2" / name)
    os.symlink("/nowhere/at/all", real / "README")
    root = tmp_path / "data"
    os.symlink(real, root)
    reading = Reading()
    if layout == "csv":
        (real / "t.csv").write_text("file,dr\ntrain/2/a.png,2\ntrain/2/b.png,3\n")
        reading = Reading("file", "dr")
    if layout == "manifest":
        paths = ("train/2/a.png", "train/2/b.png")
        write_manifest(real, [Record(path, 0, path, "", "train") for path in paths])
    named = "auto" if layout in ("csv", "manifest") else layout
    with pytest.raises(InputError, match=r"is a link out of the folder.*--follow-links"):
        open_data(root, named, reading)
    manifest = open_data(root, named, replace(reading, follow_links=True))
    assert manifest.layout == layout
    assert [record.path for record in manifest.records] == ["train/2/a.png", "train/2/b.png"]


def test_the_uppermost_of_several_tables_is_read(tmp_path):
    touch(tmp_path, "train/0_left.jpeg")
    (tmp_path / "trainLabels.csv").write_text("image,level\n0_left,0\n")
    for folder in ("copy", "zz"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "trainLabels.csv").write_text("image,level\n0_left,4\n")
    assert by_path(open_data(tmp_path))["train/0_left.jpeg"].grade == 0


def test_files_of_other_kinds_are_counted(tmp_path):
    touch(tmp_path, "a.png", "b.jfif", "c.gif", "d.gif", "README")
    manifest = open_data(tmp_path)
    assert len(manifest.records) == 2
    assert "files that are not read: 2 .gif, 1 without suffix" in manifest.notes


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes there alone")
def test_names_that_are_no_utf8_are_refused(tmp_path):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")).touch()
    with pytest.raises(InputError, match=r"udce9\.png' is no name in UTF-8"):
        open_data(tmp_path)
