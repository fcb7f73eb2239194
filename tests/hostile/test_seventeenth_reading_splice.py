"""What a seventeenth reading found about transport splice: a service in the host's network namespace chose it for
itself, without a privilege, by having its first thread leave, or by leaving with sockets that it had made there.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from graft.commands import watcher_process
from graft.commands.sightings import SETTLED_SECONDS
from graft.kernel import cgroup
from graft.state import thread_namespaces
from tests.e2e.test_saved_state import attached, box, saver
from tests.hostile.conftest import Without, graft_without
from tests.hostile.test_eighth_reading_folders import running
from tests.hostile.test_fifteenth_reading_watcher import watch_without
from tests.hostile.test_twelfth_reading_attach import in_cgroup
from tests.support.cgroups import new_cgroup
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, HOST4, Netns
from tests.support.puppet import puppet
from tests.support.shell import AS_NOBODY, Word, run
from tests.support.wait import until

pytestmark = pytest.mark.e2e
__all__ = ["box", "saver"]

SERVICE = r"""
import ctypes, os, socket, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
USER, NET = 0x10000000, 0x40000000
how, client, port, before = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
IPPROTO_UDPLITE = 136
kept = []

def listens(sock, at=None):
    if at is not None:
        sock.bind(("0.0.0.0", at))
    sock.listen()
    kept.append(sock)
    return f"listens {sock.getsockname()[1]}"

def attempt(what, call):
    try:
        print(what, call(), flush=True)
    except OSError as error:
        print(what, "refused", error.errno, flush=True)

def sends(sock):
    sock.sendto(b"heard", (client, port))
    return "sent"

if before > 0:
    listens(socket.socket(), before)
old, old_bound = socket.socket(), socket.socket()
old_bound.bind(("0.0.0.0", 0))
old_udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
old_lite = socket.socket(socket.AF_INET, socket.SOCK_DGRAM, IPPROTO_UDPLITE)

def tries(has_new):
    if has_new:
        attempt("bind", lambda: listens(socket.socket(), 7777))
        attempt("granted", lambda: listens(socket.socket(), 8080))
        attempt("unbound", lambda: listens(socket.socket()))
        attempt("connect", lambda: socket.socket().connect((client, port)) or "connected")
    attempt("old", lambda: listens(old))
    attempt("old bound", lambda: listens(old_bound))
    attempt("old udp", lambda: sends(old_udp))
    attempt("old lite", lambda: sends(old_lite))
    print("done", flush=True)

def leave(flags):
    assert libc.unshare(flags) == 0, os.strerror(ctypes.get_errno())

go, is_there = threading.Event(), threading.Event()

def stay():
    is_there.set()
    go.wait()
    tries(True)

def leaves():
    if how == "first thread":
        leave(USER)  # before there is a second thread: unshare(2) requires that
        threading.Thread(target=stay, daemon=True).start()
        is_there.wait()
        leave(NET)
    elif how in ("process", "processes"):
        leave(USER | NET)
        if how == "processes" and not os.fork():
            leave(NET)
            print("ready", flush=True)
            threading.Event().wait()

if before < 0:
    print("ready", flush=True)
    sys.stdin.readline()
leaves()
if how != "processes":
    print("ready", flush=True)
sys.stdin.readline()
go.set() if how == "first thread" else tries(how == "stays")
sys.stdin.readline()
"""


@dataclass
class Tried:
    """What a service did, in words; which of its listeners the client reached, and what it received from it."""

    said: dict[str, str] = field(default_factory=dict)
    reached: set[str] = field(default_factory=set)
    heard: bool = False

    @property
    def is_confined(self) -> bool:
        return not self.reached and not self.heard


def service(how: str, port: int, before: int = 0) -> tuple[Word, ...]:
    """``before``: a port that it listens at from the start; -1: it leaves only when it is told."""
    return (*AS_NOBODY, sys.executable, "-c", SERVICE, how, CLIENT4, port, before)


@contextmanager
def ear(client: Netns) -> Iterator[tuple[socket.socket, socket.socket]]:
    """The client's UDP-Lite and UDP sockets at one port."""
    with client.inside():
        lite = socket.socket(socket.AF_INET, socket.SOCK_DGRAM, 136)
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with lite, udp:
        lite.bind((CLIENT4, 0))
        udp.bind(lite.getsockname())
        for one in (lite, udp):
            one.settimeout(0.5)
        yield lite, udp


def tries(host: Host, program: subprocess.Popen[str], ears: tuple[socket.socket, socket.socket]) -> Tried:
    """Let the service try what it can."""
    done = Tried()
    assert program.stdin is not None and program.stdout is not None
    program.stdin.write("go\n")
    program.stdin.flush()
    for line in iter(program.stdout.readline, "done\n"):
        assert line, "it ended"
        what, _, result = line.strip().partition(" listens ")
        if not result:
            words = line.split()
            done.said[" ".join(words[:-1])] = words[-1]
        elif host.client.reaches(HOST4, int(result), 0.5):
            done.reached.add(what)
    for one in ears:
        with suppress(TimeoutError):
            done.heard |= bool(one.recv(10))
    return done


def attached_and_tried(host: Host, how: str, *policy: Word, without: str = "", before: int = 0) -> tuple[str, Tried]:
    """What `graft attach` says of a service that leaves so, and what it can do then."""
    with new_cgroup("leaves") as path, ear(host.client) as ears:
        port = ears[0].getsockname()[1]
        with in_cgroup(host, path, *service(how, port, before)) as program:
            said = run(
                [*graft_without(without), "attach", "--cgroup", path, *policy],
                environment=host.environment,
                status=0,
            ).stdout
            done = tries(host, program, ears)
            cgroup.kill(path)
        host.remove_at(path)
        return said, done


GRANT = "0.0.0.0:8080="


def grant(host: Host) -> str:
    return GRANT + host.endpoint(f"0.0.0.0:{host.port()}")


# ---- the transport is chosen by every thread -------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["first thread", "stays"])
def test_a_service_with_a_thread_on_the_host_is_confined_there(host: Host, how: str) -> None:
    said, done = attached_and_tried(host, how, "-i", grant(host), "--deny")
    assert "transport direct: it shares the host's network namespace" in said
    assert done.is_confined, done
    assert done.said["bind refused"] == "13"


def test_transport_splice_is_refused_to_it_by_name(host: Host) -> None:
    with new_cgroup("leaves") as path, in_cgroup(host, path, *service("first thread", 9)):
        refused = host.graft("attach", "--cgroup", path, "--deny", "--transport", "splice", status=None)
        assert refused.returncode != 0
        assert "splice is impossible: its sockets are already on the host's stack" in refused.stderr


def test_control_by_first_threads_it_has_splice_and_what_it_likes(without: Without) -> None:
    host = without("splice on the host")
    said, done = attached_and_tried(host, "first thread", "-i", grant(host), "--deny", without="threads")
    assert "transport splice" in said
    assert done.reached == {"granted", "unbound", "old", "old bound"}


def test_with_splice_its_other_threads_are_confined_all_the_same(host: Host) -> None:
    said, done = attached_and_tried(host, "first thread", "-i", grant(host), "--deny", without="threads")
    assert "transport splice" in said
    assert done.is_confined, done
    assert done.said["bind refused"] == "13"
    assert done.said["connect refused"] == "13"
    assert "granted" not in done.said, "it is bound to its endpoint"


def test_what_it_has_at_an_endpoint_there_is_closed_by_detach(host: Host) -> None:
    port = host.port()
    rules = ["-i", f"{GRANT}{host.endpoint(f'0.0.0.0:{port}')}", "--deny"]
    with (
        new_cgroup("leaves") as path,
        ear(host.client) as ears,
        in_cgroup(host, path, *service("first thread", ears[0].getsockname()[1])) as program,
    ):
        command = [*graft_without("threads"), "attach", "--cgroup", path, *rules]
        assert "transport splice" in run(command, environment=host.environment, status=0).stdout
        tries(host, program, ears)
        assert host.netns.listens(port)
        detached = host.graft("detach", "--cgroup", path, status=None)
        assert not host.netns.listens(port), detached.stdout
        cgroup.kill(path)


def test_threads_that_outlive_the_first_one_are_seen() -> None:
    script = (
        "import ctypes, threading, time; "
        "threading.Thread(target=lambda: (time.sleep(.2), print('ready', flush=True), time.sleep(600))).start(); "
        "ctypes.CDLL(None).syscall(60 if __import__('os').uname().machine == 'x86_64' else 93, 0)"
    )
    with running([sys.executable, "-c", script]) as program:
        assert thread_namespaces.of_process(program.pid) == {os.stat("/proc/self/ns/net").st_ino}


# ---- sockets that it left with ---------------------------------------------------------------------------------------


def test_a_service_that_left_the_host_is_confined_with_what_it_made_there(host: Host) -> None:
    said, done = attached_and_tried(host, "process", "-i", grant(host), "--deny")
    assert "transport splice" in said
    assert done.is_confined, done


def test_control_without_a_look_at_them_it_uses_them_as_it_likes(without: Without) -> None:
    host = without("splice on the host")
    said, done = attached_and_tried(host, "process", "-i", grant(host), "--deny")
    assert "transport splice" in said
    assert done.reached == {"old", "old bound"}


def test_where_nothing_is_denied_they_stay_usable(host: Host) -> None:
    said, done = attached_and_tried(host, "process", "-i", grant(host))
    assert "transport splice" in said
    assert done.reached == {"old", "old bound"}
    assert done.heard


def test_listeners_of_before_are_named_and_go_on_as_with_direct(host: Host) -> None:
    port = host.port()
    with new_cgroup("leaves") as path, in_cgroup(host, path, *service("process", 9, port)):
        said = host.graft("attach", "--cgroup", path, "--deny").stdout
        assert "transport splice" in said
        assert f"tcp listening 0.0.0.0:{port}" in said
        assert host.client.reaches(HOST4, port, 1)
        cgroup.kill(path)
    host.remove_at(path)


# ---- what is restored ------------------------------------------------------------------------------------------------


def restored_and_tried(saver: Host, box: Path, how: str, *asked: str, without: str = "") -> tuple[str | None, Tried]:
    """The transport that a service has after `graft down --force` and `graft up`, if it leaves in between."""
    saver.graft("ep", "add", "web", f"0.0.0.0:{saver.port()}")
    with ear(saver.client) as ears:
        port = ears[0].getsockname()[1]
        with in_cgroup(saver, box, *service(how, port, -1)) as program:
            said = saver.graft("attach", "--cgroup", box, "-i", "0.0.0.0:8080=web", "--deny", *asked).stdout
            assert "transport direct" in said
            assert program.stdin is not None and program.stdout is not None
            program.stdin.write("leave\n")
            program.stdin.flush()
            assert program.stdout.readline() == "ready\n"
            saver.graft("down", "--force")
            run([*graft_without(without), "up"], environment=saver.environment, status=0)
            transport = next((one["transport"] for one in saver.ps() if one["state"] == "attached"), None)
            done = tries(saver, program, ears)
            cgroup.kill(box)
            return transport, done


@pytest.mark.parametrize(
    ("how", "asked", "transport"),
    [
        ("first thread", (), "direct"),
        ("process", (), "splice"),
        ("processes", (), "direct"),
        ("process", ("--transport", "direct"), "direct"),
    ],
)
def test_a_service_chooses_nothing_when_it_is_restored(
    saver: Host, box: Path, how: str, asked: tuple[str, ...], transport: str
) -> None:
    has, done = restored_and_tried(saver, box, how, *asked)
    assert has == transport
    assert done.is_confined, done


def test_control_one_that_waits_uses_what_it_left_with(saver: Host, box: Path) -> None:
    transport, done = restored_and_tried(saver, box, "processes", without="stays direct")
    assert transport is None
    assert done.reached == {"old", "old bound"}


@pytest.mark.parametrize(("defence", "transport"), [("", "direct"), ("threads", "splice")])
def test_a_service_chooses_nothing_when_the_watcher_attaches_it(
    saver: Host, box: Path, defence: str, transport: str
) -> None:
    saver.graft("ep", "add", "web", f"0.0.0.0:{saver.port()}")
    with puppet(box, saver.netns.path):
        saver.graft("attach", "--cgroup", box, "-i", "0.0.0.0:8080=web", "--deny")
    watcher_process.stop(saver.settings)
    cgroup.remove(box)
    box.mkdir()
    with ear(saver.client) as ears:
        port = ears[0].getsockname()[1]
        with in_cgroup(saver, box, *service("first thread", port)) as program:
            watch_without(saver, defence)
            until("it is attached", lambda: attached(saver, box), timeout=SETTLED_SECONDS + 15)
            assert [one["transport"] for one in saver.ps()] == [transport]
            done = tries(saver, program, ears)
            assert done.is_confined, done
            cgroup.kill(box)
