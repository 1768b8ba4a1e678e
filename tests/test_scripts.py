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
from functools import partial

import numpy as np
import pytest
import torch
from conftest import child_environment
from PIL import Image
from safetensors.torch import load_file
from sklearn import metrics as sk

from fundus.manifest import GRADES
from fundus.synthetic import DrawnEye, draw_photograph
from utils import HERE, sha256_of

SCRIPTS = ("SSRL", "eval_knn", "eval_linear", "visualize_attention", "prepare_data")

# What a command may not do: the first thing that a socket does ends it.
NO_SOCKETS = """
import os, sys
def refuse(event, arguments):
    if event in ("socket.__new__", "socket.connect", "socket.getaddrinfo"):
        os.write(2, b"opened a socket\\n")
        os._exit(99)
sys.addaudithook(refuse)
"""

# TensorBoard takes seconds to import.
QUICK = 'import sys\nsys.modules["torch.utils.tensorboard"] = None\n'


# ------------------------------------------------------------------------------------- the commands


def run_command(line, folder):
    """Run a command line, `python` being this one; return what it printed."""
    first, *words = line.split()
    assert first in ("python", "python3")
    site = folder / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(QUICK)
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=child_environment(PYTHONPATH=str(site), COLUMNS="200"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{line}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the checkout with a trained run."""
    folder = tmp_path_factory.mktemp("copy") / "SSRL"
    folder.mkdir()
    for path in HERE.glob("*.py"):
        shutil.copy(path, folder)
    for name in ("configs", "fundus", "tools"):
        shutil.copytree(HERE / name, folder / name)
    shutil.copy(HERE / "tests" / "tiny.yaml", folder / "configs" / "demo.yaml")
    frame, _ = draw_photograph(DrawnEye("p", "left", 4, (7, 1, 0)), 160)
    Image.fromarray(frame).save(folder / "img.jpeg")

    printed = run_command("python3 -m torch.distributed.launch SSRL.py", folder)
    assert "demo.yaml" in printed
    (folder / "ckpt").symlink_to("runs/demo")
    return folder


def test_training(checkout):
    run = checkout / "runs" / "demo"
    names = {"config.yaml", "log.jsonl", "checkpoint.pth", "backbone.safetensors", "crops.png"}
    assert names <= {path.name for path in run.iterdir()}

    saved = torch.load(run / "checkpoint.pth", weights_only=True)
    assert saved["step"] > 0
    assert saved["options"]["data"] == "synthetic:40"
    backbone = set()
    for name in saved["teacher"]:
        if name.startswith("backbone."):
            backbone.add(name.removeprefix("backbone."))
    assert set(load_file(run / "backbone.safetensors")) == backbone

    first = json.loads((run / "log.jsonl").read_text().splitlines()[0])
    assert first["versions"]["torch"]
    assert first["command"]
    assert len(first["data"]) == 64


def recomputed(name, entry, truth, predicted, shares):
    """Return a metric as a reader of predictions.csv computes it with scikit-learn."""
    present = sorted(set(truth.tolist()))
    referable = truth >= 2
    score = shares[:, 2] + shares[:, 3] + shares[:, 4]
    common = {"labels": present, "average": "macro", "zero_division": 0}
    if name.startswith("recall_"):
        grade = int(name[-1])
        return sk.recall_score(truth, predicted, labels=[grade], average=None)[0]
    if name.startswith("sensitivity_at"):
        return (score[referable] >= entry["threshold"]).mean()
    if name.startswith("specificity_at"):
        return (score[~referable] < entry["threshold"]).mean()
    ways = {
        "accuracy": lambda: sk.accuracy_score(truth, predicted),
        "balanced_accuracy": lambda: sk.balanced_accuracy_score(truth, predicted),
        "qwk": lambda: sk.cohen_kappa_score(truth, predicted, weights="quadratic"),
        "macro_f1": lambda: sk.f1_score(truth, predicted, **common),
        "macro_precision": lambda: sk.precision_score(truth, predicted, **common),
        "macro_auroc": lambda: sk.roc_auc_score(truth, shares, multi_class="ovr"),
        "referable_auroc": lambda: sk.roc_auc_score(referable, score),
        "referable_ap": lambda: sk.average_precision_score(referable, score),
        "log_loss": lambda: sk.log_loss(truth, shares, labels=range(GRADES)),
        "brier": lambda: GRADES * sk.mean_squared_error(np.eye(GRADES)[truth], shares),
        "ece": lambda: calibration_error(shares.max(axis=1), truth == shares.argmax(axis=1)),
    }
    return ways[name]()


def calibration_error(confidence, right):
    """Return the mean gap between confidence and accuracy over 15 equal bins, by photographs."""
    bins = np.minimum((confidence * 15).astype(int), 14)
    gap = 0.0
    for number in range(15):
        inside = bins == number
        if inside.any():
            gap += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    return gap


def check_entry(name, entry, recompute):
    """Fail unless a value is the recomputed one to 1e-9, or says why it is none."""
    if entry["value"] is None:
        assert entry["reason"], name
        return
    assert entry["value"] == pytest.approx(recompute(), abs=1e-9), name
    if entry["ci95"] is None:
        assert entry["no_interval"], name
    else:
        assert entry["ci95"][0] <= entry["value"] <= entry["ci95"][1]


def check_patients(entries, rows, truth, predicted, shares):
    """Check the numbers by patient: the worst grade, prediction and score of each."""
    score = shares[:, 2] + shares[:, 3] + shares[:, 4]
    patients = np.array([row["patient"] for row in rows])
    worst = []
    for patient in sorted(set(patients)):
        own = patients == patient
        worst.append((truth[own].max(), predicted[own].max(), score[own].max()))
    grades, answers, scores = (np.array(column) for column in zip(*worst, strict=True))
    check_entry("accuracy", entries["accuracy"], lambda: (grades == answers).mean())
    check_entry(
        "qwk", entries["qwk"], lambda: sk.cohen_kappa_score(grades, answers, weights="quadratic")
    )
    check_entry(
        "referable AUROC", entries["referable_auroc"], lambda: sk.roc_auc_score(grades >= 2, scores)
    )


def check_results(folder, run):
    """Check a results.json, its numbers by predictions.csv, and return it."""
    results = json.loads((folder / "results.json").read_text())
    keys = {"protocol", "backbone", "data", "majority", "metrics", "confusion"}
    assert keys | {"versions", "command"} <= results.keys()
    assert str(HERE) not in (folder / "results.json").read_text(), "paths are relative"
    backbone = results["backbone"]
    assert backbone["sha256"] == sha256_of(run / "backbone.safetensors")
    assert backbone["arch"] == "vit_pico"
    assert backbone["patch_size"] == 8
    for split in ("train", "val", "test"):
        counts = results["data"][split]
        assert sum(counts["by_grade"]) == counts["images"] >= counts["patients"] > 0

    with (folder / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = "path,patient,eye,grade,prediction,p0,p1,p2,p3,p4"
    if "thresholded" in results:
        columns += ",thresholded"
    assert ",".join(rows[0]) == columns
    assert len(rows) == results["data"]["test"]["images"]
    truth = np.array([int(row["grade"]) for row in rows])
    predicted = np.array([int(row["prediction"]) for row in rows])
    shares = np.zeros((len(rows), GRADES))
    for number, row in enumerate(rows):
        for grade in range(GRADES):
            shares[number, grade] = float(row[f"p{grade}"])
    np.testing.assert_allclose(shares.sum(1), 1, atol=1e-4)
    assert (shares.argmax(1) == predicted).all()

    for name, entry in results["metrics"].items():
        check_entry(name, entry, partial(recomputed, name, entry, truth, predicted, shares))
    if "thresholded" in results:
        read = np.array([int(row["thresholded"]) for row in rows])
        for name, entry in results["thresholded"]["metrics"].items():
            check_entry(name, entry, partial(recomputed, name, entry, truth, read, shares))
    check_patients(results["patients"], rows, truth, predicted, shares)
    confusion = np.zeros((GRADES, GRADES), int)
    np.add.at(confusion, (truth, predicted), 1)
    assert results["confusion"] == confusion.tolist()
    most_frequent = np.argmax(results["data"]["train"]["by_grade"])
    assert results["majority"]["accuracy"] == pytest.approx((truth == most_frequent).mean())
    with Image.open(folder / "confusion.png") as picture:
        assert min(picture.size) > 100
    return results


def test_knn(checkout):
    printed = run_command("python eval_knn.py --k 15", checkout)
    run = checkout / "runs" / "demo"
    results = check_results(run / "knn", run)
    assert "15" in results["protocol"]
    (row,) = results["by_k"]
    assert row["k"] == 15
    assert row["accuracy"] == results["metrics"]["accuracy"]["value"]
    assert "majority" in printed and "runs/demo" in printed


def test_linear(checkout):
    run_command("python eval_linear.py --pretrained ckpt", checkout)
    run = checkout / "runs" / "demo"
    results = check_results(run / "linear", run)
    (chosen,) = [row for row in results["by_hyperparameter"] if row["chosen"]]
    assert {"weight_decay", "log_loss", "accuracy"} <= chosen.keys()
    assert results["validation"]["log_loss"] <= chosen["log_loss"] + 1e-6, "calibrated"
    for name in ("roc", "reliability", "embedding"):
        with Image.open(run / "linear" / f"{name}.png") as picture:
            assert min(picture.size) > 100
    assert set(load_file(run / "linear" / "head.safetensors")) == {"weight", "bias"}


def test_attention(checkout):
    run_command("python visualize_attention.py --image img.jpeg", checkout)
    folder = checkout / "runs" / "demo" / "attention"
    endings = ["", "_mean", "_overlay", "_mask", "_head0", "_head1"]
    pictures = [f"img{ending}.png" for ending in endings]
    assert {path.name for path in folder.iterdir()} == {*pictures, "img.npz"}

    with np.load(folder / "img.npz") as numbers:
        maps = numbers["attention"]
        mask = numbers["mask"]
    assert maps.shape == (2, 60, 60) and mask.shape == (60, 60)
    assert maps.min() >= 0
    np.testing.assert_allclose(maps.sum((1, 2)), 1, atol=1e-4)
    assert 0.6 <= maps.mean(0)[mask].sum() < 0.62

    for name in pictures:
        width = 480
        if name == "img.png":  # all of them side by side
            width = 480 * 6
        with Image.open(folder / name) as picture:
            assert picture.size == (width, 480), name


def test_training_again_says_that_it_is_finished(checkout):
    checkpoint = checkout / "runs" / "demo" / "checkpoint.pth"
    before = checkpoint.stat().st_mtime_ns
    assert "finished" in run_command("python SSRL.py", checkout)
    assert checkpoint.stat().st_mtime_ns == before


# ---------------------------------------------------------------------------------- help and errors


def measure_command(words, folder):
    """Return the processor time in seconds of a Python command, and what it printed."""
    output = folder / "printed.txt"
    with output.open("w") as file:
        child = subprocess.Popen(
            [sys.executable, *words],
            cwd=folder,
            env=child_environment(PYTHONPATH=str(folder), COLUMNS="200"),
            stdout=file,
            stderr=file,
        )
        # The time of this child alone, whatever others have run.
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, output.read_text()
    return usage.ru_utime + usage.ru_stime, output.read_text()


@pytest.fixture(scope="module")
def libraries_time(tmp_path_factory):
    """The processor time in seconds that importing the libraries takes."""
    libraries = ["-c", "import torch, torchvision, timm"]
    spent, _ = measure_command(libraries, tmp_path_factory.mktemp("libraries"))
    return spent


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_quick_and_opens_no_socket(name, tmp_path, libraries_time):
    """At most 1.5 times what importing the libraries costs; noise is allowed two more tries."""
    (tmp_path / "sitecustomize.py").write_text(NO_SOCKETS)
    times = []
    while not times or (min(times) > 1.5 * libraries_time and len(times) < 3):
        spent, printed = measure_command([str(HERE / f"{name}.py"), "--help"], tmp_path)
        times.append(spent)
        assert "--workers" in printed and "default" in printed
    assert min(times) <= 1.5 * libraries_time
    assert {path.name for path in tmp_path.iterdir()} <= {"sitecustomize.py", "printed.txt"}


def test_socket_guard_works(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(NO_SOCKETS)
    environment = child_environment(PYTHONPATH=str(tmp_path))
    code = "import socket; socket.socket()"
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 99


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("SSRL.py --data nowhere", "nowhere"),
        ("SSRL.py --data synthetic:3", "synthetic:3"),
        ("SSRL.py --config nowhere.yaml", "nowhere.yaml"),
        ("SSRL.py --bath-size 3", "--batch-size"),
        ("SSRL.py --epochs 0", "--epochs"),
        ("eval_knn.py", "SSRL.py"),
        ("eval_knn.py --pretrained absent.pth", "absent.pth"),
        ("eval_knn.py --pretrained empty.pth", "empty.pth"),
        ("eval_linear.py --pretrained . --weight-decay", "--weight-decay"),
        ("eval_linear.py --pretrained absent --epocs 3", "--epochs"),
        ("visualize_attention.py --image img.jpeg --threshold 60", "60"),
        ("visualize_attention.py --image absent.jpeg", "absent.jpeg"),
        ("visualize_attention.py", "--image"),
    ],
)
def test_user_errors_are_one_message(tmp_path, monkeypatch, capfd, line, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.pth").touch()
    script, *words = line.split()
    monkeypatch.setattr(sys, "argv", [script, *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(HERE / script), run_name="__main__")
    shown = capfd.readouterr()
    text = shown.out + shown.err
    assert end.value.code == 2
    assert named in text
    assert "Traceback" not in text
    assert {path.name for path in tmp_path.iterdir()} == {"empty.pth"}
