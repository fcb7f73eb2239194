"""Loads what children of the fork server need, and runs some of it: what is there before the fork is in memory once.

Python writes to what it uses (counts of references, and what it notes in code that it has run), and a page that a child
writes to is copied for it. What a child finds ready, it does not have to make.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from typing import Any

import typer

from graft.kernel import fork_messages, surroundings
from graft.kernel.seccomp_filter import born_filter, swap_filter
from graft.model.settings import Settings
from graft.model.transport import Transport
from graft.state import records
from graft.state.records import Container

from .main import app

_MODULES = (
    "graft.commands.policy_source",
    "graft.commands.run_job",
    "graft.oci.bundle",
    "graft.oci.container_job",
    "graft.oci.request",
    "graft.policy.files",
    "graft.policy.reader",
    "graft.swap.keeper",
    "pickle",
    "queue",
)
_OPTIONAL = ("graft.swap._fast_calls",)
_RUNS = 20  # after so many Python changes the code no more
_EXAMPLE = ["-i", "0.0.0.0:80=web", "-e", "0.0.0.0/0=web", "--net", "new", "--user", "root", "--", "true"]


def load() -> Any:
    """Load all of it. Gives the command graft as a function of its words."""
    for name in _MODULES:
        importlib.import_module(name)
    for name in _OPTIONAL:
        if importlib.util.find_spec(name):
            importlib.import_module(name)
    command: Any = typer.main.get_command(app)
    outer = command.make_context("graft", ["run", *_EXAMPLE])
    run = command.get_command(outer, "run")
    run.make_context("run", list(_EXAMPLE), parent=outer)  # typer imports half of what it has when it parses
    for _ in range(_RUNS):
        _run_some()
    return command


def _run_some() -> None:
    """What each child does, or something like it, that changes nothing."""
    settings = Settings.from_environment({})
    records.read_all(settings)
    container = Container(1, "web", "/none", Transport.SWAP, 1, "web", ("web",))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        fork_messages.send(ours, {"container": records.encode(container)})
        records.decode(fork_messages.receive(theirs)[0]["container"])
    surroundings.of()
    swap_filter()
    born_filter()


class LoadedFiles:
    """The files of Graft's that are loaded, as they are now."""

    def __init__(self) -> None:
        self._times = {path: _changed_at(path) for path in _paths()}

    def have_changed(self) -> bool:
        """Whether they are others now: Graft was installed anew."""
        return any(_changed_at(path) != time for path, time in self._times.items())


def _paths() -> set[str]:
    files = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items())}
    return {path for name, path in files.items() if path and name.partition(".")[0] in ("graft", "graft_cli")}


def _changed_at(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0
