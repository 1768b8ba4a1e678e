"""Copies of a photograph, told by what the retina shows, not by bytes.

Mirrors compress, resize and brighten files. A copy in another split, or under another patient's
name, makes every number look better than it is.
"""

import base64
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from fundus.manifest import Manifest, name_examples
from fundus.photographs import PhotographError, pad_square
from utils import InputError, log, sha256_of

# Cosines above which two pictures are candidates by their coarse signatures, and copies by their
# full ones.
CLOSE = 0.88
ALIKE = 0.84

# The side of a signature, and the radius of the disc that is compared, which leaves out the rim.
SIDE = 64
RADIUS = 28.8
# Grey levels against the local mean: stronger ones are cut, so that one bright spot or reflex does
# not outweigh the vessels.
STRONGEST = 12

Pair = tuple[str, str, float]  # two photographs and how alike they are; 1: the same file


# --------------------------------------------------------------------------------------- signatures


def signature(picture: np.ndarray) -> np.ndarray:
    """Return what tells one retina from another in a uint8 picture: int8 (64, 64), 0 outside it.

    It holds vessels and lesions against their local mean, without rim and surround, in which all
    photographs of a camera are alike. Two signatures are compared by `alike`.
    """
    small = Image.fromarray(pad_square(picture)).resize((SIDE, SIDE), Image.Resampling.BOX)
    grey = small.convert("L")
    light = np.asarray(grey, np.float32)
    local_mean = np.asarray(grey.filter(ImageFilter.GaussianBlur(4)), np.float32)

    # The fundus without 4 pixels at its rim, and within a disc around the middle. The surround is
    # black, so that a quarter of the fundus' own light (most pixels are fundus) tells them apart.
    level = max(12, 0.25 * np.percentile(light, 60))
    fundus = Image.fromarray(np.asarray(small).max(axis=2) > level).convert("L")
    inner = np.asarray(fundus.filter(ImageFilter.BoxBlur(4))) == 255
    squared = (np.arange(SIDE) - (SIDE - 1) / 2) ** 2
    disc = squared + squared[:, None] < RADIUS**2
    inside = inner & disc

    detail = np.clip(light - local_mean, -STRONGEST, STRONGEST) * inside
    detail -= detail.sum() / max(1, inside.sum()) * inside
    # Ten steps a grey level: 12 levels and the mean, which is small, fit into 8 bits.
    return np.round(10 * detail).clip(-127, 127).astype(np.int8)


def coarse(look: np.ndarray) -> np.ndarray:
    """Return a signature at a quarter of its resolution, int8 (16, 16), to search by."""
    blocks = look.reshape(16, 4, 16, 4)
    return blocks.mean(axis=(1, 3)).round().astype(np.int8)


def alike(one: np.ndarray, other: np.ndarray) -> float:
    """Return the cosine of two signatures, -1 to 1; 0 where one of them shows no structure.

    Copies that were compressed, resized or brightened are above 0.84, other eyes below it.
    """
    first = one.astype(np.float32).ravel()
    second = other.astype(np.float32).ravel()
    # What is left of a blank picture is noise, of which any two may be alike.
    if min(np.abs(first).mean(), np.abs(second).mean()) < 2:
        return 0.0
    return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))


# ------------------------------------------------------------------------------------------- search


def find_alike(
    small: np.ndarray, full: Callable[[int], np.ndarray]
) -> Iterator[tuple[int, int, float]]:
    """Give the pairs (i, j, cosine), i < j, of pictures that are copies of each other.

    Candidates have alike coarse signatures, `small` (N, 256) int8; their full ones, `full(i)`,
    decide, since photographs of a fundus look alike from afar.
    """
    for i, j in _close_pairs(small, small, is_same=True):
        cosine = alike(full(i), full(j))
        if cosine > ALIKE:
            yield i, j, cosine


def find_shared(looks: np.ndarray, others: np.ndarray) -> list[tuple[int, int, float]]:
    """Return (i, j, cosine) of each picture i that is a copy of j, the most alike of the others.

    Both are full signatures, int8 (N, 4096) and (M, 4096).
    """
    best: dict[int, tuple[int, float]] = {}
    for i, j in _close_pairs(_coarse_rows(looks), _coarse_rows(others)):
        cosine = alike(looks[i], others[j])
        if cosine > ALIKE and cosine > best.get(i, (0, 0.0))[1]:
            best[i] = (j, cosine)
    return [(i, j, cosine) for i, (j, cosine) in sorted(best.items())]


def _coarse_rows(looks: np.ndarray) -> np.ndarray:
    """Return full signatures (N, 4096) as coarse ones, int8 (N, 256)."""
    rows = np.zeros((len(looks), 256), np.int8)
    for row, look in zip(rows, looks, strict=True):
        row[:] = coarse(look.reshape(SIDE, SIDE)).ravel()
    return rows


def _close_pairs(
    ones: np.ndarray, others: np.ndarray, *, is_same: bool = False
) -> Iterator[tuple[int, int]]:
    """Give (i, j) of coarse signatures, int8 (N, 256) and (M, 256), that are close.

    Where both are the same set, each pair comes once, with i < j.
    """
    unit = _unit_rows(ones)
    other_unit = _unit_rows(others)

    # Cosines of all pairs, in blocks that stay in the processor's cache: EyePACS has 4e9 pairs.
    rows = 512
    columns = 2048
    block = np.empty((rows, columns), np.float32)
    for top in range(0, len(unit), rows):
        first_column = 0
        if is_same:
            first_column = top
        for left in range(first_column, len(other_unit), columns):
            upper = unit[top : top + rows]
            lower = other_unit[left : left + columns]
            cosines = np.matmul(upper, lower.T, out=block[: len(upper), : len(lower)])
            # Most blocks have no candidate, and the maximum is found faster than its place.
            if cosines.max() <= CLOSE:
                continue
            for row, column in np.argwhere(cosines > CLOSE):
                i = top + int(row)
                j = left + int(column)
                if i < j or not is_same:
                    yield i, j


def _unit_rows(small: np.ndarray) -> np.ndarray:
    """Return coarse signatures (N, 256) as vectors of length 1, float32."""
    unit = small.astype(np.float32)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-6)
    return unit


def find_copies(
    facts: Mapping[str, dict[str, Any]], picture_of: Callable[[str], np.ndarray]
) -> list[Pair]:
    """Return the pairs of prepared photographs that show one picture.

    `facts` gives each photograph's coarse signature (base64) and its picture's sha256, by path;
    `picture_of` the picture, uint8 RGB, of the few whose signatures are close.
    """
    digests = {}
    looks = []
    for path, fact in facts.items():
        if "error" not in fact:
            digests[path] = fact["sha256"]
            looks.append(base64.b64decode(fact["signature"]))
    paths = list(digests)
    small = np.frombuffer(b"".join(looks), np.int8).reshape(len(paths), 16 * 16)

    # A photograph with many copies is asked for many times.
    @functools.lru_cache(4096)
    def full(index: int) -> np.ndarray:
        try:
            return signature(picture_of(paths[index]))
        except PhotographError as error:
            raise InputError(f"{paths[index]}: {error}; repeat the command") from None

    cosines = {}
    for i, j, cosine in find_alike(small, full):
        cosines[paths[i], paths[j]] = cosine
    # Equal files count as copies whatever they show, so blank ones are found too.
    for pair in _equal_pairs(digests):
        cosines[pair] = 1.0
    return [(one, other, cosine) for (one, other), cosine in sorted(cosines.items())]


def same_files(manifest: Manifest) -> list[tuple[str, str]]:
    """Return pairs of photographs with equal bytes; none where patients are known.

    Without patients, copies would come into different splits. Only files of equal size are read.
    Copies that were compressed or resized are found by prepare_data.py.
    """
    patients = {record.patient for record in manifest.records}
    if manifest.prepared or len(patients) < len(manifest.records):
        return []

    by_size: dict[int, list[str]] = defaultdict(list)
    for record in manifest.records:
        file = manifest.root / record.path
        if file.is_file():  # what is not there is named when it is read
            by_size[file.stat().st_size].append(record.path)
    digests = {}
    for paths in by_size.values():
        if len(paths) > 1:
            for path in paths:
                digests[path] = sha256_of(manifest.root / path)

    pairs = _equal_pairs(digests)
    if pairs:
        examples = name_examples([f"{one} = {other}" for one, other in pairs])
        message = "data: %d photographs are copies: %s; prepare_data.py finds changed copies too"
        log.warning(message, len(pairs), examples)
    return pairs


def _equal_pairs(digests: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return each path with the first one of the same digest, where that is another path."""
    first: dict[str, str] = {}
    pairs = []
    for path, digest in digests.items():
        original = first.setdefault(digest, path)
        if original != path:
            pairs.append((original, path))
    return pairs
