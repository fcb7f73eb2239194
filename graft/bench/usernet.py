"""What gives a container a network from user space: pasta and slirp4netns, each with the options that podman uses.

The program runs in a namespace of the case's own, whose only way out is the program that is measured. That runs in the
host's namespace, and forwards a port of it.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from graft.bench.cases import INNER_PORT, Case, NotOffered, Server
from graft.bench.process import kept, run, wait_until
from graft.bench.report import Wanted
from graft.bench.topology import CLIENT_ADDRESS, HOST_ADDRESS, HOST_INTERFACE, Netns, Topology, named_netns

FIRST_USERNET_PORT = 8094


@dataclass
class UsernetCase:
    """The program runs in a namespace that a program in user space connects."""

    name: str
    title: str
    port: int
    command: Callable[[Path, Path, int], list[str]]
    """From a folder for files, the namespace's path, and the port to forward."""
    forward: Callable[[Path, int], None] = lambda folder, port: None
    """Has it forward the port once it runs, from the same folder and the port."""
    wanted: Wanted = field(default_factory=dict)
    _netns: Netns = field(default_factory=lambda: Netns(""))

    @contextmanager
    def prepared(self, net: Topology) -> Iterator[None]:
        """Make the namespace and connect it. Raises NotOffered."""
        if shutil.which(self.name) is None:
            raise NotOffered(f"{self.name} is not installed")
        with named_netns(net.scratch.netns(self.name), net.programs) as self._netns:
            command = net.host.enter(*self.command(net.scratch.folder, self._netns.path, self.port))
            with kept(command) as process:
                self._wait(net, process)
                yield

    def _wait(self, net: Topology, process: subprocess.Popen[str]) -> None:
        wait_until("connected", lambda: "default" in run(["ip", "-n", self._netns.name, "route"]), process)
        self.forward(net.scratch.folder, self.port)
        for protocol in ("tcp", "udp"):
            wait_until("forwarding", lambda protocol=protocol: net.host.listens(self.port, protocol), process)  # type: ignore[misc]

    @contextmanager
    def serve(self, net: Topology, server: Server) -> Iterator[int]:
        """Start the server in the namespace."""
        with server.running(self._netns, INNER_PORT):
            yield self.port

    def reach_out(self, net: Topology, command: list[str], timeout: float) -> str:
        """Start the client in the namespace."""
        return run(self._netns.enter(*command), timeout)


def _pasta(_folder: Path, netns: Path, port: int) -> list[str]:
    ports = ["-t", f"{port}:{INNER_PORT}", "-u", f"{port}:{INNER_PORT}", "-T", "none", "-U", "none"]
    where = ["-i", HOST_INTERFACE, "-a", HOST_ADDRESS, "-n", "24", "-g", CLIENT_ADDRESS, "--no-map-gw"]
    return ["pasta", "--foreground", "--quiet", "--runas", "0", "--config-net", *where, *ports, "--netns", str(netns)]


def _slirp4netns(folder: Path, netns: Path, _port: int) -> list[str]:
    options = ["--configure", "--mtu=65520", "--netns-type=path", f"--api-socket={folder / 'slirp4netns'}"]
    return ["slirp4netns", *options, str(netns), "tap0"]


def _forward_by_slirp4netns(folder: Path, port: int) -> None:
    for protocol in ("tcp", "udp"):
        ports = {"proto": protocol, "host_addr": "0.0.0.0", "host_port": port, "guest_port": INNER_PORT}
        with socket.socket(socket.AF_UNIX) as api:
            api.connect(str(folder / "slirp4netns"))
            api.sendall(json.dumps({"execute": "add_hostfwd", "arguments": ports}).encode())
            api.shutdown(socket.SHUT_WR)
            api.recv(4096)


USERNETS: tuple[Case, ...] = (
    UsernetCase("pasta", "pasta", FIRST_USERNET_PORT, _pasta),
    UsernetCase("slirp4netns", "slirp4netns", FIRST_USERNET_PORT + 1, _slirp4netns, _forward_by_slirp4netns),
)
