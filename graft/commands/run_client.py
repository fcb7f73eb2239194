"""`graft run` with little in it: a child of the fork server does what needs Graft's modules, and this process the rest.

    graft run ── arguments, environment, streams ──> child of the fork server: the policy, the container, the supervisor
       fork, prepare the program <── where and how ──
       ── its listener ──>
       let it execute    <── container and supervisor are there ──
       becomes the waiter (graft/swap/waiter.py)                the child ends

The program is this process's child, and has from it what it would have had without Graft. Few imports: they are most of
what `graft run` costs. Where no server can serve this command, it does all by itself (run.py).
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from graft.errors import KernelError
from graft.kernel import cgroup, fork_messages, process
from graft.model.settings import Settings
from graft.swap import fork_client, waiter
from graft.swap.launch import Launch, Launched, StartError, launch

_OWN_FILES = ("/dev/fd/", "/proc/self/", "/proc/thread-self/")
"""Names by which a process means its own files: to another process they would be others."""
OUTDATED = "outdated"
"""Why a server refuses that was started before Graft was installed anew. It ends then."""


def try_run(words: Sequence[str]) -> None:
    """Run ``graft`` with ``words`` (run, options, the program). Returns where that has to be done without a server.

    Raises UsageError for settings that are wrong.
    """
    if os.geteuid() != 0 or not fork_client.is_wanted(os.environ) or _names_own_files(words):
        return
    settings = Settings.from_environment()
    for _ in range(2):
        try:
            connected = fork_client.connect(settings)
            if connected is None:
                return
            with connected.sock:
                _Client(connected).run(words)
        except KeyboardInterrupt:
            process.die_by_signal(signal.SIGINT)
        except _NotServed as error:
            if error.reason != OUTDATED:
                return


def _names_own_files(words: Sequence[str]) -> bool:
    options = words[: words.index("--")] if "--" in words else words
    return any(name in word for word in options for name in _OWN_FILES)


class _NotServed(Exception):
    """The server does nothing for this process, and has done nothing."""

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason)
        self.reason = reason


class _Client:
    def __init__(self, connected: fork_client.Connected) -> None:
        self._connection, self._server = connected
        self._keeper = os.pidfd_open(os.getpid())

    def run(self, words: Sequence[str]) -> NoReturn:
        """Run it. Raises _NotServed."""
        try:
            self._ask(words)
            message, _ = fork_messages.receive(self._connection)
        except (EOFError, OSError, ValueError):
            raise _NotServed from None
        if "refused" in message:
            raise _NotServed(message["refused"])
        if "exit" in message:
            raise SystemExit(message["exit"])
        mask = waiter.block_signals()
        plan = _plan(message["launch"], mask)
        try:
            launched = launch(plan)
        except KernelError as error:
            self._fail({"failed": error.message, "hint": error.hint})
        try:
            self._start(launched)
        finally:  # the child of the server has died: nobody else knows of the program
            _end(launched, plan)
        raise SystemExit(1)

    def _ask(self, words: Sequence[str]) -> None:
        cwd = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        streams = [fd if _is_open(fd) else null for fd in (0, 1, 2)]
        request = {
            "do": "run",
            "words": list(words),
            "environment": dict(os.environ),
            "pid": os.getpid(),
            "encodings": [[one.encoding, one.errors] if one else None for one in (sys.stdout, sys.stderr)],
        }
        fork_messages.send(self._connection, request, [*streams, cwd, self._keeper])
        os.close(cwd)
        os.close(null)

    def _start(self, launched: Launched) -> None:
        """Let the program start, and become the waiter. Returns where the child of the server has died."""
        with contextlib.suppress(EOFError, OSError, ValueError):
            hello = {"pid": launched.pid, "netns": launched.netns, "killable": launched.killable}
            listener = launched.listener
            fork_messages.send(self._connection, {"launched": hello}, [] if listener is None else [listener])
            message, fds = fork_messages.receive(self._connection)
            if "exit" in message:
                raise SystemExit(message["exit"])
            try:
                launched.go()
            except StartError as error:
                self._fail({"failed": error.message, "exit": error.exit_code})
            fork_messages.send(self._connection, {"started": True})
            self._wait(launched, message["wait"], fds)
        print("graft: the process that prepared the program has died", file=sys.stderr)

    def _fail(self, message: dict[str, Any]) -> NoReturn:
        """Report a failure, and exit as the child of the server says, when it has removed what it made."""
        fork_messages.send(self._connection, message)
        answer, _ = fork_messages.receive(self._connection)
        raise SystemExit(answer["exit"])

    def _wait(self, launched: Launched, state: dict[str, Any], fds: list[int]) -> NoReturn:
        names = ("control", "supervisor", "journal")
        found = dict(zip(names, fds, strict=True)) if fds else dict.fromkeys(names, -1)
        waiter.become(
            {
                **{name: os.fsencode(state[name]) for name in waiter.TEXTS},
                **{name: [os.fsencode(one) for one in state[name]] for name in waiter.LISTS},
                "program": launched.pid,
                "listener": -1 if launched.listener is None else launched.listener,
                "keeper": self._keeper,
                "server": self._server,
                **found,
            }
        )


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _plan(message: dict[str, Any], mask: frozenset[int]) -> Launch:
    user = message["user"]
    return Launch(
        tuple(message["command"]),
        Path(message["cgroup"]),
        Path(message["net"]) if message["net"] is not None else None,
        message["host_cookie"],
        process.User(user[0], user[1], tuple(user[2])) if user is not None else None,
        message["keep_net_admin"],
        frozenset(signal.Signals(one) for one in mask if one in list(signal.Signals)),
        bytes.fromhex(message["filter"]),
    )


def _end(launched: Launched, plan: Launch) -> None:
    """End the program. The next command removes its rules."""
    cgroup.kill(plan.cgroup)
    with contextlib.suppress(OSError):
        os.kill(launched.pid, signal.SIGKILL)
        os.waitpid(launched.pid, 0)
    cgroup.remove(plan.cgroup)
