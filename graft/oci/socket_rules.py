"""The rules of a seccomp profile for socket(2), with AF_INET and AF_INET6 notified and all else as before. Pure.

A rule's conditions are about one argument each (runtimes take several about the same argument for alternatives), so
"any family but these two" is a rule for each family; so is "any type but datagrams" one for each type. Runtimes compare
all 64 bits of an argument, the kernel looks at 32: a family with something in the upper half is not notified, and its
socket is one of the container's own namespace. Format: runtime-spec, config-linux.md (seccomp).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from graft.errors import ConflictError
from graft.kernel.seccomp_filter import FAMILIES
from graft.model.json_text import mappings, number, text

Rule = dict[str, Any]

_FAMILY_ARGUMENT, _TYPE_ARGUMENT = 0, 1
_TYPES = 16  # SOCK_TYPE_MASK + 1, include/linux/net.h
_DATAGRAM = 2  # SOCK_DGRAM
_LAST_FAMILY = 63  # AF_MAX is 46 in include/linux/socket.h; there is room for more
_MAX_VALUE = (1 << 64) - 1
_ABOVE = (_LAST_FAMILY + 1, _LAST_FAMILY + 2, _MAX_VALUE - 1, _MAX_VALUE)
_EQUAL, _GREATER, _MASKED = "SCMP_CMP_EQ", "SCMP_CMP_GT", "SCMP_CMP_MASKED_EQ"
_ADMITS: Mapping[str, Callable[[int, int, int], bool]] = {
    "SCMP_CMP_NE": lambda family, value, _: family != value,
    "SCMP_CMP_LT": lambda family, value, _: family < value,
    "SCMP_CMP_LE": lambda family, value, _: family <= value,
    _EQUAL: lambda family, value, _: family == value,
    "SCMP_CMP_GE": lambda family, value, _: family >= value,
    _GREATER: lambda family, value, _: family > value,
    _MASKED: lambda family, mask, value: family & mask == value,
}


def notify_families(rule: Rule, notify: str, datagrams: bool = False) -> Iterator[Rule]:
    """Rules that together are ``rule``, a passing one for socket alone, with the two families under ``notify``.

    ``datagrams``: of these the datagram sockets alone, or all where ``rule`` has a condition about the type. Raises
    ConflictError where its conditions cannot be divided, UsageError where they are not valid.
    """
    if not admits_a_family(rule):
        yield rule
        return
    admits = _family_condition(rule)
    for family in range(_LAST_FAMILY + 1):
        if admits(family) and family in FAMILIES and datagrams:
            yield from _notify_datagrams(_for_family(rule, _EQUAL, family, None), notify)
        elif admits(family):
            yield _for_family(rule, _EQUAL, family, notify if family in FAMILIES else None)
    # What admits only some of the families above, none of which there is, admits none of them now.
    if all(admits(family) for family in _ABOVE):
        yield _for_family(rule, _GREATER, _LAST_FAMILY, None)


def family_rules(notify: str, datagrams: bool = False) -> list[Rule]:
    """Rules for the two families, for a profile whose default allows them. ``datagrams``: for these sockets alone."""
    rules = [_for_family({"names": ["socket"]}, _EQUAL, family, notify) for family in FAMILIES]
    return [{**one, "args": [*one["args"], _type_is(_DATAGRAM)]} for one in rules] if datagrams else rules


def _notify_datagrams(rule: Rule, notify: str) -> Iterator[Rule]:
    """``rule`` for each type of socket, with datagrams under ``notify``."""
    notified = {key: value for key, value in rule.items() if key != "errnoRet"} | {"action": notify}
    if any(one.get("index") == _TYPE_ARGUMENT for one in rule["args"]):
        yield notified  # the supervisor lets the others run
        return
    for kind in range(_TYPES):
        yield {**(notified if kind == _DATAGRAM else rule), "args": [*rule["args"], _type_is(kind)]}


def _type_is(kind: int) -> dict[str, Any]:
    return {"index": _TYPE_ARGUMENT, "op": _MASKED, "value": _TYPES - 1, "valueTwo": kind}


def admits_a_family(rule: Rule) -> bool:
    """Whether ``rule`` applies to a socket of either family. Raises ConflictError, UsageError."""
    admits = _family_condition(rule)
    return any(admits(family) for family in FAMILIES)


def _family_condition(rule: Rule) -> Callable[[int], bool]:
    conditions = mappings(rule.get("args"), "linux.seccomp.syscalls.args")
    indexes = [number(one.get("index"), "linux.seccomp.syscalls.args.index", 5) for one in conditions]
    if len(set(indexes)) < len(indexes):
        raise ConflictError("linux.seccomp: a rule for socket has two conditions about one argument")
    if _FAMILY_ARGUMENT not in indexes:
        return lambda _family: True
    condition = conditions[indexes.index(_FAMILY_ARGUMENT)]
    comparison = _ADMITS.get(text(condition.get("op"), "linux.seccomp.syscalls.args.op"))
    if comparison is None:
        raise ConflictError(f"linux.seccomp: a rule for socket compares by {condition.get('op')!r}")
    value, second = (
        number(condition.get(name), f"linux.seccomp.syscalls.args.{name}", _MAX_VALUE) for name in ("value", "valueTwo")
    )
    return lambda family: comparison(family, value, second)


def _for_family(rule: Rule, op: str, family: int, action: str | None) -> Rule:
    """``rule`` with that condition about the family instead of its own; ``action`` None keeps its action."""
    new = copy.deepcopy(rule)
    others = [one for one in new.get("args") or [] if one.get("index") != _FAMILY_ARGUMENT]
    new["args"] = [{"index": _FAMILY_ARGUMENT, "value": family, "op": op}, *others]
    if action is not None:
        new["action"] = action
        new.pop("errnoRet", None)
    return new
