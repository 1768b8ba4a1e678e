"""visualize_attention.py: which patches count, whose photographs, and what is written of them.

Run it with `python -m pytest tests/test_visualize_attention.py`.
"""

import csv
import json
import shutil
import subprocess
import sys
from itertools import combinations

import helpers
import numpy as np
import pytest
import torch
from conftest import child_environment
from PIL import Image

import visualize_attention
from fundus.lesion_scores import score_photograph
from fundus.lesions import find_masks, read_lesions
from fundus.photographs import load_photograph, read_photograph
from fundus.synthetic import draw_frames
from utils import HERE, InputError
from vision_transformer import Backbone, BackboneSpec
from visualize_attention import (
    Options,
    attend,
    check_memory,
    draw,
    find_photographs,
    main,
    patch_tokens,
    strongest,
)
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


# ------------------------------------------------------------------------------------- lesions


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Six drawn photographs with masks of their lesions."""
    folder = tmp_path_factory.mktemp("drawn") / "frames"
    draw_frames(folder, 6, height=160)
    return folder


def lesion_options(run, drawn, **changed):
    values = {"masks": str(drawn / "masks"), "image_size": 128, "draws": 100}
    return options(run, drawn / "images", **{**values, **changed})


def read_lesion_results(folder):
    return json.loads((folder / "lesions.json").read_text(encoding="utf-8"))


def test_lesions_by_the_command(run, drawn, tmp_path):
    words = ["--pretrained", str(run), "--image", str(drawn / "images")]
    words += ["--masks", str(drawn / "masks"), "--image-size", "128", "--draws", "100"]
    words += ["--device", "cpu", "--precision", "fp32"]
    done = subprocess.run(
        [sys.executable, str(HERE / "visualize_attention.py"), *words],
        cwd=tmp_path,
        env=child_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    folder = run / "attention"
    results = read_lesion_results(folder)
    assert results["photographs"] == 6
    assert results["settings"]["dilate"] == {"patches": 0.5, "pixels": 8}
    assert results["settings"]["data"]["masks"]["microaneurysm"] == 6
    assert list(results["classes"])[-1] == "all_lesions"
    for name, summary in results["classes"].items():
        assert name in done.stdout
        for measure in ("lift", "pointing", "ap"):
            assert len(summary[measure]["heads"]) == 2
            assert 0 < summary[measure]["mean"]["p"] <= 1

    with (folder / "lesions.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(each["photographs"] for each in results["classes"].values())
    with Image.open(folder / "lesions.png") as picture:
        assert picture.format == "PNG"

    # The csv says of a photograph what its attention, as written, and its masks give.
    row = next(row for row in rows if row["class"] == "all_lesions")
    name = row["photograph"]
    photographs = {name: drawn / "images" / f"{name}.png"}
    masks = find_masks(drawn / "masks", photographs)[name]
    lesions = read_lesions(masks, read_photograph(photographs[name], 128), 128)
    attention = np.load(folder / f"{name}.npz")["attention"]
    scores = score_photograph(attention, lesions, 16, 8)["all_lesions"]
    for measure in ("lift", "pointing", "ap"):
        assert float(row[measure]) == pytest.approx(scores.observed(measure)[0], rel=1e-4)


def test_attention_that_lies_on_lesions_is_told_from_even_attention(run, drawn, monkeypatch):
    """Half of what both heads give lies on the lesions; then nothing does more than chance."""
    photographs = find_photographs([str(drawn / "images")])
    masks = find_masks(drawn / "masks", photographs)
    planted = []
    for name, path in photographs.items():
        photograph = read_photograph(path, 128)
        share = read_lesions(masks[name], photograph, 128).shares["all_lesions"]
        of_patches = share.reshape(8, 16, 8, 16).sum(axis=(1, 3))
        planted.append(np.stack([1 / 64 + of_patches / of_patches.sum()] * 2) / 2)

    monkeypatch.setattr(visualize_attention, "attend", lambda *_: planted.pop(0))
    main(lesion_options(run, drawn), None)
    found = read_lesion_results(run / "attention")["classes"]["all_lesions"]
    for measure in ("lift", "ap"):
        assert found[measure]["mean"]["p"] == pytest.approx(1 / 101)
        assert found[measure]["mean"]["value"] > found[measure]["mean"]["null"]["ci95"][1]

    even = np.full((2, 8, 8), 1 / 64, np.float32)
    monkeypatch.setattr(visualize_attention, "attend", lambda *_: even)
    main(lesion_options(run, drawn, overwrite=True), None)
    found = read_lesion_results(run / "attention")["classes"]["all_lesions"]
    assert found["lift"]["mean"]["value"] == pytest.approx(1)
    assert found["lift"]["mean"]["p"] == 1


def test_lesions_of_other_settings_are_not_replaced_unless_asked(run, drawn):
    main(lesion_options(run, drawn), None)
    written = run / "attention" / "lesions.json"
    before = read_lesion_results(run / "attention")["classes"]
    main(lesion_options(run, drawn), None)  # repeated, with the same numbers
    assert read_lesion_results(run / "attention")["classes"] == before

    for changed, named in (({"dilate": 1.0}, "dilate"), ({"seed": 1}, "seed")):
        with pytest.raises(InputError, match=f"differs in {named}; --overwrite"):
            main(lesion_options(run, drawn, **changed), None)
    with pytest.raises(InputError, match="differs in data"):
        main(lesion_options(run, drawn, image=(str(next((drawn / "images").iterdir())),)), None)
    assert read_lesion_results(run / "attention")["classes"] == before
    main(lesion_options(run, drawn, dilate=1.0, overwrite=True), None)
    assert read_lesion_results(run / "attention")["settings"]["dilate"]["pixels"] == 16
    written.write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="since it is damaged"):
        main(lesion_options(run, drawn), None)


def test_a_mask_of_another_size_costs_its_photograph_alone(run, drawn, tmp_path, caplog):
    folder = tmp_path / "copy"
    shutil.copytree(drawn, folder)
    names = sorted(path.stem for path in (folder / "images").iterdir())
    file = folder / "masks" / "microaneurysm" / f"{names[0]}.png"
    Image.open(file).crop((0, 0, 90, 90)).save(file)
    for path in (folder / "masks").rglob(f"{names[1]}.png"):
        path.unlink()
    with caplog.at_level("INFO"), pytest.raises(InputError) as error:
        main(lesion_options(run, folder), None)
    assert f"{names[0]}.png has 90 x 90 pixels" in str(error.value)
    assert names[2] not in str(error.value)
    assert "1 photographs have no mask" in caplog.text
    assert read_lesion_results(run / "attention")["photographs"] == 4
    maps = {path.stem for path in (run / "attention").glob("*.npz")}
    assert maps == set(names[1:]), "the one without masks has its map"


def test_masks_that_show_no_lesion_are_an_error(run, drawn, tmp_path):
    name = sorted(path.stem for path in (drawn / "images").iterdir())[0]
    with Image.open(drawn / "images" / f"{name}.png") as picture:
        empty = Image.new("L", picture.size)
    (tmp_path / "empty").mkdir()
    empty.save(tmp_path / "empty" / f"{name}_MA.png")
    with pytest.raises(InputError, match="no mask has a lesion"):
        main(lesion_options(run, drawn, masks=str(tmp_path / "empty")), None)


def test_tokens_that_would_fill_the_memory_are_refused():
    check_memory(helpers.pico(), 10, 480)
    with pytest.raises(InputError, match=r"100000 photographs at 480 px take 11\.5 GB"):
        check_memory(helpers.pico(), 100_000, 480)


@pytest.mark.parametrize("side", [32, 40])
def test_patch_tokens_are_the_backbones(side):
    backbone = helpers.pico()
    photograph = np.random.default_rng(0).integers(0, 256, (side, side, 3)).astype(np.uint8)
    grid = -(-side // 16)
    padded = np.zeros((16 * grid, 16 * grid, 3), np.uint8)
    padded[:side, :side] = photograph
    image = torch.from_numpy(padded).permute(2, 0, 1)[None]
    with torch.inference_mode():
        expected = backbone.all_tokens(backbone.normalize(image)).patches[0].numpy()
    found = patch_tokens(backbone, photograph, None)
    assert found.shape == (grid**2, 64)
    assert np.abs(found - expected).max() < 1e-6


def test_a_photograph_called_lesions_keeps_its_files(tmp_path):
    helpers.touch(tmp_path, "lesions.png")
    assert list(find_photographs([str(tmp_path)])) == ["lesions-2"]
