"""Network namespaces that the operator names, opened in a child: every user may list /run/netns, and so hold it.

An endpoint's namespace is opened under the installation's lock, for which every command waits. So who holds that folder
(folder_calls.py) has the command refused, in a second, instead of all of them wait.
"""

from __future__ import annotations

import os
import socket

from graft.errors import ConflictError
from graft.kernel import netns
from graft.kernel.unix_files import UnixPathError
from graft.state.folder_calls import in_folder_of


def open_named(spec: str) -> int:
    """A descriptor of the namespace given by name (of `ip netns`), process id, or path. To be closed.

    Raises NotFoundError, and ConflictError where somebody holds its folder.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        try:
            in_folder_of(str(netns.path_of(spec)), lambda: _send(theirs, netns.open_named(spec)), {theirs.fileno()})
        except UnixPathError as error:
            raise ConflictError(f"netns: {error.message}", error.hint) from error
        _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
        return descriptors[0]


def _send(to: socket.socket, opened: int) -> None:
    socket.send_fds(to, [b"."], [opened])
    os.close(opened)
