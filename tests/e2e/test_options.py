"""Socket options: what a program set before bind or connect is there afterwards, and nothing else has changed."""

from __future__ import annotations

import pytest

from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, CLIENT6, HOST4, HOST6
from tests.support.shell import run

pytestmark = pytest.mark.e2e

PYTHON = ("/usr/bin/python3", "-ISc")

# Sets many options, binds or connects, and prints what a long list of options then is.
SCRIPT = """
import socket, struct, sys
what, family, address, port, sets = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5] == "set"
s = socket.socket(socket.AF_INET6 if family == 6 else socket.AF_INET)
second, hundred, one = struct.pack("ll", 3, 500000), 100, 1
wanted = [
    (1, 2, 1), (1, 5, 1), (1, 9, 1), (1, 10, 1), (1, 13, struct.pack("ii", 1, 7)), (1, 15, 1), (1, 18, 3),
    (1, 20, second), (1, 21, second), (1, 7, 40000), (1, 8, 50000), (1, 12, 4),
    (1, 35, 1), (1, 47, 123456), (1, 60, 1), (1, 49, 0),
    (6, 1, 1), (6, 2, 1200), (6, 4, 111), (6, 5, 22), (6, 6, 3), (6, 7, 4), (6, 8, 33), (6, 9, 5), (6, 10, 44444),
    (6, 13, b"reno"), (6, 16, 1), (6, 18, 9999), (6, 25, 16384), (6, 36, 1),
    (0, 1, 16), (0, 2, 33), (0, 10, 2), (0, 11, 1), (0, 12, 1), (0, 13, 1), (0, 21, 9), (0, 24, 1),
]
if family == 6:
    wanted += [(41, 16, 55), (41, 23, 2), (41, 25, 1), (41, 26, 1), (41, 49, 1), (41, 51, 1), (41, 67, 32), (41, 73, 7)]
for level, name, value in wanted if sets else ():
    try:
        s.setsockopt(level, name, value)
    except OSError as error:
        print("set", level, name, error.errno)
s.setblocking(sys.argv[6] == "blocking")
s.set_inheritable(sys.argv[7] == "inherit")
try:
    s.bind((address, port)) if what == "bind" else s.connect((address, port))
except BlockingIOError:
    pass
if what == "bind":
    s.listen(5)
listed = {(level, name) for level, name, _ in wanted}
listed |= {(1, n) for n in (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 15, 16, 18, 19, 20, 21, 29, 30, 35, 36, 37, 38, 39,
                           40, 42, 44, 45, 46, 47, 49, 60, 61, 64, 72)}
listed |= {(6, n) for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 16, 17, 18, 19, 24, 25, 27, 30, 34, 36, 37)}
listed |= {(0, n) for n in (1, 2, 6, 7, 8, 10, 11, 12, 13, 15, 18, 19, 21, 22, 24, 32, 33, 34, 49, 50, 51)}
if family == 6:
    listed |= {(41, n) for n in (16, 18, 19, 23, 25, 26, 31, 33, 49, 51, 62, 66, 67, 70, 72, 73, 75, 78)}
import fcntl
print("flags", fcntl.fcntl(s, fcntl.F_GETFL) & ~0o2, fcntl.fcntl(s, fcntl.F_GETFD))
for level, name in sorted(listed):
    try:
        print(level, name, s.getsockopt(level, name, 64).hex())
    except OSError as error:
        print(level, name, "errno", error.errno)
"""

MODES = ("blocking keep", "nonblocking inherit")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sets", ["set", "plain"])
@pytest.mark.parametrize("family", [4, 6])
def test_a_bound_listener_has_the_options_that_it_has_without_graft(
    host: Host, family: int, sets: str, mode: str
) -> None:
    address, spec = ("0.0.0.0", "0.0.0.0") if family == 4 else ("::", "[::]")
    port = host.port()
    arguments = ("bind", family, address, 8080, sets, *mode.split())
    rules = ["-i", f"{spec}:8080={host.endpoint(f'{spec}:{port}', dual_stack=spec == '[::]')}"]
    grafted = host.run(rules, *PYTHON, SCRIPT, *map(str, arguments)).stdout
    # Bare: as root without the capability that `graft run` takes away, in a namespace of its own.
    bare = run(["unshare", "-n", "--", *drop_net_admin(), *PYTHON, SCRIPT, *map(str, arguments)], status=0).stdout
    assert comparable(grafted) == comparable(bare)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sets", ["set", "plain"])
@pytest.mark.parametrize("family", [4, 6])
def test_a_connecting_socket_has_the_options_that_it_has_without_graft(
    host: Host, family: int, sets: str, mode: str
) -> None:
    listener = host.client.listener("::")
    address = CLIENT4 if family == 4 else CLIENT6
    arguments = ("connect", family, address, listener.getsockname()[1], sets, *mode.split())
    rules = ["-e", f"0.0.0.0/0={host.endpoint('0.0.0.0:dynamic')}", "-e", f"::/0={host.endpoint('[::]:dynamic')}"]
    grafted = host.run(rules, *PYTHON, SCRIPT, *map(str, arguments)).stdout
    bare = run([*host.netns.command(*drop_net_admin(), *PYTHON, SCRIPT, *map(str, arguments))], status=0).stdout
    listener.close()
    assert comparable(grafted) == comparable(bare)


def drop_net_admin() -> list[str]:
    """As root that has no CAP_NET_ADMIN."""
    return ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", "--"]


def comparable(said: str) -> list[str]:
    """The lines without what differs between connections: SO_INCOMING_CPU, TCP_TIMESTAMP (a clock) and TCP_QUICKACK."""
    return [line for line in said.splitlines() if not line.startswith(("1 49 ", "6 12 ", "6 24 "))]


def test_options_follow_a_socket_that_is_moved_more_than_once(host: Host) -> None:
    script = f"""
import socket
s = socket.socket()
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
try: s.connect(("{CLIENT4}", 9))
except ConnectionRefusedError: pass
s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
s.bind(("127.0.0.1", 8000))
print(s.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT), s.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
"""
    result = host.run(["-e", f"0.0.0.0/0={host.endpoint('0.0.0.0:dynamic')}"], *PYTHON, script)
    assert result.stdout == "1 1\n"


def test_more_options_than_the_hook_records_are_copied_all_the_same(host: Host) -> None:
    script = """
import socket
s = socket.socket()
tried = 0
for level in (1, 6, 0):
    for name in range(1, 80):
        if (level, name) in ((1, 26), (1, 27), (1, 50), (1, 25), (6, 19), (6, 31)): continue
        try: s.setsockopt(level, name, s.getsockopt(level, name)); tried += 1
        except OSError: pass
s.setsockopt(6, 5, 77); s.setsockopt(1, 8, 60000)
before = s.getsockopt(6, 5), s.getsockopt(1, 8), s.getsockopt(1, 15), s.getsockopt(0, 2)
s.bind(("0.0.0.0", 80))
print(tried > 32, before == (s.getsockopt(6, 5), s.getsockopt(1, 8), s.getsockopt(1, 15), s.getsockopt(0, 2)))
"""
    result = host.run(["-i", f"0.0.0.0:80={host.endpoint('0.0.0.0:8080')}"], *PYTHON, script)
    assert result.stdout == "True True\n"


def test_a_packet_filter_is_copied(host: Host) -> None:
    port = host.port()
    script = """
import ctypes, socket, struct
s = socket.socket()
drop = ctypes.create_string_buffer(struct.pack("=HBBI", 6, 0, 0, 0))  # ret 0: nothing comes in
s.setsockopt(socket.SOL_SOCKET, 26, struct.pack("=HxxxxxxQ", 1, ctypes.addressof(drop)))
s.bind(("0.0.0.0", 80)); s.listen()
print("ready", flush=True)
s.settimeout(30); s.accept()
"""
    rules = ["--allow-net-admin", "-i", f"0.0.0.0:80={host.endpoint(f'0.0.0.0:{port}')}"]
    program = host.start(*rules, "--", *PYTHON, script)
    program.says("ready")
    with pytest.raises(TimeoutError):
        host.client.connected(HOST4, port, timeout=0.3)


def test_an_ipv6_only_socket_accepts_no_ipv4(host: Host) -> None:
    port = host.port()
    script = """
import signal, socket
s = socket.socket(socket.AF_INET6); s.setsockopt(41, 26, 1); s.bind(("::", 80)); s.listen(); print("ready", flush=True)
signal.pause()
"""
    program = host.start("-i", f"[::]:80={host.endpoint(f'[::]:{port}')}", "--", *PYTHON, script)
    program.says("ready")
    host.client.connected(HOST6, port).close()
    with pytest.raises(ConnectionRefusedError):
        host.client.connected(HOST4, port)


@pytest.mark.flaky(reruns=1)  # it depends on how much of the machine it gets
def test_signals_of_a_socket_still_arrive(host: Host) -> None:
    port = host.port()
    script = """
import fcntl, os, signal, socket
signal.signal(signal.SIGIO, lambda *_: print("SIGIO", flush=True))
s = socket.socket()
fcntl.fcntl(s, fcntl.F_SETOWN, os.getpid())
fcntl.fcntl(s, fcntl.F_SETFL, os.O_ASYNC)
s.bind(("0.0.0.0", 80)); s.listen(); print("ready", flush=True)
s.settimeout(30); s.accept()
"""
    program = host.start("-i", f"0.0.0.0:80={host.endpoint(f'0.0.0.0:{port}')}", "--", *PYTHON, script)
    program.says("ready")
    host.client.connected(HOST4, port).close()
    program.says("SIGIO")
