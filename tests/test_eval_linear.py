"""eval_linear.py against autograd, torch.optim.SGD, scikit-learn, and a test that must not count.

Run it with `python -m pytest tests/test_eval_linear.py`.
Shapes: N rows, F features, K folds, S decays, G grades.
"""

import json
import math
from dataclasses import replace

import helpers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from sklearn import metrics as sk
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

import eval_linear
import evaluation
from augment import PaperView, ProbeView, WholeView
from data import PhotographDataset, grades_of
from eval_linear import (
    Calibration,
    Fit,
    LinearHead,
    Options,
    Probes,
    Rotation,
    fit,
    fit_paper,
    fit_whole,
    judge,
    main,
    probe_input,
    softmax,
)
from evaluation import GradedSet
from features import extract_features
from fundus import readings
from fundus.manifest import GRADES
from fundus.splits import fold_of_each
from utils import InputError
from vision_transformer import ARCHS, Backbone, BackboneSpec
from weights import save_backbone

DECAYS = (1e-3, 0.03, 1.0)


def options(**changed) -> Options:
    """Return options of seconds, with some changed."""
    values = {"workers": 0, "device": "cpu", "precision": "fp32", "epochs": 5, "pictures": False}
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
        {"choice_folds": 1},
        {"fractions": (0.0, 0.5)},
        {"fractions": (1.5,)},
        {"views": -1},
        {"views": 101, "epochs": 100},
        {"rotation": 181.0},
        {"rotation": float("nan")},
    ],
)
def test_numbers_that_cannot_be_are_refused(changed):
    with pytest.raises(InputError, match="--(epochs|views|rotation|choice-folds|fractions)"):
        options(**changed)


@pytest.mark.parametrize(
    "changed",
    [
        {"weight_decay": (0.1, float("nan"))},
        {"weight_decay": (0.0,)},
        {"weight_decay": (-1e-4,)},
        {"weight_decay": (0.1, 1e22)},
    ],
)
def test_settings_that_cannot_train_are_refused(changed):
    with pytest.raises(InputError, match="--weight-decay"):
        options(**changed)


@pytest.mark.parametrize(
    "flag, changed",
    [
        ("--features", {"features": "color"}),
        ("--readout", {"readout": "tokens"}),
        ("--choice-folds", {"choice_folds": 4}),
        ("--fractions", {"fractions": (0.1,)}),
        ("--views", {"views": 2}),
        ("--weight-decay", {"weight_decay": (0.1,)}),
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


@pytest.mark.parametrize("name, value", [("readout", "tokens"), ("views", 2)])
@pytest.mark.parametrize("kind", ["color", "handmade"])
def test_options_of_backbones_are_refused_for_other_features(kind, name, value):
    with pytest.raises(InputError, match=f"--{name}: is about --features backbone alone"):
        options(features=kind, **{name: value})


def assert_same_places(found, expected):
    """Fail unless rows are equally far apart, as of features that were turned in another way."""
    products = []
    for rows in (found, expected):
        rows = (rows - rows.mean(dim=0)).double()
        products.append(rows @ rows.T)
    torch.testing.assert_close(*products, rtol=1e-3, atol=1e-2)


# ------------------------------------------------------------------------------------- the fit


def noisy(count, width, signal, seed=0):
    """Return features of which a few tell a little of skewed grades, as of photographs."""
    rng = np.random.default_rng(seed)
    grades = rng.choice(GRADES, count, p=(0.6, 0.1, 0.2, 0.05, 0.05))
    features = rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) / width**0.5
    features[:, :10] += signal * grades[:, None]
    return torch.from_numpy(features).float(), torch.from_numpy(grades)


def folded(count, folds):
    """Return the fold of each row, and which groups learn from it, (N, K + 1)."""
    fold_of = torch.arange(count) // 2 % folds
    learns = torch.ones(count, folds + 1)
    learns[torch.arange(count), fold_of] = 0
    return fold_of, learns


def mean_loss(probe, features, grades, kept, decay):
    """Return what a probe minimises on the rows `kept`: cross-entropy with half its decay."""
    weight, bias = probe
    loss = F.cross_entropy(features[kept].double() @ weight + bias, grades[kept])
    return loss + decay * len(features) / int(kept.sum()) * weight.square().sum() / 2


def test_steps_are_gradients_over_the_curvatures_bound():
    """Nesterov's, each probe by itself, the gradient by autograd, momentum anew when uphill."""
    features, grades = noisy(90, 8, 1.0)
    rotation = Rotation([features])
    turned = rotation.turn(features)
    _, learns = folded(90, 3)
    probes = Probes(rotation.spread, DECAYS, learns)
    probes.start_at(grades)
    for _ in range(25):
        probes.step(turned, grades)

    restarts = 0
    for group in range(4):
        kept = learns[:, group] > 0
        share = 90 / int(kept.sum())
        for s, decay in enumerate(DECAYS):
            counts = np.bincount(grades[kept], minlength=GRADES) + 1
            weight = torch.zeros(8, GRADES, dtype=torch.double)
            bias = torch.from_numpy(np.log(counts / counts.sum()))
            last = (weight, bias)
            step = 1 / (0.5 * rotation.spread.double().unsqueeze(1) * share + decay * share)
            k = 0
            for _ in range(25):
                ahead = []
                for now, before in zip((weight, bias), last, strict=True):
                    ahead.append((now + k / (k + 3) * (now - before)).requires_grad_())
                loss = mean_loss(ahead, turned, grades, kept, decay)
                slopes = torch.autograd.grad(loss, ahead)
                last = (weight, bias)
                weight = ahead[0].detach() - step * slopes[0]
                bias = ahead[1].detach() - 2 / share * slopes[1]
                uphill = (slopes[0] * (weight - last[0])).sum()
                uphill += (slopes[1] * (bias - last[1])).sum()
                k = 0 if uphill > 0 else k + 1
                restarts += int(uphill > 0)
            assert (probes.weight[:, group, s] - weight).abs().max() < 1e-4, (group, decay)
            assert (probes.bias[group, s] - bias).abs().max() < 1e-4, (group, decay)
    assert restarts, "or nothing is shown of them"


def test_photographs_in_several_chunks_make_the_same_step(monkeypatch):
    features, grades = noisy(90, 8, 1.0)
    _, learns = folded(90, 3)
    weights = []
    for rows in (4096, 7):
        monkeypatch.setattr(eval_linear, "ROWS", rows)
        probes = Probes(torch.ones(8), DECAYS, learns)
        for _ in range(3):
            probes.step(features, grades)
        weights.append(probes.weight)
    torch.testing.assert_close(weights[0], weights[1])


def test_logits_are_a_product_for_each_decay_of_a_group():
    probes = Probes(torch.ones(8), DECAYS, torch.ones(7, 3))
    features, _ = blobs(7)
    probes.weight = torch.randn(8, 3, 3, GRADES)
    probes.bias = torch.randn(3, 3, GRADES)
    for group in (0, 1, 2, -1):
        for s in range(3):
            expected = features @ probes.weight[:, group, s] + probes.bias[group, s]
            torch.testing.assert_close(probes.logits(features, group)[:, s], expected)


def test_a_heads_logits_are_in_double():
    head = LinearHead(torch.eye(8)[:, :GRADES], torch.arange(5.0))
    logits = head.logits(1e-9 * torch.ones(2, 8))
    assert logits.dtype == np.float64
    assert logits[0, 1] == 1 + float(torch.tensor(1e-9))


@pytest.mark.parametrize("count, width", [(200, 12), (30, 50)])
def test_turned_features_are_uncorrelated_and_their_heads_turn_back(count, width):
    features, _ = noisy(count, width, 0.3)
    rotation = Rotation([3 * features + 7])
    turned = rotation.turn(3 * features + 7)
    kept = min(width, count - 1)
    assert turned.shape == (count, kept)
    moments = turned.T @ turned / count
    torch.testing.assert_close(moments, torch.diag(rotation.spread), rtol=0, atol=1e-4)
    scaled = (features - features.mean(0)) / features.std(0)
    assert_same_places(turned, scaled)

    head = LinearHead(torch.randn(kept, GRADES), torch.randn(GRADES))
    back = rotation.turn_back(head)
    expected = turned @ head.weight + head.bias
    torch.testing.assert_close(
        (3 * features + 7) @ back.weight + back.bias, expected, rtol=1e-3, atol=1e-3
    )


def test_views_are_uncorrelated_together():
    features, _ = noisy(60, 5, 0.3)
    other = features * torch.arange(1.0, 6.0)
    rotation = Rotation([features, other])
    both = rotation.turn(torch.cat([features, other]))
    torch.testing.assert_close(both.T @ both / 120, torch.diag(rotation.spread), rtol=0, atol=1e-3)
    assert rotation.mean.allclose(features.mean(0)), "the first one says what is standard"


# -------------------------------------------------------------------------------------- the choice


def fitted(features, grades, fold_of, asked):
    """Return the fit on turned features, and the turn."""
    rotation = Rotation([features])
    turned = rotation.turn(features)
    found = fit(forever(turned), turned, rotation.spread, grades, fold_of, asked)
    return found, rotation


@pytest.mark.parametrize("width, signal", [(8, 0.3), (60, 0.3), (150, 0.3), (150, 0.0)])
def test_the_probe_is_scikit_learns_with_c_chosen_the_same_way(width, signal):
    features, grades = noisy(1600, width, signal)
    learnt = features[:600]
    fold_of, _ = folded(600, 5)
    decays = (1e-3, 0.01, 0.1, 1.0, 10.0, 100.0)
    asked = options(epochs=300, weight_decay=decays)
    found, rotation = fitted(learnt, grades[:600], fold_of, asked)
    ours = softmax(rotation.turn_back(found.head).logits(features[600:]))

    scaled = ((features - rotation.mean) / rotation.std).double().numpy()
    losses = []
    for decay, row in zip(decays, found.rows, strict=True):
        shares = np.zeros((600, GRADES))
        for fold in range(5):
            kept = (fold_of != fold).numpy()
            model = LogisticRegression(C=1 / decay / 600, max_iter=1000)
            model.fit(scaled[:600][kept], grades[:600][kept])
            shares[~kept] = model.predict_proba(scaled[:600][~kept])
        losses.append(sk.log_loss(grades[:600], shares))
        assert row["weight_decay"] == decay
        if decay >= 0.01:  # those with less of it have a longer way to go
            assert row["log_loss"] == pytest.approx(losses[-1], rel=2e-3)
        right = (shares.argmax(axis=1) == grades[:600].numpy()).mean()
        assert row["accuracy"] == pytest.approx(right, abs=0.01)

    best = int(np.argmin(losses))
    assert [row["chosen"] for row in found.rows] == [s == best for s in range(len(decays))]
    assert (best == 5) == (signal == 0), "where features tell nothing, the largest is the best"
    model = LogisticRegression(C=1 / decays[best] / 600, max_iter=1000)
    theirs = model.fit(scaled[:600], grades[:600]).predict_proba(scaled[600:])
    assert np.abs(ours - theirs).max() < 0.06
    assert np.abs(ours - theirs).mean() < 0.001
    assert sk.log_loss(grades[600:], ours) == pytest.approx(
        sk.log_loss(grades[600:], theirs), rel=5e-3
    )
    assert sk.log_loss(grades[:600], softmax(found.held_out)) == pytest.approx(
        found.rows[best]["log_loss"], rel=1e-5
    )


def test_separable_toy_data_is_learnt():
    features, grades = blobs(200, distance=20.0)
    held, truth = blobs(50, distance=20.0, seed=1)
    fold_of, _ = folded(200, 4)
    found, rotation = fitted(features, grades, fold_of, options(epochs=50))
    head = rotation.turn_back(found.head)
    assert (head.logits(held).argmax(axis=1) == truth.numpy()).all()
    (chosen,) = [row for row in found.rows if row["chosen"]]
    assert chosen["accuracy"] == 1


def test_a_fit_ends_when_it_has_converged(monkeypatch):
    features, grades = noisy(90, 8, 1.0)
    fold_of, _ = folded(90, 3)
    taken = []
    step = Probes.step
    monkeypatch.setattr(Probes, "step", lambda *given: taken.append(step(*given)) or taken[-1])
    asked = options(weight_decay=(0.1, 1.0), epochs=500)
    found, _ = fitted(features, grades, fold_of, asked)
    assert 10 < len(taken) < 200
    assert taken[-1] < eval_linear.NEGLIGIBLE_GAIN <= min(taken[:-1])
    longer, _ = fitted(features, grades, fold_of, replace(asked, views=1, epochs=300))
    assert len(taken) > 300, "of random crops each epoch is another"
    assert np.abs(longer.held_out - found.held_out).max() < 0.02


def test_decays_without_a_finite_loss_are_never_chosen():
    held_out = torch.zeros(4, 3, GRADES)
    held_out[:, 0] = torch.nan
    held_out[:, 1, 0] = 9.0
    rows, best = judge(held_out, torch.tensor([0, 0, 0, 1]), (0.1, 1.0, 10.0))
    assert best == 2
    assert rows[0] == {"weight_decay": 0.1, "log_loss": None, "accuracy": 0.75, "chosen": False}
    assert rows[2]["log_loss"] == pytest.approx(math.log(5))
    json.dumps(rows, allow_nan=False)
    with pytest.raises(InputError, match="no weight decay gave a finite loss"):
        judge(held_out[:, :1], torch.tensor([0, 0, 0, 1]), (0.1,))


def test_a_calibration_reads_logits_by_temperature_then_thresholds():
    rng = np.random.default_rng(0)
    grades = rng.choice(GRADES, 2000, p=(0.6, 0.1, 0.2, 0.05, 0.05))
    logits = rng.normal(size=(2000, GRADES)) * 3 + 2 * np.eye(GRADES)[grades]
    calibration = Calibration.of(logits, grades)
    assert calibration.temperature == readings.fit_temperature(logits, grades)
    assert calibration.temperature > 1.2, "it was too sure"
    shares = calibration.probabilities(logits)
    assert shares.sum(axis=1) == pytest.approx(1)
    assert sk.log_loss(grades, shares) < sk.log_loss(grades, softmax(logits))
    expected = readings.expected_grade(shares)
    assert calibration.thresholds.tolist() == readings.fit_thresholds(expected, grades).tolist()
    read = calibration.thresholded(shares)
    assert read.tolist() == readings.read_thresholds(expected, calibration.thresholds).tolist()
    weights = {"weights": "quadratic"}
    assert sk.cohen_kappa_score(grades, read, **weights) > sk.cohen_kappa_score(
        grades, shares.argmax(axis=1), **weights
    )


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
    std = torch.randn(3, width)
    top = torch.randn(3, width)
    found = {"cls": cls_tokens, "patch": patch, "patch_std": std, "patch_top": top}
    found |= {"color": torch.rand(3, 6), "handmade": torch.rand(3, 9)}
    features = probe_input(found, options(protocol=protocol))
    parts = [cls_tokens[:, 0], cls_tokens[:, 1], cls_tokens[:, 2], cls_tokens[:, 3]]
    if blocks == 1:
        parts = [cls_tokens[:, 3], patch]
    assert torch.equal(features, torch.cat(parts, dim=1))
    for kind in ("color", "handmade"):
        assert torch.equal(probe_input(found, options(features=kind)), found[kind])
    tokens = probe_input(found, options(readout="tokens"))
    assert torch.equal(tokens, torch.cat([cls_tokens.flatten(1), patch, std, top], dim=1))


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


def splits_of(manifest):
    return [manifest.split("train"), manifest.split("val")]


def learnt_by(manifest):
    return [*manifest.split("train"), *manifest.split("val")]


def test_the_head_takes_features_as_they_are_extracted(manifest, tmp_path):
    asked = options(weight_decay=(0.03, 0.3), epochs=200)
    opened = helpers.evaluation(asked, manifest, tmp_path / "linear")
    records = learnt_by(manifest)
    found = fit_whole(opened, splits_of(manifest), records)
    raw = cls_of(opened.backbone, manifest, records, WholeView(32))
    fold_of = torch.tensor(fold_of_each(records, 5))
    expected, rotation = fitted(raw, torch.from_numpy(grades_of(records)), fold_of, asked)
    logits = rotation.turn(raw) @ expected.head.weight + expected.head.bias
    assert np.abs(found.head.logits(raw) - logits.numpy()).max() < 1e-2
    assert np.abs(found.held_out - expected.held_out).max() < 1e-2
    assert [row["weight_decay"] for row in found.rows] == [0.03, 0.3]


@pytest.fixture
def fits(monkeypatch):
    """Let no probe be trained; a list of what each fit was given: grades and epochs."""
    given = []

    def spy(train, whole, spread, grades, fold_of, asked):
        epochs = [next(train).clone() for _ in range(asked.epochs)]
        given.append({"grades": grades.tolist(), "whole": whole, "epochs": epochs})
        assert fold_of.max() == 4
        head = LinearHead(torch.zeros(whole.shape[1], GRADES), torch.zeros(GRADES))
        return Fit(head, np.zeros((len(grades), GRADES)), [])

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
    splits = splits_of(manifest)
    records = learnt_by(manifest)
    opened = helpers.evaluation(asked, manifest, tmp_path / "linear")
    crop = ProbeView(32, flip_vertical=True, rotation=0.0)

    fit_whole(opened, splits, records)
    assert [entry[1:] for entry in extracted[:2]] == [(0, 40), (0, 20)], "the whole view, first"
    crops = [(crop, seed, count) for seed in range(3) for count in (40, 20)]
    assert extracted[2:] == crops
    fit_whole(opened, splits, records)
    assert len(extracted) == 8, "the second time all of them are cached"
    for once, again in zip(fits[0]["epochs"], fits[1]["epochs"], strict=True):
        assert torch.equal(once, again)

    whole = cls_of(opened.backbone, manifest, records, WholeView(32))
    views = []
    for seed in range(3):
        crops = [cls_of(opened.backbone, manifest, part, crop, seed) for part in splits]
        views.append(torch.cat(crops))
    rotation = Rotation([whole, *views])
    assert_same_places(fits[0]["whole"], rotation.turn(whole))
    for epoch, features in enumerate(fits[0]["epochs"]):
        assert_same_places(features, rotation.turn(views[epoch % 3]))
    assert not torch.allclose(fits[0]["epochs"][0], fits[0]["epochs"][1], atol=0.1)


def test_crops_are_the_seeds_and_turned_as_asked(manifest, tmp_path, monkeypatch, fits):
    extracted = note_extractions(monkeypatch, evaluation)
    asked = options(views=2, seed=2, flip_vertical=False, rotation=30.0)
    opened = helpers.evaluation(asked, manifest, tmp_path / "linear")
    fit_whole(opened, splits_of(manifest), learnt_by(manifest))
    crop = ProbeView(32, flip_vertical=False, rotation=30.0)
    assert (crop, 200_006, 40) in extracted
    assert (crop, 200_007, 20) in extracted
    assert len(extracted) == 6


def test_a_fraction_is_read_from_the_cache_of_all(manifest, tmp_path, monkeypatch, fits):
    extracted = note_extractions(monkeypatch, evaluation)
    opened = helpers.evaluation(options(), manifest, tmp_path / "linear")
    chosen = [*manifest.split("train")[4:10], *manifest.split("val")[::3]]
    fit_whole(opened, splits_of(manifest), chosen)
    assert [count for _, _, count in extracted] == [40, 20]
    raw = cls_of(opened.backbone, manifest, chosen, WholeView(32))
    assert_same_places(fits[0]["whole"], Rotation([raw]).turn(raw))
    assert fits[0]["grades"] == grades_of(chosen).tolist()


def test_the_test_split_does_not_move_the_head_but_val_does(manifest, tmp_path):
    asked = options(weight_decay=(0.1, 1.0))

    def fit_on(changed, name):
        opened = helpers.evaluation(asked, changed, tmp_path / name / "linear")
        return fit_whole(opened, splits_of(changed), learnt_by(changed))

    found = fit_on(manifest, "as it is")
    same = fit_on(helpers.regraded(manifest, "test", 4), "test garbage")
    assert torch.equal(found.head.weight, same.head.weight)
    assert torch.equal(found.head.bias, same.head.bias)
    assert found.rows == same.rows
    other = fit_on(helpers.regraded(manifest, "val", 4), "val garbage")
    assert found.rows != other.rows


def test_the_papers_protocol_draws_crops_each_epoch_and_chooses_on_test(
    manifest, tmp_path, monkeypatch
):
    """Against torch's SGD on the published crops, the epoch of the highest test accuracy kept."""
    extracted = note_extractions(monkeypatch, eval_linear)
    held = note_extractions(monkeypatch, evaluation)
    asked = options(protocol="paper", epochs=4, seed=1)
    opened = helpers.evaluation(asked, manifest, tmp_path / "linear-paper")
    opened = replace(opened, image_size=224)
    records = manifest.split("train")
    test = GradedSet("", manifest, manifest.split("test"))
    monkeypatch.setattr(eval_linear, "PAPER_LR", 0.05)  # so that epochs differ
    head, (row,) = fit_paper(opened, records, test)

    # The published crops: not upside down, not turned, whatever training does.
    published = ProbeView(224, flip_vertical=False, rotation=0.0)
    assert extracted == [(published, 100_003 + epoch, 40) for epoch in range(4)]
    assert [(seed, count) for _, seed, count in held] == [(0, 10)]

    generator = torch.Generator().manual_seed(1)
    start = torch.empty(GRADES, 128).normal_(0, 0.01, generator=generator)
    weight = start.T.double().requires_grad_()
    bias = torch.zeros(GRADES, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.SGD([weight, bias], lr=0.05, momentum=0.9)
    truth = grades_of(test.records)
    asked_of = cls_of(opened.backbone, manifest, test.records, PaperView()).double()
    best = (-1.0, 0.0)
    for epoch in range(4):
        crops = cls_of(opened.backbone, manifest, records, published, 100_003 + epoch).double()
        order = np.random.default_rng((1, epoch)).permutation(40)
        for number, rows in enumerate((order[:25], order[25:])):
            scale = (1 + math.cos(math.pi * (epoch + number / 2) / 4)) / 2
            optimizer.param_groups[0]["lr"] = 0.05 * scale
            optimizer.zero_grad()
            labels = torch.from_numpy(grades_of(records)[rows])
            F.cross_entropy(crops[rows] @ weight + bias, labels).backward()
            optimizer.step()
        logits = (asked_of @ weight + bias).detach()
        accuracy = float((logits.argmax(1).numpy() == truth).mean())
        loss = float(F.cross_entropy(logits, torch.from_numpy(truth)))
        if (accuracy, -loss) > best:
            best = (accuracy, -loss)
            expected = (epoch + 1, weight.detach().clone(), bias.detach().clone())
    assert row["epoch"] == expected[0]
    assert row["accuracy"] == pytest.approx(best[0])
    assert row["log_loss"] == pytest.approx(-best[1], rel=1e-3)
    torch.testing.assert_close(head.weight.double(), expected[1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(head.bias.double(), expected[2], rtol=1e-3, atol=1e-3)


def test_the_program_writes_a_head_that_repeats_its_predictions(manifest, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("seed: 0\n")
    save_backbone(helpers.pico(), run / "backbone.safetensors", {"data": str(manifest.root)})
    main(options(pretrained=str(run), epochs=60), None)

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
    shares = (features.double() @ weight.T.double() + bias.double()).softmax(dim=1)
    predicted = shares.argmax(1).numpy()
    lines = (run / "linear" / "predictions.csv").read_text().splitlines()[1:]
    assert [int(line.split(",")[4]) for line in lines] == predicted.tolist()
    for line, row in zip(lines, shares.tolist(), strict=True):
        assert [float(text) for text in line.split(",")[5:10]] == pytest.approx(row, abs=1e-4)
    expected = readings.expected_grade(shares.numpy())
    read = readings.read_thresholds(expected, np.array(about["thresholds"]))
    assert [int(line.split(",")[10]) for line in lines] == read.tolist()
    assert results["thresholded"]["thresholds"] == about["thresholds"]
    right = float(np.mean(predicted == grades_of(records)))
    assert results["metrics"]["accuracy"]["value"] == pytest.approx(right)
    assert right > 0.5

    assert "chosen by log-loss over patient folds" in results["protocol"]
    assert results["candidates"] == len(results["by_hyperparameter"]) == 13
    (chosen,) = [row for row in results["by_hyperparameter"] if row["chosen"]]
    # The temperature was fitted on the same photographs, so it can only lower their loss.
    assert results["validation"]["log_loss"] <= chosen["log_loss"] + 1e-6
    assert results["validation"]["accuracy"] == pytest.approx(chosen["accuracy"])
    assert sum(row["chosen"] for row in results["by_hyperparameter"]) == 1


@pytest.mark.parametrize(
    "changed, folder, named",
    [
        ({"protocol": "paper"}, "linear-paper", "best epoch on the test split"),
        ({"features": "color"}, "linear-color", "on colour alone"),
        ({"features": "handmade"}, "linear-handmade", "on hand-made statistics"),
        ({"readout": "tokens"}, "linear-tokens", "patch tokens too"),
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


def test_fractions_of_the_patients_are_fitted_on_too(manifest, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("seed: 0\n")
    save_backbone(helpers.pico(), run / "backbone.safetensors", {"data": str(manifest.root)})
    asked = {"pretrained": str(run), "epochs": 20, "pictures": True}
    main(options(fractions=(0.2, 1.0), fraction_seeds=3, **asked), None)
    results = json.loads((run / "linear-fractions" / "results.json").read_text())
    few, every = results["by_fraction"]
    assert (few["fraction"], few["seeds"], few["patients"], few["images"]) == (0.2, 3, 6, 12)
    assert (every["fraction"], every["patients"], every["images"]) == (1.0, 30, 60)
    values = few["log_loss"]["values"]
    assert few["log_loss"]["mean"] == pytest.approx(np.mean(values))
    assert few["log_loss"]["sd"] == pytest.approx(np.std(values, ddof=1))
    assert len(set(values)) == 3, "draws of patients differ"
    # Of all patients there is one draw, the same as the evaluation's own.
    own = results["metrics"]["log_loss"]["value"]
    assert every["log_loss"]["values"] == pytest.approx([own] * 3)
    with Image.open(run / "linear-fractions" / "fractions.png") as picture:
        assert picture.format == "PNG"
