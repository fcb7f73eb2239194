"""UDP in transport swap: born on the host's stack, taken home by what stays inside, and the ferry between the two."""

from __future__ import annotations

import ctypes
import os
import signal
import socket

import pytest

from graft.kernel import cgroup
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, CLIENT6, HOST4
from tests.support.wait import until

pytestmark = pytest.mark.e2e

PYTHON = ("/usr/bin/python3", "-ISc")


def out_rule(host: Host) -> list[str]:
    return ["-e", f"0.0.0.0/0={host.endpoint('0.0.0.0:dynamic')}", "-e", f"::/0={host.endpoint('[::]:dynamic')}"]


def server_rule(host: Host, port: int = 53) -> tuple[list[str], int]:
    outside = host.port()
    return ["-i", f"*:{port}={host.endpoint(f'0.0.0.0:{outside}')}"], outside


def echo(host: Host, address: str = "0.0.0.0") -> socket.socket:
    with host.client.inside():
        made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    made.settimeout(20)
    made.bind((address, 0))
    return made


def ask(host: Host, port: int, text: bytes = b"query") -> bytes:
    with echo(host) as client:
        client.connect((HOST4, port))
        client.send(text)
        return client.recv(100)


SERVER = (
    "import socket\n"
    "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('0.0.0.0', 53))\n"
    "print(s.getsockname(), flush=True)\n"
    "data, peer = s.recvfrom(100); print(peer[0], flush=True); s.sendto(data.upper(), peer)\n"
)


def test_a_udp_server_answers_its_client(host: Host) -> None:
    rules, port = server_rule(host)
    program = host.start(*rules, *out_rule(host), "--", *PYTHON, SERVER)
    program.says("('0.0.0.0', 53)")
    assert [one["transport"] for one in host.ps()] == ["swap"]
    assert ask(host, port) == b"QUERY"
    assert program.wait() == 0
    assert program.said.splitlines()[1] == CLIENT4


INSIDE = """
import os, socket, sys
def server(family, address):
    s = socket.socket(family, socket.SOCK_DGRAM); s.settimeout(20); s.bind((address, 5300))
    if os.fork() == 0:
        while True:
            data, peer = s.recvfrom(100)
            if data == b'end':
                os._exit(0)
            s.sendto(data.upper() + b' ' + peer[0].encode(), peer)
    s.close()
"""


@pytest.mark.parametrize(
    ("family", "address"), [("AF_INET", "127.0.0.1"), ("AF_INET", "127.0.0.11"), ("AF_INET6", "::1")]
)
def test_an_unconnected_socket_talks_to_both_worlds(host: Host, family: str, address: str) -> None:
    """It sends to a server inside and to one outside, and sees each answer come from where it came from."""
    outside = CLIENT6 if family == "AF_INET6" else CLIENT4
    with echo(host, outside) as far:
        script = INSIDE + (
            f"server(socket.{family}, '{address}')\n"
            f"s = socket.socket(socket.{family}, socket.SOCK_DGRAM); s.settimeout(20)\n"
            f"s.sendto(b'hello', ('{outside}', {far.getsockname()[1]}))\n"
            f"for _ in range(3):\n"
            f"    s.sendto(b'one', ('{address}', 5300)); print(*s.recvfrom(100)[:2])\n"
            f"    s.sendto(b'two', ('{outside}', {far.getsockname()[1]})); print(s.recvfrom(100)[1][:2])\n"
            f"s.sendto(b'end', ('{address}', 5300))\n"
        )
        program = host.start(*out_rule(host), "--", *PYTHON, script)
        assert far.recv(100) == b"hello"
        for _ in range(3):
            data, peer = far.recvfrom(100)
            assert data == b"two"
            far.sendto(b"answer", peer)
        port = far.getsockname()[1]
        assert program.wait() == 0
    lines = program.said.splitlines()
    assert [line.startswith("b'ONE ") and f"('{address}', 5300" in line for line in lines[::2]] == [True] * 3
    assert lines[1::2] == [f"('{outside}', {port})"] * 3


def test_an_ipv6_socket_talks_to_both_worlds_over_both_families(host: Host) -> None:
    """Unconnected, as the sockets of Go's and of many QUIC programs; then with an address of its own by a connect."""
    with echo(host, CLIENT4) as far4, echo(host, CLIENT6) as far6:
        ports = far4.getsockname()[1], far6.getsockname()[1]
        script = INSIDE + (
            "server(socket.AF_INET, '127.0.0.1'); server(socket.AF_INET6, '::1')\n"
            "s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM); s.settimeout(20)\n"
            "inside = [('::ffff:127.0.0.1', 5300), ('::1', 5300)]\n"
            f"outside = [('::ffff:{CLIENT4}', {ports[0]}), ('{CLIENT6}', {ports[1]})]\n"
            "for turn in range(2):\n"
            "    for one in inside + outside:\n"
            "        s.sendto(b'x', one); data, peer = s.recvfrom(100); print(data[:1], peer[:2] == one)\n"
            "s.connect(outside[1]); s.sendto(b'x', inside[1]); print(s.getpeername()[:2] == outside[1])\n"
            "for one in inside: s.sendto(b'end', one)\n"
        )
        program = host.start(*out_rule(host), "--", *PYTHON, script)
        for _ in range(2):
            for far in (far4, far6):
                data, peer = far.recvfrom(100)
                assert data == b"x"
                far.sendto(b"Y", peer)
        assert program.wait() == 0, program.complained
    assert program.said.splitlines() == ["b'X' True", "b'X' True", "b'Y' True", "b'Y' True"] * 2 + ["True"]


ANY_PORT = """
import os, socket, sys
family = socket.AF_INET if sys.argv[1] == '4' else socket.AF_INET6
s = socket.socket(family, socket.SOCK_DGRAM); s.settimeout(20); s.bind(('', 0))
port = s.getsockname()[1]
print(port, flush=True)
c = socket.socket(family, socket.SOCK_DGRAM); c.settimeout(20)
c.connect(('127.0.0.1' if sys.argv[1] == '4' else '::1', port)); c.send(b'from inside')
data, peer = s.recvfrom(100); assert peer[1] == c.getsockname()[1], (peer, c.getsockname())
print(data, peer[0]); s.sendto(b'answer', peer); print(c.recv(100))
s.sendto(b'out', (sys.argv[2], int(sys.argv[3]))); print(s.recvfrom(100)[0])
"""


@pytest.mark.parametrize("family", ["4", "6"])
def test_a_server_at_a_port_of_the_kernels_choice_is_reached_from_inside_and_reaches_out(
    host: Host, family: str
) -> None:
    outside = CLIENT4 if family == "4" else CLIENT6
    with echo(host, outside) as far:
        words = (ANY_PORT, family, outside, str(far.getsockname()[1]))
        program = host.start("-v", *out_rule(host), "--", *PYTHON, *words)
        data, peer = far.recvfrom(100)
        assert data == b"out"
        far.sendto(b"back", peer)
        assert program.wait() == 0
    port, *rest = program.said.splitlines()
    assert rest == [f"b'from inside' {'127.0.0.1' if family == '4' else '::1'}", "b'answer'", "b'back'"]
    assert peer[1] == int(port)
    assert f":0: port {port} of the host, and of the container" in program.complained


def test_what_is_bound_inside_stays_there(host: Host) -> None:
    """A server and its client at the container's own loopback, as without Graft: no datagram takes another way."""
    script = (
        "import socket\n"
        "s, c = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in '12'); s.settimeout(20); c.settimeout(20)\n"
        "s.bind(('127.0.0.1', 53)); c.bind(('127.0.0.1', 0)); c.sendto(b'q', ('127.0.0.1', 53))\n"
        "data, peer = s.recvfrom(9); assert peer == c.getsockname(); s.sendto(b'a', peer); print(c.recvfrom(9))\n"
    )
    program = host.start("-v", *out_rule(host), "--", *PYTHON, script)
    assert program.wait() == 0
    assert program.said.strip() == "(b'a', ('127.0.0.1', 53))"
    assert program.complained.count("back to the container") == 2


def test_a_socket_is_connected_inside_outside_and_inside_again(host: Host) -> None:
    """As the C library's resolver does to sort addresses: each connect is to the world that the destination is in."""
    with echo(host, CLIENT4) as far:
        port = far.getsockname()[1]
        script = INSIDE + (
            "server(socket.AF_INET, '127.0.0.1')\n"
            "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(20); s.setsockopt(0, 1, 16)\n"
            "for turn in range(2):\n"
            "    s.connect(('127.0.0.1', 5300)); s.send(b'in'); print(s.recv(100)[:2], s.getpeername()[0])\n"
            f"    s.connect(('{CLIENT4}', {port})); s.send(b'out'); print(s.recv(100), s.getpeername()[0])\n"
            "print(s.getsockopt(0, 1))\n"
            "s.connect(('127.0.0.1', 5300)); s.send(b'end')\n"
        )
        program = host.start(*out_rule(host), "--", *PYTHON, script)
        for _ in range(2):
            data, peer = far.recvfrom(100)
            assert data == b"out"
            far.sendto(b"answer", peer)
        assert program.wait() == 0
    turn = ["b'IN' 127.0.0.1", f"b'answer' {CLIENT4}"]
    assert program.said.splitlines() == [*turn, *turn, "16"]


def test_no_call_of_the_data_path_is_trapped(host: Host) -> None:
    """One notification for each socket and each bind or connect, whatever is sent and received."""
    with echo(host, CLIENT4) as far:
        script = INSIDE + (
            "server(socket.AF_INET, '127.0.0.1')\n"
            "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(20)\n"
            "for _ in range(200):\n"
            f"    s.sendto(b'in', ('127.0.0.1', 5300)); s.recvfrom(100); s.sendto(b'o', ('{CLIENT4}', "
            f"{far.getsockname()[1]}))\n"
            "s.sendto(b'end', ('127.0.0.1', 5300))\n"
        )
        program = host.start("-v", *out_rule(host), "--", *PYTHON, script)
        assert program.wait() == 0
    assert program.complained.count("graft: ") == 3  # two sockets, one bind


def test_a_policy_without_udp_leaves_datagram_sockets_alone(host: Host) -> None:
    rules = ["-e", f"0.0.0.0/0={host.endpoint('0.0.0.0:dynamic', 'tcp')}"]
    script = "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('', 0))"
    program = host.start("-v", *rules, "--", *PYTHON, script)
    assert program.wait() == 0
    assert "socket" not in program.complained


def test_the_ferry_ends_with_its_container(host: Host) -> None:
    script = "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); print('made', flush=True); input()"
    program = host.start(*out_rule(host), "--", *PYTHON, script, talk=True)
    program.says("made")
    container = host.container(program)
    assert len(cgroup.processes(host.cgroup / "supervisors")) == 2
    assert [int(key.value) for key in host.maps.ferries.keys()] == [container.id]  # noqa: SIM118
    program.tell("\n")
    assert program.wait() == 0
    assert host.leftovers() == []
    assert list(host.maps.ferries.keys()) + list(host.maps.berths.keys()) == []


def test_a_denied_destination_stays_denied(host: Host) -> None:
    script = (
        "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "for one in ('127.0.0.1', '127.0.0.2'):\n"
        "    try: s.sendto(b'x', (one, 9)); print('sent')\n"
        "    except PermissionError: print('refused')\n"
    )
    policy = host.folder / "denies.yaml"
    policy.write_text(
        "name: denies\nendpoints: {out: {address: '0.0.0.0:dynamic'}}\n"
        "egress: [{to: 192.0.2.0/24, endpoint: out}, {to: 127.0.0.2/32, action: deny}]\n"
    )
    result = host.run(["--policy", policy], *PYTHON, script)
    assert result.stdout.split() == ["sent", "refused"]


LOOP = (
    INSIDE
    + """
server(socket.AF_INET, '127.0.0.1')
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(20)
while True:
    for one in (socket.socket(socket.AF_INET, socket.SOCK_DGRAM), s):
        one.settimeout(20); one.sendto(b'q', ('127.0.0.1', 5300)); print(one.recv(9)[:1], flush=True)
    input()
"""
)


def test_a_supervisor_that_is_killed_leaves_the_ferry_to_the_next_one(host: Host) -> None:
    program = host.start(*out_rule(host), "--", *PYTHON, LOOP, talk=True)
    program.until("two answers", lambda: program.said.count("Q") == 2)
    before = host.maps.ferries.get(ctypes.c_uint32(host.container(program).id))
    os.kill(host.supervisor(program), signal.SIGKILL)
    program.tell("\n")
    program.until("two more", lambda: program.said.count("Q") == 4)
    after = host.maps.ferries.get(ctypes.c_uint32(host.container(program).id))
    assert before is not None and after is not None and before.mark == after.mark


def test_a_ferry_that_is_killed_is_started_again_with_the_next_socket(host: Host) -> None:
    program = host.start(*out_rule(host), "--", *PYTHON, LOOP, talk=True)
    program.until("two answers", lambda: program.said.count("Q") == 2)
    (ferry,) = set(cgroup.processes(host.cgroup / "supervisors")) - {host.supervisor(program)}
    os.kill(ferry, signal.SIGKILL)
    until("its end", lambda: ferry not in cgroup.processes(host.cgroup / "supervisors"))
    program.tell("\n")
    program.until("answers to the new socket and to the old one", lambda: program.said.count("Q") == 4)


def test_nothing_is_left_when_graft_run_is_killed(host: Host) -> None:
    program = host.start(*out_rule(host), "--", *PYTHON, LOOP, talk=True)
    program.until("two answers", lambda: program.said.count("Q") == 2)
    program.process.kill()
    until("nothing is left", lambda: not host.leftovers() and not list(host.maps.ferries.keys()))
