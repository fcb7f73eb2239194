"""The splice transport: containers that already run, served by relays in the daemon `graftd`.

    connection.py   two sockets and the bytes between them: the state machine
    pipes.py        what bytes travel through
    handed.py       a flow that the kernel moves: catching up, and its end
    sockmap.py      the maps by which it does
    selftest.py     whether this kernel does it right
    verdict.py      how long what that found holds
    kernel_relay.py the relay in the kernel for whoever is to have it, once it has passed

    loop.py         the event loop
    turns.py        whose turn it is in the loop (pure)
    jobs.py         work that takes more than one turn
    aside.py        calls that wait, made in threads
    shares.py       who may have one more of what is scarce (pure)
    room.py         a container's turns, descriptors and pipes

    inside.py       sockets made in a container's namespace
    namespaces.py   the namespaces that they are made in
    choice.py       which listeners are published, and what is dialled for them (pure)
    survey.py       what a container listens on, in steps
    door.py         a listener: accepting while there is room
    inward.py       a listener on an endpoint
    outward.py      the relay inside, to which the connect hook turns granted connections
    relays.py       both, for one container
    records.py      which containers there are
    served.py       one container's course in the daemon
    service.py      all containers: what graft/daemon.py runs
    control.py      how commands talk to the daemon
    commands.py     the daemon's end of that

The hooks behind it are in bpf/splice.bpf.c, the relay in the kernel in bpf/relay.bpf.c. This module is what `graft
attach`, `detach` and `ps` call.
"""

from __future__ import annotations

import ctypes
from typing import Any

from graft.containers import Container
from graft.errors import KernelError
from graft.maps import Maps
from graft.settings import Settings
from graft.splice import control

RELAYS = ("splice", "kernel")
_LOOK_SECONDS = 10.0  # that a daemon may take to say how it is


def check_relay(settings: Settings, name: str) -> None:
    """See to it that relay ``name`` can serve here: splice always, kernel where its self-test passes.

    Raises KernelError with what is wrong. Graft is up.
    """
    if name != "kernel":
        return
    from graft.splice import verdict

    problem = verdict.verdict(settings).problem
    if not problem and not (settings.pin_dir / "flows").exists():
        problem = "it was not loaded when Graft came up"
    if problem:
        raise KernelError(f"--relay: the kernel's relay does not serve on this machine: {problem}", "--relay splice")


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
    from graft import daemon

    daemon.stop(settings)
