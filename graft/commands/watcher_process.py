"""Starts and stops the watcher (watcher.py). There is one: it has a lock, which the kernel releases however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from graft import __version__
from graft.errors import ConflictError, KernelError, UsageError
from graft.keeper import lines
from graft.kernel import journal
from graft.kernel.atomic_file import write_atomically
from graft.kernel.file_lock import is_locked
from graft.model import json_text
from graft.model.settings import Settings

MODULE = "graft.commands.watcher"
_INHERITED = ("PATH", "PYTHONPATH", "GRAFT_DEBUG", "LANG", "HOME", journal.STREAM)
_ENGINES = ("DOCKER_", "CONTAINER_", "CONTAINERS_")  # which engine the operator's commands ask
_STOP_SECONDS, _KILL_SECONDS = 10.0, 2.0
_BUSY_SECONDS = 60.0
"""What takes longer to do is said: the watcher may wait for something that never comes."""
_READY_SECONDS = 5.0
_MAX_NOTES = 4 << 20


class WatcherLock:
    """The lock of the only watcher. Its file says which process it is, and since when it is at work (0: it sleeps);
    another one, which version of Graft that process has.
    """

    def __init__(self, settings: Settings, fd: int) -> None:
        self._fd = fd
        with contextlib.suppress(OSError):  # no space: the next `graft up` starts another one
            write_atomically(_version_file(settings), _version_of(os.getpid()))
        os.ftruncate(fd, 0)
        self.note(True)

    def note(self, is_busy: bool) -> None:
        """Note that its process begins to work, or goes to sleep."""
        with contextlib.suppress(OSError):  # no space
            os.pwrite(self._fd, b"%-10d %-14d\n" % (os.getpid(), int(time.monotonic()) if is_busy else 0), 0)


@contextlib.contextmanager
def watcher_lock(settings: Settings) -> Iterator[WatcherLock]:
    """Have the lock of the only watcher. Raises ConflictError where another process has it."""
    fd = os.open(settings.run_dir / "watcher.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise ConflictError("a watcher runs already", f"its log: {_log_of(settings)}") from None
    try:
        yield WatcherLock(settings, fd)
    finally:
        os.close(fd)


def is_running(settings: Settings) -> bool:
    """Whether a watcher has the lock."""
    return is_locked(settings.run_dir / "watcher.lock")


def _holder(settings: Settings) -> tuple[int, int]:
    """The process that has the lock, and for how many seconds it has been at work. Raises OSError, ValueError."""
    pid, since = map(int, (settings.run_dir / "watcher.lock").read_text().split())
    return pid, int(time.monotonic()) - since if since else 0


def ensure_running(settings: Settings) -> bool:
    """Start a watcher where none runs, which outlives the caller, and gets nothing from it but the settings. Whether
    one runs now, and does not wait for something.

    It looks at everything when it starts.
    """
    try:
        if not is_running(settings):
            _start(settings)
        return is_running(settings) and not _waits(settings)
    except OSError:  # no process, no descriptor, no space
        return False


def _waits(settings: Settings) -> list[str]:
    """A line that says so where the watcher has been at one work for very long."""
    with contextlib.suppress(OSError, ValueError):
        pid, seconds = _holder(settings)
        if seconds > _BUSY_SECONDS:
            return [
                f"the watcher (process {pid}) has waited for something for {seconds} s: "
                f"no saved container that starts is attached meanwhile ({_log_of(settings)})"
            ]
    return []


def warnings(settings: Settings) -> list[str]:
    """What an operator has to know where a watcher is needed: that there is none, that it does nothing, or what it does
    not see.
    """
    if not is_running(settings):
        return [f"nobody watches for saved containers that start (graft up; {_log_of(settings)})"]
    return _waits(settings) + _noted(settings)


def _noted(settings: Settings) -> list[str]:
    """What the watcher has noted last."""
    try:
        return json_text.texts(json_text.parse(_notes(settings).read_bytes(), "watcher", _MAX_NOTES), "watcher")
    except (OSError, UsageError):
        return []


def note_problems(settings: Settings, lines: Sequence[str]) -> None:
    """Have `warnings` give these, until the watcher notes others."""
    with contextlib.suppress(OSError):
        write_atomically(_notes(settings), json.dumps(lines).encode())


def _notes(settings: Settings) -> Path:
    return settings.run_dir / "watcher.json"


def _start(settings: Settings) -> None:
    """Start it, and wait until it watches, or has ended, for a while. Raises OSError."""
    log = _open_log(settings)
    inherited = {name: value for name, value in os.environ.items() if _is_inherited(name)}
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        starter = subprocess.Popen(
            [sys.executable, "-P", "-m", MODULE, str(writer)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**inherited, **settings.environment},
            start_new_session=True,
            cwd="/",
            pass_fds=[writer],
        )
    except BaseException:
        os.close(reader)
        raise
    finally:
        os.close(log)
        os.close(writer)
    starter.wait()  # it goes to the background at once
    with open(reader, "rb", buffering=0) as ready:
        poll = select.poll()
        poll.register(ready, select.POLLIN)
        poll.poll(_READY_SECONDS * 1000)


def _open_log(settings: Settings) -> int:
    """Where its lines go: a file, or systemd's journal where a unit starts it."""
    path = settings.run_dir / "watcher.log"
    if journal.is_standard_error():
        path.unlink(missing_ok=True)
        return os.dup(2)
    return os.open(path, lines.OPENED | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _log_of(settings: Settings) -> str:
    """Where the last watcher's lines are, in a few words."""
    path = settings.run_dir / "watcher.log"
    return str(path) if path.exists() else "journalctl -t graft-watch"


def _is_inherited(name: str) -> bool:
    return name in _INHERITED or name.startswith(_ENGINES)


def stop(settings: Settings) -> bool:
    """End the watcher and wait until it has ended. Returns whether one ran.

    Raises KernelError where it does not end: it waits in the kernel, and does nothing more when that lets it go.
    """
    was_running = False
    for signum, seconds in ((signal.SIGTERM, _STOP_SECONDS), (signal.SIGKILL, _KILL_SECONDS)):
        deadline = time.monotonic() + seconds
        while is_running(settings) and time.monotonic() < deadline:
            was_running = True
            _send(settings, signum, seconds)
            time.sleep(0.01)
    if is_running(settings):
        raise KernelError("the watcher does not end: it waits in the kernel", "graft down, when that has ended")
    return was_running


def restart(settings: Settings) -> None:
    """Have one with the Graft of this process in the place of the watcher that runs, if any does. Raises KernelError
    where that does not end.
    """
    if stop(settings):
        ensure_running(settings)


def restart_another_versions(settings: Settings) -> None:
    """`restart` where it has the code of another version."""
    if is_running(settings) and _is_another_versions(settings):
        restart(settings)


def _is_another_versions(settings: Settings) -> bool:
    """Whether the watcher that runs has the code of another version: or of one that did not note which."""
    try:
        pid, _ = _holder(settings)
        return _version_file(settings).read_bytes() != _version_of(pid)
    except (OSError, ValueError):
        return True


def _version_file(settings: Settings) -> Path:
    return settings.run_dir / "watcher.version"


def _version_of(pid: int) -> bytes:
    """What such a process notes. With its number: of what an earlier one has left, that is known."""
    return f"{pid} {__version__}\n".encode()


def _send(settings: Settings, signum: int, seconds: float) -> None:
    """Send a signal to the process that has the lock, and wait for its end: its number is read before its descriptor is
    opened, and after.
    """
    with contextlib.suppress(OSError, ValueError):
        pid, _ = _holder(settings)
        process = os.pidfd_open(pid)
        try:
            if is_running(settings) and _holder(settings)[0] == pid:
                signal.pidfd_send_signal(process, signum)
                select.select([process], [], [], seconds)  # its cgroup is empty only when it has ended
        finally:
            os.close(process)
