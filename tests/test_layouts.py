"""layouts.py against folders made here, with the traps that downloaded data sets have.

Run: pytest tests/test_layouts.py
"""

import os
from collections import Counter, defaultdict
from dataclasses import replace

import pytest

from layouts import Manifest, Record, open_data, read_manifest, split_patients, write_manifest
from utils import InputError


def touch(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


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


def by_path(manifest):
    return {record.path: record for record in manifest.records}


def splits_of(records):
    return {
        name: {r.patient for r in records if r.split == name} for name in ("train", "val", "test")
    }


def assert_disjoint(records):
    patients = splits_of(records)
    total = len({record.patient for record in records})
    assert sum(map(len, patients.values())) == total


# ----------------------------------------------------------------------------------------- EyePACS


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


def test_sample_submission_is_never_read_as_labels(tmp_path):
    touch(tmp_path, "test/1_left.jpeg", "test/1_right.jpeg")
    (tmp_path / "sampleSubmission.csv").write_text("image,level\n1_left,0\n1_right,0\n")
    assert {record.grade for record in open_data(tmp_path).records} == {None}


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
    with pytest.raises(InputError, match=rf"trainLabels\.csv, row 42: level is '{level}'.*0, 1, 2"):
        open_data(tmp_path)


def test_eyepacs_row_twice(tmp_path):
    eyepacs(tmp_path)
    with (tmp_path / "trainLabels.csv").open("a") as file:
        file.write("3_left,3\n")  # the same again does no harm
    assert len(open_data(tmp_path).records) == 40
    with (tmp_path / "trainLabels.csv").open("a") as file:
        file.write("3_left,1\n")
    with pytest.raises(InputError, match="row 43: 3_left has level 3 further up"):
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


# ----------------------------------------------------------------------------------- class folders


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
    assert (manifest.layout, manifest.prepared) == ("class folders", False)
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
    assert manifest.layout == "class folders"
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


def test_numbering_per_folder_is_not_taken_for_patients(tmp_path):
    touch(tmp_path, "train/0/1.png", "train/1/1.png", "test/0/1.png", "test/1/2.png")
    patients = {record.path: record.patient for record in open_data(tmp_path).records}
    assert len(set(patients.values())) == 4
    assert patients["test/1/2.png"] == "2"


# ----------------------------------------------------------------------- photographs, wrong folders


def test_flat_and_nested_photographs(tmp_path):
    touch(tmp_path, *(f"{n}_left.JPG" for n in range(10)), "more/deep/x.webp", "more/notes.txt")
    touch(tmp_path, ".hidden/y.png", "__MACOSX/z.png")
    manifest = open_data(tmp_path)
    assert manifest.layout == "photographs" and len(manifest.records) == 11
    assert {record.grade for record in manifest.records} == {None}
    assert by_path(manifest)["more/deep/x.webp"].patient == "x"
    assert any("no grades" in note for note in manifest.notes)


def test_photographs_in_split_folders_without_classes_keep_their_split(tmp_path):
    touch(tmp_path, "train/a.png", "train/b.png", "test/c.png")
    assert by_path(open_data(tmp_path))["test/c.png"].split == "test"


def test_links_are_followed_and_do_not_go_round(tmp_path):
    touch(tmp_path / "elsewhere", "a.png", "b.png")
    (tmp_path / "data").mkdir()
    os.symlink(tmp_path / "elsewhere", tmp_path / "data" / "link")
    os.symlink(tmp_path / "data", tmp_path / "data" / "back")
    assert len(open_data(tmp_path / "data").records) == 2


@pytest.mark.parametrize("make", ["eyepacs", "class folders", "manifest"])
def test_one_level_too_high_names_the_folder(tmp_path, make):
    inner = tmp_path / "inner"
    inner.mkdir()
    if make == "eyepacs":
        eyepacs(inner, 3)
    elif make == "class folders":
        class_tree(inner, ["train", "test"], "01")
    else:
        touch(inner, "a.png")
        write_manifest(inner, [Record("a.png", 0, "a", "", "train")])
    with pytest.raises(InputError, match=f"one level too high; give {inner}"):
        open_data(tmp_path)


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
