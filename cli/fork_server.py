"""The beginning of the fork server's process (graft/kernel/fork_server.py): few imports, before anything else is done.

python -m graft_cli.fork_server serve NAME     the server; it writes to descriptor 3 when it is ready
python -m graft_cli.fork_server serve-one      one request, at the connection that is descriptor 3

Every user may hold the /proc folder of a process that he has seen. So a child, which nobody has seen yet, looks up
there all that it will need, and only then loads the rest (fork_jobs.py), which takes half a second.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import sys
from typing import NoReturn

from graft.kernel import process, surroundings
from graft.model.settings import Settings
from graft.swap.fork_client import LOOKED

_CHANNEL = 3


def main() -> NoReturn:
    """The entry point: leaves a child, which nobody has to wait for."""
    if os.fork():
        os._exit(0)
    code = 1
    try:
        pinned = surroundings.pin_own()
        own = surroundings.of()
        if sys.argv[1] == "serve":
            os.write(_CHANNEL, LOOKED)
        _leave_the_caller(pinned)
        from . import fork_jobs

        if sys.argv[1] == "serve":
            fork_jobs.serve(Settings.from_environment(), sys.argv[2], own, _CHANNEL)
        else:
            fork_jobs.serve_one(socket.socket(fileno=_CHANNEL))
        code = 0
    finally:
        os._exit(code)


def _leave_the_caller(pinned: list[int]) -> None:
    """Be a process like any other of root's, whatever the command was that started it."""
    process.close_all_but({_CHANNEL, *pinned})
    os.chdir("/")
    os.umask(0o077)
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, 0)
    for limit in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE, resource.RLIMIT_DATA):
        with contextlib.suppress(OSError, ValueError):
            hard = resource.getrlimit(limit)[1]
            resource.setrlimit(limit, (hard, hard))
    process.raise_descriptor_limit()


if __name__ == "__main__":
    main()
