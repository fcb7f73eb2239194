"""What `graft run` becomes when its program runs: the shell's child, which waits for the program and passes signals on.

It has the seccomp listener and the journal open, so that the container's calls wait when its supervisor dies, and has
another one started then. When the program has ended, it has the container removed. Both are done by children of the
fork server (graft/kernel/fork_server.py), or, where there is none, by a process of their own.

It is executed as a file, in a Python that imports nothing but a few built-in modules, to be small: nothing of Graft's,
and no module of the standard library that is written in Python. graft-wait (graft/swap/compiled_waiter/, C) is the same
again, a tenth as big; this file serves where nothing was compiled.
"""

import _signal  # type: ignore[import-not-found]
import _socket
import fcntl
import posix
import resource
import select
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

SI_KERNEL = 0x80  # include/uapi/asm-generic/siginfo.h; from the terminal here
NOT_FORWARDED = {_signal.SIGKILL, _signal.SIGSTOP, _signal.SIGSEGV, _signal.SIGBUS, _signal.SIGFPE, _signal.SIGILL}
MAX_RESTARTS, IN_SECONDS = 10, 5.0
DESCRIPTORS = ("listener", "journal", "keeper", "supervisor", "control", "server")
NUMBERS = ("program", *DESCRIPTORS)
TEXTS = ("name", "start", "end")
LISTS = ("command", "environment")
NOT_COMPILED = b"GRAFT_NO_COMPILED"
"""In the environment, not empty: this file serves, compiled or not."""
HELLO, ASK = b"+", b"?"
"""As in graft/kernel/fork_messages.py."""
HELLO_SECONDS, LOOK_MILLISECONDS = 20.0, 100
FAILED = 6  # the exit status of graft.errors.KernelError


class Failed(Exception):
    """No supervisor can be started."""


Answer = tuple[bytes, list[int]]


class Waiter:
    """Waits for one program.

    ``state``: program (its id); the descriptors listener, journal, keeper (a pidfd of this process), supervisor (its
    pidfd), control (a socket that hangs up with the supervisor), server (the file that is the socket of the fork server
    by which the program was prepared: no other server is known to be root's), each -1 where there is none; name, of the
    container; start and end, requests to it; command and environment, of a process that serves one request. Texts are
    bytes.
    """

    def __init__(self, state: "dict[str, Any]") -> None:
        self.state = state
        self.control: int = state["control"]
        self.supervisor: int = state["supervisor"]
        self.starts = [time.monotonic()]
        if self.control >= 0:
            self.watch()

    def watch(self) -> None:
        """Have SIGIO sent when the supervisor has died."""
        fcntl.fcntl(self.control, fcntl.F_SETOWN, posix.getpid())
        fcntl.fcntl(self.control, fcntl.F_SETFL, fcntl.fcntl(self.control, fcntl.F_GETFL) | 0o20000)  # O_ASYNC

    def has_died(self) -> bool:
        """Whether there is a supervisor that has died."""
        if self.control < 0:
            return False
        poll = select.poll()
        poll.register(self.control, 0)
        return bool(poll.poll(0))

    def wait(self) -> int:
        """Until the program exits: forward signals, stop when it stops, keep a supervisor running."""
        signals = set(_signal.valid_signals()) - NOT_FORWARDED
        pid = self.state["program"]
        while True:
            if self.has_died():  # also one that died before this process could be told
                self.restart()
            info = _signal.sigwaitinfo(signals)
            if info.si_signo == _signal.SIGCHLD:
                status = exit_status(pid)
                if status is not None:
                    return status
            elif info.si_code != SI_KERNEL:
                # A terminal sends a signal to the whole foreground group: the program has received it.
                try:
                    posix.kill(pid, info.si_signo)
                except ProcessLookupError:
                    pass

    def restart(self) -> None:
        """Start a supervisor in the place of one that has died."""
        now = time.monotonic()
        self.starts = [start for start in self.starts if now - start < IN_SECONDS] + [now]
        if len(self.starts) > MAX_RESTARTS:
            raise Failed(b"the supervisor of %b died %d times in a row" % (self.state["name"], MAX_RESTARTS))
        posix.close(self.control)
        posix.close(self.supervisor)
        self.control = self.supervisor = -1
        ours, theirs = _socket.socketpair()
        fds = [self.state[name] for name in ("listener", "journal", "keeper")]
        answer, received = self.ask(self.state["start"], [*fds, theirs.fileno(), 2])
        theirs.close()
        if not answer or not received:
            raise Failed(b"cannot start a supervisor for %b" % self.state["name"])
        self.control, self.supervisor = ours.detach(), received[0]
        self.watch()

    def end(self) -> int:
        """Remove the container. Gives the exit status of a failure, 0 for none."""
        answer, _ = self.ask(self.state["end"], [2] if self.supervisor < 0 else [2, self.supervisor])
        return answer[0] if answer else FAILED

    def ask(self, request: bytes, fds: list[int]) -> Answer:
        """The answer to a request, and descriptors: of a child of the fork server, or of a process for it alone."""
        for connect in (self.connect, self.spawn):
            try:
                sock = connect()
            except OSError:
                continue
            try:
                if not is_answered(sock):
                    continue
                sent = sock.sendmsg([request], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, packed(fds))])
                if sent < len(request):
                    sock.sendall(request[sent:])
                answer, rights, _, _ = sock.recvmsg(1, _socket.CMSG_SPACE(4), _socket.MSG_CMSG_CLOEXEC)
            except OSError:
                continue
            finally:
                sock.close()
            if answer:
                return answer, [int.from_bytes(data[:4], sys.byteorder, signed=True) for _, _, data in rights]
        return b"", []

    def connect(self) -> _socket.socket:
        """A connection to the fork server."""
        sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        sock.setblocking(False)  # not to wait until a server that is stopped accepts others
        sock.connect(b"/proc/self/fd/%d" % self.state["server"])
        sock.setblocking(True)
        return sock

    def spawn(self) -> _socket.socket:
        """A connection to a process that is started for one request."""
        command = self.state["command"]
        environment = dict(one.split(b"=", 1) for one in self.state["environment"])
        ours, theirs = _socket.socketpair()
        files = [(posix.POSIX_SPAWN_OPEN, 0, "/dev/null", posix.O_RDWR, 0), (posix.POSIX_SPAWN_DUP2, 0, 1)]
        files += [(posix.POSIX_SPAWN_DUP2, 0, 2), (posix.POSIX_SPAWN_DUP2, theirs.fileno(), 3)]
        pid = posix.posix_spawn(command[0], command, environment, file_actions=files, setsigmask=(), setsid=True)
        theirs.close()
        posix.waitpid(pid, 0)  # it leaves a child
        return ours


def is_answered(sock: _socket.socket) -> bool:
    """Whether somebody is there for this connection: not where the process that listens is stopped."""
    peer = sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)  # of a pair: this process
    server, deadline = int.from_bytes(peer[:4], sys.byteorder), time.monotonic() + HELLO_SECONDS
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    while not poll.poll(LOOK_MILLISECONDS):
        if time.monotonic() > deadline or (server != posix.getpid() and is_stopped(server)):
            return False
    return sock.recv(1) == HELLO and sock.send(ASK) == 1 and sock.recv(1) == HELLO


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped."""
    fd = posix.open(f"/proc/{pid}/stat", posix.O_RDONLY | posix.O_CLOEXEC)
    try:
        return posix.read(fd, 4096).rpartition(b") ")[2][:1] in (b"T", b"t")
    finally:
        posix.close(fd)


def keep_own_descriptors() -> None:
    """Keep /proc/self/fd open, by which the server is connected to: any user may hold the folder above it, and whoever
    looks up a name there that the kernel has forgotten waits for him.
    """
    try:
        posix.open("/proc/self/fd", posix.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC)
    except OSError:
        pass


def packed(fds: list[int]) -> bytes:
    """Descriptors as SCM_RIGHTS has them."""
    return b"".join(fd.to_bytes(4, sys.byteorder, signed=True) for fd in fds)


def exit_status(pid: int) -> "int | None":
    """The program's exit status, if it has exited. If it is stopped, this process stops too, until SIGCONT."""
    while True:
        found, status = posix.waitpid(pid, posix.WNOHANG | posix.WUNTRACED | posix.WCONTINUED)
        if found == 0:
            return None
        if posix.WIFSTOPPED(status):
            posix.kill(posix.getpid(), _signal.SIGSTOP)
        elif posix.WIFEXITED(status) or posix.WIFSIGNALED(status):
            return posix.waitstatus_to_exitcode(status)


def die_by_signal(signum: int) -> None:
    """End this process by a signal, so that its parent sees the status of the program that the signal ended."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    try:
        _signal.signal(signum, _signal.SIG_DFL)
    except (OSError, ValueError):
        pass
    _signal.pthread_sigmask(_signal.SIG_UNBLOCK, {signum})
    posix.kill(posix.getpid(), signum)


def main(state: "dict[str, Any]") -> "NoReturn":
    """Wait for the program, remove its container, and exit as the program did. Never returns."""
    keep_own_descriptors()
    waiter = Waiter(state)
    failed = 0
    status = 0
    try:
        status = waiter.wait()
    except Failed as error:
        posix.write(2, b"graft: %b\n" % error.args[0])
        failed = FAILED
    failed = waiter.end() or failed
    if not failed and status < 0:
        die_by_signal(-status)
    posix._exit(failed or status & 0xFF)


def block_signals() -> "frozenset[int]":
    """Block every signal that is forwarded, to wait for it; gives the signal mask from before."""
    return frozenset(_signal.pthread_sigmask(_signal.SIG_BLOCK, set(_signal.valid_signals()) - NOT_FORWARDED))


def encoded(state: "dict[str, Any]") -> bytes:
    """The texts of ``state``: each after its length, lists after the number of their texts."""
    raw = b"".join(_counted(state[name]) for name in TEXTS)
    for name in LISTS:
        raw += len(state[name]).to_bytes(4, sys.byteorder) + b"".join(_counted(one) for one in state[name])
    return raw


def _counted(text: bytes) -> bytes:
    return len(text).to_bytes(4, sys.byteorder) + text


def decoded(raw: bytes) -> "dict[str, Any]":
    """The texts in what `encoded` made."""
    at = 0

    def number() -> int:
        nonlocal at
        at += 4
        return int.from_bytes(raw[at - 4 : at], sys.byteorder)

    def text() -> bytes:
        nonlocal at
        size = number()
        at += size
        return raw[at - size : at]

    found: dict[str, Any] = {name: text() for name in TEXTS}
    return found | {name: [text() for _ in range(number())] for name in LISTS}


def become(state: "dict[str, Any]") -> "NoReturn":
    """Execute the waiter, compiled or this file, in the calling process. Descriptors in ``state`` stay open."""
    file = posix.memfd_create("graft-waiter", 0)
    raw = encoded(state)
    while raw:
        raw = raw[posix.write(file, raw) :]
    for name in DESCRIPTORS:
        if state[name] >= 0:
            posix.set_inheritable(state[name], True)
    words = [str(number) for number in (file, *(state[name] for name in NUMBERS))]
    folder = __file__.rpartition("/")[0]
    ways = [[folder + "/graft-wait"], [sys.executable, "-I", "-S", __file__]]
    for way in ways[bool(posix.environ.get(NOT_COMPILED)) :]:
        try:
            posix.execv(way[0], way + words)
        except OSError:  # not compiled, or no memory
            continue
    main(state)


def load(words: list[str]) -> "dict[str, Any]":
    """The state in the arguments, and in the file that they name."""
    fd, *numbers = (int(word) for word in words)
    raw = b""
    posix.lseek(fd, 0, 0)
    while chunk := posix.read(fd, 1 << 20):
        raw += chunk
    posix.close(fd)
    state = decoded(raw) | dict(zip(NUMBERS, numbers, strict=True))
    for name in DESCRIPTORS:
        if state[name] >= 0:
            posix.set_inheritable(state[name], False)
    return state


if __name__ == "__main__":
    main(load(sys.argv[1:]))
