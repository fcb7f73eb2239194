"""The schema for editors accepts what the reader accepts, and refuses mistakes that one sees in a value or a rule."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft7Validator

from graft.policy.document import read_document
from graft.policy.reader import check_policy
from graft.policy.schema import policy_schema

ROOT = Path(__file__).parents[2]
POLICIES = re.findall(
    r"^```yaml\n(.*?)^```\n(?:```text\n(.*?)^```)?", (ROOT / "docs" / "policy.md").read_text(), re.MULTILINE | re.DOTALL
)
VALIDATOR = Draft7Validator(policy_schema())


class CoreLoader(yaml.SafeLoader):
    """YAML 1.2's core schema, which the language servers read by. (PyYAML's own is of 1.1: 1:30 is 90 there.)"""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # as the class above declares it


for tag, pattern, first in (
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", None),
):
    letters = [*(first or "-+0123456789."), *([""] if tag == "null" else [])]
    CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^({pattern})$"), letters)


def core_number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = node.value
    return int(text, 0) if text[:2] in ("0x", "0o") else int(text)


CoreLoader.add_constructor("tag:yaml.org,2002:int", core_number)


def as_an_editor_reads(text: str) -> Any:
    """The values of a YAML text; the keys as the text that JSON has."""

    def with_text_keys(value: Any) -> Any:
        if isinstance(value, dict):
            return {key if isinstance(key, str) else str(key): with_text_keys(one) for key, one in value.items()}
        return [with_text_keys(one) for one in value] if isinstance(value, list) else value

    return with_text_keys(yaml.load(text, CoreLoader))


def complaints(value: Any) -> list[str]:
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in VALIDATOR.iter_errors(value)]


def test_the_schema_is_one() -> None:
    Draft7Validator.check_schema(policy_schema())


def test_the_command_prints_it_without_root() -> None:
    program = "from graft_cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "policy", "schema"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == policy_schema()


@pytest.mark.parametrize(
    "text",
    [text for text, errors in POLICIES if not errors] + [(ROOT / "examples/podman/nginx/web.yaml").read_text()],
)
def test_every_valid_policy_of_the_documentation_is_accepted(text: str) -> None:
    assert not complaints(as_an_editor_reads(text))


@pytest.mark.parametrize(
    "text", [text for text, errors in POLICIES if "did you mean" in errors or "has no port" in errors]
)
def test_an_invalid_policy_of_the_documentation_is_refused(text: str) -> None:
    assert complaints(as_an_editor_reads(text))


@pytest.mark.parametrize(
    "text",
    [
        "endpoints: {1.5: 0.0.0.0:0, 80: 0.0.0.0:1-65535}",
        "endpoints: {a: {address: 0.0.0.0:80, netns: 1234, open: TRUE, dual_stack: False}}",
        "endpoints: {a: {address: '[::]:80', multicast: [FF02::FB]}, b: {address: 0.0.0.0:5, multicast: [239.1.1.1]}}",
        "endpoints: {a: {address: 'unix:/run/..a/b', owner: 1000, mode: 0660, dual_stack: false, protocol: any}}",
        "ingress: [{bind: '*:0', endpoint: 80}, {bind: '[::FFFF:10.0.0.1]:1-2', endpoint: a}]",
        "egress: [{to: '::/0', endpoint: 7, ports: [80, '443', 8000-8099]}]",
        "egress: [{to: 10.0.0.1/32, action: deny, protocol: icmp}]",
        "default: {}",
        "ingress: []\negress: []\nendpoints: {}",
    ],
)
def test_a_rare_form_is_accepted_as_by_the_reader(text: str) -> None:
    whole = f"name: 007\n{text}\n"
    assert not check_policy(whole, None).problems
    assert not complaints(as_an_editor_reads(whole))


MISTAKES = [
    ("egres: []", "'egres' was unexpected"),
    ("open: yes", "open: 'yes' is not of type 'boolean'"),
    ("endpoints: {a: 0.0.0.0}", "endpoints.a: '0.0.0.0' does not match"),
    ("endpoints: {a: '::1:80'}", "endpoints.a: '::1:80' does not match"),
    ("endpoints: {a: 'localhost:80'}", "endpoints.a: "),
    ("endpoints: {a: 0.0.0.0:65536}", "endpoints.a: "),
    ("endpoints: {a: 0.0.0.256:80}", "endpoints.a: "),
    ("endpoints: {a: 0.0.0.0:http}", "endpoints.a: "),
    ("endpoints: {my web: 0.0.0.0:80}", "'my web' does not match"),
    ("endpoints: {a: {protocol: tcp}}", "endpoints.a: 'address' is a required property"),
    ("endpoints: {a: {address: 0.0.0.0:80, proto: tcp}}", "'proto' was unexpected"),
    ("endpoints: {a: {address: 0.0.0.0:80, protocol: icmp}}", "endpoints.a.protocol: "),
    ("endpoints: {a: {address: 0.0.0.0:80, owner: www-data}}", "False schema does not allow 'www-data'"),
    ("endpoints: {a: {address: 'unix:/a', netns: blue}}", "False schema does not allow 'blue'"),
    ("endpoints: {a: {address: 'unix:/a', protocol: udp}}", "endpoints.a.protocol: "),
    ("endpoints: {a: {address: 'unix:/a', mode: '0999'}}", "endpoints.a.mode: "),
    ("endpoints: {a: 'unix:/a/../b'}", "endpoints.a: "),
    ("endpoints: {a: {address: 0.0.0.0:80, multicast: [10.0.0.1]}}", "endpoints.a.multicast.0: "),
    ("endpoints: {a: {address: 0.0.0.0:80, multicast: 239.1.1.1}}", "endpoints.a.multicast: "),
    ("endpoints: {a: }", "endpoints.a: None is not of type 'string'"),
    ("ingress: {bind: 0.0.0.0:80, endpoint: a}", "ingress: "),
    ("ingress: [0.0.0.0:80=a]", "ingress.0: '0.0.0.0:80=a' is not of type 'object'"),
    ("ingress: [{bind: 0.0.0.0:80}]", "ingress.0: 'endpoint' is a required property"),
    ("ingress: [{endpoint: a}]", "ingress.0: 'bind' is a required property"),
    ("ingress: [{bind: 80, endpoint: a}]", "ingress.0.bind: 80 is not of type 'string'"),
    ("ingress: [{bind: 0.0.0.0:dynamic, endpoint: a}]", "ingress.0.bind: "),
    ("ingress: [{bind: 0.0.0.0:80, to: a}]", "'to' was unexpected"),
    ("ingress: [{bind: 'unix:/a', endpoint: a, protocol: tcp}]", "False schema does not allow 'tcp'"),
    ("egress: [{to: 10.0.0.0/8}]", "egress.0: "),
    ("egress: [{to: 10.0.0.0/8, endpoint: a, action: deny}]", "egress.0: "),
    ("egress: [{to: 10.0.0.0/8, action: drop}]", "egress.0.action: 'drop' is not one of"),
    ("egress: [{to: 10.0.0.0/33, action: deny}]", "egress.0.to: "),
    ("egress: [{to: example.org, action: deny}]", "egress.0.to: "),
    ("egress: [{to: 10.0.0.0/8, action: deny, ports: 80}]", "egress.0.ports: 80 is not of type 'array'"),
    ("egress: [{to: 10.0.0.0/8, action: deny, ports: []}]", "egress.0.ports: "),
    ("egress: [{to: 10.0.0.0/8, action: deny, ports: [0]}]", "egress.0.ports.0: "),
    ("egress: [{to: 10.0.0.0/8, action: deny, ports: [70000]}]", "egress.0.ports.0: "),
    ("egress: [{to: 10.0.0.0/8, action: deny, ports: [http]}]", "egress.0.ports.0: "),
    ("egress: [{to: 10.0.0.0/8, action: deny, protocol: icmp, ports: [1]}]", "False schema does not allow [1]"),
    ("default: drop", "default: 'drop' is not one of"),
    ("default:", "default: None is not one of"),
    ("default: {listen: deny}", "'listen' was unexpected"),
]


@pytest.mark.parametrize(("text", "said"), MISTAKES)
def test_a_typical_mistake_is_refused_at_its_place_as_by_the_reader(text: str, said: str) -> None:
    whole = f"name: p\n{text}\n"
    assert [one for one in complaints(as_an_editor_reads(whole)) if said in one], complaints(as_an_editor_reads(whole))
    assert check_policy(whole, None).problems


def test_a_policy_without_a_name_is_refused() -> None:
    assert complaints({"default": "deny"}) == [": 'name' is a required property"]


NAMES = st.sampled_from(["a", "b", "80", "1.5", "0x1F", "1e3", "007", "no", "A_b.c-d", "a" * 31, "2024-01-01", "1_0"])
PORTS = st.sampled_from(["1", "80", "443", "65535", "8000-8099", "1-65535", "60000-65535"])
ADDRESSES = st.sampled_from(
    [
        "0.0.0.0",
        "127.0.0.1",
        "255.255.255.255",
        "[::]",
        "[::1]",
        "[2001:DB8::1]",
        "[::ffff:10.0.0.1]",
        "[0:0:0:0:0:0:0:0]",
    ]
)
PATHS = st.sampled_from(["unix:/a", "unix:/run/x/.s.PGSQL.5432", "unix:/" + "a" * 106, "unix:/ü/..b/c..", "unix:/a b"])
PREFIXES = st.sampled_from(
    [
        "10.0.0.0/8",
        "0.0.0.0/0",
        "10.1.2.3",
        "10.1.2.3/32",
        "::/0",
        "2001:db8::/32",
        "::1",
        "::ffff:10.0.0.0/104",
        "ff02::fb",
    ]
)
GROUPS = st.sampled_from(["239.1.1.1", "224.0.0.251", "ff02::fb", "FF05::1"])
PROTOCOLS = st.sampled_from(["tcp", "udp", "any"])
SWITCHES = st.sampled_from(["true", "True", "FALSE", "false"])


def joined(*parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.tuples(*parts).map("".join)


def scalar(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """A value as an operator may write it."""
    return st.tuples(values, st.sampled_from(["", '"', "'"])).map(lambda pair: f"{pair[1]}{pair[0]}{pair[1]}")


def flow(**fields: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """A mapping with some of the fields; with those whose names end in _ always."""
    needed = {key.rstrip("_"): value for key, value in fields.items() if key.endswith("_")}
    more = {key: value for key, value in fields.items() if not key.endswith("_")}
    found = st.fixed_dictionaries(needed, optional=more)
    return found.map(lambda values: "{" + ", ".join(f"{key}: {value}" for key, value in values.items()) + "}")


def some(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.lists(values, min_size=1, max_size=2).map(lambda items: "[" + ", ".join(items) + "]")


NETNS = st.sampled_from(["blue", "1234", "/run/netns/x", "-5", "1.5", "a:b@c"])
OWNERS = st.sampled_from(["root", "1000", "1000:1000", "www-data:www-data", "-5", ".nan", "1.5"])
MODES = st.sampled_from(["0660", "660", "0777", "000"])
ENDPOINTS = st.one_of(
    scalar(joined(ADDRESSES, st.just(":"), PORTS | st.sampled_from(["dynamic", "0"])) | PATHS),
    flow(
        address_=scalar(joined(ADDRESSES, st.just(":"), PORTS)),
        protocol=PROTOCOLS,
        netns=scalar(NETNS),
        open=SWITCHES,
        dual_stack=SWITCHES,
        multicast=some(scalar(GROUPS)),
    ),
    flow(
        address_=scalar(PATHS),
        protocol=PROTOCOLS,
        open=SWITCHES,
        dual_stack=SWITCHES,
        owner=scalar(OWNERS),
        mode=scalar(MODES),
    ),
)
INGRESS = st.one_of(
    flow(
        bind_=scalar(joined(ADDRESSES | st.just("*"), st.just(":"), PORTS | st.just("0"))),
        endpoint_=NAMES,
        protocol=PROTOCOLS,
    ),
    flow(bind_=scalar(PATHS), endpoint_=scalar(NAMES)),
)
EGRESS = flow(
    to_=scalar(PREFIXES),
    ports=some(scalar(PORTS)),
    protocol=PROTOCOLS | st.just("icmp"),
    endpoint=scalar(NAMES),
    action=st.sampled_from(["deny", "container"]),
)
OUTCOMES = scalar(st.sampled_from(["deny", "container"]))
TEXTS = st.fixed_dictionaries(
    {"name": scalar(NAMES)},
    optional={
        "open": SWITCHES,
        "endpoints": st.dictionaries(scalar(NAMES), ENDPOINTS, max_size=2).map(
            lambda found: "{" + ", ".join(f"{key}: {value}" for key, value in found.items()) + "}"
        ),
        "ingress": some(INGRESS) | st.just("[]"),
        "egress": some(EGRESS) | st.just("[]"),
        "default": OUTCOMES | flow(bind=OUTCOMES, connect=OUTCOMES, other=OUTCOMES),
    },
).map(lambda found: "".join(f"{key}: {value}\n" for key, value in found.items()))


@given(TEXTS)
def test_what_the_reader_accepts_the_schema_accepts(text: str) -> None:
    document = read_document(text)
    if document.problems or check_policy(text, None).problems:
        return
    assert not complaints(document.value), text
    assert not complaints(as_an_editor_reads(text)), text


@given(ENDPOINTS)
def test_an_endpoint_that_the_reader_accepts_the_schema_accepts(value: str) -> None:
    text = f"name: p\nendpoints: {{a: {value}}}\n"
    if not check_policy(text, None).problems:
        assert not complaints(as_an_editor_reads(text)), text


@given(INGRESS | EGRESS)
def test_a_rule_that_the_reader_accepts_the_schema_accepts(value: str) -> None:
    text = f"name: p\n{'egress' if '{to:' in value else 'ingress'}: [{value}]\n"
    if not check_policy(text, None).problems:
        assert not complaints(as_an_editor_reads(text)), text
