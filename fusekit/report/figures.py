"""Figures: every function takes numbers and returns a Plotly figure without colours of its own.

Colours that depend on the reader's theme (text, grid, colour scales) are set by the page; the
figure's `meta` says which kind of scale it wants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fusekit.errors import MissingExtraError

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

PALETTE = (
    "#4a90d9",
    "#e07b39",
    "#3aa17e",
    "#b565b0",
    "#c9a227",
    "#d1495b",
    "#6c7a89",
    "#00a6a6",
)
"""Told apart on light and dark ground."""

SCALES = {
    "sequential": ("#eef3f9", "#7fb0dd", "#16508c"),
    "diverging": ("#b2182b", "#f1f1f1", "#2166ac"),
}
"""Colour scales for light ground, also used for images."""

ROW_PIXELS = 22
_MARGIN = {"l": 8, "r": 8, "t": 12, "b": 8}


def require_plotly() -> None:
    """Raises `MissingExtraError` unless Plotly is installed."""
    try:
        import plotly  # noqa: F401
    except ModuleNotFoundError:
        raise MissingExtraError("a report with figures", "report") from None


def heat_map(
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    scale: str = "sequential",
    limits: tuple[float, float] | None = None,
    legend: str = "",
    numbers: bool = False,
    as_percent: bool = False,
) -> Figure:
    """A matrix as colours, the first row at the top; missing values stay blank.

    Args:
        values: (rows, columns), None where there is nothing.
        scale: `sequential` or `diverging`.
        limits: values of the scale's ends.
        legend: what the colour says.
        numbers: write the values into the cells.
        as_percent: show shares as percentages.
    """
    from plotly.graph_objects import Figure, Heatmap

    form = ".0%" if as_percent else ".2f" if numbers else ".3g"
    trace = Heatmap(
        z=[list(row) for row in values],
        x=list(columns),
        y=list(rows),
        coloraxis="coloraxis",
        hoverongaps=False,
        xgap=1,
        ygap=1,
        texttemplate=f"%{{z:{form}}}" if numbers else None,
        hovertemplate=f"%{{y}}, %{{x}}: %{{z:{form}}}<extra></extra>",
    )
    figure = Figure(trace)
    low, high = limits or (None, None)
    bar = {"title": {"text": legend, "side": "right"}, "thickness": 12, "len": 1, "outlinewidth": 0}
    figure.update_layout(
        _layout(max(240, ROW_PIXELS * len(rows) + 120)),
        meta={"scale": scale},
        coloraxis={
            "colorscale": _colour_scale(scale),
            "cmin": low,
            "cmax": high,
            "colorbar": {**bar, "tickformat": ".0%" if as_percent else None},
        },
    )
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False, automargin=True)
    figure.update_xaxes(type="category", showgrid=False, tickangle=-40, automargin=True)
    return figure


def lines(
    series: Mapping[str, Sequence[float | None]],
    positions: Sequence[str],
    *,
    axis: str,
    as_percent: bool = False,
) -> Figure:
    """One line per series over labelled positions, such as layers."""
    from plotly.graph_objects import Figure, Scatter

    figure = Figure()
    for (name, values), colour in zip(series.items(), _colours(len(series)), strict=True):
        figure.add_trace(
            Scatter(
                x=list(positions),
                y=list(values),
                name=name,
                mode="lines+markers",
                line={"color": colour, "width": 2},
                marker={"size": 5},
                hovertemplate="%{x}: %{y:.3g}<extra>%{fullData.name}</extra>"
                if not as_percent
                else "%{x}: %{y:.1%}<extra>%{fullData.name}</extra>",
            )
        )
    figure.update_layout(_layout(360), showlegend=True)
    figure.update_yaxes(
        title=axis, tickformat=".0%" if as_percent else None, rangemode="tozero", automargin=True
    )
    figure.update_xaxes(type="category", nticks=12, automargin=True, showgrid=False)
    return figure


def bars(
    names: Sequence[str],
    values: Sequence[float],
    intervals: Sequence[tuple[float, float]] | None = None,
    *,
    axis: str,
    reference: float | None = None,
) -> Figure:
    """Horizontal bars, the first at the top, with whiskers for intervals and a reference line."""
    from plotly.graph_objects import Bar, Figure

    figure = Figure(
        Bar(
            x=list(values),
            y=list(names),
            orientation="h",
            marker={"color": PALETTE[0]},
            hovertemplate="%{y}: %{x:.3f}<extra></extra>",
        )
    )
    if intervals is not None:
        figure.update_traces(
            error_x={
                "type": "data",
                "array": [high - x for x, (_, high) in zip(values, intervals, strict=True)],
                "arrayminus": [x - low for x, (low, _) in zip(values, intervals, strict=True)],
                "thickness": 1.5,
                "width": 4,
            },
            customdata=[list(pair) for pair in intervals],
            hovertemplate="%{y}: %{x:.3f} (%{customdata[0]:.3f} to %{customdata[1]:.3f})"
            "<extra></extra>",
        )
    figure.update_layout(_layout(max(220, 26 * len(names) + 90)), bargap=0.35)
    figure.update_yaxes(type="category", autorange="reversed", automargin=True, showgrid=False)
    figure.update_xaxes(title=axis, automargin=True, rangemode="tozero")
    if reference is not None:
        figure.add_vline(x=reference, line={"dash": "dot", "width": 1.5, "color": PALETTE[5]})
    return figure


def cost_against_quality(
    names: Sequence[str],
    costs: Sequence[float],
    qualities: Sequence[float],
    *,
    cost_axis: str,
    quality_axis: str,
) -> Figure:
    """A point per method, cost on a logarithmic axis; methods that nothing beats are joined."""
    from plotly.graph_objects import Figure, Scatter

    front = pareto_front(costs, qualities)
    labelled = _apart(front, np.log(costs), np.asarray(qualities))
    figure = Figure()
    figure.add_trace(
        Scatter(
            x=[costs[i] for i in front],
            y=[qualities[i] for i in front],
            mode="lines",
            name="nothing cheaper is better",
            line={"dash": "dot", "color": PALETTE[1], "shape": "hv"},
            hoverinfo="skip",
        )
    )
    figure.add_trace(
        Scatter(
            x=list(costs),
            y=list(qualities),
            text=[name if i in labelled else "" for i, name in enumerate(names)],
            customdata=list(names),
            mode="markers+text",
            textposition="top center",
            name="methods",
            marker={"size": 9, "color": PALETTE[0]},
            cliponaxis=False,
            hovertemplate="%{customdata}: %{y:.3f} for %{x:.3g}<extra></extra>",
        )
    )
    figure.update_layout(_layout(420), showlegend=True)
    figure.update_xaxes(title=cost_axis, type="log", automargin=True)
    figure.update_yaxes(title=quality_axis, automargin=True)
    return figure


def pareto_front(costs: Sequence[float], qualities: Sequence[float]) -> list[int]:
    """Indices of the points that no other point beats in cost and quality, by rising cost."""
    order = sorted(range(len(costs)), key=lambda i: (costs[i], -qualities[i]))
    front: list[int] = []
    for i in order:
        if not front or qualities[i] > qualities[front[-1]]:
            front.append(i)
    return front


def _apart(points: Sequence[int], x: Any, y: Any) -> list[int]:
    """Of these points, from the best down, those whose labels do not cover one another."""
    wide, high = 0.3 * (np.ptp(x) or 1.0), 0.05 * (np.ptp(y) or 1.0)
    kept: list[int] = []
    for i in reversed(points):
        if all(abs(x[i] - x[k]) > wide or abs(y[i] - y[k]) > high for k in kept):
            kept.append(i)
    return kept


def _layout(height: int) -> dict[str, Any]:
    clear = "rgba(0,0,0,0)"
    return {
        "height": height,
        "margin": _MARGIN,
        "paper_bgcolor": clear,
        "plot_bgcolor": clear,
        "template": "none",
        "font": {"size": 12},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    }


def _colour_scale(scale: str) -> list[tuple[float, str]]:
    colours = SCALES[scale]
    return [(float(at), colour) for at, colour in zip(np.linspace(0, 1, 3), colours, strict=True)]


def _colours(count: int) -> list[str]:
    return [PALETTE[i % len(PALETTE)] for i in range(count)]
