"""The BPF programs themselves, on sockets of a test's cgroup: what they rewrite, refuse and leave alone."""

from __future__ import annotations

import ctypes
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graft.datapath import attachments, layout
from graft.datapath.layout import HookDecision
from graft.datapath.rulesets import Lookup
from graft.kernel import bpf_maps
from graft.kernel.pidfd import pidfd_getfd
from graft.model.address import BindPattern, Prefix, pack16
from graft.model.endpoint import Endpoint
from graft.model.ports import PortRange, mapped_port
from graft.model.transport import Home, Transport
from graft.policy.compiler import IngressEntry, compile_policy
from graft.policy.model import Default, EgressRule, IngressRule, Policy, Verdict, policy_from_flags
from graft.state.records import Container
from tests.support.cgroups import new_cgroup
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, CLIENT6, HOST4, HOST6
from tests.support.puppet import Puppet, puppet

pytestmark = pytest.mark.kernel

TCP = socket.IPPROTO_TCP
Confine = Callable[..., tuple[Container, Puppet]]


@pytest.fixture
def confine(host: Host) -> Iterator[Confine]:
    """Puts a process into a cgroup of its own, under a policy; in the host's namespace unless another one is named."""
    with ExitStack() as stack:

        def make(policy: Policy, netns: Path | None = None, transport: Transport = Transport.DIRECT):  # type: ignore[no-untyped-def]
            path = stack.enter_context(new_cgroup("hooks"))
            one = stack.enter_context(puppet(path, netns or host.netns.path))
            cookie = host.netns.cookie if netns is None else 0
            graft = host.installation
            compiled = graft.compile(policy)
            with graft.transaction() as change:
                container = change.containers.create(compiled, path, cookie, transport)
            stack.callback(lambda: host.remove(container))
            return container, one

        yield make


def rules(ingress: list[str], egress: list[str], default: Default = Default.DENY) -> Policy:
    return replace(policy_from_flags("t", ingress, egress), bind_default=default, connect_default=default)


def tag_of(host: Host, process: Puppet, fd: int) -> layout.Tag | None:
    """The tag that the hooks have given a socket of a process."""
    pidfd = os.pidfd_open(process.pid)
    copy = pidfd_getfd(pidfd, fd)
    os.close(pidfd)
    try:
        return host.maps.tags.get(ctypes.c_int32(copy))
    finally:
        os.close(copy)


@pytest.mark.parametrize(
    "asked, family, spec, real",
    [
        ("0.0.0.0", 4, "127.0.0.1:{}", "127.0.0.1"),
        ("10.9.8.7", 4, "0.0.0.0:{}", "0.0.0.0"),  # an address that the host does not even have
        ("::", 6, "[::1]:{}", "[::1]"),
        ("::", 6, "127.0.0.1:{}", "[::ffff:127.0.0.1]"),  # dual-stack, on an IPv4 endpoint
        ("::ffff:10.9.8.7", 6, "127.0.0.1:{}", "[::ffff:127.0.0.1]"),
    ],
)
def test_a_bind_becomes_its_endpoints_and_the_program_sees_what_it_asked_for(
    host: Host, confine: Confine, asked: str, family: int, spec: str, real: str
) -> None:
    port = host.port()
    _, process = confine(rules([f"*:80={host.endpoint(spec.format(port))}"], []))
    fd = process.socket("tcp", family)
    assert process.say("bind", fd, asked, 80) == "ok"
    assert process.say("listen", fd) == "ok"
    assert process.say("name", fd) == [asked, 80]
    assert f"{real}:{port} " in host.netns.run("ss", "-Hltn", f"sport = :{port}")
    tag = tag_of(host, process, fd)
    assert tag is not None and tag.bound_port and tag.home == Home.HOST


def test_only_a_bind_that_succeeded_marks_a_socket_as_bound(host: Host, confine: Confine) -> None:
    with closing(host.netns.listener()) as taken:
        _, process = confine(rules([f"*:80={host.endpoint(f'0.0.0.0:{taken.getsockname()[1]}')}"], []))
        fd = process.socket()
        assert process.say("bind", fd, "0.0.0.0", 80) == "EADDRINUSE"
        tag = tag_of(host, process, fd)
        assert tag is not None and not tag.bound_port


def test_what_no_rule_names_is_refused_by_default_deny_and_left_alone_otherwise(host: Host, confine: Confine) -> None:
    port = host.port()
    denied, inside = confine(rules([], []))
    _, outside = confine(rules([], [], Default.CONTAINER))
    for address in ("0.0.0.0", "127.0.0.1", "::", "::1"):
        assert inside.bind(address, port) == "EACCES"
        assert inside.connect(address, port) == "EACCES"
    assert inside.connect(CLIENT4, 9) == inside.connect(CLIENT6, 9) == inside.sendto(CLIENT4, 9) == "EACCES"
    assert outside.bind("0.0.0.0", port) == "ok"
    assert outside.connect(CLIENT4, 9) == outside.connect(CLIENT6, 9) == "ECONNREFUSED"
    counted = host.decisions(denied.id)
    assert counted == {HookDecision.REFUSED_BIND: 4, HookDecision.REFUSED_CONNECT: 7}


def test_a_process_of_no_container_is_untouched_by_the_rules_of_others(host: Host, confine: Confine) -> None:
    port = host.port()
    confine(rules([f"*:{port}={host.endpoint('127.0.0.1:1')}"], []))
    with new_cgroup("hooks") as path, puppet(path, host.netns.path) as free:
        fd = free.listener("0.0.0.0", port)
        assert free.say("name", fd) == ["0.0.0.0", port]
        assert tag_of(host, free, fd) is None
        assert free.connect(CLIENT4, 9) == "ECONNREFUSED"


def test_old_rules_are_whole_as_long_as_a_hook_may_read_them(
    host: Host, confine: Confine, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = host.endpoint("0.0.0.0:dynamic")
    container, _ = confine(rules([f"*:80={name}"], [f"0.0.0.0/0={name}"]))
    key = ctypes.c_uint32(container.id)

    def ruleset() -> int:
        value = host.maps.containers.get(key)
        assert value is not None
        return int(value.ruleset)

    def entries() -> Counter[int]:
        maps = host.maps
        return Counter(one.ruleset for table in (maps.ingress, maps.egress, maps.egress_ports) for one in table.keys())  # noqa: SIM118

    old, before = ruleset(), entries()
    waited = []
    monkeypatch.setattr(bpf_maps, "wait_for_programs", lambda: waited.append((ruleset(), entries()[old])))
    graft = host.installation
    with graft.transaction() as change:
        change.containers.apply(container, graft.compile(rules([], [f"0.0.0.0/0={name}"])))
    assert waited == [(ruleset(), before[old])]
    assert old != ruleset() and before[old] and not entries()[old]


def test_programs_are_waited_for() -> None:
    bpf_maps.wait_for_programs()


def test_detaching_takes_effect_at_the_next_call(host: Host, confine: Confine) -> None:
    container, process = confine(rules([f"*:80={host.endpoint('0.0.0.0:dynamic')}"], []))
    first, second = process.socket(), process.socket()
    assert process.say("bind", first, "0.0.0.0", 80) == "ok"
    host.remove(replace(container, cgroup_id=1 << 40))  # none: the hooks stay attached
    # The cgroup belongs to no container any more: a socket that a rule had put into the host's stack is refused.
    assert process.say("connect", first, CLIENT4, 9) == "EACCES"
    attachments.detach(host.settings, container.cgroup_path)
    assert process.say("bind", second, "0.0.0.0", host.port()) == "ok"


def test_an_endpoint_of_another_namespace_is_refused(host: Host, confine: Confine) -> None:
    name = host.endpoint("0.0.0.0:dynamic", netns=str(host.client.path))
    _, process = confine(rules([f"*:80={name}"], [f"0.0.0.0/0={name}"]))
    assert process.bind("0.0.0.0", 80) == "EACCES"
    assert process.connect(CLIENT4, 9) == "EACCES"


def test_an_endpoint_of_another_protocol_is_refused(host: Host, confine: Confine) -> None:
    _, process = confine(rules([f"*:80={host.endpoint('0.0.0.0:dynamic', proto='udp')}"], []))
    assert process.bind("0.0.0.0", 80, "tcp") == "EACCES"
    assert process.bind("0.0.0.0", 80, "udp") == "ok"


def test_a_connection_leaves_from_its_endpoint(host: Host, confine: Confine) -> None:
    source = host.port()
    four, six = host.endpoint(f"{HOST4}:{source}"), host.endpoint(f"[{HOST6}]:{source}")
    _, process = confine(rules([], [f"0.0.0.0/0={four}", f"::/0={six}"]))
    for address, expected in ((CLIENT4, HOST4), (CLIENT6, HOST6)):
        with closing(host.client.listener(address)) as listener:
            fd = process.socket("tcp", 6 if ":" in address else 4)
            assert process.say("connect", fd, address, listener.getsockname()[1]) == "ok"
            assert listener.accept()[1][:2] == (expected, source)


@pytest.mark.parametrize("level, name", [(1, 25), (1, 36), (1, 62), (0, 19), (0, 4), (0, 35), (41, 75), (41, 20)])
def test_options_past_the_policy_are_refused_on_a_socket_of_the_hosts_stack(
    host: Host, confine: Confine, level: int, name: int
) -> None:
    _, process = confine(rules(["*:80=" + host.endpoint("[::]:dynamic", dual_stack=True)], []))
    fd = process.socket("tcp", 6)
    assert process.say("bind", fd, "::", 80) == "ok"
    assert process.say("option", fd, level, name, "lo\0\0") in ("EPERM", "EACCES")
    assert process.say("option", fd, 6, 1, 1) == "ok"  # TCP_NODELAY


def test_a_listener_on_no_endpoint_refuses_every_client(host: Host, confine: Confine) -> None:
    container, process = confine(rules([], []))
    fd = process.socket()
    assert process.say("listen", fd) == "ok"
    port = process.say("name", fd)[1]
    for one, address in ((host.client, HOST4), (host.netns, "127.0.0.1")):
        with pytest.raises(ConnectionRefusedError):
            one.connected(address, port)
    assert host.decisions(container.id)[HookDecision.CLOSED_LISTENER] == 1


def test_an_accepted_connection_has_its_listeners_tag_and_the_port_that_was_asked_for(
    host: Host, confine: Confine
) -> None:
    port = host.port()
    container, process = confine(rules([f"*:80={host.endpoint(f'0.0.0.0:{port}')}"], []))
    fd = process.listener("0.0.0.0", 80)
    with closing(host.client.connected(HOST4, port)) as client:
        accepted = process.say("accept", fd)
        assert process.say("name", accepted) == [HOST4, 80]
        assert client.getpeername() == (HOST4, port)
        tag = tag_of(host, process, accepted)
        assert tag is not None and (tag.container, tag.port) == (container.id, 80)


# Random policies: lookups in the maps, by user space and by the hooks, agree with the compiled entries.

ENDPOINTS = ("a4", "b4", "r4", "a6")
# r4 is a range of ten ports.
_SPECS = {"a4": "0.0.0.0:dynamic", "b4": "127.0.0.1:dynamic", "r4": "127.0.0.1:{}-{}", "a6": "[::]:dynamic"}
BINDABLE = ["0.0.0.0", "127.0.0.1", "10.98.0.1", "::", "::1"]
HOST_BROADCAST, ALL_HOSTS = "10.98.0.255", "255.255.255.255"
BY_NAME = {HOST_BROADCAST: HOST_BROADCAST, ALL_HOSTS: ALL_HOSTS, "239.1.1.1": "224.0.0.0/4", "ff0e::1": "ff00::/8"}
"""The targets that only a rule inside of these grants (docs/policy.md)."""
TARGETS = ["10.98.0.2", "10.98.1.1", "10.99.0.1", "192.0.2.1", "fd98::2", "fd98::3", "2001:db8::1", *BY_NAME]
PREFIXES = ["0.0.0.0/0", "10.0.0.0/8", "10.98.0.0/16", "10.98.0.2/32", "10.98.0.254/31", f"{HOST_BROADCAST}/32"]
PREFIXES += [f"{ALL_HOSTS}/32", "224.0.0.0/3", "239.0.0.0/8", "239.1.1.1/32"]
PREFIXES += ["::/0", "fd98::/16", "fd98::2/128", "fe00::/7", "ff0e::/16", "ff0e::1/128"]
# Ranges that are either apart or one inside the other: others are in conflict, and no policy at all.
RANGES = [PortRange(2000, 2999), PortRange(2000, 2009), PortRange(2005, 2005), PortRange(2500, 2511), PortRange(80, 80)]
PORT_0 = PortRange(0, 0)
PORTS = [0, 80, 2000, 2004, 2005, 2006, 2009, 2010, 2500, 2505, 2512, 2999, 3000]


def _fits(name: str, ports: PortRange) -> bool:
    return len(ports) == 10 if name == "r4" else True


def _family(name: str) -> int:
    return 6 if name.endswith("6") else 4


ingress_rules = st.builds(
    lambda address, ports, name: (address, ports, name),
    st.sampled_from([None, *BINDABLE]),
    st.sampled_from([*RANGES, PORT_0]),
    st.sampled_from(ENDPOINTS),
).filter(
    lambda one: (
        _fits(one[2], one[1]) and (one[0] is None or one[0] == "::" or ip_address(one[0]).version == _family(one[2]))
    )
)

egress_rules = st.tuples(
    st.sampled_from(PREFIXES), st.sampled_from([None, *RANGES]), st.sampled_from([*ENDPOINTS, "deny", "container"])
).filter(lambda one: one[2] in ("deny", "container") or ip_network(one[0]).version == _family(one[2]))


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    """Policies without conflicts: one endpoint for a pattern, one outcome for a prefix."""
    ingress: dict[tuple[str | None, int, PortRange], IngressRule] = {}
    for address, ports, name in draw(st.lists(ingress_rules, max_size=8)):
        pattern = BindPattern(None if address is None else ip_address(address), ports)
        ingress[address, _family(name) if address is None else 0, ports] = IngressRule(pattern, name)
    egress: dict[str, EgressRule] = {}
    for prefix, ports, outcome in draw(st.lists(egress_rules, max_size=12)):
        verdict = {"deny": Verdict.DENY, "container": Verdict.CONTAINER}.get(outcome, Verdict.GRANT)
        where = Prefix(ip_network(prefix))
        name = outcome if verdict is Verdict.GRANT else None
        egress[prefix] = EgressRule(where, verdict, name, None if ports is None else (ports,))
    return Policy(
        "random",
        ingress=tuple(ingress.values()),
        egress=tuple(egress.values()),
        bind_default=Default.DENY,
        connect_default=Default.DENY,
    )


def bind_entry(entries: tuple[IngressEntry, ...], address: str, port: int) -> IngressEntry | None:
    ip = ip_address(address)
    for wanted in (pack16(ip), None):
        found = [
            one
            for one in entries
            if (one.protocol, one.family, one.address) == (TCP, ip.version, wanted)
            and one.port >> (16 - one.port_bits) == port >> (16 - one.port_bits)
        ]
        if found:
            return max(found, key=lambda one: one.port_bits)
    return None


def egress_outcome(policy: Policy, address: str, port: int) -> Verdict:
    """What docs/policy.md says of a destination: the rule with the longest prefix that has the port decides."""
    ip = ip_address(address)
    covering = [
        rule
        for rule in policy.egress
        if ip in rule.to.network and (rule.ports is None or any(one.first <= port <= one.last for one in rule.ports))
    ]
    covering.sort(key=lambda rule: rule.to.length, reverse=True)
    if address in BY_NAME and address != HOST_BROADCAST:
        named = Prefix(ip_network(BY_NAME[address]))
        covering = [rule for rule in covering if rule.verdict is not Verdict.GRANT or rule.to.inside(named)]
    if not covering:
        return Verdict.NONE
    decisive = covering[0]
    by_a_wider_rule = address == HOST_BROADCAST and decisive.to.length < 32
    return Verdict.NONE if by_a_wider_rule and decisive.verdict is Verdict.GRANT else decisive.verdict


def goes_there(process: Puppet, address: str, port: int) -> str:
    """What the kernel says to a connect or, where many get what is sent, to a datagram: they are not connected to."""
    fd = process.socket("udp", ip_address(address).version)
    if address in BY_NAME:
        process.say("option", fd, socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    said = process.say("sendto" if address in BY_NAME else "connect", fd, address, port)
    process.say("close", fd)
    return str(said)


def test_random_policies_mean_the_same_to_the_compiler_the_lookups_and_the_hooks(host: Host, confine: Confine) -> None:
    ten = host.ports(10)
    specs = {name: spec.format(ten, ten + 9) for name, spec in _SPECS.items()}
    names = {name: host.endpoint(spec, dual_stack=name == "a6") for name, spec in specs.items()}
    stored = {mine: host.installation.endpoints.find(name) for mine, name in names.items()}
    endpoints: dict[str, Endpoint] = {name: one.endpoint for name, one in stored.items()}
    ids = {name: one.id for name, one in stored.items()}
    container, process = confine(rules([], []))
    lookup = Lookup(host.maps)
    outcomes: Counter[tuple[str, bool]] = Counter()

    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        policies(),
        st.lists(st.tuples(st.sampled_from(BINDABLE), st.sampled_from(PORTS)), min_size=4, max_size=8),
        st.lists(st.tuples(st.sampled_from(TARGETS), st.sampled_from(PORTS)), min_size=12, max_size=16),
    )
    def check(policy: Policy, binds: list[tuple[str, int]], connects: list[tuple[str, int]]) -> None:
        entries = compile_policy(policy, endpoints)
        renamed = replace(
            policy,
            ingress=tuple(replace(rule, endpoint=names[rule.endpoint]) for rule in policy.ingress),
            egress=tuple(replace(rule, endpoint=rule.endpoint and names[rule.endpoint]) for rule in policy.egress),
        )
        compiled = host.installation.compile(renamed)
        with host.installation.transaction() as change:
            change.containers.apply(container, compiled)
        value = host.maps.containers.get(ctypes.c_uint32(container.id))
        assert value is not None
        for address, port in binds:
            ip = ip_address(address)
            expected = bind_entry(entries.ingress, address, port)
            number = lookup.ingress(value.ruleset, TCP, ip.version, pack16(ip), port)
            assert number == ((0, 0) if expected is None else (ids[expected.endpoint], expected.first_port))
            fd = process.socket("tcp", ip.version)
            said = process.say("bind", fd, address, port)
            assert (said == "EACCES") == (expected is None), (address, port, expected)
            outcomes["bind", said == "ok"] += 1
            if said == "ok":
                tag = tag_of(host, process, fd)
                assert expected is not None and tag is not None and tag.endpoint == number[0]
                target = endpoints[expected.endpoint]
                mapped = mapped_port(port, expected.first_port, target.port, target.last_port)
                assert tag.bound_port and mapped in (0, tag.bound_port)
                assert process.say("name", fd) == [address, port or tag.bound_port]
            process.say("close", fd)
        for address, port in connects:
            ip = ip_address(address)
            outcome = egress_outcome(policy, address, port)
            verdict, source = lookup.egress(value.ruleset, socket.IPPROTO_UDP, ip.version, pack16(ip), port)
            assert verdict == outcome, (address, port)
            if address in BY_NAME and (not port or source == ids["r4"]):
                continue  # no datagram goes to port 0, nor, from a socket that is not bound, from an endpoint's port
            said = goes_there(process, address, port)
            assert (said == "EACCES") == (outcome in (Verdict.NONE, Verdict.DENY)), (address, port, said, outcome)
            outcomes["by name" if address in BY_NAME else "connect", said != "EACCES"] += 1

    check()
    ways = ("bind", "connect", "by name")
    assert min(outcomes[way, granted] for way in ways for granted in (True, False)) > 0, outcomes


def put_on_the_host(host: Host, container: Container, process: Puppet, fd: int) -> None:
    """Tag a program's socket as a supervisor tags a replacement."""
    pidfd = os.pidfd_open(process.pid)
    copy = pidfd_getfd(pidfd, fd)
    os.close(pidfd)
    host.maps.tags.put(ctypes.c_int32(copy), layout.Tag(container=container.id, home=Home.HOST))
    os.close(copy)


def test_a_rule_for_a_unix_socket_gives_a_socket_of_the_hosts_stack_nothing(
    host: Host, confine: Confine, tmp_path: Path
) -> None:
    name = host.endpoint(f"unix:{tmp_path}/a")
    policy = rules(["*:80=" + name], ["10.99.0.5=" + name])
    container, process = confine(policy, transport=Transport.SWAP)
    at_home, bound, connecting = process.socket(), process.socket(), process.socket()
    put_on_the_host(host, container, process, bound)
    put_on_the_host(host, container, process, connecting)
    assert process.say("bind", bound, "0.0.0.0", 80) == "EACCES"
    assert process.say("connect", connecting, "10.99.0.5", 80) == "EACCES"
    assert process.say("bind", at_home, "127.0.0.1", 80) == "ok"  # although the default denies


def test_without_a_relay_a_destination_that_leads_to_a_unix_socket_is_refused(
    host: Host, confine: Confine, tmp_path: Path
) -> None:
    name = host.endpoint(f"unix:{tmp_path}/a")
    for transport in (Transport.DIRECT, Transport.SWAP):
        _, process = confine(rules([], ["10.99.0.5=" + name], Default.CONTAINER), transport=transport)
        assert process.connect("10.99.0.5", 80) == "ECONNREFUSED"
