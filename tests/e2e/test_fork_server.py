"""`graft run` by way of the fork server: what runs, what it shares, and what happens when a part of it dies."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from graft.kernel import cgroup, surroundings
from graft.swap import fork_client, fork_servers
from tests.e2e.test_run import is_alive
from tests.support.building import Programs
from tests.support.installation import GRAFT, Host
from tests.support.namespaces import CLIENT4
from tests.support.program import Program
from tests.support.shell import run
from tests.support.wait import until

pytestmark = pytest.mark.e2e

COMPILED = {"compiled": {}, "python": {"GRAFT_NO_COMPILED": "1"}}


@pytest.fixture(params=COMPILED)
def either(request: pytest.FixtureRequest, host: Host) -> Host:
    """A host where what can be compiled is, or is not."""
    return replace(host, environment=host.environment | COMPILED[request.param])


@pytest.fixture
def alone(host: Host) -> Iterator[Host]:
    """A host without fork servers, before and after."""
    fork_servers.stop_all(host.settings)
    yield replace(host, environment=host.environment | {fork_client.NO_SERVER: "1"})


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])


def words(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0").split("\0")


def descriptors(pid: int) -> list[str]:
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            found.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
        except FileNotFoundError:
            continue
    return found


def one_server(host: Host) -> int:
    """The server of programs that are started as this process is."""
    server = int((fork_client.folder_of(host.settings) / f"{surroundings.of().name}{fork_client.LOCK}").read_text())
    assert server in fork_servers.running(host.settings)
    return server


def test_all_programs_have_one_server_and_each_a_waiter_and_a_supervisor(host: Host) -> None:
    started = [host.start("--", "sleep", "600") for _ in range(3)]
    supervisors = [host.supervisor(one) for one in started]
    server = one_server(host)
    assert [parent(one) for one in supervisors] == [server] * 3
    assert not set(supervisors) & set(cgroup.processes(host.cgroup / "forks"))
    assert sorted(cgroup.processes(host.cgroup / "supervisors")) == sorted(supervisors)
    for one in started:
        assert Path(words(one.process.pid)[0]).name == "graft-wait"
        children = Path(f"/proc/{one.process.pid}/task/{one.process.pid}/children").read_text().split()
        assert children == [str(one.child())]
    server_maps, own_maps = (Path(f"/proc/{pid}/maps").read_text() for pid in (server, supervisors[0]))
    assert "python" in server_maps and "python" in own_maps
    for pid in (one.process.pid for one in started):
        assert "python" not in Path(f"/proc/{pid}/maps").read_text()


def test_a_supervisor_has_no_descriptor_of_another_ones(host: Host) -> None:
    started = [host.start("--", "sleep", "600") for _ in range(3)]
    supervisors = [host.supervisor(one) for one in started]
    for pid in (*supervisors, one_server(host)):
        listeners = [name for name in descriptors(pid) if "seccomp notify" in name]
        assert len(listeners) == (pid in supervisors)
        assert not [name for name in descriptors(pid) if name.endswith(fork_client.LOCK) and pid in supervisors]
    assert len({cgroup.of_process(pid) for pid in supervisors}) == 3
    for pid in supervisors:
        assert os.getsid(pid) == pid
        assert Path(f"/proc/{pid}/environ").read_bytes() == Path(f"/proc/{one_server(host)}/environ").read_bytes()


def test_the_server_has_no_descriptor_of_its_clients(host: Host) -> None:
    program = host.start("--", "sh", "-c", "echo up; cat", talk=True)
    program.says("up")
    before = sorted(descriptors(one_server(host)))
    host.run([], "true")
    assert sorted(descriptors(one_server(host))) == before
    assert program.out.name not in before


def test_programs_go_on_when_the_server_is_killed(either: Host, programs: Programs) -> None:
    host = either
    listener = host.client.listener()
    port = listener.getsockname()[1]
    steps = ["socket", "4", "connect", CLIENT4, port, "wait"] * 2
    rules = ["-e", f"0.0.0.0/0={host.endpoint('0.0.0.0:dynamic')}", "--"]
    program = host.start(*rules, programs["calls"], *steps, "socket", "4", "connect", CLIENT4, port, "home", talk=True)
    program.says("connect ok")
    first = host.supervisor(program)
    server = one_server(host)
    os.kill(server, signal.SIGKILL)
    until("the server's end", lambda: server not in fork_servers.running(host.settings))
    assert is_alive(first)
    program.tell("\n")
    program.until("the second connect", lambda: program.said.count("connect ok") == 2)
    os.kill(first, signal.SIGKILL)  # the next supervisor has no server to come from
    second = program.until("another supervisor", lambda: host.supervisor_or_0(program) not in (0, first))
    assert second
    program.tell("\n")
    assert program.wait() == 0, program.complained
    assert program.said.splitlines()[-2:] == ["connect ok", f"home {host.netns.cookie}"]
    assert host.leftovers() == []
    listener.close()


def test_nobody_waits_for_a_server_that_is_stopped(either: Host, programs: Programs) -> None:
    host = either
    listener = host.client.listener()
    steps = ["socket", "4", "connect", CLIENT4, listener.getsockname()[1], "wait"]
    rule = f"0.0.0.0/0={host.endpoint('0.0.0.0:dynamic')}"
    program = host.start("-e", rule, "--", programs["calls"], *steps, *steps[:-1], talk=True)
    program.says("connect ok")
    server, first = one_server(host), host.supervisor(program)
    os.kill(server, signal.SIGSTOP)
    try:
        assert host.run(["-e", rule], "sh", "-c", "echo ran").stdout == "ran\n"
        os.kill(first, signal.SIGKILL)
        program.tell("\n")
        program.until("the second connect", lambda: program.said.count("connect ok") == 2)
        assert program.wait() == 0, program.complained
        assert host.leftovers() == []
    finally:
        os.kill(server, signal.SIGCONT)
    host.run([], "true")
    assert one_server(host) == server
    listener.close()


def test_a_server_that_is_stopped_is_ended_by_down(bare_host: Host) -> None:
    bare_host.run([], "true")
    server = one_server(bare_host)
    os.kill(server, signal.SIGSTOP)
    bare_host.graft("down")
    assert not is_alive(server)
    assert not bare_host.cgroup.exists()


LOOK = """
env | grep -v NO_FORK_SERVER | sort; umask; pwd; ulimit -a; ulimit -aH; nice; cat /proc/self/oom_score_adj
grep -E '^(Sig[BCIP]|Cap|Seccomp:|NoNew|Uid|Groups)' /proc/self/status
cut -d' ' -f6-8 /proc/$$/stat; readlink /proc/$$/fd/*; true
"""
"""The last line is session, terminal, and the terminal's foreground group."""


def test_a_program_has_what_it_would_have_without_a_server(host: Host, tmp_path: Path) -> None:
    host.run([], "true")  # the server is another command's
    before = "umask 037; ulimit -n 100; ulimit -c 0; trap '' HUP; export A=$'b\\nc'; exec 7</dev/null 2>&1"
    command = f'exec nice -n 5 choom -n 300 -- {GRAFT} run -- bash -c "$LOOK"'
    environment = {**host.environment, "LOOK": LOOK}

    def said(more: dict[str, str], descriptors: str) -> list[str]:
        script = f"cd {tmp_path}; {before} {descriptors}; {command}"
        words = ["bash", "-c", script]
        found = run(words, environment=environment | more, status=0).stdout.splitlines()
        return [line for line in found if "pipe:" not in line and not line.startswith("SHLVL")]

    for descriptors in ("", "<&-"):
        ours = said({}, descriptors)
        assert ours == said({fork_client.NO_SERVER: "1"}, descriptors)
        assert {"0037", str(tmp_path), "A=b", "5", "300"} <= set(ours)


def test_a_supervisor_has_the_limits_and_the_oom_score_of_its_own_command(host: Host) -> None:
    host.run([], "true")
    ordinary = one_server(host)
    adjusted = host.start_command(["choom", "-n", "300", "--", str(GRAFT), "run", "--", "sleep", "600"])
    limited = host.start_command(["prlimit", "--nofile=500:500", str(GRAFT), "run", "--", "sleep", "600"])
    first, second = host.supervisor(adjusted), host.supervisor(limited)
    assert parent(first) == ordinary != parent(second)
    assert Path(f"/proc/{first}/oom_score_adj").read_text() == "300\n"
    assert resource.prlimit(second, resource.RLIMIT_NOFILE) == (500, 500)
    assert resource.prlimit(first, resource.RLIMIT_NOFILE) == resource.prlimit(ordinary, resource.RLIMIT_NOFILE)


def test_the_next_program_starts_another_server(host: Host) -> None:
    host.run([], "true")
    first = one_server(host)
    os.kill(first, signal.SIGKILL)
    until("the server's end", lambda: first not in fork_servers.running(host.settings))
    host.run([], "true")
    assert one_server(host) != first


def test_its_socket_is_roots_only(host: Host) -> None:
    host.run([], "true")
    folder = fork_client.folder_of(host.settings)
    for path in (folder, folder / surroundings.of().name):
        assert (path.stat().st_uid, path.stat().st_mode & 0o777) == (0, 0o700)


def test_many_at_once_start_one_server(host: Host) -> None:
    fork_servers.stop_all(host.settings)
    started = [host.start("--", "sh", "-c", "echo up; sleep 600") for _ in range(8)]
    for one in started:
        one.says("up", timeout=60)
    assert {parent(host.supervisor(one)) for one in started} == {one_server(host)}


def test_a_supervisor_that_dies_again_and_again_ends_its_program_alone(either: Host) -> None:
    host = either
    other, program = host.start("--", "sleep", "600"), host.start("--", "sleep", "600")
    host.supervisor(other)
    host.supervisor(program)
    container = host.container(program)
    killed: set[int] = set()

    def kill_again() -> bool:
        if program.process.poll() is None and (found := host.supervisor_or_0(program)) and found not in killed:
            killed.add(found)
            os.kill(found, signal.SIGKILL)
        return program.process.poll() is not None

    until("its end", kill_again, timeout=60)
    assert program.process.returncode == 6
    assert program.complained == f"graft: the supervisor of {container.name} died 10 times in a row\n"
    assert other.process.poll() is None and is_alive(host.supervisor(other))
    other.stop()
    assert host.leftovers() == []


def test_without_a_server_a_program_runs_as_well(alone: Host) -> None:
    program = alone.start("--", "sh", "-c", "echo up; read word; exit 5", talk=True)
    program.says("up")
    assert parent(alone.supervisor(program)) == program.process.pid
    assert fork_servers.running(alone.settings) == []
    program.tell("\n")
    assert program.wait() == 5
    assert alone.leftovers() == []


@pytest.mark.parametrize(
    "confined",
    [
        ["setpriv", "--bounding-set=-sys_boot", "--"],
        ["setpriv", "--no-new-privs", "--"],
        ["unshare", "--uts", "--"],
        ["unshare", "--ipc", "--"],
    ],
    ids=lambda words: words[1],
)
def test_who_is_not_as_the_server_is_gets_nothing_from_it(host: Host, confined: list[str]) -> None:
    host.run([], "true")
    ordinary = one_server(host)
    program = host.start_command([*confined, str(GRAFT), "run", "--", "sleep", "600"])
    assert parent(host.supervisor(program)) != ordinary
    program.stop()


def test_a_request_over_somebody_elses_connection_is_refused(host: Host) -> None:
    """By the name of the server alone anybody of root's could connect: who connected is looked at."""
    host.run([], "true")
    script = (
        "import socket, sys; from graft.kernel import fork_messages;"
        "sock = socket.socket(socket.AF_UNIX); sock.connect(sys.argv[1]);"
        "assert sock.recv(1) == fork_messages.HELLO; sock.send(fork_messages.ASK);"
        "assert sock.recv(1) == fork_messages.HELLO; print(fork_messages.receive(sock)[0])"
    )
    path = fork_client.folder_of(host.settings) / surroundings.of().name
    python = [str(GRAFT.with_name("python")), "-P", "-c", script, str(path)]
    said = run(["unshare", "--uts", "--", *python], environment=host.environment, status=0).stdout
    assert said == "{'refused': 'surroundings'}\n"


def test_a_policy_may_come_from_a_descriptor(host: Host) -> None:
    port = host.port()
    policy = f"endpoints: {{web: '0.0.0.0:{port}'}}\\ningress: [{{bind: '*:80', endpoint: web}}]\\n"
    script = f'exec {GRAFT} run --policy <(printf "name: x\\n{policy}") -- echo ran'
    assert run(["bash", "-c", script], environment=host.environment, status=0).stdout == "ran\n"


def test_a_relative_policy_is_that_of_the_working_directory(host: Host, tmp_path: Path) -> None:
    (tmp_path / "here.yaml").write_text("name: here\n")
    script = f"cd {tmp_path} && exec {GRAFT} run --policy here.yaml -- pwd"
    assert run(["bash", "-c", script], environment=host.environment, status=0).stdout == f"{tmp_path}\n"


@pytest.mark.flaky(reruns=1)  # it depends on how much of the machine it gets
@pytest.mark.parametrize("closing", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_may_be_closed(host: Host, closing: str, tmp_path: Path) -> None:
    script = f"{GRAFT} run -- sh -c 'exit 3' {closing}"
    assert subprocess.run(["bash", "-c", script], env={**os.environ, **host.environment}).returncode == 3


def test_a_server_whose_files_were_replaced_ends_and_another_one_serves(host: Host) -> None:
    host.run([], "true")
    first = one_server(host)
    module = Path(fork_client.__file__).with_name("call_log.py")
    os.utime(module)
    host.run([], "true")
    assert one_server(host) != first


def test_down_ends_the_server(bare_host: Host) -> None:
    bare_host.run([], "true")
    server = one_server(bare_host)
    bare_host.graft("down")
    assert not is_alive(server)
    assert not bare_host.cgroup.exists()


def test_killing_the_process_that_prepares_leaves_nothing(host: Host) -> None:
    """It waits for the installation's lock here."""
    host.run([], "true")

    forks = host.cgroup / "forks"
    before = set(cgroup.processes(forks))
    with host.installation.transaction():
        program: Program = host.start("--", "sleep", "600")
        path = host.cgroup / f"run-{program.process.pid}"
        program.until("the program's process", lambda: cgroup.processes(path))
        (preparing,) = set(cgroup.processes(forks)) - before
        os.kill(preparing, signal.SIGKILL)
    assert program.wait() == 1
    assert "has died" in program.complained
    until("nothing left", lambda: not host.leftovers())
