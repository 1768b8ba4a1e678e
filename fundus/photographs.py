"""Bring one fundus photograph in: decode it safely, find the fundus, crop it to a square, resize.

`load_photograph` does all of it and is the only way in for a raw photograph, so that preparing,
training, evaluation and attention maps see the same picture. Only numpy and Pillow are needed.

Shapes: H and W are the height and width of an image.
"""

import contextlib
import io
import os
import stat
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from fundus.field_of_view import Box, find_field_of_view

FilePath = str | os.PathLike[str]

# Limits for the memory that a photograph takes: of its file, and of what is decoded from it.
MAX_BYTES = 100_000_000
MAX_SIDE = 8192
MAX_PIXELS = 50_000_000

# Shortest side of a raw photograph; below it there is no fundus to grade.
MIN_SIDE = 64

# No others, because Pillow would start a program (Ghostscript) to read EPS.
FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP")

# How files of these formats begin, TIFF's in either byte order.
JPEG_START = b"\xff\xd8\xff"
FILE_STARTS = (JPEG_START, b"\x89PNG", b"II*\0", b"MM\0*", b"RIFF", b"BM")
JPEG_END = b"\xff\xd9"

# EXIF's tag for how the camera was held, and what undoes each of its values; 1 is upright.
ORIENTATION_TAG = 0x0112
UPRIGHT_BY = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)  # those that swap width and height


class PhotographError(ValueError):
    """A photograph that cannot be used: the reason, without the file's name."""


class Photograph(NamedTuple):
    """A photograph brought in, with what was found on the way."""

    picture: np.ndarray  # uint8 (size, size, 3); with keep_aspect the longer side is size
    box: Box  # of the fundus, in pixels of the source
    doubtful: bool  # no fundus was found, the box is the whole image
    width: int  # of the source, upright
    height: int
    factor: int  # it was decoded at 1 / factor of its size: 1, 2, 4 or 8
    decoded_box: Box  # of the fundus, in pixels of what was decoded


def load_photograph(
    path: FilePath, size: int = 512, *, allow_truncated: bool = False, exact: bool = True
) -> np.ndarray:
    """Return a photograph cropped to the fundus and padded to a square: uint8 RGB (size, size, 3).

    Every raw photograph comes in through here. Where it need not be `exact`, the side is what
    decoding gave, at least `size` where the source has it. Raises PhotographError with the reason.
    """
    photograph = read_photograph(path, size, allow_truncated=allow_truncated, exact=exact)
    return photograph.picture


def read_photograph(
    path: FilePath,
    size: int = 512,
    *,
    allow_truncated: bool = False,
    keep_aspect: bool = False,
    exact: bool = True,
) -> Photograph:
    """Return what `load_photograph` does, with the fundus' box and the source's width and height.

    `keep_aspect` leaves the padding to a square to the reader. Where it need not be `exact`, the
    fundus stays as large as it was decoded, padded to a square, for a reader who resizes it: at
    least `size`, unless the source is smaller. Raises PhotographError with the reason.
    """
    # A JPEG takes less time when it is decoded at a fraction of its size. The fundus must not come
    # out smaller than `size`, and how large it is shows only after decoding.
    for min_side in (size, 2 * size, None):
        image, (width, height) = _decode(path, min_side, allow_truncated=allow_truncated)
        if min(width, height) < MIN_SIDE:
            raise PhotographError(f"is only {width} x {height} pixels; each side needs {MIN_SIDE}")
        field = find_field_of_view(image)
        box = field or _whole(image)
        has_all_pixels = image.shape[1] == width
        if has_all_pixels or max(box.width, box.height) >= size:
            break

    if not exact:
        picture = pad_square(box.cut(image))
    elif keep_aspect:
        picture = crop_aspect(image, box, size)
    else:
        picture = crop_square(image, box, size)

    x_scale = width / image.shape[1]
    y_scale = height / image.shape[0]
    source_box = Box(
        left=round(box.left * x_scale),
        top=round(box.top * y_scale),
        right=round(box.right * x_scale),
        bottom=round(box.bottom * y_scale),
    )
    factor = round(max(x_scale, y_scale))
    return Photograph(picture, source_box, field is None, width, height, factor, box)


def open_photograph(
    path: FilePath, *, min_side: int | None = None, allow_truncated: bool = False
) -> np.ndarray:
    """Decode a photograph and return it upright, as uint8 RGB (H, W, 3).

    16 bits are scaled to 8, transparency is laid on black, every other mode is converted. With
    `min_side` a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as its shorter side
    keeps `min_side` pixels. `allow_truncated` takes what there is of a cut-off JPEG; the rest is
    grey. Raises PhotographError with the reason.
    """
    return _decode(path, min_side, allow_truncated=allow_truncated)[0]


def find_fundus(image: np.ndarray) -> Box:
    """Return the bounding box of the fundus in an RGB image, uint8 (H, W, 3).

    The fundus is the largest disc, perhaps cut off, that is brighter than its surround. Where there
    is none the box is the whole image: a loose crop loses resolution, a wrong one loses lesions.
    """
    return find_field_of_view(image) or _whole(image)


def pad_square(image: np.ndarray) -> np.ndarray:
    """Return uint8 (H, W[, 3]) padded with black to a square, the image in its middle."""
    height, width = image.shape[:2]
    if height == width:
        return image

    side = max(height, width)
    top = (side - height) // 2
    left = (side - width) // 2
    square = np.zeros((side, side, *image.shape[2:]), dtype=image.dtype)
    square[top : top + height, left : left + width] = image
    return square


def crop_square(
    image: np.ndarray, box: Box, size: int, resample: Image.Resampling = Image.Resampling.LANCZOS
) -> np.ndarray:
    """Return the box, padded with black to a square and resized: uint8 (size, size[, 3]).

    The fundus is in the middle of the square. `image` is uint8 (H, W[, 3]). LANCZOS is antialiased
    and keeps microaneurysms; masks want `Image.Resampling.NEAREST` or `BOX`.
    """
    square = Image.fromarray(pad_square(box.cut(image)))
    return np.array(square.resize((size, size), resample))


def crop_mask(mask: np.ndarray, photograph: Photograph, size: int) -> np.ndarray:
    """Return the share of each pixel of a photograph's picture that a mask of it covers.

    `mask` is bool (height, width) as the source, the result float32 (size, size). It goes the very
    way of the photograph, step by step: a box in the source's pixels could be off by half of a
    decoded pixel, which may be a whole one of the picture.
    """
    white = Image.fromarray(mask.astype(np.uint8) * 255)
    # Decoders round up where the factor does not divide the size, as this does.
    decoded = np.asarray(white.reduce(photograph.factor))
    # Pillow's BOX takes whole pixels, which moves small lesions by a third of one; of a quarter of
    # a pixel that is little. Smoother filters would spread them instead.
    fine = crop_square(decoded, photograph.decoded_box, 4 * size, Image.Resampling.BOX)
    share = np.asarray(Image.fromarray(fine).reduce(4))
    return share.astype(np.float32) / 255


def crop_aspect(image: np.ndarray, box: Box, size: int) -> np.ndarray:
    """Return the box with its longer side resized to `size` pixels; the other one follows."""
    crop = Image.fromarray(box.cut(image))
    longer = max(crop.size)
    width = max(1, round(crop.width * size / longer))
    height = max(1, round(crop.height * size / longer))
    return np.array(crop.resize((width, height), Image.Resampling.LANCZOS))


def subtract_local_mean(picture: np.ndarray) -> np.ndarray:
    """Return 4 (picture - its local mean) + 128 within the fundus, 128 outside; uint8, same shape.

    `picture` is uint8 RGB (H, W, 3), cropped to the fundus. What is lost is illumination and
    pigmentation; lesions and vessels stand out. The mean is Gaussian with sigma of a 30th of the
    fundus' radius. After B. Graham, winner of Kaggle's competition on EyePACS, 2015.
    """
    # JPEG leaves some noise in the black surround.
    inside = (picture.max(axis=2, keepdims=True) > 12).astype(np.float32)  # (H, W, 1)

    sigma = max(picture.shape) / 2 / 30
    reach = round(3 * sigma)  # beyond three sigmas a Gaussian has 0.3 % of its weight
    offsets = np.arange(-reach, reach + 1)
    kernel = np.exp(-(offsets**2) / (2 * sigma**2), dtype=np.float32)

    # The last plane is blurred as well and counts the weight that fell on the fundus. Divided by
    # it, the mean is that of the fundus alone, and the rim is no edge.
    planes = np.concatenate([picture * inside, inside], axis=2)  # (H, W, 4)
    for axis in (0, 1):
        padding = [(0, 0), (0, 0), (0, 0)]
        padding[axis] = (reach, reach)
        padded = np.pad(planes, padding)
        planes = np.zeros_like(planes)
        for start, weight in enumerate(kernel):
            planes += weight * padded.take(range(start, start + planes.shape[axis]), axis)
    mean = planes[..., :3] / np.maximum(planes[..., 3:], 1e-6)

    # The half is there because the conversion to whole numbers rounds down.
    return np.clip(4 * (picture - mean) * inside + 128.5, 0, 255).astype(np.uint8)


def _whole(image: np.ndarray) -> Box:
    """Return the box that holds all of an image."""
    return Box(left=0, top=0, right=image.shape[1], bottom=image.shape[0])


# ------------------------------------------------------------------------------------------- decode


def _decode(
    path: FilePath, min_side: int | None, *, allow_truncated: bool
) -> tuple[np.ndarray, tuple[int, int]]:
    """Return what `open_photograph` does, and the full width and height of the photograph."""
    data = _read_bytes(path)
    is_jpeg = data.startswith(JPEG_START)
    if is_jpeg and allow_truncated:
        # The decoder finds an end, fills what is missing before it and does not complain.
        data += JPEG_END

    try:
        with warnings.catch_warnings():
            # Pillow warns of broken metadata and of large sizes; neither is worth a line each.
            warnings.simplefilter("ignore")
            image, full_size = _decode_bytes(data, min_side)
    except Exception as error:  # damaged bytes make decoders raise almost anything
        raise PhotographError(_reason(error, data)) from None

    # Some cut-off files decode without complaint. What a JPEG lacks at its end comes out as even
    # grey (128); a photograph that lies on such a grey has it at its top, too.
    pixels = np.array(image)
    lacks_end = (pixels[-1] == 128).all() and (pixels[0] != 128).any()
    if is_jpeg and lacks_end and not allow_truncated:
        raise PhotographError(_damaged("its end is missing"))
    return pixels, full_size


def _read_bytes(path: FilePath) -> bytes:
    """Return the bytes of a file; PhotographError if it is none, empty or too large."""
    try:
        # Opening a pipe would wait for somebody to write into it.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise PhotographError("is no file")
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size > MAX_BYTES:
                raise PhotographError(f"has over {MAX_BYTES // 10**6} MB")
            data = file.read()
    except OSError as error:
        raise PhotographError(f"cannot be read ({error.strerror or error})") from None

    if not data:
        raise PhotographError("is empty")
    return data


def _decode_bytes(data: bytes, min_side: int | None) -> tuple[Image.Image, tuple[int, int]]:
    """Return an RGB image, perhaps scaled down, and its full width and height, all upright."""
    orientation = None
    with Image.open(io.BytesIO(data), formats=FORMATS) as file:
        # So far only the header was read: a small file can hold an image that fills the memory.
        if file.width * file.height > MAX_PIXELS or max(file.size) > MAX_SIDE:
            raise Image.DecompressionBombError

        stored_size = file.size
        if min_side is not None:
            file.draft(None, (min_side, min_side))
        is_scaled = file.size != stored_size
        file.load()

        # Bad metadata must not cost the photograph. TIFF's reader has turned the image already,
        # and has taken the tag away.
        with contextlib.suppress(Exception):
            orientation = file.getexif().get(ORIENTATION_TAG)
        image = _to_rgb(file)

    if orientation in UPRIGHT_BY:
        image = image.transpose(UPRIGHT_BY[orientation])
    if not is_scaled:
        return image, image.size
    if orientation in SIDEWAYS:
        return image, stored_size[::-1]
    return image, stored_size


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return an image of any mode as RGB, 16 bits scaled to 8 and transparency laid on black."""
    if image.mode.startswith(("I", "F")):
        # These are 16 bits, or 32 bits that hold 16. Pillow's convert() would clip them at 255.
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise PhotographError("has 32-bit pixels of unknown range; save it with 8 bits")
        rounded = (values.astype(np.int32) + 128) // 257  # 65535 = 257 x 255
        image = Image.fromarray(rounded.astype(np.uint8))
    elif image.has_transparency_data:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image.convert("RGBA"))

    if image.mode == "RGB":
        return image
    return image.convert("RGB")


def _reason(error: Exception, data: bytes) -> str:
    """Return why these bytes were refused, in the reader's terms."""
    if isinstance(error, PhotographError):
        return str(error)
    if isinstance(error, Image.DecompressionBombError):
        return f"has over {MAX_PIXELS // 10**6} million pixels, or over {MAX_SIDE} on a side"
    if not isinstance(error, UnidentifiedImageError):
        return _damaged(str(error) or "no data")
    if data.startswith(FILE_STARTS):
        return _damaged("header")
    if data[:200].lstrip().startswith((b"<", b"{")):
        # A download without a login answers with HTML or JSON under the photograph's name.
        return "is a web page, not a photograph"
    return f"is none of {', '.join(FORMATS)}"


def _damaged(detail: str) -> str:
    """Return the reason of a file whose bytes are not what they were."""
    return f"is damaged or cut off ({detail}): copy or download it again"
