"""metrics.py, scores.py and predictions.py against tables worked by hand, scikit-learn, and loops.

Run it with `python -m pytest tests/test_metrics.py`.
"""

import json
import warnings

import numpy as np
import pytest
from drawn_predictions import draw_predictions, predictions_of, select
from sklearn import metrics as sk

from fundus.intervals import evaluate
from fundus.manifest import GRADES
from fundus.metrics import (
    METRICS,
    PATIENT_METRICS,
    OperatingPoint,
    Predictions,
    majority,
    mean_of_folds,
    patient_level,
    point_values,
    print_summary,
    reliability,
    short_scores,
    summarize,
    summary_lines,
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
    # F1 of each grade: 6/7, 1/2, 2/3, 1, 0; precision 1, 1/2, 1/2, 1, 0.
    "macro_f1": (6 / 7 + 1 / 2 + 2 / 3 + 1 + 0) / 5,
    "macro_precision": (1 + 1 / 2 + 1 / 2 + 1 + 0) / 5,
    # The true grade has 0.8 seven times and 0.05 three times.
    "log_loss": -(7 * np.log(0.8) + 3 * np.log(0.05)) / 10,
    "brier": (7 * (0.2**2 + 4 * 0.05**2) + 3 * (0.8**2 + 0.95**2 + 3 * 0.05**2)) / 10,
    "ece": 0.8 - 0.7,
    # The five with the score 0.9 are four positives, and one of the six that are none.
    "referable_ap": 4 / 5,
    "referable_auroc": (4 * 5 + 4 * 0.5) / (4 * 6),  # four positives, one of six negatives ties
    "recall_0": 3 / 4,
    "recall_1": 1 / 2,
    "recall_2": 1.0,
    "recall_3": 1.0,
    "recall_4": 0.0,
}


def count_pairs(score, truth):
    """Return the share of pairs in which the positive has the higher score, ties half."""
    wins = []
    for positive in score[truth]:
        for negative in score[~truth]:
            wins.append((positive > negative) + (positive == negative) / 2)
    return float(np.mean(wins))


def values_of(predictions, validation=None):
    entries = point_values(predictions, validation)
    return {name: entry["value"] for name, entry in entries.items()}


# --------------------------------------------------------------------------------------- the table


def test_results_list_the_metrics_in_the_tables_order():
    names = [metric.name for metric in METRICS]
    assert names == [
        *("accuracy", "balanced_accuracy", "qwk", "macro_f1", "macro_precision", "macro_auroc"),
        *("referable_auroc", "referable_ap", "sensitivity_at_90_specificity"),
        *("sensitivity_at_95_specificity", "specificity_at_90_sensitivity"),
        *("log_loss", "brier", "ece"),
        *("recall_0", "recall_1", "recall_2", "recall_3", "recall_4"),
    ]
    assert list(point_values(draw_predictions(40))) == names
    assert list(evaluate(draw_predictions(40), draws=2)) == names
    assert len({metric.title for metric in METRICS}) == len(names)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_every_metric_says_how_it_is_resampled(metric):
    if not isinstance(metric, OperatingPoint):
        given = (metric.from_confusion, metric.losses, metric.from_draws)
        assert sum(one is not None for one in given) == 1
        assert (metric.from_confusion is not None) == (metric.group == "decision")


# -------------------------------------------------------------------------------------- the values


def test_values_worked_by_hand():
    found = values_of(predictions_of(TRUTH, PREDICTED))
    assert {name: found[name] for name in BY_HAND} == pytest.approx(BY_HAND)


def test_aurocs_count_pairs():
    predictions = draw_predictions(80)
    shares = predictions.probabilities
    each = [count_pairs(shares[:, grade], predictions.grades == grade) for grade in LABELS]
    found = values_of(predictions)
    assert found["macro_auroc"] == pytest.approx(np.mean(each))
    referable = shares[:, 2] + shares[:, 3] + shares[:, 4]
    expected = count_pairs(referable, predictions.grades > 1)
    assert found["referable_auroc"] == pytest.approx(expected)


def test_a_saturated_head_still_ranks():
    """Scores that differ in the ninth digit alone are no ties."""
    referable = np.array([1e-9, 3e-9, 2e-9, 4e-9])
    shares = np.zeros((4, GRADES))
    shares[:, 0] = 1 - referable
    shares[:, 2] = referable
    predictions = Predictions(np.array([0, 2, 0, 3]), np.zeros(4, int), shares, np.arange(4))
    assert values_of(predictions)["referable_auroc"] == 1.0


def test_probabilities_are_kept_in_float64():
    shares = np.full((1, GRADES), 0.2, np.float32)
    predictions = Predictions(np.array([0]), np.array([0]), shares, np.array(["a"]))
    assert predictions.probabilities.dtype == np.float64
    assert predictions.referable_score[0] == 3 * np.float64(np.float32(0.2))


def test_macro_f1_and_precision_leave_out_grades_that_do_not_occur():
    # Grade 3 is predicted but does not occur; grade 2 occurs but is never predicted.
    predictions = predictions_of([0, 0, 1, 2], [0, 1, 1, 3])
    found = values_of(predictions)
    assert found["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    assert found["macro_precision"] == pytest.approx((1 + 1 / 2 + 0) / 3)


def test_losses_are_naive_sums():
    predictions = draw_predictions(50)
    logs = []
    squares = []
    for grade, shares in zip(predictions.grades, predictions.probabilities, strict=True):
        logs.append(-np.log(shares[grade]))
        square = 0
        for other, share in enumerate(shares):
            square += (share - (other == grade)) ** 2
        squares.append(square)
    found = values_of(predictions)
    assert found["log_loss"] == pytest.approx(np.mean(logs))
    assert found["brier"] == pytest.approx(np.mean(squares))


def test_a_share_of_nothing_costs_what_scikit_learn_says():
    shares = np.eye(GRADES)[[0, 1]]
    predictions = Predictions(np.array([0, 0]), np.array([0, 1]), shares, np.array(["a", "b"]))
    expected = sk.log_loss([0, 0], shares, labels=LABELS)
    assert values_of(predictions)["log_loss"] == pytest.approx(expected)
    assert 15 < expected < 20


def test_the_calibration_error_is_a_naive_loop_over_bins():
    predictions = draw_predictions(200)
    shares = predictions.probabilities.max(axis=1)
    is_right = predictions.predicted == predictions.grades
    total = 0
    for number in range(15):
        inside = (shares > number / 15) & (shares <= (number + 1) / 15)
        if inside.any():
            total += inside.mean() * abs(is_right[inside].mean() - shares[inside].mean())
    assert values_of(predictions)["ece"] == pytest.approx(total)


def test_reliability_by_hand():
    shares = np.array(
        [[0.8, 0.1, 0.1, 0, 0], [0, 0.8, 0.2, 0, 0], [0, 0, 0, 1, 0], [1, 0, 0, 0, 0]]
    )
    predictions = Predictions(
        np.array([0, 2, 3, 2]), shares.argmax(axis=1), shares, np.array(list("abcd"))
    )
    found = reliability(predictions)
    assert {name: len(bins) for name, bins in found.items()} == {"confidence": 15, "referable": 15}
    # 0.8 is the upper edge of bin 11, which it belongs to; 1 is that of the last.
    filled = [number for number, entry in enumerate(found["confidence"]) if entry["images"]]
    assert filled == [11, 14]
    high = found["confidence"][11]
    assert (high["low"], high["high"], high["images"]) == (11 / 15, 12 / 15, 2)
    assert (high["predicted"], high["observed"]) == (pytest.approx(0.8), 0.5)
    empty = found["confidence"][0]
    assert empty == {"low": 0, "high": 1 / 15, "images": 0, "predicted": None, "observed": None}
    referable = [(entry["images"], entry["observed"]) for entry in found["referable"]]
    assert referable == [(1, 1.0), (1, 0.0), (1, 1.0), *[(0, None)] * 11, (1, 1.0)]


def test_perfect_predictions_are_all_one():
    predictions = predictions_of(TRUTH, TRUTH)
    found = values_of(predictions, predictions)
    losses = {name: found.pop(name) for name in ("log_loss", "brier", "ece")}
    assert found == dict.fromkeys(found, 1.0)
    assert losses == pytest.approx(
        {"log_loss": -np.log(0.8), "brier": 0.2**2 + 4 * 0.05**2, "ece": 0.2}
    )


def test_constant_predictions_agree_no_more_than_chance():
    found = values_of(predictions_of(TRUTH, np.zeros(10, int)))
    assert found["accuracy"] == 0.4
    assert found["balanced_accuracy"] == pytest.approx(0.2)
    assert found["qwk"] == pytest.approx(0, abs=1e-12)
    assert found["macro_auroc"] == found["referable_auroc"] == 0.5
    assert found["referable_ap"] == 0.4


# -------------------------------------------------------------------------------- operating points


def scored(scores, referable, patients=None):
    """Return predictions whose score of referable DR is given."""
    scores = np.array(scores)
    shares = np.zeros((len(scores), GRADES))
    shares[:, 0] = 1 - scores
    shares[:, 4] = scores
    grades = np.where(referable, 4, 0)
    names = np.arange(len(scores)).astype(str) if patients is None else np.array(patients)
    return Predictions(grades, shares.argmax(axis=1), shares, names)


def test_operating_points_by_hand():
    """Ten of each side: specificity 0.9 leaves one of those without DR at or above the score."""
    negative = [0.1, 0.1, 0.1, 0.2, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    positive = [0.05, 0.2, 0.35, 0.65, 0.7, 0.75, 0.8, 0.8, 0.9, 0.9]
    validation = scored(negative + positive, [False] * 10 + [True] * 10)
    test = scored([0.1, 0.65, 0.65, 0.2, 0.6, 0.9], [False, False, True, True, True, True])
    found = point_values(test, validation)
    # 9 of 10 are below 0.65; all 10 are only below 0.75; nine of ten with DR are at 0.2 or above.
    assert found["sensitivity_at_90_specificity"] == {
        "value": 0.5,
        "threshold": pytest.approx(0.65),
        "achieved": 0.5,
    }
    assert found["sensitivity_at_95_specificity"] == {
        "value": 0.25,
        "threshold": pytest.approx(0.75),
        "achieved": 1.0,
    }
    assert found["specificity_at_90_sensitivity"] == {
        "value": 0.5,
        "threshold": pytest.approx(0.2),
        "achieved": 1.0,
    }


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("digits", [1, 9])
def test_thresholds_are_those_of_scikit_learns_curve(seed, digits):
    rng = np.random.default_rng(seed)
    truth = rng.random(150) < 0.4
    score = (0.3 * truth + 0.7 * rng.random(150)).round(digits)
    validation = scored(score, truth)
    test = draw_predictions(60, seed)
    fpr, tpr, thresholds = sk.roc_curve(truth, validation.referable_score, drop_intermediate=False)
    for percent in (90, 95):
        specific = thresholds[(1 - fpr >= percent / 100 - 1e-12) & np.isfinite(thresholds)]
        entry = point_values(test, validation)[f"sensitivity_at_{percent}_specificity"]
        assert entry["threshold"] == specific.min()
        named = test.referable_score >= entry["threshold"]
        assert entry["value"] == pytest.approx(sk.recall_score(test.grades >= 2, named))
        expected = sk.recall_score(test.grades >= 2, named, pos_label=False)
        assert entry["achieved"] == pytest.approx(expected)
    entry = point_values(test, validation)["specificity_at_90_sensitivity"]
    assert entry["threshold"] == thresholds[tpr >= 0.9 - 1e-12].max()
    named = test.referable_score >= entry["threshold"]
    expected = sk.recall_score(test.grades >= 2, named, pos_label=False)
    assert entry["value"] == pytest.approx(expected)


def test_operating_points_without_a_threshold_say_why():
    test = draw_predictions(60)
    name = "sensitivity_at_90_specificity"
    assert point_values(test)[name] == {
        "value": None,
        "reason": "no validation predictions to choose the threshold on",
    }
    reason = "no threshold with 90 % specificity on validation"
    one_sided = scored([0.1, 0.2, 0.3], [False, False, False])
    assert point_values(test, one_sided)[name] == {"value": None, "reason": reason}
    # Of all without DR, a half has the highest score: none above it is known.
    tied = scored([0.1, 0.9, 0.9], [False, False, True])
    assert point_values(test, tied)[name] == {"value": None, "reason": reason}
    lone = scored([0.1, 0.2], [False, False])
    entry = point_values(lone, test)[name]
    assert entry == {"value": None, "reason": "all test images on one side of grade 2"}


# ---------------------------------------------------------------------------------------- patients


def test_a_patient_has_the_worse_eye():
    shares = np.array(
        [
            [0.0, 0.4, 0.3, 0.3, 0.0],  # b: 0.6 referable
            [0.5, 0.3, 0.0, 0.0, 0.2],  # a: 0.2
            [0.2, 0.1, 0.1, 0.6, 0.0],  # b: 0.7
            [0.9, 0.1, 0.0, 0.0, 0.0],  # a: 0
            [0.0, 0.8, 0.2, 0.0, 0.0],  # c: 0.2, one photograph
        ]
    )
    predictions = Predictions(
        np.array([2, 0, 1, 4, 1]),
        np.array([4, 1, 3, 0, 1]),  # by another reading than the most probable grade
        shares,
        np.array(["b", "a", "b", "a", "c"]),
    )
    found = patient_level(predictions)
    assert found.patients.tolist() == ["a", "b", "c"]
    assert found.grades.tolist() == [4, 2, 1]
    assert found.predicted.tolist() == [1, 4, 1]
    assert found.probabilities.tolist() == shares[[1, 2, 4]].tolist()


@pytest.mark.parametrize("seed", range(3))
def test_patients_are_those_of_a_loop(seed):
    predictions = draw_predictions(80, seed, per_patient=3)
    order = np.random.default_rng(seed).permutation(80)
    predictions = select(predictions, order)
    found = patient_level(predictions)
    assert found.patients.tolist() == sorted(set(predictions.patients))
    for row, name in enumerate(found.patients):
        mine = predictions.patients == name
        assert found.grades[row] == predictions.grades[mine].max()
        assert found.predicted[row] == predictions.predicted[mine].max()
        assert found.referable_score[row] == predictions.referable_score[mine].max()
    assert patient_level(found).probabilities.tolist() == found.probabilities.tolist()


# ------------------------------------------------------------------------------ undefined, majority


def test_an_absent_grade_is_undefined_with_its_reason():
    predictions = predictions_of([0, 0, 1, 2, 4], [0, 1, 1, 2, 4])
    found = point_values(predictions)
    assert found["macro_auroc"] == {"value": None, "reason": "no test image of grade 3"}
    assert found["recall_3"] == {"value": None, "reason": "no test image of grade 3"}
    assert found["balanced_accuracy"]["value"] == pytest.approx((0.5 + 1 + 1 + 1) / 4)
    assert evaluate(predictions, draws=20)["recall_3"]["ci95"] is None


@pytest.mark.parametrize("grades", [[0, 1, 1, 0], [2, 3, 4, 4]])
@pytest.mark.parametrize("name", ["referable_auroc", "referable_ap"])
def test_one_side_of_referable_is_undefined_with_its_reason(grades, name):
    entry = point_values(predictions_of(grades, [0, 1, 2, 3]))[name]
    assert entry == {"value": None, "reason": "all test images on one side of grade 2"}


def test_qwk_of_one_same_grade_is_undefined_with_its_reason():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = evaluate(predictions_of([2] * 12, [2] * 12), draws=20)
    assert found["qwk"]["value"] is None
    assert "one same grade" in found["qwk"]["reason"]
    assert found["accuracy"]["value"] == 1.0
    # One grade answered with another is no agreement, but it is defined.
    assert values_of(predictions_of([2, 2, 2], [1, 1, 1]))["qwk"] == 0


def test_majority_answers_the_most_frequent_grade_of_train():
    line = majority(np.array([1, 1, 1, 0, 0, 4]), np.array([0, 0, 1, 2, 3]))
    assert list(line) == ["grade", *(metric.name for metric in METRICS)]
    assert line["grade"] == 1
    assert line["accuracy"] == pytest.approx(1 / 5)
    assert line["balanced_accuracy"] == pytest.approx(1 / 4)
    assert line["qwk"] == pytest.approx(0)
    assert line["macro_f1"] == pytest.approx((2 / 6) / 4)
    assert line["macro_auroc"] is None
    assert line["referable_auroc"] == 0.5
    assert line["referable_ap"] == pytest.approx(2 / 5)
    assert line["sensitivity_at_90_specificity"] is None
    # The probabilities are train's shares, 2, 3, 0, 0 and 1 of 6; grades 2 and 3 never come true.
    shares = np.array([2, 3, 0, 0, 1]) / 6
    squares = (shares**2).sum() + 1 - 2 * shares[[0, 0, 1, 2, 3]]
    assert line["brier"] == pytest.approx(squares.mean())
    assert line["ece"] == pytest.approx(3 / 6 - 1 / 5)
    truth = [0, 0, 1, 2, 3]
    expected = sk.log_loss(truth, np.tile(shares, (5, 1)), labels=range(GRADES))
    assert line["log_loss"] == pytest.approx(expected)
    assert (line["recall_0"], line["recall_1"], line["recall_4"]) == (0, 1, None)


def test_short_scores_by_hand():
    votes = np.eye(GRADES, dtype=np.float32)[[0, 0, 2, 4]]
    found = short_scores(votes, np.array([0, 1, 2, 4]), np.array([0, 0, 3]))
    # Mean squares 5 and 5.25, means 1.5 and 1.75, one squared error of 1: 1 - 1 / (4 * 5).
    assert found == pytest.approx({"accuracy": 0.75, "majority": 0.25, "qwk": 1 - 1 / 20})


def test_short_scores_of_one_grade_have_no_qwk():
    constant = short_scores(np.eye(GRADES)[[0, 0]], np.array([0, 0]), np.array([0]))
    assert constant == {"accuracy": 1.0, "majority": 1.0, "qwk": None}


# ------------------------------------------------------------------- what is written and shown


def test_summary_has_the_parts_of_results():
    predictions = draw_predictions(60, per_patient=2)
    validation = draw_predictions(40, seed=1, per_patient=2)
    thresholds = [0.5, 1.5, 2.5, 3.5]
    expected_grade = predictions.probabilities @ np.arange(GRADES)
    by_thresholds = np.digitize(expected_grade, thresholds)
    train_grades = np.array([0, 0, 1])
    summary = summarize(predictions, train_grades, validation, (thresholds, by_thresholds))
    assert list(summary) == [
        *("majority", "metrics", "patients", "thresholded", "confusion", "reliability"),
        "validation",
    ]
    json.dumps(summary, allow_nan=False)

    assert summary["metrics"] == evaluate(predictions, validation)
    assert summary["validation"] == values_of(validation, validation)
    patients = patient_level(predictions)
    expected = evaluate(patients, patient_level(validation), PATIENT_METRICS)
    assert summary["patients"] == expected
    assert list(expected) == [
        *("accuracy", "balanced_accuracy", "qwk", "macro_f1", "referable_auroc", "referable_ap"),
        *("sensitivity_at_90_specificity", "sensitivity_at_95_specificity"),
        *("specificity_at_90_sensitivity", *(f"recall_{grade}" for grade in LABELS)),
    ]
    reading = summary["thresholded"]
    assert reading["thresholds"] == thresholds
    assert list(reading["metrics"]) == [
        *("accuracy", "balanced_accuracy", "qwk", "macro_f1", "macro_precision"),
        *(f"recall_{grade}" for grade in LABELS),
    ]
    kappa = sk.cohen_kappa_score(predictions.grades, by_thresholds, weights="quadratic")
    assert reading["metrics"]["qwk"]["value"] == pytest.approx(kappa)
    table = sk.confusion_matrix(predictions.grades, by_thresholds, labels=LABELS)
    assert reading["confusion"] == table.tolist()
    table = sk.confusion_matrix(predictions.grades, predictions.predicted, labels=LABELS)
    assert summary["confusion"] == table.tolist(), "the truth is in rows"

    bare = summarize(predictions, train_grades)
    assert list(bare) == ["majority", "metrics", "patients", "confusion", "reliability"]


def texts_of(lines):
    """Return the lines of the first part, by what stands in the title's columns."""
    titles = [line[: lines[0].index("value") - 3].strip() for line in lines[1:]]
    return dict(zip(titles, lines[1:], strict=True))


def test_summary_and_its_lines(capsys):
    predictions = draw_predictions(200)
    predictions = select(predictions, predictions.grades != 3)
    summary = summarize(predictions, np.array([0, 0, 0, 1]))
    lines = summary_lines(summary)
    assert lines[0].split() == ["value", "95", "%", "interval", "majority"]
    (patients,) = [row for row, line in enumerate(lines) if line.startswith("patients")]
    texts = texts_of(lines[:patients])
    entry = summary["metrics"]["accuracy"]
    low, high = entry["ci95"]
    words = [f"{entry['value']:.3f}", f"{low:.3f}", "to", f"{high:.3f}"]
    words.append(f"{summary['majority']['accuracy']:.3f}")
    assert texts["accuracy"].split()[1:] == words
    assert texts["QWK"].split()[-1] == "0.000"
    assert texts["macro AUROC"].split()[2] == "-"
    assert texts["macro AUROC"].endswith("(no test image of grade 3)")
    assert texts["balanced accuracy"].endswith(
        "(no interval: 0 patients of grade 3; an interval takes 10)"
    )
    title = "sensitivity at 90 % specificity"
    assert texts[title].endswith("(no validation predictions to choose the threshold on)")
    assert lines[patients + 1].split()[0] == "accuracy"

    print_summary(summary, "A title")
    assert capsys.readouterr().out == "\n".join(["", "A title", *lines, ""])


def test_both_readings_are_shown():
    predictions = draw_predictions(60)
    thresholds = [0.5, 1.5, 2.5, 3.5]
    summary = summarize(
        predictions, np.array([0]), None, (thresholds, np.zeros_like(predictions.grades))
    )
    lines = summary_lines(summary)
    row = lines.index("grades by thresholds")
    value = f"{(predictions.grades == 0).mean():.3f}"
    assert lines[row + 1].split()[:2] == ["accuracy", value]
    assert lines[1].split()[1] != value


def test_long_reasons_are_shortened_for_people():
    predictions = predictions_of([0, 1, 2, 3, 4] * 3, [0, 1, 2, 3, 4] * 3)
    summary = summarize(predictions, np.array([0]))
    reason = summary["metrics"]["macro_f1"]["no_interval"]
    assert len(reason) > 60
    (line,) = [line for line in summary_lines(summary) if line.startswith("macro F1")][:1]
    assert line.endswith(f"(no interval: {reason[:57].rstrip()}...)")


def test_a_metric_may_be_defined_where_the_majority_lines_is_not():
    predictions = predictions_of([2, 2, 2], [2, 2, 1])
    summary = summarize(predictions, np.array([2]))
    assert summary["metrics"]["qwk"]["value"] == 0
    assert summary["majority"]["qwk"] is None
    line = [line for line in summary_lines(summary) if line.startswith("QWK")][0]
    assert line.split()[1:4] == ["0.000", "-", "-"]


def test_means_of_folds_by_hand():
    folds = [
        {"qwk": {"value": 0.1}, "macro_f1": {"value": 0.5}},
        {"qwk": {"value": 0.3}, "macro_f1": {"value": None, "reason": "one grade alone"}},
    ]
    assert mean_of_folds(folds) == {
        "qwk": {"value": pytest.approx(0.2), "sd": pytest.approx(0.02**0.5)},
        "macro_f1": {"value": None, "reason": "undefined in fold 2"},
    }


def test_folds_together_fall_below_chance_where_features_tell_nothing():
    """The trap that the mean of folds is there for: each fold answers what it learnt, no more."""
    rng = np.random.default_rng(0)
    grades = np.zeros(1000, int)
    grades[:200] = 2
    rng.shuffle(grades)
    together, own = [], []
    for fold in range(5):
        inside = np.arange(1000) % 5 == fold
        share = (grades[~inside] == 2).mean()
        noise = rng.normal(scale=1e-4, size=inside.sum())
        score = share + noise
        shares = np.zeros((inside.sum(), 5))
        shares[:, 0] = 1 - score
        shares[:, 2] = score
        names = np.flatnonzero(inside).astype(str)
        predictions = Predictions(grades[inside], shares.argmax(axis=1), shares, names)
        together.append(predictions)
        own.append(point_values(predictions))
    all_grades = np.concatenate([part.grades for part in together])
    all_scores = np.concatenate([part.referable_score for part in together])
    assert sk.roc_auc_score(all_grades >= 2, all_scores) < 0.47
    assert mean_of_folds(own)["referable_auroc"]["value"] == pytest.approx(0.5, abs=0.05)
