"""Rounds: every workload in every case, the cases close together, in another order each round."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.bench.cases import Case, NotOffered
from tests.bench.process import BenchError
from tests.bench.report import Measurements
from tests.bench.workloads import Place, Workload


class Show(Protocol):
    """Takes a line on what is being measured, then on what came out."""

    def __call__(self, doing: str, result: str | None = None) -> None:
        """Show it."""


def measure_all(
    workloads: Sequence[Workload], cases: Sequence[Case], place: Place, rounds: int, console: Console
) -> Measurements:
    """One value a round for each workload and case.

    The machine is not quiet and not steady, so what is compared is measured side by side: the cases of one workload
    follow each other within a round, and no case is always the first.
    """
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    with ExitStack() as stack:
        offered = _prepared(stack, cases, place, console)
        show = stack.enter_context(_progress(console, rounds * len(workloads) * len(offered)))
        for number in range(rounds):
            shift = number % len(offered)
            for workload in workloads:
                for case in [*offered[shift:], *offered[:shift]]:
                    metric = workload.metric
                    doing = f"round {number + 1}/{rounds}: {metric.title}, {case.title}"
                    show(doing)
                    try:
                        value = workload.measure(case, place)
                    except NotOffered:
                        show(doing, "-")
                        continue
                    values[metric.name, case.name].append(value)
                    show(doing, f"{value:,.{metric.digits}f} {metric.unit}")
    return values


def _prepared(stack: ExitStack, cases: Sequence[Case], place: Place, console: Console) -> list[Case]:
    """Those of ``cases`` that this machine offers, ready until ``stack`` is closed. Raises BenchError for none."""
    offered = []
    for case in cases:
        try:
            stack.enter_context(case.prepared(place.net, place.workdir))
        except NotOffered as reason:
            console.print(f"not measured: {case.title}: {reason}", highlight=False, markup=False, soft_wrap=True)
        else:
            offered.append(case)
    if not offered:
        raise BenchError("none of the cases can be measured here")
    return offered


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Show]:
    """A bar on a terminal, a line a result elsewhere."""
    if not console.is_terminal:

        def lines(doing: str, result: str | None = None) -> None:
            if result is not None:
                console.print(f"{doing}: {result}", highlight=False, soft_wrap=True)

        yield lines
        return

    text = TextColumn("{task.description}")
    with Progress(MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), text, console=console) as progress:
        task = progress.add_task("", total=total)

        def bar(doing: str, result: str | None = None) -> None:
            progress.update(task, description=doing if result is None else f"{doing}: {result}")
            if result is not None:
                progress.advance(task)

        yield bar
