"""What a fourteenth reading found: by a socket that was made untrapped, and swapped, a user passed for another one at a
firewall inside, where that was the only one of whom the ferry knew.
"""

from __future__ import annotations

import pytest

from tests.hostile.conftest import graft_without
from tests.hostile.test_eleventh_reading_ferry import received_past
from tests.hostile.test_ferry import PYTHON, out_rule
from tests.support.building import Programs
from tests.support.installation import Host
from tests.support.shell import Word

pytestmark = pytest.mark.e2e

CODE = """
import os, socket, subprocess, sys
inside = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); inside.settimeout(2); inside.bind(("127.0.0.1", 5400))
other = ["setpriv", "--reuid=1001", "--regid=1001", "--clear-groups", "--", *sys.argv[1:]]
child = subprocess.Popen(other, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
for _ in range(2): assert child.stdout.readline().endswith(b" ok\\n")
print(os.getpid(), flush=True); input()
child.stdin.write(b"\\n"); child.stdin.flush()
try: print(inside.recv(100).decode(), flush=True)
except TimeoutError: print("nothing", flush=True)
input()
"""


def passes(host: Host, programs: Programs, make: str, rule: str, defence: str = "") -> list[str]:
    """What user 1001 sends inside past a firewall there, where another one was root's until then."""
    steps: list[Word] = [make, 2, 2, 0, "bind", "0.0.0.0", 5300, "wait", "send", "127.0.0.1", 5400, "wait"]
    grants = ["-i", f"0.0.0.0:5300={host.endpoint('0.0.0.0:dynamic')}", *out_rule(host)]
    command = [*graft_without(defence), "run", *grants, "--", *PYTHON, CODE, programs["calls"], *steps]
    program = host.start_command(command, talk=True)
    program.until("its process", lambda: program.said.endswith("\n"))
    return received_past(program.said.strip(), program, rule)


@pytest.mark.parametrize("make", ["make", "make32"])
def test_a_user_does_not_pass_for_another_by_a_socket_made_untrapped(host: Host, programs: Programs, make: str) -> None:
    assert passes(host, programs, make, "meta skuid != 0") == ["nothing"]


@pytest.mark.parametrize("make", ["make", "make32"])
def test_what_he_sends_is_his(host: Host, programs: Programs, make: str) -> None:
    assert passes(host, programs, make, "meta skuid != 1001") == ["hello"]


def test_control_where_the_only_one_known_has_everything_he_does(host: Host, programs: Programs) -> None:
    assert passes(host, programs, "make32", "meta skuid != 0", "ferry's only owner") == ["hello"]
