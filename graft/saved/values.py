"""What is saved, as plain values and back: the body of a file, and the YAML of `graft export`.

    endpoint      {name: nx4, endpoint: 0.0.0.0:8080}           as in a policy file
    attachment    {container: docker:web, policy: {...}, ...}   the policy as its file would have it
    the whole     {version: 1, endpoints: {...}, attachments: [...]}

Reading reports every error at its field (graft/policy/fields.py), and with its line where the values came from YAML.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from graft.errors import UsageError
from graft.model.endpoint import Endpoint, parse_name
from graft.policy.document import Document, FieldPath, Value, format_path
from graft.policy.fields import Fields, choice
from graft.policy.model import Policy
from graft.policy.reader import check_document, read_endpoint
from graft.policy.writer import endpoint_value, policy_value
from graft.saved.model import (
    LastSeen,
    SavedAttachment,
    SavedState,
    parse_asked_transport,
    parse_cgroup,
    parse_container_id,
    parse_target,
    saved_state,
)

EXPORT_VERSION = "1"
MAX_SAVED = 4096
"""Endpoints in an export, and attachments."""

_RELAYS = {"splice": "splice", "kernel": "kernel"}
_ATTACHMENT_KEYS = ("container", "transport", "relay", "last", "policy")


def attachment_value(saved: SavedAttachment) -> dict[str, Value]:
    """The value of an attachment."""
    value: dict[str, Value] = {"container": saved.target.text}
    if saved.transport is not None:
        value["transport"] = str(saved.transport)
    if saved.relay is not None:
        value["relay"] = saved.relay
    last: dict[str, Value] = {"cgroup": saved.last.cgroup, "id": saved.last.id}
    if saved.last.transport is not None:
        last["transport"] = str(saved.last.transport)
    if any(last.values()):
        value["last"] = {key: found for key, found in last.items() if found}
    return {**value, "policy": policy_value(saved.policy)}


def endpoint_file_value(endpoint: Endpoint) -> dict[str, Value]:
    """The value of an endpoint's own file."""
    return {"name": endpoint.name, "endpoint": endpoint_value(endpoint)}


def state_value(state: SavedState) -> dict[str, Value]:
    """The value of the whole."""
    return {
        "version": EXPORT_VERSION,
        "endpoints": {endpoint.name: endpoint_value(endpoint) for endpoint in state.endpoints},
        "attachments": [attachment_value(one) for one in state.attachments],
    }


# ---- back -------------------------------------------------------------------------------------------


def plain_document(value: Any) -> Document:
    """The document of values that were not YAML (of JSON): every line is 1."""
    plain = _plain(value)
    return Document(plain, dict.fromkeys(_paths(plain, ()), 1))


def _plain(value: Any) -> Value:
    """Numbers become text, as in YAML (graft/policy/document.py)."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return value if value is None or isinstance(value, (bool, str)) else str(value)


def _paths(value: Value, path: FieldPath) -> Iterator[FieldPath]:
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _paths(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _paths(inner, (*path, index))


def read_endpoint_file(document: Document) -> Endpoint | None:
    """The endpoint in a file of its own; None where the document has problems then."""
    fields = Fields(document, (), document.value, ("name", "endpoint"))
    name = fields.text("name", parse_name)
    if name is None or document.at(("endpoint",)) is None:
        document.report((), "no name, or no endpoint")
        return None
    found = list(read_endpoint(document, ("endpoint",), name, document.at(("endpoint",))))
    return found[0] if found and not document.problems else None


def read_attachment(
    document: Document, path: FieldPath = (), known: Mapping[str, Endpoint] | None = None
) -> SavedAttachment | None:
    """The attachment at ``path``; None where the document has problems then.

    ``known`` are the endpoints that its policy may name, None if that is not to be checked.
    """
    before = len(document.problems)
    fields = Fields(document, path, document.at(path), _ATTACHMENT_KEYS)
    target = fields.text("container", parse_target)
    transport = fields.text("transport", parse_asked_transport)
    relay = fields.text("relay", choice(_RELAYS))
    last = _read_last(document, (*path, "last"))
    policy = _read_policy(document, (*path, "policy"), known)
    if target is None and fields.valid:
        fields.report(("container",), "the key is missing", "container: docker:web")
    if target is None or policy is None or len(document.problems) > before:
        return None
    return SavedAttachment(target, policy, transport, relay, last)


def _read_last(document: Document, path: FieldPath) -> LastSeen:
    if path not in document.lines:
        return LastSeen()
    fields = Fields(document, path, document.at(path), ("cgroup", "id", "transport"))
    return LastSeen(
        fields.text("cgroup", parse_cgroup) or "",
        fields.text("id", parse_container_id) or "",
        fields.text("transport", parse_asked_transport),
    )


def _read_policy(document: Document, path: FieldPath, known: Mapping[str, Endpoint] | None) -> Policy | None:
    if path not in document.lines:
        document.report(path, "the key is missing", "policy: as in a policy file")
        return None
    result = check_document(document.below(path), known)
    document.take_problems(path, result.problems)
    return result.policy


def read_state(document: Document) -> SavedState | None:
    """The whole; None where the document has problems then. Every policy is checked with the endpoints beside it."""
    fields = Fields(document, (), document.value, ("version", "endpoints", "attachments"))
    fields.text("version", _check_version)
    named = fields.of_type("endpoints", dict, "NAME: ADDR:PORT") or {} if document.at(("endpoints",)) else {}
    listed = fields.of_type("attachments", list, "of containers") or [] if document.at(("attachments",)) else []
    for key, count in (("endpoints", len(named)), ("attachments", len(listed))):
        if count > MAX_SAVED:
            document.report((key,), f"more than {MAX_SAVED} of them")
            return None
    endpoints: list[Endpoint] = []
    for name, value in named.items():
        endpoints += read_endpoint(document, ("endpoints", name), name, value)
    known = {endpoint.name: endpoint for endpoint in endpoints}
    attachments = _read_attachments(document, len(listed), known)
    return None if document.problems else saved_state(endpoints, attachments)


def _check_version(text: str, field: str) -> None:
    if text != EXPORT_VERSION:
        raise UsageError(f"{field}: this Graft reads version {EXPORT_VERSION}", "export it again")


def _read_attachments(document: Document, count: int, known: Mapping[str, Endpoint]) -> list[SavedAttachment]:
    """Each once, checked with ``known`` and with what all of their policies declare: one may use another's."""
    declared = dict(known)
    for index in range(count):
        path = ("attachments", index)
        one = read_attachment(document, path)
        if one is not None:
            _check_declared(document, (*path, "policy"), one.policy, declared)
            declared |= {endpoint.name: endpoint for endpoint in one.policy.endpoints}
    found: dict[str, SavedAttachment] = {}
    for index in range(count if not document.problems else 0):
        one = read_attachment(document, ("attachments", index), declared)
        if one is not None and one.target.text in found:
            document.report(("attachments", index, "container"), f"{one.target.text} is there twice")
        elif one is not None:
            found[one.target.text] = one
    return list(found.values())


def _check_declared(document: Document, path: FieldPath, policy: Policy, known: Mapping[str, Endpoint]) -> None:
    """Endpoints have one name space: what a policy declares must not contradict an endpoint or another policy."""
    for endpoint in policy.endpoints:
        other = known.get(endpoint.name, endpoint)
        if other != endpoint:
            where = (*path, "endpoints", endpoint.name)
            document.report(where, f"{format_path((endpoint.name,))} is at {other.spec} elsewhere", "one address")
