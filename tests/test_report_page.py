"""The report's page: what is on it, that it is well formed, escaped, and asks for nothing outside.

Run with `python -m pytest tests/test_report_page.py`.
"""

import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from written_runs import write_evaluation, write_training

from tools.report_html import Pictures, show_confusion, show_entry, show_number
from tools.report_page import page
from tools.report_runs import Evaluation, read_run

VOID = {"meta", "img", "br", "hr", "link", "input"}
HOSTILE = '"><img src=x onerror=alert(1)><script>alert(2)</script>&\ud800'


class Reader(html.parser.HTMLParser):
    """Collects the tags of a page, its text and its ids, and fails where tags do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.ids, self.links = [], [], [], [], []
        self.sources = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        values = dict(attributes)
        assert not [name for name in values if name.startswith("on")]
        if "id" in values:
            self.ids.append(values["id"])
        if tag == "a":
            self.links.append(values["href"])
        if "src" in values:
            self.sources.append(values["src"])
            assert values["alt"]
        if tag not in VOID and tag not in ("path", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def picture(path, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


@pytest.fixture
def run(tmp_path):
    """A run with everything that a page shows."""
    run = tmp_path / "run"
    write_training(run)
    write_evaluation(run / "linear", seed=1, skill=1.0)
    write_evaluation(run / "linear-handmade", seed=2, skill=0.2)
    write_evaluation(run / "linear-folds", seed=3)
    write_evaluation(run / "linear-folds" / "fold-1", seed=4)
    picture(run / "linear" / "roc.png")
    picture(run / "linear" / "confusion.png")
    picture(run / "crops.png")
    for name in ("a", "a_head0", "a_mean"):
        picture(run / "attention" / f"{name}.png")
    return run


def read(*folders):
    return Reader(page([read_run(folder) for folder in folders]))


# ------------------------------------------------------------------------------------ what it shows
def test_the_page_is_well_formed_and_links_within_itself(run):
    found = read(run)
    assert len(set(found.ids)) == len(found.ids)
    assert found.links
    assert {link.removeprefix("#") for link in found.links} <= set(found.ids)
    assert not {"script", "link", "iframe", "object", "form"} & set(found.tags)
    assert found.tags.count("h1") == 1


def test_the_verdict_says_what_the_numbers_say(run):
    results = json.loads((run / "linear" / "results.json").read_text())
    entry = results["metrics"]["qwk"]
    low, high = entry["ci95"]
    words = read(run).words
    assert f"the linear probe has a QWK of {entry['value']:.3f} [{low:.3f}, {high:.3f}]" in words
    assert "better than that answer's by more than chance explains" in words
    assert "The network's is better than that of hand-made statistics, by +" in words
    assert "Chance alone may explain" not in words


def test_a_network_that_chance_explains_is_called_so(tmp_path):
    write_evaluation(tmp_path / "linear", seed=1, skill=0.0)
    words = read(tmp_path).words
    assert "Chance alone may explain the QWK" in words
    assert "whether the network beats them is open" in words


def test_every_metric_of_every_reading_is_there(run):
    results = json.loads((run / "linear" / "results.json").read_text())
    words = read(run).words
    entries = [
        *results["metrics"].values(),
        *results["thresholded"]["metrics"].values(),
        *results["patients"].values(),
    ]
    assert len(entries) > 30
    for entry in entries:
        if entry["value"] is not None:
            assert f"{entry['value']:.3f}" in words
        if entry["ci95"]:
            low, high = entry["ci95"]
            assert f"[{low:.3f}, {high:.3f}]" in words
        for name in ("reason", "no_interval"):
            assert entry.get(name, "") in words


def test_published_numbers_stand_with_what_they_were_measured_on(run):
    words = read(run).words
    assert "Published (arXiv 2410.00779): EyePACS, 53,576 test photographs" in words
    for number in ("0.791", "0.774", "0.766", "0.770", "0.744", "0.738"):
        assert number in words


def test_pictures_are_embedded_with_their_names(run):
    found = read(run)
    # roc.png, crops.png and one sheet of attention: its heads are parts of it, and the confusion
    # matrix stands there as a table.
    assert len(found.sources) == 3
    assert all(source.startswith("data:image/png;base64,") for source in found.sources)
    assert "linear: roc" in found.words
    assert "These show photographs" in found.words


def test_two_runs_are_compared(run, tmp_path):
    other = tmp_path / "other"
    write_evaluation(other / "linear", seed=5, skill=0.1)
    words = read(run, other).words
    assert "linear, run by run" in words
    assert "linear: run less other; most probable grade; 80 photographs of 40 patients" in words
    assert "linear-handmade: run less other" not in words


def test_runs_of_other_photographs_are_not(run, tmp_path):
    write_evaluation(tmp_path / "other" / "linear", patients=30)
    words = read(run, tmp_path / "other").words
    assert "These are of different test photographs." in words
    assert "No paired difference: " in words


def test_a_collapse_is_told_first(tmp_path):
    write_training(tmp_path, collapse="all outputs are one")
    words = read(tmp_path).words
    assert "not evaluated yet" in words
    assert words.count("all outputs are one") == 1


def test_folds_are_held_against_hand_made_statistics_by_folds(tmp_path):
    means = {"qwk": {"value": 0.123, "sd": 0.045}}
    write_evaluation(tmp_path / "linear-folds", seed=1, skill=1.0, mean_of_folds=means)
    write_evaluation(tmp_path / "linear-handmade-folds", seed=2, skill=0.2)
    words = read(tmp_path).words
    assert "the linear probe, pooled over folds, has a QWK of" in words
    assert "better than that of hand-made statistics, by +" in words
    assert "0.123 sd 0.045" in words


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *(("linear", False), ("linear-folds", False), ("linear-fractions/other", False)),
        *(("linear-color", True), ("linear-handmade-folds", True), ("knn-0000", True)),
        *(("knn-paper", True), ("knn-folds-0012", True)),
    ],
)
def test_baselines_are_known_by_their_name(name, expected, tmp_path):
    assert Evaluation(name, tmp_path).is_baseline is expected


def test_lesions_are_tabled(run):
    lift = {"value": 1.5, "ci95": [1.2, 1.8], "null": {"ci95": [0.9, 1.1]}, "p": 0.001}
    probe = {"tokens": {"ap": 0.4, "ci95": [0.3, 0.5]}, "color": {"ap": 0.2}, "prevalence": 0.05}
    lesion = {"photographs": 12, "lift": {"mean": lift}, "probe": probe}
    found = {"classes": {"hard_exudate": lesion, "odd": 3}}
    (run / "attention" / "lesions.json").write_text(json.dumps(found))
    words = read(run).words
    assert "attention: [CLS] attention on lesions" in words
    assert "hard exudate 12 1.500 [1.200, 1.800] [0.900, 1.100] 0.001" in words
    assert "0.400 [0.300, 0.500] 0.200 0.050" in words


# --------------------------------------------------------------------------- what files must not do
def test_text_from_files_is_escaped_wherever_it_stands(tmp_path):
    hostile = HOSTILE.replace("/", "_").replace("\ud800", "")  # what a file's name can hold
    run = tmp_path / f"run {hostile}"
    write_training(run, collapse=HOSTILE)
    seen = {"allowed": True, "photographs": [HOSTILE]}
    write_evaluation(
        run / f"linear {hostile}",
        protocol=HOSTILE,
        settings={HOSTILE: HOSTILE},
        versions={HOSTILE: HOSTILE},
        command=[HOSTILE],
        by_k=[{HOSTILE: HOSTILE}],
        seen=seen,
    )
    picture(run / f"linear {hostile}" / f"a {hostile}.png")
    (run / "config.yaml").write_text(json.dumps({HOSTILE.strip("\ud800"): HOSTILE.strip("\ud800")}))
    found = read(run, run)
    assert "script" not in found.tags
    assert found.tags.count("img") == len(found.sources) == 2
    assert found.words.count("<script>alert(2)</script>") > 10
    text = page([read_run(run)])
    assert "onerror=alert(1)>" not in text
    text.encode("utf-8")


DAMAGED = [
    "",
    "[]",
    "{}",
    "3",
    '{"metrics": 3, "data": [], "majority": null}',
    '{"metrics": {"qwk": {"value": NaN, "ci95": [1]}}, "confusion": [[1, "a"]]}',
    '{"metrics": {"qwk": {"value": 1e999}}, "reliability": {"confidence": 3}, "by_k": [3, {}]}',
    '{"metrics": {"qwk": 0.5}, "thresholded": {"thresholds": 3}, "command": 3, "seen": 3}',
    '{"protocol": {"a": 1}, "candidates": "many", "data": {"test": {"by_grade": "x"}}}',
    "[" * 100_000,
]


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_damaged_results_never_cost_the_page(content, run):
    (run / "knn").mkdir()
    (run / "knn" / "results.json").write_text(content)
    words = read(run).words
    assert "the linear probe has a QWK of" in words
    assert not re.search(r"\bnan\b|\binf\b", words)


@pytest.mark.parametrize(
    "name", ["config.yaml", "log.jsonl", "crops.png", "attention/lesions.json"]
)
@pytest.mark.parametrize("content", [b"\xff\xfe", b"{[", b"3\n4\n"])
def test_damaged_files_of_a_training_never_cost_the_page(name, content, run):
    (run / name).write_bytes(content)
    assert "the linear probe has a QWK of" in read(run).words


def test_a_log_that_was_cut_short_is_shown_up_to_there(run):
    file = run / "log.jsonl"
    file.write_text(file.read_text()[:-20])
    words = read(run).words
    assert "damaged" not in words
    assert "self-distillation loss" in words


def test_a_page_has_room_for_so_many_bytes_of_pictures(tmp_path):
    picture(tmp_path / "large.png", (1600, 1200))
    picture(tmp_path / "small.png")
    pictures = Pictures(most_bytes=100_000)
    assert pictures.embed(tmp_path / "large.png", "large") == ""
    assert pictures.left_out == 1
    assert "image/png" in pictures.embed(tmp_path / "small.png", "small")
    large = Pictures().embed(tmp_path / "large.png", "large")
    assert "image/jpeg" in large
    assert 'width="1200" height="900"' in large


def test_numbers_as_they_are_shown():
    assert [show_number(value) for value in (1, 0.5, 0.0012345, 123456.0, None, True, "x")] == [
        *("1", "0.500", "0.001234", "1.235e+05", "-", "-", "-")
    ]
    entry = {"value": None, "reason": "no grade < 2"}
    assert show_entry(entry) == '-<span class="why">no grade &lt; 2</span>'
    matrix = show_confusion([[1, 1], [0, 2]], "counts")
    assert matrix.count("50%") == 2
    assert show_confusion([[1, 2], [3]], "ragged") == show_confusion(3, "none") == ""


# ------------------------------------------------------------------------------------- in a browser
def browser():
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        if shutil.which(name):
            return shutil.which(name)
    return None


@pytest.mark.skipif(not browser(), reason="no Chromium on this machine")
def test_chromium_finds_no_error_and_asks_for_nothing(run, tmp_path):
    """What the policy forbids would be an error on the console; requests stand in the net log."""
    hostile = write_hostile(run)
    target = tmp_path / "page.html"
    target.write_text(page([read_run(run)]), "utf-8")
    console, requests = visit(target, tmp_path)
    assert not console
    assert not requests
    assert hostile in target.read_text("utf-8")

    # The same eyes see both where there is something to see.
    bad = "<img src='http://127.0.0.1:9/x.png'><script>console.error('seen')</script>"
    target.write_text(f"<!doctype html><title>x</title>{bad}", "utf-8")
    console, requests = visit(target, tmp_path)
    assert [line for line in console if "seen" in line]
    assert requests == {"http://127.0.0.1:9/x.png"}


def write_hostile(run):
    """Give a run an option that would load a picture and run a script if it were not escaped."""
    (run / "config.yaml").write_text("arch: \"<script src='http://127.0.0.1:9/y.js'></script>\"\n")
    return "&lt;script src=&#x27;http://127.0.0.1:9/y.js&#x27;"


def visit(target, folder):
    """Return what Chromium writes to its console on a page, and the addresses it asks for."""
    log = folder / "net.json"
    log.unlink(missing_ok=True)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    flags += ["--disable-background-networking", "--disable-component-update", "--no-first-run"]
    flags += [f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}"]
    command = [browser(), *flags, "--dump-dom", target.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "</html>" in done.stdout
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return console, asked_for(log)


def asked_for(log):
    """Return the addresses outside that a page asked for: not the browser, for its own updates."""
    found = set()
    for line in log.read_text("utf-8", errors="replace").splitlines():
        try:
            parameters = json.loads(line.rstrip(",")).get("params", {})
        except ValueError:
            continue  # the first and the last line are one object together
        is_of_page = parameters.get("initiator", "not an origin") != "not an origin"
        if is_of_page and parameters.get("url", "").startswith(("http", "ws", "ftp")):
            found.add(parameters["url"])
    return found
