"""A ferry asks about the sockets of its container, and not of the machine: others may have very many."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.hostile.conftest import graft_without
from tests.hostile.test_eleventh_reading_ferry import inside
from tests.hostile.test_ferry import PYTHON, out_rule
from tests.support.installation import Host
from tests.support.program import Program

pytestmark = pytest.mark.e2e

QUESTION = "ferry's question"
SOON = 1.0
"""Seconds, on a busy machine."""
MANY = 45000

STRANGER = """
import os, resource, socket, sys
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
count, made = int(sys.argv[1]), 0
while made < count:
    some = min(hard - 64, count - made)
    ready, done = os.pipe()
    if os.fork() == 0:
        for number in range(made, made + some):
            one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(("127.0.0.1", 10000 + number % 20000)); one.detach()
        os.write(done, b"+"); sys.stdin.read(); os._exit(0)
    os.close(done); assert os.read(ready, 1); made += some
print("ready", flush=True); sys.stdin.read()
"""

# Two users; a socket that is bound; for some seconds each question comes from a new socket, as a resolver's does.
ASKS = """
import os, socket, threading, time
def new(): s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(5); return s
server = new(); server.settimeout(None); server.bind(("127.0.0.1", 5300))
def serve():
    while True:
        data, who = server.recvfrom(100); server.sendto(data, who)
threading.Thread(target=serve, daemon=True).start()
def ask(s):
    begun = time.monotonic(); s.sendto(b"q", ("127.0.0.1", 5300))
    try: s.recv(100)
    except TimeoutError: pass
    return time.monotonic() - begun
bound = new(); bound.bind(("", 0))
os.setresuid(-1, 1001, -1); other = new(); ask(other); os.setresuid(-1, 0, -1)
print("asked", flush=True); input()
longest, end = 0.0, time.monotonic() + 8
while time.monotonic() < end:
    longest = max(longest, ask(new()), ask(bound)); time.sleep(0.05)
print(longest, flush=True); input()
"""


@contextmanager
def sockets_of_a_stranger(host: Host, count: int) -> Iterator[None]:
    """Any user's of the host."""
    words = host.netns.command("setpriv", "--reuid=1234", "--regid=1234", "--clear-groups", "--", *PYTHON)
    with subprocess.Popen(
        [*map(str, words), STRANGER, str(count)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as stranger:
        assert stranger.stdin is not None and stranger.stdout is not None
        try:
            assert stranger.stdout.readline() == b"ready\n"
            yield
        finally:
            stranger.stdin.close()


def started(host: Host, defence: str, code: str) -> Program:
    return host.start_command([*graft_without(defence), "run", *out_rule(host), "--", *PYTHON, code], talk=True)


def longest_wait(host: Host, defence: str, strangers: int) -> float:
    """Of a program that asks a server inside."""
    program = started(host, defence, ASKS)
    program.says("asked")
    with sockets_of_a_stranger(host, strangers):
        program.tell("\n")
        program.until("the time", lambda: len(program.said.splitlines()) > 1, timeout=30)
        return float(program.said.splitlines()[1])


def test_sockets_of_others_do_not_stop_a_ferry(host: Host) -> None:
    assert longest_wait(host, "", MANY) < SOON


def test_control_where_it_lists_the_machine_they_do(host: Host) -> None:
    assert longest_wait(host, QUESTION, MANY) > SOON


def test_control_few_sockets_do_not_stop_one_that_lists_them(host: Host) -> None:
    assert longest_wait(host, QUESTION, 10) < SOON


BINDS = """
import os, socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(("", 0))
print(os.getpid(), s.getsockname()[1], flush=True)
input(); s.close(); print("closed", flush=True); input()
"""
SWEEPS = 12
"""Seconds in which a ferry has looked twice for what is gone."""


def is_freed(host: Host, defence: str) -> bool:
    """Whether a port inside is free again, whose socket on the host's stack was closed, and has a stranger's there."""
    program = started(host, defence, BINDS)
    program.until("its port", lambda: program.said.endswith("\n"))
    pid, port = program.said.split()

    def has_port() -> bool:
        return bool(inside(pid, "ss", "-Hlun", f"sport = :{port}"))

    time.sleep(SWEEPS)
    assert has_port()
    program.tell("\n")
    program.says("closed")
    with host.netns.inside():
        stranger = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with stranger:
        stranger.bind(("", int(port)))
        time.sleep(SWEEPS)
        return not has_port()


def test_a_stranger_does_not_keep_a_port_inside_taken(host: Host) -> None:
    assert is_freed(host, "")


def test_control_where_any_socket_of_the_machine_counts_he_does(host: Host) -> None:
    assert not is_freed(host, QUESTION)
