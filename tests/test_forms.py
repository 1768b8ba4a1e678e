"""forms.py: class folders, any folder of photographs, any csv. Run: pytest tests/test_forms.py"""

import os
from collections import Counter

import pytest
from helpers import by_path, touch

from fundus.layouts import open_data
from fundus.listing import Reading
from fundus.manifest import Record, write_manifest
from utils import InputError

# ------------------------------------------------------------------------------------ class folders


def class_tree(root, splits, names, count=4):
    for split in splits:
        for grade, name in enumerate(names):
            touch(root, *(f"{split}/{name}/{split}{grade}{i}.png" for i in range(count)))


@pytest.mark.parametrize(
    "names",
    [
        ["0", "1", "2", "3", "4"],
        ["No_DR", "Mild", "Moderate", "Severe", "Proliferate_DR"],
        ["no dr", "mild dr", "moderate-dr", "SEVERE_DR", "pdr"],
        ["NoDR", "Mild NPDR", "Moderate NPDR", "Severe_NPDR", "PDR"],
        ["0 - No DR", "1 - Mild", "2 - Moderate", "3 - Severe", "4 - Proliferative DR"],
        ["grade_0", "grade_1", "grade_2", "grade_3", "grade_4"],
        [
            "No apparent retinopathy",
            "Mild non-proliferative diabetic retinopathy",
            "Moderate non-proliferative diabetic retinopathy",
            "Severe non-proliferative diabetic retinopathy",
            "Proliferative diabetic retinopathy",
        ],
    ],
    ids=lambda names: names[4],
)
def test_class_folders(tmp_path, names):
    class_tree(tmp_path, ["train", "val", "test"], names)
    manifest = open_data(tmp_path)
    assert (manifest.layout, manifest.prepared) == ("class_folders", False)
    assert Counter((r.split, r.grade) for r in manifest.records) == {
        (split, grade): 4 for split in ("train", "val", "test") for grade in range(5)
    }
    for record in manifest.records:
        assert record.grade == names.index(record.path.split("/")[1])
    assert any(f"{names[2]} = 2" in note for note in manifest.notes)


def test_class_folders_with_other_names_of_splits(tmp_path):
    class_tree(tmp_path, ["Training", "validation", "Testing"], "01234")
    counts = Counter(record.split for record in open_data(tmp_path).records)
    assert counts == {"train": 20, "val": 20, "test": 20}


def test_class_folders_with_val_but_no_test(tmp_path):
    class_tree(tmp_path, ["train", "valid"], "01234", count=10)
    manifest = open_data(tmp_path)
    for record in manifest.records:
        assert (record.split == "test") == record.path.startswith("valid/")
    assert len(manifest.split("val")) == 5
    assert any("test is made from val" in note for note in manifest.notes)


def test_class_folders_without_splits(tmp_path):
    for grade in range(5):
        touch(tmp_path, *(f"{grade}/{grade}{i}.png" for i in range(20)))
    manifest = open_data(tmp_path)
    assert manifest.layout == "class_folders"
    assert Counter(record.grade for record in manifest.split("test")) == dict.fromkeys(range(5), 4)
    assert len(manifest.split("val")) == 8


@pytest.mark.parametrize(
    "names",
    [
        ["a", "b"],
        ["1", "2", "3", "4", "5"],
        ["No_DR", "DR"],
        ["0", "1", "2", "3", "4", "ungradable"],
        ["2 - mild", "0", "1"],
        ["normal", "npdr"],
        ["mild", "very severe"],
    ],
    ids=str,
)
def test_class_folders_with_other_names_are_refused_with_a_map(tmp_path, names):
    class_tree(tmp_path, ["train", "test"], names)
    with pytest.raises(InputError, match=r"name no grade.*rename.*0 \(no DR\), 1 \(mild\)"):
        open_data(tmp_path)


def test_class_folders_leave_other_photographs_out_and_say_so(tmp_path):
    class_tree(tmp_path, ["train", "test"], "01234")
    touch(tmp_path, "cover.png", "train/odd.png", "docs/figures/1.png")
    manifest = open_data(tmp_path)
    assert len(manifest.records) == 40
    assert any(note.startswith("3 photographs outside") for note in manifest.notes)


def test_class_folders_with_eyepacs_names_know_patients_and_refuse_leaks(tmp_path):
    touch(tmp_path, "train/0/10_left.jpeg", "train/2/10_right.jpeg", "test/0/11_left.jpeg")
    record = by_path(open_data(tmp_path))["train/2/10_right.jpeg"]
    assert (record.patient, record.eye, record.grade) == ("10", "right", 2)
    touch(tmp_path, "test/1/10_left.png")
    with pytest.raises(InputError, match=r"10 \(test, train\)"):
        open_data(tmp_path)


def test_class_folders_by_a_map(tmp_path):
    touch(tmp_path, "train/healthy/a.png", "train/sick/b.png", "test/healthy/c.png")
    with pytest.raises(InputError, match="--grades healthy 0"):
        open_data(tmp_path)
    manifest = open_data(tmp_path, reading=Reading(grades={"healthy": 0, "Sick": 2}))
    assert {r.path: r.grade for r in manifest.records} == {
        "train/healthy/a.png": 0,
        "train/sick/b.png": 2,
        "test/healthy/c.png": 0,
    }


def test_class_folders_0_and_1_alone_need_their_meaning_said(tmp_path):
    touch(tmp_path, "train/0/a.png", "train/1/b.png", "test/1/c.png")
    with pytest.raises(InputError, match=r"0 and 1 alone.*--grades 0 0 1 2"):
        open_data(tmp_path)
    manifest = open_data(tmp_path, reading=Reading(grades={"0": 0, "1": 2}))
    assert {r.path: r.grade for r in manifest.records} == {
        "train/0/a.png": 0,
        "train/1/b.png": 2,
        "test/1/c.png": 2,
    }
    mild = tmp_path / "mild"
    touch(mild, "train/No_DR/a.png", "train/Mild/b.png", "test/Mild/c.png")
    assert {r.grade for r in open_data(mild).records} == {0, 1}, "these names are of the scale"


def test_class_folders_one_level_deeper_are_refused(tmp_path):
    touch(tmp_path, *(f"data/{grade}/{i}.png" for grade in range(5) for i in range(2)))
    with pytest.raises(InputError, match=f"one level too high; give {tmp_path}/data"):
        open_data(tmp_path)


# --------------------------------------------------------------------------------------- any folder


def test_flat_and_nested_photographs(tmp_path):
    touch(tmp_path, *(f"{n}_left.JPG" for n in range(10)), "more/deep/x.webp", "more/notes.txt")
    touch(tmp_path, ".hidden/y.png", "__MACOSX/z.png")
    manifest = open_data(tmp_path)
    assert (manifest.layout, len(manifest.records)) == ("photographs", 11)
    assert {record.grade for record in manifest.records} == {None}
    assert by_path(manifest)["more/deep/x.webp"].patient == "x"
    assert any("no grades" in note for note in manifest.notes)


def test_photographs_in_split_folders_without_classes_keep_their_split(tmp_path):
    touch(tmp_path, "train/a.png", "train/b.png", "test/c.png")
    assert by_path(open_data(tmp_path))["test/c.png"].split == "test"


@pytest.mark.parametrize("make", ["class_folders", "manifest"])
def test_one_level_too_high_names_the_folder(tmp_path, make):
    inner = tmp_path / "inner"
    inner.mkdir()
    if make == "class_folders":
        class_tree(inner, ["train", "test"], "01")
    else:
        touch(inner, "a.png")
        write_manifest(inner, [Record("a.png", 0, "a", "", "train")])
    with pytest.raises(InputError, match=f"one level too high; give {inner}"):
        open_data(tmp_path)


def test_tables_that_no_layout_takes_are_noted(tmp_path):
    (tmp_path / "labels.csv").write_text("image,level\na,1\nb,2\n")
    touch(tmp_path, "images/a.png", "images/b.png")
    notes = open_data(tmp_path).notes
    assert "1 tables are not read; prepare_data.py --path-column would: labels.csv" in notes


# ------------------------------------------------------------------------------------------ any csv


def csv_of(root, text, *paths, name="my.csv"):
    (root / name).write_text(text)
    touch(root, *paths)


def rows_of(manifest):
    return {(record.path, record.grade, record.patient) for record in manifest.records}


def test_csv_with_named_columns(tmp_path):
    rows = ["file,dr,who", "a/1.png,0,ann", "a/2.png,4,ann", "b/1.png,2,bob", "b/2.png,,cid"]
    csv_of(tmp_path, "\n".join(rows), "a/1.png", "a/2.png", "a/3.png", "b/1.png", "b/2.png")
    for path in (tmp_path, tmp_path / "my.csv"):
        manifest = open_data(path, reading=Reading("file", "dr", "who"))
        assert manifest.layout == "csv"
        assert rows_of(manifest) == {
            ("a/1.png", 0, "ann"),
            ("a/2.png", 4, "ann"),
            ("b/1.png", 2, "bob"),
            ("b/2.png", None, "cid"),
        }


def test_csv_of_0_and_1_alone_needs_their_meaning_said(tmp_path):
    csv_of(tmp_path, "file,sick\na.png,0\nb.png,1\nc.png,\n", "a.png", "b.png", "c.png")
    with pytest.raises(InputError, match=r"my.csv: column sick.*0 and 1 alone.*--grades 0 0 1 2"):
        open_data(tmp_path, reading=Reading("file", "sick"))
    for grade in (2, 1):
        reading = Reading("file", "sick", grades={"0": 0, "1": grade})
        expected = {("a.png", 0, "a"), ("b.png", grade, "b"), ("c.png", None, "c")}
        assert rows_of(open_data(tmp_path, reading=reading)) == expected


def test_csv_with_labels_in_words(tmp_path):
    csv_of(tmp_path, "file,dr\na.png,healthy\nb.png,Severe\nc.png,4\n", "a.png", "b.png", "c.png")
    reading = Reading("file", "dr", grades={"Healthy": 0, "severe": 3})
    expected = {("a.png", 0, "a"), ("b.png", 3, "b"), ("c.png", 4, "c")}
    assert rows_of(open_data(tmp_path, reading=reading)) == expected
    with pytest.raises(InputError, match="row 2: grade is 'healthy'"):
        open_data(tmp_path, reading=Reading("file", "dr"))


def test_csv_labels_that_need_no_map_and_what_is_ungradable(tmp_path):
    labels = {"a": "No DR", "b": "Moderate", "c": "NA", "d": "4", "e": "5", "f": "2.0"}
    rows = "\n".join(f"{name}.png,{label}" for name, label in labels.items())
    csv_of(tmp_path, f"file,dr\n{rows}\n", *(f"{name}.png" for name in labels))
    with pytest.raises(InputError, match=r"row 6: grade is '5'.*--grades '5' 0, or '5' ungradable"):
        open_data(tmp_path, reading=Reading("file", "dr"))
    manifest = open_data(tmp_path, reading=Reading("file", "dr", grades={"5": None}))
    assert {(path, grade) for path, grade, _ in rows_of(manifest)} == {
        ("a.png", 0),
        ("b.png", 2),
        ("c.png", None),
        ("d.png", 4),
        ("f.png", 2),
    }
    assert "1 photographs left out, ungradable: e.png" in manifest.notes
    assert "labels read as grades: No DR = 0, Moderate = 2, 5 = ungradable" in manifest.notes
    with pytest.raises(InputError, match="--grades sik: is none of the labels of column dr"):
        open_data(tmp_path, reading=Reading("file", "dr", grades={"5": None, "sik": 2}))


def test_class_folders_of_ungradable_photographs_are_left_out(tmp_path):
    touch(tmp_path, *(f"{grade}/{grade}{i}.png" for grade in range(6) for i in range(2)))
    manifest = open_data(tmp_path, reading=Reading(grades={"5": None}))
    assert {record.grade for record in manifest.records} == {0, 1, 2, 3, 4}
    assert "2 photographs left out, ungradable: 5/50.png, 5/51.png" in manifest.notes
    with pytest.raises(InputError, match="--grades six: is none of the class folders"):
        open_data(tmp_path, reading=Reading(grades={"5": None, "six": 2}))


@pytest.mark.parametrize("column", ["Subset", "where it belongs"])
def test_csv_keeps_the_splits_of_its_column(tmp_path, column):
    splits = {"a": "training", "b": "TEST", "c": "valid", "d": "train", "e": "test"}
    rows = "\n".join(f"{name}.png,2,{split}" for name, split in splits.items())
    csv_of(tmp_path, f"file,dr,{column}\n{rows}\n", *(f"{name}.png" for name in splits))
    said = "" if column == "Subset" else column
    manifest = open_data(tmp_path, reading=Reading("file", "dr", split_column=said))
    split_of = {record.path[0]: record.split for record in manifest.records}
    assert split_of == {"a": "train", "b": "test", "c": "val", "d": "train", "e": "test"}
    assert f"splits are those of column {column} of my.csv" in manifest.notes


def test_csv_columns_that_hold_no_splits(tmp_path):
    text = "file,dr,set\na.png,0,train\nb.png,3,\nb.png,3,test\n"
    csv_of(tmp_path, text, "a.png", "b.png")
    notes = open_data(tmp_path, reading=Reading("file", "dr")).notes
    assert "column set of my.csv is not read as splits: it holds ''" in notes
    with pytest.raises(InputError, match=r"my.csv, row 3: set is ''; expected train, val or test"):
        open_data(tmp_path, reading=Reading("file", "dr", split_column="set"))
    (tmp_path / "my.csv").write_text(text.replace("3,\n", "3,val\n"))
    with pytest.raises(InputError, match=r"row 4: b.png is in val further up"):
        open_data(tmp_path, reading=Reading("file", "dr", split_column="set"))
    (tmp_path / "my.csv").write_text("file,dr,who,set\na.png,0,ann,train\nb.png,3,ann,test\n")
    with pytest.raises(InputError, match=r"1 patients are in more than one split: ann"):
        open_data(tmp_path, reading=Reading("file", "dr", "who"))


def test_csv_of_names_alone(tmp_path):
    csv_of(tmp_path, "file,dr\n1.jpg,0\n3.jpg,2\n", "a/1.png", "b/3.png")
    manifest = open_data(tmp_path, reading=Reading("file", "dr"))
    assert rows_of(manifest) == {("a/1.png", 0, "1"), ("b/3.png", 2, "3")}
    touch(tmp_path, "b/1.png")
    with pytest.raises(InputError, match=r"a/1\.png and b/1\.png have the same name"):
        open_data(tmp_path, reading=Reading("file", "dr"))


@pytest.mark.parametrize("path", ["/etc/passwd", "../x.png", "C:\\x.png"])
def test_csv_paths_never_lead_out_of_its_folder(tmp_path, path):
    csv_of(tmp_path, f"file,dr\na.png,0\n{path},1\n", "a.png")
    with pytest.raises(InputError, match=r"my\.csv, row 3: path is"):
        open_data(tmp_path, reading=Reading("file", "dr"))


def test_csv_rows_go_by_path_and_missing_ones_are_noted(tmp_path):
    """Both folders number alike: nobody gets another one's row because a file is missing."""
    rows = ["file,dr,who", "a/0.png,1,ann", "a/1.png,1,ann", "./b/0.png,2,bob", "./b/1.png,2,bob"]
    rows.append("b/2.png,2,bob")
    csv_of(tmp_path, "\n".join(rows), "a/0.png", "a/1.png", "b/0.png", "b/9.png")
    manifest = open_data(tmp_path, reading=Reading("file", "dr", "who"))
    assert rows_of(manifest) == {
        ("a/0.png", 1, "ann"),
        ("a/1.png", 1, "ann"),
        ("b/0.png", 2, "bob"),
    }
    assert "2 rows of my.csv without photograph: b/1.png, b/2.png" in manifest.notes


def test_csv_with_two_patients_for_one_photograph_is_refused(tmp_path):
    csv_of(tmp_path, "file,who\na.png,ann\nb.png,bob\na.png,cid\n", "a.png", "b.png")
    with pytest.raises(InputError, match=r"my\.csv, row 4: a\.png has patient ann further up"):
        open_data(tmp_path, reading=Reading("file", "", "who"))


def test_csv_without_a_patient_in_a_row_and_by_tabs_and_upper_case(tmp_path):
    csv_of(tmp_path, "file\tdr\twho\na.png\t1\tann\nb.png\t2\t\n", "a.png", "b.png", name="MY.CSV")
    for path in (tmp_path, tmp_path / "MY.CSV"):
        manifest = open_data(path, reading=Reading("file", "dr", "who"))
        assert rows_of(manifest) == {("a.png", 1, "ann"), ("b.png", 2, "b")}


def test_csv_with_links_out_of_its_folder_is_refused(tmp_path):
    touch(tmp_path / "secret", "s.png")
    (tmp_path / "data").mkdir()
    os.symlink(tmp_path / "secret", tmp_path / "data" / "f")
    csv_of(tmp_path / "data", "file,dr\na.png,0\nf/s.png,1\n", "a.png")
    with pytest.raises(InputError, match=r"data/f is a link out"):
        open_data(tmp_path / "data", reading=Reading("file", "dr"))


def test_a_csv_without_its_columns_named_is_refused(tmp_path):
    csv_of(tmp_path, "file,dr\na.png,0\n", "a.png")
    with pytest.raises(InputError, match=r"--path-column NAME \(of file, dr\)"):
        open_data(tmp_path / "my.csv")
    manifest = open_data(tmp_path)  # the folder: its table is told, and how to have it read
    assert "1 tables are not read; prepare_data.py --path-column would: my.csv" in manifest.notes


def test_sample_submission_beside_photographs_is_noted(tmp_path):
    touch(tmp_path, "a.png", "b.png")
    (tmp_path / "sampleSubmission.csv").write_text("image,level\na,0\nb,0\n")
    manifest = open_data(tmp_path)
    assert all(r.grade is None for r in manifest.records)
    assert any("sampleSubmission.csv is not read" in note for note in manifest.notes)
    for path in (tmp_path, tmp_path / "sampleSubmission.csv"):
        with pytest.raises(InputError, match=r"sampleSubmission\.csv: its grades are placeholders"):
            open_data(path, reading=Reading("image", "level"))
