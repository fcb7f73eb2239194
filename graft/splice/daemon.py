"""graftd: the process that relays, in the foreground or in the background.

There is one for all containers (daemon_process.py has its lock). It runs in a cgroup of Graft's own, where the hooks
treat its sockets as their tags say. Its parent is its keeper, which starts it again when it dies: Graft's own
(graft/keeper), or the service manager.
"""

from __future__ import annotations

import gc
import os
import pickle  # noqa: F401  what answers of children are read with: no file is read for it later, with the lock
import sys

from graft.datapath import attachments, dataplane
from graft.errors import GraftError
from graft.keeper import own_names, protocol
from graft.keeper.lines import write_line
from graft.kernel import cgroup, process
from graft.model.printable import printable
from graft.model.settings import Settings
from graft.splice import descriptor_store, log
from graft.splice.daemon_process import daemon_lock
from graft.splice.service import Service
from graft.splice.watchdog import Watchdog


def run(settings: Settings, keep: bool = True, keeper_pid: int = 0) -> None:
    """Run the daemon, until a signal ends it, or (without ``keep``) nothing is left to serve.

    ``keeper_pid``: the process id of its keeper, if that is Graft's own. Raises ConflictError where a daemon runs
    already.
    """
    log.connect()
    told = {name: os.environ.pop(name) for name in protocol.VARIABLES if name in os.environ}
    received = descriptor_store.received(told)
    own_names.pin()  # before anybody else has seen this process; Graft's own keeper has done it before
    keeper = descriptor_store.connected(told)
    dataplane.up(settings)
    with daemon_lock(settings):
        folder = dataplane.relays_cgroup(settings)
        cgroup.make(folder)
        attachments.attach(settings, folder, 0, splice=True, replaces=True)
        cgroup.enter(folder)
        process.raise_descriptor_limit()
        os.setgroups(())  # servers of unix sockets would be shown them (SO_PEERGROUPS)
        service = Service(settings, keep, keeper, received, keeper_pid)
        gc.freeze()
        watchdog = Watchdog(told, service.last_turn)
        service.keeper_watch.on_another = watchdog.continue_with
        service.run()
        watchdog.close()


def main(keep: bool) -> None:
    """The daemon as the child of Graft's own keeper, which starts __main__.py."""
    try:
        run(Settings.from_environment(), keep, os.getppid())
    except GraftError as error:
        write_line(printable(error.message))
        sys.exit(error.exit_code)
