"""By the route of another destination over IPv6, in another namespace, to a service tied to a link; addresses that are
taken for the host's; a broadcast that no rule speaks of.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.hostile.conftest import TRANSPORTS, Confine, Without, lines_of
from tests.hostile.test_thirty_first_reading import (
    ADDRFORM,
    AS_INET,
    BROADCAST,
    CORK,
    DGRAM,
    ELSEWHERE,
    INET,
    INET6,
    OFF,
    ON,
    SO_BROADCAST,
    begun_before,
    granting,
    heard,
    rule,
    service,
)
from tests.hostile.test_twenty_sixth_reading import SEGMENTS, Arena, arrives
from tests.support.building import Programs
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, HOST4, HOST6
from tests.support.shell import AS_NOBODY, Word
from tests.support.udp import udp

pytestmark = pytest.mark.e2e

ELSEWHERE6 = "2001:db8::77"
THERE, BROADCAST_THERE = "10.77.0.1", "10.77.0.255"


# ---- IPv6 ---------------------------------------------------------------------------------------------------------


def reached6(arena: Arena, transport: str, seconds: int) -> bool:
    """Two threads: a datagram for an address far away, by the route to the host's own that is granted at port 53."""
    with service(arena.host, "::") as near:
        port = near.getsockname()[1]
        policy = granting(rule(HOST6, 53, "endpoint: out6"), rule(ELSEWHERE6, port, "endpoint: out6"))
        with arena.mixing(transport, policy, HOST6, 53, ELSEWHERE6, port, seconds, *SEGMENTS) as program:
            return arrives(program, near)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_ipv6_datagram_for_another_address_does_not_arrive_at_the_hosts_own(
    host: Host, programs: Programs, tmp_path: Path, transport: str
) -> None:
    assert not reached6(Arena(host, programs, tmp_path), transport, 4)


@pytest.mark.flaky(reruns=1)  # a race
def test_control_where_its_route_is_not_judged_it_does(without: Without, programs: Programs, tmp_path: Path) -> None:
    assert reached6(Arena(without("astray6"), programs, tmp_path), "born", 30)


def misread_route(host: Host, confine: Confine) -> list[tuple[str, bytes]]:
    """Source and destination are the same address far away, by the route to the host's own."""
    with service(host) as near:
        port = near.getsockname()[1]
        chosen = socket.inet_aton(ELSEWHERE) * 2 + port.to_bytes(2, "big") + bytes(5) + b"\x01"
        rules = f"{{to: {HOST4}, ports: [{port}], action: deny}}"
        policy = f"name: t\negress: [{rules}]\ndefault: {{bind: deny, connect: container}}\n"
        steps: list[Word] = ["make", INET6, DGRAM, 0, "connect", f"::ffff:{HOST4}", 53, "bytes", *CORK, ON]
        steps += ["send", socket.inet_ntop(socket.AF_INET6, chosen), 9, "bytes", *CORK, OFF]
        steps += ["bytes32", *ADDRFORM, AS_INET, "send", "-", "-", "wait"]
        confine(host, "direct", policy, *steps).lines(7)
        return heard(near)


def test_nor_one_that_says_that_it_comes_from_there_too(host: Host, confine: Confine) -> None:
    assert misread_route(host, confine) == []


def test_control_where_its_route_is_not_judged_that_arrives(without: Without, confine: Confine) -> None:
    assert misread_route(without("astray"), confine) == [(ELSEWHERE, b"hello")]


# ---- who receives it, and what counts as the host's ---------------------------------------------------------------


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_neither_at_a_service_that_is_tied_to_a_link(host: Host, confine: Confine, transport: str) -> None:
    with service(host) as near:
        port = near.getsockname()[1]
        near.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0\0")
        policy = granting(rule(HOST4, 53), rule(ELSEWHERE, port))
        confine(host, transport, policy, *begun_before(INET, HOST4, port)).lines(6)
        assert heard(near) == []


def reached_with_help(host: Host, confine: Confine, programs: Programs, transport: str) -> list[tuple[str, bytes]]:
    """A user of the host, under no policy, sends the container's server such a datagram first."""
    with service(host) as near:
        port, web = near.getsockname()[1], host.port()
        policy = (
            f"name: t\nendpoints: {{web: '0.0.0.0:{web}', out: '0.0.0.0:dynamic'}}\n"
            f"ingress: [{{bind: '0.0.0.0:53', endpoint: web}}]\n"
            f"egress: [{rule(HOST4, 53)}, {rule(ELSEWHERE, port)}]\ndefault: deny\n"
        )
        serving: list[Word] = ["make", INET, DGRAM, 0, "bind", "0.0.0.0", 53, "wait"]
        one = confine(host, transport, policy, *serving, *begun_before(INET, HOST4, port))
        assert one.lines(2) == ["make ok", "bind ok"]
        words = [*AS_NOBODY, programs["calls"], *begun_before(INET, HOST4, web)]
        helper = host.start_command(host.netns.command(*words), talk=True)
        assert lines_of(helper, 6)[-1] == "send ok"
        helper.stop()
        one.resume()
        one.lines(8)
        return heard(near)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_no_user_of_the_host_has_it_taken_for_the_hosts(
    host: Host, confine: Confine, programs: Programs, transport: str
) -> None:
    assert reached_with_help(host, confine, programs, transport) == []


# ---- broadcast ----------------------------------------------------------------------------------------------------


@contextmanager
def another_namespace(host: Host, address: str) -> Iterator[socket.socket]:
    """A service in the namespace of an endpoint, whose link has a broadcast address that the host has not."""
    run = host.client.run
    run("ip", "address", "add", f"{THERE}/24", "brd", BROADCAST_THERE, "dev", "eth0")
    run("ip", "-6", "route", "replace", "default", "via", HOST6, "dev", "eth0")
    try:
        with closing(udp(host.client, address)) as sock:
            yield sock
    finally:
        run("ip", "-6", "route", "del", "default")
        run("ip", "address", "del", f"{THERE}/24", "dev", "eth0")


def from_there(host: Host, *rules: str, source: str = "0.0.0.0") -> str:
    where = f"netns: {host.client.name}"
    out, out6 = (f"{{address: '{address}:dynamic', {where}}}" for address in (source, "[::]"))
    return f"name: t\nendpoints: {{out: {out}, out6: {out6}}}\negress: [{', '.join(rules)}]\ndefault: deny\n"


EVERYWHERE = (
    *("{to: 0.0.0.0/0, endpoint: out}", "{to: '::/0', endpoint: out6}"),
    *(f"{{to: {one}, action: deny}}" for one in (THERE, CLIENT4)),
)


def misreading(to: str, port: int) -> list[Word]:
    """The addresses of an IPv6 datagram, read as those of an IPv4 one, by the route to a broadcast address."""
    chosen = socket.inet_aton("127.0.0.1") * 2 + port.to_bytes(2, "big") + bytes(5) + b"\x01"
    steps: list[Word] = ["make", INET6, DGRAM, 0, "option", *SO_BROADCAST, "connect", f"::ffff:{to}", 53]
    steps += ["bytes", *CORK, ON, "send", socket.inet_ntop(socket.AF_INET6, chosen), 9, "bytes", *CORK, OFF]
    return [*steps, "bytes32", *ADDRFORM, AS_INET, "send", "-", "-", "wait"]


@pytest.mark.parametrize("at", ["127.0.0.1", "0.0.0.0"])
def test_a_broadcast_address_of_an_endpoints_namespace_is_granted_by_name_only(
    host: Host, confine: Confine, at: str
) -> None:
    with another_namespace(host, at) as near:
        port = near.getsockname()[1]
        steps: list[Word] = ["make", INET, DGRAM, 0, "option", *SO_BROADCAST, "send", BROADCAST_THERE, port, "wait"]
        confine(host, "swap", from_there(host, *EVERYWHERE), *steps).lines(3)
        confine(host, "swap", from_there(host, *EVERYWHERE), *misreading(BROADCAST_THERE, port)).lines(8)
        assert heard(near) == []


@pytest.mark.parametrize("source", ["0.0.0.0", CLIENT4])
def test_the_addresses_of_an_endpoints_namespace_can_be_sent_to(host: Host, confine: Confine, source: str) -> None:
    with another_namespace(host, "0.0.0.0") as near:
        port = near.getsockname()[1]
        policy = from_there(host, rule(THERE, port), source=source)
        confine(host, "swap", policy, "make", INET, DGRAM, 0, "connect", THERE, port, "send", "-", "-", "wait").lines(3)
        assert len(heard(near)) == 1


def denied_reached(host: Host, confine: Confine) -> list[tuple[str, bytes]]:
    """Everything is the container's own, but for the host's loopback and its address."""
    with service(host, "127.0.0.1") as near:
        rules = ", ".join(f"{{to: {one}, action: deny}}" for one in ("127.0.0.0/8", HOST4))
        policy = f"name: t\negress: [{rules}]\ndefault: {{bind: deny, connect: container}}\n"
        confine(host, "direct", policy, *misreading(BROADCAST, near.getsockname()[1])).lines(8)
        return heard(near)


def test_what_is_denied_is_not_reached_by_broadcast_either(host: Host, confine: Confine) -> None:
    assert denied_reached(host, confine) == []


def test_control_where_a_peer_of_no_rule_is_not_judged_it_is(without: Without, confine: Confine) -> None:
    assert denied_reached(without("broadcasts"), confine) == [("127.0.0.1", b"hello")]
