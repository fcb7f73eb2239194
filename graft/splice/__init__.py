"""The splice transport: containers that already run, served by relays in the daemon `graftd`.

    connection.py   two sockets and the bytes between them: the state machine
    pipes.py        what bytes travel through
    loop.py         the event loop
    inside.py       sockets made in a container's namespace
    choice.py       which listeners are published, and what is dialled for them (pure)
    inward.py       a listener on an endpoint
    outward.py      the relay inside, to which the connect hook turns granted connections
    relays.py       both, for one container
    service.py      all containers: what graft/daemon.py runs
    control.py      how commands talk to the daemon

The hooks behind it are in bpf/splice.bpf.c. This module is what `graft attach`, `detach` and `ps` call.
"""

from __future__ import annotations

import ctypes
from typing import Any

from graft.containers import Container
from graft.errors import RefusedError, UsageError
from graft.maps import Maps
from graft.settings import Settings
from graft.splice import control

RELAYS = ("splice", "kernel")


def check_relay(name: str) -> None:
    """Raises RefusedError for the kernel relay, which this version does not have, UsageError for what is no relay."""
    if name == "kernel":
        raise RefusedError(
            "--relay kernel: this version of Graft has no relay in the kernel", "splice, see docs/splice.md for why"
        )
    if name not in RELAYS:
        raise UsageError(f"--relay: {name!r} is no relay", "splice")


def prepare(settings: Settings) -> None:
    """See to it that a daemon runs, before hooks that need it are attached. Raises GraftError."""
    from graft import daemon

    daemon.ensure(settings)


def attach(settings: Settings, maps: Maps, container: Container, pid: int) -> None:
    """Have ``container`` (recorded with transport splice) served. When this returns, it is.

    ``pid`` is a process in its network namespace, 0 to have one found. Raises GraftError.
    """
    from graft import daemon

    daemon.request(settings, {"do": "attach", "container": container.id, "pid": pid})


def detach(settings: Settings, container: Container) -> None:
    """Stop serving ``container``: its listeners go, its connections are reset.

    To be called when its record is removed, lest the daemon take it up again. Safe to repeat, and where no daemon runs.
    """
    if control.ask(settings, {"do": "detach", "container": container.id}) is None:
        Maps(settings.pin_dir).relays.delete(ctypes.c_uint32(container.id))


def describe(settings: Settings, container: Container) -> dict[str, Any]:
    """What is published for ``container`` and what is not; ``serves`` is False where no daemon runs.

    relay, pid, serves, problem; published: [{endpoint (id), address, listener, dials, connections, served}];
    failed: [{endpoint, listener, error}]; not_granted: [listener]; out: {port, served}; connections.
    """
    found = control.ask(settings, {"do": "describe", "container": container.id})
    return {"relay": "splice(2)", "serves": False, "problem": "the daemon does not run"} if found is None else found


def stop(settings: Settings) -> None:
    """End the daemon, if one runs; its connections are reset."""
    from graft import daemon

    daemon.stop(settings)
