"""weights.py: other projects' files, read into networks whose features must be timm's own.

Each file is written here, name by name, from a small random network of timm.
Run it with `python -m pytest tests/test_name_rules.py`.
"""

import argparse
import json
import logging

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf

import vision_transformer
import weights
from utils import InputError
from vision_transformer import ARCHS, IMAGENET_MEAN, Architecture
from weights import load_backbone, read_weights

SIDE = 32  # of the images; all patches but DINOv2's have 16 pixels
PLAIN = "vit_small_patch16_224"
DINOV2 = "vit_small_patch14_dinov2"
REGISTERS = "vit_small_patch14_reg4_dinov2"

# Small networks under names that files and users know. Two pairs differ in heads alone.
TINY = {
    "vit_tiny": Architecture(PLAIN, {"embed_dim": 48, "depth": 2, "num_heads": 3}),
    "vit_small": Architecture(PLAIN, {"embed_dim": 96, "depth": 2, "num_heads": 6}),
    "vit_small_h12": Architecture(PLAIN, {"embed_dim": 96, "depth": 2, "num_heads": 12}),
    "vit_base": Architecture(PLAIN, {"embed_dim": 144, "depth": 2, "num_heads": 12}),
    "tiny_dinov2": Architecture(DINOV2, {"embed_dim": 48, "depth": 2, "num_heads": 3}),
    "tiny_reg4": Architecture(REGISTERS, {"embed_dim": 48, "depth": 2, "num_heads": 3}),
    "tiny_swiglu": Architecture(
        "vit_giant_patch14_dinov2", {"embed_dim": 96, "depth": 2, "num_heads": 4}
    ),
}


@pytest.fixture(autouse=True)
def tiny_architectures(monkeypatch):
    """Let the short names stand for networks of two blocks, and leave large ones unsought."""
    for name in ("vit_nano", "vit_large"):
        monkeypatch.delitem(ARCHS, name)
    for name, architecture in TINY.items():
        monkeypatch.setitem(ARCHS, name, architecture)
    monkeypatch.setattr(timm, "list_models", lambda *_filters, **_settings: [])


def network_of(name: str, seed: int = 0, side: int = SIDE, **changes):
    """Return timm's own network of a name of TINY, all parameters random."""
    torch.manual_seed(seed)
    settings = {"num_classes": 0, "img_size": side} | TINY[name].changes | changes
    network = timm.create_model(TINY[name].timm_name, **settings)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network.eval()


@torch.no_grad()
def assert_same_features(found: weights.Weights, network) -> None:
    """Check that the backbone of `found` gives what timm's network gives."""
    side = network.patch_embed.img_size[0]
    images = torch.randn(2, 3, side, side)
    features = load_backbone(found)(images)
    torch.testing.assert_close(features, network(images), atol=1e-5, rtol=1e-5)


def prefixed(state: dict, prefix: str) -> dict:
    """Return a state dict with a prefix before each name."""
    return {prefix + name: value for name, value in state.items()}


def named_anew(state: dict, names: list[tuple[str, str]]) -> dict:
    """Return a state dict in which parts of names are replaced, literally."""
    renamed = {}
    for name, value in state.items():
        for old, new in names:
            name = name.replace(old, new)
        renamed[name] = value
    return renamed


# -------------------------------------------------------------------------------------------- timm


@pytest.mark.parametrize("kind", ["folder", "model.safetensors", "pytorch_model.bin"])
def test_what_timm_saves_for_the_hub(tmp_path, kind):
    network = timm.create_model("test_vit", num_classes=0, img_size=SIDE).eval()
    save_for_hf(network, tmp_path, safe_serialization="both")
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"] |= {"mean": [0.5, 0.4, 0.3], "std": [0.3, 0.2, 0.1]}
    (tmp_path / "config.json").write_text(json.dumps(config))

    found = read_weights(str(tmp_path if kind == "folder" else tmp_path / kind))
    assert (found.spec.arch, found.spec.image_size) == ("test_vit", SIDE)
    assert found.spec.mean == (0.5, 0.4, 0.3) and found.spec.std == (0.3, 0.2, 0.1)
    assert_same_features(found, network)


def test_the_classifier_of_a_timm_file_is_left_out_and_named(tmp_path, caplog):
    network = network_of("vit_base", num_classes=7)
    torch.save(network.state_dict(), tmp_path / "trained.pth")
    with caplog.at_level(logging.INFO, logger="ssrl"):
        found = read_weights(str(tmp_path / "trained.pth"))
    assert "left out 2 names, first head.weight, head.bias" in caplog.text
    network.reset_classifier(0)
    assert_same_features(found, network)


def test_pooling_other_than_the_architectures_own(tmp_path):
    for pooling in ("avg", "max"):
        network = timm.create_model("test_vit", num_classes=0, img_size=SIDE, global_pool=pooling)
        save_for_hf(network, tmp_path, safe_serialization=True)
        found = read_weights(str(tmp_path))
        assert found.spec.pooling == pooling
        assert_same_features(found, network.eval())


def test_metadata_in_the_header_of_a_safetensors_file(tmp_path):
    network = network_of("vit_small_h12")
    configuration = {"input_size": [3, SIDE, SIDE], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    header = {"architecture": "vit_small_h12", "pretrained_cfg": json.dumps(configuration)}
    save_file(network.state_dict(), tmp_path / "a.safetensors", metadata=header)
    found = read_weights(str(tmp_path / "a.safetensors"))
    assert found.spec.arch == "vit_small_h12" and found.spec.mean == (0.1, 0.2, 0.3)
    assert_same_features(found, network)


def test_a_checkpoint_of_timms_training_script(tmp_path):
    name = "test_vit"
    network = timm.create_model(name, num_classes=0).eval()
    content = {"arch": name, "state_dict": network.state_dict(), "epoch": 3}
    content["args"] = argparse.Namespace(model=name)
    torch.save(content, tmp_path / "last.pth.tar")
    found = read_weights(str(tmp_path / "last.pth.tar"))
    assert found.spec.arch == name
    assert_same_features(found, network)


def test_a_short_name_in_a_script_s_checkpoint_does_not_say_how_many_heads_there_are(tmp_path):
    """MoCo v3's linear probe writes such files, and its vit_small has 12."""
    network = network_of("vit_small_h12")
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    path = tmp_path / "linear.pth.tar"
    torch.save({"arch": "vit_small", "state_dict": state, "epoch": 90}, path)
    with pytest.raises(InputError, match="expected --arch vit_small .* or vit_small_h12"):
        read_weights(str(path))
    assert_same_features(read_weights(str(path), arch="vit_small_h12"), network)


def test_changes_that_weights_do_not_show_are_refused(tmp_path):
    network = timm.create_model("test_vit", num_classes=0).eval()
    config = {"architecture": "test_vit", "model_args": {"num_classes": 0}}
    torch.save(network.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same_features(read_weights(str(tmp_path)), network)
    config["model_args"]["act_layer"] = "relu"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="model_args has 'act_layer'"):
        read_weights(str(tmp_path))


def test_a_configuration_beside_a_file_of_another_name_is_another_networks(tmp_path):
    network = network_of("vit_tiny")
    torch.save(network.state_dict(), tmp_path / "dino.pth")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_base_patch16_224"}))
    assert_same_features(read_weights(str(tmp_path / "dino.pth"), arch="vit_tiny"), network)


def test_networks_without_position_embedding_have_the_size_that_their_configuration_says(tmp_path):
    changes = {"embed_dim": 64, "depth": 1, "num_heads": 1, "num_classes": 0}
    network = timm.create_model("vit_small_patch16_dinov3", **changes).eval()
    config = {"architecture": "rope", "pretrained_cfg": {"input_size": [3, 96, 96]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(network.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHS, "rope", Architecture("vit_small_patch16_dinov3", changes))
        changes.pop("num_classes")
        found = read_weights(str(tmp_path))
        assert found.spec.image_size == 96
        images = torch.randn(1, 3, 96, 96)
        with torch.no_grad():
            expected = network.forward_features(images)[:, 0]
            torch.testing.assert_close(load_backbone(found)(images), expected)


# ------------------------------------------------------------------------- DINO, iBOT, DINOv2, MAE


@pytest.mark.parametrize("key", ["teacher", "student"])
@pytest.mark.parametrize("arguments", [argparse.Namespace, dict])
def test_dino_says_its_architecture_among_its_arguments(tmp_path, key, arguments):
    networks = {"teacher": network_of("vit_small", 0), "student": network_of("vit_small", 1)}
    content = {"args": arguments(arch="deit_small", patch_size=16)}
    for name, network in networks.items():
        state = prefixed(network.state_dict(), "module.backbone.")
        state["module.head.mlp.0.weight"] = torch.zeros(3, 3)
        state["module.head.last_layer.weight_g"] = torch.zeros(3, 1)
        content[name] = state
    torch.save(content, tmp_path / "checkpoint.pth")
    found = read_weights(str(tmp_path / "checkpoint.pth"), key)
    assert found.spec == vision_transformer.BackboneSpec("vit_small", 16, SIDE)
    assert_same_features(found, networks[key])


def test_backbone_of_dino_alone_needs_a_word_on_its_heads(tmp_path):
    path = tmp_path / "dino_deitsmall16_pretrain.pth"
    torch.save(network_of("vit_small").state_dict(), path)
    with pytest.raises(InputError) as error:
        read_weights(str(path))
    expected = (
        "--arch vit_small (6 heads) or vit_small_h12 (12 heads) (96 wide, 2 blocks, patch 16)"
    )
    assert expected in str(error.value)
    for arch in ("vit_small", "vit_small_h12"):
        assert_same_features(read_weights(str(path), arch=arch), network_of(arch))


def test_ibot(tmp_path):
    network = network_of("vit_base")
    state = prefixed(network.state_dict(), "backbone.")
    state |= {
        "backbone.masked_embed": torch.zeros(1, 144),
        "head.last_layer2.weight": torch.ones(2),
    }
    content = {"teacher": state, "args": argparse.Namespace(arch="vit_base")}
    torch.save(content, tmp_path / "ibot.pth")
    assert_same_features(read_weights(str(tmp_path / "ibot.pth")), network)


@pytest.mark.parametrize("arch", ["tiny_dinov2", "tiny_reg4", "tiny_swiglu"])
def test_dinov2_under_timms_names(tmp_path, arch):
    network = network_of(arch, side=28)
    torch.save(network.state_dict(), tmp_path / "model.pth")
    found = read_weights(str(tmp_path / "model.pth"))
    assert (found.spec.arch, found.spec.patch_size, found.spec.image_size) == (arch, 14, 28)
    assert_same_features(found, network)


def as_meta_writes(network) -> dict:
    """Return a network of timm under DINOv2's own names."""
    state = network.state_dict()
    if network.num_prefix_tokens > 1:
        position = torch.randn(1, 1, network.embed_dim)
        state["cls_token"] = state["cls_token"] - position
        state["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
        state["register_tokens"] = state.pop("reg_token")
    if "blocks.0.mlp.fc1_g.weight" in state or network.embed_dim == 96:
        state = named_anew(state, [(".mlp.fc1.", ".mlp.w12."), (".mlp.fc2.", ".mlp.w3.")])
    state["mask_token"] = torch.zeros(1, network.embed_dim)
    return state


@pytest.mark.parametrize("arch", ["tiny_dinov2", "tiny_reg4", "tiny_swiglu"])
def test_dinov2_under_its_own_names(tmp_path, arch):
    network = network_of(arch, side=28)
    torch.save(as_meta_writes(network), tmp_path / "pretrain.pth")
    found = read_weights(str(tmp_path / "pretrain.pth"))
    assert found.spec.arch == arch
    assert_same_features(found, network)


def test_a_teacher_that_dinov2_trained_with_its_blocks_in_chunks(tmp_path):
    network = network_of("tiny_dinov2", side=28)
    state = named_anew(as_meta_writes(network), [("blocks.0.", "blocks.0.0."), ("blocks.1.", "x")])
    state = named_anew(prefixed(state, "backbone."), [(".x", ".blocks.1.1.")])
    state |= {"dino_head.mlp.0.weight": torch.ones(2), "ibot_head.mlp.0.weight": torch.ones(2)}
    torch.save({"teacher": state}, tmp_path / "teacher_checkpoint.pth")
    assert_same_features(read_weights(str(tmp_path / "teacher_checkpoint.pth")), network)


def test_mae_and_retfound_as_pretrained(tmp_path, caplog):
    network = network_of("vit_base")
    state = network.state_dict()
    for name in ("mask_token", "decoder_pos_embed", "decoder_blocks.0.norm1.weight"):
        state[name] = torch.zeros(1, 1, 8)
    content = {"model": state, "args": argparse.Namespace(model="mae_vit_base_patch16"), "epoch": 1}
    torch.save(content, tmp_path / "RETFound_cfp_weights.pth")
    with caplog.at_level(logging.INFO, logger="ssrl"):
        found = read_weights(str(tmp_path / "RETFound_cfp_weights.pth"))
    assert "left out 3 names, first mask_token, decoder_pos_embed" in caplog.text
    assert found.spec.arch == "vit_base" and found.spec.pooling == ""
    assert_same_features(found, network)


def test_mae_and_retfound_as_fine_tuned_pool_their_patches(tmp_path):
    network = network_of("vit_base", global_pool="avg", num_classes=5)
    torch.save({"model": network.state_dict()}, tmp_path / "checkpoint-best.pth")
    found = read_weights(str(tmp_path / "checkpoint-best.pth"))
    assert found.spec.pooling == "avg"
    network.reset_classifier(0)
    assert_same_features(found, network)


# ------------------------------------------------------------------------------------ Hugging Face

# Names of one block, in timm and in files of transformers.
VIT_BLOCK = [
    ("norm1", "layernorm_before"),
    ("norm2", "layernorm_after"),
    ("attn.proj", "attention.output.dense"),
    ("mlp.fc1", "intermediate.dense"),
    ("mlp.fc2", "output.dense"),
]
DINOV2_BLOCK = [
    ("norm1", "norm1"),
    ("norm2", "norm2"),
    ("attn.proj", "attention.output.dense"),
    ("mlp.fc1", "mlp.fc1"),
    ("mlp.fc2", "mlp.fc2"),
]


def as_transformers_writes(network, names, layer: str, attention: list[str]) -> dict:
    """Return a network of timm under the names of transformers, layer by layer."""
    timm_state = as_meta_writes(network) if network.num_prefix_tokens > 1 else network.state_dict()
    state = {
        "embeddings.cls_token": timm_state["cls_token"],
        "embeddings.position_embeddings": timm_state["pos_embed"],
        "layernorm.weight": timm_state["norm.weight"],
        "layernorm.bias": timm_state["norm.bias"],
    }
    if "register_tokens" in timm_state:
        state["embeddings.register_tokens"] = timm_state["register_tokens"]
    for end in ("weight", "bias"):
        value = timm_state[f"patch_embed.proj.{end}"]
        state[f"embeddings.patch_embeddings.projection.{end}"] = value
    for block in range(len(network.blocks)):
        old, new = f"blocks.{block}.", f"{layer}.{block}."
        for end in ("weight", "bias"):
            parts = timm_state[f"{old}attn.qkv.{end}"].chunk(3)
            for name, part in zip(attention, parts, strict=True):
                state[f"{new}{name}.{end}"] = part.clone()
            for ours, theirs in names:
                state[f"{new}{theirs}.{end}"] = timm_state[f"{old}{ours}.{end}"]
        for number in (1, 2):
            if f"{old}ls{number}.gamma" in timm_state:
                scale = timm_state[f"{old}ls{number}.gamma"]
                state[f"{new}layer_scale{number}.lambda1"] = scale
    return state


OLD_ATTENTION = [f"attention.attention.{name}" for name in ("query", "key", "value")]
NEW_ATTENTION = [f"attention.{name}_proj" for name in "qkv"]


def write_folder(folder, state, config, mean=None):
    """Write what transformers' save_pretrained writes."""
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    if mean:
        processor = {"image_mean": mean, "image_std": [0.2, 0.3, 0.4]}
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))


@pytest.mark.parametrize("prefix", ["", "vit."])
@pytest.mark.parametrize("arch", ["vit_small", "vit_small_h12"])
def test_vit_of_hugging_face_with_the_heads_of_its_config(tmp_path, prefix, arch):
    network = network_of(arch)
    state = as_transformers_writes(network, VIT_BLOCK, "encoder.layer", OLD_ATTENTION)
    state = prefixed(state, prefix)
    state |= {f"{prefix}pooler.dense.bias": torch.ones(2), "classifier.bias": torch.ones(2)}
    state |= {"decoder.mask_token": torch.ones(2), "decoder.decoder_pred.weight": torch.ones(2)}
    heads = TINY[arch].changes["num_heads"]
    write_folder(tmp_path, state, {"num_attention_heads": heads}, mean=[0.5, 0.5, 0.5])
    found = read_weights(str(tmp_path))
    assert (found.spec.arch, found.spec.mean) == (arch, (0.5, 0.5, 0.5))
    assert found.spec.std == (0.2, 0.3, 0.4)
    assert_same_features(found, network)


def test_vit_of_hugging_face_under_its_newer_names(tmp_path):
    network = network_of("vit_base")
    newer = [*VIT_BLOCK[:2], ("attn.proj", "attention.o_proj"), *DINOV2_BLOCK[3:]]
    state = as_transformers_writes(network, newer, "layers", NEW_ATTENTION)
    torch.save(state, tmp_path / "model.pth")
    assert_same_features(read_weights(str(tmp_path / "model.pth")), network)


@pytest.mark.parametrize("arch", ["tiny_dinov2", "tiny_reg4"])
@pytest.mark.parametrize("prefix", ["", "dinov2.", "dinov2_with_registers."])
def test_dinov2_of_hugging_face(tmp_path, arch, prefix):
    network = network_of(arch, side=28)
    state = as_transformers_writes(network, DINOV2_BLOCK, "encoder.layer", OLD_ATTENTION)
    state["embeddings.mask_token"] = torch.zeros(1, 48)
    write_folder(tmp_path, prefixed(state, prefix), {"num_attention_heads": 3})
    found = read_weights(str(tmp_path))
    assert (found.spec.arch, found.spec.mean) == (arch, IMAGENET_MEAN)
    assert_same_features(found, network)


@pytest.mark.parametrize("newer", [False, True])
def test_swiglu_of_hugging_face(tmp_path, newer):
    network = network_of("tiny_swiglu", side=28)
    block = [*DINOV2_BLOCK[:3], ("mlp.fc1", "mlp.weights_in"), ("mlp.fc2", "mlp.weights_out")]
    state = as_transformers_writes(network, block, "encoder.layer", OLD_ATTENTION)
    if newer:
        state = named_anew(state, [("weights_out", "down_proj")])
        for name in [name for name in state if "weights_in" in name]:
            gate, up = state.pop(name).chunk(2)
            state[name.replace("weights_in", "gate_proj")] = gate.clone()
            state[name.replace("weights_in", "up_proj")] = up.clone()
    write_folder(tmp_path, state, {"num_attention_heads": 4})
    assert_same_features(read_weights(str(tmp_path)), network)


def test_what_a_config_of_hugging_face_says_and_we_cannot_do_is_refused(tmp_path):
    network = network_of("vit_small")
    state = as_transformers_writes(network, VIT_BLOCK, "encoder.layer", OLD_ATTENTION)
    write_folder(tmp_path, state, {"num_attention_heads": 6, "hidden_act": "quick_gelu"})
    with pytest.raises(InputError, match="quick_gelu"):
        read_weights(str(tmp_path))
    write_folder(tmp_path, state, {"num_attention_heads": 3})
    with pytest.raises(InputError, match=r"--arch vit_small \(6 heads\) or .*patch 16, 3 heads"):
        read_weights(str(tmp_path))
    with pytest.raises(InputError, match=r"has 3 heads; expected vit_small \(6 heads\)"):
        read_weights(str(tmp_path), arch="vit_small")


# --------------------------------------------------------------------- MoCo v3, solo-learn, Lightly


@pytest.mark.parametrize(
    "key, encoder", [("teacher", "momentum_encoder"), ("student", "base_encoder")]
)
def test_moco_v3_whose_small_vit_has_12_heads(tmp_path, key, encoder):
    networks = {
        "momentum_encoder": network_of("vit_small_h12", 0),
        "base_encoder": network_of("vit_small_h12", 1),
    }
    state = {"module.predictor.0.weight": torch.ones(2)}
    for name, network in networks.items():
        state |= prefixed(network.state_dict(), f"module.{name}.")
        state[f"module.{name}.head.0.weight"] = torch.ones(2)
    torch.save({"arch": "vit_small", "state_dict": state}, tmp_path / "moco.pth.tar")
    found = read_weights(str(tmp_path / "moco.pth.tar"), key)
    assert found.spec.arch == "vit_small_h12"
    assert_same_features(found, networks[encoder])
    with pytest.raises(InputError, match=r"of vit_small_h12 \(12 heads\), not of vit_small \(6"):
        read_weights(str(tmp_path / "moco.pth.tar"), key, arch="vit_small")


def write_solo(folder, networks, arguments):
    """Write a checkpoint as solo-learn does, and its arguments beside it."""
    state = {"projector.0.weight": torch.ones(2), "momentum_projector.0.weight": torch.ones(2)}
    state |= {"classifier.weight": torch.ones(2), "predictor.0.weight": torch.ones(2)}
    for prefix, network in networks.items():
        state |= prefixed(network.state_dict(), prefix)
    content = {"state_dict": state, "epoch": 3, "pytorch-lightning_version": "1.9.0"}
    torch.save(content, folder / "solo.ckpt")
    if arguments:
        (folder / "args.json").write_text(json.dumps(arguments))
    return str(folder / "solo.ckpt")


@pytest.mark.parametrize("method, arch", [("mocov3", "vit_small_h12"), ("dino", "vit_small")])
def test_solo_learn_with_a_teacher(tmp_path, method, arch):
    networks = {"momentum_backbone.": network_of(arch, 0), "backbone.": network_of(arch, 1)}
    arguments = {"method": method, "backbone": {"name": "vit_small"}}
    path = write_solo(tmp_path, networks, arguments)
    assert read_weights(path).spec.arch == arch
    assert_same_features(read_weights(path), networks["momentum_backbone."])
    assert_same_features(read_weights(path, "student"), networks["backbone."])


def test_solo_learn_with_one_network_and_without_its_arguments(tmp_path):
    network = network_of("vit_tiny")
    path = write_solo(tmp_path, {"backbone.": network}, None)
    with pytest.raises(InputError, match=r"expected --arch vit_tiny \(3 heads\)"):
        read_weights(path)
    assert_same_features(read_weights(path, arch="vit_tiny"), network)


@pytest.mark.parametrize(
    "teacher, student",
    [
        ("teacher_backbone.vit.", "student_backbone.vit."),
        ("teacher_backbone.", "student_backbone."),
        ("backbone.vit.", "student_backbone.vit."),
    ],
)
def test_lightly(tmp_path, teacher, student):
    networks = {teacher: network_of("vit_base", 0), student: network_of("vit_base", 1)}
    state = {"projection_head.layers.0.weight": torch.ones(2), "criterion.center": torch.ones(2)}
    state |= {"student_head.layers.0.weight": torch.ones(2), "online_classifier.a": torch.ones(2)}
    for prefix, network in networks.items():
        state |= prefixed(network.state_dict(), prefix)
        state[prefix + "head.weight"] = torch.ones(2)
        state[prefix.removesuffix("vit.") + "mask_token"] = torch.ones(2)
    torch.save({"state_dict": state}, tmp_path / "lightly.ckpt")
    path = str(tmp_path / "lightly.ckpt")
    assert_same_features(read_weights(path), networks[teacher])
    assert_same_features(read_weights(path, "student"), networks[student])


# ---------------------------------------------------------------------------------- what is refused


def test_an_architecture_that_the_file_contradicts_is_refused(tmp_path):
    state = network_of("vit_small").state_dict()
    content = {"teacher": state, "args": argparse.Namespace(arch="vit_small")}
    torch.save(content, tmp_path / "dino.pth")
    path = str(tmp_path / "dino.pth")
    with pytest.raises(InputError, match=r"not of vit_small_h12 .*expected --arch vit_small$"):
        read_weights(path, arch="vit_small_h12")
    with pytest.raises(InputError, match=r"does not fit vit_base, patch 16\n.*instead of"):
        read_weights(path, arch="vit_base")
    with pytest.raises(InputError, match="timm has no such network"):
        read_weights(path, arch="vit_smal")


def test_an_architecture_that_shapes_contradict_is_refused(tmp_path):
    content = {"teacher": network_of("vit_tiny").state_dict()}
    content["args"] = argparse.Namespace(arch="vit_base")
    torch.save(content, tmp_path / "dino.pth")
    with pytest.raises(InputError, match="does not fit vit_base, patch 16"):
        read_weights(str(tmp_path / "dino.pth"))


def test_names_that_no_rule_knows_are_refused(tmp_path):
    state = network_of("vit_base").state_dict() | {"adapter.weight": torch.ones(2)}
    torch.save(state, tmp_path / "adapted.pth")
    with pytest.raises(InputError, match=r"(?s)does not fit vit_base.*unexpected: adapter\.weight"):
        read_weights(str(tmp_path / "adapted.pth"))


def test_a_layer_in_part_is_refused(tmp_path):
    network = network_of("vit_base")
    state = as_transformers_writes(network, VIT_BLOCK, "encoder.layer", OLD_ATTENTION)
    del state["encoder.layer.1.attention.attention.value.weight"]
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(InputError, match=r"(?s)missing: blocks\.1\.attn\.qkv\.weight\n"):
        read_weights(str(tmp_path / "part.pth"))


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"architecture": "test_vit", "pretrained_cfg": {"mean": [0.5]}}']
)
def test_a_damaged_configuration_beside_the_file_is_refused(tmp_path, text):
    network = timm.create_model("test_vit", num_classes=0)
    torch.save(network.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=str(tmp_path)):
        read_weights(str(tmp_path))


def test_two_names_of_one_weight_are_refused(tmp_path):
    network = network_of("tiny_dinov2", side=28)
    state = network.state_dict()
    state["blocks.0.1.norm1.weight"] = state["blocks.1.norm1.weight"] + 1
    torch.save(state, tmp_path / "twice.pth")
    with pytest.raises(InputError, match=r"two of its names stand for timm's blocks\.1\.norm1\.w"):
        read_weights(str(tmp_path / "twice.pth"))


def test_a_checkpoint_without_the_network_asked_for_is_refused(tmp_path):
    state = prefixed(network_of("vit_base").state_dict(), "student_backbone.")
    torch.save({"state_dict": state}, tmp_path / "lightly.ckpt")
    with pytest.raises(InputError, match=r"no weights of the teacher \(--checkpoint-key"):
        read_weights(str(tmp_path / "lightly.ckpt"))
