"""Real programs and their datagrams, in the transports swap and born, with servers outside and (in swap) inside."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.support.building import SOURCES
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, HOST4
from tests.support.shell import Word, output

pytestmark = pytest.mark.e2e

PYTHON = ("/usr/bin/python3", "-ISc")
NAME_SERVER = """
import socket, struct, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind((sys.argv[1], 53))
print('serves', flush=True)
while True:
    question, peer = s.recvfrom(512)
    end = question.index(0, 12) + 5
    found = struct.unpack_from('>H', question, end - 4)[0] == 1
    record = bytes.fromhex('c00c000100010000003c0004') + socket.inet_aton(sys.argv[2]) if found else b''
    head = question[:2] + bytes.fromhex('81800001') + struct.pack('>H', found) + bytes(4)
    s.sendto(head + question[12:end] + record, peer)
"""
"""Answers every question for an IPv4 address with the one that it was given."""


@pytest.fixture(params=["swap", "born"])
def served(host: Host, request: pytest.FixtureRequest) -> Host:
    """The host, where every `graft run` has that transport."""
    return host.with_transport(request.param)


def out_rule(host: Host) -> list[str]:
    return ["-e", f"0.0.0.0/0={host.endpoint('0.0.0.0:dynamic')}"]


def any_port_rule(host: Host) -> list[str]:
    """What a resolver needs that binds a port of the kernel's choice, where the default denies."""
    return ["-i", f"*:0={host.endpoint('0.0.0.0:dynamic')}"] if host.run_flags else []


def server_rule(host: Host, port: int) -> tuple[list[str], int]:
    outside = host.port()
    return ["-i", f"*:{port}={host.endpoint(f'0.0.0.0:{outside}')}"], outside


# ---- DNS


def test_dnsmasq_answers_dig_over_udp_and_tcp(served: Host) -> None:
    port = served.port()
    rules = ["-i", f"127.0.0.1:53={served.endpoint(f'0.0.0.0:{port}')}"]
    command = ("dnsmasq", "-k", "-C", "/dev/null", "--no-hosts", "--no-resolv", "--user=root", "--group=root",
               "--address=/graft.test/192.0.2.7", "--pid-file=", "--log-facility=-",
               "--bind-interfaces", "--listen-address=127.0.0.1")  # fmt: skip
    program = served.start(*rules, *out_rule(served), "--", *command)
    for flag in ("+notcp", "+tcp"):
        dig = ("dig", "+short", "+tries=1", "+time=2", flag, f"@{HOST4}", "-p", str(port), "x.graft.test")
        asked = served.client.command(*dig)
        program.until(
            "an answer",
            lambda asked=asked: (  # type: ignore[misc]
                subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() == "192.0.2.7"
            ),
        )


@pytest.fixture(scope="session")
def resolving(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/programs/resolving.c as a static program of musl's."""
    target = tmp_path_factory.mktemp("musl") / "resolving"
    output(["musl-gcc", "-static", "-O1", "-Wall", "-Werror", "-o", target, SOURCES / "resolving.c"])
    return target


RESOLVES = """
import os, signal, subprocess, sys, tempfile
server, script, *command = sys.argv[1:]
child = None
if script:
    child = subprocess.Popen(['/usr/bin/python3', '-ISc', script, server, '192.0.2.8'], stdout=subprocess.PIPE)
    child.stdout.readline()
file = tempfile.NamedTemporaryFile('w')
file.write('nameserver ' + server + chr(10)); file.flush()
subprocess.run(['mount', '--bind', file.name, '/etc/resolv.conf'], check=True)
status = subprocess.run(command).returncode
if child is not None:
    child.kill()
sys.exit(status)
"""
"""Runs a command with that one name server, which runs beside it where its script is given."""


def resolves(server: str, inside: bool, *command: Word) -> tuple[Word, ...]:
    return ("unshare", "-m", *PYTHON, RESOLVES, server, NAME_SERVER if inside else "", *command)


@pytest.mark.parametrize("address", ["127.0.0.11", "127.0.0.53"])
def test_a_static_musl_program_resolves_with_a_server_inside(host: Host, resolving: Path, address: str) -> None:
    program = host.start("-v", *out_rule(host), "--", *resolves(address, True, resolving, "name.test"))
    assert program.wait() == 0, program.complained
    assert program.said == "192.0.2.8\n"
    # The server's socket and bind, the resolver's socket and bind: none for what they send and receive.
    assert program.complained.count("graft: ") == 4


def test_a_static_musl_program_resolves_with_a_server_outside(served: Host, resolving: Path) -> None:
    server = served.start_command(served.client.command(*PYTHON, NAME_SERVER, CLIENT4, "192.0.2.9"))
    server.says("serves")
    rules = [*out_rule(served), *any_port_rule(served)]
    assert served.run(rules, *resolves(CLIENT4, False, resolving, "name.test")).stdout == "192.0.2.9\n"


@pytest.mark.parametrize("inside", [True, False])
def test_gos_own_resolver(host: Host, inside: bool) -> None:
    """hey, which asks for the address of the server that it measures (there is none at that address)."""
    if not inside:
        host.start_command(host.client.command(*PYTHON, NAME_SERVER, CLIENT4, "192.0.2.9")).says("serves")
    command = ("env", "GODEBUG=netdns=go+2", "hey", "-n", "1", "-c", "1", "-t", "2", "http://name.test:9/")
    result = host.run(out_rule(host), *resolves("127.0.0.11" if inside else CLIENT4, inside, *command), status=None)
    assert f"192.0.2.{8 if inside else 9}" in result.stdout + result.stderr


# ---- others


NODE = """
const [family, port, address] = process.argv.slice(1);
const s = require('dgram').createSocket('udp4');
s.on('message', (data, peer) => { console.log(String(data), peer.address, peer.port == port); s.close(); });
s.send('from node', Number(port), address);
"""


def test_node_sends_and_receives(served: Host) -> None:
    script = "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('0.0.0.0', 7777))\n"
    script += "print('serves', flush=True); data, peer = s.recvfrom(99); s.sendto(data.upper(), peer)\n"
    served.start_command(served.client.command(*PYTHON, script)).says("serves")
    rules = [*out_rule(served), *any_port_rule(served)]
    result = served.run(rules, "node", "-e", NODE, "--", "4", "7777", CLIENT4)
    assert result.stdout == f"FROM NODE {CLIENT4} true\n"


def test_iperf3_measures_datagrams(served: Host) -> None:
    rules, port = server_rule(served, 5201)
    program = served.start("-v", *rules, *out_rule(served), "--", "iperf3", "-s", "-1", "--forceflush")
    program.says("Server listening")
    client = ("iperf3", "-J", "-u", "-b", "20M", "-t", "1", "-c", HOST4, "-p", str(port))
    report = json.loads(output(served.client.command(*client)))
    assert report["end"]["sum"]["packets"] > 100
    assert report["end"]["sum"]["lost_percent"] < 50
    assert program.wait() == 0
    # A few sockets and binds: thousands of datagrams make no notification.
    assert program.complained.count("graft: ") < 20


CALLS = """
import ctypes, errno, os, select, socket, struct, sys
peer = sys.argv[1]
libc = ctypes.CDLL(None, use_errno=True)
class Vec(ctypes.Structure): _fields_ = [('base', ctypes.c_char_p), ('len', ctypes.c_size_t)]
class Msg(ctypes.Structure):
    _fields_ = [('name', ctypes.c_void_p), ('namelen', ctypes.c_uint), ('iov', ctypes.POINTER(Vec)),
                ('iovlen', ctypes.c_size_t), ('control', ctypes.c_void_p), ('controllen', ctypes.c_size_t),
                ('flags', ctypes.c_int), ('zero', ctypes.c_int), ('len', ctypes.c_uint)]
def messages(texts, name=None):
    made = (Msg * len(texts))()
    for one, text in zip(made, texts):
        one.iov = ctypes.pointer(Vec(text, len(text))); one.iovlen = 1
        if name is not None:
            one.name = ctypes.addressof(name); one.namelen = 16
    return made
def new(): s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(20); return s
name = ctypes.create_string_buffer(struct.pack('=H', 2) + struct.pack('>H', 7777) + socket.inet_aton(peer), 16)
s = new()
print('sendmmsg', libc.sendmmsg(s.fileno(), messages([b'one', b'two', b'three'], name), 3, 0))
got = [s.recvfrom(9) for _ in range(2)]; print(got)
room = messages([b'x' * 9] * 4); select.select([s], [], [], 20)
print('recvmmsg', libc.recvmmsg(s.fileno(), room, 4, 0x40, None), room[0].len)
s = new(); s.setsockopt(socket.SOL_UDP if hasattr(socket, 'SOL_UDP') else 17, 103, 100); s.setsockopt(17, 104, 1)
print('segment', s.sendto(b'y' * 350, (peer, 7777)))
sizes = 0
while sizes < 350:
    data, messages_, _, sender = s.recvmsg(1000, 100); sizes += len(data)
print(sizes, sender)
s = new(); s.setsockopt(socket.IPPROTO_IP, 8, 1); s.setsockopt(0, 12, 1); s.sendto(b'info', (peer, 7777))
data, info, _, sender = s.recvmsg(99, 200); print(data, sorted((one[0], one[1], one[2][-4:]) for one in info), sender)
s = new(); s.setsockopt(0, 11, 1); s.connect((peer, 9)); s.send(b'nobody')
select.select([s], [], [], 20)
try: s.recv(9)
except OSError as error: print(errno.errorcode[error.errno])
data, found, flags, sender = s.recvmsg(99, 200, socket.MSG_ERRQUEUE)
print(data, flags == socket.MSG_ERRQUEUE, sender, [(one[0], one[1], one[2][:8], one[2][16:24]) for one in found])
print(s.getpeername())
"""
ECHO = """
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('0.0.0.0', 7777)); print('serves', flush=True)
while True:
    data, peer = s.recvfrom(2000); s.sendto(data, peer)
"""


def test_every_call_and_option_of_datagrams_does_what_it_does_on_the_host(served: Host) -> None:
    """sendmmsg, recvmmsg, UDP_SEGMENT and UDP_GRO, IP_PKTINFO, IP_RECVTTL, IP_RECVERR with MSG_ERRQUEUE."""
    served.start_command(served.client.command(*PYTHON, ECHO)).says("serves")
    rules = [*out_rule(served), *any_port_rule(served)]
    grafted = served.run(rules, *PYTHON, CALLS, CLIENT4).stdout
    assert grafted == served.netns.run(*PYTHON, CALLS, CLIENT4)
    assert "sendmmsg 3" in grafted and "ECONNREFUSED" in grafted


REUSING = """
import socket, sys
def new():
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.setsockopt(1, 15, 1); s.bind(('0.0.0.0', 53)); return s
group = [new(), new()]
print('bound', flush=True)
import select
for _ in range(20):
    s = select.select(group, [], [])[0][0]; data, peer = s.recvfrom(99); s.sendto(data, peer)
"""


def test_a_group_of_sockets_shares_a_port(served: Host) -> None:
    rules, port = server_rule(served, 53)
    program = served.start(*rules, *out_rule(served), "--", *PYTHON, REUSING)
    program.says("bound")
    ask = (
        "import socket\nfor n in range(20):\n"
        "    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(20)\n"
        f"    s.connect(('{HOST4}', {port})); s.send(b'%d' % n); assert s.recv(9) == b'%d' % n\n"
    )
    output(served.client.command(*PYTHON, ask))
    assert program.wait() == 0
