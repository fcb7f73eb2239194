"""What a container does with its sockets neither holds the operator's commands up nor hides from them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from graft.kernel import cgroup, sockets, tasks
from graft.kernel.pidfd import threads_have_pidfds
from tests.hostile.undefended import COMMAND
from tests.support.building import Programs
from tests.support.installation import GRAFT, Host
from tests.support.namespaces import HOST4
from tests.support.program import Program, start
from tests.support.puppet import puppet
from tests.support.shell import Word, run
from tests.support.wait import until

pytestmark = pytest.mark.e2e

UNFINISHED = 8
can_destroy = sockets.can_destroy()
before_6_9 = pytest.mark.skipif(not can_destroy, reason="no MPTCP socket connects with data")
HOWS = ("listen", "connect", "udp", pytest.param("fastopen", marks=before_6_9))


@pytest.fixture
def folder(host: Host) -> Iterator[Path]:
    """A cgroup outside Graft's own, for a container in the host's namespace."""
    path = cgroup.v2_mount() / f"hostile-{os.getpid()}"
    path.mkdir()
    yield path
    cgroup.kill(path)
    host.graft("detach", "--cgroup", path, status=None)
    cgroup.remove(path)


@pytest.fixture
def holder(host: Host, programs: Programs, folder: Path) -> Iterator[Callable[..., Program]]:
    """Starts a process that holds the lock of a socket of its own, in a cgroup. It lets go at the end."""
    started: list[Program] = []

    def begin(how: str, address: str, port: int) -> Program:
        enter = ["sh", "-c", f'echo 0 > {folder}/cgroup.procs && exec "$@"', "-"]
        command = host.netns.command(*enter, programs["holding"], how, address, port)
        started.append(start(command, talk=True))
        started[-1].says("held")
        return started[-1]

    yield begin
    for one in started:
        one.stop()


def asked(host: Host, holder: Program, command: Sequence[Word], *words: Word, status: int = 0) -> str:
    """What a command says, which has to end by itself. One that hangs is released, and fails the test."""
    program = start([*command, *words], {**os.environ, **host.environment})
    try:
        assert program.wait() == status, program.complained
        return program.said + program.complained
    finally:
        if program.process.poll() is None:
            let_go(holder)
        program.stop()


def let_go(holder: Program) -> None:
    holder.tell("go on\n")
    holder.says("released")


def hangs(host: Host, holder: Program, defence: str, *words: Word) -> None:
    """A command without a defence waits for the holder, uninterruptibly, and goes on when that lets go."""
    program = start([sys.executable, COMMAND, defence, *words], {**os.environ, **host.environment})
    try:
        program.until("it waits for a lock", lambda: waits_for_good(program.process.pid))
        program.process.kill()
        assert waits_for_good(program.process.pid), "it could be killed"
    finally:
        let_go(holder)
        program.stop()


def waits_for_good(pid: int) -> bool:
    """Whether it waits for a socket's lock. (Any process may be in state D for a moment, for a page of a file.)"""
    activity = tasks.activity(pid)
    return activity is not None and activity.state == "D" and "lock_sock" in Path(f"/proc/{pid}/stack").read_text()


def attach(host: Host, folder: Path, port: int) -> str:
    """Attach the container in ``folder``: its port 80 becomes ``port`` of the host. Gives the endpoint's name."""
    endpoint = host.endpoint(f"0.0.0.0:{port}")
    host.graft("attach", "--cgroup", folder, "-i", f"0.0.0.0:80={endpoint}")
    return endpoint


def target(host: Host, how: str, stack: ExitStack) -> tuple[str, int]:
    """Where the holder binds, or whom it connects to."""
    if how in ("listen", "udp"):
        return "0.0.0.0", 80
    listener = stack.enter_context(host.netns.listener(HOST4))
    return HOST4, int(listener.getsockname()[1])


# --- a lock that is held ----------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOWS)
def test_no_command_waits_for_a_socket_that_is_held(
    host: Host, folder: Path, holder: Callable[..., Program], tmp_path: Path, how: str
) -> None:
    port = host.port()
    endpoint = attach(host, folder, port)
    with ExitStack() as stack:
        program = holder(how, *target(host, how, stack))
        policy = tmp_path / "again.yaml"
        policy.write_text(f"name: again\ningress:\n  - bind: 0.0.0.0:80\n    endpoint: {endpoint}\n")
        (seen,) = json.loads(asked(host, program, [GRAFT], "ps", "--json"))
        assert [one["pid"] for one in seen["sockets"]] == [child(program)]
        asked(host, program, [GRAFT], "ps")
        asked(host, program, [GRAFT], "attach", "--cgroup", folder, "--policy", policy)
        asked(host, program, [GRAFT], "policy", "apply", policy)
        asked(host, program, [GRAFT], "policy", "show", folder)
        asked(host, program, [GRAFT], "ep", "del", "--force", endpoint)


def child(program: Program) -> int:
    """The process id of what `nsenter` and `sh` have become."""
    return program.process.pid


@pytest.mark.parametrize("how", ["listen", "udp"])
def test_detach_ends_all_the_others_and_says_which_it_could_not(
    host: Host, folder: Path, holder: Callable[..., Program], how: str
) -> None:
    port, free = host.port(), host.port()
    attach(host, folder, port)
    held_one = f"{'udp unconnected' if how == 'udp' else 'tcp listening'} 0.0.0.0:{port}"
    other = "tcp" if how == "udp" else "udp"  # on the same endpoint
    with puppet(folder, host.netns.path) as program:
        sock = program.socket(other)
        assert program.say("bind", sock, "0.0.0.0", 80) == "ok"
        if other == "tcp":
            assert program.say("listen", sock) == "ok"
        attacker = holder(how, "0.0.0.0", 80)
        said = asked(host, attacker, [GRAFT], "detach", "--cgroup", folder, status=UNFINISHED)
        closed, _, still_open = said.partition("not closed")
        assert f"{other} " in closed and f"{held_one} (process {child(attacker)}" in still_open
        assert "cannot close 1 socket of" in said and "(process" in said.rpartition("cannot close")[2]
        assert program.bind("0.0.0.0", free) == "ok" and json.loads(host.graft("ps", "--json").stdout) == []
        assert how == "listen" or not host.netns.listens(port)
        # The helper closes it as soon as it can.
        helper = int(said.rpartition("(process ")[2].split()[0])
        let_go(attacker)
        until("the helper ends", lambda: (tasks.activity(helper) or tasks.Activity("Z", 0, 0)).state == "Z")
        assert not host.netns.listens(port)


@pytest.mark.parametrize("words", [("ps",), ("detach", "--cgroup")], ids=["ps", "detach"])
@pytest.mark.parametrize("how", ["listen", "udp"])
def test_control_without_the_defence_a_command_waits(
    host: Host, folder: Path, holder: Callable[..., Program], how: str, words: Sequence[str]
) -> None:
    attach(host, folder, host.port())
    program = holder(how, "0.0.0.0", 80)
    hangs(host, program, "asking", *words, *([folder] if words[-1] == "--cgroup" else []))


def test_where_the_kernel_does_not_answer_commands_say_so_and_go_on(host: Host, folder: Path) -> None:
    attach(host, folder, host.port())
    command: list[Word] = [sys.executable, COMMAND, "listing"]
    with puppet(folder, host.netns.path) as program:
        program.listener("0.0.0.0", 80)
        (seen,) = json.loads(run([*command, "ps", "--json"], environment=host.environment, status=0).stdout)
        assert (seen["processes"], seen["sockets"]) == (1, None)
        detached = run([*command, "detach", "--cgroup", folder], environment=host.environment, status=UNFINISHED)
        assert detached.stdout == f"{folder.name}: detached\n"
        assert "cannot list the sockets of" in detached.stderr
        assert json.loads(host.graft("ps", "--json").stdout) == []


# --- a descriptor that is out of sight --------------------------------------------------------------

HIDING = ("thread", "leader", "message")


def hidden(host: Host, programs: Programs, way: str, command: Sequence[Word], status: int = 0) -> tuple[str, str]:
    """What detaching a container says, and what becomes of the listener that it hid."""
    port = host.port()
    rules: list[Word] = ["-i", f"0.0.0.0:80={host.endpoint(f'0.0.0.0:{port}')}", "--"]
    command_line = [GRAFT, "run", *rules, programs["hiding"], way, "0.0.0.0", 80]
    program = start(command_line, {**os.environ, **host.environment}, talk=True)
    host.started.append(program)
    program.says("listening")
    detached = start([*command, "detach", "--cgroup", host.container(program).name], {**os.environ, **host.environment})
    assert detached.wait() == status
    said = detached.said + detached.complained
    detached.stop()
    program.tell("go on\n")
    program.until("it looks at its listener", lambda: len(program.said.splitlines()) == 2)
    return said, program.said.splitlines()[1]


@pytest.mark.parametrize("way", HIDING)
def test_detach_ends_a_listener_wherever_its_descriptor_is(host: Host, programs: Programs, way: str) -> None:
    said, state = hidden(host, programs, way, [GRAFT], 0 if can_destroy else UNFINISHED)
    assert state == ("ended" if can_destroy else "still listens")
    assert "in no process" in said if way == "message" else "(process" in said


@pytest.mark.parametrize("way", HIDING)
def test_control_without_the_defence_it_listens_on(host: Host, programs: Programs, way: str) -> None:
    assert hidden(host, programs, way, [sys.executable, COMMAND, "tags"])[1] == "still listens"


@pytest.mark.parametrize("way", HIDING)
def test_where_the_kernel_cannot_be_asked_it_takes_a_descriptor(host: Host, programs: Programs, way: str) -> None:
    lost = way == "message" or not threads_have_pidfds()
    command: list[Word] = [sys.executable, COMMAND, "destroy"]
    said, state = hidden(host, programs, way, command, UNFINISHED if lost else 0)
    assert state == ("still listens" if lost else "ended")
    assert ("cannot close 1 socket of hiding" in said) == lost


# --- a supervisor that is held up -------------------------------------------------------------------


@pytest.fixture
def captive(host: Host, programs: Programs) -> Iterator[Program]:
    """A program of `graft run` that keeps its own supervisor waiting."""
    rules: list[Word] = ["-i", f"0.0.0.0:80={host.endpoint(f'0.0.0.0:{host.port()}')}", "--"]
    command = [GRAFT, "run", *rules, programs["holding"], "call", "127.0.0.1", 8080]
    program = start(command, {**os.environ, **host.environment}, talk=True)
    program.says("held")
    program.until("its supervisor waits for it", lambda: waits_for_good(host.supervisor_or_0(program)))
    yield program
    program.stop()


def supervision(host: Host, program: Program, command: Sequence[Word]) -> tuple[dict[str, Any], str]:
    """What `graft ps` says of a program, as a record and as a line."""
    number = host.container(program).id
    records = json.loads(asked(host, program, command, "ps", "--json"))
    lines = asked(host, program, command, "ps").splitlines()
    record = next(one for one in records if one["id"] == number)
    return record, next(line for line in lines if line.startswith(f"{number}\t"))


def test_ps_says_that_a_supervisor_does_not_answer(host: Host, captive: Program) -> None:
    supervisor = host.supervisor(captive)
    record, line = supervision(host, captive, [GRAFT])
    assert (record["supervisor"], record["stuck"]) == (supervisor, [supervisor])
    assert f"\t{supervisor} does not answer\t" in line
    let_go(captive)
    record, line = supervision(host, captive, [GRAFT])
    assert (record["supervisor"], record["stuck"]) == (supervisor, [])
    assert f"\t{supervisor}\t" in line


def test_control_without_the_defence_it_seems_to_be_at_work(host: Host, captive: Program) -> None:
    record, line = supervision(host, captive, [sys.executable, COMMAND, "liveness"])
    assert record["stuck"] == [] and "does not answer" not in line


def test_a_supervisor_that_is_held_up_is_its_own_containers_loss_alone(host: Host, captive: Program) -> None:
    port = host.port()
    rules = ["-i", f"0.0.0.0:80={host.endpoint(f'0.0.0.0:{port}')}"]
    other = host.start(*rules, "--", "busybox", "nc", "-ll", "-p", "80", "-e", "true")
    other.until("another container listens", lambda: host.netns.listens(port))
    assert len(json.loads(asked(host, captive, [GRAFT], "ps", "--json"))) == 2
    asked(host, captive, [GRAFT], "detach", "--cgroup", host.container(captive).name)
    supervisor = host.supervisor(captive)
    captive.process.terminate()
    captive.wait()  # the program is gone, and with it what its supervisor waited for
    until("its supervisor is gone", lambda: not Path(f"/proc/{supervisor}").exists())
