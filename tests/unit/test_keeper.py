"""A keeper stops its supervisor, also one that does not die at once."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from graft.model.settings import Settings
from graft.model.transport import Transport
from graft.state.records import Container
from graft.swap import keeper
from graft.swap.keeper import Keeper

CONTAINER = Container(7, "web", "/none", Transport.SWAP, 1, "web", ())


def keeper_of(pid: int) -> Keeper:
    """A keeper whose supervisor is that process."""
    made = Keeper(Settings.from_environment({}), CONTAINER, os.open(os.devnull, os.O_RDONLY), False)
    made.pid = pid
    return made


def test_a_supervisor_is_killed_and_reaped() -> None:
    process = subprocess.Popen(["sleep", "600"])
    keeper_of(process.pid).stop()
    assert not Path(f"/proc/{process.pid}").exists()
    process.wait()


def test_one_that_does_not_die_within_the_timeout_is_reaped_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "_KILL_TIMEOUT", 0.1)
    stuck, other = subprocess.Popen(["sleep", "600"]), subprocess.Popen(["sleep", "600"])
    kill = os.kill
    monkeypatch.setattr(os, "kill", lambda pid, signum: None if pid == stuck.pid else kill(pid, signum))
    keeper_of(stuck.pid).stop()  # returns, though that one still runs
    assert Path(f"/proc/{stuck.pid}").exists()
    kill(stuck.pid, signal.SIGKILL)
    os.waitid(os.P_PID, stuck.pid, os.WEXITED | os.WNOWAIT)
    keeper_of(other.pid).stop()
    assert not Path(f"/proc/{stuck.pid}").exists() and not Path(f"/proc/{other.pid}").exists()
    for process in (stuck, other):
        process.wait()


def test_many_that_cannot_die_yet_are_waited_for_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "_KILL_TIMEOUT", 0.5)
    dying: list[int] = []
    monkeypatch.setattr(keeper, "_killed", dying)
    monkeypatch.setattr(keeper, "_reap_killed", lambda: dying)
    monkeypatch.setattr(os, "kill", lambda pid, signum: None)
    began = time.monotonic()
    keeper.stop_all([keeper_of(pid) for pid in range(1, 65)])
    assert len(dying) == 64
    assert time.monotonic() - began < 64 * 0.5 / 2  # one after the other, they would take 64 times the timeout
