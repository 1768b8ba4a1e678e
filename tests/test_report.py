"""tools/report.py as a program: its table, its page, its messages.

Run with `python -m pytest tests/test_report.py`.
"""

import json
import os
import subprocess
import sys

import pytest
from written_runs import write_evaluation, write_training

from fundus.metrics import METRICS
from tools import report
from tools.report_table import COLUMNS, cell
from utils import HERE, InputError

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


def run_report(*arguments, where=HERE):
    command = [sys.executable, "-m", "tools.report", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    return subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True)


# ------------------------------------------------------------------------------------------ --table
def test_columns_are_metrics_under_their_titles():
    titles = {metric.name: metric.title for metric in METRICS}
    for name, title in COLUMNS.items():
        assert titles[name] == title


def test_baselines_stand_first_and_the_majority_above_all(tmp_path):
    evaluations = {name: make_results() for name in ("linear", "knn", "linear-color", "knn-0000")}
    table = report.make_table([write_run(tmp_path / "run", evaluations)])
    assert [row[0] for row in table] == [
        "evaluation",
        "always grade 0",
        "run/knn-0000",
        "run/linear-color",
        "run/knn",
        "run/linear",
    ]
    columns = len(COLUMNS)
    assert table[1] == ["always grade 0", "200", *["0.250"] * columns]
    assert table[2] == ["run/knn-0000", "200", *["0.500 [0.400, 0.600]"] * columns]


def test_results_older_than_a_column_have_a_dash(tmp_path):
    results = make_results()
    del results["metrics"]["qwk"], results["majority"]["qwk"]
    header, majority, row = report.make_table([write_run(tmp_path / "run", {"knn": results})])
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
    names = [row[0] for row in report.make_table([first, second])[1:]]
    assert names == [
        *("always grade 0", "a/knn", "always grade 0", "a/knn/other", "a/linear"),
        *("b/knn", "b/knn/other", "b/linear"),
    ]


def test_folds_stand_within_their_whole(tmp_path):
    evaluations = {"linear-folds": make_results(), "linear-folds/fold-1": make_results()}
    names = [row[0] for row in report.make_table([write_run(tmp_path / "run", evaluations)])]
    assert names == ["evaluation", "always grade 0", "run/linear-folds"]


def test_what_a_number_must_not_be_compared_with_is_said(tmp_path):
    evaluations = {
        "knn": make_results(weights="new"),
        "knn/other": make_results(weights="old", test_set="g"),
        "linear-paper": make_results(protocol="linear probe, the paper's: best epoch on the test"),
        "linear": {**make_results(), "seen": {"allowed": True, "photographs": ["a.jpg", "b.jpg"]}},
    }
    names = [row[0] for row in report.make_table([write_run(tmp_path / "run", evaluations)])]
    assert "run/knn/other (other weights)" in names
    assert "run/linear-paper (chosen on test)" in names
    assert "run/linear (2 test photographs seen before)" in names
    assert "run/knn" in names


def test_undefined_values_and_intervals():
    assert cell(None) == cell({"value": None, "reason": "no grade 2"}) == "-"
    assert cell({"value": float("nan")}) == cell({"value": True}) == cell("0.5") == "-"
    assert cell({"value": 0.5}) == cell({"value": 0.5, "ci95": None}) == "0.500"
    assert cell({"value": 0.5, "ci95": [0.25, 0.75]}) == "0.500 [0.250, 0.750]"


def test_a_folder_without_results_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"no \*/results.json there; run eval_knn.py"):
        report.make_table([tmp_path])


def test_the_program_prints_columns(tmp_path):
    run = write_run(tmp_path / "run", {"knn": make_results()})
    done = run_report("--table", run, where=tmp_path)
    header, rule, majority, row = done.stdout.splitlines()
    assert header.startswith("evaluation      n    accuracy")
    assert set(rule) == {"-", " "}
    assert majority.startswith("always grade 0  200  0.250")
    assert row.startswith("run/knn         200  0.500 [0.400, 0.600]")
    assert row == row.rstrip()


# -------------------------------------------------------------------------------------- the program
def test_the_page_of_one_run_lies_in_it_and_of_several_beside_the_first(tmp_path, capsys):
    for name in "ab":
        write_evaluation(tmp_path / name / "knn")
    report.main([str(tmp_path / "a")])
    assert capsys.readouterr().out == f"{tmp_path}/a/report.html\n"
    report.main([str(tmp_path / "a"), str(tmp_path / "b")])
    assert capsys.readouterr().out == f"{tmp_path}/report.html\n"
    report.main([str(tmp_path / "a"), "--out", str(tmp_path / "x.html")])
    for page in ("a/report.html", "report.html", "x.html"):
        assert (tmp_path / page).read_text().startswith("<!doctype html>")


def test_the_program_works_without_torch(tmp_path):
    """Reports are made where results were copied to, on any laptop."""
    write_evaluation(tmp_path / "run" / "knn")
    write_training(tmp_path / "run")
    code = (
        "import sys; sys.modules['torch'] = None\nfrom tools.report import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such folder; name a run's"),
        (["empty"], "empty: holds no run: no config.yaml"),
        (["run", "--out", "run/knn/results.json/x"], "results.json: is no folder but a file"),
        (["--compare", "run/knn", "empty"], "empty: holds no predictions.csv"),
        (["--compare", "run/knn,run/knn", "run/knn"], "name each folder once"),
    ],
)
def test_what_cannot_be_read_or_written_is_named(arguments, message, tmp_path):
    write_evaluation(tmp_path / "run" / "knn")
    (tmp_path / "empty").mkdir()
    done = run_report(*arguments, where=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments", [[], ["run", "--compare", "a", "b"], ["run", "--table", "--out", "x.html"]]
)
def test_flags_that_do_not_go_together_are_refused(arguments):
    with pytest.raises(SystemExit) as caught:
        report.main(arguments)
    assert caught.value.code == 2
