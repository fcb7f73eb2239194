"""graftd as the child of its keeper.

Source: pidfd_open(2), execve(2), wait(2).
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from functools import partial

from graft.keeper import own_names, protocol
from graft.keeper.holdings import arrange
from graft.keeper.prepared import Forks


class Child:
    """A graftd that was started with descriptors, each with a name. ``pidfd`` is readable when it has ended.

    ``folder``: the one that the keeper's socket is in, open. ``forks`` makes the process.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        descriptors: Sequence[tuple[str, int]],
        folder: int = -1,
        forks: Forks | None = None,
    ) -> None:
        """Raises OSError where no process can be made, TimeoutError where another try may succeed at once."""
        self.pid, self.pidfd = self._begin(forks or Forks(), command, environment, descriptors, folder)
        self.started = self.heard = time.monotonic()
        """When it was started, and when it said last that it works."""
        self.ready = 0.0
        """When it said first that it is ready; 0: it has not."""
        self.is_stopping = False
        """Whether it said that it ends by itself."""
        self.was_killed = False
        """Whether it was sent SIGKILL."""

    def _begin(
        self,
        forks: Forks,
        command: Sequence[str],
        environment: Mapping[str, str],
        descriptors: Sequence[tuple[str, int]],
        folder: int,
    ) -> tuple[int, int]:
        names = [name for name, _ in descriptors]
        inherited = [fd for _, fd in descriptors] + ([folder] if folder >= 0 else [])
        pid = forks.start(inherited, partial(_execute, command, environment, names))
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
        """Send it a signal."""
        self._send(signum)
        self.was_killed = self.was_killed or signum == signal.SIGKILL

    def _send(self, signum: int) -> None:
        os.kill(self.pid, signum)  # it is not reaped yet, so the number is its own

    def reap(self) -> int:
        """Its exit status, or the negative number of the signal that killed it. Waits until it has ended."""
        os.close(self.pidfd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def leave(self, forks: Forks) -> None:
        """Watch it no longer: ``forks`` reaps it when it ends."""
        os.close(self.pidfd)
        forks.leave(self.pid)


class Adopted(Child):
    """A graftd whose keeper was killed: no child of this process, but served like one."""

    def __init__(self, pid: int) -> None:
        """Raises OSError where it has ended."""
        self._pid = pid
        super().__init__((), {}, ())
        self.note_ready()

    def _begin(self, *_: object) -> tuple[int, int]:
        return self._pid, os.pidfd_open(self._pid)

    def _send(self, signum: int) -> None:
        try:  # its number may be another's by now, its descriptor is not
            signal.pidfd_send_signal(self.pidfd, signum)
        except ProcessLookupError:
            pass

    def reap(self) -> int:
        """0 where it said that it ends, else as if it was killed: how it ended, its parent is told alone."""
        os.close(self.pidfd)
        return 0 if self.is_stopping else -signal.SIGKILL

    def leave(self, forks: Forks) -> None:
        """Whoever is its parent reaps it."""
        os.close(self.pidfd)


def _execute(
    command: Sequence[str], environment: Mapping[str, str], names: Sequence[str], inherited: Sequence[int]
) -> None:
    """The child's side. ``inherited``: a descriptor for each name, and that of the keeper's folder, where there is one.

    Raises OSError.
    """
    told = protocol.listen_environment(names, os.getpid())
    if protocol.WATCHDOG_USEC in environment:
        told[protocol.WATCHDOG_PID] = str(os.getpid())
    if len(inherited) > len(names):
        told[protocol.NOTIFY_SOCKET] = protocol.address(protocol.FIRST_DESCRIPTOR + len(names))
    # Before others get the numbers of the first pins.
    own_names.pin(inherited=protocol.FIRST_DESCRIPTOR + len(inherited))
    arrange(inherited, protocol.FIRST_DESCRIPTOR)
    os.execve(command[0], list(command), {**environment, **told})
