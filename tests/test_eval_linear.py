"""eval_linear.py against autograd, torch.optim.SGD, toy data, and a test split that must not count.

Run it with `python -m pytest tests/test_eval_linear.py`.
"""

import json
import math
from dataclasses import replace

import helpers
import numpy as np
import pytest
import torch
from safetensors import safe_open
from sklearn import metrics as sk
from torch.nn import functional as F

import eval_linear
import evaluation
from augment import ProbeView
from data import PhotographDataset, grades_of
from eval_linear import Options, Probes, fit, fit_paper, fit_whole, main, probe_input, train_epoch
from features import extract_features
from utils import InputError
from weights import save_backbone

SETTINGS = [(0.5, 0.0), (0.1, 1e-2), (0.01, 0.3), (1e-3, 0.0)]


def options(**changed) -> Options:
    values = {"workers": 0, "device": "cpu", "precision": "fp32", "epochs": 5}
    values |= {} if changed.get("protocol") == "paper" else {"batch_size": 16}
    return Options(**(values | changed))


def blobs(count=100, width=8, distance=6.0, seed=0):
    """Features (N, F) around one middle a grade, and grades (N,); far middles are separable."""
    g = torch.Generator().manual_seed(seed)
    grades = torch.arange(count) % 5
    return distance * torch.eye(width)[grades] + torch.randn(count, width, generator=g), grades


def forever(x):
    return iter(lambda: x, None)


# ------------------------------------------------------------------------------------- the training


def test_steps_are_those_of_torchs_sgd_for_every_setting():
    x, grades = blobs(64, distance=1.0)
    probes = Probes(8, SETTINGS, seed=3)
    starts = [probes.weight[:, s].clone() for s in range(len(SETTINGS))]
    assert all(torch.equal(start, starts[0]) for start in starts), "settings start alike"
    scales = [1.0 - 0.04 * step for step in range(20)]
    for step, scale in enumerate(scales):
        rows = torch.arange(16) + 16 * (step % 4)
        probes.step(x[rows], grades[rows], scale)
    for s, (lr, decay) in enumerate(SETTINGS):
        weight = starts[s].double().requires_grad_()
        bias = torch.zeros(5, dtype=torch.double, requires_grad=True)
        groups = [{"params": [weight], "weight_decay": decay}, {"params": [bias]}]
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)
        for step, scale in enumerate(scales):
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
            rows = torch.arange(16) + 16 * (step % 4)
            optimizer.zero_grad()
            F.cross_entropy(x[rows].double() @ weight + bias, grades[rows]).backward()
            optimizer.step()
        assert (probes.weight[:, s] - weight).abs().max() < 1e-5, (lr, decay)
        assert (probes.bias[s] - bias).abs().max() < 1e-5, (lr, decay)


def test_logits_are_a_product_for_each_setting():
    probes, (x, _) = Probes(8, SETTINGS, seed=0), blobs(7)
    probes.weight = torch.randn(8, 4, 5)
    probes.bias = torch.randn(4, 5)
    for s in range(4):
        expected = x @ probes.weight[:, s] + probes.bias[s]
        torch.testing.assert_close(probes.logits(x)[:, s], expected)


class Recorder:
    """Takes the place of Probes and notes its steps."""

    def __init__(self):
        self.steps = []

    def step(self, x, grades, scale):
        self.steps.append((x[:, 0].tolist(), grades.tolist(), scale))


@pytest.mark.parametrize("protocol, sizes", [("whole", [16, 16, 16, 2]), ("paper", [25, 25])])
def test_an_epoch_sees_each_row_once_in_its_own_order(protocol, sizes):
    x, grades = torch.arange(50.0).unsqueeze(1), torch.arange(50) % 5
    orders = []
    for epoch in range(3):
        recorder = Recorder()
        train_epoch(recorder, x, grades, epoch, options(protocol=protocol, epochs=3))
        seen = [int(i) for rows, _, _ in recorder.steps for i in rows]
        assert sorted(seen) == list(range(50))
        assert [g for _, rows, _ in recorder.steps for g in rows] == [i % 5 for i in seen]
        assert [len(rows) for rows, _, _ in recorder.steps] == sizes
        for number, (_, _, scale) in enumerate(recorder.steps):
            done = (epoch + number / len(sizes)) / 3
            assert scale == pytest.approx((1 + math.cos(math.pi * done)) / 2)
        orders.append(seen)
    assert orders[0] != orders[1] != orders[2]
    again = Recorder()
    train_epoch(again, x, grades, 2, options(protocol=protocol, epochs=3))
    assert [int(i) for rows, _, _ in again.steps for i in rows] == orders[2]


def score(weight, bias, held, truth, select):
    predicted = (held @ weight + bias).argmax(1).numpy()
    if select == "qwk":
        return sk.cohen_kappa_score(truth, predicted, weights="quadratic", labels=list(range(5)))
    return {"accuracy": sk.accuracy_score, "balanced_accuracy": sk.balanced_accuracy_score}[select](
        truth, predicted
    )


@pytest.mark.parametrize("select", ["qwk", "accuracy", "balanced_accuracy"])
def test_the_best_setting_and_epoch_on_the_held_out_rows_are_returned(select):
    x, grades = blobs(80, distance=1.0)
    held, truth = blobs(61, distance=1.0, seed=1)
    o = options(select=select, epochs=6)
    weight, bias, rows = fit(forever(x), grades, held, truth.numpy(), o, SETTINGS)
    # The same training one setting at a time, every epoch judged by scikit-learn.
    tried = []
    for s, setting in enumerate(SETTINGS):
        probes, seen = Probes(8, [setting], o.seed), []
        for epoch in range(6):
            train_epoch(probes, x, grades, epoch, o)
            head = probes.weight[:, 0].clone(), probes.bias[0].clone()
            loss = F.cross_entropy(held @ head[0] + head[1], truth).item()
            seen.append((score(*head, held, truth.numpy(), select), -loss, epoch + 1, s, head))
        tried.append(max(seen, key=lambda entry: entry[:2]))
    for row, best, (lr, decay) in zip(rows, tried, SETTINGS, strict=True):
        assert (row["lr"], row["weight_decay"], row["epoch"]) == (lr, decay, best[2])
        assert row[select] == pytest.approx(best[0]) and row["loss"] == pytest.approx(-best[1])
    winner = max(tried, key=lambda entry: entry[:2])
    assert [row["chosen"] for row in rows] == [s == winner[3] for s in range(len(SETTINGS))]
    torch.testing.assert_close(weight, winner[4][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bias, winner[4][1], rtol=1e-4, atol=1e-5)
    assert len({row["epoch"] for row in rows}) > 1, "epochs differ, so that choosing one matters"


def test_separable_toy_data_is_learnt():
    x, grades = blobs(200, distance=20.0)
    held, truth = blobs(50, distance=20.0, seed=1)
    weight, bias, rows = fit(
        forever(x), grades, held, truth.numpy(), options(epochs=20), [(0.1, 0.0)]
    )
    assert ((held @ weight + bias).argmax(1) == truth).all()
    assert rows[0]["qwk"] == 1 and rows[0]["chosen"] is True


def test_a_setting_that_diverges_is_never_chosen():
    x, grades = blobs(60, distance=1.0)
    settings = [(3e38, 0.0), (0.1, 0.0), (1e38, 1e3)]  # the largest float is 3.4e38
    weight, bias, rows = fit(forever(x), grades, x, grades.numpy(), options(), settings)
    assert [row["chosen"] for row in rows] == [False, True, False]
    assert weight.isfinite().all() and bias.isfinite().all() and weight.any()
    json.dumps(rows, allow_nan=False)


def test_a_setting_that_diverges_is_still_named():
    x, grades = blobs(60, distance=1.0)
    settings = [(3e38, 0.1), (0.1, 0.0)]
    _, _, rows = fit(forever(x), grades, x, grades.numpy(), options(), settings)
    assert (rows[0]["lr"], rows[0]["weight_decay"]) == settings[0]


def test_no_setting_that_works_is_an_error():
    x, grades = blobs(60, distance=1.0)
    with pytest.raises(InputError, match="--lr"):
        fit(forever(x), grades, x, grades.numpy(), options(), [(3e38, 0.0)])


# ---------------------------------------------------------------------------------------- its input


@pytest.mark.parametrize(
    "arch, protocol, width",
    [
        ("vit_tiny", "whole", 40),
        ("vit_small", "whole", 40),
        ("vit_base", "whole", 20),
        ("vit_large", "whole", 20),
        ("vit_base", "paper", 40),
        ("vit_small", "paper", 40),
    ],
)
def test_input_by_architecture_and_protocol(arch, protocol, width):
    found = {"cls": torch.randn(3, 4, 10), "patch": torch.randn(3, 10), "color": torch.rand(3, 6)}
    x = probe_input(found, arch, options(protocol=protocol))
    assert x.shape == (3, width)
    tail = found["cls"][:, -1] if width == 40 else found["patch"]
    assert torch.equal(x[:, -10:], tail)
    assert torch.equal(x[:, :10], found["cls"][:, 0 if width == 40 else -1])
    assert torch.equal(probe_input(found, arch, options(features="color")), found["color"])


@pytest.mark.parametrize(
    "changed",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"features": "color", "protocol": "paper"},
        {"select": "accuracy", "protocol": "paper"},
        {"views": 2, "protocol": "paper"},
        {"views": -1},
        {"views": 101},
    ],
)
def test_options_that_cannot_be_are_refused(changed):
    with pytest.raises(InputError):
        options(**changed)


@pytest.mark.parametrize(
    "changed",
    [{"lr": (0.1, float("nan"))}, {"lr": (-0.1,)}, {"lr": (0.0,)}, {"weight_decay": (-1e-4,)}],
)
def test_settings_that_cannot_train_are_refused(changed):
    with pytest.raises(InputError, match="--lr|--weight-decay"):
        options(**changed)


# ------------------------------------------------------------------------------ the whole protocol


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return helpers.draw_prepared(tmp_path_factory.mktemp("set") / "drawn", train=40, val=20)


def test_standardisation_is_folded_into_the_head(manifest, tmp_path, monkeypatch):
    kept = {}

    def spy(train, grades, held, truth, o, settings):
        weight, bias, rows = fit(train, grades, held, truth, o, settings)
        kept.update(x=next(train), held=held, truth=truth, grades=grades)
        kept.update(weight=weight.clone(), bias=bias.clone(), settings=settings)
        return weight, bias, rows

    monkeypatch.setattr(eval_linear, "fit", spy)
    o = options(lr=(0.01, 0.1), weight_decay=(0.0, 0.1, 0.2))
    e = helpers.evaluation(o, manifest, tmp_path / "linear")
    records = manifest.split("train")
    weight, bias, rows = fit_whole(e, o, records)
    raw = {}
    for split in ("train", "val"):
        dataset = PhotographDataset(manifest, manifest.split(split), eval_linear.WholeView(32))
        raw[split] = extract_features(e.backbone, dataset)["cls"].flatten(1)
    assert kept["x"].mean(0).abs().max() < 1e-4
    assert (kept["x"].std(0) - 1).abs().max() < 1e-3
    for name, seen in (("train", kept["x"]), ("val", kept["held"])):
        expected = seen @ kept["weight"] + kept["bias"]
        torch.testing.assert_close(raw[name] @ weight + bias, expected, rtol=1e-3, atol=1e-3)
    assert kept["truth"].tolist() == grades_of(manifest.split("val")).tolist()
    assert kept["grades"].tolist() == grades_of(records).tolist()
    assert kept["settings"] == [(lr, d) for lr in (0.01, 0.1) for d in (0.0, 0.1, 0.2)]
    assert len(rows) == 6


def test_views_are_made_once_and_fitted_on_in_turn(manifest, tmp_path, monkeypatch):
    """Each epoch's features are those of its own random crops, by a backbone run once for each."""
    ran, seen = [], []

    def counted(backbone, dataset, *how):
        ran.append((dataset.view, dataset.seed, len(dataset)))
        return extract_features(backbone, dataset)

    def spy(train, grades, held, truth, o, settings):
        seen.append([next(train).clone() for _ in range(o.epochs)])
        return torch.zeros(128, 5), torch.zeros(5), []

    monkeypatch.setattr(evaluation, "extract_features", counted)
    monkeypatch.setattr(eval_linear, "fit", spy)
    o, records = options(views=3, epochs=5), manifest.split("train")
    e = helpers.evaluation(o, manifest, tmp_path / "linear")
    for _ in range(2):
        fit_whole(e, o, records)
    crop, whole = ProbeView(32), eval_linear.WholeView(32)
    assert ran == [(crop, 0, 40), (whole, 0, 20), (crop, 1, 40), (crop, 2, 40)], "then the cache"
    ran.clear()
    fit_whole(e, replace(o, seed=2), records)
    assert ran == [(crop, 200_006 + number, 40) for number in range(3)], "crops are the seed's"
    assert all(torch.equal(a, b) for a, b in zip(*seen[:2], strict=True))
    first = [
        extract_features(e.backbone, PhotographDataset(manifest, records, crop, seed))["cls"]
        for seed in range(3)
    ]
    mean, std = first[0].flatten(1).mean(0), first[0].flatten(1).std(0)
    for epoch, found in enumerate(seen[0]):
        expected = (first[epoch % 3].flatten(1) - mean) / std
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(seen[0][0], seen[0][1], atol=0.1)


def test_the_test_split_does_not_move_the_head_but_val_does(manifest, tmp_path):
    o, heads = options(lr=(1e-3, 0.1)), {}
    variants = {
        "as it is": manifest,
        "test garbage": helpers.regraded(manifest, "test", 4),
        "val garbage": helpers.regraded(manifest, "val", 4),
    }
    for name, changed in variants.items():
        e = helpers.evaluation(o, changed, tmp_path / name / "linear")
        heads[name] = fit_whole(e, o, changed.split("train"))
    as_it_is, garbage = heads["as it is"], heads["test garbage"]
    assert torch.equal(as_it_is[0], garbage[0]) and torch.equal(as_it_is[1], garbage[1])
    assert as_it_is[2] == garbage[2]
    assert as_it_is[2] != heads["val garbage"][2]


def test_the_papers_protocol_draws_crops_each_epoch_and_judges_on_test(
    manifest, tmp_path, monkeypatch
):
    views, judged = [], []

    def noted(backbone, dataset, dtype, workers, title):
        views.append((dataset.view, dataset.seed, len(dataset)))
        return extract_features(backbone, dataset)

    def spy(train, grades, held, truth, o, settings):
        judged.append((truth.tolist(), settings, list(train)))
        return torch.zeros(128, 5), torch.zeros(5), []

    monkeypatch.setattr(eval_linear, "extract_features", noted)
    monkeypatch.setattr(eval_linear, "fit", spy)
    o = options(protocol="paper", epochs=2)
    e = helpers.evaluation(o, manifest, tmp_path / "linear-paper")
    fit_paper(e, o, manifest.split("train"))
    (truth, settings, epochs) = judged[0]
    assert truth == grades_of(manifest.split("test")).tolist()
    assert settings == [(pytest.approx(0.001 * 25 / 256), 0.0)]
    assert [view for view, _, _ in views] == [ProbeView()] * 2 and views[0][1] != views[1][1]
    assert not torch.equal(epochs[0], epochs[1]), "each epoch sees other crops"


def test_the_program_writes_a_head_that_repeats_its_predictions(manifest, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("seed: 0\n")
    save_backbone(helpers.pico(), run / "backbone.safetensors", {"data": str(manifest.root)})
    main(options(pretrained=str(run), epochs=20), None)
    found = json.loads((run / "linear" / "results.json").read_text())
    with safe_open(run / "linear" / "head.safetensors", framework="pt") as file:
        weight, bias = file.get_tensor("weight"), file.get_tensor("bias")
        about = json.loads(file.metadata()["ssrl"])
    assert weight.shape == (5, 128) and bias.shape == (5,)
    assert about["backbone"] == found["backbone"]["sha256"] and about["image_size"] == 32
    records = manifest.split("test")
    dataset = PhotographDataset(manifest, records, eval_linear.WholeView(32))
    x = extract_features(helpers.pico(), dataset)["cls"].flatten(1)
    predicted = (x @ weight.T + bias).argmax(1).numpy()
    lines = (run / "linear" / "predictions.csv").read_text().splitlines()[1:]
    assert [int(line.split(",")[4]) for line in lines] == predicted.tolist()
    right = float(np.mean(predicted == grades_of(records)))
    assert found["metrics"]["accuracy"]["value"] == pytest.approx(right) and right > 0.5
    assert sum(row["chosen"] for row in found["by_hyperparameter"]) == 1
    assert len(found["by_hyperparameter"]) == 24 and "chosen on val" in found["protocol"]
