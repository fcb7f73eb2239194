"""`graft policy learn`: watches a container, and proposes the smallest policy that would have allowed what it did."""

from __future__ import annotations

import time
from collections.abc import Callable

from graft.commands.policy_source import policy_name
from graft.commands.trace import Batch, Filter, Traced, watch
from graft.datapath.decisions import Event
from graft.datapath.layout import TracedCall, TracedOutcome
from graft.errors import UsageError
from graft.model.endpoint import PROTOCOLS
from graft.model.transport import Transport
from graft.policy.learning import Observation, learn
from graft.policy.limits import MAX_RULES
from graft.policy.model import Policy
from graft.state.installation import Installation
from graft.state.records import Container

_CALLS = frozenset({TracedCall.BIND, TracedCall.CONNECT, TracedCall.SEND})
_ELSEWHERE = (
    "Not in it: what was left to network namespaces that it made itself. A policy cannot leave that to it",
    "without leaving it the same on the host's stack, which it shares.",
)
_RANGES = "Each port that it bound of a range has an endpoint of its own: name the range to grant all of them."


class Learning:
    """What was seen of a container so far."""

    def __init__(self, graft: Installation, container: Container) -> None:
        self._graft, self._container = graft, container
        self._seen: set[Observation] = set()
        self.lost = 0
        self.has_gaps = False
        self._was_elsewhere = False

    def watch(self, seconds: float, step: Callable[[float, int], object]) -> None:
        """Watch for so long. ``step`` is called now and then with the seconds that are over, and how much was seen.

        Raises UsageError where that is more than a policy can have.
        """
        begun = time.monotonic()
        batches = watch(self._graft, Filter(self._container.id, _CALLS))
        try:
            for batch in batches:
                self._note(batch)
                passed = time.monotonic() - begun
                step(min(passed, seconds), len(self._seen))
                if passed >= seconds:
                    return
        except KeyboardInterrupt as interrupt:
            self._note(batches.throw(interrupt))  # which raises it again where the last batch was given
            raise

    def _note(self, batch: Batch) -> None:
        self.lost += batch.lost
        self.has_gaps |= batch.has_gap
        here = [one for one in batch.decisions if not is_elsewhere(one.event, self._container.transport)]
        self._was_elsewhere |= len(here) < len(batch.decisions)
        found = [_observation(one, self._container.transport) for one in here]
        self._seen.update(one for one in found if one is not None)
        if len(self._seen) > MAX_RULES:
            raise UsageError(
                f"container: {self._container.name} did more than {MAX_RULES} different things: no policy has so many"
                " rules",
                "write one for networks: graft trace shows what it does",
            )

    @property
    def policy(self) -> Policy:
        """The policy for what was seen."""
        listed = self._graft.endpoints.listing()
        known = {one.endpoint.name: one.endpoint for one in listed}
        declared = [one.endpoint.name for one in listed if one.declared]  # they go with the policy
        return learn(policy_name(self._container.name), self._seen, known, declared)

    @property
    def comment(self) -> str:
        """What whoever reads the policy has to know, in lines."""
        lines = [f"What {self._container.name} did while it was watched."]
        if self._was_elsewhere:
            lines += _ELSEWHERE
        ranges = {one.endpoint.name for one in self._graft.endpoints.listing() if one.endpoint.last_port}
        if any(one.is_bind and one.endpoint in ranges for one in self._seen):
            lines.append(_RANGES)
        return "\n".join(lines)


def is_elsewhere(event: Event, transport: Transport) -> bool:
    """Whether a direct container did this in a network namespace that it made itself, where the defaults let it.

    No rule names such a namespace: one for a destination, or a default, that leaves it to the container leaves it the
    same on the host's stack, which is where its other sockets are.
    """
    return transport is Transport.DIRECT and event.outcome is TracedOutcome.CONTAINER


def _observation(traced: Traced, transport: Transport) -> Observation | None:
    event, protocol = traced.event, PROTOCOLS.get(traced.protocol)
    if event.ip is None or protocol is None:
        return None
    endpoint = None if traced.endpoint is None else traced.endpoint.name
    if endpoint is None and traced.rule is not None and " = " in traced.rule.outcome:
        endpoint = traced.rule.outcome.split(" = ")[0]  # graftd relays it
    is_bind = event.call is TracedCall.BIND
    stays = endpoint is None and (
        event.outcome is TracedOutcome.CONTAINER or (is_bind and _has_any_port(event, transport))
    )
    got = _port_there(traced) if is_bind and endpoint is not None else 0
    return Observation(is_bind, protocol, event.ip, event.port, endpoint, stays, got)


def _has_any_port(event: Event, transport: Transport) -> bool:
    """Whether it is a bind of a datagram socket of a swap container to a port of the kernel's choice, by the default.

    It receives there only from where it may send to; a rule for it would have it receive from everybody.
    """
    return transport is Transport.SWAP and event.outcome is TracedOutcome.PASSED


def _port_there(traced: Traced) -> int:
    """Which port of its endpoint a bind got, 0 where nobody says. Where graftd relays, it is the rule that says it."""
    event, rule = traced.event, traced.rule
    if event.endpoint_port or rule is None:
        return event.endpoint_port
    return rule.port_of_endpoint(event.port)
