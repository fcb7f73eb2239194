"""What is saved: written and read again it is the same, and every damage is found."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.errors import UsageError
from graft.model.endpoint import parse_endpoint
from graft.policy.model import PolicyError
from graft.policy.reader import load_policy
from graft.policy.writer import policy_value
from graft.saved import envelope
from graft.saved.model import (
    SavedAttachment,
    SavedState,
    Target,
    outlives_boot,
    parse_target,
)
from graft.saved.text import export_text, import_text
from graft.saved.values import (
    attachment_value,
    endpoint_file_value,
    plain_document,
    read_attachment,
    read_endpoint_file,
    read_state,
)
from tests.support.saved import ATTACHMENT, ENDPOINT, EVERY_RULE, states


@given(states())
@settings(max_examples=60)
def test_each_endpoint_and_attachment_comes_back_from_its_bytes(state: SavedState) -> None:
    for endpoint in state.endpoints:
        document = plain_document(envelope.decode(envelope.encode(endpoint_file_value(endpoint)), "f"))
        assert read_endpoint_file(document) == endpoint, document.problems
    for attachment in state.attachments:
        document = plain_document(envelope.decode(envelope.encode(attachment_value(attachment)), "f"))
        assert read_attachment(document) == attachment, document.problems


@given(states())
@settings(max_examples=60)
def test_the_whole_comes_back_from_yaml(state: SavedState) -> None:
    text = export_text(state)
    # What rules name is not in it: that is checked, and tested below. So read it as a file of each part would be.
    whole = SavedState(state.endpoints)
    assert import_text(export_text(whole), "f") == whole
    document = plain_document(yaml.safe_load(text))
    for index, attachment in enumerate(state.attachments):
        assert read_attachment(document, ("attachments", index)) == attachment, document.problems


def test_a_policy_is_written_as_an_operator_would_have() -> None:
    assert policy_value(EVERY_RULE) == {
        "name": "web",
        "endpoints": {"own": {"address": "127.0.0.1:8082", "protocol": "tcp"}},
        "ingress": [{"bind": "*:80-89", "endpoint": "own", "protocol": "tcp"}],
        "egress": [{"to": "10.0.0.0/8", "ports": ["443"], "action": "deny"}],
        "default": {"bind": "deny", "connect": "container"},
    }


def test_a_policy_is_read_again_from_its_yaml_text() -> None:
    assert load_policy(yaml.safe_dump(policy_value(EVERY_RULE)), "f", {}) == EVERY_RULE


@pytest.mark.parametrize("value", [endpoint_file_value(ENDPOINT), attachment_value(ATTACHMENT)], ids=["ep", "attached"])
def test_each_flipped_byte_is_found(value: dict[str, object]) -> None:
    raw = envelope.encode(value)  # type: ignore[arg-type]
    assert envelope.decode(raw, "f") == value
    for index in range(len(raw)):
        for bit in range(8):
            damaged = raw[:index] + bytes([raw[index] ^ 1 << bit]) + raw[index + 1 :]
            with pytest.raises(UsageError, match=r"^f: damaged: ") as caught:
                envelope.decode(damaged, "f")
            assert "\n" not in caught.value.message


@given(st.integers(0, 10_000), st.binary(max_size=40))
@settings(max_examples=200)
def test_truncated_and_lengthened_files_are_found(length: int, more: bytes) -> None:
    raw = envelope.encode(attachment_value(ATTACHMENT))
    for damaged in (raw[: length % len(raw)], raw + b"x" + more, more):
        with pytest.raises(UsageError):
            envelope.decode(damaged, "f")


@given(st.binary(max_size=200))
def test_what_has_the_right_checksum_and_makes_no_sense_is_refused_too(body: bytes) -> None:
    head = b"graft-saved 1 " + envelope._checksum(1, body) + b"\n"
    try:
        document = plain_document(envelope.decode(head + body, "f"))
    except UsageError:
        return
    assert read_endpoint_file(document) is None and document.problems
    document = plain_document(envelope.decode(head + body, "f"))
    assert read_attachment(document) is None and document.problems
    assert read_state(plain_document(json.loads(body))) is None or json.loads(body) in ({}, None)


def test_a_newer_version_says_so() -> None:
    newer = envelope.encode({"name": "nx4", "place": "elsewhere"}, version=2)
    with pytest.raises(UsageError, match="of version 2, which this Graft cannot read"):
        envelope.decode(newer, "f")


WRONG = [
    ("version: 2\n", 1, "version", "reads version 1"),
    ("version: 1\nendpoints: {a: 0.0.0.0}\n", 2, "endpoints.a", "has no port"),
    ("version: 1\nendpoints:\n  a: 0.0.0.0:1\n  a: 0.0.0.0:2\n", 4, "endpoints.a", "duplicate"),
    ("version: 1\nattachments: [{policy: {name: p}}]\n", 2, "attachments[0].container", "missing"),
    ("version: 1\nattachments:\n - container: web\n   policy: {name: p}\n", 3, "attachments[0].container", "not a con"),
    ("version: 1\nattachments:\n - container: docker:web\n", 3, "attachments[0].policy", "missing"),
    ("version: 1\nattachments:\n - {container: 'docker:a', policy: {name: p}, x: 1}\n", 3, "attachments[0].x", "unkno"),
    (
        "version: 1\nattachments:\n - container: docker:a\n   policy:\n     name: p\n     ingress:\n"
        "      - bind: 0.0.0.0:80\n        endpoint: gone\n",
        8,
        "attachments[0].policy.ingress[0].endpoint",
        "'gone' not found",
    ),
    (
        "version: 1\nattachments:\n - {container: 'docker:a', policy: {name: p}}\n"
        " - {container: 'docker:a', policy: {name: p}}\n",
        4,
        "attachments[1].container",
        "there twice",
    ),
    (
        "version: 1\nendpoints: {a: 0.0.0.0:1}\nattachments:\n"
        " - {container: 'docker:a', policy: {name: p, endpoints: {a: '0.0.0.0:2'}}}\n",
        4,
        "attachments[0].policy.endpoints.a",
        "0.0.0.0:1 elsewhere",
    ),
    ("- a\n", 1, "the file", "must be a mapping"),
    ("version: 1\nendpoints: *x\n", 2, "endpoints", "aliases"),
]


@pytest.mark.parametrize(("text", "line", "field", "message"), WRONG)
def test_each_error_of_an_import_has_its_line_and_field(text: str, line: int, field: str, message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        import_text(text, "x.yaml")
    lines = caught.value.lines()
    assert any(one.startswith(f"x.yaml:{line}: {field}: ") and message in one for one in lines), lines


def test_a_policy_may_use_what_another_one_declares() -> None:
    text = """\
version: 1
attachments:
  - container: docker:a
    policy: {name: a, ingress: [{bind: 0.0.0.0:80, endpoint: shared}]}
  - container: docker:b
    policy: {name: b, endpoints: {shared: 0.0.0.0:8080}}
"""
    assert [one.target.name for one in import_text(text, "f").attachments] == ["a", "b"]


def test_the_whole_with_policies_that_name_its_endpoints_is_the_same_again() -> None:
    out = parse_endpoint("out4", "0.0.0.0:dynamic")
    policy = load_policy("name: p\negress: [{to: 0.0.0.0/0, endpoint: out4}]\n", "f", {"out4": out})
    state = SavedState((ENDPOINT, out), (ATTACHMENT, SavedAttachment(Target("unit", "a.service"), policy)))
    assert import_text(export_text(state), "f") == state


@pytest.mark.parametrize("netns", ["1234", "/proc/1234/ns/net", "/proc/self/ns/net"])
def test_an_endpoint_in_the_namespace_of_a_process_does_not_outlive_a_boot(netns: str) -> None:
    assert not outlives_boot(parse_endpoint("a", "0.0.0.0:1", netns=netns))
    assert outlives_boot(parse_endpoint("a", "0.0.0.0:1", netns="blue"))
    assert outlives_boot(parse_endpoint("a", "0.0.0.0:1", netns="/run/netns/blue"))
    assert outlives_boot(parse_endpoint("a", "unix:/run/a.sock"))


@pytest.mark.parametrize(
    "text", ["web", "docker:", "docker:a/b", "graft:a", "cgroup:/a", "cgroup:a/../b", "cgroup:a//b", "unit:a\0"]
)
def test_a_target_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^container: "):
        parse_target(text)


def test_what_runs_for_long_has_nothing_of_it_in_memory() -> None:
    program = (
        "import sys, graft_cli.main, graft.commands.run, graft.oci.shim, graft.splice.daemon\n"
        "assert not [name for name in sys.modules if name == 'yaml' or name.startswith('graft.saved')]"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
