"""The ferry of transport swap: who passes for it, and who takes its place."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
from collections.abc import Callable

import pytest

from graft.datapath import layout
from tests.hostile.test_exchanges import NOBODY
from tests.hostile.test_ferry import PYTHON
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, CLIENT6
from tests.support.program import Program, start
from tests.support.wait import until

pytestmark = pytest.mark.e2e

Without = Callable[[str], Host]

INET, INET6 = 2, 10
LOOPBACK = {INET: "127.0.0.1", INET6: "::1"}
ASKING = (
    "import socket, sys\n"
    "family, to, port = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])\n"
    "s, c = (socket.socket(family, socket.SOCK_DGRAM) for _ in range(2)); s.settimeout(20); c.settimeout(20)\n"
    "s.bind((to, 5300)); c.bind(('::' if family == 10 else '0.0.0.0', port))\n"
    "def tell(got, *before): print(*before, got[0], *got[1][:2], flush=True)\n"
    "def ask(word):\n"
    "    try: c.sendto(word, (to, 5300))\n"
    "    except OSError as error: print(type(error).__name__, flush=True); return\n"
    "    word, peer = s.recvfrom(100); s.sendto(word.upper(), peer); tell(c.recvfrom(100))\n"
    "ask(b'first'); input()\n"
    "c.settimeout(1)\n"
    "try: tell(c.recvfrom(100), 'received')\n"
    "except TimeoutError: print('received nothing', flush=True)\n"
    "input(); c.settimeout(20); ask(b'second'); input()\n"
)


def rules_for(host: Host, to: str) -> list[str]:
    return ["-e", f"{to}={host.endpoint('[::]:dynamic' if ':' in to else '0.0.0.0:dynamic')}"]


def asking(host: Host, *rules: str, port: int = 0, family: int = INET) -> Program:
    """A container whose socket has asked a server inside, by the ferry."""
    program = host.start(*rules, "--", *PYTHON, ASKING, str(family), LOOPBACK[family], str(port), talk=True)
    program.says(f"b'FIRST' {LOOPBACK[family]} 5300")
    return program


def ferry_of(host: Host, program: Program) -> layout.FerryValue:
    ferry = host.maps.ferries.get(ctypes.c_uint32(host.container(program).id))
    assert ferry is not None
    return ferry


def sockets_at(host: Host, port: int) -> str:
    return host.netns.run("ss", "-Huanp", f"sport = :{port}").strip()


def kill_ferry(host: Host, program: Program) -> None:
    port = int(ferry_of(host, program).port)
    found = re.search(r"pid=(\d+)", sockets_at(host, port))
    assert found
    os.kill(int(found[1]), signal.SIGKILL)
    until("the ferry is gone", lambda: not sockets_at(host, port))


# ---- a user of the host sends from an address of the ferry's

FORGER = """
import socket, struct, sys
source, ferry, to, victim, device, options = sys.argv[1:]
s = socket.socket(socket.AF_INET6 if ":" in source else socket.AF_INET, socket.SOCK_DGRAM)
if device: s.setsockopt(socket.SOL_SOCKET, 25, device.encode())
if options: s.setsockopt(socket.SOL_IP, 4, bytes.fromhex(options))
lo = [(0, 8, struct.pack("=i4s4s", socket.if_nametoindex("lo"), socket.inet_aton(source), bytes(4)))] if device else []
try:
    s.bind((source, int(ferry)))
    s.sendmsg([b"forged"], lo, 0, (to, int(victim)))
    print("sent")
except OSError as error: print(type(error).__name__)
"""


def forge(host: Host, program: Program, victim: int, device: str = "", options: str = "") -> str:
    """What the container's socket receives then, and what the forger says."""
    (key,) = host.maps.berths.keys()
    ferry, family = ferry_of(host, program), INET if key.family == 4 else INET6
    at = (
        (f"127.254.{key.place >> 8}.{key.place & 255}", ferry.port)
        if family == INET
        else ("::1", ferry.ports6[key.place])
    )
    words = (at[0], str(at[1]), LOOPBACK[family], str(victim), device, options)
    said = host.netns.run(*NOBODY, sys.executable, "-c", FORGER, *words).strip()
    program.tell("\n")
    program.says("received ")
    return f"{program.said.splitlines()[1]}; {said}"


def victims_port(host: Host, program: Program) -> int:
    """The one port, besides the ferry's, that a datagram socket of the host's has at all addresses."""
    ferry = int(ferry_of(host, program).port)
    found = re.findall(r"(?:0\.0\.0\.0|\[::\]|\*)(?:%lo)?:(\d+) ", host.netns.run("ss", "-Huan"))
    (port,) = {int(one) for one in found} - {ferry}
    return port


@pytest.mark.parametrize("rule", ["0.0.0.0/0", CLIENT4])
def test_nobody_has_a_ferrys_port_beside_it(host: Host, rule: str) -> None:
    program = asking(host, *rules_for(host, rule))
    received = forge(host, program, victims_port(host, program), device="eth0")
    assert received == "received nothing; OSError"
    program.tell("\n")
    program.says("b'SECOND' 127.0.0.1 5300")


def forged_after_its_death(host: Host, rule: str, options: str, endpoint: bool) -> str:
    """What a container's socket receives when its ferry has died, and another has the port of that."""
    port = host.port() if endpoint else 0
    server = ["-i", f"*:{port}={host.endpoint(f'0.0.0.0:{port}')}"] if endpoint else []
    program = asking(host, *server, *rules_for(host, rule), port=port, family=INET6 if ":" in rule else INET)
    victim = victims_port(host, program)
    kill_ferry(host, program)
    return forge(host, program, victim, options=options)


NOPS = "01010101"  # options in the header, behind which the ports are not read
WAYS = pytest.mark.parametrize(
    ("rule", "options", "endpoint"),
    [
        (CLIENT4, "", False),
        ("0.0.0.0/0", "", False),
        (CLIENT4, "", True),
        (CLIENT4, NOPS, True),
        (CLIENT6, "", False),
    ],
    ids=["not granted", "granted", "at an endpoint", "with options", "ipv6"],
)


@WAYS
def test_nobody_passes_for_a_ferry(host: Host, rule: str, options: str, endpoint: bool) -> None:
    assert forged_after_its_death(host, rule, options, endpoint) == "received nothing; sent"


@WAYS
def test_control_where_the_mark_is_not_asked_for_he_does(
    without: Without, rule: str, options: str, endpoint: bool
) -> None:
    host = without("ferry's mark on answers")
    assert forged_after_its_death(host, rule, options, endpoint) == (
        f"received b'forged' {LOOPBACK[INET6 if ':' in rule else INET]} 5300; sent"
    )


# ---- he takes the port of one that has died

THIEF = """
import select, socket, sys
family, address, *ports = sys.argv[1:]
thieves = [socket.socket(int(family), socket.SOCK_DGRAM) for _ in ports]
for thief, port in zip(thieves, ports): thief.bind((address, int(port)))
print("ready", flush=True); print("stole", select.select(thieves, [], [])[0][0].recv(100), flush=True)
"""


def is_robbed(host: Host, family: int) -> bool:
    program = asking(host, *rules_for(host, "0.0.0.0/0" if family == INET else "::/0"), family=family)
    ferry = ferry_of(host, program)
    ports = [ferry.port] if family == INET else list(ferry.ports6)
    kill_ferry(host, program)
    words = (str(family), "0.0.0.0" if family == INET else "::1", *map(str, ports))
    thief = start(host.netns.command(*NOBODY, sys.executable, "-c", THIEF, *words))
    try:
        thief.says("ready")
        program.tell("\n")
        program.says("received nothing")
        program.tell("\n")
        until("an end", lambda: "stole" in thief.said or len(program.said.splitlines()) > 2)
        if "stole b'second'" in thief.said:
            return True
        assert program.said.splitlines()[2] == "ConnectionRefusedError"
        return False
    finally:
        thief.stop()


@pytest.mark.parametrize("family", [INET, INET6])
def test_nobody_who_takes_a_ferrys_port_gets_what_is_for_inside(host: Host, family: int) -> None:
    assert not is_robbed(host, family)


@pytest.mark.parametrize("family", [INET, INET6])
def test_control_where_the_hooks_do_not_look_who_receives_he_does(without: Without, family: int) -> None:
    assert is_robbed(without("ferry's own port"), family)
