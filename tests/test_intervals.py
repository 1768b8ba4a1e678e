"""draws.py and intervals.py against scikit-learn, scipy, a resampling loop and worked tables.

Run it with `python -m pytest tests/test_intervals.py`. How often intervals hold the truth is
measured by tests/test_coverage.py.
"""

import warnings

import numpy as np
import pytest
from drawn_predictions import draw_predictions, predictions_of, select
from scipy import stats
from sklearn import metrics as sk

from fundus import intervals
from fundus.draws import ap_by_score, auroc_by_score, draw_by_score, draw_patients
from fundus.intervals import (
    difference_interval,
    effective_number,
    evaluate,
    expanded_percentiles,
    mean_interval,
    paired_difference,
    rate_interval,
    why_no_interval,
    wilson,
)
from fundus.manifest import GRADES
from fundus.predictions import Predictions
from fundus.scores import (
    METRICS,
    OperatingPoint,
    bootstrap,
    brier_losses,
    confusion_metrics,
    log_losses,
    point_values,
)

LABELS = list(range(GRADES))
NAMES = [metric.name for metric in METRICS]


def once(predictions):
    """Return the draw that holds every patient once: the test set itself."""
    draws = draw_patients(predictions.patients, 1, seed=0)
    draws.counts[:] = 1
    return draws


def values_by_scikit(predictions, rows, thresholds):
    """Return the metrics of some rows, NaN where undefined."""
    truth = predictions.grades[rows]
    predicted = predictions.predicted[rows]
    shares = predictions.probabilities[rows]
    referable = truth >= 2
    score = shares[:, 2] + shares[:, 3] + shares[:, 4]
    present = sorted(set(truth))
    macro = {"labels": present, "average": "macro", "zero_division": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of grades without predictions
        values = {
            "accuracy": sk.accuracy_score(truth, predicted),
            "balanced_accuracy": sk.balanced_accuracy_score(truth, predicted),
            "qwk": sk.cohen_kappa_score(truth, predicted, labels=LABELS, weights="quadratic"),
            "macro_f1": sk.f1_score(truth, predicted, **macro),
            "macro_precision": sk.precision_score(truth, predicted, **macro),
            "log_loss": sk.log_loss(truth, shares, labels=LABELS),
            "brier": sk.brier_score_loss(truth, shares, labels=LABELS, scale_by_half=False),
            "ece": naive_ece(shares, truth == predicted),
        }
    values["macro_auroc"] = np.nan
    if len(present) == GRADES:
        values["macro_auroc"] = sk.roc_auc_score(truth, shares, multi_class="ovr")
    values["referable_auroc"] = values["referable_ap"] = np.nan
    if len(set(referable)) == 2:
        values["referable_auroc"] = sk.roc_auc_score(referable, score)
        values["referable_ap"] = sk.average_precision_score(referable, score)
    for name, threshold in thresholds.items():
        side = referable if name.startswith("sensitivity") else ~referable
        named = (score >= threshold) == referable
        values[name] = named[side].mean() if side.any() else np.nan
    for grade in LABELS:
        mine = truth == grade
        values[f"recall_{grade}"] = (predicted[mine] == grade).mean() if mine.any() else np.nan
    return values


def naive_ece(shares, is_right):
    """Return the calibration error, bin by bin."""
    highest = shares.max(axis=1)
    total = 0
    for number in range(15):
        inside = (highest > number / 15) & (highest <= (number + 1) / 15)
        if inside.any():
            total += inside.mean() * abs(is_right[inside].mean() - highest[inside].mean())
    return total


# ------------------------------------------------------------------------------- values of draws


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_both_ways_of_a_metric_agree(metric):
    """A draw that holds every patient once is the test set itself."""
    for seed in range(5):
        predictions = draw_predictions(90, seed)
        entries = point_values(predictions, draw_predictions(50, seed + 9))
        (found,) = bootstrap(predictions, once(predictions), entries)[metric.name]
        assert found == pytest.approx(entries[metric.name]["value"], abs=1e-12)


def draw_second_alone(whole, grades, predicted):
    """Return a metric's draw that holds further images and none of `whole`, by its name."""
    entries = point_values(whole, whole)
    both = predictions_of([*whole.grades, *grades], [*whole.predicted, *predicted])
    draws = once(both)
    draws.counts[0, draws.patient_of_image[: len(whole.grades)]] = 0
    return bootstrap(both, draws, entries)


@pytest.mark.parametrize(
    "grades, predicted",
    [([2, 2], [2, 2]), ([0, 1, 1], [0, 0, 1]), ([3, 4], [0, 1]), (LABELS, LABELS)],
)
def test_both_ways_of_a_metric_are_undefined_together(grades, predicted):
    found = draw_second_alone(draw_predictions(60), grades, predicted)
    alone = predictions_of(grades, predicted)
    for metric in METRICS:
        reason = metric.why_undefined(alone)
        if isinstance(metric, OperatingPoint):
            # With a threshold, sensitivity needs those with DR alone, specificity the others.
            is_needed = alone.referable == metric.name.startswith("sensitivity")
            reason = "" if is_needed.any() else "none of its side"
        assert np.isnan(found[metric.name][0]) == bool(reason), metric.name


def test_draws_are_those_of_a_resampling_loop():
    predictions = draw_predictions(36, seed=3, per_patient=2)
    # Ties within and across patients, and probabilities of 0.
    shares = predictions.probabilities.round(1)
    shares[:, 0] = 1 - shares[:, 1:].sum(axis=1)
    predictions = Predictions(
        predictions.grades, predictions.predicted, shares.clip(0, 1), predictions.patients
    )
    entries = point_values(predictions, draw_predictions(80, seed=4))
    thresholds = {}
    for name, entry in entries.items():
        if "threshold" in entry:
            thresholds[name] = entry["threshold"]
    assert len(thresholds) == 3

    patients = np.unique(predictions.patients)
    found = bootstrap(predictions, draw_patients(predictions.patients, 100, seed=7), entries)
    assert set(found) == set(NAMES)
    rng = np.random.default_rng(7)
    undefined = 0
    for draw in range(100):
        chosen = patients[rng.integers(len(patients), size=len(patients))]
        rows = [np.flatnonzero(predictions.patients == patient) for patient in chosen]
        expected = values_by_scikit(predictions, np.concatenate(rows), thresholds)
        assert set(expected) == set(NAMES)
        undefined += np.isnan(expected["macro_auroc"])
        for name, value in expected.items():
            assert found[name][draw] == pytest.approx(value, abs=1e-9, nan_ok=True), name
    assert undefined, "undefined draws occur"


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
    kappa = sk.cohen_kappa_score(truth, predicted, labels=LABELS, weights="quadratic", **weighted)
    recalls = sk.recall_score(truth, predicted, labels=LABELS, average=None, **weighted)
    assert found["accuracy"][0] == pytest.approx(sk.accuracy_score(truth, predicted, **weighted))
    assert found["qwk"][:2] == pytest.approx([kappa, kappa])  # it is symmetric
    assert [found[f"recall_{grade}"][0] for grade in LABELS] == pytest.approx(list(recalls))
    assert found["qwk"][2] == found["accuracy"][2] == found["macro_f1"][2] == 1


def test_confusion_without_some_grades():
    table = np.zeros((GRADES, GRADES))
    table[0, 0] = 3
    table[2, 0] = 1
    table[2, 2] = 1
    found = confusion_metrics(table)
    assert found["balanced_accuracy"] == pytest.approx((1 + 1 / 2) / 2)
    assert found["macro_f1"] == pytest.approx((6 / 7 + 2 / 3) / 2)
    assert found["macro_precision"] == pytest.approx((3 / 4 + 1) / 2)
    assert np.isnan([found["recall_1"], found["recall_3"], found["recall_4"]]).all()
    table[:] = 0
    table[3, 3] = 4
    assert np.isnan(confusion_metrics(table)["qwk"])


@pytest.mark.parametrize("levels", [3, 10, 10_000])
def test_weighted_scores_are_scikit_learns_with_ties(levels):
    rng = np.random.default_rng(levels)
    truth = rng.random(200) < 0.3
    score = rng.integers(levels, size=200) + truth
    draws = draw_patients(np.arange(200).astype(str), 20, seed=1)
    aurocs = draw_by_score(score, truth, draws, auroc_by_score)
    precisions = draw_by_score(score, truth, draws, ap_by_score)
    for draw, count in enumerate(draws.counts):
        weight = {"sample_weight": count[draws.patient_of_image]}
        assert aurocs[draw] == pytest.approx(sk.roc_auc_score(truth, score, **weight))
        expected = sk.average_precision_score(truth, score, **weight)
        assert precisions[draw] == pytest.approx(expected)
    for side in (truth, ~truth):
        draws.counts[:] = side[np.argsort(np.arange(200).astype(str))]
        assert np.isnan(draw_by_score(score, truth, draws, auroc_by_score)).all()
        assert np.isnan(draw_by_score(score, truth, draws, ap_by_score)).all()


def test_draws_in_blocks_are_those_at_once(monkeypatch):
    predictions = draw_predictions(50)
    entries = point_values(predictions, predictions)
    draws = draw_patients(predictions.patients, 30, seed=2)
    whole = bootstrap(predictions, draws, entries)
    monkeypatch.setattr("fundus.draws.CELLS", 7 * 50)  # 7 draws at a time, 2 at the end
    parts = bootstrap(predictions, draws, entries)
    for name in NAMES:
        assert parts[name].tolist() == whole[name].tolist()


def test_a_draw_holds_as_many_patients_as_there_are():
    draws = draw_patients(np.array(["b", "a", "b", "c"]), 200, seed=0)
    assert draws.patient_of_image.tolist() == [1, 0, 1, 2]
    assert (draws.counts.sum(axis=1) == 3).all()
    assert draws.counts.max() == 3, "with replacement"
    (counts,) = draws.image_counts(np.array([3, 0, 1, 2]))
    assert counts.tolist() == draws.counts[:, [2, 1, 0, 1]].tolist()


# ----------------------------------------------------------------------------- the two methods


def test_wilson_is_scipys():
    for hits, total in ((0, 10), (1, 10), (7, 12), (300, 400), (25, 25)):
        exact = stats.binomtest(hits, total).proportion_ci(method="wilson")
        assert wilson(hits / total, total) == pytest.approx(tuple(exact))


def test_wilson_by_hand():
    # z^2 = 3.8415. None of ten: 0 to z^2 / (10 + z^2). Half of ten: 0.5 -+ z / (2 sqrt(10 + z^2)).
    assert wilson(0, 10) == pytest.approx((0, 3.8415 / 13.8415), abs=1e-5)
    half = 1.95996 / (2 * 13.8415**0.5)
    assert wilson(0.5, 10) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-5)


def test_effective_number_by_hand():
    # Pairs of eyes that are always alike count once but for P / (P - 1).
    alike = np.array([2, 0, 2, 0])
    assert effective_number(alike, np.array([2, 2, 2, 2])) == pytest.approx(3)
    # One of two each: no variance is seen, and images count once each at most.
    assert effective_number(np.array([1, 1, 1]), np.array([2, 2, 2])) == 6
    # All or none: a patient counts once.
    assert effective_number(np.array([2, 2, 1]), np.array([2, 2, 1])) == 3
    assert effective_number(np.array([0, 0, 0]), np.array([2, 2, 1])) == 3
    # Shares 3/5; hits less their expectation 0.8, -0.6, -0.2: squares sum to 1.04.
    variance = 1.04 * 3 / 2 / 25
    found = effective_number(np.array([2, 0, 1]), np.array([2, 1, 2]))
    assert found == pytest.approx(0.24 / variance)


def test_rates_of_lone_images_have_wilsons_interval():
    predictions = draw_predictions(80)
    hits = predictions.predicted == predictions.grades
    among = predictions.grades == 0
    draws = draw_patients(predictions.patients, 1, 0)
    found = rate_interval((hits, among), draws)
    count = int(among.sum())
    # The variance over patients has P - 1 for P, so that the number is one smaller.
    assert found == pytest.approx(wilson(hits[among].mean(), count - 1))


def test_percentiles_are_expanded_for_few():
    samples = np.random.default_rng(0).normal(size=20_001)
    # t of 9 degrees of freedom is 2.262, which 1.185 % of a normal distribution lie below.
    found = expanded_percentiles(samples, 10)
    assert found == {"ci95": pytest.approx(np.percentile(samples, [1.1842, 98.8158]), abs=1e-3)}
    many = expanded_percentiles(samples, 10**6)["ci95"]
    assert many == pytest.approx(np.percentile(samples, [2.5, 97.5]), abs=1e-3)


def test_the_interval_of_a_mean_is_the_bootstrap_t_of_a_plain_loop():
    rng = np.random.default_rng(3)
    patients = np.repeat(np.arange(30), rng.integers(1, 4, 30)).astype(str)
    losses = rng.exponential(size=len(patients))
    draws = draw_patients(patients, 200, seed=1)

    def mean_and_error(rows_of_patients):
        rows = np.concatenate(rows_of_patients)
        mean = losses[rows].mean()
        residuals = [(losses[own] - mean).sum() for own in rows_of_patients]
        return mean, np.sqrt(np.sum(np.square(residuals))) / len(rows)

    rows_of = [np.flatnonzero(patients == name) for name in np.unique(patients)]
    mean, error = mean_and_error(rows_of)
    ratios = []
    for counts in draws.counts:
        drawn = [rows_of[place] for place, count in enumerate(counts) for _ in range(count)]
        drawn_mean, drawn_error = mean_and_error(drawn)
        ratios.append((drawn_mean - mean) / drawn_error)
    low, high = np.percentile(ratios, [2.5, 97.5])
    expected = [mean - high * error, mean - low * error]
    assert mean_interval(losses, draws) == pytest.approx(expected, rel=1e-9)
    # Exponential losses are skewed: more may be missing above than below.
    assert expected[1] - mean > 1.2 * (mean - expected[0])


def test_a_mean_of_equal_losses_is_sure():
    draws = draw_patients(np.array(["a", "a", "b", "c"]), 50, seed=0)
    assert mean_interval(np.full(4, 0.1), draws) == pytest.approx([0.1, 0.1])


def test_undefined_draws_are_counted_and_left_out():
    samples = np.array([np.nan, *range(101), np.nan])
    found = expanded_percentiles(samples, 10**6)
    assert found == {"ci95": pytest.approx([2.5, 97.5], abs=1e-3), "undefined_draws": 2}


def test_an_entry_tells_of_its_undefined_draws():
    predictions = predictions_of(LABELS * 10, LABELS * 9 + [1, 2, 3, 4, 0])
    draws = draw_patients(predictions.patients, 10_000, seed=7)
    lacks = (draws.counts[:, draws.patient_of_image].reshape(10_000, 10, 5).sum(axis=1) == 0).any(1)
    assert lacks.sum() > 0
    found = evaluate(predictions, draws=10_000, seed=7)
    assert found["macro_auroc"]["undefined_draws"] == lacks.sum()
    assert "undefined_draws" not in found["balanced_accuracy"]


# --------------------------------------------------------------------------- of one evaluation


def test_every_metric_has_its_methods_interval():
    predictions = draw_predictions(200, seed=3, per_patient=2)
    validation = draw_predictions(100, seed=4)
    found = evaluate(predictions, validation, seed=5)
    draws = draw_patients(predictions.patients, 1000, seed=5)
    samples = bootstrap(predictions, draws, found)
    patients = {}
    for grade in LABELS:
        patients[grade] = len(set(predictions.patients[predictions.grades == grade]))
    referable = len(set(predictions.patients[predictions.grades >= 2]))
    others = len(set(predictions.patients[predictions.grades < 2]))
    sides = min(referable, others)
    expanded = dict.fromkeys(
        ["balanced_accuracy", "macro_f1", "macro_precision", "macro_auroc"], min(patients.values())
    )
    expanded |= dict.fromkeys(["qwk", "referable_auroc", "referable_ap"], sides)
    for name, count in expanded.items():
        tail = 100 * stats.norm.cdf(stats.t.ppf(0.025, count - 1))
        expected = np.percentile(samples[name], [tail, 100 - tail])
        assert found[name]["ci95"] == pytest.approx(list(expected)), name
    for name, losses in (("log_loss", log_losses), ("brier", brier_losses)):
        assert found[name]["ci95"] == mean_interval(losses(predictions), draws), name

    score = predictions.referable_score
    truth = predictions.grades >= 2
    for name in NAMES:
        if name.startswith("recall"):
            among = predictions.grades == int(name[-1])
            hits = predictions.predicted == predictions.grades
        elif name.startswith(("sensitivity", "specificity")):
            among = truth == name.startswith("sensitivity")
            hits = (score >= found[name]["threshold"]) == truth
        elif name == "accuracy":
            among = np.ones(200, bool)
            hits = predictions.predicted == predictions.grades
        else:
            assert name in {*expanded, "log_loss", "brier", "ece"}
            continue
        assert found[name]["ci95"] == pytest.approx(rate_interval((hits, among), draws)), name
    for entry in found.values():
        if entry["ci95"]:
            low, high = entry["ci95"]
            assert low < entry["value"] < high


def test_the_calibration_error_has_no_interval():
    entry = evaluate(draw_predictions(100), draws=5)["ece"]
    assert entry["ci95"] is None
    assert "upward" in entry["no_interval"]


def test_few_patients_have_no_interval_and_the_reason():
    # Grade 3 has 12 images but 6 patients, grade 4 has 10 patients, grade 1 one.
    grades = np.array([0] * 40 + [1] + [2] * 20 + [3] * 12 + [4] * 10)
    patients = np.array([f"p{row}" for row in range(61)] + [f"q{row // 2}" for row in range(12)])
    patients = np.r_[patients, [f"r{row}" for row in range(10)]]
    shares = np.full((len(grades), GRADES), 0.2)
    rng = np.random.default_rng(0)
    predicted = np.where(rng.random(len(grades)) < 0.7, grades, 0)
    predictions = Predictions(grades, predicted, shares, patients)
    found = evaluate(predictions, draws=50)
    assert found["recall_3"]["no_interval"] == "6 patients of grade 3; an interval takes 10"
    assert found["recall_1"]["no_interval"] == "1 patient of grade 1; an interval takes 10"
    for name in ("balanced_accuracy", "macro_f1", "macro_precision", "macro_auroc"):
        assert found[name]["ci95"] is None
        expected = "1 patient of grade 1, 6 patients of grade 3; an interval takes 10"
        assert found[name]["no_interval"] == expected
    for name in ("accuracy", "qwk", "referable_auroc", "recall_4", "recall_0"):
        assert found[name]["ci95"]
        assert "no_interval" not in found[name]


def test_few_on_one_side_have_no_interval_for_referable_dr():
    predictions = predictions_of([0] * 30 + [2] * 9, [0] * 20 + [2] * 19)
    found = evaluate(predictions, predictions, draws=50)
    reason = "9 patients with referable DR; an interval takes 10"
    for name in ("qwk", "referable_auroc", "referable_ap"):
        assert found[name]["no_interval"] == reason
    assert found["accuracy"]["ci95"] and found["log_loss"]["ci95"]
    (metric,) = [metric for metric in METRICS if metric.name == "sensitivity_at_90_specificity"]
    assert why_no_interval(metric, predictions) == reason


def test_below_ten_patients_nothing_has_an_interval():
    predictions = draw_predictions(18, per_patient=2)
    for name, entry in evaluate(predictions, predictions, draws=50).items():
        assert entry["ci95"] is None
        if entry["value"] is not None and name != "ece":
            assert entry["no_interval"] == "9 patients; an interval takes 10"


def test_intervals_are_seeded_and_do_not_depend_on_the_rows_order():
    predictions = draw_predictions(160, per_patient=2)
    found = evaluate(predictions, predictions, draws=100)
    assert evaluate(predictions, predictions, draws=100) == found
    assert evaluate(predictions, predictions, draws=100, seed=1)["qwk"] != found["qwk"]
    order = np.random.default_rng(1).permutation(160)
    mixed = evaluate(select(predictions, order), predictions, draws=100)
    for name, entry in found.items():
        if name != "ece":
            assert mixed[name]["ci95"] == pytest.approx(entry["ci95"], abs=1e-9)


def test_two_eyes_of_a_patient_do_not_count_as_two():
    one = draw_predictions(150, seed=2)
    twice = select(one, np.tile(np.arange(150), 2))
    loose = Predictions(
        twice.grades, twice.predicted, twice.probabilities, np.arange(300).astype(str)
    )
    expected = evaluate(one, one, draws=400)
    found = evaluate(twice, one, draws=400)
    narrow = evaluate(loose, one, draws=400)
    for name in NAMES:
        if name == "ece":
            continue
        assert found[name]["ci95"] == pytest.approx(expected[name]["ci95"], abs=1e-6), name
        width = np.diff(found[name]["ci95"])[0]
        independent = np.diff(narrow[name]["ci95"])[0]
        assert 1.15 < width / independent < 1.75, name  # sqrt 2 = 1.41


# -------------------------------------------------------------------------- of two evaluations


def seeds_of(count, quality, total=120):
    """Return predictions of the same images by several seeds, two images a patient."""
    found = []
    truth = draw_predictions(total, seed=0, per_patient=2)
    for seed in range(count):
        rng = np.random.default_rng((seed, round(10 * quality)))
        scores = rng.normal(size=(total, GRADES))
        scores[np.arange(total), truth.grades] += quality
        shares = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        found.append(Predictions(truth.grades, shares.argmax(axis=1), shares, truth.patients))
    return found


def test_paired_differences_are_those_of_a_loop():
    a = seeds_of(3, 1.5)
    b = seeds_of(2, 0.8)
    found = paired_difference(a, b, draws=60, seed=3)
    patients = np.unique(a[0].patients)
    rng = np.random.default_rng(3)
    samples = []
    for _ in range(60):
        chosen = patients[rng.integers(len(patients), size=len(patients))]
        rows = np.concatenate([np.flatnonzero(a[0].patients == name) for name in chosen])
        values = []
        for side in (a, b):
            values.append([values_by_scikit(one, rows, {}) for one in side])
        samples.append(values)
    for name in ("qwk", "macro_f1", "macro_auroc", "referable_ap", "log_loss", "brier"):
        (metric,) = [metric for metric in METRICS if metric.name == name]
        differences = []
        for ours, theirs in samples:
            one = np.mean([values[name] for values in ours])
            differences.append(one - np.mean([values[name] for values in theirs]))
        count = intervals.fewest_patients(metric, a[0])
        tail = 100 * stats.norm.cdf(stats.t.ppf(0.025, count - 1))
        entry = found[name]
        expected = np.percentile(differences, [tail, 100 - tail])
        assert entry["ci95"] == pytest.approx(list(expected), abs=1e-9), name
        assert entry["a"] == [point_values(one)[name]["value"] for one in a]
        assert entry["value"] == pytest.approx(np.mean(entry["a"]) - np.mean(entry["b"]))
        assert "seeds" not in entry and "spread" not in entry, "the sides differ in length"


def test_seeds_are_paired_where_there_are_as_many():
    a = seeds_of(3, 1.5)
    b = seeds_of(3, 0.8)
    entry = paired_difference(a, b, draws=10)["accuracy"]
    expected = []
    for ours, theirs in zip(a, b, strict=True):
        right = (ours.predicted == ours.grades).mean()
        expected.append(right - (theirs.predicted == theirs.grades).mean())
    assert entry["seeds"] == pytest.approx(expected)
    assert entry["spread"] == pytest.approx(np.std(expected, ddof=1))
    assert entry["value"] == pytest.approx(np.mean(expected))
    single = paired_difference(a[:1], b[:1], draws=10)["accuracy"]
    assert len(single["seeds"]) == 1 and "spread" not in single
    back = paired_difference(b, a, draws=10)["accuracy"]
    assert back["ci95"] == pytest.approx([-entry["ci95"][1], -entry["ci95"][0]])


def test_the_interval_of_two_shares_by_hand():
    # Four patients of two images, whose gains are 2, 0, -1 and 1; then half of 2, half of -2, and
    # one of 0. Six patients of twelve images, mean 1/6, so 1/3 of a patient's gain is expected.
    a = np.array([1, 1, 0, 0, 0, 0, 1, 1])
    b = np.array([0, 0, 0, 0, 1, 0, 0, 1])
    among = np.ones(8, bool)
    draws = draw_patients(np.array(list("aabbccdd")), 1, 0)
    mean = 2 / 12
    squares = 0
    for gain, weight in ((2, 1), (0, 1), (-1, 1), (1, 1), (2, 0.5), (-2, 0.5), (0, 1)):
        squares += weight * (gain - 1 / 3) ** 2
    half = 1.959964 * (squares * 6 / 5) ** 0.5 / 12
    found = difference_interval((a, among), (b, among), draws)
    assert found == pytest.approx([mean - half, mean + half], abs=1e-6)


def test_the_interval_of_matched_pairs_is_agresti_and_mins():
    # With an image a patient: 1/2 more in each cell of the table, then Wald's interval.
    rng = np.random.default_rng(0)
    a = rng.random(400) < 0.7
    b = rng.random(400) < 0.6
    for_a = (a & ~b).sum() + 0.5
    for_b = (b & ~a).sum() + 0.5
    total = 402
    mean = (for_a - for_b) / total
    half = 1.959964 * (for_a + for_b - (for_a - for_b) ** 2 / total) ** 0.5 / total
    among = np.ones(400, bool)
    draws = draw_patients(np.arange(400).astype(str), 1, 0)
    found = difference_interval((a * 1.0, among), (b * 1.0, among), draws)
    assert found == pytest.approx([mean - half, mean + half], rel=0.01)
    assert found[1] - found[0] == pytest.approx(2 * half * (402 / 401) ** 0.5)


def test_equal_shares_still_differ_by_chance():
    one = seeds_of(1, 1.0)
    found = paired_difference(one, one, one, one, draws=20)
    for name in ("accuracy", "recall_4", "sensitivity_at_90_specificity"):
        low, high = found[name]["ci95"]
        assert found[name]["value"] == 0
        assert -0.5 < low < 0 < high == -low
    assert found["qwk"]["ci95"] == [0, 0]


def test_operating_points_of_a_pair_take_each_sides_own_threshold():
    a = seeds_of(1, 1.5)
    b = seeds_of(1, 0.8)
    name = "sensitivity_at_90_specificity"
    bare = paired_difference(a, b, draws=5)[name]
    reason = "no validation predictions to choose the threshold on"
    assert bare == {"value": None, "ci95": None, "reason": reason}
    held_a = seeds_of(1, 1.4, total=60)
    held_b = seeds_of(1, 0.7, total=60)
    entry = paired_difference(a, b, held_a, held_b, draws=5)[name]
    ours = point_values(a[0], held_a[0])[name]["value"]
    theirs = point_values(b[0], held_b[0])[name]["value"]
    assert entry["value"] == pytest.approx(ours - theirs)
    assert entry["ci95"][0] < entry["value"] < entry["ci95"][1]


def test_differences_of_few_patients_have_no_interval():
    a = seeds_of(2, 1.5, total=16)
    entry = paired_difference(a, a, draws=5)["accuracy"]
    assert entry["ci95"] is None
    assert entry["no_interval"] == "8 patients; an interval takes 10"
