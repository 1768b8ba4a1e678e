"""Masks of lesions: which file is whose, and where the lesions lie on the picture of a photograph.

A mask has its photograph's own size, so it goes the photograph's way: the same crop to the fundus,
the same padding to a square, the same resizing. A class without a file has no lesion there.

Shapes: S is the side of the picture that the network sees.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fundus.eye_map import LESIONS
from fundus.listing import NAME_WITH_EYE, stem_of
from fundus.photographs import Photograph, PhotographError, crop_mask, open_photograph
from utils import InputError, log

# No JPEG, since its noise about an edge is no lesion, and since photographs may lie beside masks.
MASK_SUFFIXES = (".png", ".tif", ".tiff", ".bmp")

OPTIC_DISC = "optic_disc"  # a landmark: reported like a lesion, but none
ALL_LESIONS = "all_lesions"  # every class but the optic disc

# Other words for the classes that drawings have, and IDRiD's and DDR's abbreviations.
ALIASES = {
    "ma": "microaneurysm",
    "he": "haemorrhage",
    "hemorrhage": "haemorrhage",
    "ex": "hard_exudate",
    "se": "cotton_wool_spot",
    "soft_exudate": "cotton_wool_spot",
    "od": OPTIC_DISC,
    "optic_disk": OPTIC_DISC,
}
KNOWN = {*LESIONS, *ALIASES.values()}

# A mask of more than this share of its photograph has its lesions in black.
MOST_COVERED = 0.5

MaskFiles = dict[str, Path]  # of one photograph, by class


@dataclass(frozen=True)
class Lesions:
    """Where the lesions of one photograph are, on its picture."""

    inside: np.ndarray  # bool (S, S), the fundus
    shares: dict[str, np.ndarray]  # by class, float32 (S, S): the share of a pixel that they cover


# -------------------------------------------------------------------------------------------- files
def class_of(text: str) -> str:
    """Return the class that a folder's or a file's name says.

    Numbers before it, case and the plural are no part of it: "3. Hard Exudates" is hard_exudate.
    """
    words = re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")
    words = re.sub(r"^\d+_", "", words)
    name = re.sub(r"s$", "", words)
    return ALIASES.get(name, name)


def patient_of(name: str) -> str:
    """Return the patient whom a photograph's name tells: both eyes' of 10_left and 10_right."""
    match = re.fullmatch(NAME_WITH_EYE, name)
    if match:
        return match[1]
    return name


def find_masks(folder: Path, photographs: Mapping[str, Path]) -> dict[str, MaskFiles]:
    """Return the masks below a folder by the name of their photograph, and then by class.

    A mask is called like its photograph, with or without something behind: STEM.png, STEM_MA.tif.
    Its class is what stands behind the stem where that is a class that is known, else the folder
    it lies in; in `folder` itself what stands behind, whatever it is. Photographs without any mask
    are left out. Raises InputError where there is no such folder, where no mask belongs to a
    photograph, and where two files claim one place.
    """
    if not folder.is_dir():
        raise InputError(f"--masks {folder}: no such folder; expected one of masks by class")
    names = _names_by_stem(photographs)
    found: dict[str, MaskFiles] = {}
    strangers = 0
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() not in MASK_SUFFIXES:
            continue
        stem = _owner(file.stem.casefold(), names)
        if not stem:
            strangers += 1
            continue
        if len(names[stem]) > 1:
            raise InputError(
                f"{file}: belongs to {' and '.join(names[stem])}, photographs of one name; "
                "evaluate their folders one by one"
            )
        lesion = _class_of_file(file, stem, folder)
        masks = found.setdefault(names[stem][0], {})
        if lesion in masks:
            raise InputError(f"{file}: {masks[lesion]} is {lesion} of that photograph, too")
        masks[lesion] = file

    if not found:
        examples = ", ".join(list(photographs)[:3])
        raise InputError(
            f"--masks {folder}: none of {strangers} masks ({' '.join(MASK_SUFFIXES)}) belongs to a "
            f"photograph of --image; expected names that begin like these: {examples}"
        )
    if strangers:
        log.info("%d masks belong to none of the photographs", strangers)
    return found


def _names_by_stem(photographs: Mapping[str, Path]) -> dict[str, list[str]]:
    """Return the names of photographs by the stem of their file, in lower case."""
    names: dict[str, list[str]] = {}
    for name, path in photographs.items():
        names.setdefault(stem_of(path.name), []).append(name)
    return names


def _owner(mask: str, stems: Mapping[str, object]) -> str:
    """Return the longest stem that a mask's name is, or begins with before a dash or the like."""
    if mask in stems:
        return mask
    for place in range(len(mask) - 1, 0, -1):
        if mask[place] in "_-. " and mask[:place] in stems:
            return mask[:place]
    return ""


def _class_of_file(file: Path, stem: str, folder: Path) -> str:
    """Return the class of a mask that belongs to a photograph; raises InputError without one."""
    behind = class_of(file.stem[len(stem) :])
    lesion = behind
    if behind not in KNOWN and file.parent != folder:
        lesion = class_of(file.parent.name)
    if not lesion or lesion == ALL_LESIONS:
        raise InputError(
            f"{file}: says no class; expected CLASS/{stem}{file.suffix} or "
            f"{stem}_CLASS{file.suffix}, such as {stem}_MA{file.suffix}"
        )
    return lesion


# ----------------------------------------------------------------------------------------- geometry
def read_lesions(masks: MaskFiles, photograph: Photograph, size: int) -> Lesions:
    """Return where the masks of a photograph put lesions on its picture of side `size`.

    Classes that have no pixel inside the fundus are left out; ALL_LESIONS comes last, where there
    is a lesion. Raises PhotographError with the file and the reason for a mask that cannot be read,
    that is not of the photograph's size, or that covers more than MOST_COVERED of it.
    """
    inside = fundus_region(photograph, size)
    shares = {}
    for lesion in sorted(masks):
        share = _read_mask(masks[lesion], photograph, size) * inside
        if share.any():
            shares[lesion] = share

    lesions = [share for lesion, share in shares.items() if lesion != OPTIC_DISC]
    if lesions:
        shares[ALL_LESIONS] = np.max(lesions, axis=0)
    return Lesions(inside, shares)


def fundus_region(photograph: Photograph, size: int) -> np.ndarray:
    """Return which pixels of a photograph's picture show the fundus, bool (size, size).

    It is the disc as wide as the fundus' box, in the picture's middle, without the padding where
    the frame cuts it off. Where no fundus was found it is the whole box.
    """
    everything = np.ones((photograph.height, photograph.width), dtype=bool)
    in_box = crop_mask(everything, photograph, size) > 0.5
    if photograph.doubtful:
        return in_box
    offset = np.arange(size) + 0.5 - size / 2
    return in_box & (offset**2 + offset[:, None] ** 2 <= (size / 2) ** 2)


def _read_mask(path: Path, photograph: Photograph, size: int) -> np.ndarray:
    """Return the share of each pixel of the picture that a mask covers, float32 (size, size)."""
    try:
        image = open_photograph(path)
    except PhotographError as error:
        raise PhotographError(f"its mask {path} {error}") from None
    height, width = image.shape[:2]
    if (width, height) != (photograph.width, photograph.height):
        raise PhotographError(
            f"its mask {path} has {width} x {height} pixels; expected the photograph's own "
            f"{photograph.width} x {photograph.height}"
        )

    # Whatever their colour. A maximum over the last axis would take ten times as long.
    brightness = np.maximum(np.maximum(image[..., 0], image[..., 1]), image[..., 2])
    # Lesions are 1 in some files and 255 in others; smooth edges are cut at half of it.
    covered = brightness > brightness.max() // 2
    if covered.mean() > MOST_COVERED:
        raise PhotographError(
            f"its mask {path} covers {covered.mean():.0%} of it; expected black (0) outside lesions"
        )
    return crop_mask(covered, photograph, size)


def widen(share: np.ndarray, radius: float) -> np.ndarray:
    """Return all pixels within `radius` of a pixel that is covered at all, bool (S, S)."""
    from scipy.ndimage import distance_transform_edt

    covered = share > 0
    if not covered.any():  # there is no distance to nothing
        return covered
    return distance_transform_edt(~covered) <= radius


def count_classes(found: Mapping[str, MaskFiles]) -> dict[str, int]:
    """Return how many photographs have a mask of each class, the most frequent first."""
    counts: Counter[str] = Counter()
    for masks in found.values():
        counts.update(masks.keys())
    return dict(counts.most_common())
