"""What a thirty-sixth reading found: a UDP socket that was granted an endpoint before stays in the kernel's group of
those that share the port (SO_REUSEPORT), and takes the datagrams of the container that has the endpoint next. A
thirty-seventh: so does one that shares it by SO_REUSEADDR, by what it sets afterwards, or at IPv4 where the next one's
endpoint is dual-stack.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hostile.conftest import TRANSPORTS, Confine, Confined, Without
from tests.hostile.test_afterwards import apply
from tests.support.installation import Host
from tests.support.namespaces import HOST4

pytestmark = pytest.mark.e2e

COUNT = 40

SERVER = r"""
import ctypes, errno, socket, struct, sys
picks, shares, path, address = sys.argv[1] == "1", sys.argv[2] == "1", sys.argv[3], sys.argv[4]
u = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
u.setsockopt(socket.SOL_SOCKET, 15 if shares else socket.SO_REUSEADDR, 1)
try:
    u.bind((address, 53))
except OSError as error:
    print(errno.errorcode[error.errno], flush=True)
    sys.stdin.readline()
if picks:  # SO_ATTACH_REUSEPORT_CBPF: the first of the group
    code = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0))
    u.setsockopt(socket.SOL_SOCKET, 51, struct.pack("HxxxxxxP", 1, ctypes.addressof(code)))
if path:
    with socket.socket(socket.AF_UNIX) as holder:
        holder.connect(path)
        socket.send_fds(holder, [b"x"], [u.fileno()])
print("serving", flush=True)
for line in sys.stdin:
    u.settimeout(0.5)
    got = 0
    try:
        while True:
            u.recv(100)
            got += 1
    except OSError:
        print("got", got, flush=True)
"""


@pytest.fixture
def holder() -> Iterator[socket.socket]:
    """Where a process outside takes sockets; anybody may connect to it."""
    folder = Path(f"/tmp/graft-holder-{os.getpid()}")
    with socket.socket(socket.AF_UNIX) as made:
        folder.unlink(missing_ok=True)
        made.bind(str(folder))
        folder.chmod(0o777)
        made.listen()
        made.settimeout(30)
        yield made
    folder.unlink()


ANY4, ANY6 = "0.0.0.0", "::"
DUAL_STACK = "{{address: '[::]:{}', dual_stack: true}}"


def policy(web: int, rules: str = "{bind: '*:53', endpoint: web}", endpoint: str = "'0.0.0.0:{}'") -> str:
    return f"name: t\nendpoints: {{web: {endpoint.format(web)}}}\ningress: [{rules}]\ndefault: deny\n"


def server(
    host: Host,
    confine: Confine,
    transport: str,
    text: str,
    picks: bool = False,
    shares: bool = True,
    path: str = "",
    address: str = ANY4,
) -> Confined:
    words = ["/usr/bin/python3", "-ISc", SERVER, str(int(picks)), str(int(shares)), path, address]
    return confine(host, transport, text, within=words)


def said(one: Confined) -> str:
    """The last word of a server's start, or of its answer."""
    return one.lines(1)[-1]


def received(host: Host, one: Confined, port: int) -> int:
    """How many of a number of datagrams, each from another port, it gets."""
    for _ in range(COUNT):
        with host.netns.inside():
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with sock:
            sock.sendto(b"x", (HOST4, port))
    one.resume()
    return int(one.lines(2)[1].split()[1])


def after_its_rule(host: Host, confine: Confine, transport: str, folder: Path, picks: bool, shares: bool = True) -> str:
    """What the next one's bind says when the one before has lost its rule; where it serves, how much it gets."""
    web = host.port()
    before = server(host, confine, transport, policy(web), picks, shares)
    assert said(before) == "serving"
    apply(host, before, folder, policy(web, rules=""))
    after = server(host, confine, transport, policy(web), shares=shares)
    return said(after) if said(after) != "serving" else f"{received(host, after, web)} of {COUNT}"


@pytest.mark.parametrize("picks", [False, True])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_one_that_lost_its_rule_takes_none_in_silence(
    host: Host, confine: Confine, tmp_path: Path, transport: str, picks: bool
) -> None:
    assert after_its_rule(host, confine, transport, tmp_path, picks) == "EADDRINUSE"


@pytest.mark.parametrize("picks", [False, True])
def test_without_the_look_at_the_port_it_does(without: Without, confine: Confine, tmp_path: Path, picks: bool) -> None:
    got = after_its_rule(without("leftovers at its port"), confine, "direct", tmp_path, picks)
    assert int(got.split()[0]) < (1 if picks else COUNT)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_nor_one_with_so_reuseaddr(host: Host, confine: Confine, tmp_path: Path, transport: str) -> None:
    """Of two with that the last one that was bound gets all; but the other one can have the kernel prefer it later."""
    assert after_its_rule(host, confine, transport, tmp_path, picks=False, shares=False) == "EADDRINUSE"


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_nor_one_of_the_other_family(
    host: Host, confine: Confine, tmp_path: Path, transport: str, shares: bool
) -> None:
    web = host.port()
    before = server(host, confine, transport, policy(web), shares=shares)
    assert said(before) == "serving"
    apply(host, before, tmp_path, policy(web, rules=""))
    text = policy(web, endpoint=DUAL_STACK)
    assert said(server(host, confine, transport, text, shares=shares, address=ANY6)) == "EADDRINUSE"


@pytest.mark.parametrize("transport", ["swap", "born"])
def test_one_that_has_ended_takes_none_in_silence(
    host: Host, confine: Confine, holder: socket.socket, transport: str
) -> None:
    """A process outside has its socket; when that lets go, the port is the next one's."""
    web = host.port()
    before = server(host, confine, transport, policy(web), picks=True, path=holder.getsockname())
    with holder.accept()[0] as stranger:
        _, fds, _, _ = socket.recv_fds(stranger, 10, 1)
    assert said(before) == "serving"
    before.program.stop()
    assert said(server(host, confine, transport, policy(web))) == "EADDRINUSE"
    os.close(fds[0])
    after = server(host, confine, transport, policy(web))
    assert said(after) == "serving"
    assert received(host, after, web) == COUNT


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_those_that_are_granted_it_share_it(host: Host, confine: Confine, transport: str) -> None:
    """Of two that both have the endpoint each gets its part."""
    web = host.port()
    one, other = (server(host, confine, transport, policy(web)) for _ in range(2))
    assert [said(one), said(other)] == ["serving", "serving"]
    assert received(host, one, web) < COUNT


@pytest.mark.parametrize("ends", [False, True])
def test_one_that_is_detached_leaves_the_port(host: Host, confine: Confine, holder: socket.socket, ends: bool) -> None:
    """Its program goes on, and has the socket, or has ended, and a process outside has it."""
    web = host.port()
    before = server(host, confine, "direct", policy(web), picks=True, path=holder.getsockname())
    with holder.accept()[0] as stranger:
        _, fds, _, _ = socket.recv_fds(stranger, 10, 1)
    assert said(before) == "serving"
    if ends:
        before.program.stop()
    host.graft("detach", "--cgroup", before.cgroup)
    after = server(host, confine, "direct", policy(web))
    assert said(after) == "serving"
    assert received(host, after, web) == COUNT
    os.close(fds[0])
