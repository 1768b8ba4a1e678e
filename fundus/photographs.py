"""Bring one fundus photograph in: decode it safely, find the fundus, crop it to a square, resize.

`load_photograph` does it all and is the only way in for a raw photograph, so that preparing,
training, evaluation and attention maps see the same picture. Needs only numpy and Pillow.
"""

import contextlib
import io
import os
import stat
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter, UnidentifiedImageError

MAX_BYTES = 100_000_000
MAX_SIDE, MAX_PIXELS = 8192, 50_000_000  # of a photograph, for the memory that it takes
MIN_SIDE = 64  # of a raw photograph; below it there is no fundus to grade
FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP")  # and no others: EPS would run a program
MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"II*\0", b"MM\0*", b"RIFF", b"BM")
JPEG, END_OF_JPEG = b"\xff\xd8\xff", b"\xff\xd9"

T = Image.Transpose
TURNS = (T.FLIP_LEFT_RIGHT, T.ROTATE_180, T.FLIP_TOP_BOTTOM, T.TRANSPOSE)
TURNS = dict(
    enumerate((*TURNS, T.ROTATE_270, T.TRANSVERSE, T.ROTATE_90), 2)
)  # EXIF: what undoes it


class PhotographError(ValueError):
    """A photograph that cannot be used: the reason, without the file's name."""


class Box(NamedTuple):
    """Half-open pixel rectangle within an image."""

    left: int
    top: int
    right: int
    bottom: int


class Photograph(NamedTuple):
    """A photograph brought in, with what was found on the way."""

    picture: np.ndarray  # uint8 (size, size, 3); with keep_aspect the longer side is size
    box: Box  # of the fundus, in pixels of the source
    doubtful: bool  # no fundus was found, the box is the whole image
    width: int  # of the source, upright
    height: int


def open_photograph(
    path, *, min_side: int | None = None, allow_truncated: bool = False
) -> np.ndarray:
    """Decode a photograph to uint8 RGB (H, W, 3), upright; PhotographError says why it cannot be.

    16 bits are scaled to 8, transparency is laid on black, every other mode is converted. With
    `min_side` a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size while its shorter side keeps
    `min_side` pixels. `allow_truncated` takes what there is of a cut-off JPEG; the rest is grey.
    """
    return _decode(path, min_side, allow_truncated)[0]


def find_fundus(image: np.ndarray) -> Box:
    """The bounding box of the fundus in an RGB image, uint8 (H, W, 3).

    The fundus is the largest disc, perhaps cut off, that is brighter than its surround. Where there
    is none the box is the whole image: a loose crop loses resolution, a wrong one loses lesions.
    """
    return _fundus_box(image) or Box(0, 0, image.shape[1], image.shape[0])


def pad_square(image: np.ndarray) -> np.ndarray:
    """Pad uint8 (H, W[, 3]) with black to a square, the image in its middle."""
    height, width = image.shape[:2]
    if height == width:
        return image
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    square = np.zeros((side, side, *image.shape[2:]), dtype=image.dtype)
    square[top : top + height, left : left + width] = image
    return square


def crop_square(
    image: np.ndarray, box: Box, size: int, resample: int = Image.Resampling.LANCZOS
) -> np.ndarray:
    """Crop `box`, pad it with black to a square with the fundus in its middle, resize to `size`.

    Takes uint8 (H, W[, 3]), gives uint8 (size, size[, 3]). LANCZOS is antialiased and keeps
    microaneurysms; masks want `Image.Resampling.NEAREST` or `BOX`.
    """
    square = pad_square(image[box.top : box.bottom, box.left : box.right])
    return np.array(Image.fromarray(square).resize((size, size), resample))


def crop_aspect(image: np.ndarray, box: Box, size: int) -> np.ndarray:
    """Crop `box` and resize its longer side to `size`; the other one follows."""
    crop = Image.fromarray(image[box.top : box.bottom, box.left : box.right])
    sides = (max(1, round(side * size / max(crop.size))) for side in crop.size)
    return np.array(crop.resize(tuple(sides), Image.Resampling.LANCZOS))


def subtract_local_mean(picture: np.ndarray) -> np.ndarray:
    """Return 4 (picture - its local mean) + 128 within the fundus, 128 outside; uint8, same shape.

    It takes illumination and pigmentation away and brings lesions and vessels out. The mean is
    Gaussian with sigma of a 30th of the fundus' radius, over the fundus alone, so that its rim is
    no edge. After B. Graham, winner of Kaggle's competition on EyePACS, 2015.
    """
    inside = (picture.max(axis=2, keepdims=True) > 12).astype(np.float32)
    sigma = max(picture.shape) / 2 / 30
    reach = np.arange(-round(3 * sigma), round(3 * sigma) + 1)
    kernel = np.exp(-(reach**2) / (2 * sigma**2), dtype=np.float32)
    values = np.concatenate([picture * inside, inside], axis=2)
    for axis in (0, 1):
        pad = [(len(reach) // 2,) * 2 if a == axis else (0, 0) for a in range(3)]
        padded, values = np.pad(values, pad), np.zeros_like(values)
        for start, weight in enumerate(kernel):
            values += weight * padded.take(range(start, start + values.shape[axis]), axis)
    mean = values[..., :3] / np.maximum(values[..., 3:], 1e-6)
    return np.clip(4 * (picture - mean) * inside + 128.5, 0, 255).astype(np.uint8)


def read_photograph(
    path,
    size: int = 512,
    allow_truncated: bool = False,
    keep_aspect: bool = False,
    exact: bool = True,
) -> Photograph:
    """As `load_photograph`, with the fundus's box and the source's width and height.

    `keep_aspect` leaves the padding to a square to the reader. Not `exact`, the fundus stays as
    large as it was decoded: at least `size`, unless the source is smaller, for who resizes it.
    """
    # JPEG's own scaling saves time. It is fine as long as the fundus still has to be made smaller.
    for min_side in (size, 2 * size, None):
        image, width, height = _decode(path, min_side, allow_truncated)
        if min(width, height) < MIN_SIDE:
            raise PhotographError(f"is only {width} x {height} pixels; each side needs {MIN_SIDE}")
        found = _fundus_box(image)
        box = found or Box(0, 0, image.shape[1], image.shape[0])
        if image.shape[1] == width or max(box.right - box.left, box.bottom - box.top) >= size:
            break
    if exact:
        picture = (crop_aspect if keep_aspect else crop_square)(image, box, size)
    else:
        picture = pad_square(image[box.top : box.bottom, box.left : box.right])
    x, y = width / image.shape[1], height / image.shape[0]
    box = Box(*(round(at * scale) for at, scale in zip(box, (x, y, x, y), strict=True)))
    return Photograph(picture, box, found is None, width, height)


def load_photograph(
    path, size: int = 512, allow_truncated: bool = False, *, exact: bool = True
) -> np.ndarray:
    """Decode, crop to the fundus, pad to a square, resize: uint8 RGB (size, size, 3).

    Every raw photograph comes in through here. Not `exact`, the side is what decoding gave, at
    least `size` where the source has it. Raises PhotographError with the reason.
    """
    return read_photograph(path, size, allow_truncated, exact=exact).picture


def _decode(path, min_side: int | None, allow_truncated: bool) -> tuple[np.ndarray, int, int]:
    """Pixels (H, W, 3) uint8, perhaps scaled down, and the full width and height, all upright."""
    data = _read_bytes(path)
    if allow_truncated and data.startswith(JPEG):
        data += END_OF_JPEG  # the decoder then fills what is missing and does not complain
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # broken metadata, large sizes: not worth a line each
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
                    raise Image.DecompressionBombError
                if min_side is not None:
                    image.draft(None, (min_side, min_side))
                scaled = image.size != (width, height)
                image.load()
                orientation = None
                with contextlib.suppress(Exception):  # bad metadata must not cost the photograph
                    orientation = image.getexif().get(0x0112)  # TIFF's reader has obeyed it by now
                image = _to_rgb(image)
    except Exception as error:  # damaged bytes make decoders raise almost anything
        raise PhotographError(_reason(error, data)) from None
    if orientation in TURNS:
        image = image.transpose(TURNS[orientation])
    if not scaled:
        width, height = image.size
    elif orientation in (5, 6, 7, 8):  # the photograph lay on its side
        width, height = height, width
    pixels = np.array(image)
    # What a JPEG lacks at its end is decoded as even grey; a picture on grey has it above, too.
    lacks_end = (pixels[-1] == 128).all() and (pixels[0] != 128).any()
    if lacks_end and data.startswith(JPEG) and not allow_truncated:
        raise PhotographError(_reason(ValueError("its end is missing"), data))
    return pixels, width, height


def _read_bytes(path) -> bytes:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
            raise PhotographError("is no file")
        with open(path, "rb") as file:
            data = file.read() if os.fstat(file.fileno()).st_size <= MAX_BYTES else None
    except OSError as error:
        raise PhotographError(f"cannot be read ({error.strerror or error})") from None
    if not data:
        raise PhotographError(f"has over {MAX_BYTES // 10**6} MB" if data is None else "is empty")
    return data


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode[0] in "IF":  # 16 bits, or 32 that hold 16; convert() would clip them
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise PhotographError("has 32-bit pixels of unknown range; save it with 8 bits")
        image = Image.fromarray(((values.astype(np.int32) + 128) // 257).astype(np.uint8))
    elif image.has_transparency_data:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _reason(error: Exception, data: bytes) -> str:
    """Why these bytes were refused, in the reader's terms."""
    if isinstance(error, PhotographError):
        return str(error)
    if isinstance(error, Image.DecompressionBombError):
        return f"has over {MAX_PIXELS // 10**6} million pixels, or over {MAX_SIDE} on a side"
    if not isinstance(error, UnidentifiedImageError) or data.startswith(MAGIC):
        reason = "header" if isinstance(error, UnidentifiedImageError) else str(error) or "no data"
        return f"is damaged or cut off ({reason}): copy or download it again"
    page = data[:200].lstrip().startswith((b"<", b"{"))
    return "is a web page, not a photograph" if page else f"is none of {', '.join(FORMATS)}"


def _fundus_box(image: np.ndarray) -> Box | None:
    """As find_fundus, None if in doubt."""
    factor = max(1, max(image.shape) // 256)
    red, green, blue = np.moveaxis(np.asarray(Image.fromarray(image).reduce(factor)), 2, 0)
    light = _median(np.maximum(np.maximum(red, green), blue))
    h, w = (max(1, side // 16) for side in light.shape)
    corners = [light[:h, :w], light[:h, -w:], light[-h:, :w], light[-h:, -w:]]
    # The darkest two: a stamp, a label or a light leak may sit in the others.
    dark = np.sort([np.median(corner) for corner in corners])[:2].mean()
    if dark > 64:  # photographs lie on black; on grey the rim is not where the brightness ends
        return None
    bright = light[light > dark + 10]
    if bright.size < 0.05 * light.size:
        return None
    contrast = np.median(bright) - dark
    # Scattered light around the disc wants a high level, a fundus half in shadow a low one.
    for level in (max(5, 0.12 * contrast), max(4, 0.06 * contrast), 3):
        left, top, right, bottom = _disc(light > dark + level)
        sides = right - left, bottom - top
        if min(sides) >= max(0.4 * min(light.shape), 0.6 * max(sides)):
            end = min(right * factor, image.shape[1]), min(bottom * factor, image.shape[0])
            return Box(left * factor, top * factor, *end)
    return None


def _median(light: np.ndarray) -> np.ndarray:
    """The median of 3 x 3 pixels, (h, w) with edges repeated: Pillow's, at a tenth of its time.

    Of three sorted triples it is the median of the largest low, the median middle, the least high.
    """
    rows = np.pad(light, 1, "edge")
    triples = _sort(rows[:-2], rows[1:-1], rows[2:])
    low, middle, high = (_sort(x[:, :-2], x[:, 1:-1], x[:, 2:]) for x in triples)
    return _sort(low[2], middle[1], high[0])[1]


def _sort(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, ...]:
    """Three arrays, sorted element by element."""
    low, high = np.minimum(a, b), np.maximum(a, b)
    return np.minimum(low, c), np.maximum(low, np.minimum(high, c)), np.maximum(high, c)


def _disc(mask: np.ndarray) -> Box:
    """The box of the largest region of a bool mask (h, w) if it is a disc, perhaps cut off."""
    # Opening takes away letters and bridges to stamps: all of 7 x 7, then any of 7 x 7.
    window = ImageFilter.BoxBlur(3)
    inner = np.asarray(Image.fromarray(mask).convert("L").filter(window)) == 255
    mask = _largest_region(np.asarray(Image.fromarray(inner).convert("L").filter(window)) > 0)
    (top, bottom), (left, right) = _extent(mask.sum(axis=1)), _extent(mask.sum(axis=0))
    y, x = (np.arange(n) - (n - 1) / 2 for n in (bottom - top, right - left))
    disc = x**2 + y[:, None] ** 2 <= max(len(x), len(y)) ** 2 / 4
    mask = (_hull(mask) & _hull(mask.T).T)[top:bottom, left:right]  # shadows inside do not count
    # A panel or a label fills the corners of its box as well.
    corners = mask[~disc].sum() / max(1, (~disc).sum())
    is_disc = disc.any() and mask[disc].mean() > 0.95 and corners < 0.7
    return Box(left, top, right, bottom) if is_disc else Box(0, 0, 0, 0)


def _largest_region(mask: np.ndarray) -> np.ndarray:
    """The largest 4-connected region of a bool mask (h, w)."""
    best, left = np.zeros_like(mask), mask
    while left.sum() > best.sum():
        region, size = np.zeros_like(mask), 0
        row = left.sum(axis=1).argmax()  # from a long line it takes few rounds
        region[row, left[row].argmax()] = True
        while size < (size := int(region.sum())):
            region = _fill_runs(_fill_runs(region, left).T, left.T).T
        left = left & ~region
        best = max(best, region, key=np.sum)
    return best


def _fill_runs(seeds: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """All horizontal runs of `mask` that hold a seed."""
    gaps = np.pad(~mask, ((0, 0), (0, 1)), constant_values=True)  # one after each line
    run = np.cumsum(gaps, dtype=np.int32).reshape(gaps.shape)[:, :-1]  # gaps before it number it
    hit = np.zeros(run.max() + 1, dtype=bool)
    hit[run[seeds]] = True
    return hit[run] & mask


def _hull(mask: np.ndarray) -> np.ndarray:
    """Each line of `mask` filled from its first to its last pixel."""
    either = np.logical_or.accumulate
    return either(mask, axis=1) & either(mask[:, ::-1], axis=1)[:, ::-1]


def _extent(counts: np.ndarray) -> tuple[int, int]:
    """First and last + 1 line of a region, given its pixels per line; thin ends do not count."""
    # A chord of 0.15 diameters lies 0.6 % inside the rim; the notch of a camera is shorter.
    lines = np.flatnonzero(counts > 0.15 * counts.max()).tolist()
    return (lines[0], lines[-1] + 1) if lines else (0, 0)
