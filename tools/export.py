"""Write a run's backbone as one small file: half precision, with its recipe in its header.

    python -m tools.export --pretrained runs/drawn --out weights/drawn_vit_micro.safetensors

Reads what `--pretrained` of the evaluations reads. What it writes is read by them and by `--init`,
in fp32 again: weights of half precision differ from theirs by one part in 2,000 at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

import utils
from utils import InputError, log
from weights import load_backbone, read_weights, save_backbone


@dataclass
class Options:
    """A backbone as a file of its own."""

    pretrained: Annotated[str, tyro.conf.arg(aliases=("--pretrained-weights",))]
    """Weights: a run folder, or a file that holds a backbone."""
    out: str
    """The file to write, FILE.safetensors; one that is there is replaced."""
    checkpoint_key: Literal["teacher", "student"] = "teacher"
    """Which network of a checkpoint that holds both."""
    debug: bool = False
    """Show the traceback of errors that are otherwise one message."""


def main(options: Options, _config: Path | None) -> None:
    """Read the weights, halve them, write them."""
    path = Path(options.out)
    if path.suffix != ".safetensors":
        raise InputError(f"--out {path}: expected a name that ends in .safetensors")
    weights = read_weights(options.pretrained, options.checkpoint_key)
    backbone = load_backbone(weights).half()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_backbone(backbone, path, weights.run_options)
    log.info("%s: %.1f MB, of %s", path, path.stat().st_size / 1e6, weights.path)


if __name__ == "__main__":
    utils.run_main(main, Options)
