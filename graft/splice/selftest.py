"""Tests the relay in the kernel on this kernel, before it is used for containers.

Sockmaps have known defects (other projects have removed such a relay because of them), which differ from kernel to
kernel, so a version number says nothing. This runs as a process of its own in a network namespace of its own: it relays
its own connections by the kernel, and has a check for each known defect. selftest_result.py stores the result.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import select
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial

from graft.errors import GraftError
from graft.kernel import tcp
from graft.model.settings import Settings
from graft.splice.connection import Connection, set_relay_options
from graft.splice.event_loop import EventLoop
from graft.splice.resources import DaemonResources
from graft.splice.selftest_result import FAILED, INCONCLUSIVE
from graft.splice.sockmap import Sockmap

CHECK_SECONDS = 10.0  # for each check; all of them together take about one second
_UNREAD_BYTES = 64 << 20  # more than all buffers on the way have room for
_QUEUED_BYTES = 200_000
_DESCRIPTORS = 1024
_SCARCE = (errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ETIMEDOUT)


class CheckFailed(Exception):
    """What the kernel did wrong."""


class Inconclusive(CheckFailed):
    """A check ran out of time, memory or descriptors: on a less busy machine it might pass."""


class Trial:
    """An event loop that relays connections by ``sockmap``."""

    def __init__(self, sockmap: Sockmap) -> None:
        self.sockmap = sockmap
        self._loop = EventLoop(lambda: None, interval=0.002)
        self._daemon_resources = DaemonResources(self._loop, _DESCRIPTORS)
        self._resources = self._daemon_resources.add_container(1)
        self._loop.watch(sockmap.events, select.EPOLLIN, sockmap.on_events)
        self.connections: set[Connection] = set()

    def connected(self, before: bytes = b"") -> tuple[socket.socket, socket.socket]:
        """A client's socket and a server's, with the relay between; ``before`` was sent before the handover."""
        with socket.create_server(("127.0.0.1", 0)) as front, socket.create_server(("127.0.0.1", 0)) as back:
            client = socket.create_connection(front.getsockname())
            client.sendall(before)
            near, _ = front.accept()
            far = socket.socket()
            for sock in (near, far):
                sock.setblocking(False)
                set_relay_options(sock)
            far.connect_ex(back.getsockname())
            server, _ = back.accept()
        for end in (client, server):
            end.settimeout(CHECK_SECONDS)
        self._resources.reserve_connection()
        Connection(self._resources, self.connections, near, far, self.sockmap)
        return client, server

    def while_relayed(self, *work: Callable[[], object]) -> None:
        """Run each of ``work`` in a thread, while the relay runs. Raises what they raise, or Inconclusive."""
        errors: list[BaseException] = []

        def guarded(one: Callable[[], object]) -> None:
            try:
                one()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=guarded, args=(one,), daemon=True) for one in work]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + CHECK_SECONDS
        while any(thread.is_alive() for thread in threads):
            self._loop.turn()
            if time.monotonic() > deadline:
                raise Inconclusive("a transfer hangs")
        for error in errors:
            raise error

    def until(self, condition: Callable[[], bool], otherwise: str) -> None:
        """Run the relay until ``condition`` is true. Raises Inconclusive with ``otherwise`` where it never is."""
        deadline = time.monotonic() + CHECK_SECONDS
        while not condition():
            self._loop.turn()
            if time.monotonic() > deadline:
                raise Inconclusive(otherwise)

    def close(self) -> None:
        """Close everything but the maps."""
        for connection in list(self.connections):
            connection.reset()
        self._loop.unwatch(self.sockmap.events)
        self._daemon_resources.close()
        self._loop.shut_down()


def _everything(sock: socket.socket, pause: float = 0.0) -> str:
    """A hash of everything up to the end of the stream, read with pauses."""
    found = hashlib.sha256()
    while part := sock.recv(1 << 16):
        found.update(part)
        if pause:
            time.sleep(pause)
    return found.hexdigest()


def _send(sock: socket.socket, data: bytes, pieces: random.Random) -> None:
    at = 0
    while at < len(data):
        size = pieces.choice((1, 100, 10_000, 1_000_000))
        sock.sendall(data[at : at + size])
        at += size
    sock.shutdown(socket.SHUT_WR)


def bytes_before_the_handover_come_first(trial: Trial) -> None:
    """Bytes that came before the socket was in the map stay in its queue, where the BPF program does not see them."""
    client, server = trial.connected(b"before, ")
    found: list[bytes] = []
    with client, server:

        def read() -> None:
            while sum(map(len, found)) < len(b"before, after"):
                found.append(server.recv(100))

        trial.while_relayed(lambda: client.sendall(b"after"), read)
    if b"".join(found) != b"before, after":
        raise CheckFailed("bytes that came before the handover are lost or late")


def a_reader_that_waits_is_woken(trial: Trial) -> None:
    """A socket that is put into a sockmap while a program is blocked in recv() on it never wakes that program."""
    client, server = trial.connected()
    with client, server:

        def ask() -> None:
            client.sendall(b"?")
            if client.recv(1) != b"!":
                raise CheckFailed("an answer is wrong")

        def answer() -> None:
            server.recv(1)
            server.sendall(b"!")

        trial.while_relayed(answer, ask)
        moved = [trial.sockmap.counts(number)[0] for number in trial.sockmap.flows]
    if sorted(moved) != [1, 1]:
        raise CheckFailed("the kernel does not move the bytes")


def every_byte_arrives_and_no_end_overtakes(trial: Trial, size: int, pause: float) -> None:
    """In both directions at once, with the end right behind the data, and a reader that pauses."""
    pieces = random.Random(size)
    there, back = pieces.randbytes(size), pieces.randbytes(size // 3)
    client, server = trial.connected()
    found: dict[str, str] = {}
    with client, server:
        trial.while_relayed(
            lambda: _send(client, there, random.Random(1)),
            lambda: _send(server, back, random.Random(2)),
            lambda: found.update(there=_everything(server, pause)),
            lambda: found.update(back=_everything(client)),
        )
        trial.until(lambda: not trial.connections, "a connection that ended in both directions stays open")
    if found != {"there": hashlib.sha256(there).hexdigest(), "back": hashlib.sha256(back).hexdigest()}:
        raise CheckFailed("bytes are lost, doubled or in another order")


def an_end_waits_for_the_kernels_queue(trial: Trial) -> None:
    """Redirected bytes are sent from a work queue: an end that was forwarded at once would overtake them."""
    client, server = trial.connected()
    with client, server:
        trial.until(lambda: len(trial.sockmap.flows) == 2, "a connection is not handed over")
        [connection] = trial.connections
        number = tcp.cookie(connection.near.sock)
        sent = 0
        while trial.sockmap.counts(number)[0] - tcp.written(connection.far.sock) < _QUEUED_BYTES:
            sent += client.send(bytes(1 << 16))
            if sent > _UNREAD_BYTES:
                raise CheckFailed("bytes for a full target are neither left nor queued")
        client.shutdown(socket.SHUT_WR)
        trial.until(lambda: connection.near.ended, "an end of stream does not arrive")
        found = 0

        def read() -> None:
            nonlocal found
            while part := server.recv(1 << 16):
                found += len(part)

        trial.while_relayed(read)
        if found != sent:
            raise CheckFailed("an end of stream overtakes the bytes before it")


def an_answer_after_an_end_arrives(trial: Trial) -> None:
    """An end of stream without data must not count as an error of the target."""
    client, server = trial.connected()
    with client, server:

        def ask() -> None:
            client.sendall(b"?")
            client.recv(1)
            client.shutdown(socket.SHUT_WR)
            time.sleep(0.02)  # so that the end is sent without data
            if client.recv(1) != b"!":
                raise CheckFailed("an answer after the end of the question is lost")

        def answer() -> None:
            server.recv(1)
            server.sendall(b".")
            server.recv(1)
            time.sleep(0.02)
            server.sendall(b"!")

        trial.while_relayed(ask, answer)


def a_reader_that_stops_stops_its_sender(trial: Trial) -> None:
    """The kernel queues bytes for a full target without a limit, so the BPF program has to count and stop them."""
    client, server = trial.connected()
    sent = hashlib.sha256()
    with client, server:
        client.settimeout(0.1)
        block = os.urandom(1 << 18)
        total = 0

        def fill() -> None:
            nonlocal total
            with contextlib.suppress(TimeoutError):
                while total < _UNREAD_BYTES:
                    done = client.send(block)
                    sent.update(block[:done])
                    total += done
            client.shutdown(socket.SHUT_WR)

        trial.while_relayed(fill)
        if total >= _UNREAD_BYTES:
            raise CheckFailed("a sender is not stopped though its peer does not read")
        found: list[str] = []
        trial.while_relayed(lambda: found.append(_everything(server)))
        if found != [sent.hexdigest()]:
            raise CheckFailed("bytes are lost or doubled where a reader was slow")


def a_reset_arrives(trial: Trial) -> None:
    """A reset is forwarded as a reset, after the bytes before it."""
    client, server = trial.connected()
    with server:

        def end() -> None:
            client.sendall(b"last words")
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()

        def read() -> None:
            with contextlib.suppress(ConnectionResetError):
                while server.recv(100):
                    pass
                raise CheckFailed("a reset arrives as an end of stream")

        trial.while_relayed(end, read)


def run_checks(trial: Trial) -> None:
    """Run every check. Raises CheckFailed."""
    every_byte = every_byte_arrives_and_no_end_overtakes
    sizes = (1, 1000, 100_000, 3_000_000)
    run_check(trial, bytes_before_the_handover_come_first)
    run_check(trial, a_reader_that_waits_is_woken)
    for size in sizes:
        run_check(trial, partial(every_byte, size=size, pause=0.0), f"{size} bytes")
    trial.sockmap.after = 2  # flows are now handed over after some bytes
    for size in sizes:
        run_check(trial, partial(every_byte, size=size, pause=0.0), f"{size} bytes, handed over in the middle")
    trial.sockmap.after = 0
    run_check(trial, partial(every_byte, size=6_000_000, pause=0.0005), "a slow reader")
    run_check(trial, an_end_waits_for_the_kernels_queue)
    run_check(trial, an_answer_after_an_end_arrives)
    run_check(trial, a_reader_that_stops_stops_its_sender)
    run_check(trial, a_reset_arrives)
    trial.until(lambda: not trial.sockmap.flows, "flows of closed connections are still in the maps")


def run_check(trial: Trial, check: Callable[[Trial], None], name: str = "") -> None:
    """Run one check. Raises CheckFailed that names it, also for an OSError."""
    try:
        check(trial)
    except OSError as error:
        kind = Inconclusive if isinstance(error, TimeoutError) or error.errno in _SCARCE else CheckFailed
        raise kind(f"{name or getattr(check, '__name__', '').replace('_', ' ')}: {error.strerror or error}") from error


def main() -> int:
    """What `selftest_result.run_selftest` runs: prints a problem in one line, and returns the exit status."""
    from graft.datapath import loader
    from graft.kernel import netns

    try:
        netns.unshare_netns()
        netns.bring_lo_up()
        loaded = loader.load_relay(Settings.from_environment().cache_dir)
        sockmap = Sockmap(lambda name: os.dup(loaded.map_fd(name)), after=0)
        trial = Trial(sockmap)
        run_checks(trial)
        trial.close()
    except (CheckFailed, GraftError, OSError) as error:
        traceback.print_exc()
        print(str(error).splitlines()[0])
        return INCONCLUSIVE if isinstance(error, Inconclusive | OSError) else FAILED
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # without waiting for threads that hang
