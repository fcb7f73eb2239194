"""A policy with the endpoints that it was compiled for, and what of it keeps a container from having it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from graft.errors import RefusedError
from graft.model.endpoint import Endpoint
from graft.model.transport import Transport
from graft.policy.born import grants_datagrams, why_not_born
from graft.policy.compiler import RuleSet, compile_policy
from graft.policy.limits import check_size
from graft.policy.model import Origin, Policy


@dataclass(frozen=True, slots=True)
class CompiledPolicy:
    """A policy's map entries, and the endpoints that they were compiled with."""

    policy: Policy
    endpoints: dict[str, Endpoint]
    rules: RuleSet

    @property
    def supervised_transport(self) -> Transport:
        """The transport of a container that a supervisor serves under it: born where the policy permits, or swap."""
        return Transport.SWAP if why_not_born(self.policy, self.endpoints) else Transport.BORN

    @property
    def bears_datagrams(self) -> bool:
        """Whether UDP sockets of a container that is started under it are born on the host's stack."""
        return grants_datagrams(self.policy, self.endpoints)


def compile_for(
    policy: Policy, endpoints: Mapping[str, Endpoint], before: CompiledPolicy | None = None
) -> CompiledPolicy:
    """Compile ``policy`` with these endpoints, or return ``before`` if the endpoints that it names have not changed.

    Raises PolicyError, UsageError.
    """
    check_size(policy)
    named = {name: endpoints[name] for name in endpoint_names(policy) if name in endpoints}
    if before is not None and before.endpoints == named:
        return before
    return CompiledPolicy(policy, named, compile_policy(policy, endpoints))


def endpoint_names(policy: Policy) -> tuple[str, ...]:
    """The names of the endpoints in a policy's rules, each once."""
    named = [rule.endpoint for rule in policy.every_ingress]
    named += [rule.endpoint for rule in policy.egress if rule.endpoint]
    return tuple(dict.fromkeys(named))


def check_transport(transport: Transport, name: str, compiled: CompiledPolicy) -> None:
    """Raises RefusedError where a policy needs another transport than the container ``name`` was started with."""
    obstacle = why_not_born(compiled.policy, compiled.endpoints) if transport is Transport.BORN else None
    if obstacle:
        raise RefusedError(
            f"policy {compiled.policy.name}: {obstacle}; {name} was started with all its sockets on the host's stack",
            "start it again under that policy, for transport swap",
        )


def refuse_closed(policy: Policy, known: Mapping[str, Endpoint]) -> None:
    """Raises RefusedError where a container's own policy names an endpoint that is not open now: it may have been, when
    its start began.
    """
    if policy.origin is Origin.PAIRS:
        for name in endpoint_names(policy):
            if not known[name].open:
                raise RefusedError(f"policy: the endpoint {name!r} is not open any more", "start it again")
