"""Where cameras look at drawn eyes. Run with `python -m pytest tests/test_camera.py`."""

import numpy as np
import pytest

from fundus.camera import Camera

HEIGHT = 200


def aim(seed: int, *, is_left: bool = True) -> Camera:
    """A camera of the seed's, aimed by the seed."""
    camera_rng = np.random.default_rng((1, seed))
    rng = np.random.default_rng((2, seed))
    return Camera(camera_rng, rng, HEIGHT, is_left=is_left)


@pytest.mark.parametrize("is_left", [True, False])
def test_pixels_of_places_are_where_the_places_are_shown(is_left):
    for seed in range(5):
        camera = aim(seed, is_left=is_left)
        height, width = camera.shape
        assert height == HEIGHT
        x, y = np.moveaxis(camera.to_pixels(camera.places), -1, 0)
        columns = np.broadcast_to(np.arange(width) + 0.5, camera.shape)
        rows = np.broadcast_to(np.arange(height)[:, None] + 0.5, camera.shape)
        np.testing.assert_allclose(x, columns, atol=1e-3)
        np.testing.assert_allclose(y, rows, atol=1e-3)


def test_the_temple_is_right_in_a_left_eye_and_up_is_up():
    for seed in range(5):
        left = aim(seed)
        right = aim(seed, is_left=False)
        disc, temporal, above = left.to_pixels(np.array((0, 1, 1j)))
        np.testing.assert_allclose(temporal - disc, (left.disc_diameter, 0), atol=1e-9)
        np.testing.assert_allclose(above - disc, (0, -left.disc_diameter), atol=1e-9)
        disc, temporal, above = right.to_pixels(np.array((0, 1, 1j)))
        np.testing.assert_allclose(temporal - disc, (-right.disc_diameter, 0), atol=1e-9)
        np.testing.assert_allclose(above - disc, (0, -right.disc_diameter), atol=1e-9)


def test_the_aperture_is_a_disc_and_half_of_the_cameras_have_a_notch():
    notches = 0
    for seed in range(60):
        camera = aim(seed)
        assert camera.aperture.min() >= 0 and camera.aperture.max() == 1
        inside = camera.eccentricity < 0.88
        assert (camera.aperture[inside] == 1).all()
        assert (camera.aperture[camera.eccentricity > 1.05] == 0).all()

        # Beyond the rim it is light only in the notch, up and to the right.
        is_beyond = (camera.aperture == 1) & (camera.eccentricity > 1.02)
        if is_beyond.any():
            notches += 1
            row, column = np.argwhere(is_beyond).mean(axis=0)
            assert row < camera.centre[1] - 0.6 * camera.radius
            assert column > camera.centre[0] + 0.6 * camera.radius
    assert 15 < notches < 45


def test_places_are_found_on_visible_retina():
    rng = np.random.default_rng(0)
    for seed in range(10):
        camera = aim(seed)
        places = camera.find_places(rng, 50, camera.fovea, 1.5)
        assert len(places) == 50
        x, y = camera.to_pixels(places).T
        column = x.astype(int)
        row = y.astype(int)
        assert (column >= 0).all() and (column < camera.shape[1]).all()
        assert (row >= 0).all() and (row < camera.shape[0]).all()
        assert (camera.eccentricity[row, column] < 1).all()
        assert (np.abs(places) > 0.85).all()  # neither on the disc nor in the fovea
        assert (np.abs(places - camera.fovea) > 0.15).all()


def test_places_go_round_their_centres():
    camera = aim(0)
    centres = camera.fovea + np.array((1, 1j, -1j))
    places = camera.find_places(np.random.default_rng(0), 9, centres, 0.01)
    nearest = np.abs(places[:, None] - centres).argmin(axis=1)
    assert nearest.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2]


def test_no_places_are_found_where_the_camera_does_not_look():
    rng = np.random.default_rng(0)
    assert len(aim(0).find_places(rng, 5, 40 + 0j, 0.1)) == 0
    assert len(aim(0).find_places(rng, 0, 2.5 + 0j, 0.1)) == 0
