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
from augment import CropBatch, MultiCrop, MultiCropOptions, PatchMasks, WholeView
from data import PhotographDataset, StepSampler, evaluation_loader, prefetch, training_loader
from devices import Processes
from fundus import copies, painting, photographs, synthetic
from fundus.manifest import GRADES, Manifest, Record, read_manifest
from fundus.painting import PAINTED
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
    """Whether two items or batches hold the same tensors under the same names."""
    if one.keys() != other.keys():
        return False
    return all(torch.equal(one[name], other[name]) for name in one)


def test_views_are_keyed_by_seed_epoch_and_index(prepared):
    dataset = train_set(prepared, seed=5)
    item = dataset[(3, 7)]
    assert item["index"] == 7
    picture = np.asarray(Image.open(prepared / dataset.records[7].path))
    expected = CROPS(torch.from_numpy(picture.copy()).permute(2, 0, 1), (5, 3, 7))
    for name in expected:
        assert torch.equal(item[name], expected[name])
    # what is drawn between makes no difference
    dataset[(0, 0)]
    torch.rand(3)
    np.random.random(3)
    assert equal(dataset[(3, 7)], item)
    assert equal(dataset[7], dataset[(0, 7)])
    for other in (dataset[(2, 7)], train_set(prepared, seed=6)[(3, 7)]):
        assert not torch.equal(other["global"], item["global"])


def test_raw_photographs_are_brought_in_prepared_ones_as_they_are(prepared):
    manifest = read_manifest(prepared)
    assert manifest.prepared
    records = [manifest.records[0]]
    path = prepared / records[0].path
    whole = PhotographDataset(manifest, records, WholeView(SIDE))[0]["image"]
    assert np.array_equal(whole.permute(1, 2, 0).numpy(), np.asarray(Image.open(path)))

    raw = replace(manifest, prepared=False)
    expected = torch.from_numpy(photographs.load_photograph(path, data.RAW_SIZE))
    found = PhotographDataset(raw, records, lambda photograph, key: {"image": photograph})[0]
    assert torch.equal(found["image"].permute(1, 2, 0), expected)


@pytest.fixture
def wavy(tmp_path):
    """A photograph of waves (1024, 1024) within a round fundus, saved as a.jpg; and its record."""
    y, x = np.mgrid[:1024, :1024]
    waves = []
    for length in (9, 14, 23):
        waves.append(128 + 60 * np.sin(x / length) * np.cos(y / (length + 3)))
    is_inside = (x - 511.5) ** 2 + (y - 511.5) ** 2 < 500**2
    picture = (np.stack(waves, axis=2) * is_inside[..., None]).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.jpg", quality=95, subsampling=0)
    return picture, Record("a.jpg", None, "a", "", "train")


def read_for(view, folder, record, *, prepared):
    """What a dataset reads for a view."""
    manifest = Manifest(folder, (record,), prepared, "test")
    return PhotographDataset(manifest, [record], view).read(0)


def test_a_photograph_is_decoded_no_larger_than_crops_need(wavy, tmp_path):
    """Crops of what a quarter of the pixels holds are those of all pixels, to 35 dB."""
    _, record = wavy
    crops = MultiCrop(MultiCropOptions())
    small = read_for(crops, tmp_path, record, prepared=True)
    whole = read_for(WholeView(224), tmp_path, record, prepared=True)
    assert whole.shape[0] == 1024
    assert small.shape[0] == 512 >= crops.min_side
    for key in range(5):  # each side's crops of one window
        found = crops(torch.from_numpy(small).permute(2, 0, 1), (key,))
        expected = crops(torch.from_numpy(whole).permute(2, 0, 1), (key,))
        for name in ("global", "local"):
            error = found[name].float() - expected[name].float()
            assert error.square().mean() < 255**2 / 10**3.5, (key, name)
            assert error.mean().abs() < 0.3, (key, name)


def test_of_a_raw_photograph_crops_get_the_fundus_alone_as_it_is(wavy, tmp_path):
    picture, record = wavy
    small = read_for(MultiCrop(MultiCropOptions()), tmp_path, record, prepared=False)
    whole = read_for(WholeView(224), tmp_path, record, prepared=False)
    assert whole.shape[0] == data.RAW_SIZE
    left, top, right, bottom = find_fundus(picture)
    fundus = open_photograph(tmp_path / "a.jpg")[top:bottom, left:right]
    assert np.array_equal(small, pad_square(fundus)) and small.shape[0] > 960


def test_workers_change_nothing(prepared):
    dataset = train_set(prepared)
    expected = batches_of(dataset, 0)
    assert len(expected) == 8
    assert expected[0]["global"].shape == (4, 2, 3, 32, 32)
    for workers in (1, 3):
        found = batches_of(dataset, workers)
        assert len(found) == 8
        assert all(map(equal, found, expected))
    resumed = batches_of(dataset, 1, start=2)
    assert len(resumed) == 4
    assert all(map(equal, resumed, expected[4:]))


def test_evaluation_takes_every_photograph_in_order(prepared):
    dataset = train_set(prepared, view=WholeView(SIDE))
    for workers in (0, 2):
        batches = list(evaluation_loader(dataset, 16, workers))
        indices = torch.cat([batch["index"] for batch in batches])
        assert indices.tolist() == list(range(40))
        assert [len(batch["image"]) for batch in batches] == [16, 16, 8]


def test_loaders_draw_nothing_from_the_generator_of_training(prepared):
    dataset = train_set(prepared)
    before = torch.get_rng_state()
    batches_of(dataset, 0)
    list(evaluation_loader(dataset, 16, 0))
    assert torch.equal(torch.get_rng_state(), before)


def crop_batches(count, device):
    """Batches of crops as color_views makes them, each full of its number."""
    for number in range(count):
        crops = [torch.full((2, 3, 512, 512), float(number), device=device)]
        yield CropBatch(crops, PatchMasks())


def test_prefetching_gives_every_batch_once():
    batches = list(prefetch(crop_batches(3, CPU), CPU))
    assert [float(batch.crops[0].mean()) for batch in batches] == [0, 1, 2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("count", [0, 1, 20])
def test_prefetching_on_cuda_waits_for_what_it_gives(count):
    """The batches are whole though steps are slow, and the memory of none is taken too early."""
    device = torch.device("cuda")
    found = []
    for batch in prefetch(crop_batches(count, device), device):
        torch.cuda._sleep(20_000_000)  # a step of some milliseconds, of which the host knows not
        found.append(batch.crops[0].clone())
        del batch
    for number, crops in enumerate(found):
        assert torch.equal(crops, torch.full_like(crops, number))
    assert len(found) == count


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
    assert message.startswith(str(path))
    assert "Traceback" not in message and "\n" not in message


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_photograph_is_replaced_and_named_once(prepared, tmp_path, workers, caplog):
    folder = tmp_path / "broken"
    shutil.copytree(prepared, folder)
    expected = batches_of(train_set(folder), 0, stop=10)
    dataset = train_set(folder)
    dataset.max_bad = 0.03  # of 40: one
    path = folder / dataset.records[11].path
    path.write_bytes(b"")
    caplog.set_level("WARNING", logger="ssrl")
    found = batches_of(dataset, workers, stop=10)  # two epochs
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: is empty; mend the file, or run prepare_data.py, which leaves it out. "
        "Another one takes its place; 1 so far"
    ]
    count = 0
    for batch, whole in zip(found, expected, strict=True):
        is_other = (batch["global"] != whole["global"]).flatten(1).any(dim=1)
        assert torch.equal(batch["index"], whole["index"])
        assert torch.equal(is_other, batch["index"] == 11)
        assert torch.equal(batch["bad"], torch.where(is_other, 11, data.READABLE))
        count += int(is_other.sum())
    assert count == 2
    assert all(map(equal, found, batches_of(dataset, 0, stop=10)))  # the same ones each time

    (folder / dataset.records[12].path).write_bytes(b"")
    with pytest.raises(InputError, match="2 of 40 photographs, over --max-bad 0.03"):
        batches_of(dataset, workers, stop=10)


def test_a_photograph_that_takes_its_own_place_is_named_all_the_same(prepared, monkeypatch):
    """It could not be read for a moment, and then it was drawn as its own substitute."""
    dataset = train_set(prepared)
    dataset.max_bad = 1.0
    expected = dataset[(0, 5)]
    monkeypatch.setattr(dataset, "_candidates", lambda epoch, index: [index, index])
    read = dataset.read
    calls = []

    def read_at_second_try(index):
        calls.append(index)
        if len(calls) == 1:
            raise InputError("busy")
        return read(index)

    monkeypatch.setattr(dataset, "read", read_at_second_try)
    assert equal(dataset[(0, 5)], expected | {"bad": torch.tensor(5)})


def test_a_folder_of_unreadable_photographs(prepared, monkeypatch):
    dataset = train_set(prepared)
    dataset.max_bad = 1.0

    def refuse(index):
        raise InputError("gone")

    monkeypatch.setattr(dataset, "read", refuse)
    with pytest.raises(InputError, match="of 10 photographs none can be read"):
        dataset[(0, 5)]


def test_substitutes_depend_on_seed_epoch_and_photograph(prepared):
    dataset = train_set(prepared)
    other = PhotographDataset(dataset.manifest, dataset.records, CROPS, seed=1)
    fewer = PhotographDataset(dataset.manifest, dataset.records[:30], CROPS)
    drawn = set()
    for photographs_of, epoch, index in (
        (dataset, 0, 3),
        (dataset, 1, 3),
        (dataset, 0, 4),
        (other, 0, 3),
        (fewer, 0, 3),
    ):
        first, *substitutes = photographs_of._candidates(epoch, index)
        assert first == index
        assert len(substitutes) == 9
        assert max(substitutes) < len(photographs_of)
        assert [first, *substitutes] == list(photographs_of._candidates(epoch, index))
        drawn.add(tuple(substitutes))
    assert len(drawn) == 5


def bad_worker(rank: int, folder: str, max_bad: float) -> None:
    """One process of two reads its half of two epochs; writes what it logged and how it ended."""
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
    dataset = train_set(Path(folder, "data"))
    dataset.max_bad = max_bad
    sampler = StepSampler(40, 4, processes=Processes(CPU, rank, 2))
    sampler.set_range(0, 10)
    lines = []
    utils.log.warning = lambda text, *values: lines.append(text % values)
    try:
        batches = list(training_loader(dataset, sampler, 0, CPU))
        lines.append(f"{len(batches)} batches")
    except InputError as error:
        lines.append(str(error))
    Path(folder, f"lines{rank}").write_text("\n".join(lines))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("max_bad", [0.1, 0.05])
def test_unreadable_photographs_are_counted_over_all_processes(prepared, tmp_path, max_bad):
    folder = tmp_path / "data"
    shutil.copytree(prepared, folder)
    records = train_set(folder).records
    order = np.random.default_rng((0, 0)).permutation(40)
    taken = order.reshape(5, 2, 4)  # at each step by two processes, 4 photographs each
    unreadable = [records[index].path for index in (taken[1, 0, 2], taken[0, 1, 0], taken[4, 1, 3])]
    for path in unreadable:
        (folder / path).write_bytes(b"")
    torch.multiprocessing.spawn(bad_worker, (str(tmp_path), max_bad), nprocs=2)
    lines = (tmp_path / "lines0").read_text()
    assert lines == (tmp_path / "lines1").read_text()  # each logs what any of them found
    if max_bad == 0.1:
        *warnings, end = lines.splitlines()
        assert end == "10 batches" and len(warnings) == 3
        assert sorted(path for path in unreadable for line in warnings if path in line) == sorted(
            unreadable
        )
    else:
        assert "3 of 40 photographs, over --max-bad 0.05" in lines.splitlines()[-1]


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


TOO_MANY = ["9" * 20, "9" * 5000, "1000001"]


@pytest.mark.parametrize(
    "count",
    [
        "5",
        "9",
        "0",
        "x",
        "-20",
        "+20",
        "1e3",
        "20.0",
        "inf",
        "nan",
        " 20",
        "20@",
        "20@x",
        "20@63",
        "@2049",
        *TOO_MANY,
    ],
)
def test_counts_of_drawn_photographs_that_are_refused(count, monkeypatch):
    monkeypatch.setattr(data, "synthetic_manifest", lambda *asked: pytest.fail(f"drew {asked}"))
    with pytest.raises(InputError) as caught:
        data.open_manifest(f"synthetic:{count}")
    message = str(caught.value)
    assert message.startswith(f"--data synthetic:{count[:40]}")
    assert message.endswith("N photographs, 10 to 1000000, of SIZE pixels, 64 to 2048")
    assert len(message) < 240


@pytest.mark.parametrize(
    ("name", "count", "size"),
    [
        ("synthetic", synthetic.SYNTHETIC_COUNT, 256),
        ("synthetic:", synthetic.SYNTHETIC_COUNT, 256),
        ("synthetic:10", 10, 256),
        ("synthetic:1000000", 1_000_000, 256),
        ("synthetic:10@512", 10, 512),
        ("synthetic:@64", synthetic.SYNTHETIC_COUNT, 64),
    ],
)
def test_counts_of_drawn_photographs(name, count, size, monkeypatch):
    asked = []

    def draw(*numbers):
        asked.append(numbers)
        return Manifest(Path("drawn"), (), True, "test")

    monkeypatch.setattr(data, "synthetic_manifest", draw)
    assert data.open_manifest(name).root == Path("drawn")
    assert asked == [(count, size)]


@pytest.mark.parametrize("name", ["synth", ""])
def test_names_that_are_nothing_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError):
        data.open_manifest(name)


def test_files_copied_within_a_set_without_patients_stay_together(tmp_path, caplog):
    """40 photographs of APTOS, each twice under other names, opened as downloaded."""
    names = [f"train_images/{name}{i:02d}.png" for name in "ab" for i in range(40)]
    touch(tmp_path, *names)
    for i, name in enumerate(names):  # some of one size that are no copies
        (tmp_path / name).write_bytes(bytes([i % 40]) * (100 + i % 20))
    rows = [f"{Path(name).stem},{i % GRADES}" for i, name in enumerate(names)]
    (tmp_path / "train.csv").write_text("id_code,diagnosis\n" + "\n".join(rows))
    manifest = data.open_manifest(str(tmp_path))
    split = {record.path: record.split for record in manifest.records}
    assert Counter(split.values()) == {"test": 16, "val": 6, "train": 58}
    for name in names:
        assert split[name] == split[name.replace("/a", "/b")]
    assert "40 photographs are copies: train_images/a00.png = train_images/b00.png" in caplog.text


def test_a_link_that_leads_nowhere_is_no_copy(tmp_path):
    touch(tmp_path, "0/a.png", "1/b.png", "2/c.png")
    (tmp_path / "0" / "x.png").symlink_to("/nowhere/at/all.png")
    assert len(data.open_manifest(str(tmp_path)).records) == 4


def test_patients_that_are_known_need_no_search_for_copies(tmp_path):
    rows = []
    for patient in range(20):
        for eye in ("left", "right"):
            touch(tmp_path, f"train/{patient}_{eye}.jpeg")
            rows.append(f"{patient}_{eye},{patient % GRADES}")
    (tmp_path / "trainLabels.csv").write_text("image,level\n" + "\n".join(rows))
    assert not copies.same_files(data.open_manifest(str(tmp_path)))


def test_folder_that_is_not_there():
    with pytest.raises(InputError, match="nowhere"):
        data.open_manifest("nowhere")


def test_graded_counts(prepared, caplog):
    manifest = read_manifest(prepared)
    records = manifest.split("train")
    assert data.graded(manifest, records, "train") == records
    for index in range(0, 40, 4):
        records[index] = replace(records[index], grade=None)
    with caplog.at_level("INFO", logger="ssrl"):
        kept = data.graded(manifest, records, "train")
    assert len(kept) == 30
    assert all(record.grade is not None for record in kept)
    assert "train: 10 photographs without grade are left out" in caplog.text
    with pytest.raises(InputError, match="manifest.csv.*val"):
        data.graded(manifest, [replace(r, grade=None) for r in records], "val")


# ---------------------------------------------------------------------------------- painted lesions
LESIONS = replace(CROPS, lesion_grid=2)


def painted_set(folder, seed=0):
    manifest = read_manifest(folder)
    return PhotographDataset(manifest, manifest.split("train"), LESIONS, seed, paint=True)


def test_painted_lesions_are_keyed_by_seed_epoch_and_index(prepared):
    dataset = painted_set(prepared)
    item = dataset[(1, 3)]
    assert item["lesions"].shape == (2, 4, len(PAINTED))
    assert equal(dataset[(1, 3)], item)
    assert any(not torch.equal(dataset[(epoch, 3)]["lesions"], item["lesions"]) for epoch in (2, 3))
    whole = [dataset[(0, index)]["lesions"].any() for index in range(20)]
    assert sum(map(bool, whole)) >= 10


def test_painting_changes_nothing_else(prepared, monkeypatch):
    """Crops are cut where they would be, of a photograph that has no lesion painted on it."""
    monkeypatch.setattr(painting, "PAINTED_SHARE", 0.0)
    plain, painted = train_set(prepared), painted_set(prepared)
    for index in range(4):
        expected = plain[(1, index)]
        item = painted[(1, index)]
        assert all(torch.equal(item[name], expected[name]) for name in expected)


def test_drawn_photographs_bring_their_own_lesions(prepared, monkeypatch):
    monkeypatch.setattr(painting, "PAINTED_SHARE", 0.0)
    dataset = painted_set(prepared)
    for index, record in enumerate(dataset.records[:20]):
        kinds = [
            (prepared / "masks" / f"{Path(record.path).stem}_{name}.png").is_file()
            for name in PAINTED
        ]
        array = dataset._paint(dataset.read(index), index, (0,))
        assert array[..., 3:].any(axis=(0, 1)).tolist() == kinds
    assert any(record.grade > 1 for record in dataset.records[:20])
