"""What several test files share. Run them all with `python -m pytest tests`.

A small prepared folder and tiny training options; the user's home and cache stay untouched, the
network is not asked, signal handlers that training installs are put back.
"""

import os
import signal
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fundus.manifest import GRADES, Record, write_manifest
from fundus.synthetic import DrawnEye, draw_photograph
from utils import sha256_of

SIDE = 64
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="session", autouse=True)
def own_home(tmp_path_factory):
    """A home of the tests' own; one thread, whatever the number of cores."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in LAUNCHED:
            patch.delenv(name, raising=False)
        patch.setenv("HOME", str(home))
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield home
        torch.set_num_threads(threads)


@pytest.fixture
def handlers():
    """Start with Python's own handlers of signals, and put back those that were there before.

    A shell lets what it runs in the background ignore Ctrl-C, and pytest's processes inherit that.
    """
    of_terminate = signal.getsignal(signal.SIGTERM)
    of_interrupt = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, of_terminate)
    signal.signal(signal.SIGINT, of_interrupt)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A prepared folder: 60 drawn photographs of 30 patients, both eyes, all grades in each split.

    40 for training, 10 for validation, 10 for testing.
    """
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "images").mkdir()
    records = []
    splits = ["train"] * 20 + ["val"] * 5 + ["test"] * 5
    for patient, split in enumerate(splits):
        name = f"p{patient:02d}"
        grade = patient % GRADES
        for number, eye in enumerate(("left", "right")):
            frame, _ = draw_photograph(DrawnEye(name, eye, grade, (9, patient, number)), SIDE)
            path = folder / "images" / f"{name}_{eye}.jpg"
            Image.fromarray(frame).resize((SIDE, SIDE)).save(path, quality=95)
            relative = path.relative_to(folder).as_posix()
            record = Record(relative, grade, name, eye, split, "drawn", SIDE, SIDE, sha256_of(path))
            records.append(record)
    write_manifest(folder, records)
    (folder / "data_report.json").write_text("{}")  # what prepared folders have
    return folder


@pytest.fixture
def photograph():
    """One drawn photograph, uint8 (3, 96, 96)."""
    frame, _ = draw_photograph(DrawnEye("p", "left", 3, (4, 2, 0)), 96)
    array = np.array(Image.fromarray(frame).resize((96, 96)))
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


@pytest.fixture
def tiny(prepared, tmp_path, monkeypatch):
    """A function that returns options of a short training, some changed; runs under tmp_path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # seconds to import

    import SSRL  # here, since most tests need no training

    def options(**changed):
        return SSRL.Options(**(tiny_values(prepared) | changed))

    return options


def tiny_values(folder):
    """Options by name: 40 photographs, a step takes 8, 2 epochs of 5 steps, fp32, no drop path."""
    return {
        "data": str(folder),
        "output_dir": "run",
        "arch": "vit_pico",
        "patch_size": 8,
        "init": "none",
        "epochs": 2,
        "batch_size": 8,
        "global_crop_size": 32,
        "local_crop_size": 16,
        "local_crops_number": 2,
        "out_dim": 64,
        "head_hidden_dim": 64,
        "drop_path": 0.0,
        "warmup_epochs": 1,
        "knn_every": 0,
        "log_every": 1,
        "keep_every": 0,
        "precision": "fp32",
        "device": "cpu",
        "workers": 0,
    }


def tiny_flags(folder, **changed):
    """The same options as command-line arguments."""
    words = []
    for name, value in (tiny_values(folder) | changed).items():
        words += [f"--{name}", str(value)]
    return words


def child_environment(**changed):
    """The environment of a command that tests start."""
    return os.environ | {"PYTHONDONTWRITEBYTECODE": "1"} | changed
