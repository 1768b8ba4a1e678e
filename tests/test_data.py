"""Order of training, batches and sets. Run with `python -m pytest tests/test_data.py`."""

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SIDE
from helpers import touch
from PIL import Image

import data
import utils
from augment import MultiCrop, MultiCropOptions, WholeView
from data import PhotographDataset, StepSampler, training_loader
from devices import Processes
from fundus import copies, photographs
from fundus.manifest import Manifest, Record, read_manifest
from fundus.photographs import find_fundus, open_photograph, pad_square
from utils import InputError

CPU = torch.device("cpu")
CROPS = MultiCrop(MultiCropOptions(global_crop_size=32, local_crop_size=16, local_crops_number=2))


def steps(images, batch, accumulate, world, start, stop, seed=0):
    """What each step takes over all processes and micro-batches: {step: sorted keys}."""
    taken = {step: [] for step in range(start, stop)}
    for rank in range(world):
        sampler = StepSampler(images, batch, accumulate, Processes(CPU, rank, world), seed)
        sampler.set_range(start, stop)
        micros = list(sampler)
        assert len(micros) == len(sampler) == (stop - start) * accumulate
        assert all(len(micro) == batch for micro in micros)
        for number, micro in enumerate(micros):
            taken[start + number // accumulate] += micro
    return {step: sorted(keys) for step, keys in taken.items()}


# -------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize(
    ("batch", "accumulate", "world"), [(4, 1, 2), (2, 1, 4), (2, 4, 1), (1, 2, 4)]
)
def test_global_batch_is_the_same_however_it_is_spread(batch, accumulate, world):
    assert steps(45, batch, accumulate, world, 3, 14) == steps(45, 8, 1, 1, 3, 14)


def test_an_epoch_takes_every_image_at_most_once():
    sampler = StepSampler(45, 8)
    assert (sampler.steps_per_epoch, sampler.global_batch) == (5, 8)
    orders = []
    for epoch in range(6):
        taken = steps(45, 8, 1, 1, 5 * epoch, 5 * epoch + 5)
        keys = [key for step in sorted(taken) for key in taken[step]]
        assert {key[0] for key in keys} == {epoch}
        indices = [key[1] for key in keys]
        assert len(set(indices)) == 40 and set(indices) <= set(range(45))
        orders.append(tuple(indices))
    assert len(set(orders)) == 6
    left_out = [set(range(45)) - set(order) for order in orders]
    assert set.intersection(*left_out) == set()  # not always the same ones


def test_whole_epoch_is_a_permutation_by_seed():
    first = StepSampler(40, 8, seed=1)
    first.set_range(0, 5)
    order = [key for micro in first for key in micro]
    assert sorted(order) == [(0, index) for index in range(40)] and order != sorted(order)
    assert all(type(index) is int for _, index in order)
    other = StepSampler(40, 8, seed=2)
    other.set_range(0, 5)
    assert order != [key for micro in other for key in micro]


def test_resumes_by_arithmetic():
    whole = steps(45, 4, 2, 2, 0, 12)
    for start in (1, 2, 5, 11):
        rest = steps(45, 4, 2, 2, start, 12)
        assert rest == {step: whole[step] for step in range(start, 12)}


def test_batch_larger_than_the_set():
    assert StepSampler(8, 2, 2, Processes(CPU, 0, 2)).steps_per_epoch == 1
    with pytest.raises(InputError, match="16.*8"):
        StepSampler(8, 2, 2, Processes(CPU, 0, 4))


# ------------------------------------------------------------------------------------------ batches


def batches_of(dataset, workers, start=0, stop=4):
    sampler = StepSampler(len(dataset), 4, 2)
    sampler.set_range(start, stop)
    return list(training_loader(dataset, sampler, workers, CPU))


def train_set(folder, seed=0, view=CROPS):
    manifest = read_manifest(folder)
    return PhotographDataset(manifest, manifest.split("train"), view, seed)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_views_are_keyed_by_seed_epoch_and_index(prepared):
    dataset = train_set(prepared, seed=5)
    item = dataset[(3, 7)]
    assert item["index"] == 7
    picture = np.asarray(Image.open(prepared / dataset.records[7].path))
    expected = CROPS(torch.from_numpy(picture.copy()).permute(2, 0, 1), (5, 3, 7))
    assert all(torch.equal(item[name], expected[name]) for name in expected)
    dataset[(0, 0)], torch.rand(3), np.random.random(3)
    assert equal(dataset[(3, 7)], item)
    assert equal(dataset[7], dataset[(0, 7)])
    for other in (dataset[(2, 7)], train_set(prepared, seed=6)[(3, 7)]):
        assert not torch.equal(other["global"], item["global"])


def test_raw_photographs_are_brought_in_prepared_ones_as_they_are(prepared):
    manifest = read_manifest(prepared)
    assert manifest.prepared
    record, view = manifest.records[:1], WholeView(SIDE)
    picture = np.asarray(Image.open(prepared / record[0].path))
    whole = PhotographDataset(manifest, list(record), view)[0]["image"]
    assert np.array_equal(whole.permute(1, 2, 0).numpy(), picture)
    raw = replace(manifest, prepared=False)
    expected = torch.from_numpy(
        photographs.load_photograph(prepared / record[0].path, data.RAW_SIZE)
    )
    found = PhotographDataset(raw, list(record), lambda photograph, key: {"image": photograph})[0]
    assert torch.equal(found["image"].permute(1, 2, 0), expected)


def test_a_photograph_is_decoded_no_larger_than_crops_need(tmp_path):
    """Crops of what a quarter of the pixels holds are those of all pixels, to 35 dB."""
    y, x = np.mgrid[:1024, :1024]
    waves = [128 + 60 * np.sin(x / s) * np.cos(y / (s + 3)) for s in (9, 14, 23)]
    inside = (x - 511.5) ** 2 + (y - 511.5) ** 2 < 500**2
    picture = (np.stack(waves, axis=2) * inside[..., None]).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.jpg", quality=95, subsampling=0)
    records = [Record("a.jpg", None, "a", "", "train")]
    views = {"crops": MultiCrop(MultiCropOptions()), "whole": WholeView(224)}
    for prepared in (True, False):
        manifest = Manifest(tmp_path, tuple(records), prepared, "test")
        sets = {n: PhotographDataset(manifest, records, v) for n, v in views.items()}
        small, whole = (sets[name].read(0) for name in views)
        assert whole.shape[0] == (1024 if prepared else data.RAW_SIZE)
        if not prepared:  # the fundus alone, as it is
            left, top, right, bottom = find_fundus(picture)
            fundus = open_photograph(tmp_path / "a.jpg")[top:bottom, left:right]
            assert np.array_equal(small, pad_square(fundus)) and small.shape[0] > 960
            continue
        assert small.shape[0] == 512 >= MultiCrop(MultiCropOptions()).min_side
        for key in range(5):  # each side's crops of one window
            found, expected = (
                MultiCrop(MultiCropOptions())(torch.from_numpy(a).permute(2, 0, 1), (key,))
                for a in (small, whole)
            )
            for name in ("global", "local"):
                error = found[name].float() - expected[name].float()
                assert error.square().mean() < 255**2 / 10**3.5, (key, name)
                assert error.mean().abs() < 0.3, (key, name)


def test_workers_change_nothing(prepared):
    dataset = train_set(prepared)
    expected = batches_of(dataset, 0)
    assert len(expected) == 8 and expected[0]["global"].shape == (4, 2, 3, 32, 32)
    for workers in (1, 3):
        found = batches_of(dataset, workers)
        assert len(found) == 8 and all(map(equal, found, expected))
    resumed = batches_of(dataset, 1, start=2)
    assert len(resumed) == 4 and all(map(equal, resumed, expected[4:]))


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_photograph_is_one_message(prepared, tmp_path, workers):
    folder = tmp_path / "broken"
    shutil.copytree(prepared, folder)
    dataset = train_set(folder)
    path = folder / dataset.records[11].path
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError) as caught:
        batches_of(dataset, workers, stop=5)
    message = str(caught.value)
    assert message.startswith(str(path)) and "Traceback" not in message and "\n" not in message


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_photograph_is_replaced_and_named_once(prepared, tmp_path, workers, caplog):
    folder = tmp_path / "broken"
    shutil.copytree(prepared, folder)
    whole, dataset = train_set(folder), train_set(folder)
    dataset.max_bad = 0.03  # of 40: one
    expected = batches_of(whole, 0, stop=10)
    path, second = (folder / dataset.records[i].path for i in (11, 12))
    path.write_bytes(b"")
    caplog.set_level("WARNING", logger="ssrl")
    found = batches_of(dataset, workers, stop=10)  # two epochs
    assert [r.getMessage() for r in caplog.records] == [
        f"{path}: is empty; mend the file, or run prepare_data.py, which leaves it out. "
        "Another one takes its place; 1 so far"
    ]
    replaced = 0
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one["index"], other["index"])
        same = (one["global"] == other["global"]).flatten(1).all(dim=1)
        assert torch.equal(~same, one["index"] == 11) and torch.equal(one["bad"] == 11, ~same)
        replaced += int((~same).sum())
    assert replaced == 2
    assert all(map(equal, found, batches_of(dataset, 0, stop=10)))  # the same ones each time
    second.write_bytes(b"")
    with pytest.raises(InputError, match="2 of 40 photographs, over --max-bad 0.03"):
        batches_of(dataset, workers, stop=10)


def test_substitutes_depend_on_seed_epoch_and_photograph(prepared):
    dataset = train_set(prepared)
    other = PhotographDataset(dataset.manifest, dataset.records, CROPS, seed=1)
    fewer = PhotographDataset(dataset.manifest, dataset.records[:30], CROPS)
    keys = [(dataset, 0, 3), (dataset, 1, 3), (dataset, 0, 4), (other, 0, 3), (fewer, 0, 3)]
    chosen = [tuple(d._candidates(epoch, index)) for d, epoch, index in keys]
    assert len({c[1:] for c in chosen}) == 5 and all(len(c) == 10 for c in chosen)
    assert [c[0] for c in chosen] == [3, 3, 4, 3, 3] and max(chosen[4]) < 30
    assert tuple(dataset._candidates(0, 3)) == chosen[0]


def bad_worker(rank: int, folder: str, max_bad: float) -> None:
    """One process of two reads its half of two epochs; writes what it logged and how it ended."""
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
    dataset = train_set(Path(folder, "data"))
    dataset.max_bad = max_bad
    sampler = StepSampler(40, 4, processes=Processes(CPU, rank, 2))
    sampler.set_range(0, 10)
    said = []
    utils.log.warning = lambda text, *values: said.append(text % values)
    try:
        said.append(f"{len(list(training_loader(dataset, sampler, 0, CPU)))} batches")
    except InputError as error:
        said.append(str(error))
    Path(folder, f"said{rank}").write_text("\n".join(said))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("max_bad", [0.1, 0.05])
def test_unreadable_photographs_are_counted_over_all_processes(prepared, tmp_path, max_bad):
    folder = tmp_path / "data"
    shutil.copytree(prepared, folder)
    records = train_set(folder).records
    order = np.random.default_rng((0, 0)).permutation(40)
    taken = order.reshape(5, 2, 4)  # at each step by two processes, 4 photographs each
    victims = [int(i) for i in (taken[1, 0, 2], taken[0, 1, 0], taken[4, 1, 3])]  # 3 of 40
    for index in victims:
        (folder / records[index].path).write_bytes(b"")
    torch.multiprocessing.spawn(bad_worker, (str(tmp_path), max_bad), nprocs=2)
    said = [(tmp_path / f"said{rank}").read_text().splitlines() for rank in (0, 1)]
    assert said[0] == said[1]  # the main process logs what any of them found
    if max_bad == 0.1:
        assert len(said[0]) == 4 and said[0][-1] == "10 batches"
        assert all(any(records[i].path in line for line in said[0]) for i in victims)
    else:
        assert "3 of 40 photographs, over --max-bad 0.05" in said[0][-1]


def test_prepared_pictures_that_kept_their_sides_are_padded(prepared, tmp_path):
    folder = tmp_path / "oblong"
    shutil.copytree(prepared, folder)
    dataset = train_set(folder, view=WholeView(SIDE))
    path = folder / dataset.records[3].path
    Image.new("RGB", (SIDE, SIDE // 2), (200, 100, 50)).save(path)
    image = dataset[3]["image"].float()
    quarter = SIDE // 4
    assert image[:, : quarter - 4].max() < 30 and image[:, -quarter + 4 :].max() < 30
    assert image[0, quarter + 4 : -quarter - 4].min() > 170


# --------------------------------------------------------------------------------------------- sets


@pytest.mark.parametrize("name", ["synthetic:5", "synthetic:x", "synthetic:-20", "synth", ""])
def test_bad_names_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "synthetic_manifest", lambda count: pytest.fail(f"drew {count}"))
    with pytest.raises(InputError):
        data.open_manifest(name)


def test_files_copied_within_a_set_without_patients_stay_together(tmp_path, caplog):
    """40 photographs of APTOS, each twice under other names, opened as downloaded."""
    names = [f"train_images/{name}{i:02d}.png" for name in "ab" for i in range(40)]
    touch(tmp_path, *names)
    for i, name in enumerate(names):  # some of one size that are no copies
        (tmp_path / name).write_bytes(bytes([i % 40]) * (100 + i % 20))
    rows = [f"{Path(name).stem},{i % 5}" for i, name in enumerate(names)]
    (tmp_path / "train.csv").write_text("id_code,diagnosis\n" + "\n".join(rows))
    manifest = data.open_manifest(str(tmp_path))
    split = {record.path: record.split for record in manifest.records}
    assert Counter(split.values()) == {"test": 16, "val": 6, "train": 58}
    assert all(split[name] == split[name.replace("/a", "/b")] for name in names)
    assert "40 photographs are copies: train_images/a00.png = train_images/b00.png" in caplog.text


def test_patients_that_are_known_need_no_search_for_copies(tmp_path):
    touch(tmp_path, *(f"train/{i}_{eye}.jpeg" for i in range(20) for eye in ("left", "right")))
    rows = [f"{i}_{eye},{i % 5}" for i in range(20) for eye in ("left", "right")]
    (tmp_path / "trainLabels.csv").write_text("image,level\n" + "\n".join(rows))
    assert not copies.same_files(data.open_manifest(str(tmp_path)))


def test_folder_that_is_not_there():
    with pytest.raises(InputError, match="nowhere"):
        data.open_manifest("nowhere")


def test_graded_counts(prepared, caplog):
    manifest = read_manifest(prepared)
    records = manifest.split("train")
    assert data.graded(manifest, records, "train") == records
    some = [replace(r, grade=None) if i % 4 == 0 else r for i, r in enumerate(records)]
    with caplog.at_level("INFO", logger="ssrl"):
        kept = data.graded(manifest, some, "train")
    assert len(kept) == 30 and all(r.grade is not None for r in kept) and "10" in caplog.text
    with pytest.raises(InputError, match="manifest.csv.*val"):
        data.graded(manifest, [replace(r, grade=None) for r in records], "val")
