"""Parts of HTML pages that need no other file: the frame, tables, cells, and axes of plots in SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from .files import atomic_write
from .labels import catalogue

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 620, 150, 16, 6, 26  # of a plot, in pixels


def write_page(path: Path, title: str, parts: Iterable[str]) -> None:
    """Writes a page of these parts of HTML, of which empty ones are left out."""
    text = _TEMPLATE.format(title=escape(title), style=_STYLE, body="\n".join(part for part in parts if part))
    with atomic_write(path) as new:
        new.write_text(text, encoding="utf-8", errors="backslashreplace")


_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --page: #ffffff; --muted: #66717f; --line: #dde2e8; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ee; --page: #14181e; --muted: #97a2b0; --line: #313a45; --bad: #ff8a80; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 1290px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
p, li { max-width: 95ch; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; font-size: .9rem; }
th, td { padding: .22rem .7rem; text-align: right; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--muted); vertical-align: bottom; }
th:first-child, td:first-child, td:has(i.swatch) { text-align: left; }
tfoot td { font-weight: 600; border-bottom: none; }
.bad, .trouble { color: var(--bad); }
.muted { color: var(--muted); }
i.swatch { display: inline-block; width: .75em; height: .75em; border-radius: 2px; margin-right: .5em;
  outline: 1px solid var(--line); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 540px), 1fr)); gap: 1rem 2rem; }
figure { margin: 0; }
dl { display: grid; grid-template-columns: max-content minmax(0, 95ch); gap: .15rem 1.2rem; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
img { width: 100%; border-radius: 6px; }
.cell { display: block; padding: 0 .8em; border-radius: 4px; }
figcaption { font-weight: 600; }
svg { width: 100%; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: var(--ink); }
svg .grid { stroke: var(--line); }
svg .zero { stroke: var(--muted); }
svg .second { fill-opacity: 0; stroke-dasharray: 3 2; }
"""


def listing(lines: Iterable[str]) -> str:
    """A list of texts."""
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def table(head: Iterable[str], rows: Iterable[Iterable[str]], foot: Sequence[str] = ()) -> str:
    """Of cells that are HTML already."""
    body = "\n".join(f"<tr>{_cells(row)}</tr>" for row in rows)
    end = f"<tfoot><tr>{_cells(foot)}</tr></tfoot>" if foot else ""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody>{end}</table></div>'


def _cells(cells: Iterable[str]) -> str:
    return "".join(f"<td>{cell}</td>" for cell in cells)


def structure_cell(key: str) -> str:
    """A structure's name behind its colour."""
    entry = catalogue()[key]
    return f'<i class="swatch" style="background: rgb{entry.color}"></i>{escape(entry.name)}'


def bad(text: str, is_bad: object) -> str:
    """HTML that stands out where something is bad."""
    return f'<span class="bad">{text}</span>' if is_bad else text


def small(text: str) -> str:
    """On a line of its own."""
    return f'<br><span class="muted">{text}</span>'


def number(value: float | None, places: int, sign: bool = False) -> str:
    """A number with so many decimals, a dash where there is none."""
    if value is None:
        return "–"
    return f"{round(value, places) + 0.0:{'+' if sign else ''}.{places}f}".replace("-", "−")  # + 0.0: no minus zero


class Axis(NamedTuple):
    """The horizontal axis of a plot, from its first to its last tick."""

    low: float
    high: float
    ticks: list[float]

    def x(self, value: float) -> float:
        """Pixels from the left border."""
        return LEFT + (value - self.low) / (self.high - self.low) * (WIDTH - LEFT - RIGHT)


def axis_over(values: Sequence[float]) -> Axis:
    """An axis over all values that ends at ticks."""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    rough = 10 ** math.floor(math.log10(span))
    step = next(factor * rough for factor in (0.2, 0.5, 1, 2) if span / (factor * rough) <= 6)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    first -= int(first == last)
    return Axis(first * step, last * step, [number * step for number in range(first, last + 1)])


def grid_lines(axis: Axis, bottom: float) -> str:
    """Vertical lines at the ticks down to `bottom`, and their numbers below."""
    lines = []
    for tick in axis.ticks:
        kind, x = "zero" if tick == 0 else "grid", axis.x(tick)
        lines.append(f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
        lines.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{tick:.4g}</text>'.replace(">-", ">−"))
    return "".join(lines)
