"""What a forty-fourth reading found at ports that several containers have: notes of who serves there were overwritten,
by one with many addresses and by one that bound at the same moment; and an option that was refused kept a socket from
connecting.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.hostile.conftest import Confine, Confined, Without
from tests.hostile.test_afterwards import apply
from tests.hostile.test_fortieth_reading_ports import ALL, SERVER, come
from tests.hostile.test_fortieth_reading_ports import server as listener
from tests.hostile.test_forty_first_reading_ports import ADDR, WHOLLY_FREE
from tests.hostile.test_forty_second_reading_ports import AGAIN, held
from tests.hostile.test_thirty_eighth_reading_ports import ANSWERS, DENIED, ask, lends
from tests.hostile.test_thirty_sixth_reading_groups import policy, said
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, HOST4
from tests.support.udp import udp

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

CONTROL = pytest.mark.parametrize("is_control", [False, True], ids=["", "control"])

WITH_MANY_ADDRESSES = SERVER.replace(
    "\nt = made()\n",
    """
others = []
def more():
    one = made()
    one.bind(("127.0.0.%d" % (len(others) + 1), 53))
    others.append(one)
    return "more"

def end():
    for one in [t, *others]:
        one.close()
    return "ended"

t = made()
""",
    1,
)
"""One that listens at 0.0.0.0, and at 127.0.0.1 and so on, as servers of DNS do."""


def full_place(host: Host, confine: Confine, folder: Path, web: int) -> tuple[Confined, Confined]:
    """One that has lost the endpoint and listens on, and one that serves there by three requests. A third one has noted
    itself last, and serves on.
    """
    at = f"'{HOST4}:{{}}'"
    before = listener(host, confine, "direct", policy(web, endpoint=at))
    assert said(before) == "serving"
    apply(host, before, folder, policy(web, rules="", endpoint=at))
    words = ["/usr/bin/python3", "-ISc", WITH_MANY_ADDRESSES + ANSWERS, "listen", "0.0.0.0", "53"]
    many = confine(host, "direct", policy(web), within=words)
    assert said(many) == "serving"
    assert [ask(many, "more"), ask(many, "more")] == ["more", "more"]
    assert said(listener(host, confine, "direct", policy(web))) == "serving"
    return before, many


@CONTROL
def test_one_with_many_addresses_takes_no_place_of_anothers(
    host: Host, without: Without, confine: Confine, tmp_path: Path, is_control: bool
) -> None:
    """Who has lost the endpoint hears the clients of who is granted it, when that one has ended."""
    host, web = without("own places") if is_control else host, host.port()
    before, many = full_place(host, confine, tmp_path, web)
    assert ask(many, "more") == "more"
    assert ask(many, "end") == "ended"
    many.program.stop()
    apply(host, many, tmp_path, policy(web, rules=""))
    come(host, web)
    assert ask(before, "read") == (ALL if is_control else "0 ")


@CONTROL
def test_nor_does_a_third_one_where_one_has_many(
    host: Host, without: Without, confine: Confine, tmp_path: Path, is_control: bool
) -> None:
    host, web = without("several places") if is_control else host, host.port()
    before, many = full_place(host, confine, tmp_path, web)
    third = listener(host, confine, "direct", policy(web))
    assert said(third) == "serving"
    assert ask(many, "end") == "ended"
    for one in (many, third):
        one.program.stop()
        apply(host, one, tmp_path, policy(web, rules=""))
    come(host, web)
    assert ask(before, "read") == (ALL if is_control else "0 ")


# ---- two binds at the same moment ---------------------------------------------------------------------

COUNT, FIRST = 400, 21000
AT_EACH = r"""
import errno, os, select, socket, sys, time
address, first, count, cpu, start = sys.argv[1], *map(int, sys.argv[2:5]), float(sys.argv[5])
os.sched_setaffinity(0, {cpu})
every = []
def read():
    got = set()
    while ready := select.select(every, [], [], 0.5)[0]:
        for one in ready:
            one.recv(100)
            got.add(one)
    return len(got)
try:
    for number in range(count):
        every.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        every[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        while time.monotonic() < start + number * 0.004:
            pass
        every[-1].bind((address, first + number))
    print("serving", flush=True)
except OSError as error:
    print(errno.errorcode[error.errno], number, flush=True)
"""
"""Binds so many ports, one in four milliseconds from some time on."""


def with_many_ports(granted: bool) -> str:
    rule = f"{{bind: '*:5000-{5000 + COUNT - 1}', endpoint: many}}" if granted else ""
    return f"name: t\nendpoints: {{many: '0.0.0.0:{FIRST}-{FIRST + COUNT - 1}'}}\ningress: [{rule}]\ndefault: deny\n"


@CONTROL
@pytest.mark.flaky(reruns=2)  # a race
def test_of_two_binds_at_the_same_moment_none_is_forgotten(
    host: Host, without: Without, confine: Confine, tmp_path: Path, is_control: bool
) -> None:
    """One of the two ends; a third one, which had the ports freely, is denied by now, and at one address."""
    host = without("notes at once") if is_control else host

    def start(text: str, address: str, first: int, cpu: int, when: float) -> Confined:
        words = ["/usr/bin/python3", "-ISc", AT_EACH + ANSWERS, address, first, COUNT, cpu, when]
        return confine(host, "direct", text, within=words)

    before = start(WHOLLY_FREE, HOST4, FIRST, 0, 0)
    assert said(before) == "serving"
    apply(host, before, tmp_path, DENIED)
    when = time.monotonic() + 6
    one, other = (start(with_many_ports(True), "0.0.0.0", 5000, cpu, when) for cpu in (0, 1))
    assert [said(one), said(other)] == ["serving", "serving"]
    other.program.stop()
    apply(host, other, tmp_path, with_many_ports(False))
    with udp(host.client, CLIENT4) as client:
        for number in range(COUNT):
            client.sendto(b"x", (HOST4, FIRST + number))
    assert (int(ask(before, "read")) > 0) is is_control


# ---- options that were refused ------------------------------------------------------------------------

JOINS = AGAIN.replace(
    'print("ready", flush=True)',
    """
def join():
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    return "joins"

print("ready", flush=True)
""",
)


@CONTROL
def test_an_option_that_is_refused_keeps_nobody_from_connecting(
    host: Host, without: Without, confine: Confine, is_control: bool
) -> None:
    """A program that sets the option before each try connects when the port that it is lent is free."""
    host = without("refused options") if is_control else host
    web = host.port()
    with host.client.listener() as far:
        words = ["/usr/bin/python3", "-ISc", JOINS + ANSWERS, CLIENT4, str(far.getsockname()[1]), ADDR]
        one = confine(host, "direct", lends(web, "10.0.0.0/8"), within=words)
        assert said(one) == "ready"
        assert ask(one, "join") == "joins"
        with held(host, web):
            assert ask(one, "connect") == "EADDRINUSE"
            assert ask(one, "join") == "EPERM"
        assert ask(one, "connect") == ("EADDRINUSE" if is_control else "ok")
