"""The published recipe, written plainly. Our fast one is tested and timed against it.

This is DINO's training step (arXiv 2104.14294) in the way that its code and that of arXiv
2410.00779 go about it: Pillow makes crops and colours in the workers, the attention matrix is
materialised, a residual branch is computed and then dropped, the loss and the update of the
parameters are loops. Parameters have our names, so that both sides can start from the same weights.
Nothing here imports what it is compared with.

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

# Mean and standard deviation of ImageNet's colours, which DINO normalises by.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


# ------------------------------------------------------------------------------------------- data
class Blur:
    """Blur an image by Pillow with a probability; the Gaussian's radius is 0.1 to 2 pixels."""

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def __call__(self, image: Image.Image) -> Image.Image:
        if random.random() >= self.probability:
            return image
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


class Solarize:
    """Invert all values above half, by Pillow, with a probability."""

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def __call__(self, image: Image.Image) -> Image.Image:
        if random.random() >= self.probability:
            return image
        return ImageOps.solarize(image)


class MultiCrop:
    """Cut 2 global and some local crops out of a Pillow image.

    Each crop is a normalised fp32 tensor (3, h, w). `sides` are the sides of a global and of a
    local crop in pixels.
    """

    def __init__(self, local_crops: int = 6, sides: tuple[int, int] = (224, 96)) -> None:
        # Strengths and probabilities are those of DINO's code, which takes them from BYOL.
        color = [
            transforms.RandomHorizontalFlip(0.5),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            transforms.RandomGrayscale(0.2),
        ]
        normalize = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        bicubic = transforms.InterpolationMode.BICUBIC
        global_crop = transforms.RandomResizedCrop(sides[0], (0.4, 1.0), interpolation=bicubic)
        local_crop = transforms.RandomResizedCrop(sides[1], (0.05, 0.4), interpolation=bicubic)

        # The two global views differ in blur and solarisation.
        first_view = transforms.Compose([global_crop, *color, Blur(1.0), *normalize])
        second_view = transforms.Compose(
            [global_crop, *color, Blur(0.1), Solarize(0.2), *normalize]
        )
        local_view = transforms.Compose([local_crop, *color, Blur(0.5), *normalize])
        self.views = [first_view, second_view] + [local_view] * local_crops

    def __call__(self, image: Image.Image) -> list[Tensor]:
        return [view(image) for view in self.views]


class Photographs(torch.utils.data.Dataset):
    """Photographs by path, each decoded whole by Pillow and then given to `transform`."""

    def __init__(self, paths: Sequence[Path], transform: Callable[[Image.Image], object]) -> None:
        self.paths = list(paths)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> object:
        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert("RGB"))


# --------------------------------------------------------------------------------------- networks
class DropPath(nn.Module):
    """Stochastic depth: throw the computed branch of some samples away."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        # The branches that stay are scaled up, so that their expected sum does not change.
        kept = x.new_empty(len(x), 1, 1).bernoulli_(1 - self.rate)
        return x * kept / (1 - self.rate)


class Attention(nn.Module):
    """Multi-head self-attention with its (B, H, N, N) matrix in memory."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        # One layer gives queries, keys and values; each head sees its share of the width.
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # (B, H, N, D / H)
        attention = (q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1)  # (B, H, N, N)
        return self.proj((attention @ v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with GELU between."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, drop: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.mlp = Mlp(dim)
        self.drop = DropPath(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Embed patches by a convolution: (B, 3, h, w) to (B, D, h / patch, w / patch)."""

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

        # Later blocks are dropped more often: the rate rises from 0 to `drop`.
        rates = [drop * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(dim, heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Return the position embedding (1, N, D) of a grid, resampled where it is another one."""
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        if grid == (side, side):
            return self.pos_embed
        square = self.pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        square = F.interpolate(square.float(), grid, mode="bicubic", antialias=True)
        return torch.cat([self.pos_embed[:, :1], square.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images)  # (B, D, h / patch, w / patch)
        x = patches.flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, N, D)
        x = x + self.positions(tuple(patches.shape[-2:]))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]


class Head(nn.Module):
    """DINO's projection head: it maps [CLS] (B, D) to logits (B, K)."""

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

        # `norm_last_layer` of DINO: prototypes keep the length 1, and only their direction learns.
        lengths = self.last_layer.parametrizations.weight.original0
        lengths.data.fill_(1)
        lengths.requires_grad = False

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class Network(nn.Module):
    """Backbone and head; the backbone takes the crops of one resolution in one pass."""

    def __init__(self, backbone: VisionTransformer, head: Head) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, crops: list[Tensor]) -> Tensor:
        """Return the logits (V B, K) of crops (B, 3, h, w), those of one size side by side."""
        # Crops of other sizes need passes of their own: a tensor has one size.
        tokens = []
        start = 0
        while start < len(crops):
            end = start + 1
            while end < len(crops) and crops[end].shape == crops[start].shape:
                end += 1
            tokens.append(self.backbone(torch.cat(crops[start:end])))
            start = end
        return self.head(torch.cat(tokens))


# ------------------------------------------------------------------------------------------- step
class Loss(nn.Module):
    """The cross-entropy over pairs of views, and the centre of the teacher's logits.

    `temps` are the student's and the teacher's temperature.
    """

    def __init__(self, prototypes: int, views: int, temps: tuple[float, float]) -> None:
        super().__init__()
        self.views = views
        self.student_temp, self.teacher_temp = temps
        self.register_buffer("center", torch.zeros(1, prototypes))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of logits (V B, K) and (2 B, K), and move the centre."""
        students = (student / self.student_temp).chunk(self.views)
        targets = F.softmax((teacher - self.center) / self.teacher_temp, dim=-1).detach().chunk(2)

        # Equation 3 of the paper: a view is never compared with itself.
        total = torch.zeros((), device=student.device)
        pairs = 0
        for i, target in enumerate(targets):
            for j, view in enumerate(students):
                if i == j:
                    continue
                terms = torch.sum(-target * F.log_softmax(view, dim=-1), dim=-1)
                total = total + terms.mean()
                pairs += 1

        # Equation 4: the centre is a moving average of the teacher's mean logits.
        with torch.no_grad():
            mean = teacher.float().sum(dim=0, keepdim=True) / len(teacher)
            self.center = self.center * 0.9 + mean * 0.1

        return total / pairs


def clip_gradients(model: nn.Module, limit: float) -> None:
    """Scale each parameter's gradient to a norm of at most `limit`, one after the other."""
    for parameter in model.parameters():
        if parameter.grad is None:
            continue
        # DINO's meaning of clipping: each parameter by its own norm, not all by a common one.
        norm = parameter.grad.norm(2)
        scale = limit / (norm.item() + 1e-6)
        if scale < 1:
            parameter.grad.mul_(scale)


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move the teacher towards the student, one parameter after the other."""
    for new, old in zip(student.parameters(), teacher.parameters(), strict=True):
        old.data.mul_(momentum).add_((1 - momentum) * new.detach().data)


def build_optimizer(student: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW with two groups: what weight decay applies to, and biases and norms."""
    decayed = []
    not_decayed = []
    for parameter in student.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim == 1:
            not_decayed.append(parameter)
        else:
            decayed.append(parameter)
    return torch.optim.AdamW([{"params": decayed}, {"params": not_decayed}])


@dataclass
class Training:
    """The networks, the loss and the optimizer, with the numbers of the recipe."""

    student: Network
    teacher: Network
    loss: Loss
    optimizer: torch.optim.Optimizer
    lr: float = 1e-4
    weight_decay: float = 0.04
    momentum: float = 0.996
    clip: float = 3.0
    dtype: torch.dtype | None = None
    """The dtype of autocast; None computes in fp32."""

    def step(self, crops: list[Tensor]) -> float:
        """Take one step on crops, each (B, 3, h, w), the 2 global ones first; return the loss."""
        decayed, not_decayed = self.optimizer.param_groups
        decayed["lr"] = self.lr
        decayed["weight_decay"] = self.weight_decay
        not_decayed["lr"] = self.lr
        not_decayed["weight_decay"] = 0.0

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
