"""visualize_attention.py: which patches count, whose photographs, and what is written of them.

Run it with `python -m pytest tests/test_visualize_attention.py`.
"""

from itertools import combinations

import helpers
import numpy as np
import pytest
import torch
from PIL import Image

import visualize_attention
from fundus import listing
from fundus.photographs import load_photograph
from utils import InputError
from vision_transformer import BackboneSpec
from visualize_attention import Options, attend, draw, find_photographs, main, strongest
from weights import save_backbone

ENDINGS = ["", "_head0", "_head1", "_mask", "_mean", "_overlay"]


def fundus(path, seed=0, size=(120, 96)):
    """Write a bright disc on black, as a photograph of a fundus looks."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    inside = (x - width / 2) ** 2 + (y - height / 2) ** 2 < (0.45 * height) ** 2
    noise = np.random.default_rng(seed).integers(60, 200, (height, width, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((noise * inside[..., None]).astype(np.uint8)).save(path)
    return path


# ------------------------------------------------------------------------------------ the mask


def fewest(attention, share):
    """Try all sets of patches, small ones first; of equals the heaviest."""
    values, whole = attention.ravel().astype(np.float64), attention.sum(dtype=np.float64)
    for count in range(1, values.size + 1):
        best = max(combinations(range(values.size), count), key=lambda s: values[list(s)].sum())
        if values[list(best)].sum() >= share * whole * (1 - 1e-5):
            return count, values[list(best)].sum()
    raise AssertionError


@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(3, 3), (2, 5)])
def test_the_fewest_patches_that_hold_the_share(shape, share):
    for seed in range(5):
        attention = np.random.default_rng(seed).dirichlet(np.full(shape[0] * shape[1], 0.5))
        attention = attention.reshape(shape).astype(np.float32)
        mask = strongest(attention, share)
        count, mass = fewest(attention, share)
        assert mask.shape == shape and mask.dtype == bool
        assert mask.sum() == count
        assert attention[mask].sum() == pytest.approx(mass, rel=1e-5)


def test_strongest_by_hand():
    attention = np.array([[0.1, 0.4], [0.2, 0.3]])
    assert strongest(attention, 0.4).tolist() == [[False, True], [False, False]]
    assert strongest(attention, 0.7).tolist() == [[False, True], [False, True]]
    assert strongest(attention * 7, 0.71).tolist() == [[False, True], [True, True]]
    assert strongest(attention, 1.0).all()
    assert strongest(np.full((4, 4), 1 / 16), 0.5).sum() == 8, "equal ones: half of them"
    one = np.zeros((2, 2))
    one[1, 0] = 1
    assert np.array_equal(strongest(one, 1.0), one > 0)


# ----------------------------------------------------------------------------- options and names


@pytest.mark.parametrize("threshold", [0.0, -0.1, 1.01, 60.0, float("nan")])
def test_a_threshold_that_is_no_share_is_refused(threshold):
    with pytest.raises(InputError, match="--threshold"):
        Options(image=("a.png",), threshold=threshold)


def test_other_options_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="--image"):
        Options()
    with pytest.raises(InputError, match="--image-size"):
        Options(image=("a.png",), image_size=15)
    assert Options(image=("a.png",), threshold=1.0, image_size=16).threshold == 1


def test_photographs_are_found_in_files_and_folders(tmp_path):
    for name in ("f/b.PNG", "f/a.jpeg", "f/sub/a.tif", "f/notes.txt", "g/b.png", "b.v2.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    names = [str(tmp_path / name) for name in ("f", "g/b.png", "b.v2.webp", "g", "g/b.png")]
    found = find_photographs(tuple(names))
    relative = {name: path.relative_to(tmp_path).as_posix() for name, path in found.items()}
    assert relative == {
        "a": "f/a.jpeg",
        "b": "f/b.PNG",
        "sub_a": "f/sub/a.tif",
        "b-2": "g/b.png",
        "b.v2": "b.v2.webp",
        "b-3": "g/b.png",
        "b-4": "g/b.png",
    }


def test_names_that_look_like_a_duplicates_do_not_collide(tmp_path):
    for name in ("a.png", "a-2.png", "a.jpg"):
        (tmp_path / name).touch()
    found = find_photographs(tuple(str(tmp_path / n) for n in ("a.png", "a-2.png", "a.jpg")))
    assert len(found) == len({str(path) for path in found.values()}) == 3


def test_photographs_that_are_not_there_are_errors(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.png: no such file"):
        find_photographs((str(tmp_path / "nothing.png"),))
    with pytest.raises(InputError, match="no photograph in this folder"):
        find_photographs((str(tmp_path),))


# --------------------------------------------------------------------------------- the attention


@pytest.mark.parametrize("side, grid", [(32, 2), (96, 6), (40, 3), (33, 3)])
def test_attention_is_of_the_padded_photograph(side, grid):
    spec = BackboneSpec("vit_pico", 16, 32, mean=(0.3, 0.2, 0.1), std=(0.2, 0.3, 0.4))
    backbone = helpers.pico(spec=spec)
    photograph = np.random.default_rng(0).integers(0, 256, (side, side, 3)).astype(np.uint8)
    found = attend(backbone, photograph, None)
    assert found.shape == (2, grid, grid) and found.dtype == np.float32
    assert found.sum(axis=(1, 2)) == pytest.approx(1, abs=1e-6) and (found > 0).all()
    padded = np.zeros((grid * 16, grid * 16, 3))
    padded[:side, :side] = photograph / 255
    image = torch.tensor((padded - spec.mean) / spec.std).float().permute(2, 0, 1)[None]
    with torch.inference_mode():
        rows = backbone.cls_attention(image)[0, :, 1:]
    expected = (rows / rows.sum(dim=1, keepdim=True)).reshape(2, grid, grid).numpy()
    assert np.abs(found - expected).max() < 1e-6


def test_pictures_show_the_mask_and_have_the_photographs_size():
    photograph = np.full((40, 40, 3), 200, np.uint8)  # 3 x 3 patches of 16, the last ones cut
    attention = np.random.default_rng(0).dirichlet(np.ones(9), 2).reshape(2, 3, 3)
    mask = np.zeros((3, 3), bool)
    mask[0, 1] = mask[2, 2] = True
    pictures = draw(photograph, attention, mask, 16)
    assert sorted(pictures) == ENDINGS
    sheet = np.asarray(pictures[""])
    assert sheet.shape == (40, 40 * 6, 3) and np.array_equal(sheet[:, :40], photograph)
    for ending in ENDINGS[1:]:
        assert pictures[ending].size == (40, 40) and pictures[ending].mode == "RGB"
    expected = np.full((40, 40), 50)
    expected[:16, 16:32] = expected[32:, 32:] = 200
    assert np.array_equal(np.asarray(pictures["_mask"]), np.repeat(expected[..., None], 3, axis=2))


def test_bright_is_where_the_attention_is():
    attention = np.full((1, 4, 4), 0.01)
    attention[0, 3, 0] = 0.85
    head = draw(np.zeros((64, 64, 3), np.uint8), attention, attention[0] > 0.5, 16)["_head0"]
    light = np.asarray(head).sum(axis=2)
    assert light[56, 8] == light.max() > 600 and light[8, 56] < 10


# --------------------------------------------------------------------------------- the program


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs" / "random"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 0\n")
    save_backbone(helpers.pico(), folder / "backbone.safetensors", {})
    return folder


def options(run, *images, **changed):
    values = {"pretrained": str(run), "image_size": 40, "device": "cpu", "precision": "fp32"}
    return Options(image=tuple(map(str, images)), **(values | {"workers": 0} | changed))


def test_pictures_and_numbers_are_written(run, tmp_path):
    path = fundus(tmp_path / "photographs" / "one.png")
    fundus(tmp_path / "photographs" / "deep" / "two.png", seed=1)
    main(options(run, tmp_path / "photographs", threshold=0.5), None)
    written = sorted(p.name for p in (run / "attention").iterdir())
    names = ("deep_two", "one")
    expected = [f"{n}{e}.png" for n in names for e in ENDINGS] + [f"{n}.npz" for n in names]
    assert written == sorted(expected)
    numbers = np.load(run / "attention" / "one.npz", allow_pickle=False)
    attention = attend(helpers.pico(), load_photograph(path, 40), None)
    assert np.abs(numbers["attention"] - attention).max() < 1e-6
    assert np.array_equal(numbers["mask"], strongest(attention.mean(axis=0), 0.5))
    assert (float(numbers["threshold"]), int(numbers["patch_size"])) == (0.5, 16)
    assert len(str(numbers["backbone"])) == 64
    other = np.load(run / "attention" / "deep_two.npz")["attention"]
    assert not np.allclose(other, numbers["attention"])
    for name, width in (("one", 240), ("one_mask", 40), ("one_head1", 40)):
        with Image.open(run / "attention" / f"{name}.png") as picture:
            assert picture.size == (width, 40) and picture.format == "PNG"


def test_a_photograph_that_cannot_be_read_does_not_cost_the_others(run, tmp_path):
    folder = tmp_path / "photographs"
    for name in ("a.png", "c.png"):
        fundus(folder / name)
    (folder / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing of the kind")
    fundus(folder / "d.png", size=(40, 30))  # too small to grade
    with pytest.raises(InputError) as error:
        main(options(run, folder), None)
    text = str(error.value)
    assert "b.png" in text and "d.png" in text and "a.png" not in text and "c.png" not in text
    assert sorted(p.name for p in (run / "attention").glob("*.npz")) == ["a.npz", "c.npz"]


def test_maps_of_other_weights_are_not_replaced_unless_asked(run, tmp_path):
    path, output = fundus(tmp_path / "a.png"), str(tmp_path / "maps")
    main(options(run, path, output_dir=output), None)
    main(options(run, path, output_dir=output), None)  # of the same weights: repeated
    before = (tmp_path / "maps" / "a.npz").read_bytes()
    save_backbone(helpers.pico(1), run / "backbone.safetensors", {})
    with pytest.raises(InputError, match="--overwrite"):
        main(options(run, path, output_dir=output), None)
    assert (tmp_path / "maps" / "a.npz").read_bytes() == before
    main(options(run, path, output_dir=output, overwrite=True), None)
    assert (tmp_path / "maps" / "a.npz").read_bytes() != before


def test_pictures_of_one_photograph_are_not_written_over_anothers(run, tmp_path):
    folder = tmp_path / "photographs"
    fundus(folder / "a.png")
    fundus(folder / "a_mask.png", seed=1)
    main(options(run, folder), None)
    assert len(list((run / "attention").glob("*.png"))) == 2 * len(ENDINGS)


def test_known_suffixes_are_those_of_the_data_sets():
    assert visualize_attention.SUFFIXES == listing.SUFFIXES
