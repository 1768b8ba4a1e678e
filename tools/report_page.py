"""The report as one html page: verdict, table, every evaluation, training.

It is made from what runs wrote, and shows what is there: evaluations older than a field lack it,
damaged ones are named with their fault.
"""

from __future__ import annotations

from typing import Any

from fundus.metrics import METRICS
from tools.report_compare import NO_POINTS, Comparison, compare, comparison_header, comparison_rows
from tools.report_html import (
    Pictures,
    describe_set,
    details,
    document,
    paragraph,
    show_command,
    show_confusion,
    show_entry,
    show_number,
    show_options,
    show_records,
    table,
    text,
)
from tools.report_runs import Evaluation, Run, child, children, identify_test_set, remarks, words
from tools.report_table import COLUMNS, table_rows
from tools.report_training import training
from tools.report_verdict import verdict
from utils import InputError

TITLES = {metric.name: metric.title for metric in METRICS}
MAIN = (*COLUMNS, "macro_f1", "referable_ap", "log_loss")
# Accuracies on EyePACS' 53,576 test photographs as arXiv 2410.00779 reports them, and nothing else.
PUBLISHED = (
    ("always grade 0", 0.738),
    ("k-NN, k = 15, architecture not stated", 0.7436),
    ("linear probe, ViT-S/8, best epoch on test", 0.791),
    ("linear probe, ViT-S/16, best epoch on test", 0.774),
    ("linear probe, ViT-B/8, best epoch on test", 0.766),
    ("linear probe, ViT-B/16, best epoch on test", 0.770),
)
LISTS = {
    "by_k": "by the number of neighbours",
    "by_hyperparameter": "by setting, as the choice saw them",
    "by_fraction": "by the share of labelled patients",
    "by_fold": "by fold",
}


def page(runs: list[Run]) -> str:
    """Return the whole page of one or more runs."""
    pictures = Pictures()
    names = ", ".join(run.name for run in runs)
    sections = [("verdict", "What the numbers say", verdicts(runs))]
    sections.append(("table", "All evaluations", main_table(runs)))
    if len(runs) > 1:
        sections.append(("side-by-side", "Side by side", side_by_side(runs)))
        sections.append(("differences", "Paired differences", paired_differences(runs)))
    contents = []
    for place, run in enumerate(runs, start=1):
        suffix = ""
        if len(runs) > 1:
            suffix = f" of {run.name}"
        title, anchor = f"Evaluations{suffix}", f"evaluations-{place}"
        body, links = evaluation_sections(run, place, pictures)
        sections.append((anchor, title, body))
        contents.append((anchor, links))
        title, anchor = f"Training{suffix}", f"training-{place}"
        sections.append((anchor, title, training(run, pictures)))
    parts = [f"<h1>Report on {text(names)}</h1>", table_of_contents(sections, dict(contents))]
    for anchor, title, body in sections:
        parts.append(f'<section><h2 id="{anchor}">{text(title)}</h2>\n{body}</section>')
    parts.append(
        paragraph("Not a medical device. Synthetic data say nothing about patients.", "soft")
    )
    return document(f"Report on {names}", "\n".join(parts))


def table_of_contents(
    sections: list[tuple[str, str, str]], inner: dict[str, list[tuple[str, str]]]
) -> str:
    """Return links to the sections, and to the evaluations within them."""
    lines = []
    for anchor, title, _ in sections:
        line = f'<li><a href="#{anchor}">{text(title)}</a>'
        links = inner.get(anchor, [])
        if links:
            entries = "".join(f'<li><a href="#{id_}">{text(name)}</a></li>' for id_, name in links)
            line += f"<ul>{entries}</ul>"
        lines.append(f"{line}</li>")
    return f'<nav aria-label="Contents"><ul>{"".join(lines)}</ul></nav>'


def verdicts(runs: list[Run]) -> str:
    """Return a paragraph for each run."""
    return "".join(paragraph(verdict(run), "verdict") for run in runs)


# ------------------------------------------------------------------------------------------ tables
def main_table(runs: list[Run]) -> str:
    """Return the table of all evaluations, and below it the published accuracies."""
    rows = []
    kinds = []
    for row in table_rows(runs):
        cells = [text(row.title), text(row.images)]
        cells += [show_entry(row.entries.get(name)) for name in MAIN]
        rows.append(cells)
        is_base = row.evaluation is None or row.evaluation.is_baseline
        kinds.append("base" if is_base else "")
    header = ["evaluation", "n", *(TITLES[name] for name in MAIN)]
    caption = "Brackets hold 95 % intervals over patients. Log loss: lower is better."
    note = "Grey rows are what the others are held against."
    parts = [table(header, rows, caption, row_kinds=kinds), paragraph(note, "soft")]
    return "".join([*parts, published_table()])


def published_table() -> str:
    """Return the accuracies that the paper reports, and with what they compare."""
    rows = [[text(title), f"{accuracy:.3f}"] for title, accuracy in PUBLISHED]
    caption = "Published (arXiv 2410.00779): EyePACS, 53,576 test photographs"
    note = "The paper reports accuracy alone. It compares only with these same photographs."
    return table(["method", "accuracy"], rows, caption) + paragraph(note, "soft")


def side_by_side(runs: list[Run]) -> str:
    """Return, for each evaluation that several runs have, its metrics with a column a run."""
    parts = []
    for name in shared_names(runs):
        owners = [run for run in runs if run.find(name)]
        results = [run.find(name).results for run in owners]
        rows = []
        for metric in metric_names(results):
            cells = [text(TITLES.get(metric, metric))]
            cells += [show_entry(child(one, "metrics").get(metric)) for one in results]
            rows.append(cells)
        parts.append(f"<h3>{text(name)}</h3>")
        if len({identify_test_set(one) for one in results}) > 1:
            parts.append(paragraph("These are of different test photographs.", "warn"))
        header = ["metric", *(run.name for run in owners)]
        parts.append(table(header, rows, f"{name}, run by run"))
    return "".join(parts) or paragraph("No evaluation has the same name in two runs.")


def shared_names(runs: list[Run]) -> list[str]:
    """Return the names of the evaluations that at least two runs have, but for folds."""
    names = []
    for run in runs:
        for evaluation in run.evaluations:
            owners = [one for one in runs if one.find(evaluation.name)]
            if len(owners) > 1 and not evaluation.whole and evaluation.name not in names:
                names.append(evaluation.name)
    return names


def metric_names(every: list[dict[str, Any]]) -> list[str]:
    """Return the names of all metrics in some results: those that we know, then others."""
    found: set[str] = set()
    for results in every:
        for part in (results, child(results, "thresholded")):
            found |= set(child(part, "metrics"))
        found |= set(child(results, "patients")) | set(child(results, "validation"))
    return [name for name in TITLES if name in found] + sorted(found - set(TITLES))


# -------------------------------------------------------------------------------------- differences
def paired_differences(runs: list[Run]) -> str:
    """Return what each other run differs by from the first, evaluation by evaluation."""
    first, *others = runs
    parts = [
        paragraph(
            f"A is {first.name}, B the other run. Patients are drawn for both at once. {NO_POINTS}"
        )
    ]
    for other in others:
        for name in shared_names([first, other]):
            title = f"{name}: {first.name} less {other.name}"
            parts.append(f"<h3>{text(title)}</h3>")
            folders = [[run.find(name).folder] for run in (first, other)]
            try:
                found = compare(folders[0], folders[1], MAIN)
            except InputError as error:
                parts.append(paragraph(f"No paired difference: {error}"))
                continue
            parts.append(comparison_tables(found, title))
    return "".join(parts)


def comparison_tables(found: Comparison, title: str) -> str:
    """Return the differences of two evaluations as tables, one for each reading."""
    parts = []
    for name, entries in found.parts.items():
        rows = []
        for cells in comparison_rows(entries):
            rows.append([text(cell) for cell in cells])
        caption = f"{title}; {name}; {found.images} photographs of {found.patients} patients"
        parts.append(table(comparison_header(), rows, caption))
    return "".join(parts)


def comparison_page(found: Comparison) -> str:
    """Return a page on one comparison."""
    title = f"{found.name_a} against {found.name_b}"
    about = (
        f"A is {found.name_a}, B is {found.name_b}: {found.images} test photographs of "
        f"{found.patients} patients, drawn for both at once. Values of several seeds are means; "
        f"the interval is that of the mean over patients, the spread that over seeds. {NO_POINTS}"
    )
    body = f"<h1>{text(title)}</h1>{paragraph(about)}{comparison_tables(found, title)}"
    return document(title, body)


# ------------------------------------------------------------------------------------- evaluations
def evaluation_sections(
    run: Run, place: int, pictures: Pictures
) -> tuple[str, list[tuple[str, str]]]:
    """Return all evaluations of a run as html, and (id, name) of each; folds stand in their whole.

    `place` is the run's number on the page, from which the ids come.
    """
    parts = []
    links = []
    for number_, evaluation in enumerate(run.evaluations, start=1):
        if evaluation.whole and run.find(evaluation.whole):
            continue
        anchor = f"evaluation-{place}-{number_}"
        links.append((anchor, evaluation.name))
        title = evaluation.name
        for remark in remarks(evaluation, run):
            title += f" ({remark})"
        parts.append(f'<h3 id="{anchor}">{text(title)}</h3>')
        parts.append(evaluation_body(evaluation, pictures))
        for fold in run.evaluations:
            if fold.whole == evaluation.name:
                parts.append(details(fold.name, evaluation_body(fold, pictures)))
    if not parts:
        parts.append(paragraph("None yet: run eval_knn.py and eval_linear.py on this run."))
    return "\n".join(parts), links


def evaluation_body(evaluation: Evaluation, pictures: Pictures) -> str:
    """Return one evaluation: protocol, metrics, confusion, tables, pictures, how it was made."""
    results = evaluation.results
    if evaluation.fault:
        return paragraph(f"{evaluation.fault}; evaluate again.", "warn")
    parts = []
    if evaluation.protocol:
        parts.append(paragraph(evaluation.protocol))
    parts.append(about_choice(evaluation))
    parts.append(about_seen(results))
    parts.append(metrics_table(results))
    matrices = show_confusion(results.get("confusion"), "Most probable grade: photographs")
    thresholded = child(results, "thresholded")
    matrices += show_confusion(thresholded.get("confusion"), "Grades by thresholds: photographs")
    if matrices:
        parts.append(f'<div class="two">{matrices}</div>')
    shown = []
    for path in sorted(evaluation.folder.glob("*.png")):
        if path.stem == "confusion":
            continue  # the tables above say the same
        shown.append(pictures.embed(path, f"{evaluation.name}: {path.stem.replace('_', ' ')}"))
    if shown:
        parts.append(f'<div class="pictures">{"".join(shown)}</div>')
    parts.append(detail_tables(results))
    parts.append(provenance(results))
    return "\n".join(part for part in parts if part)


def about_choice(evaluation: Evaluation) -> str:
    """Return on which photographs an evaluation stands, and among how many settings it chose."""
    results = evaluation.results
    data = child(results, "data")
    sentence = f"Test: {describe_set(child(data, 'test'))}."
    if data.get("test_path"):
        sentence += f" They are of another set, {words(data['test_path'])}; nothing was refitted."
    candidates = words(results.get("candidates"))
    if candidates and evaluation.is_chosen_on_test:
        sentence += f" Of {candidates} epochs the best on these photographs was taken."
    elif candidates:
        sentence += f" The choice was among {candidates} candidates, on the photographs of the "
        sentence += "column validation."
    thresholds = children(child(results, "thresholded"), "thresholds")
    if thresholds:
        shown = ", ".join(show_number(one) for one in thresholds)
        sentence += f" Thresholds of the expected grade: {shown}."
    return paragraph(sentence, "soft")


def about_seen(results: dict[str, Any]) -> str:
    """Return a warning where photographs of the test had been seen in training, with their list."""
    paths = children(child(results, "seen"), "photographs")
    if not paths:
        return ""
    warning = f"{len(paths)} test photographs had been seen in training, which --allow-seen let in."
    listed = "".join(f"<li>{text(path)}</li>" for path in paths)
    return paragraph(warning, "warn") + details("which they are", f"<ul>{listed}</ul>")


def metrics_table(results: dict[str, Any]) -> str:
    """Return every metric of an evaluation, with a column for each reading that it has."""
    columns = {"test": child(results, "metrics")}
    thresholded = child(child(results, "thresholded"), "metrics")
    if thresholded:
        columns["by thresholds"] = thresholded
    if child(results, "patients"):
        columns["by patient, worse eye"] = child(results, "patients")
    if child(results, "mean_of_folds"):
        columns["mean of folds"] = child(results, "mean_of_folds")
    plain = {}
    if child(results, "validation"):
        plain["validation"] = child(results, "validation")
    plain["always one grade"] = child(results, "majority")

    rows = []
    for name in metric_names([results]):
        cells = [text(TITLES.get(name, name))]
        held = name.rpartition("_")[2]
        for entries in columns.values():
            # An operating point says what it holds; a metric that a reading lacks has a blank.
            cells.append(show_entry(entries[name], held) if name in entries else "")
        for values in plain.values():
            cells.append(show_number(values[name]) if name in values else "")
        rows.append(cells)
    if not rows:
        return paragraph("results.json holds no metrics.", "warn")
    caption = "All metrics, with 95 % intervals; a blank where a reading has none"
    return table(["metric", *columns, *plain], rows, caption)


def detail_tables(results: dict[str, Any]) -> str:
    """Return the lists of an evaluation as tables that are closed at first."""
    parts = []
    for name, title in LISTS.items():
        records = children(results, name)
        if records:
            body = show_records(records, f"{name}: {title}", TITLES)
            parts.append(details(f"{title} ({len(records)})", body))
    titles = {"confidence": "highest probability", "referable": "score of referable DR"}
    for name, title in titles.items():
        bins = [one for one in children(child(results, "reliability"), name)]
        filled = [one for one in bins if isinstance(one, dict) and one.get("images")]
        if filled:
            body = show_records(filled, f"Reliability of the {title}; empty bins left out", {})
            parts.append(details(f"reliability of the {title}", body))
    return "".join(parts)


def provenance(results: dict[str, Any]) -> str:
    """Return settings, weights, data, versions and command of an evaluation, closed at first."""
    parts = []
    for name in ("settings", "backbone", "versions"):
        if child(results, name):
            parts.append(show_options(child(results, name), name))
    data = child(results, "data")
    about = {name: data[name] for name in data if not isinstance(data[name], dict)}
    if about:
        parts.append(show_options(about, "data"))
    parts.append(show_command(results))
    return details("settings, weights, versions and command", "".join(parts))
