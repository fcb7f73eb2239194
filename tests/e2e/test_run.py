"""`graft run` as a shell sees it: exit status, signals, standard streams, the terminal, and what is left behind."""

from __future__ import annotations

import os
import pty
import re
import select
import shlex
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.building import Programs
from tests.support.installation import GRAFT, Host
from tests.support.namespaces import CLIENT4
from tests.support.shell import AS_NOBODY, run
from tests.support.wait import PATIENCE, until

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("status", [0, 3, 255])
def test_the_exit_status_is_the_programs(host: Host, status: int) -> None:
    host.run([], "sh", "-c", f"exit {status}", status=status)


@pytest.mark.parametrize("name", ["TERM", "KILL", "SEGV"])
def test_a_program_that_a_signal_ended_is_seen_as_one(host: Host, name: str) -> None:
    host.run([], "sh", "-c", f"kill -{name} $$", status=-getattr(signal, f"SIG{name}"))


def test_a_command_that_is_not_found_ends_with_127_as_in_a_shell(host: Host) -> None:
    result = host.run([], "no-such-command", status=127)
    assert result.stderr == "graft: no-such-command: No such file or directory\n"
    assert host.leftovers() == []


def test_a_file_that_is_not_executable_ends_with_126_as_in_a_shell(host: Host, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("text")
    result = host.run([], tmp_path / "text", status=126)
    assert result.stderr.startswith("graft: ") and result.stderr.count("\n") == 1


def test_standard_streams_are_the_programs(host: Host) -> None:
    result = host.run([], "sh", "-c", "cat; echo oops >&2", stdin="one\ntwo\n")
    assert (result.stdout, result.stderr) == ("one\ntwo\n", "oops\n")


def test_arguments_and_environment_reach_the_program_as_they_are(host: Host) -> None:
    result = host.run([], "sh", "-c", 'printf "%s|" "$@"; echo $GRAFT_CGROUP', "sh", "a b", "-i", "--", "*")
    assert result.stdout == f"a b|-i|--|*|{host.settings.cgroup}\n"


@pytest.mark.parametrize("name", ["TERM", "INT", "HUP", "USR1", "USR2", "WINCH", "QUIT"])
def test_signals_are_passed_on(host: Host, name: str) -> None:
    script = f"trap 'echo got {name}; exit 7' {name}; echo ready; while :; do sleep 0.02; done"
    program = host.start("--", "sh", "-c", script)
    program.says("ready")
    program.process.send_signal(getattr(signal, f"SIG{name}"))
    assert program.wait() == 7
    assert f"got {name}" in program.said


def test_a_program_starts_with_the_signals_that_it_would_have_without_graft(host: Host) -> None:
    command = ["grep", "-E", "^Sig(Blk|Ign|Cgt)|^NoNewPrivs", "/proc/self/status"]
    assert host.run([], *command).stdout == run(command, status=0).stdout


def test_a_program_has_no_descriptors_of_grafts(host: Host) -> None:
    assert host.run([], "ls", "/proc/self/fd").stdout == run(["ls", "/proc/self/fd"], status=0).stdout


def test_the_program_runs_as_the_user_that_was_asked_for(host: Host) -> None:
    script = "id -u; id -g; id -G"
    assert host.run(["--user", "nobody"], "sh", "-c", script).stdout.split() == ["65534"] * 3
    assert host.run(["--user", "1234:2345"], "sh", "-c", script).stdout.split() == ["1234", "2345", "2345"]
    result = host.run(["--user", "no-such-user"], "true", status=3)
    assert "--user: 'no-such-user' not found" in result.stderr


def test_a_new_namespace_has_lo_and_nothing_else(host: Host) -> None:
    script = "readlink /proc/self/ns/net; ip -o link"
    inode, *links = host.run([], "sh", "-c", script).stdout.splitlines()
    assert inode != os.readlink("/proc/self/ns/net")
    assert inode != f"net:[{host.netns.path.stat().st_ino}]"
    assert len(links) == 1 and "lo:" in links[0] and "UP" in links[0]


def test_a_program_can_run_in_a_namespace_that_is_there(host: Host, programs: Programs) -> None:
    port = host.port()
    rules = ["-i", f"0.0.0.0:80={host.endpoint(f'0.0.0.0:{port}')}", "--net", str(host.client.path)]
    steps = ["socket", "4", "bind", CLIENT4, "81", "home", "socket", "4", "bind", "0.0.0.0", "80", "home"]
    said = host.run(rules, programs["calls"], *steps).stdout.splitlines()
    assert said == ["bind ok", f"home {host.client.cookie}", "bind ok", f"home {host.netns.cookie}"]


def test_a_namespace_that_is_not_found_is_one_clear_line(host: Host) -> None:
    result = host.run(["--net", "no-such-namespace"], "true", status=3)
    assert result.stderr.startswith("graft: ") and result.stderr.count("\n") == 1
    assert "no-such-namespace" in result.stderr


@pytest.mark.parametrize(
    "rules, status, field",
    [
        (["-i", "0.0.0.0:80=nobody"], 2, "nobody"),
        (["-i", "0.0.0.0=web"], 2, "-i"),
        (["-i", "0.0.0.0:99999=web"], 2, "-i"),
        (["-e", "10.0.0.1/8=web"], 2, "-e"),
        (["-e", "::/0=web"], 2, "-e"),
        (["--policy", "/no/such/file"], 3, "/no/such/file"),
        (["--policy", "/etc/passwd", "-i", "0.0.0.0:80=web"], 2, "--policy"),
    ],
)
def test_what_cannot_be_started_is_one_clear_line_and_leaves_nothing(
    host: Host, rules: list[str], status: int, field: str
) -> None:
    host.graft("ep", "add", "web", "0.0.0.0:8080")
    result = host.run(rules, "true", status=status)
    assert result.stderr.count("\n") == 1
    assert field in result.stderr and "Traceback" not in result.stderr
    assert host.leftovers() == []


def test_nothing_is_left_when_a_program_ends(host: Host) -> None:
    rules = ["-i", f"0.0.0.0:80={host.endpoint('0.0.0.0:8080')}", "-e", f"0.0.0.0/0={host.endpoint('0.0.0.0:dynamic')}"]
    host.run(rules, "true")
    assert host.leftovers() == []


def is_alive(pid: int) -> bool:
    """Whether a process runs: one that only waits for its parent to ask for its exit status does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except FileNotFoundError:
        return False


def test_processes_that_a_program_leaves_behind_end_with_it(host: Host) -> None:
    result = host.run([], "sh", "-c", "setsid sleep 1000 >/dev/null 2>&1 </dev/null & echo $!")
    assert not is_alive(int(result.stdout))
    assert host.leftovers() == []


def test_killing_graft_run_ends_the_program_and_leaves_nothing(host: Host, programs: Programs) -> None:
    port = host.port()
    rules = ["-i", f"0.0.0.0:80={host.endpoint(f'0.0.0.0:{port}')}"]
    steps = ["socket", "4", "bind", "0.0.0.0", "80", "listen", "wait"]
    program = host.start(*rules, "--", programs["calls"], *steps, talk=True)
    program.says("listen ok")
    child = program.child()
    program.process.kill()
    program.process.wait()
    until("the program's end", lambda: not is_alive(child))
    until("nothing left", lambda: not host.leftovers())
    assert not host.netns.listens(port)


def test_a_call_waits_for_the_next_supervisor_where_the_first_one_is_killed(host: Host, programs: Programs) -> None:
    listener = host.client.listener()
    port = listener.getsockname()[1]
    rules = ["-e", f"0.0.0.0/0={host.endpoint('0.0.0.0:dynamic')}"]
    steps = ["socket", "4", "connect", CLIENT4, port, "wait", "socket", "4", "connect", CLIENT4, port, "home"]
    program = host.start(*rules, "--", programs["calls"], *steps, talk=True)
    program.says("connect ok")
    first = host.supervisor(program)
    os.kill(first, signal.SIGSTOP)  # so that it is killed while a call waits for it
    program.tell("\n")
    wchan = Path(f"/proc/{program.child()}/wchan")
    until("the trapped call", lambda: "seccomp" in wchan.read_text() or "seccomp" in stack(program.child()))
    os.kill(first, signal.SIGKILL)
    assert program.wait() == 0
    assert program.said.splitlines()[1:] == ["connect ok", f"home {host.netns.cookie}"]
    listener.close()


def stack(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stack").read_text()
    except OSError:
        return ""


def test_supervisors_killed_again_and_again_cost_no_call(host: Host, programs: Programs) -> None:
    listener = host.client.listener()
    port, count = listener.getsockname()[1], 400
    script = (
        "import socket\n"
        f"for number in range({count}):\n"
        f"    with socket.create_connection(('{CLIENT4}', {port}), 20) as one: one.recv(1)\n"
        "    print(number, flush=True)\n"
    )
    program = host.start(
        "-e", f"0.0.0.0/0={host.endpoint('0.0.0.0:dynamic')}", "--", "/usr/bin/python3", "-ISc", script
    )
    listener.settimeout(30)
    killed: set[int] = set()
    for number in range(count):
        listener.accept()[0].close()
        if number % 80 == 40:
            victim = program.until(
                "a supervisor", lambda: next(iter({host.supervisor_or_0(program)} - killed - {0}), 0)
            )
            os.kill(victim, signal.SIGKILL)
            killed.add(victim)
    assert program.wait() == 0, program.complained
    assert len(killed) == 5
    listener.close()


class Terminal:
    """A shell with job control on a terminal of its own."""

    def __init__(self, host: Host) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ.update(host.environment, PS1="$ ", GRAFT=str(GRAFT))
            os.execv("/bin/bash", ["bash", "--norc", "--noediting", "-i"])
        self.seen = ""

    def type(self, text: str) -> None:
        """What a user types."""
        os.write(self.fd, text.encode())

    def shows(self, pattern: str, timeout: float = 15) -> str:
        """Wait until the terminal shows ``pattern``; the output up to there is dropped."""
        deadline = time.monotonic() + timeout * PATIENCE
        while not (found := re.search(pattern, self.seen)):
            left = deadline - time.monotonic()
            assert left > 0, f"{pattern!r} is not in {self.seen!r}"
            if select.select([self.fd], [], [], left)[0]:
                self.seen += os.read(self.fd, 4096).decode(errors="replace")
        self.seen = self.seen[found.end() :]
        return found[0]

    def close(self) -> None:
        """End the shell and what it started."""
        os.kill(self.pid, signal.SIGHUP)
        os.close(self.fd)
        os.waitpid(self.pid, 0)


@pytest.fixture
def terminal(host: Host) -> Iterator[Terminal]:
    """A shell on a terminal; it ends with the test."""
    made = Terminal(host)
    yield made
    made.close()


def test_the_terminal_is_the_programs(host: Host, terminal: Terminal) -> None:
    terminal.type("$GRAFT run -- sh -c 'tty; read word; echo said-$word; exit 5'; echo status=$?\n")
    terminal.shows(r"/dev/pts/\d+\r\n")
    terminal.type("hello\n")
    terminal.shows("said-hello")
    terminal.shows("status=5")


def test_control_c_reaches_the_program_once(host: Host, terminal: Terminal) -> None:
    script = "n=0; trap 'n=$((n+1))' INT; echo up-$((1+1)); while [ $n = 0 ]; do sleep 0.02; done; "
    script += "echo caught-$n; read word; echo end-$n"
    terminal.type(f"$GRAFT run -- sh -c {shlex.quote(script)}; echo status=$?\n")
    terminal.shows("up-2")
    terminal.type("\x03")
    terminal.shows("caught-1")
    terminal.type("\n")
    terminal.shows("end-1")
    terminal.shows("status=0")


def test_control_c_ends_a_program_by_the_signal(host: Host, terminal: Terminal) -> None:
    terminal.type("$GRAFT run -- cat\n")
    terminal.type("hello\n")
    terminal.shows("(?s)hello.*hello")  # typed, and said by cat
    terminal.type("\x03")
    terminal.shows(r"\$ ")
    terminal.type("echo status=$?\n")
    terminal.shows("status=130")


def test_control_z_stops_the_program_and_fg_continues_it(host: Host, terminal: Terminal) -> None:
    terminal.type("$GRAFT run -- sh -c 'echo up-$((1+1)); read word; echo said-$word'\n")
    terminal.shows("up-2")
    terminal.type("\x1a")
    terminal.shows("Stopped")
    terminal.type("jobs; echo still-$((3+3))\n")
    terminal.shows("Stopped")
    terminal.shows("still-6")
    terminal.type("fg\n")
    terminal.shows(r"run -- sh")
    terminal.type("hello\n")
    terminal.shows("said-hello")


def test_with_v_each_trapped_call_gets_a_line(host: Host, programs: Programs) -> None:
    name = host.endpoint("0.0.0.0:8080")
    steps = ["socket", "4", "bind", "0.0.0.0", "80", "listen", "socket", "4", "bind", "127.0.0.1", "81"]
    result = host.run(["-v", "-i", f"0.0.0.0:80={name}"], programs["calls"], *steps)
    assert result.stderr.splitlines() == [
        f"graft: bind 0.0.0.0:80 -> {name} = 0.0.0.0:8080",
        "graft: listen: unchanged",
        "graft: bind 127.0.0.1:81: unchanged",
    ]


def test_graft_ps_lists_what_runs(host: Host) -> None:
    name = host.endpoint("0.0.0.0:8080")
    program = host.start("-i", f"0.0.0.0:80={name}", "--", "sh", "-c", "echo ready; sleep 1000")
    program.says("ready")
    (record,) = host.ps()
    assert (record["name"], record["transport"], record["endpoints"]) == ("sh", "swap", [name])
    assert host.graft("ps").stdout.count("\n") == 1
    program.stop()
    assert host.graft("ps").stdout == ""


def test_without_root_each_command_says_so_in_one_line(host: Host) -> None:
    # May read all files, so that it finds Graft in a checkout that only root can see.
    can_read = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
    for words in (["run", "--", "true"], ["up"], ["ep", "show"], ["down"]):
        result = run([*AS_NOBODY[:-1], *can_read, "--", GRAFT, *words], environment=host.environment)
        assert (result.returncode, result.stderr.count("\n")) == (5, 1), result.stderr
        assert "root" in result.stderr
