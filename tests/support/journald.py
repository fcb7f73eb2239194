"""The real systemd-journald of the machine's distribution, in a mount namespace where /run/systemd is its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.shell import Word, run
from tests.support.wait import until

_DAEMON = "/lib/systemd/systemd-journald"
_START = f"""
set -e
mkdir -p /run/systemd /run/log /var/log
for folder in /run/systemd /run/log /var/log; do mount -t tmpfs none $folder; done
mkdir -p /run/systemd/journal /run/systemd/journald.conf.d
printf '[Journal]\\nReadKMsg=no\\nStorage=volatile\\n' > /run/systemd/journald.conf.d/test.conf
exec {_DAEMON}
"""
# What a service manager does with StandardError=journal (systemd.exec(5)), then the command.
_CONNECT = """
import os, socket, sys
stream = socket.socket(socket.AF_UNIX)
stream.connect("/run/systemd/journal/stdout")
stream.sendall(b"test\\n\\n6\\n1\\n0\\n0\\n0\\n")
stream.shutdown(socket.SHUT_RD)
os.dup2(stream.fileno(), 2)
found = os.fstat(2)
os.environ["JOURNAL_STREAM"] = f"{found.st_dev}:{found.st_ino}"
os.execvp(sys.argv[1], sys.argv[1:])
"""


@dataclass(frozen=True, slots=True)
class Journald:
    """A running one."""

    pid: int

    @property
    def inside(self) -> tuple[Word, ...]:
        """Words before a command that is to see this journal."""
        return ("nsenter", "--mount", f"--target={self.pid}", "--")

    @property
    def connected(self) -> tuple[Word, ...]:
        """The same for one whose standard error it is."""
        return (*self.inside, sys.executable, "-c", _CONNECT)

    def entries(self, *matches: str) -> list[dict[str, Any]]:
        """Those that match, as `journalctl` finds them."""
        command: Sequence[Word] = (*self.inside, "journalctl", "--no-pager", "--output=json", *matches)
        return [json.loads(line) for line in run(command, status=0).stdout.splitlines()]


@contextmanager
def journald() -> Iterator[Journald]:
    """Run one. The machine's own, if it has one, hears nothing of it."""
    assert Path(_DAEMON).exists(), "make setup: missing systemd-journald"
    process = subprocess.Popen(["unshare", "--mount", "--propagation=private", "sh", "-c", _START])
    try:
        socket = Path(f"/proc/{process.pid}/root/run/systemd/journal/stdout")
        until("journald listens", lambda: process.poll() is None and socket.exists() and _is_own(process.pid))
        yield Journald(process.pid)
    finally:
        process.kill()
        process.wait()


def _is_own(pid: int) -> bool:
    """Whether the namespace is made, and this is not the machine's journal."""
    return Path(f"/proc/{pid}/exe").resolve() == Path(_DAEMON).resolve()
