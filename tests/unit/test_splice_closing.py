"""Sockets whose close would wait are closed by a process that exits, on a kernel that cannot refuse descriptors."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from graft.kernel import unix_rights
from graft.splice import closing
from graft.splice.closing import Closer
from tests.support.wait import until

LINGER = 2
AT_EXIT = """
import socket, sys
from graft.kernel import unix_rights
from graft.splice.closing import Closer
unix_rights.refused_by_kernel = lambda: False
Closer.close_at_exit(socket.socket(fileno=int(sys.argv[1])))
"""


@pytest.fixture(autouse=True)
def older_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unix_rights, "refused_by_kernel", lambda: False)


@pytest.fixture
def closer() -> Iterator[Closer]:
    made = Closer()
    yield made
    made.stop()


@contextlib.contextmanager
def sent_to(peer: socket.socket, seconds: int = LINGER) -> Iterator[socket.socket]:
    """A TCP socket with unsent data and SO_LINGER is sent to the other end of ``peer``. Gives the one that it writes
    to, which reads nothing.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        lingering = socket.create_connection(server.getsockname())
        reader, _ = server.accept()
    with reader:
        lingering.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                lingering.send(bytes(1 << 20))
        lingering.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, seconds))
        socket.send_fds(peer, [b"x"], [lingering.fileno()])
        lingering.close()
        yield reader


def ends(reader: socket.socket) -> bool:
    """Whether the other end of a TCP connection is closed."""
    reader.settimeout(10)
    with contextlib.suppress(ConnectionResetError):
        while reader.recv(1 << 20):
            pass
    return True


def took(start: float) -> float:
    return time.monotonic() - start


def test_a_socket_with_a_descriptor_in_its_queue_is_closed_at_once(closer: Closer) -> None:
    ours, peer = socket.socketpair()
    with peer, sent_to(peer, 60) as reader:
        start = time.monotonic()
        assert closer.close(ours)
        assert took(start) < 1
        assert ends(reader)
        peer.settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            assert peer.recv(1) == b""


def test_a_hundred_of_them_are(closer: Closer) -> None:
    with contextlib.ExitStack() as stack:
        start, readers = 0.0, []
        pairs = [socket.socketpair() for _ in range(100)]
        for _, peer in pairs:
            readers.append(stack.enter_context(sent_to(stack.enter_context(peer), 60)))
        start = time.monotonic()
        for ours, _ in pairs:
            while not closer.close(ours):
                time.sleep(0.01)
        assert all(ends(reader) for reader in readers)
        assert took(start) < 30


def test_control_closed_here_it_takes_as_long_as_it_lingers() -> None:
    ours, peer = socket.socketpair()
    with peer, sent_to(peer):
        start = time.monotonic()
        ours.close()
        assert took(start) > LINGER / 2


class SlowToClose(socket.socket):
    """One whose process is slow: it closes it when the helper's child has received it, and has ended or waits."""

    closer: Closer
    seconds = 0.0

    def close(self) -> None:
        until("the helper's child has it", lambda: has_received(self.closer))
        until("it exits no more", lambda: set(states(children(self.closer._helper))) <= {"S"})
        start = time.monotonic()
        super().close()
        self.seconds = took(start)


def has_received(closer: Closer) -> bool:
    """Whether nothing is left that was sent to the helper."""
    assert closer._outbox is not None
    return not any(fcntl.ioctl(closer._outbox, termios.TIOCOUTQ, bytes(4)))


def children(pid: int) -> list[int]:
    """Those that have not ended."""
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def states(pids: list[int]) -> Iterator[str]:
    """What those of them do that have not ended."""
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            yield Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]


def slow_to_close(closer: Closer, sock: socket.socket) -> SlowToClose:
    made = SlowToClose(fileno=sock.detach())
    made.closer = closer
    return made


def test_where_the_process_is_slower_than_its_helper_it_does_not_have_the_last_copy(closer: Closer) -> None:
    for _ in range(2):  # the second one's child is told of the second one
        ours, peer = socket.socketpair()
        slow = slow_to_close(closer, ours)
        with peer, sent_to(peer, 60) as reader:
            assert closer.close(slow)
            assert slow.seconds < 1
            assert ends(reader)
    until("no child is left", lambda: not children(closer._helper))


def test_control_where_the_helpers_child_does_not_wait_for_it_it_has(
    closer: Closer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(closing, "_wait_until_closed", lambda _closed, _count: None)
    ours, peer = socket.socketpair()
    slow = slow_to_close(closer, ours)
    with peer, sent_to(peer):
        assert closer.close(slow)
        assert slow.seconds > LINGER / 2


def test_where_the_process_ends_before_it_has_closed_one_its_helpers_child_exits(closer: Closer) -> None:
    ours, peer = socket.socketpair()
    with ours, peer, sent_to(peer, 60):
        assert closer._send(ours)
        until("it waits", lambda: has_received(closer) and children(closer._helper))
        helper = closer._helper
        waiting = children(helper)
        closer.stop()  # what it has open is closed
        until("its helper has ended, and the child", lambda: not list(states([helper, *waiting])))


def test_a_listener_with_one_that_was_not_accepted_is_closed_at_once(closer: Closer, tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "sock"))
    listener.listen()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "sock"))
        with sent_to(client, 60) as reader:
            start = time.monotonic()
            assert closer.close(listener)
            assert took(start) < 1
            with socket.socket(socket.AF_UNIX) as late, pytest.raises(ConnectionRefusedError):
                late.connect(str(tmp_path / "sock"))
            assert ends(reader)


def test_a_helper_that_was_killed_is_started_again(closer: Closer) -> None:
    first, peer = socket.socketpair()
    with peer:
        peer.send(b"x")
        assert closer.close(first)
        subprocess.run(["kill", "-KILL", str(closer._helper)], check=True)
    second, peer = socket.socketpair()
    with peer, sent_to(peer, 60) as reader:
        deadline = time.monotonic() + 10
        while not closer.close(second):
            assert time.monotonic() < deadline
        assert ends(reader)


def test_a_process_that_exits_does_not_wait() -> None:
    ours, peer = socket.socketpair()
    with peer, sent_to(peer, 60) as reader:
        with subprocess.Popen([sys.executable, "-c", AT_EXIT, str(ours.fileno())], pass_fds=[ours.fileno()]) as process:
            ours.close()
            assert process.wait(20) == 0
        assert ends(reader)


def test_a_look_at_the_queue_says_whether_descriptors_came() -> None:
    ours, peer = socket.socketpair()
    buffer = memoryview(bytearray(100))
    with ours, peer, open("/dev/null") as file:
        peer.send(b"first")
        assert unix_rights.peek(ours, buffer) == 5
        socket.send_fds(peer, [b"x"], [file.fileno()])
        with pytest.raises(PermissionError):
            unix_rights.peek(ours, buffer)
        assert ours.recv(5) == b"first"
        _, fds, _, _ = socket.recv_fds(ours, 1, 1)  # it is still there
        socket.close(fds[0])
        assert not unix_rights.stop_receiving(ours)
        with pytest.raises(BrokenPipeError):
            peer.send(b"late")
