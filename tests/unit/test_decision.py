"""In which namespace a socket should live: a table of cases, and properties of all decisions."""

from __future__ import annotations

import errno
import socket
import struct
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from graft.datapath.layout import ENDPOINT_DUAL_STACK, ENDPOINT_HAS_PORT, ENDPOINT_UNIX
from graft.model.sockaddr import Sockaddr, parse_sockaddr
from graft.model.transport import Home
from graft.policy.model import Default, Verdict
from graft.swap.decision import TCP_CLOSE, Action, Call, Decision, SocketFacts, decide

OURS, HOST, OTHER = 100, 1, 7

CONTAINER_SOCKET = SocketFacts(
    netns=OURS,
    container_netns=OURS,
    endpoint_netns=0,
    endpoint=0,
    local_port=0,
    home=Home.CONTAINER,
    family=4,
    state=TCP_CLOSE,
    bound=0,
    verdict=Verdict.NONE,
    endpoint_family=0,
    bind_default=Default.CONTAINER,
    connect_default=Default.CONTAINER,
    protocol=socket.IPPROTO_TCP,
    endpoint_flags=0,
)
HOST_SOCKET = CONTAINER_SOCKET._replace(home=Home.HOST, netns=HOST)
GRANT = {"endpoint": 5, "endpoint_netns": HOST, "endpoint_family": 4, "verdict": Verdict.GRANT}
UNIX = {**GRANT, "endpoint_flags": ENDPOINT_UNIX}
DENY_DEFAULTS = {"bind_default": Default.DENY, "connect_default": Default.DENY}

WEB = Sockaddr(4, bytes(16), 80)
WEB6 = Sockaddr(6, bytes(16), 80)
MAPPED = Sockaddr(4, bytes(16), 80, mapped=True)

RESUME = Decision(Action.RESUME)
TO_HOST = Decision(Action.TO_HOST, 5, HOST)
ONLY_IPV6 = Decision(Action.TO_HOST, 5, HOST, v6only=True)
TO_CONTAINER = Decision(Action.TO_CONTAINER)
REFUSED = Decision(Action.REFUSE, error=errno.EACCES)

BIND, CONNECT, LISTEN = Call.BIND, Call.CONNECT, Call.LISTEN
bound = {"bound": 1, "local_port": 8080}

UDP = {"protocol": socket.IPPROTO_UDP}
CONNECTED = {"state": 1, "local_port": 40000}
NOTHING, NOTHING6 = Sockaddr(4, bytes(16), 0), Sockaddr(6, bytes(16), 0)
LOOPBACK_0 = Sockaddr(4, socket.inet_aton("127.0.0.1") + bytes(12), 0)
TO_BOTH = Decision(Action.TO_BOTH)

CASES = [
    # datagrams, born on the host's stack
    (BIND, WEB, HOST_SOCKET, UDP | GRANT, RESUME),
    (BIND, WEB, HOST_SOCKET, UDP, TO_CONTAINER),
    (BIND, NOTHING, HOST_SOCKET, UDP, TO_BOTH),
    (BIND, NOTHING6, HOST_SOCKET, UDP | {"family": 6}, TO_BOTH),
    (BIND, NOTHING, HOST_SOCKET, UDP | GRANT, RESUME),
    (BIND, NOTHING, HOST_SOCKET, UDP | DENY_DEFAULTS, REFUSED),
    (BIND, NOTHING, HOST_SOCKET, {}, TO_CONTAINER),
    (BIND, NOTHING, CONTAINER_SOCKET, UDP, RESUME),
    (BIND, LOOPBACK_0, HOST_SOCKET, UDP, TO_CONTAINER),
    (CONNECT, WEB, HOST_SOCKET, UDP, TO_CONTAINER),
    (CONNECT, WEB, HOST_SOCKET, UDP | CONNECTED, TO_CONTAINER),
    (CONNECT, WEB, HOST_SOCKET, UDP | CONNECTED | GRANT, RESUME),
    (CONNECT, WEB, CONTAINER_SOCKET, UDP | CONNECTED | GRANT, TO_HOST),
    (CONNECT, WEB, CONTAINER_SOCKET, CONNECTED | GRANT, RESUME),
    (CONNECT, WEB, HOST_SOCKET, UDP | bound, REFUSED),
    (LISTEN, None, HOST_SOCKET, UDP, RESUME),
    # call, address, socket, changes -> decision
    (BIND, WEB, CONTAINER_SOCKET, GRANT, TO_HOST),
    (CONNECT, WEB, CONTAINER_SOCKET, GRANT, TO_HOST),
    (BIND, WEB, CONTAINER_SOCKET, {}, RESUME),
    # a unix socket of the host: the program's own socket stays in, or goes back into, the container
    (BIND, WEB, CONTAINER_SOCKET, UNIX, RESUME),
    (CONNECT, WEB, CONTAINER_SOCKET, UNIX, RESUME),
    (BIND, WEB, HOST_SOCKET, UNIX, TO_CONTAINER),
    (CONNECT, WEB, HOST_SOCKET, UNIX, TO_CONTAINER),
    (CONNECT, WEB, HOST_SOCKET, UNIX | bound, REFUSED),
    (CONNECT, WEB, CONTAINER_SOCKET, {}, RESUME),
    (BIND, WEB, CONTAINER_SOCKET, DENY_DEFAULTS, RESUME),  # the hooks refuse it
    (CONNECT, WEB, CONTAINER_SOCKET, DENY_DEFAULTS, RESUME),
    (LISTEN, None, CONTAINER_SOCKET, {}, RESUME),
    # a namespace that the program made, or a socket that it received
    (BIND, WEB, CONTAINER_SOCKET, GRANT | {"netns": OTHER}, RESUME),
    (CONNECT, WEB, CONTAINER_SOCKET, GRANT | {"netns": OTHER}, RESUME),
    # in the host's stack already
    (BIND, WEB, HOST_SOCKET, GRANT, RESUME),
    (CONNECT, WEB, HOST_SOCKET, GRANT, RESUME),
    (BIND, WEB, HOST_SOCKET, GRANT | {"endpoint_netns": OTHER}, Decision(Action.TO_HOST, 5, OTHER)),
    (CONNECT, WEB, HOST_SOCKET, GRANT | {"endpoint_netns": OTHER}, Decision(Action.TO_HOST, 5, OTHER)),
    (CONNECT, WEB, HOST_SOCKET, GRANT | bound | {"endpoint_netns": OTHER}, RESUME),
    (BIND, WEB, HOST_SOCKET, {}, TO_CONTAINER),
    (CONNECT, WEB, HOST_SOCKET, {}, TO_CONTAINER),
    (CONNECT, WEB, HOST_SOCKET, {"verdict": Verdict.CONTAINER} | DENY_DEFAULTS, TO_CONTAINER),
    (BIND, WEB, HOST_SOCKET, DENY_DEFAULTS, REFUSED),
    (CONNECT, WEB, HOST_SOCKET, DENY_DEFAULTS, REFUSED),
    (CONNECT, WEB, HOST_SOCKET, bound, REFUSED),  # it is bound to an endpoint, which would be lost
    (LISTEN, None, HOST_SOCKET, {}, REFUSED),
    (LISTEN, None, HOST_SOCKET, bound, RESUME),
    # bound already: the kernel's EINVAL
    (BIND, WEB, CONTAINER_SOCKET, GRANT | {"local_port": 4000}, RESUME),
    (BIND, WEB, HOST_SOCKET, GRANT | bound, RESUME),
    # denied by a rule
    (CONNECT, WEB, CONTAINER_SOCKET, {"verdict": Verdict.DENY}, REFUSED),
    (CONNECT, WEB, HOST_SOCKET, {"verdict": Verdict.DENY}, REFUSED),
    # connecting, connected or listening: the kernel has the errno
    (CONNECT, WEB, CONTAINER_SOCKET, GRANT | {"state": 1}, RESUME),
    (LISTEN, None, HOST_SOCKET, {"state": 10}, RESUME),
    # an address that a socket of this family cannot have, or none at all
    (BIND, WEB6, CONTAINER_SOCKET, GRANT, RESUME),
    (BIND, MAPPED, CONTAINER_SOCKET, GRANT, RESUME),
    (BIND, WEB, CONTAINER_SOCKET, GRANT | {"family": 6}, RESUME),
    (BIND, None, CONTAINER_SOCKET, GRANT, RESUME),
    (CONNECT, None, CONTAINER_SOCKET, GRANT, RESUME),
    # both families at once
    (BIND, WEB6, CONTAINER_SOCKET, GRANT | {"family": 6}, TO_HOST),
    (BIND, MAPPED, CONTAINER_SOCKET, GRANT | {"family": 6}, TO_HOST),
    (CONNECT, MAPPED, CONTAINER_SOCKET, GRANT | {"family": 6}, TO_HOST),
]


@pytest.mark.parametrize("call, address, start, changes, wanted", CASES)
def test_decisions(
    call: Call, address: Sockaddr | None, start: SocketFacts, changes: dict[str, int], wanted: Decision
) -> None:
    assert decide(call, address, start._replace(**changes)) == wanted


def test_an_ipv6_only_socket_does_not_get_an_ipv4_endpoint() -> None:
    facts = CONTAINER_SOCKET._replace(family=6, **GRANT)
    assert decide(BIND, WEB6, facts, v6only=False) == TO_HOST
    assert decide(BIND, WEB6, facts, v6only=True) == RESUME
    assert decide(BIND, WEB6, facts._replace(endpoint_family=6), v6only=True) == ONLY_IPV6


def test_a_socket_at_an_ipv6_endpoint_is_ipv6_only_unless_that_is_dual_stack() -> None:
    facts = CONTAINER_SOCKET._replace(family=6, **GRANT)._replace(endpoint_family=6)
    dual = facts._replace(endpoint_flags=ENDPOINT_DUAL_STACK)
    assert decide(BIND, WEB6, facts, v6only=False) == ONLY_IPV6
    assert decide(BIND, WEB6, dual, v6only=False) == TO_HOST
    # One in the host's stack that is not IPv6-only is replaced by one that is.
    there = {"home": Home.HOST, "netns": HOST}
    assert decide(BIND, WEB6, facts._replace(**there), v6only=False) == ONLY_IPV6
    assert decide(BIND, WEB6, facts._replace(**there), v6only=True) == RESUME
    assert decide(BIND, WEB6, dual._replace(**there), v6only=False) == RESUME
    # A datagram socket becomes IPv6-only itself.
    assert decide(BIND, WEB6, facts._replace(**there, **UDP), v6only=False) == Decision(Action.IPV6_ONLY)
    assert decide(BIND, WEB6, facts._replace(**there, **UDP), v6only=True) == RESUME
    assert decide(BIND, WEB6, dual._replace(**there, **UDP), v6only=False) == RESUME
    assert decide(BIND, WEB6, facts._replace(**UDP), v6only=False) == ONLY_IPV6


def test_nor_does_one_that_connects_from_an_ipv6_port() -> None:
    facts = CONTAINER_SOCKET._replace(family=6, **{**GRANT, "endpoint_family": 6, "endpoint_flags": ENDPOINT_HAS_PORT})
    dual = facts._replace(endpoint_flags=ENDPOINT_HAS_PORT | ENDPOINT_DUAL_STACK)
    assert decide(CONNECT, WEB6, facts, v6only=False) == ONLY_IPV6
    assert decide(CONNECT, WEB6, dual, v6only=False) == TO_HOST
    assert decide(CONNECT, WEB6, facts._replace(endpoint_flags=0), v6only=False) == TO_HOST
    there = {"home": Home.HOST, "netns": HOST}
    assert decide(CONNECT, WEB6, facts._replace(**there), v6only=False) == ONLY_IPV6
    assert decide(CONNECT, WEB6, facts._replace(**there), v6only=True) == RESUME
    assert decide(CONNECT, WEB6, facts._replace(**there, local_port=4000), v6only=False) == RESUME


FACTS = st.builds(
    SocketFacts,
    netns=st.sampled_from([OURS, HOST, OTHER]),
    container_netns=st.just(OURS),
    endpoint_netns=st.sampled_from([HOST, OTHER]),
    endpoint=st.sampled_from([0, 5]),
    local_port=st.sampled_from([0, 8080]),
    home=st.sampled_from(Home),
    family=st.sampled_from([4, 6]),
    state=st.sampled_from([1, 2, TCP_CLOSE, 10]),
    bound=st.sampled_from([0, 1]),
    verdict=st.sampled_from(Verdict),
    endpoint_family=st.sampled_from([4, 6]),
    bind_default=st.sampled_from(Default),
    connect_default=st.sampled_from(Default),
    protocol=st.just(6),
    endpoint_flags=st.sampled_from([0, ENDPOINT_DUAL_STACK]),
)
ADDRESSES = st.none() | st.builds(
    Sockaddr, st.sampled_from([4, 6]), st.binary(min_size=16, max_size=16), st.integers(0, 65535)
)


def test_no_socket_goes_to_the_host_unless_a_rule_names_an_endpoint() -> None:
    to_host = 0

    @settings(max_examples=1000, deadline=None)
    @given(st.sampled_from(Call), ADDRESSES, FACTS, st.booleans())
    @example(BIND, WEB, CONTAINER_SOCKET._replace(**GRANT), False)  # chance meets few of both
    @example(CONNECT, WEB, CONTAINER_SOCKET._replace(**GRANT), False)
    def check(call: Call, address: Sockaddr | None, facts: SocketFacts, v6only: bool) -> None:
        nonlocal to_host
        decision = decide(call, address, facts, v6only)
        if decision.action is Action.TO_HOST:
            to_host += 1
            assert call is not Call.LISTEN and address is not None
            assert (decision.endpoint, decision.netns) == (facts.endpoint, facts.endpoint_netns)
            assert facts.endpoint if call is Call.BIND else facts.verdict == Verdict.GRANT

    check()
    assert to_host > 0


@given(st.sampled_from(Call), ADDRESSES, FACTS, st.booleans())
def test_a_socket_that_is_bound_to_an_endpoint_is_never_replaced(
    call: Call, address: Sockaddr | None, facts: SocketFacts, v6only: bool
) -> None:
    bound_facts = facts._replace(home=Home.HOST, bound=1, local_port=8080)
    assert decide(call, address, bound_facts, v6only).action in (Action.RESUME, Action.REFUSE)


@given(st.sampled_from(Call), ADDRESSES, FACTS, st.booleans())
def test_only_a_refusal_has_an_errno(call: Call, address: Sockaddr | None, facts: SocketFacts, v6only: bool) -> None:
    decision = decide(call, address, facts, v6only)
    assert (decision.action is Action.REFUSE) == bool(decision.error)


def in4(address: str, port: int) -> bytes:
    return struct.pack("=H", socket.AF_INET) + struct.pack("!H", port) + IPv4Address(address).packed + bytes(8)


def in6(address: str, port: int) -> bytes:
    head = struct.pack("=H", socket.AF_INET6) + struct.pack("!HI", port, 0)
    return head + IPv6Address(address).packed + struct.pack("=I", 0)


def test_addresses_are_parsed_as_in_the_hooks() -> None:
    assert str(parse_sockaddr(in4("10.1.2.3", 80))) == "10.1.2.3:80"
    assert str(parse_sockaddr(in6("2001:db8::1", 443))) == "[2001:db8::1]:443"
    mapped = parse_sockaddr(in6("::ffff:10.1.2.3", 80))
    assert mapped is not None and mapped.mapped and str(mapped) == "10.1.2.3:80"


FAMILIES = st.sampled_from([struct.pack("=H", family) for family in (socket.AF_INET, socket.AF_INET6)])


@given(st.binary(max_size=28))
def test_any_bytes_of_a_programs_memory_are_parsed_without_an_error(raw: bytes) -> None:
    parse_sockaddr(raw)


@given(FAMILIES, st.binary(min_size=26, max_size=26))
def test_any_address_of_a_known_family_has_16_bytes_and_a_port(family: bytes, rest: bytes) -> None:
    found = parse_sockaddr(family + rest)
    assert found is not None
    assert len(found.address) == 16 and 0 <= found.port <= 65535


@pytest.mark.parametrize("size", range(24))
def test_a_truncated_address_is_none(size: int) -> None:
    assert parse_sockaddr(in6("::1", 80)[:size]) is None
    assert (parse_sockaddr(in4("1.2.3.4", 80)[:size]) is None) == (size < 8)
