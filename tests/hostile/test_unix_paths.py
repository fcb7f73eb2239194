"""Unix sockets of the host: neither a container nor another user leads Graft elsewhere, or takes what is another's."""

from __future__ import annotations

import contextlib
import os
import pwd
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hostile.conftest import Without, graft_without
from tests.hostile.test_daemon_shares import FEW, KNOCKS, StartDaemon, hostile, other, start_daemon
from tests.support.installation import Host
from tests.support.plain import Plain
from tests.support.program import Program
from tests.support.shell import Word
from tests.support.wait import PATIENCE, until

pytestmark = pytest.mark.e2e
__all__ = ["hostile", "other", "start_daemon"]

NOBODY = pwd.getpwnam("nobody")
BINDS = """
import socket, sys
sys.stdin.readline()
sock = socket.socket(socket.AF_UNIX)
try:
    sock.bind(sys.argv[1])
    print("bound", flush=True)
except OSError as error:
    print("refused", error.errno, flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder of the user nobody's, with a short path."""
    with tempfile.TemporaryDirectory(prefix="gu-") as made:
        Path(made).chmod(0o755)
        os.chown(made, NOBODY.pw_uid, NOBODY.pw_gid)
        yield Path(made)


def endpoint(host: Host, path: Path) -> str:
    return host.endpoint(f"unix:{path}")


def binder(host: Host, name: str, own: Word, defence: str = "") -> Program:
    """A program of nobody's that binds ``own``, redirected to an endpoint, when it is told to."""
    words: list[Word] = ["run", "-v", "--user", "nobody", "-i", f"unix:{own}={name}", "--", "python3", "-c", BINDS, own]
    program = host.start_command([*graft_without(defence), *words], talk=True)
    host.supervisor(program)
    return program


def after_bind(program: Program) -> str:
    program.tell("\n")
    program.until("an answer", lambda: "\n" in program.said)
    return program.said.strip()


@pytest.mark.parametrize("defence", ["", "links"])
@pytest.mark.parametrize("by", ["symbolic link", "/proc"])
def test_a_folder_that_is_swapped_for_a_link_leads_nowhere(host: Host, folder: Path, defence: str, by: str) -> None:
    served, victim = folder / "served", folder / "victim"
    served.mkdir()
    victim.mkdir()
    program = binder(host, endpoint(host, served / "a.sock"), "/own.sock", defence)
    served.rmdir()
    served.symlink_to(victim if by == "symbolic link" else f"/proc/{os.getpid()}/root{victim}")
    said = after_bind(program)
    if defence:
        assert said == "bound"
        assert [one.name for one in victim.iterdir()] == ["a.sock"]
    else:
        assert said == "refused 40"  # ELOOP
        assert list(victim.iterdir()) == []
        assert "symbolic link" in program.complained


def test_the_last_part_of_the_path_is_not_followed_either(host: Host, folder: Path) -> None:
    target = folder / "target"
    program = binder(host, endpoint(host, folder / "a.sock"), "/own.sock")
    (folder / "a.sock").symlink_to(target)
    assert after_bind(program) == "refused 98"
    assert not target.exists()


@pytest.mark.parametrize("defence", ["", "holders"])
def test_a_container_does_not_take_a_path_that_another_has_bound(host: Host, folder: Path, defence: str) -> None:
    path = folder / "a.sock"
    name = endpoint(host, path)
    first, second = binder(host, name, "/own.sock"), binder(host, name, "/other.sock", defence)
    assert after_bind(first) == "bound"
    inode = path.stat().st_ino
    assert after_bind(second) == ("bound" if defence else "refused 98")
    assert (path.stat().st_ino == inode) is (not defence)


def test_a_path_is_compared_as_it_is_written(host: Host, folder: Path) -> None:
    path = folder / "a.sock"
    name = endpoint(host, path)
    own = folder / "own.sock"
    words: list[Word] = ["--user", "nobody", "-i", f"unix:{own}={name}", "--", "python3", "-c", BINDS]
    program = host.start(*words, f"{folder}/./own.sock", talk=True)
    host.supervisor(program)
    assert after_bind(program) == "bound"
    assert own.is_socket()  # by the program itself, with its own rights
    assert not path.exists()


def test_an_abstract_name_is_no_path(host: Host, folder: Path) -> None:
    name = endpoint(host, folder / "a.sock")
    code = "import socket; s = socket.socket(socket.AF_UNIX); s.bind(chr(0) + '/own.sock'); print(s.getsockname())"
    said = host.run(["-i", f"unix:/own.sock={name}"], "python3", "-c", code).stdout
    assert said == "b'\\x00/own.sock'\n"
    assert not (folder / "a.sock").exists()


def test_nothing_of_graft_can_be_entered_while_it_binds(host: Host, folder: Path) -> None:
    program = binder(host, endpoint(host, folder / "a.sock"), "/own.sock")
    assert after_bind(program) == "bound"
    assert [one.name for one in folder.iterdir()] == ["a.sock"]


# ---- a flood at the path ----------------------------------------------------------------------------


@pytest.mark.parametrize("defence", ["", "shares"])
def test_a_flood_at_one_containers_path_leaves_room_for_another(
    host: Host, start_daemon: StartDaemon, hostile: Plain, other: Plain, folder: Path, defence: str
) -> None:
    start_daemon(defence, FEW)
    flooded, path = folder / "flooded.sock", folder / "a.sock"
    flooded_listener, listener = hostile.listener(), other.listener()
    hostile.attach("-i", f"0.0.0.0:80={endpoint(host, flooded)}")
    other.attach("-i", f"0.0.0.0:80={endpoint(host, path)}")
    with contextlib.ExitStack() as stack, flooded_listener:
        for _ in range(KNOCKS * 2):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.connect(str(flooded))
        seen: list[int] = []

        def has_all_it_gets() -> bool:
            seen.append(hostile.described()["connections"])
            return seen[-1] > 50 and seen[-10:] == [seen[-1]] * 10

        until("the flood has all it gets", has_all_it_gets)
        listener.settimeout(3 if defence else 15 * PATIENCE)
        with stack.enter_context(socket.socket(socket.AF_UNIX)) as client:
            client.connect(str(path))
            client.sendall(b"hello")
            try:
                accepted = stack.enter_context(listener.accept()[0])
                served = accepted.recv(10) == b"hello"
            except TimeoutError:
                served = False
    assert served is (not defence)


# ---- a container in the host's namespace ------------------------------------------------------------


@pytest.mark.parametrize("defence", ["", "unix listener"])
def test_others_on_the_host_do_not_reach_the_relays_listener(
    host: Host, without: Without, folder: Path, defence: str
) -> None:
    where = without(defence) if defence else host
    name = endpoint(where, folder / "a.sock")
    words: list[Word] = ["--net", where.netns.path, "-i", f"0.0.0.0:80={name}", "--"]
    program = where.start(*words, "busybox", "httpd", "-f", "-p", "0.0.0.0:80")
    program.until("published", (folder / "a.sock").is_socket)
    port = int(where.ps()[0]["relay"]["published"][0]["dials"].rpartition(":")[2])
    assert where.netns.reaches("127.0.0.1", port, 1) is bool(defence)
