"""What children of the fork server do for the OCI runtime (quick.py): prepare a container, and be its shim."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from graft.errors import GraftError, KernelError
from graft.kernel import cgroup, fork_messages, surroundings
from graft.model.settings import Settings
from graft.model.transport import Transport
from graft.oci import arguments, main, options, shim
from graft.oci.plan import Plan
from graft.oci.prepare import Caller
from graft.policy.model import Origin, PolicyError
from graft.policy.policy_file import PolicyFile
from graft.policy.reader import check_document
from graft.policy.writer import policy_value
from graft.saved.values import plain_document
from graft.swap import fork_client


def prepare_container(connection: socket.socket, request: dict[str, Any], fds: Sequence[int]) -> None:
    """Prepare the container that a runtime is about to start. Answers with the error, if there is one."""
    cwd, runtime = fds
    os.fchdir(cwd)
    os.environ.clear()
    os.environ.update(request["environment"])
    answer: dict[str, Any] = {}
    try:
        caller = Caller(cgroup.of_process(request["pid"]), runtime)
        chosen = options.load(os.environ)
        invocation = arguments.parse(request["words"])
        main.prepare_if_asked(invocation, chosen, options.find_runtime(chosen), caller, _start_shim)
    except GraftError as error:
        answer = {"error": main.in_one_line(error)}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    fork_messages.send(connection, answer)


def _start_shim(plan: Plan, hook: socket.socket, listeners: socket.socket, lock: int, runtime: int) -> None:
    """Have a new child of the server become the shim: this process has used more memory than that one will."""
    server = fork_client.connect_to(plan.settings, surroundings.of().name)
    if server is None:
        shim.start(plan, hook, listeners, lock, runtime)
        return
    debug = os.environ.get("GRAFT_DEBUG", "")
    with server:
        request = {"do": "shim", "plan": plan_value(plan), "debug": debug}
        fork_messages.send(server, request, [hook.fileno(), listeners.fileno(), runtime, lock])
        if not server.recv(1):
            raise KernelError("cannot start the container's shim: its process has died")


def be_shim(connection: socket.socket, request: dict[str, Any], fds: Sequence[int]) -> None:
    """Be the shim of a container, to its end. The client is the root that this process is (fork_server.is_served)."""
    hook, listeners, runtime, lock = fds
    if request["debug"]:
        os.environ["GRAFT_DEBUG"] = request["debug"]
    plan = plan_of(request["plan"])
    connection.send(b"+")
    connection.close()
    shim.serve(plan, _accepting(hook), _accepting(listeners), lock, runtime)


def plan_value(plan: Plan) -> dict[str, Any]:
    """The values of a plan that a message has: no pickle, which would be code of the sender's."""
    return {
        "settings": plan.settings.environment,
        "policy": policy_value(plan.policy),
        "origin": plan.policy.origin,
        "transport": str(plan.transport),
        "id": plan.id,
        "folder": None if plan.folder is None else str(plan.folder),
        "engine_cgroup": str(plan.engine_cgroup),
        "killable": plan.killable,
        "datagrams": plan.datagrams,
        "file": _file_value(plan.policy.file),
    }


def plan_of(value: dict[str, Any]) -> Plan:
    """The plan of `plan_value`. Raises UsageError, KeyError, ValueError."""
    checked = check_document(plain_document(value["policy"]), None)
    if checked.policy is None:
        raise PolicyError("policy", checked.problems)
    return Plan(
        Settings.from_environment(value["settings"]),
        replace(checked.policy, origin=Origin(value["origin"]), file=_file_of(value["file"])),
        Transport.parse(value["transport"]),
        value["id"],
        None if value["folder"] is None else Path(value["folder"]),
        Path(value["engine_cgroup"]),
        value["killable"],
        value["datagrams"],
    )


def _file_value(file: PolicyFile | None) -> list[Any] | None:
    return None if file is None else [str(file.path), file.stamp, [str(path) for path in file.passed]]


def _file_of(value: list[Any] | None) -> PolicyFile | None:
    """The inverse."""
    if value is None:
        return None
    path, stamp, passed = value
    return PolicyFile(Path(path), tuple(stamp), tuple(map(Path, passed)))


def _accepting(fd: int) -> socket.socket:
    sock = socket.socket(fileno=fd)
    sock.setblocking(False)
    return sock
