"""Sockets that ping (ICMP datagram sockets) in transport direct: which are made, and which packets pass."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from graft.datapath.layout import HookDecision
from graft.model.transport import Transport
from graft.policy.reader import load_policy
from tests.support.cgroups import new_cgroup
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, CLIENT6, HOST4, HOST6
from tests.support.puppet import Puppet, puppet

pytestmark = pytest.mark.kernel

ECHO_REPLY, ECHO_REPLY6, EXTENDED_ECHO = 0, 129, 42
NOBODY = 65534
HEAD = f"name: t\nendpoints: {{out: '0.0.0.0:dynamic', out6: '[::]:dynamic', one: '{HOST4}:dynamic'}}\n"
DENY = "default: deny\n"
OPEN = f"""{HEAD}egress:
  - {{to: 0.0.0.0/0, protocol: icmp, endpoint: out}}
  - {{to: '::/0', protocol: icmp, endpoint: out6}}
"""
NOTHING = ("EPERM", "ETIMEDOUT")
"""What a dropped echo request gets; the kernel tells a program only of an IPv4 one."""


class Confined:
    """A process of nobody's in a cgroup of the host's, under one policy after the other."""

    def __init__(self, host: Host, path: Path, process: Puppet) -> None:
        self.host, self.path, self.process, self.id = host, path, process, 0

    def under(self, text: str) -> Puppet:
        """The process, when the policy is in force."""
        graft = self.host.installation
        compiled = graft.compile(load_policy(text, "policy"))
        with graft.transaction() as change:
            if self.id:
                change.containers.remove(graft.containers.find(str(self.path)))
            self.id = change.containers.create(compiled, self.path, self.host.netns.cookie, Transport.DIRECT).id
        return self.process


@pytest.fixture
def confined(host: Host) -> Iterator[Confined]:
    """A process that may ping, as far as the host is concerned."""
    host.netns.run("sysctl", "-qw", f"net.ipv4.ping_group_range={NOBODY} {NOBODY}")
    with new_cgroup("ping") as path, puppet(path, host.netns.path, NOBODY) as process:
        yield Confined(host, path, process)
        host.remove_at(path)


def ping(process: Puppet, address: str, *kind: int) -> object:
    """An echo request, and the answer to it: its type and its sender, or an errno."""
    six = ":" in address
    fd = process.socket("icmpv6" if six else "icmp", 6 if six else 4)
    process.say("patience", fd, 1)
    sent = process.say("ping", fd, address, 0, *kind)
    return sent if sent != "ok" else process.say("await ping", fd)


@pytest.mark.parametrize("address, reply", [(CLIENT4, ECHO_REPLY), (CLIENT6, ECHO_REPLY6)])
def test_a_rule_for_icmp_lets_a_container_ping(confined: Confined, address: str, reply: int) -> None:
    assert ping(confined.under(OPEN + DENY), address) == [reply, address]


@pytest.mark.parametrize("protocol", ["", "protocol: udp, "])
def test_without_a_rule_for_icmp_no_such_socket_is_made(confined: Confined, protocol: str) -> None:
    process = confined.under(HEAD + f"egress: [{{to: 0.0.0.0/0, {protocol}endpoint: out}}]\n" + DENY)
    assert process.say("socket", "icmp", 4) in ("EPERM", "EACCES")
    assert process.say("socket", "icmpv6", 6) in ("EPERM", "EACCES")


def test_the_hosts_range_of_groups_applies(confined: Confined) -> None:
    process = confined.under(OPEN + DENY)
    confined.host.netns.run("sysctl", "-qw", f"net.ipv4.ping_group_range={NOBODY - 1} {NOBODY - 1}")
    assert process.say("socket", "icmp", 4) == "EACCES"


def test_only_granted_destinations_get_an_echo_request(confined: Confined) -> None:
    text = OPEN.replace("0.0.0.0/0", "192.0.2.0/24").replace("::/0", "2001:db8:ffff::/48") + DENY
    process = confined.under(text)
    for address in (CLIENT4, CLIENT6, "127.0.0.1", "::1", HOST4, HOST6):
        assert ping(process, address) in NOTHING
    assert confined.host.decisions(confined.id)[HookDecision.DROPPED] == 6


def test_loopback_needs_a_rule_of_its_own(confined: Confined) -> None:
    process = confined.under(OPEN + DENY)
    assert ping(process, "127.0.0.1") in NOTHING and ping(process, "::1") in NOTHING
    process = confined.under(OPEN + "  - {to: 127.0.0.0/8, protocol: icmp, endpoint: out}\n" + DENY)
    assert ping(process, "127.0.0.1") == [ECHO_REPLY, "127.0.0.1"]


def test_a_rule_that_denies_everything_of_a_destination_denies_pings(confined: Confined) -> None:
    process = confined.under(OPEN + f"  - {{to: {CLIENT4}, action: deny}}\n")
    assert ping(process, CLIENT4) == "EPERM"
    assert ping(process, CLIENT6) == [ECHO_REPLY6, CLIENT6]
    process = confined.under(OPEN + f"  - {{to: {CLIENT4}, action: deny, ports: [80]}}\n")
    assert ping(process, CLIENT4) == [ECHO_REPLY, CLIENT4]


def test_the_default_container_lets_pings_through_that_no_rule_names(confined: Confined) -> None:
    text = HEAD + f"egress: [{{to: {CLIENT6}, protocol: icmp, action: deny}}]\n"
    process = confined.under(text)
    assert ping(process, CLIENT4) == [ECHO_REPLY, CLIENT4]
    assert ping(process, CLIENT6) in NOTHING


def test_other_types_are_dropped(confined: Confined) -> None:
    """The kernel sends extended echo requests too (RFC 8335), which ask for an interface by its name."""
    process = confined.under(OPEN + DENY)
    confined.host.netns.run("sysctl", "-qw", f"net.ipv4.ping_group_range=0 {NOBODY}")
    assert ping(process, CLIENT4, EXTENDED_ECHO) == "EPERM"


def test_an_endpoint_with_an_address_is_the_source(confined: Confined) -> None:
    host, process = confined.host, confined.under(OPEN.replace("endpoint: out}", "endpoint: one}") + DENY)
    other = "10.98.0.77"
    host.netns.run("ip", "address", "replace", f"{other}/32", "dev", "lo")
    assert ping(process, CLIENT4) == [ECHO_REPLY, CLIENT4]
    fd = process.socket("icmp", 4)
    assert process.say("bind", fd, other, 0) == "ok"
    assert process.say("ping", fd, CLIENT4, 0) == "EPERM"


def test_a_rule_that_is_removed_stops_the_answers_too(confined: Confined) -> None:
    process = confined.under(OPEN + DENY)
    fd = process.socket("icmp", 4)
    assert process.say("ping", fd, CLIENT4, 0) == "ok"
    assert process.say("await ping", fd) == [ECHO_REPLY, CLIENT4]
    confined.under(HEAD + DENY)
    assert process.say("ping", fd, CLIENT4, 0) == "EPERM"


def test_a_connected_socket_pings_too(confined: Confined) -> None:
    process = confined.under(OPEN + DENY)
    fd = process.socket("icmp", 4)
    assert process.say("connect", fd, CLIENT4, 7) == "ok"
    assert process.say("ping", fd, CLIENT4, 0) == "ok"
    assert process.say("await ping", fd) == [ECHO_REPLY, CLIENT4]
    assert ping(confined.under(OPEN.replace("0.0.0.0/0", "192.0.2.1") + DENY), CLIENT4) == "EPERM"


def test_raw_sockets_are_never_made(confined: Confined) -> None:
    process = confined.under(OPEN + DENY)
    assert process.say("raw", socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) == "EPERM"


@pytest.mark.parametrize(
    "family, level, name", [("icmp", 0, 15), ("icmpv6", 41, 78), ("icmpv6", 41, 75), ("icmp", 1, 25)]
)
def test_a_source_that_is_not_the_hosts_cannot_be_asked_for(
    confined: Confined, family: str, level: int, name: int
) -> None:
    process = confined.under(OPEN + DENY)
    fd = process.socket(family, 6 if family == "icmpv6" else 4)
    assert process.say("option", fd, level, name, 1) in ("EPERM", "EACCES")
    assert process.say("option", fd, 0 if family == "icmp" else 41, 2 if family == "icmp" else 16, 9) == "ok"  # TTL
