"""The entry point of the command graft: `graft run` without the modules of all other commands, if it can be."""

from __future__ import annotations

import contextlib
import sys

from graft.errors import GraftError, KernelError
from graft.kernel.descriptor_limit import require_descriptors


def main() -> None:
    """The command graft."""
    try:
        require_descriptors()
        if sys.argv[1:2] == ["run"]:
            from graft.commands import run_client

            with contextlib.suppress(GraftError):  # reported below, by the command itself
                run_client.try_run(sys.argv[1:])
    except KernelError as error:
        from .output import fail

        fail(error)
    from .main import main as whole

    whole()
