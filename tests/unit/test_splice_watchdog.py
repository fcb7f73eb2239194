"""When graftd tells its keeper that it works, and when it does not."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from graft.keeper import protocol
from graft.splice.watchdog import Activity, Watchdog, parse_activity, seconds, works
from tests.support.wait import PATIENCE

STAT = "7 (a) b ) R 1 7 7 0 -1 4194304 100 0 0 0 250 30 0 0 20 0 1 0 5 6 7"


def test_the_state_and_the_time_in_user_space_are_read_of_any_name() -> None:
    assert parse_activity(STAT) == Activity("R", 250)
    own = parse_activity(Path("/proc/thread-self/stat").read_text())
    assert own.state == "R" and own.user <= os.times().user * os.sysconf("SC_CLK_TCK") + 1


@pytest.mark.parametrize(
    "since, before, now, expected",
    [
        (0.1, Activity("S", 5), Activity("S", 5), True),  # it waits for events
        (9.0, Activity("R", 5), Activity("R", 5), True),  # one call of the kernel's, as long as a container likes
        (9.0, Activity("R", 5), Activity("R", 6), False),  # a loop in user space
        (9.0, Activity("S", 5), Activity("S", 5), False),  # it waits for something that does not come
        (9.0, Activity("D", 5), Activity("D", 5), False),
    ],
)
def test_one_that_hangs_is_told_from_one_in_a_long_call(
    since: float, before: Activity, now: Activity, expected: bool
) -> None:
    assert works(since, 5.0, before, now) is expected


def test_the_time_is_for_the_process_that_it_is_said_to_be_for() -> None:
    own = str(os.getpid())
    assert seconds({protocol.WATCHDOG_USEC: "2500000", protocol.WATCHDOG_PID: own}) == 2.5
    assert seconds({protocol.WATCHDOG_USEC: "2500000"}) == 2.5
    assert seconds({protocol.WATCHDOG_USEC: "2500000", protocol.WATCHDOG_PID: "1"}) == 0.0
    assert seconds({}) == 0.0
    assert seconds({protocol.WATCHDOG_USEC: "often"}) == 0.0


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "k"))
        sock.settimeout(PATIENCE)
        yield sock


def test_it_is_said_while_the_loop_turns_and_not_when_it_stands(keeper: socket.socket) -> None:
    told = {protocol.NOTIFY_SOCKET: keeper.getsockname()}
    told[protocol.WATCHDOG_USEC] = str(int(300_000 * PATIENCE))
    turned = time.monotonic()
    watchdog = Watchdog(told, lambda: turned)
    try:
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            turned = time.monotonic()
            time.sleep(0.01)
        assert keeper.recv(100) == b"WATCHDOG=1"
        time.sleep(PATIENCE)  # this thread, which is the loop's, waits
        keeper.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                keeper.recv(100)
        time.sleep(0.3 * PATIENCE)
        with pytest.raises(BlockingIOError):
            keeper.recv(100)
    finally:
        watchdog.close()
