"""Self-contained HTML: one file with its style, its charts as SVG and its pictures inside."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

PALETTE = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#a463f2", "#9c6b4e", "#97bbf5")

STYLE = """
:root { color-scheme: light; --ink: #1c2430; --soft: #667085; --line: #e4e7ec; --tint: #f7f8fa; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 5rem; max-width: 80rem; color: var(--ink); background: #fff;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.02em; }
h2 { font-size: 1.3rem; margin: 3rem 0 .6rem; letter-spacing: -.01em; }
p, li { max-width: 48rem; } .soft { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; margin: .8rem 0; }
th { text-align: left; font-weight: 600; color: var(--soft); border-bottom: 2px solid var(--line); }
th, td { padding: .4rem .7rem .4rem 0; white-space: nowrap; vertical-align: top; }
td { border-bottom: 1px solid var(--line); } td.wide { white-space: normal; min-width: 14rem; }
th.number, td.number { text-align: right; }
code, pre { font: .85em/1.5 ui-monospace, SFMono-Regular, Menlo, monospace; background: var(--tint); }
pre { padding: .8rem 1rem; overflow-x: auto; border-radius: 6px; } code { padding: .1em .3em; border-radius: 4px; }
figure { margin: 1.2rem 0; } figure img { max-width: 100%; height: auto; border-radius: 6px; display: block; }
figcaption { color: var(--soft); font-size: .88rem; margin-top: .4rem; }
.row { display: flex; flex-wrap: wrap; gap: 1rem; } .row figure { flex: 1 1 15rem; margin: .5rem 0; }
svg { max-width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: var(--soft); }
.swatch { display: inline-block; width: .7em; height: .7em; border-radius: 2px; margin-right: .45em; }
details { margin: 1rem 0; } summary { cursor: pointer; color: var(--soft); }
"""


def page(title: str, sections: Sequence[str]) -> str:
    """A whole HTML document."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """A table of ready HTML cells; columns after the first `text_columns` hold numbers."""

    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{'' if i < text_columns else ' class=number'}>{cell}</{tag}>"
            for i, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{cells(head, "th")}</tr></thead><tbody>{body}</tbody></table></div>'


def picture(image: Image.Image, caption: str, quality: int = 88) -> str:
    """A figure with the image inside the page (JPEG)."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=quality)
    data = base64.b64encode(buffer.getvalue()).decode()
    text = html.escape(caption)
    return f'<figure><img alt="{text}" src="data:image/jpeg;base64,{data}"><figcaption>{text}</figcaption></figure>'


def line_chart(
    series: Mapping[str, Sequence[tuple[float, float]]],
    x_label: str,
    y_label: str,
    colours: Mapping[str, str] | None = None,
    size_px: tuple[int, int] = (520, 260),
) -> str:
    """Lines over a common x axis, y from zero, with a legend below."""
    series = {name: points for name, points in series.items() if points}
    if not series:
        return ""
    width, height = size_px
    left, right, top, bottom = 52, 12, 12, 40
    x_max = _round_up(max(x for points in series.values() for x, _ in points))
    y_max = _round_up(max(y for points in series.values() for _, y in points))

    def at(x: float, y: float) -> tuple[float, float]:
        return left + x / x_max * (width - left - right), height - bottom - y / y_max * (
            height - top - bottom
        )

    parts = []
    for i in range(5):
        value = y_max * i / 4
        _, y = at(0, value)
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e4e7ec"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for i in range(5):
        x, _ = at(x_max * i / 4, 0)
        parts.append(
            f'<text x="{x:.1f}" y="{height - bottom + 16}" text-anchor="middle">{x_max * i / 4:.4g}</text>'
        )
    legend = []
    for i, (name, points) in enumerate(series.items()):
        colour = (colours or {}).get(name, PALETTE[i % len(PALETTE)])
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))
        dashes = ' stroke-dasharray="5 3"' if i >= len(PALETTE) and not colours else ""
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>')
        legend.append(swatch(colour) + html.escape(name))
    parts.append(
        f'<text x="{(left + width) / 2}" y="{height - 6}" text-anchor="middle">{html.escape(x_label)}</text>'
    )
    chart = (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="{html.escape(y_label)}">'
    )
    return (
        f"<figure>{chart}{''.join(parts)}</svg><figcaption>{html.escape(y_label)} &nbsp; "
        f"{' &nbsp; '.join(legend)}</figcaption></figure>"
    )


def interval_chart(
    rows: Sequence[tuple[str, float, tuple[float, float], Sequence[float]]],
    colours: Mapping[str, str],
    x_label: str,
    width: int = 760,
) -> str:
    """One line per row: name, mean (dot), interval (bar) and single values (small dots); zero is marked."""
    low = min(0.0, *(min([interval[0], *values]) for _, _, interval, values in rows))
    high = max(0.0, *(max([interval[1], *values]) for _, _, interval, values in rows))
    span = (high - low) or 1.0
    left, right, step = 330, 70, 26
    height = step * len(rows) + 36

    def at(value: float) -> float:
        return left + (value - low) / span * (width - left - right)

    parts = [
        f'<line x1="{at(0):.1f}" x2="{at(0):.1f}" y1="4" y2="{height - 30}" stroke="#98a2b3" stroke-dasharray="3 3"/>'
    ]
    for i, (name, mean, interval, values) in enumerate(rows):
        y, colour = 16 + i * step, colours.get(name, PALETTE[0])
        parts.append(f'<text x="{left - 12}" y="{y + 4}" text-anchor="end">{html.escape(name)}</text>')
        parts.append(
            f'<line x1="{at(interval[0]):.1f}" x2="{at(interval[1]):.1f}" y1="{y}" y2="{y}" '
            f'stroke="{colour}" stroke-width="5" stroke-linecap="round" opacity=".35"/>'
        )
        if len(values) > 1:
            parts += [f'<circle cx="{at(v):.1f}" cy="{y}" r="2.5" fill="{colour}"/>' for v in values]
        parts.append(f'<circle cx="{at(mean):.1f}" cy="{y}" r="5" fill="{colour}"/>')
        parts.append(f'<text x="{width - right + 12}" y="{y + 4}">{mean:+.3f}</text>')
    parts.append(
        f'<text x="{(left + width - right) / 2}" y="{height - 8}" text-anchor="middle">{html.escape(x_label)}</text>'
    )
    return f'<figure><svg viewBox="0 0 {width} {height}" width="{width}" role="img">{"".join(parts)}</svg></figure>'


def swatch(colour: str) -> str:
    return f'<span class="swatch" style="background:{colour}"></span>'


def read_curve(metrics_file: Path, key: str) -> list[tuple[float, float]]:
    """(step, value) of one logged quantity; lines without it are passed over."""
    if not metrics_file.exists():
        return []
    lines = [json.loads(line) for line in metrics_file.read_text().splitlines()]
    return [(line["step"], line[key]) for line in lines if key in line]


def _round_up(value: float) -> float:
    """The next number of the form 1, 2, 2.5 or 5 times a power of ten."""
    if value <= 0:
        return 1.0
    scale = 10.0 ** len(str(int(value))) / 10 if value >= 1 else 1.0
    while value < scale:
        scale /= 10
    return next(factor * scale for factor in (1, 2, 2.5, 5, 10) if factor * scale >= value)
