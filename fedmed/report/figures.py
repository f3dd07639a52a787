"""Figures as inline SVG: learning curves, and every case as a dot.

Small panels of one size, which a page can set side by side on a desk and below each
other on a phone. Text stays text. Colours are told apart by colour-blind readers
(Okabe and Ito, 2008) and repeat in line styles and markers.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedmed.seeds import numpy_rng

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#AA4499", "#B07D00", "#3B8FC2", "#444444")
_LINES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_WIDTH_INCH = 4.2
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "text.parse_math": False,
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


@dataclass(frozen=True)
class Curve:
    """One line of a learning curve.

    Attributes:
        rounds: Round numbers, ascending.
        values: One a round; NaN leaves a gap.
        low: Lower edge of a band around the line (smallest seed), or empty.
        high: Upper edge.
    """

    label: str
    rounds: tuple[int, ...]
    values: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()


def draw_curves(
    curves: Sequence[Curve], *, name: str, y_label: str, alt: str
) -> Markup:
    """Draw learning curves.

    Args:
        curves: At least one.
        name: Unique on the page, [a-z0-9-]+.
        y_label: Quantity and unit.
        alt: What the figure shows, for readers who do not see it.

    Returns:
        An `<svg>` element.
    """
    with matplotlib.rc_context(_STYLE):
        rows = math.ceil(len(curves) / 2)
        figure, axes = _panel(2.6 + 0.19 * rows)
        for index, curve in enumerate(curves):
            _draw_curve(axes, curve, index)
        axes.set_xlabel("Round")
        axes.set_ylabel(y_label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        figure.legend(
            loc="outside lower center", ncols=min(2, len(curves)), handlelength=2.4
        )
        return _to_svg(figure, name, alt)


def draw_cases(
    groups: Mapping[str, Sequence[float]], *, name: str, x_label: str, alt: str
) -> Markup:
    """Draw every case as a dot beside a box with median and quartiles.

    Args:
        groups: Label -> one value a case; NaN is left out.
        name: Unique on the page, [a-z0-9-]+.
        x_label: Quantity and unit.
        alt: What the figure shows.

    Returns:
        An `<svg>` element; groups from top to bottom in the given order.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _panel(0.75 + 0.42 * len(groups))
        for index, (label, values) in enumerate(groups.items()):
            _draw_group(axes, index, np.array(values, dtype=float), label)
        axes.set_yticks(range(len(groups)), list(groups))
        axes.set_ylim(len(groups) - 0.45, -0.55)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(x_label)
        return _to_svg(figure, name, alt)


def _panel(height_inch: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(_WIDTH_INCH, height_inch), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()


def _draw_curve(axes: Any, curve: Curve, index: int) -> None:
    colour = COLOURS[index % len(COLOURS)]
    axes.plot(
        curve.rounds,
        curve.values,
        label=curve.label,
        color=colour,
        linestyle=_LINES[index % len(_LINES)],
        marker=_MARKERS[index % len(_MARKERS)],
        markersize=3,
        markevery=max(1, len(curve.rounds) // 10),
        linewidth=1.6,
    )
    if curve.low:
        axes.fill_between(
            curve.rounds, curve.low, curve.high, color=colour, alpha=0.13, linewidth=0
        )


def _draw_group(axes: Any, index: int, values: np.ndarray, label: str) -> None:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return
    colour = COLOURS[index % len(COLOURS)]
    axes.boxplot(
        [finite],
        positions=[index],
        orientation="horizontal",
        widths=0.56,
        showfliers=False,
        boxprops={"color": "#555555"},
        whiskerprops={"color": "#555555"},
        capprops={"color": "#555555"},
        medianprops={"color": "#111111", "linewidth": 2},
        manage_ticks=False,
    )
    rng = numpy_rng(0, "report", "jitter", label)
    heights = index + rng.uniform(-0.17, 0.17, len(finite))
    marker = _MARKERS[index % len(_MARKERS)]
    axes.scatter(finite, heights, s=13, color=colour, alpha=0.75, marker=marker)


def _to_svg(figure: Figure, name: str, alt: str) -> Markup:
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    return _inline(buffer.getvalue(), name, alt)


def _inline(svg: str, name: str, alt: str) -> Markup:
    """Strip what only a file needs, make ids unique on the page, and add a label."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", body)
    box = re.search(r'viewBox="([^"]+)"', body)
    head = (
        f'<svg class="plot" viewBox="{box.group(1) if box else ""}" role="img" '
        f'aria-label="{escape(alt)}" xmlns="http://www.w3.org/2000/svg" '
        'xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return Markup(head + body[body.index(">") + 1 :])
