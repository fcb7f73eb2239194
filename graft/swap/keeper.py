"""The keeper of one container's listener: starts its supervisor, and restarts one that has died.

When the last descriptor of a listener is closed, every trapped call fails with ENOSYS. So two processes have it open:
the supervisor and the one with the `Keeper`. A supervisor that dies is replaced by another one, with the same listener
and the same journal. When the keeper's process dies, the supervisor ends the container and cleans up, or, where Graft
did not start the container, serves it to its end and cleans up then.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import time
from collections.abc import Callable, Sequence

from graft.errors import KernelError
from graft.kernel.seccomp import hung_up
from graft.model.settings import Settings
from graft.state.installation import Installation
from graft.state.records import Container
from graft.swap.supervision import Supervision, supervise

_MAX_RESTARTS, _IN_SECONDS = 10, 5.0
_KILL_TIMEOUT = 5.0
_killed: list[int] = []  # supervisors of this process that were killed, and not reaped yet


class Keeper:
    """A container's listener and its supervisor's process.

    ``clean_up`` is called by a supervisor whose keeper's process has died, when it has served the container to its
    end. Without it, such a supervisor ends the container at once. ``killable``: the listener's filter has the flag for
    which only a signal that kills ends the wait of a trapped call. ``datagrams``: in transport swap, UDP sockets are
    born.
    """

    def __init__(
        self,
        settings: Settings,
        container: Container,
        listener: int,
        verbose: bool,
        clean_up: Callable[[Installation], None] | None = None,
        killable: bool = False,
        datagrams: bool = False,
    ) -> None:
        self._settings, self._container, self._verbose, self._clean_up = settings, container, verbose, clean_up
        self._listener, self._killable, self._datagrams = listener, killable, datagrams
        self._journal = mmap.mmap(-1, mmap.PAGESIZE)
        self._starts: list[float] = []
        self.pid = 0

    def start(self) -> None:
        """Start a supervisor, the first or the next one. Raises KernelError if too many died within a short time."""
        now = time.monotonic()
        self._starts = [start for start in self._starts if now - start < _IN_SECONDS] + [now]
        if len(self._starts) > _MAX_RESTARTS:
            raise KernelError(f"the supervisor of {self._container.name} died {_MAX_RESTARTS} times in a row")
        keeper = os.pidfd_open(os.getpid())
        self.pid = os.fork()
        if self.pid == 0:
            supervise(self._supervision(keeper))
        os.close(keeper)

    def _supervision(self, keeper: int) -> Supervision:
        return Supervision(
            self._settings,
            self._container,
            self._listener,
            self._journal,
            keeper,
            self._verbose,
            self._killable,
            self._datagrams,
            self._clean_up,
        )

    def hung_up(self) -> bool:
        """Whether every process under the listener's filter is gone."""
        return hung_up(self._listener)

    def reap(self) -> bool:
        """Whether the supervisor has died; it is reaped then."""
        if not self.pid or os.waitpid(self.pid, os.WNOHANG)[0] != self.pid:
            return False
        self.pid = 0
        return True

    def stop(self) -> None:
        """`stop_all` of this one."""
        stop_all([self])

    def _kill(self) -> int:
        """Kill the supervisor; gives its process id, 0 where there is none."""
        pid, self.pid = self.pid, 0
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            _killed.append(pid)
        return pid

    def _close(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._listener)


def stop_all(keepers: Sequence[Keeper], patience: float | None = None) -> None:
    """End their supervisors. The container's processes must be gone: their calls would fail from here on.

    Those that wait in the kernel for another container (for the lock of a socket that the two share) are waited for
    together, for ``patience`` seconds at most (by default a few): the keepers' process may serve other containers too.
    What has not died by then is reaped by a later call.
    """
    killed = {one._kill() for one in keepers}
    deadline = time.monotonic() + (_KILL_TIMEOUT if patience is None else patience)
    while not killed.isdisjoint(_reap_killed()) and time.monotonic() < deadline:
        time.sleep(0.002)
    for one in keepers:
        one._close()


def _reap_killed() -> list[int]:
    """Reap the supervisors that were killed; gives those that have not died yet. Waits for none."""
    for pid in list(_killed):
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG) == (0, 0):
                continue
        _killed.remove(pid)
    return _killed
