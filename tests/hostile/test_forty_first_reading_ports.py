"""What a forty-first reading found of ports that several sockets share. A socket that had lost its endpoint, or had its
port from when binds were free, heard the next one's clients where the lookup at the bind did not find it: at one
address, connected just then, tied to an interface. What was lent a port joined a server's group as MPTCP, or by a
setsockopt of another thread. And a service of before its policy, which grants its place, lost what was for it.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hostile.conftest import TRANSPORTS, Confine, Confined, Without
from tests.hostile.test_afterwards import apply
from tests.hostile.test_fortieth_reading_ports import ALL, COUNT, SECRET, SERVER, come, policy6
from tests.hostile.test_fortieth_reading_ports import server as listener
from tests.hostile.test_thirty_eighth_reading_ports import ANSWERS, DENIED, FREE, ask, lends
from tests.hostile.test_thirty_sixth_reading_groups import policy, said
from tests.support.cgroups import in_cgroup, new_cgroup
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, HOST4, HOST6
from tests.support.shell import AS_NOBODY
from tests.support.udp import udp

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

WHOLLY_FREE = "name: t\ndefault: container\n"
TIED = "one.setsockopt(1, 25, b'eth0')  # SO_BINDTODEVICE\n"
MPTCP = SERVER.replace("socket.socket(socket.AF_INET, kind)", "socket.socket(socket.AF_INET, kind, 262)")
SERVER6 = SERVER.replace("socket.AF_INET,", "socket.AF_INET6,").replace(
    "    return one\n", "    one.setsockopt(41, 26, 1)  # IPV6_V6ONLY\n    return one\n", 1
)

UDP = r"""
import ctypes, errno, select, socket, sys
peer, address, port, share = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
one.setsockopt(socket.SOL_SOCKET, share, 1)

def connect():
    one.connect((peer, 9))
    return leave()

def leave():
    assert ctypes.CDLL(None).connect(one.fileno(), bytes(16), 16) == 0  # AF_UNSPEC
    return "left"

def read():
    got, data = 0, b""
    while select.select([one], [], [], 0.5)[0]:
        data = one.recv(100)
        got += 1
    return "%d %s" % (got, data.decode())

try:
    one.bind((address, port))
    if peer:
        one.connect((peer, 9))
    print("serving", flush=True)
except OSError as error:
    print(errno.errorcode[error.errno], flush=True)
"""
ADDR, PORT = str(socket.SO_REUSEADDR), str(socket.SO_REUSEPORT)


def datagrams(
    host: Host,
    confine: Confine,
    text: str,
    address: str = "0.0.0.0",
    port: int = 53,
    *,
    peer: str = "",
    program: str = UDP,
    share: str = ADDR,
) -> Confined:
    words = ["/usr/bin/python3", "-ISc", program + ANSWERS, peer, address, str(port), share]
    return confine(host, "direct", text, within=words)


@contextlib.contextmanager
def running_service(host: Host, kind: str, port: int, folder: Path, text: str) -> Iterator[Confined]:
    """One that serves at that port, and is attached with the policy ``text`` then."""
    words = ["/usr/bin/python3", "-ISc", SERVER + ANSWERS, "listen", "0.0.0.0", str(port)]
    if kind == "udp":
        words = ["/usr/bin/python3", "-ISc", UDP + ANSWERS, "", "0.0.0.0", str(port), ADDR]
    (folder / "running.yaml").write_text(text)
    with new_cgroup(f"runs-already-{kind}") as path, contextlib.ExitStack() as stack:
        service = host.start_command([*in_cgroup(path), *host.netns.command(*AS_NOBODY, *words)], talk=True)
        stack.callback(service.stop)
        service.until("that it serves", lambda: "serving" in service.said)
        host.graft("attach", "--cgroup", path, "--policy", folder / "running.yaml")
        stack.callback(host.remove_at, path)
        yield Confined(host, service, path)


def send(host: Host, port: int, count: int = COUNT) -> None:
    for _ in range(count):
        with udp(host.client, CLIENT4) as client:
            client.sendto(SECRET, (HOST4, port))


def grants_itself(web: int) -> str:
    """A policy with a rule for binds of the endpoint's own port."""
    named = f"w{web}"
    return policy(web, rules=f"{{bind: '*:{web}', endpoint: {named}}}").replace("web: ", f"{named}: ")


# ---- whom the lookup at the bind does not find


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_listener_that_lost_its_endpoint_at_one_address_hears_nobody(
    host: Host, confine: Confine, tmp_path: Path, transport: str
) -> None:
    assert heard_at_one_address(host, confine, tmp_path, transport) == "0 "


def test_control_where_nobody_notes_who_serves_it_hears_the_next_ones_clients(
    without: Without, confine: Confine, tmp_path: Path
) -> None:
    assert heard_at_one_address(without("servers"), confine, tmp_path, "direct") == ALL


def heard_at_one_address(host: Host, confine: Confine, tmp_path: Path, transport: str) -> str:
    web = host.port()
    at = f"'{HOST4}:{{}}'"
    before = listener(host, confine, transport, policy(web, endpoint=at))
    assert said(before) == "serving"
    apply(host, before, tmp_path, policy(web, rules="", endpoint=at))
    assert said(listener(host, confine, transport, policy(web))) == "serving"
    come(host, web)
    return ask(before, "read")


@pytest.mark.parametrize("without_it", ["", "servers"], ids=["", "control"])
@pytest.mark.parametrize("how", ["connected", "tied", "at one address"])
def test_who_bound_it_freely_reads_no_datagram_for_the_next_one(
    host: Host, without: Without, confine: Confine, tmp_path: Path, how: str, without_it: str
) -> None:
    used = without(without_it) if without_it else host
    web = used.port()
    program = UDP.replace("try:\n", f"{TIED}try:\n", 1) if how == "tied" else UDP
    address, peer = HOST4 if how == "at one address" else "0.0.0.0", CLIENT4 if how == "connected" else ""
    before = datagrams(used, confine, WHOLLY_FREE, address, web, peer=peer, program=program)
    assert said(before) == "serving"
    apply(used, before, tmp_path, DENIED)
    assert said(datagrams(used, confine, policy(web))) == "serving"
    if peer:
        assert ask(before, "leave") == "left"
    send(used, web)
    assert ask(before, "read") == (ALL if without_it else "0 ")


@pytest.mark.parametrize("without_it", ["", "servers"], ids=["", "control"])
def test_nor_hears_it_clients_over_ipv6_by_the_interface_that_it_is_tied_to(
    host: Host, without: Without, confine: Confine, tmp_path: Path, without_it: str
) -> None:
    used = without(without_it) if without_it else host
    web = used.port()
    words = [
        "/usr/bin/python3",
        "-ISc",
        SERVER6.replace("    return one\n", f"    {TIED}    return one\n", 1) + ANSWERS,
    ]
    before = confine(used, "direct", WHOLLY_FREE, within=[*words, "listen", "::", str(web)])
    assert said(before) == "serving"
    apply(used, before, tmp_path, DENIED)
    words = ["/usr/bin/python3", "-ISc", SERVER6 + ANSWERS, "listen", "::", "53"]
    assert said(confine(used, "direct", policy6(web), within=words)) == "serving"
    for _ in range(COUNT):
        with used.client.inside(), contextlib.suppress(OSError), socket.create_connection((HOST6, web), 0.2) as client:
            client.send(SECRET)
    assert ask(before, "read") == (ALL if without_it else "0 ")


def test_a_server_at_another_address_keeps_what_is_for_it(host: Host, confine: Confine, tmp_path: Path) -> None:
    """The next one's endpoint is at another address, or of the other family."""
    web = host.port()
    before = datagrams(host, confine, WHOLLY_FREE, HOST4, web)
    assert said(before) == "serving"
    apply(host, before, tmp_path, DENIED)
    for number, at in enumerate(("'127.0.0.9:{}'", "'[::1]:{}'")):
        text = policy(web, endpoint=at).replace("web", f"web{number}")
        program = UDP if not number else UDP.replace("AF_INET,", "AF_INET6,")
        assert said(datagrams(host, confine, text, "0.0.0.0" if not number else "::", program=program)) == "serving"
    send(host, web)
    assert ask(before, "read") == ALL


# ---- whom a rule grants what it had before


@pytest.mark.parametrize("without_it", ["", "granted place"], ids=["", "control"])
@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_a_service_that_runs_already_shares_the_port_that_it_is_granted(
    host: Host, without: Without, confine: Confine, tmp_path: Path, kind: str, without_it: str
) -> None:
    used = without(without_it) if without_it else host
    web = used.port()
    with running_service(used, kind, web, tmp_path, grants_itself(web)):
        next_one = policy(web).replace("web", f"v{web}")
        other = listener(used, confine, "direct", next_one) if kind == "tcp" else datagrams(used, confine, next_one)
        assert said(other) == ("EADDRINUSE" if without_it else "serving")


@pytest.mark.parametrize("without_it", ["", "granted place"], ids=["", "control"])
def test_what_was_bound_before_and_is_granted_now_loses_no_datagram(
    host: Host, without: Without, confine: Confine, tmp_path: Path, without_it: str
) -> None:
    used = without(without_it) if without_it else host
    lost = 0
    for _ in range(4):
        web = used.port()
        before = datagrams(used, confine, FREE, port=web, share=PORT)
        assert said(before) == "serving"
        after = datagrams(used, confine, grants_itself(web), port=web, share=PORT)
        assert said(after) == "serving"
        apply(used, before, tmp_path, grants_itself(web))
        send(used, web, 40)
        lost += 40 - sum(int(ask(one, "read").split()[0]) for one in (before, after))
    assert (lost > 0) == bool(without_it)


# ---- whom an egress rule lends the port


@pytest.mark.parametrize("without_it", ["", "groups of MPTCP"], ids=["", "control"])
def test_mptcp_joins_no_servers_group(host: Host, without: Without, confine: Confine, without_it: str) -> None:
    used = without(without_it) if without_it else host
    web = used.port()
    words = ["/usr/bin/python3", "-ISc", MPTCP + ANSWERS, "borrow", CLIENT4, "9"]
    one = confine(used, "direct", lends(web, "10.0.0.0/8"), within=words)
    assert said(one) == "EAFNOSUPPORT"
    after = listener(used, confine, "direct", policy(web))
    assert said(after) == "serving"
    assert ask(one, "join") == ("joins" if without_it else "EPERM")
    ask(one, "listen")
    come(used, web)
    assert (ask(after, "read") == ALL) == (not without_it)


RACE = r"""
import ctypes, errno, mmap, os, socket, struct, sys, time
address, port = sys.argv[1], int(sys.argv[2])
wrong = struct.pack("=HH4s8x", 1, socket.htons(port), socket.inet_aton(address))
libc, shared, won = ctypes.CDLL(None, use_errno=True), mmap.mmap(-1, 8), 0
all = [socket.socket(socket.AF_INET, socket.SOCK_STREAM) for _ in range(600)]
for one in all:
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
turn, done = (ctypes.c_uint32.from_buffer(shared, at) for at in (0, 4))
child = os.fork()
if not child:
    for number, one in enumerate(all, 1):
        while turn.value < number:
            pass
        end = time.monotonic() + 0.02
        try:
            while time.monotonic() < end:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        except OSError:
            pass
        done.value = number
    os._exit(0)
for number, one in enumerate(all, 1):
    turn.value = number
    for _ in range(200):
        pass
    assert libc.connect(one.fileno(), wrong, 16) == -1
    lent = ctypes.get_errno() == errno.EAFNOSUPPORT
    while done.value < number:
        pass
    won += lent and one.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)
os.waitpid(child, 0)
print(won, flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("without_it", ["", "options that are under way"], ids=["", "control"])
def test_nor_what_another_thread_has_set_meanwhile(
    host: Host, without: Without, confine: Confine, without_it: str
) -> None:
    used = without(without_it) if without_it else host
    words = ["/usr/bin/python3", "-ISc", RACE, CLIENT4, "9"]
    won = 0
    for _ in range(5 if without_it else 1):
        one = confine(used, "direct", lends(used.port(), "10.0.0.0/8"), within=words)
        won += int(one.lines(1)[0])
        if won:
            break
    assert (won > 0) == bool(without_it)


TWO = r"""
import errno, socket, sys
all, said = [], []
for port in sys.argv[3:5]:
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, int(sys.argv[1]), 1)
    all.append(one)
    said.append(errno.errorcode.get(one.connect_ex((sys.argv[2], int(port))), "ok"))
print(*said, flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize(("option", "second"), [(ADDR, "ok"), (PORT, "EADDRINUSE")])
def test_two_connections_leave_from_one_lent_port_by_one_option(
    host: Host, confine: Confine, option: str, second: str
) -> None:
    with host.client.listener() as a, host.client.listener() as b:
        ports = [str(one.getsockname()[1]) for one in (a, b)]
        words = ["/usr/bin/python3", "-ISc", TWO, option, CLIENT4, *ports]
        assert said(confine(host, "direct", lends(host.port(), "10.0.0.0/8"), within=words)) == f"ok {second}"


@pytest.mark.parametrize("without_it", ["", "bound without a port"], ids=["", "control"])
def test_what_was_lent_the_port_is_no_server_by_a_bind_without_a_port(
    host: Host, without: Without, confine: Confine, without_it: str
) -> None:
    used = without(without_it) if without_it else host
    web = used.port()
    program = UDP.replace(
        "    one.bind((address, port))\n",
        "    one.setsockopt(0, 24, 1)  # IP_BIND_ADDRESS_NO_PORT\n    one.bind((address, port))\n"
        "    connect()\n    peer = ''\n",
    )
    rules = (
        f"name: t\nendpoints: {{web: '0.0.0.0:{web}', any: '0.0.0.0:dynamic'}}\n"
        "ingress: [{bind: '*:77', endpoint: any}]\negress: [{to: 10.0.0.0/8, endpoint: web}]\ndefault: deny\n"
    )
    assert said(datagrams(used, confine, rules, port=77, peer=CLIENT4, program=program)) == "serving"
    assert said(datagrams(used, confine, policy(web))) == ("serving" if without_it else "EADDRINUSE")
