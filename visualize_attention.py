"""Show where the last layer's [CLS] attends in photographs.

    python visualize_attention.py --image img.jpeg
    python visualize_attention.py --pretrained runs/NAME --image FOLDER a.jpeg --image-size 960
    python visualize_attention.py --pretrained runs/NAME --image FOLDER --masks MASKS

Writes RUN/attention/ for each photograph: <name>.png (input, mean, overlay, mask and heads side by
side), <name>_mean.png, _overlay.png, _mask.png, _head<i>.png and <name>.npz with the numbers.
With masks of lesions it says whether attention lies on them, and whether patch tokens tell them:
lesions.json, lesions.csv and lesions.png.
Shapes: S the photograph's side in pixels, H heads, h w the grid of patches, N tokens.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from PIL import Image
from tqdm import tqdm

from devices import autocast, autocast_dtype, choose_device, use_fast_matmul
from evaluation import open_weights
from fundus import lesion_probe, lesion_scores
from fundus.lesion_report import Study, evaluate_lesions, plot_lesions, summary_lines, table_of
from fundus.lesion_scores import cut_patches, holds_lesion, score_photograph
from fundus.lesions import Lesions, MaskFiles, count_classes, find_masks, patient_of, read_lesions
from fundus.listing import SUFFIXES
from fundus.photographs import PhotographError, read_photograph
from run_folder import versions
from utils import Bounds, InputError, RunOptions, log, run_main, sha256_of, write_atomic, write_json
from vision_transformer import Backbone
from weights import BackboneOptions, Weights, load_backbone

# Names of files in the output that are no photograph's.
RESERVED = ("lesions",)

# What the patch tokens of all photographs with masks may take in memory.
MAX_TOKEN_BYTES = 8 * 10**9


# ----------------------------------------------------------------------------------------- options
@dataclass
class Options(BackboneOptions, RunOptions):
    """Attention maps of the last layer's [CLS]."""

    image: Annotated[tuple[str, ...], tyro.conf.arg(aliases=("--image-path",))] = ()
    """Photographs, or folders of them."""
    image_size: Annotated[int, Bounds(16, 4096)] = 480
    """Side in pixels that the squared photograph is brought to, padded to full patches."""
    threshold: Annotated[float, Bounds(1e-3, 1)] = 0.6
    """The mask keeps the patches that hold this share of the attention, the strongest first."""
    masks: str = ""
    """Folder of lesion masks, CLASS/PHOTOGRAPH.png or PHOTOGRAPH_CLASS.png, in the photographs' own
    size: is attention on lesions? Empty: not asked."""
    dilate: Annotated[float, Bounds(0, 16)] = 0.5
    """By how many patches' sides lesions are widened for lift and pointing game, since attention is
    no finer than a patch."""
    draws: Annotated[int, Bounds(100, 100_000)] = 1000
    """Draws of the turned null and of the bootstrap over patients."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.image:
            raise InputError("--image: name a photograph or a folder of them")


# ------------------------------------------------------------------------------------- photographs
def find_photographs(names: Sequence[str]) -> dict[str, Path]:
    """Return photographs by the name of their results; raises InputError for what is not there.

    The name is the file's, with its folders inside a folder that was named: sub_a for FOLDER/sub/a.
    A name that is taken gets a number behind it.
    """
    found: list[tuple[str, Path]] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            found += list_folder(path)
        elif path.is_file():
            found.append((path.stem, path))
        else:
            raise InputError(f"--image {name}: no such file or folder")

    stems = {stem for stem, _ in found}
    photographs: dict[str, Path] = {}
    for stem, path in found:
        number = 1
        unique = stem
        # Beside a.png, the input of a_mask.png would be written where a's mask is.
        owner = re.sub(r"_(mean|overlay|mask|head\d+)$", "", stem)
        if owner != stem and owner in stems:
            unique = f"{stem}-1"
        while unique in photographs or unique in RESERVED:
            number += 1
            unique = f"{stem}-{number}"
        photographs[unique] = path
    return photographs


def list_folder(folder: Path) -> list[tuple[str, Path]]:
    """Return (name, file) of all photographs in a folder; raises InputError if there is none."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise InputError(f"--image {folder}: no photograph in this folder ({' '.join(SUFFIXES)})")
    named = []
    for file in files:
        parts = file.relative_to(folder).with_suffix("").parts
        named.append(("_".join(parts), file))
    return named


# --------------------------------------------------------------------------------------- attention
@torch.inference_mode()
def attend(backbone: Backbone, photograph: np.ndarray, dtype: torch.dtype | None) -> np.ndarray:
    """Return the attention (H, h, w) of a uint8 photograph (S, S, 3), each head summing to 1.

    The photograph is padded with black, right and below, to a multiple of the patch. What [CLS]
    gives to itself and to registers is left out before each head is scaled to 1.
    """
    image = pad_photograph(backbone, photograph)
    grid = image.shape[2] // backbone.spec.patch_size
    with autocast(backbone.device, dtype):
        attention = backbone.cls_attention(backbone.normalize(image))[0]  # (H, N)
    of_patches = attention[:, backbone.num_prefix_tokens :].float().cpu()
    maps = of_patches.reshape(-1, grid, grid)
    return (maps / maps.sum(dim=(1, 2), keepdim=True)).numpy()


@torch.inference_mode()
def patch_tokens(
    backbone: Backbone, photograph: np.ndarray, dtype: torch.dtype | None
) -> np.ndarray:
    """Return the normed patch tokens of a photograph padded as `attend` does, float32 (h w, D)."""
    image = pad_photograph(backbone, photograph)
    with autocast(backbone.device, dtype):
        tokens = backbone.all_tokens(backbone.normalize(image)).patches[0]
    return tokens.float().cpu().numpy()


def pad_photograph(backbone: Backbone, photograph: np.ndarray) -> torch.Tensor:
    """Return a photograph (S, S, 3) as uint8 (1, 3, h patch, w patch) on the backbone's device."""
    device = backbone.device
    side = photograph.shape[0]
    padded = math.ceil(side / backbone.spec.patch_size) * backbone.spec.patch_size
    image = torch.zeros(1, 3, padded, padded, dtype=torch.uint8, device=device)
    image[..., :side, :side] = torch.from_numpy(photograph).to(device).permute(2, 0, 1)
    return image


def strongest(attention: np.ndarray, share: float) -> np.ndarray:
    """Return the fewest patches of a map (h, w) that hold `share` of its mass, as bool (h, w)."""
    order = np.argsort(-attention, axis=None, kind="stable")
    mass = np.cumsum(attention.ravel()[order])
    # A little less than the share, since rounding of the sum must not cost a patch more.
    enough = share * mass[-1] * (1 - 1e-6)
    count = int(np.searchsorted(mass, enough)) + 1
    mask = np.zeros(attention.size, dtype=bool)
    mask[order[:count]] = True
    return mask.reshape(attention.shape)


# ---------------------------------------------------------------------------------------- pictures
def draw(
    photograph: np.ndarray, attention: np.ndarray, mask: np.ndarray, patch: int
) -> dict[str, Image.Image]:
    """Return the pictures of one photograph by the ending of their name, all of its size.

    `photograph` is uint8 (S, S, 3), `attention` (H, h, w), `mask` bool (h, w). The one without an
    ending shows the photograph and all others side by side.
    """
    side = photograph.shape[0]
    plain = Image.fromarray(photograph)
    mean = draw_map(attention.mean(axis=0), patch, side)
    inside = enlarge(mask.astype(np.uint8) * 255, patch, side, Image.Resampling.NEAREST) > 0
    masked = np.where(inside[..., None], photograph, photograph // 4)

    pictures = {
        "_mean": mean,
        "_overlay": Image.blend(plain, mean, 0.5),
        "_mask": Image.fromarray(masked),
    }
    for number, head in enumerate(attention):
        pictures[f"_head{number}"] = draw_map(head, patch, side)

    columns = [plain, *pictures.values()]
    sheet = Image.new("RGB", (side * len(columns), side))
    for number, picture in enumerate(columns):
        sheet.paste(picture, (number * side, 0))
    pictures[""] = sheet
    return pictures


def draw_map(values: np.ndarray, patch: int, side: int) -> Image.Image:
    """Return a map (h, w) as a picture (side, side) from dark to bright."""
    from matplotlib import colormaps

    # A few patches may hold most of the attention; they alone may saturate.
    low = values.min()
    high = np.quantile(values, 0.995)
    scaled = np.clip((values - low) / max(high - low, 1e-12), 0, 1).astype(np.float32)
    smooth = enlarge(scaled, patch, side, Image.Resampling.BICUBIC)
    colors = colormaps["inferno"](np.clip(smooth, 0, 1))[..., :3]  # without opacity
    return Image.fromarray((colors * 255).astype(np.uint8))


def enlarge(values: np.ndarray, patch: int, side: int, resample: Image.Resampling) -> np.ndarray:
    """Return a map (h, w) at the photograph's size (side, side), without the padding."""
    height, width = values.shape
    large = Image.fromarray(values).resize((width * patch, height * patch), resample)
    return np.asarray(large)[:side, :side]


# ----------------------------------------------------------------------------------------- results
def check_results(path: Path, origin: tuple[str, str]) -> None:
    """Raise InputError if a .npz of ours at `path` has another origin (read_origin)."""
    if path.is_file() and read_origin(path) != origin:
        raise InputError(
            f"{path}: is of other weights or another photograph; --overwrite replaces it, "
            "--output-dir spares it"
        )


def read_origin(path: Path) -> tuple[str, str]:
    """Return what a .npz of ours says of its weights and photograph; empty where it is damaged."""
    try:
        with np.load(path) as numbers:
            return str(numbers["backbone"]), str(numbers["photograph"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return "", ""


def write_results(
    output: Path, name: str, pictures: dict[str, Image.Image], numbers: dict[str, np.ndarray]
) -> None:
    """Write pictures as PNG and numbers as .npz, each whole or not at all."""
    for ending, picture in pictures.items():
        write_picture(output / f"{name}{ending}.png", picture)

    def write(path: Path) -> None:
        with path.open("wb") as file:
            np.savez_compressed(file, **numbers)

    write_atomic(output / f"{name}.npz", write)


def write_picture(path: Path, picture: Image.Image) -> None:
    """Write a picture as PNG."""
    write_atomic(path, lambda temporary: picture.save(temporary, "PNG"))


# ----------------------------------------------------------------------------------------- lesions
def study_photograph(
    backbone: Backbone,
    name: str,
    picture: np.ndarray,
    attention: np.ndarray,
    lesions: Lesions,
    options: Options,
) -> Study:
    """Return what the evaluation of lesions needs of one photograph.

    `picture` is uint8 (S, S, 3), `attention` (H, h, w).
    """
    patch = backbone.spec.patch_size
    dtype = autocast_dtype(options.precision, backbone.device)
    counted = cut_patches(lesions.inside, patch).counted
    held = {}
    for lesion, share in lesions.shares.items():
        held[lesion] = holds_lesion(share, patch)[counted]
    # 16 bits hold a normed token well enough, and all of a data set's tokens stay in memory.
    tokens = patch_tokens(backbone, picture, dtype)[counted].astype(np.float16)
    features = {"tokens": tokens, "color": lesion_probe.patch_colors(picture, patch, counted)}
    scores = score_photograph(attention, lesions, patch, options.dilate * patch)
    return Study(name, patient_of(name), scores, held, features)


def lesion_settings(
    options: Options,
    weights: Weights,
    photographs: Mapping[str, Path],
    masks: Mapping[str, MaskFiles],
) -> dict[str, Any]:
    """Return all that lesions.json depends on."""
    rows = []
    for name in sorted(masks):
        files = {lesion: sha256_of(path) for lesion, path in sorted(masks[name].items())}
        rows.append((name, sha256_of(photographs[name]), files))
    patch = weights.spec.patch_size
    return {
        "backbone": {
            "path": weights.path,
            "sha256": weights.sha256,
            "network": weights.network,
            "arch": weights.spec.arch,
            "patch_size": patch,
        },
        "data": {
            "photographs": len(masks),
            "masks": count_classes(masks),
            "fingerprint": hashlib.sha256(repr(rows).encode()).hexdigest(),
        },
        "image_size": options.image_size,
        "precision": options.precision,
        "dilate": {"patches": options.dilate, "pixels": options.dilate * patch},
        "lesion_share_of_patch": lesion_scores.LESION_SHARE,
        "null": {"turns": lesion_scores.TURNS, "least_kept": lesion_scores.LEAST_KEPT},
        "probe": lesion_probe.SETTINGS,
        "draws": options.draws,
        "seed": options.seed,
    }


def check_lesions(path: Path, settings: dict[str, Any]) -> None:
    """Raise InputError if a lesions.json at `path` has other settings, and says which."""
    if not path.is_file():
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["settings"]
        differing = [name for name in settings if found.get(name) != settings[name]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        differing = ["everything, since it is damaged"]
    if differing:
        raise InputError(
            f"{path}: differs in {', '.join(differing)}; --overwrite replaces it, --output-dir "
            "spares it"
        )


def write_lesions(
    output: Path, settings: dict[str, Any], studies: Sequence[Study], options: Options
) -> None:
    """Evaluate the photographs with masks; print the tables, write lesions.json, .csv and .png."""
    classes, rows = evaluate_lesions(studies, options.draws, options.seed)
    if not classes:
        raise InputError(f"--masks {options.masks}: no mask has a lesion inside the fundus")
    results = {
        "settings": settings,
        "photographs": len(studies),
        "classes": classes,
        "versions": versions(),
        "command": sys.argv,
    }
    table = table_of(rows)
    plot_lesions(classes, output / "lesions.png")
    write_atomic(output / "lesions.csv", lambda path: path.write_text(table, "utf-8"))
    write_json(output / "lesions.json", results)  # the last: what has it is complete
    print("\n".join(["", f"lesions of {len(studies)} photographs, {output}"]))
    print("\n".join(summary_lines(classes)))


def open_masks(options: Options, photographs: Mapping[str, Path]) -> dict[str, MaskFiles]:
    """Return the masks of each photograph by class; none where `--masks` does not ask."""
    if not options.masks:
        return {}
    masks = find_masks(Path(options.masks), photographs)
    without = len(photographs) - len(masks)
    if without:
        log.info("%d photographs have no mask at all and take no part in lesions.json", without)
    return masks


def check_memory(backbone: Backbone, count: int, image_size: int) -> None:
    """Raise InputError where the tokens of `count` photographs would take too much memory."""
    patches = math.ceil(image_size / backbone.spec.patch_size) ** 2
    size = count * patches * backbone.embed_dim * 2
    if size > MAX_TOKEN_BYTES:
        raise InputError(
            f"--masks: the tokens of {count} photographs at {image_size} px take {size / 1e9:.1f} "
            f"GB; expected {MAX_TOKEN_BYTES / 1e9:.0f} or less: fewer photographs, or a smaller "
            "--image-size"
        )


# ------------------------------------------------------------------------------------- the program
def main(options: Options, config: Path | None) -> None:
    """Draw the maps of every photograph; one that cannot be read does not cost the others."""
    photographs = find_photographs(options.image)
    masks = open_masks(options, photographs)
    weights, output = open_weights(options, "attention")
    settings = lesion_settings(options, weights, photographs, masks)
    if masks and not options.overwrite:
        check_lesions(output / "lesions.json", settings)
    device = choose_device(options.device)
    use_fast_matmul(device)
    dtype = autocast_dtype(options.precision, device)
    backbone = load_backbone(weights).to(device)
    check_memory(backbone, len(masks), options.image_size)
    patch = backbone.spec.patch_size

    failed = []
    studies = []
    for name, path in tqdm(photographs.items(), desc="attention", disable=None):
        lesions = None
        try:
            photograph = read_photograph(path, options.image_size)
            if name in masks:
                lesions = read_lesions(masks[name], photograph, options.image_size)
        except PhotographError as error:
            failed.append(f"{path}: {error}")
            continue
        origin = (f"{weights.sha256} {weights.network}".strip(), sha256_of(path))
        if not options.overwrite:
            check_results(output / f"{name}.npz", origin)

        picture = photograph.picture
        attention = attend(backbone, picture, dtype)
        mask = strongest(attention.mean(axis=0), options.threshold)
        pictures = draw(picture, attention, mask, patch)
        numbers = {
            "attention": attention,
            "mask": mask,
            "threshold": np.array(options.threshold),
            "patch_size": np.array(patch),
            "backbone": np.array(origin[0]),
            "photograph": np.array(origin[1]),
        }
        write_results(output, name, pictures, numbers)
        if lesions:
            study = study_photograph(backbone, name, picture, attention, lesions, options)
            studies.append(study)

    log.info("%d photographs in %s", len(photographs) - len(failed), output)
    if studies:
        write_lesions(output, settings, studies, options)
    if failed:
        raise InputError("no attention for\n  " + "\n  ".join(failed))


if __name__ == "__main__":
    run_main(main, Options)
