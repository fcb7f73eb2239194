"""The command line of an OCI runtime, as far as the wrapper reads it. Pure, and quick to import.

Sources: the flags of runc(8) and crun(1). All arguments are passed on unchanged; only the sub-command, the bundle
and the log file are read. (NamedTuple and no dataclass: `dataclasses` alone takes 15 ms to import.)
"""

from __future__ import annotations

import os.path
from collections.abc import Sequence
from typing import NamedTuple

# Flags that take a value. All others are switches.
_GLOBAL = frozenset({"log", "log-format", "log-level", "root", "criu", "rootless", "cgroup-manager", "config"})
_CREATE = frozenset({"bundle", "b", "config", "f", "console-socket", "pid-file", "preserve-fds"})
_RESTORE = _CREATE | {
    "image-path",
    "work-path",
    "parent-path",
    "empty-ns",
    "lsm-profile",
    "lsm-mount-context",
    "manage-cgroups-mode",
}

STARTING = frozenset({"create", "run"})
"""The sub-commands that create a container."""

RESTORING = frozenset({"restore"})
"""Those that make one of a checkpoint, in which nothing of Graft's is."""


class Invocation(NamedTuple):
    """What a command line asks for. ``config`` is the path of the container's configuration."""

    command: str = ""
    id: str = ""
    config: str = "config.json"
    log: str | None = None
    log_json: bool = False


def _parse_flag(words: Sequence[str], at: int, valued: frozenset[str]) -> tuple[str, str, int]:
    """(name, value, index of the next word) of the flag at ``at``, in any form that runtimes accept."""
    name, equals, value = words[at].lstrip("-").partition("=")
    if equals:
        return name, value, at + 1
    if name in valued:
        return name, words[at + 1] if at + 1 < len(words) else "", at + 2
    if not words[at].startswith("--") and name[:1] in valued:
        return name[0], name[1:], at + 1
    return name, "", at + 1


def _parse_flags(words: Sequence[str], at: int, valued: frozenset[str]) -> tuple[dict[str, str], int]:
    found: dict[str, str] = {}
    while at < len(words) and words[at].startswith("-") and words[at] not in ("-", "--"):
        name, value, at = _parse_flag(words, at, valued)
        found[name] = value
    return found, at + 1 if at < len(words) and words[at] == "--" else at


def parse(words: Sequence[str]) -> Invocation:
    """The invocation in ``words``, the command line without the program's name."""
    global_flags, at = _parse_flags(words, 0, _GLOBAL)
    command = words[at] if at < len(words) else ""
    log, as_json = global_flags.get("log") or None, global_flags.get("log-format") == "json"
    if command not in STARTING | RESTORING:
        return Invocation(command=command, log=log, log_json=as_json)
    valued = _CREATE if command in STARTING else _RESTORE
    flags, at = _parse_flags(words, at + 1, valued)
    container_id = words[at] if at < len(words) else ""
    trailing, _ = _parse_flags(words, at + 1, valued)  # crun accepts flags after the container's name too
    flags |= trailing
    bundle = flags.get("bundle") or flags.get("b") or "."
    config = flags.get("config") or flags.get("f") or "config.json"
    return Invocation(command, container_id, os.path.join(bundle, config), log, as_json)
