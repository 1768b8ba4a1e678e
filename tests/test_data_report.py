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

A = "images/a <b>.jpg"
C = "images/c d.png"
LISTS = {
    "doubtful_crops": [{"text": A, "pictures": [A]}],
    "near_black": [],
    "copies": [{"text": f"{A} = {C} (0.97)", "pictures": [A, C]}],
    "copies_of_other_patients": [{"text": f"copy {i}", "pictures": [C, C]} for i in range(70)],
    "unreadable": [{"text": "raw/x.jpg is empty", "pictures": []}],
    "rows of train.csv without photograph": [{"text": "lost_left", "pictures": []}],
}
SPLITS = {
    "train": {
        "images": 3,
        "patients": 2,
        "by_grade": [2, 1, 0, 0, 0],
        "without_grade": 0,
        "majority": 0.6667,
    },
    "test": {"images": 0, "patients": 0, "by_grade": [0, 0, 0, 0, 0], "without_grade": 0},
}


@pytest.fixture
def folder(tmp_path):
    """A prepared folder's report and pictures, one wide and one tall."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (300, 200), (200, 30, 30)).save(tmp_path / "images" / "a <b>.jpg")
    Image.new("L", (60, 90), 90).save(tmp_path / "images" / "c d.png")
    report = {"layout": "csv", "size": 300, "notes": ["1 < 2"], "splits": SPLITS, "doubts": LISTS}
    (tmp_path / "data_report.json").write_text(json.dumps(report))
    return tmp_path


def page_of(folder):
    return page(folder, json.loads((folder / "data_report.json").read_text()))


def test_page_shows_every_list_that_is_not_empty(folder):
    text = page_of(folder)
    assert re.findall("<h2>(.*?): ([0-9]+)</h2>", text) == [
        ("doubtful crops", "1"),
        ("copies", "1"),
        ("copies of other patients", "70"),
        ("unreadable", "1"),
        ("rows of train.csv without photograph", "1"),
    ]
    assert "None: near black." in text
    assert f"and {70 - SHOWN} more" in text


def test_page_escapes_what_data_sets_say(folder):
    text = page_of(folder)
    assert "1 &lt; 2" in text
    assert "a &lt;b&gt;.jpg" in text
    assert "<b>" not in text


def test_page_has_a_row_for_each_split(folder):
    text = page_of(folder)
    assert "<th>0</th><th>1</th><th>2</th><th>3</th><th>4</th><th>without grade</th>" in text
    cells = "<td>3</td><td>2</td><td>2</td><td>1</td><td>0</td><td>0</td><td>0</td><td>0</td>"
    assert f"<td>train</td>{cells}<td>66.7%</td>" in text
    assert "<td>0</td><td>-</td></tr></table>" in text


def test_page_holds_the_pictures_of_each_entry(folder):
    text = page_of(folder)
    figures = re.findall("<figure>(.*?)</figure>", text)
    counts = [figure.count("<img") for figure in figures]
    assert counts == [1, 2] + [2] * SHOWN + [0, 0]
    sizes = []
    for data in re.findall('base64,([^"]*)', figures[1]):
        sizes.append(Image.open(io.BytesIO(base64.b64decode(data))).size)
    assert sizes == [(THUMBNAIL, 85), (60, 90)]
    assert not re.findall('(?:src|href)="(?!data:)', text), "all of it is in the page"


def test_missing_pictures_cost_only_themselves(folder):
    (folder / "images" / "c d.png").unlink()
    text = page_of(folder)
    assert "(no picture)" in text
    assert "<h2>copies: 1</h2>" in text


def run(*arguments):
    command = [sys.executable, "-m", "tools.data_report", *map(str, arguments)]
    environment = child_environment()
    return subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)


def test_command(folder):
    done = run(folder)
    assert done.returncode == 0
    assert "data_report.html" in done.stdout
    assert (folder / "data_report.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("report", [None, "[]", "{", '{"notes": []}', '{"splits": {}}'])
def test_a_folder_without_a_report_is_refused(tmp_path, report):
    if report is not None:
        (tmp_path / "data_report.json").write_text(report)
    done = run(tmp_path)
    assert done.returncode == 2
    assert "no report of prepare_data.py there" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_page_that_cannot_be_written_is_refused(folder):
    done = run(folder, "--out", folder / "no" / "page")
    assert done.returncode == 2
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
