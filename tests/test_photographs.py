"""Decoding, cropping and resizing against Pillow's own, and files that must be refused.

Run: pytest tests/test_photographs.py
"""

import io
import os
import struct
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
from discs import assert_boxes_agree, draw_fundus, to_uint8
from PIL import Image, ImageFile, ImageOps

from fundus.photographs import (
    Box,
    PhotographError,
    crop_aspect,
    crop_square,
    find_fundus,
    load_photograph,
    open_photograph,
    pad_square,
    read_photograph,
    subtract_local_mean,
)
from fundus.synthetic import DrawnEye, draw_photograph


def save(path, image, **options):
    Image.fromarray(image).save(path, **options)
    return path


def encoded_fundus():
    """The bytes of a JPEG."""
    buffer = io.BytesIO()
    image = Image.fromarray(to_uint8(draw_fundus(400, 300, (200, 150), 120)))
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------ crop, resize


def test_read_photograph_leaves_padding_and_size_to_the_reader(tmp_path):
    path = save(tmp_path / "a.png", to_uint8(draw_fundus(1000, 660, (500, 330), 390)))
    image = open_photograph(path)
    fundus = find_fundus(image)
    kept = read_photograph(path, 128, keep_aspect=True).picture
    assert np.array_equal(kept, crop_aspect(image, fundus, 128)) and kept.shape[1] == 128
    loose = read_photograph(path, 128, exact=False).picture
    assert np.array_equal(loose, pad_square(fundus.cut(image)))


def test_where_no_fundus_is_found_the_whole_image_is_kept(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    assert find_fundus(image) == Box(left=0, top=0, right=120, bottom=90)
    photograph = read_photograph(save(tmp_path / "a.png", image), 120)
    assert photograph.doubtful and photograph.box == Box(0, 0, 120, 90)
    assert np.array_equal(photograph.picture, pad_square(image))
    assert not read_photograph(save(tmp_path / "b.png", to_uint8(draw_fundus())), 64).doubtful


def test_crop_square_centres_and_pads_with_black():
    image = np.zeros((50, 80, 3), np.uint8)
    image[10:30, 20:60] = [200, 100, 50]
    square = crop_square(image, Box(20, 10, 60, 30), 40)
    assert square.shape == (40, 40, 3) and square.dtype == np.uint8
    assert (square[10:30] == [200, 100, 50]).all()
    assert not square[:10].any() and not square[30:].any()


def test_crop_square_is_pillows_antialiased_resize():
    image = np.random.default_rng(0).integers(0, 255, (90, 90, 3), dtype=np.uint8)
    expected = Image.fromarray(image[:60, 10:70]).resize((24, 24), Image.Resampling.LANCZOS)
    assert np.array_equal(crop_square(image, Box(10, 0, 70, 60), 24), np.array(expected))


def test_crop_square_keeps_masks_aligned_with_their_image():
    mask = np.zeros((60, 100), np.uint8)
    mask[20:40, 30:50] = 255
    box = Box(10, 0, 90, 60)
    got = crop_square(mask, box, 40, Image.Resampling.NEAREST)
    image = crop_square(np.repeat(mask[..., None], 3, axis=2), box, 40, Image.Resampling.BOX)
    assert got.shape == (40, 40) and set(np.unique(got)) == {0, 255}
    assert np.array_equal(got > 127, image[..., 0] > 127)


def test_load_photograph_fits_the_fundus_into_the_square(tmp_path):
    path = save(tmp_path / "a.png", to_uint8(draw_fundus(1000, 660, (420, 330), 310)))
    picture = load_photograph(path, 128)
    assert picture.shape == (128, 128, 3) and picture.dtype == np.uint8
    lit = picture.max(axis=2) > 20
    for sums in (lit.sum(axis=0), lit.sum(axis=1)):
        extent = np.flatnonzero(sums)
        assert extent[0] <= 2 and extent[-1] >= 125
    assert abs(lit.mean() - np.pi / 4) < 0.03


def test_read_photograph_reports_in_pixels_of_the_source(tmp_path):
    # Large enough to be decoded at a fraction of its size.
    image = to_uint8(draw_fundus(2000, 1300, (900, 640), 600))
    exif = Image.Exif()
    exif[0x0112] = 6
    sideways = np.rot90(image)  # which orientation 6 turns back
    path = save(tmp_path / "a.jpg", np.ascontiguousarray(sideways), quality=90, exif=exif)
    photograph = read_photograph(path, 64)
    assert (photograph.width, photograph.height) == (2000, 1300)
    assert not photograph.doubtful
    assert_boxes_agree(photograph.box, Box(300, 40, 1500, 1240), 600)


def test_read_photograph_decodes_all_pixels_of_a_small_fundus(tmp_path):
    image = draw_fundus(1600, 1600, (800, 800), 340)
    image[780:820:8, 700:900] = 0  # fine lines, lost at a fraction of the size
    path = save(tmp_path / "a.jpg", to_uint8(image), quality=95, subsampling=0)
    full = np.array(Image.open(path))
    assert np.array_equal(load_photograph(path, 512), crop_square(full, find_fundus(full), 512))


# ------------------------------------------------------------------------------------------- decode


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def psnr(a, b):
    return 10 * np.log10(255**2 / max(1e-9, np.mean((a.astype(float) - b.astype(float)) ** 2)))


def test_scaled_decoding_is_close_to_full_decoding(tmp_path):
    rng = np.random.default_rng(0)
    image = draw_fundus(2400, 1600, (1200, 800), 780)
    for x, y in rng.integers((700, 300), (1700, 1300), (150, 2)):
        image[y - 4 : y + 4, x - 4 : x + 4] *= 0.5  # microaneurysms
    path = save(tmp_path / "a.jpg", to_uint8(image + rng.normal(0, 3, image.shape)), quality=90)
    full = Image.open(path).convert("RGB")
    assert np.array_equal(open_photograph(path), np.array(full))
    for min_side, side in ((1600, 1600), (801, 1600), (800, 800), (300, 400), (100, 200)):
        scaled = open_photograph(path, min_side=min_side)
        assert min(scaled.shape[:2]) == side >= min_side
        small = Image.fromarray(scaled).resize((150, 100), Image.Resampling.LANCZOS)
        expected = full.resize((150, 100), Image.Resampling.LANCZOS)
        assert psnr(np.array(small), np.array(expected)) > 35
    expected = crop_square(np.array(full), find_fundus(np.array(full)), 256)
    assert psnr(load_photograph(path, 256), expected) > 35


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_exif_orientation_is_applied(tmp_path, orientation, suffix):
    image = to_uint8(draw_fundus(96, 64, (40, 30), 28))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / f"a.{suffix}", image, exif=exif)
    with Image.open(path) as opened:
        opened.load()
        expected = np.array(ImageOps.exif_transpose(opened).convert("RGB"))
    got = open_photograph(path)
    assert np.array_equal(got, expected)
    if suffix in ("png", "tif"):  # lossless, so that the drawn image itself is the oracle
        upright = {
            1: image,
            2: image[:, ::-1],
            3: image[::-1, ::-1],
            4: image[::-1],
            5: image.swapaxes(0, 1),
            6: np.rot90(image, -1),
            7: np.rot90(image, 2).swapaxes(0, 1),
            8: np.rot90(image),
        }
        assert np.array_equal(got, upright[orientation])


def test_broken_exif_does_not_cost_the_photograph(tmp_path):
    image = to_uint8(draw_fundus(96, 64, (40, 30), 28))
    path = save(tmp_path / "a.jpg", image, exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert open_photograph(path).shape == (64, 96, 3)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_are_scaled_and_not_clipped(tmp_path, suffix):
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    path = save(tmp_path / f"a.{suffix}", values)
    got = open_photograph(path)
    assert np.abs(got - (values / 257)[..., None]).max() <= 0.5 + 1e-6
    assert got.min() == 0 and got.max() == 255


def test_16_bits_colour_png_is_scaled(tmp_path):
    values = np.linspace(0, 65535, 16 * 16 * 3).reshape(16, 16, 3).astype(">u2")
    lines = b"".join(b"\0" + line.tobytes() for line in values)
    data = b"\x89PNG\r\n\x1a\n" + png_chunk(
        b"IHDR", struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)
    )
    data += png_chunk(b"IDAT", zlib.compress(lines)) + png_chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(data)
    assert np.abs(open_photograph(tmp_path / "a.png") - values / 257).max() <= 1


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "LA", "1", "YCbCr"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    source = Image.fromarray(to_uint8(draw_fundus(96, 64, (48, 32), 30))).convert(mode)
    suffix = {"CMYK": "jpg", "YCbCr": "jpg"}.get(mode, "png")
    source.save(tmp_path / f"a.{suffix}", quality=100)
    got = open_photograph(tmp_path / f"a.{suffix}")
    expected = np.array(source.convert("RGB"))
    assert got.shape == (64, 96, 3) and got.dtype == np.uint8
    if suffix == "jpg":
        assert psnr(got, expected) > 30
    else:
        assert np.array_equal(got, expected)


def test_transparent_pixels_are_black(tmp_path):
    image = np.full((64, 64, 4), 255, np.uint8)
    image[:, :32, 3] = 0
    got = open_photograph(save(tmp_path / "a.png", image))
    assert not got[:, :32].any() and (got[:, 32:] == 255).all()


# ------------------------------------------------------------------------------------------ refused


def jpeg_bytes(width=400, height=300, **options):
    buffer = io.BytesIO()
    image = draw_fundus(width, height, (width / 2, height / 2), height / 2.2)
    noise = np.random.default_rng(0).normal(0, 10, image.shape)
    Image.fromarray(to_uint8(image + noise)).save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>Sign in to download</html>", "web page"),
        (b"\n  <?xml version='1.0'?><Error>AccessDenied</Error>", "web page"),
        (b"image,level\n10_left,0\n", "none of"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "none of"),
        (jpeg_bytes()[:100], "cut off"),
        (jpeg_bytes()[:9000], "cut off"),
        (jpeg_bytes(progressive=True)[:9000], "cut off"),
    ],
    ids=["empty", "html", "xml", "csv", "eps", "header", "half", "progressive"],
)
def test_what_is_no_photograph_is_refused_with_its_reason(tmp_path, data, reason):
    path = tmp_path / "10_left.jpeg"
    path.write_bytes(data)
    with pytest.raises(PhotographError, match=reason):
        open_photograph(path)


def test_truncated_png_is_refused(tmp_path):
    path = save(tmp_path / "a.png", to_uint8(draw_fundus()))
    path.write_bytes(path.read_bytes()[:2000])
    for allow_truncated in (False, True):
        with pytest.raises(PhotographError, match="cut off"):
            open_photograph(path, allow_truncated=allow_truncated)


@pytest.mark.parametrize("progressive", [False, True])
def test_truncated_jpeg_is_taken_when_allowed(tmp_path, progressive):
    data = jpeg_bytes(progressive=progressive)
    (tmp_path / "whole.jpg").write_bytes(data)
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) * 2 // 3])
    whole = open_photograph(tmp_path / "whole.jpg")
    cut = open_photograph(tmp_path / "cut.jpg", allow_truncated=True)
    assert cut.shape == whole.shape
    likeness = 90
    if progressive:
        likeness = 20  # all of it is there, but coarse
    assert psnr(cut[:100], whole[:100]) > likeness
    assert not np.array_equal(cut, whole)
    assert np.array_equal(open_photograph(tmp_path / "whole.jpg", allow_truncated=True), whole)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    with pytest.raises(PhotographError, match="cut off"):
        open_photograph(tmp_path / "cut.jpg")


def test_a_jpeg_whose_end_is_missing_but_marked_is_refused(tmp_path):
    """Copied in part and closed again: decoders fill the rest with even grey, without complaint."""
    whole = encoded_fundus()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2] + b"\xff\xd9")
    with pytest.raises(PhotographError, match="cut off .its end is missing"):
        open_photograph(tmp_path / "cut.jpg")
    assert (open_photograph(tmp_path / "cut.jpg", allow_truncated=True)[-1] == 128).all()


def test_a_photograph_on_even_grey_is_not_taken_for_a_cut_off_one(tmp_path):
    image = draw_fundus(400, 300, (200, 150), 120)
    image[image.sum(axis=2) == 0] = 128  # as Graham's preprocessing leaves it
    Image.fromarray(to_uint8(image)).save(tmp_path / "grey.jpg", quality=95)
    assert (open_photograph(tmp_path / "grey.jpg")[-1] == 128).all()


def test_only_of_a_jpeg_a_grey_end_means_that_it_is_cut_off(tmp_path):
    image = to_uint8(draw_fundus(400, 300, (200, 150), 120))
    image[150:] = 128
    assert np.array_equal(open_photograph(save(tmp_path / "a.png", image)), image)


def test_a_damaged_tiff_is_not_called_another_format(tmp_path):
    Image.fromarray(to_uint8(draw_fundus(300, 200, (150, 100), 80))).save(
        tmp_path / "a.tif", compression="tiff_lzw"
    )
    data = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(data[: len(data) // 2])
    with pytest.raises(PhotographError, match="damaged or cut off"):
        open_photograph(tmp_path / "a.tif")


def test_folders_and_missing_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    for odd in (tmp_path, tmp_path / "pipe.jpg"):
        with pytest.raises(PhotographError, match="is no file"):
            open_photograph(odd)
    with pytest.raises(PhotographError, match="No such file"):
        open_photograph(tmp_path / "none.jpg")


@pytest.mark.parametrize("width, height", [(20000, 20000), (8000, 7000), (65500, 64)])
def test_bombs_are_refused_before_they_are_decoded(tmp_path, width, height):
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    packed = zlib.compress(bytes(width + 1) * 1000)
    path = tmp_path / "a.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", packed) + png_chunk(b"IEND", b"")
    )
    tracemalloc.start()
    with pytest.raises(PhotographError, match="50 million pixels, or over 8192 on a side"):
        open_photograph(path)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_large_photographs_below_the_limit_are_taken_without_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30_000_000)  # from which Pillow itself warns
    Image.new("L", (8192, 6000)).save(tmp_path / "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_photograph(tmp_path / "a.png").shape == (6000, 8192, 3)


def test_large_files_are_refused(tmp_path):
    with open(tmp_path / "a.tif", "wb") as file:
        file.write(b"II*\0")
        file.truncate(200_000_000)
    with pytest.raises(PhotographError, match="100 MB"):
        open_photograph(tmp_path / "a.tif")


@pytest.mark.parametrize("shape", [(1, 1, 3), (20, 3000, 3), (63, 100, 3)])
def test_raw_photographs_below_64_pixels_are_refused(tmp_path, shape):
    path = save(tmp_path / "a.png", np.full(shape, 99, np.uint8))
    with pytest.raises(PhotographError, match="64"):
        load_photograph(path)
    assert open_photograph(path).shape == shape  # decoding alone has no such limit


def test_flipped_bytes_raise_nothing_else(tmp_path):
    rng = np.random.default_rng(0)
    kinds = {"jpg": {}, "png": {}, "tif": {"compression": "tiff_lzw"}, "webp": {}}
    for suffix, options in kinds.items():
        image = to_uint8(draw_fundus(96, 64, (48, 32), 30))
        path = save(tmp_path / f"a.{suffix}", image, **options)
        data = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(60):
            damaged = data.copy()
            where = rng.integers(0, len(data), 8)
            where[:4] %= 200  # the header above all
            damaged[where] = rng.integers(0, 256, 8)
            path.write_bytes(damaged.tobytes())
            try:
                assert open_photograph(path).dtype == np.uint8
            except PhotographError as error:
                assert str(error)


def test_local_mean_is_the_naive_one():
    """Pixel by pixel, with a Gaussian over the fundus alone."""
    frame, _ = draw_photograph(DrawnEye("p", "left", 2, (31, 2, 0)), 96)
    picture = crop_square(frame, find_fundus(frame), 96)
    found = subtract_local_mean(picture).astype(float)
    inside = picture.max(axis=2) > 12
    sigma = 96 / 2 / 30
    y, x = np.mgrid[:96, :96]
    reach = round(3 * sigma)
    for row, column in ((48, 48), (10, 40), (60, 90), (30, 6)):
        assert inside[row, column]
        near = (abs(y - row) <= reach) & (abs(x - column) <= reach) & inside
        weight = np.exp(-((y - row) ** 2 + (x - column) ** 2) / (2 * sigma**2)) * near
        mean = (picture * weight[..., None]).sum((0, 1)) / weight.sum()
        expected = np.clip(4 * (picture[row, column] - mean) + 128, 0, 255)
        assert np.abs(found[row, column] - expected).max() <= 1
    assert (found[~inside] == 128).all()


@pytest.mark.parametrize(("shape", "expected"), [((60, 40), (50, 33)), ((40, 60), (33, 50))])
def test_aspect_is_kept_and_padding_brings_the_square_back(shape, expected):
    image = np.full((*shape, 3), 200, np.uint8)
    kept = crop_aspect(image, Box(0, 0, shape[1], shape[0]), 50)
    assert kept.shape[:2] == expected and (kept == 200).all()
    square = pad_square(kept)
    assert square.shape == (50, 50, 3) and (square == 200).all(axis=2).sum() == kept[..., 0].size
    assert square[25, 25, 0] == 200 and square[0, 0, 0] in (0, 200)
