"""What a tenth reading found in the datagrams of transport splice: others in the container's network namespace (a pod's
other container, any process with any user) took part in what graftd relays for one container.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import NamedTuple

import pytest

from graft.splice.datagrams import ExchangeId
from tests.hostile.test_daemon_shares import StartDaemon, start_daemon
from tests.hostile.test_exchanges import NOBODY, THIEF
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, CLIENT6, HOST4, HOST6
from tests.support.plain import Plain, plain
from tests.support.program import Program, start
from tests.support.udp import give_address, udp
from tests.support.wait import PATIENCE

pytestmark = pytest.mark.e2e

__all__ = ["start_daemon"]

Without = Callable[[str], Host]
DECEIVER = """
import os, socket, sys
assert os.getuid() == 65534
source, port, to, relay, *options = sys.argv[1:]
family = socket.AF_INET6 if ":" in source else socket.AF_INET
stranger = socket.socket(family, socket.SOCK_DGRAM); stranger.bind((source, int(port)))
for option in options: stranger.setsockopt(socket.SOL_IP, socket.IP_OPTIONS, bytes.fromhex(option))
stranger.sendto(b"forged", (to, int(relay)))
print("sent", flush=True); print(stranger.recv(100), flush=True)
"""
SUCCESSOR = """
import socket, sys
successor = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET, socket.SOCK_DGRAM)
print("ready", flush=True)
while True:
    try: successor.bind((sys.argv[1], 5300)); break
    except OSError: pass
print("has the port", flush=True)
while True:
    data, peer = successor.recvfrom(100)
    print("took", data, flush=True); successor.sendto(b"forged", peer)
"""


@contextmanager
def stranger(container: Plain, code: str, *words: object) -> Iterator[Program]:
    """A process of another cgroup and without privileges, in the container's network namespace."""
    made = start(container.netns.command(*NOBODY, sys.executable, "-c", code, *map(str, words)))
    try:
        yield made
    finally:
        made.stop()


class Family(NamedTuple):
    """The far end, the host's address towards it, and the container's: the server's, and another one."""

    far: str
    near: str
    loopback: str
    other: str

    @property
    def six(self) -> bool:
        return ":" in self.far

    def at(self, port: object) -> str:
        """That port of the host's."""
        return f"[::]:{port}" if self.six else f"0.0.0.0:{port}"

    def spec(self, address: str, port: object) -> str:
        return f"[{address}]:{port}" if self.six else f"{address}:{port}"


IPV4 = Family(CLIENT4, HOST4, "127.0.0.1", "127.0.0.2")
IPV6 = Family(CLIENT6, HOST6, "::1", "fd99::5")
FAMILIES = pytest.mark.parametrize("family", [IPV4, IPV6], ids=["ipv4", "ipv6"])


def own_udp(container: Plain, family: Family) -> socket.socket:
    """A socket of the container's. (Connected, one of IPv6 that may speak IPv4 is relayed as over IPv4.)"""
    sock = container.udp(socket.AF_INET6 if family.six else socket.AF_INET)
    if family.six:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    return sock


def far_end(host: Host, family: Family) -> closing[socket.socket]:
    return closing(udp(host.client, family.far))


def grant(container: Plain, family: Family) -> tuple[str, str]:
    """A rule by which it reaches the far end."""
    return "-e", f"{family.far}={container.host.endpoint(family.spec(family.near, 'dynamic'))}"


@contextmanager
def served(host: Host, family: Family) -> Iterator[tuple[Plain, socket.socket, socket.socket]]:
    """A container, its server, and a client that is connected to it."""
    with plain(host) as container, far_end(host, family) as client, own_udp(container, family) as server:
        server.bind((family.loopback, 5300))
        port = host.port()
        inside = f"{family.spec(family.loopback, 5300)}={host.endpoint(family.at(port))}"
        container.attach("-i", inside, *grant(container, family))
        client.connect((family.near, port))
        yield container, server, client


def exchange_of(container: Plain, family: Family, out: bool) -> tuple[str, int]:
    """The address in the container's namespace of the one exchange that there is. (Others see it in /proc/net/udp.)"""
    number, maps = container.container.id, container.host.maps
    if family.six:
        (port,) = [
            key.port for key, value in maps.stand_ins.items() if key.container == number and bool(value.cookie) == out
        ]
        return "::1", port
    (found,) = [
        ExchangeId(out, value.generation, key.slot)
        for key, value in maps.exchanges.items()
        if key.container == number and key.out == out
    ]
    (port,) = [int(value.datagram_port) for key, value in maps.relays.items() if key.value == number]
    return socket.inet_ntoa(found.packed), port


def sends_by_anothers_grant(host: Host, family: Family) -> bool:
    """Whether the far end receives what a stranger sends to the address of a program's exchange."""
    with plain(host) as container, own_udp(container, family) as program, far_end(host, family) as far:
        container.attach(*grant(container, family))
        program.connect(far.getsockname())
        with stranger(container, DECEIVER, family.loopback, 0, *exchange_of(container, family, True)) as other:
            other.says("sent")
            program.send(b"the program's")
            data, peer = far.recvfrom(100)
            if data == b"forged":
                return True
            far.sendto(b"answer", peer)
            assert (data, program.recv(100), other.said) == (b"the program's", b"answer", "sent\n")
            return False


@FAMILIES
def test_a_stranger_does_not_send_by_a_containers_grant(host: Host, family: Family) -> None:
    assert not sends_by_anothers_grant(host, family)


@FAMILIES
def test_control_where_the_relay_hears_anybody_he_does(without: Without, family: Family) -> None:
    assert sends_by_anothers_grant(without("datagram relay's mark"), family)


def sends_by_a_neighbours_exchange(host: Host, family: Family) -> bool:
    """The same of another socket of the container, which may be another user's."""
    with (
        plain(host) as container,
        own_udp(container, family) as program,
        own_udp(container, family) as other,
        far_end(host, family) as far,
    ):
        container.attach(*grant(container, family))
        program.connect(far.getsockname())
        other.sendto(b"forged", exchange_of(container, family, True))
        program.send(b"the program's")
        return far.recv(100) == b"forged"


@FAMILIES
def test_a_socket_does_not_take_the_exchange_of_another_one(host: Host, family: Family) -> None:
    assert not sends_by_a_neighbours_exchange(host, family)


@FAMILIES
def test_control_where_the_hook_does_not_ask_whose_exchange_it_is_it_does(without: Without, family: Family) -> None:
    assert sends_by_a_neighbours_exchange(without("exchange's own socket"), family)


def answers_for_the_server(host: Host, family: Family) -> bool:
    """Whether a client receives from the endpoint what a stranger sends from the server's port, at another address."""
    with served(host, family) as (container, server, client):
        client.send(b"question")
        data, peer = server.recvfrom(100)
        assert (data, peer) == (b"question", client.getsockname())
        if family.six:
            give_address(container.netns, family.other)
        with stranger(container, DECEIVER, family.other, 5300, *exchange_of(container, family, False)) as other:
            other.says("sent")
            server.sendto(b"answer", peer)
            return client.recv(100) == b"forged"


@FAMILIES
def test_a_stranger_does_not_answer_a_containers_clients(host: Host, family: Family) -> None:
    assert not answers_for_the_server(host, family)


@FAMILIES
def test_control_where_the_relay_hears_anybody_he_answers(without: Without, family: Family) -> None:
    assert answers_for_the_server(without("datagram relay's mark"), family)


def succeeds_the_server(host: Host, family: Family) -> bool:
    """Whether a stranger who waits for the port of a server that closes gets datagrams of its clients."""
    with served(host, family) as (container, server, client):
        client.send(b"question")
        assert server.recv(100) == b"question"
        with stranger(container, SUCCESSOR, family.loopback) as other:
            other.says("ready")
            server.close()
            end = time.monotonic() + 2
            while time.monotonic() < end and "took" not in other.said:
                try:
                    client.send(b"secret")
                except ConnectionRefusedError:  # graftd has noticed
                    break
                time.sleep(0.001)
            other.says("has the port")
            time.sleep(0.1)
            return "took b'secret'" in other.said


@FAMILIES
def test_nobody_gets_the_datagrams_of_a_server_that_closed(host: Host, family: Family) -> None:
    assert not succeeds_the_server(host, family)


@FAMILIES
def test_control_where_the_hook_does_not_ask_who_receives_he_does(without: Without, family: Family) -> None:
    assert succeeds_the_server(without("datagram relay's receiver"), family)


def robs_a_connected_socket(host: Host, family: Family) -> bool:
    """Whether he who takes the port of a killed graftd gets what a socket sends that was connected before."""
    with plain(host) as container, own_udp(container, family) as program:
        container.attach(*grant(container, family))
        program.connect((family.far, 9))
        _, relay = exchange_of(container, family, True)
        host.kill_daemon()
        with stranger(container, THIEF, 6 if family.six else 4, relay) as thief:
            thief.says("ready")
            try:
                program.send(b"secret")
            except PermissionError:
                return False
            thief.says("stole b'secret'")
            return True


@FAMILIES
def test_nobody_who_takes_the_relays_port_gets_what_connected_sockets_send(host: Host, family: Family) -> None:
    assert not robs_a_connected_socket(host, family)


@FAMILIES
def test_control_where_no_hook_looks_who_receives_he_gets_it(without: Without, family: Family) -> None:
    assert robs_a_connected_socket(without("relay's mark for datagrams"), family)


def passes_for_the_far_end(host: Host, family: Family, *options: str) -> bool:
    """Whether a program takes what a stranger sends, who has the port of a killed graftd, for the far end's."""
    with plain(host) as container, own_udp(container, family) as program, far_end(host, family) as far:
        container.attach(*grant(container, family))
        program.sendto(b"question", far.getsockname())
        far.sendto(b"answer", far.recvfrom(100)[1])
        assert program.recvfrom(100) == (b"answer", far.getsockname())
        place = exchange_of(container, family, True)
        host.kill_daemon()
        to = family.loopback, program.getsockname()[1]
        with stranger(container, DECEIVER, *place, *to, *options) as other:
            other.says("sent")
            program.settimeout(1)
            try:
                assert program.recvfrom(100) == (b"forged", far.getsockname())
            except TimeoutError:
                return False
            return True


NOPS = "01010101"  # options in the header, behind which the ports are not read


@FAMILIES
def test_nobody_who_takes_the_relays_port_passes_for_a_far_end(host: Host, family: Family) -> None:
    assert not passes_for_the_far_end(host, family)


def test_nobody_does_with_options_in_the_header(host: Host) -> None:
    assert not passes_for_the_far_end(host, IPV4, NOPS)


@FAMILIES
def test_control_where_the_program_hears_anybody_he_does(without: Without, family: Family) -> None:
    assert passes_for_the_far_end(without("datagram relay's mark on answers"), family)


def test_control_where_it_hears_anybody_options_change_nothing(without: Without) -> None:
    assert passes_for_the_far_end(without("datagram relay's mark on answers"), IPV4, NOPS)


@FAMILIES
def test_what_a_server_has_not_read_yet_is_not_shown_as_from_a_later_client(host: Host, family: Family) -> None:
    """A flood makes graftd forget clients, while what they sent waits to be read."""
    with served(host, family) as (_, server, client):
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        clients = 1500 if family is IPV4 else 400
        for _ in range(clients):
            with far_end(host, family) as one:
                one.sendto(b"%d" % one.getsockname()[1], client.getpeername())
        server.settimeout(PATIENCE)
        wrong, known = [], 0
        with suppress(TimeoutError):
            while True:
                data, peer = server.recvfrom(100)
                known += peer[0] == family.far
                if peer[0] == family.far and peer[1] != int(data):
                    wrong.append(peer)
        assert known and not wrong


CONNECTED = """
import socket, sys
sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM); sock.connect((sys.argv[1], int(sys.argv[2])))
print("connected", flush=True); sock.recv(100)
"""


def keeps_a_stand_in(host: Host) -> bool:
    """Whether a port of graftd's at ::1, of which a container has so many, stays taken when the socket that took it is
    closed, and a stranger's is connected there.
    """
    with plain(host) as container, own_udp(container, IPV6) as program:
        container.attach(*grant(container, IPV6))
        program.connect((IPV6.far, 9))
        with stranger(container, CONNECTED, *exchange_of(container, IPV6, True)) as other:
            other.says("connected")
            program.close()
            end = time.monotonic() + 5 * PATIENCE
            while time.monotonic() < end:
                if not list(host.maps.stand_ins.keys()):
                    return False
                time.sleep(0.1)
            return True


def test_a_stranger_keeps_no_port_of_graftds_taken(host: Host) -> None:
    assert not keeps_a_stand_in(host)


def test_control_where_anybody_counts_as_connected_he_does(host: Host, start_daemon: StartDaemon) -> None:
    start_daemon("datagram peers")
    assert keeps_a_stand_in(host)


@FAMILIES
def test_a_socket_of_a_cgroup_below_the_containers_is_its_own(host: Host, family: Family) -> None:
    """As of a service that systemd starts in a container."""
    with plain(host) as container, far_end(host, family) as far:
        below = container.cgroup / "below"
        below.mkdir()
        try:
            container.attach(*grant(container, family))
            code = (
                "import socket, sys\n"
                "open(sys.argv[1] + '/cgroup.procs', 'w').write('0')\n"
                "s = socket.socket(socket.AF_INET6 if ':' in sys.argv[2] else socket.AF_INET, socket.SOCK_DGRAM)\n"
                "s.sendto(b'question', (sys.argv[2], int(sys.argv[3]))); print(s.recv(100), flush=True)\n"
            )
            program = container.start(sys.executable, "-c", code, below, *far.getsockname()[:2])
            data, peer = far.recvfrom(100)
            assert data == b"question"
            far.sendto(b"answer", peer)
            program.says("b'answer'")
            program.wait()
        finally:
            below.rmdir()
