"""A process that has everything loaded and does nothing but fork: each client gets a child of it, which does its job.

    client ── connect ──> server ── fork ──> child: who is the client? ── the job ── its end
                            │
                            └── the next client

A child shares the server's memory until one of the two writes to it. It has nothing else of the server's, nor of other
clients: no descriptor but its connection and a pidfd of its client, no lock, no signal handler. The server reads
nothing that a client sends, so that no client can keep it from the others; it has no maps, no threads and no state.
When it dies, its children go on.

A child says HELLO first, and its client asks for nothing before that: a server that is stopped forks none, and the
client, which does without it then, must not have left a request with it. Then each has the other one say something, to
know that it is a process with the rights that it has itself (graft/kernel/peers.py). Before HELLO a child looks up what
both need in its folder in /proc: somebody may hold that (graft/kernel/surroundings.py). It keeps that open, as the
server does what clients that wait look up to know whether it is stopped.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import time
from collections.abc import Callable

from graft.kernel import peers, process, surroundings
from graft.kernel.fork_messages import ASK, HELLO
from graft.kernel.peers import Peer
from graft.kernel.surroundings import Surroundings

Job = Callable[[socket.socket, Peer], None]
_BACKLOG = 1024


class Server:
    """Forks a child for each connection to ``listening``, a bound socket; ``job`` is what the child does with it.

    From when it is made clients can connect.
    """

    def __init__(self, listening: socket.socket, job: Job) -> None:
        self._listening, self._job = listening, job
        listening.listen(_BACKLOG)
        self._children: set[int] = set()
        self._poll = select.poll()

    def serve(self, idle_seconds: float) -> None:
        """Serve until there is neither a client nor a child for so long."""
        wakeups = _wake_for_children()
        self._listening.setblocking(False)
        self._poll.register(self._listening, select.POLLIN)
        self._poll.register(wakeups, select.POLLIN)
        gc.collect()
        gc.freeze()  # the collector writes to what it looks at: what is loaded now stays shared
        while self._poll.poll(None if self._children else idle_seconds * 1000) or self._children:
            with contextlib.suppress(BlockingIOError):
                os.read(wakeups, 4096)
            self._reap()
            self._accept()

    def _accept(self) -> None:
        try:
            connection, _ = self._listening.accept()
        except OSError:
            return
        with connection, contextlib.suppress(OSError):  # no memory, or too many processes: the client sees it hang up
            child = os.fork()
            if child == 0:
                self._run(connection)
            self._children.add(child)

    def _run(self, connection: socket.socket) -> None:
        """What a child does. Never returns."""
        code = 1
        try:
            pinned = surroundings.pin_own()
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            process.close_all_but({connection.fileno(), *pinned})
            connection.setblocking(True)
            client = _meet(connection)
            self._job(connection, client)
            code = 0
        finally:
            os._exit(code)

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (child := os.waitpid(-1, os.WNOHANG)[0]) != 0:
                self._children.discard(child)


def _wake_for_children() -> int:
    """A descriptor that becomes readable when a child has died."""
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    return reader


def _meet(connection: socket.socket) -> Peer:
    """The client, which has answered. Raises OSError where who answers is not the process that has connected."""
    peers.name_senders(connection)
    client = Peer(connection, surroundings.peer_pid(connection))
    connection.send(HELLO)
    if client.hear() != ASK:
        raise ConnectionError
    peers.name_senders(connection, wanted=False)
    connection.send(HELLO)
    return client


def is_served(client: Peer, own: Surroundings) -> bool:
    """Whether the client is as this process is, which may do for it what it asks then. Neither is under a filter."""
    return not own.is_filtered and client.is_like(own)


def end_server() -> None:
    """End the server that the calling process is a child of. Its other children go on."""
    server = os.getppid()
    os.kill(server, signal.SIGTERM)
    while os.getppid() == server:
        time.sleep(0.001)
