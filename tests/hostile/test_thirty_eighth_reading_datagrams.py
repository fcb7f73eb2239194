"""What a thirty-eighth reading found in the datagrams of transport splice: a socket that was connected to a remote end
kept an address of graftd's relay as its peer, and exchanged datagrams with whoever had that address later.
"""

from __future__ import annotations

import ctypes
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from graft.datapath import layout
from tests.hostile.conftest import Without
from tests.hostile.test_tenth_reading_splice import (
    FAMILIES,
    Family,
    exchange_of,
    far_end,
    grant,
    own_udp,
    stranger,
)
from tests.support.installation import Host
from tests.support.plain import Plain, plain
from tests.support.udp import udp
from tests.support.wait import PATIENCE

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

DEFENCE = "whom a socket is connected to"
SENDER = """
import os, socket, sys
assert os.getuid() == 65534
source, port, to, there = sys.argv[1:]
one = socket.socket(socket.AF_INET6 if ":" in source else socket.AF_INET, socket.SOCK_DGRAM)
one.bind((source, int(port)))
one.sendto(b"forged", (to, int(there)))
print("sent", flush=True); sys.stdin.read()
"""


def heard(sock: socket.socket, seconds: float = 1.0) -> bytes | None:
    """What a socket receives, None where it does not."""
    sock.settimeout(seconds * PATIENCE)
    try:
        return sock.recv(100)
    except (TimeoutError, ConnectionRefusedError):
        return None


# ---- the address stands for somebody else


@contextmanager
def session(host: Host, family: Family) -> Iterator[tuple[Plain, socket.socket, socket.socket, int]]:
    """A server's socket that is connected to its client, as servers of DTLS and TFTP do; the client, and the port at
    which it reaches the server.
    """
    every = "::" if family.six else "0.0.0.0"
    with plain(host) as container, own_udp(container, family) as server, own_udp(container, family) as connected:
        for one in (server, connected):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((every, 5300))
        port = host.port()
        container.attach("-i", f"{family.at(5300)}={host.endpoint(family.at(port))}", *grant(container, family))
        with udp(host.client, family.far) as client:
            client.sendto(b"hello", (family.near, port))
            _, peer = server.recvfrom(100)
            connected.bind((every, 5300))
            connected.connect(peer)
            connected.send(b"welcome")
            assert heard(client) == b"welcome"
            client.sendto(b"more", (family.near, port))
            assert heard(connected) == b"more"
            yield container, connected, client, port


def give_to_another_client(container: Plain, family: Family) -> None:
    """As if graftd had forgotten the client, and the next one had got its slot or port: here with the first one's
    number, so that it need not be waited for.
    """
    maps, number = container.host.maps, container.container.id
    if family.six:
        [(key6, stand_in)] = [(key, one) for key, one in maps.stand_ins.items() if key.container == number and one.port]
        stand_in.port ^= 1
        maps.stand_ins.put(key6, stand_in)
    else:
        [(key4, exchange)] = [(key, one) for key, one in maps.exchanges.items() if key.container == number]
        exchange.port ^= 1
        maps.exchanges.put(key4, exchange)


def has_anothers_session(host: Host, family: Family, fails: bool = False) -> tuple[bool, bool]:
    """Whether the next client is heard by the socket that is connected to the one before, and gets what that sends.

    ``fails``: another connect of that socket has failed meanwhile.
    """
    with session(host, family) as (container, connected, client, port):
        give_to_another_client(container, family)
        if fails:
            with pytest.raises(OSError):
                connected.connect(("2001:db8::9" if family.six else "192.0.2.9", 9))
        client.sendto(b"of another", (family.near, port))
        is_heard = heard(connected) == b"of another"
        connected.send(b"secret")
        return is_heard, heard(client) == b"secret"


@pytest.mark.parametrize("fails", [False, True], ids=["", "a connect fails"])
@FAMILIES
def test_the_next_client_has_no_part_in_the_session_of_one_before(host: Host, family: Family, fails: bool) -> None:
    assert has_anothers_session(host, family, fails) == (False, False)


@FAMILIES
def test_control_where_a_socket_does_not_remember_he_has_it(without: Without, family: Family) -> None:
    assert has_anothers_session(without(DEFENCE), family) == (True, True)


# ---- it is nobody's


def passes_for_the_peer(host: Host, family: Family) -> bool:
    """Whether a stranger in the namespace, who has the port of a graftd that is gone, passes for the far end, to a
    socket that was connected to it: when another graftd serves, at other ports.
    """
    with plain(host) as container, far_end(host, family) as far, own_udp(container, family) as program:
        rules = grant(container, family)
        container.attach(*rules)
        program.connect(far.getsockname()[:2])
        program.send(b"question")
        far.sendto(b"answer", far.recvfrom(100)[1])
        assert heard(program) == b"answer"
        place = exchange_of(container, family, True)
        host.kill_daemon()
        with stranger(container, SENDER, *place, *program.getsockname()[:2]) as other:
            other.says("sent")  # it has the port, so the next graftd has another one
            container.attach(*rules)
            while heard(program, 0.2) is not None:  # by the rules of before
                pass
            other.stop()
        with stranger(container, SENDER, *place, *program.getsockname()[:2]) as other:
            other.says("sent")
            return heard(program) == b"forged"


@FAMILIES
def test_nobody_passes_for_the_peer_when_another_graftd_serves(host: Host, family: Family) -> None:
    assert not passes_for_the_peer(host, family)


@FAMILIES
def test_control_where_a_socket_does_not_remember_he_does(without: Without, family: Family) -> None:
    assert passes_for_the_peer(without(DEFENCE), family)


@FAMILIES
def test_nobody_passes_for_the_peer_when_the_container_is_served_no_more(host: Host, family: Family) -> None:
    with session(host, family) as (container, connected, _, _port):
        place = exchange_of(container, family, False)
        host.kill_daemon()
        host.maps.relays.delete(ctypes.c_uint32(container.container.id))
        to = connected.getsockname()[:2]
        with stranger(container, SENDER, *place, *to) as other:
            other.says("sent")
            assert heard(connected) is None


# ---- one that is connected again


@FAMILIES
def test_a_socket_that_is_connected_anew_is_heard_at_once(host: Host, family: Family) -> None:
    with plain(host) as container, far_end(host, family) as far, own_udp(container, family) as program:
        container.attach(*grant(container, family))
        far.settimeout(2 * PATIENCE)
        program.connect(far.getsockname()[:2])
        for count in range(3):
            program.send(b"%d" % count)
            data, where = far.recvfrom(100)
            far.sendto(data, where)
            assert heard(program) == data == b"%d" % count
            disconnect(program)
            program.connect(far.getsockname()[:2])  # at another port of its own


def disconnect(sock: socket.socket) -> None:
    """connect(2) to AF_UNSPEC, which socket.connect() cannot say."""
    unspecified = bytes(ctypes.sizeof(layout.StandInValue))[:16]
    assert ctypes.CDLL(None).connect(sock.fileno(), unspecified, len(unspecified)) == 0
