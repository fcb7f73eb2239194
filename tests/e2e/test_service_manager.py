"""A graftd that a service manager starts takes the place of one that Graft's own keeper has."""

from __future__ import annotations

import pytest

from graft.keeper.process import LOCK
from graft.kernel.file_lock import is_locked
from graft.splice import control
from tests.support.installation import GRAFT, Host
from tests.support.plain import plain
from tests.support.relayed import published
from tests.support.wait import PATIENCE, until

pytestmark = pytest.mark.e2e


def test_it_serves_what_is_attached_and_no_keeper_is_left(host: Host) -> None:
    with plain(host) as container, container.listener():
        port = published(container)
        container.until_published(port)
        assert is_locked(host.settings.run_dir / LOCK)
        started = host.start_command(["env", f"NOTIFY_SOCKET={host.folder}/none", GRAFT, "daemon"])
        until(
            "it answers", lambda: (control.ask(host.settings, {"do": "ping"}) or {}).get("pid") == started.process.pid
        )
        container.until_published(port)
        assert not is_locked(host.settings.run_dir / LOCK)


def test_a_reload_ends_before_graftd_does(host: Host) -> None:
    """As systemd's ExecReload=, which has the main process's number in its environment."""
    with plain(host) as container:
        published(container)
        before = container.daemon()
        reload = host.start_command(["env", f"MAINPID={before}", GRAFT, "daemon", "--replace"])
        assert reload.process.wait(30 * PATIENCE) == 0
        until("the next one", lambda: (control.ask(host.settings, {"do": "ping"}) or {}).get("pid", before) != before)
