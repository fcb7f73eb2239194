"""Binds of port 0, and endpoints that are a range of ports: what the hooks make of them in a direct container."""

from __future__ import annotations

import ctypes
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graft.datapath.layout import HookDecision
from graft.model.ports import mapped_port
from graft.model.transport import Transport
from graft.policy.model import Default, Policy, policy_from_flags
from graft.state.records import Container
from tests.kernel.test_hooks import tag_of
from tests.support.cgroups import new_cgroup
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, CLIENT6, HOST4, HOST6
from tests.support.puppet import Puppet, puppet
from tests.support.wait import until

pytestmark = pytest.mark.kernel

Confine = Callable[..., tuple[Container, Puppet]]
ADDRESS_WITHOUT_PORT = 24  # IP_BIND_ADDRESS_NO_PORT of linux/in.h


@pytest.fixture
def confine(host: Host) -> Iterator[Confine]:
    """Puts a process into a direct container that has these rules and may do nothing else."""
    with ExitStack() as stack:

        def make(ingress: list[str], egress: list[str] | None = None) -> tuple[Container, Puppet]:
            path = stack.enter_context(new_cgroup("ports"))
            one = stack.enter_context(puppet(path, host.netns.path))
            compiled = host.installation.compile(rules(ingress, egress))
            with host.installation.transaction() as change:
                container = change.containers.create(compiled, path, host.netns.cookie, Transport.DIRECT)
            stack.callback(lambda: host.remove(container))
            return container, one

        yield make


def rules(ingress: list[str], egress: list[str] | None = None) -> Policy:
    made = policy_from_flags("ports", ingress, egress or [])
    return replace(made, bind_default=Default.DENY, connect_default=Default.DENY)


def local_ports(host: Host, *query: str) -> set[int]:
    """The local ports of the sockets that `ss` lists."""
    return {int(line.split()[3].rpartition(":")[2]) for line in host.netns.run("ss", "-Han", *query).splitlines()}


CASES = [("tcp", 4, HOST4), ("tcp", 6, HOST6), ("udp", 4, HOST4), ("udp", 6, HOST6)]
CASE_NAMES = [f"{protocol}{family}" for protocol, family, _ in CASES]


def wildcard(family: int) -> str:
    return "0.0.0.0" if family == 4 else "::"


def spec(family: int, ports: str) -> str:
    return f"0.0.0.0:{ports}" if family == 4 else f"[::]:{ports}"


def dual(family: int) -> bool:
    """In direct no socket can be made an IPv6-only one."""
    return family == 6


def exchange(host: Host, process: Puppet, protocol: str, fd: int, address: str, port: int) -> object:
    """What a server at the socket ``fd`` receives from the client beside the host, or whether it is reached."""
    if protocol == "tcp":
        assert process.say("listen", fd) == "ok"
        return host.client.reaches(address, port, 2)
    with host.client.inside(), closing(socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, 2)) as one:
        one.sendto(b"rtp", (address, port))
    return process.say("receive", fd)[0] == "rtp"


@pytest.mark.parametrize(("protocol", "family", "address"), CASES, ids=CASE_NAMES)
def test_a_bind_of_port_0_shows_the_port_that_it_got_and_is_reached_there(
    host: Host, confine: Confine, protocol: str, family: int, address: str
) -> None:
    name = host.endpoint(spec(family, "dynamic"), dual_stack=dual(family))
    _, process = confine([f"*:0={name}"])
    fd = process.socket(protocol, family)
    assert process.say("bind", fd, wildcard(family), 0) == "ok"
    shown, port = process.say("name", fd)
    assert shown == wildcard(family) and port
    assert exchange(host, process, protocol, fd, address, port) is True
    assert process.say("name", fd) == [shown, port]
    tag = tag_of(host, process, fd)
    assert tag is not None and (tag.port, tag.bound_port) == (0, port)


def test_an_accepted_connection_of_port_0_shows_the_real_port_too(host: Host, confine: Confine) -> None:
    _, process = confine([f"0.0.0.0:0={host.endpoint('0.0.0.0:dynamic')}"])
    fd = process.socket()
    process.say("bind", fd, "0.0.0.0", 0)
    process.say("listen", fd)
    port = process.say("name", fd)[1]
    with closing(host.client.connected(HOST4, port)):
        assert process.say("name", process.say("accept", fd)) == [HOST4, port]


def test_a_rule_for_port_0_is_for_no_other_port_and_no_other_rule_for_port_0(host: Host, confine: Confine) -> None:
    name = host.endpoint("0.0.0.0:dynamic")
    _, only_0 = confine([f"*:0={name}"])
    _, all_but_0 = confine([f"*:1-65535={name}"])
    for port in (1, 80, 65535):
        assert only_0.bind("0.0.0.0", port) == "EACCES"
        assert all_but_0.bind("0.0.0.0", port) == "ok"
    assert only_0.bind("0.0.0.0", 0) == "ok"
    assert all_but_0.bind("0.0.0.0", 0) == "EACCES"


def test_a_bind_of_port_0_that_puts_the_port_off_gets_none_that_is_not_granted(host: Host, confine: Confine) -> None:
    """With IP_BIND_ADDRESS_NO_PORT the kernel picks the port at connect, or at listen."""
    _, process = confine([f"*:0={host.endpoint('0.0.0.0:dynamic')}"])
    fd = process.socket()
    assert process.say("option", fd, socket.IPPROTO_IP, ADDRESS_WITHOUT_PORT, 1) == "ok"
    assert process.say("bind", fd, "0.0.0.0", 0) == "ok"
    assert process.say("listen", fd) == "ok"  # no hook can refuse it
    assert not host.client.reaches(HOST4, process.say("name", fd)[1], 0.5)


def test_an_endpoint_with_a_port_serves_port_0_no_more(host: Host, confine: Confine) -> None:
    """The command refuses to change it so; the hooks do not depend on that."""
    name = host.endpoint("0.0.0.0:dynamic")
    _, process = confine([f"*:0={name}"])
    refused = host.graft("ep", "set", name, f"0.0.0.0:{host.port()}", status=4)
    assert refused.stderr.count("\n") == 1 and "port 0" in refused.stderr
    change_port(host, name, host.port())
    assert process.bind("0.0.0.0", 0) == "EACCES"


def change_port(host: Host, name: str, port: int, last_port: int = 0) -> None:
    """Write another port of an endpoint to the map."""
    stored = host.installation.endpoints.find(name)
    key = ctypes.c_uint32(stored.id)
    value = host.maps.endpoints.get(key)
    assert value is not None
    value.port, value.last_port = port, last_port
    host.maps.endpoints.put(key, value)


@pytest.mark.parametrize(("protocol", "family", "address"), CASES, ids=CASE_NAMES)
def test_a_range_maps_port_by_port(host: Host, confine: Confine, protocol: str, family: int, address: str) -> None:
    first = host.ports(5)
    name = host.endpoint(spec(family, f"{first}-{first + 4}"), dual_stack=dual(family))
    _, process = confine([f"*:5000-5004={name}"])
    for number in (4, 0, 2, 1, 3):
        fd = process.socket(protocol, family)
        assert process.say("bind", fd, wildcard(family), 5000 + number) == "ok"
        assert process.say("name", fd) == [wildcard(family), 5000 + number]
        assert exchange(host, process, protocol, fd, address, first + number) is True
        tag = tag_of(host, process, fd)
        assert tag is not None and tag.bound_port == first + number
    for port in (4999, 5005, first):
        assert process.bind(wildcard(family), port, protocol) == "EACCES"
    assert process.bind(wildcard(family), 5002, protocol) == "EADDRINUSE"


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(1, 65535), st.integers(1, 12), st.integers(0, 20), st.integers(1, 65535))
def check_mapping(host: Host, confined: tuple[Container, Puppet], start: int, size: int, skip: int, other: int) -> None:
    """The hook binds where the compiler's entry and `mapped_port` say, each port of a range at one of its own."""
    container, process = confined
    first = min(start, 65536 - size)
    begin = MAPPED_FROM + skip
    name = host.endpoint(f"127.0.0.1:{begin}-{begin + size - 1}")
    compiled = host.installation.compile(rules([f"*:{first}-{first + size - 1}={name}"]))
    with host.installation.transaction() as change:
        change.containers.apply(container, compiled)
    asked = {first - 1, *range(first, first + size), first + size, other} & set(range(1, 65536))
    real = {}
    for port in asked:
        fd = process.socket()
        if process.say("bind", fd, "0.0.0.0", port) == "ok":
            tag = tag_of(host, process, fd)
            real[port] = tag and tag.bound_port
        process.say("close", fd)
    last = begin + size - 1 if size > 1 else 0
    assert real == {port: mapped_port(port, first, begin, last) for port in range(first, first + size)}
    assert len(set(real.values())) == size


MAPPED_FROM = 18000  # below the ports of other tests (tests/support/installation.py)


def test_the_mapping_of_a_range_is_one_to_one_and_is_that_of_the_compiler(host: Host, confine: Confine) -> None:
    check_mapping(host, confine([]))


def test_a_smaller_range_takes_its_ports_out_of_a_bigger_one_and_shifts_nothing(host: Host, confine: Confine) -> None:
    first, alone = host.ports(5), host.port()
    _, process = confine(
        [f"*:5000-5004={host.endpoint(f'0.0.0.0:{first}-{first + 4}')}", f"*:5002={host.endpoint(f'0.0.0.0:{alone}')}"]
    )
    for port, real in ((5001, first + 1), (5002, alone), (5003, first + 3)):
        fd = process.listener("0.0.0.0", port)
        tag = tag_of(host, process, fd)
        assert tag is not None and tag.bound_port == real


def test_a_range_of_binds_to_an_endpoint_of_one_port_becomes_that_port(host: Host, confine: Confine) -> None:
    port = host.port()
    _, process = confine([f"*:5000-5004={host.endpoint(f'0.0.0.0:{port}')}"])
    tag = tag_of(host, process, process.listener("0.0.0.0", 5003))
    assert tag is not None and tag.bound_port == port
    assert process.bind("0.0.0.0", 5001) == "EADDRINUSE"


@pytest.mark.parametrize("call", ["listen", "accept"])
def test_a_socket_counts_only_at_the_port_that_its_request_becomes_now(host: Host, confine: Confine, call: str) -> None:
    """The rule moves by one port: what 5001 became, is what 5000 becomes now."""
    first = host.ports(5)
    name = host.endpoint(f"0.0.0.0:{first}-{first + 4}")
    container, process = confine([f"*:5000-5004={name}"])
    fd = process.socket("tcp" if call == "listen" else "udp")
    assert process.say("bind", fd, "0.0.0.0", 5001) == "ok"
    compiled = host.installation.compile(rules([f"*:4999-5003={name}"]))
    with host.installation.transaction() as change:
        change.containers.apply(container, compiled)
    if call == "listen":
        assert process.say("listen", fd) == "ok"  # no hook can refuse it
        assert not host.client.reaches(HOST4, first + 1, 0.5)
        return
    with host.client.inside(), closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as one:
        one.sendto(b"rtp", (HOST4, first + 1))
    until("the packet hook has dropped it", lambda: host.decisions(container.id).get(HookDecision.DROPPED))


def test_an_endpoint_keeps_its_number_of_ports_while_rules_need_it(host: Host, confine: Confine) -> None:
    first = host.ports(6)
    name = host.endpoint(f"0.0.0.0:{first}-{first + 4}")
    _, process = confine([f"*:5000-5004={name}"])
    refused = host.graft("ep", "set", name, f"0.0.0.0:{first}-{first + 3}", status=4)
    assert refused.stderr == (
        f"graft: address: rules in force are for 5 ports of '{name}', not 4 (as many ports, or add another endpoint)\n"
    )
    host.graft("ep", "set", name, f"0.0.0.0:{first + 1}-{first + 5}")
    tag = tag_of(host, process, process.listener("0.0.0.0", 5000))
    assert tag is not None and tag.bound_port == first + 1


def test_a_shrunken_range_refuses_what_has_no_port_in_it(host: Host, confine: Confine) -> None:
    """The command does not allow it; the hooks do not depend on that."""
    first = host.ports(5)
    name = host.endpoint(f"0.0.0.0:{first}-{first + 4}")
    _, process = confine([f"*:5000-5004={name}"])
    change_port(host, name, first, first + 1)
    assert [process.bind("0.0.0.0", 5000 + number) for number in range(4)] == ["ok", "ok", "EACCES", "EACCES"]


def test_an_endpoint_that_became_a_range_serves_no_rule_from_before(host: Host, confine: Confine) -> None:
    """The command does not allow it; the hooks do not depend on that."""
    one, zero, first = host.endpoint(f"0.0.0.0:{host.port()}"), host.endpoint("0.0.0.0:dynamic"), host.ports(20)
    _, process = confine([f"*:1-10={one}", f"*:0={zero}"])
    for name in (one, zero):
        change_port(host, name, first, first + 19)
    assert [process.bind("0.0.0.0", port) for port in (0, 1, 5, 10)] == ["EACCES"] * 4


@pytest.mark.parametrize(("protocol", "family", "far"), [("tcp", 4, CLIENT4), ("tcp", 6, CLIENT6), ("udp", 4, CLIENT4)])
def test_connections_leave_from_free_ports_of_a_range(
    host: Host, confine: Confine, protocol: str, family: int, far: str
) -> None:
    first = host.ports(4)
    prefix = "0.0.0.0/0" if family == 4 else "::/0"
    name = host.endpoint(spec(family, f"{first}-{first + 3}"), dual_stack=dual(family))
    _, process = confine([], [f"{prefix}={name}"])
    with closing(host.client.listener(wildcard(family))) as listener:
        port = listener.getsockname()[1]
        made = [process.socket(protocol, family) for _ in range(5)]
        assert [process.say("connect", fd, far, port) for fd in made] == ["ok"] * 4 + ["EADDRNOTAVAIL"]
        used = {process.say("name", fd)[1] for fd in made[:4]}
        assert used == set(range(first, first + 4))
        if protocol == "udp":
            process.say("close", made[2])  # a port that is given back is found again
            assert process.connect(far, port, protocol) == "ok"


def test_what_is_bound_in_a_range_sends_and_receives_at_its_own_port(host: Host, confine: Confine) -> None:
    """RTP: a datagram socket that is bound, then connected, and connected again."""
    first = host.ports(4)
    name = host.endpoint(f"0.0.0.0:{first}-{first + 3}")
    _, process = confine([f"*:5000-5003={name}"], [f"0.0.0.0/0={name}"])
    fd = process.socket("udp")
    assert process.say("bind", fd, "0.0.0.0", 5002) == "ok"
    for _ in range(2):
        with host.client.inside(), closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as far:
            far.bind((CLIENT4, 0))
            far.settimeout(5)
            assert process.say("connect", fd, *far.getsockname()) == "ok"
            assert process.say("sendto", fd, *far.getsockname()) == "ok"
            assert far.recvfrom(100) == (b"hello", (HOST4, first + 2))
            far.sendto(b"rtp", (HOST4, first + 2))
            assert process.say("receive", fd)[0] == "rtp"


def test_what_is_bound_in_a_range_connects_from_its_own_port(host: Host, confine: Confine) -> None:
    first = host.ports(4)
    name = host.endpoint(f"0.0.0.0:{first}-{first + 3}")
    _, process = confine([f"*:5000-5003={name}"], [f"0.0.0.0/0={name}"])
    with closing(host.client.listener()) as listener:
        fd = process.socket()
        assert process.say("bind", fd, "0.0.0.0", 5002) == "ok"
        assert process.say("connect", fd, CLIENT4, listener.getsockname()[1]) == "ok"
        assert listener.accept()[1] == (HOST4, first + 2)
        assert process.say("name", fd)[1] == 5002


def test_a_connect_that_is_repeated_leaves_again_from_the_port_that_it_got(host: Host, confine: Confine) -> None:
    first = host.ports(4)
    _, process = confine([], [f"0.0.0.0/0={host.endpoint(f'{HOST4}:{first}-{first + 3}')}"])
    datagrams, stream, ports = process.socket("udp"), process.socket(), set()
    with closing(host.client.listener()) as listener:
        for port in (9, 10, listener.getsockname()[1]):
            assert process.say("connect", datagrams, CLIENT4, port) == "ok"
            ports.add(process.say("name", datagrams)[1])
            said = process.say("connect", stream, CLIENT4, port)
            # (The second call on a socket that does not block reports that the first one failed.)
            assert said in ({9: "ECONNREFUSED", 10: "ECONNABORTED"}.get(port, "ok"), "ECONNREFUSED")
        assert said == "ok"
        ports.add(process.say("name", stream)[1])
    assert all(first <= port < first + 4 for port in ports)
    assert len(ports) <= 2


def test_a_big_range_is_searched_from_different_ports_on(host: Host, confine: Confine) -> None:
    """A connect tries 32 ports: more than that can be in use, because it does not always begin at the first."""
    first = host.ports(200)
    _, process = confine([], [f"0.0.0.0/0={host.endpoint(f'0.0.0.0:{first}-{first + 199}')}"])
    for _ in range(60):
        assert process.connect(CLIENT4, 9, "udp") == "ok"
    assert len(local_ports(host, "-u", f"sport >= :{first} and sport <= :{first + 199}")) == 60
