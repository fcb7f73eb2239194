"""Network namespaces of the tests: one plays the host, one a client beside it.

client ---- veth ---- host
10.98.0.2        10.98.0.1      fd98::2 / fd98::1
"""

from __future__ import annotations

import itertools
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from graft.kernel import netns
from tests.support.shell import Word, output, run
from tests.support.wait import PATIENCE

PREFIX = "grafttest"
_FOLDER = Path("/run/netns")
_counter = itertools.count(1)

HOST4, HOST6 = "10.98.0.1", "fd98::1"
CLIENT4, CLIENT6 = "10.98.0.2", "fd98::2"


@dataclass(frozen=True, slots=True)
class Netns:
    """A named network namespace with lo up."""

    name: str

    @property
    def path(self) -> Path:
        """Where iproute2 keeps it."""
        return _FOLDER / self.name

    @property
    def cookie(self) -> int:
        """What the maps call it."""
        return netns.cookie(self.path)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """The calling thread in it; sockets made there stay there."""
        with netns.entered(self.path):
            yield

    def command(self, *words: Word) -> list[str]:
        """A command that runs in it. (`ip netns exec` would hide bpffs behind a /sys of its own.)"""
        return ["nsenter", f"--net={self.path}", "--", *map(str, words)]

    def run(self, *words: Word) -> str:
        """The output of a command run in it."""
        return output(self.command(*words))

    def sockets(self, *filters: str) -> str:
        """Its TCP sockets, as `ss -tanp` lists them."""
        return self.run("ss", "-Htanp", *filters)

    def listens(self, port: int, protocol: str = "tcp") -> bool:
        """Whether it has a listener on that port; of UDP: a socket."""
        return bool(self.run("ss", "-Hltn" if protocol == "tcp" else "-Haun", f"sport = :{port}").strip())

    def listening_ports(self) -> set[int]:
        """The ports at which it has TCP listeners."""
        return {int(line.split()[3].rpartition(":")[2]) for line in self.run("ss", "-Hltn").splitlines()}

    def listener(self, address: str = "0.0.0.0", port: int = 0) -> socket.socket:
        """A TCP listener in it."""
        with self.inside():
            sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, port))
        sock.listen(128)
        return sock

    def connected(self, address: str, port: int, timeout: float = 10) -> socket.socket:
        """A TCP connection out of it."""
        with self.inside():
            sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        sock.settimeout(timeout * PATIENCE)
        sock.connect((address, port))
        return sock

    @contextmanager
    def with_address(self, prefix: str) -> Iterator[None]:
        """Another address (with its prefix length) of its eth0, for the time of the block."""
        self.run("ip", "address", "replace", prefix, "dev", "eth0", *(["nodad"] if ":" in prefix else []))
        try:
            yield
        finally:
            self.run("ip", "address", "del", prefix, "dev", "eth0")

    def reaches(self, address: str, port: int, timeout: float = 10) -> bool:
        """Whether a TCP connection out of it is accepted. Where packets are dropped this takes the whole timeout."""
        try:
            self.connected(address, port, timeout).close()
        except OSError:
            return False
        return True

    def fetch(self, address: str, port: int, path: str = "/") -> str:
        """What a web server answers to curl in it."""
        host = f"[{address}]" if ":" in address else address
        limit = str(round(10 * PATIENCE))
        return self.run("curl", "-sS", "--max-time", limit, f"http://{host}:{port}{path}")


@contextmanager
def namespace(role: str) -> Iterator[Netns]:
    """A new namespace, removed afterwards."""
    made = Netns(f"{PREFIX}-{os.getpid()}-{role}-{next(_counter)}")
    output(["ip", "netns", "add", made.name])
    try:
        output(["ip", "-n", made.name, "link", "set", "lo", "up"])
        yield made
    finally:
        run(["ip", "netns", "del", made.name])


@contextmanager
def host_and_client() -> Iterator[tuple[Netns, Netns]]:
    """The two of the picture above."""
    with namespace("host") as host, namespace("client") as client:
        peer = ["peer", "name", "eth0", "netns", client.name]
        output(["ip", "-n", host.name, "link", "add", "eth0", "type", "veth", *peer])
        for one, four, six in ((host, HOST4, HOST6), (client, CLIENT4, CLIENT6)):
            output(["ip", "-n", one.name, "address", "add", f"{four}/24", "dev", "eth0"])
            output(["ip", "-n", one.name, "address", "add", f"{six}/64", "dev", "eth0", "nodad"])
            output(["ip", "-n", one.name, "link", "set", "eth0", "up"])
        yield host, client


def sweep() -> None:
    """Remove the namespaces of runs that were killed before they could."""
    for path in _FOLDER.glob(f"{PREFIX}-*"):
        found = re.fullmatch(rf"{PREFIX}-(\d+)-.*", path.name)
        if found and not Path(f"/proc/{found[1]}").exists():
            run(["ip", "netns", "del", path.name])
