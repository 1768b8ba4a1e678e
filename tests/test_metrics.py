"""metrics.py against tables worked by hand, scikit-learn, and a resampling loop.

Run it with `python -m pytest tests/test_metrics.py`.
"""

import warnings

import matplotlib.figure
import numpy as np
import pytest
from PIL import Image
from sklearn import metrics as sk

from fundus.manifest import GRADES
from fundus.metrics import (
    METRICS,
    REFERABLE,
    Predictions,
    bootstrap,
    confusion_metrics,
    draw_patients,
    evaluate,
    majority,
    plot_confusion,
    point_values,
    print_summary,
    short_scores,
    summarize,
    summary_lines,
    weighted_auroc,
)

LABELS = list(range(GRADES))

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


def predictions_of(grades, predicted):
    """Return predictions with 0.8 for the grade that is predicted; one image a patient."""
    shares = np.full((len(grades), GRADES), 0.2 / 4)
    shares[np.arange(len(grades)), predicted] = 0.8
    patients = np.arange(len(grades)).astype(str)
    return Predictions(np.array(grades), np.array(predicted), shares, patients)


def draw_predictions(count, seed=0, per_patient=1):
    """Return predictions that are right more often than not, with soft probabilities."""
    rng = np.random.default_rng(seed)
    grades = rng.choice(GRADES, count, p=[0.4, 0.15, 0.2, 0.15, 0.1])
    scores = rng.normal(size=(count, GRADES))
    scores[np.arange(count), grades] += 1.2
    shares = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    patients = (np.arange(count) // per_patient).astype(str)
    return Predictions(grades, shares.argmax(axis=1), shares, patients)


def count_pairs(score, truth):
    """Return the share of pairs in which the positive has the higher score, ties half."""
    wins = []
    for positive in score[truth]:
        for negative in score[~truth]:
            wins.append((positive > negative) + (positive == negative) / 2)
    return float(np.mean(wins))


def values_of(predictions):
    return {name: entry["value"] for name, entry in point_values(predictions).items()}


# --------------------------------------------------------------------------------------- the table


def test_results_list_the_metrics_in_the_tables_order():
    names = [metric.name for metric in METRICS]
    assert names == [
        *("accuracy", "balanced_accuracy", "qwk", "macro_auroc", "referable_auroc"),
        *("recall_0", "recall_1", "recall_2", "recall_3", "recall_4"),
    ]
    assert list(point_values(draw_predictions(40))) == names
    assert list(evaluate(draw_predictions(40), draws=2)) == names


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_every_metric_says_how_it_is_resampled(metric):
    assert (metric.from_confusion is None) != (metric.from_draws is None)
    assert metric.title


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_both_ways_of_a_metric_agree(metric):
    """A draw that holds every patient once is the test set itself."""
    for seed in range(5):
        predictions = draw_predictions(90, seed)
        draws = draw_patients(predictions.patients, 1, seed=0)
        draws.counts[:] = 1
        (found,) = bootstrap(predictions, draws)[metric.name]
        assert found == pytest.approx(metric.value(predictions), abs=1e-6)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_both_ways_of_a_metric_are_undefined_together(metric):
    sets = [([2, 2], [2, 2]), ([0, 1, 1], [0, 0, 1]), ([3, 4], [0, 1]), (TRUTH, PREDICTED)]
    for grades, predicted in sets:
        predictions = predictions_of(grades, predicted)
        draws = draw_patients(predictions.patients, 1, seed=0)
        draws.counts[:] = 1
        (found,) = bootstrap(predictions, draws)[metric.name]
        assert np.isnan(found) == bool(metric.why_undefined(predictions)), (grades, predicted)


# -------------------------------------------------------------------------------------- the values


def test_values_worked_by_hand():
    found = values_of(predictions_of(TRUTH, PREDICTED))
    assert {name: found[name] for name in BY_HAND} == pytest.approx(BY_HAND)
    assert set(found) == {*BY_HAND, "macro_auroc"}


def test_aurocs_count_pairs():
    predictions = draw_predictions(80)
    shares = predictions.probabilities
    each = [count_pairs(shares[:, grade], predictions.grades == grade) for grade in LABELS]
    found = values_of(predictions)
    assert found["macro_auroc"] == pytest.approx(np.mean(each))
    referable = shares[:, 2] + shares[:, 3] + shares[:, 4]
    expected = count_pairs(referable, predictions.grades > 1)
    assert found["referable_auroc"] == pytest.approx(expected)


def test_votes_that_are_equal_but_for_rounding_tie():
    shares = np.array([[0.7, 0, 0.1, 0.2, 0], [0.7, 0, 0.2, 0.1, 0], [0.7, 0, 0.3, 0, 0]])
    sums = shares[:, REFERABLE:].sum(axis=1)
    assert len(set(sums)) > 1, "these sums of one value differ in their last bits"
    predictions = Predictions(np.array([0, 2, 0]), np.zeros(3, int), shares, np.arange(3))
    assert values_of(predictions)["referable_auroc"] == 0.5


def test_perfect_predictions_are_all_one():
    found = values_of(predictions_of(TRUTH, TRUTH))
    assert found == dict.fromkeys(found, 1.0)


def test_constant_predictions_agree_no_more_than_chance():
    found = values_of(predictions_of(TRUTH, np.zeros(10, int)))
    assert found["accuracy"] == 0.4
    assert found["balanced_accuracy"] == pytest.approx(0.2)
    assert found["qwk"] == pytest.approx(0, abs=1e-12)
    assert found["macro_auroc"] == found["referable_auroc"] == 0.5


def test_an_absent_grade_is_undefined_with_its_reason():
    predictions = predictions_of([0, 0, 1, 2, 4], [0, 1, 1, 2, 4])
    found = point_values(predictions)
    assert found["macro_auroc"] == {"value": None, "reason": "no test image of grade 3"}
    assert found["recall_3"] == {"value": None, "reason": "no test image of grade 3"}
    assert found["balanced_accuracy"]["value"] == pytest.approx((0.5 + 1 + 1 + 1) / 4)
    assert evaluate(predictions, draws=20)["recall_3"]["ci95"] is None


@pytest.mark.parametrize("grades", [[0, 1, 1, 0], [2, 3, 4, 4]])
def test_one_side_of_referable_is_undefined_with_its_reason(grades):
    entry = point_values(predictions_of(grades, [0, 1, 2, 3]))["referable_auroc"]
    assert entry == {"value": None, "reason": "all test images on one side of grade 2"}


def test_qwk_of_one_same_grade_is_undefined_with_its_reason():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = evaluate(predictions_of([2, 2, 2], [2, 2, 2]), draws=20)
    assert found["qwk"]["value"] is None
    assert "one same grade" in found["qwk"]["reason"]
    assert found["accuracy"] == {"value": 1.0, "ci95": [1.0, 1.0]}
    # One grade answered with another is no agreement, but it is defined.
    assert values_of(predictions_of([2, 2, 2], [1, 1, 1]))["qwk"] == 0


def test_majority_answers_the_most_frequent_grade_of_train():
    line = majority(np.array([1, 1, 1, 0, 0, 4]), np.array([0, 0, 1, 2, 3]))
    assert list(line) == ["grade", *(metric.name for metric in METRICS)]
    assert line["grade"] == 1
    assert line["accuracy"] == pytest.approx(1 / 5)
    assert line["balanced_accuracy"] == pytest.approx(1 / 4)
    assert line["qwk"] == pytest.approx(0)
    assert line["macro_auroc"] is None
    assert (line["recall_0"], line["recall_1"], line["recall_4"]) == (0, 1, None)


def test_short_scores_by_hand():
    votes = np.eye(GRADES)[[0, 0, 2, 4]]
    found = short_scores(votes, np.array([0, 1, 2, 4]), np.array([0, 0, 3]))
    # Mean squares 5 and 5.25, means 1.5 and 1.75, one squared error of 1: 1 - 1 / (4 * 5).
    assert found == pytest.approx({"accuracy": 0.75, "majority": 0.25, "qwk": 1 - 1 / 20})
    constant = short_scores(np.eye(GRADES)[[0, 0]], np.array([0, 0]), np.array([0]))
    assert constant["qwk"] == 0.0


# ---------------------------------------------------------- the bootstrap's sufficient statistics


@pytest.mark.parametrize("seed", range(5))
def test_weighted_confusion_is_scikit_learns(seed):
    predictions = draw_predictions(60, seed)
    truth = predictions.grades
    predicted = predictions.predicted
    weight = np.random.default_rng(seed).integers(0, 4, 60)
    table = np.zeros((GRADES, GRADES))
    np.add.at(table, (truth, predicted), weight)
    found = confusion_metrics(np.stack([table, table.T, np.eye(GRADES)]))

    weighted = {"sample_weight": weight}
    accuracy = sk.accuracy_score(truth, predicted, **weighted)
    balanced = sk.balanced_accuracy_score(truth, predicted, **weighted)
    recalls = sk.recall_score(truth, predicted, labels=LABELS, average=None, **weighted)
    kappa = sk.cohen_kappa_score(truth, predicted, labels=LABELS, weights="quadratic", **weighted)
    assert found["accuracy"][0] == pytest.approx(accuracy)
    assert found["qwk"][:2] == pytest.approx([kappa, kappa])  # it is symmetric
    assert found["balanced_accuracy"][0] == pytest.approx(balanced)
    assert [found[f"recall_{grade}"][0] for grade in LABELS] == pytest.approx(list(recalls))
    assert found["qwk"][2] == found["accuracy"][2] == 1


def test_confusion_without_some_grades():
    table = np.zeros((GRADES, GRADES))
    table[0, 0] = 3
    table[2, 0] = 1
    table[2, 2] = 1
    found = confusion_metrics(table)
    assert found["balanced_accuracy"] == pytest.approx((1 + 1 / 2) / 2)
    assert np.isnan([found["recall_1"], found["recall_3"], found["recall_4"]]).all()
    table[:] = 0
    table[3, 3] = 4
    assert np.isnan(confusion_metrics(table)["qwk"])


@pytest.mark.parametrize("levels", [3, 10, 10_000])
def test_weighted_auroc_is_scikit_learns_with_ties(levels):
    rng = np.random.default_rng(levels)
    truth = rng.random(200) < 0.3
    weight = rng.integers(0, 4, 200)
    score = rng.integers(levels, size=200) + truth
    ranks = np.unique(score, return_inverse=True)[1]
    expected = sk.roc_auc_score(truth, score, sample_weight=weight)
    assert weighted_auroc(ranks, truth, weight.astype(np.float32)) == pytest.approx(expected)
    assert np.isnan(weighted_auroc(ranks, truth, weight * truth))
    assert np.isnan(weighted_auroc(ranks, truth, weight * ~truth))


# ------------------------------------------------------------------------------------- intervals


def values_by_scikit(predictions, rows):
    """Return the metrics of some rows, NaN where undefined."""
    truth = predictions.grades[rows]
    predicted = predictions.predicted[rows]
    shares = predictions.probabilities[rows]
    recalls = np.full(GRADES, np.nan)
    for grade in set(truth):
        recalls[grade] = (predicted[truth == grade] == grade).mean()
    macro = np.nan
    if len(set(truth)) == GRADES:
        macro = sk.roc_auc_score(truth, shares, multi_class="ovr")
    values = {
        "accuracy": sk.accuracy_score(truth, predicted),
        "balanced_accuracy": np.nanmean(recalls),
        "qwk": sk.cohen_kappa_score(truth, predicted, labels=LABELS, weights="quadratic"),
        "macro_auroc": macro,
        "referable_auroc": sk.roc_auc_score(truth >= 2, shares[:, 2:].sum(axis=1)),
    }
    for grade in LABELS:
        values[f"recall_{grade}"] = recalls[grade]
    return values


def test_intervals_are_those_of_a_resampling_loop():
    predictions = draw_predictions(36, seed=3, per_patient=2)
    patients = np.unique(predictions.patients)
    rng = np.random.default_rng(7)
    samples = []
    for _ in range(100):
        chosen = patients[rng.integers(len(patients), size=len(patients))]
        rows = [np.flatnonzero(predictions.patients == patient) for patient in chosen]
        samples.append(values_by_scikit(predictions, np.concatenate(rows)))
    assert any(np.isnan(values["macro_auroc"]) for values in samples), "undefined draws occur"

    found = evaluate(predictions, draws=100, seed=7)
    for name, entry in found.items():
        expected = np.nanpercentile([values[name] for values in samples], [2.5, 97.5])
        assert entry["ci95"] == pytest.approx(expected, abs=1e-6), name


def select(predictions, rows):
    """Return the predictions of some rows."""
    return Predictions(
        predictions.grades[rows],
        predictions.predicted[rows],
        predictions.probabilities[rows],
        predictions.patients[rows],
    )


def test_intervals_are_seeded_and_do_not_depend_on_the_rows_order():
    predictions = draw_predictions(60, per_patient=2)
    found = evaluate(predictions, 100)
    assert evaluate(predictions, 100) == found
    assert evaluate(predictions, 100, seed=1)["accuracy"] != found["accuracy"]
    order = np.random.default_rng(1).permutation(60)
    mixed = evaluate(select(predictions, order), 100)
    for name, entry in found.items():
        assert mixed[name]["ci95"] == pytest.approx(entry["ci95"], abs=1e-6)
        low, high = entry["ci95"]
        assert low <= entry["value"] <= high


def test_two_eyes_of_a_patient_do_not_count_as_two():
    one = draw_predictions(100, seed=2)
    twice = select(one, np.tile(np.arange(100), 2))
    loose = Predictions(
        twice.grades, twice.predicted, twice.probabilities, np.arange(200).astype(str)
    )
    expected = evaluate(one, 400)
    found = evaluate(twice, 400)
    narrow = evaluate(loose, 400)
    for name in ("accuracy", "qwk", "macro_auroc", "referable_auroc", "balanced_accuracy"):
        assert found[name]["ci95"] == pytest.approx(expected[name]["ci95"], abs=1e-6), name
        width = np.diff(found[name]["ci95"])[0]
        independent = np.diff(narrow[name]["ci95"])[0]
        assert 1.15 < width / independent < 1.75, name  # sqrt 2 = 1.41


def test_a_draw_holds_as_many_patients_as_there_are():
    draws = draw_patients(np.array(["b", "a", "b", "c"]), 200, seed=0)
    assert draws.patient_of_image.tolist() == [1, 0, 1, 2]
    assert (draws.counts.sum(axis=1) == 3).all()
    assert draws.counts.max() == 3, "with replacement"
    weights = list(draws.image_weights())
    assert len(weights) == 200
    first = draws.counts[0]
    assert weights[0].tolist() == [first[1], first[0], first[1], first[2]]


# -------------------------------------------------------------------------------- what people see


def test_summary_and_its_lines(capsys):
    predictions = predictions_of([0, 0, 0, 1, 2], [0, 0, 2, 1, 2])
    summary = summarize(predictions, np.array([0, 0, 0, 1]))
    assert list(summary) == ["majority", "metrics", "confusion"]
    expected = np.zeros((GRADES, GRADES), int)
    expected[0, 0] = 2
    expected[0, 2] = 1
    expected[1, 1] = 1
    expected[2, 2] = 1
    assert summary["confusion"] == expected.tolist(), "the truth is in rows"
    assert summary["majority"]["grade"] == 0

    lines = summary_lines(summary)
    assert lines[0].split() == ["value", "95", "%", "interval", "majority"]
    titles = [line[:18].strip() for line in lines[1:]]
    assert titles == [metric.title for metric in METRICS]
    texts = dict(zip(titles, lines[1:], strict=True))
    low, high = summary["metrics"]["accuracy"]["ci95"]
    words = ["accuracy", "0.800", f"{low:.3f}", "to", f"{high:.3f}", "0.600"]
    assert texts["accuracy"].split() == words
    assert texts["QWK"].split()[-1] == "0.000"
    assert " - " in texts["macro AUROC"]
    assert "no test image of grade 3, 4" in texts["macro AUROC"]

    print_summary(summary, "A title")
    assert capsys.readouterr().out == "\n".join(["", "A title", *lines, ""])


def test_a_metric_may_be_defined_where_the_majority_lines_is_not():
    predictions = predictions_of([2, 2, 2], [2, 2, 1])
    summary = summarize(predictions, np.array([2]))
    assert summary["metrics"]["qwk"]["value"] == 0
    assert summary["majority"]["qwk"] is None
    (line,) = [line for line in summary_lines(summary) if line.startswith("QWK")]
    assert line.split()[1] == "0.000"
    assert line.split()[-1] == "-"


def test_confusion_plot_shows_the_counts(tmp_path, monkeypatch):
    figures = []
    save = matplotlib.figure.Figure.savefig

    def keep(figure, *args, **kwargs):
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    table = np.arange(GRADES**2).reshape(GRADES, GRADES)
    plot_confusion(table.tolist(), tmp_path / "confusion.png")

    (axes,) = figures[0].axes
    assert axes.get_xlabel() == "predicted grade"
    assert axes.get_ylabel() == "grade"
    assert len(axes.texts) == GRADES**2
    for text in axes.texts:
        column, row = text.get_position()
        assert text.get_text() == str(table[round(row), round(column)])
    shares = np.asarray(axes.images[0].get_array())
    assert shares.sum(axis=1) == pytest.approx(np.ones(GRADES))
    with Image.open(tmp_path / "confusion.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 300
