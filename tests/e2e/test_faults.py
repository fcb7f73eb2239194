"""What can fail, made to fail: a clear message, nothing half done, nothing more permitted, and a way back.

Most faults have their tests where the part is tested. docs/operations.md has the table of all of them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from graft.kernel import cgroup
from graft.policy.limits import MAX_RULES
from tests.e2e.conftest import MakeCgroup, WritePolicy
from tests.e2e.test_run import stack
from tests.support.building import Programs
from tests.support.installation import GRAFT, Host
from tests.support.namespaces import CLIENT4, HOST4, Netns
from tests.support.program import Program
from tests.support.shell import Result, Word, run
from tests.support.wait import PATIENCE, until

pytestmark = pytest.mark.e2e

SOON = 20.0  # seconds for a command, beside a process of Graft's that does not answer
SERVER = (
    "import socket\n"
    "sock = socket.create_server(('0.0.0.0', 80))\n"
    "print('ready', flush=True)\n"
    "while True:\n"
    "    sock.accept()[0].sendall(b'hello\\n')\n"
)
HOME = (
    "import socket\n"
    "sock = socket.create_server(('0.0.0.0', 80))\n"
    "print('home', int.from_bytes(sock.getsockopt(1, 71, 8), 'little'), flush=True)\n"  # SO_NETNS_COOKIE
    "sock.accept()\n"
)


def serve(host: Host, *rules: Word) -> tuple[Program, int]:
    """A server under `graft run`, and its port at the host."""
    port = host.port()
    program = host.start("-i", f"0.0.0.0:80={host.endpoint(f'0.0.0.0:{port}')}", *rules, "--", "python3", "-c", SERVER)
    program.says("ready")
    return program, port


def greeting(host: Host, port: int) -> str:
    """What a server at the host's port says to a client."""
    with host.client.connected(HOST4, port) as sock:
        return sock.makefile().readline()


def is_one_line(result: Result) -> bool:
    """Whether a command has said what is wrong, in one line."""
    return result.stderr.startswith("graft: ") and result.stderr.count("\n") == 1 and "Traceback" not in result.stderr


# ---- processes that stop, or end at a bad moment --------------------------------------------------------


def test_a_program_that_is_killed_in_the_middle_of_a_call_leaves_nothing(host: Host, programs: Programs) -> None:
    rules: list[Word] = ["-e", f"0.0.0.0/0={host.endpoint('0.0.0.0:dynamic')}"]
    steps: list[Word] = ["socket", "4", "connect", CLIENT4, 9, "wait", "socket", "4", "connect", CLIENT4, 9]
    program = host.start(*rules, "--", programs["calls"], *steps, talk=True)
    program.says("connect")
    supervisor = host.supervisor(program)
    os.kill(supervisor, signal.SIGSTOP)
    program.tell("\n")
    child = program.child()
    until("the trapped call", lambda: "seccomp" in stack(child))
    os.kill(child, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):  # it may be ended with its program
        os.kill(supervisor, signal.SIGCONT)
    assert program.wait() == -signal.SIGKILL
    until("nothing is left", lambda: not host.leftovers())


def test_no_command_waits_for_a_supervisor_that_is_stopped(host: Host, write_policy: WritePolicy) -> None:
    program, port = serve(host)
    container = host.container(program)
    supervisor = host.supervisor(program)
    policy = write_policy(f"name: other\ningress: [{{bind: '*:81', endpoint: {host.endpoint('0.0.0.0:dynamic')}}}]\n")
    os.kill(supervisor, signal.SIGSTOP)
    try:
        for words in (("ps",), ("policy", "show", str(container.id)), ("ep", "show")):
            begun = time.monotonic()
            host.graft(*words)
            assert time.monotonic() - begun < SOON * PATIENCE
        assert greeting(host, port) == "hello\n"
        begun = time.monotonic()
        host.graft("policy", "apply", "--cgroup", str(container.id), policy)
        assert time.monotonic() - begun < SOON * PATIENCE
        assert "(IPv4):81 -> " in host.graft("policy", "show", str(container.id)).stdout
    finally:
        os.kill(supervisor, signal.SIGCONT)
    program.stop()
    until("nothing is left", lambda: not host.leftovers())


# ---- what a container is named by, gone --------------------------------------------------------


def test_an_endpoint_keeps_a_namespace_whose_name_is_deleted_until_it_is_deleted_itself(
    host: Host, netns: Callable[[], Netns]
) -> None:
    place = netns()
    cookie = place.cookie
    host.graft("ep", "add", "kept", "0.0.0.0:8080", "--netns", place.name)
    run(["ip", "netns", "delete", place.name], status=0)
    program = host.start("-i", "0.0.0.0:80=kept", "--", "python3", "-c", HOME)
    assert program.says("home").split()[-1] == str(cookie)
    program.stop()
    assert "kept" in host.graft("ep", "show").stdout
    host.graft("ep", "del", "kept")
    assert host.leftovers() == []


def test_a_cgroup_that_is_deleted_while_it_is_attached_leaves_nothing(host: Host, make_cgroup: MakeCgroup) -> None:
    path = make_cgroup()
    host.graft("attach", "--cgroup", path, "-i", f"0.0.0.0:80={host.endpoint('0.0.0.0:8080')}")
    path.rmdir()
    assert not any(one["cgroup"] == str(path) for one in host.ps())
    refused = host.graft("detach", "--cgroup", path, status=None)
    assert refused.returncode != 0 and is_one_line(refused)
    assert host.leftovers() == []


# ---- limits --------------------------------------------------------


def test_a_policy_at_its_limit_is_in_force_and_one_rule_more_is_refused(host: Host, write_policy: WritePolicy) -> None:
    port = host.port()
    name = host.endpoint(f"0.0.0.0:{port}")
    rules = [
        f"  - {{bind: '127.1.{number // 250}.{number % 250 + 1}:80', endpoint: {name}}}" for number in range(MAX_RULES)
    ]
    last = f"127.1.{(MAX_RULES - 1) // 250}.{(MAX_RULES - 1) % 250 + 1}"
    whole = write_policy("name: most\ningress:\n" + "\n".join(rules) + "\n")
    server = SERVER.replace("0.0.0.0", last)
    program = host.start("--policy", whole, "--", "python3", "-c", server)
    program.says("ready")
    assert greeting(host, port) == "hello\n"
    program.stop()
    more = write_policy("name: more\ningress:\n" + "\n".join([*rules, rules[0].replace(":80", ":81")]) + "\n")
    refused = host.run(["--policy", more], "true", status=2)
    assert f"ingress: more than {MAX_RULES} of them" in refused.stderr and refused.stderr.count("\n") == 1
    assert host.leftovers() == []


@pytest.mark.parametrize(("count", "status"), [(16, 6), (24, 6), (63, 6), (64, 0)])
def test_a_command_without_descriptors_says_so_and_leaves_nothing(host: Host, count: int, status: int) -> None:
    rules = ["-i", f"0.0.0.0:80={host.endpoint('0.0.0.0:8080')}"]
    command: list[Word] = ["prlimit", f"--nofile={count}", GRAFT, "run", *rules, "--", "true"]
    result = run(command, environment={**host.environment, "GRAFT_NO_FORK_SERVER": "1"}, status=status)
    assert status == 0 or (is_one_line(result) and str(count) in result.stderr)
    assert host.leftovers() == []


@pytest.fixture
def few_processes() -> Iterator[Callable[[int], list[str]]]:
    """Gives the words before a command that lets it, and what it starts, have so many processes (pids controller)."""
    both = Path("/sys/fs/cgroup/pids")
    path = (both if both.is_dir() else cgroup.v2_mount()) / f"graft-test-few-{os.getpid()}"
    path.mkdir()

    def words(most: int) -> list[str]:
        (path / "pids.max").write_text(f"{most}\n")
        return ["sh", "-c", f'echo $$ > {path}/cgroup.procs; exec "$@"', "sh"]

    yield words
    until("its processes have ended", lambda: not (path / "cgroup.procs").read_text())
    path.rmdir()


@pytest.mark.parametrize("most", range(1, 7))
def test_a_command_that_cannot_make_a_process_says_so_and_leaves_nothing(
    host: Host, few_processes: Callable[[int], list[str]], most: int
) -> None:
    rules = ["-i", f"0.0.0.0:80={host.endpoint('0.0.0.0:8080')}"]
    command: list[Word] = [*few_processes(most), GRAFT, "run", *rules, "--", "true"]
    result = run(command, environment={**host.environment, "GRAFT_NO_FORK_SERVER": "1"})
    assert result.returncode == 0 or is_one_line(result), result.stderr
    until("nothing is left", lambda: not host.leftovers())
