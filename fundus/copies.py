"""Copies of a photograph, told by what the retina shows, not by bytes.

Mirrors compress, resize and brighten files.
"""

import base64
import functools
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from fundus.manifest import Manifest, some
from fundus.photographs import PhotographError, pad_square
from utils import InputError, log, sha256_of

CLOSE, ALIKE = 0.88, 0.84  # cosines of coarse and full signatures from which pictures are copies
Pair = tuple[str, str, float]  # two photographs and how alike they are; 1: the same file


def signature(picture: np.ndarray) -> np.ndarray:
    """Return what tells one retina from another in a picture: int8 (64, 64), 0 outside the fundus.

    Vessels and lesions against their local mean, without rim and surround, in which photographs of
    one camera are alike. Two are compared by their cosine, as `alike` does.
    """
    small = Image.fromarray(pad_square(picture)).resize((64, 64), Image.Resampling.BOX)
    grey = small.convert("L")
    light, mean = (
        np.asarray(i, np.float32) for i in (grey, grey.filter(ImageFilter.GaussianBlur(4)))
    )
    level = max(12, 0.25 * np.percentile(light, 60))
    inside = Image.fromarray(np.asarray(small).max(axis=2) > level).convert("L")
    away = (np.arange(64) - 31.5) ** 2
    away = away + away[:, None] < 830  # squared pixels from the middle: a disc of radius 29
    within = (np.asarray(inside.filter(ImageFilter.BoxBlur(4))) == 255) & away  # shrunk by 4
    detail = np.clip(light - mean, -12, 12) * within
    detail -= detail.sum() / max(1, within.sum()) * within
    return np.round(10 * detail).clip(-127, 127).astype(np.int8)


def coarse(look: np.ndarray) -> np.ndarray:
    """Return a signature at a quarter of its resolution, int8 (16, 16), to search by."""
    return look.reshape(16, 4, 16, 4).mean(axis=(1, 3)).round().astype(np.int8)


def alike(one: np.ndarray, other: np.ndarray) -> float:
    """Return the cosine of two signatures, -1 to 1; 0 where one of them shows no structure.

    Copies that were compressed, resized or brightened are above 0.84, other eyes below it.
    """
    a, b = (s.astype(np.float32).ravel() for s in (one, other))
    weak = min(np.abs(a).mean(), np.abs(b).mean()) < 2
    return 0.0 if weak else float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def find_alike(
    small: np.ndarray, full: Callable[[int], np.ndarray]
) -> Iterator[tuple[int, int, float]]:
    """Give the pairs (i, j, cosine), i < j, of pictures that are copies of each other.

    Candidates have alike coarse signatures, `small` (N, 256) int8; their full ones, `full(i)`,
    decide, since photographs of a fundus look alike from afar.
    """
    unit = small.astype(np.float32)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-6)
    rows, columns = 512, 2048  # a block that stays in the processor's cache
    block = np.empty((rows, columns), np.float32)
    for top in range(0, len(unit), rows):
        for left in range(top, len(unit), columns):
            a, b = unit[top : top + rows], unit[left : left + columns]
            cosines = np.matmul(a, b.T, out=block[: len(a), : len(b)])
            close = np.argwhere(cosines > CLOSE) if cosines.max() > CLOSE else ()
            for i, j in ((top + int(i), left + int(j)) for i, j in close):
                how = alike(full(i), full(j)) if i < j else 0.0
                if how > ALIKE:
                    yield i, j, how


def find_copies(
    facts: Mapping[str, dict[str, Any]], picture_of: Callable[[str], np.ndarray]
) -> list[Pair]:
    """Return the pairs of prepared photographs that show one picture.

    `facts` gives each photograph's coarse signature (base64) and its picture's sha256, by path;
    `picture_of` the picture, uint8 RGB, of the few whose signatures are close.
    """
    paths = [path for path, fact in facts.items() if "error" not in fact]
    looks = b"".join(base64.b64decode(facts[path]["signature"]) for path in paths)
    small = np.frombuffer(looks, np.int8).reshape(len(paths), -1)

    @functools.lru_cache(4096)
    def full(index: int) -> np.ndarray:
        try:
            return signature(picture_of(paths[index]))
        except PhotographError as error:
            raise InputError(f"{paths[index]}: {error}; repeat the command") from None

    found = {(paths[i], paths[j]): how for i, j, how in find_alike(small, full)}
    first: dict[str, str] = {}
    same = [(first.setdefault(facts[path]["sha256"], path), path) for path in paths]
    found |= {pair: 1.0 for pair in same if pair[0] != pair[1]}
    return [(*pair, how) for pair, how in sorted(found.items())]


def same_files(manifest: Manifest) -> list[tuple[str, str]]:
    """Return pairs of photographs that are one file, where no patients are known to tell copies.

    Only files of one size are read. Copies that were compressed or resized take prepare_data.py.
    """
    if manifest.prepared or len({r.patient for r in manifest.records}) < len(manifest.records):
        return []
    by_size: dict[int, list[str]] = defaultdict(list)
    for record in manifest.records:
        by_size[os.path.getsize(manifest.root / record.path)].append(record.path)
    paths = [path for same in by_size.values() if len(same) > 1 for path in same]
    digests = {path: sha256_of(manifest.root / path) for path in paths}
    first: dict[str, str] = {}
    pairs = [(first.setdefault(digest, path), path) for path, digest in digests.items()]
    pairs = [pair for pair in pairs if pair[0] != pair[1]]
    if pairs:
        told = f"{len(pairs)} photographs are copies: {some([' = '.join(p) for p in pairs])}"
        log.warning("data: %s; prepare_data.py finds changed copies too", told)
    return pairs
