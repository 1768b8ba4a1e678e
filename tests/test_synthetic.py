"""Drawn photographs: the same bits every time, lesions by grade and in their place, and nothing
else that tells the grade. Colour and camera are also compared across grades on one and the same
eye, because drawing takes the lesions from a random stream of their own."""

import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from fundus import synthetic
from fundus.synthetic import LESIONS, DrawnEye, draw_photograph, plan_eyes

HEIGHT = 192
BY_GRADE = [
    set(),
    {"microaneurysm"},
    {"microaneurysm", "haemorrhage", "hard_exudate", "cotton_wool_spot"},
    set(LESIONS) - {"new_vessel", "preretinal_haemorrhage"},
    set(LESIONS),
]
ALWAYS = [
    set(),
    {"microaneurysm"},
    {"microaneurysm", "haemorrhage"},
    {"microaneurysm", "haemorrhage", "cotton_wool_spot", "venous_beading"},
    {"microaneurysm", "haemorrhage", "new_vessel"},
]


@cache
def drawn(eye: DrawnEye, height: int = HEIGHT) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    return draw_photograph(eye, height)


def eyes(grade: int, count: int = 8) -> list[DrawnEye]:
    # Both eyes of several patients, all given this grade: only the lesions differ between grades.
    return [replace(eye, grade=grade) for eye in plan_eyes(count, seed=3)]


def digest(eye: DrawnEye) -> str:
    image, masks = draw_photograph(eye, 128)
    parts = image.tobytes() + b"".join(masks[name].tobytes() for name in LESIONS)
    return hashlib.sha256(parts).hexdigest()


def grown(mask: np.ndarray, pixels: int) -> np.ndarray:
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    return np.asarray(image.filter(ImageFilter.MaxFilter(2 * pixels + 1))) > 0


def test_same_bits_in_another_process():
    eye = DrawnEye("p0001", "right", 4, (5, 7, 1))
    code = f"import test_synthetic as t; print(t.digest(t.{eye!r}))"
    here = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": str(here.parent)}
    other = subprocess.run(
        [sys.executable, "-c", code], cwd=here, env=env, capture_output=True, text=True, check=True
    )
    assert other.stdout.strip() == digest(eye) == digest(eye)


def test_other_seeds_are_other_eyes():
    plans = plan_eyes(6, seed=0) + plan_eyes(6, seed=1) + [DrawnEye("p", "left", 0, (0, 0, 2))]
    assert len({digest(replace(eye, grade=0, eye="left")) for eye in plans}) == len(plans)


def test_plan_prefix_and_patients():
    plan = plan_eyes(100)
    assert plan_eyes(50) == plan[:50] and plan_eyes(51) == plan[:51] and plan_eyes(0) == []
    assert plan != plan_eyes(100, seed=1)
    assert len({eye.seed for eye in plan}) == 100 and len({eye.patient for eye in plan}) == 50
    for left, right in zip(plan[::2], plan[1::2], strict=True):
        assert left.patient == right.patient and (left.eye, right.eye) == ("left", "right")
        assert left.seed[:-1] == right.seed[:-1]


def test_plan_grades():
    grades = np.array([eye.grade for eye in plan_eyes(6000)])
    shares = np.bincount(grades, minlength=5) / len(grades)
    assert np.abs(shares - (0.493, 0.101, 0.273, 0.053, 0.080)).max() < 0.02
    left, right = grades[::2], grades[1::2]
    assert np.abs(left - right).max() == 1 and 0.6 < (left == right).mean() < 0.95
    for side in (left, right):  # neither eye is the worse one by rule
        assert np.abs(np.bincount(side, minlength=5) / 3000 - shares).max() < 0.02


@pytest.mark.parametrize(
    "call",
    [
        lambda: plan_eyes(-1),
        lambda: plan_eyes(2, seed=-1),
        lambda: draw_photograph(DrawnEye("p", "middle", 0, (0, 0, 0))),
        lambda: draw_photograph(DrawnEye("p", "left", 5, (0, 0, 0))),
        lambda: draw_photograph(DrawnEye("p", "left", 0, (0, 0, 0)), 16),
    ],
)
def test_wrong_input_is_named(call):
    with pytest.raises(ValueError, match="expected"):
        call()


def test_laterality_is_seen_in_the_picture():
    right_side = []
    for eye in plan_eyes(20, seed=2):
        image = Image.fromarray(drawn(replace(eye, grade=0), 128)[0]).convert("L")
        fundus = np.asarray(image) > 12
        # The disc is the one bright spot of its size: small blur minus large blur, off the rim.
        near, far = (np.asarray(image.filter(ImageFilter.GaussianBlur(r)), float) for r in (3, 12))
        spot = np.where(grown(~fundus, 9), -np.inf, near - far)
        column = np.unravel_index(spot.argmax(), spot.shape)[1]
        right_side.append(column > np.flatnonzero(fundus.any(0)).mean())
    assert np.mean(np.array(right_side) == np.tile((False, True), 10)) >= 0.9


def test_frame_and_surround():
    shapes = set()
    for left, right in zip(*(iter(eyes(0, 24)),) * 2, strict=True):
        image, masks = drawn(left)
        assert image.dtype == np.uint8 and image.shape[0] == HEIGHT and image.shape[2] == 3
        assert 1 <= image.shape[1] / HEIGHT <= 1.5 and tuple(masks) == LESIONS
        assert image.shape == drawn(right)[0].shape  # one camera for both eyes
        dark = image.max(2) < 12
        assert 0.15 < dark.mean() < 0.65 and dark[:8, :8].all() and dark[-8:, -8:].all()
        shapes.add(image.shape)
    assert len(shapes) > 2


@pytest.mark.parametrize("grade", range(5))
def test_lesions_of_the_grade(grade):
    seen = [{name for name, mask in drawn(eye)[1].items() if mask.any()} for eye in eyes(grade)]
    assert set().union(*seen) == BY_GRADE[grade]
    assert all(names >= ALWAYS[grade] for names in seen)
    if grade == 4:
        assert 1 < sum("preretinal_haemorrhage" in names for names in seen) < 7


@pytest.mark.parametrize("grade", range(1, 5))
def test_lesions_lie_on_retina(grade):
    for eye in eyes(grade):
        image, masks = drawn(eye)
        view = synthetic._View(eye, HEIGHT)
        for name, mask in masks.items():
            assert mask.dtype == bool and mask.shape == image.shape[:2]
            assert not (mask & (view.aperture < 0.5)).any()
            if name != "new_vessel":
                assert not (mask & (np.abs(view.z) < 0.47)).any(), name
        if grade == 3:  # severe: haemorrhages in four quadrants about the macula
            spots = view.z[masks["haemorrhage"]] - 0.8 * view.fovea
            assert len({(spot.real > 0, spot.imag > 0) for spot in spots}) == 4


def test_worse_grades_show_more():
    area = [np.mean([drawn(eye)[1]["haemorrhage"].sum() for eye in eyes(g)]) for g in range(5)]
    assert area[0] == area[1] == 0 < area[2] < area[3] / 1.5
    dots = [np.mean([drawn(eye)[1]["microaneurysm"].sum() for eye in eyes(g)]) for g in range(4)]
    assert dots[0] == 0 < dots[1] < dots[2] / 1.5 < dots[3]


@pytest.mark.parametrize(
    ("name", "grade", "sign"),
    [
        ("microaneurysm", 1, -1),
        ("haemorrhage", 3, -1),
        ("preretinal_haemorrhage", 4, -1),
        ("hard_exudate", 3, 1),
        ("cotton_wool_spot", 3, 1),
    ],
)
def test_lesions_stand_out(name, grade, sign):
    # Green, in which blood is dark and deposits are bright: against the ring around the lesions,
    # and against the same eye without lesions.
    around, without = [], []
    for eye in eyes(grade):
        image, masks = drawn(eye, 384)
        mask, others = masks[name], np.any([masks[other] for other in LESIONS], 0)
        if mask.any():
            green = image[..., 1].astype(float)
            ring = grown(mask, 5) & ~grown(others, 2)
            plain = drawn(replace(eye, grade=0), 384)[0][..., 1]
            around.append(sign * (green[mask].mean() / green[ring].mean() - 1))
            without.append(sign * (green[mask].mean() / plain[mask].mean() - 1))
    assert len(around) >= 2 and np.mean(around) > 0.08 and min(around) > 0
    assert np.mean(without) > 0.08 and min(without) > 0


def test_one_eye_in_two_grades_differs_at_lesions_only():
    for plain, sick in zip(eyes(0, 5), eyes(4, 5), strict=True):
        before, (after, masks) = drawn(plain)[0].astype(int), drawn(sick)
        assert before.shape == after.shape
        change = np.abs(after - before).max(2)
        lesion = np.any(list(masks.values()), 0)
        # Fine new vessels reach beyond their mask, and JPEG spreads a change over 16 pixels.
        assert np.percentile(change[~grown(lesion, 24)], 95) <= 4
        assert change[lesion].mean() > 4


def test_grade_is_not_in_colour_light_or_camera():
    plan = plan_eyes(120, seed=4)
    facts = []
    for eye in plan:
        image, masks = drawn(eye, 80)
        clear = (image.max(2) > 20) & ~grown(np.any(list(masks.values()), 0), 2)
        facts.append(
            (
                *np.median(image[clear], 0),
                image[clear].std(),
                image.shape[1],
                (image.max(2) < 12).mean(),
            )
        )
    grades = np.array([eye.grade for eye in plan], float)
    correlation = np.corrcoef(grades, np.array(facts).T)[0, 1:]
    assert np.abs(correlation).max() < 0.25, correlation


def test_colours_and_light_vary():
    colours = [
        np.median(image[image.max(2) > 20], 0)
        for image in (drawn(eye, 80)[0] for eye in plan_eyes(60, seed=4)[::2])
    ]
    red, green, blue = np.array(colours).T
    assert np.ptp(red) > 90 and np.ptp(green / red) > 0.2 and np.ptp(blue / green) > 0.3


def test_height_scales_the_same_eye():
    for eye in eyes(3, 4):
        small, masks = drawn(eye)
        large, fine = drawn(eye, 2 * HEIGHT)
        assert large.shape[0] == 2 * HEIGHT and abs(large.shape[1] - 2 * small.shape[1]) <= 2
        again = np.asarray(Image.fromarray(large).resize(small.shape[1::-1]), float)
        assert np.corrcoef(again.ravel(), small.ravel())[0, 1] > 0.97
        for name in ("haemorrhage", "cotton_wool_spot"):
            again = np.asarray(Image.fromarray(fine[name]).resize(small.shape[1::-1]))
            both, either = again & masks[name], again | masks[name]
            assert both.sum() > 0.6 * either.sum()
    for height in (64, 100, 700):
        assert draw_photograph(DrawnEye("p", "left", 4, (0, 1, 0)), height)[0].shape[0] == height


# ---------------------------------------------------------------------------------- drawn folder


@pytest.fixture(scope="module")
def manifest():
    """The manifest of 12 drawn photographs, in the tests' own cache."""
    return synthetic.synthetic_manifest(12)


def test_synthetic_is_a_prepared_folder_with_masks(manifest, own_home):
    assert manifest.prepared and len(manifest.records) == 12
    assert manifest.root.is_relative_to(own_home / "cache")

    patients = {}
    for split in ("train", "val", "test"):
        patients[split] = {record.patient for record in manifest.split(split)}
    assert all(patients.values()) and sum(map(len, patients.values())) == 6
    assert not patients["train"] & patients["test"]
    assert not patients["train"] & patients["val"]

    masks = list((manifest.root / "masks").iterdir())
    for record in manifest.records:
        with Image.open(manifest.root / record.path) as picture:
            assert picture.size == (synthetic.SYNTHETIC_SIZE, synthetic.SYNTHETIC_SIZE)
        stem = record.path.removeprefix("images/").removesuffix(".jpg")
        has_masks = any(mask.name.startswith(stem + "_") for mask in masks)
        assert has_masks == (record.grade > 0)
    for mask in masks:
        assert set(np.unique(np.asarray(Image.open(mask)))) == {0, 255}


def test_synthetic_is_drawn_once(manifest, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("drawn again")

    monkeypatch.setattr(synthetic, "draw_folder", refuse)
    again = synthetic.synthetic_manifest(12)
    assert again.records == manifest.records and again.fingerprint == manifest.fingerprint


def test_masks_lie_on_lesions(manifest):
    """Blood swallows green: it is darker inside the masks than around them."""
    darker = []
    # The t is that of left and right: preretinal haemorrhages are left out.
    for path in (manifest.root / "masks").glob("*t_haemorrhage.png"):
        mask = Image.open(path)
        ring = np.asarray(mask.filter(ImageFilter.MaxFilter(15))) > np.asarray(mask)
        name = path.name.replace("_haemorrhage.png", ".jpg")
        green = np.asarray(Image.open(manifest.root / "images" / name))[..., 1].astype(float)
        darker.append(green[np.asarray(mask) > 127].mean() < green[ring].mean())
    assert len(darker) >= 2 and np.mean(darker) > 0.5
