"""Helpers for tests of relays: publish a container's listener, talk through the relay, measure the daemon."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import socket
import threading
from pathlib import Path

from tests.support.namespaces import CLIENT4, HOST4
from tests.support.plain import Plain
from tests.support.wait import PATIENCE


def published(container: Plain, address: str = "0.0.0.0", bound: str = "0.0.0.0:80") -> int:
    """Attach with one ingress rule; returns the endpoint's port."""
    port = container.host.port()
    endpoint = container.host.endpoint(f"{address}:{port}")
    container.attach("-i", f"{bound}={endpoint}", "-e", f"{CLIENT4}/32={container.host.endpoint('0.0.0.0:dynamic')}")
    return port


def pair(container: Plain, listener: socket.socket, port: int) -> tuple[socket.socket, socket.socket]:
    """A connection through the relay: the client's socket, and the socket that the container accepted."""
    client = container.host.client.connected(HOST4, port)
    accepted, _ = listener.accept()
    accepted.settimeout(15 * PATIENCE)
    return client, accepted


def talk(one: socket.socket, other: socket.socket) -> None:
    """Exchange more small messages than it takes for a connection to be handed over to the kernel."""
    for _ in range(8):
        one.sendall(b"question")
        assert other.recv(100) == b"question"
        other.sendall(b"answer")
        assert one.recv(100) == b"answer"


def refused(container: Plain, port: int) -> bool:
    """Whether a connection to the endpoint is refused."""
    try:
        container.host.client.connected(HOST4, port).close()
    except ConnectionRefusedError:
        return True
    return False


def reset(sock: socket.socket) -> bool:
    """Whether the peer reset the connection, and did not close it. Raises TimeoutError where it does neither."""
    try:
        while sock.recv(65536):
            pass
    except ConnectionResetError:
        return True
    return False


def read_all(sock: socket.socket) -> bytes:
    """Everything up to the end of the stream."""
    parts = []
    while part := sock.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def transfer(near: socket.socket, far: socket.socket, there: int, back: int, half_close: bool, seed: int) -> None:
    """Send in both directions, in pieces of random sizes, and compare hashes. ``half_close``: one after the other."""
    found: dict[str, str] = {}

    def send(sock: socket.socket, data: bytes, chance: random.Random) -> None:
        at = 0
        while at < len(data):
            size = chance.choice((1, 10, 1000, 100_000, 1_000_000))
            sock.sendall(data[at : at + size])
            at += size
        sock.shutdown(socket.SHUT_WR)

    def receive(sock: socket.socket, name: str) -> None:
        found[name] = hashlib.sha256(read_all(sock)).hexdigest()

    chance = random.Random(seed)
    first, second = chance.randbytes(there), chance.randbytes(back)
    if half_close:  # one direction ends before the other begins
        receiver = threading.Thread(target=receive, args=(far, "first"))
        receiver.start()
        send(near, first, chance)
        receiver.join()
        threads = [threading.Thread(target=send, args=(far, second, chance))]
    else:
        threads = [
            threading.Thread(target=send, args=(near, first, random.Random(seed + 1))),
            threading.Thread(target=send, args=(far, second, random.Random(seed + 2))),
            threading.Thread(target=receive, args=(far, "first")),
        ]
    for thread in threads:
        thread.start()
    receive(near, "second")
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a transfer hangs"
    assert found == {
        "first": hashlib.sha256(first).hexdigest(),
        "second": hashlib.sha256(second).hexdigest(),
    }


def resident_bytes(pid: int) -> int:
    """A process's resident memory, in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def descriptors(pid: int) -> int:
    """How many descriptors a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))
