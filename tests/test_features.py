"""features.py against scikit-learn, a direct forward, and numbers worked by hand.

Run it with `python -m pytest tests/test_features.py`.
"""

import math
from dataclasses import dataclass, replace

import helpers
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

import features
import losses
from augment import PaperView, WholeView
from data import PhotographDataset, grades_of
from features import (
    Monitor,
    Signatures,
    Signed,
    check_finite,
    choose_view,
    embedding_std,
    extract_features,
    knn_predict,
    name_collapse,
    rankme,
    sign_photographs,
)
from fundus import metrics
from fundus.copies import signature
from fundus.manifest import GRADES
from utils import InputError
from vision_transformer import Backbone, BackboneSpec


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return helpers.draw_prepared(tmp_path_factory.mktemp("prepared") / "set")


# -------------------------------------------------------------------------------------------- k-NN


def random_bank(count=300, queries=50, width=12, seed=0):
    """Return a bank, its grades and queries, of features that do not tell the grades.

    Neighbours disagree, so that their weights matter.
    """
    generator = torch.Generator().manual_seed(seed)
    bank = torch.randn(count, width, generator=generator)
    asked = torch.randn(queries, width, generator=generator)
    grades = torch.randint(GRADES, (count,), generator=generator)
    return bank, grades, asked


def scikit_votes(bank, grades, queries, k, temperature=0.07):
    """Return the votes (N, G) of scikit-learn's weighted k-NN, in double precision."""
    reference = KNeighborsClassifier(
        k,
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp((1 - distance) / temperature),
    )
    reference.fit(bank.double().numpy(), grades.numpy())
    votes = np.zeros((len(queries), GRADES))
    votes[:, reference.classes_] = reference.predict_proba(queries.double().numpy())
    return votes


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
    assert len(queries) > 2 * features.QUERIES
    found = knn_predict(bank, grades, queries, [3])[3]
    assert found.shape == (5000, GRADES)
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
    assert knn_predict(bank, grades, queries, [5, 5])[5].shape == (50, GRADES)


# -------------------------------------------------------------------------------- how features lie


def test_rankme_by_hand():
    assert rankme(torch.eye(6)) == pytest.approx(6)
    turned = torch.linalg.qr(torch.randn(8, 8))[0]
    assert rankme(turned[:5] * 3) == pytest.approx(5, rel=1e-5)
    line = torch.outer(torch.arange(1.0, 9), torch.arange(1.0, 6))
    assert rankme(line) == pytest.approx(1, abs=1e-4)
    # Singular values 3 and 1: shares 3/4 and 1/4.
    entropy = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    assert rankme(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(math.exp(entropy))


def test_embedding_std_by_hand():
    assert embedding_std(torch.eye(7) * 5) == pytest.approx(1)
    assert embedding_std(torch.ones(9, 4)) == pytest.approx(0, abs=1e-6)
    # Unit rows (1, 0) and (0.6, 0.8): deviations 0.4 / sqrt 2 and 0.8 / sqrt 2, times sqrt 2.
    assert embedding_std(torch.tensor([[9.0, 0], [3, 4]])) == pytest.approx(0.6)


# -------------------------------------------------------------------------------------- extraction


def test_views_of_the_protocols():
    assert choose_view("whole", 96) == WholeView(96)
    assert choose_view("paper", 96) == PaperView()


def test_extracted_features_are_those_of_a_direct_forward(manifest, monkeypatch):
    monkeypatch.setattr(features, "BATCH", 8)  # 21 photographs make three batches, one not full
    spec = replace(helpers.PICO, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    backbone = helpers.pico(spec=spec)
    records = manifest.records[3:24]
    found = extract_features(backbone, PhotographDataset(manifest, records, WholeView(32)))
    assert list(found) == ["cls", "patch", "patch_std", "patch_top", "color"]
    assert found["cls"].shape == (21, 2, 64)  # a pico has two blocks
    assert found["patch"].shape == (21, 64)
    assert found["color"].shape == (21, 6)

    for row, record in enumerate(records):
        with Image.open(manifest.root / record.path) as picture:
            small = np.asarray(picture.resize((32, 32), Image.Resampling.BICUBIC)) / 255
        image = torch.from_numpy((small - np.array(spec.mean)) / np.array(spec.std)).float()
        with torch.no_grad():
            blocks = backbone.vit.get_intermediate_layers(
                image.permute(2, 0, 1)[None], n=2, return_prefix_tokens=True, norm=True
            )
        expected = torch.stack([prefix[0, 0] for _, prefix in blocks])
        torch.testing.assert_close(found["cls"][row], expected, rtol=0, atol=0.02)
        tokens = blocks[1][0][0]  # of four patches
        torch.testing.assert_close(found["patch"][row], tokens.mean(0), rtol=0, atol=0.02)
        spread = tokens.std(0, correction=0)
        torch.testing.assert_close(found["patch_std"][row], spread, rtol=0, atol=0.02)
        torch.testing.assert_close(found["patch_top"][row], tokens.amax(0), rtol=0, atol=0.02)
        color = [*small.mean(axis=(0, 1)), *small.std(axis=(0, 1), ddof=1)]
        assert found["color"][row].tolist() == pytest.approx(color, abs=0.002)
    apart = (found["cls"][0] - found["cls"][2]).abs().max()
    assert apart > 0.2, "pictures of other grades have other features"


def test_a_backbone_in_training_gives_frozen_features_and_goes_on_training(manifest):
    training = Backbone(helpers.PICO, drop_path=0.9).train()
    training.load_state_dict(helpers.pico().state_dict())
    dataset = PhotographDataset(manifest, manifest.split("val"), WholeView(32))
    found = extract_features(training, dataset)
    expected = extract_features(helpers.pico(), dataset)
    assert torch.equal(found["cls"], expected["cls"])
    assert training.training


def test_features_that_are_not_finite_name_the_photograph(manifest):
    backbone = helpers.pico()
    with torch.no_grad():
        backbone.vit.norm.bias[3] = torch.nan
    records = manifest.split("val")
    with pytest.raises(InputError, match=r"images/val0.png.*cls.*10 photographs of 10"):
        extract_features(backbone, PhotographDataset(manifest, records, WholeView(32)))
    # Of a value too large for the arithmetic alone one photograph may be at fault.
    values = torch.zeros(10, 2, 4)
    values[7, 1, 2] = torch.inf
    with pytest.raises(InputError, match=r"images/val7.png.*patch.*1 photographs of 10"):
        check_finite({"cls": torch.zeros(10, 4), "patch": values}, records)


# -------------------------------------------------------------------------------------- signatures


def test_signatures_are_those_of_the_pictures_and_outlive_the_disk(manifest, tmp_path):
    records = manifest.split("val")
    signed = extract_features(
        helpers.pico(), PhotographDataset(manifest, records, Signed(WholeView(32)))
    )
    found = sign_photographs(manifest, records, workers=0)
    assert np.array_equal(found.looks, signed["look"].numpy())
    for record, look in zip(records, found.looks, strict=True):
        with Image.open(manifest.root / record.path) as picture:
            assert np.array_equal(look, signature(np.asarray(picture)).ravel())
    found.save(tmp_path / "seen.npz")
    again = Signatures.load(tmp_path / "seen.npz")
    assert again.paths == [record.path for record in records]
    assert again.sha256 == [record.sha256 for record in records]
    assert np.array_equal(again.looks, found.looks)
    (tmp_path / "seen.npz").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"seen.npz.*cannot be read"):
        Signatures.load(tmp_path / "seen.npz")


# ----------------------------------------------------------------------------------------- collapse

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


# ---------------------------------------------------------------------- what training looks at


@dataclass(frozen=True)
class TrainingOptions:
    """What Monitor.look reads of training's options."""

    out_dim: int = 1024
    epochs: int = 5
    knn_every: int = 2
    distillation_weight: float = 1.0


def test_training_looks_at_256_photographs_spread_over_train(manifest):
    record = manifest.split("train")[0]
    many = tuple(replace(record, path=f"{number}.png") for number in range(1000))
    fixed = Monitor(replace(manifest, records=many), None, 0).fixed
    assert [one.path for one in fixed] == [f"{number}.png" for number in range(0, 768, 3)]
    assert Monitor(manifest, None, 0).fixed == manifest.split("train"), "all of a small set"


def test_only_graded_photographs_vote_and_are_graded(manifest):
    records = [replace(manifest.records[0], grade=None), *manifest.records[1:]]
    train, val = Monitor(replace(manifest, records=tuple(records)), None, 0).graded
    assert train == manifest.split("train")[1:]
    assert val == manifest.split("val")


def test_a_look_measures_fixed_photographs_and_votes_when_due(manifest):
    monitor = Monitor(manifest, None, 0)
    backbone = helpers.pico()
    embeddings, _ = monitor.embeddings(backbone, monitor.fixed)
    votes, grades, train_grades = monitor.knn_votes(backbone)
    for epoch, is_due in ((0, True), (1, False), (2, True), (3, False), (5, True)):
        record = monitor.look(backbone, epoch, TrainingOptions())
        assert record["epoch"] == epoch
        assert record["rankme"] == rankme(embeddings)
        assert record["embedding_std"] == embedding_std(embeddings)
        assert ("knn_qwk" in record) == is_due
    scores = metrics.short_scores(votes.numpy(), grades, train_grades)
    assert record["knn_accuracy"] == scores["accuracy"]
    assert record["knn_majority"] == scores["majority"]
    assert record["knn_qwk"] == scores["qwk"]
    assert "knn_qwk" not in monitor.look(backbone, 2, TrainingOptions(knn_every=0))


def test_votes_on_val_are_those_of_15_neighbours_in_train(manifest):
    monitor = Monitor(manifest, None, 0)
    backbone = helpers.pico()
    votes, grades, train_grades = monitor.knn_votes(backbone)
    assert grades.tolist() == grades_of(manifest.split("val")).tolist()
    assert train_grades.tolist() == grades_of(manifest.split("train")).tolist()
    bank, _ = monitor.embeddings(backbone, manifest.split("train"))
    queries, _ = monitor.embeddings(backbone, manifest.split("val"))
    expected = knn_predict(bank, torch.from_numpy(train_grades), queries, [15])[15]
    assert torch.equal(votes, expected)

    few = replace(manifest, records=manifest.split("train")[:4] + manifest.split("val"))
    assert Monitor(few, None, 0).knn_votes(backbone)[0].shape == (10, GRADES)


def test_a_look_leaves_out_what_cannot_be_read(tmp_path, caplog):
    manifest = helpers.draw_prepared(tmp_path, train=20, val=10, test=1)
    backbone = helpers.pico()
    lost = {manifest.split("train")[3].path, manifest.split("val")[0].path}
    kept = [record for record in manifest.records if record.path not in lost]
    expected = Monitor(replace(manifest, records=kept), None, 0).knn_votes(backbone)
    for path in lost:
        (tmp_path / path).write_bytes(b"\xff\xd8 cut off")

    monitor = Monitor(manifest, None, 0, max_bad=0.1)
    for found, wanted in zip(monitor.knn_votes(backbone), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert "1 photographs cannot be read" in caplog.text
    record = monitor.look(backbone, 2, TrainingOptions())
    embeddings, readable = monitor.embeddings(backbone, manifest.split("train"))
    assert readable == [record for record in kept if record.split == "train"]
    assert record["rankme"] == rankme(embeddings)
    with pytest.raises(InputError, match=manifest.split("train")[3].path):
        Monitor(manifest, None, 0).look(backbone, 1, TrainingOptions())


def test_a_look_without_grades_has_no_votes(manifest):
    ungraded = helpers.regraded(manifest, "val", None)
    assert "knn_qwk" not in Monitor(ungraded, None, 0).look(helpers.pico(), 2, TrainingOptions())


def test_a_collapse_is_warned_of_and_logged(manifest, caplog):
    monitor = Monitor(manifest, None, 0)
    backbone = helpers.pico()
    flat = {"teacher_entropy": 1.0, "marginal_entropy": 1.0, "loss": math.log(1024)}
    record = monitor.look(backbone, 1, TrainingOptions(), flat)
    assert record["collapse"].startswith("uniform")
    assert "epoch 1: collapse, uniform" in caplog.text
    caplog.clear()
    healthy = monitor.look(backbone, 1, TrainingOptions(), {**flat, "loss": 5.0})
    assert "collapse" not in healthy and not caplog.text
    # Few kinds of lesions are few directions, and its remedies are about self-distillation.
    low = {"embedding_std": 0.0, "rankme": 1.0}
    alone = monitor.look(backbone, 1, TrainingOptions(distillation_weight=0.0), flat | low)
    assert "collapse" not in alone and not caplog.text


# ------------------------------------------------------------------------------- a frozen teacher


@pytest.mark.parametrize("name", ["resnet10t", "tf_efficientnet_lite0", "convnext_atto"])
def test_a_network_of_convolutions_teaches_its_last_map(name):
    network = timm.create_model(name, num_classes=0).eval().requires_grad_(False)
    teacher = features.FrozenTeacher(network, 64, 4)
    crops = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    tokens = teacher(crops)
    config = network.pretrained_cfg
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    (last,) = network.forward_intermediates(
        (crops / 255 - mean) / std, indices=1, intermediates_only=True
    )
    assert last.shape[2:] == (2, 2)
    assert teacher.widths == (tokens.embedding.shape[1], tokens.patches.shape[2])
    pooled = torch.cat([last.mean(dim=(2, 3)), last.amax(dim=(2, 3))], dim=1)
    torch.testing.assert_close(tokens.embedding, pooled, rtol=1e-3, atol=1e-4)
    # Bilinear: what lies in a corner stays, and all of it keeps its mean.
    assert tokens.patches.shape == (2, 16, last.shape[1])
    torch.testing.assert_close(tokens.patches[:, 0], last[:, :, 0, 0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(tokens.patches.mean(dim=1), last.mean((2, 3)), rtol=1e-3, atol=1e-4)


def test_a_network_of_convolutions_teaches_in_half_precision():
    # Where torch resizes no bf16, as on a CPU, the map is resized in fp32.
    network = timm.create_model("resnet10t", num_classes=0).eval().requires_grad_(False)
    teacher = features.FrozenTeacher(network, 64, 4)
    crops = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    exact = teacher(crops)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = teacher(crops)
    near = {"rtol": 0.1, "atol": 0.1 * float(exact.patches.std())}
    torch.testing.assert_close(tokens.patches.float(), exact.patches, **near)


def test_a_vit_teaches_tokens_of_the_students_grid():
    backbone = Backbone(BackboneSpec("vit_pico", 8, 32)).eval()
    teacher = features.FrozenTeacher(backbone, 32, 4)
    crops = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    expected = backbone.all_tokens(backbone.normalize(crops))
    tokens = teacher(crops)
    assert teacher.widths == (64, 64)
    torch.testing.assert_close(tokens.patches, expected.patches, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tokens.embedding, expected.embedding, rtol=1e-4, atol=1e-5)
    assert not tokens.patches.requires_grad
    coarser = features.FrozenTeacher(backbone, 32, 2)
    assert coarser(crops).patches.shape == (2, 4, 64)


def test_a_network_that_takes_one_size_alone_is_refused():
    network = timm.create_model("mixer_s32_224", num_classes=0).eval()
    with pytest.raises(InputError, match="cannot look at crops of 64 pixels .*224"):
        features.FrozenTeacher(network, 64, 4)
