"""What a thirty-sixth reading found: a graftd that was killed, and waits in the kernel with the lock of the only one,
kept every one that was started after it from running.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from graft.splice import client as splice
from graft.splice import daemon_process
from tests.hostile.test_daemon_shares import served
from tests.hostile.test_seventeenth_reading_keeper import log_of
from tests.hostile.test_sixteenth_reading_keeper import graftd
from tests.support.installation import Host
from tests.support.plain import plain
from tests.support.relayed import published
from tests.support.wait import PATIENCE, kill, until

pytestmark = pytest.mark.e2e

UNKILLABLE = (
    "import os, signal; from graft.keeper import process; process._END_SECONDS = 0.2; kill = os.kill; "
    "os.kill = lambda pid, signum: kill(pid, 0 if signum == signal.SIGKILL else signum); "
)
"""As if whoever the keeper kills waited in the kernel."""
KEEPS_THE_FILE = "process._forget_lock = lambda folder: None; "


@pytest.fixture
def keeper(host: Host, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """The installation's graftd, with a keeper whose signals do not end it; ``param``: what else the keeper does."""
    splice.stop(host.settings)
    monkeypatch.setattr(daemon_process, "_KEEPER", daemon_process._KEEPER.replace("from", f"{_before(request)}from", 1))
    monkeypatch.setattr(daemon_process, "_WATCHDOG_SECONDS", 3.0 * PATIENCE)
    daemon_process.ensure_running(host.settings)
    yield
    splice.stop(host.settings)


def _before(request: pytest.FixtureRequest) -> str:
    return UNKILLABLE + str(getattr(request, "param", ""))


def is_served_beside(host: Host) -> bool:
    """Whether a container is served while the graftd before is left behind, and when that has ended."""
    with plain(host) as container, container.listener() as listener:
        port = published(container)
        first = graftd(host)
        assert served(container, listener, port, 5 * PATIENCE)
        os.kill(first, signal.SIGSTOP)
        try:
            until("it is left behind", lambda: f"({first}) was killed, does not end" in log_of(host), timeout=30)
            beside = served(container, listener, port, 10 * PATIENCE)
        finally:
            kill(first)
        until("the container is served", lambda: served(container, listener, port, PATIENCE), timeout=30)
        return beside


@pytest.mark.timeout(180)
@pytest.mark.flaky(reruns=1)
@pytest.mark.usefixtures("keeper")
def test_the_next_one_serves_beside_it(host: Host) -> None:
    assert is_served_beside(host)


@pytest.mark.timeout(180)
@pytest.mark.flaky(reruns=1)
@pytest.mark.parametrize("keeper", [KEEPS_THE_FILE], indirect=True)
@pytest.mark.usefixtures("keeper")
def test_with_the_lock_file_that_it_has_none_does(host: Host) -> None:
    assert not is_served_beside(host)
