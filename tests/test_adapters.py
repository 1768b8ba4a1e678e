"""adapters.py: data sets as downloaded, with the traps that they have, and the registry of them.

Run: pytest tests/test_adapters.py
"""

from collections import Counter
from typing import get_args

import pytest
from helpers import assert_disjoint, by_path, splits_of, touch

from fundus.adapters import DATA_SETS, LAYOUTS, LayoutName, expected_data, layout_help, layout_table
from fundus.layouts import open_data
from fundus.manifest import GRADES
from utils import HERE, InputError


def eyepacs(root, patients=20, split="train", first=0, suffix=".jpeg"):
    """Photographs and labels as Kaggle ships them; grades: left patient % 5, right 0."""
    rows = ["image,level" if split == "train" else "image,level,Usage"]
    for patient in range(first, first + patients):
        for eye, grade in (("left", patient % 5), ("right", 0)):
            touch(root, f"{split}/{patient}_{eye}{suffix}")
            rows.append(f"{patient}_{eye},{grade}" + ",Private" * (split == "test"))
    name = "trainLabels.csv" if split == "train" else "retinopathy_solution.csv"
    (root / name).write_text("\n".join(rows) + "\n")
    return rows


# ------------------------------------------------------------------------------------------ EyePACS


def test_eyepacs_train_alone(tmp_path):
    eyepacs(tmp_path, 50)
    manifest = open_data(tmp_path)
    assert (manifest.layout, manifest.prepared, manifest.root) == ("eyepacs", False, tmp_path)
    assert len(manifest.records) == 100
    record = by_path(manifest)["train/13_left.jpeg"]
    assert (record.grade, record.patient, record.eye) == (3, "13", "left")
    assert {name: len(p) for name, p in splits_of(manifest.records).items()} == {
        "train": 36,
        "val": 4,
        "test": 10,
    }
    assert_disjoint(manifest.records)
    assert any("test" in note and "20 %" in note for note in manifest.notes)


def test_eyepacs_with_test(tmp_path):
    eyepacs(tmp_path, 20)
    eyepacs(tmp_path, 30, "test", first=100)
    manifest = open_data(tmp_path)
    assert splits_of(manifest.records)["test"] == {str(p) for p in range(100, 130)}
    assert len(splits_of(manifest.records)["val"]) == 2
    assert by_path(manifest)["test/104_left.jpeg"].grade == 4
    assert len(manifest.split("test")) == 60


def test_eyepacs_test_alone(tmp_path):
    eyepacs(tmp_path, 10, "test")
    assert {record.split for record in open_data(tmp_path).records} == {"test"}


def test_eyepacs_test_without_its_grades_is_left_out_and_told(tmp_path):
    eyepacs(tmp_path)
    touch(tmp_path, *(f"test/{n}_left.jpeg" for n in range(900, 907)))
    zeros = "\n".join(f"{n}_left,0" for n in range(900, 907))
    (tmp_path / "sampleSubmission.csv").write_text(f"image,level\n{zeros}\n")
    manifest = open_data(tmp_path)
    assert len(manifest.records) == 40
    assert not any(record.path.startswith("test/") for record in manifest.records)
    assert any(
        "7 photographs of test/" in n and "retinopathy_solution" in n for n in manifest.notes
    )


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".JPG", ".tiff"])
def test_eyepacs_mirrors_with_other_suffixes(tmp_path, suffix):
    eyepacs(tmp_path, 10, suffix=suffix)
    assert len(open_data(tmp_path).records) == 20


def test_eyepacs_mirrors_in_grade_folders_or_unpacked_one_level_deeper(tmp_path):
    rows = eyepacs(tmp_path / "a", 10)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "trainLabels.csv").write_text("\n".join(rows))
    for row in rows[1:]:
        name, grade = row.split(",")
        touch(tmp_path / "b", f"train/train/{grade}/{name.upper()}.png")
    grades = [
        {(r.patient, r.eye): r.grade for r in open_data(tmp_path / name).records} for name in "ab"
    ]
    assert grades[0] == grades[1]


def test_eyepacs_csv_with_bom_crlf_blanks_semicolons_and_suffixes(tmp_path):
    touch(tmp_path, "train/1_left.jpeg", "train/1_right.jpeg", "train/2_left.jpeg")
    text = "image ; level ;\r\n 1_left.jpeg ; 2 ;\r\n1_right;4.0;\r\n\r\n2_left;0;"
    (tmp_path / "trainLabels.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    grades = {record.path: record.grade for record in open_data(tmp_path).records}
    assert grades == {"train/1_left.jpeg": 2, "train/1_right.jpeg": 4, "train/2_left.jpeg": 0}


def test_eyepacs_rows_and_files_without_partner_are_counted_with_five_names(tmp_path):
    eyepacs(tmp_path)
    for patient in range(7):
        (tmp_path / f"train/{patient}_left.jpeg").unlink()
    touch(tmp_path, "train/77_left.jpeg", "train/.78_left.jpeg", "train/Thumbs.db")
    manifest = open_data(tmp_path)
    assert len(manifest.records) == 33
    rows = next(note for note in manifest.notes if "rows" in note)
    assert rows.startswith("7 ") and rows.count("_left") == 5
    files = next(note for note in manifest.notes if "photographs without" in note)
    assert files.startswith("1 ") and "77_left" in files


def test_eyepacs_same_stem_twice_names_both_files(tmp_path):
    eyepacs(tmp_path)
    touch(tmp_path, "train/3_left.png")
    with pytest.raises(InputError, match=r"train/3_left\.jpeg and train/3_left\.png"):
        open_data(tmp_path)


@pytest.mark.parametrize("level", ["5", "2.5", "-1", "NaN", "mild"])
def test_eyepacs_bad_levels_name_file_and_row(tmp_path, level):
    eyepacs(tmp_path)
    with (tmp_path / "trainLabels.csv").open("a") as file:
        file.write(f"99_left,{level}\n")
    with pytest.raises(InputError, match=rf"trainLabels\.csv, row 42: grade is '{level}'.*0, 1, 2"):
        open_data(tmp_path)


def test_eyepacs_row_twice(tmp_path):
    eyepacs(tmp_path)
    with (tmp_path / "trainLabels.csv").open("a") as file:
        file.write("3_left,3\n")  # the same again does no harm
    assert len(open_data(tmp_path).records) == 40
    with (tmp_path / "trainLabels.csv").open("a") as file:
        file.write("3_left,1\n")
    with pytest.raises(InputError, match="row 43: 3_left has grade 3 further up"):
        open_data(tmp_path)


def test_eyepacs_missing_column_shows_the_header(tmp_path):
    eyepacs(tmp_path)
    (tmp_path / "trainLabels.csv").write_text("name,level\n1_left,0\n")
    with pytest.raises(InputError, match=r"trainLabels\.csv: no column image.*name,level"):
        open_data(tmp_path)


def test_eyepacs_not_unpacked(tmp_path):
    (tmp_path / "trainLabels.csv").write_text("image,level\n1_left,0\n")
    touch(tmp_path, "train.zip.001", "train.zip.002")
    with pytest.raises(InputError, match="no photographs in train.*7z x train.zip.001"):
        open_data(tmp_path)


def test_eyepacs_patient_in_train_and_test_is_refused(tmp_path):
    eyepacs(tmp_path, 10)
    eyepacs(tmp_path, 10, "test", first=9)
    with pytest.raises(
        InputError, match=r"1 patients are in more than one split: 9 \(test, train\)"
    ):
        open_data(tmp_path)


@pytest.mark.parametrize("folder", ["resized_train/resized_train", "images", "."])
def test_eyepacs_mirrors_need_no_folder_named_train(tmp_path, folder):
    eyepacs(tmp_path, 10)
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for path in list((tmp_path / "train").iterdir()):
        path.rename(tmp_path / folder / path.name)
    touch(tmp_path, "test/900_left.jpeg")  # without a grade
    manifest = open_data(tmp_path)
    assert manifest.layout == "eyepacs" and len(manifest.records) == 20
    assert any("photographs of test/ left out" in note for note in manifest.notes)


def test_eyepacs_known_bad_photographs_are_kept_and_listed(tmp_path):
    touch(tmp_path, "train/492_right.jpeg", "train/1_left.jpeg")
    (tmp_path / "trainLabels.csv").write_text("image,level\n492_right,0\n1_left,0\n")
    manifest = open_data(tmp_path)
    assert len(manifest.records) == 2
    what = "photographs are known to be black or unusable, and kept"
    assert manifest.lists[what] == ["train/492_right.jpeg"]


def test_sample_submission_is_never_read_as_labels(tmp_path):
    touch(tmp_path, "test/1_left.jpeg", "test/1_right.jpeg")
    (tmp_path / "sampleSubmission.csv").write_text("image,level\n1_left,0\n1_right,0\n")
    assert {record.grade for record in open_data(tmp_path).records} == {None}


# ---------------------------------------------------------------------------------- other data sets


def published(manifest):
    """The note that holds what was found against what the data set publishes."""
    return [note for note in manifest.notes if "photographs of grades 0-4" in note]


def test_aptos(tmp_path):
    """train.csv with grades, test.csv without, no patients; splits are made."""
    rows = [f"id{i:03d},{i % 5}" for i in range(50)]
    (tmp_path / "train.csv").write_text("id_code,diagnosis\n" + "\n".join(rows))
    (tmp_path / "test.csv").write_text("id_code\nhidden\n")
    (tmp_path / "sample_submission.csv").write_text("id_code,diagnosis\nhidden,0\n")
    touch(tmp_path, "test_images/hidden.png", *(f"train_images/id{i:03d}.png" for i in range(50)))
    manifest = open_data(tmp_path)
    assert manifest.layout == "aptos" and len(manifest.records) == 50
    assert all(r.grade == int(r.patient[2:]) % 5 for r in manifest.records)
    assert Counter(r.split for r in manifest.records) == {"train": 36, "val": 4, "test": 10}
    notes = "\n".join(manifest.notes)
    assert "1 photographs of test.csv left out" in notes and "patients are not published" in notes
    assert published(manifest) == [
        "train: 50 photographs of grades 0-4 (10, 10, 10, 10, 10); "
        "published 3662 (1805, 370, 999, 193, 295)"
    ]


def test_aptos_mirror_with_three_labelled_parts(tmp_path):
    for part, name in (("train", "train_1.csv"), ("val", "valid.csv"), ("test", "test.csv")):
        (tmp_path / name).write_text(f"id_code,diagnosis\n{part}0,0\n{part}1,4\n")
        touch(tmp_path, f"{part}_images/{part}_images/{part}0.png")
        touch(tmp_path, f"{part}_images/{part}_images/{part}1.png")
    found = {(r.patient, r.grade, r.split) for r in open_data(tmp_path).records}
    assert found == {(f"{p}{i}", 4 * i, p) for p in ("train", "val", "test") for i in range(2)}


def test_aptos_with_upper_case_folders(tmp_path):
    (tmp_path / "train.csv").write_text("id_code,diagnosis\na,1\nb,2\n")
    touch(tmp_path, "Train_images/a.png", "Train_images/b.png")
    assert open_data(tmp_path).layout == "aptos"


def test_ddr(tmp_path):
    """Blank-separated lists, the split folder `valid`, grade 5 dropped and counted."""
    base = tmp_path / "DDR-dataset" / "DR_grading"
    for number, part in enumerate(("train", "valid", "test")):
        names = [f"00{number}-{i:04d}-000.jpg" for i in range(12)]
        touch(base / part, *names)
        lines = [f"{name} {i % 6}" for i, name in enumerate(names)]
        (base / f"{part}.txt").write_text("\n".join(lines) + "\n")
    manifest = open_data(tmp_path)
    assert manifest.layout == "ddr" and len(manifest.records) == 30
    assert Counter(r.split for r in manifest.records) == {"train": 10, "val": 10, "test": 10}
    assert sum("2 photographs left out, ungradable (grade 5)" in n for n in manifest.notes) == 3
    assert "all: 30 photographs of grades 0-4 (6, 6, 6, 6, 6); published 12522" in "".join(
        manifest.notes
    )
    (base / "test.txt").write_text("002-0000-000.jpg 6\n")
    with pytest.raises(InputError, match=r"test\.txt, row 1: grade is '6'"):
        open_data(tmp_path)


@pytest.mark.parametrize("blank", ["\t", "  "])
def test_ddr_lists_with_other_blanks_and_blanks_in_names(tmp_path, blank):
    touch(tmp_path, "train/a b.jpg", "train/c.jpg")
    (tmp_path / "train.txt").write_text(f"a b.jpg{blank}3\nc.jpg{blank}5\n")
    (record,) = open_data(tmp_path).records
    assert (record.path, record.grade) == ("train/a b.jpg", 3)


def test_a_list_that_holds_no_grades_is_not_taken_for_ddr(tmp_path):
    touch(tmp_path, "train/a.png", "train/b.png")
    (tmp_path / "train.txt").write_text("train/a.png\ntrain/b.png\n")
    assert open_data(tmp_path).layout == "photographs"


def messidor2(root, pairs):
    rows = ["image_id,adjudicated_dr_grade,adjudicated_dme,adjudicated_gradable"]
    rows += ["20051020_43808_0100_PP.png,0,0,1", "IM004832.jpg,3,1,1", "IM004833.jpg,,,0"]
    (root / "messidor_data.csv").write_text("\n".join(rows))
    touch(root, "IMAGES/20051020_43808_0100_PP.png", "IMAGES/IM004832.JPG", "IMAGES/IM004833.JPG")
    if pairs:
        (root / "messidor-2.csv").write_text(
            "examID;left;right\n20051020_43808_0100_PP.png;IM004832.JPG\nIM004833.JPG;x.JPG\n"
        )


@pytest.mark.parametrize("pairs", [False, True])
def test_messidor2(tmp_path, pairs):
    """`.jpg` in the csv, `.JPG` on disk; ungradable ones dropped; all of it is a test set."""
    messidor2(tmp_path, pairs)
    manifest = open_data(tmp_path)
    found = [(r.path, r.grade, r.split) for r in manifest.records]
    assert manifest.layout == "messidor2" and found == [
        ("IMAGES/20051020_43808_0100_PP.png", 0, "test"),
        ("IMAGES/IM004832.JPG", 3, "test"),
    ]
    assert len({r.patient for r in manifest.records}) == (1 if pairs else 2)
    lone = [note for note in manifest.notes if "tell no patient" in note]
    unpaired = [note for note in manifest.notes if "messidor-2.csv of the download" in note]
    assert len(lone) == len(unpaired) == (0 if pairs else 1)
    assert any(note.startswith("1 photographs left out, ungradable") for note in manifest.notes)
    assert any("published 1744" in note for note in manifest.notes)


def test_messidor2_says_ungradable_in_several_ways_or_has_other_columns(tmp_path):
    rows = ["image_id,adjudicated_dr_grade,adjudicated_gradable", "a.png,1,1.0", "b.png,2,0.0"]
    (tmp_path / "messidor_data.csv").write_text("\n".join([*rows, "c.png,,1"]))
    touch(tmp_path, "a.png", "b.png", "c.png")
    manifest = open_data(tmp_path)
    assert [r.path for r in manifest.records] == ["a.png"]
    assert "1 photographs left out, ungradable: b" in manifest.notes
    assert "1 photographs left out, without a grade: c" in manifest.notes
    (tmp_path / "messidor_data.csv").write_text("id_code,diagnosis\na,1\n")
    assert any("tables are not read" in note for note in open_data(tmp_path).notes)


def idrid(root):
    header = "Image name,Retinopathy grade,Risk of macular edema ,,,\n"
    images, truths = root / "1. Original Images", root / "2. Groundtruths"
    for letter, part, count in (("a", "Training", 6), ("b", "Testing", 3)):
        touch(
            images / f"{letter}. {part} Set", *(f"IDRiD_{i:03d}.jpg" for i in range(1, count + 1))
        )
        rows = "".join(f"IDRiD_{i:03d},{i % 5},0,,,\n" for i in range(1, count + 1))
        truths.mkdir(exist_ok=True)
        name = f"{letter}. IDRiD_Disease Grading_{part} Labels.csv"
        (truths / name).write_text(header + rows)


def test_idrid(tmp_path):
    """Trailing blanks and empty columns in headers; the same numbers in train and test."""
    idrid(tmp_path / "B. Disease Grading")
    touch(tmp_path, "A. Segmentation/1. Original Images/a. Training Set/IDRiD_01.jpg")
    manifest = open_data(tmp_path)
    assert manifest.layout == "idrid" and len(manifest.records) == 9
    found = Counter(r.split for r in manifest.records)
    assert found["test"] == 3 and found["train"] + found["val"] == 6
    assert len({r.patient for r in manifest.records}) == 9
    grades = {r.path.rpartition("/")[2]: r.grade for r in manifest.records if r.split == "test"}
    assert grades == {"IDRiD_001.jpg": 1, "IDRiD_002.jpg": 2, "IDRiD_003.jpg": 3}
    assert len(published(manifest)) == 2


# ------------------------------------------------------------------------------------- the registry


def test_published_counts_are_the_data_sets_own():
    totals = {}
    for layout in DATA_SETS:
        totals[layout.name] = {split: sum(counts) for split, counts in layout.published.items()}
        assert all(len(counts) == GRADES for counts in layout.published.values())
    assert totals == {
        "eyepacs": {"train": 35126, "test": 53576},
        "aptos": {"train": 3662},
        "ddr": {"all": 12522},
        "messidor2": {"test": 1744},
        "idrid": {"train": 413, "test": 103},
    }


def test_docs_show_the_registry():
    text = (HERE / "docs" / "data.md").read_text(encoding="utf-8")
    shown = text.partition("<!-- layouts -->\n")[2].partition("<!-- end of layouts -->")[0]
    assert shown == layout_table(), "docs/data.md: put layout_table()'s text between the marks"


def test_choices_help_and_errors_follow_the_registry():
    assert get_args(LayoutName) == ("auto", *LAYOUTS)
    for name, layout in LAYOUTS.items():
        assert layout.name == name
        assert f"{name}: {layout.title}" in layout_help()
        assert layout.title in expected_data()
        assert f"| `{name}` | {layout.title} |" in layout_table()
    table = layout_table()
    assert "| `eyepacs` | EyePACS | train 35,126, test 53,576 | from names or a table |" in table
    assert "| `ddr` | DDR | all 12,522 | not published |" in table
    assert "IDRiD, DDR or APTOS 2019 as downloaded" in expected_data()
