"""The published recipe, written plainly: the oracle of the fast one, and its other side in ratios.

DINO's training step (arXiv 2104.14294) as its code and that of arXiv 2410.00779 go about it: crops
and colours by Pillow in the workers, attention materialised, a residual branch computed and then
dropped, a loss over pairs of views, loops over parameters. Parameters have our names, so weights
can be exchanged; nothing here imports what it is compared with.
Shapes: B batch, V views, N tokens, D width, H heads, K prototypes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torchvision import transforms

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# ------------------------------------------------------------------------------------------- data
class Blur:
    """Gaussian blur by Pillow with probability p, of radius 0.1 to 2 pixels."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        if random.random() >= self.p:
            return image
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


class Solarize:
    """Inversion of all above half, by Pillow, with probability p."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.solarize(image) if random.random() < self.p else image


class MultiCrop:
    """2 global and some local crops of a Pillow image, as normalised fp32 tensors (3, h, w)."""

    def __init__(self, local_crops: int = 6, sides: tuple[int, int] = (224, 96)) -> None:
        color = [
            transforms.RandomHorizontalFlip(0.5),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            transforms.RandomGrayscale(0.2),
        ]
        end = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        bicubic = transforms.InterpolationMode.BICUBIC
        whole = transforms.RandomResizedCrop(sides[0], (0.4, 1.0), interpolation=bicubic)
        part = transforms.RandomResizedCrop(sides[1], (0.05, 0.4), interpolation=bicubic)
        self.views = [
            transforms.Compose([whole, *color, Blur(1.0), *end]),
            transforms.Compose([whole, *color, Blur(0.1), Solarize(0.2), *end]),
        ]
        self.views += [transforms.Compose([part, *color, Blur(0.5), *end])] * local_crops

    def __call__(self, image: Image.Image) -> list[Tensor]:
        return [view(image) for view in self.views]


class Photographs(torch.utils.data.Dataset):
    """Photographs by path, each decoded whole by Pillow and then given to `transform`."""

    def __init__(self, paths: Sequence[Path], transform: Callable[[Image.Image], object]) -> None:
        self.paths, self.transform = list(paths), transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> object:
        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert("RGB"))


# --------------------------------------------------------------------------------------- networks
class DropPath(nn.Module):
    """Stochastic depth: a computed branch of some samples is thrown away."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        kept = x.new_empty(len(x), 1, 1).bernoulli_(1 - self.rate)
        return x * kept / (1 - self.rate)


class Attention(nn.Module):
    """Multi-head self-attention with its (B, H, N, N) matrix in memory."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # (B, H, N, D / H)
        attention = (q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1)
        return self.proj((attention @ v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with GELU between."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, drop: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = Attention(dim, heads), Mlp(dim)
        self.drop = DropPath(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Patches by convolution, (B, 3, h, w) to (B, D, h / p, w / p)."""

    def __init__(self, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class VisionTransformer(nn.Module):
    """A ViT that returns the normed [CLS] (B, D) and resamples its positions to any image size."""

    def __init__(
        self, dim: int, depth: int, heads: int, patch: int, image: int = 224, drop: float = 0.1
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(dim, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, (image // patch) ** 2 + 1, dim))
        rates = [drop * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(dim, heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The position embedding for a grid of patches, bicubic where it is another one."""
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        if grid == (side, side):
            return self.pos_embed
        square = self.pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        square = F.interpolate(square.float(), grid, mode="bicubic", antialias=True)
        return torch.cat([self.pos_embed[:, :1], square.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images)
        x = patches.flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = x + self.positions(tuple(patches.shape[-2:]))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]


class Head(nn.Module):
    """DINO's projection head: (B, D) to logits (B, K)."""

    def __init__(self, dim: int, prototypes: int, hidden: int = 2048) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, 256),
        )
        self.last_layer = weight_norm(nn.Linear(256, prototypes, bias=False))
        lengths = self.last_layer.parametrizations.weight.original0
        lengths.data.fill_(1)
        lengths.requires_grad = False

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class Network(nn.Module):
    """Backbone and head over crops of several resolutions, those of one resolution in one pass."""

    def __init__(self, backbone: VisionTransformer, head: Head) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, crops: list[Tensor]) -> Tensor:
        """Map crops, each (B, 3, h, w) and those of one size side by side, to (V B, K)."""
        tokens, start = [], 0
        while start < len(crops):
            end = start + 1
            while end < len(crops) and crops[end].shape == crops[start].shape:
                end += 1
            tokens.append(self.backbone(torch.cat(crops[start:end])))
            start = end
        return self.head(torch.cat(tokens))


# ------------------------------------------------------------------------------------------- step
class Loss(nn.Module):
    """The cross-entropy over pairs of views, and the centre of the teacher's logits."""

    def __init__(self, prototypes: int, views: int, temps: tuple[float, float]) -> None:
        super().__init__()
        self.views, (self.student_temp, self.teacher_temp) = views, temps
        self.register_buffer("center", torch.zeros(1, prototypes))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of logits (V B, K) and (2 B, K), and move the centre."""
        students = (student / self.student_temp).chunk(self.views)
        targets = F.softmax((teacher - self.center) / self.teacher_temp, dim=-1).detach().chunk(2)
        total, pairs = torch.zeros((), device=student.device), 0
        for i, target in enumerate(targets):
            for j, view in enumerate(students):
                if i != j:
                    terms = torch.sum(-target * F.log_softmax(view, dim=-1), dim=-1)
                    total, pairs = total + terms.mean(), pairs + 1
        with torch.no_grad():
            mean = teacher.float().sum(dim=0, keepdim=True) / len(teacher)
            self.center = self.center * 0.9 + mean * 0.1
        return total / pairs


def clip_gradients(model: nn.Module, limit: float) -> None:
    """Scale each parameter's gradient to a norm of at most `limit`, one after the other."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            norm = parameter.grad.norm(2)
            scale = limit / (norm.item() + 1e-6)
            if scale < 1:
                parameter.grad.mul_(scale)


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move the teacher, one parameter after the other."""
    for new, old in zip(student.parameters(), teacher.parameters(), strict=True):
        old.data.mul_(momentum).add_((1 - momentum) * new.detach().data)


def build_optimizer(student: nn.Module) -> torch.optim.Optimizer:
    """AdamW with torch's defaults, without weight decay on biases and norms."""
    parameters = [p for p in student.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.ndim > 1]
    groups = [{"params": decayed}, {"params": [p for p in parameters if p.ndim == 1]}]
    return torch.optim.AdamW(groups)


@dataclass
class Training:
    """Networks and optimizer on their way, and the recipe's numbers."""

    student: Network
    teacher: Network
    loss: Loss
    optimizer: torch.optim.Optimizer
    lr: float = 1e-4
    weight_decay: float = 0.04
    momentum: float = 0.996
    clip: float = 3.0
    dtype: torch.dtype | None = None  # of autocast; None computes in fp32

    def step(self, crops: list[Tensor]) -> float:
        """Take one step on crops, each (B, 3, h, w), the 2 global ones first; return the loss."""
        for group, decay in zip(self.optimizer.param_groups, (self.weight_decay, 0.0), strict=True):
            group["lr"], group["weight_decay"] = self.lr, decay
        with torch.autocast(crops[0].device.type, self.dtype, enabled=self.dtype is not None):
            with torch.no_grad():
                targets = self.teacher(crops[:2])
            value = self.loss(self.student(crops), targets)
        self.optimizer.zero_grad()
        value.backward()
        clip_gradients(self.student, self.clip)
        self.optimizer.step()
        update_teacher(self.teacher, self.student, self.momentum)
        return value.item()
