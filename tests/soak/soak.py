"""A soak from its start to its report."""

from __future__ import annotations

import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path

from tests.soak import accounts
from tests.soak.accounts import Account
from tests.soak.clients import Client, Servers, serving
from tests.soak.containers import FORBIDDEN_PORT, Box, DirectBox, KernelBox, PodmanBox, RunBox, SpliceBox, SwapBox
from tests.soak.events import Events
from tests.soak.excuses import judge
from tests.soak.services import SERVICES, Nginx, Service
from tests.support import engines
from tests.support.installation import Host
from tests.support.shell import output
from tests.support.wait import until

_WORKER = Path(__file__).with_name("worker.c")
_PAUSE = 0.5
_KILLS_FOR_A_LOSS = 100
"""docs/splice.md: of what graftd accepts in its last 30 microseconds nobody knows: 2 in 490 kills."""
_SETTLED = 60.0


@dataclass
class Report:
    """What a soak has found. ``problems`` is empty where it passes."""

    seed: int
    seconds: float = 0.0
    containers: int = 0
    requests: int = 0
    from_containers: int = 0
    forbidden_tried: int = 0
    excused: int = 0
    lost_with_graftd: int = 0
    events: dict[str, int] = field(default_factory=dict)
    before: Account | None = None
    after: Account | None = None
    problems: list[str] = field(default_factory=list)


@contextmanager
def _boxes(host: Host, folder: Path) -> Iterator[list[Box]]:
    """Twenty containers, started."""
    folder.mkdir()
    worker = folder / "worker"
    output(["gcc", "-O1", "-static", "-Wall", "-Werror", "-o", worker, _WORKER])
    host.graft("ep", "add", "soak-out", "0.0.0.0:dynamic")
    root = engines.make_root(folder / "root")
    numbers = count(1)
    short = Path(tempfile.mkdtemp(prefix="graft-soak-"))
    made: list[Box] = []

    def make(kind: type[Box], service: Service, at: object = host) -> None:
        number = next(numbers)
        made.append(kind(at, service, folder / f"box{number}", number, worker))  # type: ignore[arg-type]

    with ExitStack() as stack:
        stack.callback(shutil.rmtree, short, ignore_errors=True)
        podman = stack.enter_context(engines.podman(host, short, root))
        for kind in (SwapBox, RunBox, DirectBox, SpliceBox):
            for service in SERVICES:
                make(kind, service)
        make(KernelBox, Nginx())
        for _ in range(3):
            make(PodmanBox, Nginx(), podman)
        for box in made:
            stack.callback(box.stop)
        for box in made:
            box.start()
        yield made


def _listening(host: Host) -> set[int]:
    """The TCP ports at which the host's namespace has listeners."""
    return {int(found) for found in re.findall(r":(\d+)\s", host.netns.run("ss", "-Hltn"))}


def _strange_listeners(host: Host, boxes: Sequence[Box]) -> list[str]:
    """What the host's namespace listens at, though no endpoint has it. Between two events."""
    found = _listening(host) - {box.port for box in boxes} - {FORBIDDEN_PORT}
    return [f"the host listens at {port}, which no endpoint has" for port in sorted(found)]


def _steady(host: Host) -> Account:
    """The account, once two in a row are alike in all but memory."""
    deadline, before = time.monotonic() + _SETTLED, accounts.account(host)
    while time.monotonic() < deadline:
        time.sleep(2.0)
        now = accounts.account(host)
        if (now.descriptors, now.entries, now.processes) == (before.descriptors, before.entries, before.processes):
            return now
        before = now
    return before


def _work(host: Host, boxes: Sequence[Box], events: Events, seconds: float, show: Callable[[str], None]) -> list[str]:
    """Events for so long. Gives what is wrong between them."""
    end, problems = time.monotonic() + seconds, list[str]()
    while time.monotonic() < end:
        name = events.happen()
        problems += _strange_listeners(host, boxes)
        left = max(0.0, end - time.monotonic())
        show(f"{left:5.0f} s left, {sum(events.counts.values())} events, the last: {name}")
        time.sleep(_PAUSE)
    return problems


def soak(host: Host, folder: Path, seconds: float, seed: int, show: Callable[[str], None]) -> Report:
    """A soak of so many ``seconds``, not counting its start and end. Raises AssertionError where something that was
    killed does not come back.
    """
    report = Report(seed)
    with serving(host) as servers, _boxes(host, folder) as boxes:
        clients = [Client(box) for box in boxes]
        try:
            events = Events(host, boxes, seed)
            time.sleep(5.0)  # pools and caches fill
            report.before = _paused(clients, host)
            begun = time.monotonic()
            report.problems += _work(host, boxes, events, seconds, show)
            report.seconds = time.monotonic() - begun
            report.after = _paused(clients, host)
        finally:
            for client in clients:
                client.stop()
        for box in boxes:
            box.stop()
        _judge(report, boxes, clients, servers, events)
    try:
        until("nothing is left", lambda: not accounts.left(host), 60)
    except AssertionError:
        report.problems += accounts.left(host)
    return report


def _paused(clients: Sequence[Client], host: Host) -> Account:
    """The account while no client asks. (Those inside of the containers do: they have one socket at a time.)"""
    for client in clients:
        client.pause()
    found = _steady(host)
    for client in clients:
        client.pause(False)
    return found


def _judge(report: Report, boxes: Sequence[Box], clients: Sequence[Client], servers: Servers, events: Events) -> None:
    failures = [*chain.from_iterable(box.failures for box in boxes), *chain.from_iterable(c.failures for c in clients)]
    kills = events.counts["kill graftd"]
    verdict = judge(
        failures, list(chain.from_iterable(box.excuses for box in boxes)), max(1, kills // _KILLS_FOR_A_LOSS)
    )
    report.containers, report.requests = len(boxes), sum(client.requests for client in clients)
    report.from_containers = sum(box.tally.requests for box in boxes)
    report.forbidden_tried = sum(box.tally.forbidden for box in boxes)
    report.excused, report.lost_with_graftd = verdict.excused, len(verdict.rare)
    report.events = dict(events.counts)
    for one in verdict.unexcused:
        near = ", ".join(events.near(one)) or "nothing"
        report.problems.append(f"{one.who}: failed after {one.ended - one.begun:.1f} s: {one.what} ({near} happened)")
    report.problems += servers.reached
    report.problems += chain.from_iterable(box.succeeded for box in boxes)
    report.problems += [f"{box.name}: its client has asked nothing" for box in boxes if not box.tally.requests]
    if report.before and report.after:
        report.problems += report.after.excess(report.before)
