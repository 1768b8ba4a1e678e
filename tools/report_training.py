"""The part of the report on training: what was run, curves, pictures, attention on lesions."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

from tools.report_curves import charts
from tools.report_html import (
    Pictures,
    details,
    paragraph,
    show_command,
    show_entry,
    show_number,
    show_options,
    splits_table,
    table,
    text,
)
from tools.report_runs import Run, child, interval, number, short, words
from tools.report_verdict import collapses, data_of

MOST_SHEETS = 24  # of attention that a run shows
LESION_COLUMNS = (
    "lesion",
    "photographs",
    "lift",
    "lift of turned maps",
    "p",
    "pointing game",
    "of turned maps",
    "average precision",
    "of turned maps",
    "AP of a probe of tokens",
    "AP of a probe of colours",
    "chance",
)


def training(run: Run, pictures: Pictures) -> str:
    """Return what was trained and how it went: warnings, curves, crops, attention, options."""
    parts = [paragraph(f"{fault}.", "warn") for fault in run.faults]
    warnings = collapses(run)
    if warnings:
        listed = "".join(f"<li>{text(warning)}</li>" for warning in warnings)
        parts.append(f'<div class="warn"><p>Warnings of a collapse:</p><ul>{listed}</ul></div>')
    if run.first or run.log:
        parts.append(show_options(facts(run), "What was run"))
    else:
        parts.append(paragraph("No log of a training lies here."))
    curves = charts(run.log)
    if curves:
        parts.append(f'<h4>Curves</h4><div class="charts">{"".join(curves)}</div>')
    parts.append(lesion_tables(run))
    parts.append(photographs(run, pictures))
    if data_of(run):
        parts.append(splits_table(data_of(run)))
    inside = ""
    if run.config:
        inside += show_options(run.config, "config.yaml")
    if child(run.first, "versions"):
        inside += show_options(child(run.first, "versions"), "versions")
    inside += show_command(run.first)
    if inside:
        parts.append(details("options, versions and command", inside))
    return "\n".join(part for part in parts if part)


def facts(run: Run) -> dict[str, Any]:
    """Return the main facts of a training, by what they are called."""
    options = run.config or child(run.first, "options")
    found = {}
    for name in ("arch", "patch_size", "init", "epochs", "batch_size", "data"):
        if name in options:
            found[name.replace("_", " ")] = options[name]
    found["fingerprint of the data"] = words(run.first.get("data")) or "not known"
    found["device"] = words(child(run.first, "versions").get("device")) or "not known"
    reached = [one for one in run.log if number(one.get("epoch")) is not None]
    if reached:
        found["reached"] = (
            f"step {words(reached[-1].get('step'))}, epoch {reached[-1]['epoch']:.4g}"
        )
    speeds = [number(one.get("images_per_s")) for one in run.log]
    known = [speed for speed in speeds if speed]
    if known:
        found["photographs a second (median)"] = f"{statistics.median(known):.3g}"
    seconds = training_seconds(run)
    if seconds:
        found["time that the steps took"] = f"{duration(seconds)}, as the logged speeds add up"
    return found


def training_seconds(run: Run) -> float:
    """Return how long the steps took, from the steps and the speed of each interval of the log.

    What an epoch ends with (RankMe, k-NN, checkpoints) is left out; 0 where the log does not tell.
    """
    options = child(run.first, "options")
    batch = 1.0
    for name in ("batch_size", "accumulate", "processes"):
        batch *= number(options.get(name, 1)) or 0
    total = 0.0
    before = 0.0
    for record in run.log:
        speed = number(record.get("images_per_s"))
        step = number(record.get("step"))
        if speed and step is not None and speed > 0:
            total += max(0.0, step - before) * batch / speed
            before = step
    return total


def duration(seconds: float) -> str:
    """Return a time in the two units that tell it."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes_left} min"
    if minutes:
        return f"{minutes} min {rest} s"
    return f"{rest} s"


def photographs(run: Run, pictures: Pictures) -> str:
    """Return the first batch's crops and the sheets of attention, with what was left out."""
    parts = []
    crops = run.folder / "crops.png"
    if crops.is_file():
        parts.append(pictures.embed(crops, "Crops of the first batch, as the networks see them"))
    sheets = attention_sheets(run.folder)
    for path in sheets[:MOST_SHEETS]:
        parts.append(pictures.embed(path, f"{path.parent.name}: {path.stem}"))
    if not parts:
        return ""
    note = "These show photographs: who may see this page depends on the rules of their data set."
    left_out = max(0, len(sheets) - MOST_SHEETS) + pictures.left_out
    if left_out:
        note += f" {left_out} pictures were left out; they lie in the folder of the run."
    inside = f'<div class="pictures">{"".join(parts)}</div>'
    return f"<h4>Photographs</h4>{inside}{paragraph(note, 'soft')}"


def attention_sheets(folder: Path) -> list[Path]:
    """Return the pictures of attention, one a photograph: without the parts that a sheet joins."""
    sheets = []
    for path in sorted(folder.glob("attention*/*.png")):
        part = re.fullmatch(r"(.+)_(head\d+|mean|mask|overlay)", path.stem)
        if not part or not path.with_name(f"{part[1]}.png").is_file():
            sheets.append(path)
    return sheets


# ----------------------------------------------------------------------------- attention on lesions
def lesion_tables(run: Run) -> str:
    """Return what visualize_attention.py --masks found, a table for each folder; "" if none."""
    parts = []
    for file in sorted(run.folder.glob("*/lesions.json")):
        place = file.parent.name
        try:
            found = json.loads(file.read_text("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            parts.append(
                paragraph(f"{place}/lesions.json cannot be read ({short(error)}).", "warn")
            )
            continue
        rows = []
        classes = child(found, "classes")
        for lesion in classes:
            rows.append(_lesion_row(lesion, child(classes, lesion)))
        if rows:
            parts.append(table(LESION_COLUMNS, rows, f"{place}: [CLS] attention on lesions"))
    if not parts:
        return ""
    note = (
        "Lift is the share of attention on a lesion over its share of the fundus; turned maps are "
        "the null, turned about the optic disc. Probes are logistic units on frozen patch tokens, "
        "or on colours alone; average precision over held-out patients."
    )
    return f"<h4>Attention on lesions</h4>{''.join(parts)}{paragraph(note, 'soft')}"


def _lesion_row(lesion: str, summary: dict[str, Any]) -> list[str]:
    """Return one class' row of LESION_COLUMNS as html cells."""
    lift = child(child(summary, "lift"), "mean")
    cells = [text(lesion.replace("_", " ")), text(summary.get("photographs"))]
    cells.append(show_entry(lift))
    cells.append(_show_range(child(lift, "null").get("ci95")))
    cells.append(show_number(lift.get("p")))
    for measure in ("pointing", "ap"):
        entry = child(child(summary, measure), "mean")
        cells.append(show_number(entry.get("value")))
        cells.append(show_number(child(entry, "null").get("mean")))
    probe = child(summary, "probe")
    for name in ("tokens", "color"):
        entry = child(probe, name)
        cells.append(show_entry({**entry, "value": entry.get("ap")}))
    cells.append(show_number(probe.get("prevalence")))
    return cells


def _show_range(value: Any) -> str:
    """Return an interval alone, a dash where there is none."""
    limits = interval(value)
    if not limits:
        return "-"
    return f"[{limits[0]:.3f}, {limits[1]:.3f}]"
