"""What a fourteenth reading found in what outlives a reboot, and in the fork server.

Containers of engines are in tests/e2e/test_saved_state.py, what needs no kernel in tests/unit/test_restore.py and
test_watcher.py.
"""

from __future__ import annotations

import errno
import sys
import time
from pathlib import Path

import pytest

from graft.kernel import cgroup
from graft.kernel.syscalls import MACHINE
from graft.swap import fork_servers
from tests.e2e.conftest import WritePolicy, write_policy
from tests.e2e.test_saved_state import assert_confined, attached, box, confine, saver, watcher_of
from tests.hostile.test_eighth_reading_folders import running
from tests.support.holding import NOBODY_WITH_A_PAGE
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
    "x86_64": {"inotify_init1": 294, "inotify_add_watch": 254, "bpf": 321, "acct": 163},
    "aarch64": {"inotify_init1": 26, "inotify_add_watch": 27, "bpf": 280, "acct": 89},
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


# ---- the fork server --------------------------------------------------------------------------------

HOLDS_EACH = (
    NOBODY_WITH_A_PAGE
    + r"""
libc.prctl(4, 1, 0, 0, 0)
known = set(os.listdir("/proc"))
print("ready", flush=True)

def make(path):
    try:
        os.open(path + "/x", os.O_CREAT | os.O_RDONLY)
    except OSError:
        pass

while True:
    for pid in set(os.listdir("/proc")) - known:
        path = f"/proc/{pid}"
        try:
            words = open(f"{path}/cmdline", "rb").read()
            if open(f"{path}/comm").read() == "graft-forks\n":
                known.add(pid)
            elif b"graft_cli.fork_server" in words:
                fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
                threading.Thread(target=libc.syscall, args=(217, fd, ctypes.c_void_p(at), 4096), daemon=True).start()
                time.sleep(0.0003)
                threading.Thread(target=make, args=(path,), daemon=True).start()
        except OSError:
            words = b"gone"
        if words and (b"-m" in words or b"graft" not in words):
            known.add(pid)
    time.sleep(0.001)
"""
)
"""The user nobody holds the folder in /proc of each new fork server that he sees (not of what it forks)."""


def test_who_holds_the_folder_of_each_new_server_has_no_command_wait_for_long(host: Host) -> None:
    fork_servers.stop_all(host.settings)
    with running([sys.executable, "-c", HOLDS_EACH]):
        for _ in range(2):
            start = time.monotonic()
            host.graft("run", "--", "true", timeout=100)
            assert time.monotonic() - start < 12, "a start without a server takes two seconds, on a slow machine"


def test_a_command_under_a_filter_gets_nothing_done_by_a_server_under_another_one(host: Host) -> None:
    fork_servers.stop_all(host.settings)
    words: list[Word] = [GRAFT, "run", "--", "echo", "ran"]
    assert run(filtered("acct", errno.EPERM, *words), environment=host.environment).stdout == "ran\n"
    assert fork_servers.running(host.settings) == []
    refused = run(filtered("bpf", errno.EPERM, *words), environment=host.environment)
    assert refused.returncode != 0 and refused.stdout == ""
