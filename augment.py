"""Random views of a photograph: multi-crop geometry for each image, colour for a whole batch.

Geometry runs in the loader's workers on uint8 tensors. Colour runs on the device for all crops of
a batch at once; its parameters are drawn in the worker, from a generator keyed by (seed, epoch,
image), so that nothing depends on the number of workers or on the device.
Strengths are DINO's (arXiv 2104.14294, appendix; BYOL's before it).
Shapes: B batch, V local views, N patches of a crop, M masked patches of a batch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from utils import Bounds, InputError

# Grey as Pillow has it (ITU-R 601), and the colour space in which hue is an angle.
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
RGB_TO_YIQ = np.array([LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]], dtype=np.float32)
YIQ_TO_RGB = np.linalg.inv(RGB_TO_YIQ)
COLOR = np.eye(3, dtype=np.float32)
GREY = np.outer(np.ones(3, dtype=np.float32), LUMA)

# What turning YIQ's chroma plane by an angle makes of RGB: KEPT + cos COSINE + sin SINE.
KEPT = YIQ_TO_RGB @ np.diag([1, 0, 0]) @ RGB_TO_YIQ
COSINE = YIQ_TO_RGB @ np.diag([0, 1, 1]) @ RGB_TO_YIQ
SINE = YIQ_TO_RGB @ np.array([[0, 0, 0], [0, 0, -1], [0, 1, 0]]) @ RGB_TO_YIQ

# What the 15 numbers of a crop's colour change are, in this order.
MATRIX = slice(0, 9)  # of RGB, 0 to 1, row by row
OFFSET = slice(9, 12)
SIGMA = 12  # of the blur in pixels; 0: none
THRESHOLD = 13  # of solarizing, NO_SOLARIZE: none
GAMMA = 14  # RGB is raised to it before all else; 1: stays

BLUR_RADIUS = 6  # pixels each side: three of the largest sigma, 2
NO_SOLARIZE = 2.0  # a threshold that no pixel reaches

# How much cameras and eyes differ: standard deviations of the logarithm of each factor.
EXPOSURE = 0.15
WHITE_BALANCE = 0.18  # of each of red, green and blue
TONE = 0.25  # of gamma
SATURATION = 0.35
CONTRAST = 0.25

CACHE = 2**18  # numbers in fp32 that, a few times over, fit a core's cache

MASK_SHARES = (0.1, 0.5)  # of a crop's patches, as DINOv2 draws them (arXiv 2304.07193)
MASK_STREAM = 1  # makes the generator of masks another one than that of views

DARKEST_FUNDUS = 16  # grey levels; JPEG leaves some noise in the black surround
FUNDUS_STEP = 8  # pixels between those that are asked whether they show the fundus
FUNDUS_TRIES = 10  # windows that are drawn until one shows enough of it; then the last one is taken

LEAST_LESION = 0.3  # share of a pixel that a lesion covers; a patch with such a pixel holds it

Window = tuple[int, int, int, int]  # top, left, height, width in pixels


# ----------------------------------------------------------------------------------------- options
@dataclass
class ViewOptions:
    """How a random view may be turned; a fundus photograph has no up, but for the optic disc."""

    flip_vertical: bool = True
    """Flip random crops upside down half the time."""
    rotation: Annotated[float, Bounds(0, 180)] = 0.0
    """Turn random crops by up to this many degrees either way."""


@dataclass
class MultiCropOptions(ViewOptions):
    """The views of self-supervised training."""

    global_crop_size: Annotated[int, Bounds(1, 4096)] = 224
    """Side of the 2 global crops in pixels."""
    local_crop_size: Annotated[int, Bounds(1, 4096)] = 96
    """Side of the local crops in pixels."""
    global_crops_scale: Annotated[tuple[float, float], Bounds(1e-4, 1)] = (0.4, 1.0)
    """Least and largest share of the photograph's area that a global crop holds."""
    local_crops_scale: Annotated[tuple[float, float], Bounds(1e-4, 1)] = (0.05, 0.4)
    """Least and largest share of the photograph's area that a local crop holds."""
    min_fundus: Annotated[float, Bounds(0, 1)] = 0.0
    """Least share of a crop that shows the fundus, which its middle then does too; 0: any."""
    local_crops_number: Annotated[int, Bounds(0, 100)] = 6
    """Local crops of each photograph."""
    jitter: Literal["dino", "camera"] = "dino"
    """How colours change. dino: its jitter, grey and solarized crops; camera: what cameras and eyes
    differ in, which is exposure, white balance, gamma, saturation and contrast."""
    color_strength: Annotated[float, Bounds(0, 2.5)] = 1.0
    """Multiplies the jitter (DINO's is 0.4 brightness, 0.4 contrast, 0.2 saturation, 0.1 hue)."""
    noise: Annotated[float, Bounds(0, 1)] = 0.0
    """Largest noise of a crop, as a Gaussian's standard deviation; 1 is from black to white."""
    blur_sigma: Annotated[tuple[float, float], Bounds(1e-3, 2)] = (0.1, 2.0)
    """Least and largest blur of a crop, as a Gaussian's sigma in pixels."""

    def check_views(self, patch_size: int) -> None:
        """Raise InputError for pairs out of order and crops that patches do not tile."""
        for name in ("global_crops_scale", "local_crops_scale", "blur_sigma"):
            least, largest = getattr(self, name)
            if least > largest:
                flag = "--" + name.replace("_", "-")
                raise InputError(f"{flag} {least} {largest}: expected the smaller number first")
        for name in ("global_crop_size", "local_crop_size"):
            size = getattr(self, name)
            if size % patch_size:
                flag = "--" + name.replace("_", "-")
                near = max(1, round(size / patch_size)) * patch_size
                raise InputError(
                    f"{flag} {size}: expected a multiple of the patch size {patch_size}, "
                    f"such as {near}"
                )


# -------------------------------------------------------------------------------- views of an image
@dataclass(frozen=True)
class ViewRecipe:
    """How the views of one kind are drawn (global 1, global 2 or local)."""

    size: int  # side in pixels
    scale: tuple[float, float]  # share of the photograph's area
    blur: float  # probability
    solarize: float  # probability


@dataclass(frozen=True)
class MultiCrop:
    """Draws 2 global and V local views of a photograph, and masks of their patches if asked.

    Planes beyond RGB are masks of lesions, 255 inside, one for each kind. They go the way of the
    photograph, and the view says which patches of the global crops hold which kinds.
    """

    options: MultiCropOptions
    mask_grid: int = 0  # patches along a global crop's side; 0: no masks are drawn
    lesion_grid: int = 0  # the same, where photographs come with masks of lesions; else 0

    @property
    def recipes(self) -> list[ViewRecipe]:
        """One recipe a view, global ones first."""
        o = self.options
        if o.jitter == "camera":
            # Both alike: what is small is to be seen in either.
            first = ViewRecipe(o.global_crop_size, o.global_crops_scale, blur=0.5, solarize=0.0)
            second = first
        else:
            first = ViewRecipe(o.global_crop_size, o.global_crops_scale, blur=1.0, solarize=0.0)
            second = ViewRecipe(o.global_crop_size, o.global_crops_scale, blur=0.1, solarize=0.2)
        local = ViewRecipe(o.local_crop_size, o.local_crops_scale, blur=0.5, solarize=0.0)
        return [first, second] + [local] * o.local_crops_number

    @property
    def min_side(self) -> int:
        """Side of the smallest photograph (square) of which no crop is enlarged."""
        sides = []
        for recipe in self.recipes:
            narrowest = math.sqrt(recipe.scale[0] * 3 / 4)  # a crop's aspect goes down to 3 to 4
            sides.append(recipe.size / narrowest)
        return math.ceil(max(sides))

    def __call__(self, photograph: Tensor, key: tuple[int, ...]) -> dict[str, Tensor]:
        """Return the views of a uint8 photograph (3 + K, h, w) for a key of non-negative integers.

        `global` (2, 3, G, G) and `local` (V, 3, L, L) are uint8; `color` (2 + V, 15) is float32, as
        MATRIX and the constants beside it say. With a mask grid, `mask` (2, N) is bool; with masks
        of lesions, `lesions` (2, N, K) is bool.
        """
        rng = np.random.default_rng(key)
        crops, colors, lesions = [], [], []
        for number, recipe in enumerate(self.recipes):
            is_global = number < 2
            planes = photograph if is_global else photograph[:3]
            crop = self._draw_crop(planes, recipe, rng)
            if is_global and self.lesion_grid:
                lesions.append(find_lesions(crop[3:], self.lesion_grid))
            crop = crop[:3]
            if self.options.noise:
                crop = add_noise(crop, rng.uniform(0, self.options.noise), rng)
            crops.append(crop)
            colors.append(self._draw_color(crop, recipe, rng))
        item = {
            "global": torch.stack(crops[:2]),
            "local": self._stack_local(crops[2:]),
            "color": torch.from_numpy(np.stack(colors)),
        }
        if self.mask_grid:
            item["mask"] = torch.from_numpy(draw_masks(self.mask_grid, key))
        if self.lesion_grid:
            item["lesions"] = torch.stack(lesions)
        return item

    def _stack_local(self, crops: list[Tensor]) -> Tensor:
        size = self.options.local_crop_size
        return torch.stack(crops) if crops else torch.empty(0, 3, size, size, dtype=torch.uint8)

    def _draw_crop(
        self, photograph: Tensor, recipe: ViewRecipe, rng: np.random.Generator
    ) -> Tensor:
        """Cut one view, turned and flipped at random."""
        window = draw_window(photograph.shape[-2:], recipe.scale, rng)
        if self.options.min_fundus:
            for _ in range(FUNDUS_TRIES - 1):
                if shows_fundus(photograph, window, self.options.min_fundus):
                    break
                window = draw_window(photograph.shape[-2:], recipe.scale, rng)
        rotation = self.options.rotation
        angle = rng.uniform(-rotation, rotation) if rotation else 0.0
        crop = cut(photograph, window, recipe.size, angle)
        return flip_at_random(crop, rng, vertical=self.options.flip_vertical)

    def _draw_color(self, crop: Tensor, recipe: ViewRecipe, rng: np.random.Generator) -> np.ndarray:
        """Draw what `apply_color` does to a crop: float32 (15,)."""
        mean = crop.float().mean(dim=(1, 2)).numpy() / 255
        gamma = 1.0
        if self.options.jitter == "camera":
            matrix_and_offset, gamma = draw_camera(mean, self.options.color_strength, rng)
        else:
            matrix_and_offset = draw_color(mean, self.options.color_strength, rng)
        sigma = 0.0
        if rng.random() < recipe.blur:
            sigma = rng.uniform(*self.options.blur_sigma)
        threshold = NO_SOLARIZE
        if rng.random() < recipe.solarize:
            threshold = 0.5
        return np.array([*matrix_and_offset, sigma, threshold, gamma], dtype=np.float32)


def find_lesions(masks: Tensor, grid: int) -> Tensor:
    """Return which patches of a crop hold which kinds of lesions, bool (N, K), row by row.

    `masks` is uint8 (K, G, G), 255 inside; `grid` is the number of patches along G.
    """
    patch = masks.shape[1] // grid
    strongest = F.max_pool2d(masks.float(), patch)  # (K, grid, grid)
    return (strongest > 255 * LEAST_LESION).flatten(1).T.contiguous()


def flip_at_random(crop: Tensor, rng: np.random.Generator, *, vertical: bool) -> Tensor:
    """Flip a crop (3, h, w) left to right half the time and, if `vertical`, upside down too."""
    turned = []
    if rng.random() < 0.5:
        turned.append(-1)
    if vertical and rng.random() < 0.5:
        turned.append(-2)
    return crop.flip(turned) if turned else crop


def draw_window(
    shape: tuple[int, int], scale: tuple[float, float], rng: np.random.Generator
) -> Window:
    """Draw a crop window (top, left, height, width) as torchvision's RandomResizedCrop does.

    Area share uniform in `scale`, aspect log-uniform in 3/4 to 4/3; after 10 misses the middle.
    """
    height, width = shape
    for _ in range(10):
        # The window may be larger than the photograph where its aspect is another one.
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w = round(math.sqrt(area * aspect))
        h = round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(rng.integers(height - h + 1))
            left = int(rng.integers(width - w + 1))
            return top, left, h, w
    h = min(height, round(width * 4 / 3))
    w = min(width, round(height * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def shows_fundus(photograph: Tensor, window: Window, least: float) -> bool:
    """Say whether a window's middle, and a share of at least `least` of it, are not black."""
    top, left, h, w = window
    middle = photograph[:3, top + h // 2, left + w // 2]
    if int(middle.amax()) <= DARKEST_FUNDUS:
        return False
    sampled = photograph[:3, top : top + h : FUNDUS_STEP, left : left + w : FUNDUS_STEP]
    return float((sampled.amax(dim=0) > DARKEST_FUNDUS).float().mean()) >= least


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Resize uint8 (C, h, w) with antialiased bicubic, equal to Pillow's within rounding."""
    # torch has its fast path for uint8 images whose channels, 4 at most, lie side by side.
    parts = []
    for channels in image.split(4):
        batch = channels.unsqueeze(0).contiguous(memory_format=torch.channels_last)
        resized = F.interpolate(batch, size=(height, width), mode="bicubic", antialias=True)
        parts.append(resized.squeeze(0))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def cut(image: Tensor, window: Window, size: int, angle: float = 0.0) -> Tensor:
    """Cut a window, turned by `angle` degrees about its middle, and resize it to (C, size, size).

    What a turned window sees beyond the photograph is black, as is a fundus photograph's surround.
    """
    top, left, h, w = window
    if not angle:
        return resize(image[:, top : top + h, left : left + w], size, size).contiguous()

    # A square that is turned fits into one |sin| + |cos| times as wide. Half of what that is wider
    # goes to either side. (The window is stretched to a square before it is turned.)
    turn = math.radians(angle)
    wider = abs(math.sin(turn)) + abs(math.cos(turn)) - 1
    margin_h = math.ceil(h * wider / 2 - 1e-6)
    margin_w = math.ceil(w * wider / 2 - 1e-6)
    tall = h + 2 * margin_h
    wide = w + 2 * margin_w

    # What of the wider window lies in the photograph, and black where it does not. A slice must not
    # end below 0, where Python counts from the other end.
    y = top - margin_h
    x = left - margin_w
    around = image[:, max(y, 0) : max(y + tall, 0), max(x, 0) : max(x + wide, 0)]
    above = max(-y, 0)
    before = max(-x, 0)
    padding = (before, wide - around.shape[2] - before, above, tall - around.shape[1] - above)
    around = resize(F.pad(around, padding), round(tall * size / h), round(wide * size / w))
    return _rotate_and_crop(around, angle, size)


def _rotate_and_crop(image: Tensor, angle: float, size: int) -> Tensor:
    """Turn uint8 (C, h, w) about its middle, bilinear, and keep the middle (C, size, size)."""
    # Where each pixel of the crop lies in the image, from the middle of both.
    radians = math.radians(angle)
    height, width = image.shape[-2:]
    steps = (torch.arange(size) + 0.5) - size / 2  # pixels from the middle
    dy, dx = torch.meshgrid(steps, steps, indexing="ij")
    # grid_sample counts from -1 to 1 over the image's sides.
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
    # A colour x becomes matrix x + offset; each change is multiplied from the left.
    matrix = COLOR
    offset = np.zeros(3, dtype=np.float32)
    if rng.random() < 0.8:
        brightness, contrast, saturation = 1 + strength * rng.uniform(-1, 1, 3) * (0.4, 0.4, 0.2)
        hue = strength * rng.uniform(-0.1, 0.1) * 2 * math.pi
        for change in rng.permutation(4):
            if change == 0:
                matrix = matrix * brightness
                offset = offset * brightness
            elif change == 1:  # x -> c x + (1 - c) grey, the mean grey after the changes so far
                grey = LUMA @ (matrix @ mean + offset)
                matrix = matrix * contrast
                offset = offset * contrast + (1 - contrast) * grey
            elif change == 2:
                matrix = _saturation(saturation) @ matrix
                offset = _saturation(saturation) @ offset
            else:
                matrix = _hue(hue) @ matrix
                offset = _hue(hue) @ offset
    if rng.random() < 0.2:
        matrix = _saturation(0.0) @ matrix
        offset = _saturation(0.0) @ offset
    return np.concatenate([matrix.ravel(), offset]).astype(np.float32)


def draw_camera(
    mean: np.ndarray, strength: float, rng: np.random.Generator
) -> tuple[np.ndarray, float]:
    """Draw another camera's, or another eye's, colours of a crop of RGB mean `mean` (0-1).

    Returns matrix and offset, float32 (12,), and the gamma that RGB is raised to before them. A
    lesion is no darker than the retina around it by hue or by brightness alone, so that none of
    both is turned off, as in DINO's grey crops.
    """
    saturation = math.exp(strength * SATURATION * rng.normal())
    gamma = math.exp(strength * TONE * rng.normal())
    balance = np.exp(strength * WHITE_BALANCE * rng.normal(size=3))
    exposure = math.exp(strength * EXPOSURE * rng.normal())
    contrast = math.exp(strength * CONTRAST * rng.normal())
    matrix = exposure * balance[:, None] * _saturation(saturation)
    # Contrast is about the mean of each channel, which what is raised to gamma has nearly there.
    offset = (1 - contrast) * (matrix @ mean**gamma)
    return np.concatenate([(contrast * matrix).ravel(), offset]).astype(np.float32), gamma


def add_noise(crop: Tensor, deviation: float, rng: np.random.Generator) -> Tensor:
    """Return a crop, uint8 (3, h, w), with a sensor's noise: normal, `deviation` of 255 strong."""
    noise = torch.from_numpy(rng.standard_normal(crop.shape, dtype=np.float32))
    return noise.mul_(255 * deviation).add_(crop).round_().clamp_(0, 255).to(torch.uint8)


def _saturation(factor: float) -> np.ndarray:
    """Return the matrix that blends RGB with its grey; 0 is grey."""
    return factor * COLOR + (1 - factor) * GREY


def _hue(angle: float) -> np.ndarray:
    """Return the matrix that turns RGB's chroma by `angle` radians, its luma kept."""
    return KEPT + math.cos(angle) * COSINE + math.sin(angle) * SINE


# ----------------------------------------------------------------------------------- masked patches
def draw_masks(grid: int, key: tuple[int, ...]) -> np.ndarray:
    """Return which patches of a photograph's 2 global crops are hidden, bool (2, grid * grid).

    One of the two crops, at random, has 10 to 50 % of its patches hidden, the other one none:
    half of all crops, as in DINOv2, and never a batch without any.
    """
    rng = np.random.default_rng((*key, MASK_STREAM))
    masks = np.zeros((2, grid * grid), dtype=bool)
    crop = rng.integers(2)
    count = max(1, round(grid * grid * rng.uniform(*MASK_SHARES)))
    masks[crop] = draw_block_mask(grid, count, rng).ravel()
    return masks


def draw_block_mask(grid: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return a mask (grid, grid) of `count` patches, in rectangles as far as they fit.

    After BEiT (arXiv 2106.08254, algorithm 1): whole blocks, since a single hidden patch is
    guessed from its neighbours.
    """
    mask = np.zeros((grid, grid), dtype=bool)
    for _ in range(10):
        left = count - int(mask.sum())
        if left < 4:
            break
        area = rng.uniform(4, left)
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        h = round(math.sqrt(area * aspect))
        w = round(math.sqrt(area / aspect))
        if not (0 < h <= grid and 0 < w <= grid):
            continue
        top = rng.integers(grid - h + 1)
        side = rng.integers(grid - w + 1)
        block = mask[top : top + h, side : side + w]
        if np.count_nonzero(~block) <= left:
            block[:] = True

    # Single patches make up what the blocks leave.
    free = np.flatnonzero(~mask)
    chosen = rng.choice(free, count - int(mask.sum()), replace=False)
    mask.ravel()[chosen] = True
    return mask


# --------------------------------------------------------------------------------- a batch of views
class PatchMasks(NamedTuple):
    """The M patches of a batch's global crops that the student does not see; all None without."""

    hidden: Tensor | None = None  # (2 B, N) bool
    index: Tensor | None = None  # (M,) int64, their places among all 2 B N patches
    weight: Tensor | None = None  # (M,) float32, 1 / (hidden patches of its crop x 2 B crops)


class CropBatch(NamedTuple):
    """The views of a batch, normalised, on their device; views are the outer dimension."""

    crops: list[Tensor]  # (2 B, 3, G, G), and (V B, 3, L, L) if V is not 0
    masks: PatchMasks
    lesions: Tensor | None = None  # (2 B, N, K) bool, which patches hold which kinds
    clean: Tensor | None = None  # (2 B, 3, G, G) uint8, the global crops before colours changed

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory of all tensors until what `stream` has been told so far is done."""
        for tensor in (*self.crops, *self.masks, self.lesions, self.clean):
            if tensor is not None:
                tensor.record_stream(stream)


def color_views(
    batch: dict[str, Tensor], device: torch.device, mean: Sequence[float], std: Sequence[float]
) -> CropBatch:
    """Bring a batch of MultiCrop's items to the device, coloured and normalised.

    `mean` and `std` are RGB's, 0 to 1.
    """
    center = _constant(tuple(mean), device)
    spread = _constant(tuple(std), device)
    clean = {}
    crops = []
    for kind, colors in (("global", batch["color"][:, :2]), ("local", batch["color"][:, 2:])):
        images = batch[kind].to(device, non_blocking=True).transpose(0, 1).flatten(0, 1)
        clean[kind] = images
        if len(images):
            rows = colors.transpose(0, 1).flatten(0, 1)
            crops.append(apply_color(images, rows, center, spread))
    masks = PatchMasks()
    if "mask" in batch:
        masks = index_masks(batch["mask"].transpose(0, 1).flatten(0, 1), device)
    lesions = None
    if "lesions" in batch:
        lesions = batch["lesions"].to(device, non_blocking=True).transpose(0, 1).flatten(0, 1)
    return CropBatch(crops, masks, lesions, clean["global"])


def index_masks(hidden: Tensor, device: torch.device) -> PatchMasks:
    """Return masks (2 B, N), bool on the CPU, on the device, with the places of their patches.

    They are counted here, on the CPU, since a GPU would be waited for.
    """
    per_crop = hidden.sum(dim=1)
    crop = hidden.nonzero()[:, 0]  # (M,)
    weight = 1 / (per_crop[crop] * len(hidden))
    parts = (hidden, hidden.flatten().nonzero()[:, 0], weight)
    return PatchMasks(*(part.to(device, non_blocking=True) for part in parts))


@functools.cache
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return numbers on a device, brought there once: a GPU would be waited for each time."""
    return torch.tensor(values, device=device)


def apply_color(crops: Tensor, color: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Change colour, blur, solarize and normalise a batch on its device.

    `crops` is uint8 (B, 3, h, w) on the device, `color` float32 (B, 15) on the CPU as drawn, `mean`
    and `std` (3,) on the device. Returns float32 (B, 3, h, w).
    """
    # A CPU takes as many crops at a time as its cache holds, a GPU all of them.
    at_a_time = len(crops)
    if not crops.is_cuda:
        at_a_time = max(1, CACHE // crops[0].numel())
    parts = zip(crops.split(at_a_time), color.split(at_a_time), strict=True)
    return torch.cat([_color_part(images, rows, mean, std) for images, rows in parts])


def _color_part(crops: Tensor, color: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Do what `apply_color` says, for all crops at once."""
    rows = color.to(crops.device, non_blocking=True)
    matrix = rows[:, MATRIX].view(-1, 3, 3)
    offset = rows[:, OFFSET].view(-1, 3, 1)
    pixels = crops.float().flatten(2)
    if (color[:, GAMMA] != 1).any():
        pixels = pixels.div_(255).pow_(rows[:, GAMMA].view(-1, 1, 1)).mul_(255)
    # All of a crop's colours change by one product, from 0-255 to 0-1.
    images = torch.baddbmm(offset, matrix / 255, pixels)
    images = images.clamp_(0, 1).view(crops.shape)

    # Which crops are blurred or solarized is asked of the CPU's copy, so that no GPU is waited for.
    blurred = (color[:, SIGMA] > 0).nonzero().squeeze(1)
    if len(blurred):
        index = blurred.to(crops.device, non_blocking=True)
        images[index] = gaussian_blur(images[index], color[blurred, SIGMA])
    solarized = (color[:, THRESHOLD] <= 1).nonzero().squeeze(1)
    if len(solarized):
        index = solarized.to(crops.device, non_blocking=True)
        chosen = images[index]
        threshold = rows[index, THRESHOLD].view(-1, 1, 1, 1)
        images[index] = torch.where(chosen >= threshold, 1 - chosen, chosen)
    return images.sub_(mean.view(3, 1, 1)).div_(std.view(3, 1, 1))


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur each image of (B, 3, h, w) with its own sigma, in pixels up to 2; edges repeat.

    `sigma` (B,) is on the CPU. A kernel reaches 3 sigma, rounded up.
    """
    # A kernel as long as the widest serves all; what lies beyond its own reach is 0.
    steps = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1)
    reach = torch.ceil(3 * sigma).view(-1, 1)
    kernel = torch.exp(-(steps**2) / (2 * sigma.view(-1, 1) ** 2)) * (steps.abs() <= reach)
    kernel = kernel / kernel.sum(dim=1, keepdim=True)  # (B, 13)
    if images.is_cuda:
        return _convolve(images, kernel.to(images.device, non_blocking=True))
    return _add_shifted(images, kernel, min(BLUR_RADIUS, int(reach.max())))


def _convolve(images: Tensor, kernel: Tensor) -> Tensor:
    """Convolve rows and columns of each image with its symmetric kernel (B, 13)."""
    # Every channel of every image is a group of its own, so that each gets its own kernel.
    batch, _, height, width = images.shape
    per_channel = kernel.repeat_interleave(3, dim=0)[:, None]  # (3 B, 1, 13)
    pad = (BLUR_RADIUS, BLUR_RADIUS)
    flat = F.pad(images.reshape(1, 3 * batch, height, width), (*pad, 0, 0), mode="replicate")
    flat = F.conv2d(flat, per_channel[:, :, None, :], groups=3 * batch)
    flat = F.pad(flat, (0, 0, *pad), mode="replicate")
    return F.conv2d(flat, per_channel[..., None], groups=3 * batch).view_as(images)


def _add_shifted(images: Tensor, kernel: Tensor, reach: int) -> Tensor:
    """Do as `_convolve`, by adding shifted images: a CPU is faster at it than at convolutions."""
    # A kernel is symmetric: one weight for the middle, one for each pair at the same distance.
    weights = kernel[:, BLUR_RADIUS:].T.reshape(-1, len(images), 1, 1, 1)
    for dim, pad in ((3, (reach, reach, 0, 0)), (2, (0, 0, reach, reach))):
        padded = F.pad(images, pad, mode="replicate")
        side = images.shape[dim]
        images = padded.narrow(dim, reach, side) * weights[0]
        for step in range(1, reach + 1):
            before = padded.narrow(dim, reach - step, side)
            after = padded.narrow(dim, reach + step, side)
            images.addcmul_(before + after, weights[step])
    return images


# ----------------------------------------------------------------------------- views of evaluations
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
    """A linear probe's random training view: a crop of area 0.08-1, flipped and turned or not.

    The defaults are the published probe's, torchvision's RandomResizedCrop and a flip left to
    right.
    """

    size: int = 224
    flip_vertical: bool = False
    rotation: float = 0.0  # degrees, either way

    def __call__(self, photograph: Tensor, key: tuple[int, ...]) -> dict[str, Tensor]:
        rng = np.random.default_rng(key)
        window = draw_window(photograph.shape[-2:], (0.08, 1.0), rng)
        angle = rng.uniform(-self.rotation, self.rotation) if self.rotation else 0.0
        crop = cut(photograph, window, self.size, angle)
        return {"image": flip_at_random(crop, rng, vertical=self.flip_vertical)}


def contact_sheet(items: list[dict[str, Tensor]]) -> np.ndarray:
    """Lay out MultiCrop's items for the eye, coloured: uint8 (h, w, 3), a photograph a row."""
    black = torch.zeros(3)
    white = torch.ones(3)
    rows = []
    for item in items:
        views = []
        for crop, color in zip([*item["global"], *item["local"]], item["color"], strict=True):
            view = apply_color(crop[None], color[None], black, white)[0]
            side = views[0].shape[-1] if views else view.shape[-1]  # the first one is the largest
            views.append(F.pad(view, (0, side - view.shape[-1], 0, side - view.shape[-2])))
        rows.append(torch.cat(views, dim=2))
    sheet = torch.cat(rows, dim=1).clamp(0, 1) * 255
    return sheet.byte().permute(1, 2, 0).numpy()
