"""A container's sockets can neither block the operator's commands nor be hidden from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from graft.kernel import cgroup, sockets, tasks
from graft.kernel.pidfd import threads_have_pidfds
from tests.hostile.conftest import graft_without
from tests.support.building import Programs
from tests.support.cgroups import in_cgroup, new_cgroup
from tests.support.installation import GRAFT, Host
from tests.support.namespaces import HOST4
from tests.support.program import Program
from tests.support.puppet import puppet
from tests.support.shell import Word, run
from tests.support.wait import until

pytestmark = pytest.mark.e2e

UNFINISHED = 8
can_destroy = sockets.can_destroy()
before_6_9 = pytest.mark.skipif(not can_destroy, reason="no MPTCP socket connects with data")
HOWS = ("listen", "connect", "udp", pytest.param("fastopen", marks=before_6_9))


@pytest.fixture
def container(host: Host) -> Iterator[Path]:
    """The cgroup of a container in the host's namespace; it is detached when its processes have ended."""
    with new_cgroup("hostile") as path:
        yield path
        cgroup.kill(path)
        host.remove_at(path)


LockSocket = Callable[..., Program]


@pytest.fixture
def lock_socket(host: Host, programs: Programs, container: Path) -> Iterator[LockSocket]:
    """Starts a process of the container that keeps a socket of its own locked until `unlock`, or its end."""
    started: list[Program] = []

    def begin(how: str, address: str, port: int) -> Program:
        command = host.netns.command(*in_cgroup(container), programs["locking"], how, address, port)
        started.append(host.start_command(command, talk=True))
        started[-1].says("locked")
        return started[-1]

    yield begin
    for one in started:
        one.stop()


def output_of(host: Host, locker: Program, command: Sequence[Word], *words: Word, status: int = 0) -> str:
    """The output of a command that has to end by itself. One that hangs is released, and fails the test."""
    program = host.start_command([*command, *words])
    try:
        assert program.wait() == status, program.complained
        return program.said + program.complained
    finally:
        if program.process.poll() is None:
            unlock(locker)


def unlock(locker: Program) -> None:
    """Let the process unlock its socket."""
    locker.tell("go on\n")
    locker.says("released")


def assert_hangs(host: Host, locker: Program, defence: str, *words: Word) -> None:
    """A command without a defence waits for the socket's lock, and cannot be killed."""
    program = host.start_command([*graft_without(defence), *words])
    try:
        program.until("it waits for a lock", lambda: waits_for_socket_lock(program.process.pid))
        program.process.kill()
        assert waits_for_socket_lock(program.process.pid), "it could be killed"
    finally:
        unlock(locker)
        program.stop()


def waits_for_socket_lock(pid: int) -> bool:
    """Whether it waits for a socket's lock. (Any process may be in state D for a moment, for a page of a file.)"""
    activity = tasks.activity(pid)
    return activity is not None and activity.state == "D" and "lock_sock" in Path(f"/proc/{pid}/stack").read_text()


def attach(host: Host, container: Path, port: int) -> str:
    """Attach a container: its port 80 becomes ``port`` of the host. Gives the endpoint's name."""
    endpoint = host.endpoint(f"0.0.0.0:{port}")
    host.graft("attach", "--cgroup", container, "-i", f"0.0.0.0:80={endpoint}")
    return endpoint


def target(host: Host, how: str, stack: ExitStack) -> tuple[str, int]:
    """The address that the process binds, or connects to."""
    if how in ("listen", "udp"):
        return "0.0.0.0", 80
    listener = stack.enter_context(host.netns.listener(HOST4))
    return HOST4, int(listener.getsockname()[1])


# --- a locked socket --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOWS)
def test_no_command_waits_for_a_locked_socket(
    host: Host, container: Path, lock_socket: LockSocket, tmp_path: Path, how: str
) -> None:
    port = host.port()
    endpoint = attach(host, container, port)
    with ExitStack() as stack:
        program = lock_socket(how, *target(host, how, stack))
        policy = tmp_path / "again.yaml"
        policy.write_text(f"name: again\ningress:\n  - bind: 0.0.0.0:80\n    endpoint: {endpoint}\n")
        (seen,) = json.loads(output_of(host, program, [GRAFT], "ps", "--json"))
        assert [one["pid"] for one in seen["sockets"]] == [program.process.pid]
        output_of(host, program, [GRAFT], "ps")
        output_of(host, program, [GRAFT], "attach", "--cgroup", container, "--policy", policy)
        output_of(host, program, [GRAFT], "policy", "apply", policy)
        output_of(host, program, [GRAFT], "policy", "show", container)
        output_of(host, program, [GRAFT], "ep", "del", "--force", endpoint)


@pytest.mark.parametrize("how", ["listen", "udp"])
def test_detach_closes_all_other_sockets_and_says_which_it_could_not(
    host: Host, container: Path, lock_socket: LockSocket, how: str
) -> None:
    port, free = host.port(), host.port()
    attach(host, container, port)
    locked = f"{'udp unconnected' if how == 'udp' else 'tcp listening'} 0.0.0.0:{port}"
    other = "tcp" if how == "udp" else "udp"  # on the same endpoint
    with puppet(container, host.netns.path) as program:
        sock = program.socket(other)
        assert program.say("bind", sock, "0.0.0.0", 80) == "ok"
        if other == "tcp":
            assert program.say("listen", sock) == "ok"
        attacker = lock_socket(how, "0.0.0.0", 80)
        said = output_of(host, attacker, [GRAFT], "detach", "--cgroup", container, status=UNFINISHED)
        closed, _, still_open = said.partition("not closed")
        assert f"{other} " in closed and f"{locked} (process {attacker.process.pid}" in still_open
        assert "cannot close 1 socket of" in said and "(process" in said.rpartition("cannot close")[2]
        assert program.bind("0.0.0.0", free) == "ok" and host.ps() == []
        assert how == "listen" or not host.netns.listens(port)
        # The helper keeps trying, and closes it as soon as it is unlocked.
        helper = int(said.rpartition("(process ")[2].split()[0])
        unlock(attacker)
        until("the helper ends", lambda: (tasks.activity(helper) or tasks.Activity("Z", 0, 0)).state == "Z")
        assert not host.netns.listens(port)


@pytest.mark.parametrize("words", [("ps",), ("detach", "--cgroup")], ids=["ps", "detach"])
@pytest.mark.parametrize("how", ["listen", "udp"])
def test_control_without_the_defence_a_command_waits(
    host: Host, container: Path, lock_socket: LockSocket, how: str, words: Sequence[str]
) -> None:
    attach(host, container, host.port())
    program = lock_socket(how, "0.0.0.0", 80)
    assert_hangs(host, program, "asking", *words, *([container] if words[-1] == "--cgroup" else []))


def test_where_the_kernel_does_not_answer_commands_say_so_and_continue(host: Host, container: Path) -> None:
    attach(host, container, host.port())
    command: list[Word] = graft_without("listing")
    with puppet(container, host.netns.path) as program:
        program.listener("0.0.0.0", 80)
        (seen,) = json.loads(run([*command, "ps", "--json"], environment=host.environment, status=0).stdout)
        assert (seen["processes"], seen["sockets"]) == (1, None)
        detached = run([*command, "detach", "--cgroup", container], environment=host.environment, status=UNFINISHED)
        assert detached.stdout.splitlines()[0] == f"{container.name}: detached"
        assert "does not list all TCP sockets in time" in detached.stdout
        assert "cannot list the sockets of" in detached.stderr
        assert host.ps() == []


# --- a hidden descriptor ----------------------------------------------------------------------------

HIDING = ("thread", "leader", "message")


def hidden(host: Host, programs: Programs, way: str, command: Sequence[Word], status: int = 0) -> tuple[str, str]:
    """The output of `graft detach`, and what the program says of the listener that it had hidden."""
    port = host.port()
    rules: list[Word] = ["-i", f"0.0.0.0:80={host.endpoint(f'0.0.0.0:{port}')}", "--"]
    program = host.start(*rules, programs["hiding"], way, "0.0.0.0", 80, talk=True)
    program.says("listening")
    detached = host.start_command([*command, "detach", "--cgroup", host.container(program).name])
    assert detached.wait() == status
    said = detached.said + detached.complained
    program.tell("go on\n")
    program.until("it looks at its listener", lambda: len(program.said.splitlines()) == 2)
    return said, program.said.splitlines()[1]


@pytest.mark.parametrize("way", HIDING)
def test_detach_closes_a_listener_whose_descriptor_is_hidden(host: Host, programs: Programs, way: str) -> None:
    said, state = hidden(host, programs, way, [GRAFT], 0 if can_destroy else UNFINISHED)
    assert state == ("ended" if can_destroy else "still listens")
    assert "in no process" in said if way == "message" else "(process" in said


@pytest.mark.parametrize("way", HIDING)
def test_control_without_the_defence_it_still_listens(host: Host, programs: Programs, way: str) -> None:
    assert hidden(host, programs, way, graft_without("tags"))[1] == "still listens"


@pytest.mark.parametrize("way", HIDING)
def test_on_kernels_that_close_no_socket_detach_needs_a_descriptor(host: Host, programs: Programs, way: str) -> None:
    lost = way == "message" or not threads_have_pidfds()
    command: list[Word] = graft_without("destroy")
    said, state = hidden(host, programs, way, command, UNFINISHED if lost else 0)
    assert state == ("still listens" if lost else "ended")
    assert ("cannot close 1 socket of hiding" in said) == lost


# --- a blocked supervisor ---------------------------------------------------------------------------


@pytest.fixture
def blocking(host: Host, programs: Programs) -> Program:
    """A program of `graft run` that keeps its own supervisor waiting."""
    rules: list[Word] = ["-i", f"0.0.0.0:80={host.endpoint(f'0.0.0.0:{host.port()}')}", "--"]
    program = host.start(*rules, programs["locking"], "call", "127.0.0.1", 8080, talk=True)
    program.says("locked")
    program.until("its supervisor waits for it", lambda: waits_for_socket_lock(host.supervisor_or_0(program)))
    return program


def supervision(host: Host, program: Program, command: Sequence[Word]) -> tuple[dict[str, Any], str]:
    """The record and the line that `graft ps` has of a program."""
    number = host.container(program).id
    records = json.loads(output_of(host, program, command, "ps", "--json"))
    lines = output_of(host, program, command, "ps").splitlines()
    record = next(one for one in records if one["id"] == number)
    return record, next(line for line in lines if line.startswith(f"{number}\t"))


def test_ps_says_that_a_supervisor_does_not_answer(host: Host, blocking: Program) -> None:
    supervisor = host.supervisor(blocking)
    record, line = supervision(host, blocking, [GRAFT])
    assert (record["supervisor"], record["stuck"]) == (supervisor, [supervisor])
    assert f"\t{supervisor} does not answer\t" in line
    unlock(blocking)
    record, line = supervision(host, blocking, [GRAFT])
    assert (record["supervisor"], record["stuck"]) == (supervisor, [])
    assert f"\t{supervisor}\t" in line


def test_control_without_the_defence_it_seems_to_answer(host: Host, blocking: Program) -> None:
    record, line = supervision(host, blocking, graft_without("liveness"))
    assert record["stuck"] == [] and "does not answer" not in line


def test_a_blocked_supervisor_affects_its_own_container_only(host: Host, blocking: Program) -> None:
    port = host.port()
    rules = ["-i", f"0.0.0.0:80={host.endpoint(f'0.0.0.0:{port}')}"]
    other = host.start(*rules, "--", "busybox", "nc", "-ll", "-p", "80", "-e", "true")
    other.until("another container listens", lambda: host.netns.listens(port))
    assert len(json.loads(output_of(host, blocking, [GRAFT], "ps", "--json"))) == 2
    supervisor = host.supervisor(blocking)
    output_of(host, blocking, [GRAFT], "detach", "--cgroup", host.container(blocking).name)
    blocking.process.terminate()
    blocking.wait()  # the program is gone, and with it what its supervisor waited for
    until("its supervisor is gone", lambda: not Path(f"/proc/{supervisor}").exists())
