"""The commands as a newcomer types them. Run with `python -m pytest tests/test_scripts.py`.

In a copy of the checkout tests/tiny.yaml stands in for configs/demo.yaml, `ckpt` is the run just
trained and `img.jpeg` a drawn photograph.
"""

import csv
import json
import os
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import child_environment
from PIL import Image
from safetensors.torch import load_file

from fundus.synthetic import DrawnEye, draw_photograph
from utils import HERE, sha256_of

SCRIPTS = ("SSRL", "eval_knn", "eval_linear", "visualize_attention", "prepare_data")
# what a command may not do: the first thing that a socket does ends it
NO_SOCKETS = """
import os, sys
def refuse(event, arguments):
    if event in ("socket.__new__", "socket.connect", "socket.getaddrinfo"):
        os.write(2, b"opened a socket\\n")
        os._exit(99)
sys.addaudithook(refuse)
"""
QUICK = 'import sys\nsys.modules["torch.utils.tensorboard"] = None\n'  # seconds to import


def command(line, folder, site=QUICK):
    """Run a command line, `python` being this one; returns what it printed."""
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site" / "sitecustomize.py").write_text(site)
    first, *words = line.split()
    assert first in ("python", "python3")
    environment = child_environment(PYTHONPATH=str(folder / "site"), COLUMNS="200")
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{line}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the checkout with a trained run."""
    folder = tmp_path_factory.mktemp("copy") / "SSRL"
    kept = {"configs", "fundus", "tools"}
    folder.mkdir()
    for path in HERE.iterdir():
        if path.suffix == ".py":
            shutil.copy(path, folder)
        elif path.name in kept:
            shutil.copytree(path, folder / path.name)
    (folder / "configs").mkdir(exist_ok=True)
    shutil.copy(HERE / "tests" / "tiny.yaml", folder / "configs" / "demo.yaml")
    frame, _ = draw_photograph(DrawnEye("p", "left", 4, (7, 1, 0)), 160)
    Image.fromarray(frame).save(folder / "img.jpeg")
    printed = command("python3 -m torch.distributed.launch SSRL.py", folder)
    assert "demo.yaml" in printed
    (folder / "ckpt").symlink_to("runs/demo")
    return folder


def test_training(checkout):
    run = checkout / "runs" / "demo"
    names = {"config.yaml", "log.jsonl", "checkpoint.pth", "backbone.safetensors", "crops.png"}
    assert names <= {path.name for path in run.iterdir()}
    saved = torch.load(run / "checkpoint.pth", weights_only=True)
    assert saved["step"] > 0 and saved["options"]["data"] == "synthetic:40"
    assert set(load_file(run / "backbone.safetensors")) == {
        name.removeprefix("backbone.") for name in saved["teacher"] if name.startswith("backbone.")
    }
    first = json.loads((run / "log.jsonl").read_text().splitlines()[0])
    assert first["versions"]["torch"] and first["command"] and len(first["data"]) == 64


def check_results(folder, run):
    """The schema, and numbers that follow from predictions.csv."""
    results = json.loads((folder / "results.json").read_text())
    keys = {"protocol", "backbone", "data", "majority", "metrics", "confusion", "versions"}
    assert keys | {"command"} <= results.keys()
    backbone = results["backbone"]
    assert backbone["sha256"] == sha256_of(run / "backbone.safetensors")
    assert (backbone["arch"], backbone["patch_size"]) == ("vit_pico", 8)
    for split in ("train", "val", "test"):
        counts = results["data"][split]
        assert sum(counts["by_grade"]) == counts["images"] >= counts["patients"] > 0
    with (folder / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert ",".join(rows[0]) == "path,patient,eye,grade,prediction,p0,p1,p2,p3,p4"
    truth, said = (np.array([int(row[name]) for row in rows]) for name in ("grade", "prediction"))
    shares = np.array([[float(row[f"p{grade}"]) for grade in range(5)] for row in rows])
    np.testing.assert_allclose(shares.sum(1), 1, atol=1e-4)
    assert (shares.argmax(1) == said).all() and len(rows) == results["data"]["test"]["images"]
    accuracy = results["metrics"]["accuracy"]
    assert accuracy["value"] == pytest.approx((truth == said).mean())
    assert accuracy["ci95"][0] <= accuracy["value"] <= accuracy["ci95"][1]
    confusion = np.zeros((5, 5), int)
    np.add.at(confusion, (truth, said), 1)
    assert results["confusion"] == confusion.tolist()
    majority = np.argmax(results["data"]["train"]["by_grade"])
    assert results["majority"]["accuracy"] == pytest.approx((truth == majority).mean())
    assert str(HERE) not in (folder / "results.json").read_text()
    with Image.open(folder / "confusion.png") as picture:
        assert min(picture.size) > 100
    return results


def test_knn(checkout):
    printed = command("python eval_knn.py --k 15", checkout)
    run = checkout / "runs" / "demo"
    results = check_results(run / "knn", run)
    assert [row["k"] for row in results["by_k"]] == [15] and "15" in results["protocol"]
    assert results["by_k"][0]["accuracy"] == results["metrics"]["accuracy"]["value"]
    assert "majority" in printed and "runs/demo" in printed


def test_linear(checkout):
    command("python eval_linear.py --pretrained ckpt", checkout)
    run = checkout / "runs" / "demo"
    results = check_results(run / "linear", run)
    chosen = [row for row in results["by_hyperparameter"] if row["chosen"]]
    assert len(chosen) == 1 and {"lr", "weight_decay", "epoch", "qwk"} <= chosen[0].keys()
    assert set(load_file(run / "linear" / "head.safetensors")) == {"weight", "bias"}


def test_attention(checkout):
    command("python visualize_attention.py --image img.jpeg", checkout)
    folder = checkout / "runs" / "demo" / "attention"
    endings = ("", "_mean", "_overlay", "_mask", "_head0", "_head1")
    assert {f"img{e}.png" for e in endings} | {"img.npz"} == {p.name for p in folder.iterdir()}
    with np.load(folder / "img.npz") as numbers:
        maps, mask = numbers["attention"], numbers["mask"]
    assert maps.shape == (2, 60, 60) and mask.shape == (60, 60) and maps.min() >= 0
    np.testing.assert_allclose(maps.sum((1, 2)), 1, atol=1e-4)
    assert 0.6 <= maps.mean(0)[mask].sum() < 0.62
    sizes = [Image.open(folder / f"img{e}.png").size for e in endings]
    assert sizes == [(480 * 6, 480)] + [(480, 480)] * 5


def test_training_again_says_that_it_is_finished(checkout):
    checkpoint = checkout / "runs" / "demo" / "checkpoint.pth"
    before = checkpoint.stat().st_mtime_ns
    assert "finished" in command("python SSRL.py", checkout)
    assert checkpoint.stat().st_mtime_ns == before


# ---------------------------------------------------------------------------------- help and errors


def seconds(words, folder):
    """Processor time of a Python command, which must succeed, and what it printed."""
    environment = child_environment(PYTHONPATH=str(folder), COLUMNS="200")
    output = folder / "printed.txt"
    with output.open("w") as file:
        child = subprocess.Popen(
            [sys.executable, *words], cwd=folder, env=environment, stdout=file, stderr=file
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, output.read_text()
    return usage.ru_utime + usage.ru_stime, output.read_text()


def test_help_is_quick_and_opens_no_socket(tmp_path):
    """At most 1.5 times what importing the libraries costs; noise is allowed two more tries."""
    (tmp_path / "sitecustomize.py").write_text(NO_SOCKETS)
    libraries = ["-c", "import torch, torchvision, timm"]
    least = seconds(libraries, tmp_path)[0]
    for name in SCRIPTS:
        for attempt in range(3):
            spent, printed = seconds([str(HERE / f"{name}.py"), "--help"], tmp_path)
            assert "--workers" in printed and "default" in printed
            if spent <= 1.5 * least:
                break
            assert attempt < 2, f"{name}.py --help takes {spent:.1f} s, the libraries {least:.1f} s"
            least = max(least, seconds(libraries, tmp_path)[0])
    assert {p.name for p in tmp_path.iterdir()} <= {"sitecustomize.py", "printed.txt"}


def test_socket_guard_works(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(NO_SOCKETS)
    environment = child_environment(PYTHONPATH=str(tmp_path))
    code = "import socket; socket.socket()"
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 99


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("SSRL.py --data nowhere", "nowhere"),
        ("SSRL.py --data synthetic:3", "synthetic:3"),
        ("SSRL.py --config nowhere.yaml", "nowhere.yaml"),
        ("SSRL.py --bath-size 3", "--batch-size"),
        ("SSRL.py --epochs 0", "--epochs"),
        ("eval_knn.py", "SSRL.py"),
        ("eval_knn.py --pretrained absent.pth", "absent.pth"),
        ("eval_knn.py --pretrained empty.pth", "empty.pth"),
        ("eval_linear.py --pretrained . --lr", "--lr"),
        ("eval_linear.py --pretrained absent --batch-sise 3", "--batch-size"),
        ("visualize_attention.py --image img.jpeg --threshold 60", "60"),
        ("visualize_attention.py --image absent.jpeg", "absent.jpeg"),
        ("visualize_attention.py", "--image"),
    ],
)
def test_user_errors_are_one_message(tmp_path, monkeypatch, capfd, line, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.pth").touch()
    script, *words = line.split()
    monkeypatch.setattr(sys, "argv", [script, *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(HERE / script), run_name="__main__")
    shown = capfd.readouterr()
    text = shown.out + shown.err
    assert end.value.code == 2 and told in text and "Traceback" not in text
    assert {p.name for p in tmp_path.iterdir()} == {"empty.pth"}
