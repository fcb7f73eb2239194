"""Calls and options of datagrams do in the transports swap and born what they do on the host."""

from __future__ import annotations

import socket

import pytest

from tests.support.building import SOURCES
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, CLIENT6, HOST4, HOST6, Netns

pytestmark = pytest.mark.e2e

PYTHON = ("/usr/bin/python3", "-ISc")
CALLS = ("/usr/bin/python3", "-ISu", SOURCES / "datagram_calls.py")
ECHO = """
import socket, sys
s = socket.socket(socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET, socket.SOCK_DGRAM)
s.bind((sys.argv[1], 7777)); print('serves', flush=True)
while True:
    data, peer = s.recvfrom(65535); s.sendto(data, peer)
"""


@pytest.fixture(params=["swap", "born"])
def served(host: Host, request: pytest.FixtureRequest) -> Host:
    """The host, where every `graft run` has that transport."""
    return host.with_transport(request.param)


def out_rules(host: Host) -> list[str]:
    """All destinations outside."""
    four, six = host.endpoint("0.0.0.0:dynamic"), host.endpoint("[::]:dynamic")
    return ["-e", f"0.0.0.0/0={four}", "-e", f"::/0={six}"]


def unlimited(netns: Netns) -> None:
    """It sends every ICMP error, and not only so many a second."""
    netns.run("sysctl", "-qw", "net.ipv4.icmp_ratelimit=0", "net.ipv6.icmp.ratelimit=0")


@pytest.mark.parametrize("peer", [CLIENT4, CLIENT6])
def test_what_the_kernel_says_is_what_it_says_on_the_host(served: Host, peer: str) -> None:
    unlimited(served.client)
    served.start_command(served.client.command(*PYTHON, ECHO, peer)).says("serves")
    grafted = served.run(out_rules(served), *CALLS, peer).stdout
    assert grafted == served.netns.run(*CALLS, peer)
    for shown in ("sendmmsg 4", "ECONNREFUSED", "EMSGSIZE", "zero copy"):
        assert shown in grafted
    assert "nothing" not in grafted


WITH_SERVER = """
import subprocess, sys
words = [sys.executable, '-ISc', sys.argv[1], sys.argv[2]]
server = subprocess.Popen(words, stdout=subprocess.PIPE); server.stdout.readline()
status = subprocess.run(sys.argv[3:]).returncode; server.kill(); sys.exit(status)
"""


@pytest.mark.parametrize("peer", ["127.0.0.1", "::1"])
def test_with_a_server_inside_it_is_the_same_but_for_an_error_by_way_of_the_ferry(host: Host, peer: str) -> None:
    unlimited(host.netns)
    words = (*PYTHON, WITH_SERVER, ECHO, peer, *CALLS, peer)
    grafted = host.run(out_rules(host), *words).stdout.splitlines()
    expected = host.netns.run(*words).splitlines()
    differing = [(here, there) for here, there in zip(grafted, expected, strict=True) if here != there]
    assert [here for here, _ in differing] == ["unconnected nothing"]
    assert differing[0][1].startswith("unconnected (b'nobody'")


@pytest.mark.parametrize(("outside", "inside"), [(CLIENT4, "127.0.0.1"), (CLIENT6, "::1")])
def test_calls_for_many_datagrams_reach_both_worlds(host: Host, outside: str, inside: str) -> None:
    """sendmmsg to a server outside and one inside in turn; recvmmsg says of each answer which of them it is from."""
    unlimited(host.client)
    host.start_command(host.client.command(*PYTHON, ECHO, outside)).says("serves")
    words = (*PYTHON, WITH_SERVER, ECHO, inside, *CALLS, outside, inside)
    grafted = host.run(out_rules(host), *words).stdout
    assert grafted == host.netns.run(*words)
    assert f"(b'text 1', ('{inside}', 7777))" in grafted


# ---- servers

ANSWERS = """
import socket, struct, sys
six = ':' in sys.argv[1]
s = socket.socket(socket.AF_INET6 if six else socket.AF_INET, socket.SOCK_DGRAM)
for option in ((41, 49), (41, 74)) if six else ((0, 8), (0, 20)):
    s.setsockopt(*option, 1)
s.bind((sys.argv[1], int(sys.argv[2]))); print('serves', flush=True)
for _ in range(3):
    data, found, _, peer = s.recvmsg(100, 200)
    told = {kind: (level, value) for level, kind, value in found}
    kind = 50 if six else 8
    level, value = told[kind]
    to = value[:16] if six else value[8:]
    asked = told[74 if six else 20][1]
    assert to == (asked[8:24] if six else asked[4:8]), told
    print(int.from_bytes(asked[2:4], 'big'), end=' ')
    print(socket.inet_ntop(s.family, to), flush=True)
    own = to + bytes(4) if six else bytes(4) + to + bytes(4)
    s.sendmsg([data.upper()], [(level, kind, own)], 0, peer)
"""
"""Answers from the address that a client has sent to, as DNS servers do that are bound to all addresses. Prints it,
with the port of IP_RECVORIGDSTADDR, IPV6_RECVORIGDSTADDR.
"""


@pytest.mark.parametrize("family", [4, 6])
def test_a_server_is_told_which_address_a_client_sent_to_and_answers_from_there(served: Host, family: int) -> None:
    any_address, first, other = ("0.0.0.0", HOST4, "10.98.0.77") if family == 4 else ("::", HOST6, "fd98::77")
    port = served.port()
    spec = f"0.0.0.0:{port}" if family == 4 else f"[::]:{port}"
    bind = "0.0.0.0:53" if family == 4 else "[::]:53"
    with served.netns.with_address(f"{other}/{24 if family == 4 else 64}"):
        program = served.start("-i", f"{bind}={served.endpoint(spec)}", *out_rules(served), "--", *PYTHON, ANSWERS,
                               any_address, "53")  # fmt: skip
        program.says("serves")
        for address in (first, other, first):
            assert ask(served, address, port) == (b"QUERY", address)
        assert program.wait() == 0
    assert program.said.splitlines() == ["serves", f"{port} {first}", f"{port} {other}", f"{port} {first}"]


def ask(host: Host, address: str, port: int) -> tuple[bytes, str]:
    """The answer to a client, and where it comes from."""
    with host.client.inside():
        client = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    with client:
        client.settimeout(20)
        client.sendto(b"query", (address, port))
        data, peer = client.recvfrom(100)
    return data, peer[0]


GROUP = """
import ctypes, select, socket, struct, sys
family = socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET
def new():
    s = socket.socket(family, socket.SOCK_DGRAM); s.setsockopt(1, 15, 1); s.bind((sys.argv[1], 53)); return s
group = [new() for _ in range(3)]
# The socket with the number in the first byte of a datagram: ld [0] (a byte); ret a
code = struct.pack('=HBBI', 0x30, 0, 0, 0) + struct.pack('=HBBI', 0x16, 0, 0, 0)
room = ctypes.create_string_buffer(code)
group[0].setsockopt(1, 51, struct.pack('@HP', 2, ctypes.addressof(room)))
print('bound', flush=True)
for _ in range(12):
    s = select.select(group, [], [])[0][0]; data, peer = s.recvfrom(99)
    s.sendto(bytes([group.index(s)]) + data, peer)
"""


@pytest.mark.parametrize("family", [4, 6])
def test_a_group_with_a_program_that_chooses_serves_as_on_the_host(served: Host, family: int) -> None:
    """SO_REUSEPORT with SO_ATTACH_REUSEPORT_CBPF: each datagram at the socket that it is for."""
    any_address, address = ("0.0.0.0", HOST4) if family == 4 else ("::", HOST6)
    port = served.port()
    endpoint = served.endpoint(f"0.0.0.0:{port}" if family == 4 else f"[::]:{port}")
    bind = "0.0.0.0:53" if family == 4 else "[::]:53"
    program = served.start("-i", f"{bind}={endpoint}", *out_rules(served), "--", *PYTHON, GROUP, any_address)
    program.says("bound")
    with served.client.inside():
        client = socket.socket(socket.AF_INET6 if family == 6 else socket.AF_INET, socket.SOCK_DGRAM)
    with client:
        client.settimeout(20)
        for turn in range(12):
            client.sendto(bytes([turn % 3]) + b"x", (address, port))
            assert client.recv(9) == bytes([turn % 3]) * 2 + b"x"
    assert program.wait() == 0


def test_a_group_that_is_bound_inside_is_one_there(host: Host) -> None:
    """Each of its sockets is replaced, with SO_REUSEPORT, by one in the container."""
    script = (
        "import select, socket\n"
        "def new(): return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "group = [new() for _ in range(4)]\n"
        "for s in group: s.setsockopt(1, 15, 1); s.bind(('127.0.0.1', 53))\n"
        "heard = set()\n"
        "for _ in range(100):\n"
        "    new().sendto(b'x', ('127.0.0.1', 53)); c = new(); c.connect(('127.0.0.1', 53)); c.send(b'x')\n"
        "    for s in select.select(group, [], [], 20)[0]: s.recv(9); heard.add(s.fileno())\n"
        "print(len(heard) > 1)\n"
    )
    assert host.run(out_rules(host), *PYTHON, script).stdout == "True\n"
