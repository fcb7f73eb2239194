"""graftd as the child of its keeper.

Source: pidfd_open(2), execve(2), wait(2).
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence

from graft.keeper import own_names, protocol
from graft.keeper.holdings import arrange


class Child:
    """A graftd that was started with descriptors, each with a name. ``pidfd`` is readable when it has ended.

    ``folder``: the one that the keeper's socket is in, open.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        descriptors: Sequence[tuple[str, int]],
        folder: int = -1,
    ) -> None:
        """Raises OSError where no process can be made."""
        self.started = self.heard = time.monotonic()
        """When it was started, and when it said last that it works."""
        self.ready = 0.0
        """When it said first that it is ready; 0: it has not."""
        self.is_stopping = False
        """Whether it said that it ends by itself."""
        self.pid, self.pidfd = self._begin(command, environment, descriptors, folder)

    def _begin(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        descriptors: Sequence[tuple[str, int]],
        folder: int,
    ) -> tuple[int, int]:
        pid = os.fork()
        if pid == 0:
            _execute(command, environment, descriptors, folder)
        try:
            return pid, os.pidfd_open(pid)
        except OSError:  # else it would run, and nobody would know of it
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise

    def note_ready(self) -> None:
        """It says that it is ready."""
        self.ready = self.ready or time.monotonic()

    def ready_for(self) -> float:
        """For how many seconds it has been ready."""
        return time.monotonic() - self.ready if self.ready else 0.0

    def send(self, signum: int) -> None:
        """Send it a signal: it is not reaped yet, so the number is its own."""
        os.kill(self.pid, signum)

    def reap(self) -> int:
        """Its exit status, or the negative number of the signal that killed it. Waits until it has ended."""
        os.close(self.pidfd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


class Adopted(Child):
    """A graftd whose keeper was killed: no child of this process, but served like one."""

    def __init__(self, pid: int) -> None:
        """Raises OSError where it has ended."""
        self._pid = pid
        super().__init__((), {}, ())
        self.note_ready()

    def _begin(self, *_: object) -> tuple[int, int]:
        return self._pid, os.pidfd_open(self._pid)

    def send(self, signum: int) -> None:
        """As for a child: its number may be another's by now, its descriptor is not."""
        try:
            signal.pidfd_send_signal(self.pidfd, signum)
        except ProcessLookupError:
            pass

    def reap(self) -> int:
        """0 where it said that it ends, else as if it was killed: how it ended, its parent is told alone."""
        os.close(self.pidfd)
        return 0 if self.is_stopping else -signal.SIGKILL


def _execute(
    command: Sequence[str], environment: Mapping[str, str], descriptors: Sequence[tuple[str, int]], folder: int
) -> None:
    """The child's side. ``folder``: as above, or -1."""
    try:
        own_names.pin()  # at once; again where no descriptor gets another number, for graftd
        signal.set_wakeup_fd(-1)
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, signal.SIG_DFL)
        told = protocol.listen_environment([name for name, _ in descriptors], os.getpid())
        if protocol.WATCHDOG_USEC in environment:
            told[protocol.WATCHDOG_PID] = str(os.getpid())
        if folder >= 0:
            told[protocol.NOTIFY_SOCKET] = protocol.address(protocol.FIRST_DESCRIPTOR + len(descriptors))
        inherited = [fd for _, fd in descriptors] + ([folder] if folder >= 0 else [])
        arrange(inherited, protocol.FIRST_DESCRIPTOR)
        own_names.pin(inherited=True)
        os.execve(command[0], list(command), {**environment, **told})
    except BaseException as error:
        os.write(2, f"graftd cannot be started: {error}\n".encode())
    os._exit(1)
