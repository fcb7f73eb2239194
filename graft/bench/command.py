"""`graft bench`: the whole run, from options to results."""

from __future__ import annotations

import datetime
import os
import platform
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from graft import __version__
from graft.bench import growth
from graft.bench.attached import ATTACHED
from graft.bench.bypass4netns import BYPASSES
from graft.bench.cases import BRIDGE_PORT, INNER_PORT, PLAIN_CASES, Case
from graft.bench.options import Options
from graft.bench.proxies import PROXIES
from graft.bench.report import Column, Growth, Results, Run
from graft.bench.runner import Clock, Measured, measure_all, progress
from graft.bench.scratch import scratch
from graft.bench.supervised import SUPERVISED
from graft.bench.topology import topology
from graft.bench.usernet import USERNETS
from graft.bench.workloads import Place
from graft.errors import UnfinishedError
from graft.kernel.credentials import require_root

CASES: tuple[Case, ...] = (*PLAIN_CASES, *ATTACHED, *SUPERVISED, *PROXIES, *BYPASSES, *USERNETS)
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def measure(options: Options, command: str, console: Console) -> Results:
    """Measure, with progress on ``console``; ``command`` is what the report says was run.

    All that is made for it is removed when it ends, by KeyboardInterrupt too. Raises PrivilegeError, KernelError and
    BenchError where nothing can be measured at all.
    """
    require_root()
    began = time.monotonic()
    console.print(plan(options), highlight=False, markup=False, soft_wrap=True)
    with _interruptible(), scratch() as own, topology(own, public=BRIDGE_PORT, inner=INNER_PORT) as net:
        place = Place(net, options.seconds)
        measured = Measured(console)
        if options.workloads:
            clock = Clock(began + options.limit_of_cases)
            measured = measure_all(options.workloads, options.cases, place, options.rounds, clock, console)
        grown = _measure_growth(options, place, Clock(began + options.limit), measured, console)
    metrics = [metric for workload in options.workloads for metric in workload.metrics]
    columns = [Column(case.name, case.title, case.wanted) for case in options.cases]
    return Results(_run(options, command), metrics, columns, measured.values, grown, measured.omissions)


def plan(options: Options) -> str:
    """A line that says what comes, and how long it takes at the most."""
    about, most = options.expected / 60, options.limit / 60
    parts = [f"{len(options.workloads)} workloads in {len(options.cases)} cases"] if options.workloads else []
    parts += [f"up to {max(options.rules):,} rules"] if options.rules else []
    parts += [f"up to {max(options.containers):,} containers"] if options.containers else []
    return (
        f"{', '.join(parts)}; {options.rounds} rounds of"
        f" {options.seconds:g} s: about {about:.1f} min; nothing is begun after {most:.1f} min"
    )


def raise_if_failed(results: Results) -> None:
    """Raises UnfinishedError if anything could not be measured that should have been."""
    failed = [str(one) for one in results.omissions if one.failed]
    if failed:
        raise UnfinishedError("not measured: " + "; ".join(failed))


def _measure_growth(options: Options, place: Place, clock: Clock, measured: Measured, console: Console) -> list[Growth]:
    steps = growth.step_count(options.rules, options.containers, options.rounds)
    if not options.rules and not options.containers:
        return []
    with progress(console, steps) as show:
        return growth.measure_growth(place, options.rules, options.containers, options.rounds, clock, show, measured)


def _run(options: Options, command: str) -> Run:
    return Run(
        command=command,
        date=datetime.date.today().isoformat(),
        kernel=platform.release(),
        machine=f"{os.cpu_count()} cores, {platform.machine()}",
        version=__version__,
        rounds=options.rounds,
        seconds=options.seconds,
    )


@contextmanager
def _interruptible() -> Iterator[None]:
    """Have the signals that end a command raise KeyboardInterrupt, once: what follows must not stop the cleaning up."""

    def interrupt(_number: int, _frame: object) -> None:
        for one in _SIGNALS:
            signal.signal(one, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {one: signal.signal(one, interrupt) for one in _SIGNALS}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
