"""metrics.py against tables worked by hand, scikit-learn, and a resampling loop.

Run it with `python -m pytest tests/test_metrics.py`.
"""

import warnings

import matplotlib.figure
import numpy as np
import pytest
from PIL import Image
from sklearn import metrics as sk

from fundus.metrics import (
    Predictions,
    brief,
    confusion_metrics,
    evaluate,
    majority,
    plot_confusion,
    point_values,
    result_lines,
    summarize,
    weighted_auroc,
)

# Ten images worked by hand. Right: 3 of 4, 1 of 2, 2 of 2, 1 of 1, 0 of 1.
TRUTH = np.array([0, 0, 0, 0, 1, 1, 2, 2, 3, 4])
PREDICTED = np.array([0, 0, 0, 1, 1, 2, 2, 2, 3, 2])
# Squared errors 1 + 1 + 4 = 6. Means 1.3 and 1.3, mean squares 3.5 and 2.7, so by chance
# 10 (3.5 + 2.7 - 2 * 1.3 * 1.3) = 28.2.
BY_HAND = {
    "accuracy": 0.7,
    "balanced_accuracy": (3 / 4 + 1 / 2 + 1 + 1 + 0) / 5,
    "qwk": 1 - 6 / 28.2,
    "referable_auroc": (4 * 5 + 4 * 0.5) / (4 * 6),  # four positives, one of six negatives ties
    "recall_0": 3 / 4,
    "recall_1": 1 / 2,
    "recall_2": 1.0,
    "recall_3": 1.0,
    "recall_4": 0.0,
}


def predictions(grades, predicted, patients=None, sharp=0.8) -> Predictions:
    shares = np.full((len(grades), 5), (1 - sharp) / 4)
    shares[np.arange(len(grades)), predicted] = sharp
    patients = np.arange(len(grades)) if patients is None else patients
    return Predictions(
        np.array(grades), np.array(predicted), shares, np.array(patients).astype(str)
    )


def drawn(count: int, seed: int = 0, per_patient: int = 1) -> Predictions:
    """Predictions that are right more often than not, with soft probabilities."""
    rng = np.random.default_rng(seed)
    grades = rng.choice(5, count, p=[0.4, 0.15, 0.2, 0.15, 0.1])
    scores = rng.normal(size=(count, 5))
    scores[np.arange(count), grades] += 1.2
    shares = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    patients = (np.arange(count) // per_patient).astype(str)
    return Predictions(grades, shares.argmax(axis=1), shares, patients)


def naive_auroc(score, truth) -> float:
    """Count the pairs in which the positive has the higher score, ties half."""
    wins = [(a > b) + (a == b) / 2 for a in score[truth] for b in score[~truth]]
    return float(np.mean(wins))


def values_of(p: Predictions) -> dict[str, float | None]:
    return {name: entry["value"] for name, entry in point_values(p).items()}


# -------------------------------------------------------------------------------------- the values


def test_values_worked_by_hand():
    found = values_of(predictions(TRUTH, PREDICTED))
    assert {name: found[name] for name in BY_HAND} == pytest.approx(BY_HAND)
    assert set(found) == {*BY_HAND, "macro_auroc"}


def test_aurocs_count_pairs():
    p = drawn(80)
    each = [naive_auroc(p.probabilities[:, grade], p.grades == grade) for grade in range(5)]
    found = values_of(p)
    assert found["macro_auroc"] == pytest.approx(np.mean(each))
    referable = p.probabilities[:, 2] + p.probabilities[:, 3] + p.probabilities[:, 4]
    assert found["referable_auroc"] == pytest.approx(naive_auroc(referable, p.grades > 1))


def test_perfect_predictions_are_all_one():
    found = values_of(predictions(TRUTH, TRUTH))
    assert found == dict.fromkeys(found, 1.0)


def test_constant_predictions_agree_no_more_than_chance():
    found = values_of(predictions(TRUTH, np.zeros(10, int)))
    assert found["accuracy"] == 0.4 and found["balanced_accuracy"] == pytest.approx(0.2)
    assert found["qwk"] == pytest.approx(0, abs=1e-12)
    assert found["macro_auroc"] == found["referable_auroc"] == 0.5


def test_an_absent_grade_is_undefined_with_its_reason():
    p = predictions([0, 0, 1, 2, 4], [0, 1, 1, 2, 4])
    found = point_values(p)
    assert found["macro_auroc"] == {"value": None, "reason": "no test image of grade 3"}
    assert found["recall_3"] == {"value": None, "reason": "no test image of grade 3"}
    assert found["balanced_accuracy"]["value"] == pytest.approx((0.5 + 1 + 1 + 1) / 4)
    assert evaluate(p, draws=20)["recall_3"]["ci95"] is None


@pytest.mark.parametrize("grades", [[0, 1, 1, 0], [2, 3, 4, 4]])
def test_one_side_of_referable_is_undefined_with_its_reason(grades):
    entry = point_values(predictions(grades, [0, 1, 2, 3]))["referable_auroc"]
    assert entry["value"] is None and "one side" in entry["reason"]


def test_qwk_of_one_same_grade_is_undefined_with_its_reason():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = evaluate(predictions([2, 2, 2], [2, 2, 2]), draws=20)
    assert found["qwk"]["value"] is None and "one same grade" in found["qwk"]["reason"]
    assert found["accuracy"] == {"value": 1.0, "ci95": [1.0, 1.0]}
    # One grade answered with another is no agreement, but it is defined.
    assert values_of(predictions([2, 2, 2], [1, 1, 1]))["qwk"] == 0


def test_majority_answers_the_most_frequent_grade_of_train():
    line = majority(np.array([1, 1, 1, 0, 0, 4]), np.array([0, 0, 1, 2, 3]))
    assert line["grade"] == 1
    assert line["accuracy"] == pytest.approx(1 / 5) and line["qwk"] == pytest.approx(0)
    assert line["balanced_accuracy"] == pytest.approx(1 / 4) and line["macro_auroc"] is None
    assert line["recall_1"] == 1 and line["recall_0"] == 0 and line["recall_4"] is None


# ---------------------------------------------------------- the bootstrap's sufficient statistics


@pytest.mark.parametrize("seed", range(5))
def test_weighted_confusion_is_scikit_learns(seed):
    p, rng = drawn(60, seed), np.random.default_rng(seed)
    weight = rng.integers(0, 4, 60)
    table = np.zeros((5, 5))
    np.add.at(table, (p.grades, p.predicted), weight)
    found = confusion_metrics(np.stack([table, table.T, np.eye(5)]))
    labels = list(range(5))
    accuracy = sk.accuracy_score(p.grades, p.predicted, sample_weight=weight)
    kappa = sk.cohen_kappa_score(
        p.grades, p.predicted, labels=labels, weights="quadratic", sample_weight=weight
    )
    balanced = sk.balanced_accuracy_score(p.grades, p.predicted, sample_weight=weight)
    recalls = sk.recall_score(
        p.grades, p.predicted, labels=labels, average=None, sample_weight=weight
    )
    assert found["accuracy"][0] == pytest.approx(accuracy)
    assert found["qwk"][:2] == pytest.approx([kappa, kappa])  # it is symmetric
    assert found["balanced_accuracy"][0] == pytest.approx(balanced)
    assert [found[f"recall_{g}"][0] for g in labels] == pytest.approx(list(recalls))
    assert found["qwk"][2] == found["accuracy"][2] == 1


def test_confusion_without_some_grades():
    table = np.zeros((5, 5))
    table[0, 0], table[2, 0], table[2, 2] = 3, 1, 1
    found = confusion_metrics(table)
    assert found["balanced_accuracy"] == pytest.approx((1 + 1 / 2) / 2)
    assert np.isnan([found["recall_1"], found["recall_3"], found["recall_4"]]).all()
    table[:] = 0
    table[3, 3] = 4
    assert np.isnan(confusion_metrics(table)["qwk"])


@pytest.mark.parametrize("levels", [3, 10, 10_000])
def test_weighted_auroc_is_scikit_learns_with_ties(levels):
    rng = np.random.default_rng(levels)
    truth, weight = rng.random(200) < 0.3, rng.integers(0, 4, 200)
    score = (
        np.round(rng.normal(size=200) + truth, 6) if levels > 10 else rng.integers(levels, size=200)
    )
    ranks = np.unique(score, return_inverse=True)[1]
    expected = sk.roc_auc_score(truth, score, sample_weight=weight)
    assert weighted_auroc(ranks, truth, weight.astype(np.float32)) == pytest.approx(expected)
    assert np.isnan(weighted_auroc(ranks, truth, weight * truth))
    assert np.isnan(weighted_auroc(ranks, truth, weight * ~truth))


# ------------------------------------------------------------------------------------- intervals


def by_scikit_learn(p: Predictions, rows: np.ndarray) -> dict[str, float]:
    """Metrics of some rows, NaN where undefined."""
    truth, predicted, shares = p.grades[rows], p.predicted[rows], p.probabilities[rows]
    found = {
        "accuracy": sk.accuracy_score(truth, predicted),
        "qwk": sk.cohen_kappa_score(truth, predicted, labels=list(range(5)), weights="quadratic"),
        "balanced_accuracy": np.mean([(predicted[truth == g] == g).mean() for g in set(truth)]),
        "referable_auroc": sk.roc_auc_score(truth >= 2, shares[:, 2:].sum(axis=1)),
        "macro_auroc": np.nan,
    }
    for g in range(5):
        found[f"recall_{g}"] = (predicted[truth == g] == g).mean() if g in truth else np.nan
    if len(set(truth)) == 5:
        found["macro_auroc"] = sk.roc_auc_score(truth, shares, multi_class="ovr")
    return found


def test_intervals_are_those_of_a_resampling_loop():
    p, draws = drawn(36, seed=3, per_patient=2), 100
    patients, rng, samples = np.unique(p.patients), np.random.default_rng(7), []
    for _ in range(draws):
        chosen = patients[rng.integers(len(patients), size=len(patients))]
        rows = np.concatenate([np.flatnonzero(p.patients == patient) for patient in chosen])
        samples.append(by_scikit_learn(p, rows))
    found = evaluate(p, draws=draws, seed=7)
    assert any(np.isnan(s["macro_auroc"]) for s in samples), "undefined draws are in this test"
    for name, entry in found.items():
        expected = np.nanpercentile([s[name] for s in samples], [2.5, 97.5])
        assert entry["ci95"] == pytest.approx(expected, abs=1e-6), name


def test_intervals_are_seeded_and_do_not_depend_on_the_rows_order():
    p = drawn(60, per_patient=2)
    order = np.random.default_rng(1).permutation(60)
    mixed = Predictions(*(v[order] for v in (p.grades, p.predicted, p.probabilities, p.patients)))
    found, again, moved = evaluate(p, 100), evaluate(p, 100), evaluate(mixed, 100)
    assert found == again
    for name in found:
        assert moved[name]["ci95"] == pytest.approx(found[name]["ci95"], abs=1e-6)
        low, high = found[name]["ci95"]
        assert low <= found[name]["value"] <= high
    assert evaluate(p, 100, seed=1)["accuracy"] != found["accuracy"]


def test_two_eyes_of_a_patient_do_not_count_as_two():
    one = drawn(100, seed=2)
    columns = one.grades, one.predicted, one.probabilities, one.patients
    twice = Predictions(*(np.concatenate([column, column]) for column in columns))
    loose = Predictions(
        twice.grades, twice.predicted, twice.probabilities, np.arange(200).astype(str)
    )
    expected, found, narrow = evaluate(one, 400), evaluate(twice, 400), evaluate(loose, 400)
    for name in ("accuracy", "qwk", "macro_auroc", "referable_auroc", "balanced_accuracy"):
        assert found[name]["ci95"] == pytest.approx(expected[name]["ci95"], abs=1e-6), name
        width, independent = (np.diff(e[name]["ci95"])[0] for e in (found, narrow))
        assert 1.15 < width / independent < 1.75, name  # sqrt 2 = 1.41


# -------------------------------------------------------------------------------- what people see


def test_summary_and_its_lines():
    p = predictions([0, 0, 0, 1, 2], [0, 0, 2, 1, 2])
    summary = summarize(p, np.array([0, 0, 0, 1]))
    expected = np.zeros((5, 5), int)
    expected[0, 0], expected[0, 2], expected[1, 1], expected[2, 2] = 2, 1, 1, 1
    assert summary["confusion"] == expected.tolist(), "the truth is in rows"
    assert summary["majority"]["grade"] == 0
    lines = {line.split()[0]: line for line in result_lines(summary)}
    low, high = summary["metrics"]["accuracy"]["ci95"]
    assert lines["accuracy"].split() == [
        "accuracy",
        "0.800",
        f"{low:.3f}",
        "to",
        f"{high:.3f}",
        "0.600",
    ]
    assert "no test image of grade 3, 4" in lines["macro_auroc"] and " - " in lines["macro_auroc"]
    assert len(lines) == len(summary["metrics"]) + 1
    assert lines["qwk"].split()[-1] == "0.000"


def test_confusion_plot_shows_the_counts(tmp_path, monkeypatch):
    figures, save = [], matplotlib.figure.Figure.savefig

    def keep(figure, *args, **kwargs):
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    table = np.arange(25).reshape(5, 5)
    plot_confusion(table.tolist(), tmp_path / "confusion.png")
    (axes,) = figures[0].axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted grade", "grade")
    shown = {
        (round(t.get_position()[1]), round(t.get_position()[0])): t.get_text() for t in axes.texts
    }
    assert shown == {(row, column): str(table[row, column]) for row, column in np.ndindex(5, 5)}
    shares = np.asarray(axes.images[0].get_array())
    assert shares.sum(axis=1) == pytest.approx(np.ones(5))
    with Image.open(tmp_path / "confusion.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 300


def test_brief_by_hand():
    votes = np.eye(5)[[0, 0, 2, 4]]
    found = brief(votes, np.array([0, 1, 2, 4]), np.array([0, 0, 3]))
    # mean squares 5 and 5.25, means 1.5 and 1.75, one squared error of 1: 1 - 1 / (4 * 5)
    assert found == pytest.approx({"accuracy": 0.75, "majority": 0.25, "qwk": 1 - 1 / 20})
    assert brief(np.eye(5)[[0, 0]], np.array([0, 0]), np.array([0]))["qwk"] == 0.0
