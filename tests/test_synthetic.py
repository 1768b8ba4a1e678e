"""Drawn photographs: the same bits every time, lesions by grade and in their place, and nothing
else that tells the grade. Run with `python -m pytest tests/test_synthetic.py`.

Colour and camera are also compared across grades on one and the same eye, because drawing takes the
lesions from random numbers of their own.
"""

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
from fundus.eye_map import LESIONS
from fundus.manifest import GRADES
from fundus.synthetic import DrawnEye, draw_photograph, plan_eyes
from utils import InputError

HEIGHT = 192

# Which lesions an eye may have, by grade, and which it always has.
POSSIBLE = [
    set(),
    {"microaneurysm"},
    {"microaneurysm", "haemorrhage", "hard_exudate", "cotton_wool_spot"},
    set(LESIONS) - {"new_vessel", "preretinal_haemorrhage"},
    set(LESIONS),
]
CERTAIN = [
    set(),
    {"microaneurysm"},
    {"microaneurysm", "haemorrhage"},
    {"microaneurysm", "haemorrhage", "cotton_wool_spot", "venous_beading"},
    {"microaneurysm", "haemorrhage", "new_vessel"},
]


@cache
def draw(eye: DrawnEye, height: int = HEIGHT) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Draw each eye once for all tests."""
    return draw_photograph(eye, height)


def eyes_of_grade(grade: int, count: int = 8) -> list[DrawnEye]:
    """Both eyes of several patients, all given this grade: only lesions differ between grades."""
    return [replace(eye, grade=grade) for eye in plan_eyes(count, seed=3)]


def any_lesion(masks: dict[str, np.ndarray]) -> np.ndarray:
    """The mask of all lesions together."""
    return np.any(list(masks.values()), axis=0)


def digest(eye: DrawnEye) -> str:
    """A checksum of the photograph and its masks."""
    image, masks = draw_photograph(eye, 128)
    parts = image.tobytes() + b"".join(masks[name].tobytes() for name in LESIONS)
    return hashlib.sha256(parts).hexdigest()


def dilate(mask: np.ndarray, pixels: int) -> np.ndarray:
    """The mask, larger by so many pixels on each side."""
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
    shares = np.bincount(grades, minlength=GRADES) / len(grades)
    assert np.abs(shares - (0.493, 0.101, 0.273, 0.053, 0.080)).max() < 0.02  # APTOS 2019's
    left = grades[::2]
    right = grades[1::2]
    assert np.abs(left - right).max() == 1 and 0.6 < (left == right).mean() < 0.95
    for side in (left, right):  # neither eye is the worse one by rule
        assert np.abs(np.bincount(side, minlength=GRADES) / len(side) - shares).max() < 0.02


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
        image = Image.fromarray(draw(replace(eye, grade=0), 128)[0]).convert("L")
        fundus = np.asarray(image) > 12
        # The disc is the one bright spot of its size: small blur minus large blur, off the rim.
        near = np.asarray(image.filter(ImageFilter.GaussianBlur(3)), float)
        far = np.asarray(image.filter(ImageFilter.GaussianBlur(12)), float)
        spot = np.where(dilate(~fundus, 9), -np.inf, near - far)
        column = np.unravel_index(spot.argmax(), spot.shape)[1]
        right_side.append(column > np.flatnonzero(fundus.any(0)).mean())
    assert np.mean(np.array(right_side) == np.tile((False, True), 10)) >= 0.9


def test_frame_and_surround():
    shapes = set()
    eyes = eyes_of_grade(0, 24)
    for left, right in zip(eyes[::2], eyes[1::2], strict=True):
        image, masks = draw(left)
        assert image.dtype == np.uint8 and image.shape[0] == HEIGHT and image.shape[2] == 3
        assert 1 <= image.shape[1] / HEIGHT <= 1.5
        assert tuple(masks) == LESIONS
        assert image.shape == draw(right)[0].shape  # one camera for both eyes
        is_dark = image.max(axis=2) < 12
        assert 0.15 < is_dark.mean() < 0.65
        assert is_dark[:8, :8].all() and is_dark[-8:, -8:].all()
        shapes.add(image.shape)
    assert len(shapes) > 2


@pytest.mark.parametrize("grade", range(GRADES))
def test_lesions_of_the_grade(grade):
    found = []
    for eye in eyes_of_grade(grade):
        _, masks = draw(eye)
        found.append({name for name, mask in masks.items() if mask.any()})
    assert set().union(*found) == POSSIBLE[grade]
    assert all(names >= CERTAIN[grade] for names in found)
    if grade == 4:
        assert 1 < sum("preretinal_haemorrhage" in names for names in found) < 7


@pytest.mark.parametrize("grade", range(1, GRADES))
def test_lesions_lie_on_retina(grade):
    for eye in eyes_of_grade(grade):
        image, masks = draw(eye)
        camera = synthetic._aim_camera(eye, HEIGHT)
        for name, mask in masks.items():
            assert mask.dtype == bool and mask.shape == image.shape[:2]
            assert not (mask & (camera.aperture < 0.5)).any()
            if name != "new_vessel":
                assert not (mask & (np.abs(camera.places) < 0.47)).any(), name
        if grade == 3:  # severe: haemorrhages in four quadrants about the macula
            spots = camera.places[masks["haemorrhage"]] - 0.8 * camera.fovea
            assert len({(spot.real > 0, spot.imag > 0) for spot in spots}) == 4


def mean_area(name: str, grade: int) -> float:
    """Pixels that a lesion covers in an eye of this grade, on average."""
    return float(np.mean([draw(eye)[1][name].sum() for eye in eyes_of_grade(grade)]))


def test_worse_grades_show_more():
    blood = [mean_area("haemorrhage", grade) for grade in range(4)]
    assert blood[0] == blood[1] == 0 < blood[2] < blood[3] / 1.5
    dots = [mean_area("microaneurysm", grade) for grade in range(4)]
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
    """Blood is dark in green and deposits are bright.

    This holds against the ring around the lesions, and against the same eye without lesions.
    """
    against_ring = []
    against_plain = []
    for eye in eyes_of_grade(grade):
        image, masks = draw(eye, 384)
        mask = masks[name]
        if not mask.any():
            continue
        green = image[..., 1].astype(float)
        ring = dilate(mask, 5) & ~dilate(any_lesion(masks), 2)
        plain = draw(replace(eye, grade=0), 384)[0][..., 1]
        against_ring.append(sign * (green[mask].mean() / green[ring].mean() - 1))
        against_plain.append(sign * (green[mask].mean() / plain[mask].mean() - 1))
    assert len(against_ring) >= 2
    for difference in (against_ring, against_plain):
        assert np.mean(difference) > 0.08 and min(difference) > 0


def test_one_eye_in_two_grades_differs_at_lesions_only():
    for plain, sick in zip(eyes_of_grade(0, 5), eyes_of_grade(4, 5), strict=True):
        before = draw(plain)[0].astype(int)
        after, masks = draw(sick)
        assert before.shape == after.shape
        change = np.abs(after - before).max(axis=2)
        lesion = any_lesion(masks)
        # Fine new vessels reach beyond their mask, and JPEG spreads a change over 16 pixels.
        assert np.percentile(change[~dilate(lesion, 24)], 95) <= 4
        assert change[lesion].mean() > 4


def test_grade_is_not_in_colour_light_or_camera():
    plan = plan_eyes(120, seed=4)
    facts = []
    for eye in plan:
        image, masks = draw(eye, 80)
        is_clear = (image.max(axis=2) > 20) & ~dilate(any_lesion(masks), 2)
        red, green, blue = np.median(image[is_clear], axis=0)
        contrast = image[is_clear].std()
        surround = (image.max(axis=2) < 12).mean()
        facts.append((red, green, blue, contrast, surround, image.shape[1]))
    grades = np.array([eye.grade for eye in plan], float)
    correlation = np.corrcoef(grades, np.array(facts).T)[0, 1:]
    assert np.abs(correlation).max() < 0.25, correlation


def test_colours_and_light_vary():
    colours = []
    for eye in plan_eyes(60, seed=4)[::2]:
        image, _ = draw(eye, 80)
        colours.append(np.median(image[image.max(axis=2) > 20], axis=0))
    red, green, blue = np.array(colours).T
    assert np.ptp(red) > 90 and np.ptp(green / red) > 0.2 and np.ptp(blue / green) > 0.3


def test_height_scales_the_same_eye():
    for eye in eyes_of_grade(3, 4):
        small, masks = draw(eye)
        large, large_masks = draw(eye, 2 * HEIGHT)
        size = small.shape[1::-1]
        assert large.shape[0] == 2 * HEIGHT and abs(large.shape[1] - 2 * small.shape[1]) <= 2
        reduced = np.asarray(Image.fromarray(large).resize(size), float)
        assert np.corrcoef(reduced.ravel(), small.ravel())[0, 1] > 0.97
        for name in ("haemorrhage", "cotton_wool_spot"):
            reduced = np.asarray(Image.fromarray(large_masks[name]).resize(size))
            both = reduced & masks[name]
            either = reduced | masks[name]
            assert both.sum() > 0.6 * either.sum()


@pytest.mark.parametrize("height", [64, 100, 700])
def test_every_height_is_kept(height):
    image, _ = draw_photograph(DrawnEye("p", "left", 4, (0, 1, 0)), height)
    assert image.shape[0] == height


# ----------------------------------------------------------------------------------------- folder


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


def test_photographs_are_drawn_as_large_as_asked(own_home):
    larger = synthetic.synthetic_manifest(10, 96)
    assert larger.root.name.startswith("synthetic-10-96-")
    for path in (larger.root / "images").iterdir():
        with Image.open(path) as picture:
            assert picture.size == (96, 96)
    for path in (larger.root / "masks").iterdir():
        with Image.open(path) as mask:
            assert mask.size == (96, 96)


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


@pytest.mark.parametrize("count", [10**20, synthetic.SYNTHETIC_MAX + 1])
def test_too_many_are_refused_before_any_is_drawn(count, monkeypatch):
    monkeypatch.setattr(synthetic, "draw_folder", lambda *_: pytest.fail("drawn"))
    monkeypatch.setattr(synthetic, "plan_eyes", lambda *_: pytest.fail("planned"))
    with pytest.raises(InputError, match=f"synthetic:{count}.* 1,000,000 photographs or fewer"):
        synthetic.synthetic_manifest(count)


def test_as_many_as_are_allowed_are_drawn(monkeypatch):
    class Reached(Exception):
        pass

    def stop(folder, count, **_size):
        raise Reached(count)

    monkeypatch.setattr(synthetic, "draw_folder", stop)
    with pytest.raises(Reached, match="^1000000$"):
        synthetic.synthetic_manifest(1_000_000)
