"""Say in sentences what a run's numbers show, beside what any network must beat."""

from __future__ import annotations

from typing import Any

from tools.report_compare import compare
from tools.report_runs import Evaluation, Run, child, children, interval, number, remarks, words
from utils import InputError

METHODS = {
    "linear": "the linear probe",
    "linear-folds": "the linear probe, pooled over folds,",
    "linear-fractions": "the linear probe",
    "knn": "k-NN",
    "knn-folds": "k-NN, pooled over folds,",
}


def verdict(run: Run) -> str:
    """Return one paragraph of plain text on the run's main evaluation, made from its numbers."""
    evaluation = run.headline()
    if evaluation is None:
        if run.evaluations:
            return f"{run.name}: no results could be read; see below."
        return (
            f"{run.name}: not evaluated yet. Run eval_knn.py and eval_linear.py on it: the curves "
            "of training do not say whether the features tell grades."
        )
    sentences = [_main_sentence(run, evaluation)]
    sentences += _majority_sentences(evaluation)
    sentences += _baseline_sentences(run, evaluation)
    limits = remarks(evaluation, run)
    if limits:
        sentences.append(f"Mind: {', '.join(limits)}.")
    if collapses(run):
        sentences.append("Training warned of a collapse; see its curves.")
    return " ".join(sentences)


def collapses(run: Run) -> list[str]:
    """Return the warnings of collapse in a run's log, with their epochs."""
    found = []
    for record in run.log:
        if record.get("collapse"):
            found.append(f"epoch {words(record.get('epoch'))}: {words(record['collapse'])}")
    return found


def _main_sentence(run: Run, evaluation: Evaluation) -> str:
    """Return what was evaluated on what, and its QWK."""
    test = child(child(evaluation.results, "data"), "test")
    where = f"{words(test.get('images')) or 'an unknown number of'} test photographs"
    if test.get("patients"):
        where += f" of {words(test['patients'])} patients"
    subject = METHODS.get(evaluation.name, evaluation.name)
    entry = child(child(evaluation.results, "metrics"), "qwk")
    if number(entry.get("value")) is None:
        reason = words(entry.get("reason")) or "its results do not hold one"
        return f"{run.name}: on {where} {subject} has no QWK ({reason})."

    sentence = f"{run.name}: on {where} {subject} has a QWK of {_score(entry)}"
    thresholded = child(evaluation.results, "thresholded")
    by_thresholds = child(child(thresholded, "metrics"), "qwk")
    if number(by_thresholds.get("value")) is not None:
        sentence += f", by thresholds of the expected grade {_score(by_thresholds)}"
    if not interval(entry.get("ci95")):
        reason = words(entry.get("no_interval")) or "its results do not hold one"
        sentence += f" (without an interval: {reason})"
    auroc = child(child(evaluation.results, "metrics"), "referable_auroc")
    if number(auroc.get("value")) is not None:
        sentence += f"; its referable AUROC is {_score(auroc)}"
    return sentence + "."


def _majority_sentences(evaluation: Evaluation) -> list[str]:
    """Return what always giving one answer scores, and whether chance explains the QWK."""
    line = child(evaluation.results, "majority")
    baseline = number(line.get("qwk"))
    metrics = child(evaluation.results, "metrics")
    sentences = []
    answer = f"Always answering grade {words(line.get('grade'))}"
    if baseline is not None:
        sentences.append(f"{answer} has a QWK of {baseline:.3f}.")
    accuracy = child(metrics, "accuracy")
    if number(line.get("accuracy")) is not None and number(accuracy.get("value")) is not None:
        by_majority = number(line["accuracy"])
        sentences.append(
            f"The accuracy is {_score(accuracy)}, that of always answering it {by_majority:.3f}."
        )

    limits = interval(child(metrics, "qwk").get("ci95"))
    if limits is None or baseline is None:
        return sentences
    low, high = limits
    if low > baseline:
        sentences.append("The QWK is better than that answer's by more than chance explains.")
    elif high < baseline:
        sentences.append("The QWK is worse than that answer's by more than chance explains.")
    else:
        sentences.append("Chance alone may explain the QWK: its interval holds that answer's.")
    return sentences


def _baseline_sentences(run: Run, evaluation: Evaluation) -> list[str]:
    """Return what hand-made statistics and mean colours score, and the difference to the first."""
    sentences = []
    handmade = _baseline(run, evaluation, "handmade")
    if handmade is None:
        sentences.append(
            "Hand-made statistics (eval_linear.py --features handmade) were not evaluated: whether "
            "the network beats them is open."
        )
    for features, subject in (("handmade", "Hand-made statistics"), ("color", "Mean colours")):
        baseline = _baseline(run, evaluation, features)
        if baseline is None or baseline is evaluation:
            continue
        entry = child(child(baseline.results, "metrics"), "qwk")
        if number(entry.get("value")) is not None:
            sentences.append(f"{subject} have one of {_score(entry)}.")
    if handmade and handmade is not evaluation:
        sentences.append(_difference_sentence(evaluation, handmade))
    return sentences


def _baseline(run: Run, evaluation: Evaluation, features: str) -> Evaluation | None:
    """Return the linear probe's evaluation on other features, of the same protocol if possible."""
    name = f"linear-{features}"
    if evaluation.name.endswith("-folds"):
        return run.find(f"{name}-folds")
    return run.find(name)


def _difference_sentence(evaluation: Evaluation, handmade: Evaluation) -> str:
    """Return how the QWK differs from that of hand-made statistics, patients drawn for both."""
    try:
        found = compare([evaluation.folder], [handmade.folder], ["qwk"])
    except InputError:
        return "Network and statistics cannot be compared: no predictions of the same photographs."
    entry = next(iter(found.parts.values()))["qwk"]
    limits = interval(entry.get("ci95"))
    if number(entry.get("value")) is None or limits is None:
        return "The difference has no interval."
    shown = f"{entry['value']:+.3f} [{limits[0]:+.3f}, {limits[1]:+.3f}]"
    if limits[0] > 0:
        return f"The network's is better than that of hand-made statistics, by {shown}."
    if limits[1] < 0:
        return f"The network's is worse than that of hand-made statistics, by {shown}."
    return (
        f"The network's differs from that of hand-made statistics by {shown}, which may be chance."
    )


def _score(entry: dict[str, Any]) -> str:
    """Return a value with its interval, as text."""
    shown = f"{number(entry.get('value')):.3f}"
    limits = interval(entry.get("ci95"))
    if limits:
        shown += f" [{limits[0]:.3f}, {limits[1]:.3f}]"
    return shown


def data_of(run: Run) -> dict[str, Any]:
    """Return what the evaluations say of the data that the run was trained on, {} if nothing."""
    fallback: dict[str, Any] = {}
    for evaluation in run.evaluations:
        data = child(evaluation.results, "data")
        if children(child(data, "train"), "by_grade") and "test_fingerprint" not in data:
            if data.get("fingerprint") == run.first.get("data"):
                return data
            fallback = fallback or data
    return fallback
