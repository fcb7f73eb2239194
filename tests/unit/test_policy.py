"""Policies from text: their meaning, and every error that they can have."""

from __future__ import annotations

import fcntl
import signal
import subprocess
import sys
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from textwrap import dedent

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.errors import NotFoundError, UsageError
from graft.model.address import parse_bind_pattern, parse_prefix
from graft.model.endpoint import Endpoint, Protocol, parse_endpoint
from graft.model.ports import PortRange
from graft.policy.files import read_policy
from graft.policy.limits import MAX_BYTES, MAX_RULES
from graft.policy.model import (
    Default,
    EgressRule,
    IngressRule,
    Policy,
    PolicyError,
    Problem,
    Verdict,
    policy_from_flags,
)
from graft.policy.reader import check_policy, load_policy
from graft.policy.validator import check_splice

KNOWN = {
    "nx4": parse_endpoint("nx4", "0.0.0.0:8080"),
    "other4": parse_endpoint("other4", "0.0.0.0:8081"),
    "nx6": parse_endpoint("nx6", "[::]:8080"),
    "tcp4": parse_endpoint("tcp4", "0.0.0.0:8082", proto="tcp"),
    "out4": parse_endpoint("out4", "0.0.0.0:dynamic"),
    "out6": parse_endpoint("out6", "[::]:dynamic"),
}

EXAMPLE = """\
name: nginx
endpoints:
  nx4: 0.0.0.0:8080
  nx6: "[::]:8080"
  out4: 0.0.0.0:dynamic
ingress:
  - bind: 0.0.0.0:80          # a range: 0.0.0.0:8000-8099; any address: "*:80"
    endpoint: nx4
  - bind: "[::]:80"
    endpoint: nx6
egress:
  - to: 10.0.0.0/8
    action: deny
  - to: 0.0.0.0/0
    ports: [80, 443, 8000-8099]
    protocol: tcp
    endpoint: out4
default:
  bind: container             # or deny
  connect: deny
"""


def problems_in(text: str, known: dict[str, Endpoint]) -> tuple[Problem, ...]:
    return check_policy(text, known).problems


def places(problems: Sequence[Problem]) -> list[tuple[int | None, str]]:
    return [(problem.line, problem.field) for problem in problems]


def test_the_example_means_what_it_says() -> None:
    assert load_policy(EXAMPLE, "example") == Policy(
        name="nginx",
        endpoints=(
            parse_endpoint("nx4", "0.0.0.0:8080"),
            parse_endpoint("nx6", "[::]:8080"),
            parse_endpoint("out4", "0.0.0.0:dynamic"),
        ),
        ingress=(
            IngressRule(parse_bind_pattern("0.0.0.0:80"), "nx4"),
            IngressRule(parse_bind_pattern("[::]:80"), "nx6"),
        ),
        egress=(
            EgressRule(parse_prefix("10.0.0.0/8"), Verdict.DENY),
            EgressRule(
                to=parse_prefix("0.0.0.0/0"),
                verdict=Verdict.GRANT,
                endpoint="out4",
                ports=(PortRange(80, 80), PortRange(443, 443), PortRange(8000, 8099)),
                protocols=Protocol.TCP,
            ),
        ),
        bind_default=Default.CONTAINER,
        connect_default=Default.DENY,
    )


def test_rules_know_their_place_in_the_text() -> None:
    policy = load_policy(EXAMPLE, "example")
    assert [(rule.field, rule.line) for rule in policy.ingress] == [("ingress[0]", 7), ("ingress[1]", 9)]
    assert [(rule.field, rule.line) for rule in policy.egress] == [("egress[0]", 12), ("egress[1]", 14)]


def test_an_endpoint_has_a_long_form() -> None:
    text = "name: a\nendpoints:\n  nx4: {address: 0.0.0.0:8080, protocol: tcp, netns: blue, open: true}\n"
    expected = Endpoint("nx4", ip_address("0.0.0.0"), 8080, Protocol.TCP, "blue", True)
    assert load_policy(text, "a").endpoints == (expected,)


def test_a_policy_needs_only_a_name() -> None:
    assert load_policy("name: a", "a") == Policy("a")


def test_default_deny_is_short_for_both() -> None:
    policy = load_policy("name: a\ndefault: deny\n", "a")
    assert (policy.bind_default, policy.connect_default) == (Default.DENY, Default.DENY)


def test_a_default_that_is_not_given_is_the_container() -> None:
    policy = load_policy("name: a\ndefault: {connect: deny}\n", "a")
    assert (policy.bind_default, policy.connect_default) == (Default.CONTAINER, Default.DENY)


@pytest.mark.parametrize(("line", "is_open"), [("open: true", True), ("open: false", False), ("", False)])
def test_a_policy_is_open_only_where_it_says_so(line: str, is_open: bool) -> None:
    assert load_policy(f"name: a\n{line}\n", "a").open is is_open


def test_names_that_yaml_would_convert_stay_text() -> None:
    text = "name: 123\nendpoints: {on: 1.1.1.1:1, 1e3: 1.1.1.1:2, 2020-01-01: 1.1.1.1:3}\n"
    policy = load_policy(text, "a")
    assert policy.name == "123"
    assert [endpoint.name for endpoint in policy.endpoints] == ["on", "1e3", "2020-01-01"]


def test_a_rule_may_name_an_existing_endpoint() -> None:
    assert problems_in("name: a\ningress: [{bind: 0.0.0.0:80, endpoint: nx4}]\n", KNOWN) == ()


def test_loading_without_known_endpoints_does_not_check_names() -> None:
    text = "name: a\ningress: [{bind: 0.0.0.0:80, endpoint: later}]\n"
    assert load_policy(text, "a").ingress[0].endpoint == "later"
    with pytest.raises(PolicyError):
        load_policy(text, "a", KNOWN)


def test_a_declared_endpoint_takes_precedence_over_an_existing_one() -> None:
    text = """\
    name: a
    endpoints: {nx4: "[::]:1"}
    ingress: [{bind: "[2001:db8::1]:80", endpoint: nx4}]
    """
    assert problems_in(dedent(text), KNOWN) == ()


WRONG_FIELDS = [
    ("colour: red", 2, "colour", "unknown key"),
    ("Name: a", 2, "Name", "unknown key"),
    ("open: yes", 2, "open", "must be true or false, not text"),
    ("open: [true]", 2, "open", "must be true or false, not a list"),
    ("open:", 2, "open", "there is no value"),
    ("default: maybe", 2, "default", "'maybe' is not possible here"),
    ("default: [deny]", 2, "default", "must be a mapping, not a list"),
    ("default:", 2, "default", "there is no value"),
    ("default:\n  bind: deny\n  connect: no", 4, "default.connect", "'no' is not possible here"),
    ("default:\n  connects: deny", 3, "default.connects", "unknown key"),
    ("endpoints: []", 2, "endpoints", "must be a mapping, not a list"),
    ("endpoints:", 2, "endpoints", "there is no value"),
    ("endpoints:\n  e: 1.2.3.4", 3, "endpoints.e", "'1.2.3.4' has no port"),
    ("endpoints:\n  e: 1.2.3.4:99999", 3, "endpoints.e", "port 99999 is out of range"),
    ("endpoints:\n  e: '[fe80::1%eth0]:80'", 3, "endpoints.e", "'fe80::1%eth0' has a zone"),
    ("endpoints:\n  e:", 3, "endpoints.e", "there is no value"),
    ("endpoints:\n  e: 8080", 3, "endpoints.e", "'8080' has no port"),
    ("endpoints:\n  e: []", 3, "endpoints.e", "must be a mapping, not a list"),
    ("endpoints:\n  e: {protocol: tcp}", 3, "endpoints.e.address", "the key is missing"),
    ("endpoints:\n  e:\n    address: 1.2.3.4:5\n    port: 80", 5, "endpoints.e.port", "unknown key"),
    ("endpoints:\n  e:\n    address: 1.2.3.4:5\n    netns: a/b", 5, "endpoints.e.netns", "is not a network namespace"),
    ("endpoints:\n  e:\n    address: 1.2.3.4:5\n    protocol: sctp", 5, "endpoints.e.protocol", "is not a protocol"),
    ("endpoints:\n  e:\n    address: 1.2.3.4:5\n    open: 1", 5, "endpoints.e.open", "must be true or false"),
    ("endpoints:\n  a b: 1.2.3.4:5", 3, "endpoints.'a b'", "'a b' is not a valid name"),
    (f"endpoints:\n  {'x' * 32}: 1.2.3.4:5", 3, f"endpoints.{'x' * 32}", "longer than 31 bytes"),
    ("ingress: {}", 2, "ingress", "must be a list, not a mapping"),
    ("ingress:", 2, "ingress", "there is no value"),
    ("ingress:\n  - 0.0.0.0:80=nx4", 3, "ingress[0]", "must be a mapping, not text"),
    ("ingress:\n  -", 3, "ingress[0]", "there is no value"),
    ("ingress:\n  - bind: 0.0.0.0:80", 3, "ingress[0].endpoint", "the key is missing"),
    ("ingress:\n  - endpoint: nx4", 3, "ingress[0].bind", "the key is missing"),
    ("ingress:\n  - endpoint: nx4\n    bind: 0.0.0.0", 4, "ingress[0].bind", "'0.0.0.0' has no port"),
    ("ingress:\n  - endpoint: nx4\n    bind: 0.0.0.0:9-8", 4, "ingress[0].bind", "'9-8' runs backwards"),
    ("ingress:\n  - endpoint: nx4\n    bind: 80", 4, "ingress[0].bind", "'80' has no port"),
    ("ingress:\n  - endpoint: nx4\n    bind: [80]", 4, "ingress[0].bind", "must be text, not a list"),
    ("ingress:\n  - bind: 0.0.0.0:80\n    endpoint: nope", 4, "ingress[0].endpoint", "endpoint 'nope' not found"),
    ("ingress:\n  - bind: 0.0.0.0:80\n    endpoint: true", 4, "ingress[0].endpoint", "must be text, not true or false"),
    (
        "ingress:\n  - bind: 0.0.0.0:80\n    endpoint: nx6",
        4,
        "ingress[0].endpoint",
        "an IPv4 bind cannot be",
    ),
    (
        "ingress:\n  - bind: '[::1]:80'\n    endpoint: nx4",
        4,
        "ingress[0].endpoint",
        "an IPv6 bind cannot be",
    ),
    (
        "ingress:\n  - bind: 0.0.0.0:80\n    endpoint: tcp4\n    protocol: udp",
        5,
        "ingress[0].protocol",
        "the rule is for udp, its endpoint tcp4 for tcp",
    ),
    (
        "ingress:\n  - bind: 0.0.0.0:80\n    endpoint: tcp4\n    protocol: any",
        5,
        "ingress[0].protocol",
        "the rule is for any, its endpoint tcp4 for tcp",
    ),
    ("ingress:\n  - bind: 0.0.0.0:80\n    endpoint: nx4\n    ports: [1]", 5, "ingress[0].ports", "unknown key"),
    ("egress: nothing", 2, "egress", "must be a list, not text"),
    ("egress:\n  - action: deny", 3, "egress[0].to", "the key is missing"),
    ("egress:\n  - to: 10.0.0.0/8", 3, "egress[0]", "neither endpoint nor action"),
    (
        "egress:\n  - to: 10.0.0.0/8\n    endpoint: out4\n    action: deny",
        5,
        "egress[0].action",
        "an endpoint or an action, not both",
    ),
    ("egress:\n  - to: 10.0.0.0/8\n    endpoint:", 4, "egress[0].endpoint", "there is no value"),
    ("egress:\n  - to: 10.0.0.0/8\n    action:", 4, "egress[0].action", "there is no value"),
    ("egress:\n  - to: 10.0.0.0/8\n    action: drop", 4, "egress[0].action", "'drop' is not possible here"),
    ("egress:\n  - action: deny\n    to: 10.0.0.1/8", 4, "egress[0].to", "has bits set after its prefix length"),
    ("egress:\n  - action: deny\n    to: 10.0.0.0/40", 4, "egress[0].to", "/40 is not a prefix length"),
    ("egress:\n  - action: deny\n    to: 0.0.0.0", 4, "egress[0].to", "0.0.0.0 is the container's own loopback"),
    ("egress:\n  - action: deny\n    to: ::/128", 4, "egress[0].to", ":: is the container's own loopback"),
    ("egress:\n  - to: ::/0\n    endpoint: out4", 4, "egress[0].endpoint", "IPv6 destinations cannot be reached"),
    ("egress:\n  - to: 0.0.0.0/0\n    endpoint: out6", 4, "egress[0].endpoint", "IPv4 destinations cannot be reached"),
    ("egress:\n  - to: 0.0.0.0/0\n    endpoint: nope", 4, "egress[0].endpoint", "endpoint 'nope' not found"),
    ("egress:\n  - to: ::/0\n    action: deny\n    ports: 80", 5, "egress[0].ports", "must be a list, not text"),
    ("egress:\n  - to: ::/0\n    action: deny\n    ports:", 5, "egress[0].ports", "there is no value"),
    ("egress:\n  - to: ::/0\n    action: deny\n    ports: []", 5, "egress[0].ports", "the list is empty"),
    ("egress:\n  - to: ::/0\n    action: deny\n    ports: [1, 0]", 5, "egress[0].ports[1]", "port 0 is out of range"),
    ("egress:\n  - to: ::/0\n    action: deny\n    ports: [5-]", 5, "egress[0].ports[0]", "'5-' is not a"),
    (
        "egress:\n  - to: ::/0\n    action: deny\n    ports:\n      - 1\n      - x",
        7,
        "egress[0].ports[1]",
        "is not a port",
    ),
    ("egress:\n  - to: ::/0\n    action: deny\n    protocol: sctp", 5, "egress[0].protocol", "is not a protocol"),
    (
        "egress:\n  - to: ::/0\n    action: deny\n    protocol: icmp\n    ports: [1]",
        6,
        "egress[0].ports",
        "icmp has no ports",
    ),
    (
        "egress:\n  - to: 0.0.0.0/0\n    endpoint: nx4\n    protocol: icmp",
        4,
        "egress[0].endpoint",
        "is for icmp, its endpoint nx4",
    ),
    (
        "ingress:\n  - bind: 0.0.0.0:80\n    endpoint: nx4\n    protocol: icmp",
        5,
        "ingress[0].protocol",
        "is not a protocol",
    ),
    ("endpoints:\n  e: {address: 1.1.1.1:1, multicast: [239.1.1.1]}", 3, "endpoints.e.multicast", "is at 0.0.0.0 or"),
    ("endpoints:\n  e: {address: 0.0.0.0:1, multicast: []}", 3, "endpoints.e.multicast", "the list is empty"),
    ("endpoints:\n  e: {address: 0.0.0.0:1, multicast: [10.0.0.1]}", 3, "endpoints.e.multicast[0]", "multicast group"),
    ("endpoints:\n  e: {address: 0.0.0.0:1, multicast: [x]}", 3, "endpoints.e.multicast[0]", "is not an IP address"),
    ("endpoints:\n  e: {address: 0.0.0.0:1, multicast: [ff02::1]}", 3, "endpoints.e.multicast", "endpoint's family"),
    (
        "endpoints:\n  e: {address: 0.0.0.0:1, protocol: tcp, multicast: [239.1.1.1]}",
        3,
        "endpoints.e.multicast",
        "groups are for udp",
    ),
    ("name: b", 2, "name", "duplicate key"),
    ("endpoints:\n  e: 1.1.1.1:1\n  e: 1.1.1.1:2", 4, "endpoints.e", "duplicate key"),
    ("ingress:\n  - bind: 0.0.0.0:80\n    endpoint: nx4\n    bind: 0.0.0.0:81", 5, "ingress[0].bind", "duplicate key"),
]


@pytest.mark.parametrize(("text", "line", "field", "message"), WRONG_FIELDS)
def test_a_wrong_field_is_named_with_its_line(text: str, line: int, field: str, message: str) -> None:
    problems = problems_in(f"name: a\n{text}\n", KNOWN)
    assert places(problems) == [(line, field)]
    assert message in problems[0].message
    assert "\n" not in problems[0].format("f")
    assert problems[0].hint


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "there is no value"),
        ('""', "the name is empty"),
        ("a b", "is not a valid name"),
        ("-a", "is not a valid name"),
        ("x" * 64, "longer than 63 bytes"),
        ("[a]", "must be text, not a list"),
        ("true", "must be text, not true or false"),
    ],
)
def test_a_wrong_name_is_refused(name: str, message: str) -> None:
    problems = problems_in(f"name: {name}\n", {})
    assert places(problems) == [(1, "name")]
    assert message in problems[0].message


def test_a_name_may_have_63_bytes() -> None:
    assert load_policy(f"name: {'x' * 63}", "a").name == "x" * 63


def test_a_policy_without_a_name_is_refused() -> None:
    assert places(problems_in("default: deny\n", {})) == [(1, "name")]


WRONG_YAML = [
    ("", 1, "the policy is empty"),
    ("# nothing\n", 2, "the policy is empty"),
    ("name: a\n---\nname: b\n", 2, "a second document follows"),
    ("name: a\ningress: [\n", 3, "not YAML"),
    ("name: a\n\tdefault: deny\n", 2, "not YAML"),
    ("name: a\ningress:\n  - bind: *:80\n", 3, "not YAML"),
    ("name: a\ningress:\n  - bind: [::]:80\n", 3, "not YAML"),
    ("name: a: b\n", 1, "not YAML"),
    ('name: a\nopen: "x\n', 3, "not YAML"),
    ("name: a\nx: \x01\n", 2, "character 0x01 is not allowed in YAML"),
    ("name: \ud800\n", 1, "not UTF-8"),
]


@pytest.mark.parametrize(("text", "line", "message"), WRONG_YAML)
def test_invalid_yaml_is_refused_with_its_line(text: str, line: int, message: str) -> None:
    problems = problems_in(text, KNOWN)
    assert places(problems) == [(line, "policy")]
    assert message in problems[0].message


@pytest.mark.parametrize("address", ["*:80", "[::]:80"])
def test_an_address_that_needs_quotes_gets_a_hint(address: str) -> None:
    (problem,) = problems_in(f"name: a\ningress:\n  - bind: {address}\n", KNOWN)
    assert problem.hint is not None
    assert "quotes" in problem.hint


@pytest.mark.parametrize("text", ["just text", "- a\n- b\n", "42", "~"])
def test_a_document_that_is_not_a_mapping_is_refused(text: str) -> None:
    assert places(problems_in(text, {})) == [(1, "policy")]


def test_an_alias_is_refused_before_it_costs_anything() -> None:
    lines = ["name: a", "x0: &x0 [lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 8)}]" for n in range(1, 30)]
    (problem,) = problems_in("\n".join(lines), {})
    assert (problem.line, problem.field) == (3, "x1[0]")
    assert "aliases (*x0) are not allowed" in problem.message


def test_a_merge_key_is_refused() -> None:
    (problem,) = problems_in("name: a\n<<: {open: true}\n", {})
    assert problem.message == "unknown key"


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!x", "!!int"])
def test_a_tag_is_refused(tag: str) -> None:
    (problem,) = problems_in(f"name: {tag} a\n", {})
    assert (problem.line, problem.field) == (1, "name")
    assert "tags" in problem.message


@pytest.mark.parametrize("text", ["name: !<%0A%1b> a", "name: !%0A a", f"name: *{'a' * 5000}", f"{'x' * 5000}: 1"])
def test_tags_and_anchors_do_not_break_a_message_into_lines(text: str) -> None:
    for problem in problems_in(text, {}):
        assert problem.format("f").isprintable() and len(problem.format("f")) < 200


def test_a_text_of_more_than_a_mebibyte_is_refused() -> None:
    text = "name: a\n#" + "x" * MAX_BYTES
    (problem,) = problems_in(text, {})
    assert f"the text has {len(text)} bytes" in problem.message


def test_a_text_of_exactly_a_mebibyte_is_read() -> None:
    text = "name: a\n#"
    assert problems_in(text + "x" * (MAX_BYTES - len(text)), {}) == ()


def test_deep_nesting_is_refused() -> None:
    (problem,) = problems_in("[" * 100_000, {})
    assert "nested too deep" in problem.message


def test_very_many_values_are_refused() -> None:
    (problem,) = problems_in("x: [" + "1," * 400_000 + "]", {})
    assert "values" in problem.message


def test_very_many_rules_are_refused() -> None:
    rule = "  - {to: 10.0.0.0/8, action: deny}\n"
    (problem,) = problems_in("name: a\negress:\n" + rule * (MAX_RULES + 1), {})
    assert (problem.line, problem.field) == (2, "egress")
    assert str(MAX_RULES) in problem.message


def test_very_many_map_entries_are_refused() -> None:
    odd = ", ".join(str(port) for port in range(1, 40_000, 2))
    wide = f"  - {{to: 0.0.0.0/0, endpoint: out4, ports: [{odd}]}}\n"
    narrow = "  - {to: 10.0.0.0/8, action: deny, ports: [1]}\n"
    (problem,) = problems_in("name: a\negress:\n" + wide + narrow, KNOWN)
    assert "map entries" in problem.message


def test_all_errors_are_reported_at_once() -> None:
    text = """\
    name: a b
    colour: red
    endpoints:
      e: 0.0.0.0
    ingress:
      - bind: 0.0.0.0:80-70
        endpoint: nope
      - bind: 0.0.0.0:80
        endpoint: e
      - bind: 0.0.0.0:443
        endpoint: nx6
    egress:
      - to: 10.0.0.1/8
        ports: [0]
    default: x
    """
    assert places(problems_in(dedent(text), KNOWN)) == [
        (1, "name"),
        (2, "colour"),
        (4, "endpoints.e"),
        (6, "ingress[0].bind"),
        (7, "ingress[0].endpoint"),
        (11, "ingress[2].endpoint"),
        (13, "egress[0]"),
        (13, "egress[0].to"),
        (14, "egress[0].ports[0]"),
        (15, "default"),
    ]


def ingress(*rules: tuple[str, str]) -> str:
    return "name: a\ningress:\n" + "".join(f"  - {{bind: '{bind}', endpoint: {name}}}\n" for bind, name in rules)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("0.0.0.0:80", "0.0.0.0:80"),
        ("0.0.0.0:80-90", "0.0.0.0:80-90"),
        ("0.0.0.0:80-90", "0.0.0.0:85-95"),
        ("0.0.0.0:85-95", "0.0.0.0:80-90"),
        ("0.0.0.0:80-90", "0.0.0.0:90-91"),
        ("*:80", "*:80"),
        ("[::]:80", "[::]:80"),
        ("10.0.0.1:80", "[::ffff:10.0.0.1]:80"),
    ],
)
def test_two_endpoints_for_one_bind_are_a_conflict(one: str, other: str) -> None:
    (problem,) = problems_in(ingress((one, "nx4"), (other, "other4")), KNOWN)
    assert (problem.line, problem.field) == (4, "ingress[1].bind")
    assert f"ingress[0] (line 3) redirects {parse_bind_pattern(one)} to nx4" in problem.message


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("0.0.0.0:80-90", "0.0.0.0:85"),  # one inside the other
        ("0.0.0.0:80-90", "0.0.0.0:80-85"),
        ("0.0.0.0:80-90", "0.0.0.0:85-90"),
        ("0.0.0.0:80-90", "0.0.0.0:91-99"),  # side by side
        ("0.0.0.0:80", "*:80"),  # exact before any
        ("0.0.0.0:80", "127.0.0.1:80"),
        ("0.0.0.0:80", "[::]:80"),
    ],
)
def test_distinct_binds_are_no_conflict(one: str, other: str) -> None:
    assert problems_in(ingress((one, "nx4"), (other, "other4")), KNOWN) == ()
    assert problems_in(ingress((other, "nx4"), (one, "other4")), KNOWN) == ()


def test_ranges_of_one_endpoint_may_overlap() -> None:
    assert problems_in(ingress(("0.0.0.0:80-90", "nx4"), ("0.0.0.0:85-95", "nx4")), KNOWN) == ()


RTP = {**KNOWN, "rtp": parse_endpoint("rtp", "0.0.0.0:20000-20009"), "dyn": parse_endpoint("dyn", "0.0.0.0:dynamic")}


@pytest.mark.parametrize(
    ("bind", "endpoint", "message"),
    [
        ("0.0.0.0:80-88", "rtp", "0.0.0.0:80-88 has 9 ports, the endpoint rtp (0.0.0.0:20000-20009) 10"),
        ("*:80", "rtp", "*:80 has 1 port, the endpoint rtp (0.0.0.0:20000-20009) 10"),
        ("*:0", "rtp", "a bind of port 0 cannot be redirected to the endpoint rtp, which has no dynamic port"),
        ("*:0", "nx4", "a bind of port 0 cannot be redirected to the endpoint nx4, which has no dynamic port"),
    ],
)
def test_a_rule_whose_ports_do_not_fit_its_endpoint_is_refused_at_its_line(
    bind: str, endpoint: str, message: str
) -> None:
    (problem,) = problems_in(ingress((bind, endpoint)), RTP)
    assert (problem.field, problem.message) == ("ingress[0].bind", message)
    assert problem.line and bind in ingress((bind, endpoint)).splitlines()[problem.line - 1]
    assert problem.hint


def test_ports_that_fit_their_endpoint_are_accepted() -> None:
    assert problems_in(ingress(("*:80-89", "rtp"), ("*:0", "dyn"), ("*:1-50", "dyn"), ("*:90-95", "nx4")), RTP) == ()


def test_ranges_that_make_two_ports_of_one_are_in_conflict_though_their_endpoint_is_one() -> None:
    (problem,) = problems_in(ingress(("*:80-89", "rtp"), ("*:85-94", "rtp")), RTP)
    assert problem.field == "ingress[1].bind"
    assert problems_in(ingress(("*:80-89", "rtp"), ("*:80-89", "rtp"), ("*:90-99", "rtp")), RTP) == ()


def test_transport_splice_refuses_a_bind_of_port_0() -> None:
    policy = load_policy(ingress(("*:80", "nx4"), ("*:0", "dyn")), "p", RTP)
    (problem,) = check_splice(policy)
    assert problem.field == "ingress[1].bind" and problem.line
    (problem,) = check_splice(policy_from_flags("p", ["*:0=dyn"], []))
    assert (problem.field, problem.line) == ("-i *:0=dyn", None)


def test_any_address_can_have_an_endpoint_of_each_family() -> None:
    assert problems_in(ingress(("*:80", "nx4"), ("*:80", "nx6")), KNOWN) == ()


def test_a_dual_stack_bind_can_be_redirected_to_an_ipv4_endpoint() -> None:
    assert problems_in(ingress(("[::]:80", "nx4")), KNOWN) == ()


def test_rules_for_different_protocols_are_no_conflict() -> None:
    text = """\
    name: a
    ingress:
      - {bind: 0.0.0.0:53, endpoint: nx4, protocol: tcp}
      - {bind: 0.0.0.0:53, endpoint: other4, protocol: udp}
    """
    assert problems_in(dedent(text), KNOWN) == ()


def egress(*rules: str) -> str:
    return "name: a\negress:\n" + "".join(f"  - {{{rule}}}\n" for rule in rules)


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ("action: deny", "action: container", "every port of 10.0.0.0/8 has action container"),
        ("action: deny", "endpoint: out4", "every port of 10.0.0.0/8 has endpoint out4"),
        ("endpoint: nx4", "endpoint: out4", "endpoint out4 for tcp, but endpoint nx4 in egress[0]"),
        ("ports: [80-90], action: deny", "ports: [1, 85-99], endpoint: out4", "port 85 of 10.0.0.0/8"),
        ("action: deny", "ports: [443], endpoint: out4", "port 443 of 10.0.0.0/8"),
    ],
)
def test_two_outcomes_for_one_destination_are_a_conflict(one: str, other: str, message: str) -> None:
    (problem,) = problems_in(egress(f"to: 10.0.0.0/8, {one}", f"to: 10.0.0.0/8, {other}"), KNOWN)
    assert (problem.line, problem.field) == (4, "egress[1].to")
    assert message in problem.message
    assert "egress[0] (line 3)" in problem.message


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("to: 10.0.0.0/8, action: deny", "to: 10.0.0.0/9, action: container"),
        ("to: 10.0.0.0/8, action: deny, ports: [80]", "to: 10.0.0.0/8, action: container, ports: [81]"),
        ("to: 10.0.0.0/8, action: deny, protocol: tcp", "to: 10.0.0.0/8, action: container, protocol: udp"),
        ("to: 10.0.0.0/8, action: deny", "to: 10.0.0.0/8, action: deny, ports: [80]"),
        ("to: 10.0.0.0/8, endpoint: tcp4", "to: 10.0.0.0/8, action: deny, protocol: udp"),
    ],
)
def test_distinct_destinations_are_no_conflict(one: str, other: str) -> None:
    assert problems_in(egress(one, other), KNOWN) == ()


@pytest.mark.parametrize("kind", ["egress", "ingress"])
def test_every_rule_in_conflict_with_an_earlier_one_is_reported(kind: str) -> None:
    if kind == "egress":
        text = egress(*(f"to: 10.0.0.0/8, endpoint: {name}" for name in ("nx4", "other4", "nx4", "other4")))
    else:
        text = ingress(*(("0.0.0.0:80-90", name) for name in ("nx4", "other4", "nx4", "other4")))
    assert [problem.line for problem in problems_in(text, KNOWN)] == [4, 5, 6]


def test_a_problem_is_one_line_with_its_line_number_and_hint() -> None:
    problem = Problem(7, "ingress[0].bind", "'0.0.0.0' has no port", "ADDR:PORT")
    assert problem.format("p.yaml") == "p.yaml:7: ingress[0].bind: '0.0.0.0' has no port (ADDR:PORT)"


def test_loading_an_invalid_policy_raises_every_problem() -> None:
    with pytest.raises(PolicyError) as caught:
        load_policy("name: a\ncolour: red\nopen: 1\n", "p.yaml")
    assert isinstance(caught.value, UsageError)
    assert caught.value.message == "p.yaml:2: colour: unknown key (and 1 more)"
    assert places(caught.value.problems) == [(2, "colour"), (3, "open")]


def test_a_valid_policy_is_checked_and_compiled() -> None:
    examined = check_policy(EXAMPLE, {})
    assert examined.policy is not None
    assert examined.ruleset is not None
    assert examined.problems == ()


def test_flags_make_a_policy() -> None:
    policy = policy_from_flags("run", ["0.0.0.0:80=nx4", "*:8000-8099=nx4"], ["0.0.0.0/0=out4"])
    assert policy == Policy(
        name="run",
        ingress=(
            IngressRule(parse_bind_pattern("0.0.0.0:80"), "nx4"),
            IngressRule(parse_bind_pattern("*:8000-8099"), "nx4"),
        ),
        egress=(EgressRule(parse_prefix("0.0.0.0/0"), Verdict.GRANT, "out4"),),
    )
    assert policy.ingress[0].field == "-i 0.0.0.0:80=nx4"


@pytest.mark.parametrize(("ingress_flags", "egress_flags", "flag"), [(["x"], [], "-i"), ([], ["x"], "-e")])
def test_a_wrong_flag_is_refused(ingress_flags: list[str], egress_flags: list[str], flag: str) -> None:
    with pytest.raises(UsageError, match=f"^{flag}: "):
        policy_from_flags("run", ingress_flags, egress_flags)


def test_flags_do_not_import_yaml() -> None:
    code = """
import sys
from graft.policy.compiler import compile_policy
from graft.model.endpoint import parse_endpoint
from graft.policy.model import policy_from_flags
compile_policy(policy_from_flags("a", ["*:80=e"], []), {"e": parse_endpoint("e", "0.0.0.0:1")})
assert "yaml" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("regular_only", [False, True])
def test_a_file_is_read_as_text(tmp_path: Path, regular_only: bool) -> None:
    file = tmp_path / "p.yaml"
    file.write_bytes(b"\xef\xbb\xbfname: a\n")
    assert read_policy(file, regular_only) == "name: a\n"


def test_a_leased_file_is_refused_at_once(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text("name: a\n")
    previous = signal.signal(signal.SIGIO, signal.SIG_IGN)  # what the kernel sends to the holder of a lease
    try:
        with file.open("rb") as leased:
            fcntl.fcntl(leased, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            with pytest.raises(UsageError, match=r"^policy: .*p.yaml is leased by another process$"):
                read_policy(file, regular_only=True)
    finally:
        signal.signal(signal.SIGIO, previous)


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"^policy: .*p.yaml not found$"):
        read_policy(tmp_path / "p.yaml")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"#" * (MAX_BYTES + 1)])
def test_a_file_that_is_not_text_or_too_big_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "p.yaml"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=r"^policy: "):
        read_policy(file)


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"policy: cannot read .*: Is a directory"):
        read_policy(tmp_path)


LEAVES = st.sampled_from(
    ["nx4", "out6", "nope", "deny", "80", "1-5", "0.0.0.0:80", "'*:80-90'", "::/0", "10.0.0.0/8", "true", "", "'", "&a"]
)
KEYS = st.sampled_from(
    ["name", "endpoints", "ingress", "egress", "default", "open", "bind", "to", "ports", "endpoint", "action", "x"]
)
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4).map(lambda items: f"[{', '.join(items)}]")
        | st.lists(st.tuples(KEYS, inner), max_size=6).map(
            lambda pairs: "{" + ", ".join(f"{key}: {value}" for key, value in pairs) + "}"
        )
    ),
    max_leaves=25,
)


@given(TREES)
@settings(max_examples=300, deadline=None)
def test_any_tree_is_a_policy_or_gets_problems_with_lines(text: str) -> None:
    for problem in problems_in(text, KNOWN):
        assert problem.line is not None
        assert problem.field
        assert "\n" not in problem.format("f")


@given(st.text(max_size=200))
@settings(deadline=None)
def test_any_text_is_a_policy_or_gets_problems(text: str) -> None:
    examined = check_policy(text, KNOWN)
    assert (examined.policy is None) == bool(examined.problems)
