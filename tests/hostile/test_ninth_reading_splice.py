"""What a ninth reading found about graftd: what it looks up, and for whose slow calls a container is held."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from graft.kernel import cgroup
from tests.hostile.test_daemon_shares import StartDaemon, served, start_daemon
from tests.hostile.test_eighth_reading_folders import holder, running
from tests.support.installation import GRAFT, Host
from tests.support.plain import Plain, plain
from tests.support.relayed import published
from tests.support.shell import Word
from tests.support.wait import PATIENCE, until

pytestmark = pytest.mark.e2e
__all__ = ["start_daemon"]


# ---- whether a cgroup exists, where a folder above is held and the kernel has not its name in the cache --------------


def forget_names() -> bool:
    """As when others use up the memory (who reads a big sparse file, without any right, has it done in a minute)."""
    for _ in range(3):
        Path("/proc/sys/vm/drop_caches").write_text("2")
    return False


@contextlib.contextmanager
def attached_below(host: Host, beside: Plain) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """A container of its own, attached with transport splice; its cgroup is below a folder that anybody may list."""
    above = cgroup.v2_mount() / f"graft-test-{os.getpid()}-above"
    (above / "below").mkdir(parents=True)
    enter = f'echo $$ > {above}/below/cgroup.procs; exec "$@"'
    try:
        with subprocess.Popen(["sh", "-c", enter, "sh", *beside.netns.command("sleep", "1000")]) as process:
            until("it is in there", lambda: cgroup.processes(above))
            rule = f"0.0.0.0:82={host.endpoint(f'0.0.0.0:{host.port()}')}"
            host.graft("attach", "--cgroup", above / "below", "-i", rule)
            try:
                yield above, process
            finally:
                process.kill()
    finally:
        cgroup.kill(above)
        cgroup.remove(above)


@contextlib.contextmanager
def two(host: Host) -> Iterator[tuple[Plain, Plain, socket.socket, int]]:
    with plain(host) as hostile, plain(host) as other, hostile.listener(), other.listener(port=80) as listener:
        port, _ = published(other), published(hostile)
        assert served(other, listener, port, 15 * PATIENCE)
        yield hostile, other, listener, port


def test_the_daemon_serves_others_while_a_folder_above_a_cgroup_is_held(host: Host, start_daemon: StartDaemon) -> None:
    start_daemon()
    with two(host) as (hostile, other, listener, port), attached_below(host, hostile) as (above, process):
        with running(holder(above)):
            for _ in range(6):
                forget_names()
                assert served(other, listener, port, 4 * PATIENCE)
                time.sleep(0.5)
        process.kill()
        process.wait()
        cgroup.remove(above / "below")
        until("its record is gone", lambda: len(host.installation.containers.listing()) == 2)


def test_control_a_daemon_that_asks_by_its_id_serves_nobody(host: Host, start_daemon: StartDaemon) -> None:
    start_daemon("cgroup events")
    with two(host) as (hostile, other, listener, port), attached_below(host, hostile) as (above, _):
        with running(holder(above)):
            until("the daemon waits", lambda: forget_names() or not served(other, listener, port, 2.0))
        assert until("served", lambda: served(other, listener, port, 1.0))


def test_the_daemon_starts_while_a_folder_above_a_cgroup_is_held(host: Host, start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    with two(host) as (hostile, other, listener, port), attached_below(host, hostile) as (above, process):
        with running(holder(above)):
            daemon.process.terminate()
            daemon.process.wait()
            forget_names()
            start_daemon()
            other.until_published(port)
            assert served(other, listener, port, 4 * PATIENCE)
        process.kill()
        process.wait()
        cgroup.remove(above / "below")
        until("its record is gone", lambda: len(host.installation.containers.listing()) == 2, 30 * PATIENCE)


def test_commands_end_while_a_folder_above_a_cgroup_is_held(host: Host, start_daemon: StartDaemon) -> None:
    """No daemon keeps the name in the cache: it is stopped."""
    daemon = start_daemon()
    with two(host) as (hostile, _, _, _), attached_below(host, hostile) as (above, _):
        daemon.process.terminate()
        daemon.process.wait()
        with running(holder(above)):
            commands: list[list[Word]] = [
                ["ps"],
                ["run", "-i", f"0.0.0.0:80={host.endpoint(f'0.0.0.0:{host.port()}')}", "--", "true"],
                ["detach", "--cgroup", hostile.cgroup],
                ["detach", "--cgroup", above / "below"],
            ]
            for number, words in enumerate(commands):
                forget_names()
                command = host.start_command([GRAFT, *words])
                time.sleep(0.5)
                host.graft("ep", "add", f"n{os.getpid()}-{number}", f"10.98.0.1:{host.port()}", timeout=10 * PATIENCE)
                command.process.wait(20 * PATIENCE)
            assert above / "below" not in {one.cgroup_path for one in host.installation.containers.listing()}
        start_daemon()


# ---- graftd's own folder in /proc, which every user may list ---------------------------------------------------------

UNIX_SERVER = """
import socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen(100)
print("ready", flush=True)
while True:
    with listener.accept()[0] as accepted:
        accepted.send(b"!")
"""


def served_while_its_folder_is_held(host: Host, start_daemon: StartDaemon, without: str = "") -> bool:
    """Whether others are served when a container connects to a unix endpoint, while somebody holds /proc/GRAFTD."""
    start_daemon(without)
    with two(host) as (hostile, other, listener, port), tempfile.TemporaryDirectory(prefix="gu-", dir="/run") as made:
        os.chmod(made, 0o711)
        host.start_command([sys.executable, "-c", UNIX_SERVER, f"{made}/s"]).says("ready")
        name = f"own{os.getpid()}{without.replace(' ', '')}"
        host.graft("ep", "add", name, f"unix:{made}/s")
        hostile.attach("-e", f"10.99.0.5/32={name}")

        def connect() -> None:
            with hostile.tcp() as sock, contextlib.suppress(OSError):
                sock.settimeout(2)
                sock.connect(("10.99.0.5", 80))
                sock.recv(1)

        connect()
        with running(holder(f"/proc/{other.daemon()}")):
            for _ in range(4):
                forget_names()
                connect()
                connect()
                if not served(other, listener, port, 3.0):
                    break
            else:
                return True
        until("served again", lambda: served(other, listener, port, 1.0))
        return False


def test_the_daemon_serves_others_while_its_folder_in_proc_is_held(host: Host, start_daemon: StartDaemon) -> None:
    assert served_while_its_folder_is_held(host, start_daemon)


def test_control_a_daemon_that_looks_itself_up_serves_nobody(host: Host, start_daemon: StartDaemon) -> None:
    assert not served_while_its_folder_is_held(host, start_daemon, "own descriptors")
