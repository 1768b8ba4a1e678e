"""What is said of attention on lesions: lesions.json, lesions.csv, lesions.png and a table.

Shapes: N photographs, P patches of one that are counted, D the width of tokens.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fundus.eye_map import LESIONS
from fundus.lesion_probe import evaluate_probes
from fundus.lesion_scores import MEASURES, Scores, summarize
from fundus.lesions import ALL_LESIONS, OPTIC_DISC
from utils import write_atomic

COLUMNS = ("photograph", "class", "fundus_share", *MEASURES, "tokens_ap", "color_ap")


@dataclass(frozen=True)
class Study:
    """One photograph as the network saw it, beside its lesions."""

    name: str
    patient: str
    scores: dict[str, Scores]  # by class
    held: dict[str, np.ndarray]  # by class, bool (P,): the patches that hold a lesion
    features: dict[str, np.ndarray]  # by the probe's name: tokens (P, D), color (P, 6)


def evaluate_lesions(
    studies: Sequence[Study], draws: int, seed: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return what lesions.json says of each class, and the rows of lesions.csv."""
    classes = {}
    rows = []
    for lesion in order_classes(studies):
        having = [study for study in studies if lesion in study.scores]
        patients = np.array([study.patient for study in having])
        scores = [study.scores[lesion] for study in having]
        summary = summarize(scores, patients, draws, seed)

        # The probe sees photographs without the class as well: all of their patches are without.
        everyone = np.array([study.patient for study in studies])
        truth = []
        for study in studies:
            nothing = np.zeros(len(study.features["color"]), dtype=bool)
            truth.append(study.held.get(lesion, nothing))
        features = {}
        for name in studies[0].features:
            features[name] = [study.features[name] for study in studies]
        probe, precisions = evaluate_probes(features, truth, everyone, draws, seed)
        summary["probe"] = probe

        classes[lesion] = summary
        for number, study in enumerate(studies):
            if lesion in study.scores:
                row = _row(study, lesion)
                for name, values in precisions.items():
                    row[f"{name}_ap"] = _cell(values[number])
                rows.append(row)
    return classes, rows


def order_classes(studies: Sequence[Study]) -> list[str]:
    """Return the classes that occur: known lesions, others, the optic disc, all lesions."""
    present = {lesion for study in studies for lesion in study.scores}
    last = (OPTIC_DISC, ALL_LESIONS)
    others = sorted(present - {*LESIONS, *last})
    return [lesion for lesion in (*LESIONS, *others, *last) if lesion in present]


def _row(study: Study, lesion: str) -> dict[str, Any]:
    """Return the row of lesions.csv for one class in one photograph, without its probes."""
    scores = study.scores[lesion]
    row: dict[str, Any] = {
        "photograph": study.name,
        "class": lesion,
        "fundus_share": _cell(scores.share),
    }
    for measure in MEASURES:
        row[measure] = _cell(scores.observed(measure)[0])
    return row


def _cell(value: float) -> str:
    """Return a number for a csv; empty where it is undefined."""
    if np.isnan(value):
        return ""
    return f"{value:.6g}"


def table_of(rows: Sequence[dict[str, Any]]) -> str:
    """Return the text of lesions.csv; undefined values are empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# ------------------------------------------------------------------------------------------- shown
def summary_lines(classes: dict[str, Any]) -> list[str]:
    """Return two tables for people: attention beside its turned null, and the probes' precision."""
    width = 2 + max(len(lesion) for lesion in classes)
    lines = [
        f"{'attention':{width}}{'n':>5}{'fundus':>9}{'lift':>8}  {'95 % interval':17}"
        f"{'turned, 95 %':17}{'p':>7}{'pointing':>10}{'turned':>8}{'AP':>8}{'turned':>8}"
    ]
    for lesion, summary in classes.items():
        lines.append(f"{lesion:{width}}{_attention_text(summary)}".rstrip())
    lines += [
        "",
        f"{'AP of probes':{width}}{'n':>5}{'tokens':>9}  {'95 % interval':17}"
        f"{'colour':>7}{'chance':>8}{'gain':>8}  95 % interval",
    ]
    for lesion, summary in classes.items():
        lines.append(f"{lesion:{width}}{_probe_text(summary['probe'])}".rstrip())
    return lines


def _attention_text(summary: dict[str, Any]) -> str:
    """Return a class' row in the table of attention, the mean over heads."""
    lift = summary["lift"]["mean"]
    text = f"{summary['photographs']:5}{summary['fundus_share']:9.2%}"
    text += f"{_number(lift, 'value'):>8}  {_interval(lift):17}"
    text += f"{_interval(lift.get('null', {})):17}{_number(lift, 'p'):>7}"
    for measure, room in (("pointing", 10), ("ap", 8)):
        entry = summary[measure]["mean"]
        null_mean = _number(entry.get("null", {}), "mean")
        text += f"{_number(entry, 'value'):>{room}}{null_mean:>8}"
    return text


def _probe_text(probe: dict[str, Any]) -> str:
    """Return a class' row in the table of probes."""
    text = f"{probe['photographs']:5}"
    if "reason" in probe:
        return f"{text}        -  ({probe['reason']})"
    tokens = probe["tokens"]
    gain = probe["tokens_over_color"]
    text += f"{_number(tokens, 'ap'):>9}  {_interval(tokens):17}"
    text += f"{_number(probe['color'], 'ap'):>7}{_number(probe, 'prevalence'):>8}"
    return f"{text}{_number(gain, 'ap'):>8}  {_interval(gain)}"


def _number(entry: dict[str, Any], key: str) -> str:
    """Return a number of an entry for people, a dash where there is none."""
    if entry.get(key) is None:
        return "-"
    return f"{entry[key]:.3f}"


def _interval(entry: dict[str, Any]) -> str:
    """Return an entry's 95 % interval for people."""
    if not entry.get("ci95"):
        return "-"
    low, high = entry["ci95"]
    return f"{low:.3f} to {high:.3f}"


def plot_lesions(classes: dict[str, Any], path: Path) -> None:
    """Draw lift and average precision of each class as PNG, beside chance."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.6 + 0.5 * len(classes)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(classes))
    _plot_lifts(left, classes)
    _plot_precisions(right, classes)
    left.set_yticks(places, [lesion.replace("_", " ") for lesion in classes])
    left.invert_yaxis()
    for axes in (left, right):
        # Above, where no bar can be below it.
        axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False)
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))


def _plot_lifts(axes: Any, classes: dict[str, Any]) -> None:
    """Draw a bar of lift with its interval for each class, over the null's middle 95 %."""
    axes.set_xlabel("lift: share of attention over share of the fundus")
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
    for place, summary in enumerate(classes.values()):
        entry = summary["lift"]["mean"]
        if entry["value"] is None:
            continue
        axes.barh(place, entry["value"], height=0.45, color="tab:blue")
        low, high = entry["ci95"]
        axes.plot([low, high], [place, place], color="black", linewidth=1.5)
        low, high = entry["null"]["ci95"]
        axes.barh(place, high - low, 0.8, left=low, color="tab:orange", alpha=0.6)
    # Names for the legend, once.
    axes.barh(0, 0, color="tab:blue", label="attention, mean over heads")
    axes.barh(0, 0, color="tab:orange", alpha=0.6, label="turned: middle 95 %")


def _plot_precisions(axes: Any, classes: dict[str, Any]) -> None:
    """Draw the average precision of tokens, colour, attention and chance for each class."""
    axes.set_xlabel("average precision for patches that hold a lesion")
    axes.set_xlim(0, 1)
    bars: dict[str, list[float]] = {"tokens": [], "colour": [], "attention": [], "chance": []}
    for summary in classes.values():
        probe = summary["probe"]
        nothing: dict[str, Any] = {}
        bars["tokens"].append(probe.get("tokens", nothing).get("ap") or 0)
        bars["colour"].append(probe.get("color", nothing).get("ap") or 0)
        bars["attention"].append(summary["ap"]["mean"]["value"] or 0)
        bars["chance"].append(probe.get("prevalence") or 0)
    colors = ("tab:green", "tab:orange", "tab:blue", "tab:gray")
    places = np.arange(len(classes))
    for number, (name, values) in enumerate(bars.items()):
        axes.barh(places + 0.2 * (number - 1.5), values, 0.2, color=colors[number], label=name)
