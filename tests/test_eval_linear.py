"""eval_linear.py against autograd, torch.optim.SGD, toy data, and a test split that must not count.

Run it with `python -m pytest tests/test_eval_linear.py`.
Shapes: N rows, F features, S settings, G grades.
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
from augment import PaperView, ProbeView, WholeView
from data import PhotographDataset, grades_of
from eval_linear import (
    LinearHead,
    Options,
    Probes,
    fit,
    fit_paper,
    fit_whole,
    main,
    probe_input,
    train_epoch,
)
from features import extract_features
from fundus.manifest import GRADES
from utils import InputError
from vision_transformer import ARCHS, Backbone, BackboneSpec
from weights import save_backbone

SETTINGS = [(0.5, 0.0), (0.1, 1e-2), (0.01, 0.3), (1e-3, 0.0)]


def options(**changed) -> Options:
    """Return options of seconds, with some changed."""
    values = {"workers": 0, "device": "cpu", "precision": "fp32", "epochs": 5}
    if changed.get("protocol") != "paper":  # which has a batch size of its own
        values["batch_size"] = 16
    return Options(**{**values, **changed})


def blobs(count=100, width=8, distance=6.0, seed=0):
    """Return features (N, F) around one middle a grade, and grades (N,).

    Middles that are far apart make the grades separable.
    """
    generator = torch.Generator().manual_seed(seed)
    grades = torch.arange(count) % GRADES
    noise = torch.randn(count, width, generator=generator)
    return distance * torch.eye(width)[grades] + noise, grades


def forever(features):
    """Give the same features for every epoch."""
    while True:
        yield features


# ----------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "changed",
    [
        {"epochs": 0},
        {"epochs": 10**19},
        {"batch_size": 0},
        {"views": -1},
        {"views": 101, "epochs": 100},
        {"rotation": 181.0},
        {"rotation": float("nan")},
    ],
)
def test_numbers_that_cannot_be_are_refused(changed):
    with pytest.raises(InputError, match="--(epochs|batch-size|views|rotation)"):
        options(**changed)


@pytest.mark.parametrize(
    "changed",
    [
        {"lr": (0.1, float("nan"))},
        {"lr": (-0.1,)},
        {"lr": (0.0,)},
        {"lr": (float("inf"),)},
        {"weight_decay": (-1e-4,)},
        {"weight_decay": (0.0, 1e22)},
    ],
)
def test_settings_that_cannot_train_are_refused(changed):
    with pytest.raises(InputError, match="--lr|--weight-decay"):
        options(**changed)


@pytest.mark.parametrize(
    "flag, changed",
    [
        ("--features", {"features": "color"}),
        ("--select", {"select": "accuracy"}),
        ("--views", {"views": 2}),
        ("--lr", {"lr": (0.1,)}),
        ("--weight-decay", {"weight_decay": (0.0,)}),
        ("--batch-size", {"batch_size": 25}),
        ("--image-size", {"image_size": 224}),
        ("--flip-vertical", {"flip_vertical": False}),
        ("--rotation", {"rotation": 10.0}),
    ],
)
def test_the_papers_protocol_fixes_what_it_published(flag, changed):
    with pytest.raises(InputError, match=f"--protocol paper fixes {flag};"):
        options(protocol="paper", **changed)


@pytest.mark.parametrize("changed", [{"flip_vertical": False}, {"rotation": 10.0}])
def test_options_of_views_that_are_not_drawn_are_refused(changed):
    with pytest.raises(InputError, match="is about --views, which are none"):
        options(**changed)
    options(views=2, **changed)


def test_the_papers_protocol_keeps_the_most_accurate_epoch():
    paper = options(protocol="paper")
    assert paper.criterion == "accuracy"
    assert replace(paper, seed=1).criterion == "accuracy"
    assert options(select="balanced_accuracy").criterion == "balanced_accuracy"


# ------------------------------------------------------------------------------------- the training


def test_steps_are_those_of_torchs_sgd_for_every_setting():
    features, grades = blobs(64, distance=1.0)
    probes = Probes(8, SETTINGS, seed=3)
    start = probes.weight[:, 0].clone()
    for s in range(len(SETTINGS)):
        assert torch.equal(probes.weight[:, s], start), "settings start alike"

    batches = []
    for step in range(20):
        rows = torch.arange(16) + 16 * (step % 4)
        batches.append((rows, 1.0 - 0.04 * step))
    for rows, scale in batches:
        probes.step(features[rows], grades[rows], scale)

    for s, (lr, decay) in enumerate(SETTINGS):
        weight = start.double().requires_grad_()
        bias = torch.zeros(GRADES, dtype=torch.double, requires_grad=True)
        groups = [{"params": [weight], "weight_decay": decay}, {"params": [bias]}]
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)
        for rows, scale in batches:
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
            optimizer.zero_grad()
            logits = features[rows].double() @ weight + bias
            F.cross_entropy(logits, grades[rows]).backward()
            optimizer.step()
        assert (probes.weight[:, s] - weight).abs().max() < 1e-5, (lr, decay)
        assert (probes.bias[s] - bias).abs().max() < 1e-5, (lr, decay)


def test_logits_are_a_product_for_each_setting():
    probes = Probes(8, SETTINGS, seed=0)
    features, _ = blobs(7)
    probes.weight = torch.randn(8, 4, GRADES)
    probes.bias = torch.randn(4, GRADES)
    for s in range(4):
        expected = features @ probes.weight[:, s] + probes.bias[s]
        torch.testing.assert_close(probes.logits(features)[:, s], expected)


class Recorder:
    """Takes the place of Probes and notes its steps."""

    def __init__(self):
        self.rows = []  # of each step
        self.grades = []
        self.scales = []

    def step(self, features, grades, scale):
        self.rows.append(features[:, 0].int().tolist())
        self.grades.append(grades.tolist())
        self.scales.append(scale)


@pytest.mark.parametrize("protocol, sizes", [("whole", [16, 16, 16, 2]), ("paper", [25, 25])])
def test_an_epoch_takes_each_row_once_in_its_own_order(protocol, sizes):
    features = torch.arange(50.0).unsqueeze(1)
    grades = torch.arange(50) % GRADES
    orders = []
    for epoch in (0, 1, 2, 2):
        recorder = Recorder()
        train_epoch(recorder, features, grades, epoch, options(protocol=protocol, epochs=3))
        order = sum(recorder.rows, [])
        assert sorted(order) == list(range(50))
        assert sum(recorder.grades, []) == [row % GRADES for row in order]
        assert [len(rows) for rows in recorder.rows] == sizes
        for number, scale in enumerate(recorder.scales):
            done = (epoch + number / len(sizes)) / 3
            assert scale == pytest.approx((1 + math.cos(math.pi * done)) / 2)
        orders.append(order)
    assert orders[0] != orders[1] != orders[2]
    assert orders[2] == orders[3], "an epoch's order is its own, whatever came before"


# -------------------------------------------------------------------------------------- the choice


def score_by_scikit(head, held, truth, criterion):
    """Return a metric of one head on held-out rows."""
    predicted = (held @ head.weight + head.bias).argmax(1).numpy()
    if criterion == "qwk":
        labels = list(range(GRADES))
        return sk.cohen_kappa_score(truth, predicted, weights="quadratic", labels=labels)
    if criterion == "accuracy":
        return sk.accuracy_score(truth, predicted)
    return sk.balanced_accuracy_score(truth, predicted)


@pytest.mark.parametrize("select", ["qwk", "accuracy", "balanced_accuracy"])
def test_the_best_setting_and_epoch_on_the_held_out_rows_are_returned(select):
    features, grades = blobs(80, distance=1.0)
    held, truth = blobs(61, distance=1.0, seed=1)
    asked = options(select=select, epochs=6)
    head, rows = fit(forever(features), grades, held, truth.numpy(), asked, SETTINGS)

    # The same training one setting at a time, every epoch judged by scikit-learn.
    ranks = []
    heads = []
    for setting, row in zip(SETTINGS, rows, strict=True):
        probes = Probes(8, [setting], asked.seed)
        tried = []
        for epoch in range(6):
            train_epoch(probes, features, grades, epoch, asked)
            then = LinearHead(probes.weight[:, 0].clone(), probes.bias[0].clone())
            loss = F.cross_entropy(held @ then.weight + then.bias, truth).item()
            score = score_by_scikit(then, held, truth.numpy(), select)
            tried.append((score, -loss, epoch + 1, then))
        score, minus_loss, epoch, then = max(tried, key=lambda entry: entry[:2])
        assert (row["lr"], row["weight_decay"], row["epoch"]) == (*setting, epoch)
        assert row[select] == pytest.approx(score)
        assert row["loss"] == pytest.approx(-minus_loss)
        ranks.append((score, minus_loss))
        heads.append(then)

    winner = ranks.index(max(ranks))
    assert [row["chosen"] for row in rows] == [s == winner for s in range(len(SETTINGS))]
    torch.testing.assert_close(head.weight, heads[winner].weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head.bias, heads[winner].bias, rtol=1e-4, atol=1e-5)
    assert len({row["epoch"] for row in rows}) > 1, "epochs differ, so that choosing one matters"


def test_separable_toy_data_is_learnt():
    features, grades = blobs(200, distance=20.0)
    held, truth = blobs(50, distance=20.0, seed=1)
    asked = options(epochs=20)
    head, rows = fit(forever(features), grades, held, truth.numpy(), asked, [(0.1, 0.0)])
    assert ((held @ head.weight + head.bias).argmax(1) == truth).all()
    assert rows[0]["qwk"] == 1
    assert rows[0]["chosen"] is True


def test_a_setting_that_diverges_is_never_chosen():
    features, grades = blobs(60, distance=1.0)
    settings = [(3e38, 0.0), (0.1, 0.0), (1e38, 1e3)]  # the largest float is 3.4e38
    head, rows = fit(forever(features), grades, features, grades.numpy(), options(), settings)
    assert [row["chosen"] for row in rows] == [False, True, False]
    assert head.weight.isfinite().all() and head.bias.isfinite().all()
    assert head.weight.any()
    json.dumps(rows, allow_nan=False)


def test_a_setting_that_diverges_is_still_named():
    features, grades = blobs(60, distance=1.0)
    settings = [(3e38, 0.1), (0.1, 0.0)]
    _, rows = fit(forever(features), grades, features, grades.numpy(), options(), settings)
    assert (rows[0]["lr"], rows[0]["weight_decay"]) == settings[0]


def test_no_setting_that_works_is_an_error():
    features, grades = blobs(60, distance=1.0)
    settings = [(3e38, 0.0), (3e38, 0.1)]
    with pytest.raises(InputError, match=r"--lr 3e\+38: all diverged"):
        fit(forever(features), grades, features, grades.numpy(), options(), settings)


# ---------------------------------------------------------------------------------------- its input


@pytest.mark.parametrize(
    "width, protocol, blocks",
    [
        (64, "whole", 4),
        (767, "whole", 4),
        (768, "whole", 1),
        (1024, "whole", 1),
        (1024, "paper", 4),
        (64, "paper", 4),
    ],
)
def test_input_by_width_and_protocol(width, protocol, blocks):
    cls_tokens = torch.randn(3, 4, width)
    patch = torch.randn(3, width)
    found = {"cls": cls_tokens, "patch": patch, "color": torch.rand(3, 6)}
    features = probe_input(found, options(protocol=protocol))
    parts = [cls_tokens[:, 0], cls_tokens[:, 1], cls_tokens[:, 2], cls_tokens[:, 3]]
    if blocks == 1:
        parts = [cls_tokens[:, 3], patch]
    assert torch.equal(features, torch.cat(parts, dim=1))
    assert torch.equal(probe_input(found, options(features="color")), found["color"])


def test_of_the_short_names_base_and_large_are_wide():
    wide = set()
    for arch in ARCHS:
        with torch.device("meta"):
            backbone = Backbone(BackboneSpec(arch, 16, 32))
        tokens = torch.zeros(1, 4, backbone.embed_dim)
        found = {"cls": tokens, "patch": tokens[:, 0]}
        if probe_input(found, options()).shape[1] == 2 * backbone.embed_dim:
            wide.add(arch)
    assert {"vit_base", "vit_large"} <= wide
    assert not wide & {"vit_tiny", "vit_small", "vit_small_h12"}


# ------------------------------------------------------------------------------ the whole protocol


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return helpers.draw_prepared(tmp_path_factory.mktemp("set") / "drawn", train=40, val=20)


def cls_of(backbone, manifest, records, view, seed=0):
    """Return the [CLS] of all blocks of a pico, (N, F)."""
    dataset = PhotographDataset(manifest, records, view, seed)
    return extract_features(backbone, dataset)["cls"].flatten(1)


def test_standardisation_is_folded_into_the_head(manifest, tmp_path, monkeypatch):
    given = {}

    def spy(train, grades, held, truth, asked, settings):
        head, rows = fit(train, grades, held, truth, asked, settings)
        given.update(train=next(train), held=held, truth=truth, grades=grades)
        given.update(head=LinearHead(head.weight.clone(), head.bias.clone()), settings=settings)
        return head, rows

    monkeypatch.setattr(eval_linear, "fit", spy)
    asked = options(lr=(0.01, 0.1), weight_decay=(0.0, 0.1, 0.2))
    opened = helpers.evaluation(asked, manifest, tmp_path / "linear")
    train = manifest.split("train")
    val = manifest.split("val")
    folded, rows = fit_whole(opened, train)

    assert given["train"].mean(0).abs().max() < 1e-4
    assert (given["train"].std(0) - 1).abs().max() < 1e-3
    for records, standardised in ((train, given["train"]), (val, given["held"])):
        raw = cls_of(opened.backbone, manifest, records, WholeView(32))
        expected = standardised @ given["head"].weight + given["head"].bias
        found = raw @ folded.weight + folded.bias
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)

    assert given["truth"].tolist() == grades_of(val).tolist()
    assert given["grades"].tolist() == grades_of(train).tolist()
    assert given["settings"] == [
        *((0.01, 0.0), (0.01, 0.1), (0.01, 0.2)),
        *((0.1, 0.0), (0.1, 0.1), (0.1, 0.2)),
    ]
    assert len(rows) == 6


@pytest.fixture
def fits(monkeypatch):
    """Let no probe be trained; a list of what each fit was given: grades, settings, epochs."""
    given = []

    def spy(train, grades, held, truth, asked, settings):
        epochs = [next(train).clone() for _ in range(asked.epochs)]
        given.append({"truth": truth.tolist(), "settings": settings, "epochs": epochs})
        return LinearHead(torch.zeros(128, GRADES), torch.zeros(GRADES)), []

    monkeypatch.setattr(eval_linear, "fit", spy)
    return given


def note_extractions(monkeypatch, module):
    """Return a list of view, seed and number of photographs whenever the module extracts some."""
    extracted = []

    def noted(backbone, dataset, *_):
        extracted.append((dataset.view, dataset.seed, len(dataset)))
        return extract_features(backbone, dataset)

    monkeypatch.setattr(module, "extract_features", noted)
    return extracted


def test_views_are_made_once_and_fitted_on_in_turn(manifest, tmp_path, monkeypatch, fits):
    """Each epoch's features are those of its own random crops, by a backbone run once for each."""
    extracted = note_extractions(monkeypatch, evaluation)
    asked = options(views=3, epochs=5)
    records = manifest.split("train")
    opened = helpers.evaluation(asked, manifest, tmp_path / "linear")
    crop = ProbeView(32, flip_vertical=True, rotation=0.0)
    whole = WholeView(32)

    fit_whole(opened, records)
    assert extracted == [(crop, 0, 40), (whole, 0, 20), (crop, 1, 40), (crop, 2, 40)]
    fit_whole(opened, records)
    assert len(extracted) == 4, "the second time all of them are cached"
    for once, again in zip(fits[0]["epochs"], fits[1]["epochs"], strict=True):
        assert torch.equal(once, again)

    views = [cls_of(opened.backbone, manifest, records, crop, seed) for seed in range(3)]
    mean = views[0].mean(0)
    std = views[0].std(0)
    for epoch, features in enumerate(fits[0]["epochs"]):
        expected = (views[epoch % 3] - mean) / std
        torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(fits[0]["epochs"][0], fits[0]["epochs"][1], atol=0.1)


def test_crops_are_the_seeds_and_turned_as_asked(manifest, tmp_path, monkeypatch, fits):
    extracted = note_extractions(monkeypatch, evaluation)
    asked = options(views=2, seed=2, flip_vertical=False, rotation=30.0)
    opened = helpers.evaluation(asked, manifest, tmp_path / "linear")
    fit_whole(opened, manifest.split("train"))
    crop = ProbeView(32, flip_vertical=False, rotation=30.0)
    assert (crop, 200_006, 40) in extracted
    assert (crop, 200_007, 40) in extracted
    assert len(extracted) == 3


def test_the_test_split_does_not_move_the_head_but_val_does(manifest, tmp_path):
    asked = options(lr=(1e-3, 0.1))

    def fit_on(changed, name):
        opened = helpers.evaluation(asked, changed, tmp_path / name / "linear")
        return fit_whole(opened, changed.split("train"))

    head, rows = fit_on(manifest, "as it is")
    same_head, same_rows = fit_on(helpers.regraded(manifest, "test", 4), "test garbage")
    assert torch.equal(head.weight, same_head.weight)
    assert torch.equal(head.bias, same_head.bias)
    assert rows == same_rows
    _, other_rows = fit_on(helpers.regraded(manifest, "val", 4), "val garbage")
    assert rows != other_rows


def test_the_papers_protocol_draws_crops_each_epoch_and_judges_on_test(
    manifest, tmp_path, monkeypatch, fits
):
    extracted = note_extractions(monkeypatch, eval_linear)
    held = note_extractions(monkeypatch, evaluation)
    opened = helpers.evaluation(
        options(protocol="paper", epochs=2, seed=1), manifest, tmp_path / "linear-paper"
    )
    fit_paper(opened, manifest.split("train"))
    (given,) = fits
    assert given["truth"] == grades_of(manifest.split("test")).tolist()
    assert given["settings"] == [(pytest.approx(0.001 * 25 / 256), 0.0)]
    # The published crops: not upside down, not turned, whatever training does.
    published = ProbeView(224, flip_vertical=False, rotation=0.0)
    assert extracted == [(published, 100_003, 40), (published, 100_004, 40)]
    assert held == [(PaperView(), 0, 10)]
    first, second = given["epochs"]
    assert not torch.equal(first, second), "each epoch has other crops"


def test_the_program_writes_a_head_that_repeats_its_predictions(manifest, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("seed: 0\n")
    save_backbone(helpers.pico(), run / "backbone.safetensors", {"data": str(manifest.root)})
    main(options(pretrained=str(run), epochs=20), None)

    results = json.loads((run / "linear" / "results.json").read_text())
    with safe_open(run / "linear" / "head.safetensors", framework="pt") as file:
        weight = file.get_tensor("weight")
        bias = file.get_tensor("bias")
        about = json.loads(file.metadata()["ssrl"])
    assert weight.shape == (GRADES, 128)
    assert bias.shape == (GRADES,)
    assert about["backbone"] == results["backbone"]["sha256"]
    assert about["image_size"] == 32
    assert (about["spec"]["arch"], about["features"]) == ("vit_pico", "backbone")

    records = manifest.split("test")
    features = cls_of(helpers.pico(), manifest, records, WholeView(32))
    predicted = (features @ weight.T + bias).argmax(1).numpy()
    lines = (run / "linear" / "predictions.csv").read_text().splitlines()[1:]
    assert [int(line.split(",")[4]) for line in lines] == predicted.tolist()
    right = float(np.mean(predicted == grades_of(records)))
    assert results["metrics"]["accuracy"]["value"] == pytest.approx(right)
    assert right > 0.5

    assert "chosen on val" in results["protocol"]
    assert len(results["by_hyperparameter"]) == 24
    assert sum(row["chosen"] for row in results["by_hyperparameter"]) == 1


@pytest.mark.parametrize(
    "changed, folder, named",
    [
        ({"protocol": "paper"}, "linear-paper", "best epoch on the test split"),
        ({"features": "color"}, "linear-color", "on colour alone"),
        ({"views": 1}, "linear", "fitted on 1 random crops of each photograph"),
    ],
)
def test_results_of_each_kind_have_their_folder_and_say_so(
    manifest, tmp_path, changed, folder, named
):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("seed: 0\n")
    save_backbone(helpers.pico(), run / "backbone.safetensors", {"data": str(manifest.root)})
    main(options(pretrained=str(run), epochs=1, **changed), None)
    results = json.loads((run / folder / "results.json").read_text())
    assert results["protocol"].startswith("linear probe")
    assert named in results["protocol"]
    with safe_open(run / folder / "head.safetensors", framework="pt") as file:
        about = json.loads(file.metadata()["ssrl"])
    expected_size = 32
    if folder == "linear-paper":
        expected_size = 224
    assert about["image_size"] == expected_size
