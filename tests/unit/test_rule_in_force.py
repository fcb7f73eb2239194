"""Which of the rules in force decides, and how a traced decision is shown: of both families."""

from __future__ import annotations

from datetime import datetime
from ipaddress import ip_address

import pytest

from graft.commands.policy_show import ActiveRule
from graft.commands.rule_in_force import deciding_bind, deciding_destination
from graft.commands.trace import Traced
from graft.datapath.decisions import Event
from graft.datapath.layout import TracedCall, TracedOutcome

WIDE4 = ActiveRule("egress", "any", "10.0.0.0/8", 0, 65535, "out = 0.0.0.0:dynamic")
NARROW4 = ActiveRule("egress", "tcp", "10.1.0.0/16", 80, 80, "deny")
WIDE6 = ActiveRule("egress", "any", "[fd00::]/8", 0, 65535, "out6 = [::]:dynamic")
NARROW6 = ActiveRule("egress", "any", "[fd00::1]/128", 0, 65535, "deny")
BINDS = [
    ActiveRule("ingress", "any", "0.0.0.0", 80, 80, "a = 0.0.0.0:8080"),
    ActiveRule("ingress", "tcp", "[::]", 80, 80, "b = [::]:8080"),
    ActiveRule("ingress", "any", "* (IPv6)", 80, 89, "c = [::]:9090"),
]


@pytest.mark.parametrize(
    ("protocol", "ip", "port", "expected"),
    [
        ("tcp", "10.2.0.1", 80, WIDE4),
        ("tcp", "10.1.0.1", 80, NARROW4),
        ("tcp", "10.1.0.1", 81, None),  # the longest prefix that has the protocol decides
        ("udp", "10.1.0.1", 81, WIDE4),
        ("tcp", "fd00::2", 80, WIDE6),
        ("udp", "fd00::1", 80, NARROW6),
        ("tcp", "2001:db8::1", 80, None),
    ],
)
def test_the_longest_prefix_decides(protocol: str, ip: str, port: int, expected: ActiveRule | None) -> None:
    rules = [WIDE4, NARROW4, WIDE6, NARROW6, *BINDS]
    assert deciding_destination(rules, protocol, ip_address(ip), port) == expected


@pytest.mark.parametrize(
    ("protocol", "ip", "port", "expected"),
    [
        ("udp", "0.0.0.0", 80, BINDS[0]),
        ("tcp", "::", 80, BINDS[1]),
        ("udp", "::", 80, BINDS[2]),
        ("tcp", "fd00::1", 85, BINDS[2]),
        ("tcp", "127.0.0.1", 80, None),
    ],
)
def test_the_address_itself_decides_before_any(protocol: str, ip: str, port: int, expected: ActiveRule | None) -> None:
    assert deciding_bind([WIDE4, *BINDS], protocol, ip_address(ip), port) == expected


@pytest.mark.parametrize(
    ("ip", "shown", "address"), [("fd00::1", "[fd00::1]:80", "fd00::1"), ("10.1.0.1", "10.1.0.1:80", "10.1.0.1")]
)
def test_addresses_are_shown_as_they_are_written(ip: str, shown: str, address: str) -> None:
    event = Event(0, 1, TracedCall.CONNECT, TracedOutcome.REFUSED, 7, 7, "x", ip_address(ip), 80, 6)
    traced = Traced(event, datetime(2026, 1, 2, 3, 4, 5), "web", "x[7]", None, None)
    assert str(traced) == f"03:04:05.000000 web x[7] connect tcp {shown} -> refused"
    assert traced.record["address"] == address
