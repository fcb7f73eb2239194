"""Graft's splice transport, and beside it what else relays connections to a container that runs already."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from graft.errors import KernelError, RefusedError
from graft.kernel import cgroup
from tests.bench.cases import INNER_PORT, NotOffered, Server, graft_command, graft_environment, serving
from tests.bench.process import BenchError, ProgramFailed, kept, run, wait_until
from tests.bench.report import Bound, Wanted, at_least, more_than
from tests.bench.topology import CONTAINER_ADDRESS, Topology

SPLICE_PORT = 8083
FIRST_PROXY_PORT = 8084
SPLICE_KERNEL_PORT = 8088

MORE_THAN_PROXIES: tuple[Bound, ...] = (more_than(1, of="docker-proxy"), more_than(1, of="socat"))


@dataclass
class SpliceCase:
    """The program runs in the container's namespace, and was started without Graft: `graft attach` serves it."""

    name: str
    title: str
    relay: str
    """What `graft attach --relay` takes."""
    port: int
    wanted: Wanted = field(default_factory=dict)
    _environment: dict[str, str] = field(default_factory=dict)
    _cgroup: Path = Path()
    _resident: subprocess.Popen[str] | None = None

    @contextmanager
    def prepared(self, net: Topology, workdir: Path) -> Iterator[None]:
        """Attach a cgroup in which a process lives already; servers and clients are started in it later."""
        name = f"graft-bench-{self.name}-{os.getpid()}"
        self._environment = graft_environment(net, workdir, name)
        self._cgroup = cgroup.v2_mount() / f"{name}-container"
        self._cgroup.mkdir()
        try:
            with kept(self._inside(net, "sleep", "infinity")) as process:
                wait_until("in its cgroup", lambda: bool(cgroup.processes(self._cgroup)), process)
                self._resident = process
                self._graft("ep", "add", "bench-http", f"0.0.0.0:{self.port}")
                self._graft("ep", "add", "bench-out", "0.0.0.0:dynamic")
                self._attach()
                yield
        finally:
            with suppress(BenchError):
                self._graft("down", "--force")
            cgroup.remove(self._cgroup)

    @contextmanager
    def serve(self, net: Topology, server: Server) -> Iterator[int]:
        """Start the server in the container; the endpoint answers once Graft has seen it listen."""
        command = self._inside(net, *server.command(INNER_PORT))
        with serving(command, net.host, self.port, protocol=server.protocol):
            yield self.port
        assert self._resident is not None
        wait_until("withdrawn", lambda: not net.host.listens(self.port, server.protocol), self._resident)

    def reach_out(self, net: Topology, command: list[str], timeout: float) -> str:
        """Start the client in the container."""
        return run(self._inside(net, *command), timeout)

    def _inside(self, net: Topology, *command: str) -> list[str]:
        enter = f'echo $$ > {self._cgroup}/cgroup.procs; exec "$@"'
        return ["sh", "-c", enter, "sh", *net.container.enter(*command)]

    def _attach(self) -> None:
        """Raises NotOffered where the relay in the kernel is refused; splice(2) has to be there."""
        rules = ["-i", f"0.0.0.0:{INNER_PORT}=bench-http", "-e", "0.0.0.0/0=bench-out"]
        try:
            self._graft("attach", "--cgroup", str(self._cgroup), "--relay", self.relay, *rules)
        except ProgramFailed as error:
            refused = error.status in (KernelError.exit_code, RefusedError.exit_code) and "relay" in error.said
            if self.relay == "kernel" and refused:
                raise NotOffered(error.said.strip()) from error
            raise

    def _graft(self, *arguments: str) -> None:
        run([graft_command(), *arguments], environment=self._environment)


@dataclass
class ProxyCase:
    """The program runs behind the bridge, and a proxy of another kind on the host leads to it."""

    name: str
    title: str
    program: str
    port: int
    command: Callable[[Path, int, str], list[str]]
    """From a folder for files, the port to listen on, and tcp or udp. Raises NotOffered."""
    wanted: Wanted = field(default_factory=dict)
    _workdir: Path = Path()

    @contextmanager
    def prepared(self, net: Topology, workdir: Path) -> Iterator[None]:
        """Nothing to prepare but a folder."""
        if shutil.which(self.program) is None and not Path(self.program).exists():
            raise NotOffered(f"{self.program} is not installed")
        self._workdir = workdir
        yield

    @contextmanager
    def serve(self, net: Topology, server: Server) -> Iterator[int]:
        """Start the server in the container and the proxy on the host."""
        proxy = net.host.enter(*self.command(self._workdir, self.port, server.protocol))
        with (
            server.running(net.container, INNER_PORT),
            serving(proxy, net.host, self.port, protocol=server.protocol),
        ):
            yield self.port

    def reach_out(self, net: Topology, command: list[str], timeout: float) -> str:
        """Not what such a proxy does."""
        raise NotOffered("a proxy relays what comes in")


def _docker_proxy(_folder: Path, port: int, protocol: str) -> list[str]:
    # Descriptor 3 is where docker-proxy tells the docker daemon that it is ready.
    words = f"docker-proxy -proto {protocol} -host-ip 0.0.0.0 -host-port {port}"
    words += f" -container-ip {CONTAINER_ADDRESS} -container-port {INNER_PORT}"
    return ["sh", "-c", f"exec {words} 3>/dev/null"]


def _socat(_folder: Path, port: int, protocol: str) -> list[str]:
    if protocol == "udp":
        return ["socat", f"UDP4-LISTEN:{port},fork,reuseaddr", f"UDP4:{CONTAINER_ADDRESS}:{INNER_PORT}"]
    listen = f"TCP4-LISTEN:{port},fork,reuseaddr,nodelay,backlog=4096"
    return ["socat", listen, f"TCP4:{CONTAINER_ADDRESS}:{INNER_PORT},nodelay"]


def _only_tcp(protocol: str) -> None:
    if protocol != "tcp":
        raise NotOffered("a proxy of TCP")


def _haproxy(folder: Path, port: int, protocol: str) -> list[str]:
    _only_tcp(protocol)
    file = folder / "haproxy.cfg"
    file.write_text(
        "global\n  maxconn 4096\n"
        "defaults\n  mode tcp\n  option splice-auto\n"
        "  timeout connect 10s\n  timeout client 1m\n  timeout server 1m\n"
        f"listen bench\n  bind 0.0.0.0:{port}\n  server container {CONTAINER_ADDRESS}:{INNER_PORT}\n"
    )
    return ["haproxy", "-db", "-f", str(file)]


SOCKET_PROXYD = "/usr/lib/systemd/systemd-socket-proxyd"


def _socket_proxyd(_folder: Path, port: int, protocol: str) -> list[str]:
    _only_tcp(protocol)
    activate = ["systemd-socket-activate", "-l", f"0.0.0.0:{port}"]
    return [*activate, SOCKET_PROXYD, "--connections-max=4096", f"{CONTAINER_ADDRESS}:{INNER_PORT}"]


RELAYS: tuple[SpliceCase | ProxyCase, ...] = (
    SpliceCase(
        "splice",
        "splice",
        "splice",
        SPLICE_PORT,
        {
            "request": MORE_THAN_PROXIES,
            "pingpong": MORE_THAN_PROXIES,
            "bulk-in": [at_least(0.9, of="bridge")],
            "bulk-out": [at_least(0.9, of="bridge")],
            "udp-pingpong": [more_than(1, of="socat")],
            "udp-packets": [more_than(1, of="socat")],
        },
    ),
    SpliceCase(
        "splice-kernel",
        "splice, kernel relay",
        "kernel",
        SPLICE_KERNEL_PORT,
        {"pingpong": [at_least(1, of="bridge")]},
    ),
    ProxyCase("docker-proxy", "docker-proxy", "docker-proxy", FIRST_PROXY_PORT, _docker_proxy),
    ProxyCase("socat", "socat", "socat", FIRST_PROXY_PORT + 1, _socat),
    ProxyCase("haproxy", "haproxy", "haproxy", FIRST_PROXY_PORT + 2, _haproxy),
    ProxyCase("socket-proxyd", "systemd-socket-proxyd", SOCKET_PROXYD, FIRST_PROXY_PORT + 3, _socket_proxyd),
)
