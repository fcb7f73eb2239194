"""What a forty-second reading, and one after it, found of the notes that binds leave of servers, of shared ports.
One note for a port hid a server behind another one, at another address or gone by now; one of a socket that was closed
long ago silenced a service that got the port since; copies of what was sent to a group, or to all, went the same way. A
rule for a port that the kernel chooses granted every port, one for IPv6 the IPv4 port too. MPTCP joined a group after a
bind that failed, where TCP could not connect twice.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hostile.conftest import Confine, Without
from tests.hostile.test_afterwards import apply
from tests.hostile.test_fortieth_reading_ports import ALL, COUNT, SECRET, SERVER, come, policy6
from tests.hostile.test_fortieth_reading_ports import server as listener
from tests.hostile.test_forty_first_reading_ports import (
    ADDR,
    PORT,
    TIED,
    UDP,
    WHOLLY_FREE,
    datagrams,
    running_service,
    send,
)
from tests.hostile.test_thirty_eighth_reading_ports import ANSWERS, DENIED, ask, lends
from tests.hostile.test_thirty_sixth_reading_groups import policy, said
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, CLIENT6, HOST4, HOST6
from tests.support.udp import udp

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

ALSO = """
def also():
    global other
    other = made()
    other.bind(("127.0.0.9", 54))
    return "bound"

"""
SECOND = SERVER.replace("\nt = made()\n", f"{ALSO}t = made()\n", 1)
MADE = "one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\none.setsockopt(socket.SOL_SOCKET, share, 1)\n"
MAKES = """def made():
    u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    u.setsockopt(socket.SOL_SOCKET, share, 1)
    return u
"""
SECOND_UDP = UDP.replace(MADE, f"{MAKES}{ALSO}one = made()\n")
BOTH = "{bind: '*:53', endpoint: web}, "


def aside(web: int, first: str = "") -> str:
    """A policy that grants the port at another address, and ``first``."""
    return (
        f"name: t\nendpoints: {{web: '{HOST4}:{web}', aside: '127.0.0.9:{web}'}}\n"
        f"ingress: [{first}{{bind: '*:54', endpoint: aside}}]\ndefault: deny\n"
    )


@contextlib.contextmanager
def held(host: Host, port: int = 0) -> Iterator[int]:
    """A port of the host's at which somebody listens."""
    with host.netns.inside():
        holder = socket.socket()
    with holder:
        holder.bind(("0.0.0.0", port))
        holder.listen()
        yield holder.getsockname()[1]


# ---- one note hides another one


@pytest.mark.parametrize("without_it", ["", "servers"], ids=["", "control"])
@pytest.mark.parametrize("hides", ["another address", "one that has ended"])
def test_a_listener_that_lost_its_endpoint_hears_nobody_by_a_later_note(
    host: Host, without: Without, confine: Confine, tmp_path: Path, hides: str, without_it: str
) -> None:
    used = without(without_it) if without_it else host
    web = used.port()
    words = ["/usr/bin/python3", "-ISc", SECOND + ANSWERS, "listen", "0.0.0.0", "53"]
    before = confine(used, "direct", aside(web, BOTH), within=words)
    assert said(before) == "serving"
    apply(used, before, tmp_path, aside(web))
    assert said(listener(used, confine, "direct", policy(web))) == "serving"
    if hides == "another address":
        assert ask(before, "also") == "bound"
    else:
        ends = listener(used, confine, "direct", policy(web))
        assert said(ends) == "serving"
        ends.program.stop()
    come(used, web)
    assert ask(before, "read") == (ALL if without_it else "0 ")


def test_nor_reads_one_that_bound_it_freely_a_datagram(host: Host, confine: Confine, tmp_path: Path) -> None:
    web = host.port()
    before = datagrams(host, confine, WHOLLY_FREE, HOST4, web, program=SECOND_UDP)
    assert said(before) == "serving"
    apply(host, before, tmp_path, aside(web))
    assert said(datagrams(host, confine, policy(web))) == "serving"
    assert ask(before, "also") == "bound"
    send(host, web)
    assert ask(before, "read") == "0 "


@pytest.mark.parametrize("behind", [False, True], ids=["", "behind a header"])
def test_nor_one_over_ipv6_whatever_headers_it_has(host: Host, confine: Confine, tmp_path: Path, behind: bool) -> None:
    web = host.port()
    program = UDP.replace("AF_INET,", "AF_INET6,")
    before = datagrams(host, confine, WHOLLY_FREE, HOST6, web, program=program)
    assert said(before) == "serving"
    apply(host, before, tmp_path, DENIED)
    v6only = program.replace("one.setsockopt(", "one.setsockopt(41, 26, 1)\none.setsockopt(", 1)
    assert said(datagrams(host, confine, policy6(web), "::", program=v6only)) == "serving"
    for _ in range(COUNT):
        with udp(host.client, CLIENT6) as client:
            if behind:
                client.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_DSTOPTS, bytes([0, 0, 1, 4, 0, 0, 0, 0]))
            client.sendto(SECRET, (HOST6, web))
    assert ask(before, "read") == "0 "


@pytest.mark.parametrize("without_it", ["", "same request"], ids=["", "control"])
def test_nor_when_the_rule_of_the_servers_later_bind_goes(
    host: Host, without: Without, confine: Confine, tmp_path: Path, without_it: str
) -> None:
    used = without(without_it) if without_it else host
    web, at = used.port(), f"'{HOST4}:{{}}'"
    before = listener(used, confine, "direct", policy(web, endpoint=at))
    assert said(before) == "serving"
    apply(used, before, tmp_path, policy(web, rules="", endpoint=at))
    both = policy(web, rules="{bind: '*:53', endpoint: web}, {bind: '*:54', endpoint: web}")
    words = ["/usr/bin/python3", "-ISc", SECOND.replace("127.0.0.9", "0.0.0.0") + ANSWERS, "listen", "0.0.0.0", "53"]
    after = confine(used, "direct", both, within=words)
    assert said(after) == "serving" and ask(after, "also") == "bound"
    apply(used, after, tmp_path, policy(web))
    come(used, web)
    assert ask(before, "read") == (ALL if without_it else "0 ")


@pytest.mark.parametrize("without_it", ["", "one family"], ids=["", "control"])
def test_nor_reads_one_at_both_families_that_is_granted_one(
    host: Host, without: Without, confine: Confine, tmp_path: Path, without_it: str
) -> None:
    used = without(without_it) if without_it else host
    web = used.port()
    program = UDP.replace("AF_INET,", "AF_INET6,").replace("try:\n", f"{TIED}try:\n", 1)
    before = datagrams(used, confine, WHOLLY_FREE, "::", web, program=program)
    assert said(before) == "serving"
    six = policy(web, f"{{bind: '[::]:{web}', endpoint: web}}", "'[::]:{}'").replace("web", "six")
    apply(used, before, tmp_path, six)
    assert said(datagrams(used, confine, policy(web))) == "serving"
    send(used, web)
    assert ask(before, "read") == (ALL if without_it else "0 ")


# ---- what is for a service of before


@pytest.mark.parametrize("without_it", ["", "time of a bind"], ids=["", "control"])
@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_a_service_is_not_silenced_by_one_that_had_the_port_before(
    host: Host, without: Without, confine: Confine, tmp_path: Path, kind: str, without_it: str
) -> None:
    used = without(without_it) if without_it else host
    web = used.port()
    other = listener(used, confine, "direct", policy(web)) if kind == "tcp" else datagrams(used, confine, policy(web))
    assert said(other) == "serving"
    other.program.stop()
    with running_service(used, kind, web, tmp_path, DENIED) as service:
        come(used, web) if kind == "tcp" else send(used, web)
        assert ask(service, "read") == ("0 " if without_it else ALL)


MEMBER = UDP.replace(
    "    one.bind((address, port))\n",
    "    one.bind((address, port))\n"
    "    one.setsockopt(0, 35, socket.inet_aton(address) + socket.inet_aton(peer))  # IP_ADD_MEMBERSHIP\n"
    "    peer = ''\n",
)


def test_a_service_of_before_has_its_copy_of_what_is_sent_to_its_group(
    host: Host, confine: Confine, tmp_path: Path
) -> None:
    web, group = host.port(), "239.1.2.3"
    before = datagrams(host, confine, WHOLLY_FREE, group, web, peer=HOST4, program=MEMBER)
    assert said(before) == "serving"
    apply(host, before, tmp_path, DENIED)
    assert said(datagrams(host, confine, policy(web))) == "serving"
    for _ in range(COUNT):
        with udp(host.client, CLIENT4) as client:
            client.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(CLIENT4))
            client.sendto(SECRET, (group, web))
    assert ask(before, "read") == ALL


@pytest.mark.parametrize("sender", ["client", "netns"])
def test_and_of_a_broadcast_whoever_sends_it(host: Host, confine: Confine, tmp_path: Path, sender: str) -> None:
    web, everybody = host.port(), "10.98.0.255"
    before = datagrams(host, confine, WHOLLY_FREE, everybody, web)
    assert said(before) == "serving"
    apply(host, before, tmp_path, DENIED)
    assert said(datagrams(host, confine, policy(web))) == "serving"
    for _ in range(COUNT):
        with udp(getattr(host, sender), "0.0.0.0") as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            one.sendto(SECRET, (everybody, web))
    assert ask(before, "read") == ALL


@pytest.mark.parametrize("without_it", ["", "certain port"], ids=["", "control"])
def test_a_rule_for_a_port_of_the_kernels_choice_grants_no_certain_one(
    host: Host, without: Without, confine: Confine, tmp_path: Path, without_it: str
) -> None:
    used = without(without_it) if without_it else host
    web = used.port()
    before = listener(used, confine, "direct", WHOLLY_FREE, port=web)
    assert said(before) == "serving"
    rule = f"name: t\nendpoints: {{any: '0.0.0.0:dynamic'}}\ningress: [{{bind: '*:{web}', endpoint: any}}]\n"
    apply(used, before, tmp_path, f"{rule}default: deny\n")
    assert said(listener(used, confine, "direct", policy(web))) == ("serving" if without_it else "EADDRINUSE")


# ---- whom an egress rule lends the port

FAILS = """
def fail():
    try:
        t.bind(("0.0.0.0", 77))
    except OSError as error:
        assert error.errno == errno.EADDRINUSE

t = made()
fail()
"""


@pytest.mark.parametrize("without_it", ["", "options of the whole"], ids=["", "control"])
def test_mptcp_joins_no_group_after_a_bind_that_failed(
    host: Host, without: Without, confine: Confine, without_it: str
) -> None:
    used = without(without_it) if without_it else host
    program = SERVER.replace("socket.socket(socket.AF_INET, kind)", "socket.socket(socket.AF_INET, kind, 262)")
    program = program.replace("\nt = made()\n", FAILS, 1)
    with held(used) as taken:
        rules = (
            f"name: t\nendpoints: {{web: '0.0.0.0:{used.port()}', busy: '0.0.0.0:{taken}'}}\n"
            "ingress: [{bind: '*:77', endpoint: busy}]\negress: [{to: 10.0.0.0/8, endpoint: web}]\ndefault: deny\n"
        )
        words = ["/usr/bin/python3", "-ISc", program + ANSWERS, "borrow", CLIENT4, "9"]
        one = confine(used, "direct", rules, within=words)
        assert said(one) == "EAFNOSUPPORT"
        assert ask(one, "join") == ("joins" if without_it else "EPERM")


AGAIN = r"""
import errno, socket, sys
address, port = sys.argv[1], int(sys.argv[2])
one = socket.socket()
one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)
one.setsockopt(socket.SOL_SOCKET, int(sys.argv[3]), 1)

def connect():
    return errno.errorcode.get(one.connect_ex((address, port)), "ok")

print("ready", flush=True)
"""


@pytest.mark.parametrize("option", [ADDR, PORT], ids=["SO_REUSEADDR", "SO_REUSEPORT"])
def test_a_connect_that_found_the_port_taken_succeeds_when_it_is_free(
    host: Host, confine: Confine, option: str
) -> None:
    web = host.port()
    with host.client.listener() as far:
        words = ["/usr/bin/python3", "-ISc", AGAIN + ANSWERS, CLIENT4, str(far.getsockname()[1]), option]
        one = confine(host, "direct", lends(web, "10.0.0.0/8"), within=words)
        assert said(one) == "ready"
        with held(host, web):
            assert ask(one, "connect") == "EADDRINUSE"
        assert ask(one, "connect") == "ok"
