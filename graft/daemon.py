"""graftd: the process of the relays, in the foreground or on its own.

One for all containers, by a lock that the kernel gives back whatever happens. It lives in a cgroup of Graft's own,
where the hooks treat its sockets as what their tags say.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from graft import attachments
from graft.errors import ConflictError, GraftError, KernelError
from graft.kernel import cgroup, process
from graft.lifecycle import up
from graft.printable import printable
from graft.settings import Settings
from graft.splice import control

_START_SECONDS = 20.0


def relays_cgroup(settings: Settings) -> Path:
    """The cgroup that the daemon runs in."""
    return cgroup.v2_mount() / settings.cgroup / "relays"


def run(settings: Settings, keep: bool = True, ready: int | None = None) -> None:
    """Be the daemon, until a signal ends it, or (without ``keep``) nothing is left to serve.

    ``ready`` is a descriptor that is written to when commands are answered. Raises ConflictError where another one
    runs.
    """
    from graft.splice.service import Service

    up(settings)
    with _only_one(settings):
        folder = relays_cgroup(settings)
        folder.mkdir(parents=True, exist_ok=True)
        attachments.attach(settings, folder, 0, splice=True)
        cgroup.enter(folder)
        process.allow_descriptors()
        service = Service(settings, keep)
        gc.freeze()
        service.run(lambda: _say_ready(ready))


def _say_ready(fd: int | None) -> None:
    if fd is not None:
        os.write(fd, b"ready")
        os.close(fd)


@contextlib.contextmanager
def _only_one(settings: Settings):  # type: ignore[no-untyped-def]
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


def ensure(settings: Settings) -> None:
    """Start a daemon where none runs, and wait until it answers. Raises KernelError where it does not come up."""
    if control.ask(settings, {"do": "ping"}) is None:
        _start(settings)


def request(settings: Settings, command: dict[str, Any]) -> dict[str, Any]:
    """The answer of the daemon, which is started where it is not there. Raises GraftError."""
    deadline = time.monotonic() + _START_SECONDS
    while True:
        ensure(settings)
        answer = control.ask(settings, command)
        if answer is not None:
            return answer
        if time.monotonic() > deadline:
            raise KernelError("the daemon ended while it was asked", f"see {settings.run_dir}/graftd.log")


def _start(settings: Settings) -> None:
    """A daemon on its own: it outlives the caller, and keeps nothing of the caller's but the settings."""
    reader, writer = os.pipe()
    log = os.open(settings.run_dir / "graftd.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    environment = {
        **{name: value for name, value in os.environ.items() if name in ("PATH", "PYTHONPATH", "GRAFT_DEBUG", "LANG")},
        "GRAFT_HOST_NETNS": str(settings.host_netns),
        "GRAFT_PIN_DIR": str(settings.pin_dir),
        "GRAFT_RUN_DIR": str(settings.run_dir),
        "GRAFT_STATE_DIR": str(settings.state_dir),
        "GRAFT_CGROUP": settings.cgroup,
    }
    try:
        starter = subprocess.Popen(
            [sys.executable, "-m", "graft.daemon", str(writer)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[writer],
            env=environment,
            start_new_session=True,
            cwd="/",
        )
    finally:
        os.close(log)
        os.close(writer)
    with open(reader, "rb") as said:
        answered = said.read()
    starter.wait()
    deadline = time.monotonic() + (0 if answered else 2)  # another one may be starting, which was quicker
    while control.ask(settings, {"do": "ping"}) is None:
        if time.monotonic() > deadline:
            raise KernelError("the daemon did not start", f"see {settings.run_dir}/graftd.log")
        time.sleep(0.02)


def stop(settings: Settings) -> None:
    """End the daemon and wait until it is gone. Safe to repeat."""
    with contextlib.suppress(GraftError):
        if control.ask(settings, {"do": "stop"}) is None:
            return
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        try:
            with _only_one(settings):
                return
        except ConflictError:
            time.sleep(0.01)
    raise KernelError("the daemon does not end", f"see {settings.run_dir}/graftd.log")


def main(ready: int) -> None:
    """What `_start` runs: a process of its own, whose parent is nobody that would have to wait for it."""
    if os.fork():
        os._exit(0)
    try:
        run(Settings.from_environment(), keep=False, ready=ready)
    except ConflictError:
        pass  # another one was quicker
    except GraftError as error:
        print(f"graftd: {printable(error.message)}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main(int(sys.argv[1]))
