"""What a ninth reading found about graftd: what it looks up, and for whose slow calls a container is held."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from graft.kernel import cgroup
from tests.hostile.test_daemon_shares import StartDaemon, served, start_daemon
from tests.hostile.test_eighth_reading_folders import holder, running
from tests.support.installation import GRAFT, Host
from tests.support.namespaces import HOST4
from tests.support.plain import Plain, plain
from tests.support.relayed import published
from tests.support.shell import AS_NOBODY, Word
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
            for _ in range(20 if without else 4):  # the kernel does not forget each time
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


# ---- a client whose own waiters make graftd's calls slow -------------------------------------------------------------

WAITING_CLIENT = """
import ctypes, resource, socket, sys, threading, time
threads, host, port, seconds = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
threading.stack_size(65536)
entries, libc = 20000, ctypes.CDLL(None)
class Pollfd(ctypes.Structure):
    _fields_ = (("fd", ctypes.c_int), ("events", ctypes.c_short), ("revents", ctypes.c_short))
end = resets = 0
while not end or time.monotonic() < end:
    try:
        sock = socket.create_connection((host, port), timeout=30)
        array = (Pollfd * entries)(*[Pollfd(sock.fileno(), 0, 0)] * entries)
        waiters = [threading.Thread(target=libc.poll, args=(array, entries, -1), daemon=True) for _ in range(threads)]
        for waiter in waiters:
            waiter.start()
        time.sleep(0 if end else 3)
        print("" if end else "ready", flush=True)
        end = end or time.monotonic() + seconds
        while time.monotonic() < end:
            sock.send(b"?")
            if not sock.recv(1):
                raise ConnectionResetError
            time.sleep(0.1)
    except OSError:
        resets += 1
        for waiter in waiters:
            waiter.join()
print("finished", resets, flush=True)
import os
os._exit(0)
"""
ECHO = """
import asyncio
async def serve(reader, writer):
    try:
        while data := await reader.read(100):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    writer.close()
async def main():
    server = await asyncio.start_server(serve, "0.0.0.0", 80, backlog=1000)
    print("ready", flush=True)
    await server.serve_forever()
asyncio.run(main())
"""
_ATTACKED_SECONDS = 12


def asked(container: Plain, port: int, seconds: float) -> int:
    """How often a remote client gets an answer, by a new connection each time."""
    count, until_then = 0, time.monotonic() + seconds
    while time.monotonic() < until_then:
        with contextlib.suppress(OSError), container.host.client.connected(HOST4, port) as sock:
            sock.settimeout(60)
            sock.sendall(b"?")
            count += sock.recv(1) == b"?"
    return count


def served_beside_a_waiting_client(
    host: Host, start_daemon: StartDaemon, without: str = ""
) -> tuple[float, float, int, int]:
    """How often per second the container is served to which a local user connects, before that and meanwhile; how often
    another one is; and how often his connection was reset.
    """
    start_daemon(without)
    with plain(host) as victim, plain(host) as other:
        for one in (victim, other):
            one.start(sys.executable, "-c", ECHO).says("ready")
        port, others_port = published(victim), published(other)
        victim.until_published(port)
        before = asked(victim, port, 3.0) / 3.0
        words = [*AS_NOBODY, sys.executable, "-c", WAITING_CLIENT, "200", HOST4, str(port), str(_ATTACKED_SECONDS)]
        client = host.start_command(host.netns.command(*words))
        client.says("ready", 60)
        counts = [0, 0]

        def ask(index: int, container: Plain, where: int) -> None:
            counts[index] = asked(container, where, _ATTACKED_SECONDS)

        threads = [
            threading.Thread(target=ask, args=(0, victim, port)),
            threading.Thread(target=ask, args=(1, other, others_port)),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        client.until("finished", lambda: "finished" in client.said, 120)
        resets = int(client.said.split("finished")[1])
        print(
            f"before {before:.1f}/s, meanwhile {counts[0] / _ATTACKED_SECONDS:.1f}/s, "
            f"another {counts[1] / _ATTACKED_SECONDS:.1f}/s, resets {resets}"
        )
        return before, counts[0] / _ATTACKED_SECONDS, counts[1], resets


@pytest.mark.flaky(reruns=1)  # it depends on how much of the machine it gets
def test_a_client_that_wakes_its_own_waiters_is_reset_and_the_container_serves_others(
    host: Host, start_daemon: StartDaemon
) -> None:
    before, meanwhile, others, resets = served_beside_a_waiting_client(host, start_daemon)
    assert resets > 0
    assert meanwhile > before / 20
    assert others > 30 * _ATTACKED_SECONDS


def test_control_where_the_container_waits_it_serves_hardly_anybody(host: Host, start_daemon: StartDaemon) -> None:
    before, meanwhile, _, _ = served_beside_a_waiting_client(host, start_daemon, "slow peers")
    assert meanwhile < before / 20
