"""A holder and the supervisors that die, or do not."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from graft import holder
from graft.containers import Container
from graft.holder import Holder
from graft.settings import Settings

CONTAINER = Container(7, "web", "/none", "swap", 1, "web", ())


def held(pid: int) -> Holder:
    made = Holder(Settings.from_environment({}), CONTAINER, os.open(os.devnull, os.O_RDONLY), False)
    made.pid = pid
    return made


def test_a_supervisor_is_ended_and_waited_for() -> None:
    process = subprocess.Popen(["sleep", "600"])
    held(process.pid).stop()
    assert not Path(f"/proc/{process.pid}").exists()
    process.wait()


def test_one_that_cannot_die_yet_is_left_and_waited_for_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holder, "_DYING_SECONDS", 0.1)
    stuck, other = subprocess.Popen(["sleep", "600"]), subprocess.Popen(["sleep", "600"])
    kill = os.kill
    monkeypatch.setattr(os, "kill", lambda pid, signum: None if pid == stuck.pid else kill(pid, signum))
    began = time.monotonic()
    held(stuck.pid).stop()
    assert time.monotonic() - began < 10
    assert Path(f"/proc/{stuck.pid}").exists()
    kill(stuck.pid, signal.SIGKILL)
    os.waitid(os.P_PID, stuck.pid, os.WEXITED | os.WNOWAIT)
    held(other.pid).stop()
    assert not Path(f"/proc/{stuck.pid}").exists() and not Path(f"/proc/{other.pid}").exists()
    for process in (stuck, other):
        process.wait()


def test_many_that_cannot_die_yet_are_waited_for_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holder, "_DYING_SECONDS", 0.5)
    dying: list[int] = []
    monkeypatch.setattr(holder, "_dying", dying)
    monkeypatch.setattr(holder, "_still_dying", lambda: dying)
    monkeypatch.setattr(os, "kill", lambda pid, signum: None)
    began = time.monotonic()
    holder.stop_all([held(pid) for pid in range(1, 65)])
    assert len(dying) == 64
    assert time.monotonic() - began < 10
