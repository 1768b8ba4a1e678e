"""Whether intervals hold the truth as often as they say, on drawn test sets; minutes.

Run it with `python -m pytest -m slow tests/test_coverage.py`. `python -m benchmarks.check_coverage`
does the same on more test sets and writes what it finds.
"""

import numpy as np
import pytest

from benchmarks import check_coverage
from benchmarks.check_coverage import PREVALENCE, count_coverage, draw_models, find_truth
from fundus.scores import point_values


def test_drawn_models_are_like_real_ones():
    models = draw_models(20_000, np.random.default_rng(0))
    for predictions in models:
        shares = np.bincount(predictions.grades) / len(predictions.grades)
        assert shares == pytest.approx(PREVALENCE / PREVALENCE.sum(), abs=0.01)
        entries = point_values(predictions)
        assert 0.55 < entries["qwk"]["value"] < 0.7
        assert 0.86 < entries["referable_auroc"]["value"] < 0.93
        assert 0.03 < entries["ece"]["value"] < 0.1
        eyes = predictions.grades.reshape(-1, 2)
        assert 0.5 < np.corrcoef(eyes.T)[0, 1] < 0.8
    assert (models[0].grades == models[1].grades).all()


def test_rows_count_what_is_covered(monkeypatch):
    found = [
        {"images": {"qwk": [0.1, 0.3], "brier": None}, "percentile bootstrap": {"qwk": [0.4, 0.6]}},
        {"images": {"qwk": [0.3, 0.4], "brier": [0, 1]}, "percentile bootstrap": {"qwk": [0, 1]}},
    ]

    class Pool:
        def __init__(self, workers):
            assert workers == 3

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def map(self, function, numbers, chunksize):
            return [found[number] for number in numbers]

    monkeypatch.setattr(check_coverage, "ProcessPoolExecutor", Pool)
    truth = {"images": {"qwk": 0.2, "brier": 0.5}}
    rows = count_coverage(truth, 100, 2, workers=3)
    assert rows == [
        ["images", "qwk", 100, 2, 0.5, 1.0, 0.15],
        ["images", "brier", 100, 1, 1.0, 0.5, 1],
        ["percentile bootstrap", "qwk", 100, 2, 0.5, 1.0, 0.6],
    ]


def test_failures_take_the_simulations_own_error_into_account():
    def row(coverage, count, kind="images", name="qwk"):
        return [kind, name, 100, count, coverage, 1.0, 0.1]

    # Three standard errors of 1,000 are 0.021, of 10,000 0.0065.
    assert not check_coverage.list_failures([row(0.92, 1000), row(0.98, 1000), row(0.5, 100)])
    assert len(check_coverage.list_failures([row(0.90, 1000), row(0.995, 1000)])) == 2
    assert len(check_coverage.list_failures([row(0.92, 10_000)])) == 1
    assert not check_coverage.list_failures([row(0.5, 1000, "percentile bootstrap")])
    assert not check_coverage.list_failures([row(1.0, 1000, "difference", "recall_1")])
    for other in (("difference", "qwk"), ("images", "recall_1")):
        assert check_coverage.list_failures([row(1.0, 1000, *other)])
    assert check_coverage.list_failures([row(0.9, 1000, "difference", "recall_1")])


@pytest.mark.slow
@pytest.mark.parametrize("patients", check_coverage.SIZES)
def test_intervals_hold_the_truth_in_19_of_20_test_sets(patients):
    rows = count_coverage(find_truth(), patients, simulations=600, workers=2)
    judged = [row for row in rows if row[0] in check_coverage.OURS and row[3] >= 200]
    assert len(judged) > 25
    assert not check_coverage.list_failures(rows)
