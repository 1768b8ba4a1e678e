"""tools/report_compare.py: which evaluations may be held against each other, and what comes of it.

Run with `python -m pytest tests/test_report_compare.py`.
"""

import numpy as np
import pytest
from written_runs import write_evaluation

from fundus.intervals import paired_difference
from tools import report
from tools.report_compare import compare, comparison_rows, read_predictions, split_folders
from utils import InputError


@pytest.fixture
def two(tmp_path):
    """Two evaluations of the same photographs, the second of better features."""
    write_evaluation(tmp_path / "a" / "linear", seed=1, skill=0.2)
    write_evaluation(tmp_path / "b" / "linear", seed=2, skill=1.0)
    return tmp_path / "a" / "linear", tmp_path / "b" / "linear"


def test_differences_are_those_of_the_predictions_written(two, tmp_path):
    a = write_evaluation(tmp_path / "c", seed=1, skill=0.2)
    b = write_evaluation(tmp_path / "d", seed=2, skill=1.0)
    expected = paired_difference([a], [b])
    found = compare([two[0]], [two[1]])
    assert (found.name_a, found.name_b) == ("a/linear", "b/linear")
    assert (found.images, found.patients) == (80, 40)
    entries = found.parts["most probable grade"]
    for name in ("qwk", "referable_auroc", "log_loss", "recall_2"):
        # The order of rows is another, so that sums differ by rounding and draws by their patients.
        assert entries[name]["value"] == pytest.approx(expected[name]["value"], abs=1e-12)
        assert entries[name]["ci95"] == pytest.approx(expected[name]["ci95"], abs=0.05)
    assert entries["qwk"]["ci95"][1] < 0 < entries["log_loss"]["ci95"][0]
    assert set(found.parts) == {
        "most probable grade",
        "grades by thresholds",
        "patients, by their worse eye",
    }
    assert "sensitivity_at_90_specificity" not in entries


def test_rows_may_be_in_any_order(two):
    file = two[1] / "predictions.csv"
    header, *rows = file.read_text().splitlines()
    before = compare([two[0]], [two[1]]).parts
    file.write_text("\n".join([header, *reversed(rows)]))
    assert compare([two[0]], [two[1]]).parts == before


def test_seeds_are_averaged_and_their_spread_is_told(two, tmp_path):
    for seed in (3, 4):
        write_evaluation(tmp_path / f"a-{seed}" / "linear", seed=seed, skill=0.2)
        write_evaluation(tmp_path / f"b-{seed}" / "linear", seed=seed + 10, skill=1.0)
    sides = []
    for letter in "ab":
        names = [f"{tmp_path}/{letter}-{seed}/linear" for seed in (3, 4)]
        sides.append(split_folders(",".join(names)))
    found = compare(*sides)
    entry = found.parts["most probable grade"]["accuracy"]
    differences = np.array(entry["a"]) - np.array(entry["b"])
    assert entry["value"] == pytest.approx(differences.mean())
    assert entry["spread"] == pytest.approx(differences.std(ddof=1))
    assert found.name_a == "a-3/linear and 1 more seed"
    row = next(row for row in comparison_rows(found.parts["most probable grade"]))
    assert row[0] == "accuracy"
    assert row[3].startswith(f"{entry['value']:+.3f} [")
    assert row[4] == f"{entry['spread']:.3f}"


def change(folder, old, new):
    file = folder / "predictions.csv"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_other_photographs_patients_or_grades_are_refused(two):
    change(two[1], "images/p7_left.jpg", "images/p7_other.jpg")
    with pytest.raises(InputError, match=r"not of the same test photographs \(2 .*p7_left.jpg\)"):
        compare([two[0]], [two[1]])
    change(two[1], "images/p7_other.jpg,p7", "images/p7_left.jpg,p8")
    with pytest.raises(InputError, match=r"other patients for 1 .*p7_left.jpg \(p7, p8\)"):
        compare([two[0]], [two[1]])
    change(two[1], "images/p7_left.jpg,p8", "images/p7_left.jpg,p7")
    text = (two[1] / "predictions.csv").read_text().splitlines()
    row = next(line for line in text if "p7_left" in line)
    cells = row.split(",")
    cells[3] = str((int(cells[3]) + 1) % 5)
    change(two[1], row, ",".join(cells))
    with pytest.raises(InputError, match=r"other grades for 1 .*p7_left.jpg"):
        compare([two[0]], [two[1]])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("x.jpg,p,left,2,2,0.2,0.2,0.2,0.2,0.2,9", "line 82: a grade outside 0 to 4"),
        ("x.jpg,p,left,2,2,0.9,0.2,0.2,0.2,0.2,2", "line 82: p0 to p4 are no probabilities"),
        ("x.jpg,p,left,2,2,nan,0.2,0.2,0.2,0.2,2", "line 82: p0 to p4 are no probabilities"),
        ("x.jpg,p,left,2,2,a,0.2,0.2,0.2,0.2,2", "line 82: holds no numbers"),
        ("x.jpg,p,left,2", "line 82: holds no numbers"),
        ("images/p1_left.jpg,p1,left,2,2,0.2,0.2,0.2,0.2,0.2,2", "p1_left.jpg is there twice"),
    ],
)
def test_a_row_that_cannot_be_is_named(row, message, two):
    with (two[0] / "predictions.csv").open("a") as file:
        file.write(f"{row}\n")
    with pytest.raises(InputError, match=message):
        read_predictions(two[0])


def test_a_table_that_lacks_columns_or_rows_is_named(two):
    file = two[0] / "predictions.csv"
    lines = file.read_text().splitlines()
    file.write_text(lines[0])
    with pytest.raises(InputError, match="holds no rows; evaluate again"):
        read_predictions(two[0])
    file.write_text(file.read_text().replace("p3", "third"))
    with pytest.raises(InputError, match="lacks the columns p3"):
        read_predictions(two[0])
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read"):
        read_predictions(two[0])


def test_the_program_prints_and_writes_the_comparison(two, tmp_path, capsys):
    page = tmp_path / "page.html"
    report.main(["--compare", str(two[0]), str(two[1]), "--out", str(page)])
    printed = capsys.readouterr().out
    assert "A: a/linear\nB: b/linear\n80 test photographs of 40 patients" in printed
    assert printed.rstrip().endswith(str(page))
    html = page.read_text()
    entry = compare([two[0]], [two[1]]).parts["most probable grade"]["qwk"]
    for text in (printed, html):
        assert f"{entry['value']:+.3f} [{entry['ci95'][0]:+.3f}" in text
