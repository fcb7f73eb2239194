"""What a sixth reading found: sources that a rule names no more, marks on connections, what outlives a container."""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from graft.kernel import cgroup, sockets
from graft.oci import shim
from graft.state.records import Container
from tests.conftest import installation
from tests.hostile.conftest import TRANSPORTS, Confine, Confined, Without, graft_without, lines_of
from tests.hostile.test_afterwards import OTHER4, SOL_SOCKET, SOL_TCP, apply, held_socket
from tests.hostile.test_datagrams import came, datagrams
from tests.hostile.test_more_ways import SO_REUSEADDR, give_another_address, source_of_next
from tests.support.building import Programs
from tests.support.cgroups import in_cgroup, new_cgroup
from tests.support.installation import GRAFT, Host
from tests.support.namespaces import CLIENT4, CLIENT6, HOST4, HOST6, Netns
from tests.support.program import Program
from tests.support.shell import Word, run
from tests.support.wait import PATIENCE, until

pytestmark = pytest.mark.e2e

OTHER6 = "fd98::79"
INET, INET6, STREAM, DGRAM = 2, 10, 1, 2
SOL_UDP, UDP_CORK, SO_MARK, TCP_FASTOPEN_CONNECT = 17, 1, 36, 30

# ---- a source that an endpoint lent, when the rule names another endpoint or the endpoint has moved ------------------

LOSSES = ["another endpoint", "moved", "moved to no address", "no port any more"]


def rule(endpoint: str, to: str = CLIENT4) -> str:
    return f"egress: [{{to: '{to}', endpoint: {endpoint}}}]\ndefault: deny\n"


def lender(host: Host, loss: str) -> str:
    """The name of an endpoint, whose address or port is going to be lost."""
    give_another_address(host)
    return host.endpoint(f"{HOST4}:{host.port()}" if loss == "no port any more" else f"{OTHER4}:dynamic")


def lose(host: Host, one: Confined, folder: Path, name: str, loss: str) -> None:
    """Take the address, or the port, away; the destination remains granted."""
    if loss == "another endpoint":
        apply(host, one, folder, f"name: t\nendpoints: {{b: '{HOST4}:dynamic'}}\n{rule('b')}")
    else:
        address = "0.0.0.0" if loss == "moved to no address" else HOST4
        host.graft("ep", "set", name, f"{address}:dynamic")


def sends_on(host: Host, confine: Confine, folder: Path, loss: str) -> list[str | None]:
    """The sources of a connected socket's datagrams, before and after."""
    name = lender(host, loss)
    with datagrams(host) as far:
        steps = ["make", INET, DGRAM, 0, "connect", CLIENT4, far.getsockname()[1], "send", "-", "-", "wait"]
        one = confine(host, "direct", f"name: t\n{rule(name)}", *steps, "send", "-", "-", "wait")
        one.lines(3)
        before = came(far, 10)
        lose(host, one, folder, name, loss)
        one.resume()
        one.lines(4)
        return [before, came(far)]


@pytest.mark.parametrize("loss", LOSSES)
def test_a_connected_datagram_socket_sends_no_more_from_a_source_that_is_not_the_rules(
    host: Host, confine: Confine, tmp_path: Path, loss: str
) -> None:
    before, after = sends_on(host, confine, tmp_path, loss)
    assert before is not None
    assert after is None


@pytest.mark.parametrize("loss", LOSSES)
def test_control_where_nobody_looks_at_what_was_lent_it_does(
    without: Without, confine: Confine, tmp_path: Path, loss: str
) -> None:
    assert None not in sends_on(without("lent"), confine, tmp_path, loss)


def begins(host: Host, confine: Confine, folder: Path, transport: str, loss: str) -> tuple[str, int] | None:
    """The source of a connection that was put off until then; None: none comes."""
    name = lender(host, loss)
    with contextlib.closing(host.client.listener()) as far:
        steps = ["make", INET, STREAM, 0, "cookieless", "option", SOL_TCP, TCP_FASTOPEN_CONNECT]
        steps += ["connect", CLIENT4, far.getsockname()[1], "wait", "send", "-", "-", "wait"]
        one = confine(host, transport, f"name: t\n{rule(name)}", *steps)
        assert one.lines(4)[-1] == "connect ok"
        lose(host, one, folder, name, loss)
        one.resume()
        return source_of_next(far, 1)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_connection_put_off_does_not_begin_from_a_source_that_is_not_the_rules(
    host: Host, confine: Confine, tmp_path: Path, transport: str, loss: str
) -> None:
    assert begins(host, confine, tmp_path, transport, loss) is None


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_control_where_nobody_looks_at_what_was_lent_it_begins(
    without: Without, confine: Confine, tmp_path: Path, transport: str
) -> None:
    source = begins(without("lent"), confine, tmp_path, transport, "another endpoint")
    assert source is not None and source[0] == OTHER4


FAMILIES = {INET: (OTHER4, HOST4, CLIENT4), INET6: (f"[{OTHER6}]", f"[{HOST6}]", CLIENT6)}


def completes(host: Host, confine: Confine, folder: Path, family: int) -> str | None:
    """The source of a datagram that is completed then (UDP_CORK), of a socket that has no address of its own."""
    give_another_address(host)
    host.netns.run("ip", "address", "replace", f"{OTHER6}/128", "dev", "lo")
    host.client.run("ip", "route", "replace", f"{OTHER6}/128", "via", HOST6)
    other, now, client = FAMILIES[family]
    with datagrams(host, client) as far:
        steps = ["make", family, DGRAM, 0, "option", SOL_UDP, UDP_CORK, "send", client, far.getsockname()[1], "wait"]
        text = f"name: t\nendpoints: {{a: '{other}:dynamic'}}\n{rule('a', client)}"
        one = confine(host, "direct", text, *steps, "bytes", SOL_UDP, UDP_CORK, "00000000", "wait")
        assert one.lines(3)[-1] == "send ok"
        apply(host, one, folder, f"name: t\nendpoints: {{b: '{now}:dynamic'}}\n{rule('b', client)}")
        one.resume()
        one.lines(4)
        return came(far)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_datagram_is_not_completed_with_a_source_that_is_not_the_rules(
    host: Host, confine: Confine, tmp_path: Path, family: int
) -> None:
    assert completes(host, confine, tmp_path, family) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_control_where_nobody_looks_at_its_source_it_is(
    without: Without, confine: Confine, tmp_path: Path, family: int
) -> None:
    assert completes(without("its source"), confine, tmp_path, family) == FAMILIES[family][0].strip("[]")


def keeps_port(host: Host, confine: Confine, transport: str, kind: int) -> list[str]:
    """What it says, when its endpoint has no port any more, of a connect or a send; an earlier connect got the port."""
    name = lender(host, "no port any more")
    steps = ["make", INET, kind, 0, "connect", CLIENT4, 9, "unspec", "wait"]
    again = ["connect", CLIENT4, 9] if kind == STREAM else ["send", CLIENT4, 9]
    one = confine(host, transport, f"name: t\n{rule(name)}", *steps, *again, "wait")
    one.lines(3)
    host.graft("ep", "set", name, f"{HOST4}:dynamic")
    one.resume()
    return one.lines(4)[1:]


@pytest.mark.parametrize(("transport", "kind"), [("swap", STREAM), ("direct", STREAM), ("direct", DGRAM)])
def test_a_port_that_an_endpoint_has_no_more_is_left_from_no_more(
    host: Host, confine: Confine, transport: str, kind: int
) -> None:
    assert keeps_port(host, confine, transport, kind)[-1].split()[1] in ("EPERM", "EACCES")


@pytest.mark.parametrize(("transport", "kind"), [("swap", STREAM), ("direct", STREAM), ("direct", DGRAM)])
def test_control_where_nobody_looks_at_the_port_it_is(
    without: Without, confine: Confine, transport: str, kind: int
) -> None:
    assert keeps_port(without("lent"), confine, transport, kind)[-1].split()[1] in ("ok", "ECONNREFUSED")


def test_a_connected_datagram_socket_sends_on_where_its_rule_stays(
    host: Host, confine: Confine, tmp_path: Path
) -> None:
    name = lender(host, "another endpoint")
    with datagrams(host) as far:
        steps = ["make", INET, DGRAM, 0, "connect", CLIENT4, far.getsockname()[1], "wait", "send", "-", "-", "wait"]
        one = confine(host, "direct", f"name: t\n{rule(name)}", *steps)
        one.lines(2)
        more = f"egress: [{{to: '{CLIENT4}', endpoint: {name}}}, {{to: 192.0.2.1, endpoint: {name}}}]\n"
        apply(host, one, tmp_path, f"name: t\n{more}default: deny\n")
        one.resume()
        assert came(far, 10) == OTHER4


# ---- a mark, by a 32-bit call, on a connection that is established ---------------------------------------------------

MARK: list[Word] = [SOL_SOCKET, SO_MARK, struct.pack("=I", 7).hex()]
WITH_NET_RAW: tuple[Word, ...] = (
    "setpriv",
    "--reuid=65534",
    "--regid=65534",
    "--clear-groups",
    "--inh-caps=-all,+net_raw",
    "--ambient-caps=-all,+net_raw",
    "--bounding-set=-all,+net_raw",
    "--",
)


@contextlib.contextmanager
def with_net_raw(host: Host, folder: Path, transport: str, text: str, *command: Word) -> Iterator[Program]:
    """A program of nobody's that has CAP_NET_RAW, under a policy."""
    (folder / "raw.yaml").write_text(text)
    words = [*WITH_NET_RAW, *command]
    if transport == "swap":
        program = host.start("--policy", folder / "raw.yaml", "--", *words, talk=True)
        yield program
        return
    with new_cgroup("net-raw") as path:
        host.graft("attach", "--cgroup", path, "--policy", folder / "raw.yaml")
        program = host.start_command([*in_cgroup(path), *host.netns.command(*words)], talk=True)
        yield program
        program.stop()
        host.remove_at(path)


def received(sock: socket.socket) -> bytes:
    """What comes within a second; nothing where nothing does."""
    sock.settimeout(PATIENCE)
    with contextlib.suppress(TimeoutError):
        return sock.recv(100)
    return b""


def heard_with_a_mark(host: Host, programs: Programs, folder: Path, transport: str) -> bytes:
    """What comes on a connection that is marked when it is established."""
    text = f"name: t\nendpoints: {{out: '0.0.0.0:dynamic'}}\n{rule('out')}"
    with contextlib.closing(host.client.listener()) as far:
        steps = ["make", INET, STREAM, 0, "connect", CLIENT4, far.getsockname()[1], "bytes", *MARK, "bytes32", *MARK]
        command = [programs["calls"], *steps, "send", "-", "-", "wait"]
        with with_net_raw(host, folder, transport, text, *command) as program:
            assert lines_of(program, 5)[1:] == ["connect ok", "bytes EPERM", "bytes32 ok", "send ok"]
            with far.accept()[0] as near:
                return received(near)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_connection_that_a_program_has_marked_says_nothing_more(
    host: Host, programs: Programs, tmp_path: Path, transport: str
) -> None:
    assert heard_with_a_mark(host, programs, tmp_path, transport) == b""


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_control_where_nobody_looks_at_the_mark_it_is_heard(
    without: Without, programs: Programs, tmp_path: Path, transport: str
) -> None:
    assert heard_with_a_mark(without("mark"), programs, tmp_path, transport) == b"hello"


@contextlib.contextmanager
def marked_by_the_host(host: Host, folder: Path, accept: bool) -> Iterator[None]:
    """The host marks what comes from the client, and has the kernel answer with that mark, or not."""
    (folder / "mark.nft").write_text(
        "table ip sixth {\n chain c {\n  type filter hook prerouting priority -150;\n"
        f"  ip saddr {CLIENT4} meta mark set 7\n }}\n}}\n"
    )
    host.netns.run("nft", "-f", folder / "mark.nft")
    host.netns.run("sysctl", "-qw", f"net.ipv4.tcp_fwmark_accept={int(accept)}")
    try:
        yield
    finally:
        host.netns.run("sysctl", "-qw", "net.ipv4.tcp_fwmark_accept=0")
        host.netns.run("nft", "delete", "table", "ip", "sixth")


@pytest.mark.parametrize("accept", [True, False])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_accepted_connection_has_the_mark_that_the_host_gave_it(
    host: Host, programs: Programs, tmp_path: Path, transport: str, accept: bool
) -> None:
    """It is heard with that; one that the host does not mark is not heard when its program has marked it."""
    port = host.port()
    text = f"name: t\nendpoints: {{web: '0.0.0.0:{port}'}}\ningress: [{{bind: '*:80', endpoint: web}}]\ndefault: deny\n"
    steps: list[Word] = ["make", INET, STREAM, 0, "bind", "0.0.0.0", 80, "listen", "accept", "send", "-", "-", "wait"]
    steps += ["bytes32", *MARK, "send", "-", "-", "wait"]
    with (
        marked_by_the_host(host, tmp_path, accept),
        with_net_raw(host, tmp_path, transport, text, programs["calls"], *steps) as program,
    ):
        assert lines_of(program, 3)[-1] == "listen ok"
        with host.client.connected(HOST4, port) as client:
            assert received(client) == b"hello"
            lines_of(program, 5)
            program.tell("\n")
            assert lines_of(program, 7)[-2:] == ["bytes32 ok", "send ok"]
            assert received(client) == (b"hello" if accept else b"")


# ---- what somebody outside was handed of a container's, when that has ended ------------------------------------------

needs_destroy = pytest.mark.skipif(not sockets.can_destroy(), reason="the kernel would block other requests (6.9)")
WEB = "name: t\nendpoints: {{web: '0.0.0.0:{}'}}\ningress: [{{bind: '*:80', endpoint: web}}]\ndefault: deny\n"
LISTENER: list[Word] = ["make", INET, STREAM, 0, "option", SOL_SOCKET, SO_REUSEADDR]
LISTENER += ["bind", "0.0.0.0", 80, "listen", "wait"]


def port_after(host: Host, confine: Confine, way: str, defence: str = "") -> str:
    """What the next container says of the bind to its endpoint, when somebody has the listener of one that ended. (Both
    have set SO_REUSEADDR, as servers do.)
    """
    text = WEB.format(host.port())
    one = confine(host, "swap", text, *LISTENER, defence=defence)
    assert one.lines(4)[-1] == "listen ok"
    with held_socket(one):
        if way == "exits":
            one.resume()
            one.program.process.wait(10 * PATIENCE)
        else:
            supervisor = host.supervisor(one.program)
            one.program.process.kill()
            until("the supervisor has ended it", lambda: not Path(f"/proc/{supervisor}").exists())
        return confine(host, "swap", text, *LISTENER, defence=defence).lines(3)[2]


@needs_destroy
@pytest.mark.parametrize("way", ["exits", "is killed"])
def test_a_listener_of_a_container_that_has_ended_does_not_keep_its_port(
    host: Host, confine: Confine, way: str
) -> None:
    assert port_after(host, confine, way) == "bind ok"


@pytest.mark.parametrize("way", ["exits", "is killed"])
def test_control_where_nobody_looks_for_it_it_does(host: Host, confine: Confine, way: str) -> None:
    assert port_after(host, confine, way, "leftovers") == "bind EADDRINUSE"


def remove_as_the_shim(host: Host, container: Container) -> None:
    cgroup.kill(container.cgroup_path)
    shim._remove_container(host.installation, container)


def remove_as_the_hook(host: Host, container: Container) -> None:
    cgroup.kill(container.cgroup_path)
    cgroup.remove(container.cgroup_path)
    run([sys.executable, "-m", "graft.oci.hook", "reap"], environment=host.environment, status=0)


@needs_destroy
@pytest.mark.parametrize(("transport", "remove"), [("swap", remove_as_the_shim), ("direct", remove_as_the_hook)])
def test_nor_does_one_of_a_container_of_an_engines(
    host: Host, confine: Confine, transport: str, remove: Callable[[Host, Container], None]
) -> None:
    port = host.port()
    one = confine(host, transport, WEB.format(port), *LISTENER)
    assert one.lines(4)[-1] == "listen ok"
    found = host.installation.containers.at(one.cgroup)
    assert found is not None
    with held_socket(one):
        assert f":{port} " in host.netns.run("ss", "-Hltn")
        remove(host, found)
        assert f":{port} " not in host.netns.run("ss", "-Hltn")


def listens_after_down(net: tuple[Netns, Netns], programs: Programs, folder: Path, defence: str) -> bool:
    """Whether the listener of a container that has ended is one still when Graft has been taken down."""
    with installation(folder, *net, f"sixth-{bool(defence)}") as host, ExitStack() as stack:
        run([GRAFT, "up"], environment=host.environment, status=0)
        port = host.port()
        (folder / "web.yaml").write_text(WEB.format(port))
        # A container that ends without a look for what is left.
        words: list[Word] = ["run", "--policy", folder / "web.yaml", "--", programs["calls"], *LISTENER]
        program = host.start_command([*graft_without("leftovers"), *words], talk=True)
        assert lines_of(program, 4)[-1] == "listen ok"
        one = Confined(host, program, Path(host.container(program).cgroup))
        stack.enter_context(held_socket(one))
        program.tell("\n")
        program.process.wait(10 * PATIENCE)
        assert f":{port} " in host.netns.run("ss", "-Hltn")
        run([*graft_without(defence), "down"], environment=host.environment, status=0)
        return f":{port} " in host.netns.run("ss", "-Hltn")


@needs_destroy
def test_a_listener_that_outlived_its_container_does_not_outlive_the_installation(
    net: tuple[Netns, Netns], programs: Programs, tmp_path: Path
) -> None:
    assert not listens_after_down(net, programs, tmp_path, "")


def test_control_where_nobody_looks_for_what_is_left_it_does(
    net: tuple[Netns, Netns], programs: Programs, tmp_path: Path
) -> None:
    assert listens_after_down(net, programs, tmp_path, "leftovers")
