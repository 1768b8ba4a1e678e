"""Show where the last layer's [CLS] attends in photographs.

    python visualize_attention.py --image img.jpeg
    python visualize_attention.py --pretrained runs/NAME --image FOLDER a.jpeg --image-size 960

Writes RUN/attention/ for each photograph: <name>.png (input, mean, overlay, mask and heads side by
side), <name>_mean.png, _overlay.png, _mask.png, _head<i>.png and <name>.npz with the numbers.
Shapes: S the photograph's side in pixels, H heads, h w the grid of patches, N tokens.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from PIL import Image
from tqdm import tqdm

from devices import autocast, autocast_dtype, choose_device, use_fast_matmul
from evaluation import open_weights
from fundus.listing import SUFFIXES
from fundus.photographs import PhotographError, load_photograph
from utils import Bounds, InputError, RunOptions, log, run_main, sha256_of, write_atomic
from vision_transformer import Backbone
from weights import BackboneOptions, load_backbone


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
        while unique in photographs:
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
    device = backbone.device
    patch = backbone.spec.patch_size
    side = photograph.shape[0]
    grid = math.ceil(side / patch)
    image = torch.zeros(1, 3, grid * patch, grid * patch, dtype=torch.uint8, device=device)
    image[..., :side, :side] = torch.from_numpy(photograph).to(device).permute(2, 0, 1)

    with autocast(device, dtype):
        attention = backbone.cls_attention(backbone.normalize(image))[0]  # (H, N)
    of_patches = attention[:, backbone.num_prefix_tokens :].float().cpu()
    maps = of_patches.reshape(-1, grid, grid)
    return (maps / maps.sum(dim=(1, 2), keepdim=True)).numpy()


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


# ------------------------------------------------------------------------------------- the program
def main(options: Options, config: Path | None) -> None:
    """Draw the maps of every photograph; one that cannot be read does not cost the others."""
    photographs = find_photographs(options.image)
    weights, output = open_weights(options, "attention")
    device = choose_device(options.device)
    use_fast_matmul(device)
    dtype = autocast_dtype(options.precision, device)
    backbone = load_backbone(weights).to(device)
    patch = backbone.spec.patch_size

    failed = []
    for name, path in tqdm(photographs.items(), desc="attention", disable=None):
        try:
            photograph = load_photograph(path, options.image_size)
        except PhotographError as error:
            failed.append(f"{path}: {error}")
            continue
        origin = (f"{weights.sha256} {weights.network}".strip(), sha256_of(path))
        if not options.overwrite:
            check_results(output / f"{name}.npz", origin)

        attention = attend(backbone, photograph, dtype)
        mask = strongest(attention.mean(axis=0), options.threshold)
        pictures = draw(photograph, attention, mask, patch)
        numbers = {
            "attention": attention,
            "mask": mask,
            "threshold": np.array(options.threshold),
            "patch_size": np.array(patch),
            "backbone": np.array(origin[0]),
            "photograph": np.array(origin[1]),
        }
        write_results(output, name, pictures, numbers)

    log.info("%d photographs in %s", len(photographs) - len(failed), output)
    if failed:
        raise InputError("no attention for\n  " + "\n  ".join(failed))


if __name__ == "__main__":
    run_main(main, Options)
