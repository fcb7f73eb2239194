"""The command line of an OCI runtime, as far as the wrapper has to understand it. Pure, and quick to import.

Sources: the flags of runc(8) and crun(1). Everything is handed on as it came; only the sub-command, the
bundle and where to log are read. (NamedTuple and no dataclass: `dataclasses` alone takes 15 ms to import.)
"""

from __future__ import annotations

import os.path
from collections.abc import Sequence
from typing import NamedTuple

# Flags with a value of their own. What is not here is taken as a switch.
_GLOBAL = frozenset({"log", "log-format", "log-level", "root", "criu", "rootless", "cgroup-manager", "config"})
_CREATE = frozenset({"bundle", "b", "config", "f", "console-socket", "pid-file", "preserve-fds"})

STARTING = frozenset({"create", "run"})
"""The sub-commands that make a container of a bundle."""


class Invocation(NamedTuple):
    """What a command line asks for. ``config`` is the path of the container's configuration."""

    command: str = ""
    id: str = ""
    config: str = "config.json"
    log: str | None = None
    log_json: bool = False


def _flag(words: Sequence[str], at: int, valued: frozenset[str]) -> tuple[str, str, int]:
    """(name, value, index of the next word) of the flag at ``at``, in any of the forms that runtimes take."""
    name, equals, value = words[at].lstrip("-").partition("=")
    if equals:
        return name, value, at + 1
    if name in valued:
        return name, words[at + 1] if at + 1 < len(words) else "", at + 2
    if not words[at].startswith("--") and name[:1] in valued:
        return name[0], name[1:], at + 1
    return name, "", at + 1


def _flags(words: Sequence[str], at: int, valued: frozenset[str]) -> tuple[dict[str, str], int]:
    found: dict[str, str] = {}
    while at < len(words) and words[at].startswith("-") and words[at] not in ("-", "--"):
        name, value, at = _flag(words, at, valued)
        found[name] = value
    return found, at + 1 if at < len(words) and words[at] == "--" else at


def parse(words: Sequence[str]) -> Invocation:
    """What ``words``, the command line without the program's name, asks for."""
    ours, at = _flags(words, 0, _GLOBAL)
    command = words[at] if at < len(words) else ""
    log, as_json = ours.get("log") or None, ours.get("log-format") == "json"
    if command not in STARTING:
        return Invocation(command=command, log=log, log_json=as_json)
    its, at = _flags(words, at + 1, _CREATE)
    identity = words[at] if at < len(words) else ""
    late, _ = _flags(words, at + 1, _CREATE)  # crun takes flags behind the container's name too
    its |= late
    bundle = its.get("bundle") or its.get("b") or "."
    config = its.get("config") or its.get("f") or "config.json"
    return Invocation(command, identity, os.path.join(bundle, config), log, as_json)
