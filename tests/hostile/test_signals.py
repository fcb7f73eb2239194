"""A socket's signals reach only processes that its program may signal itself."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence

import pytest

from tests.hostile.conftest import Victims, graft_without
from tests.support.building import Programs
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, HOST4
from tests.support.program import Program
from tests.support.shell import Word, run

pytestmark = pytest.mark.e2e

ROOT, NOBODY = 0, 65534
WAYS = ("process", "group", "thread", "ioctl")
AS_NOBODY = ("--user", "nobody")


def outgoing(host: Host) -> list[Word]:
    """Rules for a program of the user nobody that may connect to one destination."""
    return [*AS_NOBODY, "-e", f"{CLIENT4}/32={host.endpoint('0.0.0.0:dynamic')}", "--"]


def run_without_defence(*words: Word) -> list[Word]:
    """`graft run` where root copies the settings for a socket's signals."""
    return [*graft_without("signals"), "run", *words]


def ended(victim: subprocess.Popen[bytes], within: float) -> int | None:
    """The signal that ended it; None where it still runs."""
    try:
        return -victim.wait(within)
    except subprocess.TimeoutExpired:
        return None


@pytest.mark.parametrize("way", WAYS)
def test_a_refused_connection_kills_no_process_of_roots(
    host: Host, programs: Programs, victims: Victims, way: str
) -> None:
    victim = victims(ROOT)
    attack: list[Word] = [programs["killing"], way, victim.pid, "connect", CLIENT4, 9]
    said = host.graft("run", *outgoing(host), *attack).stdout
    assert said == "connect ECONNREFUSED\n"  # by the host's stack: the signal was due
    assert ended(victim, 0.2) is None


@pytest.mark.parametrize("way", WAYS)
def test_control_without_the_defence_it_kills_one(host: Host, programs: Programs, victims: Victims, way: str) -> None:
    victim = victims(ROOT)
    attack: list[Word] = [programs["killing"], way, victim.pid, "connect", CLIENT4, 9]
    result = run(run_without_defence(*outgoing(host), *attack), environment=host.environment, status=0)
    assert result.stdout == "connect ECONNREFUSED\n"
    assert ended(victim, 10) == signal.SIGKILL


def let_a_client_come(host: Host, program: Program, port: int) -> None:
    program.says("listening")
    host.client.connected(HOST4, port).close()
    program.says("poll 1")


def listening(host: Host, programs: Programs, port: int, victim: int) -> Sequence[Word]:
    rules = [*AS_NOBODY, "-i", f"0.0.0.0:80={host.endpoint(f'0.0.0.0:{port}')}", "--"]
    return [*rules, programs["killing"], "process", victim, "bind", "0.0.0.0", 80]


def test_a_new_client_kills_no_process_of_roots(host: Host, programs: Programs, victims: Victims) -> None:
    victim, port = victims(ROOT), host.port()
    let_a_client_come(host, host.start(*listening(host, programs, port, victim.pid)), port)
    assert ended(victim, 0.2) is None


def test_control_without_the_defence_a_new_client_kills_it(host: Host, programs: Programs, victims: Victims) -> None:
    victim, port = victims(ROOT), host.port()
    command = run_without_defence(*listening(host, programs, port, victim.pid))
    let_a_client_come(host, host.start_command(command), port)
    assert ended(victim, 10) == signal.SIGKILL


@pytest.mark.parametrize("way", WAYS)
def test_the_signals_that_a_program_may_send_still_arrive(
    host: Host, programs: Programs, victims: Victims, way: str
) -> None:
    victim = victims(NOBODY)
    attack: list[Word] = [programs["killing"], way, victim.pid, "connect", CLIENT4, 9]
    assert host.graft("run", *outgoing(host), *attack).stdout == "connect ECONNREFUSED\n"
    assert ended(victim, 10) == signal.SIGKILL


def test_a_receiver_that_is_gone_costs_no_call(host: Host) -> None:
    script = f"""
import fcntl, os, socket, struct
gone = os.fork()
if gone == 0: os._exit(0)
s = socket.socket()
fcntl.fcntl(s, 15, struct.pack("ii", 1, gone))
fcntl.fcntl(s, fcntl.F_SETFL, os.O_ASYNC)
os.waitpid(gone, 0)
try: s.connect(("{CLIENT4}", 9))
except ConnectionRefusedError: print("refused")
"""
    said = host.graft("run", *outgoing(host), "/usr/bin/python3", "-ISc", script).stdout
    assert said == "refused\n"
