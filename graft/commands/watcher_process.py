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

from graft.errors import ConflictError, KernelError, UsageError
from graft.kernel.atomic_file import write_atomically
from graft.model import json_text
from graft.model.settings import Settings

MODULE = "graft.commands.watcher"
_INHERITED = ("PATH", "PYTHONPATH", "GRAFT_DEBUG", "LANG", "HOME")
_ENGINES = ("DOCKER_", "CONTAINER_", "CONTAINERS_")  # which engine the operator's commands ask
_STOP_SECONDS = 20.0
_READY_SECONDS = 5.0
_MAX_NOTES = 4 << 20


@contextlib.contextmanager
def watcher_lock(settings: Settings) -> Iterator[None]:
    """Have the lock of the only watcher, with this process's number in it. Raises ConflictError where one has it."""
    fd = os.open(settings.run_dir / "watcher.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise ConflictError("a watcher runs already", f"its log is {settings.run_dir}/watcher.log") from None
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, b"%d\n" % os.getpid(), 0)
        yield
    finally:
        os.close(fd)


def is_running(settings: Settings) -> bool:
    """Whether a watcher has the lock."""
    try:
        fd = os.open(settings.run_dir / "watcher.lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def ensure_running(settings: Settings) -> bool:
    """Start a watcher where none runs, which outlives the caller, and gets nothing from it but the settings. Whether
    one runs now.

    It looks at everything when it starts.
    """
    try:
        if not is_running(settings):
            _start(settings)
        return is_running(settings)
    except OSError:  # no process, no descriptor, no space
        return False


def warnings(settings: Settings) -> list[str]:
    """What an operator has to know where a watcher is needed: that there is none, or what it does not see."""
    if not is_running(settings):
        return [f"nobody watches for saved containers that start (graft up; {settings.run_dir}/watcher.log)"]
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
    log = os.open(settings.run_dir / "watcher.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
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


def _is_inherited(name: str) -> bool:
    return name in _INHERITED or name.startswith(_ENGINES)


def stop(settings: Settings) -> bool:
    """End the watcher and wait until it has ended. Returns whether one ran. Raises KernelError if it does not end."""
    deadline = time.monotonic() + _STOP_SECONDS
    was_running = False
    while is_running(settings):
        was_running = True
        _send_end(settings)
        if time.monotonic() > deadline:
            raise KernelError("the watcher did not stop", f"see {settings.run_dir}/watcher.log")
        time.sleep(0.01)
    return was_running


def _send_end(settings: Settings) -> None:
    """SIGTERM to the process that has the lock: its number is read before its descriptor is opened, and after."""
    with contextlib.suppress(OSError, ValueError):
        path = settings.run_dir / "watcher.lock"
        pid = int(path.read_text())
        process = os.pidfd_open(pid)
        try:
            if is_running(settings) and int(path.read_text()) == pid:
                signal.pidfd_send_signal(process, signal.SIGTERM)
                select.select([process], [], [], _STOP_SECONDS)  # its cgroup is empty only when it has ended
        finally:
            os.close(process)
