"""What a run measures, how often and how long: from the options of the command. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from graft.bench.cases import Case
from graft.bench.report import BASELINE
from graft.bench.workloads import PEER, Workload
from graft.errors import UsageError

Item = TypeVar("Item")

RULES, CONTAINERS = "rules", "containers"
"""Besides the workloads: the cost of a call as these grow."""

_RULE_COUNTS = (1, 10, 100, 1000, 10000)
_CONTAINER_COUNTS = (1, 10, 50, 200)

QUICK_CASES = (BASELINE, "bridge", "direct", "swap", "born", "splice")
QUICK_WORKLOADS = ("pingpong", "accept", "connect", RULES, CONTAINERS)
_QUICK_RULE_COUNTS = (1, 10000)
_QUICK_CONTAINER_COUNTS = (1, 20)

# What a measurement takes besides its time: to start and end a server and a client. Seconds, on a slow machine.
_STARTING = 0.7
_PREPARING = 2.5
_ATTACHING = 0.3


@dataclass(frozen=True, slots=True)
class Options:
    """One run. ``rules`` and ``containers`` are the numbers of them for the cost of growth; empty: not measured."""

    cases: Sequence[Case]
    workloads: Sequence[Workload]
    rounds: int
    seconds: float
    rules: Sequence[int]
    containers: Sequence[int]
    minutes: float | None

    @property
    def limit(self) -> float:
        """After how many seconds nothing more is begun."""
        return self.minutes * 60 if self.minutes is not None else 2 * self.expected + 60

    @property
    def expected(self) -> float:
        """About how many seconds the run takes."""
        return self._expected_of_cases + self._expected_of_growth

    @property
    def limit_of_cases(self) -> float:
        """After how many seconds the cases leave the rest of the time to growth."""
        return self.limit * self._expected_of_cases / self.expected

    @property
    def _expected_of_cases(self) -> float:
        if not self.workloads:
            return _PREPARING
        measurements = sum(_STARTING + max(self.seconds, shortest(workload)) for workload in self.workloads)
        return len(self.cases) * (_PREPARING + self.rounds * measurements) + _PREPARING

    @property
    def _expected_of_growth(self) -> float:
        measurements = self.rounds * (len(self.rules) + bool(self.rules) + 2 * len(self.containers))
        attached = len(self.rules) + max(self.containers, default=0)
        return measurements * (self.seconds + _STARTING) + attached * _ATTACHING


def shortest(workload: Workload) -> float:
    """How long a measurement takes at least, in seconds: wrk and iperf3 count whole ones."""
    return 0.0 if str(PEER) in workload.needs else 1.0


@dataclass(frozen=True, slots=True)
class Wishes:
    """The options as they were given; None: as a quick or a whole run has it."""

    quick: bool = False
    minutes: float | None = None
    rounds: int | None = None
    seconds: float | None = None
    cases: str | None = None
    workloads: str | None = None


def choose(wishes: Wishes, cases: Sequence[Case], workloads: Sequence[Workload]) -> Options:
    """The run that is wished for. The host is always among its cases. Raises UsageError, which names the option."""
    quick = wishes.quick
    wanted_cases = _names("--cases", wishes.cases, QUICK_CASES if quick else None, [case.name for case in cases])
    wanted = _names("--workloads", wishes.workloads, QUICK_WORKLOADS if quick else None, workload_names(workloads))
    return Options(
        cases=_only(cases, lambda case: case.name, {BASELINE, *wanted_cases}),
        workloads=_only(workloads, lambda workload: workload.metric.name, wanted),
        rounds=wishes.rounds if wishes.rounds is not None else 3 if quick else 5,
        seconds=wishes.seconds if wishes.seconds is not None else 0.3 if quick else 1.0,
        rules=(_QUICK_RULE_COUNTS if quick else _RULE_COUNTS) if RULES in wanted else (),
        containers=(_QUICK_CONTAINER_COUNTS if quick else _CONTAINER_COUNTS) if CONTAINERS in wanted else (),
        minutes=wishes.minutes,
    )


def workload_names(workloads: Sequence[Workload]) -> list[str]:
    """What ``--workloads`` knows: these, and the measurements of growth."""
    return [*(workload.metric.name for workload in workloads), RULES, CONTAINERS]


def _names(field: str, text: str | None, default: Sequence[str] | None, known: Sequence[str]) -> set[str]:
    """The names in a list with commas."""
    if text is None:
        return set(known if default is None else default)
    wanted = {name.strip() for name in text.split(",")}
    if unknown := sorted(wanted - set(known)):
        raise UsageError(f"{field}: {', '.join(map(repr, unknown))} not known", f"some of {', '.join(known)}")
    return wanted


def _only(items: Sequence[Item], name: Callable[[Item], str], wanted: set[str]) -> list[Item]:
    return [item for item in items if name(item) in wanted]
