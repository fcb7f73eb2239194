"""The JSON schema of a policy file, for editors: they complete its keys, and mark mistakes while one types. Pure.

It accepts all that the reader accepts (graft/policy/reader.py), and refuses what can be seen in one value or rule:
whether rules fit their endpoints and each other is for `graft policy check`. An editor takes 8080 for a number, where
the reader has text, so a number may stand wherever a text may be one.

Draft 7, the latest that the language servers for YAML know. Regular expressions are those that Python and ECMAScript
have in common.
"""

from __future__ import annotations

from typing import Any

from graft.model.endpoint import MAX_ENDPOINT_NAME, MAX_GROUPS, MAX_POLICY_NAME
from graft.model.ports import MAX_PORT
from graft.model.unix_socket import MAX_PATH, SCHEME
from graft.policy.limits import MAX_RULES

Schema = dict[str, Any]

_OCTET = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = rf"({_OCTET}\.){{3}}{_OCTET}"
_IPV6 = "[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*"
_PORT = "(6553[0-5]|655[0-2][0-9]|65[0-4][0-9]{2}|6[0-4][0-9]{3}|[1-5][0-9]{4}|[1-9][0-9]{0,3})"
_PORTS = f"{_PORT}(-{_PORT})?"
_ADDRESS = rf"({_IPV4}|\[{_IPV6}\])"
_GROUP4 = rf"2(2[4-9]|3[0-9])(\.{_OCTET}){{3}}"
_GROUP6 = "([Ff]{2}[0-9A-Fa-f]{2}|0{0,4}):[0-9A-Fa-f:.]*"
_UNIX = rf"{SCHEME}(?!.*/\.{{1,2}}(/|$))(/[^/]+)+"
_NAME_FIRST, _NAME_REST = "[A-Za-z0-9]", "[A-Za-z0-9_.-]"
_IS_UNIX = {"type": "string", "pattern": f"^{SCHEME}"}


def policy_schema() -> Schema:
    """The schema of a whole policy."""
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Graft policy",
        "description": "What a container may do on the host's network stack.",
        **_mapping(
            {
                "name": _name(MAX_POLICY_NAME, "The policy's name."),
                "open": _switch("A container may ask for this policy by its environment."),
                "endpoints": {
                    "description": "Endpoints of the policy's own, by name: ADDR:PORT, or a mapping with more.",
                    "type": "object",
                    "propertyNames": _name(MAX_ENDPOINT_NAME, "An endpoint's name."),
                    "additionalProperties": _endpoint(),
                    "maxProperties": MAX_RULES,
                },
                "ingress": _rules(_ingress_rule(), "Which binds become which endpoint."),
                "egress": _rules(_egress_rule(), "Which destinations are reached through the host's stack."),
                "default": _default(),
            },
            required=["name"],
        ),
    }


def _mapping(properties: Schema, required: list[str]) -> Schema:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _rules(rule: Schema, description: str) -> Schema:
    return {"description": description, "type": "array", "items": rule, "maxItems": MAX_RULES}


def _text(pattern: str, description: str, *examples: str) -> Schema:
    """Text that no editor takes for a number."""
    return {"description": description, "type": "string", "pattern": f"^({pattern})$", "examples": list(examples)}


def _text_or_number(pattern: str, description: str) -> Schema:
    """Text that may consist of digits."""
    return {"description": description, "type": ["string", "number"], "pattern": f"^({pattern})$"}


def _name(longest: int, description: str) -> Schema:
    return _text_or_number(f"{_NAME_FIRST}{_NAME_REST}{{0,{longest - 1}}}", description) | {"minimum": 0}


def _endpoint_name(description: str) -> Schema:
    return _name(MAX_ENDPOINT_NAME, description)


def _switch(description: str) -> Schema:
    return {"description": description, "type": "boolean", "default": False}


def _one_of(description: str, *words: str) -> Schema:
    return {"description": description, "enum": list(words)}


def _endpoint() -> Schema:
    """An endpoint's value, in its short form or its long one."""
    return {"if": {"type": "object"}, "then": _long_endpoint(), "else": _endpoint_address()}


def _endpoint_address() -> Schema:
    what = "ADDR:PORT; PORT may be a range or dynamic. Or unix:/PATH, a unix socket of the host."
    pattern = f"{_ADDRESS}:({_PORTS}|dynamic|0)|{_UNIX}"
    return _text(pattern, what, "0.0.0.0:8080", "[::]:8080", "0.0.0.0:dynamic") | {"maxLength": len(SCHEME) + MAX_PATH}


def _long_endpoint() -> Schema:
    properties = {
        "address": _endpoint_address(),
        "protocol": _one_of("Which protocols it is for. If left out: any, which is both.", "tcp", "udp", "any"),
        "netns": _text_or_number(
            "/[^\\0]*|[A-Za-z0-9_.:@-]{1,255}", "The network namespace of the address: a name, a pid or a path."
        ),
        "open": _switch("A container may ask for it by its environment."),
        "dual_stack": _switch("At [::] only: it has IPv4 clients too."),
        "multicast": {
            "description": "Multicast groups that its sockets may join.",
            "type": "array",
            "items": _text(f"{_GROUP4}|{_GROUP6}", "A multicast group.", "239.1.1.1", "ff02::fb"),
            "minItems": 1,
            "maxItems": MAX_GROUPS,
        },
        "owner": _text_or_number(
            "[A-Za-z0-9_.-]{1,64}(:[A-Za-z0-9_.-]{1,64})?", "unix: only: USER or USER:GROUP of the socket."
        ),
        "mode": {
            "description": 'unix: only: its permissions, three octal digits. If left out: "0660".',
            "type": ["string", "integer"],
            "pattern": "^0?[0-7]{3}$",
            "minimum": 0,
            "maximum": 777,
        },
    }
    of_unix = {"netns": False, "multicast": False, "dual_stack": {"const": False}, "protocol": {"enum": ["tcp", "any"]}}
    return _mapping(properties, ["address"]) | {
        "if": {"properties": {"address": _IS_UNIX}, "required": ["address"]},
        "then": {"properties": of_unix},
        "else": {"properties": {"owner": False, "mode": False}},
    }


def _ingress_rule() -> Schema:
    what = "ADDR:PORT or ADDR:FIRST-LAST; ADDR may be *, PORT 0 is for binds of port 0. Or unix:/PATH."
    bind = _text(rf"({_ADDRESS}|\*):({_PORTS}|0)|{_UNIX}", what, "0.0.0.0:80", "*:80", "[::]:80")
    properties = {
        "bind": bind | {"maxLength": len(SCHEME) + MAX_PATH},
        "endpoint": _endpoint_name("What such a bind becomes."),
        "protocol": _one_of("If left out: all that the endpoint has.", "tcp", "udp", "any"),
    }
    return _mapping(properties, ["bind", "endpoint"]) | {
        "if": {"properties": {"bind": _IS_UNIX}, "required": ["bind"]},
        "then": {"properties": {"protocol": False}},
    }


def _egress_rule() -> Schema:
    properties = {
        "to": _text(
            f"{_IPV4}(/([12]?[0-9]|3[0-2]))?|{_IPV6}(/([1-9]?[0-9]|1[01][0-9]|12[0-8]))?",
            "A prefix; an address alone is itself only.",
            "10.0.0.0/8",
            "0.0.0.0/0",
            "::/0",
        ),
        "ports": {
            "description": "Ports and ranges. If left out: every port.",
            "type": "array",
            "items": {
                "type": ["integer", "string"],
                "minimum": 1,
                "maximum": MAX_PORT,
                "pattern": f"^{_PORTS}$",
                "examples": [443, "8000-8099"],
            },
            "minItems": 1,
        },
        "protocol": _one_of("If left out: all that the endpoint has.", "tcp", "udp", "any", "icmp"),
        "endpoint": _endpoint_name("Reach it through the host's stack, from this endpoint."),
        "action": _one_of("deny: refuse it. container: leave it to the container's own.", "deny", "container"),
    }
    return _mapping(properties, ["to"]) | {
        "oneOf": [{"required": ["endpoint"]}, {"required": ["action"]}],
        "if": {"properties": {"protocol": {"const": "icmp"}}, "required": ["protocol"]},
        "then": {"properties": {"ports": False}},
    }


def _default() -> Schema:
    def outcome(of: str) -> Schema:
        return _one_of(f"What happens to {of}.", "container", "deny")

    long_form = {
        "bind": outcome("binds that no rule matches"),
        "connect": outcome("destinations that no rule matches"),
        "other": outcome("sockets that no rule can match"),
    }
    return {
        "description": "What happens to a call that no rule matches.",
        "if": {"type": "object"},
        "then": _mapping(long_form, []),
        "else": outcome("binds and destinations"),
    }
