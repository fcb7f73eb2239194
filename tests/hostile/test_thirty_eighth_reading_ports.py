"""What a thirty-eighth reading found: a container took the UDP datagrams of another one in silence, by a port that an
egress rule had lent it, or that it had bound while its binds were free. A graftd that was killed, and waits in the
kernel, kept its lock from the next one when its keeper was killed too. And what a ferry had brought was shown as from
loopback when its place stood for nobody any more.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from graft.errors import ConflictError, GraftError
from graft.keeper.process import GRAFTD_LOCK
from graft.splice import client as splice
from graft.splice import control, daemon_process
from tests.e2e.test_datagrams_swap import PYTHON, out_rule
from tests.hostile.conftest import Confine, Confined, Without
from tests.hostile.test_afterwards import apply
from tests.hostile.test_daemon_shares import served
from tests.hostile.test_seventeenth_reading_keeper import log_of
from tests.hostile.test_sixteenth_reading_keeper import graftd, keeper
from tests.hostile.test_thirty_sixth_reading_groups import COUNT, policy, received, said, server
from tests.hostile.test_thirty_sixth_reading_keeper import KEEPS_THE_FILE, UNKILLABLE
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, HOST4
from tests.support.plain import plain
from tests.support.relayed import published
from tests.support.wait import PATIENCE, kill, until

pytestmark = pytest.mark.e2e

FREE = "name: t\ndefault: {bind: container, connect: deny}\n"
DENIED = "name: t\ndefault: deny\n"
LENDS = "egress: [{{to: {}, endpoint: web}}]\n"

ANSWERS = r"""
for line in sys.stdin:
    try:
        print(globals()[line.strip()](), flush=True)
    except OSError as error:
        print(errno.errorcode[error.errno], flush=True)
"""
"""The end of a program that runs the function which a line of its input names, and prints the result or the error."""

SHARES = r"""
import ctypes, errno, os, select, socket, sys
how, address, port = sys.argv[1], sys.argv[2], int(sys.argv[3])

def made(cpu):
    u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    u.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    getattr(u, how)((address, port))
    return u

def leave():
    for cpu, u in enumerate(all):
        ctypes.CDLL(None).connect(u.fileno(), bytes(16), 16)  # AF_UNSPEC
        u.setsockopt(socket.SOL_SOCKET, 49, cpu)  # SO_INCOMING_CPU
    return "left"

def read():
    got = 0
    while select.select(all, [], [], 0.5)[0]:
        got += sum(len(u.recv(100)) for u in select.select(all, [], [], 0)[0])
    return got

def send():
    return all[0].sendto(b"x", (address, port))

try:
    all = [made(cpu) for cpu in range(os.cpu_count())]
    print("made", flush=True)
except OSError as error:
    print(errno.errorcode[error.errno], flush=True)
"""


def shares(host: Host, confine: Confine, transport: str, text: str, how: str, address: str, port: int) -> Confined:
    """Has SO_REUSEADDR sockets, one for each CPU, that are connected or bound to that address."""
    return confine(host, transport, text, within=["/usr/bin/python3", "-ISc", SHARES + ANSWERS, how, address, port])


def ask(one: Confined, word: str) -> str:
    """What it says to one of its commands."""
    before = len(one.program.said.splitlines())
    one.program.tell(f"{word}\n")
    return one.lines(before + 1)[before]


def lends(web: int, to: str) -> str:
    return policy(web, rules="") + LENDS.format(to)


def serving(host: Host, confine: Confine, transport: str, web: int) -> str:
    """What a server's bind says; how much it gets where it serves."""
    one = server(host, confine, transport, policy(web), shares=False)
    return said(one) if said(one) != "serving" else f"{received(host, one, web)} of {COUNT}"


@pytest.fixture
def peer(host: Host) -> Iterator[socket.socket]:
    with host.client.inside():
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with made:
        made.bind((CLIENT4, 0))
        made.settimeout(10)
        yield made


# ---- whoever binds the endpoint beside it


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("transport", ["direct", "swap"])
def test_who_was_lent_the_port_takes_none_in_silence(
    host: Host, confine: Confine, tmp_path: Path, transport: str, keeps: bool
) -> None:
    web = host.port()
    one = shares(host, confine, transport, lends(web, "10.0.0.0/8"), "connect", CLIENT4, 9)
    assert said(one) == "made" and ask(one, "leave") == "left"
    if not keeps:
        apply(host, one, tmp_path, policy(web, rules=""))
    assert serving(host, confine, transport, web) == "EADDRINUSE"


def test_nor_who_bound_it_while_binds_were_free(host: Host, confine: Confine, tmp_path: Path) -> None:
    web = host.port()
    one = shares(host, confine, "direct", FREE, "bind", "0.0.0.0", web)
    assert said(one) == "made" and ask(one, "leave") == "left"
    apply(host, one, tmp_path, DENIED)
    assert serving(host, confine, "direct", web) == "EADDRINUSE"


@pytest.mark.parametrize("how", ["connect", "bind"])
def test_control_where_only_lost_endpoints_count_they_do(
    without: Without, confine: Confine, tmp_path: Path, how: str
) -> None:
    host = without("lent and free ports")
    web = host.port()
    if how == "connect":
        one = shares(host, confine, "direct", lends(web, "10.0.0.0/8"), "connect", CLIENT4, 9)
    else:
        one = shares(host, confine, "direct", FREE, "bind", "0.0.0.0", web)
    assert said(one) == "made" and ask(one, "leave") == "left"
    if how == "bind":
        apply(host, one, tmp_path, DENIED)
    assert serving(host, confine, "direct", web) == f"0 of {COUNT}"


@pytest.mark.parametrize("detached", [False, True])
def test_who_binds_freely_leaves_the_port_to_others(host: Host, confine: Confine, detached: bool) -> None:
    """A responder of mDNS, say; a program that is detached goes on, and has its sockets."""
    web = host.port()
    one = shares(host, confine, "direct", FREE, "bind", "0.0.0.0", web)
    assert said(one) == "made"
    if detached:
        host.graft("detach", "--cgroup", one.cgroup)
    assert said(server(host, confine, "direct", policy(web), shares=False)) == "serving"


# ---- whom it is lent beside


@pytest.mark.parametrize("transport", ["direct", "swap"])
def test_none_is_lent_the_port_that_another_one_has(host: Host, confine: Confine, transport: str) -> None:
    web = host.port()
    serves = server(host, confine, transport, policy(web), shares=False)
    assert said(serves) == "serving"
    one = shares(host, confine, transport, lends(web, "10.0.0.0/8"), "connect", CLIENT4, 9)
    assert said(one) == "EADDRINUSE"
    assert received(host, serves, web) == COUNT


def test_control_who_is_lent_it_takes_all(without: Without, confine: Confine) -> None:
    host = without("others at a lent port")
    web = host.port()
    serves = server(host, confine, "direct", policy(web), shares=False)
    assert said(serves) == "serving"
    one = shares(host, confine, "direct", lends(web, "10.0.0.0/8"), "connect", CLIENT4, 9)
    assert said(one) == "made" and ask(one, "leave") == "left"
    assert received(host, serves, web) == 0


def test_its_own_server_is_no_other(host: Host, confine: Confine) -> None:
    web = host.port()
    one = shares(host, confine, "direct", policy(web) + LENDS.format(f"{CLIENT4}/32"), "connect", CLIENT4, 9)
    assert said(one) == "made"


# ---- what it receives there


def heard(host: Host, confine: Confine, peer: socket.socket, transport: str) -> list[str]:
    """How many octets of its peer's come to it: from its peer, and when it has none any more; what a send says then."""
    web = host.port()
    port = peer.getsockname()[1]
    one = shares(host, confine, transport, lends(web, f"{CLIENT4}/32"), "connect", CLIENT4, port)
    assert said(one) == "made"
    peer.sendto(b"one", (HOST4, web))
    answers = [ask(one, "read"), ask(one, "leave")]
    peer.sendto(b"another", (HOST4, web))
    return [*answers, ask(one, "read"), ask(one, "send")]


@pytest.mark.parametrize("transport", ["direct", "swap"])
def test_without_a_peer_it_receives_nothing(host: Host, confine: Confine, peer: socket.socket, transport: str) -> None:
    assert heard(host, confine, peer, transport) == ["3", "left", "0", "EACCES"]


def test_control_it_receives_from_whom_it_may_send_to(without: Without, confine: Confine, peer: socket.socket) -> None:
    host = without("peer of a lent port")
    assert heard(host, confine, peer, "direct") == ["3", "left", "7", "1"]


# ---- a graftd that cannot end, when its keeper is killed

WAITS_LONG = UNKILLABLE + "process._END_SECONDS = 1000.0; "
"""The keeper waits long for the end of a graftd that it has killed, and that waits in the kernel."""


@pytest.fixture
def waiting_keeper(host: Host, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """The installation's graftd, with such a keeper; ``param``: what else that does."""
    splice.stop(host.settings)
    before = WAITS_LONG + str(getattr(request, "param", ""))
    monkeypatch.setattr(daemon_process, "_KEEPER", daemon_process._KEEPER.replace("from", f"{before}from", 1))
    monkeypatch.setattr(daemon_process, "_WATCHDOG_SECONDS", 3.0 * PATIENCE)
    daemon_process.ensure_running(host.settings)
    monkeypatch.undo()
    monkeypatch.setattr(control.ask, "__defaults__", (3.0 * PATIENCE,))
    yield
    splice.stop(host.settings)


def serves_after_both_were_killed(host: Host) -> bool:
    """Whether a command has a container served when graftd was killed, and cannot end, and its keeper was too."""
    first, its_keeper = graftd(host), keeper(host)
    with plain(host) as container, container.listener() as listener:
        os.kill(first, signal.SIGSTOP)
        try:
            until("it was killed", lambda: f"({first}) hangs, and is killed" in log_of(host), timeout=30)
            kill(its_keeper)
            with contextlib.suppress(GraftError):
                daemon_process.ensure_running(host.settings)
                return served(container, listener, published(container), 10 * PATIENCE)
            return False
        finally:
            kill(first)


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("waiting_keeper")
def test_another_graftd_serves_when_the_keeper_is_killed_too(host: Host) -> None:
    assert serves_after_both_were_killed(host)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("waiting_keeper", [KEEPS_THE_FILE], indirect=True)
@pytest.mark.usefixtures("waiting_keeper")
def test_control_with_the_lock_that_the_first_one_has_none_does(host: Host) -> None:
    assert not serves_after_both_were_killed(host)


def test_nobody_has_the_lock_of_a_file_that_is_removed(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was opened before the keeper removed it, and let go of by who was killed."""
    settings = host.settings._replace(run_dir=host.settings.run_dir / "beside")
    settings.run_dir.mkdir()
    lock = fcntl.flock

    def flock(fd: int, how: int) -> None:
        (settings.run_dir / GRAFTD_LOCK).unlink()
        lock(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ConflictError), daemon_process.daemon_lock(settings):
        pass
    monkeypatch.setattr(daemon_process, "is_at", lambda fd, path: True)
    with daemon_process.daemon_lock(settings):
        assert not (settings.run_dir / GRAFTD_LOCK).exists()


# ---- what a ferry has brought, when its peer is forgotten

UNREAD = """
import os, socket, sys
family, here = (socket.AF_INET, "127.0.0.1") if sys.argv[1] == "4" else (socket.AF_INET6, "::1")
s = socket.socket(family, socket.SOCK_DGRAM); s.settimeout(20); s.bind(("", 0))
c = socket.socket(family, socket.SOCK_DGRAM); c.connect((here, s.getsockname()[1])); c.send(b"x")
s.recv(1, socket.MSG_PEEK)
print("it waits", flush=True); input()
print(s.recvfrom(10)[1][:2], flush=True); input()
"""
"""A server on the host, of port 0, and its peer inside."""


def shown(host: Host, family: str) -> str:
    """Whom the server sees, when what its peer has sent was not read before the ferry forgot that."""
    program = host.start(*out_rule(host), "--", *PYTHON, UNREAD, family, talk=True)
    program.says("it waits")
    forgotten = [key for key, _ in host.maps.berths.items() if key.family == int(family)]  # as Berths.sweep() does
    assert forgotten
    for key in forgotten:
        host.maps.berths.delete(key)
    program.tell("\n")
    return program.until("the sender", lambda: program.said.splitlines()[1:])[0]


@pytest.mark.parametrize(("family", "nobody"), [("4", "('0.0.0.0', 0)"), ("6", "('::', 0)")])
def test_who_is_forgotten_is_shown_as_nobody(host: Host, family: str, nobody: str) -> None:
    assert shown(host, family) == nobody


@pytest.mark.parametrize(("family", "loopback"), [("4", "('127."), ("6", "('::1',")])
def test_control_else_as_somebody_on_loopback(without: Without, family: str, loopback: str) -> None:
    assert shown(without("forgotten peers"), family).startswith(loopback)
