"""Datagrams by another destination's route: to the host's own sockets, and by broadcast; pings after their rule."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.hostile.conftest import TRANSPORTS, Confine, Without
from tests.hostile.test_afterwards import apply
from tests.hostile.test_pings import ECHO, wire
from tests.hostile.test_pings import policy as pinging
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, CLIENT6, HOST4
from tests.support.shell import Word
from tests.support.udp import udp
from tests.support.wait import PATIENCE

pytestmark = pytest.mark.e2e

INET, INET6, DGRAM, ICMP = 2, 10, 2, 1
CORK, ON, OFF = (17, 1), "01000000", "00000000"
SO_BROADCAST, ADDRFORM, AS_INET = (1, 6), (41, 1), "02000000"
BROADCAST, ELSEWHERE = "10.98.0.255", "203.0.113.77"


def heard(sock: socket.socket, within: float = 0.5) -> list[tuple[str, bytes]]:
    """What has come, and from whom."""
    found = []
    sock.settimeout(within * PATIENCE)
    try:
        while True:
            content, sender = sock.recvfrom(100)
            found.append((str(sender[0]), content))
            sock.settimeout(0.1)
    except TimeoutError:
        return found


@contextmanager
def service(host: Host, address: str = "0.0.0.0") -> Iterator[socket.socket]:
    """A datagram service of the host's own; and the host has a way to every address, and a broadcast address."""
    run = host.netns.run
    run("ip", "address", "replace", f"{HOST4}/24", "brd", BROADCAST, "dev", "eth0")
    run("ip", "route", "replace", "default", "dev", "eth0")
    run("ip", "-6", "route", "replace", "default", "via", CLIENT6, "dev", "eth0")
    try:
        with closing(udp(host.netns, address)) as sock:
            yield sock
    finally:
        run("ip", "route", "del", "default")
        run("ip", "-6", "route", "del", "default")
        run("ip", "address", "del", f"{HOST4}/24", "dev", "eth0")
        run("ip", "address", "add", f"{HOST4}/24", "dev", "eth0")


def granting(*rules: str, default: str = "deny") -> str:
    return (
        "name: t\nendpoints: {out: '0.0.0.0:dynamic', out6: '[::]:dynamic'}\n"
        f"egress: [{', '.join(rules)}]\ndefault: {default}\n"
    )


def rule(to: str, port: int, action: str = "endpoint: out") -> str:
    return f"{{to: '{to}', ports: [{port}], {action}}}"


# ---- begun to one destination, and sent to another one ----------------------------------------------------------


def begun(family: int, to: str, port: int) -> list[Word]:
    """The kernel has the route to the host's own address when the program connects to another one."""
    mapped = "::ffff:" if family == INET6 else ""
    steps: list[Word] = ["make", family, DGRAM, 0, "bytes", *CORK, ON, "send", f"{mapped}{to}", 53]
    return [*steps, "connect", f"{mapped}{ELSEWHERE}", port, "bytes", *CORK, OFF, "wait"]


def begun_before(family: int, to: str, port: int) -> list[Word]:
    """It has the address of a datagram that has left when the program sends one to its peer."""
    mapped = "::ffff:" if family == INET6 else ""
    steps: list[Word] = ["make", family, DGRAM, 0, "connect", f"{mapped}{to}", 53]
    steps += ["bytes", *CORK, ON, "send", f"{mapped}{ELSEWHERE}", port, "bytes", *CORK, OFF]
    return [*steps, "send", "-", "-", "wait"]


WAYS = {"begun": begun, "begun before": begun_before}


def reached(host: Host, confine: Confine, transport: str, way: str, family: int, to: str) -> list[tuple[str, bytes]]:
    """What a service of the host's at every address hears, where only the host's port 53 is granted, and all others."""
    with service(host) as near:
        port = near.getsockname()[1]
        policy = granting(rule(to, 53), rule(ELSEWHERE, port))
        lines = confine(host, transport, policy, *WAYS[way](family, to, port)).lines(5)
        assert lines[0] == "make ok"
        return heard(near)


@pytest.mark.parametrize("to", ["127.0.0.1", HOST4])
@pytest.mark.parametrize("family", [INET, INET6])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_datagram_for_another_address_does_not_arrive_at_the_hosts_own(
    host: Host, confine: Confine, transport: str, way: str, family: int, to: str
) -> None:
    assert reached(host, confine, transport, way, family, to) == []


@pytest.mark.parametrize(("way", "defence"), [("begun", "astray, and begun"), ("begun before", "astray")])
def test_control_where_its_route_is_not_judged_it_does(
    without: Without, confine: Confine, way: str, defence: str
) -> None:
    assert reached(without(defence), confine, "born", way, INET, HOST4) == [(HOST4, b"hello")]


def test_what_another_thread_makes_of_it_the_packet_hook_drops(without: Without, confine: Confine) -> None:
    assert reached(without("begun"), confine, "born", "begun", INET, HOST4) == []


def begun_inside(host: Host, confine: Confine) -> list[tuple[str, bytes]]:
    """What is begun to the container's own loopback has the route to its ferry, on the host's."""
    with service(host) as near:
        port = near.getsockname()[1]
        policy = granting("{to: 0.0.0.0/0, endpoint: out}", f"{{to: {HOST4}, action: deny}}", default="container")
        confine(host, "swap", policy, *begun(INET, "127.0.0.1", port)).lines(5)
        return heard(near)


def test_neither_by_the_route_to_the_containers_own_ferry(host: Host, confine: Confine) -> None:
    assert begun_inside(host, confine) == []


def test_control_by_that_route_it_does(without: Without, confine: Confine) -> None:
    assert begun_inside(without("astray, and begun"), confine)


@pytest.mark.parametrize("source", ["0.0.0.0", HOST4])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_whatever_address_of_the_hosts_is_granted_can_be_sent_to(
    host: Host, confine: Confine, transport: str, source: str
) -> None:
    """One that an endpoint with another address leads to, too, and one that the host has only since then."""
    with service(host) as near:
        port = near.getsockname()[1]
        host.netns.run("ip", "address", "replace", "10.98.0.78/32", "dev", "lo")
        to = ("127.0.0.1", HOST4, "10.98.0.78") if source == "0.0.0.0" else (HOST4, "10.98.0.78")
        policy = granting(*(rule(one, port) for one in to)).replace("0.0.0.0:dynamic", f"{source}:dynamic")
        steps: list[Word] = ["make", INET, DGRAM, 0]
        for one in to:
            steps += ["send", one, port]
        assert confine(host, transport, policy, *steps, "wait").lines(1 + len(to))[1:] == ["send ok"] * len(to)
        assert len(heard(near)) == len(to)


# ---- broadcast ----------------------------------------------------------------------------------------------------

EVERYWHERE = "{to: 0.0.0.0/0, endpoint: out}", "{to: '::/0', endpoint: out6}", f"{{to: {HOST4}, action: deny}}"


def sent_to_all(host: Host, confine: Confine, transport: str, *rules: str, how: str = "send") -> tuple[str, bool]:
    """What came of it, and whether a service of the host's has heard it."""
    with service(host) as near:
        port = near.getsockname()[1]
        steps: list[Word] = ["make", INET, DGRAM, 0, "option", *SO_BROADCAST, how, BROADCAST, port, "wait"]
        lines = confine(host, transport, granting(*rules), *steps).lines(3)
        assert lines[1] == "option ok"
        return lines[2], bool(heard(near))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_rule_for_a_network_does_not_grant_its_broadcast_address(
    host: Host, confine: Confine, transport: str
) -> None:
    assert sent_to_all(host, confine, transport, *EVERYWHERE) == ("send EACCES", False)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_one_that_names_it_does(host: Host, confine: Confine, transport: str) -> None:
    named = f"{{to: {BROADCAST}, endpoint: out}}"
    assert sent_to_all(host, confine, transport, named) == ("send ok", True)
    assert sent_to_all(host, confine, transport, named, how="connect") == ("connect EACCES", False)


def test_explain_says_the_same(host: Host, confine: Confine) -> None:
    with service(host):
        one = confine(host, "direct", granting(*EVERYWHERE), "wait")
        said = host.graft("explain", one.cgroup, "connect", f"{BROADCAST}:9", "--proto", "udp").stdout
        assert "refused" in said, said


def misread(host: Host, confine: Confine, option: str) -> list[tuple[str, bytes]]:
    """The addresses of an IPv6 datagram, which the program chooses, are read as those of an IPv4 one (IPV6_ADDRFORM).
    By the route to a broadcast address the host's own sockets have a copy before the packet hook drops it.
    """
    with service(host, "127.0.0.1") as near:
        port = near.getsockname()[1]
        chosen = socket.inet_aton("127.0.0.1") * 2 + port.to_bytes(2, "big") + bytes(5) + b"\x01"
        steps: list[Word] = ["make", INET6, DGRAM, 0, "option", *SO_BROADCAST, "connect", f"::ffff:{BROADCAST}", 53]
        steps += ["bytes", *CORK, ON, "send", socket.inet_ntop(socket.AF_INET6, chosen), 9, "bytes", *CORK, OFF]
        steps += [option, *ADDRFORM, AS_INET, "send", "-", "-", "wait"]
        lines = confine(host, "born", granting(*EVERYWHERE), *steps).lines(8)
        assert lines[:2] == ["make ok", "option ok"]
        return heard(near)


@pytest.mark.parametrize("option", ["bytes", "bytes32"])
def test_no_datagram_with_chosen_addresses_arrives_on_loopback(host: Host, confine: Confine, option: str) -> None:
    assert misread(host, confine, option) == []


def test_control_where_a_broadcast_address_is_like_others_it_does(without: Without, confine: Confine) -> None:
    assert misread(without("broadcasts"), confine, "bytes") == [("127.0.0.1", b"hello")]


# ---- sockets that ping --------------------------------------------------------------------------------------------


def pings_after_its_rule(host: Host, confine: Confine, tmp_path: Path) -> bool:
    """Whether a socket of born pings when its policy has no rule for ICMP any more, and says nothing of others."""
    host.netns.run("sysctl", "-qw", "net.ipv4.ping_group_range=0 2147483647")
    default = "default: {bind: deny, connect: deny, other: container}\n"
    steps: list[Word] = ["make", INET, DGRAM, ICMP, "content", ECHO, "wait", "send", CLIENT4, 0, "wait"]
    with wire(host, HOST4) as has_arrived:
        one = confine(host, "born", pinging().replace("default: deny\n", default), *steps)
        assert one.lines(1) == ["make ok"]
        apply(host, one, tmp_path, f"name: t\n{default}")
        one.resume()
        one.lines(2)
        return has_arrived()


def test_after_its_rule_a_socket_pings_no_more(host: Host, confine_as_it_is: Confine, tmp_path: Path) -> None:
    assert not pings_after_its_rule(host, confine_as_it_is, tmp_path)


def test_control_where_other_protocols_pass_it_does(
    without: Without, confine_as_it_is: Confine, tmp_path: Path
) -> None:
    assert pings_after_its_rule(without("others"), confine_as_it_is, tmp_path)


@pytest.fixture
def confine_as_it_is(confine: Confine, monkeypatch: pytest.MonkeyPatch) -> Confine:
    """The same with a policy whose default stays as it is: it has transport born by itself."""
    monkeypatch.setattr("tests.hostile.conftest.for_transport", lambda transport, policy: policy)
    return confine
