"""graftd: the process of the relays, in the foreground or on its own.

One for all containers, by a lock that the kernel gives back whatever happens. It lives in a cgroup of Graft's own,
where the hooks treat its sockets as what their tags say.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

from graft.datapath import attachments, dataplane
from graft.errors import ConflictError, GraftError
from graft.kernel import cgroup, process
from graft.model.printable import printable
from graft.model.settings import Settings
from graft.splice.daemon_process import only_one
from graft.splice.service import Service


def relays_cgroup(settings: Settings) -> Path:
    """The cgroup that the daemon runs in."""
    return cgroup.v2_mount() / settings.cgroup / "relays"


def run(settings: Settings, keep: bool = True, ready: int | None = None) -> None:
    """Be the daemon, until a signal ends it, or (without ``keep``) nothing is left to serve.

    ``ready`` is a descriptor that is written to when commands are answered. Raises ConflictError where another one
    runs.
    """
    dataplane.up(settings)
    with only_one(settings):
        folder = relays_cgroup(settings)
        folder.mkdir(parents=True, exist_ok=True)
        attachments.attach(settings, folder, 0, splice=True)
        cgroup.enter(folder)
        process.raise_descriptor_limit()
        service = Service(settings, keep)
        gc.freeze()
        service.run(lambda: _say_ready(ready))


def _say_ready(fd: int | None) -> None:
    if fd is not None:
        os.write(fd, b"ready")
        os.close(fd)


def main(ready: int) -> None:
    """What `_start` runs: a process of its own, whose parent is nobody that would have to wait for it."""
    if os.fork():
        os._exit(0)
    try:
        run(Settings.from_environment(), keep=False, ready=ready)
    except ConflictError:
        pass  # another one was quicker
    except GraftError as error:
        print(f"graftd: {printable(error.message)}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main(int(sys.argv[1]))
