"""prepare_data.py end to end on a small drawn data set with bad photographs in it.

Run: pytest tests/test_prepare_data.py
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import prepare_data
from fundus.adapters import LAYOUTS, layout_help
from fundus.layouts import open_data
from fundus.manifest import GRADES, read_manifest
from fundus.photographs import load_photograph, read_photograph, subtract_local_mean
from fundus.synthetic import DrawnEye, draw_photograph
from prepare_data import PrepareOptions, Task, main, prepare_photographs
from utils import InputError, Stopped, parse

SIZE = 64


def draw(path, seed, width=160, height=108):
    """A shaded, blotched disc on black, another one for every seed."""
    rng = np.random.default_rng(seed)
    blotches = Image.fromarray(rng.integers(0, 256, (12, 18), dtype=np.uint8))
    y, x = np.mgrid[:height, :width]
    radius = rng.uniform(0.36, 0.44) * height
    centre = rng.uniform(0.4, 0.6) * width
    distance = np.hypot(x - centre, y - height / 2) / radius
    light = np.where(distance < 1, rng.uniform(120, 250) * (1 - 0.4 * distance**2), 0)
    light *= 0.7 + 0.3 * np.asarray(blotches.resize((width, height), Image.BICUBIC)) / 255
    image = light[..., None] * [1, rng.uniform(0.3, 0.7), 0.3]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.astype(np.uint8)).save(path, quality=95)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """EyePACS as downloaded, 120 photographs of 60 patients, all good."""
    root = tmp_path_factory.mktemp("drawn")
    rows = ["image,level"]
    for patient in range(60):
        for eye in ("left", "right"):
            draw(root / f"train/{patient}_{eye}.jpeg", len(rows))
            rows.append(f"{patient}_{eye},{patient % 5}")
    (root / "trainLabels.csv").write_text("\n".join(rows))
    return root


@pytest.fixture
def source(drawn, tmp_path):
    return Path(shutil.copytree(drawn, tmp_path / "source"))


def prepare(source, out, **options):
    main(PrepareOptions(str(source), str(out), **({"size": SIZE, "workers": 1} | options)))
    return read_manifest(out)


def tree(root):
    """Return the files below a folder."""
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def report_of(out):
    return json.loads((out / "data_report.json").read_text())


def doubts_of(out):
    """Return the lines of each list of doubts."""
    lists = {}
    for name, entries in report_of(out)["doubts"].items():
        lists[name] = [entry["text"] for entry in entries]
    return lists


def test_prepared_pictures_are_load_photographs_up_to_jpeg(source, tmp_path):
    out = tmp_path / "out"
    manifest = prepare(source, out)
    raw = open_data(source)
    assert manifest.prepared and len(manifest.records) == 120
    for record, origin in zip(manifest.records, raw.records, strict=True):
        assert record.path == f"images/{Path(origin.path).stem}.jpg"
        assert (record.source, record.width, record.height) == (origin.path, 160, 108)
        for name in ("grade", "patient", "eye", "split"):
            assert getattr(record, name) == getattr(origin, name)
        data = (out / record.path).read_bytes()
        assert hashlib.sha256(data).hexdigest() == record.sha256
    for record in manifest.records[::20]:
        with Image.open(out / record.path) as picture:
            assert (picture.size, picture.mode, picture.format) == ((SIZE, SIZE), "RGB", "JPEG")
            assert picture.layer[0][1:3] == picture.layer[1][1:3] == (1, 1)  # 4:4:4
            got = np.array(picture).astype(float)
        expected = load_photograph(source / record.source, SIZE)
        assert np.abs(got - expected).mean() < 1.5
    assert tree(out) - {r.path for r in manifest.records} == {
        "manifest.csv",
        "data_report.json",
        "prepare.jsonl",
    }


def test_report_counts_what_there_is(source, tmp_path):
    shutil.copy(source / "train/4_left.jpeg", source / "train/59_right.jpeg")
    Image.new("RGB", (160, 108), (90, 40, 20)).save(source / "train/7_left.jpeg")
    manifest = prepare(source, tmp_path / "out")
    report = report_of(tmp_path / "out")
    for split in ("train", "val", "test"):
        records = manifest.split(split)
        line = report["splits"][split]
        assert line["images"] == len(records)
        assert line["patients"] == len({record.patient for record in records})
        grades = Counter(record.grade for record in records)
        assert line["by_grade"] == [grades[grade] for grade in range(GRADES)]
    train = report["splits"]["train"]["by_grade"]
    test = report["splits"]["test"]["by_grade"]
    assert report["splits"]["test"]["majority"] == round(test[np.argmax(train)] / sum(test), 4)
    doubts = doubts_of(tmp_path / "out")
    assert doubts["doubtful_crops"] == ["images/7_left.jpg"]
    pair = "images/4_left.jpg = images/59_right.jpg (1.00)"
    assert doubts["copies"] == [pair]
    assert doubts["copies_with_other_grades"] == []
    assert doubts["copies_of_other_patients"] == [f"{pair}: 4, 59"]
    assert doubts["copies_in_other_splits"] == []  # they are kept together
    assert doubts["blank"] == ["images/7_left.jpg"]
    assert doubts["near_black"] == []
    assert doubts["unreadable"] == []
    assert report["layout"] == "eyepacs"
    pictures = report["doubts"]["copies"][0]["pictures"]
    assert pictures == ["images/4_left.jpg", "images/59_right.jpg"]


def copy_of(path, target, kind):
    """A copy as mirrors have them: the same bytes, compressed again, half as large, brighter."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(path) as image:
        if kind == "copied":
            shutil.copy(path, target)
        elif kind == "compressed":
            image.save(target, quality=50)
        elif kind == "resized":
            image.resize((image.width * 3 // 4, image.height * 3 // 4)).save(target, quality=90)
        else:
            image.point(lambda value: min(255, int(1.15 * value))).save(target, quality=95)


def test_all_copies_under_other_patients_names_are_found_and_nothing_else(tmp_path):
    """50 planted among 150 eyes drawn as such; no patient of a copy is parted from its origin."""
    source = tmp_path / "source"
    planted = set()
    for number in range(100):
        eye = DrawnEye(f"p{number}", "left", number % 5, (77, number, 0))
        path = source / f"p{number}_left.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(draw_photograph(eye, 256)[0]).save(path, quality=92)
    for number in range(50):
        kind = ("copied", "compressed", "resized", "brighter")[number % 4]
        copy_of(source / f"p{number}_left.jpg", source / f"q{number}_left.jpg", kind)
        planted.add((f"images/p{number}_left.jpg", f"images/q{number}_left.jpg"))
    draw(source / "p0_right.jpg", 1000)  # else each photograph is its own patient
    manifest = prepare(source, tmp_path / "out", size=256)
    doubts = report_of(tmp_path / "out")["doubts"]
    assert {tuple(entry["pictures"]) for entry in doubts["copies"]} == planted
    assert len(doubts["copies_of_other_patients"]) == 50
    assert doubts["copies_in_other_splits"] == []
    split_of = {Path(record.path).stem: record.split for record in manifest.records}
    for number in range(50):
        assert split_of[f"p{number}_left"] == split_of[f"q{number}_left"]


def test_copies_in_published_splits_and_with_other_grades_are_noted(tmp_path):
    source = tmp_path / "source"
    for split, grade, seed in (("train", 0, 1), ("train", 1, 2), ("test", 0, 3), ("test", 3, 1)):
        draw(source / split / str(grade) / f"{split}{grade}.jpg", seed)
    prepare(source, tmp_path / "out")
    doubts = doubts_of(tmp_path / "out")
    pair = "images/test3.jpg = images/train0.jpg (1.00)"
    (text,) = doubts["copies_in_other_splits"]
    assert text in (f"{pair}: test, train", f"{pair}: test, val")
    assert doubts["copies_with_other_grades"] == [f"{pair}: 3, 0"]
    assert doubts["copies_of_other_patients"] == []  # nobody's names are known here


@pytest.mark.parametrize("options", [{"graham": True}, {"keep_aspect": True}, {}], ids=str)
def test_png_holds_what_was_computed(drawn, tmp_path, options):
    manifest = prepare(drawn, tmp_path / "out", image_format="png", workers=1, **options)
    record = manifest.records[5]
    with Image.open(tmp_path / "out" / record.path) as picture:
        got = np.array(picture)
        assert picture.format == "PNG" and record.path.endswith(".png")
    aspect = options.get("keep_aspect", False)
    expected = read_photograph(drawn / record.source, SIZE, keep_aspect=aspect).picture
    expected = subtract_local_mean(expected) if options.get("graham") else expected
    assert np.array_equal(got, expected)
    with pytest.raises(InputError, match="image-format = png, not jpeg"):
        prepare(drawn, tmp_path / "out", **options)


def test_folds_are_manifests_of_the_same_pictures(drawn, tmp_path):
    manifest = prepare(drawn, tmp_path / "out", folds=3)
    tested = []
    for fold in (1, 2, 3):
        rows = open_data(tmp_path / "out" / f"manifest-fold-{fold}.csv")
        assert rows.prepared and {r.path for r in rows.records} == {
            r.path for r in manifest.records
        }
        tested += [r.patient for r in rows.split("test") if r.eye == "left"]
    assert sorted(tested) == sorted({r.patient for r in manifest.records})


def test_one_bad_photograph_costs_only_itself(drawn, tmp_path):
    # 120 good ones are too few for "below 1 %", so these have more company.
    source = tmp_path / "source"
    for copy in range(2):
        shutil.copytree(drawn / "train", source / f"copy{copy}")
    (source / "copy0/5_left.jpeg").write_bytes(b"<html>403</html>")
    manifest = prepare(source, tmp_path / "out")
    assert len(manifest.records) == 239
    assert "copy0/5_left.jpeg" not in {record.source for record in manifest.records}
    doubts = doubts_of(tmp_path / "out")
    assert doubts["unreadable"] == ["copy0/5_left.jpeg is a web page, not a photograph"]


def test_many_bad_photographs_are_an_error_after_all_good_ones(source, tmp_path):
    data = (source / "train/1_left.jpeg").read_bytes()
    (source / "train/1_left.jpeg").write_bytes(data[: len(data) // 2])
    (source / "train/2_left.jpeg").write_bytes(b"")
    with pytest.raises(InputError, match=r"2 of 120 photographs cannot be used"):
        prepare(source, tmp_path / "out")
    assert len(read_manifest(tmp_path / "out").records) == 118
    doubts = doubts_of(tmp_path / "out")
    assert [line.split()[0] for line in doubts["unreadable"]] == [
        "train/1_left.jpeg",
        "train/2_left.jpeg",
    ]
    # One of 120 is below 1 %.
    assert len(prepare(source, tmp_path / "out", allow_truncated=True).records) == 119
    with pytest.raises(InputError, match="2 of 120"):  # what was allowed then is not now
        prepare(source, tmp_path / "out")
    (source / "train/1_left.jpeg").write_bytes(data)  # mended
    shutil.copy(source / "train/3_left.jpeg", source / "train/2_left.jpeg")
    assert len(prepare(source, tmp_path / "out").records) == 120


def test_a_data_set_of_bad_photographs_alone_is_a_message(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for number in range(3):
        (source / f"{number}.jpg").write_bytes(b"<html>403</html>")
    with pytest.raises(InputError, match="3 of 3 photographs cannot be used"):
        prepare(source, tmp_path / "out")


def test_a_photograph_replaced_by_one_of_its_size_is_prepared_again(source, tmp_path):
    first, other = source / "train/1_left.jpeg", source / "train/2_left.jpeg"
    one, two = first.read_bytes(), other.read_bytes()
    size = max(len(one), len(two))
    first.write_bytes(one + bytes(size - len(one)))
    before = {r.source: r.sha256 for r in prepare(source, tmp_path / "out").records}
    first.write_bytes(two + bytes(size - len(two)))
    after = {r.source: r.sha256 for r in prepare(source, tmp_path / "out").records}
    changed = {path for path in after if after[path] != before[path]}
    assert changed == {"train/1_left.jpeg"}
    assert after["train/1_left.jpeg"] == after["train/2_left.jpeg"]


def test_a_second_run_keeps_what_is_finished(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    prepare(source, out)
    before = {path: (out / path).stat().st_mtime_ns for path in tree(out)}
    redone = []
    once = prepare_data.prepare_photograph
    monkeypatch.setattr(
        prepare_data, "prepare_photograph", lambda task: redone.append(task.path) or once(task)
    )
    prepare(source, out)
    assert redone == []
    (out / "images/1_left.jpg").unlink()
    (out / "images/2_left.jpg").write_bytes(b"half a pict")
    draw(source / "train/3_left.jpeg", 999)  # another photograph under the same name
    manifest = prepare(source, out)
    assert sorted(redone) == [f"train/{n}_left.jpeg" for n in (1, 2, 3)]
    for record in manifest.records:
        data = (out / record.path).read_bytes()
        assert hashlib.sha256(data).hexdigest() == record.sha256
    assert (out / "images/9_left.jpg").stat().st_mtime_ns == before["images/9_left.jpg"]


def test_stopping_leaves_a_state_from_which_the_next_run_goes_on(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    started = []
    once = prepare_data.prepare_photograph

    def stop_at_40(task):
        started.append(task.path)
        if len(started) == 40:
            raise KeyboardInterrupt
        return once(task)

    monkeypatch.setattr(prepare_data, "prepare_photograph", stop_at_40)
    with pytest.raises(Stopped, match="same command"):
        prepare(source, out)
    assert not (out / "manifest.csv").exists()
    assert len(list((out / "images").iterdir())) == 39
    with (out / "prepare.jsonl").open("a") as journal:
        journal.write('{"path": "train/4')  # as a lost machine leaves it
    prepare(source, out)
    assert len(started) == 40 + 81
    monkeypatch.undo()
    whole = prepare(source, tmp_path / "other")
    assert read_manifest(out).records == whole.records


def test_another_size_or_a_foreign_folder_is_refused(source, tmp_path):
    prepare(source, tmp_path / "out")
    with pytest.raises(InputError, match=f"size = {SIZE}, not 32; give a new folder"):
        prepare(source, tmp_path / "out", size=32)
    (tmp_path / "foreign" / "images").mkdir(parents=True)
    with pytest.raises(InputError, match="holds other data"):
        prepare(source, tmp_path / "foreign")
    for inside in (source, source / "train" / "out"):
        with pytest.raises(InputError, match="lie in each other"):
            prepare(source, inside)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"size": 8}, "--size 8: expected"),
        ({"size": 10**19}, "--size 10000000000000000000: expected"),
        ({"workers": -1}, "--workers -1: expected"),
        ({"folds": 1}, "--folds 1: expected 2 or more"),
        ({"folds": -2}, "--folds -2: expected"),
        ({"grade_column": "dr"}, "--path-column"),
        ({"patient_column": "id"}, "--path-column"),
        ({"split_column": "set"}, "--split-column: needs --path-column"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        PrepareOptions("a", "b", **options)


def test_help_and_choices_of_layout_are_the_registry(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    arguments = ["--source", "a", "--out", "b", "--layout"]
    for name in ("auto", *LAYOUTS):
        assert parse(PrepareOptions, [*arguments, name])[0].layout == name
    with pytest.raises(SystemExit) as caught:
        parse(PrepareOptions, [*arguments, "messidor3"])
    assert caught.value.code == 2
    refusal = "".join(capsys.readouterr())
    assert "invalid choice 'messidor3'" in refusal
    assert "'messidor2'" in refusal
    with pytest.raises(SystemExit):
        parse(PrepareOptions, ["--help"])
    assert layout_help() in capsys.readouterr().out


def test_an_output_that_cannot_be_written_is_an_input_error(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written.*Not a directory"):
        prepare(source, tmp_path / "file" / "out")


def test_a_manifest_written_by_hand_is_prepared_with_its_splits(drawn, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(drawn / "train", source / "raw")
    rows = ["path,grade,patient,eye,split"]
    for number, split in enumerate(["train"] * 3 + ["val", "test"]):
        rows.append(f"raw/{number}_left.jpeg,{number},clinic-{number},,{split}")
    (source / "manifest.csv").write_text("\n".join(rows))
    records = prepare(source, tmp_path / "out").records
    assert [(r.patient, r.split, r.grade) for r in records] == [
        (f"clinic-{n}", split, n) for n, split in enumerate(["train"] * 3 + ["val", "test"])
    ]


def tasks_of(source, out, count=6):
    paths = sorted((source / "train").iterdir())[:count]
    return [Task(path.name, path, out / f"{path.stem}.jpg", SIZE) for path in paths]


def test_processes_side_by_side_give_the_same_pictures(drawn, tmp_path):
    one = {f["path"]: f for f in prepare_photographs(tasks_of(drawn, tmp_path / "1"), 1)}
    two = {f["path"]: f for f in prepare_photographs(tasks_of(drawn, tmp_path / "2"), 2)}
    for facts in (*one.values(), *two.values()):
        assert facts.pop("target_ns") > 0
    assert one == two and len(one) == 6
    assert all(len(facts["sha256"]) == 64 for facts in one.values())


def kill_worker(task):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_killed_worker_is_reported_and_not_waited_for(drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "prepare_photograph", kill_worker)
    with pytest.raises(InputError, match="fewer --workers"):
        list(prepare_photographs(tasks_of(drawn, tmp_path), 2))


def count_lines(file):
    if not file.exists():
        return 0
    return len(file.read_text().splitlines())


@pytest.mark.skipif(os.name == "nt", reason="signals as on POSIX")
def test_the_command_stops_on_a_signal_and_goes_on(drawn, tmp_path):
    source = tmp_path / "source"
    for copy in range(4):
        shutil.copytree(drawn / "train", source / f"copy{copy}")
    out = tmp_path / "out"
    script = Path(prepare_data.__file__)
    command = [sys.executable, str(script), "--source", str(source), "--out", str(out)]
    command += ["--size", "256", "--workers", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path}
    process = subprocess.Popen(command, **pipes)
    limit = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < limit:
        if count_lines(out / "prepare.jsonl") > 20:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "the same command goes on" in errors
    assert "Traceback" not in errors
    done = count_lines(out / "prepare.jsonl") - 1
    assert 0 < done < 480
    again = subprocess.run(command, **pipes, timeout=120)
    assert again.returncode == 0, again.stderr
    assert f"{done} of them finished" in again.stdout
    assert "480 pictures" in again.stdout
    assert len(read_manifest(out).records) == 480


def test_preparing_imports_no_torch():
    code = "import prepare_data, sys; assert not {'torch', 'timm', 'torchvision'} & {*sys.modules}"
    folder = Path(prepare_data.__file__).parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder)


# ------------------------------------------------------------- folders that are not one's own


def test_another_data_set_never_takes_a_prepared_folder(source, tmp_path):
    out = tmp_path / "out"
    before = prepare(source, out).records
    for number in range(3):
        draw(tmp_path / "other" / f"{number}_left.jpg", 500 + number)
    with pytest.raises(InputError, match="of 120 photographs prepared in it, 0 are those"):
        prepare(tmp_path / "other", out)
    for inside in (out, out / "images"):
        with pytest.raises(InputError, match="is prepared already|lie in each other"):
            prepare(inside, out)
    with pytest.raises(InputError, match="is prepared already"):
        prepare(out, tmp_path / "again")
    assert read_manifest(out).records == before
    assert prepare(source, out).records == before  # its own data set goes on
    for path in list((source / "train").glob("1*_left.jpeg")):  # with some taken away
        path.unlink()
    assert len(prepare(source, out).records) == 109


def test_a_folder_that_another_process_prepares_is_refused(source, tmp_path):
    out = tmp_path / "out"
    with prepare_data.locked(out), pytest.raises(InputError, match="another process"):
        prepare(source, out)
    prepare(source, out)


@pytest.mark.parametrize("damage", [b"\xff\xfe\x80", b"5\n[]\n", b'{"path'])
def test_a_damaged_journal_costs_only_what_it_lost(source, tmp_path, damage):
    out = tmp_path / "out"
    records = prepare(source, out).records
    journal = out / "prepare.jsonl"
    first, *others = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(first + damage + b"\n" + b"".join(others[:100]))
    assert prepare(source, out).records == records


def test_a_damaged_picture_is_prepared_again(source, tmp_path):
    shutil.copy(source / "train/4_left.jpeg", source / "train/59_right.jpeg")  # in a pair of copies
    out = tmp_path / "out"
    prepare(source, out)
    victim = out / "images/4_left.jpg"
    data = victim.read_bytes()
    victim.write_bytes(bytes(len(data)))
    prepare(source, out)
    assert victim.read_bytes() == data


def test_too_many_folds_are_refused_before_any_work(source, tmp_path):
    with pytest.raises(InputError, match="--folds 61: expected 2 to 60"):
        prepare(source, tmp_path / "out", folds=61)
    assert not (tmp_path / "out").exists()


def test_folds_of_an_earlier_run_do_not_stay(source, tmp_path):
    out = tmp_path / "out"
    for folds, count in ((5, 5), (3, 3), (0, 0)):
        prepare(source, out, folds=folds)
        assert len(list(out.glob("manifest-fold-*.csv"))) == count


@pytest.mark.parametrize("graham", [False, True])
def test_copies_stay_in_one_fold_also_where_pictures_are_grahams(tmp_path, graham):
    source = tmp_path / "source"
    for number in range(12):
        eye = DrawnEye(f"p{number}", "left", number % 5, (78, number, 0))
        source.mkdir(exist_ok=True)
        path = source / f"a{number}.jpg"
        Image.fromarray(draw_photograph(eye, 256)[0]).save(path, quality=92)
        copy_of(path, source / f"b{number}.jpg", "compressed")
    prepare(source, tmp_path / "out", size=128, folds=4, graham=graham)
    assert len(report_of(tmp_path / "out")["doubts"]["copies"]) == 12
    for fold in range(1, 5):
        manifest = read_manifest(tmp_path / "out", f"manifest-fold-{fold}.csv")
        split_of = {record.source: record.split for record in manifest.records}
        for number in range(12):
            assert split_of[f"a{number}.jpg"] == split_of[f"b{number}.jpg"]


def test_what_is_missing_is_noted_before_preparing_and_listed_whole(source, tmp_path, caplog):
    caplog.set_level("INFO", logger="ssrl")
    gone = [source / f"train/{n}_left.jpeg" for n in range(10)]
    for path in gone:
        path.unlink()
    draw(source / "train/492_right.jpeg", 7)
    with (source / "trainLabels.csv").open("a") as labels:
        labels.write("\n492_right,0")
    prepare(source, tmp_path / "out")
    text = caplog.text
    assert text.index("10 rows of trainLabels.csv without photograph") < text.index("0 of them")
    doubts = report_of(tmp_path / "out")["doubts"]
    lost = [entry["text"] for entry in doubts["rows of trainLabels.csv without photograph"]]
    assert sorted(lost) == sorted(path.stem for path in gone)
    (known,) = doubts["photographs are known to be black or unusable, and kept"]
    assert known["pictures"] == ["images/492_right.jpg"]


def test_cut_off_photographs_that_are_taken_are_listed(source, tmp_path):
    path = source / "train/1_left.jpeg"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 4])
    prepare(source, tmp_path / "out", allow_truncated=True)
    doubts = doubts_of(tmp_path / "out")
    assert doubts["truncated"] == ["images/1_left.jpg"]
    assert doubts["unreadable"] == []


def test_one_in_a_hundred_is_too_many(drawn, tmp_path):
    source = tmp_path / "source"
    for copy in range(2):
        shutil.copytree(drawn / "train", source / f"copy{copy}")
    for number, path in enumerate(sorted(source.rglob("*.jpeg"))):
        if number >= 200:
            path.unlink()
    bad = [source / "copy0/5_left.jpeg", source / "copy0/6_left.jpeg"]
    bad[0].write_bytes(b"")
    assert len(prepare(source, tmp_path / "out").records) == 199
    bad[1].write_bytes(b"")
    with pytest.raises(InputError, match="2 of 200 photographs cannot be used"):
        prepare(source, tmp_path / "out")


@pytest.mark.skipif(os.name == "nt", reason="signals as on POSIX")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_no_traceback_whenever_it_comes(drawn, tmp_path, monkeypatch, number, handlers):
    def interrupted(*_):
        signal.raise_signal(number)

    monkeypatch.setattr(prepare_data.copies, "find_copies", interrupted)
    with pytest.raises(Stopped, match="same command"):
        prepare(drawn, tmp_path / "out")
