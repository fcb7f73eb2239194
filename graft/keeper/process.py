"""The keeper, the process: starts graftd, starts it again when it dies, and has its descriptors meanwhile.

    graftd's answer ── READY ──▶ the starter is told ── graftd ends with 0 ─▶ the keeper ends, and closes everything
          ▲                                          ── with REPLACED ──────▶ the next one at once
          └──── the next one, with all descriptors ◀── killed, failed ──────▶ the next one after a pause (restarts.py)

One that is to be replaced may say by which command the next one is started (an upgrade). If that is never ready, the
command before is used again.

A graftd whose keeper was killed starts another one, which adopts it: it is stored with again what it has.

A first graftd that ends before it is ready is not started again: what its starter wants is impossible.

A message counts if the kernel says that it is of the graftd that was started, and root's (SCM_CREDENTIALS); what came
before graftd's end is read before the next one is started. One that says nothing for too long is killed, and left
behind where it does not end then: it runs no instruction of its own any more, wherever in the kernel it waits.
"""

from __future__ import annotations

import array
import fcntl
import itertools
import os
import resource
import select
import signal
import socket
import struct
import time
from collections.abc import Mapping, Sequence

from graft.keeper import protocol
from graft.keeper.child import Adopted, Child
from graft.keeper.closing import Closer
from graft.keeper.holdings import Holdings
from graft.keeper.lines import write_line
from graft.keeper.prepared import Forks
from graft.keeper.restarts import Restarts

SOCKET, LOCK = protocol.SOCKET, "keeper.lock"
GRAFTD_LOCK = "graftd.lock"
"""In run_dir: what the only graftd has locked."""
_CREDENTIALS = struct.Struct("=3i")  # struct ucred of unix(7): pid, uid, gid
_ROOM = socket.CMSG_SPACE(_CREDENTIALS.size) + socket.CMSG_SPACE(4 * protocol.MAX_DESCRIPTORS)
_LOCK_SECONDS = 2.0
_START_SECONDS = 60.0  # until graftd is ready
_END_SECONDS = 20.0  # after SIGTERM
_FORK_AGAIN_SECONDS = 1.0


def log(text: str) -> None:
    """A line of graftd's log."""
    write_line(f"keeper: {text}")


class Keeper:
    """``folder``: run_dir, open. ``ready``: a descriptor to write to when graftd is ready, the first time; -1: none.

    ``watchdog``: after how many seconds without a message graftd is killed; 0: never. ``adopted``: the process id of a
    graftd that has no keeper any more, 0 to start one.
    """

    def __init__(
        self,
        folder: int,
        command: Sequence[str],
        environment: Mapping[str, str],
        ready: int,
        watchdog: float,
        adopted: int = 0,
    ) -> None:
        self._command, self._ready, self._watchdog = command, ready, watchdog
        self._next: Sequence[str] = ()
        """The command of the graftd that is to replace the one that runs, () for the same."""
        self._previous: Sequence[str] = ()
        """The command before, until the one that has replaced it is ready."""
        self._closer, self._restarts, self._forks = Closer(), Restarts(), Forks()
        self._holdings = Holdings(self._closer)
        self._child: Child | None = None
        self._due = 0.0
        """When to start the next graftd."""
        self._killed_at = 0.0
        """When to kill the one that runs, which was sent a signal; 0: none was sent."""
        self._was_ready = self._ending = False
        self._folder, self._socket = folder, _listener(folder)
        self._environment = {
            **environment,
            **({protocol.WATCHDOG_USEC: str(int(watchdog * 1e6))} if watchdog else {}),
        }
        self._wakeup, writer = socket.socketpair()
        self._wakeup.setblocking(False)
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.detach())
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, lambda *_: None)
        self._poll = select.poll()
        for sock in (self._socket, self._wakeup):
            self._poll.register(sock, select.POLLIN)
        if adopted:
            self._child = Adopted(adopted)
            self._poll.register(self._child.pidfd, select.POLLIN)
            self._note_ready()

    def run(self) -> int:
        """Keep a graftd running until one ends by itself, or SIGTERM. Gives the status to exit with."""
        while True:
            now = time.monotonic()
            if self._child is None:
                if self._ending:
                    return 0
                if now >= self._due:
                    self._start()
            elif self._is_late(now):
                self._kill(self._child, now)
            if self._has_ended(now) and self._child is not None:
                self._receive()
                status = self._reaped(self._child)
                if status is not None:
                    return status

    def _start(self) -> None:
        try:
            held = self._holdings.items()
            self._child = Child(self._command, self._environment, held, self._folder, self._forks)
            self._poll.register(self._child.pidfd, select.POLLIN)
        except OSError as error:
            log(f"graftd cannot be started: {error.strerror}")
            self._due = time.monotonic() + (0.0 if isinstance(error, TimeoutError) else _FORK_AGAIN_SECONDS)

    def _deadline(self) -> float:
        """When something is to be done though nothing happens."""
        if self._child is None:
            return self._due
        if self._killed_at:
            return self._killed_at
        if not self._child.ready:
            return self._child.started + _START_SECONDS
        return self._child.heard + self._watchdog if self._watchdog else float("inf")

    def _is_late(self, now: float) -> bool:
        if now < self._deadline():
            return False
        self._receive()  # its messages may be here: this process was slow, not graftd
        return time.monotonic() >= self._deadline()

    def _has_ended(self, now: float) -> bool:
        """Wait for something to do, and do it. Whether graftd has ended."""
        left = self._deadline() - now
        found = self._poll.poll(None if left == float("inf") else max(0.0, left) * 1000 + 1)
        has_ended = False
        for fd, _ in found:
            if fd == self._socket.fileno():
                self._receive()
            elif fd == self._wakeup.fileno():
                self._wakeup.recv(64)
                self._end()
            else:
                has_ended = True
        return has_ended

    def _kill(self, child: Child, now: float) -> None:
        """graftd is late. One that was killed before and has not ended waits in the kernel: another one is started."""
        if child.was_killed:
            log(f"graftd ({child.pid}) was killed, does not end, and is left behind")
            self._poll.unregister(child.pidfd)
            child.leave(self._forks)
            self._child, self._killed_at, self._due = None, 0.0, now
            self._choose_command(is_replaced=False)
        else:
            log(f"graftd ({child.pid}) hangs, and is killed")
            child.send(signal.SIGKILL)
            _forget_lock(self._folder)
            self._killed_at = now + _END_SECONDS

    def _end(self) -> None:
        """SIGTERM: end graftd, which resets its connections, and then this process."""
        self._ending = True
        if self._child is not None and not self._killed_at:
            self._killed_at = time.monotonic() + _END_SECONDS
            self._child.send(signal.SIGTERM)

    def _reaped(self, child: Child) -> int | None:
        """graftd has ended. Gives the status to exit with, None to start another one."""
        self._child, self._killed_at = None, 0.0
        self._poll.unregister(child.pidfd)
        status = child.reap()
        if self._ending:
            return 0
        is_replaced = status == protocol.REPLACED or (isinstance(child, Adopted) and bool(self._next))
        self._choose_command(is_replaced)
        if status == 0 or not (self._was_ready or is_replaced):
            return max(status, 1) if status else 0
        pause = 0.0 if is_replaced else self._restarts.pause(child.ready_for())
        if not is_replaced:
            how = f"was killed by signal {-status}" if status < 0 else f"failed ({status})"
            log(f"graftd ({child.pid}) {how}; it is started again{f' in {pause:.1f} s' if pause else ''}")
        self._due = time.monotonic() + pause
        return None

    def _choose_command(self, is_replaced: bool) -> None:
        """That of the next graftd."""
        if self._previous:
            log("the new graftd is not ready; the previous one is started again")
            self._command, self._previous = self._previous, ()
        elif is_replaced and self._next:
            self._previous, self._command = self._command, self._next
        self._next = ()

    def _receive(self) -> int:
        """Read all messages that are there; gives their number."""
        for count in itertools.count():
            try:
                raw, control, _, _ = self._socket.recvmsg(
                    protocol.MAX_MESSAGE, _ROOM, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                self._closer.finish()
                return count
            fds, sender = _parse_control(control)
            if self._child is not None and sender == (self._child.pid, 0):
                fds = self._take(protocol.parse(raw), fds, self._child)
            self._closer.close(fds)
        return 0

    def _take(self, message: Mapping[str, str], fds: Sequence[int], child: Child) -> Sequence[int]:
        """Do what a message of graftd's says. Gives the descriptors that are not kept."""
        child.heard = max(child.heard, time.monotonic())
        if message.get(protocol.REMOVE) == "1":
            self._holdings.remove(message.get(protocol.NAME, ""))
        if message.get(protocol.STORE) == "1":
            if not self._holdings.add(message.get(protocol.NAME, "stored"), fds):
                log("graftd stores more than can be kept")
            fds = ()
        child.is_stopping = child.is_stopping or message.get(protocol.STOPPING) == "1"
        self._next = protocol.parse_command(message) or self._next
        if message.get(protocol.READY) == "1":
            self._previous = ()
            child.note_ready()
            self._note_ready()
        return fds

    def _note_ready(self) -> None:
        if not self._was_ready and self._ready >= 0:
            try:
                os.write(self._ready, b"ready")
            except OSError:  # the starter has ended
                pass
            os.close(self._ready)
        self._was_ready = True


def _parse_control(control: Sequence[tuple[int, int, bytes]]) -> tuple[Sequence[int], tuple[int, int]]:
    """The descriptors of a message, and who sent it: process and user."""
    fds, sender = array.array("i"), (0, -1)
    for level, kind, data in control:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
        elif (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
            sender = _CREDENTIALS.unpack(data[: _CREDENTIALS.size])[:2]
    return fds.tolist(), sender


def _listener(folder: int) -> socket.socket:
    """The socket that graftd sends to; the caller has the lock of the only keeper."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    try:
        os.unlink(SOCKET, dir_fd=folder)
    except FileNotFoundError:
        pass
    before = os.umask(0o177)
    made.bind(protocol.address(folder))
    os.umask(before)
    return made


def _forget_lock(folder: int) -> None:
    """Let the next graftd have a lock of its own: one that was killed has the file's until the kernel lets it end, and
    does nothing any more that the lock is to keep from being done twice. Not only when it is left behind: until then
    this process may be killed too, and then nobody else knows.
    """
    try:
        os.unlink(GRAFTD_LOCK, dir_fd=folder)
    except OSError:  # it had none yet; or the next one says that it has not got it
        pass


def _lock(folder: int) -> bool:
    """Have the lock of the only keeper, with this process's number in it, until this process ends."""
    fd = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=folder)
    deadline = time.monotonic() + _LOCK_SECONDS  # the previous one may be ending
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
    os.ftruncate(fd, 0)
    os.pwrite(fd, b"%d\n" % os.getpid(), 0)
    return True


def main(folder: str, ready: str, watchdog: str, adopted: str, *command: str) -> int:
    """The keeper for the installation with that run_dir. ``command`` is graftd's; ``adopted``: the process id of one
    that runs, or 0. Gives the status to exit with.
    """
    comm = os.open("/proc/self/comm", os.O_WRONLY | os.O_CLOEXEC)  # O_CREAT would wait for the folder's lock
    os.write(comm, b"graft-keeper")
    os.close(comm)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    opened = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    os.set_inheritable(int(ready), False) if int(ready) >= 0 else None
    if not _lock(opened):
        log("another keeper runs already")
        return 1
    return Keeper(opened, command, os.environ, int(ready), float(watchdog), int(adopted)).run()
