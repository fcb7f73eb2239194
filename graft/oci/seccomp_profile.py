"""A container's own seccomp profile, with notifications for bind, connect and listen. Pure.

The profile keeps its meaning: a call that it allows is notified instead, a call that it denies stays denied, and
rules for other calls do not change. A rule applies to every architecture of the profile, so 32-bit calls are notified
too; the supervisor lets them run unchanged.

The format is that of `linux.seccomp` in an OCI configuration (runtime-spec, config-linux.md). In what is read here,
that of the profiles of podman and docker (`--security-opt seccomp=`) is the same.
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
_PASSING = frozenset({_ALLOW, "SCMP_ACT_LOG"})  # libseccomp's actions after which the call runs
WAIT_KILLABLE = "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"

# With the 32-bit ones: libseccomp kills a process for a call of an architecture that is not listed.
_ARCHITECTURES = {
    "x86_64": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
    "aarch64": ["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"],
}

Profile = dict[str, Any]
Rule = dict[str, Any]


def allow_all_profile(machine: str | None = None) -> Profile:
    """A profile that allows every call, for a container without a profile."""
    name = machine or platform.machine()
    return {"defaultAction": _ALLOW, "architectures": list(_ARCHITECTURES.get(name, []))}


def check_profile(profile: Any, field: str) -> Profile:
    """``profile`` itself, after a check of the parts that are read here. Raises UsageError."""
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


def with_notifications(
    profile: Mapping[str, Any], listener: str, metadata: str, own_listeners: str | None = None
) -> Profile:
    """A copy of ``profile`` (see `check_profile`) that notifies bind, connect and listen at ``listener``.

    ``own_listeners`` is the prefix of the paths of Graft's listeners: a profile that was edited before is edited again.
    Raises ConflictError where the profile has another listener, or where a notification would weaken a rule.
    """
    edited = copy.deepcopy(dict(profile))
    before = edited.get("listenerPath")
    edited_before = bool(before and own_listeners and str(before).startswith(own_listeners))
    if before and not edited_before:
        raise ConflictError(
            f"linux.seccomp.listenerPath: the profile has another listener, {before}",
            "a container can have only one: remove that one, or do not use Graft's runtime",
        )
    rules: list[Rule] = edited.get("syscalls") or []
    if not edited_before:
        _refuse_foreign_notifications(edited, rules)
    for name in TRAPPED:
        rules = _notify(name, rules, str(edited.get("defaultAction")))
    edited["syscalls"] = rules
    edited["listenerPath"] = listener
    edited["listenerMetadata"] = metadata
    return edited


def _refuse_foreign_notifications(profile: Profile, rules: list[Rule]) -> None:
    """Raises ConflictError for other notifications: without a listener they fail, but Graft's would answer them."""
    notified = [name for rule in rules if rule.get("action") == NOTIFY for name in rule.get("names") or ["?"]]
    if profile.get("defaultAction") == NOTIFY:
        notified.append("defaultAction")
    if notified:
        raise ConflictError(f"linux.seccomp: {notified[0]} has {NOTIFY} without a listener", "remove that action")


def _notify(name: str, rules: list[Rule], default: str) -> list[Rule]:
    if default not in _PASSING:
        return list(_replace_actions(name, rules, _PASSING))
    # Where the default allows, rules that allow change nothing, and a rule that denies decides alone.
    denying = [rule for rule in rules if name in _names(rule) and rule.get("action") not in {*_PASSING, NOTIFY}]
    if any(not _has_condition(rule) for rule in denying):
        return list(_replace_actions(name, rules, _PASSING - {default}))
    if denying:
        raise ConflictError(
            f"linux.seccomp: {name} is denied for some arguments and allowed for the others",
            "a profile whose default denies, with a rule that allows the others",
        )
    without = [kept for rule in rules if (kept := _without(name, rule)) is not None]
    return [*without, {"names": [name], "action": NOTIFY}]


def _replace_actions(name: str, rules: list[Rule], passing: frozenset[str]) -> Iterator[Rule]:
    """The rules, with NOTIFY under the same conditions where one allows ``name`` by an action in ``passing``."""
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
    """The calls of a rule; in docker's old profiles it has one ``name``."""
    return list(rule.get("names") or ([rule["name"]] if rule.get("name") else []))


def _without(name: str, rule: Rule) -> Rule | None:
    """``rule`` without the call ``name``; None where no call is left."""
    names = _names(rule)
    if name not in names:
        return rule
    rest = [other for other in names if other != name]
    return {**{key: value for key, value in rule.items() if key != "name"}, "names": rest} if rest else None


def _has_condition(rule: Rule) -> bool:
    """Whether a rule applies to some arguments only, or (in an engine's profile) to some containers."""
    return bool(rule.get("args") or rule.get("includes") or rule.get("excludes"))
