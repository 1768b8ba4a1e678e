"""Random views of a photograph: multi-crop geometry for each image, colour for a whole batch.

Geometry runs in the loader's workers on uint8 tensors. Colour runs on the device for all crops of
a batch at once; its parameters are drawn in the worker, from a generator keyed by (seed, epoch,
image), so that nothing depends on the number of workers or on the device.
Strengths are DINO's (arXiv 2104.14294, appendix; BYOL's before it).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R 601, as Pillow's grey
RGB_TO_YIQ = np.array([LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]], dtype=np.float32)
YIQ_TO_RGB = np.linalg.inv(RGB_TO_YIQ)
COLOR, GREY = np.eye(3, dtype=np.float32), np.outer(np.ones(3, dtype=np.float32), LUMA)
# What turning YIQ's chroma plane by an angle makes of RGB: KEPT + cos COSINE + sin SINE.
KEPT, COSINE = (YIQ_TO_RGB @ np.diag(kept) @ RGB_TO_YIQ for kept in ([1, 0, 0], [0, 1, 1]))
SINE = YIQ_TO_RGB @ np.array([[0, 0, 0], [0, 0, -1], [0, 1, 0]]) @ RGB_TO_YIQ
BLUR_RADIUS = 6  # pixels each side: three of the largest sigma, 2
CACHE = 2**18  # numbers in fp32 that, a few times over, fit a core's cache


@dataclass(frozen=True)
class ViewRecipe:
    """How the views of one kind are drawn (global 1, global 2 or local)."""

    size: int  # side in pixels
    scale: tuple[float, float]  # share of the photograph's area
    blur: float  # probability
    solarize: float  # probability


@dataclass(frozen=True)
class MultiCrop:
    """Draws 2 global and V local views of a photograph; the fields are SSRL.py's options.

    `flip_vertical` and `rotation` (degrees, either way) suit fundus photographs, which have no
    canonical orientation up to the side of the optic disc.
    """

    global_crop_size: int = 224
    local_crop_size: int = 96
    global_crops_scale: tuple[float, float] = (0.4, 1.0)
    local_crops_scale: tuple[float, float] = (0.05, 0.4)
    local_crops_number: int = 6
    flip_vertical: bool = False
    rotation: float = 0.0
    color_strength: float = 1.0  # multiplies the jitter of brightness, contrast, saturation, hue
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels

    @property
    def min_side(self) -> int:
        """Side of the smallest photograph (square) of which no crop is enlarged."""
        narrow = ((r.size, math.sqrt(r.scale[0] * 3 / 4)) for r in self.recipes)  # at 3 to 4
        return math.ceil(max(size / share for size, share in narrow))

    @property
    def recipes(self) -> list[ViewRecipe]:
        """One recipe a view, global ones first."""
        size, scale = self.global_crop_size, self.global_crops_scale
        local = ViewRecipe(self.local_crop_size, self.local_crops_scale, blur=0.5, solarize=0.0)
        first = ViewRecipe(size, scale, blur=1.0, solarize=0.0)
        second = ViewRecipe(size, scale, blur=0.1, solarize=0.2)
        return [first, second] + [local] * self.local_crops_number

    def __call__(self, photograph: Tensor, key: tuple[int, ...]) -> dict[str, Tensor]:
        """Return the views of a uint8 photograph (3, h, w) for a key of non-negative integers.

        `global` (2, 3, G, G) and `local` (V, 3, L, L) are uint8; `color` (2 + V, 14) is float32:
        matrix 9, offset 3, blur sigma, solarize threshold.
        """
        rng = np.random.default_rng(key)
        crops, colors = [], []
        for recipe in self.recipes:
            crop = self._geometry(photograph, recipe, rng)
            mean = crop.float().mean(dim=(1, 2)).numpy() / 255
            crops.append(crop)
            row = draw_color(mean, self.color_strength, rng)
            sigma = rng.uniform(*self.blur_sigma) if rng.random() < recipe.blur else 0.0
            threshold = 0.5 if rng.random() < recipe.solarize else 2.0  # 2: no pixel reaches it
            colors.append(np.array([*row, sigma, threshold], dtype=np.float32))
        empty = torch.empty(0, 3, self.local_crop_size, self.local_crop_size, dtype=torch.uint8)
        return {
            "global": torch.stack(crops[:2]),
            "local": torch.stack(crops[2:]) if self.local_crops_number else empty,
            "color": torch.from_numpy(np.stack(colors)),
        }

    def _geometry(self, photograph: Tensor, recipe: ViewRecipe, rng: np.random.Generator) -> Tensor:
        window = draw_window(photograph.shape[-2:], recipe.scale, rng)
        angle = rng.uniform(-self.rotation, self.rotation) if self.rotation else 0.0
        crop = cut(photograph, window, recipe.size, angle)
        axes = (-1, -2) if self.flip_vertical else (-1,)
        turned = [axis for axis in axes if rng.random() < 0.5]
        return crop.flip(turned) if turned else crop


def draw_window(
    shape: tuple[int, int], scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw a crop window (top, left, height, width) as torchvision's RandomResizedCrop does.

    Area share uniform in `scale`, aspect log-uniform in 3/4 to 4/3; after 10 misses the middle.
    """
    height, width = shape
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Resize uint8 (3, h, w) with antialiased bicubic, equal to Pillow's within rounding."""
    batch = image.unsqueeze(0).contiguous(memory_format=torch.channels_last)  # its fast path
    return F.interpolate(batch, size=(height, width), mode="bicubic", antialias=True).squeeze(0)


def cut(image: Tensor, window: tuple[int, int, int, int], size: int, angle: float = 0.0) -> Tensor:
    """Cut a window, turned by `angle` degrees about its middle, and resize it to (3, size, size).

    What a turned window sees beyond the photograph is black, as is a fundus photograph's surround.
    """
    top, left, h, w = window
    if not angle:
        return resize(image[:, top : top + h, left : left + w], size, size).contiguous()
    # stretched to a square and then turned, a window needs this much more on every side
    more = abs(math.sin(math.radians(angle))) + abs(math.cos(math.radians(angle))) - 1
    pad_h, pad_w = (math.ceil(side * more / 2 - 1e-6) for side in (h, w))
    tall, wide, y, x = h + 2 * pad_h, w + 2 * pad_w, top - pad_h, left - pad_w
    around = image[:, max(y, 0) : max(y + tall, 0), max(x, 0) : max(x + wide, 0)]
    pad_y, pad_x = max(-y, 0), max(-x, 0)
    padding = (pad_x, wide - around.shape[2] - pad_x, pad_y, tall - around.shape[1] - pad_y)
    around = resize(F.pad(around, padding), round(tall * size / h), round(wide * size / w))
    return _rotate_and_crop(around, angle, size)


def _rotate_and_crop(image: Tensor, angle: float, size: int) -> Tensor:
    """Turn uint8 (3, h, w) about its middle, bilinear, and keep the middle (3, size, size)."""
    radians = math.radians(angle)
    height, width = image.shape[-2:]
    steps = (torch.arange(size) + 0.5) - size / 2  # pixels from the middle
    dy, dx = torch.meshgrid(steps, steps, indexing="ij")
    x = (dx * math.cos(radians) - dy * math.sin(radians)) * 2 / width
    y = (dx * math.sin(radians) + dy * math.cos(radians)) * 2 / height
    grid = torch.stack([x, y], dim=-1).unsqueeze(0)
    turned = F.grid_sample(image[None].float(), grid, mode="bilinear", align_corners=False)
    return turned[0].round_().clamp_(0, 255).to(torch.uint8)


def draw_color(mean: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Draw the colour change of a crop of RGB mean `mean` (0-1): matrix and offset, float32 (12,).

    Jitter (0.4, 0.4, 0.2, 0.1) with probability 0.8 in random order, then grey with 0.2. Each is an
    affine map of RGB (hue turns the chroma plane of YIQ), and so is their product: one matrix.
    """
    matrix, offset = COLOR, np.zeros(3, dtype=np.float32)
    if rng.random() < 0.8:
        factors = 1 + strength * rng.uniform(-1, 1, 3) * (0.4, 0.4, 0.2)
        hue = strength * rng.uniform(-0.1, 0.1) * 2 * math.pi
        for change in rng.permutation(4):
            if change == 0:  # brightness
                matrix, offset = matrix * factors[0], offset * factors[0]
            elif change == 1:  # contrast, about the crop's mean grey
                grey = LUMA @ (matrix @ mean + offset)
                matrix, offset = matrix * factors[1], offset * factors[1] + (1 - factors[1]) * grey
            else:
                step = _saturation(factors[2]) if change == 2 else _hue(hue)
                matrix, offset = step @ matrix, step @ offset
    if rng.random() < 0.2:
        matrix, offset = _saturation(0.0) @ matrix, _saturation(0.0) @ offset
    return np.concatenate([matrix.ravel(), offset]).astype(np.float32)


def _saturation(factor: float) -> np.ndarray:
    """Return the matrix that blends RGB with its grey; 0 is grey."""
    return factor * COLOR + (1 - factor) * GREY


def _hue(angle: float) -> np.ndarray:
    """Return the matrix that turns RGB's chroma by `angle` radians, its luma kept."""
    return KEPT + math.cos(angle) * COSINE + math.sin(angle) * SINE


def apply_color(crops: Tensor, color: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Change colour, blur, solarize and normalise a batch on its device.

    `crops` is uint8 (B, 3, h, w) on the device, `color` float32 (B, 14) on the CPU as drawn, `mean`
    and `std` (3,) on the device. Returns float32 (B, 3, h, w).
    """
    some = len(crops) if crops.is_cuda else max(1, CACHE // crops[0].numel())
    parts = zip(crops.split(some), color.split(some), strict=True)
    return torch.cat([_color(images, rows, mean, std) for images, rows in parts])


@functools.cache
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Numbers on a device, brought there once: a GPU would be waited for."""
    return torch.tensor(values, device=device)


def color_views(
    batch: dict[str, Tensor], device: torch.device, mean: Sequence[float], std: Sequence[float]
) -> list[Tensor]:
    """Bring a batch of MultiCrop's items to the device, coloured and normalised.

    Returns a tensor for each resolution, views as the outer dimension: (2 B, 3, G, G), and
    (V B, 3, L, L) if V is not 0. `mean` and `std` are RGB's, 0 to 1.
    """
    center, spread = (_constant(tuple(v), device) for v in (mean, std))
    crops = []
    for kind, color in (("global", batch["color"][:, :2]), ("local", batch["color"][:, 2:])):
        images = batch[kind].to(device, non_blocking=True).transpose(0, 1).flatten(0, 1)
        if len(images):
            crops.append(apply_color(images, color.transpose(0, 1).flatten(0, 1), center, spread))
    return crops


def _color(crops: Tensor, color: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    rows = color.to(crops.device, non_blocking=True)
    matrix, offset = rows[:, :9].view(-1, 3, 3), rows[:, 9:12].view(-1, 3, 1)
    images = torch.baddbmm(offset, matrix / 255, crops.float().flatten(2))
    images = images.clamp_(0, 1).view(crops.shape)
    blurred = (color[:, 12] > 0).nonzero().squeeze(1)  # on the CPU: no wait for the device
    if len(blurred):
        index = blurred.to(crops.device, non_blocking=True)
        images[index] = gaussian_blur(images[index], color[blurred, 12])
    solarized = (color[:, 13] <= 1).nonzero().squeeze(1)
    if len(solarized):
        index = solarized.to(crops.device, non_blocking=True)
        chosen = images[index]
        images[index] = torch.where(chosen >= rows[index, 13].view(-1, 1, 1, 1), 1 - chosen, chosen)
    return images.sub_(mean.view(3, 1, 1)).div_(std.view(3, 1, 1))


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur each image of (B, 3, h, w) with its own sigma, in pixels up to 2; edges repeat.

    `sigma` (B,) is on the CPU. A kernel reaches 3 sigma, rounded up.
    """
    steps, reach = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1), torch.ceil(3 * sigma).view(-1, 1)
    kernel = torch.exp(-(steps**2) / (2 * sigma.view(-1, 1) ** 2)) * (steps.abs() <= reach)
    kernel = kernel / kernel.sum(dim=1, keepdim=True)  # (B, 13)
    if images.is_cuda:
        return _convolve(images, kernel.to(images.device, non_blocking=True))
    return _add_shifted(images, kernel, min(BLUR_RADIUS, int(reach.max())))


def _convolve(images: Tensor, kernel: Tensor) -> Tensor:
    """Convolve rows and columns of each image with its symmetric kernel (B, 13)."""
    batch, _, height, width = images.shape
    kernel, pad = kernel.repeat_interleave(3, dim=0)[:, None], (BLUR_RADIUS,) * 2  # (3 B, 1, 13)
    flat = F.pad(images.reshape(1, 3 * batch, height, width), (*pad, 0, 0), mode="replicate")
    flat = F.conv2d(flat, kernel[:, :, None, :], groups=3 * batch)
    flat = F.pad(flat, (0, 0, *pad), mode="replicate")
    return F.conv2d(flat, kernel[..., None], groups=3 * batch).view_as(images)


def _add_shifted(images: Tensor, kernel: Tensor, reach: int) -> Tensor:
    """As `_convolve`, by adding shifted images, which a CPU does faster than such convolutions."""
    weights = kernel[:, BLUR_RADIUS:].T.reshape(-1, len(images), 1, 1, 1)
    for dim, pad in ((3, (reach, reach, 0, 0)), (2, (0, 0, reach, reach))):
        padded, side = F.pad(images, pad, mode="replicate"), images.shape[dim]
        images = padded.narrow(dim, reach, side) * weights[0]
        for step in range(1, reach + 1):
            before, after = (padded.narrow(dim, reach + way * step, side) for way in (-1, 1))
            images.addcmul_(before + after, weights[step])
    return images


@dataclass(frozen=True)
class WholeView:
    """Evaluation's view: the whole photograph, resized to `image`, uint8 (3, size, size)."""

    size: int

    def __call__(self, photograph: Tensor, _key: tuple[int, ...]) -> dict[str, Tensor]:
        return {"image": resize(photograph, self.size, self.size).contiguous()}


@dataclass(frozen=True)
class PaperView:
    """The published evaluation's view: resized to 256, middle 224, which cuts the fundus' rim."""

    def __call__(self, photograph: Tensor, _key: tuple[int, ...]) -> dict[str, Tensor]:
        return {"image": resize(photograph, 256, 256)[:, 16:240, 16:240].contiguous()}


@dataclass(frozen=True)
class ProbeView:
    """The published linear probe's training view: a crop of area 0.08-1, flipped or not."""

    size: int = 224

    def __call__(self, photograph: Tensor, key: tuple[int, ...]) -> dict[str, Tensor]:
        rng = np.random.default_rng(key)
        crop = cut(photograph, draw_window(photograph.shape[-2:], (0.08, 1.0), rng), self.size)
        return {"image": crop.flip(-1) if rng.random() < 0.5 else crop}


def contact_sheet(items: list[dict[str, Tensor]]) -> np.ndarray:
    """Lay out MultiCrop's items for the eye, coloured: uint8 (h, w, 3), a photograph a row."""
    rows, zero, one = [], torch.zeros(3), torch.ones(3)
    for item in items:
        pairs = zip([*item["global"], *item["local"]], item["color"], strict=True)
        views = [apply_color(crop[None], row[None], zero, one)[0] for crop, row in pairs]
        side = views[0].shape[-1]
        padded = [F.pad(v, (0, side - v.shape[-1], 0, side - v.shape[-2])) for v in views]
        rows.append(torch.cat(padded, dim=2))
    return (torch.cat(rows, dim=1).clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
