"""What the twenty-sixth reading found of whose a socket is: by fchown(2) of it, a program chose as which user or group
the firewall sees what replaces it and its ferry's sockets, and whose a unix socket's file is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.hostile.conftest import Without, graft_without
from tests.hostile.test_eleventh_reading_ferry import received_past
from tests.hostile.test_ferry import PYTHON, out_rule
from tests.hostile.test_fourteenth_reading import CODE as SENDS_INSIDE
from tests.support.building import Programs
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4
from tests.support.shell import Word, run

pytestmark = pytest.mark.e2e

USER, GROUP, OTHER_GROUP = 65534, 12345, 23456
RUNS = ("/usr/bin/python3", "-ISc")
POWERLESS = ("--inh-caps=-all", "--no-new-privs", "--")
IN_TWO_GROUPS = ("setpriv", f"--reuid={USER}", f"--regid={GROUP}", f"--groups={GROUP},{OTHER_GROUP}")
AS_USER = (*IN_TWO_GROUPS, "--bounding-set=-all", *POWERLESS)
WITH_CHOWN = ("setpriv", "--bounding-set=-all,+chown", *POWERLESS)

CONNECTS = """
import os, socket, sys
address, port, steps = sys.argv[1], int(sys.argv[2]), sys.argv[3]
def connect(steps, *kind):
    sock = socket.socket(*kind)
    exec(steps)
    try:
        sock.connect((address, port))
    except ConnectionRefusedError:
        return "refused"
    return "connected"
print(connect(steps))
"""
TO_OTHER_GROUP = f"os.fchown(sock.fileno(), -1, {OTHER_GROUP})"  # anybody may, who is in it
TO_OTHER_USER = f"os.fchown(sock.fileno(), {GROUP}, -1)"
DROPS_ROOT = f"os.setgroups([]); os.setgid({GROUP}); os.setuid({USER})"


@contextlib.contextmanager
def refusing(host: Host, folder: Path, whom: str) -> Iterator[int]:
    """A rule of the operator's own about who may connect; the port that they all want."""
    file = folder / "users.nft"
    rule = f"meta {whom} meta l4proto tcp tcp flags syn / syn,ack reject with tcp reset"
    file.write_text(f"table inet users {{\n chain c {{\n  type filter hook output priority 0;\n  {rule}\n }}\n}}\n")
    host.netns.run("nft", "-f", file)
    try:
        with contextlib.closing(host.client.listener()) as far:
            yield far.getsockname()[1]
    finally:
        host.netns.run("nft", "delete", "table", "inet", "users")


def connects(
    host: Host, port: int, program: Sequence[str], steps: str, defence: str = "", code: str = CONNECTS
) -> list[str]:
    """What a program says of its connects; its socket stays in the container until then (swap)."""
    rule = f"{CLIENT4}={host.endpoint('0.0.0.0:dynamic')}"
    command = [*graft_without(defence), "run", "-e", rule, "--", *program, *RUNS, code, CLIENT4, str(port), steps]
    return run(command, environment=host.environment, status=0).stdout.split()


def without_graft(host: Host, port: int, program: Sequence[str], steps: str) -> list[str]:
    command = host.netns.command(*program, *RUNS, CONNECTS, CLIENT4, str(port), steps)
    return run(command, status=0).stdout.split()


ATTACKS = pytest.mark.parametrize(
    ("whom", "program", "steps"),
    [(f"skgid {GROUP}", AS_USER, TO_OTHER_GROUP), (f"skuid != {GROUP}", WITH_CHOWN, TO_OTHER_USER)],
    ids=["a group that he is in", "anybody, by CAP_CHOWN"],
)


@ATTACKS
def test_a_program_does_not_choose_who_the_firewall_takes_it_for(
    host: Host, tmp_path: Path, whom: str, program: Sequence[str], steps: str
) -> None:
    with refusing(host, tmp_path, whom) as port:
        assert without_graft(host, port, program, steps) == ["refused"]
        assert connects(host, port, program, steps) == ["refused"]


@ATTACKS
def test_control_it_does_where_the_sockets_file_is_asked_for_its_owner(
    host: Host, tmp_path: Path, whom: str, program: Sequence[str], steps: str
) -> None:
    with refusing(host, tmp_path, whom) as port:
        assert connects(host, port, program, steps, "chowned") == ["connected"]


@ATTACKS
def test_nor_where_the_kernel_does_not_tell_who_opened_it(
    without: Without, tmp_path: Path, whom: str, program: Sequence[str], steps: str
) -> None:
    host = without("told opener")
    with refusing(host, tmp_path, whom) as port:
        assert connects(host, port, program, steps) == ["refused"]


def test_nor_by_the_second_socket_which_the_compiled_part_replaces(host: Host, tmp_path: Path) -> None:
    code = CONNECTS + "print(*(connect(steps) for _ in range(3)))\n"
    code = code.replace("print(connect(steps))", "connect('')")
    with refusing(host, tmp_path, f"skgid {GROUP}") as port:
        assert connects(host, port, AS_USER, TO_OTHER_GROUP, code=code) == ["refused"] * 3


SAYS_WHOSE = CONNECTS.replace('return "connected"', "return os.fstat(sock.fileno()).st_uid")


@pytest.mark.parametrize("kind", ["", ", 2, 1, 262"], ids=["tcp", "mptcp"])
def test_what_a_server_opened_before_it_dropped_root_is_roots_still(host: Host, tmp_path: Path, kind: str) -> None:
    """As without Graft: a firewall takes it for whoever opened the socket."""
    code = SAYS_WHOSE.replace("connect(steps)", f"connect(steps{kind})")
    with refusing(host, tmp_path, f"skuid {USER}") as port:
        assert without_graft(host, port, (), DROPS_ROOT) == ["connected"]
        assert connects(host, port, (), DROPS_ROOT, code=code) == ["0"]


def test_where_the_kernel_does_not_tell_it_is_the_programs_of_now(without: Without, tmp_path: Path) -> None:
    host = without("told opener")
    with refusing(host, tmp_path, f"skuid {USER}") as port:
        assert connects(host, port, (), DROPS_ROOT) == ["refused"]


# ---- the ferry ------------------------------------------------------------------------------------------------------


def passes(host: Host, programs: Programs, defence: str = "") -> list[str]:
    """What user 1001 sends inside, by a socket that is replaced, past a firewall that drops what his group sends."""
    code = SENDS_INSIDE.replace('"--clear-groups"', f'"--groups={OTHER_GROUP}"').replace("range(2)", "range(3)")
    steps: list[Word] = ["make32", 2, 2, 0, "chown", -1, OTHER_GROUP, "bind", "0.0.0.0", 5300]
    steps += ["wait", "send", "127.0.0.1", 5400, "wait"]
    grants = ["-i", f"0.0.0.0:5300={host.endpoint('0.0.0.0:dynamic')}", *out_rule(host)]
    command = [*graft_without(defence), "run", *grants, "--", *PYTHON, code, programs["calls"], *steps]
    program = host.start_command(command, talk=True)
    program.until("its process", lambda: program.said.endswith("\n"))
    return received_past(program.said.strip(), program, "meta skgid 1001")


def test_nor_does_his_ferry_pass_for_another_group(host: Host, programs: Programs) -> None:
    assert passes(host, programs) == ["nothing"]


def test_control_it_does_by_the_owner_of_the_sockets_file(host: Host, programs: Programs) -> None:
    assert passes(host, programs, "chowned") == ["hello"]


# ---- unix sockets ---------------------------------------------------------------------------------------------------

BINDS = """
import os, socket, sys
sock = socket.socket(socket.AF_UNIX)
exec(sys.argv[2])
sock.bind(sys.argv[1])
print("bound", flush=True)
input()
"""

Bind = Callable[..., tuple[int, int]]


@pytest.fixture
def bind(host: Host, tmp_path: Path) -> Bind:
    """Binds a unix socket at an endpoint without an owner; gives whose the file is that the host has."""

    def make(program: Sequence[str], steps: str, defence: str = "") -> tuple[int, int]:
        path = tmp_path / "app.sock"
        host.graft("ep", "add", "app", f"unix:{path}")
        words = ["run", "-i", "unix:/inside/own.sock=app", "--", *program, *RUNS, BINDS, "/inside/own.sock", steps]
        host.start_command([*graft_without(defence), *words], talk=True).says("bound")
        status = path.stat()
        return status.st_uid, status.st_gid

    return make


def test_a_unix_sockets_file_is_the_callers_whatever_he_made_of_the_socket(bind: Bind) -> None:
    assert bind(WITH_CHOWN, TO_OTHER_USER) == (0, 0)


def test_control_the_file_is_anybodys_by_the_owner_of_the_sockets_file(bind: Bind) -> None:
    assert bind(WITH_CHOWN, TO_OTHER_USER, "chowned") == (GROUP, 0)


def test_a_unix_sockets_file_is_whose_it_would_be_without_graft(bind: Bind) -> None:
    """The caller's of now, and not of whoever opened the socket."""
    assert bind((), DROPS_ROOT) == (USER, GROUP)
