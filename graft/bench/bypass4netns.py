"""bypass4netns, where it is installed: it replaces sockets too, on seccomp's notifications.

It waits for a container engine to send it the listener of a container. `python -I -m graft.bench.bypass4netns SOCKET --
COMMAND` does that part: it installs the filter that nerdctl does, sends the listener, and becomes the command.

Source: the runtime specification's "containerProcessState" (config-linux.md, seccomp).
"""

from __future__ import annotations

import array
import json
import os
import shutil
import socket
import struct
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from graft.bench.cases import INNER_PORT, Case, NotOffered, Server, serving
from graft.bench.process import kept, run, wait_until
from graft.bench.report import Wanted
from graft.bench.topology import Netns, Topology, named_netns
from graft.kernel.seccomp import install_listener
from graft.kernel.seccomp_filter import architecture
from graft.kernel.syscalls import MACHINE

BYPASS_PORT = 8096
TRAPPED = {
    # bind, close, connect, setsockopt, fcntl, _exit, exit_group, getpeername (its oci package's list)
    "x86_64": (49, 3, 42, 54, 72, 60, 231, 52),
    "aarch64": (200, 57, 203, 208, 25, 93, 94, 205),
}


@dataclass
class BypassCase:
    """The program runs in a namespace with nothing but lo, and bypass4netns replaces its sockets."""

    name: str = "bypass4netns"
    title: str = "bypass4netns"
    wanted: Wanted = field(default_factory=dict)
    _netns: Netns = field(default_factory=lambda: Netns(""))
    _socket: Path = Path()

    @contextmanager
    def prepared(self, net: Topology) -> Iterator[None]:
        """Start it in the host's namespace. Raises NotOffered."""
        if shutil.which(self.name) is None or MACHINE not in TRAPPED:
            raise NotOffered(f"{self.name} is not installed")
        self._socket = net.scratch.folder / "bypass4netns"
        files = {"socket": "", "com-socket": "-com", "log-file": ".log"}  # it writes a page for each call
        options = [f"--{option}={self._socket}{suffix}" for option, suffix in files.items()]
        command = [self.name, *options, "-p", f"{BYPASS_PORT}:{INNER_PORT}"]
        environment = os.environ | {"XDG_RUNTIME_DIR": str(net.scratch.folder)}
        with (
            named_netns(net.scratch.netns(self.name), net.programs) as self._netns,
            kept(net.host.enter(*command), environment) as process,
        ):
            wait_until("ready", self._socket.exists, process)
            yield

    @contextmanager
    def serve(self, net: Topology, server: Server) -> Iterator[int]:
        """Start the server in the namespace; it listens in the host's."""
        if server.protocol != "tcp":
            raise NotOffered("its sockets of UDP are replaced when they connect only")
        with serving(self._inside(*server.command(INNER_PORT)), net.host, BYPASS_PORT):
            yield BYPASS_PORT

    def reach_out(self, net: Topology, command: list[str], timeout: float) -> str:
        """Start the client in the namespace."""
        return run(self._inside(*command), timeout)

    def _inside(self, *command: str) -> list[str]:
        launcher = [sys.executable, "-I", "-m", "graft.bench.bypass4netns", str(self._socket), "--"]
        return self._netns.enter(*launcher, *command)


BYPASSES: tuple[Case, ...] = (BypassCase(),)


def notify_filter(numbers: Sequence[int], arch: int) -> bytes:
    """A filter that notifies of these calls of this architecture, and allows all else (seccomp(2))."""
    load, jump_if_equal, leave = 0x20, 0x15, 0x06
    steps = [(load, 0, 0, 4), (jump_if_equal, 0, len(numbers) + 1, arch), (load, 0, 0, 0)]
    steps += [(jump_if_equal, len(numbers) - index, 0, number) for index, number in enumerate(numbers)]
    steps += [(leave, 0, 0, 0x7FFF0000), (leave, 0, 0, 0x7FC00000)]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


def main(path: str, command: list[str]) -> None:
    """Install the filter, send the listener to the unix socket ``path``, and become ``command``."""
    state = {"ociVersion": "1.0.2", "id": "bench", "status": "creating", "pid": os.getpid(), "bundle": "/"}
    message = {"ociVersion": "0.2.0", "fds": ["seccompFd"], "pid": os.getpid(), "metadata": "", "state": state}
    to = socket.socket(socket.AF_UNIX)
    to.connect(path)
    arch, _ = architecture()
    listener, _ = install_listener(notify_filter(TRAPPED[MACHINE], arch))
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [listener]))]
    to.sendmsg([json.dumps(message).encode()], ancillary)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[3:])
