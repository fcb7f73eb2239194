"""What the fork server's process does (fork_server.py), with all that commands need loaded."""

from __future__ import annotations

import contextlib
import os
import socket
import traceback

from graft.commands import run_job
from graft.commands.run_client import OUTDATED
from graft.datapath import dataplane
from graft.kernel import cgroup, fork_messages, fork_server, process
from graft.kernel.peers import Peer
from graft.kernel.surroundings import Surroundings
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


def serve(settings: Settings, name: str, own: Surroundings, ready: int) -> None:
    """Be the server of that name, until it has not been needed for a while. Without effect where there is one."""
    jobs = Jobs()
    cgroup.make(dataplane.forks_cgroup(settings))
    cgroup.enter(dataplane.forks_cgroup(settings))
    process.set_process_name("graft-forks")

    def do_if_served(connection: socket.socket, client: Peer) -> None:
        is_served = fork_server.is_served(client, own)
        client.close()
        if is_served:
            process.set_oom_score(process.oom_score(client.pid))
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
        os.write(ready, fork_client.READY)
        os.close(ready)
        server.serve(_IDLE_SECONDS)
        path.unlink(missing_ok=True)


def serve_one(connection: socket.socket) -> None:
    """Do what one client asks for: the process that has started this one."""
    jobs = Jobs()
    connection.send(fork_messages.HELLO)
    if connection.recv(1) == fork_messages.ASK:
        connection.send(fork_messages.HELLO)
        jobs.do(connection)
