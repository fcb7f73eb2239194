"""`graft top`: what happens in a second, out of two samples. Pure, but for `watch`, which takes them.

Graft is not on the data path of a socket that it replaced, so bytes are known only of what graftd relays. A connection
counts when the connect hook grants it, or when graftd relays one into the container; who connects to a container's own
listener on the host's stack, no hook sees. Calls are those that a supervisor is notified of (transports swap and born).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from graft.commands import sample
from graft.commands.sample import ContainerSample, Sample
from graft.datapath.layout import HookDecision
from graft.model.settings import Settings
from graft.state.call_times import CallTimes
from graft.state.records import Container


@dataclass(frozen=True, slots=True)
class ContainerRates:
    """One container. Rates are for a second, and None where there are not two samples of it, or nothing counts it.

    ``sockets`` on the host's stack, None if the kernel did not list them in time; ``refusals`` since it is attached;
    ``calls`` between the samples, or of a first one since the container is attached; None where it has no supervisor.
    """

    container: Container
    sockets: int | None
    refusals: int
    connection_rate: float | None = None
    bytes_in_rate: float | None = None
    bytes_out_rate: float | None = None
    refusal_rate: float | None = None
    calls: CallTimes | None = None
    call_rate: float | None = None


@dataclass(frozen=True, slots=True)
class Rates:
    """One installation between two samples, ``seconds`` apart; 0 for a first one, which has no rates."""

    sample: Sample
    seconds: float
    containers: tuple[ContainerRates, ...]

    @property
    def calls(self) -> CallTimes | None:
        """Those of all containers; None where none has a supervisor."""
        known = [one.calls for one in self.containers if one.calls is not None]
        return sum(known, CallTimes()) if known else None


def rates(before: Sample | None, after: Sample) -> Rates:
    """What happened between two samples. Pure."""
    seconds = 0.0 if before is None else max(0.0, after.taken - before.taken)
    earlier = {} if before is None or not seconds else {one.container.id: one for one in before.containers}
    return Rates(
        after, seconds, tuple(_of_container(earlier.get(one.container.id), one, seconds) for one in after.containers)
    )


def increase(before: int, after: int) -> int:
    """How much a counter has grown. One that is less than before has begun anew, at 0, as after a restart of graftd."""
    return after - before if after >= before else after


def _of_container(before: ContainerSample | None, after: ContainerSample, seconds: float) -> ContainerRates:
    now = ContainerRates(
        container=after.container,
        sockets=None if after.sockets is None else sum(after.sockets.values()),
        refusals=after.refusals,
        calls=after.calls,
    )
    if before is None:
        return now
    calls = None if after.calls is None else after.calls.since(before.calls or CallTimes())
    connections = increase(_granted(before), _granted(after))
    bytes_in = bytes_out = None
    if before.relayed is not None and after.relayed is not None:
        connections += increase(before.relayed.connections_in, after.relayed.connections_in)
        bytes_in = increase(before.relayed.bytes_in, after.relayed.bytes_in) / seconds
        bytes_out = increase(before.relayed.bytes_out, after.relayed.bytes_out) / seconds
    return replace(
        now,
        connection_rate=connections / seconds,
        bytes_in_rate=bytes_in,
        bytes_out_rate=bytes_out,
        refusal_rate=increase(before.refusals, after.refusals) / seconds,
        calls=calls,
        call_rate=None if calls is None else calls.count / seconds,
    )


def _granted(one: ContainerSample) -> int:
    return one.decisions.get(HookDecision.CONNECTED, 0)


def watch(settings: Settings, interval: float) -> Iterator[Rates]:
    """The rates of now and of every ``interval`` seconds from then on; the first has none. Raises ConflictError."""
    before = None
    while True:
        after = sample.take(settings)
        yield rates(before, after)
        before = after
        time.sleep(interval)
