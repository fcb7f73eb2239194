"""Multicast: a program with one group granted wants others, and to send where no rule lets it."""

from __future__ import annotations

import socket

import pytest

from tests.hostile.conftest import Confine, Confined, Without
from tests.hostile.test_datagrams import DGRAM, GROUP4, INET, datagrams, send_to_group
from tests.support.installation import Host
from tests.support.namespaces import HOST4

pytestmark = pytest.mark.e2e

OURS = "239.1.2.4"
IP_ADD_MEMBERSHIP = 35
PAGE = 4096


def policy(port: int) -> str:
    return (
        f"name: t\nendpoints: {{found: {{address: '0.0.0.0:{port}', multicast: [{OURS}]}}, out: '0.0.0.0:dynamic'}}\n"
        f"ingress: [{{bind: '*:5353', endpoint: found}}]\negress: [{{to: 0.0.0.0/0, endpoint: out}}]\ndefault: deny\n"
    )


def request(group: str) -> str:
    """struct ip_mreq."""
    return (socket.inet_aton(group) + socket.inet_aton(HOST4)).hex()


def hears_another_group(host: Host, confine: Confine, transport: str) -> str:
    """What it receives of a group that it has joined by a 32-bit call, which no hook sees."""
    port = host.port()
    steps = ["make", INET, DGRAM, 0, "bind", "0.0.0.0", 5353, "bytes32", 0, IP_ADD_MEMBERSHIP, request(GROUP4)]
    one = confine(host, transport, policy(port), *steps, "wait", "receive", "wait")
    assert one.lines(3)[1:] == ["bind ok", "bytes32 ok"]
    send_to_group(host, port)
    one.resume()
    return one.lines(4)[-1]


@pytest.mark.parametrize("transport", ["direct", "born"])
def test_it_receives_no_other_group(host: Host, confine: Confine, transport: str) -> None:
    assert hears_another_group(host, confine, transport) == "receive none"


def test_control_without_the_defence_it_receives_another(without: Without, confine: Confine) -> None:
    assert hears_another_group(without("groups"), confine, "direct") == "receive stranger"


def joins(host: Host, confine: Confine, value: str) -> Confined:
    steps = ["make", INET, DGRAM, 0, "bind", "0.0.0.0", 5353, "bytes", 0, IP_ADD_MEMBERSHIP, value]
    return confine(host, "direct", policy(host.port()), *steps, "wait")


@pytest.mark.parametrize("group, result", [(OURS, "ok"), (GROUP4, "EPERM")])
def test_it_joins_no_other_group(host: Host, confine: Confine, group: str, result: str) -> None:
    assert joins(host, confine, request(group)).lines(3)[-1] == f"bytes {result}"


def test_control_without_the_defence_it_joins_another(without: Without, confine: Confine) -> None:
    assert joins(without("groups"), confine, request(GROUP4)).lines(3)[-1] == "bytes ok"


def sends_to_a_group(host: Host, confine: Confine, to: str) -> Confined:
    with datagrams(host) as far:
        steps = ["make", INET, DGRAM, 0, "option", 1, 6, "send", to, far.getsockname()[1], "wait"]
        return confine(host, "direct", policy(host.port()), *steps)


@pytest.mark.parametrize("to", [GROUP4, OURS, "255.255.255.255"])
def test_a_rule_for_everything_does_not_let_it_send_to_all(host: Host, confine: Confine, to: str) -> None:
    """Not even to the group that it may join."""
    assert sends_to_a_group(host, confine, to).lines(3)[1:] == ["option ok", "send EACCES"]
