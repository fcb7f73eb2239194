"""What the seventeenth reading found about the ends of containers."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from graft.datapath import layout
from graft.kernel import cgroup
from graft.state import ferries
from tests.hostile.conftest import graft_without
from tests.hostile.test_ferry import PYTHON, out_rule
from tests.support.installation import Host
from tests.support.program import Program
from tests.support.wait import PATIENCE, until

pytestmark = pytest.mark.e2e

# ---- ferries that are busy when their containers end: a firewall inside decides for how long

_BUSY = 5
SENDS = """
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.sendto(b'a', ('127.0.0.1', 5301)); print("sent", flush=True); input()
"""


def ferries_of(host: Host) -> set[int]:
    """The process ids of all ferries: nobody's children, in the supervisors' cgroups."""

    def parent(pid: int) -> str:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1]

    places = (host.cgroup / "supervisors").rglob("cgroup.procs")
    return {pid for place in places for pid in cgroup.processes(place.parent) if parent(pid) == "1"}


@contextmanager
def busy(host: Host, without: str = "") -> Iterator[list[Program]]:
    """Programs that sent by UDP, whose ferries do nothing for now."""
    stopped: set[int] = set()
    programs = []
    try:
        for _ in range(_BUSY):
            words = [*graft_without(without), "run", *out_rule(host), "--", *PYTHON, SENDS]
            programs.append(host.start_command(words, talk=True))
        for one in programs:
            one.says("sent", 30)
        until("their ferries", lambda: len(ferries_of(host)) >= _BUSY)
        stopped = ferries_of(host)
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        yield programs
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)


def ends_in(programs: list[Program]) -> float:
    """How long it takes until all of these programs have ended, that end at the same time."""
    begun = time.monotonic()
    for one in programs:
        one.tell("\n")
    for one in programs:
        assert one.wait() == 0
    return time.monotonic() - begun


def test_the_end_of_containers_does_not_wait_for_their_ferries(host: Host) -> None:
    maps = host.maps
    with busy(host) as programs:
        numbers = [host.container(one).id for one in programs]
        assert ends_in(programs) < _BUSY * 2.0 * PATIENCE
        for number in numbers:  # as one writes that has not heard yet that it is to end
            maps.berths.put(ferries.berth_keys(number)[3], layout.BerthValue(family=4))
        assert all(maps.ferries.get(ctypes.c_uint32(number)) is None for number in numbers)
    until("nothing is left of the ferries", lambda: not maps.berths.keys() and not ferries_of(host))


def test_control_where_each_waits_they_take_that_long_together(host: Host) -> None:
    with busy(host, "ferry ends") as programs:
        assert ends_in(programs) >= _BUSY * 2.0
