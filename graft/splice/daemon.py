"""graftd: the process that relays, in the foreground or in the background.

There is one for all containers (daemon_process.py has its lock). It runs in a cgroup of Graft's own, where the hooks
treat its sockets as their tags say.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

from graft.datapath import attachments, dataplane
from graft.errors import ConflictError, GraftError
from graft.kernel import cgroup, process, unix_files
from graft.model.printable import printable
from graft.model.settings import Settings
from graft.splice.daemon_process import daemon_lock
from graft.splice.service import Service


def relays_cgroup(settings: Settings) -> Path:
    """The cgroup that the daemon runs in."""
    return cgroup.v2_mount() / settings.cgroup / "relays"


def run(settings: Settings, keep: bool = True, ready: int | None = None) -> None:
    """Run the daemon, until a signal ends it, or (without ``keep``) nothing is left to serve.

    ``ready`` is a descriptor to write to as soon as commands are answered. Raises ConflictError where a daemon runs
    already.
    """
    unix_files.pin_own_descriptors()  # before anybody else has seen this process
    dataplane.up(settings)
    with daemon_lock(settings):
        folder = relays_cgroup(settings)
        cgroup.make(folder)
        attachments.attach(settings, folder, 0, splice=True, replaces=True)
        cgroup.enter(folder)
        process.raise_descriptor_limit()
        os.setgroups(())  # servers of unix sockets would be shown them (SO_PEERGROUPS)
        service = Service(settings, keep)
        gc.freeze()
        service.run(lambda: _signal_ready(ready))


def _signal_ready(fd: int | None) -> None:
    if fd is not None:
        os.write(fd, b"ready")
        os.close(fd)


def main(ready: int) -> None:
    """The daemon in the background: a child that nobody has to wait for. __main__.py calls it."""
    if os.fork():
        os._exit(0)
    try:
        run(Settings.from_environment(), keep=False, ready=ready)
    except ConflictError:
        pass  # another command started one first
    except GraftError as error:
        print(f"graftd: {printable(error.message)}", file=sys.stderr)
        sys.exit(error.exit_code)
