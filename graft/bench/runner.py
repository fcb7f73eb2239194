"""Rounds: every workload in every case, the cases close together, in another order each round, until the time is up.

The machine is not quiet and not steady, so what is compared is measured side by side: the cases of one workload follow
each other within a round, and no case is always the first.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from graft.bench.cases import Case, NotOffered
from graft.bench.process import BenchError
from graft.bench.report import Omission
from graft.bench.workloads import Figures, Place, Workload, missing
from graft.model.printable import printable

T = TypeVar("T")


class Show(Protocol):
    """Takes a line on what is being measured, then on what came out."""

    def __call__(self, doing: str, result: str | None = None) -> None:
        """Show it."""


@dataclass
class Measured:
    """(number, case) -> one value a round; and what was left out, with the reason, which is said at once."""

    console: Console
    values: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    omissions: list[Omission] = field(default_factory=list)

    def leave_out(self, what: str, why: object, failed: bool = False) -> None:
        """Note that ``what`` is not measured."""
        text = why.message if isinstance(why, BenchError) else str(why)
        one = Omission(what, printable(" ".join(text.split())), failed)
        self.omissions.append(one)
        self.console.print(f"not measured: {one}", highlight=False, markup=False, soft_wrap=True)


class Clock:
    """Whether there is time for one more block of measurements, before ``deadline`` (of time.monotonic)."""

    def __init__(self, deadline: float, now: Callable[[], float] = time.monotonic) -> None:
        self._deadline, self._now = deadline, now
        self._longest = 0.0

    def is_up(self) -> bool:
        """Whether the deadline has passed."""
        return self._now() >= self._deadline

    def has_room(self) -> bool:
        """Whether a block fits that takes as long as the longest so far."""
        return self._now() + self._longest < self._deadline

    @contextmanager
    def block(self) -> Iterator[None]:
        """One block of measurements."""
        began = self._now()
        yield
        self._longest = max(self._longest, self._now() - began)


def measure_all(
    workloads: Sequence[Workload], cases: Sequence[Case], place: Place, rounds: int, clock: Clock, console: Console
) -> Measured:
    """One value a round for each number of each workload in each case, as many rounds as there is time for.

    A round of a workload counts only as a whole. What fails once is left out. Raises BenchError for no case at all.
    """
    measured = Measured(console)
    chosen = [workload for workload in workloads if _can_be_measured(workload, measured)]
    failed: set[tuple[str, str]] = set()
    with ExitStack() as stack:
        offered = _prepared(stack, cases, place, measured, console)
        show = stack.enter_context(progress(console, rounds * len(chosen) * len(offered)))
        for number in range(rounds):
            for workload in chosen:
                if not clock.has_room():
                    measured.leave_out(f"{workload.metric.title}, round {number + 1}", "the time is up")
                    continue
                ready = [case for case in rotated(offered, number) if (workload.metric.name, case.name) not in failed]
                with clock.block():
                    found = _block(workload, ready, place, clock, f"round {number + 1}/{rounds}", show)
                for name, outcome in found.items():
                    if isinstance(outcome, BenchError):
                        failed.add((workload.metric.name, name))
                        title = next(case.title for case in cases if case.name == name)
                        measured.leave_out(f"{workload.metric.title}, {title}", outcome, failed=True)
                        _forget(measured, workload, name)
                        continue
                    for metric, value in outcome.items():
                        measured.values[metric, name].append(value)
    return measured


def rotated(items: Sequence[T], number: int) -> list[T]:
    """``items``, beginning with another one for each ``number``."""
    shift = number % len(items) if items else 0
    return [*items[shift:], *items[:shift]]


def _block(
    workload: Workload, cases: Sequence[Case], place: Place, clock: Clock, label: str, show: Show
) -> dict[str, Figures | BenchError]:
    """One workload in all ``cases``; nothing where the time was up before the last of them."""
    found: dict[str, Figures | BenchError] = {}
    metric = workload.metric
    for case in cases:
        if clock.is_up():
            return {}
        doing = f"{label}: {metric.title}, {case.title}"
        show(doing)
        try:
            figures = workload.measure(case, place)
        except NotOffered:
            show(doing, "-")
        except BenchError as error:
            found[case.name] = error
            show(doing, "failed")
        else:
            found[case.name] = figures
            show(doing, f"{figures[metric.name]:,.{metric.digits}f} {metric.unit}")
    return found


def _forget(measured: Measured, workload: Workload, case: str) -> None:
    for metric in workload.metrics:
        measured.values.pop((metric.name, case), None)


def _can_be_measured(workload: Workload, measured: Measured) -> bool:
    reason = missing(workload.needs)
    if reason:
        measured.leave_out(workload.metric.title, reason)
    return reason is None


def _prepared(
    stack: ExitStack, cases: Sequence[Case], place: Place, measured: Measured, console: Console
) -> list[Case]:
    """Those of ``cases`` that this machine offers, ready until ``stack`` is closed. Raises BenchError for none."""
    offered = []
    with progress(console, len(cases)) as show:
        for case in cases:
            show(f"preparing {case.title}")
            try:
                stack.enter_context(case.prepared(place.net))
            except NotOffered as reason:
                measured.leave_out(case.title, reason)
                show(f"preparing {case.title}", "-")
            except BenchError as error:
                measured.leave_out(case.title, error, failed=True)
                show(f"preparing {case.title}", "failed")
            else:
                offered.append(case)
                show(f"preparing {case.title}", "ready")
    if not offered:
        raise BenchError("none of the cases can be measured here: " + "; ".join(map(str, measured.omissions)))
    return offered


@contextmanager
def progress(console: Console, total: int) -> Iterator[Show]:
    """A bar on a terminal, a line a result elsewhere."""
    if not console.is_terminal:

        def lines(doing: str, result: str | None = None) -> None:
            if result is not None:
                console.print(f"{doing}: {result}", highlight=False, markup=False, soft_wrap=True)

        yield lines
        return

    columns = (MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    # Drawing takes time of the processors that are measured.
    with Progress(*columns, console=console, refresh_per_second=2, transient=True) as bar:
        task = bar.add_task("", total=total)

        def update(doing: str, result: str | None = None) -> None:
            bar.update(task, description=doing if result is None else f"{doing}: {result}")
            if result is not None:
                bar.advance(task)

        yield update
