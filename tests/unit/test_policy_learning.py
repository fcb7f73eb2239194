"""The policy that is proposed for what a container did: valid, and of nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.model.address import unmapped
from graft.model.endpoint import Endpoint, Protocol, unix_endpoint
from graft.model.ports import mapped_port
from graft.model.unix_socket import UnixSocket
from graft.policy.learning import Observation, learn
from graft.policy.model import Default, Policy, Verdict
from graft.policy.reader import check_policy
from graft.policy.writer import policy_text

ANY4, CLIENT, OTHER = ip_address("0.0.0.0"), ip_address("192.0.2.7"), ip_address("2001:db8::1")
WEB = Endpoint("web", ANY4, 8080)


def bind(port: int, **more: object) -> Observation:
    return Observation(True, Protocol.TCP, ANY4, port, **more)  # type: ignore[arg-type]


def to(port: int, **more: object) -> Observation:
    return Observation(False, Protocol.TCP, CLIENT, port, **more)  # type: ignore[arg-type]


def text(policy: Policy) -> str:
    return policy_text(policy, "learned")


def test_nothing_seen_grants_nothing() -> None:
    assert text(learn("web", [], {})) == "# learned\nname: web\ndefault:\n  bind: deny\n  connect: deny\n"


def test_what_was_granted_keeps_its_endpoint_and_is_declared_where_it_was() -> None:
    seen = [bind(80, endpoint="web"), to(443, endpoint="out"), to(444, endpoint="out"), to(80, endpoint="out")]
    known = {"web": WEB, "unused": Endpoint("unused", ANY4, 9), "out": Endpoint("out", ANY4, 0)}
    policy = learn("p", seen, known, ["web", "unused"])
    assert policy.endpoints == (WEB,)
    assert [(str(one.bind), one.endpoint, one.protocols) for one in policy.ingress] == [
        ("0.0.0.0:80", "web", Protocol.TCP)
    ]
    [rule] = policy.egress
    assert (str(rule.to), rule.endpoint, [str(one) for one in rule.ports or ()]) == (
        "192.0.2.7/32",
        "out",
        ["80", "443-444"],
    )


def test_what_had_no_endpoint_gets_one() -> None:
    policy = learn("p", [bind(80), Observation(False, Protocol.UDP, OTHER, 53)], {})
    assert [one.format() for one in policy.endpoints] == [
        "learned-0-0-0-0-80 = 0.0.0.0:80",
        "learned-out6 = [::]:dynamic",
    ]
    assert (policy.bind_default, policy.connect_default) == (Default.DENY, Default.DENY)


def test_what_stayed_inside_stays_there() -> None:
    policy = learn("p", [bind(80, stays=True), to(5432, stays=True)], {})
    assert policy.bind_default is Default.CONTAINER and not policy.ingress
    [rule] = policy.egress
    assert rule.verdict is Verdict.CONTAINER


def test_a_destination_at_port_0_is_none() -> None:
    """A program may connect to it all the same."""
    seen = [to(0), to(80), replace(to(0, stays=True), protocol=Protocol.UDP), bind(0)]
    policy = learn("p", seen, {})
    assert [[str(ports) for ports in rule.ports or ()] for rule in policy.egress] == [["80"]]
    assert [str(rule.bind) for rule in policy.ingress] == ["0.0.0.0:0"]


RTP = Endpoint("rtp", ip_address("192.0.2.1"), 20000, last_port=20010, netns="blue", open=True)


def test_a_port_of_a_range_gets_an_endpoint_of_its_own() -> None:
    """A rule for the range itself would grant ten ports more."""
    seen = [bind(5005, endpoint="rtp", got=20005), bind(5010, endpoint="rtp", got=20010)]
    policy = learn("p", [*seen, bind(7, endpoint="rtp", got=20005)], {"rtp": RTP}, ["rtp"])
    assert [(str(one.bind), one.endpoint) for one in policy.ingress] == [
        ("0.0.0.0:7", "learned-rtp-20005"),
        ("0.0.0.0:5005", "learned-rtp-20005"),
        ("0.0.0.0:5010", "learned-rtp-20010"),
    ]
    alike = Endpoint("learned-rtp-20005", RTP.address, 20005, netns="blue")
    assert policy.endpoints == (alike, replace(alike, name="learned-rtp-20010", port=20010))
    assert not check_policy(text(policy), {"rtp": RTP}).problems


@pytest.mark.parametrize(
    "now",
    [
        {},
        {"rtp": replace(RTP, port=30000, last_port=30010)},
        {"rtp": replace(RTP, address=OTHER)},
        {"rtp": replace(RTP, protocols=Protocol.UDP)},
    ],
    ids=["gone", "moved", "of another family", "of another protocol"],
)
def test_an_endpoint_that_is_another_one_meanwhile_is_not_named(now: dict[str, Endpoint]) -> None:
    policy = learn("p", [bind(5005, endpoint="rtp", got=20005)], now)
    assert [one.format() for one in policy.endpoints] == ["learned-0-0-0-0-5005 = 0.0.0.0:5005"]
    assert not check_policy(text(policy), now).problems


ADDRESSES = st.sampled_from([ANY4, CLIENT, ip_address("::"), OTHER, ip_address("127.0.0.1"), ip_address("::1")])
KNOWN = {
    one.name: one
    for one in (
        WEB,
        Endpoint("rtp", ANY4, 20000, last_port=20010),
        Endpoint("dual", ip_address("::"), 20005, last_port=20100, dual_stack=True),
        Endpoint("groups", ANY4, 5353, Protocol.UDP, last_port=5354, multicast=(ip_address("239.1.1.1"),)),
        Endpoint("out4", ANY4, 0),
        Endpoint("out6", ip_address("::"), 0, Protocol.TCP),
        Endpoint("sources", ANY4, 40000, last_port=40100),
        Endpoint("learned-0-0-0-0-80", ANY4, 80),
        unix_endpoint("app", UnixSocket("/run/app.sock")),
    )
}
DECLARED = ["dual", "groups", "rtp", "sources", "web"]
NAMES = st.none() | st.sampled_from([*KNOWN, "gone"])
PORTS = st.integers(0, 65535) | st.sampled_from([0, 1, 53, 80])
OBSERVATIONS = (
    st.builds(
        Observation,
        st.booleans(),
        st.sampled_from([Protocol.TCP, Protocol.UDP]),
        ADDRESSES | st.ip_addresses(),
        PORTS,
        NAMES,
        st.just(False),
        PORTS | st.sampled_from([5353, 20000, 20005, 20010, 40007]),
    )
    | st.builds(
        Observation,
        st.booleans(),
        st.sampled_from([Protocol.TCP, Protocol.UDP]),
        ADDRESSES | st.ip_addresses(),
        PORTS,
        st.none(),
        st.just(True),
    )
    | st.builds(
        Observation,
        st.just(False),
        st.just(Protocol.ICMP),
        ADDRESSES | st.ip_addresses(),
        st.just(0),
        NAMES,
        st.just(False),
    )
)


def grants(policy: Policy, known: Mapping[str, Endpoint], one: Observation) -> bool:
    """Whether the policy allows what was seen."""
    if one.is_bind and one.stays:
        return policy.bind_default is Default.CONTAINER
    ip = unmapped(one.ip)
    if not one.is_bind:
        ip = ip if int(ip) else ip_address("127.0.0.1" if ip.version == 4 else "::1")
        return any(
            rule.to.network == ip_network(ip)
            and rule.protocols == one.protocol
            and (rule.ports is None or any(one.port in ports for ports in rule.ports))
            for rule in policy.egress
        )
    return any(
        (rule.bind.address, rule.protocols, str(rule.bind.ports)) == (ip, one.protocol, str(one.port))
        and mapped_port(one.port, 0, (there := known[rule.endpoint]).port, there.last_port) is not None
        for rule in policy.ingress
    )


@given(st.lists(OBSERVATIONS, max_size=12))
def test_it_is_a_policy_that_graft_accepts_and_it_grants_what_was_seen(seen: list[Observation]) -> None:
    policy = learn("p", seen, KNOWN, DECLARED)
    found = check_policy(text(policy), KNOWN)
    assert not found.problems, (found.problems, text(policy))
    known = policy.resolve(KNOWN)
    for one in seen:
        may_be_done = one.is_bind or one.port or one.protocol is Protocol.ICMP
        assert not may_be_done or grants(policy, known, one) or _has_a_twin(one, seen), (one, text(policy))


def _has_a_twin(one: Observation, seen: list[Observation]) -> bool:
    """Whether the same was granted and left inside, or the other way round: one of them is learned."""
    return any(
        (unmapped(other.ip), other.port, other.protocol, other.is_bind)
        == (unmapped(one.ip), one.port, one.protocol, one.is_bind)
        and other.stays != one.stays
        for other in seen
    )


@given(st.integers(1, 65525), st.integers(0, 10), st.sampled_from([Protocol.TCP, Protocol.UDP]))
def test_a_bind_of_a_range_gets_the_port_that_it_had(first: int, beyond: int, protocol: Protocol) -> None:
    seen = Observation(True, protocol, ANY4, first + beyond, "rtp", got=20000 + beyond)
    policy = learn("p", [seen], KNOWN, DECLARED)
    [rule] = policy.ingress
    there = policy.resolve(KNOWN)[rule.endpoint]
    assert (there.port, there.last_port, str(rule.bind)) == (seen.got, 0, f"0.0.0.0:{seen.port}")
