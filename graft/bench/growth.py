"""The cost of a call as rules and containers grow: connect + close in transport direct, beside the host's.

A rule is a destination with a port. The destinations are all near the one that is connected to, so that the kernel's
longest-prefix search has something to compare; each point has a container of its own with so many rules. For the
number of containers one of them is measured while more and more are attached beside it.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, cycle
from pathlib import Path

from graft.bench.outputs import rounds_of
from graft.bench.own_graft import EGRESS
from graft.bench.process import BenchError, joined, kept, run, wait_until
from graft.bench.report import BASELINE, Growth, Point
from graft.bench.runner import Clock, Measured, Show, rotated
from graft.bench.topology import CLIENT_ADDRESS
from graft.bench.workloads import PATIENCE, PEER, Place, missing
from graft.commands.attach import attach
from graft.commands.policy_source import policy_of
from graft.errors import GraftError
from graft.kernel import cgroup
from graft.model.transport import Transport
from graft.state.installation import Installation

RULES = Growth("rules", "rules of the container")
CONTAINERS = Growth("containers", "containers attached")

PORTS = (443, 5432, 6379, 8443, 9092)
"""Of each destination, where there are so many rules: a policy has at most 2048 of egress."""

GROWTH_PORTS = range(9500, 10240)
"""Of the server; below those that the client's own connections have (topology.py)."""

_NEAR = ipaddress.IPv4Address("10.99.1.0")


def policy_text(rules: int) -> str:
    """A policy that grants so many destinations with a port, the last one the client's."""
    entries, left = [], rules - 1
    for number in count():
        if left <= 0:
            break
        ports = PORTS[:left]
        left -= len(ports)
        entries.append(f"  - {{to: {_NEAR + number}/32, ports: {list(ports)}, endpoint: {EGRESS}}}")
    entries.append(
        f"  - {{to: {CLIENT_ADDRESS}/32, ports: [{GROWTH_PORTS[0]}-{GROWTH_PORTS[-1]}], endpoint: {EGRESS}}}"
    )
    return "\n".join([f"name: rules-{rules}", "egress:", *entries, "default: deny", ""])


@dataclass
class Connects:
    """Measures connect + close of a program in a cgroup, in the host's namespace."""

    place: Place
    _ports: Iterator[int] = field(default_factory=lambda: cycle(GROWTH_PORTS), init=False)

    def measure(self, folder: Path) -> float:
        """The mean of one run, in microseconds. Raises BenchError.

        Each has a server port of its own: it does not search among ports in TIME_WAIT that the one before it left.
        """
        net, port = self.place.net, next(self._ports)
        with kept(net.client.enter(str(PEER), "serve", str(port))) as server:
            wait_until("listening", lambda: net.client.listens(port), server)
            command = [str(PEER), "connect", CLIENT_ADDRESS, str(port), str(self.place.connects)]
            return rounds_of(run(joined(folder, net.host.view(*command)), 2 * PATIENCE)).mean


def measure_growth(
    place: Place,
    rules: Sequence[int],
    containers: Sequence[int],
    rounds: int,
    clock: Clock,
    show: Show,
    measured: Measured,
) -> list[Growth]:
    """Both series, as far as there is time."""
    if reason := missing([str(PEER)]):
        measured.leave_out("growth", reason)
        return []
    place.net.graft.ensure_up()
    graft, connects = Installation(place.net.graft.settings), Connects(place)
    found = []
    try:
        with graft:
            found.append(_of_rules(graft, connects, rules, rounds, clock, show))
            found.append(_of_containers(graft, connects, containers, rounds, clock, show))
    except (BenchError, GraftError) as error:
        measured.leave_out("growth", error.message, failed=True)
    if clock.is_up():
        measured.leave_out("some of the growth", "the time is up")
    return [growth for growth in found if growth.points]


def _of_rules(
    graft: Installation, connects: Connects, counts: Sequence[int], rounds: int, clock: Clock, show: Show
) -> Growth:
    folders: dict[str, Path] = {BASELINE: connects.place.net.programs}
    for number in counts:
        doing = f"attaching a container with {number:,} rules"
        show(doing)
        policy = connects.place.folder / f"rules-{number}.yaml"
        policy.write_text(policy_text(number))
        folders[str(number)] = _attached(graft, connects.place, f"rules-{number}", policy)
        show(doing, "done")
    values = _rounds(connects, folders, rounds, clock, show, "with {} rules")
    return RULES.with_points(_points(values, counts))


def _of_containers(
    graft: Installation, connects: Connects, counts: Sequence[int], rounds: int, clock: Clock, show: Show
) -> Growth:
    policy = connects.place.folder / "container.yaml"
    policy.write_text(policy_text(1))
    points: list[Point] = []
    folders: list[Path] = []
    for number in counts:
        doing = f"attaching {number - len(folders):,} containers"
        show(doing)
        while len(folders) < number and not clock.is_up():
            folders.append(_attached(graft, connects.place, f"container-{len(folders)}", policy))
        show(doing, "done")
        if len(folders) < number:
            break
        beside = {BASELINE: connects.place.net.programs, str(number): folders[0]}
        points += _points(_rounds(connects, beside, rounds, clock, show, "beside {} containers"), [number])
    return CONTAINERS.with_points(points)


def _attached(graft: Installation, place: Place, name: str, policy: Path) -> Path:
    folder = place.net.scratch.cgroup / name
    cgroup.make(folder)
    attach(graft, str(folder), policy_of(graft.settings, name, policy, [], []), Transport.DIRECT)
    return folder


def _rounds(
    connects: Connects, folders: dict[str, Path], rounds: int, clock: Clock, show: Show, label: str
) -> dict[str, list[float]]:
    """A value a round for each folder; only whole rounds count."""
    values: dict[str, list[float]] = {name: [] for name in folders}
    for number in range(rounds):
        if not clock.has_room():
            break
        found = {}
        for name in rotated(list(folders), number):
            where = "on the host" if name == BASELINE else label.format(f"{int(name):,}")
            doing = f"round {number + 1}/{rounds}: connect + close {where}"
            show(doing)
            found[name] = connects.measure(folders[name])
            show(doing, f"{found[name]:,.1f} us")
        for name, value in found.items():
            values[name].append(value)
    return values


def _points(values: dict[str, list[float]], counts: Sequence[int]) -> list[Point]:
    base = values[BASELINE]
    return [Point.of(number, values[str(number)], base) for number in counts if values[str(number)]]


def step_count(rules: Sequence[int], containers: Sequence[int], rounds: int) -> int:
    """How often `measure_growth` shows a result."""
    return len(rules) + len(containers) + rounds * (1 + len(rules) + 2 * len(containers))
