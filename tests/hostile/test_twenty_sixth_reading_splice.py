"""What the twenty-sixth reading found in transport splice: slow calls of graftd's that had nobody wait, or the wrong
one. It closed what it does not relay in its own turns; and what was slow where it takes bytes out of a queue, after an
urgent byte or beside the relay in the kernel, was charged to the container whatever side that was on.
"""

from __future__ import annotations

import os
import sys
import threading

import pytest

from tests.hostile.test_daemon_shares import Pings, StartDaemon, hostile, other, start_daemon
from tests.hostile.test_ninth_reading_splice import asked
from tests.support.installation import Host
from tests.support.namespaces import HOST4
from tests.support.plain import Plain, plain
from tests.support.relayed import published
from tests.support.shell import AS_NOBODY, Word
from tests.support.wait import PATIENCE

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

__all__ = ["hostile", "other", "start_daemon"]

ENTRIES = 400_000
"""How often a socket is watched by one process: as many are woken by what happens to it."""
WATCHED = """
import ctypes, os, resource, select, socket, sys, threading, time
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
def watch(sock, entries, events):  # by each copy of the descriptor in each of the epoll instances
    copies = [os.dup(sock.fileno()) for _ in range(2000)]
    polls = [select.epoll() for _ in range(entries // len(copies))]
    for poll in polls:
        for copy in copies:
            poll.register(copy, events | select.EPOLLET)
    return copies, polls
"""

# ---- connections that are not relayed --------------------------------------------------------------------------------

CONNECTS = f"""{WATCHED}
entries, seconds = int(sys.argv[1]), float(sys.argv[2])
if len(sys.argv) > 3:
    where = sys.argv[3], 80
else:  # graftd's relay, which any process of the namespace sees
    for line in open("/proc/net/tcp").read().splitlines()[1:]:
        words = line.split()
        if words[3] == "0A" and words[1].startswith("0100007F"):
            where = "127.0.0.1", int(words[1].split(":")[1], 16)
socks, kept, closed, libc = [socket.socket() for _ in range(4)], [], 0, ctypes.CDLL(None)
for sock in socks:
    kept.append(watch(sock, entries, select.EPOLLIN))
    sock.settimeout(30)
print("ready", flush=True)
time.sleep(1)
end = time.monotonic() + seconds
def connect(sock):
    global closed
    while time.monotonic() < end:
        try:
            sock.connect(where)
            sock.recv(1)
        except OSError:
            pass
        closed += 1
        libc.connect(sock.fileno(), bytes(16), 16)  # AF_UNSPEC: it can be connected again
threads = [threading.Thread(target=connect, args=(sock,)) for sock in socks]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print("finished", closed, flush=True)
os._exit(0)
"""
STAND_IN = "10.99.0.5"
SECONDS = 8
SERVED_FOR_EACH = 100
"""How often another container is served for each connection of the hostile one that is closed: with the defence at
least (400 to 1100), without at most (15 to 30).
"""


def served_for_each(start_daemon: StartDaemon, hostile: Plain, other: Plain, way: str, without: str = "") -> float:
    """How often a container is served for each connection of another one that graftd closes at once."""
    start_daemon(without)
    published(hostile)
    if way == "granted":  # what leads to a unix socket where nobody listens
        name = f"nobody{os.getpid()}{without[:5]}"
        hostile.host.graft("ep", "add", name, f"unix:/run/graft-test-nobody-{os.getpid()}.sock")
        hostile.attach("-e", f"{STAND_IN}/32={name}", "--deny")
    with other.listener() as listener:
        listener.settimeout(60 * PATIENCE)
        port = published(other)
        where = [STAND_IN] if way == "granted" else []
        attack = hostile.start(*AS_NOBODY, sys.executable, "-c", CONNECTS, ENTRIES, SECONDS, *where)
        attack.says("ready", 120)
        with Pings(other, listener, port) as pings:
            attack.until("finished", lambda: "finished" in attack.said, 120)
            served, closed = pings.count, int(attack.said.split("finished")[1])
            print(f"served {served} times, closed {closed}, waits {hostile.described()['waits']}")
            return served / closed


@pytest.mark.flaky(reruns=1)  # it depends on how much of the machine it gets
@pytest.mark.parametrize("way", ["refused", "granted"])
def test_a_container_whose_refused_connections_are_slow_to_close_waits_for_them(
    start_daemon: StartDaemon, hostile: Plain, other: Plain, way: str
) -> None:
    assert served_for_each(start_daemon, hostile, other, way) > SERVED_FOR_EACH


@pytest.mark.parametrize("way", ["refused", "granted"])
def test_control_where_the_daemon_itself_closes_them_the_others_wait(
    start_daemon: StartDaemon, hostile: Plain, other: Plain, way: str
) -> None:
    if served_for_each(start_daemon, hostile, other, way, "owners of closes") > SERVED_FOR_EACH:
        pytest.skip("the control shows nothing: the machine is too busy for the attack")


# ---- bytes that are taken out of a client's queue --------------------------------------------------------------------

FLOODS = f"""{WATCHED}
entries, host, port, seconds, way = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), sys.argv[5]
end = 0
block = bytes(1 << 20)
while not end or time.monotonic() < end:
    sock = socket.create_connection((host, port), timeout=30)
    copies = polls = ()
    try:
        for _ in range(8 if way == "kernel" else 0):  # small messages: the flow is handed over to the kernel
            sock.send(b"?")
            sock.recv(1)
            time.sleep(0.02)
        sock.send(b"D", socket.MSG_OOB if way == "urgent" else 0)
        sock.setblocking(False)
        copies, polls = watch(sock, entries, select.EPOLLIN | select.EPOLLOUT)
        if not end:
            print("ready", flush=True)
            end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                while True:
                    sock.send(block)
            except BlockingIOError:
                pass
            time.sleep(0.3)
    except OSError:
        pass
    finally:
        for poll in polls:
            poll.close()
        for copy in copies:
            os.close(copy)
        sock.close()
print("finished", flush=True)
os._exit(0)
"""
SERVER = """
import asyncio
async def serve(reader, writer):
    try:
        while data := await reader.read(1 << 16):
            if data[:1] == b"D":
                while await reader.read(1 << 16):
                    await asyncio.sleep(0.005)
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
FLOODED_SECONDS = 8
PART = 2
"""Which part of what another container is served the client's still is, at the least: nearly all of it. In the controls
it is a quarter, or hardly any.
"""


def served_beside_a_flood(host: Host, start_daemon: StartDaemon, way: str, without: str = "") -> float:
    """What the container is served which a local user floods, as a part of what another one is."""
    start_daemon(without)
    with plain(host, relay="kernel" if way == "kernel" else "splice") as victim, plain(host) as other:
        for one in (victim, other):
            one.start(sys.executable, "-c", SERVER).says("ready")
        port, others_port = published(victim), published(other)
        victim.until_published(port)
        client_seconds = FLOODED_SECONDS + 3
        words: list[Word] = [*AS_NOBODY, sys.executable, "-c", FLOODS, ENTRIES, HOST4, port, client_seconds, way]
        client = host.start_command(host.netns.command(*words))
        client.says("ready", 60)
        counts = [0, 0]

        def ask(index: int, container: Plain, where: int) -> None:
            counts[index] = asked(container, where, FLOODED_SECONDS)

        asking = ((0, victim, port), (1, other, others_port))
        threads = [threading.Thread(target=ask, args=one) for one in asking]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        client.until("finished", lambda: "finished" in client.said, 120)
        print(f"served {counts[0]} times, another {counts[1]} times")
        return counts[0] / max(1, counts[1])


@pytest.mark.flaky(reruns=1)  # it depends on how much of the machine it gets
@pytest.mark.parametrize("way", ["urgent", "kernel"])
def test_a_client_whose_queue_is_slow_to_empty_waits_and_the_container_serves_others(
    host: Host, start_daemon: StartDaemon, way: str
) -> None:
    assert served_beside_a_flood(host, start_daemon, way) > 1 / PART


@pytest.mark.parametrize("way", ["urgent", "kernel"])
def test_control_where_the_container_waits_for_it_it_serves_hardly_anybody(
    host: Host, start_daemon: StartDaemon, way: str
) -> None:
    if served_beside_a_flood(host, start_daemon, way, "slow peers") > 1 / PART:
        pytest.skip("the control shows nothing: the machine is too busy for the attack")
