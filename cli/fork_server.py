"""The fork server's process, with all that commands need loaded (graft/kernel/fork_server.py).

python -m graft_cli.fork_server serve NAME     the server; it writes to descriptor 3 when it is ready
python -m graft_cli.fork_server serve-one      one request, at the connection that is descriptor 3
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import sys
import traceback
from typing import NoReturn

from graft.commands import run_job
from graft.commands.run_client import OUTDATED
from graft.datapath import dataplane
from graft.kernel import cgroup, fork_messages, fork_server, process, surroundings
from graft.model.settings import Settings
from graft.oci import container_job
from graft.swap import fork_client

from . import preload

_IDLE_SECONDS = 30.0


class Jobs:
    """What children of the server do."""

    def __init__(self) -> None:
        self._command = preload.load()
        self._files = preload.LoadedFiles()

    def _run(self, words: list[str], client: run_job.Client) -> None:
        self._command(words, prog_name="graft", obj=client)

    @staticmethod
    def _end_outdated(connection: socket.socket) -> None:
        fork_server.end_server()
        fork_messages.send(connection, {"refused": OUTDATED})

    def do(self, connection: socket.socket) -> None:
        """What the client at ``connection`` asks for. The calling process is there for it alone."""
        message, fds = fork_messages.receive(connection)
        try:
            match message["do"]:
                case "run" if self._files.have_changed():
                    self._end_outdated(connection)
                case "run":
                    run_job.prepare(connection, message, fds, self._run)
                case "supervise":
                    run_job.supervise_container(connection, message, fds)
                case "end":
                    run_job.end(connection, message, fds)
                case "container" if self._files.have_changed():
                    self._end_outdated(connection)
                case "container":
                    container_job.prepare_container(connection, message, fds)
                case "shim":
                    container_job.be_shim(connection, message, fds)
        except Exception:
            if os.environ.get("GRAFT_DEBUG"):
                traceback.print_exc()


def serve(settings: Settings, name: str, ready: int) -> None:
    """Be the server of that name, until it has not been needed for a while. Without effect where there is one."""
    jobs, own = Jobs(), surroundings.of()
    cgroup.make(dataplane.forks_cgroup(settings))
    cgroup.enter(dataplane.forks_cgroup(settings))
    process.set_process_name("graft-forks")

    def do_if_served(connection: socket.socket) -> None:
        if fork_server.is_served(connection, own):
            process.set_oom_score(process.oom_score(surroundings.peer_pid(connection)))
            jobs.do(connection)
        else:
            fork_messages.send(connection, {"refused": "surroundings"})

    with contextlib.suppress(BlockingIOError), fork_client.lock(settings, name, wait=False):
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        path = fork_client.folder_of(settings) / name
        path.unlink(missing_ok=True)
        with fork_client.address(settings, name) as short:
            listening.bind(short)  # 0700: by the umask
        server = fork_server.Server(listening, do_if_served)
        os.write(ready, b"+")
        os.close(ready)
        server.serve(_IDLE_SECONDS)
        path.unlink(missing_ok=True)


def _leave_the_caller() -> None:
    """Be a process like any other of root's, whatever the command was that started it."""
    process.close_all_but({3})
    os.chdir("/")
    os.umask(0o077)
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, 0)
    for limit in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE, resource.RLIMIT_DATA):
        with contextlib.suppress(OSError, ValueError):
            hard = resource.getrlimit(limit)[1]
            resource.setrlimit(limit, (hard, hard))
    process.raise_descriptor_limit()


def main() -> NoReturn:
    """The entry point: leaves a child, which nobody has to wait for."""
    if os.fork():
        os._exit(0)
    code = 1
    try:
        _leave_the_caller()
        if sys.argv[1] == "serve":
            serve(Settings.from_environment(), sys.argv[2], 3)
        else:
            jobs, connection = Jobs(), socket.socket(fileno=3)
            connection.send(fork_messages.HELLO)
            jobs.do(connection)
        code = 0
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()
