"""Show where the last layer's [CLS] attends in photographs.

    python visualize_attention.py --image img.jpeg
    python visualize_attention.py --pretrained runs/NAME --image FOLDER a.jpeg --image-size 960

Writes RUN/attention/ for each photograph: <name>.png (input, mean, overlay, mask and heads side by
side), <name>_mean.png, _overlay.png, _mask.png, _head<i>.png and <name>.npz with the numbers.
Shapes: H heads, h w the patch grid.
"""

from __future__ import annotations

import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from PIL import Image
from tqdm import tqdm

from devices import autocast_dtype, pick_device
from evaluation import open_weights
from fundus.listing import SUFFIXES
from fundus.photographs import PhotographError, load_photograph
from utils import InputError, RunOptions, log, run_main, sha256_of, write_atomic
from vision_transformer import Backbone
from weights import BackboneOptions, load_backbone


@dataclass
class Options(BackboneOptions, RunOptions):
    """Attention maps of the last layer's [CLS]."""

    image: Annotated[tuple[str, ...], tyro.conf.arg(aliases=("--image-path",))] = ()
    """Photographs, or folders of them."""
    image_size: int = 480
    """Side in pixels that the squared photograph is brought to, padded to full patches."""
    threshold: float = 0.6
    """The mask keeps the patches that hold this share of the attention, the strongest first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.image:
            raise InputError("--image: name a photograph or a folder of them")
        if not 0 < self.threshold <= 1:
            raise InputError(f"--threshold {self.threshold}: a share, above 0 and up to 1 (0.6)")
        if self.image_size < 16:
            raise InputError(f"--image-size {self.image_size}: expected 16 or more pixels")


def find_photographs(names: tuple[str, ...]) -> dict[str, Path]:
    """Return photographs by the name of their results; raises InputError for what is not there."""
    found: list[tuple[str, Path]] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
            if not inside:
                raise InputError(
                    f"--image {name}: no photograph in this folder ({' '.join(SUFFIXES)})"
                )
            found += [("_".join(p.relative_to(path).with_suffix("").parts), p) for p in inside]
        elif path.is_file():
            found.append((path.stem, path))
        else:
            raise InputError(f"--image {name}: no such file or folder")
    stems, named = {stem for stem, _ in found}, {}
    for stem, path in found:
        base = re.sub(r"_(mean|overlay|mask|head\d+)$", "", stem)  # a_mask beside a: also a's mask
        unique, count = stem if base == stem or base not in stems else f"{stem}-1", 2
        while unique in named:
            unique, count = f"{stem}-{count}", count + 1
        named[unique] = path
    return named


@torch.inference_mode()
def attend(backbone: Backbone, photograph: np.ndarray, dtype: torch.dtype | None) -> np.ndarray:
    """Return the attention (H, h, w) of a uint8 photograph (S, S, 3), each head summing to 1.

    The photograph is padded with black, right and below, to a multiple of the patch; what [CLS]
    gives to itself is left out before each head is scaled to 1.
    """
    patch, device = backbone.spec.patch_size, backbone.cls_token.device
    side = photograph.shape[0]
    grid = -(-side // patch)
    image = torch.zeros(1, 3, grid * patch, grid * patch, dtype=torch.uint8, device=device)
    image[..., :side, :side] = torch.from_numpy(photograph).to(device).permute(2, 0, 1)
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        rows = backbone.cls_attention(backbone.normalize(image))[0, :, 1:]  # (H, h w)
    maps = rows.float().cpu().reshape(-1, grid, grid)
    return (maps / maps.sum(dim=(1, 2), keepdim=True)).numpy()


def strongest(attention: np.ndarray, share: float) -> np.ndarray:
    """Return the fewest patches of a map (h, w) that hold `share` of its mass, as bool (h, w)."""
    order = np.argsort(-attention, axis=None, kind="stable")
    mass = np.cumsum(attention.ravel()[order])
    count = int(np.searchsorted(mass, share * mass[-1] * (1 - 1e-6))) + 1
    mask = np.zeros(attention.size, bool)
    mask[order[:count]] = True
    return mask.reshape(attention.shape)


def draw(
    photograph: np.ndarray, attention: np.ndarray, mask: np.ndarray, patch: int
) -> dict[str, Image.Image]:
    """Return the pictures of one photograph by the ending of their name, all of its size."""
    from matplotlib import colormaps

    side = photograph.shape[0]

    def enlarge(values: np.ndarray, resample: Image.Resampling) -> np.ndarray:
        size = (values.shape[1] * patch, values.shape[0] * patch)
        return np.asarray(Image.fromarray(values).resize(size, resample))[:side, :side]

    def colored(values: np.ndarray) -> Image.Image:
        low, high = values.min(), np.quantile(values, 0.995)
        scaled = np.clip((values - low) / max(high - low, 1e-12), 0, 1).astype(np.float32)
        large = enlarge(scaled, Image.Resampling.BICUBIC)
        return Image.fromarray(
            (colormaps["inferno"](np.clip(large, 0, 1))[..., :3] * 255).astype(np.uint8)
        )

    input_image, mean_map = Image.fromarray(photograph), colored(attention.mean(axis=0))
    inside = enlarge(mask.astype(np.uint8) * 255, Image.Resampling.NEAREST) > 0
    masked = np.where(inside[..., None], photograph, photograph // 4)
    pictures = {"": input_image, "_mean": mean_map}
    pictures["_overlay"] = Image.blend(input_image, mean_map, 0.5)
    pictures["_mask"] = Image.fromarray(masked)
    pictures |= {f"_head{i}": colored(head) for i, head in enumerate(attention)}
    sheet = Image.new("RGB", (side * len(pictures), side))
    for column, picture in enumerate(pictures.values()):
        sheet.paste(picture, (column * side, 0))
    return pictures | {"": sheet}


def write_results(
    output: Path, name: str, pictures: dict[str, Image.Image], numbers: dict[str, np.ndarray]
) -> None:
    """Write pictures as PNG and numbers as .npz, each whole or not at all."""
    for ending, picture in pictures.items():
        write_atomic(output / f"{name}{ending}.png", lambda path, p=picture: p.save(path, "PNG"))

    def write(path: Path) -> None:
        with path.open("wb") as file:
            np.savez_compressed(file, **numbers)

    write_atomic(output / f"{name}.npz", write)


def made_of(numbers: Path) -> tuple[str, str]:
    """Return what a .npz of ours says of its weights and photograph; empty where it is damaged."""
    try:
        with np.load(numbers) as file:
            return str(file["backbone"]), str(file["photograph"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return "", ""


def main(o: Options, config: Path | None) -> None:
    """Draw the maps of every photograph; one that cannot be read does not cost the others."""
    photographs = find_photographs(o.image)
    weights, output = open_weights(o, "attention")
    device = pick_device(o.device)
    backbone, dtype = load_backbone(weights).to(device), autocast_dtype(o.precision, device)
    failed = []
    for name, path in tqdm(photographs.items(), desc="attention", disable=None):
        there = output / f"{name}.npz"
        try:
            photograph = load_photograph(path, o.image_size)
        except PhotographError as error:
            failed.append(f"{path}: {error}")
            continue
        origin = f"{weights.sha256} {weights.network}".strip(), sha256_of(path)
        if there.is_file() and not o.overwrite and made_of(there) != origin:
            what = "is of other weights or another photograph"
            raise InputError(f"{there}: {what}; --overwrite replaces it, --output-dir spares it")
        attention = attend(backbone, photograph, dtype)
        mask = strongest(attention.mean(axis=0), o.threshold)
        patch = backbone.spec.patch_size
        numbers = {
            "attention": attention,
            "mask": mask,
            "threshold": np.array(o.threshold),
            "patch_size": np.array(patch),
            "backbone": np.array(origin[0]),
            "photograph": np.array(origin[1]),
        }
        write_results(output, name, draw(photograph, attention, mask, patch), numbers)
    log.info("%d photographs in %s", len(photographs) - len(failed), output)
    if failed:
        raise InputError("no attention for\n  " + "\n  ".join(failed))


if __name__ == "__main__":
    run_main(main, Options)
