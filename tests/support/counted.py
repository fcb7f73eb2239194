"""A program under `graft run` in a process of the test's own, with its supervisor's calls counted: those that come to
Python, and those that the compiled part answers (graft/swap/fast_calls.py).
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from ipaddress import ip_network
from pathlib import Path
from typing import Any

from graft.commands.run import RunPlan, run
from graft.model.address import Prefix
from graft.policy.model import EgressRule, Policy, Verdict, policy_from_flags
from graft.state.records import Container
from graft.swap.supervisor import Supervisor
from tests.support.installation import Host

# What the program can do. It makes the steps that it reads, one JSON line each, and answers in the same way.
PROGRAM = """
import ctypes, errno, fcntl, json, os, resource, select, socket, subprocess, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
kept = []

def connect(address, port, family=2, flags=0, before=""):
    "The errno's name, or what the socket is like afterwards."
    s = socket.socket(family, socket.SOCK_STREAM | flags)
    fcntl.fcntl(s, fcntl.F_SETFD, fcntl.FD_CLOEXEC if flags & socket.SOCK_CLOEXEC else 0)
    exec(before)
    try:
        s.connect((address, port))
    except BlockingIOError:
        select.select([], [s], [], 5)
        if error := s.getsockopt(1, 4):
            return errno.errorcode[error]
    except OSError as error:
        return errno.errorcode[error.errno]
    status = os.fstat(s.fileno())
    kept.append(s)
    return [s.getpeername()[:2] == (address, port), fcntl.fcntl(s, fcntl.F_GETFL) & os.O_NONBLOCK != 0,
            fcntl.fcntl(s, fcntl.F_GETFD), status.st_uid, status.st_gid]

def in_child(*where):
    "The id of a child, and what came of two connects of its."
    r, w = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(w, json.dumps([connect(*where), connect(*where)]).encode())
        os._exit(0)
    said = json.loads(os.read(r, 4096))
    os.waitpid(pid, 0)
    [os.close(fd) for fd in (r, w)]
    return [pid, said]

def same_after_connect(raw):
    "Whether a descriptor that comes by the gifts' socket is the same socket after a connect."
    fd = socket.recv_fds(socket.fromfd(GIFTS, 1, 1), 1, 1)[1][0]
    before = os.fstat(fd).st_ino
    libc.connect(fd, raw, len(raw))
    return os.fstat(fd).st_ino == before

def connect_raw(raw, size=16, family=2, kind=1):
    "The errno's name of a connect with these bytes, or with this pointer."
    with socket.socket(family, kind) as s:
        s.set_inheritable(True)  # as those of connect() are
        return errno.errorcode[ctypes.get_errno()] if libc.connect(s.fileno(), raw, size) else ""

def connect_past_limit(*where):
    "The same as connect, of a socket whose number the process may not give to another one now."
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        return connect(*where, before=f"resource.setrlimit(7, (s.fileno(), {hard}))")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

def finish():
    "Ends the compiled part's turn: this is Python's."
    with socket.socket(1, 1) as s:
        return libc.listen(s.fileno(), 1)

for line in sys.stdin:
    print(json.dumps(eval(line)), flush=True)
"""
GIFTS = 150  # a descriptor of the program's, that nothing has in the test


@dataclass
class Client:
    """A program under `graft run`, and how many of its calls came to Python (``handed``) and did not (``served``)."""

    host: Host
    pid: int
    talk: socket.socket
    gifts: socket.socket
    counts: mmap.mmap
    policy: Policy

    def do(self, step: str) -> Any:
        self.talk.sendall(step.encode() + b"\n")
        line = b""
        while not line.endswith(b"\n"):
            more = self.talk.recv(65536)
            assert more, f"the program ended: {step}"
            line += more
        return json.loads(line)

    def connect(self, listener: socket.socket, **how: Any) -> Any:
        address, port = listener.getsockname()[:2]
        more = "".join(f", {name}={value!r}" for name, value in how.items())
        return self.do(f"connect({address!r}, {port}{more})")

    def tally(self, step: Callable[[], Any]) -> tuple[Any, int, int]:
        """What a step gives, and how many of its calls were served by Python and by the compiled part."""
        self.do("finish()")
        handed, served = self._counts()
        said = step()
        self.do("finish()")
        now_handed, now_served = self._counts()
        return said, now_handed - handed - 1, now_served - served

    def _counts(self) -> tuple[int, int]:
        handed, served = struct.unpack("=QQ", self.counts[:16])
        return handed, served

    def container(self) -> Container:
        return next(one for one in self.host.installation.containers.listing() if one.pid == self.pid)

    def supervisor(self) -> int:
        """Its process id, 0 where there is none just now."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        of_graft = (self.host.cgroup / "supervisors").rglob("cgroup.procs")
        supervisors = {pid for procs in of_graft for pid in procs.read_text().split()}
        return next((int(pid) for pid in children if pid in supervisors), 0)

    def replace_policy(self, *egress: str, verdict: Verdict = Verdict.NONE) -> None:
        policy = policy_from_flags(self.policy.name, [], egress)
        if verdict is not Verdict.NONE:
            policy = replace(policy, egress=(EgressRule(Prefix(ip_network("0.0.0.0/0")), verdict),))
        compiled = self.host.installation.compile(policy)
        with self.host.installation.transaction() as change:
            change.containers.apply(self.container(), compiled)


@contextlib.contextmanager
def client(host: Host, *egress: str, verbose: bool = False) -> Iterator[Client]:
    """A program with those rules. Its supervisor counts into shared memory what comes to Python."""
    policy = policy_from_flags("fast", [], egress)
    (ours, theirs), (gifts, given) = socket.socketpair(), socket.socketpair()
    counts = mmap.mmap(-1, mmap.PAGESIZE)
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            os.dup2(theirs.fileno(), 0)
            os.dup2(theirs.fileno(), 1)
            os.dup2(given.fileno(), GIFTS)
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115  # not pytest's: its file is closed
            _count_into(counts)
            command = (sys.executable, "-Ic", f"GIFTS = {GIFTS}\n{PROGRAM}")
            run(host.installation, RunPlan(command, policy, verbose=verbose))
        finally:
            os._exit(0)
    theirs.close()
    given.close()
    try:
        yield Client(host, pid, ours, gifts, counts, policy)
    finally:
        ours.close()
        gifts.close()
        os.waitpid(pid, 0)


def _count_into(counts: mmap.mmap) -> None:
    handle = Supervisor.handle

    def handle_counted(self: Supervisor, raw: bytes | bytearray, taken_over: bool = False) -> None:
        served = 0 if self._fast is None else self._fast.served
        counts[:16] = struct.pack("=QQ", struct.unpack("=Q", counts[:8])[0] + 1, served)
        handle(self, raw, taken_over)

    Supervisor.handle = handle_counted  # type: ignore[method-assign]
