"""`graft-runtime` with little in it: a child of the fork server prepares a container, and this process becomes runc.

    wrapper ── command line, environment ──> child of the fork server: request, policy, bundle (prepare.py)
       waits                                    └── has another child become the shim, and ends
       becomes runc (or crun)

Where no server can serve it, and for every command that starts no container, main.py does it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from graft.oci import arguments, main, options
from graft.oci.arguments import Invocation

_MAX_BYTES = 16 << 20


def run(words: Sequence[str] | None = None) -> NoReturn:
    """The entry point of graft-runtime: never returns, because the process becomes the real runtime."""
    given = list(sys.argv[1:] if words is None else words)
    invocation = arguments.parse(given)
    if invocation.command in arguments.STARTING and _may_ask(invocation.config):
        _prepare(invocation, given)
    main.main(given)


def _may_ask(path: str) -> bool:
    """Whether the container may ask for a policy; False where its configuration does not have the word at all."""
    try:
        with open(path, "rb") as file:
            raw = file.read(_MAX_BYTES)
    except (OSError, ValueError):
        return False
    return b"graft" in raw.lower() or b"\\u" in raw


def _prepare(invocation: Invocation, given: Sequence[str]) -> None:
    """Have it prepared, and become the runtime. Returns where that has to be done without a server."""
    from graft.errors import GraftError
    from graft.kernel import fork_messages
    from graft.model.settings import Settings
    from graft.swap import fork_client

    try:
        connected = fork_client.connect(Settings.from_environment()) if fork_client.is_wanted(os.environ) else None
        if connected is None:
            return
        runtime = options.find_runtime(options.load(os.environ))
        with connected.sock as connection:
            cwd = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            own = os.pidfd_open(os.getpid())
            request = {"do": "container", "words": list(given), "environment": dict(os.environ), "pid": os.getpid()}
            fork_messages.send(connection, request, [cwd, own])
            answer, _ = fork_messages.receive(connection)
    except (GraftError, EOFError, OSError, ValueError):
        return  # main.py finds the error again, and says so
    if "error" in answer:
        main.fail(invocation, answer["error"])
    if "refused" not in answer:
        os.execv(runtime, [runtime, *given])
