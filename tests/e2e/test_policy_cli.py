"""`graft policy check`: every error of a policy with its line, its field and what would be right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.installation import Host

pytestmark = pytest.mark.e2e

GOOD = """\
name: nginx
endpoints:
  nx4: 0.0.0.0:8080
  nx6: "[::]:8080"
  out4: 0.0.0.0:dynamic
ingress:
  - bind: 0.0.0.0:80
    endpoint: nx4
  - bind: "[::]:80"
    endpoint: nx6
egress:
  - to: 10.0.0.0/8
    action: deny
  - to: 0.0.0.0/0
    ports: [80, 443]
    endpoint: out4
default:
  bind: container
  connect: container
"""


def check(host: Host, folder: Path, text: str | bytes, status: int) -> list[str]:
    file = folder / "p.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    result = host.graft("policy", "check", file, status=status)
    assert "Traceback" not in result.stderr
    return (result.stdout + result.stderr).replace(str(file), "p.yaml").splitlines()


def test_a_good_policy_is_one_line(host: Host, tmp_path: Path) -> None:
    assert len(check(host, tmp_path, GOOD, 0)) == 1


@pytest.mark.parametrize(
    "old, new, line, field",
    [
        ("bind: 0.0.0.0:80", "bind: 0.0.0.0:99999", 7, "ingress[0].bind"),
        ("bind: 0.0.0.0:80", "bnid: 0.0.0.0:80", 7, "ingress[0]"),
        ("endpoint: nx4", "endpoint: nx5", 8, "ingress[0].endpoint"),
        ("endpoint: nx4", "endpoint: nx6", 8, "ingress[0].endpoint"),
        ("to: 10.0.0.0/8", "to: 10.0.0.1/8", 12, "egress[0].to"),
        ("action: deny", "action: drop", 13, "egress[0].action"),
        ("ports: [80, 443]", "ports: [80, x]", 15, "egress[1].ports[1]"),
        ("bind: container", "bind: host", 18, "default.bind"),
        ("0.0.0.0:dynamic", "0.0.0.0:random", 5, "endpoints.out4"),
    ],
)
def test_an_error_is_shown_with_its_line_and_field(
    host: Host, tmp_path: Path, old: str, new: str, line: int, field: str
) -> None:
    said = check(host, tmp_path, GOOD.replace(old, new, 1), 2)
    assert any(one.startswith(f"p.yaml:{line}: {field}") for one in said), said


def test_all_errors_are_shown_at_once(host: Host, tmp_path: Path) -> None:
    bad = GOOD.replace("0.0.0.0:80\n", "0.0.0.0:x\n").replace("deny", "drop").replace("443", "70000")
    assert len(check(host, tmp_path, bad, 2)) == 3


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\0",
        b"\xff\xfe\xfa",
        b"name: [",
        b"- a\n- b\n",
        b"name: a\nname: b\n",
        b"&a [*a, *a]\n",
        b"42\n",
        b"name:\n",
        b"%YAML 9\n",
    ],
)
def test_malformed_files_are_refused_with_clear_lines(host: Host, tmp_path: Path, text: bytes) -> None:
    said = check(host, tmp_path, text, 2)
    assert said and all("p.yaml" in line for line in said)


def test_a_file_that_is_not_found_is_one_line(host: Host, tmp_path: Path) -> None:
    result = host.graft("policy", "check", tmp_path / "none", status=3)
    assert result.stderr.count("\n") == 1


def test_json_has_the_same_problems(host: Host, tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(GOOD.replace("deny", "drop"))
    found = json.loads(host.graft("policy", "check", "--json", file, status=2).stdout)
    assert not found["ok"] and found["problems"][0]["line"] == 13
