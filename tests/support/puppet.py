"""A process that makes socket calls for a test, in a cgroup and a namespace of the test's choice.

This file is both sides: imported, it is the test's; run as a program, it is the process. They speak JSON, a
line for each call; what fails comes back as the errno's name.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
_KINDS = {"tcp": (socket.SOCK_STREAM, 0), "udp": (socket.SOCK_DGRAM, 0)}
_KINDS |= {"icmp": (socket.SOCK_DGRAM, socket.IPPROTO_ICMP), "icmpv6": (socket.SOCK_DGRAM, socket.IPPROTO_ICMPV6)}


class Puppet:
    """The test's side. ``say`` gives what a call returned, or the name of its errno."""

    def __init__(self, cgroup: Path, netns: Path | None, user: int = 0) -> None:
        from tests.support.cgroups import in_cgroup  # not at the top: the process does not find it

        command = [*in_cgroup(cgroup), sys.executable, "-I", __file__, str(user)]
        if netns is not None:
            command = ["nsenter", f"--net={netns}", "--", *command]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self.say("pid")

    def say(self, *words: Any) -> Any:
        """Have one call made."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the puppet died"
        return json.loads(line)

    def socket(self, protocol: str = "tcp", family: int = 4) -> int:
        """A new socket; gives its number for the other calls."""
        return int(self.say("socket", protocol, family))

    def bind(self, address: str, port: int, protocol: str = "tcp") -> Any:
        """A new socket, bound: "ok" or an errno."""
        return self.say("bind", self.socket(protocol, 6 if ":" in address else 4), address, port)

    def connect(self, address: str, port: int, protocol: str = "tcp") -> Any:
        """A new socket, connected: "ok" or an errno."""
        return self.say("connect", self.socket(protocol, 6 if ":" in address else 4), address, port)

    def sendto(self, address: str, port: int) -> Any:
        """A datagram of a new socket: "ok" or an errno."""
        return self.say("sendto", self.socket("udp", 6 if ":" in address else 4), address, port)

    def listener(self, address: str, port: int) -> int:
        """A socket that is bound and listens."""
        one = self.socket("tcp", 6 if ":" in address else 4)
        assert self.say("bind", one, address, port) == "ok"
        assert self.say("listen", one) == "ok"
        return one

    def stop(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


@contextmanager
def puppet(cgroup: Path, netns: Path | None, user: int = 0) -> Iterator[Puppet]:
    """A process, ended afterwards."""
    one = Puppet(cgroup, netns, user)
    try:
        yield one
    finally:
        one.stop()


def _perform(sockets: dict[int, socket.socket], words: Sequence[Any]) -> Any:
    call, *rest = words
    if call == "pid":
        return os.getpid()
    if call == "netns":
        _unshare()
        return "ok"
    if call == "socket":
        sock = socket.socket(_FAMILIES[rest[1]], *_KINDS[rest[0]])
        sock.settimeout(10 * float(os.environ.get("GRAFT_TEST_PATIENCE", "1")))  # run with -I: no import of wait
        sockets[sock.fileno()] = sock
        return sock.fileno()
    if call == "raw":
        socket.socket(*rest).close()
        return "ok"
    if call == "refused connects":
        return _refused_connects(*rest)
    sock = sockets[rest[0]]
    if call in ("bind", "connect"):
        getattr(sock, call)((rest[1], rest[2]))
    elif call == "listen":
        sock.listen(16)
    elif call == "sendto":
        sock.sendto(b"hello", (rest[1], rest[2]))
    elif call == "send":
        sock.send(b"hello")
    elif call == "patience":
        sock.settimeout(rest[1] * float(os.environ.get("GRAFT_TEST_PATIENCE", "1")))
    elif call == "ping":
        # Type, code, checksum and identifier (the kernel's), sequence: RFC 792, RFC 4443.
        echo = bytes([rest[3] if len(rest) > 3 else 8 if sock.family == socket.AF_INET else 128, 0, 0, 0, 0, 0, 0, 1])
        sock.sendto(echo + b"hello", (rest[1], rest[2]))
    elif call == "await ping":
        data, where = sock.recvfrom(100)
        return [data[0], where[0]]
    elif call == "option":
        sock.setsockopt(rest[1], rest[2], rest[3].encode() if isinstance(rest[3], str) else rest[3])
    elif call == "bytes":
        sock.setsockopt(rest[1], rest[2], bytes.fromhex(rest[3]))
    elif call == "answer":
        peer, where = sock.accept()
        peer.sendall(str(rest[1]).encode())
        peer.close()
        return list(where)
    elif call == "accept":
        peer, _ = sock.accept()
        sockets[peer.fileno()] = peer
        return peer.fileno()
    elif call == "receive":
        data, where = sock.recvfrom(100)
        return [data.decode(), *(where or ())[:2]]
    elif call == "name":
        return list(sock.getsockname())[:2]
    elif call == "close":
        sockets.pop(rest[0]).close()
    elif call == "reuse":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return "ok"


def _refused_connects(address: str, port: int, times: int) -> int:
    """How many of so many connects failed."""
    refused = 0
    with socket.socket() as sock:
        for _ in range(times):
            refused += sock.connect_ex((address, port)) == errno.EACCES
    return refused


def _unshare() -> None:
    import ctypes

    if ctypes.CDLL(None, use_errno=True).unshare(0x40000000) != 0:
        raise OSError(ctypes.get_errno(), "unshare")


def _main() -> None:
    user = int(sys.argv[1])
    if user:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    sockets: dict[int, socket.socket] = {}
    for line in sys.stdin:
        try:
            result = _perform(sockets, json.loads(line))
        except TimeoutError:
            result = "ETIMEDOUT"
        except OSError as error:
            result = errno.errorcode.get(error.errno or 0, str(error))
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    _main()
