"""What a thirty-sixth reading found in `graft policy learn`: by one bind in a network namespace of its own a program
that shares the host's had a policy proposed under which it binds every port there. And what it bound of a range of
ports was learned as a policy that is none.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from graft.model.transport import Transport
from graft.policy.model import Default
from graft.policy.reader import check_policy
from tests.hostile.conftest import graft_without
from tests.support.cgroups import in_cgroup, new_cgroup
from tests.support.installation import GRAFT, Host
from tests.support.namespaces import CLIENT4
from tests.support.plain import plain
from tests.support.program import Program
from tests.support.puppet import puppet
from tests.support.shell import AS_NOBODY, Word, output

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

ELSEWHERE = f"""
import contextlib, socket
socket.socket().bind(("0.0.0.0", 4242))
with contextlib.suppress(OSError):  # no route leads there
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(("{CLIENT4}", 4243))
print("done")
"""
NOBODY = 65534


class Watched:
    """A container while `graft policy learn` watches it."""

    def __init__(self, host: Host, path: Path, command: list[Word]) -> None:
        self._learning = host.start_command([*command, "policy", "learn", path, "--seconds", "600"])
        self._trace = host.start_command([GRAFT, "trace", path])
        for program in (self._learning, self._trace):
            _until_it_watches(program)

    def learned(self, last: str, file: Path) -> Path:
        """The policy, as soon as ``last`` was seen, in ``file``."""
        self._trace.says(last)
        self._learning.process.send_signal(signal.SIGINT)
        assert self._learning.wait() == 0
        file.write_text(self._learning.said)
        return file


def _until_it_watches(program: Program) -> None:
    program.until("it watches", lambda: "watching" in program.complained)


# ---- a network namespace of its own


@pytest.mark.parametrize("without", ["", "learned elsewhere"], ids=["", "control"])
def test_what_is_done_in_a_namespace_of_its_own_opens_nothing_on_the_host(
    host: Host, tmp_path: Path, without: str
) -> None:
    port = host.port()
    with new_cgroup("learned") as path:
        host.graft("attach", "--cgroup", path)
        watched = Watched(host, path, graft_without(without))
        own = [*in_cgroup(path), *AS_NOBODY, "unshare", "--user", "--net", "/usr/bin/python3", "-c", ELSEWHERE]
        assert output(["nsenter", f"--net={host.netns.path}", "--", *own]) == "done\n"
        with puppet(path, host.netns.path, NOBODY) as program:
            assert program.bind("0.0.0.0", port) == "ok"
        file = watched.learned(f":{port}", tmp_path / "learned.yaml")
        host.graft("policy", "apply", file, "--cgroup", path)
        with puppet(path, host.netns.path, NOBODY) as program:
            assert program.bind("0.0.0.0", port) == "ok"
            there = [program.bind("0.0.0.0", port + 1), program.connect(CLIENT4, 4243, "udp")]
        host.remove_at(path)
    assert there == (["ok", "ok"] if without else ["EACCES", "EACCES"])
    assert ("namespaces that it made itself" in file.read_text()) is not bool(without)


# ---- an endpoint that is a range


def of_a_range(host: Host, folder: Path) -> tuple[int, Path]:
    """Its first port, and a policy that grants all eleven."""
    first, file = host.ports(11), folder / "first.yaml"
    rules = f"endpoints: {{r: '0.0.0.0:{first}-{first + 10}'}}\ningress: [{{bind: '*:5000-5010', endpoint: r}}]\n"
    file.write_text(f"name: first\n{rules}default: deny\n")
    return first, file


def test_of_a_range_the_port_is_learned_that_was_bound(host: Host, tmp_path: Path) -> None:
    first, file = of_a_range(host, tmp_path)
    with new_cgroup("learned") as path:
        host.graft("attach", "--cgroup", path, "--policy", file)
        watched = Watched(host, path, [GRAFT])
        with puppet(path, host.netns.path, NOBODY) as program:
            assert program.bind("0.0.0.0", 5005) == "ok"
        file = watched.learned(":5005", tmp_path / "learned.yaml")
        assert f"learned-r-{first + 5}" in host.graft("policy", "check", "--explain", file).stdout
        host.graft("policy", "apply", file, "--cgroup", path)
        with puppet(path, host.netns.path, NOBODY) as program:
            program.listener("0.0.0.0", 5005)
            assert host.netns.listens(first + 5)
            assert [program.bind("0.0.0.0", 5006), program.bind("127.0.0.1", 5005)] == ["EACCES"] * 2
        host.remove_at(path)
    assert "name the range to grant all of them" in file.read_text()


def test_where_graftd_relays_it_is_the_same(host: Host, tmp_path: Path) -> None:
    first, file = of_a_range(host, tmp_path)
    with plain(host) as container:
        container.attach("--policy", file)
        watched = Watched(host, container.cgroup, [GRAFT])
        with container.listener(port=5005):
            container.until_published(first + 5)
            file = watched.learned(":5005", tmp_path / "learned.yaml")
        container.until_published(first + 5, False)
        host.graft("policy", "apply", file, "--cgroup", container.cgroup)
        with container.listener(port=5005):
            container.until_published(first + 5)
            with pytest.raises(PermissionError):
                container.listener(port=5006)


# ---- a datagram socket that binds no port of its choice

ANY_PORT = """
import socket, sys
print("ready", flush=True)
for line in sys.stdin:
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).bind(("0.0.0.0", 0))
    print(line.strip(), flush=True)
"""


def test_a_port_of_the_kernels_choice_is_not_learned_as_one_that_all_may_send_to(host: Host, tmp_path: Path) -> None:
    """Under transport swap the default lets a socket have one, at which it receives from where it may send to. A rule
    for it would have it receive from everybody.
    """
    out = host.endpoint("0.0.0.0:dynamic")
    program = host.start("-e", f"0.0.0.0/0={out}", "--", "/usr/bin/python3", "-uc", ANY_PORT, talk=True)
    program.says("ready")
    container = host.container(program)
    assert container.transport is Transport.SWAP
    watched = Watched(host, container.cgroup_path, [GRAFT])
    program.tell("first\n")
    program.says("first")
    file = watched.learned("on the host's stack", tmp_path / "learned.yaml")
    policy = check_policy(file.read_text(), {}).policy
    assert policy is not None
    assert (policy.ingress, policy.bind_default) == ((), Default.CONTAINER)
    host.graft("policy", "apply", file, "--cgroup", container.cgroup)
    program.tell("second\n")
    program.says("second")
