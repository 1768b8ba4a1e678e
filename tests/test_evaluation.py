"""evaluation.py: which features are cached, which folders are written, what test sets may be.

Run it with `python -m pytest tests/test_evaluation.py`.
"""

import csv
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluation
from augment import PaperView, ProbeView, WholeView
from data import PhotographDataset, grades_of, patients_of
from evaluation import (
    Evaluation,
    GradedSet,
    Outcome,
    cached_features,
    check_results,
    check_unseen,
    choose_image_size,
    evaluate_all,
    open_evaluation,
    open_test_sets,
    open_weights,
    training_records,
    validation_records,
    write_results,
)
from features import extract_features, sign_photographs
from fundus.manifest import GRADES, Manifest, Record, read_manifest, write_manifest
from fundus.metrics import Predictions
from fundus.splits import fold_splits
from fundus.tables import describe_data
from utils import InputError, sha256_of
from vision_transformer import BackboneSpec
from weights import Weights, load_backbone, read_weights, save_backbone


@dataclass(frozen=True)
class Options:
    """What the functions here read of a script's options."""

    pretrained: str = ""
    checkpoint_key: str = "teacher"
    arch: str = ""
    data: str = ""
    output_dir: str = ""
    overwrite: bool = False
    device: str = "cpu"
    precision: str = "fp32"
    workers: int = 0
    image_size: int = 0
    protocol: str = "whole"
    seed: int = 0
    test_data: tuple[str, ...] = ()
    folds: bool = False
    pictures: bool = True
    allow_seen: bool = False
    follow_links: bool = False
    features: str = "backbone"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return helpers.draw_prepared(tmp_path_factory.mktemp("prepared") / "set")


# ---------------------------------------------------------------------------------- the cache


@pytest.fixture
def extractions(monkeypatch):
    """A list that grows by one whenever features are extracted rather than read."""
    calls = []

    def counted(backbone, dataset, dtype, workers, title):
        calls.append((dataset.view, dataset.seed))
        return extract_features(backbone, dataset)  # in fp32, since not every CPU can do more

    monkeypatch.setattr(evaluation, "extract_features", counted)
    return calls


def test_features_are_cached(tmp_path, manifest, extractions):
    records = manifest.split("val")
    opened = helpers.evaluation(Options(), manifest, tmp_path / "knn")
    first = cached_features(opened, manifest, records, WholeView(32))
    again = cached_features(opened, manifest, records, WholeView(32))
    assert len(extractions) == 1
    for name, values in first.items():
        assert torch.equal(values, again[name])
    assert first["look"].shape == (10, 4096), "by which copies are found"
    (name,) = cached_features(opened, manifest, records, WholeView(32), names=("cls",))
    assert name == "cls"

    beside = helpers.evaluation(Options(), manifest, tmp_path / "linear")
    cached_features(beside, manifest, records, WholeView(32))
    assert len(extractions) == 1, "evaluations of one run share the cache"


def test_features_of_other_weights_are_others(tmp_path, manifest, extractions):
    records = manifest.split("val")
    opened = helpers.evaluation(Options(), manifest, tmp_path / "knn")
    first = cached_features(opened, manifest, records, WholeView(32))
    other = helpers.evaluation(Options(), manifest, tmp_path / "knn", seed=1)
    changed = cached_features(other, manifest, records, WholeView(32))
    assert len(extractions) == 2
    assert not torch.equal(changed["cls"], first["cls"])
    assert torch.equal(changed["color"], first["color"])


def with_weights(opened, **changed):
    """Return the evaluation with something else known of its weights."""
    return replace(opened, weights=replace(opened.weights, **changed))


def test_whatever_changes_features_makes_new_ones(tmp_path, manifest, extractions):
    opened = helpers.evaluation(Options(), manifest, tmp_path / "knn")
    records = manifest.split("val")
    exchanged = [replace(records[0], sha256="another picture"), *records[1:]]
    whole = WholeView(32)
    crop = ProbeView(32)
    heads = with_weights(opened, spec=replace(helpers.PICO, arch="vit_pico_of_other_heads"))
    colors = with_weights(opened, spec=replace(helpers.PICO, mean=(0.0, 0.0, 0.0)))
    variants = [
        (opened, records, whole, 0),
        (opened, records, WholeView(64), 0),
        (opened, records, PaperView(), 0),
        (opened, records, crop, 0),
        (opened, records, crop, 1),
        (opened, records, ProbeView(32, flip_vertical=True), 0),
        (opened, records, ProbeView(32, rotation=90.0), 0),
        (opened, records[1:], whole, 0),
        (opened, records[::-1], whole, 0),
        (opened, exchanged, whole, 0),
        (replace(opened, dtype=torch.bfloat16), records, whole, 0),
        (with_weights(opened, network="student"), records, whole, 0),
        (heads, records, whole, 0),
        (colors, records, whole, 0),
    ]
    for _ in range(2):
        for number, (changed, rows, view, seed) in enumerate(variants):
            cached_features(changed, manifest, rows, view, seed)
            assert len(extractions) == number + 1 or len(extractions) == len(variants), number


def test_a_file_without_checksum_is_known_by_its_time_and_place(tmp_path, extractions):
    manifest = helpers.draw_prepared(tmp_path / "set")
    bare = [replace(record, sha256="") for record in manifest.split("val")]
    opened = helpers.evaluation(Options(), manifest, tmp_path / "knn")
    cached_features(opened, manifest, bare, WholeView(32))
    cached_features(opened, manifest, bare, WholeView(32))
    assert len(extractions) == 1
    shutil.copy(manifest.root / bare[1].path, manifest.root / bare[0].path)
    cached_features(opened, manifest, bare, WholeView(32))
    assert len(extractions) == 2


def test_a_damaged_cache_is_made_anew(tmp_path, manifest, extractions, caplog):
    opened = helpers.evaluation(Options(), manifest, tmp_path / "knn")
    records = manifest.split("val")
    first = cached_features(opened, manifest, records, WholeView(32))
    (path,) = (tmp_path / "features").iterdir()
    path.write_bytes(path.read_bytes()[:50])
    again = cached_features(opened, manifest, records, WholeView(32))
    assert len(extractions) == 2 and torch.equal(first["cls"], again["cls"])
    assert f"{path}: is damaged" in caplog.text
    cached_features(opened, manifest, records, WholeView(32))
    assert len(extractions) == 2


def features_of(source, manifest, output, **options):
    """Return the [CLS] of val by a file of weights, and the backbone."""
    weights = read_weights(str(source), options.get("checkpoint_key", "teacher"))
    backbone = load_backbone(weights)
    opened = Evaluation(Options(**options), weights, backbone, None, output, manifest, 32)
    features = cached_features(opened, manifest, manifest.split("val"), WholeView(32))
    return features["cls"], backbone


def test_student_and_teacher_of_a_checkpoint_do_not_share_features(tmp_path, manifest):
    path = tmp_path / "checkpoint.pth"
    both = {"teacher": helpers.pico(0).state_dict(), "student": helpers.pico(1).state_dict()}
    torch.save(both, path)
    teacher, _ = features_of(path, manifest, tmp_path / "knn")
    student, backbone = features_of(path, manifest, tmp_path / "knn", checkpoint_key="student")
    dataset = PhotographDataset(manifest, manifest.split("val"), WholeView(32))
    assert torch.equal(student, extract_features(backbone, dataset)["cls"])
    assert not torch.equal(student, teacher)


def test_random_weights_are_the_same_each_time():
    first = read_weights("none")
    second = read_weights("none")
    assert first.sha256 == second.sha256, "so their features may be cached"
    for name, values in first.state.items():
        assert torch.equal(values, second.state[name])


# ----------------------------------------------------------------------------- weights and output


@pytest.mark.parametrize(
    "path, run, folder",
    [
        ("runs/a/backbone.safetensors", "runs/a", "runs/a/knn"),
        ("runs/a/checkpoint-0040.pth", "runs/a", "runs/a/knn-0040"),
        ("weights/dino.pth", None, "runs/dino-01234567/knn"),
        ("weights/checkpoint-0040.pth", None, "runs/checkpoint-0040-01234567/knn"),
        ("timm:vit_tiny_patch16_224", None, "runs/timm-vit_tiny_patch16_224-01234567/knn"),
    ],
)
def test_output_folder_belongs_to_the_weights(path, run, folder, monkeypatch):
    weights = Weights({}, helpers.PICO, path, "0123456789abcdef", run and Path(run), {})
    monkeypatch.setattr(evaluation, "read_weights", lambda *_, **__: weights)
    assert open_weights(Options(pretrained=path), "knn") == (weights, Path(folder))
    named = open_weights(Options(pretrained=path, output_dir="elsewhere"), "knn")
    assert named == (weights, Path("elsewhere"))


def test_what_the_user_says_of_the_weights_is_passed_on(monkeypatch):
    asked = []

    def read(source, checkpoint_key, *, arch):
        asked.append((source, checkpoint_key, arch))
        return Weights({}, helpers.PICO, source, "0" * 64)

    monkeypatch.setattr(evaluation, "read_weights", read)
    open_weights(Options("a.pth", "student", "vit_small_h12"), "knn")
    assert asked == [("a.pth", "student", "vit_small_h12")]


def test_image_sizes_of_the_protocols():
    spec = BackboneSpec("vit_pico", 14, 518)
    assert choose_image_size(Options(), spec) == 518
    assert choose_image_size(Options(image_size=28), spec) == 28
    assert choose_image_size(Options(protocol="paper"), spec) == 224
    with pytest.raises(InputError, match="--image-size 30: .* patch size 14, such as 28"):
        choose_image_size(Options(image_size=30), spec)
    with pytest.raises(InputError, match="--image-size 3: .* such as 14"):
        choose_image_size(Options(image_size=3), spec)
    with pytest.raises(InputError, match="--protocol paper"):
        choose_image_size(Options(protocol="paper"), replace(spec, patch_size=15))


def test_an_evaluation_opens_weights_data_and_output(tmp_path, manifest):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("seed: 0\n")
    save_backbone(helpers.pico(), run / "backbone.safetensors", {"data": str(manifest.root)})
    opened = open_evaluation(Options(pretrained=str(run)), "knn")
    assert opened.output == run / "knn"
    assert opened.manifest.fingerprint == manifest.fingerprint
    assert opened.image_size == 32
    assert opened.dtype is None
    expected = helpers.pico().state_dict()
    for name, values in opened.backbone.state_dict().items():
        assert torch.equal(values, expected[name])
    assert not opened.backbone.training

    named = open_evaluation(Options(pretrained=str(run), image_size=64, protocol="paper"), "knn")
    assert named.image_size == 224


def test_weights_of_no_run_need_data(tmp_path, manifest):
    path = tmp_path / "alone.safetensors"
    save_backbone(helpers.pico(), path, {})
    with pytest.raises(InputError, match="add --data"):
        open_evaluation(Options(pretrained=str(path)), "knn")
    opened = open_evaluation(Options(pretrained=str(path), data=str(manifest.root)), "knn")
    assert opened.manifest.root == manifest.root


def test_data_of_a_run_that_have_moved_are_named_anew(tmp_path, manifest):
    path = tmp_path / "backbone.safetensors"
    save_backbone(helpers.pico(), path, {"data": "/gone/set"})
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(InputError, match="learned from /gone/set, which is not there.*--data F"):
        open_evaluation(Options(pretrained=str(tmp_path)), "knn")
    opened = open_evaluation(Options(pretrained=str(tmp_path), data=str(manifest.root)), "knn")
    assert opened.manifest.root == manifest.root


def test_the_published_protocol_learns_from_val_too(tmp_path, manifest):
    whole = helpers.evaluation(Options(), manifest, tmp_path)
    assert training_records(whole) == manifest.split("train")
    assert validation_records(whole) == manifest.split("val")
    paper = helpers.evaluation(Options(protocol="paper"), manifest, tmp_path)
    assert training_records(paper) == manifest.split("train") + manifest.split("val")
    assert validation_records(paper) == []


# ----------------------------------------------------------------------------------------- results


def write_random_results(output, manifest, records):
    """Write the results of random predictions; return results.json, predictions.csv and them."""
    shares = np.random.default_rng(0).dirichlet(np.ones(GRADES), len(records))
    predictions = Predictions(
        grades_of(records), shares.argmax(axis=1), shares, patients_of(records)
    )
    opened = helpers.evaluation(Options(), manifest, output)
    test_set = GradedSet("", manifest, records)
    train_grades = grades_of(manifest.split("train"))
    outcome = Outcome(
        test_set,
        predictions,
        train_grades,
        validation=predictions,
        validation_records=records,
        thresholded=(np.array([0.5, 1.5, 2.5, 3.5]), predictions.predicted[::-1]),
        details={"by_k": []},
    )
    write_results(opened, "15-NN", outcome, seen=["a.png = b.png"])
    results = json.loads((output / "results.json").read_text())
    with (output / "predictions.csv").open(newline="") as file:
        return results, list(csv.DictReader(file)), predictions


def test_results_json_says_what_was_evaluated(tmp_path, manifest, capsys):
    results, _, predictions = write_random_results(tmp_path, manifest, manifest.split("test"))
    keys = "protocol settings data majority metrics patients thresholded confusion reliability"
    assert list(results) == f"{keys} validation by_k seen backbone versions command".split()
    assert results["settings"] == {
        "image_size": 32,
        "precision": "float32",
        "protocol": "whole",
        "seed": 0,
        "folds": False,
        "features": "backbone",
    }
    assert results["seen"] == {"allowed": True, "photographs": ["a.png = b.png"]}
    assert results["backbone"] == {
        "path": "pico0.pth",
        "sha256": "sha-0",
        "network": "",
        "arch": "vit_pico",
        "patch_size": 16,
    }
    assert results["data"]["fingerprint"] == manifest.fingerprint
    assert results["data"]["test"] == {"images": 10, "patients": 5, "by_grade": [2] * GRADES}
    assert results["majority"]["accuracy"] == pytest.approx(0.2)
    right = np.mean(predictions.grades == predictions.predicted)
    assert results["metrics"]["accuracy"]["value"] == pytest.approx(right)
    assert results["metrics"]["accuracy"]["ci95"] is None, "of five patients"
    assert "5 patients" in results["metrics"]["accuracy"]["no_interval"]
    assert np.trace(results["confusion"]) == right * 10
    printed = capsys.readouterr().out
    assert f"\n15-NN, 10 test photographs, {tmp_path}\n" in printed
    assert f"{right:.3f}" in printed
    for name in ("confusion", "roc", "reliability"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.format == "PNG"


def test_predictions_csv_holds_every_prediction(tmp_path, manifest):
    records = manifest.split("test")
    _, rows, predictions = write_random_results(tmp_path, manifest, records)
    assert ",".join(rows[0]) == "path,patient,eye,grade,prediction,p0,p1,p2,p3,p4,thresholded"
    read = [int(row["thresholded"]) for row in rows]
    assert read == predictions.predicted[::-1].tolist()
    for row, record, shares in zip(rows, records, predictions.probabilities, strict=True):
        assert (row["path"], row["patient"]) == (record.path, record.patient)
        assert (row["eye"], int(row["grade"])) == (record.eye, record.grade)
        assert int(row["prediction"]) == shares.argmax()
        written = [float(row[f"p{grade}"]) for grade in range(GRADES)]
        assert written == shares.tolist(), "to the last bit"


def test_predictions_keep_commas_and_quotes_in_names(tmp_path, manifest):
    records = []
    for record in manifest.split("test"):
        records.append(replace(record, path=f'a, "b"/{record.path}', patient="x,y"))
    _, rows, predictions = write_random_results(tmp_path, manifest, records)
    assert [row["path"] for row in rows] == [record.path for record in records]
    assert [int(row["prediction"]) for row in rows] == predictions.predicted.tolist()


def test_results_of_something_else_are_not_replaced(tmp_path, manifest):
    write_random_results(tmp_path, manifest, manifest.split("test"))
    opened = helpers.evaluation(Options(), manifest, tmp_path)
    own = GradedSet("", manifest, manifest.split("test"))
    check_results(opened, [own], "15-NN")
    check_results(opened, [replace(own, name="elsewhere")], "linear probe")

    other = helpers.regraded(manifest, "test", 4)
    changes = [
        (opened, own, "15-NN, the paper's view"),
        (with_weights(opened, sha256="another file"), own, "15-NN"),
        (with_weights(opened, network="student"), own, "15-NN"),
        (with_weights(opened, spec=BackboneSpec("vit_nano", 16, 32)), own, "15-NN"),
        (replace(opened, manifest=other), replace(own, manifest=other), "15-NN"),
        (opened, replace(own, manifest=other), "15-NN"),
        (replace(opened, image_size=64), own, "15-NN"),
        (replace(opened, options=Options(seed=1)), own, "15-NN"),
    ]
    for changed, test_set, protocol in changes:
        with pytest.raises(InputError, match=r"results\.json: .*--overwrite"):
            check_results(changed, [test_set], protocol)
        insisting = replace(changed, options=Options(overwrite=True))
        check_results(insisting, [test_set], protocol)
    moved = replace(opened, options=Options(workers=3, device="cuda", pictures=False))
    check_results(moved, [own], "15-NN")  # none of these changes a number
    with pytest.raises(InputError, match=r"other settings \(seed 0, now 7\)"):
        check_results(replace(opened, options=Options(seed=7)), [own], "15-NN")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"backbone": 1}', '"text"'])
def test_a_damaged_file_is_not_replaced(tmp_path, manifest, text):
    (tmp_path / "results.json").write_text(text)
    opened = helpers.evaluation(Options(), manifest, tmp_path)
    with pytest.raises(InputError, match="--overwrite"):
        check_results(opened, [GradedSet("", manifest, [])], "15-NN")


# ------------------------------------------------------------------------------------------- sets


def test_the_data_are_described_by_their_counts(prepared):
    manifest = read_manifest(prepared)
    ungraded = replace(manifest.split("test")[0], grade=None)
    other = replace(manifest, root=Path("other"), records=(ungraded,))
    own = describe_data(manifest, manifest, manifest.split("test"))
    assert list(own) == ["path", "fingerprint", "train", "val", "test"]
    assert own["path"] == prepared.name
    assert own["fingerprint"] == manifest.fingerprint
    assert own["train"] == {"images": 40, "patients": 20, "by_grade": [8] * GRADES}
    assert own["test"] == {"images": 10, "patients": 5, "by_grade": [2] * GRADES}
    assert own["val"] == own["test"]

    further = describe_data(manifest, other, [ungraded])
    assert further["test_path"] == "other"
    assert further["test_fingerprint"] == other.fingerprint
    assert further["train"] == own["train"]
    assert further["test"] == {"images": 1, "patients": 1, "by_grade": [0] * GRADES}


def copy_set(folder, source, records, tint=0):
    """Write a prepared folder of some records; `tint` changes the files."""
    (folder / "images").mkdir(parents=True)
    copied = []
    for record in records:
        target = folder / record.path
        if tint:
            with Image.open(source / record.path) as picture:
                pixels = np.asarray(picture) ^ np.uint8(tint)
            Image.fromarray(pixels).save(target)
            record = replace(record, sha256=sha256_of(target))
        else:
            shutil.copy(source / record.path, target)
        copied.append(record)
    write_manifest(folder, copied)
    return folder


def test_another_set_is_tested_on_whole(prepared, tmp_path):
    manifest = read_manifest(prepared)
    other = copy_set(tmp_path / "other", prepared, manifest.records[:6], tint=1)
    own, further = open_test_sets(manifest, [str(other)])
    assert (own.name, own.manifest, own.records) == ("", manifest, manifest.split("test"))
    assert (further.name, further.manifest.root) == ("other", other)
    assert len(further.records) == 6


def learnt(opened):
    return [training_records(opened), validation_records(opened)]


def test_photographs_that_a_method_learns_from_are_not_tested_on(prepared, tmp_path, extractions):
    manifest = read_manifest(prepared)
    opened = helpers.evaluation(Options(), manifest, tmp_path / "knn")
    tested = copy_set(tmp_path / "tested", prepared, manifest.split("test"))
    sets = open_test_sets(manifest, [str(tested)])
    assert check_unseen(opened, sets, learnt(opened)) == {"": [], "tested": []}

    extractions.clear()
    mixed = copy_set(tmp_path / "mixed", prepared, manifest.records[39:])
    sets = open_test_sets(manifest, [str(mixed)])
    with pytest.raises(InputError, match=r"mixed: 11 .* = .*, \.\.\.; .*--allow-seen"):
        check_unseen(opened, sets, learnt(opened))
    assert not extractions, "equal files are found before any work"
    allowed = replace(opened, options=Options(allow_seen=True))
    shared = check_unseen(allowed, sets, learnt(opened))
    assert shared[""] == []
    assert len(shared["mixed"]) == 11
    assert all(pair.split(" = ")[0] == pair.split(" = ")[1] for pair in shared["mixed"])


def test_equal_files_are_found_where_the_manifest_has_no_checksums(prepared, tmp_path):
    manifest = read_manifest(prepared)
    bare = tuple(replace(record, sha256="") for record in manifest.records)
    mixed = copy_set(tmp_path / "mixed", prepared, bare)
    opened = helpers.evaluation(Options(), replace(manifest, records=bare), tmp_path / "knn")
    with pytest.raises(InputError, match="mixed: 50 of its photographs"):
        check_unseen(opened, open_test_sets(opened.manifest, [str(mixed)]), learnt(opened))


@pytest.fixture
def drawn_run(tmp_path):
    """A run that remembers its training photographs, drawn ones, and their prepared folder."""
    drawn = data.open_manifest("synthetic:24")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("seed: 0\n")
    save_backbone(helpers.pico(), run / "backbone.safetensors", {"data": str(drawn.root)})
    sign_photographs(drawn, drawn.split("train"), workers=0).save(run / "seen.npz")
    return run, drawn


def test_changed_copies_of_what_the_run_saw_are_found_without_its_data(drawn_run, tmp_path):
    """Compressed and made smaller, under another name, in a set with labels of its own."""
    run, drawn = drawn_run
    folder = tmp_path / "clinic"
    (folder / "images").mkdir(parents=True)
    records = []
    for number, record in enumerate([*drawn.split("test")[:4], *drawn.split("train")[:3]]):
        split = ("train", "val", "test", "test", "test", "test", "test")[number]
        path = f"images/{number}.jpg"
        with Image.open(drawn.root / record.path) as picture:
            smaller = picture.resize((200, 200), Image.Resampling.LANCZOS)
        smaller.save(folder / path, quality=60)
        checksum = sha256_of(folder / path)
        records.append(Record(path, record.grade, f"p{number}", "", split, sha256=checksum))
    write_manifest(folder, records)
    (folder / "data_report.json").write_text("{}")
    opened = open_evaluation(Options(pretrained=str(run), data=str(folder)), "knn")
    sets = open_test_sets(opened.manifest, [])
    with pytest.raises(InputError, match=r"test split: 3 .*images/4.jpg = .*images/5.jpg = "):
        check_unseen(opened, sets, learnt(opened))
    (run / "seen.npz").unlink()
    assert check_unseen(opened, sets, learnt(opened)) == {"": []}


def test_a_run_that_does_not_say_what_it_saw_is_warned_of(drawn_run, caplog):
    run, drawn = drawn_run
    (run / "seen.npz").unlink()
    opened = open_evaluation(Options(pretrained=str(run), data=str(drawn.root)), "knn")
    check_unseen(opened, open_test_sets(drawn, []), learnt(opened))
    assert "has no seen.npz" in caplog.text


def test_sets_of_one_name_do_not_replace_each_other(prepared, tmp_path):
    manifest = read_manifest(prepared)
    paths = []
    for name, count in (("a", 1), ("b", 2), ("c", 3)):
        records = manifest.records[:count]
        paths.append(str(copy_set(tmp_path / name / "set", prepared, records, tint=count)))
    sets = open_test_sets(manifest, paths)
    assert [test_set.name for test_set in sets] == ["", "set", "set-2", "set-3"]
    assert [len(test_set.records) for test_set in sets] == [10, 1, 2, 3]


def test_an_empty_manifest_has_no_grades(tmp_path):
    record = Record("a.jpg", None, "p", "", "train")
    with pytest.raises(InputError, match="no graded photograph for test"):
        open_test_sets(Manifest(tmp_path, (record,), True, "prepared"), [])


# ------------------------------------------------------------------------------------------ folds


def by_color(evaluation, training, validation, sets):
    """A method: the grade of the training photograph of the nearest colour, nearly surely."""
    outcomes = []
    for test_set in sets:
        view = evaluation.view
        colors = cached_features(evaluation, evaluation.manifest, training, view)["color"]
        asked = cached_features(evaluation, test_set.manifest, test_set.records, view)["color"]
        nearest = torch.cdist(asked, colors).argmin(dim=1)
        shares = np.eye(GRADES)[grades_of(training)[nearest]] * 0.9 + 0.02
        predictions = Predictions(
            grades_of(test_set.records),
            shares.argmax(axis=1),
            shares,
            patients_of(test_set.records),
        )
        outcomes.append(Outcome(test_set, predictions, grades_of(training)))
    return outcomes


def test_folds_test_every_photograph_once_from_one_cache(tmp_path, extractions, capsys):
    manifest = helpers.draw_prepared(tmp_path / "set", train=20, val=10, test=10)
    for number, records in enumerate(fold_splits(manifest.records, 4), 1):
        write_manifest(manifest.root, records, f"manifest-fold-{number}.csv")
    options = Options(folds=True, pictures=False)
    opened = helpers.evaluation(options, manifest, tmp_path / "run" / "color-folds")
    evaluate_all(opened, "colour", by_color)
    assert len(extractions) == 1

    together = json.loads((opened.output / "results.json").read_text())
    with (opened.output / "predictions.csv").open(newline="") as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    assert rows.keys() == {record.path for record in manifest.records}
    assert together["protocol"] == "colour, folds by patient"
    right = np.mean([row["grade"] == row["prediction"] for row in rows.values()])
    assert together["metrics"]["accuracy"]["value"] == pytest.approx(right)
    assert right > 0.8

    assert [row["fold"] for row in together["by_fold"]] == [1, 2, 3, 4]
    for row in together["by_fold"]:
        folder = opened.output / f"fold-{row['fold']}"
        own = json.loads((folder / "results.json").read_text())
        assert own["metrics"]["accuracy"]["value"] == row["accuracy"]
        fold = read_manifest(manifest.root, f"manifest-fold-{row['fold']}.csv")
        with (folder / "predictions.csv").open(newline="") as file:
            for line in csv.DictReader(file):
                assert line == rows[line["path"]]
        assert own["data"]["test"]["images"] == row["images"] == len(fold.split("test"))
    for name in ("accuracy", "referable_auroc"):
        values = [row[name] for row in together["by_fold"]]
        mean = together["mean_of_folds"][name]
        assert mean["value"] == pytest.approx(np.mean(values))
        assert mean["sd"] == pytest.approx(np.std(values, ddof=1))
    printed = capsys.readouterr().out
    assert f"referable AUROC {together['mean_of_folds']['referable_auroc']['value']:.3f}" in printed

    evaluate_all(opened, "colour", by_color)  # the same again
    with pytest.raises(InputError, match="other settings"):
        evaluate_all(replace(opened, options=replace(options, seed=1)), "colour", by_color)


def test_a_folder_without_folds_is_refused(tmp_path, manifest):
    opened = helpers.evaluation(Options(folds=True), manifest, tmp_path)
    with pytest.raises(InputError, match=r"no manifest-fold-1.csv.*--folds 5"):
        evaluate_all(opened, "colour", by_color)


def test_several_test_sets_come_in_one_table(prepared, tmp_path, capsys):
    manifest = read_manifest(prepared)
    others = []
    for name, count in (("one", 12), ("two", 20)):
        records = manifest.records[:count]
        others.append(str(copy_set(tmp_path / name, prepared, records, tint=255)))
    options = Options(pictures=False, test_data=tuple(others))
    opened = helpers.evaluation(options, manifest, tmp_path / "run" / "color")
    evaluate_all(opened, "colour", by_color)
    table = capsys.readouterr().out.split("\n\n")[-1].splitlines()
    assert [line.split()[0] for line in table] == ["QWK", "test", "one", "two"]
    for line, folder in zip(table[1:], ("", "one", "two"), strict=True):
        results = json.loads((opened.output / folder / "results.json").read_text())
        assert f"{results['metrics']['qwk']['value']:.3f}" in line
