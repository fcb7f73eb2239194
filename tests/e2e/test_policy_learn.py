"""`graft policy learn`: the policy that it proposes allows what was done, and nothing else."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.e2e.conftest import MakeCgroup, StartPuppet
from tests.support.installation import GRAFT, Host
from tests.support.namespaces import CLIENT4
from tests.support.puppet import Puppet

pytestmark = pytest.mark.e2e


def acts(puppet: Puppet, port: int, there: int) -> list[str]:
    """A bind, a connection and a datagram; gives what became of each."""
    return [
        str(puppet.bind("0.0.0.0", port)),
        str(puppet.connect(CLIENT4, there)),
        str(puppet.sendto(CLIENT4, 9)),
    ]


@pytest.mark.parametrize("before", ["nothing denied", "all denied"])
def test_the_learned_policy_allows_what_was_done_and_nothing_else(
    host: Host, make_cgroup: MakeCgroup, start_puppet: StartPuppet, tmp_path: Path, before: str
) -> None:
    path, port, file = make_cgroup(), host.port(), tmp_path / "learned.yaml"
    first = tmp_path / "first.yaml"
    first.write_text("name: first\n" + ("default: deny\n" if before == "all denied" else ""))
    host.graft("attach", "--cgroup", path, "--policy", first)
    with host.client.listener(CLIENT4) as listener:
        there = listener.getsockname()[1]
        learning = host.start_command([GRAFT, "policy", "learn", path, "--seconds", "600"])
        learning.until("it watches", lambda: "watching" in learning.complained)
        watched = host.start_command([GRAFT, "trace", path, "--call", "send"])
        watched.until("it watches", lambda: "watching" in watched.complained)
        puppet = start_puppet(path)
        expected = ["ok"] * 3 if before == "nothing denied" else ["EACCES"] * 3
        assert acts(puppet, port, there) == expected
        watched.says(f"{CLIENT4}:9")
        learning.process.send_signal(signal.SIGINT)
        assert learning.wait() == 0
        file.write_text(learning.said)
        host.graft("policy", "check", file)
        host.graft("policy", "apply", file, "--cgroup", path)
        puppet.stop()
        puppet = start_puppet(path)
        assert acts(puppet, port, there) == ["ok"] * 3
        assert acts(puppet, port + 1, there + 1) == ["EACCES", "EACCES", "ok"]
        assert puppet.bind("127.0.0.1", port) == "EACCES"


def test_who_does_nothing_is_granted_nothing(host: Host, make_cgroup: MakeCgroup) -> None:
    path = make_cgroup()
    host.graft("attach", "--cgroup", path, "--deny", "-i", f"0.0.0.0:80={host.endpoint('0.0.0.0:dynamic')}")
    text = host.graft("policy", "learn", path, "--seconds", "0.2").stdout
    assert text.splitlines() == [
        f"# What {path.name} did while it was watched.",
        f"name: {path.name}",
        "default:",
        "  bind: deny",
        "  connect: deny",
    ]
