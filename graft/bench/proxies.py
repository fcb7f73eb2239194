"""Programs that publish a port of a container: they relay its connections, each in its own way."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from graft.bench.cases import INNER_PORT, Case, NotOffered, Server, serving
from graft.bench.report import Wanted
from graft.bench.topology import CONTAINER_ADDRESS, Topology

FIRST_PROXY_PORT = 8084


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

    @contextmanager
    def prepared(self, net: Topology) -> Iterator[None]:
        """Nothing to prepare."""
        if shutil.which(self.program) is None and not Path(self.program).exists():
            raise NotOffered(f"{self.program} is not installed")
        yield

    @contextmanager
    def serve(self, net: Topology, server: Server) -> Iterator[int]:
        """Start the server in the container and the proxy on the host."""
        proxy = net.host.enter(*self.command(net.scratch.folder, self.port, server.protocol))
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


PROXIES: tuple[Case, ...] = (
    ProxyCase("docker-proxy", "docker-proxy", "docker-proxy", FIRST_PROXY_PORT, _docker_proxy),
    ProxyCase("socat", "socat", "socat", FIRST_PROXY_PORT + 1, _socat),
    ProxyCase("haproxy", "haproxy", "haproxy", FIRST_PROXY_PORT + 2, _haproxy),
    ProxyCase("socket-proxyd", "systemd-socket-proxyd", SOCKET_PROXYD, FIRST_PROXY_PORT + 3, _socket_proxyd),
)
