"""The networks: backbone and projection head.

The backbone is timm's VisionTransformer, with the views of it that self-distillation and frozen
evaluation need; its parameter names are timm's, which are DINO's too.
Shapes: B batch, N tokens, D width, H heads, K prototypes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from utils import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MOST_WEIGHTS = 2**27  # of attention, over batch and heads, that a CPU computes in memory

ARCHS = {  # width, blocks, heads; each width stands for one number of heads
    "vit_pico": (64, 2, 2),
    "vit_nano": (128, 6, 4),
    "vit_tiny": (192, 12, 3),
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
    "vit_large": (1024, 24, 16),
}
Arch = Literal["vit_pico", "vit_nano", "vit_tiny", "vit_small", "vit_base", "vit_large"]


@dataclass(frozen=True)
class BackboneSpec:
    """What a backbone is, apart from its weights; written beside them."""

    arch: str
    patch_size: int
    image_size: int  # that the position embedding is laid out for; other sizes resample it
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        for name in ("mean", "std"):  # files give tuples back as lists
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def timm_name(self) -> str:
        """timm's model of these dimensions, empty where timm has none."""
        name = f"{self.arch}_patch{self.patch_size}_224"
        return name if self.image_size == 224 and timm.is_model(name) else ""


class Backbone(VisionTransformer):
    """timm's ViT of a BackboneSpec, without classifier; `forward` gives the normed [CLS] (B, D)."""

    def __init__(self, spec: BackboneSpec, drop_path: float = 0.0) -> None:
        if spec.image_size % spec.patch_size:
            raise InputError(
                f"--patch-size {spec.patch_size} does not divide the image size {spec.image_size}"
            )
        width, depth, heads = ARCHS[spec.arch]
        super().__init__(
            img_size=spec.image_size,
            patch_size=spec.patch_size,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            num_classes=0,
            drop_path_rate=drop_path,
            dynamic_img_size=True,
        )
        self.spec, self.checkpointing = spec, False

    def normalize(self, images: Tensor) -> Tensor:
        """Return uint8 images (B, 3, h, w) as the fp32 input that the backbone was trained on."""
        mean, std = (
            images.new_tensor(v, dtype=torch.float32) for v in (self.spec.mean, self.spec.std)
        )
        return (images.float() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return the normed [CLS] (B, D) of images (B, 3, h, w)."""
        x = self.tokens(images)
        for block in self.blocks:
            x = self._run(block, x, block is self.blocks[-1])
        return self.norm(x[:, 0])

    def _run(self, block: nn.Module, x: Tensor, cls_only: bool) -> Tensor:
        """Run a block; `checkpointing` keeps its input alone and computes it anew for gradients."""
        if self.checkpointing and self.training:
            return checkpoint(run_block, block, x, cls_only, use_reentrant=False)
        return run_block(block, x, cls_only)

    def tokens(self, images: Tensor) -> Tensor:
        """Embed images (B, 3, h, w) as position-encoded tokens (B, N, D), [CLS] first."""
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(images))))

    def frozen_features(self, images: Tensor, n_blocks: int = 4) -> tuple[Tensor, Tensor]:
        """Return the normed [CLS] of the last n blocks (B, n, D) and the mean patch token (B, D).

        Both as DINO's linear evaluation takes them: blocks in order, the last one last.
        """
        x, cls_tokens = self.tokens(images), []
        for depth, block in enumerate(self.blocks, start=1):
            x = run_block(block, x)
            if depth > len(self.blocks) - n_blocks:
                cls_tokens.append(self.norm(x[:, 0]))
        return torch.stack(cls_tokens, dim=1), self.norm(x)[:, 1:].mean(dim=1)

    def cls_attention(self, images: Tensor) -> Tensor:
        """Return the last block's attention of [CLS] to all tokens, (B, H, N), rows summing to 1.

        Only the [CLS] row is computed, so memory stays linear in N at any image size.
        """
        x = self.tokens(images)
        for block in self.blocks[:-1]:
            x = run_block(block, x)
        q, k, _ = _queries_keys_values(self.blocks[-1], x, cls_only=True)
        scores = q @ k.transpose(2, 3) * q.shape[3] ** -0.5  # (B, H, 1, N)
        return scores.float().softmax(dim=-1).squeeze(2)


# ----------------------------------------------------------- a block, as far as its output is read
def run_block(block: nn.Module, x: Tensor, cls_only: bool = False) -> Tensor:
    """Return what timm's block makes of tokens (B, N, D), all of them or [CLS] alone (B, 1, D).

    Where [CLS] alone is read, a block needs the keys and values of all tokens, and nothing else.
    """
    out = x[:, :1] if cls_only else x
    out = out + block.drop_path1(_attend(block, x, cls_only))
    return out + block.drop_path2(block.mlp(block.norm2(out)))


def _attend(block: nn.Module, x: Tensor, cls_only: bool) -> Tensor:
    """Return the attention branch for all tokens (B, N, D), or for [CLS] alone (B, 1, D)."""
    values = attention(*_queries_keys_values(block, x, cls_only))
    return block.attn.proj(values.transpose(1, 2).flatten(2))


def _queries_keys_values(block: nn.Module, x: Tensor, cls_only: bool) -> tuple[Tensor, ...]:
    """Return queries, of [CLS] alone if asked so, keys and values: (B, H, 1 or N, D / H) each."""
    linear, x, width = block.attn.qkv, block.norm1(x), x.shape[2]
    heads = (block.attn.num_heads, -1)
    if not cls_only:
        return linear(x).unflatten(2, (3, *heads)).permute(2, 0, 3, 1, 4).unbind()
    weight, bias = (p.split((width, 2 * width)) for p in (linear.weight, linear.bias))
    query = F.linear(x[:, :1], weight[0], bias[0]).unflatten(2, heads).transpose(1, 2)
    both = F.linear(x, weight[1], bias[1]).unflatten(2, (2, *heads)).permute(2, 0, 3, 1, 4)
    return query, *both.unbind()


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v for q (B, H, M, d), k and v (B, H, N, d).

    A GPU has a kernel for it all. A CPU's takes 1.2 to 12 times as long as two products, and is
    for so many tokens and images that their (B, H, M, N) weights would fill the memory.
    """
    if q.device.type != "cpu" or q[..., 0].numel() * k.shape[2] > MOST_WEIGHTS:
        return F.scaled_dot_product_attention(q, k, v)
    return (q * q.shape[3] ** -0.5 @ k.transpose(2, 3)).softmax(dim=-1) @ v


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
            layers += [nn.BatchNorm1d(hidden_dim)] if use_bn else []
            layers.append(nn.GELU())
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden_dim, bottleneck_dim))
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.last_layer = weight_norm(nn.Linear(bottleneck_dim, out_dim, bias=False))
        lengths = self.last_layer.parametrizations.weight.original0
        nn.init.ones_(lengths)
        lengths.requires_grad = not norm_last_layer

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))
