"""Draw what prepare_data.py found in a data set as one self-contained html page.

    python -m tools.data_report DATA [--out PAGE.html]

Reads DATA/data_report.json and the pictures that it names, writes DATA/data_report.html: notes, the
grades of each split beside the majority line, and thumbnails of all that is doubtful. It shows
photographs: who may see them depends on the data set's rules.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image

THUMBNAIL = 128  # pixels of the longer side
SHOWN = 60  # entries of a list that get thumbnails; all are counted

# What each list means, and what to do about it.
ABOUT = {
    "doubtful_crops": "no fundus was found, so the whole image stays: look whether it is gradable",
    "near_black": "hardly brighter than 22 of 255: kept; drop its row if it is not gradable",
    "blank": "without contrast in its middle: kept; drop its row if it is not gradable",
    "truncated": "cut off, taken because of --allow-truncated: grey where its end is missing",
    "copies": "one picture twice (likeness; 1: the same file): kept, in one split where we split",
    "copies_of_other_patients": "one picture under two patients: one of the names is wrong",
    "copies_in_other_splits": "a published split leaks: leave one of the two out",
    "copies_with_other_grades": "one picture with two grades: one of them is wrong",
    "unreadable": "left out: copy or download them again and repeat the command",
}

STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem}
table{border-collapse:collapse}td,th{padding:.25rem .8rem;border-bottom:1px solid #d8dde4}
td,th{text-align:right}td:first-child,th:first-child{text-align:left}h2{margin-top:2rem}
figure{display:inline-block;margin:.4rem;vertical-align:top;max-width:18rem}img{margin-right:2px}
figcaption{font-size:12px;overflow-wrap:anywhere}"""


def thumbnail(path: Path) -> str:
    """Return an <img> with the picture inside; a remark where it cannot be read."""
    try:
        with Image.open(path) as image:
            small = image.convert("RGB")
            small.thumbnail((THUMBNAIL, THUMBNAIL))
    except OSError:
        return "<em>(no picture)</em>"
    # As data within the page: one file can be sent, and opened without the folder.
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" width="{small.width}" alt="">'


def table_of_splits(splits: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the splits' counts as an html table."""
    # The report knows how many grades there are; this tool imports nothing that does.
    grades = max(len(counts["by_grade"]) for counts in splits.values())
    names = ["split", "images", "patients", *range(grades), "without grade", "majority line"]
    rows = [_table_row("th", names)]
    for split, counts in splits.items():
        # A split without grades has no majority line.
        majority = "-"
        if "majority" in counts:
            majority = f"{counts['majority']:.1%}"
        cells = [split, counts["images"], counts["patients"], *counts["by_grade"]]
        cells += [counts["without_grade"], majority]
        rows.append(_table_row("td", cells))
    return f"<table>{''.join(rows)}</table>"


def _table_row(tag: str, cells: Iterable[object]) -> str:
    """Return a row of an html table; `tag` is th for a header, else td."""
    return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"


def section(folder: Path, name: str, entries: Sequence[Mapping[str, Any]]) -> str:
    """Return a list's heading, what it means, and its entries with the pictures of each."""
    parts = [f"<h2>{html.escape(name.replace('_', ' '))}: {len(entries)}</h2>"]
    # Lists that notes of a data set count explain themselves by their names.
    if name in ABOUT:
        parts.append(f"<p>{ABOUT[name]}</p>")
    for entry in entries[:SHOWN]:
        pictures = [thumbnail(folder / path) for path in entry["pictures"]]
        caption = f"<figcaption>{html.escape(entry['text'])}</figcaption>"
        parts.append(f"<figure>{''.join(pictures)}{caption}</figure>")
    if len(entries) > SHOWN:
        parts.append(f"<p>and {len(entries) - SHOWN} more, in data_report.json</p>")
    return "\n".join(parts)


def page(folder: Path, report: Mapping[str, Any]) -> str:
    """Return the whole page for a prepared folder and its report."""
    title = html.escape(f"{folder.resolve().name}: {report['layout']}, {report['size']} px")
    notes = [f"<li>{html.escape(note)}</li>" for note in report["notes"]]
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>",
        f"<style>{STYLE}</style><h1>{title}</h1><ul>{''.join(notes)}</ul>",
        table_of_splits(report["splits"]),
        "<p>Majority line: the accuracy of always answering train's most frequent grade.</p>",
    ]

    # Empty lists share one line at the end, which says that somebody looked.
    empty = []
    for name, entries in report["doubts"].items():
        if entries:
            parts.append(section(folder, name, entries))
        else:
            empty.append(name.replace("_", " "))
    if empty:
        parts.append(f"<p>None: {html.escape(', '.join(empty))}.</p>")
    return "\n".join(parts) + "\n"


def main() -> None:
    """Write the page of the folder named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder that prepare_data.py made")
    parser.add_argument("--out", type=Path, help="the page; data_report.html in it by default")
    options = parser.parse_args()

    # Another json under this name fails somewhere on the way, by any of these errors.
    try:
        report = json.loads((options.data / "data_report.json").read_text("utf-8"))
        text = page(options.data, report)
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"no report of prepare_data.py there ({type(error).__name__}: {error})"
        refuse(f"{options.data}: {what}")

    out = options.out or options.data / "data_report.html"
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        refuse(f"--out {out}: cannot be written ({error.strerror})")
    print(f"{out}: {len(text) / 1e3:.0f} kB")


def refuse(message: str) -> NoReturn:
    """End with the exit code of user and data errors."""
    print(message, file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
