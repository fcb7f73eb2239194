"""What a ferry makes inside: whose it is to a firewall there, and which ports it takes."""

from __future__ import annotations

import subprocess

import pytest

from tests.hostile.conftest import graft_without
from tests.hostile.test_ferry import PYTHON, out_rule
from tests.support.installation import Host
from tests.support.program import Program

pytestmark = pytest.mark.e2e

NOBODY = "65534"
CODE = """
import os, socket, sys
def new(user=None):
    if user: os.setegid(user); os.seteuid(user)
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(1)
    if user: os.seteuid(0); os.setegid(0)
    return s
inside, server = new(), new(); inside.bind(("127.0.0.1", 5400)); server.bind(("0.0.0.0", 5300))
senders = [server, *(new(int(user)) for user in sys.argv[1:])]
print(os.getpid(), flush=True); input()
for number, one in enumerate(senders):
    one.sendto(b"%d" % number, ("127.0.0.1", 5400))
    try: print(inside.recv(100).decode(), flush=True)
    except TimeoutError: print("nothing", flush=True)
input()
"""


def started(host: Host, defence: str, *words: str) -> tuple[Program, str]:
    """A server at a port below 1024 of the host's, and its process."""
    rules = ["-i", f"0.0.0.0:5300={host.endpoint('0.0.0.0:78')}", *out_rule(host)]
    program = host.start_command([*graft_without(defence), "run", *rules, *words], talk=True)
    program.until("its process", lambda: program.said.endswith("\n"))
    return program, program.said.strip()


def inside(pid: str, *words: str) -> str:
    """A command's output, in the network namespace of a process."""
    return subprocess.run(["nsenter", "-t", pid, "-n", *words], check=True, capture_output=True, text=True).stdout


def received(program: Program, senders: int = 1) -> list[str]:
    """What comes of what each of them sends inside."""
    program.tell("\n")
    program.until("all of it", lambda: len(program.said.splitlines()) > senders)
    return program.said.splitlines()[1:]


def received_past(pid: str, program: Program, rule: str, senders: int = 1) -> list[str]:
    """The same with a firewall there that drops what the rule says."""
    chain = "add chain inet users out { type filter hook output priority 0; }"
    for line in ("add table inet users", chain, f"add rule inet users out {rule} udp dport 5400 drop"):
        inside(pid, "nft", *line.split())
    return received(program, senders)


@pytest.mark.parametrize("rule", ["meta skuid != 0", "meta skgid != 0"])
def test_by_a_ferry_a_program_does_not_pass_for_root_at_a_firewall(host: Host, rule: str) -> None:
    program, pid = started(host, "", "--user", "nobody", "--", *PYTHON, CODE)
    assert received_past(pid, program, rule) == ["nothing"]


@pytest.mark.parametrize("rule", ["meta skuid != 0", "meta skgid != 0"])
def test_control_where_its_sockets_are_roots_it_does(host: Host, rule: str) -> None:
    program, pid = started(host, "ferry's owner", "--user", "nobody", "--", *PYTHON, CODE)
    assert received_past(pid, program, rule) == ["0"]


def test_each_user_has_sockets_of_his_own_inside(host: Host) -> None:
    program, pid = started(host, "", "--", *PYTHON, CODE, "1001", "1002")
    assert received_past(pid, program, "meta skuid 1001 meta skgid 1001", senders=3) == ["0", "nothing", "2"]


def has_port_78(host: Host, defence: str) -> bool:
    """Whether a socket inside has the port of the endpoint, which everybody but root may not have there."""
    program, pid = started(host, defence, "--user", "nobody", "--", *PYTHON, CODE)
    inside(pid, "sysctl", "-q", "net.ipv4.ip_unprivileged_port_start=1024")
    assert received(program) == ["0"]
    return bool(inside(pid, "ss", "-Hlun", "sport = :78"))


def test_a_ferry_takes_no_port_that_not_everybody_may_have(host: Host) -> None:
    assert not has_port_78(host, "")


def test_control_where_it_has_roots_rights_it_does(host: Host) -> None:
    assert has_port_78(host, "ferry's owner")
