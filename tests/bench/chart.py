"""The ratios as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from tests.bench.report import BASELINE, Column, Metric, Summary


def draw(
    metrics: Sequence[Metric],
    columns: Sequence[Column],
    found: Mapping[tuple[str, str], Summary],
    target: Path,
) -> None:
    """Bars of the ratios to the host, with the spread of the rounds, into the SVG file ``target``."""
    others = [column for column in columns if column.name != BASELINE]
    figure = Figure(figsize=(9, 4))  # not pyplot's: it keeps figures, and asks for a screen
    axes = figure.subplots()
    width = 0.8 / max(1, len(others))
    for number, column in enumerate(others):
        for place, metric in enumerate(metrics):
            summary = found.get((metric.name, column.name))
            if summary is None or summary.ratio is None:
                continue
            ratio = summary.ratio
            spread = [[ratio.median - ratio.low], [ratio.high - ratio.median]]
            label = column.title if place == 0 else None
            axes.bar(place + number * width, ratio.median, width, yerr=spread, color=f"C{number}", label=label)
    axes.axhline(1, color="black", linewidth=0.8)
    middle = width * (len(others) - 1) / 2
    titles = [metric.title if metric.more_is_better else f"{metric.title}\n(less is better)" for metric in metrics]
    axes.set_xticks([place + middle for place in range(len(metrics))], titles, rotation=15, ha="right", fontsize=8)
    axes.set_ylabel("ratio to the host")
    axes.legend()
    figure.tight_layout()
    figure.savefig(target)
