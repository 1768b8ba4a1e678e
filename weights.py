"""Weights in and out: a backbone's files, ours and others', under timm's names."""

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
from torch import Tensor

from run_folder import load_torch
from utils import InputError, sha256_of, write_atomic
from vision_transformer import ARCHS, Backbone, BackboneSpec


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
    side, depth = math.isqrt(tokens), len({n.split(".")[1] for n in state if n[:7] == "blocks."})
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


# ------------------------------------------------------------------------------------- torch files
