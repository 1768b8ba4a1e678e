"""copies.py: which pictures show the same retina. Run: pytest tests/test_copies.py"""

import base64
import hashlib
import io
import itertools

import numpy as np
import pytest
from PIL import Image

from fundus.copies import alike, coarse, find_alike, find_copies, find_shared, signature
from fundus.photographs import PhotographError, crop_square, find_fundus
from fundus.synthetic import DrawnEye, draw_photograph
from utils import InputError


def eye(seed, size=256):
    """A drawn fundus, cropped and square."""
    frame, _ = draw_photograph(DrawnEye("p", "left", seed % 5, (31, seed, 0)), size)
    return crop_square(frame, find_fundus(frame), size)


def compressed(picture):
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=50)
    return np.array(Image.open(buffer))


def test_copies_are_alike_and_other_eyes_are_not():
    looks = []
    for seed in range(8):
        picture = eye(seed)
        look = signature(picture)
        looks.append(look)
        small = np.array(Image.fromarray(picture).resize((128, 128), Image.Resampling.LANCZOS))
        bright = (picture * 1.15).clip(0, 255).astype(np.uint8)
        for copy in (compressed(picture), small, bright):
            assert alike(look, signature(copy)) > 0.84
        assert alike(look, look) == pytest.approx(1)
    for one, other in itertools.combinations(looks, 2):
        assert alike(one, other) < 0.6


def test_shared_pictures_of_two_sets_are_found_once_each():
    known = [eye(seed) for seed in range(6)]
    asked = [eye(20), compressed(known[4]), eye(21), known[1], np.zeros((64, 64, 3), np.uint8)]
    ours = np.stack([signature(picture).ravel() for picture in asked])
    # The picture itself and a changed copy of it are both there: the more alike one is named.
    theirs = np.stack([signature(picture).ravel() for picture in [*known, compressed(known[1])]])
    found = find_shared(ours, theirs)
    assert [(i, j) for i, j, _ in found] == [(1, 4), (3, 1)]
    assert found[1][2] == pytest.approx(1)
    assert find_shared(ours, theirs[[0, 2, 3, 5]]) == []


def test_a_black_picture_is_like_nothing():
    dark = signature(np.zeros((64, 64, 3), np.uint8))
    assert not dark.any()
    assert alike(dark, dark) == 0
    assert alike(dark, signature(eye(0))) == 0


def test_coarse_signature_is_the_mean_of_blocks():
    look = signature(eye(1))
    found = coarse(look)
    assert (found.shape, found.dtype) == ((16, 16), np.int8)
    for row, column in ((0, 0), (7, 3), (15, 15)):
        total = 0
        for i in range(4):
            for j in range(4):
                total += int(look[4 * row + i, 4 * column + j])
        assert abs(found[row, column] - total / 16) <= 0.5


def test_pairs_far_apart_in_the_list_are_found_as_by_looking_at_all():
    """2,200 signatures are searched in blocks of 512 by 2,048; all pairs are looked at here."""
    rng = np.random.default_rng(0)
    looks = rng.integers(-60, 60, (2200, 64, 64)).astype(np.int8)
    pairs = [(3, 9), (5, 600), (511, 512), (0, 2199), (2047, 2048), (700, 701)]
    for one, other in pairs:
        noise = rng.integers(-9, 10, (64, 64))
        looks[other] = (looks[one] + noise).clip(-127, 127)
    small = np.stack([coarse(look) for look in looks]).reshape(len(looks), -1)
    found = {(i, j) for i, j, _ in find_alike(small, looks.__getitem__)}
    unit = looks.reshape(len(looks), -1).astype(np.float32)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    every = {tuple(map(int, pair)) for pair in np.argwhere(np.triu(unit @ unit.T, 1) > 0.84)}
    assert found == every == set(pairs)


def test_pictures_almost_without_structure_are_no_copies():
    rng = np.random.default_rng(0)
    flat = np.full((256, 256, 3), 90, np.uint8)
    look = signature(flat + rng.integers(0, 2, flat.shape, dtype=np.uint8))
    assert look.any()
    assert alike(look, look) == 0


# ---------------------------------------------------------------------------- among prepared ones


def facts_of(pictures):
    """Return what prepare_data.py knows of pictures: sha256 and coarse signature."""
    facts = {}
    for name, picture in pictures.items():
        look = base64.b64encode(coarse(signature(picture))).decode()
        facts[name] = {"sha256": hashlib.sha256(picture.tobytes()).hexdigest(), "signature": look}
    return facts


def test_copies_among_prepared_photographs():
    pictures = {"b": eye(1), "a": eye(2), "d": compressed(eye(1)), "c": eye(3)}
    pictures["e"] = np.zeros((64, 64, 3), np.uint8)
    pictures["f"] = pictures["e"]  # equal files count, although nothing is seen in them
    facts = facts_of(pictures) | {"bad": {"error": "is empty"}}
    found = find_copies(facts, pictures.__getitem__)
    assert [pair[:2] for pair in found] == [("b", "d"), ("e", "f")]
    assert 0.84 < found[0][2] < 1
    assert found[1][2] == 1


def test_nothing_to_compare():
    assert find_copies({}, None) == []
    assert find_copies({"bad": {"error": "is empty"}}, None) == []


def test_a_picture_that_cannot_be_read_again_is_named():
    def unreadable(path):
        raise PhotographError("is empty")

    facts = facts_of({"a": eye(1), "b": compressed(eye(1))})
    with pytest.raises(InputError, match="a: is empty; repeat the command"):
        find_copies(facts, unreadable)
