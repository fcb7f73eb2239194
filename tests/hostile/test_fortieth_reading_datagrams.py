"""What a fortieth reading found: a UDP socket of transport splice forgot its remote end by a connect that is granted,
and that the kernel refuses after the hook has let it pass. It heard the next client who got its place then, was shown
the relay's address as its peer, and could not name the source of what it sent.
"""

from __future__ import annotations

import ctypes
import errno
import socket
import struct

import pytest

from tests.hostile.conftest import Without
from tests.hostile.test_tenth_reading_splice import FAMILIES, IPV4, IPV6, Family, far_end, grant, own_udp
from tests.hostile.test_thirty_eighth_reading_datagrams import give_to_another_client, heard, session
from tests.support.installation import Host
from tests.support.plain import plain

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

SOMEWHERE = 9
"""A port at the far end that nobody needs to have."""


def fail_to_connect(sock: socket.socket, family: Family) -> None:
    """A connect to a granted destination with a family that the kernel refuses, after it has asked the hook."""
    packed = socket.inet_pton(sock.family, family.far)
    if family.six:
        wrong = struct.pack("=HHI16sI", socket.AF_UNIX, socket.htons(SOMEWHERE), 0, packed, 0)
    else:
        wrong = struct.pack("=HH4s8x", socket.AF_UNIX, socket.htons(SOMEWHERE), packed)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.connect(sock.fileno(), wrong, len(wrong)) == -1
    assert ctypes.get_errno() == errno.EAFNOSUPPORT


def send_naming_no_source(sock: socket.socket, data: bytes) -> None:
    """A send with a control message, which says nothing of a source."""
    level, name = (socket.IPPROTO_IPV6, 67) if sock.family == socket.AF_INET6 else (socket.IPPROTO_IP, 1)  # TCLASS, TOS
    sock.sendmsg([data], [(level, name, struct.pack("i", 0))])


@FAMILIES
@pytest.mark.parametrize("without_it", ["", "former connects"], ids=["", "control"])
def test_after_a_connect_that_fails_it_has_no_part_in_another_clients_exchange(
    host: Host, without: Without, family: Family, without_it: str
) -> None:
    used = without(without_it) if without_it else host
    with session(used, family) as (container, connected, client, port):
        give_to_another_client(container, family)
        fail_to_connect(connected, family)
        client.sendto(b"of another", (family.near, port))
        is_heard = heard(connected) == b"of another"
        connected.send(b"secret")
        assert (is_heard, heard(client) == b"secret") == (bool(without_it), bool(without_it))


@FAMILIES
def test_it_is_connected_where_it_was(host: Host, family: Family) -> None:
    with plain(host) as container, far_end(host, family) as far, own_udp(container, family) as program:
        container.attach("--deny", *grant(container, family))
        where = far.getsockname()[:2]
        program.connect(where)
        for _ in range(3):
            fail_to_connect(program, family)
            assert program.getpeername()[:2] == where
            send_naming_no_source(program, b"x")
            assert far.recv(100) == b"x"


def test_so_it_is_after_one_of_an_ipv6_socket_to_a_mapped_address(host: Host) -> None:
    """What a program does that goes through all addresses of a name (AI_V4MAPPED)."""
    with plain(host) as container, far_end(host, IPV6) as far, own_udp(container, IPV6) as program:
        container.attach("--deny", *grant(container, IPV6), *grant(container, IPV4))
        where = far.getsockname()[:2]
        program.connect(where)
        with pytest.raises(OSError) as failed:
            program.connect((f"::ffff:{IPV4.far}", SOMEWHERE))
        assert failed.value.errno == errno.ENETUNREACH
        assert program.getpeername()[:2] == where


@FAMILIES
def test_it_may_be_connected_anew(host: Host, family: Family) -> None:
    with plain(host) as container, far_end(host, family) as one, far_end(host, family) as other:
        container.attach("--deny", *grant(container, family))
        with own_udp(container, family) as program:
            for far in (one, other, one):
                fail_to_connect(program, family) if far is other else None
                program.connect(far.getsockname()[:2])
                assert program.getpeername()[:2] == far.getsockname()[:2]
                program.send(b"hello")
                data, client = far.recvfrom(100)
                far.sendto(data, client)
                assert heard(program) == b"hello"
