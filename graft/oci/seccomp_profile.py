"""A container's own seccomp profile, with notifications for bind, connect and listen. Pure.

The profile keeps its meaning: a call that it lets through is notified instead, a call that it denies stays
denied, and no rule for any other call is touched. A rule holds for every architecture of the profile, so
32-bit calls are notified too; the supervisor lets them go on as they are.

The form is that of `linux.seccomp` of an OCI configuration (runtime-spec, config-linux.md), which the
profiles of podman and docker (`--security-opt seccomp=`) share as far as it matters here.
"""

from __future__ import annotations

import copy
import platform
from collections.abc import Iterator, Mapping
from typing import Any

from graft.errors import ConflictError
from graft.model.json_text import mapping, mappings, text, texts

TRAPPED = ("bind", "connect", "listen")
NOTIFY = "SCMP_ACT_NOTIFY"
_ALLOW = "SCMP_ACT_ALLOW"
_PASSING = frozenset({_ALLOW, "SCMP_ACT_LOG"})  # libseccomp's actions after which the call runs with nobody asked
WAIT_KILLABLE = "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"

# With its 32-bit companions: libseccomp kills what is of an architecture that is not listed.
_ARCHITECTURES = {
    "x86_64": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
    "aarch64": ["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"],
}

Profile = dict[str, Any]
Rule = dict[str, Any]


def open_profile(machine: str | None = None) -> Profile:
    """What a container without any profile has: everything is allowed."""
    name = machine or platform.machine()
    return {"defaultAction": _ALLOW, "architectures": list(_ARCHITECTURES.get(name, []))}


def check_profile(profile: Any, field: str) -> Profile:
    """``profile`` itself, where all that is read of it here has the form that it should. Raises UsageError."""
    found = mapping(profile, field)
    for key in ("defaultAction", "listenerPath"):
        text(found.get(key), f"{field}.{key}")
    texts(found.get("flags"), f"{field}.flags")
    for index, rule in enumerate(mappings(found.get("syscalls"), f"{field}.syscalls")):
        here = f"{field}.syscalls[{index}]"
        texts(rule.get("names"), f"{here}.names")
        for key in ("name", "action"):
            text(rule.get(key), f"{here}.{key}")
    return found


def with_notifications(profile: Mapping[str, Any], listener: str, metadata: str, ours: str | None = None) -> Profile:
    """A copy of ``profile`` (see `check_profile`) that has bind, connect and listen notified at ``listener``.

    ``ours`` is how a listener of Graft's begins: a profile that was edited before is edited anew. Raises
    ConflictError where somebody else has the listener, or where a rule could only be weakened.
    """
    edited = copy.deepcopy(dict(profile))
    before = edited.get("listenerPath")
    again = bool(before and ours and str(before).startswith(ours))
    if before and not again:
        raise ConflictError(
            f"linux.seccomp.listenerPath: the profile has a listener already, {before}",
            "a container can have one: leave Graft's runtime out, or the other listener",
        )
    rules: list[Rule] = edited.get("syscalls") or []
    if not again:
        _refuse_foreign_notifications(edited, rules)
    for name in TRAPPED:
        rules = _notified(name, rules, str(edited.get("defaultAction")))
    edited["syscalls"] = rules
    edited["listenerPath"] = listener
    edited["listenerMetadata"] = metadata
    return edited


def _refuse_foreign_notifications(profile: Profile, rules: list[Rule]) -> None:
    """A notification that meant nothing without a listener would be answered by ours."""
    notified = [name for rule in rules if rule.get("action") == NOTIFY for name in rule.get("names") or ["?"]]
    if profile.get("defaultAction") == NOTIFY:
        notified.append("defaultAction")
    if notified:
        raise ConflictError(f"linux.seccomp: {notified[0]} is notified already, to nobody", "take that rule out")


def _notified(name: str, rules: list[Rule], default: str) -> list[Rule]:
    if default not in _PASSING:
        return list(_swapped(name, rules, _PASSING))
    # Where everything passes, rules that let pass say nothing, and one that denies decides alone.
    denying = [rule for rule in rules if name in _names(rule) and rule.get("action") not in {*_PASSING, NOTIFY}]
    if any(not _has_condition(rule) for rule in denying):
        return list(_swapped(name, rules, _PASSING - {default}))
    if denying:
        raise ConflictError(
            f"linux.seccomp: {name} is denied for some arguments and let through for the others",
            "a profile whose default denies, with a rule that allows the others",
        )
    without = [kept for rule in rules if (kept := _without(name, rule)) is not None]
    return [*without, {"names": [name], "action": NOTIFY}]


def _swapped(name: str, rules: list[Rule], passing: frozenset[str]) -> Iterator[Rule]:
    """Each rule that lets ``name`` pass by one of these actions, under the same conditions, as one that notifies."""
    for rule in rules:
        if name not in _names(rule) or rule.get("action") not in passing:
            yield rule
            continue
        rest = _without(name, rule)
        if rest is not None:
            yield rest
        only = {key: copy.deepcopy(value) for key, value in rule.items() if key not in ("names", "name", "errnoRet")}
        yield {"names": [name], **only, "action": NOTIFY}


def _names(rule: Rule) -> list[str]:
    """The calls that a rule is for; old profiles of docker's have one ``name``."""
    return list(rule.get("names") or ([rule["name"]] if rule.get("name") else []))


def _without(name: str, rule: Rule) -> Rule | None:
    """``rule`` for the other calls that it is for; None where there is none."""
    names = _names(rule)
    if name not in names:
        return rule
    rest = [other for other in names if other != name]
    return {**{key: value for key, value in rule.items() if key != "name"}, "names": rest} if rest else None


def _has_condition(rule: Rule) -> bool:
    """Whether it holds for some arguments only, or (in an engine's profile) for some containers."""
    return bool(rule.get("args") or rule.get("includes") or rule.get("excludes"))
