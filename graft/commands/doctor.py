"""`graft doctor`: which kernel features this machine has, what each is for, and what happens without it.

Each is tried, not inferred from a version: distributions backport features. The BPF programs are loaded as `graft up`
loads them, but not pinned.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from graft.datapath import offsets, programs
from graft.datapath.programs import ProgramCheck
from graft.errors import GraftError, KernelError
from graft.kernel import cgroup, netns, pidfd, seccomp
from graft.kernel.seccomp import Listener
from graft.kernel.seccomp_filter import swap_filter
from graft.model.settings import Settings
from graft.model.transport import Transport
from graft.splice import native, selftest_result
from graft.swap import fast_calls

_BCC = "apt-get install python3-bpfcc"
_CGROUP2 = "mount -t cgroup2 cgroup2 /sys/fs/cgroup"


@dataclass(frozen=True, slots=True)
class Feature:
    """A feature that a machine has or lacks. ``needed``: Graft does not work without it.

    ``without`` says what happens without it, and why it is missing if that is known; ``log`` is the verifier's log of a
    program that this kernel does not accept; ``command`` is what gives it to the machine, if anything does.
    """

    name: str
    present: bool
    needed: bool
    purpose: str
    without: str
    log: str = ""
    command: str = ""


def features(settings: Settings) -> list[Feature]:
    """Every feature, tried on this machine. Needs root."""
    return [*_basic(), *_splice_and_pidfds(), *_programs(settings.cache_dir)]


def _basic() -> Iterator[Feature]:
    yield Feature(
        "bcc", importlib.util.find_spec("bcc") is not None, True, "compiles the hooks", "nothing works", command=_BCC
    )
    yield Feature(
        "cgroup v2",
        _works(cgroup.v2_mount),
        True,
        "tells which container a socket is of",
        "nothing works",
        command=_CGROUP2,
    )
    yield Feature("bpffs", os.path.ismount("/sys/fs/bpf"), False, "keeps maps and programs", "`graft up` mounts it")
    yield Feature("namespace cookies", _works(netns.cookie), True, "name a network namespace", "5.14 or later")
    listener, sync, killable = _seccomp()
    yield Feature("seccomp notification", listener, True, "transport swap", "transports direct and splice only")
    yield Feature("synchronous wake-up", sync, False, "a swap takes one core, not two (6.6)", "swaps take longer")
    yield Feature(
        "killable wait", killable, False, "signals do not restart a trapped call (5.19)", "Go programs retry more"
    )
    reason = native.why_not()
    without = f"plain Python serves{': ' if reason else ''}{reason}"
    yield Feature("compiled graftd", not reason, False, "relays of transport splice take less time", without)
    for name, call, transport in (("connect", "connect(2)", Transport.SWAP), ("birth", "socket(2)", Transport.BORN)):
        reason = fast_calls.why_not(transport)
        without = f"plain Python serves{': ' if reason else ''}{reason}"
        yield Feature(
            f"compiled {name}", not reason, False, f"{call} takes less time in transport {transport}", without
        )


def _splice_and_pidfds() -> Iterator[Feature]:
    yield Feature(
        "thread pidfds", pidfd.threads_have_pidfds(), False, "kept between calls (6.9)", "looked up each time"
    )
    yield Feature("relay splice(2)", _works(_splices), True, "transport splice: how its relays move bytes", "none")
    problem = selftest_result.run_selftest().problem
    without = f"splice(2) serves{': ' if problem else ''}{problem}"
    yield Feature("relay in the kernel", not problem, False, "transport splice, shorter round trips", without)


def _programs(cache: Path) -> Iterator[Feature]:
    """The optional parts of the BPF programs, then each program."""
    from graft.datapath import loader

    try:
        loaded = loader.examine(cache)
    except KernelError as error:
        log = getattr(error, "log", "")
        yield Feature("BPF programs", False, True, "every grant and refusal", _sentence(error.message), log)
        return
    has_probe = programs.PROBE in loaded.extensions
    yield Feature("type information", has_probe, False, "finds dup and epoll at once", "/proc is walked")
    unknown = ", ".join(offsets.missing()[:3])
    without = f"not judged: docs/kernel.md{': ' if unknown else ''}{unknown}"
    yield Feature("kernel structures", not unknown, False, "the hooks read what no helper tells", without)
    has_retval = programs.SET_RETVAL in loaded.extensions
    yield Feature("bpf_set_retval", has_retval, False, "refusals are EACCES (5.18)", "they are EPERM")
    has_mptcp = programs.MPTCP in loaded.extensions
    yield Feature("bpf_skc_to_mptcp_sock", has_mptcp, False, "MPTCP sockets (5.19)", "they stay in the container")
    yield from map(_feature, loaded.checks)
    try:
        yield from map(_feature, loader.examine_relay(cache).checks)
    except KernelError as error:
        yield _feature(ProgramCheck(programs.RELAY_PROGRAM, error.message, getattr(error, "log", "")))


def _feature(check: ProgramCheck) -> Feature:
    program = check.program
    lost = program.without or "Graft does not work"
    without = lost if check.accepted else f"{lost}: {check.reason}"
    return Feature(f"program {program.name}", check.accepted, program.needed, program.purpose, without, check.log)


def _sentence(message: str) -> str:
    return " ".join(message.split())


def _splices() -> None:
    """Move a byte from a socket to a socket through a pipe. Raises OSError."""
    ours, theirs = socket.socketpair()
    reader, writer = os.pipe()
    try:
        ours.send(b"x")
        os.splice(theirs.fileno(), writer, 1)
        os.splice(reader, theirs.fileno(), 1)
        if ours.recv(1) != b"x":
            raise OSError("splice")
    finally:
        for fd in (reader, writer):
            os.close(fd)
        ours.close()
        theirs.close()


def _works(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except (OSError, GraftError):
        return False
    return True


def _seccomp() -> tuple[bool, bool, bool]:
    """(notification, synchronous wake-up, killable wait), tried in a child: a filter cannot be removed."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        found = 0
        with contextlib.suppress(OSError):
            fd, killable = seccomp.install_listener(swap_filter())
            found = 1 | Listener(fd).wake_on_this_core() << 1 | killable << 2
        theirs.send(bytes([found]))
        os.kill(os.getpid(), signal.SIGKILL)
    theirs.close()
    answer = ours.recv(1)
    ours.close()
    os.waitpid(pid, 0)
    bits = answer[0] if answer else 0
    return bool(bits & 1), bool(bits & 2), bool(bits & 4)


def kernel() -> str:
    """The running kernel's release."""
    return Path("/proc/sys/kernel/osrelease").read_text().strip()
