"""contrast.py and handmade.py: what is measured, against naive computations and drawn lesions.

Run it with `python -m pytest tests/test_handmade.py`.
"""

import numpy as np
import pytest
from PIL import Image

from fundus import contrast, handmade
from fundus.handmade import FEATURE_NAMES, SIDE, handmade_features
from fundus.photographs import crop_square, find_fundus
from fundus.synthetic import DrawnEye, draw_photograph


@pytest.fixture(scope="module")
def healthy():
    """A drawn fundus without lesions, cropped and square."""
    frame, _ = draw_photograph(DrawnEye("p", "left", 0, (5, 1, 0)), 400)
    return crop_square(frame, find_fundus(frame), SIDE)


def named(picture):
    return dict(zip(FEATURE_NAMES, handmade_features(picture).tolist(), strict=True))


def disc_at(row, column, radius):
    """A mask of a disc."""
    down = np.arange(SIDE)[:, None] - row
    right = np.arange(SIDE) - column
    return down * down + right * right <= radius * radius


# Below the fovea, between the arcades, where the drawn fundus has no large vessel.
PLACES = [(178, 96), (186, 120), (196, 104), (172, 140)]


def paint(picture, color, radius):
    """The picture with round lesions of a colour, soft at the edge as a camera makes them."""
    painted = np.asarray(picture, np.float32).copy()
    for row, column in PLACES:
        painted[disc_at(row, column, radius)] = color
    soft = [handmade_blur(plane) for plane in np.moveaxis(painted, 2, 0)]
    original = [handmade_blur(plane) for plane in np.moveaxis(np.asarray(picture, float), 2, 0)]
    changed = np.asarray(picture, float) + np.moveaxis(np.array(soft) - np.array(original), 0, 2)
    return changed.round().clip(0, 255).astype(np.uint8)


def handmade_blur(plane):
    """A plane under a 3 x 3 binomial filter."""
    padded = np.pad(plane, 1, "edge")
    rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    return (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 16


# ------------------------------------------------------------------------------------- the vector


def test_every_number_has_a_name_of_its_own(healthy):
    values = handmade_features(healthy)
    assert values.dtype == np.float32
    assert len(values) == len(FEATURE_NAMES) == len(set(FEATURE_NAMES)) == 479
    assert np.array_equal(values, handmade_features(healthy.copy()))
    assert "blob red 2.0 dark round count>0.35" in FEATURE_NAMES


def degenerate():
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    dot = np.zeros((SIDE, SIDE, 3), np.uint8)
    dot[100:104, 50:54] = 200
    small = np.zeros((SIDE, SIDE, 3), np.uint8)
    small[disc_at(128, 128, 50)] = (150, 80, 40)
    stripe = np.zeros((SIDE, SIDE, 3), np.uint8)
    stripe[:, 100:130] = (150, 80, 40)
    return {
        "black": np.zeros((SIDE, SIDE, 3), np.uint8),
        "white": np.full((SIDE, SIDE, 3), 255, np.uint8),
        "noise": noise,
        "a dot": dot,
        "a small fundus": small,
        "a stripe": stripe,
    }


@pytest.mark.parametrize("name", degenerate())
def test_any_picture_has_finite_statistics_of_moderate_size(name):
    values = handmade_features(degenerate()[name])
    assert np.isfinite(values).all()
    assert np.abs(values).max() < 20


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((128, 128, 3), np.uint8),
        np.zeros((SIDE, SIDE), np.uint8),
        np.zeros((SIDE, SIDE, 3), np.float32),
    ],
)
def test_other_pictures_are_refused(picture):
    with pytest.raises(ValueError, match=r"expected uint8 \(256, 256, 3\)"):
        handmade_features(picture)


def test_the_surround_does_not_count(healthy):
    """Nor does text in a corner, as some cameras write it."""
    fundus = contrast.find_fundus(healthy)
    changed = healthy.copy()
    changed[~fundus] = 7
    changed[4:12, 4:30] = 240
    difference = handmade_features(changed) - handmade_features(healthy)
    assert np.abs(difference).max() < 1e-5


def test_a_mirror_changes_little(healthy):
    """All but which quadrants are meant is the same, down to where a sum begins."""
    difference = handmade_features(healthy[:, ::-1]) - handmade_features(healthy)
    assert np.abs(difference).mean() < 0.02


def test_light_is_no_contrast(healthy):
    """Of a photograph with half the light, what lesions are measured by hardly changes."""
    dim = (healthy * 0.6).astype(np.uint8)
    before = named(healthy)
    after = named(dim)
    of_lesions = [name for name in FEATURE_NAMES if name.startswith(("band green", "part dark"))]
    change = [abs(after[name] - before[name]) for name in of_lesions]
    assert np.mean(change) < 0.15
    assert after["color green mean"] == pytest.approx(0.6 * before["color green mean"], rel=0.05)


# --------------------------------------------------------------------------------- drawn lesions


@pytest.mark.parametrize(
    "color, radius, raised",
    [
        # A microaneurysm, a haemorrhage, an exudate.
        ((90, 25, 15), 1, ["blob green 1.0 dark round count>0.35", "part dark 1.5 tiny count"]),
        ((90, 20, 15), 4, ["blob green 3.0 dark round top", "part dark 1.5 large count"]),
        ((230, 210, 90), 3, ["blob green 2.0 bright round top", "part bright 1.5 compact area"]),
    ],
)
def test_a_lesion_raises_what_names_it(healthy, color, radius, raised):
    before = named(healthy)
    after = named(paint(healthy, color, radius))
    for name in raised:
        assert after[name] > before[name] + 0.05, name


def test_exudates_are_yellow(healthy):
    before = named(healthy)
    yellow = named(paint(healthy, (230, 210, 60), 3))
    assert yellow["part yellow 1.5 compact area"] > before["part yellow 1.5 compact area"] + 0.3
    # A white reflex is as bright, and not yellow.
    white = named(paint(healthy, (230, 215, 205), 3))
    assert white["part yellow 1.5 compact area"] < yellow["part yellow 1.5 compact area"] - 0.3


# ------------------------------------------------------------------------------- naive computations


def test_curvatures_of_a_gaussian_are_as_calculated():
    """Of exp(-r^2 / (2 s^2)) blurred to total variance s^2 + t^2, at the middle."""
    for own, sigma in ((2.0, 2.0), (4.0, 3.0)):
        total = own**2 + sigma**2
        down = np.arange(SIDE)[:, None] - 128
        right = np.arange(SIDE) - 128
        smooth = own**2 / total * np.exp(-(down**2 + right**2) / (2 * total))
        lower, higher = contrast.hessian_eigenvalues(smooth.astype(np.float32), sigma)
        expected = -(sigma**2) * own**2 / total**2
        assert lower[128, 128] == pytest.approx(expected, rel=0.05)
        assert higher[128, 128] == pytest.approx(expected, rel=0.05)


def test_curvatures_are_numpys_eigenvalues():
    smooth = np.random.default_rng(0).normal(size=(SIDE, SIDE)).astype(np.float32)
    lower, higher = contrast.hessian_eigenvalues(smooth, 1.5)
    for row, column in ((5, 9), (100, 31), (200, 254)):
        around = smooth[row - 1 : row + 2, column - 1 : column + 2].astype(float)
        xx = around[1, 2] - 2 * around[1, 1] + around[1, 0]
        yy = around[2, 1] - 2 * around[1, 1] + around[0, 1]
        xy = (around[2, 2] - around[2, 0] - around[0, 2] + around[0, 0]) / 4
        values = 1.5**2 * np.linalg.eigvalsh([[xx, xy], [xy, yy]])
        found = [lower[row, column], higher[row, column]]
        assert found == pytest.approx(values.tolist(), rel=1e-4, abs=1e-4)


def test_peaks_are_above_all_around_them():
    response = np.random.default_rng(1).normal(size=(SIDE, SIDE))
    mask = disc_at(128, 128, 90)
    expected = []
    for row in range(1, SIDE - 1):
        for column in range(1, SIDE - 1):
            value = response[row, column]
            around = response[row - 1 : row + 2, column - 1 : column + 2]
            if mask[row, column] and value > 0 and value == around.max():
                expected.append(row * SIDE + column)
    assert handmade._peaks(response, mask).tolist() == expected


def test_blurred_copies_are_those_of_one_filter_each():
    from scipy import ndimage

    plane = np.random.default_rng(2).normal(size=(SIDE, SIDE)).astype(np.float32)
    copies = contrast.blur_at_scales(plane)
    for copy, sigma in zip(copies, contrast.SCALES, strict=True):
        expected = ndimage.gaussian_filter(plane, sigma, mode="constant")
        assert np.abs(copy - expected)[20:-20, 20:-20].max() < 0.03


def test_band_energies_by_hand(healthy):
    retina = contrast.measure_retina(healthy)
    values = named(healthy)
    band = retina.contrast("red", 1.5) - retina.contrast("red", 2.0)
    inside = band[retina.off_disc].astype(float)
    rms = np.sqrt((inside**2).mean())
    assert values["band red 1.5-2.0 rms"] == pytest.approx(np.log(rms + 0.02), abs=1e-4)
    dark = -np.quantile(inside, 0.01)
    assert values["band red 1.5-2.0 p1"] == pytest.approx(np.log(dark + 0.02), abs=0.01)


def test_parts_are_counted_by_size_and_shape():
    plane = np.zeros((SIDE, SIDE))
    plane[disc_at(60, 60, 1)] = 3  # 5 pixels: tiny
    plane[disc_at(60, 120, 2)] = 3  # 13: small
    plane[disc_at(120, 120, 5)] = 5  # 81: large
    plane[150:152, 60:100] = 3  # a vessel of 80
    plane[200, 200] = 3  # a single pixel is nothing
    everywhere = plane < 9

    def describe(level):
        values = handmade._describe(handmade.find_components(plane, everywhere, level))
        return dict(zip(handmade.PART_STATISTICS, values, strict=True))

    stats = describe(2.0)
    for name in ("tiny", "small", "large", "long"):
        assert stats[f"{name} count"] == pytest.approx(np.log(2)), name
    assert stats["compact area"] == pytest.approx(np.log1p(5 + 13 + 81))
    assert stats["long area"] == pytest.approx(np.log1p(80))
    assert stats["compact share"] == pytest.approx(99 / (99 + 80 + 25))
    assert stats["largest area"] == pytest.approx(np.log1p(81))
    assert stats["contrast"] == pytest.approx(np.log1p((3 + 3 + 5) / 3))
    assert not any(describe(9.0).values())


def test_rings_and_sectors_go_by_the_fundus(healthy):
    ring, sector = contrast._rings_and_sectors(disc_at(100, 140, 80))
    assert [ring[100, 140], ring[100, 140 + 40], ring[100, 140 + 70]] == [0, 1, 2]
    corners = [sector[90, 130], sector[90, 150], sector[110, 130], sector[110, 150]]
    assert corners == [0, 1, 2, 3]
    assert sector[100 - 60, 130] == 4


def test_enlarging_is_bilinear():
    small = np.random.default_rng(3).normal(size=(64, 64)).astype(np.float32)
    expected = Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    assert np.abs(contrast._enlarge(small) - np.asarray(expected)).max() < 1e-5
