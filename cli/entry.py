"""The entry point of the command graft: `graft run` without the modules of all other commands, if it can be."""

from __future__ import annotations

import sys


def main() -> None:
    """The command graft."""
    if sys.argv[1:2] == ["run"]:
        from graft.commands import run_client
        from graft.errors import GraftError

        try:
            run_client.try_run(sys.argv[1:])
        except GraftError:
            pass  # reported below, by the command itself
    from .main import main as whole

    whole()
