"""adapters.py: data sets as downloaded, with the traps that they have, and the registry of them.

Run: pytest tests/test_adapters.py
"""

from collections import Counter
from pathlib import Path
from typing import get_args

import pytest
from helpers import assert_disjoint, by_path, splits_of, touch

from fundus.adapters import DATA_SETS, LAYOUTS, LayoutName, expected_data, layout_help, layout_table
from fundus.layouts import open_data
from fundus.manifest import GRADES
from utils import HERE, InputError


def eyepacs(root, patients=20, split="train", first=0, suffix=".jpeg"):
    """Make photographs and labels as Kaggle ships them; grades: left patient % 5, right 0."""
    name = "trainLabels.csv"
    header = "image,level"
    usage = ""
    if split == "test":
        name = "retinopathy_solution.csv"
        header = "image,level,Usage"
        usage = ",Private"
    rows = [header]
    for patient in range(first, first + patients):
        touch(root, f"{split}/{patient}_left{suffix}", f"{split}/{patient}_right{suffix}")
        rows.append(f"{patient}_left,{patient % 5}{usage}")
        rows.append(f"{patient}_right,0{usage}")
    (root / name).write_text("\n".join(rows) + "\n")
    return rows


def write_table(path, *rows):
    path.write_text("\n".join(rows) + "\n")


def grades_by_path(manifest):
    return {record.path: record.grade for record in manifest.records}


def has_note(manifest, *texts):
    """Return whether one of the manifest's notes holds all the texts."""
    return any(all(text in note for text in texts) for note in manifest.notes)


# ------------------------------------------------------------------------------------------ EyePACS


def test_eyepacs_train_alone(tmp_path):
    eyepacs(tmp_path, 50)
    manifest = open_data(tmp_path)
    assert (manifest.layout, manifest.prepared, manifest.root) == ("eyepacs", False, tmp_path)
    assert len(manifest.records) == 100
    record = by_path(manifest)["train/13_left.jpeg"]
    assert (record.grade, record.patient, record.eye) == (3, "13", "left")
    patients = splits_of(manifest.records)
    assert (len(patients["train"]), len(patients["val"]), len(patients["test"])) == (36, 4, 10)
    assert_disjoint(manifest.records)
    assert has_note(manifest, "test", "20 %")


def test_eyepacs_with_test(tmp_path):
    eyepacs(tmp_path, 20)
    eyepacs(tmp_path, 30, "test", first=100)
    manifest = open_data(tmp_path)
    patients = splits_of(manifest.records)
    assert patients["test"] == set(map(str, range(100, 130)))
    assert len(patients["val"]) == 2
    assert by_path(manifest)["test/104_left.jpeg"].grade == 4
    assert len(manifest.split("test")) == 60


def test_eyepacs_test_alone(tmp_path):
    eyepacs(tmp_path, 10, "test")
    assert {record.split for record in open_data(tmp_path).records} == {"test"}


def test_eyepacs_test_without_its_grades_is_left_out_and_noted(tmp_path):
    eyepacs(tmp_path)
    zeros = []
    for patient in range(900, 907):
        touch(tmp_path, f"test/{patient}_left.jpeg")
        zeros.append(f"{patient}_left,0")
    write_table(tmp_path / "sampleSubmission.csv", "image,level", *zeros)
    manifest = open_data(tmp_path)
    assert len(manifest.records) == 40
    assert not any(record.path.startswith("test/") for record in manifest.records)
    assert has_note(manifest, "7 photographs of test/", "retinopathy_solution")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".JPG", ".tiff"])
def test_eyepacs_mirrors_with_other_suffixes(tmp_path, suffix):
    eyepacs(tmp_path, 10, suffix=suffix)
    assert len(open_data(tmp_path).records) == 20


def test_eyepacs_mirrors_in_grade_folders_or_unpacked_one_level_deeper(tmp_path):
    rows = eyepacs(tmp_path / "original", 10)
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    write_table(mirror / "trainLabels.csv", *rows)
    for row in rows[1:]:
        name, grade = row.split(",")
        touch(mirror, f"train/train/{grade}/{name.upper()}.png")
    expected = {(r.patient, r.eye, r.grade) for r in open_data(tmp_path / "original").records}
    assert {(r.patient, r.eye, r.grade) for r in open_data(mirror).records} == expected


def test_eyepacs_csv_with_bom_crlf_blanks_semicolons_and_suffixes(tmp_path):
    touch(tmp_path, "train/1_left.jpeg", "train/1_right.jpeg", "train/2_left.jpeg")
    text = "image ; level ;\r\n 1_left.jpeg ; 2 ;\r\n1_right;4.0;\r\n\r\n2_left;0;"
    (tmp_path / "trainLabels.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    grades = grades_by_path(open_data(tmp_path))
    assert grades == {"train/1_left.jpeg": 2, "train/1_right.jpeg": 4, "train/2_left.jpeg": 0}


def test_eyepacs_rows_and_files_without_partner_are_counted_with_five_names(tmp_path):
    eyepacs(tmp_path)
    for patient in range(7):
        (tmp_path / f"train/{patient}_left.jpeg").unlink()
    touch(tmp_path, "train/77_left.jpeg", "train/.78_left.jpeg", "train/Thumbs.db")
    manifest = open_data(tmp_path)
    assert len(manifest.records) == 33
    (rows,) = (note for note in manifest.notes if "rows" in note)
    assert rows.startswith("7 ")
    assert rows.count("_left") == 5
    assert has_note(manifest, "1 photographs without", "77_left")


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
    assert (manifest.layout, len(manifest.records)) == ("eyepacs", 20)
    assert has_note(manifest, "photographs of test/ left out")


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
    """Return the notes that hold what was found beside what the data set publishes."""
    return [note for note in manifest.notes if "photographs of grades 0-4" in note]


def test_aptos(tmp_path):
    """train.csv with grades, test.csv without, no patients; splits are made."""
    rows = []
    for number in range(50):
        touch(tmp_path, f"train_images/id{number:03d}.png")
        rows.append(f"id{number:03d},{number % 5}")
    write_table(tmp_path / "train.csv", "id_code,diagnosis", *rows)
    write_table(tmp_path / "test.csv", "id_code", "hidden")
    write_table(tmp_path / "sample_submission.csv", "id_code,diagnosis", "hidden,0")
    touch(tmp_path, "test_images/hidden.png")
    manifest = open_data(tmp_path)
    assert (manifest.layout, len(manifest.records)) == ("aptos", 50)
    for record in manifest.records:
        assert record.grade == int(record.patient[2:]) % 5
    assert Counter(r.split for r in manifest.records) == {"train": 36, "val": 4, "test": 10}
    assert has_note(manifest, "1 photographs of test.csv left out")
    assert has_note(manifest, "patients are not published")
    assert not has_note(manifest, "tell no patient")
    assert published(manifest) == [
        "train: 50 photographs of grades 0-4 (10, 10, 10, 10, 10); "
        "published 3662 (1805, 370, 999, 193, 295)"
    ]


def test_aptos_mirror_with_three_labelled_parts(tmp_path):
    expected = set()
    for split, name in (("train", "train_1.csv"), ("val", "valid.csv"), ("test", "test.csv")):
        write_table(tmp_path / name, "id_code,diagnosis", f"{split}0,0", f"{split}1,4")
        touch(tmp_path / f"{split}_images/{split}_images", f"{split}0.png", f"{split}1.png")
        expected |= {(f"{split}0", 0, split), (f"{split}1", 4, split)}
    assert {(r.patient, r.grade, r.split) for r in open_data(tmp_path).records} == expected


def test_aptos_with_upper_case_folders(tmp_path):
    (tmp_path / "train.csv").write_text("id_code,diagnosis\na,1\nb,2\n")
    touch(tmp_path, "Train_images/a.png", "Train_images/b.png")
    assert open_data(tmp_path).layout == "aptos"


def test_ddr(tmp_path):
    """Blank-separated lists, the split folder `valid`, grade 5 dropped and counted."""
    base = tmp_path / "DDR-dataset" / "DR_grading"
    for part in ("train", "valid", "test"):
        lines = []
        for number in range(12):
            name = f"{part}-{number:04d}-000.jpg"
            touch(base / part, name)
            lines.append(f"{name} {number % 6}")
        base.mkdir(parents=True, exist_ok=True)
        write_table(base / f"{part}.txt", *lines)
    manifest = open_data(tmp_path)
    assert (manifest.layout, len(manifest.records)) == ("ddr", 30)
    assert Counter(r.split for r in manifest.records) == {"train": 10, "val": 10, "test": 10}
    left_out = [note for note in manifest.notes if "left out, ungradable (grade 5)" in note]
    assert len(left_out) == 3
    assert all(note.startswith("2 photographs") for note in left_out)
    assert has_note(manifest, "all: 30 photographs of grades 0-4 (6, 6, 6, 6, 6); published 12522")
    write_table(base / "test.txt", "test-0000-000.jpg 6")
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


@pytest.fixture
def messidor2(tmp_path):
    """Messidor-2 without its table of pairs."""
    write_table(
        tmp_path / "messidor_data.csv",
        "image_id,adjudicated_dr_grade,adjudicated_dme,adjudicated_gradable",
        "20051020_43808_0100_PP.png,0,0,1",
        "IM004832.jpg,3,1,1",
        "IM004833.jpg,,,0",
    )
    touch(tmp_path / "IMAGES", "20051020_43808_0100_PP.png", "IM004832.JPG", "IM004833.JPG")
    return tmp_path


def test_messidor2(messidor2):
    """`.jpg` in the csv, `.JPG` on disk; ungradable ones dropped; all of it is a test set."""
    manifest = open_data(messidor2)
    assert manifest.layout == "messidor2"
    assert [(r.path, r.grade, r.split) for r in manifest.records] == [
        ("IMAGES/20051020_43808_0100_PP.png", 0, "test"),
        ("IMAGES/IM004832.JPG", 3, "test"),
    ]
    assert has_note(manifest, "1 photographs left out, ungradable")
    assert has_note(manifest, "published 1744")


def test_messidor2_pairs_the_eyes_where_its_table_of_pairs_is(messidor2):
    alone = open_data(messidor2)
    assert len({record.patient for record in alone.records}) == 2
    assert has_note(alone, "messidor-2.csv of the download")
    assert has_note(alone, "2 photographs whose names tell no patient")
    write_table(
        messidor2 / "messidor-2.csv",
        "examID;left;right",
        "20051020_43808_0100_PP.png;IM004832.JPG",
        "IM004833.JPG;x.JPG",
    )
    paired = open_data(messidor2)
    assert len({record.patient for record in paired.records}) == 1
    assert not has_note(paired, "messidor-2.csv of the download")
    assert not has_note(paired, "tell no patient")


def test_messidor2_says_ungradable_in_several_ways_or_has_other_columns(tmp_path):
    rows = ["image_id,adjudicated_dr_grade,adjudicated_gradable", "a.png,1,1.0", "b.png,2,0.0"]
    (tmp_path / "messidor_data.csv").write_text("\n".join([*rows, "c.png,,1"]))
    touch(tmp_path, "a.png", "b.png", "c.png")
    manifest = open_data(tmp_path)
    assert [r.path for r in manifest.records] == ["a.png"]
    assert "1 photographs left out, ungradable: b" in manifest.notes
    assert "1 photographs left out, without a grade: c" in manifest.notes
    (tmp_path / "messidor_data.csv").write_text("id_code,level\na,1\n")
    assert has_note(open_data(tmp_path), "tables are not read")


def test_messidor2_of_a_mirror_with_other_columns(messidor2):
    file = messidor2 / "messidor_data.csv"
    original = open_data(messidor2)
    text = file.read_text().replace("image_id,adjudicated_dr_grade", "id_code,diagnosis")
    file.write_text(text)
    mirror = open_data(messidor2)
    assert mirror.layout == "messidor2" and mirror.records == original.records


def test_idrid(tmp_path):
    """Trailing blanks and empty columns in headers; the same numbers in train and test."""
    root = tmp_path / "B. Disease Grading"
    for part, count in (("a. Training", 6), ("b. Testing", 3)):
        rows = ["Image name,Retinopathy grade,Risk of macular edema ,,,"]
        for number in range(1, count + 1):
            touch(root / "1. Original Images" / f"{part} Set", f"IDRiD_{number:03d}.jpg")
            rows.append(f"IDRiD_{number:03d},{number % 5},0,,,")
        letter, name = part.split(" ")
        (root / "2. Groundtruths").mkdir(exist_ok=True)
        table = f"{letter} IDRiD_Disease Grading_{name} Labels.csv"
        write_table(root / "2. Groundtruths" / table, *rows)
    touch(tmp_path, "A. Segmentation/1. Original Images/a. Training Set/IDRiD_01.jpg")
    manifest = open_data(tmp_path)
    assert (manifest.layout, len(manifest.records)) == ("idrid", 9)
    assert len(manifest.split("train") + manifest.split("val")) == 6
    assert len({record.patient for record in manifest.records}) == 9
    grades = {Path(record.path).name: record.grade for record in manifest.split("test")}
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
    assert shown.strip() == layout_table(), (
        "docs/data.md: put layout_table()'s text between the marks"
    )


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
    titles = ", ".join(layout.title for layout in DATA_SETS[:-1])
    assert f"{titles} or {DATA_SETS[-1].title} as downloaded" in expected_data()
    assert expected_data().endswith("any folder of photographs or a csv with --path-column")
