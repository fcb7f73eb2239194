"""A container that was started without Graft: `graft attach` puts it under a policy while it runs.

In the host's network namespace it has transport direct, in one of its own transport splice. Whether a server listens
before it is attached or after makes no difference to splice: its listener is found, and served by the same relay.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from graft.bench.cases import INNER_PORT, Case, NotOffered, Server, serving
from graft.bench.own_graft import EGRESS
from graft.bench.process import ProgramFailed, joined, kept, run, wait_until
from graft.bench.report import Bound, Wanted, as_fast_as_host, at_least, more_than
from graft.bench.topology import Netns, Topology
from graft.errors import KernelError, RefusedError
from graft.kernel import cgroup

SPLICE_PORT = 8083
SPLICE_KERNEL_PORT = 8088
DIRECT_PORT = 8097

MORE_THAN_PROXIES: tuple[Bound, ...] = (more_than(1, of="docker-proxy"), more_than(1, of="socat"))


@dataclass
class AttachedCase:
    """Servers and clients run in a cgroup that was attached while a process lived in it."""

    name: str
    title: str
    namespace: Callable[[Topology], Netns]
    port: int
    wanted: Wanted = field(default_factory=dict)
    relay: str = ""
    """What `graft attach --relay` takes, where the transport has one."""
    _cgroup: Path = field(default=Path(), init=False)
    _resident: subprocess.Popen[str] | None = field(default=None, init=False)

    @contextmanager
    def prepared(self, net: Topology) -> Iterator[None]:
        """Attach the cgroup. Raises NotOffered where the relay in the kernel is refused."""
        net.graft.ensure_up()
        self._cgroup = net.scratch.cgroup / self.name
        cgroup.make(self._cgroup)
        with kept(self._inside(net, "sleep", "infinity")) as process:
            wait_until("in its cgroup", lambda: bool(cgroup.processes(self._cgroup)), process)
            self._resident = process
            net.graft.run("ep", "add", self._endpoint, f"0.0.0.0:{self.port}")
            self._attach(net)
            yield

    @contextmanager
    def serve(self, net: Topology, server: Server) -> Iterator[int]:
        """Start the server in the container; with splice the endpoint answers once Graft has seen it listen."""
        command = self._inside(net, *server.command(INNER_PORT))
        with serving(command, net.host, self.port, protocol=server.protocol):
            yield self.port
        assert self._resident is not None
        wait_until("withdrawn", lambda: not net.host.listens(self.port, server.protocol), self._resident)

    def reach_out(self, net: Topology, command: list[str], timeout: float) -> str:
        """Start the client in the container."""
        return run(self._inside(net, *command), timeout)

    @property
    def _endpoint(self) -> str:
        return f"bench-{self.name}"

    def _inside(self, net: Topology, *command: str) -> list[str]:
        return joined(self._cgroup, self.namespace(net).view(*command))

    def _attach(self, net: Topology) -> None:
        options = ["--relay", self.relay] if self.relay else ["--transport", "direct"]
        rules = ["-i", f"0.0.0.0:{INNER_PORT}={self._endpoint}", "-e", f"0.0.0.0/0={EGRESS}"]
        try:
            net.graft.run("attach", "--cgroup", str(self._cgroup), *options, *rules)
        except ProgramFailed as error:
            refused = error.status in (KernelError.exit_code, RefusedError.exit_code) and "relay" in error.said
            if self.relay == "kernel" and refused:
                raise NotOffered(error.said.strip()) from error
            raise


ATTACHED: tuple[Case, ...] = (
    AttachedCase("direct", "direct", lambda net: net.host, DIRECT_PORT, as_fast_as_host(1.2)),
    AttachedCase(
        "splice",
        "splice",
        lambda net: net.container,
        SPLICE_PORT,
        {
            "request": MORE_THAN_PROXIES,
            "pingpong": MORE_THAN_PROXIES,
            "bulk-in": [at_least(0.9, of="bridge")],
            "bulk-out": [at_least(0.9, of="bridge")],
            "udp-pingpong": [more_than(1, of="socat")],
            "udp-packets": [more_than(1, of="socat")],
        },
        relay="splice",
    ),
    AttachedCase(
        "splice-kernel",
        "splice, kernel relay",
        lambda net: net.container,
        SPLICE_KERNEL_PORT,
        {"pingpong": [at_least(1, of="bridge")]},
        relay="kernel",
    ),
)
