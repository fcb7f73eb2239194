"""What a fortieth reading found of ports that several sockets share. TCP: a listener that had lost its endpoint, or had
bound it while binds were free, was in the kernel's group of those who listen there (SO_REUSEPORT, of the same user),
and heard the next one's clients; so was one that an egress rule had lent the port, and the server missed them. UDP
over IPv6: the kernel prefers a socket that was connected to the sender once. And two that shared an endpoint rightly
were refused now and then.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from pathlib import Path

import pytest

from tests.hostile.conftest import TRANSPORTS, Confine, Confined, Without
from tests.hostile.test_afterwards import apply
from tests.hostile.test_thirty_eighth_reading_ports import ANSWERS, DENIED, FREE, ask, lends
from tests.hostile.test_thirty_sixth_reading_groups import policy, said
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, CLIENT6, HOST4, HOST6
from tests.support.udp import udp

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

DENY = "default: deny\n"
COUNT = 12
SECRET = b"of a client"
ALL = f"{COUNT} {SECRET.decode()}"

SERVER = r"""
import ctypes, errno, select, socket, struct, sys, time
how, address, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
SHARES = socket.SO_REUSEADDR, socket.SO_REUSEPORT

def made(kind=socket.SOCK_STREAM):
    one = socket.socket(socket.AF_INET, kind)
    for option in SHARES:
        one.setsockopt(socket.SOL_SOCKET, option, 1)
    return one

def pick(which=0):  # SO_ATTACH_REUSEPORT_CBPF: the first of the group
    code = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, which))
    t.setsockopt(socket.SOL_SOCKET, 51, struct.pack("HxxxxxxP", 1, ctypes.addressof(code)))
    return "picks"

def pick_second():
    return pick(1)

def join():
    t.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    return "joins"

def listen():
    t.listen(100)
    return "listens"

def read():
    got, data = 0, b""
    while select.select([t], [], [], 0.5)[0]:
        one = t.accept()[0]
        one.settimeout(5)
        data = one.recv(100)
        got += 1
    return "%d %s" % (got, data.decode())

def again():
    failed, end = 0, time.monotonic() + 4
    while time.monotonic() < end:
        with made(socket.SOCK_DGRAM) as one:
            try:
                one.bind((address, port))
            except OSError:
                failed += 1
    return failed

t = made()
try:
    if how == "borrow":  # the hook passes it, and the kernel says EAFNOSUPPORT: the socket has the port, and no peer
        wrong = struct.pack("=HH4s8x", 1, socket.htons(port), socket.inet_aton(address))
        assert ctypes.CDLL(None, use_errno=True).connect(t.fileno(), wrong, 16) == -1
        print(errno.errorcode[ctypes.get_errno()], flush=True)
    elif how == "listen":
        t.bind((address, port))
        t.listen(100)
        print("serving", flush=True)
    else:
        print("ready", flush=True)
except OSError as error:
    print(errno.errorcode[error.errno], flush=True)
"""


def server(host: Host, confine: Confine, transport: str, text: str, how: str = "listen", address: str = "0.0.0.0",
           port: int = 53) -> Confined:  # fmt: skip
    return confine(host, transport, text, within=["/usr/bin/python3", "-ISc", SERVER + ANSWERS, how, address, port])


def come(host: Host, port: int) -> None:
    """As many clients as COUNT, each of which says something if it is connected within a second."""
    clients = []
    for _ in range(COUNT):
        with host.client.inside():
            clients.append(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
        clients[-1].setblocking(False)
        with contextlib.suppress(BlockingIOError):
            clients[-1].connect((HOST4, port))
    left, end = set(clients), time.monotonic() + 1
    while left and time.monotonic() < end:
        for one in select.select([], [*left], [], 0.1)[1]:
            left.remove(one)
            if not one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                one.send(SECRET)
    for one in clients:
        one.close()


# ---- TCP: who has lost the endpoint


def after_a_loss(host: Host, confine: Confine, tmp_path: Path, transport: str) -> tuple[Confined, Confined, int]:
    """One that had the endpoint and listens still, the one that has it next, and its port."""
    web = host.port()
    before = server(host, confine, transport, policy(web))
    assert said(before) == "serving" and ask(before, "pick") == "picks"
    apply(host, before, tmp_path, policy(web, rules=""))
    return before, server(host, confine, transport, policy(web)), web


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_nobody_serves_beside_one_that_lost_its_endpoint(
    host: Host, confine: Confine, tmp_path: Path, transport: str
) -> None:
    _, after, _ = after_a_loss(host, confine, tmp_path, transport)
    assert said(after) == "EADDRINUSE"


def test_control_where_nobody_looks_it_hears_the_next_ones_clients(
    without: Without, confine: Confine, tmp_path: Path
) -> None:
    host = without("leftovers at its port")
    before, after, web = after_a_loss(host, confine, tmp_path, "direct")
    assert said(after) == "serving"
    come(host, web)
    assert (ask(before, "read"), ask(after, "read")) == (ALL, "0 ")


def test_nor_beside_one_that_bound_it_while_binds_were_free(host: Host, confine: Confine, tmp_path: Path) -> None:
    web = host.port()
    before = server(host, confine, "direct", FREE, port=web)
    assert said(before) == "serving"
    apply(host, before, tmp_path, DENIED)
    assert said(server(host, confine, "direct", policy(web))) == "EADDRINUSE"


def test_two_that_are_granted_it_share_it(host: Host, confine: Confine) -> None:
    web = host.port()
    both = [server(host, confine, "direct", policy(web)) for _ in range(2)]
    assert [said(one) for one in both] == ["serving", "serving"]
    come(host, web)
    assert sum(int(ask(one, "read").split()[0]) for one in both) == COUNT


# ---- TCP: whom an egress rule lends the port


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_none_is_lent_the_port_beside_a_listener(host: Host, confine: Confine, transport: str) -> None:
    web = host.port()
    after = server(host, confine, transport, policy(web))
    assert said(after) == "serving"
    one = server(host, confine, transport, lends(web, "10.0.0.0/8"), "borrow", CLIENT4, 9)
    assert said(one) in ("EADDRINUSE", "EACCES")  # (EACCES: the supervisor makes no such connect)
    ask(one, "listen")
    come(host, web)
    assert ask(after, "read") == ALL


@pytest.mark.parametrize("without_it", ["", "group of a lent port"], ids=["", "control"])
def test_who_was_lent_it_first_joins_nobodys_group(
    host: Host, without: Without, confine: Confine, without_it: str
) -> None:
    used = without(without_it) if without_it else host
    web = used.port()
    one = server(used, confine, "direct", lends(web, "10.0.0.0/8"), "borrow", CLIENT4, 9)
    assert said(one) == "EAFNOSUPPORT"
    after = server(used, confine, "direct", policy(web))
    if not without_it:
        assert ask(one, "join") == "EPERM"
    assert said(after) == "serving"
    listens = ask(one, "listen")
    ask(one, "pick_second")
    come(used, web)
    assert (listens, ask(after, "read")) == (("listens", "0 ") if without_it else ("EADDRINUSE", ALL))


# ---- UDP


def policy6(web: int) -> str:
    return policy(web, "{bind: '[::]:53', endpoint: web}", "'[::]:{}'")


def test_two_that_share_an_endpoint_bind_it_at_the_same_time(host: Host, confine: Confine) -> None:
    assert refused(host, confine) == 0


def test_control_where_a_port_counts_only_afterwards_some_are_refused(without: Without, confine: Confine) -> None:
    assert refused(without("being bound"), confine) > 0


def refused(host: Host, confine: Confine) -> int:
    """How often two that bind and close again and again are refused."""
    web = host.port()
    both = [server(host, confine, "direct", policy(web), "wait") for _ in range(2)]
    for one in both:
        one.lines(1)
        one.program.tell("again\n")
    return sum(int(one.lines(2)[1]) for one in both)


SERVER6 = r"""
import ctypes, errno, socket, sys
peer, port = sys.argv[1], int(sys.argv[2])
u = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
u.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
u.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
try:
    u.bind(("::", port))
    if peer:
        u.connect((peer, 9))
        assert ctypes.CDLL(None).connect(u.fileno(), bytes(28), 28) == 0  # AF_UNSPEC
    print("serving", flush=True)
except OSError as error:
    print(errno.errorcode[error.errno], flush=True)
for line in sys.stdin:
    u.settimeout(0.5)
    got = 0
    try:
        while u.recv(100):
            got += 1
    except OSError:
        print(got, flush=True)
"""


@pytest.mark.parametrize("without_it", ["", "earlier port"], ids=["", "control"])
def test_who_bound_it_freely_reads_nothing_that_is_for_another(
    host: Host, without: Without, confine: Confine, tmp_path: Path, without_it: str
) -> None:
    used = without(without_it) if without_it else host
    web = used.port()
    words = ["/usr/bin/python3", "-ISc", SERVER6]
    before = confine(used, "direct", "name: t\ndefault: container\n", within=[*words, CLIENT6, str(web)])
    assert said(before) == "serving"
    apply(used, before, tmp_path, DENIED)
    assert said(confine(used, "direct", policy6(web), within=[*words, "", "53"])) == "serving"
    for _ in range(COUNT):
        with udp(used.client, CLIENT6) as client:
            client.sendto(SECRET, (HOST6, web))
    assert int(ask(before, "read")) == (COUNT if without_it else 0)
