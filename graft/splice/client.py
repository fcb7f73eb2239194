"""What commands ask of the splice transport: to serve a container, to say how it is, to stop."""

from __future__ import annotations

import ctypes
from typing import Any

from graft.errors import KernelError
from graft.model.settings import Settings
from graft.splice import control, daemon_process, selftest_result
from graft.state.installation import Installation
from graft.state.records import Container

RELAYS = ("splice", "kernel")
_LOOK_SECONDS = 10.0  # that a daemon may take to say how it is


def check_relay(settings: Settings, name: str) -> None:
    """See to it that relay ``name`` can serve here: splice always, kernel where its self-test passes.

    Raises KernelError with what is wrong. Graft is up.
    """
    if name != "kernel":
        return
    problem = selftest_result.verdict(settings).problem
    if not problem and not (settings.pin_dir / "flows").exists():
        problem = "it was not loaded when Graft came up"
    if problem:
        raise KernelError(f"--relay: the kernel's relay does not serve on this machine: {problem}", "--relay splice")


def prepare(settings: Settings) -> None:
    """See to it that a daemon runs, before hooks that need it are attached. Raises GraftError."""
    daemon_process.ensure(settings)


def attach(settings: Settings, container: Container, pid: int = 0) -> None:
    """Have ``container`` (recorded with transport splice) served. When this returns, it is.

    ``pid`` is a process in its network namespace, 0 to have one found. Raises GraftError.
    """
    daemon_process.request(settings, {"do": "attach", "container": container.id, "pid": pid})


def detach(graft: Installation, container: Container) -> None:
    """Stop serving ``container``: its listeners go, its connections are reset.

    To be called when its record is removed, lest the daemon take it up again. Safe to repeat, and where no daemon runs.
    """
    if control.ask(graft.settings, {"do": "detach", "container": container.id}) is None:
        graft.maps.relays.delete(ctypes.c_uint32(container.id))


def describe(settings: Settings, container: Container) -> dict[str, Any]:
    """What is published for ``container`` and what is not; ``serves`` is False where no daemon runs.

    pid, serves, problem, relay (how new connections are moved);
    published: [{endpoint (id), address, listener, dials, connections, served}];
    failed: [{endpoint, listener, error}]; not_granted: [listener], the first of them, and more_not_granted, how many
    others; too_many: listeners that a rule names, beyond what one container may have published; out: {port, served};
    connections.
    """
    found = control.ask(settings, {"do": "describe", "container": container.id}, _LOOK_SECONDS)
    return {"serves": False, "problem": "the daemon does not run"} if found is None else found


def stop(settings: Settings) -> None:
    """End the daemon, if one runs; its connections are reset."""
    daemon_process.stop(settings)
