"""The shell all reports share: a Jinja template folder, and charts as inline SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xpert.storage import write_file

__all__ = ["Series", "bars", "histogram", "line_chart", "write_page"]

Series = tuple[str, str, Sequence[float], Sequence[float]]
"""(label, CSS colour, x values, y values)"""

WIDTH, HEIGHT = 520, 170
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 26


def write_page(path: Path, template: str, **context: Any) -> None:
    """Renders a template of this folder into one file; every value is escaped unless it is one of our own charts."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = figure
    page = environment.get_template(template).render(**context)
    write_file(path, page.replace("\0", "\ufffd"))  # HTML has no NUL, and a model may answer one


def figure(value: Any) -> str:
    """A number as a person reads it: `12,345`, `0.873`, `200 tokens` stays as it is."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{int(value):,}"
    if isinstance(value, float | np.floating):
        number = float(value)
        return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"
    return str(value)


def histogram(groups: Mapping[str, tuple[str, ArrayLike]], *, unit: str, bins: int = 30, log: bool = False) -> Any:
    """Overlaid histograms as SVG markup: label -> (CSS colour, values). Heights are shares of each group.

    `log` puts the values on a logarithmic axis. Values that are not finite are left out.
    """
    arrays = {label: (colour, _finite(values)) for label, (colour, values) in groups.items()}
    arrays = {label: pair for label, pair in arrays.items() if pair[1].size}
    if not arrays:
        return ""
    everything = np.concatenate([values for _, values in arrays.values()])
    low, high = (float(everything.min()), float(everything.max()))
    if log:
        low = max(low, 1.0)
        edges = np.geomspace(low, max(high, low * 1.001), bins + 1)
    else:
        edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    shares = {
        label: np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] / values.size
        for label, (_, values) in arrays.items()
    }
    top = max(float(share.max()) for share in shares.values())
    step = (WIDTH - LEFT - RIGHT) / bins
    parts = []
    for label, (colour, _) in arrays.items():
        points = [f"{LEFT:.1f},{HEIGHT - BOTTOM}"]
        for index, share in enumerate(shares[label]):
            y = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * float(share) / top
            points += [f"{LEFT + index * step:.1f},{y:.1f}", f"{LEFT + (index + 1) * step:.1f},{y:.1f}"]
        points.append(f"{WIDTH - RIGHT},{HEIGHT - BOTTOM}")
        parts.append(f'<polygon points="{" ".join(points)}" style="fill:{colour};stroke:{colour}" class="area"/>')
    ticks = [(float(edges[i]), LEFT + i * step) for i in np.linspace(0, bins, 5).round().astype(int)]
    legend = [(label, colour) for label, (colour, _) in arrays.items()]
    return _svg(parts, ticks, [(top, TOP), (0.0, HEIGHT - BOTTOM)], legend, unit, percent=True)


def line_chart(series: Sequence[Series], *, unit: str) -> Any:
    """Lines as SVG markup over a shared pair of axes; points that are not finite are left out."""
    kept = []
    for label, colour, xs, ys in series:
        x, y = np.asarray(xs, dtype=float), np.asarray(ys, dtype=float)
        good = np.isfinite(x) & np.isfinite(y)
        if good.any():
            kept.append((label, colour, x[good], y[good]))
    if not kept:
        return ""
    x_low, x_high = min(s[2].min() for s in kept), max(s[2].max() for s in kept)
    y_low, y_high = min(s[3].min() for s in kept), max(s[3].max() for s in kept)
    x_span, y_span = (x_high - x_low) or 1.0, (y_high - y_low) or 1.0

    def place(x: float, y: float) -> str:
        across = LEFT + (WIDTH - LEFT - RIGHT) * (x - x_low) / x_span
        return f"{across:.1f},{HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - y_low) / y_span:.1f}"

    parts = []
    for _, colour, x, y in kept:
        points = " ".join(place(a, b) for a, b in zip(x.tolist(), y.tolist(), strict=True))
        parts.append(f'<polyline points="{points}" style="stroke:{colour}" class="line"/>')
        if x.size <= 12:
            spots = (place(a, b).split(",") for a, b in zip(x.tolist(), y.tolist(), strict=True))
            parts += [f'<circle cx="{a}" cy="{b}" r="2.5" style="fill:{colour}"/>' for a, b in spots]
    x_ticks = [(x_low + x_span * f, LEFT + (WIDTH - LEFT - RIGHT) * f) for f in (0, 0.25, 0.5, 0.75, 1)]
    y_ticks = [(y_high, TOP), (y_low, HEIGHT - BOTTOM)]
    return _svg(parts, x_ticks, y_ticks, [(label, colour) for label, colour, _, _ in kept], unit, percent=False)


def bars(rows: Sequence[tuple[str, float, str]], *, most: float | None = None) -> Any:
    """Horizontal bars as HTML markup: (label, value >= 0, text shown beside the bar)."""
    from markupsafe import Markup, escape

    top = most or max((value for _, value, _ in rows), default=0) or 1.0
    lines = [
        f'<div class="bar"><span class="bar-label">{escape(label)}</span><span class="bar-track">'
        f'<span class="bar-fill" style="width:{100 * value / top:.1f}%"></span></span>'
        f'<span class="bar-text">{escape(text)}</span></div>'
        for label, value, text in rows
    ]
    return Markup("".join(lines))


def _finite(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64).ravel()
    return array[np.isfinite(array)]


def _svg(
    parts: Sequence[str],
    x_ticks: Sequence[tuple[float, float]],
    y_ticks: Sequence[tuple[float, float]],
    legend: Sequence[tuple[str, str]],
    unit: str,
    *,
    percent: bool,
) -> Any:
    from markupsafe import Markup, escape

    base = HEIGHT - BOTTOM
    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" class="chart" role="img" aria-label="{escape(unit)}">']
    out.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}" class="axis"/>')
    out += parts
    for index, (value, x) in enumerate(x_ticks):
        anchor = "start" if index == 0 else "end" if index == len(x_ticks) - 1 else "middle"
        text = figure(round(value) if abs(value) >= 20 else float(value))
        out.append(f'<text x="{x:.1f}" y="{base + 16}" text-anchor="{anchor}">{text}</text>')
    for value, y in y_ticks:
        text = f"{value:.0%}" if percent else figure(float(value))
        out.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    out.append("</svg>")
    keys = "".join(f'<span><i style="background:{colour}"></i>{escape(label)}</span>' for label, colour in legend)
    out.append(f'<div class="legend">{keys}<span class="unit">{escape(unit)}</span></div>')
    return Markup("".join(out))
