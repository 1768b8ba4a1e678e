"""The networks: a backbone, which is any vision transformer of timm, and the projection head.

`Backbone` wraps timm's network and gives the method what it reads: the embedding ([CLS]), patch
tokens, frozen features of several blocks, and the last block's attention. Its weights stand in
files under timm's names, which are DINO's too. `Network` is a backbone with its head.
Shapes: B batch, V views, N tokens or patches, M masked patches, D width, H heads, K prototypes,
T outputs of a linear layer.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import timm
import torch
from timm.layers import PatchEmbed
from timm.models.eva import Eva
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from utils import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# The most attention weights, over batch and heads, that a CPU computes in memory: 512 MB in fp32.
MAX_ATTENTION_WEIGHTS = 2**27

# What a stem of convolutions needs: patches that can be halved, and channels enough at the start.
CONV_PATCH_SIZES = (4, 8, 16, 32)
LEAST_CHANNELS = 32

# The share of patch tokens whose largest values probes may read beside the mean of all.
TOP_SHARE = 0.05


# ----------------------------------------------------------------------------------- architectures
class Architecture(NamedTuple):
    """A network of timm and what is changed in it."""

    timm_name: str
    changes: dict[str, Any]


def _plain_vit(width: int, depth: int, heads: int) -> Architecture:
    """Return the ViT of arXiv 2010.11929 with these dimensions; any patch size fits it."""
    changes = {"embed_dim": width, "depth": depth, "num_heads": heads}
    return Architecture("vit_small_patch16_224", changes)


# The short names of `--arch`. Any other ViT is called by the name that timm gives it.
ARCHS = {
    "vit_pico": _plain_vit(64, 2, 2),  # for tests
    "vit_nano": _plain_vit(128, 6, 4),  # for laptops
    "vit_micro": _plain_vit(192, 6, 3),  # of the weights that come with SSRL
    "vit_tiny": _plain_vit(192, 12, 3),
    "vit_small": _plain_vit(384, 12, 6),
    "vit_small_h12": _plain_vit(384, 12, 12),  # MoCo v3's ViT-S (arXiv 2104.02057) has 12 heads
    "vit_base": _plain_vit(768, 12, 12),
    "vit_large": _plain_vit(1024, 24, 16),
}


def find_architecture(arch: str) -> Architecture:
    """Return what `arch` stands for: a name of ARCHS, or a name of timm, with a tag or without.

    Raises InputError for an unknown name, with those that are spelled alike.
    """
    if arch in ARCHS:
        return ARCHS[arch]
    name = arch.partition(".")[0]
    if timm.is_model(name):
        return Architecture(name, {})
    known = [
        *ARCHS,
        *timm.list_models(module="vision_transformer"),
        *timm.list_models(module="eva"),
    ]
    near = difflib.get_close_matches(name, known, 3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"short names: {', '.join(ARCHS)}"
    raise InputError(f"--arch {arch}: timm has no such network; {hint}")


class Blueprint(NamedTuple):
    """What an architecture is when nothing is asked of it: its own patch and image size."""

    patch_size: int
    image_size: int
    has_position_embedding: bool


@functools.cache
def blueprint(arch: str) -> Blueprint:
    """Return an architecture's own sizes in pixels, read off a network without memory.

    Raises InputError for unknown names, and for networks that are no plain sequence of patch
    tokens and transformer blocks (timm's VisionTransformer or Eva).
    """
    network = _sketch(arch)
    if not isinstance(network, (VisionTransformer, Eva)):
        raise InputError(
            f"--arch {arch}: is a {type(network).__name__}; expected a vision transformer with "
            "patch tokens throughout (timm's VisionTransformer or Eva)"
        )
    if not isinstance(network.patch_embed, PatchEmbed):
        raise InputError(
            f"--arch {arch}: makes its patches by a {type(network.patch_embed).__name__}; expected "
            "a network that cuts the image into patches (timm's PatchEmbed)"
        )
    has_position_embedding = network.pos_embed is not None
    patch_size = network.patch_embed.patch_size[0]
    image_size = network.patch_embed.img_size[0]
    return Blueprint(patch_size, image_size, has_position_embedding)


def is_vit(arch: str) -> bool:
    """Say whether an architecture is one that a Backbone may be, as far as its type tells."""
    return isinstance(_sketch(arch), (VisionTransformer, Eva))


def _sketch(arch: str) -> nn.Module:
    """Return an architecture's network, which takes no memory for its weights."""
    architecture = find_architecture(arch)
    with torch.device("meta"):
        return timm.create_model(architecture.timm_name, num_classes=0, **architecture.changes)


def default_patch_size(arch: str) -> int:
    """Return the side of an architecture's own patches in pixels."""
    return blueprint(arch).patch_size


@functools.cache
def _are_alike(arch: str, other: str) -> bool:
    """Return whether two architectures differ in nothing but the sizes of patches and images."""
    described = []
    for network in (_sketch(arch), _sketch(other)):
        shapes = {name: value.shape for name, value in network.state_dict().items()}
        for name in ("patch_embed.proj.weight", "pos_embed"):
            shapes.pop(name, None)
        heads = [module.num_heads for module in network.modules() if hasattr(module, "num_heads")]
        described.append((type(network), shapes, heads))
    return described[0] == described[1]


@dataclass(frozen=True)
class BackboneSpec:
    """What a backbone is, apart from its weights; written beside them."""

    arch: str  # a name of ARCHS or of timm
    patch_size: int
    image_size: int  # that the position embedding is laid out for; other sizes resample it
    mean: tuple[float, ...] = IMAGENET_MEAN  # of the RGB input, 0 to 1
    std: tuple[float, ...] = IMAGENET_STD
    pooling: str = ""  # timm's global_pool, where it is not the architecture's own
    stem: str = "linear"  # how patches are embedded: "linear", or "conv" (ConvStem)

    def __post_init__(self) -> None:
        # Files give tuples back as lists.
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))

    @property
    def timm_name(self) -> str:
        """The network of timm that these weights fit as they are; empty where there is none."""
        if self.stem != "linear":
            return ""
        name = self.arch.partition(".")[0]
        if name in ARCHS and not ARCHS[name].changes:
            name = ARCHS[name].timm_name
        elif name in ARCHS:
            name = f"{name}_patch{self.patch_size}_224"
        if self.pooling or not timm.is_model(name) or not _are_alike(self.arch, name):
            return ""
        own = blueprint(name)
        fits = not own.has_position_embedding or own.image_size == self.image_size
        return name if fits and own.patch_size == self.patch_size else ""


def create_vit(spec: BackboneSpec, drop_path: float = 0.0) -> VisionTransformer | Eva:
    """Return timm's network of a spec, with random weights, for images of any size.

    `drop_path` is the rate of stochastic depth at the last block; it grows linearly from 0 at the
    first. Raises InputError where the patch size does not divide the image size, and where a stem
    of convolutions cannot make patches of that size.
    """
    if spec.image_size % spec.patch_size:
        raise InputError(
            f"--patch-size {spec.patch_size} does not divide the image size {spec.image_size}"
        )
    blueprint(spec.arch)  # refuses what is no vision transformer
    architecture = find_architecture(spec.arch)
    changes = dict(architecture.changes)
    if spec.pooling:
        changes["global_pool"] = spec.pooling
    if spec.stem == "conv":
        if spec.patch_size not in CONV_PATCH_SIZES:
            sizes = ", ".join(map(str, CONV_PATCH_SIZES))
            raise InputError(f"--stem conv: expected --patch-size {sizes}, not {spec.patch_size}")
        changes["embed_layer"] = ConvStem
    elif spec.stem != "linear":
        raise InputError(f"--stem {spec.stem}: expected linear or conv")
    return timm.create_model(
        architecture.timm_name,
        num_classes=0,
        img_size=spec.image_size,
        patch_size=spec.patch_size,
        drop_path_rate=drop_path,
        dynamic_img_size=True,
        **changes,
    )


# -------------------------------------------------------------------------------------------- stem
class ConvStem(PatchEmbed):
    """Patches by 3x3 convolutions of stride 2, in place of one linear map of all their pixels.

    As many of them as halve a patch down to one pixel (four for 16 pixels), each with batch norm
    and a ReLU, then a 1x1 convolution: "Early convolutions help transformers see better", arXiv
    2106.14881. A linear map of 768 values into a token keeps little of a lesion of two pixels.
    Batch norm is what lets it learn: a fundus is one colour with little on it, and that colour is
    subtracted. Layer, group or no norm left the lesion objective where it began.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        width = self.proj.out_channels
        halvings = int(math.log2(self.patch_size[0]))
        layers: list[nn.Module] = []
        before = 3
        for left in reversed(range(halvings)):
            channels = max(LEAST_CHANNELS, width // 2**left)
            layers.append(nn.Conv2d(before, channels, 3, stride=2, padding=1, bias=False))
            layers.append(nn.BatchNorm2d(channels))
            layers.append(nn.ReLU())
            before = channels
        layers.append(nn.Conv2d(before, width, 1))
        self.proj = nn.Sequential(*layers)


# ---------------------------------------------------------------------------------------- backbone
class Tokens(NamedTuple):
    """A backbone's normed output."""

    embedding: Tensor  # (B, D), [CLS] where there is one
    patches: Tensor  # (B, N, D), patch tokens alone, row by row


class FrozenFeatures(NamedTuple):
    """What probes read off a frozen backbone."""

    cls: Tensor  # (B, n, D), the embeddings of the last n blocks, the last one last
    patch: Tensor  # (B, D), mean of the last block's patch tokens
    patch_std: Tensor  # (B, D), their standard deviation, 0 where there is one patch
    patch_top: Tensor  # (B, D), mean of the largest TOP_SHARE of them, dimension by dimension


class Backbone(nn.Module):
    """A vision transformer of timm without classifier; `forward` gives the embedding (B, D).

    The embedding is the normed [CLS]. Networks that have no [CLS], or that norm only what they
    have pooled (`fc_norm`), give their pooled output in its place, as timm defines it.
    """

    def __init__(self, spec: BackboneSpec, drop_path: float = 0.0) -> None:
        super().__init__()
        self.spec = spec
        self.vit = create_vit(spec, drop_path)
        self.checkpointing = False  # keep less for gradients: slower, in less memory
        self.embeds_cls = self._has_cls() and not isinstance(self.vit.norm, nn.Identity)
        self.is_plain = self.embeds_cls and has_plain_blocks(self.vit)
        if self.embeds_cls and isinstance(getattr(self.vit, "attn_pool", None), nn.Module):
            # Nothing reads what it pools, so it would wait for gradients that never come.
            self.vit.attn_pool.requires_grad_(False)
        # Files know nothing of this wrapper: weights stand in them under timm's names.
        self.register_state_dict_post_hook(_without_prefix)
        self.register_load_state_dict_pre_hook(_with_prefix)

    @property
    def embed_dim(self) -> int:
        """The width D of all tokens."""
        return self.vit.embed_dim

    @property
    def num_prefix_tokens(self) -> int:
        """How many tokens come before the patches: [CLS] first, then registers."""
        return self.vit.num_prefix_tokens

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches that the position embedding is laid out for."""
        return tuple(self.vit.patch_embed.grid_size)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.vit.parameters()).device

    def _has_cls(self) -> bool:
        return getattr(self.vit, "cls_token", None) is not None

    def normalize(self, images: Tensor) -> Tensor:
        """Return uint8 images (B, 3, h, w) as the fp32 input that the backbone was trained on."""
        mean = images.new_tensor(self.spec.mean, dtype=torch.float32).view(3, 1, 1)
        std = images.new_tensor(self.spec.std, dtype=torch.float32).view(3, 1, 1)
        return (images.float() / 255 - mean) / std

    def forward(self, images: Tensor) -> Tensor:
        """Return the embedding (B, D) of normalised images (B, 3, h, w)."""
        if not self.is_plain:
            return self._embedding(self._normed_tokens(images))
        # Of the last block [CLS] alone is read, so nothing else of it is computed.
        x = self._embed_patches(images)
        for block in self.vit.blocks[:-1]:
            x = self._run(block, x)
        x = self._run(self.vit.blocks[-1], x, cls_only=True)
        return self.vit.norm(x[:, 0])

    def all_tokens(
        self, images: Tensor, hidden: Tensor | None = None, mask_token: Tensor | None = None
    ) -> Tokens:
        """Return embedding and patch tokens of normalised images (B, 3, h, w).

        Where `hidden` (B, N) is true, `mask_token` (D,) takes the place of the patch's embedding,
        before its position is added.
        """
        with self._masked(hidden, mask_token):
            x = self._normed_tokens(images)
        return Tokens(self._embedding(x), x[:, self.num_prefix_tokens :])

    def frozen_features(self, images: Tensor, n_blocks: int = 4) -> FrozenFeatures:
        """Return what probes read of normalised images (B, 3, h, w); all tokens are normed.

        Embeddings of the last n blocks and the mean patch token are what DINO's linear evaluation
        takes (arXiv 2104.14294, appendix F.2); there are fewer than n where the network has fewer.
        """
        normed = []
        if self.is_plain:
            x = self._embed_patches(images)
            first = len(self.vit.blocks) - n_blocks
            for depth, block in enumerate(self.vit.blocks):
                x = run_block(block, x)
                if depth >= first:
                    normed.append(self.vit.norm(x))
        else:
            normed = self._last_blocks(images, min(n_blocks, len(self.vit.blocks)))
        embeddings = torch.stack([self._embedding(x) for x in normed], dim=1)
        patches = normed[-1][:, self.num_prefix_tokens :].float()
        # A lesion is in few patches, so that a mean over all of them hardly moves.
        count = max(1, round(TOP_SHARE * patches.shape[1]))
        top = patches.topk(count, dim=1).values.mean(dim=1)
        std = patches.std(dim=1, correction=0)
        return FrozenFeatures(embeddings, patches.mean(dim=1), std, top)

    def cls_attention(self, images: Tensor) -> Tensor:
        """Return the last block's attention of [CLS] to all tokens, (B, H, N), rows summing to 1.

        The first `num_prefix_tokens` of them are [CLS] itself and registers, then come the
        patches. Raises InputError for a network without [CLS], or without one map for each head.
        """
        if not self._has_cls():
            raise InputError(f"{self.spec.arch}: has no [CLS] token whose attention could be shown")
        if not self.is_plain:
            return self._recorded_attention(images)
        x = self._embed_patches(images)
        for block in self.vit.blocks[:-1]:
            x = run_block(block, x)
        # Only the row of [CLS] is computed, so that memory stays linear in N at any image size.
        q, k, _ = _queries_keys_values(self.vit.blocks[-1], x, cls_only=True)
        scores = q @ k.transpose(2, 3) * q.shape[3] ** -0.5  # (B, H, 1, N)
        return scores.float().softmax(dim=-1).squeeze(2)

    def _embed_patches(self, images: Tensor) -> Tensor:
        """Return images (B, 3, h, w) as position-encoded tokens (B, N, D), for a plain ViT."""
        x = self.vit._pos_embed(self.vit.patch_embed(images))
        return self.vit.norm_pre(self.vit.patch_drop(x))

    def _run(self, block: nn.Module, x: Tensor, *, cls_only: bool = False) -> Tensor:
        """Run a block; `checkpointing` keeps its input alone and computes it anew for gradients."""
        if self.checkpointing and self.training:
            return checkpoint(run_block, block, x, cls_only, use_reentrant=False)
        return run_block(block, x, cls_only)

    def _normed_tokens(self, images: Tensor) -> Tensor:
        """Return all tokens (B, N, D) of images (B, 3, h, w) after the last norm."""
        if self.is_plain:
            x = self._embed_patches(images)
            for block in self.vit.blocks:
                x = self._run(block, x)
            return self.vit.norm(x)
        self.vit.grad_checkpointing = self.checkpointing and self.training
        return self.vit.forward_features(images)

    def _embedding(self, x: Tensor) -> Tensor:
        """Return the embedding (B, D) that normed tokens (B, N, D) hold."""
        if self.embeds_cls:
            return x[:, 0]
        return self.vit.forward_head(x, pre_logits=True)

    def _last_blocks(self, images: Tensor, count: int) -> list[Tensor]:
        """Return the normed tokens (B, N, D) that each of the last blocks gives, by timm."""
        has_prefix = self.num_prefix_tokens > 0
        outputs = self.vit.forward_intermediates(
            images,
            indices=count,
            return_prefix_tokens=has_prefix,
            norm=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        if not has_prefix:
            return outputs
        return [torch.cat([prefix, patches], dim=1) for patches, prefix in outputs]

    def _recorded_attention(self, images: Tensor) -> Tensor:
        """Return `cls_attention` of any block of timm, recorded while its network runs.

        The last block multiplies by its weights only where timm's fused attention is off; the
        dropout that they pass through shows them.
        """
        attention_layer = getattr(self.vit.blocks[-1], "attn", None)
        if not hasattr(attention_layer, "attn_drop"):
            raise InputError(f"{self.spec.arch}: its blocks have no attention that could be shown")
        recorded = []

        def record(_module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
            recorded.append(inputs[0][:, :, 0].float())  # (B, H, N)

        was_fused = attention_layer.fused_attn
        handle = attention_layer.attn_drop.register_forward_hook(record)
        attention_layer.fused_attn = False
        try:
            self.vit.forward_features(images)
        finally:
            attention_layer.fused_attn = was_fused
            handle.remove()
        return recorded[0]

    @contextlib.contextmanager
    def _masked(self, hidden: Tensor | None, mask_token: Tensor | None) -> Iterator[None]:
        """Let `mask_token` (D,) take the place of the `hidden` patches (B, N) inside."""
        if hidden is None:
            yield
            return

        def replace(_module: nn.Module, _inputs: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
            here = hidden.view(embedded.shape[:-1]).unsqueeze(-1)  # (B, rows, columns, 1)
            return torch.where(here, mask_token.to(embedded.dtype), embedded)

        # A hook, since every family of timm adds its positions in a way of its own.
        handle = self.vit.patch_embed.register_forward_hook(replace)
        try:
            yield
        finally:
            handle.remove()


def _without_prefix(
    _backbone: nn.Module, state: dict[str, Tensor], prefix: str, _metadata: dict[str, Any]
) -> None:
    """Name a Backbone's weights as timm does, without the wrapper's `vit.`."""
    inside = f"{prefix}vit."
    for name in [name for name in state if name.startswith(inside)]:
        state[prefix + name.removeprefix(inside)] = state.pop(name)


def _with_prefix(
    backbone: nn.Module, state: dict[str, Tensor], prefix: str, *_arguments: Any
) -> None:
    """Undo `_without_prefix` before weights are loaded."""
    for name in [name for name in state if name.startswith(prefix)]:
        state[f"{prefix}vit.{name.removeprefix(prefix)}"] = state.pop(name)


# ------------------------------------------------------ a plain block, as far as its output is read
def has_plain_blocks(vit: nn.Module) -> bool:
    """Say whether a network is a ViT whose blocks `run_block` computes as timm does.

    Such a block has one linear layer for queries, keys and values and one after them, norms before
    both branches, a two-layer MLP, LayerScale or not, and nothing else: no norm of queries and
    keys, no gate, no rotary positions, no dropout.
    """
    needed = {"norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"}
    allowed = needed | {"ls1", "ls2"}
    # A subclass may compute otherwise from the same parameters, hence no isinstance.
    if type(vit) is not VisionTransformer or any(type(block) is not Block for block in vit.blocks):
        return False
    for block in vit.blocks:
        owners = {name.rpartition(".")[0] for name, _ in block.named_parameters()}
        has_bias = getattr(getattr(block.attn, "qkv", None), "bias", None) is not None
        if not needed <= owners <= allowed or not has_bias:
            return False
        if any(isinstance(m, nn.Dropout) and m.p > 0 for m in block.modules()):
            return False
    return True


def run_block(block: nn.Module, x: Tensor, cls_only: bool = False) -> Tensor:
    """Return what timm's block makes of tokens (B, N, D), all of them or [CLS] alone (B, 1, D).

    Where [CLS] alone is read, a block needs the keys and values of all tokens, and nothing else.
    """
    out = x[:, :1] if cls_only else x
    out = out + block.drop_path1(block.ls1(_attend(block, x, cls_only)))
    return out + block.drop_path2(block.ls2(block.mlp(block.norm2(out))))


def _attend(block: nn.Module, x: Tensor, cls_only: bool) -> Tensor:
    """Return the attention branch for all tokens (B, N, D), or for [CLS] alone (B, 1, D)."""
    values = attention(*_queries_keys_values(block, x, cls_only))
    return block.attn.proj(values.transpose(1, 2).flatten(2))


def _queries_keys_values(
    block: nn.Module, x: Tensor, cls_only: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, of [CLS] alone if asked so, keys and values: (B, H, 1 or N, D / H) each."""
    qkv = block.attn.qkv
    heads = (block.attn.num_heads, -1)
    width = x.shape[2]
    x = block.norm1(x)
    if not cls_only:
        q, k, v = qkv(x).unflatten(2, (3, *heads)).permute(2, 0, 3, 1, 4).unbind()
        return q, k, v

    # The one layer holds the weights of queries first, then those of keys and values.
    query_weight, rest_weight = qkv.weight.split((width, 2 * width))
    query_bias, rest_bias = qkv.bias.split((width, 2 * width))
    query = F.linear(x[:, :1], query_weight, query_bias).unflatten(2, heads).transpose(1, 2)
    rest = F.linear(x, rest_weight, rest_bias)
    keys, values = rest.unflatten(2, (2, *heads)).permute(2, 0, 3, 1, 4).unbind()
    return query, keys, values


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v for q (B, H, M, d), k and v (B, H, N, d).

    A GPU has a kernel for it all. A CPU's takes 1.2 to 12 times as long as two products; it is
    left to inputs of so many tokens and images that their weights (B, H, M, N) fill the memory.
    """
    if q.device.type != "cpu" or q[..., 0].numel() * k.shape[2] > MAX_ATTENTION_WEIGHTS:
        return F.scaled_dot_product_attention(q, k, v)
    return (q * q.shape[3] ** -0.5 @ k.transpose(2, 3)).softmax(dim=-1) @ v


# --------------------------------------------------------------------------------- projection head
class ProjectionHead(nn.Module):
    """DINO's head: 3-layer MLP, l2-normalised bottleneck, weight-normalised prototypes.

    Maps (B, D) to logits (B, K), each the cosine to a prototype where `norm_last_layer` fixes their
    lengths at 1. `use_bn` puts batch norm after the two hidden layers. arXiv 2104.14294, section 3.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        *,
        use_bn: bool = False,
        norm_last_layer: bool = True,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in (in_dim, hidden_dim):
            layers.append(nn.Linear(width, hidden_dim))
            if use_bn:
                layers.append(nn.BatchNorm1d(hidden_dim))
            layers.append(nn.GELU())
        layers.append(nn.Linear(hidden_dim, bottleneck_dim))
        self.mlp = nn.Sequential(*layers)
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

        # Weight norm splits each prototype into a length (original0) and a direction.
        self.last_layer = weight_norm(nn.Linear(bottleneck_dim, out_dim, bias=False))
        lengths = self.last_layer.parametrizations.weight.original0
        nn.init.ones_(lengths)
        lengths.requires_grad = not norm_last_layer

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K) of tokens (B, D)."""
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


# ----------------------------------------------------------------------------- student and teacher
class Outputs(NamedTuple):
    """What a network makes of a batch of crops; views are the outer dimension."""

    cls_logits: Tensor  # (views B, K), global crops first
    cls_tokens: Tensor  # (2 B, D), of the global crops
    patch_logits: Tensor | None = None  # (M, K), of the masked patches
    # What linear layers read off the tokens of the global crops, by the objective's name.
    cls_read: dict[str, Tensor] | None = None  # (2 B, T) each
    patch_read: dict[str, Tensor] | None = None  # (2 B, N, T) each


class Network(nn.Module):
    """Backbone and projection head; student and teacher are one each.

    A student may have more, which no backbone is exported with: a mask token for the patch
    objective, and linear layers for objectives that say what [CLS] and patch tokens are to hold.
    `cls_readers` and `patch_readers` are their numbers of outputs by the objective's name.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: ProjectionHead,
        *,
        mask_token: bool = False,
        cls_readers: Mapping[str, int] | None = None,
        patch_readers: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        if mask_token:
            self.mask_token = nn.Parameter(torch.zeros(backbone.embed_dim))
        self.cls_readers = nn.ModuleDict()
        self.patch_readers = nn.ModuleDict()
        for name, outputs in (patch_readers or {}).items():
            self.patch_readers[name] = nn.Linear(backbone.embed_dim, outputs)
        for name, outputs in (cls_readers or {}).items():
            self.cls_readers[name] = nn.Linear(backbone.embed_dim, outputs)

    def forward(
        self, crops: Sequence[Tensor], wanted: Tensor | None = None, hidden: Tensor | None = None
    ) -> Outputs:
        """Return the outputs for crops (V_i B, 3, h, w) of each resolution, global ones first.

        `wanted` (M,) are the patches whose logits are returned, by their places among all 2 B N
        of the global crops; `hidden` (2 B, N) are those that the mask token takes the place of.
        """
        if wanted is None and not self.patch_readers:
            cls_tokens = [self.backbone(batch) for batch in crops]
            return Outputs(self.head(torch.cat(cls_tokens)), cls_tokens[0])

        mask_token = None if hidden is None else self.mask_token
        tokens = self.backbone.all_tokens(crops[0], hidden, mask_token)
        cls_tokens = [tokens.embedding]
        for batch in crops[1:]:
            cls_tokens.append(self.backbone(batch))
        outputs = Outputs(self.head(torch.cat(cls_tokens)), tokens.embedding)
        if wanted is not None:
            # One head serves [CLS] and patches (iBOT, arXiv 2111.07832, section 3; DINOv2 has two
            # at scale), in two passes, so that each has its own statistics where there is batch
            # norm.
            outputs = outputs._replace(patch_logits=self.head(tokens.patches.flatten(0, 1)[wanted]))
        return outputs._replace(
            cls_read={name: read(tokens.embedding) for name, read in self.cls_readers.items()},
            patch_read={name: read(tokens.patches) for name, read in self.patch_readers.items()},
        )
