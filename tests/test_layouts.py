"""layouts.py: which form a folder has, and what is said of it. Run: pytest tests/test_layouts.py"""

import pytest
from helpers import touch

from fundus.layouts import open_data
from fundus.listing import Reading
from utils import InputError


def test_nothing_there(tmp_path):
    with pytest.raises(InputError, match="expected a prepared folder"):
        open_data(tmp_path / "none")
    with pytest.raises(InputError, match="found nothing"):
        open_data(tmp_path)
    touch(tmp_path, "readme.txt", "train.zip")
    with pytest.raises(InputError, match="found readme.txt, train.zip; unpack"):
        open_data(tmp_path)
    with pytest.raises(InputError, match="not a folder"):
        open_data(tmp_path / "readme.txt")


def test_a_layout_by_name_that_is_not_there(tmp_path):
    touch(tmp_path, "a.png")
    with pytest.raises(InputError, match="no photographs of ddr"):
        open_data(tmp_path, "ddr")


def test_what_has_no_use_is_refused(tmp_path):
    touch(tmp_path, "train/1_left.jpeg", "train/1_right.jpeg")
    (tmp_path / "trainLabels.csv").write_text("image,level\n1_left,0\n1_right,1\n")
    for layout in ("auto", "eyepacs"):
        with pytest.raises(InputError, match="read as eyepacs, which has no use for"):
            open_data(tmp_path, layout, Reading(grades={"zzz": 1}))
    with pytest.raises(InputError, match="no use for 'image'"):
        open_data(tmp_path, "eyepacs", Reading("image"))


def test_an_unfinished_preparation_is_no_data(tmp_path):
    touch(tmp_path, "images/1_left.jpg")
    (tmp_path / "prepare.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="preparation is unfinished"):
        open_data(tmp_path)


def test_names_that_tell_no_patient_are_noted(tmp_path):
    touch(tmp_path, "0_left_1.png", "normal.png", "1_left.png", "1_right.png")
    manifest = open_data(tmp_path)
    (note,) = (note for note in manifest.notes if "tell no patient" in note)
    assert note.startswith("2 photographs") and note.endswith("0_left_1.png, normal.png")


def test_photographs_that_share_a_patient_are_not_said_to_count_alone(tmp_path):
    touch(tmp_path, "10.png", "10_left.png", "20.png")
    manifest = open_data(tmp_path)
    assert len({record.patient for record in manifest.records}) == 2
    (note,) = (note for note in manifest.notes if "tell no patient" in note)
    assert note.startswith("1 photographs")
    assert note.endswith(": 20.png")


def test_a_layout_by_name_is_tried_alone(tmp_path):
    """The folder is EyePACS' as well; read as photographs it has no grades."""
    touch(tmp_path, "images/1_left.jpeg", "images/1_right.jpeg")
    (tmp_path / "trainLabels.csv").write_text("image,level\n1_left,0\n1_right,1\n")
    assert open_data(tmp_path).layout == "eyepacs"
    manifest = open_data(tmp_path, "photographs")
    assert manifest.layout == "photographs"
    assert {record.grade for record in manifest.records} == {None}


def test_what_a_layout_notes_of_a_folder_that_it_leaves_is_void(tmp_path):
    """messidor2 and ddr try this folder before it is read as class folders."""
    for number in range(10):
        touch(tmp_path, f"train/0/{number}.png", f"train/2/{number + 10}.png")
    (tmp_path / "train.txt").write_text("".join(f"{number} 0\n" for number in range(5)))
    alone = open_data(tmp_path, "class_folders")
    assert "row" not in " ".join(alone.notes)
    (tmp_path / "train.txt").write_text("0\n1\n2\n")
    found = open_data(tmp_path)
    assert found.layout == "class_folders"
    assert (found.notes, found.lists) == (alone.notes, alone.lists)


def test_links_that_lead_nowhere_are_no_tables(tmp_path):
    touch(tmp_path, "0/1.png", "1/2.png", "2/3.png")
    for name in ("train.csv", "readme.txt", "messidor_data.csv"):
        (tmp_path / name).symlink_to("/nowhere/at/all")
    found = open_data(tmp_path)
    assert found.layout == "class_folders"
    assert any("files that are not read: 2 .csv, 1 .txt" in note for note in found.notes)
