"""Shaded discs on black: what the tests of photographs and of the field of view take for fundi."""

import numpy as np


def draw_fundus(width=1000, height=660, centre=(500, 330), radius=300, light=180):
    """Return a shaded reddish disc on black: float (height, width, 3), 0 to `light`."""
    y, x = np.mgrid[:height, :width]
    distance = np.hypot(x + 0.5 - centre[0], y + 0.5 - centre[1]) / radius
    shade = np.where(distance <= 1, 1 - 0.3 * distance**2, 0)
    return shade[..., None] * np.array([light, 0.5 * light, 0.25 * light])


def to_uint8(image):
    """Return an image of any range with 8 bits."""
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def assert_boxes_agree(found, expected, radius, tolerance=0.02):
    """Ask that no side of a box is off by more than `tolerance` diameters."""
    assert np.abs(np.subtract(found, expected)).max() <= tolerance * 2 * radius, (found, expected)
