"""From `--data` to batches: manifest, photographs, views, and the order of training.

Every batch is a pure function of (seed, step): a resumed run, or one with another number of workers
or processes, sees the same views of the same photographs.
Shapes: N photographs, h and w the sides of one.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from augment import CropBatch
from devices import Processes
from fundus.copies import same_files
from fundus.layouts import open_data
from fundus.listing import Reading
from fundus.manifest import Manifest, Record
from fundus.painting import known_lesions, paint_lesions
from fundus.photographs import PhotographError, load_photograph, open_photograph, pad_square
from fundus.synthetic import (
    SYNTHETIC_COUNT,
    SYNTHETIC_MAX,
    SYNTHETIC_SIZE,
    SYNTHETIC_SIZES,
    synthetic_manifest,
)
from utils import InputError, log, shorten

SYNTHETIC_MIN = 10  # photographs, of 5 patients: fewer make no set with three splits
RAW_SIZE = 512  # side to which photographs that nobody prepared are brought as they are read
SUBSTITUTES = 9  # photographs that may take the place of one that cannot be read
READABLE = -1  # what `bad` says of a photograph that could be read
PAINT_STREAM = 2  # makes the generator of painted lesions another one than that of views
COUNT_EVERY = 50  # batches between counts of unreadable photographs over all processes


@dataclass
class DataOptions:
    """Where the photographs are."""

    data: Annotated[str, tyro.conf.arg(aliases=("--data-path",))] = ""
    """synthetic[:N[@SIZE]], a prepared folder, class folders, a folder of photographs, or a data
    set as downloaded."""
    follow_links: bool = False
    """Follow links that lead out of the folder, as to another disk."""


# ------------------------------------------------------------------------------- which photographs
def open_manifest(data: str, *, follow_links: bool = False) -> Manifest:
    """Open what `--data` names (DataOptions) and log what was found.

    Raises InputError when it is nothing that is understood. Draws synthetic photographs once.
    """
    if not data:
        raise InputError("--data: name the photographs to use (a folder, or synthetic)")
    name, _, asked = data.partition(":")
    if name == "synthetic":
        manifest = synthetic_manifest(*_read_synthetic(asked))
    else:
        manifest = open_data(
            Path(data), reading=Reading(follow_links=follow_links), linked=same_files
        )
    for note in manifest.notes:
        log.info("data: %s", note)
    return manifest


def _read_synthetic(text: str) -> tuple[int, int]:
    """Return N and SIZE of synthetic:N@SIZE, the usual numbers where they are left out."""
    count, at, size = text.partition("@")
    least, largest = SYNTHETIC_SIZES
    number = _read_number(count, SYNTHETIC_COUNT, SYNTHETIC_MIN, SYNTHETIC_MAX)
    side = _read_number(size, 0 if at else SYNTHETIC_SIZE, least, largest)
    if not number or not side:
        raise InputError(
            f"--data synthetic:{shorten(text)}: expected synthetic:N or synthetic:N@SIZE with N "
            f"photographs, {SYNTHETIC_MIN} to {SYNTHETIC_MAX}, of SIZE pixels, {least} to {largest}"
        )
    return number, side


def _read_number(text: str, usual: int, least: int, most: int) -> int:
    """Return a number, the usual one for an empty text, and 0 for anything out of range."""
    if not text:
        return usual
    # The length comes first: Python reads no number of more than 4,300 digits.
    is_number = text.isdecimal() and len(text) <= 20
    if not is_number or not least <= int(text) <= most:
        return 0
    return int(text)


def graded(manifest: Manifest, records: Sequence[Record], name: str) -> list[Record]:
    """Return the records with a grade, and log how many have none.

    Raises InputError if none has; `name` says in messages what the records are.
    """
    kept = [record for record in records if record.grade is not None]
    if not kept:
        place = manifest.root
        if manifest.prepared:
            place = place / "manifest.csv"
        raise InputError(
            f"{place}: no graded photograph for {name}, of {len(records)} in that split; "
            "give a data set with grades in it (a set for testing alone: --test-data)"
        )
    if len(kept) < len(records):
        log.info("%s: %d photographs without grade are left out", name, len(records) - len(kept))
    return kept


def grades_of(records: Sequence[Record]) -> np.ndarray:
    """Return the grades of graded records, (N,) int64."""
    return np.array([record.grade for record in records], dtype=np.int64)


def patients_of(records: Sequence[Record]) -> np.ndarray:
    """Return the patients of records, (N,) str."""
    return np.array([record.patient for record in records], dtype=str)


# ----------------------------------------------------------------------------- photographs as items
# A view makes named tensors of a uint8 photograph (3, h, w) and a key of whole numbers, from which
# it draws all that is random. It may have a `min_side`: the side from which photographs are large
# enough for it. Where lesions are painted, their masks are further planes of the photograph.
View = Callable[[Tensor, tuple[int, ...]], dict[str, Tensor]]
Key = tuple[int, int]  # (epoch, index)


class PhotographDataset(Dataset):
    """Views of a manifest's records, addressed by (epoch, index), or by index in epoch 0.

    An item holds what `view` makes of the photograph, and two numbers. `index` is the record's.
    `bad` is READABLE where its photograph could be read. Otherwise another photograph takes its
    place, the same one each time this (epoch, index) is asked for, and `bad` is the index again.
    Nothing is replaced unless `max_bad` is above 0: the dataset then raises InputError.
    With `paint`, every photograph gets lesions (fundus/painting.py), others each time.
    """

    def __init__(
        self,
        manifest: Manifest,
        records: list[Record],
        view: View,
        seed: int = 0,
        max_bad: float = 0.0,
        *,
        paint: bool = False,
    ) -> None:
        self.manifest = manifest
        self.records = records
        self.view = view
        self.min_side = getattr(view, "min_side", None)
        self.seed = seed
        self.max_bad = max_bad
        self.paint = paint

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: Key | int) -> dict[str, Tensor]:
        if not isinstance(key, tuple):
            key = (0, key)
        epoch, index = key
        array, taken, is_replaced = self._read_or_replace(epoch, index)
        if self.paint:
            array = self._paint(array, taken, (self.seed, epoch, index, PAINT_STREAM))
        photograph = torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1)  # (3 + K, h, w)
        item = self.view(photograph, (self.seed, epoch, index))

        # Workers are processes of their own and cannot count what they could not read. They say it
        # with the item, and `training_loader` counts in the training process.
        bad = READABLE
        if is_replaced:
            bad = index
        return item | {"index": torch.tensor(index), "bad": torch.tensor(bad)}

    def _read_or_replace(self, epoch: int, index: int) -> tuple[np.ndarray, int, bool]:
        """Return a photograph, the index it is of, and whether it is there in another's place."""
        is_replaced = False
        for candidate in self._candidates(epoch, index):
            try:
                return self.read(candidate), candidate, is_replaced
            except InputError:
                if not self.max_bad:
                    raise
                is_replaced = True
        raise InputError(f"{self.manifest.root}: of {1 + SUBSTITUTES} photographs none can be read")

    def _candidates(self, epoch: int, index: int) -> Iterator[int]:
        """Give the index, then those of others that would take its place."""
        yield index
        rng = np.random.default_rng((self.seed, epoch, index, len(self)))
        for other in rng.integers(len(self), size=SUBSTITUTES):
            yield int(other)

    def _paint(self, array: np.ndarray, index: int, key: tuple[int, ...]) -> np.ndarray:
        """Return a photograph with lesions and their masks: uint8 (h, w, 3 + K).

        The masks are of painted lesions and, on a drawn photograph, of those that it came with.
        """
        painted, masks = paint_lesions(array, np.random.default_rng(key))
        known = known_lesions(self.manifest.root, self.records[index].path, masks.shape[:2])
        return np.concatenate([painted, np.maximum(masks, known)], axis=2)

    def read(self, index: int) -> np.ndarray:
        """Return a photograph as uint8 RGB, square; raises InputError where it cannot be read.

        A view that has a `min_side` gets it decoded about as large, and resizes it itself.
        """
        path = self.manifest.root / self.records[index].path
        try:
            if self.manifest.prepared:
                return pad_square(open_photograph(path, min_side=self.min_side))
            if self.min_side is None:
                return load_photograph(path, RAW_SIZE, exact=True)
            return load_photograph(path, max(RAW_SIZE, self.min_side), exact=False)
        except PhotographError as error:
            raise InputError(
                f"{path}: {error}; mend the file, or run prepare_data.py, which leaves it out"
            ) from None


# -------------------------------------------------------------------------------- order of training
class StepSampler(Sampler[list[Key]]):
    """Gives this process's micro-batches of every step of a range, by arithmetic alone.

    A step takes `batch_size * world * accumulate` images of its epoch's permutation: the same ones
    however they are spread over processes and micro-batches. An incomplete last step is left out.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        accumulate: int = 1,
        processes: Processes | None = None,
        seed: int = 0,
    ) -> None:
        if processes is None:
            processes = Processes(torch.device("cpu"))
        self.images = images
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.processes = processes
        self.seed = seed
        self.global_batch = batch_size * accumulate * processes.world
        self.steps_per_epoch = images // self.global_batch
        self.start = 0
        self.stop = 0
        if not self.steps_per_epoch:
            raise InputError(
                f"--batch-size: a step takes {self.global_batch} photographs ({batch_size} x "
                f"{accumulate} accumulated x {processes.world} processes), the training "
                f"split has {images}; make it smaller"
            )

    def set_range(self, start: int, stop: int) -> None:
        """Give the steps from `start` up to `stop`, which is not among them."""
        self.start = start
        self.stop = stop

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        # What a step takes follows from (seed, step) alone, and the step before it leaves nothing
        # behind. So a resumed run needs no record of what was taken, and takes what the run would
        # have taken without the stop. The views follow too: their key is (seed, epoch, index).
        order_epoch = -1
        for step in range(self.start, self.stop):
            epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order = np.random.default_rng((self.seed, epoch)).permutation(self.images)
                order_epoch = epoch

            # A step is cut into parts, one for each process and micro-batch. Gradients are averaged
            # over all of them, so that it does not matter who takes which.
            first = step_of_epoch * self.global_batch
            for micro in range(self.accumulate):
                part = micro * self.processes.world + self.processes.rank
                begin = first + part * self.batch_size
                yield [(epoch, int(index)) for index in order[begin : begin + self.batch_size]]


# ------------------------------------------------------------------------------------------ loaders
def training_loader(
    dataset: PhotographDataset, sampler: StepSampler, workers: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Give the sampler's micro-batches; names each photograph that could not be read.

    Raises InputError when more than the dataset's `max_bad` of all photographs could not.
    """
    batches_ahead = None
    if workers:
        batches_ahead = 4
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        prefetch_factor=batches_ahead,
        worker_init_fn=_leave_process_group,
        # The loader draws a number for its workers. From a generator of its own, since the default
        # one decides what drop path drops.
        generator=torch.Generator(),
    )
    return _count_unreadable(_unwrap_errors(loader), dataset, sampler)


def evaluation_loader(
    dataset: PhotographDataset, batch_size: int, workers: int
) -> Iterator[dict[str, Tensor]]:
    """Give a dataset's items in order, once, in batches."""
    loader = DataLoader(
        dataset,
        batch_size,
        num_workers=workers,
        worker_init_fn=_leave_process_group,
        generator=torch.Generator(),
    )
    return _unwrap_errors(loader)


def prefetch(batches: Iterator[CropBatch], device: torch.device) -> Iterator[CropBatch]:
    """Give the batches; on CUDA each is made while the step before it runs.

    What makes a batch (its copy to the GPU, colour and blur) is queued on a stream of its own. On
    the stream of the steps it would come after the running step, and the next one would wait.
    """
    if device.type != "cuda":
        yield from batches
        return
    making = torch.cuda.Stream(device)
    training = torch.cuda.current_stream(device)
    with torch.cuda.stream(making):
        batch = next(batches, None)
    while batch is not None:
        is_made = making.record_event()
        with torch.cuda.stream(making):
            following = next(batches, None)
        training.wait_event(is_made)
        # Its memory belongs to the other stream, which would give it to a later batch while the
        # step still reads it.
        batch.record_stream(training)
        yield batch
        batch = following


def _count_unreadable(
    batches: Iterator[dict[str, Tensor]], dataset: PhotographDataset, sampler: StepSampler
) -> Iterator[dict[str, Tensor]]:
    """Give the batches; name each photograph that any process could not read.

    The processes exchange what they found every COUNT_EVERY batches and at the end of epochs: all
    of them at the same batches, so that they also stop at the same one.
    """
    found: set[int] = set()  # by this process
    named: set[int] = set()  # found by any process, and logged
    batches_of_epoch = sampler.steps_per_epoch * sampler.accumulate
    number = sampler.start * sampler.accumulate
    for batch in batches:
        number += 1
        found |= set(batch["bad"].tolist()) - {READABLE}
        is_due = number % COUNT_EVERY == 0 or number % batches_of_epoch == 0
        if is_due or sampler.processes.world == 1:
            for index in sorted(sampler.processes.union(found) - named):
                named.add(index)
                _name_unreadable(index, len(named), dataset)
        yield batch


def _name_unreadable(index: int, count: int, dataset: PhotographDataset) -> None:
    """Warn of a photograph, the `count`-th one; raises InputError when they are too many."""
    # Batches carry numbers only. Reading it again tells why it could not be read.
    try:
        dataset.read(index)
        reason = f"{dataset.records[index].path}: could not be read for a moment"
    except InputError as error:
        reason = str(error)
    if count > dataset.max_bad * len(dataset):
        raise InputError(
            f"{count} of {len(dataset)} photographs, over --max-bad {dataset.max_bad}, "
            f"cannot be read; the last is {reason}"
        )
    log.warning("%s. Another one takes its place; %d so far", reason, count)


def _leave_process_group(_worker: int) -> None:
    """Leave the main process's group, as a worker that begins.

    A signal to the group (Ctrl-C, SLURM's SIGTERM) must not end the workers before the main process
    has saved. The main process can still end them.
    """
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
        # A scheduler may signal every process by itself: then the main process gets 10 seconds.
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(10))


def _unwrap_errors(loader: DataLoader) -> Iterator[dict[str, Tensor]]:
    """Give a loader's batches; an InputError of a worker is one message again."""
    try:
        yield from loader
    except InputError as error:
        # torch puts the worker's traceback before the message.
        message = str(error)
        raise InputError(message.rpartition("InputError: ")[2].strip() or message) from None
