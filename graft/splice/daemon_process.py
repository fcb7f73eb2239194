"""Starts, asks and stops graftd. There is one for all containers: it has a lock, which the kernel releases however the
daemon ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from graft.errors import ConflictError, GraftError, KernelError
from graft.model.settings import Settings
from graft.splice import control

_START_SECONDS = 20.0
_INHERITED = ("PATH", "PYTHONPATH", "GRAFT_DEBUG", "GRAFT_NO_COMPILED", "LANG")


@contextlib.contextmanager
def daemon_lock(settings: Settings) -> Iterator[None]:
    """Have the lock of the only daemon. Raises ConflictError where a daemon has it."""
    fd = os.open(settings.run_dir / "graftd.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise ConflictError("a daemon runs already", f"its log is {settings.run_dir}/graftd.log") from None
    try:
        yield
    finally:
        os.close(fd)


def ensure_running(settings: Settings) -> None:
    """Start a daemon where none runs, and wait until it answers. Raises KernelError where it does not start."""
    if control.ask(settings, {"do": "ping"}) is None:
        _start(settings)


def request(settings: Settings, command: dict[str, Any]) -> dict[str, Any]:
    """The daemon's answer; the daemon is started where none runs. Raises GraftError."""
    deadline = time.monotonic() + _START_SECONDS
    while True:
        ensure_running(settings)
        answer = control.ask(settings, command)
        if answer is not None:
            return answer
        if time.monotonic() > deadline:
            raise KernelError("the daemon ended before it answered", f"see {settings.run_dir}/graftd.log")


def _start(settings: Settings) -> None:
    """Start a daemon that outlives the caller, and gets nothing from it but the settings."""
    reader, writer = os.pipe()
    log = os.open(settings.run_dir / "graftd.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    inherited = {name: value for name, value in os.environ.items() if name in _INHERITED}
    try:
        starter = subprocess.Popen(
            [sys.executable, "-P", "-m", "graft.splice", str(writer)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[writer],
            env={**inherited, **settings.environment},
            start_new_session=True,
            cwd="/",
        )
    finally:
        os.close(log)
        os.close(writer)
    with open(reader, "rb") as file:
        is_ready = bool(file.read())
    starter.wait()
    deadline = time.monotonic() + (0 if is_ready else 2)  # another command may have started one first
    while control.ask(settings, {"do": "ping"}) is None:
        if time.monotonic() > deadline:
            raise KernelError("the daemon did not start", f"see {settings.run_dir}/graftd.log")
        time.sleep(0.02)


def stop(settings: Settings) -> None:
    """Stop the daemon and wait until it has ended. Safe to repeat."""
    with contextlib.suppress(GraftError):
        if control.ask(settings, {"do": "stop"}) is None:
            return
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        try:
            with daemon_lock(settings):
                return
        except ConflictError:
            time.sleep(0.01)
    raise KernelError("the daemon did not stop", f"see {settings.run_dir}/graftd.log")
