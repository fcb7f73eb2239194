"""The ferry of transport swap: whom it hears, and to whom it delivers."""

from __future__ import annotations

import ctypes
import socket
from collections.abc import Callable

import pytest

from tests.support.installation import Host
from tests.support.program import Program

pytestmark = pytest.mark.e2e

Without = Callable[[str], Host]
PYTHON = ("/usr/bin/python3", "-ISc")
NEW = "import socket\ndef new(): s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(20); return s\n"


def out_rule(host: Host, to: str = "0.0.0.0/0") -> list[str]:
    return ["-e", f"{to}={host.endpoint('0.0.0.0:dynamic')}"]


OWN = NEW + (
    "s, c = new(), new(); s.bind(('127.0.0.1', 5300)); c.sendto(b'own', ('127.0.0.1', 5300)); "
    "print(s.recvfrom(100)[0], flush=True); input(); c.sendto(b'own again', ('127.0.0.1', 5300))\n"
    "print(s.recvfrom(100)[0], flush=True); input()\n"
)


def served_by_a_ferry(host: Host) -> tuple[Program, tuple[str, int]]:
    """A container whose socket sent to a server inside, and the ferry's address that stands for that server."""
    program = host.start(*out_rule(host), "--", *PYTHON, OWN, talk=True)
    program.says("b'own'")
    ferry = host.maps.ferries.get(ctypes.c_uint32(host.container(program).id))
    assert ferry is not None
    (place,) = [key.place for key in host.maps.berths.keys() if key.family == 4]  # noqa: SIM118
    return program, (f"127.254.{place >> 8}.{place & 255}", int(ferry.port))


def heard_next(program: Program) -> str:
    program.tell("\n")
    program.until("the next datagram", lambda: len(program.said.splitlines()) > 1)
    return program.said.splitlines()[1]


def send_as_a_stranger(host: Host, to: tuple[str, int]) -> None:
    """Another process of the host's."""
    with host.netns.inside(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        stranger.sendto(b"strange", to)


def send_from_another_container(host: Host, to: tuple[str, int]) -> None:
    """One that is granted all of the host's loopback."""
    script = NEW + f"new().sendto(b'strange', {to!r})\n"
    host.run([*out_rule(host, "127.0.0.0/8")], *PYTHON, script)


BY_OTHERS = pytest.mark.parametrize("send", [send_as_a_stranger, send_from_another_container])


@BY_OTHERS
def test_a_ferry_hears_nobody_else(host: Host, send: Callable[[Host, tuple[str, int]], None]) -> None:
    program, address = served_by_a_ferry(host)
    send(host, address)
    assert heard_next(program) == "b'own again'"


@BY_OTHERS
def test_control_where_the_mark_is_not_looked_at_it_does(
    without: Without, send: Callable[[Host, tuple[str, int]], None]
) -> None:
    host = without("ferry's mark")
    program, address = served_by_a_ferry(host)
    send(host, address)
    assert heard_next(program) == "b'strange'"


CLOSED = NEW + (
    "s, c = new(), new(); s.bind(('127.0.0.1', 5300)); c.sendto(b'q', ('127.0.0.1', 5300))\n"
    "peer = s.recvfrom(100)[1]; port = c.getsockname()[1]; c.close()\n"
    "print(port, flush=True); input(); s.sendto(b'answer', peer); print('sent', flush=True); input()\n"
)


def delivered_to_the_next_owner(host: Host) -> bool:
    """A socket is closed, another process of the host's gets its port, and then its peer inside answers."""
    program = host.start(*out_rule(host), "--", *PYTHON, CLOSED, talk=True)
    port = int(program.until("a port", lambda: program.said.strip()))
    with host.netns.inside():
        stranger = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with stranger:
        stranger.bind(("127.0.0.1", port))
        program.tell("\n")
        program.says("sent")
        stranger.settimeout(1)
        try:
            return stranger.recv(100) == b"answer"
        except TimeoutError:
            return False


def test_a_ferry_delivers_to_nobody_else(host: Host) -> None:
    assert not delivered_to_the_next_owner(host)


def test_control_where_the_receiver_is_not_looked_at_it_does(without: Without) -> None:
    assert delivered_to_the_next_owner(without("ferry's receiver"))


def test_a_container_does_not_name_its_own_ferry(host: Host) -> None:
    """What an address of the ferry's stands for was judged for another send: a rule may have denied it since."""
    script = NEW + (
        "import errno, sys\nc = new(); c.sendto(b'x', ('127.0.0.1', 5300)); print('sent', flush=True); word = input()\n"
        "for call in (c.sendto, lambda _, to: c.connect(to)):\n"
        "    try: call(b'x', (word.split()[0], int(word.split()[1]))); print('done')\n"
        "    except OSError as error: print(errno.errorcode[error.errno])\n"
    )
    rules = [*out_rule(host), *out_rule(host, "127.254.0.0/16")]
    program = host.start(*rules, "--", *PYTHON, script, talk=True)
    program.says("sent")
    ferry = host.maps.ferries.get(ctypes.c_uint32(host.container(program).id))
    (place,) = [key.place for key in host.maps.berths.keys() if key.family == 4]  # noqa: SIM118
    assert ferry is not None
    program.tell(f"127.254.{place >> 8}.{place & 255} {ferry.port}\n")
    assert program.wait() == 0
    assert program.said.split() == ["sent", "EACCES", "EACCES"]
