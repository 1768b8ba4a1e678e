"""The field of view against drawn discs, and against what is easily taken for one.

Run: pytest tests/test_field_of_view.py
"""

import numpy as np
import pytest
from discs import assert_boxes_agree, draw_fundus, to_uint8
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from fundus import field_of_view
from fundus.field_of_view import Box, find_field_of_view

# Of the disc that draw_fundus makes by itself.
DISC = Box(200, 30, 800, 630)


@pytest.mark.parametrize(
    "width, height, centre, radius",
    [
        (1000, 660, (500, 330), 300),
        (1000, 660, (500, 330), 390),  # cut off at top and bottom
        (1000, 660, (420, 300), 340),  # cut off at the top alone
        (700, 700, (350, 350), 349),  # cropped already
        (1200, 800, (700, 380), 190),  # small and off the middle
        (3000, 2000, (1480, 1010), 930),
        (200, 150, (100, 75), 60),
    ],
)
def test_drawn_discs_are_found(width, height, centre, radius):
    image = to_uint8(draw_fundus(width, height, centre, radius))
    x, y = centre
    expected = Box(
        left=max(0, x - radius),
        top=max(0, y - radius),
        right=min(width, x + radius),
        bottom=min(height, y + radius),
    )
    assert_boxes_agree(find_field_of_view(image), expected, radius)


@pytest.mark.parametrize("light", [25, 60, 255])
@pytest.mark.parametrize("noise", [0, 6])
def test_dark_and_noisy_photographs(light, noise):
    rng = np.random.default_rng(0)
    image = draw_fundus(light=light) + 6 + rng.normal(0, noise, (660, 1000, 3))
    assert_boxes_agree(find_field_of_view(to_uint8(image)), DISC, 300)


def test_stamps_notches_and_hot_pixels_are_ignored():
    image = Image.fromarray(to_uint8(draw_fundus()))
    draw = ImageDraw.Draw(image)
    draw.text((5, 5), "2014-03-02  OD  45 deg", fill=(255, 255, 255), font_size=24)
    draw.rectangle((880, 440, 999, 559), fill=(255, 255, 255))  # a label
    draw.line((700, 500, 900, 500), fill=(255, 255, 255), width=8)  # which touches the fundus
    draw.polygon([(210, 290), (160, 330), (210, 370)], fill=(150, 75, 40))  # the notch
    pixels = np.array(image)
    rng = np.random.default_rng(0)
    pixels[rng.integers(0, 660, 300), rng.integers(0, 1000, 300)] = 255
    assert_boxes_agree(find_field_of_view(pixels), DISC, 300)


def test_a_fundus_partly_in_shadow():
    image = draw_fundus(light=220)
    image[:, 600:] *= 0.08
    assert_boxes_agree(find_field_of_view(to_uint8(image)), DISC, 300)


def test_a_shadow_in_the_middle():
    image = draw_fundus()
    y, x = np.mgrid[:660, :1000]
    image[np.hypot(x - 450, y - 300) < 110] = 0
    assert_boxes_agree(find_field_of_view(to_uint8(image)), DISC, 300)


def test_the_darkest_corners_tell_the_surround():
    """Light leaks into the other two."""
    image = draw_fundus()
    image[:120, :150] = 200
    image[-120:, -150:] = 200
    assert_boxes_agree(find_field_of_view(to_uint8(image)), DISC, 300)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((300, 400, 3), np.uint8),
        np.full((300, 400, 3), 255, np.uint8),
        np.full((1, 1, 3), 9, np.uint8),
        np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8),
        np.pad(np.full((300, 20, 3), 200, np.uint8), ((0, 0), (190, 190), (0, 0))),  # a strip
        np.pad(np.full((40, 40, 3), 200, np.uint8), ((130, 130), (180, 180), (0, 0))),  # a spot
        np.pad(np.full((150, 400, 3), 200, np.uint8), ((150, 0), (0, 0), (0, 0))),  # cut in two
    ],
    ids=["black", "white", "one pixel", "noise", "strip", "spot", "half"],
)
def test_none_is_found_where_there_is_none(image):
    assert find_field_of_view(image) is None


def test_half_a_disc_is_not_taken_for_one():
    image = draw_fundus(light=220)
    image[:, 560:] = 0  # the other part is lost altogether
    assert find_field_of_view(to_uint8(image)) is None


@pytest.mark.parametrize("color", [(128, 128, 128), (255, 255, 255), (20, 40, 160)], ids=str)
def test_a_flat_surround_may_have_any_color(color):
    """Programs fill the surround: Graham's way grey, a document white."""
    rng = np.random.default_rng(0)
    image = draw_fundus(light=220) + rng.normal(0, 3, (660, 1000, 3))
    image[draw_fundus().sum(axis=2) == 0] = color  # around the disc
    assert_boxes_agree(find_field_of_view(to_uint8(image)), DISC, 300)
    image += rng.normal(0, 12, image.shape)
    assert find_field_of_view(to_uint8(image)) is None, "what is not flat may be tissue"


@pytest.mark.parametrize("color", [(255, 255, 255), (200, 30, 30), (30, 30, 200)], ids=str)
@pytest.mark.parametrize("width", [3, 12, 60])
def test_a_border_of_any_color_is_taken_off(color, width):
    inner = to_uint8(draw_fundus())
    image = np.empty((660 + 2 * width, 1000 + 2 * width, 3), np.uint8)
    image[:] = color
    image[width:-width, width:-width] = inner
    expected = Box(*(side + width for side in DISC))
    assert_boxes_agree(find_field_of_view(image), expected, 300)


@pytest.mark.parametrize("width, is_found", [(800, True), (660, True), (450, False)])
def test_a_squeezed_disc_is_found(width, is_found):
    """Photographs that were squeezed into a square show ellipses; thin ones are something else."""
    image = Image.fromarray(to_uint8(draw_fundus())).resize((width, 660))
    found = find_field_of_view(np.asarray(image))
    if not is_found:
        assert found is None
        return
    expected = Box(round(0.2 * width), 30, round(0.8 * width), 630)
    assert_boxes_agree(found, expected, 300)


@pytest.mark.parametrize("share", [0.02, 0.06])
def test_speckle_on_the_surround(share):
    rng = np.random.default_rng(0)
    image = to_uint8(draw_fundus() + rng.normal(0, 15, (660, 1000, 3)))
    hit = rng.random((660, 1000)) < share
    image[hit] = rng.integers(0, 256, (hit.sum(), 3))
    assert_boxes_agree(find_field_of_view(image), DISC, 300)


def test_an_equalised_surround():
    """Equalising makes noise of what a JPEG leaves in the black."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(to_uint8(draw_fundus() + rng.normal(1, 1, (660, 1000, 3))))
    assert_boxes_agree(find_field_of_view(np.asarray(ImageOps.equalize(image))), DISC, 300)


def test_a_panel_is_not_taken_for_a_fundus():
    """A flat one is taken off like a border; a second photograph leaves the crop in doubt."""
    image = draw_fundus(1600, 800, (350, 400), 250)
    image[60:740, 800:1440] = 230
    assert_boxes_agree(find_field_of_view(to_uint8(image)), Box(100, 150, 600, 650), 250)
    image += np.random.default_rng(0).normal(0, 10, image.shape)
    assert find_field_of_view(to_uint8(image)) is None


def test_a_fundus_that_fills_the_frame_is_not_searched_for_a_smaller_one():
    rng = np.random.default_rng(0)
    image = draw_fundus(600, 600, (300, 300), 600, 220) + rng.normal(0, 5, (600, 600, 3))
    image += 60 * (draw_fundus(600, 600, (300, 300), 150, 1) > 0)  # a bright disc inside
    assert find_field_of_view(to_uint8(image)) is None


@pytest.mark.parametrize("width, is_found", [(500, False), (600, True)])
def test_most_of_a_disc_is_wanted(width, is_found):
    """A disc of 900 seen through a slit: below 0.6 of its height it is none."""
    image = draw_fundus(1400, 1000, (700, 500), 450, 220)
    image[:, : 700 - width // 2] = 0
    image[:, 700 + width // 2 :] = 0
    found = find_field_of_view(to_uint8(image))
    assert (found is not None) == is_found


@pytest.mark.parametrize("radius, is_found", [(118, False), (148, True)])
def test_a_disc_fills_much_of_the_frame(radius, is_found):
    """Below 0.4 of the frame's height it is something else."""
    image = draw_fundus(1000, 660, (500, 330), radius, 220)
    found = find_field_of_view(to_uint8(image))
    assert (found is not None) == is_found


@pytest.mark.parametrize("shape", [(170, 256), (37, 5), (2, 3), (1, 1)])
def test_median_is_pillows(shape):
    light = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    expected = Image.fromarray(light).filter(ImageFilter.MedianFilter(3))
    assert np.array_equal(field_of_view._median(light), np.asarray(expected))


def test_largest_region_is_the_naive_one():
    """Pixel by pixel from each seed, over edges but not over corners."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = rng.random((12, 17)) < 0.55
        regions = []
        remaining = set(map(tuple, np.argwhere(mask).tolist()))
        while remaining:
            region = set()
            waiting = [remaining.pop()]
            while waiting:
                y, x = waiting.pop()
                region.add((y, x))
                for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                    if near in remaining:
                        remaining.remove(near)
                        waiting.append(near)
            regions.append(region)

        found = set(map(tuple, np.argwhere(field_of_view._largest_region(mask)).tolist()))
        assert found in regions and len(found) == max(map(len, regions))


def test_box_cuts_what_is_in_it():
    image = np.arange(5 * 7).reshape(5, 7)
    box = Box(left=2, top=1, right=6, bottom=4)
    assert (box.width, box.height) == (4, 3)
    assert np.array_equal(box.cut(image), image[1:4, 2:6])
