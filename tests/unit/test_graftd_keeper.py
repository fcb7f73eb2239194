"""graftd's keeper: its protocol, and the process with a program of a few lines in graftd's place."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.keeper import protocol
from graft.keeper.child import Child
from graft.keeper.closing import Closer
from graft.keeper.holdings import Holdings, arrange
from graft.keeper.process import GRAFTD_LOCK, LOCK, SOCKET
from graft.keeper.restarts import Restarts
from graft.kernel.file_lock import is_locked
from tests.support.wait import PATIENCE, until

ROOT = Path(__file__).resolve().parents[2]

# ---- the protocol


def test_a_message_is_read_as_it_was_written() -> None:
    fields = {"READY": "1", "STATUS": "a = b"}
    assert protocol.parse(protocol.encode(fields)) == fields
    assert protocol.parse(protocol.store("s1")) == {"FDSTORE": "1", "FDNAME": "s1", "FDPOLL": "0"}
    assert protocol.parse(protocol.remove("s1")) == {"FDSTOREREMOVE": "1", "FDNAME": "s1"}


def test_a_value_cannot_add_a_field() -> None:
    with pytest.raises(ValueError):
        protocol.encode({"STATUS": "fine\nFDSTOREREMOVE=1"})


@given(st.binary(max_size=200))
def test_any_bytes_can_be_read(raw: bytes) -> None:
    protocol.parse(raw)


@pytest.mark.parametrize("name, good", [("s1", True), ("", False), ("a:b", False), ("a\nb", False), ("x" * 256, False)])
def test_names_are_those_that_systemd_takes(name: str, good: bool) -> None:
    assert protocol.is_name(name) is good


def test_descriptors_are_for_the_process_that_they_are_said_to_be_for() -> None:
    told = protocol.listen_environment(["s1", "s1", "p2"], 77)
    assert protocol.listen_descriptors(told, 77) == [(3, "s1"), (4, "s1"), (5, "p2")]
    assert protocol.listen_descriptors(told, 78) == []
    assert protocol.listen_descriptors({}, 77) == []
    assert protocol.listen_descriptors({**told, "LISTEN_FDS": "x"}, 77) == []


@pytest.mark.parametrize(
    "address, expected",
    [
        (protocol.address(7), 7),
        ("/run/systemd/notify", None),
        ("@notify", None),
        ("", None),
        ("/proc/4711/fd/3/keeper.sock", None),  # a keeper of an earlier version
        ("/proc/self/fd/x/keeper.sock", None),
        ("/proc/self/fd/3/other", None),
    ],
)
def test_the_folder_that_is_inherited_is_that_of_grafts_own_keeper(address: str, expected: int | None) -> None:
    assert protocol.inherited_folder({protocol.NOTIFY_SOCKET: address}) == expected


# ---- graftd, the child


def test_a_child_that_cannot_be_watched_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    forked: list[int] = []

    def fail(pid: int) -> int:
        forked.append(pid)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "pidfd_open", fail)
    with pytest.raises(OSError, match="open files"):
        Child(["/bin/sleep", "60"], {}, [])
    with pytest.raises(ChildProcessError):
        os.waitpid(forked[0], 0)


# ---- descriptors


def new_fd() -> int:
    return os.open("/dev/null", os.O_RDONLY)


def test_what_has_a_name_is_closed_with_it() -> None:
    holdings, first, second = Holdings(Closer()), new_fd(), new_fd()
    assert holdings.add("a", [first]) and holdings.add("b", [second])
    holdings.remove("a")
    holdings.remove("never there")
    assert holdings.items() == [("b", second)]
    with pytest.raises(OSError):
        os.fstat(first)
    holdings.remove("b")


def test_more_than_can_be_passed_on_is_closed() -> None:
    holdings, fd = Holdings(Closer()), new_fd()
    assert not holdings.add("a:b", [fd])
    with pytest.raises(OSError):
        os.fstat(fd)
    kept = [(f"{number:0255}", new_fd()) for number in range(520)]
    stored = [holdings.add(name, [fd]) for name, fd in kept]
    assert True in stored and False in stored
    assert sum(len(name) + 1 for name, _ in holdings.items()) <= protocol.MAX_NAMES
    for name, _ in kept:
        holdings.remove(name)


@given(st.permutations(range(6)), st.integers(0, 8))
def test_descriptors_get_the_numbers_in_a_row_whichever_they_have(order: list[int], first: int) -> None:
    base = max(int(fd) for fd in os.listdir("/proc/self/fd")) + 20
    files = [os.memfd_create(f"file-{number}") for number in range(6)]
    placed = [base + 2 + order[number] for number in range(6)]
    for file, place in zip(files, placed, strict=True):
        os.dup2(file, place)
    wanted = [os.fstat(fd).st_ino for fd in placed]
    arrange(placed, base + first)
    found = [os.fstat(base + first + number).st_ino for number in range(6)]
    for fd in (*files, *range(base + first, base + first + 6)):
        os.close(fd)
    assert found == wanted
    os.closerange(base, base + 20)


def test_one_that_dies_at_once_again_and_again_is_started_ever_later() -> None:
    restarts = Restarts()
    assert [restarts.pause(0.1) for _ in range(7)] == [0.0, 0.0, 0.0, 0.1, 0.2, 0.4, 0.8]
    assert max(restarts.pause(0.1) for _ in range(100)) == 5.0
    assert restarts.pause(60.0) == 0.0


# ---- the process

CHILD = """
import fcntl, os, signal, socket, sys, time
sys.path.append({root!r})
from graft.keeper import protocol
folder = {folder!r}
to = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
to.connect(os.environ["NOTIFY_SOCKET"])
given = protocol.listen_descriptors(os.environ, os.getpid())
def say(**fields):
    to.send(protocol.encode(fields))
def note(text):
    with open(folder + "/notes", "a") as file:
        print(os.getpid(), text, file=file)
"""
STORES = """
readable = [(fd, name) for fd, name in given if not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_WRONLY]
note("given " + " ".join(f"{name}={os.read(fd, 100).decode()}" for fd, name in readable))
if not given:
    reader, writer = os.pipe()
    os.write(writer, b"in-flight")
    socket.send_fds(to, [protocol.store("p1")], [reader, writer])
    os.close(reader)
    os.close(writer)
say(READY="1")
"""
WAITS = "\nsignal.pause()\n"


class Kept:
    """A keeper with such a program."""

    def __init__(self, folder: Path, process: subprocess.Popen[bytes], ready: int) -> None:
        self.folder, self.process, self.ready = folder, process, ready

    @property
    def notes(self) -> list[list[str]]:
        """What its programs noted: process id and words."""
        path = self.folder / "notes"
        return [line.split(" ", 1) for line in path.read_text().splitlines()] if path.exists() else []

    def noted(self, count: int) -> list[list[str]]:
        """The notes, when there are so many."""
        return until(f"{count} notes", lambda: self.notes if len(self.notes) >= count else [], timeout=40)

    def wait_until_ready(self) -> None:
        """Until the first has said so, after its note: the keeper waits far longer for one that has not."""
        assert os.read(self.ready, 10) == b"ready"


@pytest.fixture
def start_keeper(tmp_path: Path) -> Iterator[Callable[..., Kept]]:
    started: list[Kept] = []

    def make(body: str, watchdog: float = 0.0, adopted: int = 0, before: str = "") -> Kept:
        reader, writer = os.pipe()
        program = CHILD.format(root=str(ROOT), folder=str(tmp_path)) + body
        boot = f"import sys; sys.path.append(sys.argv[1])\n{before}\nfrom graft.keeper.process import main\n"
        command = [sys.executable, "-I", "-S", "-c", boot + "sys.exit(main(*sys.argv[2:]))", str(ROOT), str(tmp_path)]
        graftd = [sys.executable, "-I", "-S", "-c", program]
        process = subprocess.Popen([*command, str(writer), str(watchdog), str(adopted), *graftd], pass_fds=[writer])
        os.close(writer)
        started.append(Kept(tmp_path, process, reader))
        return started[-1]

    yield make
    for one in started:
        one.process.terminate()
        one.process.wait(10)
        os.close(one.ready)


def test_the_next_one_gets_what_a_killed_one_stored_and_soon(start_keeper: Callable[..., Kept]) -> None:
    kept = start_keeper(STORES + WAITS)
    assert os.read(kept.ready, 10) == b"ready"
    [[first, words]] = kept.noted(1)
    assert words == "given "
    begun = time.monotonic()
    os.kill(int(first), signal.SIGKILL)
    second, words = kept.noted(2)[1]
    assert time.monotonic() - begun < PATIENCE
    assert second != first
    assert words == "given p1=in-flight"


def test_two_that_die_at_once_are_not_started_in_a_tight_loop(start_keeper: Callable[..., Kept]) -> None:
    kept = start_keeper('note("begun")\nsay(READY="1")\nsys.exit(3)\n')
    kept.noted(5)
    time.sleep(1.5)
    assert 6 <= len(kept.notes) <= 10
    assert kept.process.poll() is None


def test_a_first_one_that_is_never_ready_is_not_started_again(start_keeper: Callable[..., Kept]) -> None:
    kept = start_keeper('note("begun")\nsys.exit(4)\n')
    assert kept.process.wait(10 * PATIENCE) == 4
    assert os.read(kept.ready, 10) == b""
    assert len(kept.notes) == 1


def test_one_that_ends_by_itself_ends_the_keeper(start_keeper: Callable[..., Kept]) -> None:
    kept = start_keeper('say(READY="1")\n')
    assert kept.process.wait(10 * PATIENCE) == 0


def test_one_that_makes_room_for_the_next_is_started_again_at_once(start_keeper: Callable[..., Kept]) -> None:
    kept = start_keeper('note("begun")\nsay(READY="1")\nsys.exit(75 if not os.path.exists(folder + "/end") else 0)\n')
    kept.noted(10)
    (kept.folder / "end").touch()
    assert kept.process.wait(10 * PATIENCE) == 0


def test_sigterm_ends_both(start_keeper: Callable[..., Kept]) -> None:
    kept = start_keeper(STORES + WAITS)
    [[pid, _]] = kept.noted(1)
    kept.process.terminate()
    assert kept.process.wait(10 * PATIENCE) == 0
    assert not Path(f"/proc/{pid}").exists()


def test_one_that_says_nothing_for_too_long_is_killed(start_keeper: Callable[..., Kept]) -> None:
    beats = STORES + '\nwhile True:\n    say(WATCHDOG="1")\n    time.sleep(0.1)\n'
    kept = start_keeper(beats, watchdog=1.0 * PATIENCE)
    [[first, _]] = kept.noted(1)
    time.sleep(1.5 * PATIENCE)
    assert len(kept.notes) == 1
    os.kill(int(first), signal.SIGSTOP)
    assert kept.noted(2)[1][0] != first


UNKILLABLE = """
import os, signal; from graft.keeper import process; process._END_SECONDS = 0.2; kill = os.kill
os.kill = lambda pid, signum: kill(pid, 0 if signum == signal.SIGKILL else signum)
"""
"""As if whoever is killed waited in the kernel."""


def test_one_that_does_not_end_though_it_is_killed_is_left_behind(start_keeper: Callable[..., Kept]) -> None:
    kept = start_keeper(STORES + WAITS, watchdog=1.5 * PATIENCE, before=UNKILLABLE)
    [[first, _]] = kept.noted(1)
    kept.wait_until_ready()
    os.kill(int(first), signal.SIGSTOP)
    try:
        second, words = kept.noted(2)[1]
        assert second != first
        assert words == "given p1=in-flight"
        assert Path(f"/proc/{first}").exists()
    finally:
        with contextlib.suppress(ProcessLookupError):  # stopped, and without a parent: the kernel has sent SIGHUP
            os.kill(int(first), signal.SIGKILL)


LOCKS = f"""
lock = os.open(folder + "/{GRAFTD_LOCK}", os.O_RDWR | os.O_CREAT, 0o600)
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    note("has the lock")
except BlockingIOError:
    note("has it not")
    sys.exit(1)
"""


def test_one_that_is_left_behind_keeps_no_lock_from_the_next_one(start_keeper: Callable[..., Kept]) -> None:
    kept = start_keeper(LOCKS + STORES + WAITS, watchdog=1.5 * PATIENCE, before=UNKILLABLE)
    [[first, _], _] = kept.noted(2)
    kept.wait_until_ready()
    os.kill(int(first), signal.SIGSTOP)
    try:
        assert [words for _, words in kept.noted(4)][2:] == ["has the lock", "given p1=in-flight"]
        assert Path(f"/proc/{first}").exists()
        assert is_locked(kept.folder / GRAFTD_LOCK)
    finally:
        with contextlib.suppress(ProcessLookupError):  # stopped, and without a parent: the kernel has sent SIGHUP
            os.kill(int(first), signal.SIGKILL)
    assert is_locked(kept.folder / GRAFTD_LOCK)


def test_one_that_is_killed_leaves_the_next_one_another_lock(start_keeper: Callable[..., Kept]) -> None:
    """(Who has opened its file before is refused that lock: daemon_process.py.)"""
    kept = start_keeper(LOCKS + STORES + WAITS, watchdog=1.5 * PATIENCE)
    [[first, _], _] = kept.noted(2)
    kept.wait_until_ready()
    with open(kept.folder / GRAFTD_LOCK) as before:
        os.kill(int(first), signal.SIGSTOP)
        assert kept.noted(4)[2][1] == "has the lock"
        assert not os.path.samestat(os.fstat(before.fileno()), os.stat(kept.folder / GRAFTD_LOCK))


def test_one_that_does_not_end_though_it_is_killed_keeps_no_keeper(start_keeper: Callable[..., Kept]) -> None:
    kept = start_keeper(STORES + WAITS, before=UNKILLABLE)
    [[first, _]] = kept.noted(1)
    os.kill(int(first), signal.SIGSTOP)
    try:
        kept.process.terminate()
        assert kept.process.wait(10 * PATIENCE) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):  # stopped, and without a parent: the kernel has sent SIGHUP
            os.kill(int(first), signal.SIGKILL)


def test_a_message_of_another_process_does_nothing(start_keeper: Callable[..., Kept]) -> None:
    kept = start_keeper(STORES + WAITS)
    assert os.read(kept.ready, 10) == b"ready"
    [[first, _]] = kept.noted(1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
        stranger.connect(str(kept.folder / SOCKET))
        stranger.send(protocol.remove("p1"))
        with open("/dev/null") as file:
            socket.send_fds(stranger, [protocol.store("s1")], [file.fileno()])
    os.kill(int(first), signal.SIGKILL)
    assert kept.noted(2)[1][1] == "given p1=in-flight"


def test_only_root_may_send_to_it(start_keeper: Callable[..., Kept]) -> None:
    kept = start_keeper(STORES + WAITS)
    kept.noted(1)
    assert (kept.folder / SOCKET).stat().st_mode & 0o777 == 0o600


def test_a_second_keeper_ends_without_starting_anything(start_keeper: Callable[..., Kept]) -> None:
    kept = start_keeper(STORES + WAITS)
    kept.noted(1)
    assert (kept.folder / LOCK).read_text() == f"{kept.process.pid}\n"
    assert start_keeper(STORES + WAITS).process.wait(10 * PATIENCE) == 1
    assert len(kept.notes) == 1


def test_it_takes_little_memory(start_keeper: Callable[..., Kept]) -> None:
    kept = start_keeper(STORES + WAITS)
    kept.noted(1)
    rollup = Path(f"/proc/{kept.process.pid}/smaps_rollup").read_text()
    private = [int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Private_")]
    assert sum(private) < 6 << 10


def test_a_graftd_whose_keeper_was_killed_is_adopted(start_keeper: Callable[..., Kept], tmp_path: Path) -> None:
    """Its messages count, it is started again when it dies, and its end ends the keeper where it said so."""
    ends = "signal.signal(signal.SIGTERM, lambda *_: (again(), say(STOPPING='1'), sys.exit(0)))"
    again = "def again():\n    global to\n    to = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
    again += f"    to.connect({str(tmp_path / SOCKET)!r})\n"
    first = start_keeper(STORES + again + ends + "\nwhile True:\n    signal.pause()\n")
    assert os.read(first.ready, 10) == b"ready"
    [[pid, _]] = first.noted(1)
    first.process.kill()
    first.process.wait()
    second = start_keeper("sys.exit(1)\n", adopted=int(pid))
    assert os.read(second.ready, 10) == b"ready"
    assert second.process.poll() is None
    os.kill(int(pid), signal.SIGTERM)
    assert second.process.wait(10 * PATIENCE) == 0


HELD = """
import os; from graft.keeper import own_names; pin = own_names.pin; path = {path!r}
def held(inherited=0):
    if not inherited and os.path.exists(path):
        os.rename(path, path + "-used")
        os.close(os.open(path + "-used", os.O_RDONLY))
    pin(inherited)
own_names.pin = held
"""


def test_another_one_is_started_where_one_waits_before_it_is_graftd(
    start_keeper: Callable[..., Kept], tmp_path: Path
) -> None:
    """The first one, and one that follows; what was stored is there, and who waits does not have it."""
    os.mkfifo(tmp_path / "gate")
    kept = start_keeper(STORES + WAITS, before=HELD.format(path=str(tmp_path / "gate")))
    assert os.read(kept.ready, 10) == b"ready"
    [[first, words]] = kept.noted(1)
    assert words == "given "
    os.rename(tmp_path / "gate-used", tmp_path / "gate")
    os.kill(int(first), signal.SIGKILL)
    assert kept.noted(2)[1][1] == "given p1=in-flight"


def test_sigterm_ends_a_keeper_all_of_whose_children_wait(start_keeper: Callable[..., Kept], tmp_path: Path) -> None:
    all_wait = f"import pathlib, signal; note = lambda: pathlib.Path({str(tmp_path / 'waits')!r}).touch()\n"
    all_wait += "from graft.keeper import own_names; own_names.pin = lambda inherited=0: (note(), signal.pause())\n"
    kept = start_keeper(STORES + WAITS, before=all_wait)
    until("one waits", (tmp_path / "waits").exists)
    kept.process.terminate()
    assert kept.process.wait(20 * PATIENCE) == 0
    assert kept.notes == []
