"""From `--data` to batches: manifest, photographs, views, and the order of training.

Every batch is a pure function of (seed, step): a resumed run, or one with another number of workers
or processes, sees the same views of the same photographs.
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

from devices import Processes
from fundus.copies import same_files
from fundus.layouts import open_data
from fundus.manifest import Manifest, Record
from fundus.photographs import PhotographError, load_photograph, open_photograph, pad_square
from fundus.synthetic import SYNTHETIC_COUNT, synthetic_manifest
from utils import InputError, log

COUNTED = 50  # batches between counts of unreadable photographs over all processes
RAW_SIZE = 512  # side to which photographs that nobody prepared are brought as they are read


@dataclass
class DataOptions:
    """Where the photographs are."""

    data: Annotated[str, tyro.conf.arg(aliases=("--data-path",))] = ""
    """synthetic[:N], a prepared folder, class folders, a folder of photographs, or a data set as
    downloaded."""


# ------------------------------------------------------------------------------- which photographs
def open_manifest(data: str) -> Manifest:
    """Open what `--data` names (DataOptions) and say what was found.

    Raises InputError when it is nothing that is understood. Draws synthetic photographs once.
    """
    if not data:
        raise InputError("--data: name the photographs to use (a folder, or synthetic)")
    name, _, count = data.partition(":")
    if name == "synthetic":
        if count and not (count.isdecimal() and int(count) >= 10):
            raise InputError(f"--data {data}: expected synthetic:N with N photographs, 10 or more")
        manifest = synthetic_manifest(int(count or SYNTHETIC_COUNT))
    else:
        manifest = open_data(Path(data), linked=same_files)
    for note in manifest.notes:
        log.info("data: %s", note)
    return manifest


def graded(manifest: Manifest, records: Sequence[Record], name: str) -> list[Record]:
    """Return the records with a grade; says how many have none, raises InputError if all."""
    kept = [r for r in records if r.grade is not None]
    if not kept:
        raise InputError(f"{manifest.root / 'manifest.csv'}: no graded photograph for {name}")
    if len(kept) < len(records):
        log.info("%s: %d photographs without grade are left out", name, len(records) - len(kept))
    return kept


def grades_of(records: Sequence[Record]) -> np.ndarray:
    """Return the grades of graded records, (N,) int64."""
    return np.array([r.grade for r in records], dtype=np.int64)


def patients_of(records: Sequence[Record]) -> np.ndarray:
    """Return the patients of records, (N,) str."""
    return np.array([r.patient for r in records], dtype=str)


# ----------------------------------------------------------------------------------------- batches
View = Callable[[Tensor, tuple[int, ...]], dict[str, Tensor]]
Key = tuple[int, int]  # (epoch, index)


class PhotographDataset(Dataset):
    """Views of a manifest's records, addressed by (epoch, index).

    An item is what `view` makes of the uint8 photograph (3, h, w), its `index`, and `bad`, which is
    -1. With `max_bad` above 0 a photograph that cannot be read is replaced by another one, the same
    whenever its turn comes, and `bad` is its index; otherwise it raises InputError.
    """

    def __init__(
        self,
        manifest: Manifest,
        records: list[Record],
        view: View,
        seed: int = 0,
        max_bad: float = 0.0,
    ) -> None:
        self.manifest, self.records, self.seed, self.max_bad = manifest, records, seed, max_bad
        self.view, self.min_side = view, getattr(view, "min_side", None)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: Key | int) -> dict[str, Tensor]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        bad = -1
        for taken in self._candidates(epoch, index):
            try:
                array = self.read(taken)
                break
            except InputError:
                if not self.max_bad:
                    raise
                bad = index
        else:
            raise InputError(f"{self.manifest.root}: of 10 photographs none can be read")
        photograph = torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1)
        item = self.view(photograph, (self.seed, epoch, index))
        return item | {"index": torch.tensor(index), "bad": torch.tensor(bad)}

    def _candidates(self, epoch: int, index: int) -> Iterator[int]:
        """Give the index, then those of 9 others that would take its place."""
        yield index
        rng = np.random.default_rng((self.seed, epoch, index, len(self)))
        yield from map(int, rng.integers(len(self), size=9))

    def read(self, index: int) -> np.ndarray:
        """Return a photograph as uint8 RGB, square; raises InputError where it cannot be read.

        A view that tells its `min_side` gets it decoded about as large, and resizes it itself.
        """
        path, enough = self.manifest.root / self.records[index].path, self.min_side
        try:
            if self.manifest.prepared:
                return pad_square(open_photograph(path, min_side=enough))
            return load_photograph(path, max(RAW_SIZE, enough or 0), exact=enough is None)
        except PhotographError as error:
            raise InputError(
                f"{path}: {error}; mend the file, or run prepare_data.py, which leaves it out"
            ) from None


class StepSampler(Sampler[list[Key]]):
    """Gives this process's micro-batches of every step from `start` on, by arithmetic alone.

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
        self.images, self.batch_size, self.accumulate = images, batch_size, accumulate
        self.processes = processes or Processes(torch.device("cpu"))
        self.rank, self.world = self.processes.rank, self.processes.world
        self.seed = seed
        self.global_batch = batch_size * accumulate * self.world
        self.steps_per_epoch = images // self.global_batch
        if not self.steps_per_epoch:
            raise InputError(
                f"--batch-size: a step takes {self.global_batch} photographs "
                f"({batch_size} x {accumulate} accumulated x {self.world} processes), the training "
                f"split has {images}; make it smaller"
            )
        self.start = self.stop = 0

    def set_range(self, start: int, stop: int) -> None:
        """Give the steps from `start` up to `stop`."""
        self.start, self.stop = start, stop

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        order, order_epoch = np.empty(0, int), -1
        for step in range(self.start, self.stop):
            epoch, within = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                rng = np.random.default_rng((self.seed, epoch))
                order, order_epoch = rng.permutation(self.images), epoch
            chunk = order[within * self.global_batch :]
            for micro in range(self.accumulate):
                first = (micro * self.world + self.rank) * self.batch_size
                yield [(epoch, int(i)) for i in chunk[first : first + self.batch_size]]


def training_loader(
    dataset: PhotographDataset, sampler: StepSampler, workers: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Iterate over the sampler's micro-batches; names what could not be read (`max_bad`)."""
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if workers else None,
        worker_init_fn=_own_group,
        generator=torch.Generator(),  # else it draws from the one that drop path draws from
    )
    return _count_bad(_unwrap_errors(loader), dataset, sampler)


def prefetch(batches: Iterator[list[Tensor]], device: torch.device) -> Iterator[list[Tensor]]:
    """Iterate; on CUDA a batch ahead, which is made beside a step, on a stream of its own."""
    if device.type != "cuda":
        yield from batches
        return
    side, step = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    made: list[Tensor] | None = []
    while made is not None:
        ready, done = made, side.record_event()
        with torch.cuda.stream(side):
            made = next(batches, None)
        step.wait_event(done)
        for tensor in ready:
            tensor.record_stream(step)  # its memory is not for others before the step is done
        if ready:
            yield ready


ahead = prefetch  # a name that callers are leaving


def _count_bad(
    batches: Iterator[dict[str, Tensor]], dataset: PhotographDataset, sampler: StepSampler
) -> Iterator[dict[str, Tensor]]:
    """Name each photograph that any process could not read; all processes stop at one batch.

    They exchange what they saw every COUNTED batches and at the end of epochs.
    """
    here: set[int] = set()
    told: set[int] = set()
    each = sampler.steps_per_epoch * sampler.accumulate
    for number, batch in enumerate(batches, 1 + sampler.start * sampler.accumulate):
        here |= set(batch["bad"].tolist()) - {-1}
        due = sampler.world == 1 or number % COUNTED == 0 or number % each == 0
        for index in sorted(sampler.processes.union(here) - told) if due else ():
            told.add(index)
            try:
                dataset.read(index)
                reason = f"{dataset.records[index].path}: could not be read for a moment"
            except InputError as error:
                reason = str(error)
            if len(told) > dataset.max_bad * len(dataset):
                share = f"{len(told)} of {len(dataset)} photographs, over --max-bad"
                raise InputError(f"{share} {dataset.max_bad}, cannot be read; the last is {reason}")
            log.warning("%s. Another one takes its place; %d so far", reason, len(told))
        yield batch


def evaluation_loader(
    dataset: PhotographDataset, batch_size: int, workers: int
) -> Iterator[dict[str, Tensor]]:
    """Iterate over a dataset in order, once."""
    loader = DataLoader(
        dataset,
        batch_size,
        num_workers=workers,
        worker_init_fn=_own_group,
        generator=torch.Generator(),
    )
    return _unwrap_errors(loader)


def _own_group(_worker: int) -> None:
    """Leave the main process's group: a signal to it (Ctrl-C, SLURM's SIGTERM) must not end the
    workers before the main process has saved. The main process can still end them."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
        # a scheduler may signal every process by itself: then the main process gets 10 seconds
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(10))


def _unwrap_errors(loader: DataLoader) -> Iterator[dict[str, Tensor]]:
    """Iterate; an InputError that a worker wrapped in its traceback is one message again."""
    try:
        yield from loader
    except InputError as error:
        message = str(error)
        raise InputError(message.rpartition("InputError: ")[2].strip() or message) from None
