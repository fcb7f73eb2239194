"""Endpoints and policies -> the plain values of a policy file: what graft/policy/reader.py reads, backwards.

What is not written is the reader's default, so that the text is one that an operator could have written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from graft.model.endpoint import ANY_PROTOCOL, Endpoint
from graft.model.unix_socket import DEFAULT_MODE, SCHEME, UnixSocket
from graft.policy.model import EgressRule, IngressRule, Policy, UnixRule, Verdict

if TYPE_CHECKING:
    from graft.policy.document import Value  # which imports yaml


def endpoint_value(endpoint: Endpoint) -> Value:
    """The value of an endpoint's name: its address alone, or a mapping where it has more."""
    more: dict[str, Value] = {}
    if endpoint.unix is not None:
        more |= _unix_fields(endpoint.unix)
    elif endpoint.protocols != ANY_PROTOCOL:
        more["protocol"] = endpoint.protocols.label
    if endpoint.netns is not None:
        more["netns"] = endpoint.netns
    if endpoint.open:
        more["open"] = True
    if endpoint.dual_stack:
        more["dual_stack"] = True
    if endpoint.multicast:
        more["multicast"] = [str(group) for group in endpoint.multicast]
    return {"address": endpoint.spec, **more} if more else endpoint.spec


def _unix_fields(unix: UnixSocket) -> dict[str, Value]:
    fields: dict[str, Value] = {}
    if unix.owner is not None:
        fields["owner"] = unix.owner
    if unix.mode != DEFAULT_MODE:
        fields["mode"] = f"{unix.mode:04o}"
    return fields


def policy_value(policy: Policy) -> dict[str, Value]:
    """The value of a whole policy."""
    value: dict[str, Value] = {"name": policy.name}
    if policy.open:
        value["open"] = True
    if policy.endpoints:
        value["endpoints"] = {endpoint.name: endpoint_value(endpoint) for endpoint in policy.endpoints}
    if policy.every_ingress:
        value["ingress"] = [_ingress_value(rule) for rule in policy.every_ingress]
    if policy.egress:
        value["egress"] = [_egress_value(rule) for rule in policy.egress]
    default: dict[str, Value] = {
        "bind": policy.bind_default.name.lower(),
        "connect": policy.connect_default.name.lower(),
    }
    if policy.other_default is not None:
        default["other"] = policy.other_default.name.lower()
    value["default"] = default
    return value


def _ingress_value(rule: IngressRule | UnixRule) -> Value:
    if isinstance(rule, UnixRule):
        return {"bind": SCHEME + rule.path, "endpoint": rule.endpoint}
    value: dict[str, Value] = {"bind": str(rule.bind), "endpoint": rule.endpoint}
    if rule.protocols is not None:
        value["protocol"] = rule.protocols.label
    return value


def _egress_value(rule: EgressRule) -> Value:
    value: dict[str, Value] = {"to": str(rule.to)}
    if rule.ports is not None:
        value["ports"] = [str(ports) for ports in rule.ports]
    if rule.protocols is not None:
        value["protocol"] = rule.protocols.label
    if rule.verdict is Verdict.GRANT:
        value["endpoint"] = rule.endpoint
    else:
        value["action"] = rule.verdict.name.lower()
    return value


def policy_text(policy: Policy, comment: str) -> str:
    """A policy file, with ``comment`` at its head."""
    import yaml

    head = "".join(f"# {line}\n" for line in comment.splitlines())
    return head + yaml.safe_dump(policy_value(policy), sort_keys=False, allow_unicode=False, width=100)
