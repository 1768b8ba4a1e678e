"""eval_knn.py: its options, the metrics of each k, and the whole program on drawn features.

Run it with `python -m pytest tests/test_eval_knn.py`.
"""

import json

import helpers
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn import metrics as sk
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

import eval_linear
import utils
from augment import PaperView, WholeView
from data import PhotographDataset, grades_of
from eval_knn import Options, main, predict, score_each_k, spread_over_grades
from features import extract_features, knn_predict
from fundus.handmade import handmade_features
from fundus.manifest import GRADES, Record
from utils import InputError
from vision_transformer import ARCHS, Architecture, BackboneSpec
from weights import read_weights, save_backbone


def records_of(grades, patients=None):
    """Return records of these grades, of one patient each if none are named."""
    if patients is None:
        patients = [f"p{number}" for number in range(len(grades))]
    records = []
    for number, (grade, patient) in enumerate(zip(grades, patients, strict=True)):
        records.append(Record(f"{number}.png", grade, patient, "", "test"))
    return records


# ----------------------------------------------------------------------------------------- options


def test_options():
    assert Options().k == (5, 10, 15, 20)
    assert Options().headline == 15
    assert Options(k=(20, 15, 3)).headline == 15
    assert Options(k=(20, 3)).headline == 3


@pytest.mark.parametrize("temperature", [0.0, -0.07, 1e22, float("nan"), float("inf")])
def test_a_temperature_that_cannot_be_is_refused(temperature):
    with pytest.raises(InputError, match="--temperature"):
        Options(temperature=temperature)


@pytest.mark.parametrize("ks", [(0,), (5, -1), (5, 10**19)])
def test_numbers_of_neighbours_that_cannot_be_are_refused(ks):
    with pytest.raises(InputError, match="--k"):
        Options(k=ks)


def test_the_papers_protocol_has_its_own_image_size():
    with pytest.raises(InputError, match="--image-size"):
        Options(protocol="paper", image_size=224)


def test_test_data_without_a_folder_is_refused():
    with pytest.raises(InputError, match="--test-data has no value"):
        utils.parse(Options, ["--test-data", "--pretrained", "anything"])


# ----------------------------------------------------------------------------------------- metrics


def test_every_k_has_its_metrics():
    truth = [0, 1, 2, 3, 4, 0]
    records = records_of(truth, list("aabbcc"))
    right = torch.eye(GRADES)[truth]
    always_0 = torch.eye(GRADES)[[0] * 6]
    by_k = score_each_k({15: right, 5: always_0}, records)
    assert [row["k"] for row in by_k] == [15, 5]
    assert by_k[0]["accuracy"] == by_k[0]["qwk"] == by_k[0]["macro_auroc"] == 1
    assert by_k[1]["accuracy"] == pytest.approx(1 / 3)
    assert by_k[1]["qwk"] == pytest.approx(0)

    predictions = predict(right, records)
    assert predictions.predicted.tolist() == truth
    assert predictions.grades.tolist() == truth
    assert predictions.patients.tolist() == list("aabbcc")
    assert np.array_equal(predictions.probabilities, right.numpy())


def test_undefined_metrics_of_a_k_are_none():
    votes = torch.eye(GRADES)[[1, 1]]
    (row,) = score_each_k({5: votes}, records_of([1, 1]))
    assert row["accuracy"] == 1
    assert row["qwk"] is None and row["recall_4"] is None
    json.dumps(row, allow_nan=False)


def test_neighbours_are_drawn_of_every_grade_in_turn():
    records = records_of([0, 0, 0, 0, 2, 2, 4])
    assert spread_over_grades(records, 5) == [0, 4, 6, 1, 5]
    assert sorted(spread_over_grades(records, 20)) == list(range(7))


# ------------------------------------------------------------------------------------- the program


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of random weights, and the manifest of the prepared folder that it names."""
    folder = tmp_path_factory.mktemp("runs") / "random"
    manifest = helpers.draw_prepared(folder.parent / "set", train=40, test=20)
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 0\n")
    options = {"data": str(manifest.root)}
    save_backbone(helpers.pico(), folder / "backbone.safetensors", options)
    return folder, manifest


def options_of(run, **changed):
    folder, _ = run
    values = {"pretrained": str(folder), "device": "cpu", "precision": "fp32", "workers": 0}
    values["pictures"] = False
    return Options(**{**values, **changed})


def read_results(folder):
    return json.loads((folder / "results.json").read_text())


def embeddings_of(manifest, records, view):
    """Return the [CLS] (N, D) of the run's weights."""
    dataset = PhotographDataset(manifest, records, view)
    return extract_features(helpers.pico(), dataset)["cls"][:, -1]


@pytest.mark.parametrize("ks, headline", [((3, 15, 20), 15), ((20, 3), 3)])
def test_the_program_grades_as_scikit_learn_does(run, ks, headline, capsys):
    folder, manifest = run
    main(options_of(run, k=ks, overwrite=True), None)
    results = read_results(folder / "knn")
    train = manifest.split("train")
    test = manifest.split("test")
    bank = embeddings_of(manifest, train, WholeView(32)).double().numpy()
    queries = embeddings_of(manifest, test, WholeView(32)).double().numpy()
    truth = grades_of(test)

    assert [row["k"] for row in results["by_k"]] == list(ks)
    for row in results["by_k"]:
        reference = KNeighborsClassifier(
            row["k"], metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
        )
        expected = reference.fit(bank, grades_of(train)).predict(queries)
        assert row["accuracy"] == pytest.approx(sk.accuracy_score(truth, expected))
        if row["k"] == headline:
            assert results["metrics"]["accuracy"]["value"] == row["accuracy"]
            assert results["confusion"] == sk.confusion_matrix(truth, expected).tolist()

    assert results["protocol"] == f"{headline}-NN, whole view of 32 px"
    assert results["data"]["train"]["images"] == 40
    assert results["data"]["test"]["images"] == 20
    assert results["majority"]["accuracy"] == pytest.approx(0.2)
    assert f"k {headline:3}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, changes, patch",
    [
        ("vit_small_patch14_reg4_dinov2", {}, 14),
        ("vit_small_patch16_dinov3", {}, 16),
        ("vit_base_patch16_224", {}, 16),
        ("vit_small_patch16_224", {"num_heads": 12}, 16),
    ],
)
def test_any_vit_of_timm_votes_as_timms_own_features(
    run, tmp_path, monkeypatch, name, changes, patch
):
    """Two blocks of each; the votes are those of a network that timm makes and fills alone."""
    _, manifest = run
    monkeypatch.setitem(ARCHS, "short", Architecture(name, {**changes, "depth": 2}))
    spec = BackboneSpec("short", patch, 2 * patch)
    backbone = helpers.pico(spec=spec)
    save_backbone(backbone, tmp_path / "backbone.safetensors", {"data": str(manifest.root)})
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    main(options_of((tmp_path, manifest), k=(9,)), None)

    sizes = {"depth": 2, "patch_size": patch, "img_size": 2 * patch}
    network = timm.create_model(name, num_classes=0, **changes, **sizes).eval()
    network.load_state_dict(load_file(tmp_path / "backbone.safetensors"))
    mean = torch.tensor(spec.mean)[:, None, None]
    std = torch.tensor(spec.std)[:, None, None]
    embeddings = {}
    for split in ("train", "test"):
        dataset = PhotographDataset(manifest, manifest.split(split), WholeView(2 * patch))
        images = torch.stack([dataset[number]["image"] for number in range(len(dataset))])
        with torch.inference_mode():
            tokens = network.forward_features((images / 255 - mean) / std)
        embeddings[split] = tokens[:, 0].double().numpy()  # the normed [CLS]
    reference = KNeighborsClassifier(
        9, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
    )
    reference.fit(embeddings["train"], grades_of(manifest.split("train")))
    expected = reference.predict_proba(embeddings["test"])
    lines = (tmp_path / "knn" / "predictions.csv").read_text().splitlines()[1:]
    found = [[float(text) for text in line.split(",")[5:]] for line in lines]
    assert np.abs(np.array(found) - expected).max() < 1e-4
    assert expected.std(axis=0).max() > 0.1, "photographs differ"


def test_operating_points_come_from_val(run, tmp_path):
    """The threshold is chosen on val's votes, and counted on the test split's."""
    _, manifest = run
    main(options_of(run, k=(9,), output_dir=str(tmp_path)), None)
    train = manifest.split("train")
    bank = embeddings_of(manifest, train, WholeView(32))
    scores = {}
    for split in ("val", "test"):
        queries = embeddings_of(manifest, manifest.split(split), WholeView(32))
        votes = knn_predict(bank, torch.from_numpy(grades_of(train)), queries, [9])[9]
        scores[split] = votes[:, 2:].sum(dim=1).numpy()
    entry = read_results(tmp_path)["metrics"]["sensitivity_at_90_specificity"]
    on_val = scores["val"][grades_of(manifest.split("val")) < 2]
    assert (on_val < entry["threshold"]).mean() >= 0.9
    referable = grades_of(manifest.split("test")) >= 2
    assert entry["value"] == pytest.approx((scores["test"][referable] >= entry["threshold"]).mean())
    assert entry["achieved"] == pytest.approx(
        (scores["test"][~referable] < entry["threshold"]).mean()
    )


def test_pictures_lie_beside_the_numbers(run, tmp_path):
    main(options_of(run, k=(1, 9), output_dir=str(tmp_path), pictures=True), None)
    for name in ("confusion", "roc", "reliability", "k", "neighbours", "embedding"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert min(picture.size) > 200, name
    header = (tmp_path / "doubtful.csv").read_text().splitlines()[0]
    assert header == "path,patient,grade,likely,confidence,share"


def test_a_feature_that_is_not_finite_is_not_graded(run, tmp_path):
    folder, manifest = run
    backbone = helpers.pico()
    with torch.no_grad():
        backbone.vit.norm.bias[0] = torch.nan
    save_backbone(backbone, tmp_path / "nan.safetensors", {})
    asked = {"pretrained": str(tmp_path / "nan.safetensors"), "data": str(manifest.root)}
    with pytest.raises(InputError, match=r"images/train0.png: its features \(cls\) are not finite"):
        main(options_of(run, **asked, k=(3,), output_dir=str(tmp_path / "out")), None)
    assert not (tmp_path / "out" / "results.json").exists()


def test_the_papers_protocol_lets_val_vote(run):
    folder, manifest = run
    main(options_of(run, k=(1, 50), protocol="paper"), None)
    results = read_results(folder / "knn-paper")
    assert results["protocol"] == "50-NN, the paper's view (256, middle 224)"

    voters = manifest.split("train") + manifest.split("val")
    bank = embeddings_of(manifest, voters, PaperView())
    queries = embeddings_of(manifest, manifest.split("test"), PaperView())
    votes = knn_predict(bank, torch.from_numpy(grades_of(voters)), queries, [1, 50])
    truth = grades_of(manifest.split("test"))
    for row in results["by_k"]:
        right = votes[row["k"]].argmax(dim=1).numpy() == truth
        assert row["accuracy"] == pytest.approx(right.mean())

    with pytest.raises(InputError, match="--k 51: there are 50"):
        main(options_of(run, k=(51,), protocol="paper"), None)
    with pytest.raises(InputError, match="--k 41: there are 40"):
        main(options_of(run, k=(41,)), None)


def test_too_many_neighbours_are_refused_before_any_work(run, monkeypatch):
    monkeypatch.setattr("evaluation.extract_features", None)
    with pytest.raises(InputError, match="--k 41: there are 40 .* expected 1 to that"):
        main(options_of(run, k=(3, 41)), None)


def test_the_temperature_is_the_votes(run, tmp_path):
    _, manifest = run
    main(options_of(run, k=(20,), temperature=0.5, output_dir=str(tmp_path)), None)
    train = manifest.split("train")
    bank = embeddings_of(manifest, train, WholeView(32))
    queries = embeddings_of(manifest, manifest.split("test"), WholeView(32))
    votes = knn_predict(bank, torch.from_numpy(grades_of(train)), queries, [20], 0.5)[20]
    lines = (tmp_path / "predictions.csv").read_text().splitlines()[1:]
    for line, shares in zip(lines, votes.tolist(), strict=True):
        assert [float(text) for text in line.split(",")[5:]] == pytest.approx(shares, abs=1e-5)


def test_neighbours_among_hand_made_statistics_are_scikit_learns(run):
    folder, manifest = run
    main(options_of(run, k=(5, 15), features="handmade"), None)
    results = read_results(folder / "knn-handmade")
    assert results["protocol"] == "15-NN, on hand-made statistics"

    pictures = WholeView(256)

    def statistics(records):
        dataset = PhotographDataset(manifest, records, pictures)
        pixels = [dataset[i]["image"].permute(1, 2, 0).numpy() for i in range(len(records))]
        return np.stack([handmade_features(picture) for picture in pixels])

    train, test = manifest.split("train"), manifest.split("test")
    scaler = StandardScaler().fit(statistics(train))
    bank, queries = (scaler.transform(statistics(records)) for records in (train, test))
    for row in results["by_k"]:
        reference = KNeighborsClassifier(
            row["k"], metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
        )
        expected = reference.fit(bank, grades_of(train)).predict(queries)
        assert row["accuracy"] == pytest.approx(sk.accuracy_score(grades_of(test), expected))
    with pytest.raises(InputError, match="--features"):
        options_of(run, features="handmade", protocol="paper")


@pytest.mark.parametrize("size", [40, -32])
def test_an_image_size_that_the_patch_does_not_divide_is_refused(run, size, tmp_path):
    with pytest.raises(InputError, match="--image-size"):
        main(options_of(run, image_size=size, output_dir=str(tmp_path), k=(3,)), None)


# ------------------------------------------------------------------------- results that are there


def other_sets(tmp_path):
    """Return two prepared folders of one name, whose photographs are not the run's."""
    paths = []
    for place, seed in (("a", 7), ("b", 8)):
        folder = tmp_path / place / "test"
        helpers.draw_prepared(folder, train=1, val=1, test=5, seed=seed)
        paths.append(str(folder))
    return paths


def test_further_sets_are_tested_on_whole(run, tmp_path):
    folder, _ = run
    other = helpers.draw_prepared(tmp_path / "other", train=10, val=5, test=5, seed=9)
    main(options_of(run, k=(3,), test_data=(str(other.root),), overwrite=True), None)
    results = read_results(folder / "knn" / "other")
    assert results["data"]["test"]["images"] == 20
    assert results["data"]["test_path"] == "other"
    assert results["data"]["test_fingerprint"] == other.fingerprint
    assert results["data"]["train"]["images"] == 40, "nothing but the test is of the other set"


def test_results_of_other_weights_are_not_replaced_unless_asked(run, tmp_path):
    _, manifest = run
    output = tmp_path / "here"
    main(options_of(run, k=(3,), output_dir=str(output)), None)
    before = (output / "results.json").read_text()

    path = str(tmp_path / "other.safetensors")
    save_backbone(helpers.pico(1), tmp_path / "other.safetensors", {"data": str(manifest.root)})
    other = {"pretrained": path, "output_dir": str(output), "k": (3,)}
    with pytest.raises(InputError, match="--overwrite"):
        main(options_of(run, **other), None)
    assert (output / "results.json").read_text() == before
    main(options_of(run, **other, overwrite=True), None)
    assert read_results(output)["backbone"]["sha256"] == read_weights(path).sha256


def test_results_of_another_test_set_of_that_name_are_not_replaced(run, tmp_path):
    first, second = other_sets(tmp_path)
    here = {"k": (3,), "output_dir": str(tmp_path / "out")}
    main(options_of(run, **here, test_data=(first,)), None)
    main(options_of(run, **here, test_data=(first,)), None)  # the same again
    written = tmp_path / "out" / "test" / "results.json"
    before = written.read_text()
    with pytest.raises(InputError, match="test/results.json.*--overwrite"):
        main(options_of(run, **here, test_data=(second,)), None)
    assert written.read_text() == before
    main(options_of(run, **here, test_data=(second,), overwrite=True), None)
    assert written.read_text() != before


def test_results_of_the_linear_probe_are_not_replaced(run, tmp_path):
    folder, _ = run
    here = {"output_dir": str(tmp_path / "out"), "pretrained": str(folder), "device": "cpu"}
    probe = eval_linear.Options(**here, epochs=1, workers=0, precision="fp32")
    eval_linear.main(probe, None)
    with pytest.raises(InputError, match=r"other settings \(k None, now \[3\]"):
        main(options_of(run, k=(3,), output_dir=here["output_dir"]), None)
