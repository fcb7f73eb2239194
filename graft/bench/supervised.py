"""A program that Graft starts: `graft run`, in transport swap or born, with and without what is compiled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from graft.bench.cases import INNER_PORT, Case, NotOffered, Server, serving
from graft.bench.own_graft import EGRESS
from graft.bench.process import Environment, run
from graft.bench.report import Wanted, as_fast_as_host, at_most
from graft.bench.topology import Topology
from graft.model.transport import Transport
from graft.swap import fast_calls

SWAP_PORT = 8082
BORN_PORT = 8090


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

    @contextmanager
    def prepared(self, net: Topology) -> Iterator[None]:
        """Add an endpoint to serve on."""
        net.graft.ensure_up()
        net.graft.run("ep", "add", self._endpoint, f"0.0.0.0:{self.port}")
        yield

    @contextmanager
    def serve(self, net: Topology, server: Server) -> Iterator[int]:
        """Start the server under graft run; it listens in the host's namespace or not at all."""
        rules = ["-i", f"0.0.0.0:{INNER_PORT}={self._endpoint}", "-e", f"0.0.0.0/0={EGRESS}"]
        command = self._run(net, *rules, "--", *server.command(INNER_PORT))
        with serving(command, net.host, self.port, self._environment(net), server.protocol):
            yield self.port

    def reach_out(self, net: Topology, command: list[str], timeout: float) -> str:
        """Start the client under graft run."""
        return run(self._run(net, "-e", f"0.0.0.0/0={EGRESS}", "--", *command), timeout, self._environment(net))

    @property
    def _endpoint(self) -> str:
        return f"bench-{self.name}"

    def _run(self, net: Topology, *arguments: str) -> list[str]:
        return net.graft.command("run", *self.flags, "--net", "new", *arguments)

    def _environment(self, net: Topology) -> Environment:
        return {**net.graft.environment, **self.variables}


class OnlyConnects:
    """What sockets do once they are there is the same as in another case: only connects are measured."""

    @contextmanager
    def serve(self, net: Topology, server: Server) -> Iterator[int]:
        """Raises NotOffered."""
        raise NotOffered("the same as where the plain case is compiled")
        yield 0


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
    def prepared(self, net: Topology) -> Iterator[None]:
        """Raises NotOffered where it would be the case below."""
        if reason := fast_calls.why_not(Transport.BORN):
            raise NotOffered(reason)
        with super().prepared(net):
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


SUPERVISED: tuple[Case, ...] = (SwapCase(), PlainSwapCase(), BornCase(), PlainBornCase())
