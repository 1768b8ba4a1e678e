"""Find the field of view: the bright disc that the fundus makes on a photograph's black surround.

Shapes: H and W are the height and width of an image, h and w those of the small copy on which the
disc is searched.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

# Longer side of the copy on which the disc is searched, in pixels: at least this, below twice it.
# The window of `_disc` is meant for such a copy.
SEARCH_SIDE = 256

# What may be a fundus on its surround, in grey levels (0 to 255) and in shares of the image.
BRIGHTEST_SURROUND = 64  # on grey the rim is not where the brightness ends
LEAST_CONTRAST = 10
LEAST_BRIGHT_SHARE = 0.05
LEAST_FRAME_SHARE = 0.4  # of the frame's shorter side, by the disc's shorter side
LEAST_ASPECT = 0.6  # shorter over longer side of a disc that is cut off, or was squeezed

# What a program filled around the fundus is flat, unlike a fundus that fills the frame.
FLAT = 1.5  # largest deviation of its grey levels, which JPEG makes


class Box(NamedTuple):
    """Half-open rectangle within an image, in pixels."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        """Columns of pixels in the box."""
        return self.right - self.left

    @property
    def height(self) -> int:
        """Rows of pixels in the box."""
        return self.bottom - self.top

    def cut(self, image: np.ndarray) -> np.ndarray:
        """Return the part of an image (H, W[, channels]) that is in the box."""
        return image[self.top : self.bottom, self.left : self.right]


def find_field_of_view(image: np.ndarray) -> Box | None:
    """Return the box of the bright disc in an RGB image, uint8 (H, W, 3); None if in doubt.

    The frame may cut the disc off. Stamps, labels, light leaks and shadows are expected, and what
    other programs do: a surround or a border of another colour, a disc that was squeezed.
    """
    factor = max(1, max(image.shape) // SEARCH_SIDE)
    small = np.asarray(Image.fromarray(image).reduce(factor))  # (h, w, 3)

    # Fundi differ in colour, so the brightest channel counts. The median takes hot pixels away.
    disc = _find_bright(_median(small.max(axis=2)))
    if disc is None:
        disc = _find_on_color(small)
    if disc is None:
        return None
    return Box(
        left=disc.left * factor,
        top=disc.top * factor,
        right=min(disc.right * factor, image.shape[1]),
        bottom=min(disc.bottom * factor, image.shape[0]),
    )


def _find_bright(light: np.ndarray) -> Box | None:
    """Return the box of the disc that is brighter than its surround in an image (h, w)."""
    surround = _surround(light)
    if surround > BRIGHTEST_SURROUND:
        return None
    bright = light[light > surround + LEAST_CONTRAST]
    if bright.size < LEAST_BRIGHT_SHARE * light.size:
        return None

    # The rim lies where the brightness falls below a level. Light that scatters around the disc
    # wants a high level, a fundus half in shadow a low one: the highest that gives a disc is taken.
    contrast = np.median(bright) - surround
    for level in (max(5, 0.12 * contrast), max(4, 0.06 * contrast), 3):
        disc = _disc(light > surround + level)
        if disc is None:
            continue
        shorter = min(disc.width, disc.height)
        longer = max(disc.width, disc.height)
        if shorter >= LEAST_FRAME_SHARE * min(light.shape) and shorter >= LEAST_ASPECT * longer:
            return disc
    return None


def _find_on_color(small: np.ndarray) -> Box | None:
    """Return the box of the disc within a flat border, or on a flat surround of any colour.

    `small` is uint8 RGB (h, w, 3). What is flat was filled by a program: no tissue is.
    """
    inner = _within_border(small)
    part = inner.cut(small)
    if min(part.shape[:2]) < LEAST_FRAME_SHARE * min(small.shape[:2]):
        return None
    color = _flat_surround(part)
    if color is None:
        return None
    distance = np.abs(part.astype(np.int16) - color).max(axis=2)
    disc = _find_bright(_median(distance.astype(np.uint8)))
    if disc is None:
        return None
    return Box(
        left=disc.left + inner.left,
        top=disc.top + inner.top,
        right=disc.right + inner.left,
        bottom=disc.bottom + inner.top,
    )


def _within_border(small: np.ndarray) -> Box:
    """Return the box of an RGB image (h, w, 3) without the lines at its edges that are flat."""
    top, bottom = _without_flat_ends(small)
    if top == bottom:
        return Box(0, 0, 0, 0)
    left, right = _without_flat_ends(small[top:bottom].swapaxes(0, 1))
    return Box(left, top, right, bottom)


def _without_flat_ends(lines: np.ndarray) -> tuple[int, int]:
    """Return the first and the last + 1 of the lines (n, m, 3) that is not flat."""
    is_flat = lines.std(axis=1).max(axis=1) <= FLAT
    textured = np.flatnonzero(~is_flat)
    if textured.size == 0:
        return 0, 0
    # Where a border ends, the line between it and the picture is a mixture of both.
    first = textured[0] + (textured[0] > 0)
    last = textured[-1] - (textured[-1] < len(lines) - 1)
    return int(first), max(int(first), int(last) + 1)


def _flat_surround(small: np.ndarray) -> np.ndarray | None:
    """Return the colour (3,) of the four corners of an RGB image if they are one and flat."""
    side = max(2, min(small.shape[:2]) // 32)
    corners = []
    for rows in (slice(None, side), slice(-side, None)):
        for columns in (slice(None, side), slice(-side, None)):
            corner = small[rows, columns].reshape(-1, 3)
            if corner.std(axis=0).max() > FLAT:
                return None
            corners.append(np.median(corner, axis=0))
    if np.ptp(corners, axis=0).max() > 4 * FLAT:
        return None
    return np.median(corners, axis=0).astype(np.int16)


def _surround(light: np.ndarray) -> np.floating:
    """Return the brightness around the fundus, from the corners of the image (h, w)."""
    height = max(1, light.shape[0] // 16)
    width = max(1, light.shape[1] // 16)
    corners = (
        np.median(light[:height, :width]),
        np.median(light[:height, -width:]),
        np.median(light[-height:, :width]),
        np.median(light[-height:, -width:]),
    )
    # The darkest two: a stamp, a label or a light leak may sit in the others.
    return np.mean(sorted(corners)[:2])


def _median(light: np.ndarray) -> np.ndarray:
    """Return the median of 3 x 3 pixels, edges repeated: (h, w). Pillow's takes ten times as long.

    With each column of three sorted, the median of all nine is the median of three values: the
    largest low, the median of the middles, the least high.
    """
    padded = np.pad(light, 1, "edge")
    lows, middles, highs = _sort(padded[:-2], padded[1:-1], padded[2:])  # (h, w + 2)

    largest_low = np.maximum(np.maximum(lows[:, :-2], lows[:, 1:-1]), lows[:, 2:])
    median_middle = _sort(middles[:, :-2], middles[:, 1:-1], middles[:, 2:])[1]
    least_high = np.minimum(np.minimum(highs[:, :-2], highs[:, 1:-1]), highs[:, 2:])
    return _sort(largest_low, median_middle, least_high)[1]


def _sort(
    first: np.ndarray, second: np.ndarray, third: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the lowest, the middle and the highest of three arrays, element by element."""
    lower = np.minimum(first, second)
    higher = np.maximum(first, second)
    middle = np.maximum(lower, np.minimum(higher, third))
    return np.minimum(lower, third), middle, np.maximum(higher, third)


def _disc(mask: np.ndarray) -> Box | None:
    """Return the box of a bool mask's (h, w) largest region if that is a disc, perhaps cut off."""
    # Letters and bridges to stamps are thinner than 7 pixels. They go where a pixel is kept only
    # if all of 7 x 7 are set; then all of 7 x 7 about the kept ones are set again ("opening").
    eroded = _mean_of_window(mask) == 255
    opened = _mean_of_window(eroded) > 0
    region = _largest_region(opened)

    top, bottom = _extent(region.sum(axis=1))
    left, right = _extent(region.sum(axis=0))
    box = Box(left, top, right, bottom)
    if box.width == 0 or box.height == 0:
        return None

    # Shadows inside a fundus do not count against it.
    filled = box.cut(_fill_lines(region) & _fill_lines(region.T).T)

    # Compare it with the disc in the middle of the box that is as wide as the box's longer side.
    # A fundus fills that disc; a panel or a label does so, too, and the corners around it as well.
    y = (np.arange(box.height) - (box.height - 1) / 2)[:, None]
    x = np.arange(box.width) - (box.width - 1) / 2
    longer = max(box.width, box.height)
    if _fills(filled, x**2 + y**2 <= longer**2 / 4, most_outside=0.7):
        return box
    # Photographs that were squeezed into a square have ellipses, all of which is in the frame.
    ellipse = (x / box.width) ** 2 + (y / box.height) ** 2 <= 1 / 4
    if _fills(filled, ellipse, most_outside=0.3):
        return box
    return None


def _fills(region: np.ndarray, shape: np.ndarray, most_outside: float) -> bool:
    """Return whether a region (h, w) fills a shape, and no more than a share of what is outside."""
    outside = region[~shape].sum() / max(1, (~shape).sum())
    return bool(region[shape].mean() > 0.95 and outside < most_outside)


def _mean_of_window(mask: np.ndarray) -> np.ndarray:
    """Return the mean of 7 x 7 pixels of a bool mask (h, w), uint8 with 255 for True."""
    image = Image.fromarray(mask).convert("L")
    return np.asarray(image.filter(ImageFilter.BoxBlur(3)))


def _largest_region(mask: np.ndarray) -> np.ndarray:
    """Return the largest 4-connected region of a bool mask (h, w)."""
    largest = np.zeros_like(mask)
    remaining = mask
    while np.count_nonzero(remaining) > np.count_nonzero(largest):
        # Start from a pixel of the fullest line, from which a disc is filled in few rounds.
        row = np.count_nonzero(remaining, axis=1).argmax()
        region = np.zeros_like(mask)
        region[row, remaining[row].argmax()] = True

        # Spread along rows, then along columns, until nothing is added.
        size = 0
        while np.count_nonzero(region) > size:
            size = np.count_nonzero(region)
            region = _fill_runs(region, remaining)
            region = _fill_runs(region.T, remaining.T).T

        remaining = remaining & ~region
        if np.count_nonzero(region) > np.count_nonzero(largest):
            largest = region
    return largest


def _fill_runs(seeds: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return all horizontal runs of a bool mask (h, w) that hold a seed."""
    # The number of gaps before a pixel is the same within a run and differs between runs. A gap is
    # added behind each line, so that no run goes on in the next one.
    gaps = np.pad(~mask, ((0, 0), (0, 1)), constant_values=True)
    run_numbers = np.cumsum(gaps, dtype=np.int32).reshape(gaps.shape)[:, :-1]  # (h, w)

    has_seed = np.zeros(run_numbers.max() + 1, dtype=bool)
    has_seed[run_numbers[seeds]] = True
    return has_seed[run_numbers] & mask


def _fill_lines(mask: np.ndarray) -> np.ndarray:
    """Return each line of a bool mask (h, w) filled from its first to its last pixel."""
    from_first = np.logical_or.accumulate(mask, axis=1)
    to_last = np.logical_or.accumulate(mask[:, ::-1], axis=1)[:, ::-1]
    return from_first & to_last


def _extent(counts: np.ndarray) -> tuple[int, int]:
    """Return the first and the last + 1 line of a region, given its pixels per line.

    Thin ends do not count, such as the notch beyond the rim by which cameras mark what is up. A
    chord of 0.15 diameters lies 0.6 % of the diameter inside the rim of a disc: little is lost.
    """
    lines = np.flatnonzero(counts > 0.15 * counts.max())
    if lines.size == 0:
        return 0, 0
    return int(lines[0]), int(lines[-1]) + 1
