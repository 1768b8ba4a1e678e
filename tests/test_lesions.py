"""Lesion masks: whose they are, where they lie on the picture; scores against turned masks; probes.

Run with `python -m pytest tests/test_lesions.py`. Oracles are naive loops and scikit-learn.
"""

import csv
import io
import subprocess
import sys

import helpers
import numpy as np
import pytest
from conftest import child_environment
from discs import draw_fundus, to_uint8
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import utils
from fundus import lesion_probe, lesion_report, lesion_scores
from fundus.field_of_view import Box
from fundus.lesion_scores import Scores, average_precisions, cut_patches, pool, turned
from fundus.lesions import (
    ALL_LESIONS,
    OPTIC_DISC,
    Lesions,
    class_of,
    find_masks,
    fundus_region,
    patient_of,
    read_lesions,
    widen,
)
from fundus.photographs import Photograph, PhotographError, read_photograph
from fundus.synthetic import draw_frames
from utils import InputError


def write(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def photograph_of(box, width, height, doubtful=False):
    return Photograph(np.zeros(0), box, doubtful, width, height, 1, box)


def disc_region(size):
    offset = np.arange(size) + 0.5 - size / 2
    return offset**2 + offset[:, None] ** 2 <= (size / 2) ** 2


# ------------------------------------------------------------------------------- files and classes


@pytest.mark.parametrize(
    "text, expected",
    [
        ("1. Microaneurysms", "microaneurysm"),
        ("_MA", "microaneurysm"),
        ("2. Haemorrhages", "haemorrhage"),
        ("Hemorrhages", "haemorrhage"),
        ("3. Hard Exudates", "hard_exudate"),
        ("4. Soft Exudates", "cotton_wool_spot"),
        ("-se", "cotton_wool_spot"),
        ("5. Optic Disc", "optic_disc"),
        ("_new_vessel", "new_vessel"),
        ("Drusen", "drusen"),
        ("", ""),
    ],
)
def test_classes(text, expected):
    assert class_of(text) == expected


def test_both_eyes_are_one_patients():
    assert patient_of("10_left") == patient_of("10_right") == "10"
    assert patient_of("IDRiD_01") == "IDRiD_01"


def found_names(folder, stems):
    photographs = {stem: folder / "images" / f"{stem}.jpg" for stem in stems}
    found = find_masks(folder / "masks", photographs)
    root = folder / "masks"
    names = {}
    for stem, masks in found.items():
        names[stem] = {lesion: file.relative_to(root).as_posix() for lesion, file in masks.items()}
    return names


def test_masks_are_found_as_idrid_lays_them_out(tmp_path):
    helpers.touch(
        tmp_path / "masks",
        "a. Training Set/1. Microaneurysms/IDRiD_01_MA.tif",
        "a. Training Set/5. Optic Disc/IDRiD_01_OD.tif",
        "b. Testing Set/1. Microaneurysms/IDRiD_55_MA.tif",
        "b. Testing Set/1. Microaneurysms/IDRiD_56_MA.tif",
        "a. Training Set/1. Microaneurysms/IDRiD_01_MA.jpg",
        "a. Training Set/notes.txt",
    )
    assert found_names(tmp_path, ["IDRiD_01", "IDRiD_55", "IDRiD_02"]) == {
        "IDRiD_01": {
            "microaneurysm": "a. Training Set/1. Microaneurysms/IDRiD_01_MA.tif",
            "optic_disc": "a. Training Set/5. Optic Disc/IDRiD_01_OD.tif",
        },
        "IDRiD_55": {"microaneurysm": "b. Testing Set/1. Microaneurysms/IDRiD_55_MA.tif"},
    }


def test_masks_are_found_by_folder_and_by_ending(tmp_path):
    helpers.touch(
        tmp_path / "masks",
        "EX/a.png",
        "drusen/a_mask.PNG",
        "b_scar.png",
        "A_left_haemorrhage.png",
        "deep/a_left_SE.png",
    )
    assert found_names(tmp_path, ["a", "a_left", "b"]) == {
        "a": {"hard_exudate": "EX/a.png", "drusen": "drusen/a_mask.PNG"},
        "a_left": {
            "haemorrhage": "A_left_haemorrhage.png",
            "cotton_wool_spot": "deep/a_left_SE.png",
        },
        "b": {"scar": "b_scar.png"},
    }


def test_masks_that_cannot_be_placed_are_errors(tmp_path):
    photographs = {"a": tmp_path / "a.jpg"}
    with pytest.raises(InputError, match="no such folder"):
        find_masks(tmp_path / "none", photographs)
    helpers.touch(tmp_path / "masks", "EX/b.png", "EX/ab.png")
    with pytest.raises(InputError, match="none of 2 masks .* begin like these: a"):
        find_masks(tmp_path / "masks", photographs)
    helpers.touch(tmp_path / "masks", "EX/a.png")
    two = {"x_a": tmp_path / "x" / "a.jpg", "y_a": tmp_path / "y" / "a.jpg"}
    with pytest.raises(InputError, match="x_a and y_a"):
        find_masks(tmp_path / "masks", two)
    helpers.touch(tmp_path / "masks", "EX/a_EX.tif")
    with pytest.raises(InputError, match="is hard_exudate of that photograph, too"):
        find_masks(tmp_path / "masks", photographs)
    helpers.touch(tmp_path / "plain", "a.png")
    with pytest.raises(InputError, match=r"says no class; expected CLASS/a\.png"):
        find_masks(tmp_path / "plain", photographs)


# ----------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize("size, suffix", [(120, "jpg"), (97, "jpg"), (250, "png")])
@pytest.mark.parametrize("radius", [620, 800], ids=["whole", "cut off"])
def test_a_mask_goes_its_photographs_way(tmp_path, size, suffix, radius):
    """Squares painted where the masks are change the picture where the masks come out."""
    frame = draw_fundus(2000, 1300, (1060, 650), radius)
    before = write(tmp_path / f"before.{suffix}", to_uint8(frame))
    masks = {}
    for name, top, left in (("a", 300, 800), ("b", 900, 1400), ("c", 620, 1180)):
        mask = np.zeros((1300, 2000), np.uint8)
        mask[top : top + 64, left : left + 64] = 255
        frame[mask > 0] += (-20, 50, 10)
        masks[name] = write(tmp_path / "masks" / f"{name}.png", mask)
    path = write(tmp_path / f"photograph.{suffix}", to_uint8(frame))

    photograph = read_photograph(path, size)
    lesions = read_lesions(masks, photograph, size)
    scale = size / max(photograph.box.width, photograph.box.height)
    y, x = np.mgrid[:size, :size]
    picture = photograph.picture.astype(float)
    change = np.abs(picture - read_photograph(before, size).picture).sum(axis=2)
    for name in masks:
        share = lesions.shares[name]
        changed = change * widen(share, 2)
        for axis in (x, y):
            expected = (axis * changed).sum() / changed.sum()
            assert (axis * share).sum() / share.sum() == pytest.approx(expected, abs=0.15)
        assert share.sum() == pytest.approx(64**2 * scale**2, rel=0.08)


def test_the_fundus_is_the_disc_that_the_frame_leaves():
    whole = photograph_of(Box(100, 50, 500, 450), 600, 500)
    assert np.array_equal(fundus_region(whole, 80), disc_region(80))

    # 300 of 400 rows: of 80 the middle 60
    cut = photograph_of(Box(0, 0, 400, 300), 400, 300)
    rows = np.arange(80)[:, None]
    assert np.array_equal(fundus_region(cut, 80), disc_region(80) & (rows >= 10) & (rows < 70))
    doubtful = photograph_of(Box(0, 0, 400, 300), 400, 300, doubtful=True)
    expected = np.broadcast_to((rows >= 10) & (rows < 70), (80, 80))
    assert np.array_equal(fundus_region(doubtful, 80), expected)


def whole_photograph(side=64):
    return photograph_of(Box(0, 0, side, side), side, side)


def test_masks_of_any_form_say_the_same(tmp_path):
    covered = np.zeros((64, 64), bool)
    covered[30:34, 20:40] = True
    ones = covered.astype(np.uint8)
    palette = Image.fromarray(ones, mode="P")
    palette.putpalette([0, 0, 0, 255, 0, 0])
    red = np.zeros((64, 64, 4), np.uint8)
    red[..., 3] = 255
    red[covered, 0] = 255
    write(tmp_path / "a.png", ones)
    palette.save(tmp_path / "b.tif")
    write(tmp_path / "c.tif", red)
    write(tmp_path / "d.bmp", ones * 255)
    write(tmp_path / "e.png", covered)
    for path in sorted(tmp_path.iterdir()):
        lesions = read_lesions({"x": path}, whole_photograph(), 64)
        assert np.array_equal(lesions.shares["x"], covered), path.name


def test_faults_of_masks_name_the_file(tmp_path):
    covered = np.zeros((64, 64), np.uint8)
    covered[20:30, 20:30] = 255
    turned_mask = write(tmp_path / "turned.png", covered[:, :60])
    inverted = write(tmp_path / "inverted.png", 255 - covered)
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(b"\x89PNG nothing")
    faults = {
        turned_mask: "60 x 64 pixels; expected .* 64 x 64",
        inverted: "covers 98%",
        damaged: "is damaged",
    }
    for path, reason in faults.items():
        with pytest.raises(PhotographError, match=f"{path.name} .*{reason}"):
            read_lesions({"x": path}, whole_photograph(), 64)


def test_all_lesions_are_every_class_but_the_optic_disc(tmp_path):
    masks = {}
    for number, name in enumerate(("hard_exudate", "microaneurysm", OPTIC_DISC, "outside")):
        covered = np.zeros((64, 64), np.uint8)
        covered[20 + 4 * number : 30, 20:24] = 255
        if name == "outside":  # in the corner, where no fundus is
            covered = np.zeros((64, 64), np.uint8)
            covered[:5, :5] = 255
        masks[name] = write(tmp_path / f"{name}.png", covered)
    masks["empty"] = write(tmp_path / "empty.png", np.zeros((64, 64), np.uint8))
    shares = read_lesions(masks, whole_photograph(), 64).shares
    assert list(shares) == ["hard_exudate", "microaneurysm", OPTIC_DISC, ALL_LESIONS]
    assert np.array_equal(shares[ALL_LESIONS], shares["hard_exudate"])
    only_disc = read_lesions({OPTIC_DISC: masks[OPTIC_DISC]}, whole_photograph(), 64)
    assert list(only_disc.shares) == [OPTIC_DISC]


@pytest.mark.parametrize("radius", [0, 1, 2.5, 4])
def test_widening_by_distance(radius):
    share = np.zeros((20, 20), np.float32)
    share[5, 6] = 0.1
    share[12:14, 15] = 1
    expected = np.zeros((20, 20), bool)
    for y, x in np.ndindex(20, 20):
        for at_y, at_x in zip(*np.nonzero(share), strict=True):
            if np.hypot(y - at_y, x - at_x) <= radius:
                expected[y, x] = True
    assert np.array_equal(widen(share, radius), expected)
    assert not widen(np.zeros((5, 5)), 3).any()


# ------------------------------------------------------------------------------- patches and turns


@pytest.mark.parametrize("size, patch", [(24, 8), (25, 7), (30, 16)])
def test_pooling_by_a_naive_loop(size, patch):
    values = np.random.default_rng(0).random((size, size))
    grid = -(-size // patch)
    expected = np.zeros((grid, grid))
    for y, x in np.ndindex(size, size):
        expected[y // patch, x // patch] += values[y, x]
    assert pool(values, patch) == pytest.approx(expected.ravel())


@pytest.mark.parametrize("patch", [5, 8, 16])
def test_turned_masks_by_a_naive_turn(patch):
    """By pixels rather than cells, and at quarters exactly."""
    size = 80
    inside = disc_region(size)
    weights = np.zeros((size, size))
    weights[20:36, 12:28] = np.random.default_rng(0).random((16, 16))
    patches = cut_patches(inside, patch)
    found = np.stack(list(turned(weights, patches))).reshape(-1, patches.grid, patches.grid)
    assert len(found) == lesion_scores.TURNS == 180
    for quarter in range(4):
        exact = pool(np.rot90(weights, -quarter), patch).reshape(found[0].shape)
        assert found[45 * quarter] == pytest.approx(exact)

    angle = lesion_scores.turn_angles()[20]
    expected = np.zeros_like(found[0])
    for y, x in zip(*np.nonzero(weights), strict=True):
        place = complex(x + 0.5 - size / 2, y + 0.5 - size / 2) * np.exp(1j * angle)
        column = int((place.real + size / 2) // patch)
        row = int((place.imag + size / 2) // patch)
        expected[row, column] += weights[y, x]
    assert np.abs(found[20] - expected).sum() < 0.25 * weights.sum(), "cells are a little coarse"
    assert found[20].sum() == pytest.approx(weights.sum())


def test_what_turns_out_of_the_fundus_is_lost_and_too_much_of_it_does_not_count():
    size = 80
    inside = disc_region(size)
    inside[:15] = False
    inside[-15:] = False
    share = np.zeros((size, size), np.float32)
    share[36:44, 4:12] = 1  # at the left, where the fundus is widest
    scores = lesion_scores.score_photograph(
        np.ones((1, 10, 10)) / 100, Lesions(inside, {"x": share}), 8, radius=0
    )["x"]
    assert scores.kept[0] and scores.kept[90] and not scores.kept[45] and not scores.kept[135]
    assert 0.3 < scores.kept.mean() < 0.7
    assert scores.share == pytest.approx(64 / inside.sum())


# ----------------------------------------------------------------------------------------- measures


def example(seed=0, size=60, patch=8, heads=3):
    """Return attention (heads, h, w) and lesions of two classes on a disc."""
    rng = np.random.default_rng(seed)
    grid = -(-size // patch)
    attention = rng.dirichlet(np.full(grid**2, 0.3), heads).reshape(heads, grid, grid)
    inside = disc_region(size)
    shares = {}
    for name, count in (("spots", 6), ("pool", 1)):
        share = np.zeros((size, size), np.float32)
        for _ in range(count):
            y, x = rng.integers(14, size - 18, 2)
            share[y : y + 4, x : x + 3] = 1
        shares[name] = share * inside
    return attention, Lesions(inside, shares)


def test_lift_by_pixels():
    attention, lesions = example()
    scores = lesion_scores.score_photograph(attention, lesions, 8, radius=4)
    for name, share in lesions.shares.items():
        wide = widen(share, 4) & lesions.inside
        maps = []
        for head in attention:
            pixels = np.kron(head, np.ones((8, 8)))[:60, :60] * lesions.inside
            maps.append(pixels / pixels.sum())
        maps.insert(0, np.mean(maps, axis=0))
        for number, pixels in enumerate(maps):
            expected = pixels[wide].sum() / (wide.sum() / lesions.inside.sum())
            assert scores[name].observed("lift")[number] == pytest.approx(expected)
        assert scores[name].wide_share == pytest.approx(wide.sum() / lesions.inside.sum())


def test_even_attention_has_lift_one_and_the_precision_of_chance():
    _, lesions = example()
    even = np.full((2, 8, 8), 1 / 64)
    scores = lesion_scores.score_photograph(even, lesions, 8, radius=4)["spots"]
    patches = cut_patches(lesions.inside, 8)
    held = lesion_scores.holds_lesion(lesions.shares["spots"], 8)[patches.counted]
    assert scores.values["lift"] == pytest.approx(1)
    assert scores.observed("ap") == pytest.approx(held.mean())
    summary = lesion_scores.summarize([scores] * 3, np.array(["a", "b", "c"]), 200, 0)
    assert summary["lift"]["mean"]["p"] == 1
    assert summary["lift"]["mean"]["null"]["ci95"] == pytest.approx([1, 1])


def test_pointing_by_hand():
    inside = disc_region(64)
    share = np.zeros((64, 64), np.float32)
    share[24:32, 40:48] = 1  # the patch of row 3, column 5
    attention = np.zeros((3, 8, 8)) + 1e-3
    attention[0, 3, 5] = 1  # on it
    attention[1, 3, 4] = 1  # beside it
    attention[2, 3, 5] = 1  # two equal ones, one of them on it
    attention[2, 6, 3] = 1
    attention[:, 0, 0] = 9  # the strongest is no fundus
    found = lesion_scores.score_photograph(attention, Lesions(inside, {"x": share}), 8, 0)["x"]
    assert found.observed("pointing")[1:].tolist() == [1, 0, 0.5]
    near = lesion_scores.score_photograph(attention, Lesions(inside, {"x": share}), 8, 5)["x"]
    assert near.observed("pointing")[1:].tolist() == [1, 1, 0.5]
    # Turned by half, the lesion is in row 4, column 2, where nothing points.
    assert found.values["pointing"][1:, 90].tolist() == [0, 0, 0]


def test_what_is_widened_beyond_the_rim_does_not_count():
    inside = disc_region(64)
    share = np.zeros((64, 64), np.float32)
    share[28:36, 1:5] = 1
    lesions = Lesions(inside, {"x": share * inside})
    scores = lesion_scores.score_photograph(np.ones((1, 8, 8)), lesions, 8, radius=4)["x"]
    wide = widen(share * inside, 4)
    assert (wide & ~inside).any()
    assert scores.wide_share == pytest.approx((wide & inside).sum() / inside.sum())
    assert scores.observed("lift") == pytest.approx(1)


def test_points_turn_with_the_lesions():
    """A quarter turn takes the patch of row 3, column 5 to row 5, column 4, as x to y."""
    inside = disc_region(64)
    share = np.zeros((64, 64), np.float32)
    share[24:32, 40:48] = 1
    attention = np.full((3, 8, 8), 1e-3)
    attention[0, 5, 4] = 1
    attention[1, 2, 3] = 1  # where the other way round leads
    attention[2, 4, 2] = 1  # half a turn
    found = lesion_scores.score_photograph(attention, Lesions(inside, {"x": share}), 8, radius=2)
    hits = found["x"].values["pointing"][1:]
    assert hits[:, [0, 45, 90, 135]].tolist() == [[0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]
    lifts = found["x"].values["lift"][1:]
    assert np.array_equal(lifts[:, [0, 45, 90, 135]] > 2, hits[:, [0, 45, 90, 135]] == 1)


def test_turning_the_lesions_is_turning_the_map_back():
    attention, lesions = example(size=64)
    scores = lesion_scores.score_photograph(attention, lesions, 8, radius=4)
    for quarter in (1, 2, 3):
        back = np.rot90(attention, quarter, axes=(1, 2))
        expected = lesion_scores.score_photograph(back, lesions, 8, radius=4)
        for name in lesions.shares:
            for measure in ("lift", "ap"):
                values = scores[name].values[measure][:, 45 * quarter]
                assert values == pytest.approx(expected[name].observed(measure)), measure


@pytest.mark.parametrize("levels", [3, 10, 10**6])
def test_average_precision_is_scikit_learns(levels):
    rng = np.random.default_rng(levels)
    scores = rng.integers(0, levels, 80) / levels
    truth = rng.random((30, 80)) < rng.random((30, 1)) ** 2
    truth[0] = False
    truth[1] = True
    found = average_precisions(scores, truth)
    assert np.isnan(found[0])
    for number in range(1, 30):
        if truth[number].any():
            assert found[number] == pytest.approx(average_precision_score(truth[number], scores))


def test_precision_is_of_patches_that_are_counted():
    attention, lesions = example()
    scores = lesion_scores.score_photograph(attention, lesions, 8, radius=4)["spots"]
    truth = []
    values = []
    for row, column in np.ndindex(8, 8):
        part = (slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8))
        if lesions.inside[part].sum() >= 32:
            truth.append(lesions.shares["spots"][part].sum() >= 0.01 * 64)
            values.append(attention[1, row, column])
    assert scores.observed("ap")[2] == pytest.approx(average_precision_score(truth, values))


# ------------------------------------------------------------------------------------- significance


def planted(seed, weight):
    """Return scores of attention with `weight` of it on the lesions, the rest at random."""
    attention, lesions = example(seed)
    on = pool(lesions.shares["spots"], 8).reshape(8, 8)
    mixed = (1 - weight) * attention + weight * on / on.sum()
    return lesion_scores.score_photograph(mixed, lesions, 8, radius=4)["spots"]


def test_planted_attention_is_found():
    scores = [planted(seed, 0.7) for seed in range(12)]
    patients = np.arange(12).astype(str)
    summary = lesion_scores.summarize(scores, patients, 400, 0)
    for measure in lesion_scores.MEASURES:
        entry = summary[measure]["mean"]
        assert entry["p"] == pytest.approx(1 / 401), measure
        assert entry["value"] > entry["null"]["ci95"][1], measure
        assert entry["ci95"][0] < entry["value"] < entry["ci95"][1] or measure == "pointing"
    assert summary["lift"]["mean"]["value"] > 3


def test_without_a_connection_p_is_even():
    """Of 40 evaluations of two photographs of noise, few have a low p, and the mean is a half."""
    found = []
    for number in range(40):
        scores = [planted(100 + 2 * number + each, 0) for each in range(2)]
        summary = lesion_scores.summarize(scores, np.array(["a", "b"]), 100, number)
        found.append([summary[measure]["mean"]["p"] for measure in ("lift", "ap")])
    for values in np.array(found).T:
        # Within three standard errors of what even ones give.
        assert 0.36 < values.mean() < 0.64
        assert (values < 0.1).mean() <= 0.25
        assert (values > 0.9).mean() <= 0.25


def test_a_summary_by_hand():
    """Two photographs, one map, the turns of one cut to two."""
    kept = np.zeros(180, bool)
    kept[[0, 7]] = True
    scores = []
    for first, other in ((3.0, 1.0), (5.0, 2.0)):
        values = np.full((1, 180), np.nan)
        values[0, 0] = first
        values[0, 7] = other
        every = {measure: values for measure in lesion_scores.MEASURES}
        scores.append(Scores(0.1, 0.2, every, kept))
    summary = lesion_scores.summarize(scores, np.array(["a", "b"]), 4000, 0)
    assert (summary["photographs"], summary["fundus_share"]) == (2, 0.1)
    entry = summary["lift"]["mean"]
    assert entry["value"] == 4 and entry["photographs"] == 2
    # The null is 4, 3, 2.5 or 1.5, a quarter of the draws each.
    assert entry["null"]["mean"] == pytest.approx(2.75, abs=0.05)
    assert entry["null"]["ci95"] == [1.5, 4]
    assert entry["p"] == pytest.approx(0.25, abs=0.03)
    assert entry["ci95"] == [3, 5]
    assert summary["lift"]["heads"] == []


def test_intervals_are_over_patients_and_leave_out_what_is_undefined():
    values = np.array([[1.0, np.nan], [3.0, np.nan], [8.0, np.nan], [np.nan, np.nan]])
    patients = np.array(["a", "a", "b", "c"])
    low_high, nothing = lesion_scores.mean_intervals(values, patients, 2000, 0)
    assert low_high == [2, 8], "a's two eyes together, or b alone"
    assert nothing is None


def test_lesions_too_small_for_a_patch_have_no_precision_but_a_reason():
    inside = disc_region(64)
    share = np.zeros((64, 64), np.float32)
    share[30, 30] = 0.1
    scores = lesion_scores.score_photograph(
        np.ones((2, 4, 4)), Lesions(inside, {"x": share}), 16, radius=8
    )
    summary = lesion_scores.summarize([scores["x"]], np.array(["a"]), 100, 0)
    assert summary["ap"]["mean"]["value"] is None and summary["ap"]["mean"]["reason"]
    assert summary["lift"]["mean"]["value"] == pytest.approx(1)


# ----------------------------------------------------------------------------------------- probes


def patches_of(photographs=10, count=60, width=5, signal=0.0, seed=0):
    """Return features, truth and patients; two photographs a patient; one in three is healthy."""
    rng = np.random.default_rng(seed)
    features = []
    truth = []
    for number in range(photographs):
        held = rng.random(count) < 0.2
        if number % 3 == 2:
            held[:] = False
        rows = rng.normal(size=(count, width)) * 3 + 7
        rows[held, 1] += signal
        features.append(rows.astype(np.float16))
        truth.append(held)
    patients = np.array([f"p{number // 2}" for number in range(photographs)])
    return features, truth, patients


def test_probe_scores_are_scikit_learns_on_the_other_folds(monkeypatch):
    monkeypatch.setattr(lesion_probe, "MAX_PATCHES", 1000)
    features, truth, patients = patches_of(signal=4)
    found = lesion_probe.probe_patches(features, truth, patients, seed=0)
    with_lesion = {p for p, held in zip(patients, truth, strict=True) if held.any()}
    fold_of = lesion_probe.deal_folds(patients, with_lesion, 0)
    assert set(fold_of) == set(patients) and set(fold_of.values()) == set(range(5))
    for number in range(len(features)):
        others = [i for i in range(10) if fold_of[patients[i]] != fold_of[patients[number]]]
        assert len(others) == 8, "neither its patient's other eye"
        rows = np.concatenate([features[i] for i in others]).astype(np.float32)
        labels = np.concatenate([truth[i] for i in others])
        unit = LogisticRegression(C=lesion_probe.C, class_weight="balanced", max_iter=1000)
        model = make_pipeline(StandardScaler(), unit).fit(rows, labels)
        expected = model.decision_function(features[number].astype(np.float32))
        assert found[number] == pytest.approx(expected, abs=2e-3)


def test_probes_find_what_is_there_and_nothing_else():
    tokens, truth, patients = patches_of(photographs=20, signal=12)
    color, _, _ = patches_of(photographs=20, seed=1)
    summary, precisions = lesion_probe.evaluate_probes(
        {"tokens": tokens, "color": color}, truth, patients, 200, 0
    )
    has_any = np.array([held.any() for held in truth])
    assert summary["photographs"] == has_any.sum()
    assert summary["lesion_patches"] == np.concatenate(truth).sum()
    shares = [held.mean() for held in truth if held.any()]
    assert summary["prevalence"] == pytest.approx(np.mean(shares))
    assert summary["prevalence_pooled"] == pytest.approx(np.concatenate(truth).mean())
    assert summary["tokens"]["ap"] > 0.9 and summary["tokens"]["ap_pooled"] > 0.9
    assert summary["color"]["ap"] < 0.45
    gain = summary["tokens_over_color"]
    assert gain["ap"] == pytest.approx(summary["tokens"]["ap"] - summary["color"]["ap"])
    assert 0.3 < gain["ci95"][0] < gain["ap"] < gain["ci95"][1]
    assert np.isnan(precisions["tokens"]).tolist() == (~has_any).tolist()


def test_a_probe_that_cannot_be_says_why():
    features, truth, patients = patches_of(photographs=4)
    truth = [held & (number < 2) for number, held in enumerate(truth)]  # of one patient
    summary, precisions = lesion_probe.evaluate_probes(
        {"tokens": features, "color": features}, truth, patients, 100, 0
    )
    assert summary["reason"].startswith("1 patients") and not precisions
    full = [np.ones(60, bool)] * 4
    assert "does not hold" in lesion_probe.why_unfit(full, patients)


def test_a_photograph_gives_so_many_patches_at_most():
    features, truth, _ = patches_of(photographs=3, count=2000)
    rows, labels = lesion_probe._sample(features, truth, np.arange(3), 0)
    assert labels.sum() == 2 * lesion_probe.MAX_PATCHES
    assert len(rows) == len(labels) == 5 * lesion_probe.MAX_PATCHES


def test_colors_of_patches_by_hand():
    picture = np.zeros((20, 20, 3), np.uint8)
    picture[:16, :16] = (255, 0, 51)
    picture[:16, 16:] = 102
    counted = np.array([True, True, False, False])
    found = lesion_probe.patch_colors(picture, 16, counted)
    second = 0.4 * 4 / 16  # a quarter of its columns is picture
    expected = np.array([[1, 0, 0.2], [second] * 3])
    assert found[:, :3] == pytest.approx(expected)
    assert found[:, 3:] == pytest.approx(np.tile(expected.mean(axis=0), (2, 1)))


# ------------------------------------------------------------------------------- what is written


def studies(count=8):
    made = []
    for number in range(count):
        attention, lesions = example(number)
        shares = {"hard_exudate": lesions.shares["spots"], OPTIC_DISC: lesions.shares["pool"]}
        if number == 0:
            del shares["hard_exudate"]
        lesions = Lesions(lesions.inside, shares)
        counted = cut_patches(lesions.inside, 8).counted
        held = {name: lesion_scores.holds_lesion(s, 8)[counted] for name, s in shares.items()}
        rng = np.random.default_rng(number)
        features = {
            "tokens": rng.normal(size=(counted.sum(), 4)),
            "color": rng.normal(size=(counted.sum(), 6)),
        }
        scores = lesion_scores.score_photograph(attention, lesions, 8, 4)
        name = f"p{number}"
        made.append(lesion_report.Study(name, name, scores, held, features))
    return made


def test_the_report_says_each_class_in_all_its_forms(tmp_path):
    made = studies()
    classes, rows = lesion_report.evaluate_lesions(made, 100, 0)
    assert list(classes) == ["hard_exudate", OPTIC_DISC]
    assert classes["hard_exudate"]["photographs"] == 7
    assert classes["hard_exudate"]["probe"]["patches"] == sum(
        len(study.features["color"]) for study in made
    )

    table = list(csv.DictReader(io.StringIO(lesion_report.table_of(rows))))
    assert len(table) == 7 + 8
    lifts = [float(row["lift"]) for row in table if row["class"] == "hard_exudate"]
    assert np.mean(lifts) == pytest.approx(
        classes["hard_exudate"]["lift"]["mean"]["value"], rel=1e-4
    )
    tokens = [float(row["tokens_ap"]) for row in table if row["class"] == "hard_exudate"]
    expected = classes["hard_exudate"]["probe"]["tokens"]["ap"]
    assert np.mean(tokens) == pytest.approx(expected, rel=1e-4)
    utils.write_json(tmp_path / "lesions.json", classes)  # no NaN in it

    lines = lesion_report.summary_lines(classes)
    assert sum(line.startswith("hard_exudate") for line in lines) == 2
    assert f"{classes[OPTIC_DISC]['lift']['mean']['value']:.3f}" in "\n".join(lines)
    lesion_report.plot_lesions(classes, tmp_path / "lesions.png")
    with Image.open(tmp_path / "lesions.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000


# ------------------------------------------------------------------------------- drawn with masks


def test_frames_are_drawn_with_masks_of_their_size(tmp_path):
    folder = tmp_path / "drawn"
    command = [sys.executable, "-m", "fundus.synthetic", str(folder), "--count", "3"]
    command += ["--height", "128"]
    for code in (0, 2):  # once, since the folder is not empty any more
        done = subprocess.run(
            command, cwd=utils.HERE, env=child_environment(), capture_output=True, text=True
        )
        assert done.returncode == code, done.stderr
    assert "not empty" in done.stderr
    images = sorted((folder / "images").iterdir())
    assert len(images) == 3
    photographs = {path.stem: path for path in images}
    found = find_masks(folder / "masks", photographs)
    assert set(found) == set(photographs), "every one has lesions"
    for name, masks in found.items():
        assert "microaneurysm" in masks
        photograph = read_photograph(photographs[name], 96)
        assert read_lesions(masks, photograph, 96).shares[ALL_LESIONS].any()
    with pytest.raises(InputError, match="not empty"):
        draw_frames(folder, 1)
