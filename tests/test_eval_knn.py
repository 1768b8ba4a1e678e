"""eval_knn.py: its options, the metrics of each k, and the whole program on drawn features.

Run it with `python -m pytest tests/test_eval_knn.py`.
"""

import json

import helpers
import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from sklearn.neighbors import KNeighborsClassifier

import eval_knn
import eval_linear
import utils
from data import PhotographDataset, grades_of
from eval_knn import Options, evaluate, main
from features import extract_features
from fundus.manifest import Record
from utils import InputError
from weights import read_weights, save_backbone


def records_of(grades, patients=None):
    patients = patients or [f"p{i}" for i in range(len(grades))]
    return [
        Record(f"{i}.png", g, p, "", "test")
        for i, (g, p) in enumerate(zip(grades, patients, strict=True))
    ]


def test_every_k_has_its_metrics_and_the_headline_its_predictions():
    truth = [0, 1, 2, 3, 4, 0]
    near, far = torch.eye(5)[truth], torch.eye(5)[[0] * 6]
    predictions, by_k = evaluate({15: near, 5: far}, records_of(truth, list("aabbcc")), 5)
    assert [row["k"] for row in by_k] == [15, 5]
    assert by_k[0]["accuracy"] == by_k[0]["qwk"] == by_k[0]["macro_auroc"] == 1
    assert by_k[1]["accuracy"] == pytest.approx(1 / 3) and by_k[1]["qwk"] == pytest.approx(0)
    assert predictions.predicted.tolist() == [0] * 6, "the headline is k = 5 here"
    assert predictions.grades.tolist() == truth
    assert predictions.patients.tolist() == list("aabbcc")
    assert np.array_equal(predictions.probabilities, far.numpy())
    assert evaluate({15: near, 5: far}, records_of(truth), 15)[0].predicted.tolist() == truth


def test_undefined_metrics_of_a_k_are_none():
    _, (row,) = evaluate({5: torch.eye(5)[[1, 1]]}, records_of([1, 1]), 5)
    assert row["accuracy"] == 1 and row["qwk"] is None and row["recall_4"] is None
    json.dumps(row, allow_nan=False)


def test_options():
    assert Options().k == (5, 10, 15, 20) and eval_knn.HEADLINE == 15
    for temperature in (0.0, -0.07):
        with pytest.raises(InputError, match="--temperature"):
            Options(temperature=temperature)


def test_a_temperature_that_is_no_number_is_refused():
    with pytest.raises(InputError, match="--temperature"):
        Options(temperature=float("nan"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A prepared folder and a run of random weights on it."""
    folder = tmp_path_factory.mktemp("runs") / "random"
    manifest = helpers.draw_prepared(folder.parent / "set", train=40, test=20)
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 0\n")
    options = {"data": str(manifest.root)}
    save_backbone(helpers.pico(), folder / "backbone.safetensors", options)
    return folder, manifest


def options_of(run, **changed):
    values = {"pretrained": str(run[0]), "device": "cpu", "precision": "fp32", "workers": 0}
    return Options(**(values | changed))


@pytest.mark.parametrize("ks, headline", [((3, 15, 20), 15), ((20, 3), 3)])
def test_the_program_grades_as_scikit_learn_does(run, ks, headline, capsys):
    folder, manifest = run
    main(options_of(run, k=ks, overwrite=True), None)
    found = json.loads((folder / "knn" / "results.json").read_text())
    backbone = helpers.pico()
    sets = {}
    for split in ("train", "test"):
        dataset = PhotographDataset(manifest, manifest.split(split), eval_knn.WholeView(32))
        sets[split] = extract_features(backbone, dataset)["cls"][:, -1].double().numpy()
    truth = grades_of(manifest.split("test"))
    assert [row["k"] for row in found["by_k"]] == list(ks)
    for row in found["by_k"]:
        reference = KNeighborsClassifier(
            row["k"], metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07)
        ).fit(sets["train"], grades_of(manifest.split("train")))
        expected = reference.predict(sets["test"])
        assert row["accuracy"] == pytest.approx(sk.accuracy_score(truth, expected))
        if row["k"] == headline:
            assert found["metrics"]["accuracy"]["value"] == row["accuracy"]
            assert found["confusion"] == sk.confusion_matrix(truth, expected).tolist()
    assert found["protocol"].startswith(f"{headline}-NN") and "32 px" in found["protocol"]
    assert found["data"]["train"]["images"] == 40 and found["data"]["test"]["images"] == 20
    assert found["majority"]["accuracy"] == pytest.approx(0.2)
    assert f"k {headline:3}" in capsys.readouterr().out


def test_the_papers_protocol_lets_val_vote(run):
    folder, manifest = run
    main(options_of(run, k=(1, 50), protocol="paper"), None)
    found = json.loads((folder / "knn-paper" / "results.json").read_text())
    assert "the paper's view" in found["protocol"] and found["by_k"][1]["k"] == 50
    with pytest.raises(InputError, match="--k 51: there are 50"):
        main(options_of(run, k=(51,), protocol="paper"), None)
    with pytest.raises(InputError, match="--k 41: there are 40"):
        main(options_of(run, k=(41,)), None)


def test_further_sets_are_tested_on_whole(run, tmp_path):
    helpers.draw_prepared(tmp_path / "other", train=10, val=5, test=5)
    rows = (tmp_path / "other" / "manifest.csv").read_text()
    names = {f",{split}{i}\n": f",o{split}{i}\n" for split in ("train", "val") for i in range(10)}
    for old, new in names.items():
        rows = rows.replace(old, new)
    (tmp_path / "other" / "manifest.csv").write_text(rows)
    main(options_of(run, k=(3,), test_data=(str(tmp_path / "other"),)), None)
    found = json.loads((run[0] / "knn" / "other" / "results.json").read_text())
    assert found["data"]["test"]["images"] == 20 and found["data"]["test_path"] == "other"


def test_results_of_other_weights_are_not_replaced_unless_asked(run, tmp_path):
    folder, manifest = run
    output = str(tmp_path / "here")
    main(options_of(run, k=(3,), output_dir=output), None)
    save_backbone(helpers.pico(1), tmp_path / "other.safetensors", {"data": str(manifest.root)})
    other = {"pretrained": str(tmp_path / "other.safetensors"), "output_dir": output, "k": (3,)}
    before = (tmp_path / "here" / "results.json").read_text()
    with pytest.raises(InputError, match="--overwrite"):
        main(options_of(run, **other), None)
    assert (tmp_path / "here" / "results.json").read_text() == before
    main(options_of(run, **other, overwrite=True), None)
    found = json.loads((tmp_path / "here" / "results.json").read_text())
    assert found["backbone"]["sha256"] == read_weights(str(tmp_path / "other.safetensors")).sha256


@pytest.mark.parametrize("size", [40, -32])
def test_an_image_size_that_the_patch_does_not_divide_is_refused(run, size, tmp_path):
    with pytest.raises(InputError, match="--image-size"):
        main(options_of(run, image_size=size, output_dir=str(tmp_path), k=(3,)), None)


def other_sets(run, tmp_path):
    """Two prepared folders of one name, whose photographs are not the run's."""
    for place, seed in (("a", 7), ("b", 8)):
        helpers.draw_prepared(tmp_path / place / "test", train=1, val=1, test=5, seed=seed)
        yield str(tmp_path / place / "test")


def test_results_of_another_test_set_of_that_name_are_not_replaced(run, tmp_path):
    first, second = other_sets(run, tmp_path)
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
    here = {"output_dir": str(tmp_path / "out"), "pretrained": str(run[0]), "device": "cpu"}
    eval_linear.main(eval_linear.Options(**here, epochs=1, workers=0, precision="fp32"), None)
    with pytest.raises(InputError, match="another protocol"):
        main(options_of(run, k=(3,), output_dir=here["output_dir"]), None)


def test_test_data_without_a_folder_is_refused(run):
    with pytest.raises(InputError, match="--test-data has no value"):
        utils.parse(Options, ["--test-data", "--pretrained", str(run[0])])
