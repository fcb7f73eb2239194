"""Where a program runs: each case starts a server that the client can reach, or a client that reaches out.

A new case (another transport, a proxy to compare with) is one more class and one more line in ``CASES``. A case that
needs a port of the host of its own takes the next number; ``INNER_PORT`` is what programs in a container bind.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from graft.model.transport import Transport
from graft.swap import fast_calls
from tests.bench.process import BenchError, Environment, kept, run, wait_until
from tests.bench.report import Wanted, at_least, at_most
from tests.bench.topology import Netns, Topology

INNER_PORT = 80
HOST_PORT = 8080
BRIDGE_PORT = 8081
SWAP_PORT = 8082
BORN_PORT = 8090


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

    def prepared(self, net: Topology, workdir: Path) -> AbstractContextManager[None]:
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
    wanted: Wanted = field(default_factory=dict)

    @contextmanager
    def prepared(self, net: Topology, workdir: Path) -> Iterator[None]:
        """Nothing to prepare: the topology has what is needed."""
        yield

    @contextmanager
    def serve(self, net: Topology, server: Server) -> Iterator[int]:
        """Start the server in the namespace."""
        with server.running(self.namespace(net), self.listens_on):
            yield self.answers_on

    def reach_out(self, net: Topology, command: list[str], timeout: float) -> str:
        """Start the client in the namespace."""
        return run(self.namespace(net).enter(*command), timeout)


def as_fast_as_host(connect: float) -> Wanted:
    """What is wanted where a socket is the host's own; ``connect``: of connect + close, the most."""
    return {
        "keepalive": [at_least(0.98)],
        "request": [at_least(0.95)],
        "pingpong": [at_least(0.98)],
        "bulk-in": [at_least(0.98)],
        "bulk-out": [at_least(0.98)],
        "connect": [at_most(connect)],
        "udp-pingpong": [at_least(0.97)],
        "udp-packets": [at_least(0.97)],
    }


@dataclass
class SwapCase:
    """The program runs under `graft run`, in a namespace with nothing but lo."""

    name: str = "swap"
    title: str = "swap"
    wanted: Wanted = field(default_factory=lambda: as_fast_as_host(2.2))
    port: int = SWAP_PORT
    flags: tuple[str, ...] = ()
    """Of `graft run`: ``--deny`` leaves nothing to the container, which has transport born then."""
    variables: dict[str, str] = field(default_factory=dict)
    """What the environment of `graft run` has besides."""
    _environment: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def prepared(self, net: Topology, workdir: Path) -> Iterator[None]:
        """Bring up a Graft of the benchmark's own, with an endpoint to serve on and one to reach out from."""
        name = f"graft-bench-{self.name}-{os.getpid()}"
        self._environment = graft_environment(net, workdir, name) | self.variables
        try:
            self._graft("ep", "add", "bench-http", f"0.0.0.0:{self.port}")
            self._graft("ep", "add", "bench-out", "0.0.0.0:dynamic")
            yield
        except BaseException:
            with suppress(BenchError):  # the first error is the one to show
                self._graft("down")
            raise
        self._graft("down")

    @contextmanager
    def serve(self, net: Topology, server: Server) -> Iterator[int]:
        """Start the server under graft run; it listens in the host's namespace or not at all."""
        grant = ["-i", f"0.0.0.0:{INNER_PORT}=bench-http", "-e", "0.0.0.0/0=bench-out"]
        command = [graft_command(), "run", *self.flags, *grant, "--net", "new", "--", *server.command(INNER_PORT)]
        with serving(command, net.host, self.port, self._environment, server.protocol):
            yield self.port

    def reach_out(self, net: Topology, command: list[str], timeout: float) -> str:
        """Start the client under graft run."""
        graft = [graft_command(), "run", *self.flags, "-e", "0.0.0.0/0=bench-out", "--net", "new", "--"]
        return run([*graft, *command], timeout, self._environment)

    def _graft(self, *arguments: str) -> None:
        run([graft_command(), *arguments], environment=self._environment)


class OnlyConnects:
    """What sockets do once they are there is the same as in another case: only connects are measured."""

    @contextmanager
    def serve(self, net: Topology, server: Server) -> Iterator[int]:
        """Raises NotOffered."""
        raise NotOffered("the same as where the plain case is compiled")
        yield


@dataclass
class PlainSwapCase(OnlyConnects, SwapCase):
    """Swap, where nothing was compiled."""

    name: str = "swap-plain"
    title: str = "swap, plain Python"
    wanted: Wanted = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=lambda: {fast_calls.NOT_COMPILED: "1"})


@dataclass
class BornCase(SwapCase):
    """The same under a policy that leaves nothing to the container: its sockets are born on the host's stack."""

    name: str = "born"
    title: str = "born"
    wanted: Wanted = field(default_factory=lambda: as_fast_as_host(1.5))
    port: int = BORN_PORT
    flags: tuple[str, ...] = ("--deny",)

    @contextmanager
    def prepared(self, net: Topology, workdir: Path) -> Iterator[None]:
        """Raises NotOffered where it would be the case below."""
        if reason := fast_calls.why_not(Transport.BORN):
            raise NotOffered(reason)
        with super().prepared(net, workdir):
            yield


@dataclass
class PlainBornCase(OnlyConnects, SwapCase):
    """Born, where nothing was compiled."""

    name: str = "born-plain"
    title: str = "born, plain Python"
    wanted: Wanted = field(default_factory=lambda: {"connect": [at_most(2.1)]})
    port: int = BORN_PORT + 1
    flags: tuple[str, ...] = ("--deny",)
    variables: dict[str, str] = field(default_factory=lambda: {fast_calls.NOT_COMPILED: "1"})


def graft_command() -> str:
    """The `graft` that belongs to this interpreter."""
    return str(Path(sys.prefix) / "bin" / "graft")


def graft_environment(net: Topology, workdir: Path, name: str) -> dict[str, str]:
    """For a Graft apart from all others: ``name`` is its own on this machine."""
    return {
        **os.environ,
        "GRAFT_HOST_NETNS": str(net.host.path),
        "GRAFT_PIN_DIR": f"/sys/fs/bpf/{name}",
        "GRAFT_RUN_DIR": str(workdir / f"{name}-run"),
        "GRAFT_STATE_DIR": str(workdir / f"{name}-state"),
        "GRAFT_CGROUP": name,
    }


CASES: tuple[Case, ...] = (
    PlainCase("host", "host", lambda net: net.host, HOST_PORT, HOST_PORT),
    # How far the second is from the first is how far from each other two equal things come out.
    PlainCase("again", "host again", lambda net: net.host, HOST_PORT, HOST_PORT),
    # As a container usually runs. nftables does the NAT in the kernel; no proxy is in the way.
    PlainCase("bridge", "bridge + NAT", lambda net: net.container, INNER_PORT, BRIDGE_PORT),
    SwapCase(),
    PlainSwapCase(),
    BornCase(),
    PlainBornCase(),
)
