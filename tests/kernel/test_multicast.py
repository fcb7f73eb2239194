"""Multicast groups of an endpoint, and broadcast, in transport direct: who joins, who receives, who sends."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import closing
from ipaddress import ip_address

import pytest

from graft.model.transport import Transport
from graft.policy.reader import load_policy
from tests.support.cgroups import new_cgroup
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, CLIENT6, HOST4
from tests.support.puppet import Puppet, puppet
from tests.support.wait import PATIENCE

pytestmark = pytest.mark.kernel

GROUP4, OTHER4, GROUP6, OTHER6 = "239.1.1.1", "239.1.1.2", "ff02::1:fb", "ff02::1:fc"
SOL_IP, SOL_IPV6 = 0, 41
IP_MULTICAST_IF, IP_ADD_MEMBERSHIP, MCAST_JOIN_GROUP = 32, 35, 42
IP_ADD_SOURCE_MEMBERSHIP, MCAST_JOIN_SOURCE_GROUP = 39, 46
IPV6_JOIN_GROUP = 20
REFUSED = ("EPERM", "EACCES")


@pytest.fixture
def interface(host: Host) -> int:
    """The number of the host's interface to the client."""
    with host.netns.inside():
        return next(number for number, name in socket.if_nameindex() if name != "lo")


@pytest.fixture
def port(host: Host) -> int:
    """Of the endpoints with groups; the next one is that of the endpoint without."""
    return host.ports(2)


@pytest.fixture
def process(host: Host, port: int) -> Iterator[Puppet]:
    """A process under a policy with groups, which sends to the first one of each family only."""
    text = f"""
name: t
endpoints:
  m4: {{address: "0.0.0.0:{port}", multicast: [{GROUP4}]}}
  m6: {{address: "[::]:{port}", multicast: ["{GROUP6}"]}}
  plain: "0.0.0.0:{port + 1}"
  out: 0.0.0.0:dynamic
  out6: "[::]:dynamic"
ingress:
  - {{bind: "*:5353", endpoint: m4}}
  - {{bind: "*:5353", endpoint: m6}}
  - {{bind: "*:80", endpoint: plain}}
egress:
  - {{to: 0.0.0.0/0, endpoint: out}}
  - {{to: {GROUP4}, ports: [5353], endpoint: out}}
  - {{to: 10.98.0.255, endpoint: out}}
  - {{to: "::/0", endpoint: out6}}
  - {{to: "{GROUP6}", endpoint: out6}}
default: deny
"""
    graft = host.installation
    compiled = graft.compile(load_policy(text, "policy"))
    with new_cgroup("multicast") as path, puppet(path, host.netns.path, 65534) as one:
        with graft.transaction() as change:
            container = change.containers.create(compiled, path, host.netns.cookie, Transport.DIRECT)
        yield one
        host.remove(container)


def bound(process: Puppet, family: int = 4, port: int = 5353) -> int:
    fd = process.socket("udp", family)
    if family == 6:
        assert process.say("option", fd, SOL_IPV6, 26, 1) == "ok"  # IPV6_V6ONLY
    assert process.say("bind", fd, "0.0.0.0" if family == 4 else "::", port) == "ok"
    process.say("patience", fd, 0.5)
    return fd


def join(process: Puppet, fd: int, group: str, interface: int, new: bool = False) -> str:
    """Join by the family's own option, or by the common one (RFC 3678)."""
    packed = ip_address(group).packed
    if new:
        six = len(packed) > 4
        address = struct.pack("=HHI", socket.AF_INET6, 0, 0) if six else struct.pack("=HH", socket.AF_INET, 0)
        value = struct.pack("=I4x", interface) + (address + packed).ljust(128, b"\0")
        return str(process.say("bytes", fd, SOL_IP if len(packed) == 4 else SOL_IPV6, MCAST_JOIN_GROUP, value.hex()))
    if len(packed) == 4:
        return str(process.say("bytes", fd, SOL_IP, IP_ADD_MEMBERSHIP, (packed + struct.pack("=4xi", interface)).hex()))
    return str(process.say("bytes", fd, SOL_IPV6, IPV6_JOIN_GROUP, (packed + struct.pack("=I", interface)).hex()))


def send_from_client(host: Host, group: str, port: int) -> None:
    with host.client.inside():
        family = socket.AF_INET6 if ":" in group else socket.AF_INET
        number = next(number for number, name in socket.if_nameindex() if name != "lo")
        sock = socket.socket(family, socket.SOCK_DGRAM)
    with closing(sock):
        if family == socket.AF_INET:
            sock.setsockopt(SOL_IP, IP_MULTICAST_IF, socket.inet_aton(CLIENT4))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            sock.sendto(b"to the group", (group, port))
        else:
            sock.sendto(b"to the group", (group, port, 0, number))


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("group", [GROUP4, GROUP6])
def test_a_socket_at_the_endpoint_joins_its_group_and_receives(
    host: Host, process: Puppet, port: int, interface: int, group: str, new: bool
) -> None:
    fd = bound(process, ip_address(group).version)
    assert join(process, fd, group, interface, new) == "ok"
    send_from_client(host, group, port)
    assert process.say("receive", fd)[0] == "to the group"


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("group", [OTHER4, OTHER6])
def test_another_group_is_refused(process: Puppet, interface: int, group: str, new: bool) -> None:
    assert join(process, bound(process, ip_address(group).version), group, interface, new) in REFUSED


def test_a_socket_elsewhere_does_not_join(process: Puppet, interface: int) -> None:
    assert join(process, process.socket("udp"), OTHER4, interface) in REFUSED
    assert join(process, bound(process, 4, 80), GROUP4, interface) in REFUSED


def test_a_socket_may_join_before_it_is_bound_but_receives_only_where_the_group_is(
    host: Host, process: Puppet, port: int, interface: int
) -> None:
    fd, elsewhere = process.socket("udp"), process.socket("udp")
    for one, asked in ((fd, 5353), (elsewhere, 80)):
        assert join(process, one, GROUP4, interface) == "ok"
        assert process.say("bind", one, "0.0.0.0", asked) == "ok"
        process.say("patience", one, 0.5)
    send_from_client(host, GROUP4, port)
    assert process.say("receive", fd)[0] == "to the group"
    send_from_client(host, GROUP4, port + 1)
    assert process.say("receive", elsewhere) == "ETIMEDOUT"


def test_what_a_policy_cannot_name_is_refused(process: Puppet, interface: int) -> None:
    fd, group = bound(process), ip_address(GROUP4).packed
    for name in (IP_ADD_SOURCE_MEMBERSHIP, MCAST_JOIN_SOURCE_GROUP, 41, 48):
        assert process.say("bytes", fd, SOL_IP, name, (group + bytes(260)).hex()) in REFUSED
    # As long as more than a page: the kernel would read it again from the program's memory.
    value = group + struct.pack("=4xi", interface)
    assert process.say("bytes", fd, SOL_IP, IP_ADD_MEMBERSHIP, value.ljust(5000, b"\0").hex()) in REFUSED
    assert process.say("bytes", fd, SOL_IP, IP_ADD_MEMBERSHIP, value[:7].hex()) in (*REFUSED, "EINVAL")


def test_a_group_that_somebody_else_joined_is_not_received(
    host: Host, process: Puppet, port: int, interface: int
) -> None:
    """IP_MULTICAST_ALL, by default: a socket receives at its port what any other of the host has joined."""
    fd = bound(process)
    with host.netns.inside():
        other = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with closing(other):
        value = ip_address(OTHER4).packed + struct.pack("=4xi", interface)
        other.setsockopt(SOL_IP, IP_ADD_MEMBERSHIP, value)
        send_from_client(host, OTHER4, port)
        assert process.say("receive", fd) == "ETIMEDOUT"
    assert join(process, fd, GROUP4, interface) == "ok"
    send_from_client(host, GROUP4, port)
    assert process.say("receive", fd)[0] == "to the group"


def test_sending_to_a_group_needs_a_rule_that_names_it(host: Host, process: Puppet, port: int, interface: int) -> None:
    fd = bound(process)
    assert process.say("bytes", fd, SOL_IP, IP_MULTICAST_IF, struct.pack("=8xi", interface).hex()) == "ok"
    with host.client.inside():
        member = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        number = next(number for number, name in socket.if_nameindex() if name != "lo")
    with closing(member):
        member.bind(("", 5353))
        member.settimeout(10 * PATIENCE)
        member.setsockopt(SOL_IP, IP_ADD_MEMBERSHIP, ip_address(GROUP4).packed + struct.pack("=4xi", number))
        assert process.say("sendto", fd, GROUP4, 5353) == "ok"
        assert member.recvfrom(100) == (b"hello", (HOST4, port))
    assert process.say("sendto", fd, GROUP4, 5354) == "EACCES"
    assert process.say("sendto", fd, OTHER4, 5353) == "EACCES"
    assert process.say("sendto", process.socket("udp"), OTHER4, 5353) == "EACCES"
    assert process.say("sendto", fd, CLIENT4, 5353) == "ok"
    six = bound(process, 6)
    assert process.say("sendto", six, OTHER6, 5353) == "EACCES"
    assert process.say("bytes", six, SOL_IPV6, 17, struct.pack("=I", interface).hex()) == "ok"
    assert process.say("sendto", six, GROUP6, 5353) == "ok"
    assert process.say("sendto", six, CLIENT6, 5353) == "ok"


def test_broadcast_needs_a_rule_that_names_it(process: Puppet) -> None:
    fd = process.socket("udp")
    assert process.say("option", fd, socket.SOL_SOCKET, socket.SO_BROADCAST, 1) == "ok"
    assert process.say("sendto", fd, "255.255.255.255", 9) == "EACCES"
    assert process.say("sendto", fd, "10.98.0.255", 9) == "ok"
    assert process.say("sendto", process.socket("udp"), "10.98.0.255", 9) == "EACCES"  # the kernel's: no SO_BROADCAST


def test_a_policy_without_groups_permits_no_option_of_multicast(host: Host) -> None:
    text = f"name: t\nendpoints: {{plain: '0.0.0.0:{host.port()}'}}\ningress: [{{bind: '*:80', endpoint: plain}}]\n"
    graft = host.installation
    compiled = graft.compile(load_policy(text + "default: deny\n", "policy"))
    with new_cgroup("multicast") as path, puppet(path, host.netns.path) as one:
        with graft.transaction() as change:
            container = change.containers.create(compiled, path, host.netns.cookie, Transport.DIRECT)
        fd = bound(one, 4, 80)
        for name in (32, 33, 34, 36, 49):
            assert one.say("option", fd, SOL_IP, name, 1) in REFUSED
        host.remove(container)


def test_an_endpoint_keeps_its_groups_in_the_map_and_loses_them(host: Host) -> None:
    host.graft("ep", "add", "mdns", "0.0.0.0:5353", "--multicast", "224.0.0.251", "--multicast", GROUP4)
    both = (ip_address("224.0.0.251"), ip_address(GROUP4))
    assert host.installation.endpoints.find("mdns").endpoint.multicast == both
    host.graft("ep", "set", "mdns", "0.0.0.0:5353", "--multicast", GROUP4)
    assert host.installation.endpoints.find("mdns").endpoint.multicast == (ip_address(GROUP4),)
    host.graft("ep", "del", "mdns")
    assert not list(host.maps.groups.keys())
