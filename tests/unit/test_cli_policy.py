"""`graft policy check`: its output and exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

GOOD = """\
name: nginx
endpoints: {nx4: 0.0.0.0:8080}
ingress: [{bind: 0.0.0.0:80, endpoint: nx4, protocol: tcp}]
egress: [{to: 10.0.0.0/8, action: deny, protocol: tcp}]
"""
BAD = """\
name: nginx
ingress:
  - bind: 0.0.0.0
    endpoint: nope
"""


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    return tmp_path / "policy.yaml"


def check(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command with pins that do not exist: the endpoints of the machine do not count."""
    code = "from graft_cli.main import main; main()"
    command = [sys.executable, "-c", code, "policy", "check", *map(str, arguments)]
    environment = {**os.environ, "GRAFT_PIN_DIR": "/nonexistent/graft", "TERM": "dumb"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=30)


def test_a_good_policy_gets_one_line(policy: Path) -> None:
    policy.write_text(GOOD)
    done = check(policy)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{policy}: ok (1 ingress, 1 egress rules, 4 map entries)\n"


def test_a_bad_policy_gets_a_line_for_every_error_and_exit_2(policy: Path) -> None:
    policy.write_text(BAD)
    done = check(policy)
    assert done.returncode == 2
    assert done.stdout.splitlines() == [
        f"{policy}:3: ingress[0].bind: '0.0.0.0' has no port (ADDR:PORT, such as 0.0.0.0:80 or [::]:80)",
        f"{policy}:4: ingress[0].endpoint: endpoint 'nope' not found"
        " (declare it under endpoints, or add it with: graft ep add)",
    ]


def test_json_has_the_counts_of_a_good_policy(policy: Path) -> None:
    policy.write_text(GOOD)
    assert json.loads(check(policy, "--json").stdout) == {
        "file": str(policy),
        "ok": True,
        "policy": "nginx",
        "ingress": 1,
        "egress": 1,
        "entries": 4,
        "problems": [],
    }


def test_json_has_the_problems_of_a_bad_policy(policy: Path) -> None:
    policy.write_text(BAD)
    done = check(policy, "--json")
    assert done.returncode == 2
    result = json.loads(done.stdout)
    assert result["ok"] is False
    assert [(problem["line"], problem["field"]) for problem in result["problems"]] == [
        (3, "ingress[0].bind"),
        (4, "ingress[0].endpoint"),
    ]


def test_a_missing_file_is_one_line_and_exit_3(tmp_path: Path) -> None:
    done = check(tmp_path / "nothing.yaml")
    assert done.returncode == 3
    assert done.stderr == f"graft: policy: {tmp_path / 'nothing.yaml'} not found\n"
