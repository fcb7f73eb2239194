"""UDP sockets of the tests' own."""

from __future__ import annotations

import socket
from contextlib import ExitStack, closing

from tests.support.namespaces import Netns
from tests.support.wait import PATIENCE, until


def udp(netns: Netns, address: str, port: int = 0) -> socket.socket:
    """A bound UDP socket there."""
    with netns.inside():
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((address, port))
    sock.settimeout(10 * PATIENCE)
    return sock


def give_address(netns: Netns, address: str) -> None:
    """An IPv6 address of its own. (The kernel adds the route to it a little later, by a worker.)"""
    netns.run("ip", "address", "replace", f"{address}/128", "dev", "lo", "nodad")
    until("its route", lambda: address in netns.run("ip", "-6", "route", "show", "table", "local"))


def drained(server: socket.socket) -> bool:
    """Read all that a socket has received."""
    server.settimeout(0.2)
    try:
        while server.recv(100):
            pass
    except TimeoutError:
        return True
    finally:
        server.settimeout(10 * PATIENCE)
    return False


def flood(client: Netns, own: str, target: tuple[str, int], server: socket.socket) -> None:
    """Thousands of datagrams to ``target``, each from a port of its own; ``server`` reads what reaches it."""
    for _ in range(8):
        with ExitStack() as stack:
            for _ in range(500):
                stack.enter_context(closing(udp(client, own))).sendto(b"noise", target)
        until("the flood is served", lambda: drained(server))


def answers(sock: socket.socket) -> bool:
    """Whether the next that it receives is an answer, and not a refusal of an earlier datagram."""
    try:
        return sock.recv(100) == b"answer"
    except ConnectionRefusedError:
        return False
