"""Everything with parameters or their names: backbone, projection head, weights in and out.

The backbone is timm's VisionTransformer, with the views of it that self-distillation and frozen
evaluation need; its parameter names are timm's, which are DINO's too.
Shapes: B batch, N tokens, D width, H heads, K prototypes.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import timm
import torch
import tyro
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from runs import load_torch
from utils import InputError, sha256_of, write_atomic

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

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
        self.spec = spec

    def normalize(self, images: Tensor) -> Tensor:
        """Return uint8 images (B, 3, h, w) as the fp32 input that the backbone was trained on."""
        mean, std = (
            images.new_tensor(v, dtype=torch.float32) for v in (self.spec.mean, self.spec.std)
        )
        return (images.float() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)

    def tokens(self, images: Tensor) -> Tensor:
        """Embed images (B, 3, h, w) as position-encoded tokens (B, N, D), [CLS] first."""
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(images))))

    def frozen_features(self, images: Tensor, n_blocks: int = 4) -> tuple[Tensor, Tensor]:
        """Return the normed [CLS] of the last n blocks (B, n, D) and the mean patch token (B, D).

        Both as DINO's linear evaluation takes them: blocks in order, the last one last.
        """
        x, cls_tokens = self.tokens(images), []
        for depth, block in enumerate(self.blocks, start=1):
            x = block(x)
            if depth > len(self.blocks) - n_blocks:
                cls_tokens.append(self.norm(x[:, 0]))
        return torch.stack(cls_tokens, dim=1), self.norm(x)[:, 1:].mean(dim=1)

    def cls_attention(self, images: Tensor) -> Tensor:
        """Return the last block's attention of [CLS] to all tokens, (B, H, N), rows summing to 1.

        Only the [CLS] row is computed, so memory stays linear in N at any image size.
        """
        x = self.tokens(images)
        for block in self.blocks[:-1]:
            x = block(x)
        last = self.blocks[-1]
        attention, x = last.attn, last.norm1(x)
        weights = zip(attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3), strict=True)
        q, k = (
            nn.functional.linear(tokens, *weight).unflatten(2, (attention.num_heads, -1))
            for tokens, weight in zip((x[:, :1], x), weights, strict=False)
        )  # (B, 1, H, D / H), (B, N, H, D / H)
        scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * attention.scale  # (B, H, 1, N)
        return scores.float().softmax(dim=-1).squeeze(2)


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
        return self.last_layer(nn.functional.normalize(self.mlp(x), dim=-1))


# -------------------------------------------------------------------------------------- weights in
@dataclass
class BackboneOptions:
    """Which frozen backbone to evaluate."""

    pretrained: Annotated[str, tyro.conf.arg(aliases=("--pretrained-weights",))] = ""
    """Weights: a run folder, checkpoint.pth, *.safetensors, a DINO .pth, timm:NAME (downloads) or
    none (a random ViT-S/16). Empty: the newest run under runs/."""
    checkpoint_key: Literal["teacher", "student"] = "teacher"
    """Which network of a checkpoint that holds both."""
    image_size: int = 0
    """Side of the square input in pixels; 0: the size the backbone was trained at."""


@dataclass(frozen=True)
class Weights:
    """Backbone weights under timm's names, with what is known of their origin."""

    state: dict[str, Tensor] = field(repr=False)
    spec: BackboneSpec
    path: str
    sha256: str  # of the file
    run: Path | None = None  # the run folder they belong to, if any
    run_options: dict[str, Any] = field(default_factory=dict)  # that run's, if any
    network: str = ""  # teacher or student, of a file that may hold both


def read_weights(source: str, checkpoint_key: str = "teacher") -> Weights:
    """Read backbone weights from what `--pretrained` and `--init` take.

    Position embeddings keep their grid; `load_weights` resamples them. The network is used for
    `timm:NAME` alone. Raises InputError for missing, damaged or unknown files.
    """
    if source == "none":
        spec = BackboneSpec("vit_small", 16, 224)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            state = Backbone(spec).state_dict()
        return Weights(state, spec, "none", _digest(state))
    if source.startswith("timm:"):
        return _read_timm(source)
    path = Path(source)
    if path.is_dir():
        path /= "backbone.safetensors" if checkpoint_key == "teacher" else "checkpoint.pth"
    if not path.is_file():
        raise InputError(
            f"{path}: no such weights; expected a run folder, a .pth or .safetensors file, "
            "timm:NAME or none"
        )
    if path.suffix == ".safetensors" and checkpoint_key != "teacher":
        raise InputError(f"{path}: holds one network; name the run's checkpoint.pth instead")
    if path.suffix == ".safetensors":
        state, meta = _read_safetensors(path)
    else:
        state, meta = _read_torch(path, checkpoint_key)
    spec = BackboneSpec(**meta["spec"]) if "spec" in meta else infer_spec(state, path)
    run = path.parent if (path.parent / "config.yaml").is_file() else None
    network = "" if path.suffix == ".safetensors" else checkpoint_key
    return Weights(state, spec, str(path), sha256_of(path), run, meta.get("options", {}), network)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a safetensors file and the JSON of its metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: is not a readable safetensors file ({error})") from None
    return _clean(state), json.loads(metadata.get("ssrl", "{}"))


def _read_torch(path: Path, checkpoint_key: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a .pth: ours, DINO's with student and teacher, or a plain state dict."""
    content = load_torch(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a dict of weights")
    names = (n for n in (checkpoint_key, "state_dict", "model") if isinstance(content.get(n), dict))
    nested = content.get(next(names, None), content)
    if not all(isinstance(value, Tensor) for value in nested.values()):
        raise InputError(
            f"{path}: no weights under {checkpoint_key!r} (--checkpoint-key); found {list(content)}"
        )
    meta = {k: content[k] for k in ("spec", "options") if isinstance(content.get(k), dict)}
    return _clean(nested), meta if "spec" in meta else {}


def _clean(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove wrappers' prefixes at the front of names, and heads (classifier or projection)."""
    cleaned = {}
    for name, value in state.items():
        for prefix in ("_orig_mod.", "module.", "_orig_mod.", "backbone."):
            name = name.removeprefix(prefix)
        if not name.startswith("head."):
            cleaned[name] = value
    return cleaned


def _read_timm(source: str) -> Weights:
    """Download (or take from its cache) a pretrained ViT of timm."""
    name = source.removeprefix("timm:")
    if not timm.is_model(name.split(".")[0]):
        raise InputError(f"{source}: timm has no such model; try timm:vit_small_patch16_224.dino")
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # a download fails in many ways, none of them ours
        raise InputError(
            f"{source}: could not be downloaded ({type(error).__name__}: {error}). Without "
            "network, copy the weights' file here and name it instead; none is from scratch"
        ) from None
    state, config = model.state_dict(), model.pretrained_cfg
    spec = replace(infer_spec(state, Path(name)), mean=config["mean"], std=config["std"])
    return Weights(state, spec, source, _digest(state))


def _digest(state: dict[str, Tensor]) -> str:
    """Return the SHA-256 of weights that have no file."""
    return hashlib.sha256(b"".join(v.numpy().tobytes() for v in state.values())).hexdigest()


def infer_spec(state: dict[str, Tensor], path: Path) -> BackboneSpec:
    """Tell architecture, patch and image size from the shapes of timm-named weights.

    Raises InputError when they are not those of a ViT that this project has.
    """
    try:
        width, _, patch, _ = state["patch_embed.proj.weight"].shape
        tokens = state["pos_embed"].shape[1] - 1
    except (KeyError, ValueError):
        first = ", ".join(list(state)[:5])
        raise InputError(f"{path}: these are not a ViT's weights (names begin: {first})") from None
    depth, side = (
        len({n.split(".")[1] for n in state if n.startswith("blocks.")}),
        math.isqrt(tokens),
    )
    for arch, dimensions in ARCHS.items():
        if dimensions[:2] == (width, depth) and side**2 == tokens:
            return BackboneSpec(arch, patch, side * patch)
    known = f"{width} wide, {depth} blocks, {tokens} positions; known: {', '.join(ARCHS)}"
    raise InputError(f"{path}: a ViT of other dimensions ({known})")


def load_weights(backbone: Backbone, weights: Weights) -> None:
    """Load strictly, resampling the position embedding (bicubic) to the backbone's grid.

    Raises InputError listing missing, unexpected and mis-shaped names; never loads in part.
    """
    state, own = dict(weights.state), backbone.state_dict()
    grid = weights.spec.image_size // weights.spec.patch_size
    if "pos_embed" in state and state["pos_embed"].shape != own["pos_embed"].shape:
        new_size = list(backbone.patch_embed.grid_size)
        state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], new_size, [grid, grid])
    shapes = {k: (tuple(state[k].shape), tuple(own[k].shape)) for k in own.keys() & state.keys()}
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "of another shape": [f"{k} {a} instead of {b}" for k, (a, b) in shapes.items() if a != b],
    }
    if any(problems.values()):
        listed = "".join(f"\n  {k}: {', '.join(v[:8])}" for k, v in problems.items() if v)
        name = f"{backbone.spec.arch}, patch {backbone.spec.patch_size}"
        raise InputError(f"{weights.path}: does not fit {name}{listed}")
    backbone.load_state_dict(state)


def load_backbone(weights: Weights) -> Backbone:
    """Return the frozen backbone of these weights, in evaluation mode."""
    backbone = Backbone(weights.spec)
    load_weights(backbone, weights)
    return backbone.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------- weights out
def save_backbone(backbone: Backbone, path: Path, options: dict[str, Any]) -> None:
    """Write weights under timm's names as safetensors, atomically.

    Metadata: `architecture` (timm's model name where one exists) and `ssrl`, a JSON object with the
    BackboneSpec (arch, patch_size, image_size, mean, std) and the run's options.
    """
    state = {k: v.detach().cpu().contiguous() for k, v in backbone.state_dict().items()}
    meta = json.dumps({"spec": asdict(backbone.spec), "options": options})
    metadata = {"ssrl": meta, "architecture": backbone.spec.timm_name}
    write_atomic(path, lambda temporary: save_file(state, temporary, metadata=metadata))
