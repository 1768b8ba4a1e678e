"""Pieces of a self-contained html page: text, tables, entries of metrics, pictures, the frame.

Functions return html, and take html where a parameter is named so (`cells`, `body`); whatever
comes from files goes through `text` first, which escapes it.
"""

from __future__ import annotations

import base64
import html
import io
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tools.report_runs import child, children, interval, number, words

LARGEST_SIDE = 1200  # pixels of an embedded picture
LARGEST_PNG = 300_000  # bytes of one that is embedded as it is
MOST_BYTES = 20_000_000  # of all pictures of a page
# Nothing is loaded from anywhere, and nothing runs, whatever a file's text says.
POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'"
)

STYLE = """
:root{color-scheme:light dark;--ink:#1b2430;--soft:#55606e;--page:#fff;--line:#d3d9e0;
--pale:#f3f5f8;--c0:#0b62a8;--c1:#b3541e;--c2:#2b7a4b;--warn:#fff1d6;--warnline:#b07400;--shade:46,110,190}
@media(prefers-color-scheme:dark){:root{--ink:#e4e8ee;--soft:#a5b0bd;--page:#14181d;--line:#39424d;
--pale:#1e242c;--c0:#6cb4f0;--c1:#f0a06c;--c2:#7fd0a0;--warn:#3a2e12;--warnline:#d9a03a}}
*{box-sizing:border-box}
body{font:16px/1.55 system-ui,sans-serif;color:var(--ink);background:var(--page);margin:0 auto;
max-width:76rem;padding:1rem;overflow-wrap:anywhere}
table{overflow-wrap:normal}th[scope=row],.names td{overflow-wrap:anywhere}
h1{font-size:1.6rem;line-height:1.25}h2{margin-top:2.5rem;border-bottom:2px solid var(--line)}
h3{margin-top:2rem}h4{margin:1.5rem 0 .4rem}a{color:var(--c0)}
.verdict{font-size:1.1rem;max-width:52rem;border-left:4px solid var(--c0);padding-left:1rem}
.soft{color:var(--soft);font-size:.9rem}.warn{background:var(--warn);
border-left:4px solid var(--warnline);padding:.5rem 1rem;max-width:52rem}
nav ul{padding-left:1.2rem;margin:.2rem 0}p,li{max-width:52rem}
.wide{overflow-x:auto;max-width:100%;margin:.6rem 0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem}
caption{text-align:left;color:var(--soft);padding:.2rem 0}
th,td{padding:.3rem .7rem;border-bottom:1px solid var(--line);text-align:right;vertical-align:top}
thead th{background:var(--pale);vertical-align:bottom}
th[scope=row],thead th:first-child{text-align:left;font-weight:600;min-width:9rem}
.names td{text-align:left;min-width:9rem}
tr.base{color:var(--soft)}tr.base th{font-weight:400}
.ci,.why{display:block;color:var(--soft);font-size:.9em;white-space:nowrap}
.why{white-space:normal;min-width:9rem}
.matrix td{text-align:center;min-width:3.6rem;border:1px solid var(--line)}
.two{display:flex;flex-wrap:wrap;gap:0 2.5rem}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,26rem),1fr));gap:1rem}
.pictures{display:flex;flex-wrap:wrap;gap:1rem;align-items:flex-start}
.pictures figure{max-width:min(100%,34rem)}
figure{margin:0}figcaption{font-size:.9rem;margin-bottom:.2rem}img{max-width:100%;height:auto}
svg{display:block;width:100%;height:auto}svg text{fill:var(--soft);font:13px system-ui,sans-serif}
.grid{stroke:var(--line);fill:none}.zero{stroke:var(--soft);fill:none;stroke-dasharray:4 3}
.curve{fill:none;stroke-width:2;stroke-linejoin:round}
.curve.c0{stroke:var(--c0)}.curve.c1{stroke:var(--c1);stroke-dasharray:7 4}
.curve.c2{stroke:var(--c2);stroke-dasharray:2 3}
.dot.c0{fill:var(--c0)}.dot.c1{fill:var(--c1)}.dot.c2{fill:var(--c2)}
.key{display:block}.mark{display:inline-block;width:1.6em;margin-right:.4em;vertical-align:middle;
border-top:3px solid}.m0{color:var(--c0)}.m1{color:var(--c1);border-top-style:dashed}
.m2{color:var(--c2);border-top-style:dotted}
details{margin:.6rem 0}summary{cursor:pointer}pre,code{font-size:.85rem}
pre{white-space:pre-wrap;background:var(--pale);padding:.5rem}
@media print{body{max-width:none;font-size:10pt;padding:0}.wide{overflow:visible}nav{display:none}
.pictures figure{max-width:48%}
table{font-size:7.5pt}th,td{padding:.15rem .35rem}th[scope=row],.names td,.why{min-width:0}
.ci{white-space:normal}figure,tr,.matrix{break-inside:avoid}h2,h3,h4,caption{break-after:avoid}
.charts{grid-template-columns:1fr 1fr}a{color:inherit;text-decoration:none}}
"""


def document(title: str, body: str) -> str:
    """Return a whole page; `title` is plain text, `body` html."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def text(value: Any) -> str:
    """Return a value as escaped text, for an element or an attribute in double quotes."""
    # A lone surrogate, which JSON can hold, has no form in a file.
    return html.escape(words(value)).encode("utf-8", "replace").decode()


def paragraph(value: str, kind: str = "") -> str:
    """Return plain text as a paragraph of a class of the style sheet."""
    if not kind:
        return f"<p>{text(value)}</p>"
    return f'<p class="{kind}">{text(value)}</p>'


def details(summary: str, body: str) -> str:
    """Return a part that is closed at first; `summary` is plain text."""
    return f"<details><summary>{text(summary)}</summary>{body}</details>"


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    caption: str,
    *,
    kind: str = "",
    row_kinds: Sequence[str] = (),
) -> str:
    """Return a table in a box that scrolls by itself; the first cell of a row is its heading.

    `header` and `caption` are plain text; cells are html. `row_kinds` are classes of the rows.
    """
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in header)
    lines = []
    for place, cells in enumerate(rows):
        first, *others = cells
        line = f'<th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in others)
        opening = "<tr>"
        if place < len(row_kinds) and row_kinds[place]:
            opening = f'<tr class="{row_kinds[place]}">'
        lines.append(f"{opening}{line}</tr>")
    opening = "<table>"
    if kind:
        opening = f'<table class="{kind}">'
    inside = f"<caption>{text(caption)}</caption><thead><tr>{head}</tr></thead>"
    body = f"{opening}{inside}<tbody>{''.join(lines)}</tbody></table>"
    # Focusable, so that a keyboard can scroll it.
    label = f'role="region" aria-label="{text(caption)}"'
    return f'<div class="wide" tabindex="0" {label}>{body}</div>'


# ---------------------------------------------------------------------------------- what files hold
def show_number(value: Any) -> str:
    """Return a number with three digits behind the point, or four in all where it is small."""
    found = number(value)
    if found is None:
        return "-"
    if isinstance(value, int):
        return f"{value}"[:20]
    if found != 0 and (abs(found) < 0.01 or abs(found) >= 1e5):
        return f"{found:.4g}"
    return f"{found:.3f}"


def show_entry(entry: Any, held: str = "") -> str:
    """Return a metric's entry as html: value, interval, and what there is to know about it.

    `held` is what validation holds at an operating point: sensitivity or specificity.
    """
    if not isinstance(entry, dict):
        return "-"
    value = number(entry.get("value"))
    if value is None:
        return f"-{_why(entry.get('reason'))}"
    shown = f"{value:.3f}"
    limits = interval(entry.get("ci95"))
    if limits:
        shown += f'<span class="ci">[{limits[0]:.3f}, {limits[1]:.3f}]</span>'
    elif entry.get("no_interval"):
        shown += _why(f"no interval: {words(entry['no_interval'])}")
    spread = number(entry.get("sd"))
    if spread is not None:
        shown += _why(f"sd {spread:.3f}")
    draws = number(entry.get("undefined_draws"))
    if draws:
        shown += _why(f"undefined in {draws:.0f} of the draws")
    threshold = number(entry.get("threshold"))
    if threshold is not None:
        achieved = show_number(entry.get("achieved"))
        shown += _why(f"score from {threshold:.4g}; {held or 'what is held'} here {achieved}")
    return shown


def _why(reason: Any) -> str:
    """Return a remark below a value, nothing where there is none."""
    if not reason:
        return ""
    return f'<span class="why">{text(reason)}</span>'


def show_records(records: list[Any], caption: str, titles: dict[str, str]) -> str:
    """Return a list of objects as a table with a column for each name that occurs in them."""
    names: list[str] = []
    objects = [record for record in records if isinstance(record, dict) and record]
    for record in objects:
        names += [name for name in record if name not in names]
    rows = []
    for record in objects:
        rows.append([_show_value(record.get(name)) for name in names])
    return table([titles.get(name, name.replace("_", " ")) for name in names], rows, caption)


def _show_value(value: Any) -> str:
    """Return a value of a table as html: a number, a mean over seeds, an entry, or as JSON."""
    if isinstance(value, dict) and number(value.get("mean")) is not None:
        spread = number(value.get("sd"))
        if spread is None:
            return show_number(value["mean"])
        return f"{show_number(value['mean'])} &plusmn; {show_number(spread)}"
    if isinstance(value, dict) and "value" in value:
        return show_entry(value)
    if number(value) is not None:
        return show_number(value)
    if value is None:
        return "-"
    return text(words(value)[:200])


def show_confusion(matrix: Any, caption: str) -> str:
    """Return a confusion matrix with shaded cells, truth in rows; "" where it is no matrix."""
    rows = []
    if not isinstance(matrix, list):
        return ""
    for grade, counts in enumerate(matrix):
        if not isinstance(counts, list) or any(number(count) is None for count in counts):
            return ""
        total = sum(counts)
        cells = [f"grade {grade}"]
        for count in counts:
            share = 0.0
            if total > 0:
                share = max(0.0, min(1.0, count / total))
            # Half as strong as it could be: text stays readable on every shade, in both schemes.
            shade = f"background:rgba(var(--shade),{share / 2:.2f})"
            percent = f'<span class="ci">{share:.0%}</span>'
            cells.append(f'<span style="{shade};display:block">{count:g}{percent}</span>')
        rows.append([*cells, f"{total:g}"])
    width = max((len(row) for row in rows), default=0)
    if width < 2 or any(len(row) != width for row in rows):
        return ""
    header = ["truth", *(f"said {grade}" for grade in range(width - 2)), "images"]
    return table(header, rows, caption, kind="matrix")


def show_options(options: dict[str, Any], caption: str) -> str:
    """Return options and their values as a table."""
    rows = []
    for name, value in options.items():
        rows.append([text(name), text(value)])
    return table(["option", "value"], rows, caption, kind="names")


def describe_set(counts: dict[str, Any]) -> str:
    """Return the counts of a split in words, as plain text."""
    parts = []
    for name, title in (("images", "photographs"), ("patients", "patients")):
        if number(counts.get(name)) is not None:
            parts.append(f"{counts[name]} {title}")
    grades = children(counts, "by_grade")
    if grades:
        parts.append(f"by grade {' / '.join(words(count) for count in grades)}")
    return ", ".join(parts) or "not counted"


def splits_table(data: dict[str, Any]) -> str:
    """Return the counts of train, val and test as a table."""
    rows = []
    grades = max([len(children(child(data, split), "by_grade")) for split in data], default=0)
    for split in ("train", "val", "test"):
        counts = child(data, split)
        by_grade = [text(count) for count in children(counts, "by_grade")]
        by_grade += ["-"] * (grades - len(by_grade))
        images = text(counts.get("images")) or "-"
        patients = text(counts.get("patients")) or "-"
        rows.append([split, images, patients, *by_grade])
    header = ["split", "photographs", "patients", *(f"grade {grade}" for grade in range(grades))]
    return table(header, rows, "The splits, disjoint by patient")


def show_command(holder: dict[str, Any]) -> str:
    """Return the command that wrote a file, "" where it does not say."""
    command = children(holder, "command")
    if not command:
        return ""
    return f"<pre>python {text(shlex.join(words(word) for word in command))}</pre>"


# ------------------------------------------------------------------------------------- pictures
class Pictures:
    """Embeds pictures, up to a number of bytes for the whole page; counts what was left out."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.room = most_bytes
        self.left_out = 0

    def embed(self, path: Path, alt: str) -> str:
        """Return a figure with the picture inside the page; a remark where it cannot be read."""
        caption = f"<figcaption>{text(alt)}</figcaption>"
        try:
            data, kind, (width, height) = _encode(path)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return f"<figure>{caption}<em>(cannot be read)</em></figure>"
        if len(data) > self.room:
            self.left_out += 1
            return ""
        self.room -= len(data)
        source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        # With its size, so that nothing moves while a page loads.
        size = f'width="{width}" height="{height}"'
        return f'<figure>{caption}<img src="{source}" {size} alt="{text(alt)}"></figure>'


def _encode(path: Path) -> tuple[bytes, str, tuple[int, int]]:
    """Return a picture's bytes, their kind and its size: the file itself, or a smaller JPEG."""
    data = path.read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        is_small = max(image.size) <= LARGEST_SIDE and len(data) <= LARGEST_PNG
        if image.format == "PNG" and is_small:
            return data, "png", image.size
        # What is transparent in a plot is meant to be white.
        smaller = Image.new("RGB", image.size, "white")
        layer = image.convert("RGBA")
        smaller.paste(layer, mask=layer.getchannel("A"))
    smaller.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    buffer = io.BytesIO()
    smaller.save(buffer, "JPEG", quality=85)
    return buffer.getvalue(), "jpeg", smaller.size
