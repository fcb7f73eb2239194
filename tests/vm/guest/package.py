"""What the two tests of the Debian package share: before a reboot of the guest, and after it."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

from tests.support.shell import output
from tests.support.wait import until

PACKAGE = Path("dist/graft.deb")
PINS = Path("/sys/fs/bpf/graft")
CGROUP = Path("/sys/fs/cgroup/graft")
SAVED = Path("/var/lib/graft")
UNITS = Path("/etc/systemd/system")
UNIT, PORT = UNITS / "test-web.service", 8080
PRIVATE_UNIT, OTHERS_PORT = UNITS / "test-private.service", 8081
CONTAINERS = {"shop": ("none", 8082), "desk": ("host", 8083)}
"""Of docker: the network and the endpoint's port of each."""
PORTS = (PORT, OTHERS_PORT, *(port for _, port in CONTAINERS.values()))
# It sleeps, because a unit that appears is attached some moments later, which are many more on an emulated core.
SERVICE = """[Unit]
Description=A web server that knows nothing of Graft
[Service]
WorkingDirectory=/etc/graft
{more}
ExecStartPre=sleep 60
ExecStart=/usr/bin/python3 -m http.server 80
[Install]
WantedBy=multi-user.target
"""


def answers(port: int) -> bool:
    """Whether a web server answers there. To be asked once a second at most: it is on the same core."""
    command = ["curl", "-s", "-f", "-m", "10", f"http://127.0.0.1:{port}/environment"]
    return b"GRAFT_STATE_DIR" in subprocess.run(command, capture_output=True).stdout


def until_answers(port: int) -> None:
    """Wait for the web server."""
    until(f"an answer at port {port}", lambda: answers(port), timeout=100, pause=1)


def is_active(unit: str) -> bool:
    """Whether systemd has started a unit."""
    return subprocess.run(["systemctl", "is-active", "--quiet", unit]).returncode == 0


def main_pid(unit: str) -> int:
    """The process that systemd watches."""
    return int(output(["systemctl", "show", "--property=MainPID", "--value", unit]))


def listening() -> str:
    """The listening TCP sockets of the host."""
    return output(["ss", "-Hltn"])


def root_file_system() -> bytes:
    """A tar of a system that has busybox, and the file that web servers are asked for."""
    files = {"bin/busybox": Path("/bin/busybox"), "etc/graft/environment": Path("/etc/graft/environment")}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, path in files.items():
            tar.add(path, name)
        for name in ("sh", "sleep", "httpd"):
            link = tarfile.TarInfo(f"bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
    return buffer.getvalue()


def make_image() -> None:
    """Give docker the image "box"."""
    subprocess.run(["docker", "import", "-", "box"], input=root_file_system(), check=True, timeout=600)
