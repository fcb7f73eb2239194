"""The results as a picture: ratios to the host, latency, CPU time, and the cost of a call as rules grow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from graft.bench.outputs import PERCENTILES
from graft.bench.report import BASELINE, Column, Kind, Metric, Ratio, Results

LATENCY_OF = "pingpong"
"""The workload whose percentiles are drawn."""

_PANEL = 3.6  # inches of height
_WIDTH = 11
_THIN = {"error_kw": {"linewidth": 0.7}}


def draw(results: Results, target: Path) -> None:
    """Draw what was measured into ``target``; its suffix says which kind of file."""
    panels: list[tuple[str, Callable[[Any], None]]] = []
    for kind, label in ((Kind.MAIN, "ratio to the host"), (Kind.CPU, "CPU time (less is better), ratio")):
        if metrics := results.of_kind(kind):
            panels.append((label, lambda axes, metrics=metrics: _ratios(axes, results, metrics)))  # type: ignore[misc]
    latencies = [metric for metric in results.of_kind(Kind.LATENCY) if metric.name.startswith(f"{LATENCY_OF}-")]
    if latencies:
        panels.append(("TCP ping-pong, us", lambda axes: _latencies(axes, results, latencies)))
    if results.growth:
        panels.append(("connect + close, ratio to the host", lambda axes: _growth(axes, results)))
    # Not pyplot's: it keeps figures, and asks for a screen.
    figure = Figure(figsize=(_WIDTH, _PANEL * max(1, len(panels))))
    for axes, (label, fill) in zip(figure.subplots(max(1, len(panels)), squeeze=False)[:, 0], panels, strict=False):
        fill(axes)
        axes.set_ylabel(label)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7, ncols=2, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(f"Graft {results.run.version}, Linux {results.run.kernel}, {results.run.machine}", fontsize=9)
    figure.tight_layout()
    figure.savefig(target, dpi=110)


def _ratios(axes: Any, results: Results, metrics: Sequence[Metric]) -> None:
    """Bars of the ratios to the host, up or down from 1, with the spread of the rounds."""
    found = results.summaries
    others = [column for column in results.columns if column.name != BASELINE]
    width = 0.8 / max(1, len(others))
    for number, column in enumerate(others):
        shown = [
            (place, summary.ratio)
            for place, metric in enumerate(metrics)
            if (summary := found.get((metric.name, column.name))) is not None and summary.ratio is not None
        ]
        if shown:
            places = [place + number * width for place, _ in shown]
            ratios = [ratio for _, ratio in shown]
            heights = [one.median - 1 for one in ratios]
            colour = _colour(results, column)
            axes.bar(places, heights, width, bottom=1, yerr=_spread(ratios), color=colour, label=column.title, **_THIN)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.axhline(1, color="black", linewidth=0.8)
    middle = width * (len(others) - 1) / 2
    mixed = len({metric.more_is_better for metric in metrics}) > 1
    less = {metric.name: "\n(less is better)" for metric in metrics if mixed and not metric.more_is_better}
    titles = [f"{metric.name.removesuffix('-cpu')}{less.get(metric.name, '')}" for metric in metrics]
    axes.set_xticks([place + middle for place in range(len(metrics))], titles, fontsize=7)


def _latencies(axes: Any, results: Results, metrics: Sequence[Metric]) -> None:
    """A line for each case over the percentiles."""
    found = results.summaries
    for column in results.columns:
        medians = [found[metric.name, column.name].median for metric in metrics if (metric.name, column.name) in found]
        if len(medians) == len(PERCENTILES):
            colour = _colour(results, column)
            axes.plot(PERCENTILES, medians, marker="o", markersize=3, linewidth=1, color=colour, label=column.title)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(axis="y", linewidth=0.3)


def _colour(results: Results, column: Column) -> Any:
    """The same in every panel."""
    return colormaps["tab20"](list(results.columns).index(column) % 20)


def _spread(ratios: Sequence[Ratio]) -> list[list[float]]:
    """How far the lowest and the highest are from the median."""
    return [[one.median - one.low for one in ratios], [one.high - one.median for one in ratios]]


def _growth(axes: Any, results: Results) -> None:
    """A line for rules and one for containers, with the spread of the rounds."""
    for growth in results.growth:
        counts = [point.count for point in growth.points]
        ratios = [point.ratio for point in growth.points]
        medians = [one.median for one in ratios]
        axes.errorbar(counts, medians, yerr=_spread(ratios), marker="o", capsize=3, label=growth.title)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.axhline(1, color="black", linewidth=0.8)
