"""What the containers serve, and how a client asks for it: nginx, redis, a DNS server."""

from __future__ import annotations

import os
import socket
import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from tests.support.nginx import CONFIGURATION
from tests.support.shell import Word

SECONDS = 10.0
"""How long an answer may take."""


def _receive(sock: socket.socket, enough: bytes) -> bytes:
    """What is received until it ends with ``enough``. Raises OSError: ConnectionError where the other end closes."""
    found = b""
    while not found.endswith(enough):
        piece = sock.recv(65536)
        if not piece:
            raise ConnectionError(f"closed after {len(found)} bytes")
        found += piece
    return found


def _connected(address: str, port: int) -> socket.socket:
    """A connection out of the calling thread's namespace. Raises OSError."""
    return socket.create_connection((address, port), SECONDS)


class Service(ABC):
    """One kind of server."""

    name: str
    bound: str
    """The address that it binds in its container."""
    keeps_connections = False

    @abstractmethod
    def command(self, folder: Path, said: str) -> list[Word]:
        """What runs in the container; its answers have ``said``."""

    @abstractmethod
    def ask(self, address: str, port: int, said: str) -> None:
        """One request by a new connection. Raises OSError, or ValueError for a wrong answer."""

    def ask_again(self, kept: socket.socket, said: str) -> None:
        """One more request by a connection that stays, if it ``keeps_connections``. The same."""
        raise NotImplementedError


class Nginx(Service):
    """HTTP."""

    name, bound, keeps_connections = "nginx", "0.0.0.0:80", True

    def command(self, folder: Path, said: str) -> list[Word]:
        """One worker, with a configuration of its own. It ends no connection by itself."""
        file = folder / "nginx.conf"
        location = f"keepalive_requests 1000000000; keepalive_time 1000h; return 200 '{said}\\n';"
        file.write_text(CONFIGURATION.format(folder=folder, workers=1, listen=self.bound, location=location))
        return ["nginx", "-c", file]

    def ask(self, address: str, port: int, said: str) -> None:
        """A connection for one request."""
        with _connected(address, port) as sock:
            sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
            answer = b""
            while piece := sock.recv(65536):
                answer += piece
        if not answer.endswith(f"{said}\n".encode()):
            raise ValueError(f"answered {answer[-80:]!r}")

    def ask_again(self, kept: socket.socket, said: str) -> None:
        """HTTP keep-alive."""
        kept.sendall(b"GET / HTTP/1.1\r\nHost: soak\r\n\r\n")
        _receive(kept, f"{said}\n".encode())


class Redis(Service):
    """RESP."""

    name, bound, keeps_connections = "redis", "0.0.0.0:6379", True

    def command(self, folder: Path, said: str) -> list[Word]:
        """Without persistence; the password is what it is known by."""
        words: list[Word] = ["redis-server", "--port", 6379, "--bind", "0.0.0.0", "--save", ""]
        return [*words, "--dir", folder, "--requirepass", said]

    def ask(self, address: str, port: int, said: str) -> None:
        """AUTH, which no other redis answers so."""
        with _connected(address, port) as sock:
            self.ask_again(sock, said)

    def ask_again(self, kept: socket.socket, said: str) -> None:
        """The same by a connection that stays, and a PING."""
        kept.sendall(f"AUTH {said}\r\nPING\r\n".encode())
        if _receive(kept, b"+PONG\r\n") != b"+OK\r\n+PONG\r\n":
            raise ValueError("not its password")


class Dns(Service):
    """dnsmasq, by UDP and by TCP. A datagram may be lost, as any: it is asked three times, as resolvers do."""

    name, bound = "dns", "127.0.0.1:53"
    _TRIES, _EACH = 3, 3.0

    def command(self, folder: Path, said: str) -> list[Word]:
        """It knows one name, which is its own."""
        options = "--no-hosts --no-resolv --user=root --group=root --pid-file= --log-facility=- --bind-interfaces"
        words: list[Word] = ["dnsmasq", "-k", "-C", "/dev/null", *options.split(), "--listen-address=127.0.0.1"]
        return [*words, f"--address=/{said}.test/192.0.2.7"]

    def ask(self, address: str, port: int, said: str) -> None:
        """One question by UDP, and one by TCP."""
        question = self._question(said)
        self._check(self._ask_datagram(address, port, question), question)
        with _connected(address, port) as sock:
            sock.sendall(struct.pack("!H", len(question)) + question)
            answer = sock.recv(65536)
            self._check(answer[2:], question)

    def _ask_datagram(self, address: str, port: int, question: bytes) -> bytes:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(self._EACH)
            for left in reversed(range(self._TRIES)):
                sock.sendto(question, (address, port))
                try:
                    return sock.recv(65536)
                except TimeoutError:
                    if not left:
                        raise
        raise AssertionError("not reached")

    @staticmethod
    def _question(said: str) -> bytes:
        """For an A record (RFC 1035, section 4.1)."""
        labels = b"".join(bytes([len(one)]) + one.encode() for one in (said, "test"))
        return os.urandom(2) + struct.pack("!5H", 0x0100, 1, 0, 0, 0) + labels + struct.pack("!BHH", 0, 1, 1)

    @staticmethod
    def _check(answer: bytes, question: bytes) -> None:
        if answer[:2] != question[:2] or not answer.endswith(socket.inet_aton("192.0.2.7")):
            raise ValueError(f"answered {answer[:40]!r}")


SERVICES: Sequence[Service] = (Nginx(), Nginx(), Redis(), Dns())
