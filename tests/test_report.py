"""tools/report.py on results written by hand. Run with `python -m pytest tests/test_report.py`."""

import json
import subprocess
import sys

import pytest

from fundus.metrics import METRICS
from tools import report
from utils import HERE

NAMES = [metric.name for metric in METRICS]


def make_results(value=0.5, *, weights="w", test_set="f", protocol="15-NN, whole view"):
    """Return what results.json says, with one value for all metrics."""
    entries = {name: {"value": value, "ci95": [value - 0.1, value + 0.1]} for name in NAMES}
    line = {"grade": 0, **dict.fromkeys(NAMES, 0.25)}
    data = {"fingerprint": "f", "test": {"images": 200}}
    if test_set != "f":
        data["test_fingerprint"] = test_set
    return {
        "protocol": protocol,
        "backbone": {"sha256": weights},
        "data": data,
        "majority": line,
        "metrics": entries,
    }


def write_run(run, evaluations):
    for name, results in evaluations.items():
        (run / name).mkdir(parents=True)
        (run / name / "results.json").write_text(json.dumps(results))
    return run


def test_columns_are_metrics_under_their_titles():
    titles = {metric.name: metric.title for metric in METRICS}
    for name, title in report.COLUMNS.items():
        assert titles[name] == title


def test_baselines_stand_first_and_the_majority_above_all(tmp_path):
    evaluations = {name: make_results() for name in ("linear", "knn", "linear-color", "knn-0000")}
    table = report.tabulate([write_run(tmp_path / "run", evaluations)])
    assert [row[0] for row in table] == [
        "evaluation",
        "always grade 0",
        "run/knn-0000",
        "run/linear-color",
        "run/knn",
        "run/linear",
    ]
    columns = len(report.COLUMNS)
    assert table[1] == ["always grade 0", "200", *["0.250"] * columns]
    assert table[2] == ["run/knn-0000", "200", *["0.500 [0.400, 0.600]"] * columns]


def test_results_older_than_a_column_have_a_dash(tmp_path):
    results = make_results()
    del results["metrics"]["qwk"], results["majority"]["qwk"]
    header, majority, row = report.tabulate([write_run(tmp_path / "run", {"knn": results})])
    place = header.index("QWK")
    assert (majority[place], row[place]) == ("-", "-")
    assert "-" not in (majority[place - 1], row[place - 1])


def test_each_test_set_has_its_majority_line_once(tmp_path):
    evaluations = {
        "knn": make_results(),
        "linear": make_results(),
        "knn/other": make_results(test_set="g"),
    }
    first = write_run(tmp_path / "a", evaluations)
    second = write_run(tmp_path / "b", evaluations)
    names = [row[0] for row in report.tabulate([first, second])[1:]]
    assert names == [
        *("always grade 0", "a/knn", "always grade 0", "a/knn/other", "a/linear"),
        *("b/knn", "b/knn/other", "b/linear"),
    ]


def test_what_a_number_must_not_be_compared_with_is_said(tmp_path):
    evaluations = {
        "knn": make_results(weights="new"),
        "knn/other": make_results(weights="old", test_set="g"),
        "linear-paper": make_results(protocol="linear probe, the paper's: best epoch on the test"),
    }
    names = [row[0] for row in report.tabulate([write_run(tmp_path / "run", evaluations)])]
    assert "run/knn/other (other weights)" in names
    assert "run/linear-paper (chosen on test)" in names
    assert "run/knn" in names


def test_undefined_values_and_intervals():
    assert report.cell(None) == "-"
    assert report.cell(0.5) == report.cell(0.5, None) == "0.500"
    assert report.cell(0.5, [0.25, 0.75]) == "0.500 [0.250, 0.750]"


def test_a_folder_without_results_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        report.tabulate([tmp_path])
    assert caught.value.code == 2
    assert f"{tmp_path}: no */results.json there; run eval_knn.py" in capsys.readouterr().err


def test_the_program_prints_columns(tmp_path):
    """From elsewhere, without anything of the project beside it."""
    run = write_run(tmp_path / "run", {"knn": make_results()})
    script = tmp_path / "report.py"
    script.write_bytes((HERE / "tools" / "report.py").read_bytes())
    command = [sys.executable, str(script), "--table", str(run)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    header, rule, majority, row = done.stdout.splitlines()
    assert header.startswith("evaluation      n    accuracy")
    assert set(rule) == {"-", " "}
    assert majority.startswith("always grade 0  200  0.250")
    assert row.startswith("run/knn         200  0.500 [0.400, 0.600]")
    assert row == row.rstrip()
