"""Where a program runs: each case starts a server that the client can reach, or a client that reaches out.

A new case (another transport, a proxy to compare with) is one more class and one more line in a module's list, which
command.py puts together. A case that needs a port of the host of its own takes the next number; ``INNER_PORT`` is what
programs in a container bind.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from graft.bench.process import Environment, kept, run, wait_until
from graft.bench.report import Wanted
from graft.bench.topology import NAT_PROGRAM, Netns, Topology

INNER_PORT = 80
HOST_PORT = 8080
BRIDGE_PORT = 8081


class NotOffered(Exception):
    """The case has no way to do this, or this machine has not got what it takes: its cell stays empty."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server: its command, from the port that it listens on, and whether that is one of TCP or of UDP."""

    command: Callable[[int], list[str]]
    protocol: str = "tcp"

    def running(self, where: Netns, port: int) -> AbstractContextManager[None]:
        """Keep it running in the namespace ``where``, once it listens on ``port`` there."""
        return serving(where.enter(*self.command(port)), where, port, protocol=self.protocol)


class Case(Protocol):
    """One way to give a program the network."""

    name: str
    title: str
    wanted: Wanted
    """By workload: the ratios to the host, or to another case, that are aimed at."""

    def prepared(self, net: Topology) -> AbstractContextManager[None]:
        """Set up what all measurements of the case share, and undo it. Raises NotOffered, with the reason."""

    def serve(self, net: Topology, server: Server) -> AbstractContextManager[int]:
        """Keep ``server`` running; gives the port of the host's address where the client finds it."""

    def reach_out(self, net: Topology, command: list[str], timeout: float) -> str:
        """Run the client ``command`` to its end; gives its output."""


@contextmanager
def serving(
    command: list[str], listens_in: Netns, port: int, environment: Environment = None, protocol: str = "tcp"
) -> Iterator[None]:
    """Keep ``command`` running, once a socket listens on ``port`` in the namespace ``listens_in``."""
    with kept(command, environment) as process:
        wait_until(f"listening on port {port}", lambda: listens_in.listens(port, protocol), process)
        yield


@dataclass
class PlainCase:
    """The program runs in a namespace of the topology, and nothing of Graft's is there."""

    name: str
    title: str
    namespace: Callable[[Topology], Netns]
    listens_on: int
    answers_on: int
    """The port of the host's address that leads to ``listens_on``."""
    needs: str = ""
    """A program without which the topology has no way there."""
    wanted: Wanted = field(default_factory=dict)

    @contextmanager
    def prepared(self, net: Topology) -> Iterator[None]:
        """Nothing to prepare: the topology has what is needed. Raises NotOffered."""
        if self.needs and shutil.which(self.needs) is None:
            raise NotOffered(f"{self.needs} is not installed")
        yield

    @contextmanager
    def serve(self, net: Topology, server: Server) -> Iterator[int]:
        """Start the server in the namespace."""
        with server.running(self.namespace(net), self.listens_on):
            yield self.answers_on

    def reach_out(self, net: Topology, command: list[str], timeout: float) -> str:
        """Start the client in the namespace."""
        return run(self.namespace(net).enter(*command), timeout)


PLAIN_CASES: tuple[Case, ...] = (
    PlainCase("host", "host", lambda net: net.host, HOST_PORT, HOST_PORT),
    # How far the second is from the first is how far from each other two equal things come out.
    PlainCase("again", "host again", lambda net: net.host, HOST_PORT, HOST_PORT),
    # As a container usually runs. nftables does the NAT in the kernel; no proxy is in the way.
    PlainCase("bridge", "bridge + NAT", lambda net: net.container, INNER_PORT, BRIDGE_PORT, needs=NAT_PROGRAM),
)
