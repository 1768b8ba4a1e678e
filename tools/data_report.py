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
import re
import sys
from pathlib import Path
from typing import Any

from PIL import Image

THUMBNAIL = 128  # pixels
SHOWN = 60  # entries of a list that get thumbnails; all are counted
KNOWN = ("layout", "size", "notes", "splits")  # the rest are lists of what is doubtful
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
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" width="{small.width}" alt="">'


def table_of_splits(splits: dict[str, dict[str, Any]]) -> str:
    """Return the splits' counts as an html table."""
    names = ["split", "images", "patients", *map(str, range(5)), "without grade", "majority line"]
    rows = ["<tr>" + "".join(f"<th>{name}</th>" for name in names) + "</tr>"]
    for split, line in splits.items():
        majority = f"{line['majority']:.1%}" if "majority" in line else "-"
        cells = [split, line["images"], line["patients"], *line["by_grade"]]
        cells += [line["without_grade"], majority]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return "<table>" + "".join(rows) + "</table>"


def section(folder: Path, name: str, lines: list[str]) -> str:
    """Return a list's heading and its entries, with the pictures that each names."""
    parts = [f"<h2>{html.escape(name.replace('_', ' '))}: {len(lines)}</h2>"]
    for line in lines[:SHOWN]:
        paths = re.findall(r"images/.*?\.(?:jpg|png)(?= |$)", line)
        pictures = "".join(thumbnail(folder / path) for path in paths)
        caption = f"<figcaption>{html.escape(line)}</figcaption>"
        parts.append(f"<figure>{pictures}{caption}</figure>")
    if len(lines) > SHOWN:
        parts.append(f"<p>and {len(lines) - SHOWN} more, in data_report.json</p>")
    return "\n".join(parts)


def page(folder: Path, report: dict[str, Any]) -> str:
    """Return the whole page for a prepared folder and its report."""
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in report["notes"])
    doubts = {name: lines for name, lines in report.items() if name not in KNOWN}
    clear = [name.replace("_", " ") for name, lines in doubts.items() if not lines]
    title = html.escape(f"{folder.resolve().name}: {report['layout']}, {report['size']} px")
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>",
        f"<style>{STYLE}</style><h1>{title}</h1><ul>{notes}</ul>{table_of_splits(report['splits'])}",
        *(section(folder, name, lines) for name, lines in doubts.items() if lines),
        f"<p>None: {html.escape(', '.join(clear))}.</p>" if clear else "",
    ]
    return "\n".join(parts) + "\n"


def main() -> None:
    """Write the page of the folder named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder that prepare_data.py made")
    parser.add_argument("--out", type=Path, help="the page; data_report.html in it by default")
    o = parser.parse_args()
    try:
        report = json.loads((o.data / "data_report.json").read_text("utf-8"))
        text = page(o.data, report)
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"{o.data}: no report of prepare_data.py there ({type(error).__name__}: {error})")
    out = o.out or o.data / "data_report.html"
    out.write_text(text, encoding="utf-8")
    print(f"{out}: {len(text) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
