"""A keeper stops its supervisors, also one that cannot be killed at once."""

from __future__ import annotations

import os
import signal
import subprocess
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


def test_a_supervisor_is_ended_and_waited_for() -> None:
    process = subprocess.Popen(["sleep", "600"])
    keeper_of(process.pid).stop()
    assert not Path(f"/proc/{process.pid}").exists()
    process.wait()


def test_one_that_cannot_be_killed_yet_is_waited_for_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "_DYING_SECONDS", 0.1)
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
