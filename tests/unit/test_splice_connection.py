"""The relayed connection's state machine, on sockets of this process."""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.splice.connection import Connection, set_relay_options
from graft.splice.event_loop import EventLoop
from graft.splice.resources import DaemonResources
from graft.splice.slow_calls import Blamed


class Relay:
    """A loop with one connection in it, and its two peers, ``left`` and ``right``."""

    def __init__(self, pipes: int = 8) -> None:
        self.loop = EventLoop(lambda: None, interval=0.005)
        self.daemon_resources = DaemonResources(self.loop, 1024, pipes)
        self.resources = self.daemon_resources.add_container(1)
        assert self.resources.reserve_connection()
        self.connections: set[Connection] = set()
        with socket.create_server(("127.0.0.1", 0)) as front, socket.create_server(("127.0.0.1", 0)) as back:
            self.left = socket.create_connection(front.getsockname())
            near, _ = front.accept()
            far = socket.socket()
            for sock in (near, far):
                sock.setblocking(False)
                set_relay_options(sock)
            far.connect_ex(back.getsockname())
            self.right, _ = back.accept()
        for sock in (self.left, self.right):
            sock.setblocking(False)
        self.connection = Connection(self.resources, self.connections, near, far)

    def turn(self, times: int = 5) -> None:
        for _ in range(times):
            self.loop.turn()

    def read(self, sock: socket.socket) -> bytes:
        """What arrives until the stream ends."""
        parts: list[bytes] = []
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            self.loop.turn()
            try:
                part = sock.recv(1 << 20)
            except BlockingIOError:
                continue
            if not part:
                return b"".join(parts)
            parts.append(part)
        raise AssertionError("the stream does not end")

    def close(self) -> None:
        self.connection.reset()
        self.daemon_resources.close()
        self.loop.shut_down()
        self.left.close()
        self.right.close()


@pytest.fixture
def relay() -> Iterator[Relay]:
    made = Relay()
    yield made
    made.close()


def test_bytes_pass_both_ways(relay: Relay) -> None:
    relay.left.send(b"there")
    relay.right.send(b"back")
    relay.turn()
    assert (relay.right.recv(10), relay.left.recv(10)) == (b"there", b"back")


@pytest.mark.parametrize("pipes", [8, 0])
def test_what_is_moved_is_counted_by_its_direction(pipes: int) -> None:
    relay = Relay(pipes)
    relay.left.send(b"there")
    relay.right.send(b"back")
    relay.turn()
    assert (relay.resources.traffic.bytes_in, relay.resources.traffic.bytes_out) == (5, 4)
    relay.close()


def test_an_idle_connection_has_no_pipe(relay: Relay) -> None:
    relay.left.send(b"x")
    relay.turn()
    assert relay.resources.pipes.taken == 0


def test_an_end_is_forwarded_and_the_other_direction_continues(relay: Relay) -> None:
    relay.left.send(b"question")
    relay.left.shutdown(socket.SHUT_WR)
    assert relay.read(relay.right) == b"question"
    relay.right.send(b"answer")
    relay.right.shutdown(socket.SHUT_WR)
    assert relay.read(relay.left) == b"answer"
    relay.turn()
    assert relay.connection.closed
    assert not relay.connections


def test_a_reset_of_one_side_resets_the_other(relay: Relay) -> None:
    relay.turn()
    relay.left.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    relay.left.close()
    relay.turn()
    with pytest.raises(ConnectionResetError):
        relay.right.recv(1)


def test_what_was_sent_before_a_reset_still_arrives(relay: Relay) -> None:
    relay.turn()
    relay.left.send(b"last words")
    relay.turn()
    relay.left.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    relay.left.close()
    relay.turn()
    assert relay.right.recv(100) == b"last words"
    with pytest.raises(ConnectionResetError):
        relay.right.recv(1)


def test_a_reset_right_behind_data_does_not_arrive_as_an_end(relay: Relay) -> None:
    relay.turn()
    relay.left.send(b"last words")
    relay.left.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    relay.left.close()
    relay.turn()
    with pytest.raises(ConnectionResetError):
        while relay.right.recv(100):
            pass


def test_a_reader_that_does_not_read_stops_the_writer(relay: Relay) -> None:
    sent = 0
    for _ in range(200):
        try:
            sent += relay.left.send(bytes(1 << 20))
        except BlockingIOError:
            relay.turn()
    assert sent < 64 << 20  # of 200: what the buffers of four sockets grow to, and a pipe
    assert relay.resources.pipes.taken == 1
    relay.left.shutdown(socket.SHUT_WR)
    assert len(relay.read(relay.right)) == sent
    assert relay.resources.pipes.taken == 0


def test_a_reset_with_data_on_the_way_gives_the_pipe_back(relay: Relay) -> None:
    for _ in range(50):
        try:
            relay.left.send(bytes(1 << 20))
        except BlockingIOError:
            relay.turn()
    assert relay.resources.pipes.taken == 1
    relay.connection.reset()
    assert relay.resources.pipes.taken == 0


@pytest.mark.parametrize("pipes", [8, 0])
@settings(max_examples=20, deadline=None)
@given(
    pieces=st.lists(st.integers(1, 70_000), max_size=20),
    answer=st.integers(0, 300_000),
    answer_first=st.booleans(),
)
def test_every_byte_arrives_with_pipes_and_without(
    pipes: int, pieces: list[int], answer: int, answer_first: bool
) -> None:
    relay = Relay(pipes)
    try:
        data, back = os.urandom(sum(pieces)), os.urandom(answer)

        def send(sock: socket.socket, what: bytes, sizes: list[int]) -> None:
            at = 0
            for size in sizes:
                while size:
                    try:
                        done = sock.send(what[at : at + size])
                    except BlockingIOError:
                        relay.turn()
                        continue
                    at, size = at + done, size - done
            sock.shutdown(socket.SHUT_WR)

        if answer_first:
            relay.right.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            send(relay.right, back, [answer])
        send(relay.left, data, pieces)
        assert hashlib.sha256(relay.read(relay.right)).digest() == hashlib.sha256(data).digest()
        if not answer_first:
            send(relay.right, back, [answer])
        assert relay.read(relay.left) == back
        relay.turn()
        assert relay.connection.closed
    finally:
        relay.close()


def test_pipes_that_ran_out_are_refused_until_one_is_given_back() -> None:
    loop = EventLoop(lambda: None)
    daemon_resources = DaemonResources(loop, 1024, 4)
    resources = daemon_resources.add_container(1)
    first, *others = lent = [pipe for _ in range(3) if (pipe := resources.take_pipe()) is not None]
    assert len(lent) == 3
    assert resources.take_pipe() is None  # the last one is reserved for the next container
    resources.return_pipe(first)
    assert resources.take_pipe() is first
    for pipe in (first, *others):
        resources.discard_pipe(pipe)
    assert resources.pipes.taken == 0
    daemon_resources.close()
    loop.shut_down()


def test_an_urgent_byte_is_charged_to_the_side_that_it_is_taken_from_and_to_the_one_it_goes_to() -> None:
    relay = Relay()
    relay.turn()
    said: list[Blamed | None] = []
    relay.loop.blame = lambda started, blamed: said.append(blamed)  # type: ignore[method-assign]
    near, far = relay.connection.near.blamed, relay.connection.far.blamed
    relay.left.send(b"!", socket.MSG_OOB)
    relay.turn()
    assert relay.right.recv(10) == b"!"
    assert near != far and said[:3] == [near, far, near]  # looked at, sent, taken out
    relay.close()
