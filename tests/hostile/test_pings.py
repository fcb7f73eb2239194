"""Sockets that ping: what they send is judged by its packet alone, because the kernel calls no hook for a send."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import pytest

from tests.hostile.conftest import Confine, Confined, Without
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, CLIENT6, HOST4
from tests.support.wait import until

pytestmark = pytest.mark.e2e

INET, INET6, DGRAM, RAW, PACKET, ICMP, ICMP6 = 2, 10, 2, 3, 17, 1, 58
ECHO, ECHO6 = "0800000000000001", "8000000000000001"
OTHER4, FOREIGN6 = "10.98.0.79", "fd98::bad"
IP_PKTINFO, IPV6_FREEBIND = 8, 78


def policy(to: str = CLIENT4, source: str = "0.0.0.0") -> str:
    return (
        f"name: t\nendpoints: {{out: '{source}:dynamic', out6: '[::]:dynamic'}}\negress:\n"
        f"  - {{to: {to}, protocol: icmp, endpoint: out}}\n"
        f"  - {{to: '{CLIENT6}', protocol: icmp, endpoint: out6}}\ndefault: deny\n"
    )


@pytest.fixture(autouse=True)
def _may_ping(host: Host) -> None:
    host.netns.run("sysctl", "-qw", "net.ipv4.ping_group_range=0 2147483647")


@contextmanager
def wire(host: Host, source: str) -> Iterator[Callable[[], bool]]:
    """Tells whether an echo request from that source has reached the client."""
    family = socket.AF_INET6 if ":" in source else socket.AF_INET
    address, request = socket.inet_pton(family, source), 128 if ":" in source else 8
    where, icmp, at = (8, ICMP6, 40) if ":" in source else (12, ICMP, 20)
    with host.client.inside():
        tap = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x86DD if ":" in source else 0x0800))
    with closing(tap):

        def has_arrived() -> bool:
            try:
                while True:
                    got = tap.recv(200, socket.MSG_DONTWAIT)
                    is_request = got[6 if ":" in source else 9] == icmp and got[at] == request
                    if is_request and got[where : where + len(address)] == address:
                        return True
            except BlockingIOError:
                return False

        yield has_arrived


def ping_another(host: Host, confine: Confine, transport: str) -> Confined:
    """An echo request to a destination that no rule grants."""
    steps = ["make", INET, DGRAM, ICMP, "content", ECHO, "send", CLIENT4, 0, "receive", "wait"]
    return confine(host, transport, policy(to="192.0.2.1"), *steps)


@pytest.mark.parametrize("transport", ["direct", "born"])
def test_an_echo_request_goes_only_where_a_rule_lets_it(host: Host, confine: Confine, transport: str) -> None:
    assert ping_another(host, confine, transport).lines(3) == ["make ok", "send EPERM", "receive none"]


def test_control_without_the_packet_hook_it_is_answered(without: Without, confine: Confine) -> None:
    assert ping_another(without("packets out"), confine, "direct").lines(2) == ["make ok", "send ok"]


@pytest.mark.parametrize("transport", ["direct", "born"])
@pytest.mark.parametrize(
    "family, kind, protocol", [(INET, RAW, ICMP), (INET, RAW, 255), (INET6, RAW, ICMP6), (PACKET, DGRAM, 0)]
)
def test_raw_and_packet_sockets_are_never_the_hosts(
    host: Host, confine: Confine, transport: str, family: int, kind: int, protocol: int
) -> None:
    one = confine(host, transport, policy(), "make", family, kind, protocol, "wait")
    assert one.lines(1) == ["make EPERM"]


def from_another_address(host: Host, confine: Confine) -> Confined:
    """A control message names an address of the host's that is not the endpoint's."""
    host.netns.run("ip", "address", "replace", f"{OTHER4}/32", "dev", "lo")
    where = struct.pack("=i4s4s", 0, socket.inet_aton(OTHER4), bytes(4)).hex()
    steps = ["make", INET, DGRAM, ICMP, "content", ECHO, "cmsg", 0, IP_PKTINFO, where, CLIENT4, 0, "wait"]
    return confine(host, "direct", policy(source=HOST4), *steps)


def test_an_echo_request_leaves_from_its_rules_endpoint_only(host: Host, confine: Confine) -> None:
    with wire(host, OTHER4) as has_arrived:
        assert from_another_address(host, confine).lines(2) == ["make ok", "cmsg EPERM"]
        assert not has_arrived()


def test_control_without_the_defence_it_leaves_from_another(without: Without, confine: Confine) -> None:
    host = without("ping source")
    with wire(host, OTHER4) as has_arrived:
        assert from_another_address(host, confine).lines(2) == ["make ok", "cmsg ok"]
        assert until("the echo request", has_arrived)


def from_no_address_of_the_hosts(host: Host, confine: Confine) -> Confined:
    """IPV6_FREEBIND, and a bind to an address that the host does not have."""
    steps = ["make", INET6, DGRAM, ICMP6, "option", 41, IPV6_FREEBIND, "bind", FOREIGN6, 0, "content", ECHO6]
    return confine(host, "direct", policy(), *steps, "send", CLIENT6, 0, "wait")


def test_an_echo_request_does_not_leave_from_an_address_that_is_not_the_hosts(host: Host, confine: Confine) -> None:
    with wire(host, FOREIGN6) as has_arrived:
        lines = from_no_address_of_the_hosts(host, confine).lines(4)
        assert lines[1:3] == ["option EPERM", "bind EADDRNOTAVAIL"]
        assert not has_arrived()


def test_control_without_the_defence_it_does(without: Without, confine: Confine) -> None:
    host = without("free source")
    with wire(host, FOREIGN6) as has_arrived:
        assert from_no_address_of_the_hosts(host, confine).lines(4)[1:] == ["option ok", "bind ok", "send ok"]
        assert until("the echo request", has_arrived)
