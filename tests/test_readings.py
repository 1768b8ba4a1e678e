"""readings.py against brute force, scikit-learn and scipy, and planted answers.

Run it with `python -m pytest tests/test_readings.py`.
"""

import itertools
import time

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import softmax
from sklearn.metrics import cohen_kappa_score, log_loss

from fundus.manifest import GRADES
from fundus.readings import expected_grade, fit_temperature, fit_thresholds, read_thresholds

LABELS = list(range(GRADES))


def kappa(grades, read):
    """Return QWK by scikit-learn."""
    return cohen_kappa_score(grades, read, labels=LABELS, weights="quadratic")


def draw_scale(count, seed, noise=0.8, decimals=None):
    """Return expected grades that follow the drawn grades more or less, and the grades."""
    rng = np.random.default_rng(seed)
    grades = rng.choice(GRADES, count, p=[0.5, 0.1, 0.2, 0.1, 0.1])
    expected = np.clip(0.6 * grades + 0.4 + rng.normal(scale=noise, size=count), 0, 4)
    if decimals is not None:
        expected = expected.round(decimals)
    return expected, grades


def try_all(expected, grades):
    """Return the highest QWK over all increasing cuts, each reading made anew."""
    values = np.unique(expected)
    cuts = [-1.0, *(values[:-1] + values[1:]) / 2, 9.0]
    best = -1.0
    for thresholds in itertools.combinations_with_replacement(cuts, GRADES - 1):
        read = []
        for value in expected:
            read.append(sum(value >= threshold for threshold in thresholds))
        if len({*read, *grades}) > 1:
            best = max(best, kappa(grades, read))
    return best


# ------------------------------------------------------------------------------------- thresholds
@pytest.mark.parametrize("seed", range(8))
def test_thresholds_reach_the_best_of_all_cuts(seed):
    expected, grades = draw_scale(9, seed, noise=0.3 + 0.3 * (seed % 4), decimals=seed % 3)
    thresholds = fit_thresholds(expected, grades)
    reached = kappa(grades, read_thresholds(expected, thresholds))
    assert reached == pytest.approx(try_all(expected, grades), abs=1e-12)
    assert (np.diff(thresholds) >= 0).all()


def test_no_single_move_betters_many_thresholds():
    expected, grades = draw_scale(400, 3)
    thresholds = fit_thresholds(expected, grades)
    reached = kappa(grades, read_thresholds(expected, thresholds))
    assert reached > kappa(grades, read_thresholds(expected, np.arange(4) + 0.5)) + 0.01
    for place in range(GRADES - 1):
        for cut in np.linspace(-0.1, 4.1, 85):
            moved = thresholds.copy()
            moved[place] = cut
            assert kappa(grades, read_thresholds(expected, moved)) <= reached + 1e-12


def test_separated_grades_are_cut_midway():
    expected = np.array([0.0, 0.2, 0.6, 1.0, 1.2, 2.0, 3.0])
    grades = np.array([0, 0, 1, 2, 2, 3, 4])
    thresholds = fit_thresholds(expected, grades)
    assert thresholds == pytest.approx([0.4, 0.8, 1.6, 2.5])
    assert read_thresholds(expected, thresholds).tolist() == grades.tolist()


def test_equally_good_places_give_the_middle_one():
    # By trying all: cuts below the 1st, 5th and 5th, 6th or none of the images are equally good,
    # and the last threshold is reached by none.
    expected = 0.5 * np.arange(6)
    grades = np.array([1, 2, 0, 1, 2, 2])
    for third in (1.75, 2.25, 3.5):
        read = read_thresholds(expected, np.array([-0.25, 1.75, third, 3.5]))
        assert kappa(grades, read) == pytest.approx(try_all(expected, grades), abs=1e-12)
    assert fit_thresholds(expected, grades) == pytest.approx([-0.25, 1.75, 2.25, 3.5])


@pytest.mark.parametrize("present", [(0, 4), (1, 2), (0, 2, 3)])
def test_grades_that_do_not_occur_are_not_read(present):
    grades = np.repeat(present, 5)
    expected = np.repeat(np.array(present) * 0.5 + 0.7, 5)
    thresholds = fit_thresholds(expected, grades)
    assert np.isfinite(thresholds).all()
    assert (np.diff(thresholds) >= 0).all()
    assert read_thresholds(expected, thresholds).tolist() == grades.tolist()


@pytest.mark.parametrize("grade", LABELS)
@pytest.mark.parametrize("value", [0.0, 1.7, 4.0])
def test_one_grade_alone_is_always_read(grade, value):
    expected = np.array([value, value, 2.0])
    thresholds = fit_thresholds(expected, np.full(3, grade))
    assert read_thresholds(expected, thresholds).tolist() == [grade] * 3


def test_useless_scale_gives_one_constant_grade():
    grades = np.array([0, 0, 0, 1, 1, 4])  # mean 1
    falling = np.array([4.0, 3.9, 3.8, 1.1, 1.0, 0.0])
    assert read_thresholds(falling, fit_thresholds(falling, grades)).tolist() == [1] * 6
    same = np.full(6, 2.0)
    assert read_thresholds(same, fit_thresholds(same, grades)).tolist() == [1] * 6


def test_neighbouring_floats_are_parted():
    expected = np.array([1.0, np.nextafter(1.0, 2), 4.0])
    grades = np.array([0, 3, 4])
    assert read_thresholds(expected, fit_thresholds(expected, grades)).tolist() == [0, 3, 4]


def test_thresholds_of_eyepacs_size_are_quick():
    expected, grades = draw_scale(35_126, 0)
    start = time.perf_counter()
    fit_thresholds(expected, grades)
    assert time.perf_counter() - start < 2


def test_reading_counts_the_thresholds_reached():
    read = read_thresholds(np.array([0.0, 0.5, 1.2, 3.0, 4.0]), np.array([0.5, 1.2, 1.2, 3.5]))
    assert read.tolist() == [0, 1, 3, 3, 4]


@pytest.mark.parametrize(
    "expected, grades",
    [
        ([0.1, np.nan], [0, 1]),
        ([0.1, np.inf], [0, 1]),
        ([], []),
        ([0.1, 0.2], [0, 5]),
        ([0.1, 0.2], [-1, 0]),
        ([0.1, 0.2], [0]),
    ],
)
def test_thresholds_refuse_what_they_cannot_use(expected, grades):
    with pytest.raises(ValueError, match="expected"):
        fit_thresholds(np.array(expected), np.array(grades, int))


# ----------------------------------------------------------------------------------- probabilities
@pytest.mark.parametrize("planted", [0.3, 1.0, 2.5, 12.0])
def test_planted_temperature_is_found(planted):
    rng = np.random.default_rng(1)
    honest = rng.normal(scale=2, size=(20_000, GRADES))
    chances = softmax(honest, axis=1).cumsum(axis=1)
    grades = (rng.random((20_000, 1)) > chances[:, :-1]).sum(axis=1)
    assert fit_temperature(honest * planted, grades) == pytest.approx(planted, rel=0.03)


def test_temperature_has_the_least_log_loss_of_scikit():
    rng = np.random.default_rng(2)
    grades = rng.integers(GRADES, size=300)
    logits = rng.normal(scale=3, size=(300, GRADES))
    logits[np.arange(300), grades] += 2

    def loss(log_temperature):
        shares = softmax(logits / np.exp(log_temperature[0]), axis=1)
        return log_loss(grades, shares, labels=LABELS)

    found = minimize(loss, [0.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-14})
    assert fit_temperature(logits, grades) == pytest.approx(np.exp(found.x[0]), rel=1e-5)


def test_temperature_at_its_ends_and_without_effect():
    grades = np.array([0, 1, 2, 3, 4])
    right = np.eye(GRADES)[grades]
    assert 0.01 <= fit_temperature(right, grades) < 0.05
    assert fit_temperature(-right, grades) == pytest.approx(100, rel=0.01)
    assert fit_temperature(np.zeros((5, GRADES)), grades) == 1.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_temperature_refuses_logits_that_are_not_finite(bad):
    logits = np.zeros((3, GRADES))
    logits[1, 2] = bad
    with pytest.raises(ValueError, match="finite"):
        fit_temperature(logits, np.zeros(3, int))


def test_expected_grade_is_the_mean():
    probabilities = np.array([[1, 0, 0, 0, 0], [0, 0, 0, 0, 1], [0.5, 0, 0.2, 0, 0.3]], np.float32)
    expected = expected_grade(probabilities)
    assert expected.dtype == np.float64
    assert expected == pytest.approx([0, 4, 1.6])
