"""What a fourteenth reading found in what outlives a reboot, and in the fork server.

Containers of engines are in tests/e2e/test_saved_state.py, what needs no kernel in tests/unit/test_restore.py and
test_watcher.py.
"""

from __future__ import annotations

import errno
import sys
from pathlib import Path

import pytest

from graft.kernel import cgroup
from graft.kernel.syscalls import MACHINE
from tests.e2e.conftest import WritePolicy, write_policy
from tests.e2e.test_saved_state import assert_confined, attached, box, confine, saver, watcher_of
from tests.support.installation import GRAFT, Host
from tests.support.shell import Word, run
from tests.support.wait import until

pytestmark = pytest.mark.e2e
__all__ = ["box", "saver", "write_policy"]

FILTERED = """
import os, struct, sys
from graft.kernel import seccomp
call, code = int(sys.argv[1]), int(sys.argv[2])
lines = [(0x20, 0, 0, 0), (0x15, 0, 1, call), (0x06, 0, 0, 0x00050000 | code), (0x06, 0, 0, 0x7FFF0000)]
seccomp.install(b"".join(struct.pack("=HBBI", *line) for line in lines))
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Runs a command under a filter with which one system call fails."""


NUMBERS = {
    "x86_64": {"inotify_init1": 294, "inotify_add_watch": 254},
    "aarch64": {"inotify_init1": 26, "inotify_add_watch": 27},
}


def filtered(call: str, code: int, *words: Word) -> list[Word]:
    return [sys.executable, "-c", FILTERED, NUMBERS[MACHINE][call], code, *words]


# ---- the watcher ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "code"),
    [("inotify_init1", errno.EMFILE), ("inotify_add_watch", errno.ENOSPC)],
    ids=["instances", "watches"],
)
def test_a_watcher_that_the_kernel_reports_nothing_to_attaches_too(
    saver: Host, box: Path, write_policy: WritePolicy, call: str, code: int
) -> None:
    port = confine(saver, box, write_policy)
    saver.graft("down")
    said = run(filtered(call, code, GRAFT, "up"), environment=saver.environment, status=0)
    assert said.stderr == ""
    assert attached(saver, box) and watcher_of(saver)
    cgroup.remove(box)
    until("it says so", lambda: f"{call}: " in saver.graft("ps").stderr)
    assert "is only looked at every 3 s" in (saver.settings.run_dir / "watcher.log").read_text()
    box.mkdir()
    until("it is attached", lambda: attached(saver, box))
    assert_confined(saver, box, port)


def test_attach_says_that_no_watcher_could_be_started(saver: Host, box: Path, write_policy: WritePolicy) -> None:
    (saver.settings.run_dir / "watcher.log").mkdir()
    port = saver.port()
    saver.graft("ep", "add", "web", f"0.0.0.0:{port}")
    assert "nobody watches" in saver.graft("attach", "--cgroup", box, "-i", "0.0.0.0:80=web").stderr
    assert attached(saver, box)
