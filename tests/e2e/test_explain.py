"""`graft explain` says what then happens, and by which rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import MakeCgroup, StartPuppet, WritePolicy
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, HOST4
from tests.support.puppet import Puppet

pytestmark = pytest.mark.e2e

_POLICY = """
name: explained
ingress:
  - bind: 0.0.0.0:80
    endpoint: {web}
  - bind: '*:8000-8009'
    endpoint: {range}
egress:
  - to: {client}/32
    ports: [{port}]
    endpoint: {out}
  - to: {client}/32
    ports: [9]
    action: deny
  - to: {network}
    endpoint: {out}
default: deny
"""


@pytest.fixture
def explained(host: Host, make_cgroup: MakeCgroup, write_policy: WritePolicy) -> dict[str, Any]:
    first = host.ports(10)
    names = {
        "web": host.endpoint(f"0.0.0.0:{host.port()}", "tcp"),
        "range": host.endpoint(f"0.0.0.0:{first}-{first + 9}"),
        "out": host.endpoint("0.0.0.0:dynamic"),
    }
    network = f"{CLIENT4.rsplit('.', 1)[0]}.0/24"
    path, port = make_cgroup(), host.port()
    host.graft(
        "attach",
        "--cgroup",
        path,
        "--policy",
        write_policy(_POLICY.format(client=CLIENT4, port=port, network=network, **names)),
    )
    return {**names, "path": path, "first": first, "port": port, "network": network}


def explain(host: Host, path: Path, call: str, address: str, *words: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(host.graft("explain", path, call, address, *words, "--json").stdout)
    return found


def happens(puppet: Puppet, call: str, address: str, protocol: str) -> str:
    ip, port = address.rsplit(":", 1)
    return str(getattr(puppet, call)(ip, int(port), protocol))


def test_what_it_says_happens(host: Host, explained: dict[str, Any], start_puppet: StartPuppet) -> None:
    path, puppet = explained["path"], start_puppet(explained["path"])
    with host.client.listener(CLIENT4, explained["port"]):
        for call, address, protocol, verdict, outcome in (
            ("bind", "0.0.0.0:80", "tcp", "granted", "ok"),
            ("bind", "0.0.0.0:80", "udp", "refused", "EACCES"),
            ("bind", "127.0.0.1:80", "tcp", "refused", "EACCES"),
            ("bind", "0.0.0.0:8003", "tcp", "granted", "ok"),
            ("bind", f"{HOST4}:8004", "udp", "granted", "ok"),
            ("bind", "0.0.0.0:8010", "tcp", "refused", "EACCES"),
            ("connect", f"{CLIENT4}:{explained['port']}", "tcp", "granted", "ok"),
            ("connect", f"{CLIENT4}:9", "tcp", "refused", "EACCES"),
            ("connect", f"{CLIENT4}:10", "tcp", "granted", "ECONNREFUSED"),
            ("connect", "127.0.0.1:10", "tcp", "refused", "EACCES"),
            ("connect", "0.0.0.0:10", "tcp", "refused", "EACCES"),
        ):
            found = explain(host, path, call, address, "--proto", protocol)
            assert (found["verdict"], happens(puppet, call, address, protocol)) == (verdict, outcome), found


def test_it_names_the_rule_and_the_endpoint(host: Host, explained: dict[str, Any]) -> None:
    path, first = explained["path"], explained["first"]
    found = explain(host, path, "bind", "10.9.8.7:8003")
    assert found["text"] == f"becomes {explained['range']} 0.0.0.0:{first + 3} on the host's stack"
    assert found["rule"].startswith("ingress any * (IPv4):8000-8009 ->")
    found = explain(host, path, "connect", f"{CLIENT4}:9")
    assert found["rule"] == f"egress any {CLIENT4}/32:9 -> deny"
    network = explain(host, path, "connect", explained["network"].replace(".0/24", ".77:9"))
    assert network["rule"].startswith(f"egress any {explained['network']} from {explained['out']}")
    assert network["endpoint"] == explained["out"]
    text = host.graft("explain", path, "connect", "203.0.113.1:1").stdout
    assert "refused (EACCES): no rule grants it, and the default is deny" in text
    assert "decided by: the policy's default" in text


def test_bad_questions_are_one_line(host: Host, explained: dict[str, Any]) -> None:
    path = explained["path"]
    assert "call: no such call: 'send'" in host.graft("explain", path, "send", "1.2.3.4:5", status=2).stderr
    assert (
        "--proto: no such protocol" in host.graft("explain", path, "bind", "1.2.3.4:5", "--proto", "x", status=2).stderr
    )
    assert "address" in host.graft("explain", path, "bind", "1.2.3.4", status=2).stderr
    assert "nobody" in host.graft("explain", "nobody", "bind", "1.2.3.4:5", status=3).stderr


def test_what_check_explains_is_what_is_then_in_force(
    host: Host, make_cgroup: MakeCgroup, write_policy: WritePolicy
) -> None:
    first, path = host.ports(10), make_cgroup()
    text = _POLICY.format(
        web=host.endpoint(f"0.0.0.0:{host.port()}", "tcp"),
        range=host.endpoint(f"0.0.0.0:{first}-{first + 9}"),
        out=host.endpoint("0.0.0.0:dynamic"),
        client=CLIENT4,
        port=80,
        network="192.0.2.0/24",
    )
    file = write_policy(text)
    explained = json.loads(host.graft("policy", "check", file, "--explain", "--json").stdout)["rules"]
    lines = host.graft("policy", "check", file, "--explain").stdout.splitlines()
    host.graft("attach", "--cgroup", path, "--policy", file)
    shown = json.loads(host.graft("policy", "show", path, "--json").stdout)["rules"]
    assert explained == shown and len(shown) > 5
    assert lines[1:] == host.graft("policy", "show", path).stdout.splitlines()[1:]
