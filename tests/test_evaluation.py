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
    cached_features,
    check_results,
    choose_image_size,
    describe_data,
    open_evaluation,
    open_test_sets,
    open_weights,
    training_records,
    write_results,
)
from features import extract_features
from fundus.manifest import GRADES, Manifest, Record, read_manifest, write_manifest
from fundus.metrics import Predictions
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


def test_the_published_protocol_learns_from_val_too(tmp_path, manifest):
    whole = helpers.evaluation(Options(), manifest, tmp_path)
    assert training_records(whole) == manifest.split("train")
    paper = helpers.evaluation(Options(protocol="paper"), manifest, tmp_path)
    assert training_records(paper) == manifest.split("train") + manifest.split("val")


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
    write_results(opened, "15-NN", test_set, predictions, train_grades, {"by_k": []})
    results = json.loads((output / "results.json").read_text())
    with (output / "predictions.csv").open(newline="") as file:
        return results, list(csv.DictReader(file)), predictions


def test_results_json_says_what_was_evaluated(tmp_path, manifest, capsys):
    results, _, predictions = write_random_results(tmp_path, manifest, manifest.split("test"))
    keys = "protocol data majority metrics confusion by_k backbone versions command"
    assert list(results) == keys.split()
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
    assert len(results["metrics"]["accuracy"]["ci95"]) == 2
    assert np.trace(results["confusion"]) == right * 10
    printed = capsys.readouterr().out
    assert f"\n15-NN, 10 test photographs, {tmp_path}\n" in printed
    assert f"{right:.3f}" in printed
    with Image.open(tmp_path / "confusion.png") as picture:
        assert picture.format == "PNG"


def test_predictions_csv_holds_every_prediction(tmp_path, manifest):
    records = manifest.split("test")
    _, rows, predictions = write_random_results(tmp_path, manifest, records)
    assert ",".join(rows[0]) == "path,patient,eye,grade,prediction,p0,p1,p2,p3,p4"
    for row, record, shares in zip(rows, records, predictions.probabilities, strict=True):
        assert (row["path"], row["patient"]) == (record.path, record.patient)
        assert (row["eye"], int(row["grade"])) == (record.eye, record.grade)
        assert int(row["prediction"]) == shares.argmax()
        written = [float(row[f"p{grade}"]) for grade in range(GRADES)]
        assert written == pytest.approx(shares, rel=1e-8)


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
    check_results(opened, [own], "5-NN")  # another headline is the same evaluation
    check_results(opened, [replace(own, name="elsewhere")], "linear probe")

    other = helpers.regraded(manifest, "test", 4)
    changes = [
        (opened, own, "15-NN, the paper's view"),
        (with_weights(opened, sha256="another file"), own, "15-NN"),
        (with_weights(opened, network="student"), own, "15-NN"),
        (with_weights(opened, spec=BackboneSpec("vit_nano", 16, 32)), own, "15-NN"),
        (replace(opened, manifest=other), replace(own, manifest=other), "15-NN"),
        (opened, replace(own, manifest=other), "15-NN"),
    ]
    for changed, test_set, protocol in changes:
        with pytest.raises(InputError, match=r"results\.json: .*--overwrite"):
            check_results(changed, [test_set], protocol)
        insisting = replace(changed, options=Options(overwrite=True))
        check_results(insisting, [test_set], protocol)


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
    own = describe_data(manifest, GradedSet("", manifest, manifest.split("test")))
    assert list(own) == ["path", "fingerprint", "train", "val", "test"]
    assert own["path"] == prepared.name
    assert own["fingerprint"] == manifest.fingerprint
    assert own["train"] == {"images": 40, "patients": 20, "by_grade": [8] * GRADES}
    assert own["test"] == {"images": 10, "patients": 5, "by_grade": [2] * GRADES}
    assert own["val"] == own["test"]

    further = describe_data(manifest, GradedSet("other", other, [ungraded]))
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


def test_sets_that_share_files_with_training_are_refused(prepared, tmp_path):
    manifest = read_manifest(prepared)
    tested = copy_set(tmp_path / "tested", prepared, manifest.split("test"))
    _, further = open_test_sets(manifest, [str(tested)])
    assert len(further.records) == 10
    mixed = copy_set(tmp_path / "mixed", prepared, manifest.records[39:])
    with pytest.raises(InputError, match="mixed: 11 photographs"):
        open_test_sets(manifest, [str(mixed)])


def test_shared_files_are_found_where_the_manifest_has_no_checksums(prepared, tmp_path):
    manifest = read_manifest(prepared)
    bare = tuple(replace(record, sha256="") for record in manifest.records)
    mixed = copy_set(tmp_path / "mixed", prepared, bare)
    with pytest.raises(InputError, match="mixed"):
        open_test_sets(replace(manifest, records=bare), [str(mixed)])


def test_drawn_sets_that_overlap_are_refused():
    drawn = data.open_manifest("synthetic:12")
    with pytest.raises(InputError, match="synthetic:12"):
        open_test_sets(drawn, ["synthetic:12"])


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
