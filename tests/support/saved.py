"""States to be saved, of every kind: strategies for hypothesis, and one that has something of everything."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address

from hypothesis import strategies as st

from graft.model.address import BindPattern, IPAddress, parse_prefix
from graft.model.endpoint import ANY_PROTOCOL, Endpoint, Protocol, parse_endpoint, unix_endpoint
from graft.model.ports import PortRange
from graft.model.transport import Transport
from graft.model.unix_socket import UnixSocket
from graft.policy.model import Default, EgressRule, IngressRule, Policy, UnixRule, Verdict
from graft.saved.model import LastSeen, SavedAttachment, SavedState, Target, saved_state

IP4 = st.integers(1, 0xDFFFFFFF).map(IPv4Address)
IP6 = st.integers(0x2000 << 112, 0x3FFF << 112).map(IPv6Address)
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,20}", fullmatch=True)
WORDS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.@ é~'#:{}-]{0,12}", fullmatch=True)
NETNS = st.none() | st.sampled_from(["blue", "true", "null", "0x10"]) | WORDS.map(lambda text: f"/run/netns/{text}")
PROTOCOLS = st.sampled_from([Protocol.TCP, Protocol.UDP, ANY_PROTOCOL])
IDS = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)


@st.composite
def ip_endpoints(draw: st.DrawFn, name: str) -> Endpoint:
    address: IPAddress = draw(IP4 | IP6 | st.sampled_from([ip_address("0.0.0.0"), ip_address("::")]))
    first = draw(st.integers(0, 65000))
    last = draw(st.just(0) | st.integers(first + 1, 65535)) if first else 0
    protocols = draw(PROTOCOLS)
    groups: tuple[IPAddress, ...] = ()
    if address == ip_address("0.0.0.0") and protocols & Protocol.UDP:
        groups = draw(st.sampled_from([(), (ip_address("239.1.1.1"), ip_address("239.1.1.2"))]))
    dual = address == ip_address("::") and draw(st.booleans())
    return Endpoint(name, address, first, protocols, draw(NETNS), draw(st.booleans()), dual, last, groups)


@st.composite
def unix_endpoints(draw: st.DrawFn, name: str) -> Endpoint:
    owner = draw(st.none() | st.sampled_from(["www-data", "0:0", "a:b"]))
    sock = UnixSocket("/run/" + draw(WORDS), owner, draw(st.sampled_from([0o660, 0o600, 0o777, 0o7])))
    return unix_endpoint(name, sock, draw(st.booleans()))


def endpoints(name: str) -> st.SearchStrategy[Endpoint]:
    return st.one_of(ip_endpoints(name), unix_endpoints(name))


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    """Rules of different ports and prefixes, so that none contradicts another."""
    ingress = tuple(
        IngressRule(
            BindPattern(draw(st.none() | IP4), PortRange(100 * n + 1, draw(st.integers(100 * n + 1, 100 * n + 99)))),
            f"in{n}",
            draw(st.none() | PROTOCOLS),
        )
        for n in range(draw(st.integers(0, 3)))
    )
    unix = tuple(UnixRule(f"/own-{n}.sock", f"sock{n}") for n in range(draw(st.integers(0, 2))))
    egress = tuple(draw(egress_rules(n)) for n in range(draw(st.integers(0, 4))))
    defaults = st.sampled_from(Default)
    return Policy(
        name=draw(NAMES),
        ingress=ingress,
        egress=egress,
        bind_default=draw(defaults),
        connect_default=draw(defaults),
        open=draw(st.booleans()),
        other_default=draw(st.none() | defaults),
        unix_ingress=unix,
    )


@st.composite
def egress_rules(draw: st.DrawFn, number: int) -> EgressRule:
    verdict = draw(st.sampled_from([Verdict.GRANT, Verdict.DENY, Verdict.CONTAINER]))
    ports = draw(st.none() | st.just((PortRange(80, 80), PortRange(8000, 8099))))
    protocols = draw(st.none() | PROTOCOLS) if ports else draw(st.none() | PROTOCOLS | st.just(Protocol.ICMP))
    prefix = parse_prefix(draw(st.sampled_from([f"10.{number}.0.0/16", f"2001:db8:{number}::/48", f"9.9.9.{number}"])))
    return EgressRule(prefix, verdict, "out" if verdict is Verdict.GRANT else None, ports, protocols)


@st.composite
def attachments(draw: st.DrawFn, number: int) -> SavedAttachment:
    kind = draw(st.sampled_from(["cgroup", "docker", "podman", "unit"]))
    name = draw(WORDS) + str(number)
    target = Target(kind, f"slice/{name}" if kind == "cgroup" else name)
    transports = st.none() | st.sampled_from([Transport.DIRECT, Transport.SPLICE])
    last = draw(st.just(LastSeen()) | st.builds(LastSeen, WORDS.map(lambda w: f"docker/{w}"), IDS, transports))
    policy = draw(policies())
    return SavedAttachment(target, policy, draw(transports), draw(st.sampled_from([None, "splice", "kernel"])), last)


@st.composite
def states(draw: st.DrawFn) -> SavedState:
    names = draw(st.lists(NAMES, unique=True, max_size=4))
    found = [draw(endpoints(name)) for name in names]
    return saved_state(found, [draw(attachments(n)) for n in range(draw(st.integers(0, 3)))])


EVERY_RULE = Policy(
    "web",
    endpoints=(parse_endpoint("own", "127.0.0.1:8082", "tcp"),),
    ingress=(IngressRule(BindPattern(None, PortRange(80, 89)), "own", Protocol.TCP),),
    egress=(EgressRule(parse_prefix("10.0.0.0/8"), Verdict.DENY, None, (PortRange(443, 443),)),),
    bind_default=Default.DENY,
)
ATTACHMENT = SavedAttachment(
    Target("docker", "web"), EVERY_RULE, None, "splice", LastSeen("docker/" + "0a" * 32, "0a" * 32, Transport.SPLICE)
)
ENDPOINT = parse_endpoint("nx4", "0.0.0.0:8080", "udp", "blue", True, multicast=["239.1.1.1"])
