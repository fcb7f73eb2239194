"""The policy that is proposed for what a container did: valid, and of nothing else."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

from hypothesis import given
from hypothesis import strategies as st

from graft.model.endpoint import Endpoint, Protocol
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
    policy = learn("p", seen, {"web": WEB, "unused": Endpoint("unused", ANY4, 9)})
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


ADDRESSES = st.sampled_from([ANY4, CLIENT, ip_address("::"), OTHER, ip_address("127.0.0.1"), ip_address("::1")])
OBSERVATIONS = st.builds(
    Observation,
    st.booleans(),
    st.sampled_from([Protocol.TCP, Protocol.UDP]),
    ADDRESSES | st.ip_addresses(),
    st.integers(0, 65535) | st.sampled_from([0, 1, 53, 80]),
    st.none(),
    st.booleans(),
) | st.builds(
    Observation,
    st.just(False),
    st.just(Protocol.ICMP),
    ADDRESSES | st.ip_addresses(),
    st.just(0),
    st.none(),
    st.booleans(),
)


@given(st.lists(OBSERVATIONS, max_size=12))
def test_it_is_a_policy_that_graft_accepts(seen: list[Observation]) -> None:
    found = check_policy(text(learn("p", seen, {})), {})
    assert not found.problems, (found.problems, text(learn("p", seen, {})))
