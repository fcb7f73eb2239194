"""What the thirty-second reading found about graftd's keeper: on a kernel that cannot refuse descriptors it closed the
last copy of a connection in whose queue somebody had put one, and waited for that.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from graft.splice import control, daemon_process
from graft.splice.control import NoAnswerError
from tests.hostile.test_eighth_reading_splice import SENDER, folder
from tests.hostile.test_sixteenth_reading_keeper import StartKeeper, graftd, keeper, start_keeper
from tests.support.installation import Host
from tests.support.plain import plain
from tests.support.relayed import pair, published, talk
from tests.support.shell import AS_NOBODY
from tests.support.wait import PATIENCE, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]
__all__ = ["folder", "start_keeper"]

SENDERS = 4
CLOSES_ITSELF = "from graft.keeper import closing; closing._may_have_descriptors = lambda _fd: False; "


@contextmanager
def the_last_has(host: Host, folder: Path, name: str, seconds: int) -> Iterator[None]:
    """graftd has closed some connections in whose queues descriptors are that linger for so long; its keeper, which was
    stopped meanwhile, has the last copies of them, and is told to close them.
    """
    path = folder / f"{name}.sock"
    host.graft("ep", "add", name, f"unix:{path}", "--mode", "0666")
    with plain(host) as hostile, hostile.listener(), ExitStack() as stack:
        hostile.attach("-i", f"0.0.0.0:80={name}")
        command = [*AS_NOBODY, sys.executable, "-c", SENDER, "client", str(path), str(seconds), "0"]
        senders = [host.start_command(command, talk=True) for _ in range(SENDERS)]
        for one in senders:
            stack.callback(one.stop)
            one.until("it is connected", lambda: "connected" in one.said)  # noqa: B023
        until("graftd has them", lambda: hostile.described()["connections"] == SENDERS)
        with_them = sockets(graftd(host))
        its_keeper = keeper(host)
        os.kill(its_keeper, signal.SIGSTOP)
        try:
            for one in senders:
                one.tell("\n")
                one.until("it has sent", lambda: "sent" in one.said)  # noqa: B023
            until("graftd has none any more", lambda: sockets(graftd(host)) <= with_them - SENDERS)
            until("nor its helper's children", lambda: not grandchildren(graftd(host)))
        finally:
            os.kill(its_keeper, signal.SIGCONT)
        yield


def sockets(pid: int) -> int:
    """How many a process has open."""
    found = 0
    for one in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found += os.readlink(one).startswith("socket:")
        except FileNotFoundError:
            continue
    return found


def grandchildren(pid: int) -> list[int]:
    """The children of a process's children."""
    return [other for one in children(pid) for other in children(one)]


def children(pid: int) -> list[int]:
    """Those that have not exited."""
    found = [int(one) for path in Path(f"/proc/{pid}/task").glob("*/children") for one in path.read_text().split()]
    return [one for one in found if is_running(one)]


def is_running(pid: int) -> bool:
    """Whether there is such a process, and it is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def is_followed(host: Host, seconds: float) -> bool:
    """Whether a graftd that is killed is followed by another one, within that time."""
    before = graftd(host)
    os.kill(before, signal.SIGKILL)
    try:
        until("another graftd", lambda: answering(host) not in (0, before), seconds)
    except AssertionError:
        return False
    return True


def answering(host: Host) -> int:
    """The process id of the graftd that answers, 0 while none does."""
    try:
        found = control.ask(host.settings, {"do": "ping"}, timeout=1)
    except NoAnswerError:  # the keeper has the socket
        return 0
    return found["pid"] if found else 0


@pytest.mark.flaky(reruns=1)  # it depends on how much of the machine it gets
def test_a_descriptor_whose_close_waits_does_not_stop_the_keeper(
    host: Host, start_keeper: StartKeeper, folder: Path
) -> None:
    start_keeper("older kernel")
    with plain(host) as victim, victim.listener() as listener:
        client, accepted = pair(victim, listener, published(victim))
        talk(client, accepted)
        with the_last_has(host, folder, "kept", 100):
            assert is_followed(host, 10 * PATIENCE)
            talk(client, accepted)


def test_control_where_the_keeper_closes_it_itself_it_does(
    host: Host, start_keeper: StartKeeper, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = daemon_process._KEEPER
    assert "from graft" in text
    monkeypatch.setattr(daemon_process, "_KEEPER", text.replace("from graft", f"{CLOSES_ITSELF}from graft", 1))
    start_keeper("older kernel")
    with plain(host), the_last_has(host, folder, "closed", 5):
        if is_followed(host, 3):
            pytest.skip("graftd, or its helper, had the last copy this time")
        until("the keeper goes on", lambda: answering(host), 60)
