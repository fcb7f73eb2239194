"""What a twelfth reading found in the datagrams of transport splice: what a program reads when graftd has forgotten who
sent it, a namespace without a port for graftd, and very many listeners at one port.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from itertools import chain
from typing import NamedTuple

import pytest

from graft.kernel import netns as namespaces
from graft.kernel import sockdiag
from tests.hostile.test_daemon_shares import StartDaemon, start_daemon
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, CLIENT6, HOST4, HOST6, Netns
from tests.support.plain import Plain, plain
from tests.support.program import start
from tests.support.udp import udp
from tests.support.wait import PATIENCE, until

pytestmark = pytest.mark.e2e

__all__ = ["start_daemon"]

Without = Callable[[str], Host]


class Family(NamedTuple):
    """The clients' address, the host's, any address, and how many clients graftd forgets no client for."""

    client: str
    host: str
    every: str
    clients: int

    def at(self, port: int) -> str:
        """That port, of any address."""
        return f"[{self.every}]:{port}" if ":" in self.every else f"{self.every}:{port}"


IPV4 = Family(CLIENT4, HOST4, "0.0.0.0", 1024)
IPV6 = Family(CLIENT6, HOST6, "::", 128)
FAMILIES = pytest.mark.parametrize("family", [IPV4, IPV6], ids=["ipv4", "ipv6"])


class Served(NamedTuple):
    """A container, its server, which reads when the test does, and the endpoint's port."""

    container: Plain
    server: socket.socket
    port: int
    family: Family

    def send(self, data: bytes = b"") -> tuple[str, int]:
        """From a client that has not sent before; without ``data``, its port. Returns its address."""
        with closing(udp(self.container.host.client, self.family.client)) as client:
            client.sendto(data or b"%d" % client.getsockname()[1], (self.family.host, self.port))
            address, port = client.getsockname()[:2]
            return str(address), int(port)

    def flood(self, count: int) -> None:
        """From so many clients; as quickly as graftd reads."""
        for number in range(count):
            self.send()
            if number % 20 == 0:
                time.sleep(0.002)

    @property
    def clients(self) -> int:
        """How many graftd knows."""
        return int(self.container.described()["datagrams"]["clients"])


@contextmanager
def served(host: Host, family: Family, ports: int = 0) -> Iterator[Served]:
    """``ports``: so many has the kernel to pick from in its namespace."""
    with plain(host) as container:
        if ports:
            with container.netns.inside(), open("/proc/sys/net/ipv4/ip_local_port_range", "w") as file:
                file.write(f"40000 {39999 + ports}")
        with container.udp(socket.AF_INET6 if ":" in family.host else socket.AF_INET) as server:
            server.bind((family.every, 5300))
            port = host.port()
            container.attach("-i", f"{family.at(5300)}={host.endpoint(family.at(port))}")
            yield Served(container, server, port, family)


# ---- who sent what is read late

LOOPBACK = "127.", "::1"
NOBODY = "0.0.0.0", 0


def shown_of_a_forgotten_client(host: Host, family: Family) -> tuple[tuple[str, int], tuple[str, int]]:
    """Who sent a datagram, and who did by what the server is shown that reads it when graftd has forgotten him."""
    with served(host, family) as one:
        sender = one.send(b"command")
        until("it is known", lambda: one.clients == 1)
        one.flood(family.clients)
        while one.clients < family.clients:  # some had the port of another one
            one.flood(10)
            time.sleep(0.1)
        one.flood(10)
        time.sleep(0.1)
        data, peer = one.server.recvfrom(100)
        assert data == b"command"
        return sender, (str(peer[0]), int(peer[1]))


@FAMILIES
def test_a_forgotten_client_is_shown_as_who_he_is(host: Host, family: Family) -> None:
    sender, shown = shown_of_a_forgotten_client(host, family)
    assert shown == sender


@FAMILIES
def test_control_where_nothing_is_left_of_him_he_is_not(host: Host, start_daemon: StartDaemon, family: Family) -> None:
    start_daemon("forgotten clients")
    sender, shown = shown_of_a_forgotten_client(host, family)
    assert shown != sender and (shown == NOBODY if family is IPV4 else shown[0].startswith(LOOPBACK))


def shown_without_an_entry(host: Host, mapped: bool) -> tuple[str, int]:
    """Who sent a datagram, by what the server is shown, where the map does not say it; an IPv6 socket is shown IPv4
    addresses as mapped ones.
    """
    with plain(host) as container, container.udp(socket.AF_INET6 if mapped else socket.AF_INET) as server:
        server.bind(("::" if mapped else "0.0.0.0", 5300))
        port = host.port()
        container.attach("-i", f"0.0.0.0:5300={host.endpoint(f'0.0.0.0:{port}')}", *also_at_any6(mapped, host, port))
        one = Served(container, server, port, IPV4)
        one.send(b"command")
        until("it is known", lambda: one.clients == 1)
        number = container.container.id
        for key in [key for key in host.maps.exchanges.keys() if key.container == number]:  # noqa: SIM118
            host.maps.exchanges.delete(key)
        data, peer = server.recvfrom(100)
        assert data == b"command"
        return str(peer[0]).removeprefix("::ffff:"), int(peer[1])


def also_at_any6(wanted: bool, host: Host, port: int) -> list[str]:
    """The rule for a server at all addresses of both families."""
    return ["-i", f"[::]:5300={host.endpoint(f'0.0.0.0:{port}')}"] if wanted else []


@pytest.mark.parametrize("mapped", [False, True])
def test_of_whom_nothing_is_known_is_shown_as_nobody(host: Host, mapped: bool) -> None:
    shown = shown_without_an_entry(host, mapped)
    assert shown == NOBODY
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, pytest.raises(OSError):
        sock.sendto(b"answer", shown)


@pytest.mark.parametrize("mapped", [False, True])
def test_control_where_the_hook_leaves_the_address_he_passes_for_a_program_there(
    without: Without, mapped: bool
) -> None:
    assert shown_without_an_entry(without("nobody"), mapped)[0].startswith(LOOPBACK)


def shown_as_others(host: Host) -> int:
    """How many datagrams are shown as from a client that has not sent them, where the queue of the server is full and
    the kernel has few ports to pick from.
    """
    with served(host, IPV6, ports=300) as one:
        one.flood(600)
        time.sleep(0.2)
        one.server.settimeout(0.5 * PATIENCE)
        wrong = known = 0
        with suppress(TimeoutError):
            while True:
                data, peer = one.server.recvfrom(100)
                known += peer[0] == CLIENT6
                wrong += peer[0] == CLIENT6 and peer[1] != int(data)
        assert known
        return wrong


def test_a_port_does_not_stand_for_another_client_while_the_server_has_not_read(host: Host) -> None:
    assert not shown_as_others(host)


def test_control_where_ports_are_used_again_at_once_what_is_read_is_anothers(
    host: Host, start_daemon: StartDaemon
) -> None:
    start_daemon("ports again")
    assert shown_as_others(host)


def test_clients_are_served_again_when_the_server_has_read(host: Host) -> None:
    """All ports of the namespace wait for that."""
    with served(host, IPV6, ports=300) as one:
        one.flood(600)
        one.server.settimeout(0.3)

        def is_served() -> bool:
            one.send(b"question")
            with suppress(TimeoutError):
                while (data := one.server.recv(100)) != b"question":
                    assert data
                return True
            return False

        until("a new client is served", is_served)


# ---- no port

FILLER = """
import socket, sys
low, high = map(int, open("/proc/sys/net/ipv4/ip_local_port_range").read().split())
kept = []
for port in range(low, high + 1):
    sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    try: sock.bind(("::1", port)); kept.append(sock)
    except OSError: pass
print("filled", flush=True); sys.stdin.readline()
"""


def forgotten_in_vain(host: Host) -> tuple[int, int]:
    """How many clients graftd forgets for one more, in a namespace where no port is left for him, and of how many."""
    with served(host, IPV6, ports=300) as one:
        one.flood(100)
        time.sleep(0.2)
        known = one.clients
        assert known > 80  # some had the port of another one
        filler = start(one.container.command(sys.executable, "-c", FILLER), talk=True)
        one.container.started.append(filler)
        filler.says("filled")
        for _ in range(5):
            one.send()
        time.sleep(0.3)
        return known - one.clients, known


def test_no_client_is_forgotten_where_that_helps_nobody(host: Host) -> None:
    assert forgotten_in_vain(host)[0] == 0


def test_control_all_are_where_graftd_tries_again_for_each(host: Host, start_daemon: StartDaemon) -> None:
    start_daemon("one client for another")
    gone, known = forgotten_in_vain(host)
    assert gone == known


# ---- listeners at other addresses

_OTHERS = 200


def listed_for_one_address(netns: Callable[[], Netns], monkeypatch: pytest.MonkeyPatch, address: str) -> int:
    """How many listeners the kernel sends when those at one address are asked for, of very many at that port."""
    parsed = []

    def parse(message: bytes) -> sockdiag.ListeningSocket:
        parsed.append(message)
        return read(message)

    read = sockdiag.parse_listener
    monkeypatch.setattr(sockdiag, "parse_listener", parse)
    with namespaces.entered(netns().path), ExitStack() as stack:
        for number in range(_OTHERS):
            one = stack.enter_context(socket.socket())
            one.bind((f"127.0.1.{number + 1}", 80))
            one.listen()
        for family, every in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::")):
            one = stack.enter_context(socket.socket(family))
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.bind((every, 80))
            one.listen()
        diagnostics = stack.enter_context(closing(sockdiag.Diagnostics()))
        found = list(chain.from_iterable(diagnostics.listeners_at(socket.AF_INET, address, 80)))
        assert any(socket.inet_ntoa(one.address[:4]) == address for one in found)
    return len(parsed)


def test_the_kernel_sends_the_listeners_at_an_address_only(
    netns: Callable[[], Netns], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert listed_for_one_address(netns, monkeypatch, "127.0.0.1") == 2


def test_control_where_it_does_not_choose_it_sends_all(
    netns: Callable[[], Netns], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockdiag, "_at_one_of", lambda *_: b"")
    assert listed_for_one_address(netns, monkeypatch, "127.0.0.1") == _OTHERS + 2


def asks_for(netns: Callable[[], Netns], monkeypatch: pytest.MonkeyPatch, most: int) -> int:
    """How many listeners of one address are found, of 100, where so many are read."""
    monkeypatch.setattr(sockdiag, "_MAX_AT", most)
    with namespaces.entered(netns().path), ExitStack() as stack:
        for _ in range(100):
            one = stack.enter_context(socket.socket())
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            one.bind(("127.0.0.1", 80))
            one.listen()
        diagnostics = stack.enter_context(closing(sockdiag.Diagnostics()))
        return sum(map(len, diagnostics.listeners_at(socket.AF_INET, "127.0.0.1", 80)))


def test_of_very_many_at_one_address_nobody_says_whose_they_are(
    netns: Callable[[], Netns], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the connection is reset."""
    with pytest.raises(OSError):
        asks_for(netns, monkeypatch, 50)


def test_control_of_fewer_it_does(netns: Callable[[], Netns], monkeypatch: pytest.MonkeyPatch) -> None:
    assert asks_for(netns, monkeypatch, 100) == 100
