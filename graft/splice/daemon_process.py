"""Starts, asks and stops graftd and its keeper. There is one of each for all containers: both have a lock, which the
kernel releases however they end. A graftd that was killed and does not end keeps its own: its keeper removes that file
when it kills it, and the next one locks another. Its socket takes requests until it ends, and answers none.

The keeper (graft/keeper) starts graftd, in the background or in the place of `graft daemon`. Where the service manager
started that, and is told when it is ready, it is the keeper.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from graft.datapath import dataplane
from graft.errors import ConflictError, GraftError, KernelError, NotFoundError
from graft.keeper import lines
from graft.keeper.process import GRAFTD_LOCK, LOCK
from graft.kernel import cgroup
from graft.kernel.file_lock import is_at, is_locked
from graft.model.settings import Settings
from graft.splice import control, service_manager

_START_SECONDS = 20.0
_READY_SECONDS = 60.0
"""How long a keeper may take to start graftd: longer only where somebody holds what one of both looks up."""
_STOP_SECONDS = 40.0
_REPLACE_SECONDS = 60.0
_KEEPER = (
    "import sys; sys.path.append(sys.argv[1]); from graft.keeper.process import main; sys.exit(main(*sys.argv[2:]))"
)
_WATCHDOG_SECONDS = 30.0
_INHERITED = ("PATH", "PYTHONPATH", "GRAFT_DEBUG", "GRAFT_NO_COMPILED", "LANG")


@contextlib.contextmanager
def daemon_lock(settings: Settings) -> Iterator[None]:
    """Have the lock of the only daemon. Raises ConflictError where a daemon has it."""
    path = settings.run_dir / GRAFTD_LOCK
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not is_at(fd, path):  # a keeper that kills a daemon removes the file that this has locked
            raise BlockingIOError
    except BlockingIOError:
        os.close(fd)
        raise ConflictError("a daemon runs already", f"its log is {settings.run_dir}/graftd.log") from None
    try:
        yield
    finally:
        os.close(fd)


def ensure_running(settings: Settings) -> None:
    """Start a daemon where none runs, and wait until it answers. Raises KernelError where it does not start."""
    if _answers(settings):
        return
    if service_manager.is_in_charge(settings):
        service_manager.start()
    else:
        _start(settings)


def _answers(settings: Settings) -> bool:
    """Whether a daemon answers; False where none runs, or none but one that was killed. Raises NoAnswerError where one
    runs, and does not answer.
    """
    try:
        return control.ask(settings, {"do": "ping"}) is not None
    except control.NoAnswerError:
        if runs(settings):
            raise
        return False


def request(settings: Settings, command: dict[str, Any]) -> dict[str, Any]:
    """The daemon's answer; the daemon is started where none runs. Raises GraftError, NoAnswerError."""
    deadline = time.monotonic() + _START_SECONDS
    while True:
        ensure_running(settings)
        answer = control.ask(settings, command)
        if answer is not None:
            return answer
        if time.monotonic() > deadline:
            raise KernelError("the daemon ended before it answered", f"see {settings.run_dir}/graftd.log")


def start_keeper(settings: Settings, keep: bool = False, adopted: int = 0) -> tuple[subprocess.Popen[bytes], int]:
    """Start a keeper that outlives the caller, and gets nothing from it but the settings: gives its process, and a
    descriptor at which it says that it is ready (or, without ``adopted``, that graftd is). Raises OSError.
    """
    folder = keeper_cgroup(settings)
    cgroup.make(folder)
    log = os.open(settings.run_dir / "graftd.log", lines.OPENED | os.O_CREAT | os.O_CLOEXEC, 0o600)
    inherited = {name: value for name, value in os.environ.items() if name in _INHERITED}
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        started = subprocess.Popen(
            _keeper_command(settings, writer, keep, adopted),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[writer],
            env={**inherited, **settings.environment},
            start_new_session=True,
            cwd="/",
        )
        with contextlib.suppress(OSError):  # it has ended
            (folder / "cgroup.procs").write_text(str(started.pid))
    except BaseException:
        os.close(reader)
        raise
    finally:
        os.close(log)
        os.close(writer)
    return started, reader


def _start(settings: Settings) -> None:
    """Start a keeper and its graftd, and wait until that answers. Raises KernelError where it does not."""
    starter, reader = start_keeper(settings)
    starter.returncode = 0  # nobody waits for it: it outlives this process
    is_ready = _hears_ready(settings, reader)
    deadline = time.monotonic() + (0 if is_ready else 2)  # another command may have started one first
    while control.ask(settings, {"do": "ping"}) is None:
        if time.monotonic() > deadline:
            raise KernelError("the daemon did not start", f"see {settings.run_dir}/graftd.log")
        time.sleep(0.02)


def _hears_ready(settings: Settings, reader: int) -> bool:
    """Whether a keeper says there that graftd is ready, before it ends; closed then. Raises KernelError where it does
    neither for too long. It goes on: a later command may find graftd ready.
    """
    with open(reader, "rb") as file:
        poll = select.poll()
        poll.register(file, select.POLLIN)
        if not poll.poll(_READY_SECONDS * 1000):
            raise KernelError(
                f"the daemon is not ready after {_READY_SECONDS:.0f} seconds", f"see {settings.run_dir}/graftd.log"
            )
        return bool(file.read(1))


def keeper_cgroup(settings: Settings) -> Path:
    """The cgroup of the keeper, which makes no sockets of containers'."""
    return cgroup.v2_mount() / settings.cgroup / "keeper"


def _keeper_command(settings: Settings, ready: int, keep: bool = False, adopted: int = 0) -> list[str]:
    """Starts a keeper, which starts graftd, or adopts the one that has the process id ``adopted``. ``ready``: a
    descriptor to write to then; -1: none.
    """
    import graft

    graftd = graftd_command(sys.executable, keep)
    options = [str(settings.run_dir), str(ready), str(_WATCHDOG_SECONDS), str(adopted)]
    return [sys.executable, "-I", "-S", "-c", _KEEPER, str(Path(graft.__file__).parents[1]), *options, *graftd]


def graftd_command(python: str, keep: bool) -> list[str]:
    """Starts graftd, by the interpreter at that path, and so with the Graft that is installed for it."""
    return [python, "-P", "-m", "graft.splice", *(["--keep"] if keep else [])]


def replace(settings: Settings) -> int:
    """Have graftd's keeper start another one in its place, with the Graft of this process; gives its process id, 0
    where the service manager waits for this process before it starts that.

    No connection is lost, but those that the kernel relays. Raises NotFoundError where none runs, ConflictError where
    the data plane is of another version, KernelError where the new one is not ready: then the previous one runs again.
    """
    before = control.ask(settings, {"do": "ping"}) if dataplane.is_up(settings) else None
    if before is None:
        raise NotFoundError("no daemon runs", "graft daemon")
    dataplane.up(settings)  # this Graft can work with what is there, else nothing is replaced
    # In ExecReload= systemd waits for this process before it starts the next graftd, and graftd must not end before it.
    is_reload = os.environ.get("MAINPID") == str(before["pid"])
    control.ask(settings, {"do": "replace", "python": sys.executable, "pid": os.getpid() if is_reload else 0})
    if is_reload:
        return 0
    log = f"see {settings.run_dir}/graftd.log"
    deadline = time.monotonic() + _REPLACE_SECONDS
    while time.monotonic() < deadline:
        found = None
        with contextlib.suppress(GraftError):  # it does not answer yet
            found = control.ask(settings, {"do": "ping"}, timeout=max(0.1, deadline - time.monotonic()))
        if found is not None and found["pid"] != before["pid"]:
            if before["keeper"] and found["python"] != sys.executable:
                raise KernelError("the new daemon did not start, the previous one runs again", log)
            return int(found["pid"])
        time.sleep(0.02)
    raise KernelError("the new daemon does not start; its keeper tries again, and has its connections meanwhile", log)


def become_keeper(settings: Settings) -> NoReturn:
    """Execute the keeper in the place of this process; its graftd runs until it gets a signal. Raises ConflictError
    where one runs already.
    """
    dataplane.up(settings)
    with daemon_lock(settings):
        pass
    folder = keeper_cgroup(settings)
    cgroup.make(folder)
    cgroup.enter(folder)
    command = _keeper_command(settings, -1, keep=True)
    os.execve(command[0], command, {**os.environ, **settings.environment})


def take_over(settings: Settings) -> None:
    """End a daemon that Graft's own keeper has: the service manager has started this one. Connections are reset."""
    if _has_keeper(settings):
        _stop_own(settings)


def stop(settings: Settings) -> None:
    """Stop the daemon and its keeper, and wait until they have ended. Safe to repeat."""
    service_manager.stop(settings)
    _stop_own(settings)


def _stop_own(settings: Settings) -> None:
    if not _end_keeper(settings):
        with contextlib.suppress(GraftError):
            if control.ask(settings, {"do": "stop"}) is None:
                return
    deadline = time.monotonic() + _STOP_SECONDS
    while time.monotonic() < deadline:
        try:
            with daemon_lock(settings):
                if not _has_keeper(settings):
                    return
        except ConflictError:
            pass
        time.sleep(0.01)
    raise KernelError("the daemon did not stop", f"see {settings.run_dir}/graftd.log")


def runs(settings: Settings) -> bool:
    """Whether a daemon or a keeper has its lock, even if it does not answer."""
    return _has_keeper(settings) or is_locked(settings.run_dir / GRAFTD_LOCK)


def _has_keeper(settings: Settings) -> bool:
    """Whether a keeper has its lock."""
    return is_locked(settings.run_dir / LOCK)


def _end_keeper(settings: Settings) -> bool:
    """SIGTERM to the keeper, which ends its graftd. Whether one runs: its number is read before its descriptor is
    opened, and after.
    """
    with contextlib.suppress(OSError, ValueError):
        path = settings.run_dir / LOCK
        pid = int(path.read_text())
        process = os.pidfd_open(pid)
        try:
            if _has_keeper(settings) and int(path.read_text()) == pid:
                signal.pidfd_send_signal(process, signal.SIGTERM)
                return True
        finally:
            os.close(process)
    return False
