"""weights.py: the files that it reads and writes, and those it refuses.

Run it with `python -m pytest tests/test_weights.py`.
"""

import argparse
import json
import os
import pickle
import random
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import helpers
import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from timm.layers import resample_abs_pos_embed

import weights
from evaluation import newest_run
from run_folder import load_torch, save_torch
from utils import InputError
from vision_transformer import ARCHS, Backbone, BackboneSpec
from weights import load_backbone, read_weights


def weights_of(state, spec=helpers.PICO) -> weights.Weights:
    return weights.Weights(state, spec, "some.pth", "0" * 64, None, {})


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("key", ["teacher", "student"])
@pytest.mark.parametrize("prefix", ["", "module.", "module.backbone.", "_orig_mod.", "backbone."])
def test_a_checkpoint_as_dino_writes_it(tmp_path, prefix, key):
    wanted, other = helpers.pico(0), helpers.pico(1)
    content = {}
    for name in ("teacher", "student"):
        model = wanted if name == key else other
        content[name] = {prefix + k: v for k, v in model.state_dict().items()}
        content[name][f"{prefix}head.mlp.0.weight"] = torch.randn(3, 3)
    content |= {"args": argparse.Namespace(arch="vit_small", lr=np.float64(5e-4))}
    content |= {"epoch": np.int64(3), "loss": np.float32(1.5), "fp16_scaler": None}
    torch.save(content, tmp_path / "dino.pth")
    found = read_weights(str(tmp_path / "dino.pth"), key)
    assert found.spec == helpers.PICO and found.run is None and len(found.sha256) == 64
    assert same(load_backbone(found).state_dict(), wanted.state_dict())


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("key", ["", "model", "state_dict"])
def test_a_plain_state_dict_and_older_torch_files(tmp_path, key, zipped):
    state, path = helpers.pico().state_dict(), tmp_path / "plain.pth"
    torch.save({key: state} if key else state, path, _use_new_zipfile_serialization=zipped)
    found = load_backbone(read_weights(str(path), "student"))
    assert same(found.state_dict(), state)
    assert not found.training and not any(p.requires_grad for p in found.parameters())


def test_prefixes_go_at_the_front_only(tmp_path):
    state = helpers.pico().state_dict()
    state["blocks.0.backbone.attn.qkv.weight"] = state.pop("blocks.0.attn.qkv.weight")
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(InputError) as error:
        load_backbone(read_weights(str(tmp_path / "odd.pth")))
    assert "missing: blocks.0.attn.qkv.weight" in str(error.value)
    assert "unexpected: blocks.0.backbone.attn.qkv.weight" in str(error.value)


def test_weights_that_do_not_fit_are_listed_and_nothing_is_loaded():
    backbone, state = helpers.pico(0), helpers.pico(1).state_dict()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    del state["norm.bias"]
    state["dist_token"] = torch.zeros(1)
    state["blocks.1.mlp.fc1.bias"] = torch.zeros(7)
    with pytest.raises(InputError) as error:
        weights.load_weights(backbone, weights_of(state))
    text = str(error.value)
    assert text.startswith("some.pth:") and "missing: norm.bias" in text
    assert "unexpected: dist_token" in text
    assert "blocks.1.mlp.fc1.bias (7,) instead of (256,)" in text
    assert same(before, backbone.state_dict())


def test_position_embeddings_are_resampled_as_timm_does():
    large = replace(helpers.PICO, image_size=64)
    state = helpers.pico(spec=large).state_dict()
    backbone = helpers.pico(1)
    weights.load_weights(backbone, weights_of(state, large))
    expected = resample_abs_pos_embed(state["pos_embed"], [2, 2], [4, 4])
    assert torch.equal(backbone.pos_embed, expected) and expected.shape == (1, 5, 64)
    assert torch.equal(backbone.cls_token, state["cls_token"])
    assert state["pos_embed"].shape == (1, 17, 64), "the weights read keep their own grid"


def test_safetensors_round_trip(tmp_path):
    spec = replace(helpers.PICO, mean=(0.4, 0.3, 0.2), std=(0.25, 0.2, 0.15))
    backbone, run = helpers.pico(spec=spec), tmp_path / "run"
    weights.save_backbone(backbone, run / "backbone.safetensors", {"data": "somewhere", "seed": 3})
    (run / "config.yaml").write_text("seed: 3\n")
    for source in (run, run / "backbone.safetensors"):
        found = read_weights(str(source))
        assert found.run == run and found.run_options == {"data": "somewhere", "seed": 3}
        assert same(load_backbone(found).state_dict(), backbone.state_dict())
        assert (tuple(found.spec.mean), tuple(found.spec.std)) == (spec.mean, spec.std)
    assert newest_run(tmp_path) == run
    with safe_open(run / "backbone.safetensors", framework="pt") as file:
        meta = file.metadata()
        assert set(file.keys()) == set(backbone.state_dict())
    assert json.loads(meta["ssrl"])["spec"]["arch"] == "vit_pico" and meta["architecture"] == ""
    weights.save_backbone(
        Backbone(BackboneSpec("vit_tiny", 16, 224)), tmp_path / "tiny.safetensors", {}
    )
    with safe_open(tmp_path / "tiny.safetensors", framework="pt") as file:
        assert file.metadata()["architecture"] == "vit_tiny_patch16_224"
    assert found.spec == spec  # FAILS UNTIL FIXED: JSON gives mean and std back as lists


@pytest.mark.parametrize("arch", list(ARCHS))
@pytest.mark.parametrize("patch, image", [(8, 224), (16, 224), (16, 64)])
def test_architecture_and_sizes_are_told_from_the_weights(arch, patch, image):
    with torch.device("meta"):
        state = Backbone(BackboneSpec(arch, patch, image)).state_dict()
    assert weights.infer_spec(state, "x.pth") == BackboneSpec(arch, patch, image)


def test_weights_of_something_else_are_refused(tmp_path):
    resnet = {"conv1.weight": torch.zeros(64, 3, 7, 7)}
    deeper = helpers.pico().state_dict() | {"blocks.2.norm1.weight": torch.zeros(64)}
    odd = helpers.pico().state_dict() | {"pos_embed": torch.zeros(1, 7, 64)}
    contents = [resnet, deeper, odd, {}, {"epoch": 3}, [1, 2], torch.zeros(3)]
    for number, content in enumerate(contents):
        torch.save(content, tmp_path / f"{number}.pth")
        with pytest.raises(InputError, match=rf"{number}\.pth"):
            read_weights(str(tmp_path / f"{number}.pth"))


# -------------------------------------------------------------------- files that must not be read


class Harmful:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_would_run_code_is_refused(tmp_path, zipped):
    marker = tmp_path / "was-here"
    content = {"teacher": helpers.pico().state_dict(), "args": Harmful(marker)}
    path = tmp_path / "harmful.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"harmful\.pth.*refused"):
        read_weights(str(path))
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists(), "the file of this test would have run its code"


def turned(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x80]) + data[at + 1 :]


@pytest.mark.parametrize(
    "zipped",
    [True, False],  # FAILS UNTIL FIXED for False: torch's unpickler raises IndexError, KeyError ...
)
def test_damaged_pth_files_are_refused_with_their_name(tmp_path, zipped):
    state, whole, path = helpers.pico().state_dict(), tmp_path / "whole.pth", tmp_path / "bad.pth"
    torch.save({"teacher": state}, whole, _use_new_zipfile_serialization=zipped)
    data = whole.read_bytes()
    for length in (0, 1, 3, 40, 700, 2000, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(InputError, match=r"bad\.pth"):
            read_weights(str(path))
    for at in [*range(0, 2000, 67), *range(3000, len(data), 60_000)]:
        path.write_bytes(turned(data, at))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found = read_weights(str(path))
            except InputError as error:
                assert "bad.pth" in str(error)
            else:  # a byte that does not count; the older format has no checksums
                assert same(found.state, state) or not zipped


def test_damaged_safetensors_files_are_refused_with_their_name(tmp_path):
    path = tmp_path / "bad.safetensors"
    weights.save_backbone(helpers.pico(), path, {})
    data = path.read_bytes()
    cuts = [data[:length] for length in (0, 7, 100, len(data) // 2, len(data) - 1)]
    for content in (*cuts, b"<html>404</html>", b"\xff" * 64, b"\x08" + b"\0" * 7 + b"{"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"bad\.safetensors"):
            read_weights(str(path))


def test_what_is_not_there_is_an_error_that_says_how_to_mend_it(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    for name in ("nothing.pth", "empty", "no/where.safetensors"):
        with pytest.raises(InputError, match=r"no such weights"):
            read_weights(str(tmp_path / name))
    with pytest.raises(InputError, match=r"python SSRL\.py"):
        newest_run(tmp_path)

    def offline(name, **settings):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(InputError, match=r"could not be downloaded.*no route to host"):
        read_weights("timm:vit_small_patch8_224.dino")
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: pytest.fail("asked the network"))
    with pytest.raises(InputError, match="timm has no such model"):
        read_weights("timm:vit_of_nowhere")


def test_weights_of_timm_bring_their_normalisation_and_own_name(monkeypatch):
    class Tagged(Backbone):
        pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.4, 0.4, 0.4)}

    monkeypatch.setattr(timm, "create_model", lambda name, **settings: Tagged(helpers.PICO))
    names = "timm:vit_small_patch8_224.dino", "timm:vit_small_patch8_224.augreg"
    first, second = (read_weights(name) for name in names)
    assert first.spec.mean == (0.5,) * 3 and first.spec.std == (0.4,) * 3
    assert first.path == names[0] and first.sha256 != second.sha256
    assert len(first.sha256) == 64, "it becomes part of a folder's name"


def test_a_file_of_the_teacher_alone_is_not_taken_for_the_student(tmp_path):
    path = tmp_path / "backbone.safetensors"
    weights.save_backbone(helpers.pico(), path, {})
    with pytest.raises(InputError, match="checkpoint.pth"):
        read_weights(str(path), "student")


# --------------------------------------------------------------------------------- files of weights


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("ran.txt"),)


def test_code_in_a_file_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"teacher": {"w": torch.ones(2)}, "args": Evil()}, "new.pth")
    torch.save({"args": Evil()}, "old.pth", _use_new_zipfile_serialization=False)
    Path("plain.pth").write_bytes(pickle.dumps(Evil()))
    for name in ("new.pth", "old.pth", "plain.pth"):
        with pytest.raises(InputError, match=name):
            load_torch(Path(name))
    assert not Path("ran.txt").exists()
    torch.load("new.pth", weights_only=False)
    assert Path("ran.txt").exists()  # it would have


def test_files_of_dino_load(tmp_path):
    arguments = argparse.Namespace(arch="vit_small", lr=5e-4, scale=(0.4, 1.0), clip=None)
    content = {
        "student": {"module.w": torch.arange(3.0)},
        "args": arguments,
        "epoch": 3,
        "loss": np.float64(1.5),
        "accuracy": np.float32(0.5),
        "count": np.int64(4),
    }
    path = tmp_path / "dino.pth"
    torch.save(content, path)
    older = tmp_path / "older.pth"  # as numpy 1 names its scalars
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(older, "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name).replace(b"numpy._core.", b"numpy.core."))
    torch.save(content, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    for file in (path, older, tmp_path / "legacy.pth"):
        loaded = load_torch(file)
        assert loaded["args"] == arguments and loaded["epoch"] == 3
        assert (loaded["loss"], loaded["accuracy"], loaded["count"]) == (1.5, 0.5, 4)
        torch.testing.assert_close(loaded["student"]["module.w"], torch.arange(3.0))


@pytest.mark.parametrize("kept", [0, 4, 100, 600, -1])
def test_cut_off_files_are_named(tmp_path, kept):
    path = tmp_path / "cut.pth"
    torch.save({"w": torch.arange(200.0)}, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match="cut.pth"):
        load_torch(path)


@pytest.mark.parametrize("text", ["<!DOCTYPE html>", "version https://git-lfs.github.com/spec/v1"])
def test_what_is_no_weights_is_not_called_dangerous(tmp_path, text):
    path = tmp_path / "page.pth"
    path.write_text(text)
    with pytest.raises(InputError, match="page.pth") as caught:
        load_torch(path)
    assert "run its code" not in str(caught.value)


def test_missing_file_and_folder_are_named(tmp_path):
    for path in (tmp_path / "absent.pth", tmp_path):
        with pytest.raises(InputError, match=path.name):
            load_torch(path)


def test_flipped_bits_are_found(tmp_path):
    path, rng = tmp_path / "flipped.pth", random.Random(0)
    tensor = torch.arange(50.0)
    torch.save({"w": tensor, "step": 3}, path)
    good = path.read_bytes()
    refused = 0
    for _ in range(400):
        data = bytearray(good)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            loaded = load_torch(path)
        except InputError as error:
            assert "flipped.pth" in str(error)
            refused += 1
        else:  # a bit that means nothing
            assert loaded["step"] == 3 and torch.equal(loaded["w"], tensor)
    assert refused > 50


def test_failing_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    save_torch({"step": 1}, path)

    def full(state, target):
        Path(target).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError):
        save_torch({"step": 2}, path)
    assert load_torch(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pth"]
