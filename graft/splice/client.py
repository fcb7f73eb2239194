"""What commands ask of the splice transport: serve a container, describe it, stop."""

from __future__ import annotations

import ctypes
from typing import Any

from graft.errors import GraftError, KernelError
from graft.model.settings import Settings
from graft.splice import control, daemon_process
from graft.splice.traffic import Traffic, parse_traffic
from graft.state import members
from graft.state.installation import Installation
from graft.state.records import Container

RELAYS = ("splice", "kernel")
_DESCRIBE_SECONDS = 10.0
_TRAFFIC_SECONDS = 2.0
_UNDER_LOCK_SECONDS = 2.0


def check_relay(settings: Settings, name: str) -> None:
    """Check that relay ``name`` can serve here: splice always, kernel where its self-test passes.

    Graft must be up. Raises KernelError that says what is wrong.
    """
    if name != "kernel":
        return
    from graft.splice import selftest_result  # imports what compiles BPF programs

    problem = selftest_result.get(settings).problem
    if not problem and not (settings.pin_dir / "flows").exists():
        problem = "it was not loaded by graft up"
    if problem:
        raise KernelError(
            f"--relay: the relay in the kernel cannot be used on this machine: {problem}", "--relay splice"
        )


def ensure_daemon(settings: Settings) -> None:
    """Start the daemon where none runs, before hooks that need it are attached. Raises GraftError."""
    daemon_process.ensure_running(settings)


def attach(settings: Settings, container: Container, pid: int = 0) -> None:
    """Have the daemon serve ``container``, which has a record. When this returns, it does. Started where none runs.

    ``pid`` is a process in its network namespace, 0 to let the daemon find one. Raises GraftError.
    """
    daemon_process.request(settings, _attach_request(container, pid))


def _attach_request(container: Container, pid: int) -> dict[str, Any]:
    return {"do": "attach", "container": container.id, "pid": pid}


def serve(graft: Installation, container: Container, pid: int = 0) -> None:
    """`attach` a container that was made just now, with a program that waits for this, if graftd has to serve it. Where
    that fails, remove it again: the program does not go on.
    """
    if not container.is_relayed:
        return
    try:
        attach(graft.settings, container, pid)
    except BaseException:
        with members.pinned(container.cgroup_path) as reachable, graft.transaction() as change:
            change.containers.remove(container, reachable)
        raise


def begin_to_serve(graft: Installation, container: Container, pid: int = 0) -> bool:
    """Have the daemon serve a container that was attached just now, for a caller that has others wait: graftd is not
    started. False where it does not run, or has not answered after a moment, or cannot serve it; `attach` is to be
    called when nobody waits.

    The container's rules are in force already, and stay so, whatever graftd says: what runs in the container can cause
    that, and would be rid of its policy by it.
    """
    if not container.is_relayed:
        return True
    try:
        return control.ask(graft.settings, _attach_request(container, pid), _UNDER_LOCK_SECONDS) is not None
    except GraftError:
        return False


def detach(graft: Installation, container: Container) -> None:
    """Stop serving ``container``: its listeners are closed, its connections are reset.

    Remove its record first: the daemon serves every recorded container. Safe to repeat, and where no daemon runs.
    Raises GraftError where it does not answer: then it may still have open what it served the container by.
    """
    answer = None
    try:
        answer = control.ask(graft.settings, {"do": "detach", "container": container.id})
    finally:
        if answer is None:
            graft.maps.relays.delete(ctypes.c_uint32(container.id))


def describe(settings: Settings, container: Container) -> dict[str, Any]:
    """What is published for ``container`` and what is not. Where no daemon runs, ``serves`` is False.

    pid, serves, problem, relay (how new connections are moved);
    published: [{endpoint (id), address, listener, dials, connections, served}];
    failed: [{endpoint, listener, error}]; not_granted: [listener], the first of them;
    more_not_granted: how many others; too_many: how many listeners a rule names beyond the limit of one container;
    out: {port, served}; connections; waits: for how many seconds nothing is done for it, because a call took long.
    """
    found = control.ask(settings, {"do": "describe", "container": container.id}, _DESCRIBE_SECONDS)
    return {"serves": False, "problem": "the daemon does not run"} if found is None else found


def traffic(settings: Settings) -> Traffic | None:
    """What the daemon has relayed since it started; None where none runs. Raises GraftError where it does not answer,
    or is of an earlier version.
    """
    found = control.ask(settings, {"do": "traffic"}, _TRAFFIC_SECONDS)
    return None if found is None else parse_traffic(found)


def stop(settings: Settings) -> None:
    """End the daemon, if one runs; its connections are reset. Raises KernelError where it does not end in time."""
    daemon_process.stop(settings)


def has_other_maps(graft: Installation) -> bool:
    """Whether a daemon runs that has the maps of another data plane, or does not answer."""
    try:
        answer = control.ask(graft.settings, {"do": "ping"}, _DESCRIBE_SECONDS)
    except GraftError:
        return True
    return answer is not None and answer.get("maps") != graft.maps.number


def runs(settings: Settings) -> bool:
    """Whether the daemon or its keeper runs, even if it does not answer."""
    return daemon_process.runs(settings)
