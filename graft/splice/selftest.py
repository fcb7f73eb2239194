"""Whether this kernel's sockmap can be trusted with a relay: tried, on connections of our own, before it is used.

What can go wrong is known (others gave such a relay up over it), and differs from kernel to kernel, so a version number
says nothing. A process of its own, in a network namespace of its own, hands connections to the kernel and looks at
each thing that has been seen to go wrong (verdict.py says how long its answer holds).
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
from graft.splice.connection import Connection, prepare
from graft.splice.event_loop import EventLoop
from graft.splice.resources import Resources
from graft.splice.selftest_result import FAILED, INCONCLUSIVE
from graft.splice.sockmap import Sockmap

_SECONDS = 10.0  # for each check; all of them take about one
_UNREAD_BYTES = 64 << 20  # more than any buffers on the way hold
_QUEUED_BYTES = 200_000
_DESCRIPTORS = 1024
_SCARCE = (errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ETIMEDOUT)


class Wrong(Exception):
    """What the kernel did not do right."""


class Inconclusive(Wrong):
    """What failed because of time, or for want of memory or descriptors: on a calmer machine it might pass."""


class Trial:
    """A loop of its own with ``sockmap``, and connections through it."""

    def __init__(self, sockmap: Sockmap) -> None:
        self.sockmap = sockmap
        self._loop = EventLoop(lambda: None, interval=0.002)
        self._room = Resources(self._loop, _DESCRIPTORS)
        self._account = self._room.account(1)
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
                prepare(sock)
            far.connect_ex(back.getsockname())
            server, _ = back.accept()
        for end in (client, server):
            end.settimeout(_SECONDS)
        self._account.admit()
        Connection(self._account, self.connections, near, far, self.sockmap)
        return client, server

    def while_relayed(self, *work: Callable[[], object]) -> None:
        """Do ``work``, each in a thread, while the relay runs. Raises what they raise, or Inconclusive."""
        errors: list[BaseException] = []

        def guarded(one: Callable[[], object]) -> None:
            try:
                one()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=guarded, args=(one,), daemon=True) for one in work]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + _SECONDS
        while any(thread.is_alive() for thread in threads):
            self._loop.turn()
            if time.monotonic() > deadline:
                raise Inconclusive("a transfer hangs")
        for error in errors:
            raise error

    def until(self, condition: Callable[[], bool], otherwise: str) -> None:
        """Let the relay run until ``condition``. Raises Inconclusive with ``otherwise`` where that does not
        come.
        """
        deadline = time.monotonic() + _SECONDS
        while not condition():
            self._loop.turn()
            if time.monotonic() > deadline:
                raise Inconclusive(otherwise)

    def close(self) -> None:
        """Let go of everything but the maps."""
        for connection in list(self.connections):
            connection.reset()
        self._loop.unwatch(self.sockmap.events)
        self._room.close()
        self._loop.shut_down()


def _everything(sock: socket.socket, pause: float = 0.0) -> str:
    """A hash of all up to the end of the stream, read with pauses."""
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
    """What came before the socket was listed stays in its own queue, where no program sees it."""
    client, server = trial.connected(b"before, ")
    found: list[bytes] = []
    with client, server:

        def read() -> None:
            while sum(map(len, found)) < len(b"before, after"):
                found.append(server.recv(100))

        trial.while_relayed(lambda: client.sendall(b"after"), read)
    if b"".join(found) != b"before, after":
        raise Wrong("bytes that came before the handover are lost or late")


def a_reader_that_waits_is_woken(trial: Trial) -> None:
    """A socket that is listed while its program is blocked in recv() never wakes: programs' own are not listed."""
    client, server = trial.connected()
    with client, server:

        def ask() -> None:
            client.sendall(b"?")
            if client.recv(1) != b"!":
                raise Wrong("an answer is wrong")

        def answer() -> None:
            server.recv(1)
            server.sendall(b"!")

        trial.while_relayed(answer, ask)
        moved = [trial.sockmap.counts(number)[0] for number in trial.sockmap.flows]
    if sorted(moved) != [1, 1]:
        raise Wrong("the kernel does not move the bytes")


def every_byte_arrives_and_no_end_overtakes(trial: Trial, size: int, pause: float) -> None:
    """Both ways at once, the ends right behind the data, for a quick reader and for one with pauses."""
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
        trial.until(lambda: not trial.connections, "a connection that ended both ways stays")
    if found != {"there": hashlib.sha256(there).hexdigest(), "back": hashlib.sha256(back).hexdigest()}:
        raise Wrong("bytes are lost, doubled or in another order")


def an_end_waits_for_the_kernels_queue(trial: Trial) -> None:
    """What was redirected is sent by a work queue, which an end that is handed on at once would overtake."""
    client, server = trial.connected()
    with client, server:
        trial.until(lambda: len(trial.sockmap.flows) == 2, "a connection is not handed over")
        [connection] = trial.connections
        number = tcp.cookie(connection.near.sock)
        sent = 0
        while trial.sockmap.counts(number)[0] - tcp.written(connection.far.sock) < _QUEUED_BYTES:
            sent += client.send(bytes(1 << 16))
            if sent > _UNREAD_BYTES:
                raise Wrong("what a target has no room for is nowhere")
        client.shutdown(socket.SHUT_WR)
        trial.until(lambda: connection.near.ended, "an end does not arrive")
        found = 0

        def read() -> None:
            nonlocal found
            while part := server.recv(1 << 16):
                found += len(part)

        trial.while_relayed(read)
        if found != sent:
            raise Wrong("an end overtakes the bytes before it")


def an_answer_after_an_end_arrives(trial: Trial) -> None:
    """An end that comes by itself, with no data, must not count as an error of the target's."""
    client, server = trial.connected()
    with client, server:

        def ask() -> None:
            client.sendall(b"?")
            client.recv(1)
            client.shutdown(socket.SHUT_WR)
            time.sleep(0.02)  # for the end to be alone on its way
            if client.recv(1) != b"!":
                raise Wrong("an answer after the end of the question is lost")

        def answer() -> None:
            server.recv(1)
            server.sendall(b".")
            server.recv(1)
            time.sleep(0.02)
            server.sendall(b"!")

        trial.while_relayed(ask, answer)


def a_reader_that_stops_stops_its_sender(trial: Trial) -> None:
    """The kernel takes what a target has no room for without end; it has to be counted and stopped."""
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
            raise Wrong("a sender is not stopped where nobody reads")
        found: list[str] = []
        trial.while_relayed(lambda: found.append(_everything(server)))
        if found != [sent.hexdigest()]:
            raise Wrong("bytes are lost or doubled where a reader was slow")


def a_reset_arrives(trial: Trial) -> None:
    """After what was sent before it."""
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
                raise Wrong("a reset arrives as an end")

        trial.while_relayed(end, read)


def check(trial: Trial) -> None:
    """Every check. Raises Wrong."""
    every_byte = every_byte_arrives_and_no_end_overtakes
    sizes = (1, 1000, 100_000, 3_000_000)
    _try(trial, bytes_before_the_handover_come_first)
    _try(trial, a_reader_that_waits_is_woken)
    for size in sizes:
        _try(trial, partial(every_byte, size=size, pause=0.0), f"{size} bytes")
    trial.sockmap.after = 2  # and again with flows that are handed over in the middle
    for size in sizes:
        _try(trial, partial(every_byte, size=size, pause=0.0), f"{size} bytes, handed over in the middle")
    trial.sockmap.after = 0
    _try(trial, partial(every_byte, size=6_000_000, pause=0.0005), "a slow reader")
    _try(trial, an_end_waits_for_the_kernels_queue)
    _try(trial, an_answer_after_an_end_arrives)
    _try(trial, a_reader_that_stops_stops_its_sender)
    _try(trial, a_reset_arrives)
    trial.until(lambda: not trial.sockmap.flows, "something is left of connections that ended")


def _try(trial: Trial, one: Callable[[Trial], None], name: str = "") -> None:
    try:
        one(trial)
    except OSError as error:
        kind = Inconclusive if isinstance(error, TimeoutError) or error.errno in _SCARCE else Wrong
        raise kind(f"{name or getattr(one, '__name__', '').replace('_', ' ')}: {error.strerror or error}") from error


def main() -> int:
    """What verdict.test runs: says what is wrong in one line; FAILED or INCONCLUSIVE where something is."""
    from graft.datapath import loader
    from graft.kernel import netns

    try:
        netns.unshare_netns()
        netns.bring_lo_up()
        loaded = loader.load_relay()
        sockmap = Sockmap(lambda name: os.dup(loaded.map_fd(name)), after=0)
        trial = Trial(sockmap)
        check(trial)
        trial.close()
    except (Wrong, GraftError, OSError) as error:
        traceback.print_exc()
        print(str(error).splitlines()[0])
        return INCONCLUSIVE if isinstance(error, Inconclusive | OSError) else FAILED
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # not held up by a thread that waits for ever
