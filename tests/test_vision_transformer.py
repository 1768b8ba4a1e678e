"""vision_transformer.py against an untouched timm model, and its reading and writing of weights.

Run it with `python -m pytest tests/test_vision_transformer.py`.
"""

from functools import cache

import pytest
import timm
import torch
from timm.layers import set_fused_attn
from timm.utils import AttentionExtract
from torch import nn

import vision_transformer as vt
from utils import InputError
from vision_transformer import Backbone, BackboneSpec, ProjectionHead

TINY = BackboneSpec("vit_tiny", 16, 224)


@cache
def reference(fused: bool = True) -> nn.Module:
    """timm's own ViT-Ti/16 with random parameters throughout."""
    set_fused_attn(fused)
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, num_classes=0)
    set_fused_attn(True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def ours() -> Backbone:
    backbone = Backbone(TINY).eval()
    backbone.load_state_dict(reference().state_dict())
    return backbone


# ------------------------------------------------------------------------------ the same as timm's


@pytest.mark.parametrize(
    "size, batch, training", [(96, 3, True), (96, 3, False), (224, 2, False), (480, 1, False)]
)
def test_output_and_gradients_are_timms(size, batch, training):
    theirs, mine = reference().train(training), ours().train(training)
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(size))
    slope, found = torch.randn(batch, 192), {}
    for name, model in (("theirs", theirs), ("mine", mine)):
        asked = images.clone().requires_grad_()
        output = model(asked)
        model.zero_grad()
        (output * slope).sum().backward()
        grads = {n.removeprefix("vit."): p.grad.clone() for n, p in model.named_parameters()}
        found[name] = {"output": output.detach(), "images": asked.grad} | grads
    theirs.zero_grad()
    theirs.eval()
    assert found["mine"].keys() == found["theirs"].keys()
    for name, expected in found["theirs"].items():
        error = (found["mine"][name] - expected).abs().max()
        assert error <= 1e-5 * max(1.0, float(expected.abs().max())), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_stochastic_depth_and_checkpointing_are_timms(checkpointing):
    """The same samples are dropped from the same state of the generator."""
    rate = 0.4
    theirs = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, drop_path_rate=rate)
    theirs.reset_classifier(0)
    mine = Backbone(TINY, rate)
    mine.checkpointing = checkpointing
    images, found = torch.randn(6, 3, 96, 96), {}
    for name, model in (("theirs", theirs), ("mine", mine)):
        model.load_state_dict(reference().state_dict())
        torch.manual_seed(3)
        output = model.train()(images)
        output.square().sum().backward()
        found[name] = [output.detach(), *(p.grad for p in model.parameters())]
    dropped = [torch.equal(a, reference()(images)) for a in found["mine"][:1]]
    assert dropped == [False], "something was dropped"
    for one, other in zip(*found.values(), strict=True):
        assert (one - other).abs().max() <= 1e-5 * max(1.0, float(other.abs().max()))


def test_checkpointing_keeps_less_for_gradients(monkeypatch):
    """Bytes that a forward pass leaves for the backward one."""
    images, kept = torch.randn(4, 3, 224, 224), {}
    for checkpointing in (False, True):
        backbone, sizes = ours().train(), {}
        backbone.checkpointing = checkpointing

        def note(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = backbone(images)
        kept[checkpointing] = sum(sizes.values())
        assert output.requires_grad
    assert 5 * kept[True] < kept[False]


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize(("tokens", "asked"), [(5, 5), (200, 1), (300, 300)])
def test_attention_is_the_naive_one(monkeypatch, tokens, asked, in_memory):
    torch.manual_seed(0)
    monkeypatch.setattr(vt, "MAX_ATTENTION_WEIGHTS", 2 * 3 * tokens * asked - (not in_memory))
    q = torch.randn(2, 3, asked, 16, requires_grad=True)
    k, v = (torch.randn(2, 3, tokens, 16, requires_grad=True) for _ in range(2))
    found, slope = vt.attention(q, k, v), torch.randn(2, 3, asked, 16)
    grads = torch.autograd.grad((found * slope).sum(), (q, k, v))
    weights = torch.einsum("bhid,bhjd->bhij", q.double(), k.double()).div(4).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    expected = torch.einsum("bhij,bhjd->bhid", weights, v.double())
    assert (found - expected).abs().max() < 1e-5
    wanted = torch.autograd.grad((expected * slope).sum(), (q, k, v))
    for one, other in zip(grads, wanted, strict=True):
        assert (one - other).abs().max() < 1e-5


@pytest.mark.parametrize("shape", [(1, 3, 7000, 8), (40, 12, 600, 4)])
def test_attention_of_much_keeps_no_weights(shape):
    """They would take over 512 MiB here; a tensor of the shape takes at most 5."""
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    sizes = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes), lambda t: t)
    with hooks:
        vt.attention(q, k, v)
    assert max(sizes) < 6_000_000


@pytest.mark.parametrize("size", [(96, 96), (224, 224), (160, 96)])
def test_attention_is_what_timm_extracts(size):
    images = torch.randn(2, 3, *size)
    with torch.inference_mode():
        maps = AttentionExtract(reference(fused=False), method="hook")(images)
        expected = maps["blocks.11.attn.attn_drop"][:, :, 0]  # the row of [CLS]
        found = ours().cls_attention(images)
    assert found.shape == (2, 3, 1 + size[0] * size[1] // 256)
    assert (found - expected).abs().max() < 1e-5
    assert (found.sum(dim=-1) - 1).abs().max() < 1e-5
    assert (expected - 1 / expected.shape[-1]).abs().max() > 1e-3, "it is not uniform"


@pytest.mark.parametrize("blocks", [1, 4, 12])
def test_frozen_features_are_timms_intermediate_layers(blocks):
    images = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        layers = reference().get_intermediate_layers(
            images, n=blocks, return_prefix_tokens=True, norm=True
        )
        cls_tokens, patch, patch_std, patch_top = ours().frozen_features(images, blocks)
        assert torch.allclose(cls_tokens[:, -1], reference()(images), atol=1e-5)
    assert cls_tokens.shape == (2, blocks, 192)
    expected = torch.stack([prefix[:, 0] for _, prefix in layers], dim=1)
    assert (cls_tokens - expected).abs().max() < 1e-5
    patches = layers[-1][0]  # (2, 36, 192)
    assert (patch - patches.mean(dim=1)).abs().max() < 1e-5
    assert (patch_std - patches.std(dim=1, correction=0)).abs().max() < 1e-5
    largest = patches.sort(dim=1, descending=True).values[:, :2]  # a twentieth of 36
    assert (patch_top - largest.mean(dim=1)).abs().max() < 1e-5
    assert (patch_top > patch).all()


def test_one_patch_has_no_spread():
    found = ours().frozen_features(torch.randn(2, 3, 16, 16), 1)
    assert torch.equal(found.patch, found.patch_top)
    assert not found.patch_std.any()


# ------------------------------------------------------------------------------- any ViT of timm

# Registers and LayerScale; rotary positions; a plain one; 12 narrow heads; no [CLS], pooled by
# attention; [CLS] beside a norm of what is pooled; a second prefix token; two attentions side by
# side in a block; attention and MLP side by side; [CLS] beside a pool by attention.
FAMILIES = [
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3",
    "vit_base_patch16_224",
    "vit_small_h12",
    "vit_base_patch16_siglip_224",
    "eva02_tiny_patch14_224",
    "deit_tiny_distilled_patch16_224",
    "vit_small_patch16_18x2_224",
    "vit_base_patch16_xp_224",
    "vit_pe_core_tiny_patch16_384",
]
NO_MAPS = {
    "vit_base_patch16_siglip_224": "has no .CLS. token",
    "vit_small_patch16_18x2_224": "have no attention that could be shown",
    "vit_base_patch16_xp_224": "have no attention that could be shown",
}


@cache
def family(arch: str) -> Backbone:
    """A backbone of 3 blocks of this architecture, with random parameters throughout."""
    patch = vt.default_patch_size(arch)
    with pytest.MonkeyPatch.context() as patched:
        name, changes = vt.find_architecture(arch)
        short = vt.Architecture(name, {**changes, "depth": 3})
        patched.setitem(vt.ARCHS, "short", short)
        backbone = Backbone(BackboneSpec("short", patch, 6 * patch)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return backbone


def independent(arch: str, size: int) -> nn.Module:
    """timm's network of the same weights, for images of one size."""
    backbone = family(arch)
    name, changes = vt.find_architecture(arch)
    patch = backbone.spec.patch_size
    sizes = {"depth": 3, "img_size": size, "patch_size": patch}
    network = timm.create_model(name, num_classes=0, **{**changes, **sizes})
    network.load_state_dict(backbone.state_dict())
    return network.eval()


@pytest.mark.parametrize("arch", FAMILIES)
def test_any_vit_is_timms(arch):
    """Embedding, patch tokens and frozen features are those of a network made by timm alone."""
    backbone = family(arch)
    size = 6 * backbone.spec.patch_size
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    theirs = independent(arch, size)
    with torch.inference_mode():
        tokens = theirs.forward_features(images)
        layers = theirs.forward_intermediates(
            images, indices=2, norm=True, output_fmt="NLC", intermediates_only=True
        )
        found = backbone.all_tokens(images)
        embeddings, patch, _, _ = backbone.frozen_features(images, 2)
        has_cls = theirs.cls_token is not None and not isinstance(theirs.norm, nn.Identity)
        expected = tokens[:, 0] if has_cls else theirs.forward_head(tokens, pre_logits=True)
        assert (backbone(images) - expected).abs().max() < 1e-5
        assert (found.embedding - expected).abs().max() < 1e-5
        assert (found.patches - tokens[:, theirs.num_prefix_tokens :]).abs().max() < 1e-5
        assert embeddings.shape == (2, 2, backbone.embed_dim)
        assert (embeddings[:, -1] - expected).abs().max() < 1e-5
        assert (patch - layers[-1].mean(dim=1)).abs().max() < 1e-5
        assert (embeddings[:, 0] - embeddings[:, 1]).abs().max() > 1e-3, "blocks differ"
    assert expected.std(dim=0).max() > 1e-3, "images differ"


@pytest.mark.parametrize("arch", [name for name in FAMILIES if name not in NO_MAPS])
def test_attention_of_any_vit_is_what_timm_extracts(arch):
    backbone = family(arch)
    size = 6 * backbone.spec.patch_size
    images = torch.randn(2, 3, size, size)
    set_fused_attn(False)
    theirs = independent(arch, size)
    set_fused_attn(True)
    with torch.inference_mode():
        maps = AttentionExtract(theirs, method="hook")(images)
        expected = maps["blocks.2.attn.attn_drop"][:, :, 0]
        found = backbone.cls_attention(images)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-5
    assert (expected - 1 / expected.shape[-1]).abs().max() > 1e-4, "it is not uniform"


@pytest.mark.parametrize("arch, reason", NO_MAPS.items())
def test_networks_without_one_map_for_each_head_are_refused(arch, reason):
    size = 6 * family(arch).spec.patch_size
    with pytest.raises(InputError, match=reason):
        family(arch).cls_attention(torch.zeros(1, 3, size, size))


@pytest.mark.parametrize("arch", FAMILIES)
def test_every_parameter_that_trains_gets_a_gradient(arch):
    """Several processes wait for the gradients of all of them."""
    backbone = family(arch)
    size = 6 * backbone.spec.patch_size
    backbone(torch.randn(2, 3, size, size)).square().sum().backward()
    for name, parameter in backbone.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        parameter.grad = None


@pytest.mark.parametrize("arch", ["vit_pico", "vit_small_patch16_dinov3"])
def test_checkpointing_changes_no_gradient(arch):
    patch = vt.default_patch_size(arch)
    torch.manual_seed(0)
    backbone = Backbone(BackboneSpec(arch, patch, 2 * patch)).train()
    images = torch.randn(2, 3, 2 * patch, 2 * patch)
    grads = []
    for checkpointing in (False, True):
        backbone.zero_grad()
        backbone.checkpointing = checkpointing
        backbone(images).square().sum().backward()
        grads.append([p.grad.clone() for p in backbone.parameters() if p.grad is not None])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("arch", ["vit_pico", "vit_small_patch16_dinov3"])
def test_masked_patches_are_not_seen(arch):
    """What lies under the mask changes nothing; what lies beside it does."""
    patch = vt.default_patch_size(arch)
    torch.manual_seed(0)
    backbone = Backbone(BackboneSpec(arch, patch, 4 * patch)).eval()
    images = torch.randn(1, 3, 4 * patch, 4 * patch)
    masks = torch.zeros(1, 16, dtype=torch.bool)
    masks[0, 4:8] = True  # the second row of patches
    hidden, beside = images.clone(), images.clone()
    hidden[:, :, patch : 2 * patch] = 0.0
    beside[:, :, :patch] = 0.0
    token = torch.randn(backbone.embed_dim, requires_grad=True)
    outputs = [backbone.all_tokens(x, masks, token).patches for x in (images, hidden, beside)]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])
    (slope,) = torch.autograd.grad(outputs[0].square().sum() + outputs[0].sum(), token)
    assert slope.abs().max() > 0, "the mask token learns"
    unmasked = backbone.all_tokens(images).patches
    assert not torch.allclose(unmasked, outputs[0]), "and the hook is gone afterwards"
    assert torch.equal(unmasked, backbone.all_tokens(images).patches)


@pytest.mark.parametrize("arch", FAMILIES)
def test_a_hidden_patch_keeps_its_position(arch):
    """A mask token that is what some content embeds to is the same as that content, in its place.

    With one token for patch and position, hidden patches could not be told apart.
    """
    backbone = family(arch)
    patch = backbone.spec.patch_size
    images = torch.randn(1, 3, 6 * patch, 6 * patch, generator=torch.Generator().manual_seed(0))
    content = torch.randn(3, patch, patch, generator=torch.Generator().manual_seed(1))
    hidden = torch.zeros(1, 36, dtype=torch.bool)
    filled = images.clone()
    for row, column in ((0, 1), (3, 2), (5, 5)):
        hidden[0, 6 * row + column] = True
        rows = slice(patch * row, patch * (row + 1))
        filled[0, :, rows, patch * column : patch * (column + 1)] = content
    with torch.inference_mode():
        token = backbone.vit.patch_embed(content.repeat(1, 6, 6)[None]).reshape(36, -1)[0]
        found = backbone.all_tokens(images, hidden, token)
        expected = backbone.all_tokens(filled)
    assert (found.patches - expected.patches).abs().max() < 1e-4
    assert (found.embedding - expected.embedding).abs().max() < 1e-4
    places = found.patches[0, hidden[0]]
    assert (places[0] - places[1]).abs().max() > 1e-3, "their positions tell them apart"


def test_weights_stand_under_timms_names():
    """In state dicts, also of a network around the backbone; loading takes them back."""
    network = nn.ModuleDict({"backbone": Backbone(BackboneSpec("vit_pico", 16, 32))})
    names = network["backbone"].state_dict().keys()
    changes = vt.ARCHS["vit_pico"].changes
    theirs = timm.create_model("vit_small_patch16_224", num_classes=0, img_size=32, **changes)
    assert names == theirs.state_dict().keys()
    state = network.state_dict()
    assert state.keys() == {f"backbone.{name}" for name in names}
    state["backbone.cls_token"] = torch.ones_like(state["backbone.cls_token"])
    network.load_state_dict(state)
    assert network["backbone"].vit.cls_token.eq(1).all()
    with pytest.raises(RuntimeError, match="Missing key.*cls_token"):
        network.load_state_dict({k: v for k, v in state.items() if "cls_token" not in k})


@pytest.mark.parametrize(
    ("arch", "reason"),
    [
        ("vit_smal", "did you mean vit_small"),
        ("qqqq", "short names: vit_pico"),
        ("swin_tiny_patch4_window7_224", "is a SwinTransformer"),
        ("resnet18", "is a ResNet"),
        ("vit_small_r26_s32_224", "makes its patches by a HybridEmbed"),
    ],
)
def test_other_networks_are_refused(arch, reason):
    with pytest.raises(InputError, match=f"--arch {arch}.*{reason}"):
        vt.blueprint(arch)


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        (BackboneSpec("vit_small", 16, 224), "vit_small_patch16_224"),
        (BackboneSpec("vit_small", 16, 96), ""),
        (BackboneSpec("vit_nano", 16, 224), ""),
        (BackboneSpec("unchanged", 14, 518), "vit_small_patch14_dinov2"),
        (BackboneSpec("vit_giant", 14, 224), ""),  # timm's of that name has a wider MLP
        (BackboneSpec("vit_small_patch14_dinov2", 14, 518), "vit_small_patch14_dinov2"),
        (BackboneSpec("vit_small_patch14_dinov2", 14, 224), ""),
        (BackboneSpec("vit_small_patch16_dinov3", 16, 96), "vit_small_patch16_dinov3"),
        (BackboneSpec("vit_small_patch16_224", 16, 224, pooling="avg"), ""),
    ],
)
def test_timm_is_named_where_it_loads_the_weights(spec, name, monkeypatch):
    monkeypatch.setitem(vt.ARCHS, "unchanged", vt.Architecture("vit_small_patch14_dinov2", {}))
    monkeypatch.setitem(vt.ARCHS, "vit_giant", vt._plain_vit(1408, 40, 16))
    assert spec.timm_name == name


# ----------------------------------------------------------------------------- the projection head


@pytest.mark.parametrize("use_bn", [False, True])
def test_head_gives_the_cosine_to_unit_prototypes(use_bn):
    torch.manual_seed(0)
    head = ProjectionHead(24, 50, hidden_dim=32, bottleneck_dim=16, use_bn=use_bn).eval()
    x = torch.randn(7, 24)
    logits = head(x)
    rows = head.last_layer.weight
    assert logits.shape == (7, 50)
    assert torch.allclose(rows.norm(dim=1), torch.ones(50), atol=1e-6)
    layers = [m for m in head.mlp if isinstance(m, nn.Linear)]
    assert [tuple(m.weight.shape) for m in layers] == [(32, 24), (32, 32), (16, 32)]
    assert sum(isinstance(m, nn.BatchNorm1d) for m in head.mlp) == 2 * use_bn
    if not use_bn:
        hidden = nn.functional.gelu(layers[1](nn.functional.gelu(layers[0](x))))
        low = layers[2](hidden)
        cosine = (low @ rows.T) / low.norm(dim=1, keepdim=True)
        torch.testing.assert_close(logits, cosine, rtol=1e-4, atol=1e-6)
    assert logits.abs().max() <= 1 + 1e-5


@pytest.mark.parametrize("fixed", [True, False])
def test_norm_last_layer_fixes_the_prototypes_lengths(fixed):
    torch.manual_seed(0)
    head = ProjectionHead(8, 12, hidden_dim=16, bottleneck_dim=4, norm_last_layer=fixed)
    before = head.last_layer.weight.detach().clone()
    optimizer = torch.optim.SGD([p for p in head.parameters() if p.requires_grad], lr=5.0)
    head(torch.randn(6, 8))[:, 0].sum().backward()
    optimizer.step()
    after = head.last_layer.weight.detach()
    assert not torch.allclose(before, after), "their directions train"
    assert torch.allclose(after.norm(dim=1), torch.ones(12), atol=1e-5) == fixed


def test_a_patch_that_does_not_divide_the_image_is_refused():
    with pytest.raises(InputError, match=r"--patch-size 16.*100"):
        Backbone(BackboneSpec("vit_pico", 16, 100))


# ---------------------------------------------------------------------------- stem of convolutions


@pytest.mark.parametrize("patch, size", [(4, 32), (8, 96), (16, 96), (32, 96)])
def test_a_stem_of_convolutions_makes_one_token_a_patch(patch, size):
    torch.manual_seed(0)
    backbone = Backbone(BackboneSpec("vit_pico", patch, size, stem="conv")).eval()
    assert backbone.is_plain
    images = torch.randn(2, 3, size, size)
    tokens = backbone.all_tokens(images)
    assert tokens.patches.shape == (2, (size // patch) ** 2, 64)
    torch.testing.assert_close(tokens.embedding, backbone(images), rtol=1e-4, atol=1e-5)
    # Other sizes resample the position embedding, as with any stem.
    assert backbone.all_tokens(images[:, :, : 2 * patch, : 2 * patch]).patches.shape[1] == 4
    # Once trained, no photograph's tokens depend on others of its batch.
    alone = backbone.all_tokens(images[1:]).patches
    torch.testing.assert_close(alone, tokens.patches[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_a_stem_of_convolutions_is_its_layers_one_by_one(training):
    torch.manual_seed(0)
    stem = Backbone(BackboneSpec("vit_pico", 8, 32, stem="conv")).vit.patch_embed
    for number in (1, 4, 7):
        stem.proj[number].running_mean.normal_()
        stem.proj[number].running_var.uniform_(0.5, 2)
    stem.train(training)
    values = {name: value.detach().clone() for name, value in stem.state_dict().items()}
    x = torch.randn(2, 3, 32, 32)
    expected = x
    for layer, channels in ((0, 32), (3, 32), (6, 64)):
        expected = nn.functional.conv2d(expected, values[f"proj.{layer}.weight"], None, 2, 1)
        assert expected.shape[1] == channels
        mean = expected.mean(dim=(0, 2, 3))
        variance = expected.var(dim=(0, 2, 3), unbiased=False)
        if not training:
            mean = values[f"proj.{layer + 1}.running_mean"]
            variance = values[f"proj.{layer + 1}.running_var"]
        shape = (1, channels, 1, 1)
        scaled = (expected - mean.view(shape)) / (variance.view(shape) + 1e-5).sqrt()
        expected = torch.relu(scaled)
    expected = nn.functional.conv2d(expected, values["proj.9.weight"], values["proj.9.bias"])
    found = stem(x).reshape(2, 4, 4, 64).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_hidden_patch_shows_nothing_through_convolutions():
    torch.manual_seed(0)
    backbone = Backbone(BackboneSpec("vit_pico", 8, 32, stem="conv")).eval()
    hidden = torch.ones(1, 16, dtype=torch.bool)
    token = torch.randn(64)
    one, other = (
        backbone.all_tokens(torch.randn(1, 3, 32, 32), hidden, token).patches for _ in range(2)
    )
    assert torch.equal(one, other)


def test_stems_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="--patch-size 4, 8, 16, 32, not 14"):
        Backbone(BackboneSpec("vit_pico", 14, 28, stem="conv"))
    with pytest.raises(InputError, match="expected linear or conv"):
        Backbone(BackboneSpec("vit_pico", 16, 32, stem="cubic"))


def test_timm_has_no_network_with_this_stem():
    assert BackboneSpec("vit_small", 16, 224).timm_name
    assert BackboneSpec("vit_small", 16, 224, stem="conv").timm_name == ""
