"""A zoo of 30 files, good and bad, through preparing, training, k-NN and attention.

Each gives the right pixels or one message that names the file, the same in all four. Run with
`python -m pytest tests/test_faults.py`.
"""

import io
import json
import struct
import zlib
from dataclasses import replace

import helpers
import numpy as np
import pytest
import torch
from PIL import Image

import eval_knn
import prepare_data
import visualize_attention
from augment import WholeView
from data import PhotographDataset, StepSampler, training_loader
from fundus.layouts import open_data
from fundus.photographs import find_fundus, load_photograph
from fundus.synthetic import DrawnEye, draw_photograph
from utils import InputError
from weights import save_backbone

SIZE = 64

# What was done to a photograph that has this number in its EXIF, which undoes it.
TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_90",
    7: "TRANSVERSE",
    8: "ROTATE_270",
}


def encoded(image, form="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def huge_png():
    """A PNG of a few bytes that claims 20,000 x 20,000 pixels."""

    def chunk(kind, data):
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def good_files(image):
    """Files that hold `image`, by name."""
    deep = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    files = {
        "plain.jpg": encoded(image, quality=95),
        "progressive.jpeg": encoded(image, quality=95, progressive=True),
        "cmyk.jpg": encoded(image.convert("CMYK"), quality=95),
        "rgba.png": encoded(image.convert("RGBA"), "PNG"),
        "palette.png": encoded(image.quantize(256), "PNG"),
        "tiff.tif": encoded(image, "TIFF"),
        "bitmap.bmp": encoded(image, "BMP"),
        "webp.webp": encoded(image, "WEBP", quality=95),
        "grey.png": encoded(image.convert("L"), "PNG"),
        "deep.png": encoded(deep, "PNG"),
        "jpeg_named.png": encoded(image, quality=95),
    }
    for number, turn in TURNS.items():
        tag = Image.Exif()
        tag[0x0112] = number
        turned = image.transpose(getattr(Image.Transpose, turn))
        files[f"exif{number}.jpg"] = encoded(turned, quality=95, exif=tag)
    return files


def bad_files(image):
    """Files that cannot be used: bytes, and what the message says."""
    jpeg = encoded(image, quality=95)
    png = encoded(image, "PNG")
    rng = np.random.default_rng(0)
    return {
        "empty.jpg": (b"", "is empty"),
        "page.jpg": (b"<html>403 Forbidden</html>", "web page"),
        "json.png": (b'{"error": 1}', "web page"),
        "text.png": (b"not a photograph", "none of JPEG"),
        "noise.jpg": (rng.bytes(5000), "none of JPEG"),
        "half.jpg": (jpeg[: len(jpeg) // 2], "cut off"),
        "last_bytes.jpg": (jpeg[:-200], "cut off"),
        "half.png": (png[: len(png) // 2], "cut off"),
        "header.jpg": (jpeg[:20], "cut off"),
        "bomb.png": (huge_png(), "million pixels"),
        "dot.png": (encoded(Image.new("RGB", (1, 1)), "PNG"), "1 x 1 pixels"),
        "sliver.png": (encoded(Image.new("RGB", (20, 3000), "red"), "PNG"), "20 x 3000"),
    }


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """The folder, the picture that good files give, and each bad file's message."""
    root = tmp_path_factory.mktemp("zoo") / "train"
    root.mkdir()
    frame, _ = draw_photograph(DrawnEye("p", "left", 3, (6, 1, 0)), 200)
    image = Image.fromarray(frame)
    for name, data in good_files(image).items():
        (root / name).write_bytes(data)
    messages = {}
    for name, (data, message) in bad_files(image).items():
        (root / name).write_bytes(data)
        messages[name] = message
    assert len(list(root.iterdir())) == 30
    (root.parent / "reference").mkdir()
    image.save(root.parent / "reference" / "reference.png")
    expected = load_photograph(root.parent / "reference" / "reference.png", SIZE)
    assert find_fundus(frame) != (0, 0, *image.size)
    return root, expected, messages


def assert_right(picture, expected, name):
    """Equal up to compression, in colour or, where the file has none, in grey."""
    picture = picture.astype(float)
    expected = expected.astype(float)
    if name in ("grey.png", "deep.png"):
        expected = (expected @ [0.299, 0.587, 0.114])[..., None].repeat(3, axis=2)
    limit = 6 if name == "palette.png" else 3
    assert np.abs(picture - expected).mean() < limit, name


def test_preparing(zoo, tmp_path):
    root, expected, bad = zoo
    options = prepare_data.PrepareOptions(str(root), str(tmp_path / "out"), size=SIZE, workers=2)
    with pytest.raises(InputError, match="12 of 30 photographs cannot be used"):
        prepare_data.main(options)
    report = json.loads((tmp_path / "out" / "data_report.json").read_text())
    reasons = dict(entry["text"].split(" ", 1) for entry in report["doubts"]["unreadable"])
    assert reasons.keys() == bad.keys()
    for name, message in bad.items():
        assert message in reasons[name]
    records = open_data(tmp_path / "out").records
    assert len(records) == 18
    for record in records:
        with Image.open(tmp_path / "out" / record.path) as picture:
            assert_right(np.asarray(picture), expected, record.source)


def test_training(zoo, caplog):
    """Raw photographs: bad ones are replaced and named, good ones are right."""
    root, expected, bad = zoo
    manifest = open_data(root)
    records = sorted(manifest.records, key=lambda record: record.path)
    dataset = PhotographDataset(manifest, records, WholeView(512), max_bad=1.0)
    for index, record in enumerate(records):
        if record.path in bad:
            with pytest.raises(InputError, match=f"{record.path}: .*{bad[record.path]}"):
                dataset.read(index)
        else:
            small = Image.fromarray(dataset.read(index)).resize((SIZE, SIZE), Image.BOX)
            assert_right(np.asarray(small), expected, record.path)
    sampler = StepSampler(30, 10)
    sampler.set_range(0, 3)
    caplog.set_level("WARNING", logger="ssrl")
    batches = list(training_loader(dataset, sampler, 0, torch.device("cpu")))
    assert [len(batch["image"]) for batch in batches] == [10, 10, 10]
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 12
    for name in bad:
        assert any(f"/{name}:" in warning for warning in warnings)


@pytest.mark.parametrize("name", ["empty.jpg", "half.jpg", "bomb.png"])
def test_knn_stops_at_the_first_and_names_it(zoo, tmp_path, name):
    """Class folders as they are; without the bad one it goes through."""
    root, _, bad = zoo
    data = tmp_path / "data"
    for number, part in enumerate(("train", "train", "val", "test")):
        for grade in (0, 2):
            target = data / part / str(grade) / f"{number}_{grade}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((root / "plain.jpg").read_bytes())
    save_backbone(helpers.pico(), tmp_path / "weights.safetensors", {})
    options = eval_knn.Options(
        output_dir=str(tmp_path / "out"),
        device="cpu",
        precision="fp32",
        workers=0,
        pretrained=str(tmp_path / "weights.safetensors"),
        data=str(data),
        k=(1,),
        pictures=False,
        allow_seen=True,  # of one photograph all are copies
    )
    eval_knn.main(options, None)
    victim = data / "test" / "2" / "3_2.jpg"
    victim.write_bytes((root / name).read_bytes())
    with pytest.raises(InputError, match=f"{victim}: .*{bad[name]}"):
        eval_knn.main(replace(options, output_dir=str(tmp_path / "again")), None)
    assert not (tmp_path / "again" / "results.json").exists()


def test_attention(zoo, tmp_path):
    root, expected, bad = zoo
    save_backbone(helpers.pico(), tmp_path / "weights.safetensors", {})
    options = visualize_attention.Options(
        output_dir=str(tmp_path / "maps"),
        device="cpu",
        precision="fp32",
        pretrained=str(tmp_path / "weights.safetensors"),
        image=(str(root),),
        image_size=SIZE,
    )
    with pytest.raises(InputError) as caught:
        visualize_attention.main(options, None)
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == 12
    for name, message in bad.items():
        (line,) = (line for line in lines if f"/{name}: " in line)
        assert message in line
    maps = sorted((tmp_path / "maps").glob("*.npz"))
    assert len(maps) == 18
    for path in maps:
        (name,) = (file.name for file in root.glob(f"{path.stem}.*"))
        with Image.open(path.with_suffix(".png")) as sheet:
            picture = np.asarray(sheet.convert("RGB"))[:SIZE, :SIZE]
        assert_right(picture, expected, name)
