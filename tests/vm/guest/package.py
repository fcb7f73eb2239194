"""What the two tests of the Debian package share: before a reboot of the guest, and after it."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.support.shell import output
from tests.support.wait import until

PACKAGE = Path("dist/graft.deb")
PINS = Path("/sys/fs/bpf/graft")
CGROUP = Path("/sys/fs/cgroup/graft")
SAVED = Path("/var/lib/graft")
PORT = 8080
UNIT = Path("/etc/systemd/system/test-web.service")
# It sleeps, because a unit that appears is attached some moments later, which are many more on an emulated core.
SERVICE = """[Unit]
Description=A web server that knows nothing of Graft
[Service]
WorkingDirectory=/etc/graft
ExecStartPre=sleep 20
ExecStart=/usr/bin/python3 -m http.server 80
[Install]
WantedBy=multi-user.target
"""


def answers(port: int) -> bool:
    """Whether the web server answers there. To be asked once a second at most: it is on the same core."""
    command = ["curl", "-s", "-f", "-m", "10", f"http://127.0.0.1:{port}/environment"]
    return b"graft.service" in subprocess.run(command, capture_output=True).stdout


def until_answers(port: int) -> None:
    """Wait for the web server."""
    until(f"an answer at port {port}", lambda: answers(port), timeout=100, pause=1)


def is_active(unit: str) -> bool:
    """Whether systemd has started a unit."""
    return subprocess.run(["systemctl", "is-active", "--quiet", unit]).returncode == 0


def listening() -> str:
    """The listening TCP sockets of the host."""
    return output(["ss", "-Hltn"])
