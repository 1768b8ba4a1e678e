"""tools/data_report.py on a prepared folder with every kind of doubt in it.

Run with `python -m pytest tests/test_data_report.py`.
"""

import base64
import io
import json
import re
import subprocess
import sys

import pytest
from conftest import child_environment
from PIL import Image

from tools.data_report import SHOWN, THUMBNAIL, page
from utils import HERE

A, C = "images/a <b>.jpg", "images/c d.png"
LISTS = {
    "doubtful_crops": [{"text": A, "pictures": [A]}],
    "near_black": [],
    "copies": [{"text": f"{A} = {C} (0.97)", "pictures": [A, C]}],
    "copies_of_other_patients": [{"text": f"copy {i}", "pictures": [C, C]} for i in range(70)],
    "unreadable": [{"text": "raw/x.jpg is empty", "pictures": []}],
    "rows of train.csv without photograph": [{"text": "lost_left", "pictures": []}],
}
SPLITS = {
    "train": {"images": 3, "patients": 2, "by_grade": [2, 1, 0, 0, 0], "without_grade": 0},
    "test": {"images": 0, "patients": 0, "by_grade": [0] * 5, "without_grade": 0},
}
SPLITS["train"]["majority"] = 0.6667


@pytest.fixture
def folder(tmp_path):
    """A prepared folder's report and pictures, one wide and one tall."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (300, 200), (200, 30, 30)).save(tmp_path / "images" / "a <b>.jpg")
    Image.new("L", (60, 90), 90).save(tmp_path / "images" / "c d.png")
    report = {"layout": "csv", "size": 300, "notes": ["1 < 2"], "splits": SPLITS, "doubts": LISTS}
    (tmp_path / "data_report.json").write_text(json.dumps(report))
    return tmp_path


def test_page_shows_every_list_with_its_pictures(folder):
    text = page(folder, json.loads((folder / "data_report.json").read_text()))
    heads = dict(re.findall("<h2>(.*?): ([0-9]+)</h2>", text))
    assert heads == {n.replace("_", " "): str(len(v)) for n, v in LISTS.items() if v}
    assert "None: near black." in text and f"and {70 - SHOWN} more" in text
    assert "1 &lt; 2" in text and "a &lt;b&gt;.jpg" in text and "<b>" not in text
    assert "<td>train</td><td>3</td><td>2</td><td>2</td><td>1</td>" in text and "66.7%" in text
    figures = re.findall("<figure>(.*?)</figure>", text)
    counts = [figure.count("<img") for figure in figures]
    assert counts == [1, 2] + [2] * SHOWN + [0, 0]
    found = [base64.b64decode(d) for d in re.findall('base64,([^"]*)', figures[1])]
    sizes = [Image.open(io.BytesIO(data)).size for data in found]
    assert sizes == [(THUMBNAIL, 85), (60, 90)]
    assert not re.findall('(?:src|href)="(?!data:)', text), "all of it is in the page"


def test_missing_pictures_cost_only_themselves(folder):
    (folder / "images" / "c d.png").unlink()
    text = page(folder, json.loads((folder / "data_report.json").read_text()))
    assert "(no picture)" in text and "<h2>copies: 1</h2>" in text


def test_command(folder, tmp_path):
    command = [sys.executable, "-m", "tools.data_report"]
    how = {"cwd": HERE, "env": child_environment(), "capture_output": True, "text": True}
    done = subprocess.run([*command, str(folder)], **how)
    assert done.returncode == 0 and "data_report.html" in done.stdout
    assert (folder / "data_report.html").read_text().startswith("<!doctype html>")
    (tmp_path / "empty").mkdir()
    done = subprocess.run([*command, str(tmp_path / "empty")], **how)
    assert done.returncode == 2 and "no report of prepare_data.py there" in done.stderr
    (tmp_path / "empty" / "data_report.json").write_text("[]")
    done = subprocess.run([*command, str(tmp_path / "empty")], **how)
    assert done.returncode == 2 and "no report of prepare_data.py there" in done.stderr
    done = subprocess.run([*command, str(folder), "--out", str(tmp_path / "no" / "page")], **how)
    assert done.returncode == 2 and "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
