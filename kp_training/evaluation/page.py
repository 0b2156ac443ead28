"""A self-contained HTML page with headings, text, sortable tables and figures."""

from __future__ import annotations

import base64
import html
import io
import numbers
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A table cell: a number, a mean with its standard deviation, text, or None for "not measured".
Value = float | int | str | tuple[float, float] | None

STYLE = """
:root { --ink: #1d2733; --soft: #5d6b7a; --line: #dde3ea; --band: #f5f7fa; --key: #0b62a4; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 78rem;
  color: var(--ink); background: #fff; font: 16px/1.55 system-ui, "Segoe UI", Roboto,
  "Helvetica Neue", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0.5rem 0 0.2rem; }
h2 { font-size: 1.35rem; margin: 2.6rem 0 0.6rem; padding-bottom: 0.3rem;
  border-bottom: 2px solid var(--line); }
h3 { font-size: 1.08rem; margin: 1.8rem 0 0.4rem; }
p { max-width: 48rem; margin: 0.5rem 0; }
.lead { color: var(--soft); font-size: 1.05rem; }
.scroll { overflow: auto; max-height: 42rem; margin: 0.8rem 0 0.3rem; border: 1px solid var(--line);
  border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: 0.88rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: 0.38rem 0.6rem; text-align: right; white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; position: sticky; top: 0; z-index: 1;
  background: var(--band); box-shadow: 0 2px 0 var(--line); }
th:first-child { z-index: 2; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: inherit; }
tr { background: #fff; }
thead tr { background: var(--band); }
tbody tr:nth-child(even) { background: var(--band); }
tbody tr:hover { background: #e8f1f9; }
th.words, td.words { text-align: left; }
td.best { font-weight: 700; color: var(--key); }
td .std { display: block; color: var(--soft); font-weight: 400; font-size: 0.92em; }
th button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0;
  padding: 0; cursor: pointer; text-align: inherit; }
th button::after { content: "\\2195"; opacity: 0.35; padding-left: 0.25em; }
th[aria-sort=ascending] button::after { content: "\\2191"; opacity: 1; }
th[aria-sort=descending] button::after { content: "\\2193"; opacity: 1; }
.caption, figcaption { color: var(--soft); font-size: 0.88rem; max-width: 60rem;
  margin: 0.3rem 0 1rem; }
figure { margin: 1rem 0 1.6rem; }
figure img { display: block; max-width: 100%; height: auto; border-radius: 6px; }
pre { background: var(--band); border: 1px solid var(--line); border-radius: 8px;
  padding: 0.7rem 0.9rem; overflow-x: auto; font-size: 0.85rem; }
ul { padding-left: 1.2rem; }
"""

# Sorts by the data-value of the cells: numbers in descending, text in ascending order at the first
# click. Cells without a value stay last.
SCRIPT = """
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, body = head.closest("table").tBodies[0];
    const column = head.cellIndex, value = row => row.cells[column].dataset.value;
    const rows = [...body.rows], given = rows.filter(row => value(row) !== "");
    const numeric = given.every(row => !isNaN(value(row)));
    const before = head.getAttribute("aria-sort");
    const rising = before ? before === "descending" : !numeric;
    const compare = (a, b) => numeric ? value(a) - value(b)
      : value(a).localeCompare(value(b), "en", {numeric: true});
    given.sort((a, b) => rising ? compare(a, b) : compare(b, a));
    body.append(...given, ...rows.filter(row => value(row) === ""));
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", rising ? "ascending" : "descending");
  });
}
"""


class Page:
    """A page that is built from top to bottom and written once.

    All text is escaped. The file loads nothing from elsewhere, so it can be sent by mail.
    """

    def __init__(self, title: str, lead: str = "") -> None:
        self.title = title
        self._parts = [f"<h1>{html.escape(title)}</h1>"]
        if lead:
            self._parts.append(f'<p class="lead">{html.escape(lead)}</p>')

    def heading(self, words: str, level: int = 2) -> None:
        """A heading of level 2 or 3."""
        self._parts.append(f"<h{level}>{html.escape(words)}</h{level}>")

    def text(self, words: str) -> None:
        """A paragraph."""
        self._parts.append(f"<p>{html.escape(words)}</p>")

    def items(self, lines: Sequence[str]) -> None:
        """A bullet list."""
        self._parts.append("<ul>" + "".join(f"<li>{html.escape(s)}</li>" for s in lines) + "</ul>")

    def code(self, words: str) -> None:
        """Preformatted text, such as a command."""
        self._parts.append(f"<pre>{html.escape(words)}</pre>")

    def table(
        self,
        rows: Sequence[Mapping[str, Value]],
        caption: str = "",
        best: Mapping[str, str] | None = None,
    ) -> None:
        """A table that sorts by a column when its header is clicked.

        Args:
            rows: each maps columns to values. Columns are those of all rows, in order of
                appearance; missing values are shown as not measured.
            caption: text below the table.
            best: columns with the best value in bold: `max` or `min`.
        """
        columns = list(dict.fromkeys(name for row in rows for name in row))
        choose: dict[str, Callable[[list[float]], float]] = {"max": max, "min": min}
        top = {}
        for name, kind in (best or {}).items():
            numbers = [_number(row.get(name)) for row in rows]
            known = [value for value in numbers if value is not None]
            if known:
                top[name] = choose[kind](known)
        words = {name for name in columns if any(isinstance(r.get(name), str) for r in rows)}
        heads = "".join(
            f'<th{" class=words" if name in words else ""}><button type="button">'
            f"{html.escape(name)}</button></th>"
            for name in columns
        )
        body = "".join(
            "<tr>" + "".join(_cell(row.get(name), top.get(name)) for name in columns) + "</tr>"
            for row in rows
        )
        self._parts.append(
            f'<div class="scroll"><table><thead><tr>{heads}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>"
        )
        if caption:
            self._parts.append(f'<p class="caption">{html.escape(caption)}</p>')

    def figure(self, picture: Figure | bytes, caption: str) -> None:
        """A matplotlib figure, or a PNG file's bytes."""
        kind = "png"
        if not isinstance(picture, bytes):
            file = io.BytesIO()
            # For photographs, a tenth of the size of a PNG.
            options = {"quality": 88}
            picture.savefig(file, format="webp", dpi=130, bbox_inches="tight", pil_kwargs=options)
            kind, picture = "webp", file.getvalue()
        data = base64.b64encode(picture).decode()
        words = html.escape(caption, quote=True)
        self._parts.append(
            f'<figure><img alt="{words}" src="data:image/{kind};base64,{data}">'
            f"<figcaption>{words}</figcaption></figure>"
        )

    def write(self, path: Path) -> None:
        """Write the page."""
        path.write_text(
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<link rel="icon" href="data:,">'  # prevents a request for a favicon
            f"<title>{html.escape(self.title)}</title><style>{STYLE}</style></head>\n<body>"
            + "\n".join(self._parts)
            + f"<script>{SCRIPT}</script></body></html>\n",
            encoding="utf-8",
        )


def shown(value: Value) -> str:
    """Format a value: three decimals below 10, one below 100."""
    if value is None:
        return "-"
    if isinstance(value, tuple):
        return " ± ".join(shown(part) for part in value)
    if isinstance(value, numbers.Integral):
        return str(value)
    if isinstance(value, numbers.Real):
        if not np.isfinite(value):
            return "-"
        digits = 3 if abs(value) < 10 else 1 if abs(value) < 100 else 0
        return f"{value:.{digits}f}"
    return str(value)


def _number(value: Value) -> float | None:
    """The number by which a cell is compared; None for text and missing values."""
    if isinstance(value, tuple):
        value = value[0]
    if isinstance(value, numbers.Real) and np.isfinite(value):
        return float(value)
    return None


def _cell(value: Value, best: float | None) -> str:
    number = _number(value)
    order = repr(number) if number is not None else value if isinstance(value, str) else ""
    words = html.escape(shown(value[0] if isinstance(value, tuple) else value))
    if isinstance(value, tuple):
        words += f' <span class="std">± {html.escape(shown(value[1]))}</span>'
    kind = ""
    if isinstance(value, str):
        kind = ' class="words"'
    elif number is not None and number == best:
        kind = ' class="best"'
    return f'<td{kind} data-value="{html.escape(order, quote=True)}">{words}</td>'
