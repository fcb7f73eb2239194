"""`graft-runtime`: executes runc or crun for every command, and prepares those that start a container.

Engines call this a dozen times for each container, so it imports modules only where it needs them.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from graft.errors import GraftError, RefusedError
from graft.oci import arguments, options
from graft.oci.arguments import Invocation


def main(words: Sequence[str] | None = None) -> NoReturn:
    """The entry point: never returns, because the process becomes the real runtime."""
    given = list(sys.argv[1:] if words is None else words)
    invocation = arguments.parse(given)
    try:
        chosen = options.load(os.environ)
        runtime = options.find_runtime(chosen)
        if invocation.command in arguments.STARTING | arguments.RESTORING:
            from graft.oci.bundle import read_config
            from graft.oci.request import requested

            config = read_config(invocation.config)
            if config is not None and requested(config) is not None:
                if invocation.command in arguments.RESTORING:
                    raise RefusedError("a checkpoint cannot be restored under a policy", "start the container anew")
                from graft.oci.prepare import prepare

                prepare(invocation, config, chosen, runtime)
        os.execv(runtime, [runtime, *given])
    except GraftError as error:
        _fail(invocation, error.message + (f" ({error.hint})" if error.hint else ""))
    except Exception as error:
        if os.environ.get("GRAFT_DEBUG"):
            raise
        _fail(invocation, f"{type(error).__name__}: {error}")


def _fail(invocation: Invocation, reason: str) -> NoReturn:
    """Report an error on standard error, and in the log where the engine looks for a runtime's errors."""
    from graft.model.printable import printable

    print(f"graft: {printable(reason)}", file=sys.stderr)
    if invocation.log is not None:
        log(invocation, f"graft: {reason}")
    raise SystemExit(1)


def log(invocation: Invocation, message: str) -> None:
    """Write a line to the log that the engine asked for, in runc's format."""
    import json

    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    if invocation.log_json:
        line = json.dumps({"level": "error", "msg": message, "time": now})
    else:
        line = f'time="{now}" level=error msg={json.dumps(message)}'
    try:
        with open(str(invocation.log), "a") as file:
            file.write(line + "\n")
    except OSError as error:
        print(f"graft: {invocation.log}: {error.strerror}", file=sys.stderr)


if __name__ == "__main__":
    main()
