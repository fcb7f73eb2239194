"""bind() of a unix socket: where a rule names the path, made at the endpoint's path on the host.

A unix socket belongs to a path and to no network, so nothing is replaced: the supervisor binds the program's own
socket, by its duplicate of the descriptor, and the program's call returns. What the program passed is only compared
with the rule, and shown by getsockname() again; the path that is opened is the operator's (graft/kernel/unix_files.py).
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import stat
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from graft.datapath.rulesets import Lookup
from graft.errors import GraftError
from graft.kernel.pidfd import MemoryReader
from graft.kernel.seccomp import Notification
from graft.kernel.unix_files import UnixPathError
from graft.model.endpoint import IP_PROTOCOLS, Protocol
from graft.model.unix_socket import UNIX_FAMILY, path_key
from graft.state import bound_sockets, unix_sockets
from graft.state.installation import Installation
from graft.swap.processes import Process

_SIZE = 110  # struct sockaddr_un
_TCP = IP_PROTOCOLS[Protocol.TCP]

Report = Callable[[str], None]


class UnixBind(NamedTuple):
    """What became of a bind: the errno to answer with (0: success), and a line for people."""

    error: int
    text: str


def parse_path(raw: bytes) -> bytes | None:
    """The path in a struct sockaddr_un of which ``raw`` is all that the program passed; None for anything else, and for
    an abstract name (unix(7)).
    """
    if len(raw) < 3 or int.from_bytes(raw[:2], sys.byteorder) != socket.AF_UNIX:
        return None
    return raw[2:].partition(b"\0")[0] or None


class UnixBinder:
    """Binds the unix sockets of one container."""

    def __init__(self, graft: Installation, container: int) -> None:
        self._settings, self._maps, self._container = graft.settings, graft.maps, container
        self._key = ctypes.c_uint32(container)
        self._lookup = Lookup(graft.maps)
        self._memory = MemoryReader(_SIZE)

    def bind(
        self, notification: Notification, process: Process, duplicate: int, is_waiting: Callable[[], bool]
    ) -> UnixBind | None:
        """Make a trapped bind of the socket ``duplicate`` on the host; None where no rule names its path.

        The file belongs to whom the kernel would make it for: to the caller as it is now, whoever opened the socket.
        """
        path = self.requested_path(notification)
        endpoint = self._endpoint_for(path) if path is not None else 0
        if path is None or not endpoint or _family(duplicate) != socket.AF_UNIX:
            return None
        head = f"bind unix:{os.fsdecode(path)}"
        try:
            unix = unix_sockets.load(self._settings, endpoint)
            if unix is None:  # the endpoint was deleted just now
                return UnixBind(errno.EACCES, f"{head}: its endpoint is gone")
            with socket.socket(fileno=os.dup(duplicate)) as sock:
                if sock.getsockname():
                    return UnixBind(errno.EINVAL, f"{head}: the socket is bound already")
                owner = process.file_owner()
                if not is_waiting():  # then another program may have been asked, which has the caller's id by now
                    return UnixBind(errno.EINTR, f"{head}: the caller does not wait any more")
                granted = partial(self._is_granted, path, endpoint)
                bound_sockets.bind(self._settings, self._container, endpoint, sock, unix, path, granted, owner)
        except UnixPathError as error:
            return UnixBind(error.errno, f"{head}: {error.message}")
        except GraftError as error:
            return UnixBind(errno.EACCES, f"{head}: {error.message}")
        except OSError as error:
            return UnixBind(error.errno or errno.EIO, f"{head}: {unix.path if unix else endpoint}: {error.strerror}")
        return UnixBind(0, f"{head} -> {unix.spec}")

    def is_bound_already(self, notification: Notification, duplicate: int) -> bool:
        """Whether the socket is bound to what this call asks for: the call was made, and its result not reported."""
        path = self.requested_path(notification)
        if path is None or _family(duplicate) != socket.AF_UNIX:
            return False
        with socket.socket(fileno=os.dup(duplicate)) as sock:
            name = sock.getsockname()
        return bool(name) and os.fsencode(name) == path

    def requested_path(self, notification: Notification) -> bytes | None:
        """The path that the program wants to bind, as it passed it."""
        try:
            return parse_path(self._memory.read(notification.pid, notification.address, notification.size))
        except OSError:
            return None  # a bad pointer: the kernel's EFAULT

    def _is_granted(self, path: bytes, endpoint: int) -> bool:
        return self._endpoint_for(path) == endpoint and self._maps.endpoints.get(ctypes.c_uint32(endpoint)) is not None

    def _endpoint_for(self, path: bytes) -> int:
        container = self._maps.containers.peek(self._key)
        if container is None or not path.startswith(b"/"):
            return 0
        return self._lookup.ingress(container.ruleset, _TCP, UNIX_FAMILY, path_key(path), 0)[0]


def _family(fd: int) -> int:
    """The family of a socket; 0: it is another file, which a program may pass to bind() as often as it likes."""
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        return 0
    with socket.socket(fileno=os.dup(fd)) as sock:
        return int(sock.family)
