"""visualize_attention.py: which patches count, whose photographs, and what is written of them.

Run it with `python -m pytest tests/test_visualize_attention.py`.
"""

from itertools import combinations

import helpers
import numpy as np
import pytest
import torch
from PIL import Image

from fundus.photographs import load_photograph
from utils import InputError
from vision_transformer import Backbone, BackboneSpec
from visualize_attention import Options, attend, draw, find_photographs, main, strongest
from weights import save_backbone

ENDINGS = ["", "_head0", "_head1", "_mask", "_mean", "_overlay"]


def draw_fundus(path, seed=0, size=(120, 96)):
    """Write a bright disc on black, as a photograph of a fundus is, and return its path."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    inside = (x - width / 2) ** 2 + (y - height / 2) ** 2 < (0.45 * height) ** 2
    noise = np.random.default_rng(seed).integers(60, 200, (height, width, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((noise * inside[..., None]).astype(np.uint8)).save(path)
    return path


# ------------------------------------------------------------------------------------ the mask


def fewest(attention, share):
    """Return how few patches hold a share, and how much those hold, by trying all sets of them."""
    values = attention.ravel().astype(np.float64)
    enough = share * values.sum() * (1 - 1e-5)
    for count in range(1, values.size + 1):
        masses = [values[list(chosen)].sum() for chosen in combinations(range(values.size), count)]
        if max(masses) >= enough:
            return count, max(masses)
    raise AssertionError("all patches together hold every share")


@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(3, 3), (2, 5)])
def test_the_fewest_patches_that_hold_the_share(shape, share):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        attention = rng.dirichlet(np.full(shape[0] * shape[1], 0.5))
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


@pytest.mark.parametrize("size", [15, 0, -480, 10**19])
def test_an_image_size_that_cannot_be_is_refused(size):
    with pytest.raises(InputError, match="--image-size"):
        Options(image=("a.png",), image_size=size)


def test_other_options():
    with pytest.raises(InputError, match="--image"):
        Options()
    options = Options(image=("a.png",), threshold=1.0, image_size=16)
    assert (options.threshold, options.image_size) == (1.0, 16)


def test_photographs_are_found_in_files_and_folders(tmp_path):
    helpers.touch(
        tmp_path, "f/b.PNG", "f/a.jpeg", "f/sub/a.tif", "f/notes.txt", "g/b.png", "b.v2.webp"
    )
    names = ["f", "g/b.png", "b.v2.webp", "g", "g/b.png"]
    found = find_photographs([str(tmp_path / name) for name in names])
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
    names = ["a.png", "a-2.png", "a.jpg"]
    helpers.touch(tmp_path, *names)
    found = find_photographs([str(tmp_path / name) for name in names])
    assert set(found.values()) == {tmp_path / name for name in names}


def test_a_name_that_ends_like_a_pictures_is_another_where_it_would_be_its_file(tmp_path):
    names = ["a.png", "a_mask.png", "a_mask.jpg", "b_head0.png", "a_head.png"]
    helpers.touch(tmp_path, *names)
    found = find_photographs([str(tmp_path / name) for name in names])
    assert list(found) == ["a", "a_mask-1", "a_mask-2", "b_head0", "a_head"]


def test_photographs_that_are_not_there_are_errors(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.png: no such file"):
        find_photographs([str(tmp_path / "nothing.png")])
    with pytest.raises(InputError, match="no photograph in this folder"):
        find_photographs([str(tmp_path)])


# --------------------------------------------------------------------------------- the attention


def check_attention(backbone, side, grid):
    """Compare `attend` with the backbone's attention on the photograph, padded by hand."""
    spec = backbone.spec
    photograph = np.random.default_rng(0).integers(0, 256, (side, side, 3)).astype(np.uint8)
    found = attend(backbone, photograph, None)
    heads = backbone.vit.blocks[-1].attn.num_heads
    assert found.shape == (heads, grid, grid)
    assert found.dtype == np.float32
    assert found.sum(axis=(1, 2)) == pytest.approx(1, abs=1e-6)
    assert (found > 0).all()

    padded = np.zeros((grid * spec.patch_size, grid * spec.patch_size, 3))
    padded[:side, :side] = photograph / 255
    image = torch.tensor((padded - spec.mean) / spec.std).float().permute(2, 0, 1)[None]
    with torch.inference_mode():
        of_patches = backbone.cls_attention(image)[0, :, -(grid**2) :]
    expected = of_patches / of_patches.sum(dim=1, keepdim=True)
    assert np.abs(found - expected.reshape(heads, grid, grid).numpy()).max() < 1e-6


@pytest.mark.parametrize("side, grid", [(32, 2), (96, 6), (40, 3), (33, 3)])
def test_attention_is_of_the_padded_photograph(side, grid):
    spec = BackboneSpec("vit_pico", 16, 32, mean=(0.3, 0.2, 0.1), std=(0.2, 0.3, 0.4))
    check_attention(helpers.pico(spec=spec), side, grid)


def test_attention_to_registers_is_left_out():
    torch.manual_seed(0)
    spec = BackboneSpec("vit_wee_patch16_reg1_gap_256", 16, 32)
    with pytest.raises(InputError, match="CLS"):
        attend(Backbone(spec).eval(), np.zeros((32, 32, 3), np.uint8), None)
    spec = BackboneSpec("vit_small_patch14_reg4_dinov2", 14, 28)
    backbone = Backbone(spec).eval()
    assert backbone.num_prefix_tokens == 5, "[CLS] and four registers"
    check_attention(backbone, side=40, grid=3)


def test_pictures_show_the_mask_and_have_the_photographs_size():
    photograph = np.full((40, 40, 3), 200, np.uint8)  # 3 x 3 patches of 16, the last ones cut
    attention = np.random.default_rng(0).dirichlet(np.ones(9), 2).reshape(2, 3, 3)
    mask = np.zeros((3, 3), bool)
    mask[0, 1] = True
    mask[2, 2] = True
    pictures = draw(photograph, attention, mask, 16)
    assert sorted(pictures) == ENDINGS
    for ending in ENDINGS[1:]:
        assert pictures[ending].size == (40, 40) and pictures[ending].mode == "RGB"

    expected = np.full((40, 40), 50)
    expected[:16, 16:32] = 200
    expected[32:, 32:] = 200
    assert np.array_equal(np.asarray(pictures["_mask"]), np.repeat(expected[..., None], 3, axis=2))

    sheet = np.asarray(pictures[""])
    assert sheet.shape == (40, 40 * 6, 3)
    columns = np.split(sheet, 6, axis=1)
    assert np.array_equal(columns[0], photograph)
    order = ["_mean", "_overlay", "_mask", "_head0", "_head1"]
    for column, ending in zip(columns[1:], order, strict=True):
        assert np.array_equal(column, np.asarray(pictures[ending])), ending


def test_bright_is_where_the_attention_is():
    attention = np.full((1, 4, 4), 0.01)
    attention[0, 3, 0] = 0.85
    head = draw(np.zeros((64, 64, 3), np.uint8), attention, attention[0] > 0.5, 16)["_head0"]
    light = np.asarray(head).sum(axis=2)
    assert light[56, 8] == light.max() > 600
    assert light[8, 56] < 10


# --------------------------------------------------------------------------------- the program


@pytest.fixture
def run(tmp_path):
    """A run of random weights."""
    folder = tmp_path / "runs" / "random"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 0\n")
    save_backbone(helpers.pico(), folder / "backbone.safetensors", {})
    return folder


def options(run, *images, **changed):
    values = {
        "image": tuple(map(str, images)),
        "pretrained": str(run),
        "image_size": 40,
        "device": "cpu",
        "precision": "fp32",
        "workers": 0,
    }
    return Options(**{**values, **changed})


def test_pictures_and_numbers_are_written(run, tmp_path):
    path = draw_fundus(tmp_path / "photographs" / "one.png")
    draw_fundus(tmp_path / "photographs" / "deep" / "two.png", seed=1)
    main(options(run, tmp_path / "photographs", threshold=0.5), None)
    expected = set()
    for name in ("deep_two", "one"):
        expected.add(f"{name}.npz")
        expected.update(f"{name}{ending}.png" for ending in ENDINGS)
    assert {path.name for path in (run / "attention").iterdir()} == expected

    numbers = np.load(run / "attention" / "one.npz", allow_pickle=False)
    attention = attend(helpers.pico(), load_photograph(path, 40), None)
    assert np.abs(numbers["attention"] - attention).max() < 1e-6
    assert np.array_equal(numbers["mask"], strongest(attention.mean(axis=0), 0.5))
    assert float(numbers["threshold"]) == 0.5
    assert int(numbers["patch_size"]) == 16
    assert len(str(numbers["backbone"])) == 64
    other = np.load(run / "attention" / "deep_two.npz")["attention"]
    assert not np.allclose(other, numbers["attention"])

    for name, width in (("one", 240), ("one_mask", 40), ("one_head1", 40)):
        with Image.open(run / "attention" / f"{name}.png") as picture:
            assert picture.size == (width, 40)
            assert picture.format == "PNG"


def test_a_photograph_that_cannot_be_read_does_not_cost_the_others(run, tmp_path):
    folder = tmp_path / "photographs"
    for name in ("a.png", "c.png"):
        draw_fundus(folder / name)
    (folder / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing of the kind")
    draw_fundus(folder / "d.png", size=(40, 30))  # too small to grade
    with pytest.raises(InputError) as error:
        main(options(run, folder), None)
    text = str(error.value)
    assert "b.png" in text and "d.png" in text
    assert "a.png" not in text and "c.png" not in text
    assert sorted(p.name for p in (run / "attention").glob("*.npz")) == ["a.npz", "c.npz"]


def test_maps_of_other_weights_are_not_replaced_unless_asked(run, tmp_path):
    path = draw_fundus(tmp_path / "a.png")
    output = str(tmp_path / "maps")
    written = tmp_path / "maps" / "a.npz"
    main(options(run, path, output_dir=output), None)
    main(options(run, path, output_dir=output), None)  # of the same weights: repeated
    before = written.read_bytes()

    save_backbone(helpers.pico(1), run / "backbone.safetensors", {})
    with pytest.raises(InputError, match="--overwrite"):
        main(options(run, path, output_dir=output), None)
    assert written.read_bytes() == before
    main(options(run, path, output_dir=output, overwrite=True), None)
    assert written.read_bytes() != before


def test_maps_of_another_photograph_are_not_replaced(run, tmp_path):
    path = draw_fundus(tmp_path / "a.png")
    main(options(run, path), None)
    draw_fundus(path, seed=1)
    with pytest.raises(InputError, match="another photograph"):
        main(options(run, path), None)
    (run / "attention" / "a.npz").write_bytes(b"damaged")
    with pytest.raises(InputError, match="--overwrite"):
        main(options(run, path), None)


def test_pictures_of_one_photograph_are_not_written_over_anothers(run, tmp_path):
    folder = tmp_path / "photographs"
    draw_fundus(folder / "a.png")
    draw_fundus(folder / "a_mask.png", seed=1)
    main(options(run, folder), None)
    assert len(list((run / "attention").glob("*.png"))) == 2 * len(ENDINGS)
