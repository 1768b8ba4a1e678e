"""features.py against scikit-learn, a direct forward, numbers worked by hand, and its files.

Run it with `python -m pytest tests/test_features.py`.
"""

import csv
import json
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

import data
import evaluation
import features
import losses
from augment import PaperView, WholeView
from data import PhotographDataset, grades_of, patients_of
from evaluation import cached_features, describe, open_weights, write_results
from features import embedding_std, extract_features, knn_predict, name_collapse, rankme
from fundus import metrics
from fundus.manifest import Manifest, Record, read_manifest, write_manifest
from fundus.metrics import Predictions
from utils import InputError, sha256_of
from vision_transformer import Backbone
from weights import Weights, load_backbone, read_weights


@dataclass(frozen=True)
class Options:
    """What the functions here read of a script's options."""

    pretrained: str = ""
    checkpoint_key: str = "teacher"
    output_dir: str = ""
    workers: int = 0
    image_size: int = 0


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return helpers.draw_prepared(tmp_path_factory.mktemp("prepared") / "set")


def random_bank(count=300, queries=50, width=12, seed=0):
    """Features that do not tell the grades: neighbours disagree, so weights matter."""
    g = torch.Generator().manual_seed(seed)
    bank, asked = torch.randn(count, width, generator=g), torch.randn(queries, width, generator=g)
    return bank, torch.randint(5, (count,), generator=g), asked


def scikit_votes(bank, grades, queries, k, temperature=0.07):
    reference = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / temperature)
    )
    reference.fit(bank.double().numpy(), grades.numpy())
    votes = np.zeros((len(queries), 5))
    votes[:, reference.classes_] = reference.predict_proba(queries.double().numpy())
    return votes


# -------------------------------------------------------------------------------------------- k-NN


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_votes_are_scikit_learns(temperature):
    bank, grades, queries = random_bank()
    found = knn_predict(bank * 3, grades, queries * 7, [20, 1, 5, 300], temperature)
    assert list(found) == [20, 1, 5, 300]
    for k, votes in found.items():
        expected = scikit_votes(bank, grades, queries, k, temperature)
        assert np.abs(votes.numpy() - expected).max() < 2e-5, k
        assert (votes.sum(dim=1) - 1).abs().max() < 1e-5
    agreed = (found[1].argmax(dim=1) == found[20].argmax(dim=1)).float().mean()
    assert agreed < 1, "the data is inseparable, so the number of neighbours matters"


def test_more_queries_than_a_chunk_keep_their_order():
    bank, grades, queries = random_bank(64, 5000, 4)
    found = knn_predict(bank, grades, queries, [3])[3]
    assert found.shape == (5000, 5)
    assert np.abs(found.numpy() - scikit_votes(bank, grades, queries, 3)).max() < 2e-4


def test_a_small_temperature_is_the_nearest_neighbour():
    bank, grades, queries = random_bank()
    votes = knn_predict(bank, grades, queries, [50], temperature=1e-5)[50]
    assert votes.isfinite().all()
    assert np.array_equal(votes.argmax(1), scikit_votes(bank, grades, queries, 1).argmax(1))


@pytest.mark.parametrize("k", [0, -1, 301])
def test_k_outside_the_bank_is_refused(k):
    bank, grades, queries = random_bank()
    with pytest.raises(InputError, match=rf"--k {k}: there are 300"):
        knn_predict(bank, grades, queries, [5, k])


def test_k_given_twice_answers_each_query_once():
    bank, grades, queries = random_bank()
    assert knn_predict(bank, grades, queries, [5, 5])[5].shape == (50, 5)


# --------------------------------------------------------------------------- how features lie


def test_rankme_by_hand():
    assert rankme(torch.eye(6)) == pytest.approx(6)
    turned = torch.linalg.qr(torch.randn(8, 8))[0]
    assert rankme(turned[:5] * 3) == pytest.approx(5, rel=1e-5)
    assert rankme(torch.outer(torch.arange(1.0, 9), torch.arange(1.0, 6))) == pytest.approx(
        1, abs=1e-4
    )
    # Singular values 3 and 1: shares 3/4 and 1/4.
    entropy = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    assert rankme(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(math.exp(entropy))


def test_embedding_std_by_hand():
    assert embedding_std(torch.eye(7) * 5) == pytest.approx(1)
    assert embedding_std(torch.ones(9, 4)) == pytest.approx(0, abs=1e-6)
    # Unit rows (1, 0) and (0.6, 0.8): deviations 0.4 / sqrt 2 and 0.8 / sqrt 2, times sqrt 2.
    assert embedding_std(torch.tensor([[9.0, 0], [3, 4]])) == pytest.approx(0.6)


# -------------------------------------------------------------------------------------- extraction


def test_extracted_features_are_those_of_a_direct_forward(manifest, monkeypatch):
    monkeypatch.setattr(
        features, "evaluation_loader", lambda d, b, w, old=data.evaluation_loader: old(d, 8, w)
    )
    spec = replace(helpers.PICO, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    backbone, records = helpers.pico(spec=spec), manifest.records[3:24]
    found = extract_features(backbone, PhotographDataset(manifest, records, WholeView(32)))
    assert {name: tuple(v.shape) for name, v in found.items()} == {
        "cls": (21, 2, 64),  # a pico has two blocks
        "patch": (21, 64),
        "color": (21, 6),
    }
    for row, record in enumerate(records):
        with Image.open(manifest.root / record.path) as picture:
            small = np.asarray(picture.resize((32, 32), Image.Resampling.BICUBIC)) / 255
        image = torch.from_numpy((small - np.array(spec.mean)) / np.array(spec.std)).float()
        with torch.no_grad():
            blocks = backbone.get_intermediate_layers(
                image.permute(2, 0, 1)[None], n=2, return_prefix_tokens=True, norm=True
            )
        expected = torch.stack([prefix[0, 0] for _, prefix in blocks])
        torch.testing.assert_close(found["cls"][row], expected, rtol=0, atol=0.02)
        torch.testing.assert_close(found["patch"][row], blocks[1][0][0].mean(0), rtol=0, atol=0.02)
        color = [*small.mean(axis=(0, 1)), *small.std(axis=(0, 1), ddof=1)]
        assert found["color"][row].tolist() == pytest.approx(color, abs=0.002)
    apart = (found["cls"][0] - found["cls"][2]).abs().max()
    assert apart > 0.2, "pictures of other grades have other features"


def test_a_backbone_in_training_gives_frozen_features_and_goes_on_training(manifest):
    training = Backbone(helpers.PICO, drop_path=0.9).train()
    training.load_state_dict(helpers.pico().state_dict())
    dataset = PhotographDataset(manifest, manifest.split("val"), WholeView(32))
    found, expected = (extract_features(b, dataset) for b in (training, helpers.pico()))
    assert torch.equal(found["cls"], expected["cls"]) and training.training


def test_features_are_cached_until_something_changes(tmp_path, manifest, monkeypatch):
    calls = []

    def counted(backbone, dataset, dtype, workers, title):
        calls.append(dtype)  # in fp32, since not every CPU can do more
        return extract_features(backbone, dataset)

    monkeypatch.setattr(evaluation, "extract_features", counted)
    e = helpers.evaluation(Options(), manifest, tmp_path / "knn")
    rows, view = manifest.split("val"), WholeView(32)
    first = cached_features(e, manifest, rows, view)
    again = cached_features(e, manifest, rows, view)
    assert len(calls) == 1 and all(torch.equal(first[k], again[k]) for k in first)
    beside = helpers.evaluation(Options(), manifest, tmp_path / "linear")
    cached_features(beside, manifest, rows, view)
    assert len(calls) == 1, "evaluations of one run share the cache"
    other = helpers.evaluation(Options(), manifest, tmp_path / "knn", seed=1)
    changed = cached_features(other, manifest, rows, view)
    assert len(calls) == 2 and not torch.equal(changed["cls"], first["cls"])
    assert torch.equal(changed["color"], first["color"])
    cached_features(e, manifest, rows, WholeView(64))
    cached_features(e, manifest, rows, PaperView())
    cached_features(e, manifest, rows[1:], view)
    cached_features(replace(e, dtype=torch.bfloat16), manifest, rows, view)
    exchanged = [replace(rows[0], sha256="another picture"), *rows[1:]]
    cached_features(e, manifest, exchanged, view)
    assert len(calls) == 7, "size, view, photographs, precision: each has its own features"


def features_of(source, manifest, output, **options):
    weights = read_weights(str(source), options.get("checkpoint_key", "teacher"))
    backbone = load_backbone(weights)
    e = evaluation.Evaluation(Options(**options), weights, backbone, None, output, manifest, 32)
    return cached_features(e, manifest, manifest.split("val"), WholeView(32))["cls"], backbone


def test_student_and_teacher_of_a_checkpoint_do_not_share_features(tmp_path, manifest):
    path = tmp_path / "checkpoint.pth"
    both = {"teacher": helpers.pico(0).state_dict(), "student": helpers.pico(1).state_dict()}
    torch.save(both, path)
    teacher, _ = features_of(path, manifest, tmp_path / "knn")
    student, backbone = features_of(path, manifest, tmp_path / "knn", checkpoint_key="student")
    dataset = PhotographDataset(manifest, manifest.split("val"), WholeView(32))
    assert torch.equal(student, extract_features(backbone, dataset)["cls"])
    assert not torch.equal(student, teacher)


def test_random_weights_are_the_same_each_time_or_have_their_own_name():
    first, second = (read_weights("none") for _ in range(2))
    same = all(torch.equal(first.state[k], second.state[k]) for k in first.state)
    assert same or first.sha256 != second.sha256


# --------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize(
    "path, run, folder",
    [
        ("runs/a/backbone.safetensors", "runs/a", "runs/a/knn"),
        ("runs/a/checkpoint-0040.pth", "runs/a", "runs/a/knn-0040"),
        ("weights/dino.pth", None, "runs/dino-01234567/knn"),
    ],
)
def test_output_folder_belongs_to_the_weights(path, run, folder, monkeypatch):
    weights = Weights({}, helpers.PICO, path, "0123456789abcdef", run and Path(run), {})
    monkeypatch.setattr(evaluation, "read_weights", lambda *a: weights)
    assert str(open_weights(Options(pretrained=path), "knn")[1]) == folder
    named = open_weights(Options(pretrained=path, output_dir="elsewhere"), "knn")[1]
    assert str(named) == "elsewhere"


def results(tmp_path, manifest, records):
    shares = np.random.default_rng(0).dirichlet(np.ones(5), len(records))
    p = Predictions(grades_of(records), shares.argmax(1), shares, patients_of(records))
    e = helpers.evaluation(Options(), manifest, tmp_path / "knn")
    about_data = describe(manifest, manifest, records)
    summary = metrics.report(p, grades_of(manifest.split("train")), e.output, "15-NN")
    about = {"protocol": "15-NN", "data": about_data, "by_k": []}
    write_results(e, e.output, records, shares, about | summary)
    found = json.loads((e.output / "results.json").read_text())
    with (e.output / "predictions.csv").open(newline="") as file:
        return found, list(csv.DictReader(file)), p


def test_results_can_be_recomputed_from_their_files(tmp_path, manifest, capsys):
    records = manifest.split("test")
    found, rows, p = results(tmp_path, manifest, records)
    keys = "protocol backbone data majority metrics by_k confusion versions command"
    assert set(found) == set(keys.split())
    spec = {"arch": "vit_pico", "patch_size": 16}
    assert found["backbone"] == {"path": "pico0.pth", "sha256": "sha-0", "network": ""} | spec
    assert found["data"]["fingerprint"] == manifest.fingerprint
    assert found["data"]["test"] == {"images": 10, "patients": 5, "by_grade": [2] * 5}
    assert ",".join(rows[0]) == "path,patient,eye,grade,prediction,p0,p1,p2,p3,p4"
    for row, record, share in zip(rows, records, p.probabilities, strict=True):
        assert (row["path"], row["patient"], row["eye"]) == (
            record.path,
            record.patient,
            record.eye,
        )
        assert [float(row[f"p{g}"]) for g in range(5)] == pytest.approx(share, rel=1e-5)
        assert int(row["prediction"]) == share.argmax() and int(row["grade"]) == record.grade
    right = np.mean([row["grade"] == row["prediction"] for row in rows])
    entry = found["metrics"]["accuracy"]
    assert entry["value"] == pytest.approx(right)
    assert len(entry["ci95"]) == 2 and np.trace(found["confusion"]) == right * 10
    assert found["majority"]["accuracy"] == pytest.approx(0.2)
    printed = capsys.readouterr().out
    assert "15-NN" in printed and f"{right:.3f}" in printed
    with Image.open(tmp_path / "knn" / "confusion.png") as picture:
        assert picture.format == "PNG"


def test_predictions_keep_commas_and_quotes_in_names(tmp_path, manifest):
    records = [replace(r, path=f'a, "b"/{r.path}', patient="x,y") for r in manifest.split("test")]
    _, rows, p = results(tmp_path, manifest, records)
    assert [row["path"] for row in rows] == [r.path for r in records]
    assert [int(row["prediction"]) for row in rows] == p.predicted.tolist()


# ------------------------------------------------------------------------------------------- sets


def test_describe_counts(prepared):
    manifest = read_manifest(prepared)
    told = describe(manifest, manifest, manifest.split("test"))
    assert told["path"] == prepared.name and told["fingerprint"] == manifest.fingerprint
    expected = {"images": 40, "patients": 20, "by_grade": [8] * 5}
    assert told["train"] == expected
    assert told["test"] == told["val"] == {"images": 10, "patients": 5, "by_grade": [2] * 5}


def copy_set(folder, source, keep, tint=0):
    """A prepared folder of some records; `tint` changes the files."""
    (folder / "images").mkdir(parents=True)
    records = []
    for record in keep:
        picture = np.asarray(Image.open(source / record.path)) ^ np.uint8(tint)
        target = folder / record.path
        if tint:
            Image.fromarray(picture).save(target)
            record = replace(record, sha256=sha256_of(target))
        else:
            shutil.copy(source / record.path, target)
        records.append(record)
    write_manifest(folder, records)
    return folder


def test_other_set_is_tested_on_whole(prepared, tmp_path):
    manifest = read_manifest(prepared)
    other = copy_set(tmp_path / "other", prepared, manifest.records[:6], tint=1)
    sets = evaluation.test_sets(manifest, [str(other)])
    assert list(sets) == ["", "other"]
    assert sets[""][1] == manifest.split("test")
    assert len(sets["other"][1]) == 6 and sets["other"][0].root == other


def test_sets_that_share_files_with_training_are_refused(prepared, tmp_path):
    manifest = read_manifest(prepared)
    tested = copy_set(tmp_path / "tested", prepared, manifest.split("test"))
    assert len(evaluation.test_sets(manifest, [str(tested)])["tested"][1]) == 10
    mixed = copy_set(tmp_path / "mixed", prepared, manifest.records[39:])
    with pytest.raises(InputError, match="mixed: 11 photographs"):
        evaluation.test_sets(manifest, [str(mixed)])


def test_shared_files_are_seen_where_the_manifest_has_no_checksums(prepared, tmp_path):
    manifest = read_manifest(prepared)
    bare = replace(manifest, records=tuple(replace(r, sha256="") for r in manifest.records))
    mixed = copy_set(tmp_path / "mixed", prepared, [replace(r, sha256="") for r in bare.records])
    with pytest.raises(InputError, match="mixed"):
        evaluation.test_sets(bare, [str(mixed)])


def test_drawn_sets_that_overlap_are_refused():
    drawn = data.open_manifest("synthetic:12")
    with pytest.raises(InputError, match="synthetic:12"):
        evaluation.test_sets(drawn, ["synthetic:12"])


def test_sets_of_one_name_do_not_replace_each_other(prepared, tmp_path):
    manifest = read_manifest(prepared)
    paths = [
        copy_set(tmp_path / name / "set", prepared, manifest.records[:count], tint=count)
        for name, count in (("a", 1), ("b", 2))
    ]
    found = evaluation.test_sets(manifest, [str(path) for path in paths])
    assert sorted(len(records) for _, records in found.values()) == [1, 2, 10]


def test_empty_manifest_has_no_grades(tmp_path):
    record = Record("a.jpg", None, "p", "", "train")
    with pytest.raises(InputError, match="no graded photograph for test"):
        evaluation.test_sets(Manifest(tmp_path, (record,), True, "prepared"), [])


# --------------------------------------------------------------------------------------- collapse

HEALTHY = {
    "loss": 6.0,
    "teacher_entropy": 0.6,
    "marginal_entropy": 0.9,
    "embedding_std": 0.7,
    "rankme": 20.0,
}


@pytest.mark.parametrize(
    "changed, word",
    [
        ({"teacher_entropy": 0.999, "marginal_entropy": 1.0, "loss": math.log(1024)}, "uniform"),
        ({"teacher_entropy": 0.01, "marginal_entropy": 0.01, "loss": 0.0}, "one prototype"),
        ({"embedding_std": 0.001}, "low rank"),
        ({"rankme": 1.2}, "low rank"),
    ],
)
def test_collapse_is_named_with_a_remedy(changed, word):
    message = name_collapse(HEALTHY | changed, 1024)
    assert message.startswith(word)
    assert "--" in message, "what to change is named"


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"teacher_entropy": 0.999, "loss": math.log(1024) - 0.5},  # flat targets, but learning
        {"teacher_entropy": 0.9, "loss": math.log(1024)},  # the first steps
        {"teacher_entropy": 0.02, "loss": 1.0},  # sharp targets, each image its own
        {"rankme": 3.0, "embedding_std": 0.2},
    ],
)
def test_collapse_stays_quiet_on_healthy_values(changed):
    assert name_collapse(HEALTHY | changed, 1024) == ""


def test_collapse_of_measured_targets():
    flat = losses.target_entropies(torch.full((2, 8, 1024), 1 / 1024))
    assert name_collapse(HEALTHY | flat | {"loss": math.log(1024)}, 1024).startswith("uniform")
    same = torch.softmax(torch.eye(1024)[7] * 100, dim=0).expand(2, 8, 1024)
    assert name_collapse(HEALTHY | losses.target_entropies(same), 1024).startswith("one prototype")
