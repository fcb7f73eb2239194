"""A container that was started without Graft: a cgroup, a network namespace, and sockets made in them for the test.

A socket belongs to the cgroup and the namespace that it was made in, whichever process uses it. So a small process in
the container makes sockets and sends them to the test, which makes the container's system calls itself.
"""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.kernel import cgroup
from graft.splice import client as splice
from graft.state.records import Container
from tests.support.installation import Host
from tests.support.namespaces import Netns, namespace
from tests.support.program import Program, start
from tests.support.shell import Word
from tests.support.wait import PATIENCE, until

_MAKER = """
import socket, sys
requests = socket.socket(fileno=int(sys.argv[1]))
while wanted := requests.recv(64):
    made = socket.socket(*map(int, wanted.split()))
    socket.send_fds(requests, [b"."], [made.fileno()])
    made.close()
"""
_numbers = itertools.count(1)


@dataclass
class Plain:
    """The container, and the host on which it is attached."""

    host: Host
    netns: Netns
    cgroup: Path
    requests: socket.socket
    process: subprocess.Popen[bytes]
    started: list[Program]
    relay: str = "splice"

    def command(self, *words: Word) -> list[str]:
        """A command that runs in it."""
        enter = f'echo $$ > {self.cgroup}/cgroup.procs; exec "$@"'
        return ["sh", "-c", enter, "sh", *self.netns.command(*words)]

    def start(self, *words: Word) -> Program:
        """A program in it; it ends with the test."""
        program = start(self.command(*words))
        self.started.append(program)
        return program

    def tcp(self, family: socket.AddressFamily = socket.AF_INET) -> socket.socket:
        """A TCP socket of one of its programs."""
        return self._make(family, socket.SOCK_STREAM)

    def udp(self, family: socket.AddressFamily = socket.AF_INET) -> socket.socket:
        """A UDP socket of one of its programs."""
        return self._make(family, socket.SOCK_DGRAM)

    def _make(self, family: int, kind: int) -> socket.socket:
        self.requests.send(f"{int(family)} {int(kind)}".encode())
        _, fds, _, _ = socket.recv_fds(self.requests, 1, 1)
        made = socket.socket(fileno=fds[0])
        made.settimeout(15 * PATIENCE)
        return made

    def listener(self, address: str = "0.0.0.0", port: int = 80, v6only: bool = True) -> socket.socket:
        """A listening TCP socket of one of its programs."""
        made = self.tcp(socket.AF_INET6 if ":" in address else socket.AF_INET)
        if ":" in address:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6only)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((address, port))
        made.listen(4096)
        return made

    def attach(self, *rules: Word) -> Container:
        """`graft attach` with these rules, which replace earlier ones."""
        self.host.graft("attach", "--cgroup", self.cgroup, "--relay", self.relay, *rules)
        return self.container

    @property
    def container(self) -> Container:
        """Its record."""
        return self.host.installation.containers.find(str(self.cgroup))

    def detach(self) -> None:
        """`graft detach`."""
        self.host.graft("detach", "--cgroup", self.cgroup)

    def described(self) -> dict[str, Any]:
        """The daemon's description of it."""
        return splice.describe(self.host.settings, self.container)

    def daemon(self) -> int:
        """The daemon's process id."""
        return int(self.described()["pid"])

    def is_published(self, port: int) -> bool:
        """Whether the host listens on a port."""
        return self.host.netns.listens(port)

    def until_published(self, port: int, yes: bool = True) -> None:
        """Wait until the daemon has published the port, or (not ``yes``) withdrawn it."""
        until(f"port {port} {'published' if yes else 'withdrawn'}", lambda: self.is_published(port) is yes)


@contextmanager
def plain(host: Host, relay: str = "splice") -> Iterator[Plain]:
    """A container with one process, to be served by ``relay``; it is removed afterwards."""
    path = cgroup.v2_mount() / f"graft-test-{os.getpid()}-plain-{next(_numbers)}"
    path.mkdir()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with namespace("plain") as netns, ours, theirs:
        maker = netns.command(sys.executable, "-c", _MAKER, str(theirs.fileno()))
        enter = f'echo $$ > {path}/cgroup.procs; exec "$@"'
        process = subprocess.Popen(["sh", "-c", enter, "sh", *maker], pass_fds=[theirs.fileno()])
        made = Plain(host, netns, path, ours, process, [], relay)
        try:
            made.tcp().close()
            yield made
        finally:
            host.graft("detach", "--cgroup", path, status=None)
            for program in made.started:
                program.stop()
            cgroup.kill(path)
            process.wait()
            cgroup.remove(path)
