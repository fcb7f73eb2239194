"""`graft-runtime`: executes runc or crun for every command, and prepares those that start a container.

Engines call this a dozen times for each container, so it imports modules only where it needs them.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from graft.errors import GraftError, RefusedError
from graft.oci import arguments, options
from graft.oci.arguments import Invocation
from graft.oci.options import RuntimeOptions

if TYPE_CHECKING:
    from graft.oci.prepare import Caller, StartShim


def main(words: Sequence[str] | None = None) -> NoReturn:
    """The entry point: never returns, because the process becomes the real runtime."""
    given = list(sys.argv[1:] if words is None else words)
    invocation = arguments.parse(given)
    try:
        chosen = options.load(os.environ)
        runtime = options.find_runtime(chosen)
        if invocation.command in arguments.STARTING | arguments.RESTORING:
            prepare_if_asked(invocation, chosen, runtime)
        os.execv(runtime, [runtime, *given])
    except GraftError as error:
        fail(invocation, in_one_line(error))
    except Exception as error:
        if os.environ.get("GRAFT_DEBUG"):
            raise
        fail(invocation, f"{type(error).__name__}: {error}")


def prepare_if_asked(
    invocation: Invocation,
    chosen: RuntimeOptions,
    runtime: str,
    caller: Caller | None = None,
    start_shim: StartShim | None = None,
) -> None:
    """Prepare the container, if it asks for a policy. Raises GraftError, also for an image that would have a container
    without one leave its cgroup, which may have one.

    ``caller`` is the process that becomes the runtime, where it is not this one; ``start_shim`` starts the shim then.
    """
    from graft.oci.bundle import read_config
    from graft.oci.request import check_cgroup, requested

    config = read_config(invocation.config)
    if config is None:
        return
    if requested(config) is None:
        check_cgroup(config, chosen)
        return
    if invocation.command in arguments.RESTORING:
        raise RefusedError("a checkpoint cannot be restored under a policy", "start the container anew")
    from graft.oci import prepare

    prepare.prepare(invocation, config, chosen, runtime, caller, start_shim)


def in_one_line(error: GraftError) -> str:
    """An error with its hint."""
    return error.message + (f" ({error.hint})" if error.hint else "")


def fail(invocation: Invocation, reason: str) -> NoReturn:
    """Report an error on standard error, and in the log where the engine looks for a runtime's errors."""
    from graft.model.printable import printable

    message = f"graft: {printable(reason)}"  # an image may have named what it is about
    print(message, file=sys.stderr)
    if invocation.log is not None:
        log(invocation, message)
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
