"""`graft ep`: what is stored, and every refusal as one clear line with its exit code."""

from __future__ import annotations

import json

import pytest

from graft.kernel import netns
from graft.model.endpoint import parse_endpoint
from tests.support.installation import Host
from tests.support.namespaces import namespace

pytestmark = pytest.mark.kernel

LONGEST = "n" * 31


@pytest.mark.parametrize(
    "words, shown",
    [
        (["web", "0.0.0.0:8080"], ["web", "0.0.0.0:8080", "any", "host"]),
        (["web6", "[2001:DB8::1]:443", "--proto", "tcp"], ["web6", "[2001:db8::1]:443", "tcp", "host"]),
        (["out", "10.0.0.1:dynamic", "--proto", "udp"], ["out", "10.0.0.1:dynamic", "udp", "host"]),
        (["zero", "0.0.0.0:0"], ["zero", "0.0.0.0:dynamic", "any", "host"]),
        (["rtp", "0.0.0.0:20000-20100"], ["rtp", "0.0.0.0:20000-20100", "any", "host"]),
        (["one", "[::]:80-80"], ["one", "[::]:80", "any", "host"]),
        ([LONGEST, "0.0.0.0:65535"], [LONGEST, "0.0.0.0:65535", "any", "host"]),
    ],
)
def test_an_endpoint_is_shown_as_it_was_added(host: Host, words: list[str], shown: list[str]) -> None:
    host.graft("ep", "add", *words)
    assert host.graft("ep", "show").stdout.rstrip("\n").split("\t")[:4] == shown
    assert host.graft("ep", "show", words[0]).stdout.split("\t")[0] == words[0]
    host.graft("ep", "del", words[0])
    assert host.graft("ep", "show").stdout == ""


def test_json_has_every_field(host: Host) -> None:
    host.graft("ep", "add", "web", "[::]:80", "--open", "--netns", host.client.name)
    (found,) = json.loads(host.graft("ep", "show", "--json").stdout)
    assert {name: found[name] for name in ("name", "address", "family", "protocol", "open", "declared", "netns")} == {
        "name": "web",
        "address": "[::]:80",
        "family": "ipv6",
        "protocol": "any",
        "open": True,
        "declared": False,
        "netns": host.client.name,
    }


@pytest.mark.parametrize(
    "words, status, field",
    [
        (["add", "web", "0.0.0.0:80"], 4, "name"),  # there is one already
        (["add", "", "0.0.0.0:80"], 2, "name"),
        (["add", LONGEST + "n", "0.0.0.0:80"], 2, "name"),
        (["add", "-x", "0.0.0.0:80"], 2, "-x"),
        (["add", "a/b", "0.0.0.0:80"], 2, "name"),
        (["add", "é", "0.0.0.0:80"], 2, "name"),
        (["add", "new", "0.0.0.0"], 2, "address"),
        (["add", "new", "0.0.0.0:65536"], 2, "port"),
        (["add", "new", "0.0.0.0:-1"], 2, "port"),
        (["add", "new", "0.0.0.0:80x"], 2, "port"),
        (["add", "new", "256.0.0.1:80"], 2, "address"),
        (["add", "new", "example.org:80"], 2, "address"),
        (["add", "new", "::1:80"], 2, "address"),
        (["add", "new", "[fe80::1%eth0]:80"], 2, "zone"),
        (["add", "new", "0.0.0.0:80", "--proto", "sctp"], 2, "proto"),
        (["add", "new", "0.0.0.0:80", "--netns", "no-such"], 3, "netns"),
        (["add", "new", "0.0.0.0:80", "--netns", "/etc/passwd"], 3, "netns"),
        (["add", "new", "0.0.0.0:80", "--netns", "999999999"], 3, "netns"),
        (["add", "new", "0.0.0.0:80", "--netns", "../netns/x"], 2, "netns"),
        (["set", "none", "0.0.0.0:80"], 3, "none"),
        (["set", "web", "0.0.0.0:99999"], 2, "port"),
        (["del", "none"], 3, "none"),
        (["show", "none"], 3, "none"),
    ],
)
def test_what_is_wrong_is_one_clear_line_and_changes_nothing(
    host: Host, words: list[str], status: int, field: str
) -> None:
    with host.installation.transaction() as change:
        change.endpoints.add(parse_endpoint("web", "0.0.0.0:8080"))
    before = host.installation.endpoints.listing()
    refused = host.graft("ep", *words, status=status)
    assert field in refused.stderr and "Traceback" not in refused.stderr
    if not words[1].startswith("-"):  # typer reports an unknown option in its own words
        assert refused.stderr.startswith("graft: ") and refused.stderr.count("\n") == 1
    assert host.installation.endpoints.listing() == before


def test_set_changes_an_endpoint_in_its_place(host: Host) -> None:
    host.graft("ep", "add", "web", "0.0.0.0:80")
    host.graft("ep", "set", "web", "127.0.0.1:81", "--proto", "tcp")
    assert host.graft("ep", "show").stdout.split("\t")[:3] == ["web", "127.0.0.1:81", "tcp"]


def test_a_namespace_outlives_the_name_that_it_was_given_by(host: Host) -> None:
    with namespace("fleeting") as fleeting:
        cookie = fleeting.cookie
        host.graft("ep", "add", "web", "0.0.0.0:80", "--netns", fleeting.name)
    (kept,) = (path for path in (host.settings.run_dir / "netns").iterdir() if path.name.isdigit())
    assert netns.cookie(kept) == cookie
    host.graft("ep", "del", "web")
    assert not kept.exists()
