"""A container's own seccomp profile, with notifications for bind, connect and listen, or for socket. Pure.

The profile keeps its meaning: a call that it allows is notified instead, a call that it denies stays denied, and
rules for other calls do not change. A rule applies to every architecture of the profile, so 32-bit calls are notified
too; the supervisor lets them run unchanged.

The format is that of `linux.seccomp` in an OCI configuration (runtime-spec, config-linux.md). In what is read here,
that of the profiles of podman and docker (`--security-opt seccomp=`) is the same.
"""

from __future__ import annotations

import contextlib
import copy
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from graft.errors import ConflictError
from graft.kernel.seccomp_filter import TRAPPED
from graft.model.json_text import mapping, mappings, text, texts
from graft.oci.socket_rules import Rule, admits_a_family, family_rules, notify_families

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
_SOCKET = "socket"


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
    profile: Mapping[str, Any],
    listener: str,
    metadata: str,
    own_listeners: str | None = None,
    born: bool = False,
    datagrams: bool = False,
) -> Profile:
    """A copy of ``profile`` (see `check_profile`) that notifies bind, connect and listen at ``listener``.

    ``born``: it notifies socket instead, for AF_INET and AF_INET6. ``datagrams``: it notifies socket too, for datagrams
    of these families, where its rules can be divided so (else a container's UDP sockets stay where they are).
    ``own_listeners`` is the prefix of the paths of
    Graft's listeners: a profile that was edited before is edited again. Raises ConflictError where the profile has
    another listener, or where a notification would weaken a rule.
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
    default = str(edited.get("defaultAction"))
    if edited_before:
        rules = _without_notifications(rules, TRAPPED if born else (_SOCKET,), default)
    else:
        _refuse_foreign_notifications(edited, rules)
    if born:
        rules = _notify_socket(rules, default)
    else:
        for name in TRAPPED:
            rules = _notify(name, rules, default)
        if datagrams:
            with contextlib.suppress(ConflictError):
                rules = _notify_socket(rules, default, datagrams=True)
    edited["syscalls"] = rules
    edited["listenerPath"] = listener
    edited["listenerMetadata"] = metadata
    return edited


def _without_notifications(rules: list[Rule], names: Sequence[str], default: str) -> list[Rule]:
    """The rules with ``names``, which an earlier edit had notified, allowed again."""
    allowed = list(rules)
    for index, rule in enumerate(rules):
        if rule.get("action") == NOTIFY and _names(rule)[0] in names:
            denied = any(not _has_condition(one) for one in _denying(_names(rule)[0], rules))
            # What was notified beside a denial had the passing action that is not the default.
            action = default if default in _PASSING and not denied else min(_PASSING - {default})
            allowed[index] = {**rule, "action": action}
    return allowed


def divides_sockets(profile: Mapping[str, Any]) -> bool:
    """Whether a profile's rules for socket can be divided between the families. Raises UsageError."""
    try:
        _notify_socket(list(profile.get("syscalls") or []), str(profile.get("defaultAction")))
    except ConflictError:
        return False
    return True


def _refuse_foreign_notifications(profile: Profile, rules: list[Rule]) -> None:
    """Raises ConflictError for other notifications: without a listener they fail, but Graft's would answer them."""
    notified = [name for rule in rules if rule.get("action") == NOTIFY for name in rule.get("names") or ["?"]]
    if profile.get("defaultAction") == NOTIFY:
        notified.append("defaultAction")
    if notified:
        raise ConflictError(f"linux.seccomp: {notified[0]} has {NOTIFY} without a listener", "remove that action")


def _notify(name: str, rules: list[Rule], default: str) -> list[Rule]:
    if default not in _PASSING:
        return list(_replace(name, rules, _PASSING, _notified))
    # Where the default allows, rules that allow change nothing, and a rule that denies decides alone.
    denying = _denying(name, rules)
    if any(not _has_condition(rule) for rule in denying):
        return list(_replace(name, rules, _PASSING - {default}, _notified))
    if denying:
        raise ConflictError(
            f"linux.seccomp: {name} is denied for some arguments and allowed for the others",
            "a profile whose default denies, with a rule that allows the others",
        )
    without = [kept for rule in rules if (kept := _without(name, rule)) is not None]
    return [*without, {"names": [name], "action": NOTIFY}]


def _notify_socket(rules: list[Rule], default: str, datagrams: bool = False) -> list[Rule]:
    """``datagrams``: as for `notify_families`."""
    replacement = partial(notify_families, notify=NOTIFY, datagrams=datagrams)
    if default not in _PASSING:
        return list(_replace(_SOCKET, rules, _PASSING, replacement))
    denying = _denying(_SOCKET, rules)
    if any(not _has_condition(rule) for rule in denying):
        return list(_replace(_SOCKET, rules, _PASSING - {default}, replacement))
    if any(admits_a_family(rule) for rule in denying):
        raise ConflictError("linux.seccomp: socket is denied for some of AF_INET and AF_INET6, and allowed for others")
    # Of all families but the two, what is allowed and not logged, or logged, stays so.
    others = _replace(_SOCKET, rules, _PASSING - {default}, replacement)
    kept = [_without(_SOCKET, rule) if rule.get("action") in (default, NOTIFY) else rule for rule in others]
    return [*(rule for rule in kept if rule is not None), *family_rules(NOTIFY, datagrams)]


def _denying(name: str, rules: list[Rule]) -> list[Rule]:
    return [rule for rule in rules if name in _names(rule) and rule.get("action") not in {*_PASSING, NOTIFY}]


def _only(name: str, rule: Rule) -> Rule:
    """``rule`` for that call alone."""
    return {"names": [name], **{key: value for key, value in rule.items() if key not in ("names", "name")}}


def _replace(
    name: str, rules: list[Rule], passing: frozenset[str], replacement: Callable[[Rule], Iterable[Rule]]
) -> Iterator[Rule]:
    """The rules, with ``replacement`` of what one allows of ``name`` by an action in ``passing``."""
    for rule in rules:
        if name not in _names(rule) or rule.get("action") not in passing:
            yield rule
            continue
        rest = _without(name, rule)
        if rest is not None:
            yield rest
        yield from replacement(_only(name, rule))


def _notified(rule: Rule) -> list[Rule]:
    """``rule`` with NOTIFY under the same conditions."""
    kept = {key: value for key, value in copy.deepcopy(rule).items() if key != "errnoRet"}
    return [{**kept, "action": NOTIFY}]


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
