"""fundus/painting.py: lesions on photographs, and where they are.

Run it with `python -m pytest tests/test_painting.py`.
"""

import numpy as np
import pytest
from PIL import Image

from fundus import painting
from fundus.painting import PAINTED, Paint, known_lesions, paint_lesions

SIDE = 256


def retina(grey: int = 120) -> np.ndarray:
    """A plain disc that fills a black picture."""
    rows, columns = np.indices((SIDE, SIDE)) - SIDE / 2
    inside = rows**2 + columns**2 < (SIDE / 2) ** 2
    return (inside[..., None] * np.array([grey, grey * 0.6, grey * 0.4])).astype(np.uint8)


def paint(picture, seed=0):
    return paint_lesions(picture, np.random.default_rng(seed))


def test_nothing_changes_but_where_the_masks_say():
    picture = retina()
    for seed in range(20):
        painted, masks = paint(picture, seed)
        assert painted.shape == picture.shape and painted.dtype == np.uint8
        assert masks.shape == (SIDE, SIDE, len(PAINTED)) and masks.dtype == np.uint8
        untouched = (masks == 0).all(axis=2)
        assert (painted[untouched] == picture[untouched]).all()


def test_no_lesion_is_painted_beside_the_retina():
    picture = retina()
    surround = picture.max(axis=2) <= painting.DARKEST_RETINA
    for seed in range(20):
        assert not paint(picture, seed)[1][surround].any()


@pytest.mark.parametrize("name", PAINTED)
def test_blood_is_darker_and_deposits_are_brighter(name, monkeypatch):
    monkeypatch.setattr(painting, "PAINTED", {name: PAINTED[name]})
    monkeypatch.setattr(painting, "PAINTED_SHARE", 1.0)
    monkeypatch.setattr(painting, "TINT", 0.0)
    picture = retina()
    change = []
    for seed in range(20):
        painted, masks = paint(picture, seed)
        inside = masks[..., 0] > 200
        change += list(painted[inside].astype(int) - picture[inside])
    change = np.array(change)
    assert len(change) > 100
    if PAINTED[name].density is not None:
        # Blood swallows green above all, by its own brightness.
        assert (change <= 0).all()
        lost = change.mean(axis=0) / picture[SIDE // 2, SIDE // 2]
        assert lost[1] < lost[0]
    else:
        assert (change.mean(axis=0) > 0).all()


def test_a_square_of_blood_by_hand():
    painted = np.full((40, 40, 3), 100, np.float32)
    mask = np.zeros((40, 40), np.uint8)
    corners = np.array([10 + 10j, 30 + 10j, 30 + 30j, 10 + 30j])
    colour = painting.Colour(np.array([0.0, 1.0, 2.0]), None, 1.0)
    painting._lay(painted, mask, corners, colour, 0.5)
    expected = 100 * np.exp(-np.array([0.0, 1.0, 2.0]))
    np.testing.assert_allclose(painted[20, 20], expected, rtol=1e-5)
    assert mask[20, 20] == 255 and mask[5, 5] == 0
    assert abs(int((mask > 127).sum()) - 400) <= 45  # 20 x 20, and a pixel's width of its edge


def test_a_square_of_deposit_by_hand():
    painted = np.full((40, 40, 3), 100, np.float32)
    mask = np.zeros((40, 40), np.uint8)
    corners = np.array([10 + 10j, 30 + 10j, 30 + 30j, 10 + 30j])
    colour = painting.Colour(None, np.array([1.5, 2.0, 1.0]), 0.5)
    painting._lay(painted, mask, corners, colour, 0.5)
    np.testing.assert_allclose(painted[20, 20], [125, 150, 100], rtol=1e-5)  # half way


@pytest.mark.parametrize("corner", [-8 - 8j, 35 + 35j, -50 + 10j, 10 + 90j])
def test_what_lies_over_the_edge_is_cut_off(corner):
    painted = np.full((40, 40, 3), 100, np.float32)
    mask = np.zeros((40, 40), np.uint8)
    corners = corner + np.array([0, 12, 12 + 12j, 12j])
    colour = painting.Colour(np.ones(3), None, 1.0)
    painting._lay(painted, mask, corners, colour, 0.5)
    rows, columns = np.indices(mask.shape)
    inside = (columns > corner.real + 1) & (columns < corner.real + 11)
    inside &= (rows > corner.imag + 1) & (rows < corner.imag + 11)
    assert (mask[inside] > 190).all()
    expected = 100 * np.exp(-(mask.astype(np.float32) / 255))
    np.testing.assert_allclose(painted, np.repeat(expected[..., None], 3, axis=2), rtol=1e-5)


def test_the_generator_decides():
    picture = retina()
    first, again, other = paint(picture, 1), paint(picture, 1), paint(picture, 2)
    assert (first[0] == again[0]).all() and (first[1] == again[1]).all()
    assert (first[0] != other[0]).any()


def test_every_kind_comes_and_stays_away():
    found = np.array([paint(retina(), seed)[1].any(axis=(0, 1)) for seed in range(60)])
    share = found.mean(axis=0)
    assert (share > 0.45).all() and (share < 0.9).all()


@pytest.mark.parametrize("shape", [(40, 40), (30, 90), (8, 8), (1, 1)])
def test_pictures_of_any_shape_and_of_nothing(shape):
    black = np.zeros((*shape, 3), np.uint8)
    painted, masks = paint(black)
    assert (painted == 0).all() and (masks == 0).all()
    bright, masks = paint(np.full((*shape, 3), 200, np.uint8))
    assert bright.shape == (*shape, 3) and masks.shape == (*shape, len(PAINTED))


def test_specks_of_an_exudate_lie_about_their_leak(monkeypatch):
    rng = np.random.default_rng(0)
    for _ in range(50):
        specks = painting._scatter_specks(rng, 3 + 4j)
        assert 5 <= len(specks) < 22
        assert np.abs(specks - (3 + 4j)).max() < 0.4 + 6 * painting.SPECK_SCATTER


def test_few_lesions_are_as_likely_as_many():
    rng = np.random.default_rng(0)
    places = np.full(10, 5 + 5j)
    blood = Paint(most=15, density=np.ones(3))
    counts = [
        len(painting._outline(rng, "microaneurysm", blood, places, 35.0)) for _ in range(2000)
    ]
    # The logarithm is uniform, so that each doubling has a quarter of them.
    for least, most in ((1, 1), (2, 3), (4, 7), (8, 15)):
        share = np.mean([least <= count <= most for count in counts])
        assert abs(share - 0.25) < 0.04


def test_masks_that_a_picture_came_with(tmp_path):
    (tmp_path / "masks").mkdir()
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[10:20, 30:40] = 255
    Image.fromarray(mask).save(tmp_path / "masks" / "p1_left_hard_exudate.png")
    Image.fromarray(mask).save(tmp_path / "masks" / "p1_left_new_vessel.png")  # is not painted
    masks = known_lesions(tmp_path, "images/p1_left.jpg", (SIDE, SIDE))
    kind = list(PAINTED).index("hard_exudate")
    assert (masks[..., kind] == mask).all()
    assert masks.sum() == mask.sum()
    assert not known_lesions(tmp_path, "images/p2_left.jpg", (SIDE, SIDE)).any()
    assert not known_lesions(tmp_path / "images", "a.jpg", (9, 7)).any()
