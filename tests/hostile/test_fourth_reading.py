"""What a fourth reading found: where datagrams really go, what hides behind a header, what an image says."""

from __future__ import annotations

import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from graft.errors import RefusedError
from graft.model.settings import Settings
from graft.oci import request
from graft.oci.options import RuntimeOptions
from graft.oci.request import Request, Source
from tests.hostile.conftest import TRANSPORTS, Confine, Without
from tests.hostile.test_afterwards import SOL_SOCKET, apply, reaches
from tests.hostile.test_datagrams import came, datagrams
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, CLIENT6, HOST4
from tests.support.plain import plain
from tests.support.relayed import published
from tests.support.wait import until

pytestmark = pytest.mark.e2e

OTHER4 = "10.98.0.75"
INET, INET6, STREAM, DGRAM = 2, 10, 1, 2
IPV6_RTHDR, SO_BINDTODEVICE, IP_LOCAL_PORT_RANGE = 57, 25, 51
SOL_UDP, UDP_CORK = socket.IPPROTO_UDP, 1

# ---- IPv4 sends of a connected socket go where its last datagram went that one send began and another completed ----


def policy(*to: str) -> str:
    rules = ", ".join(f"{{to: {one}, endpoint: out}}" for one in to)
    return f"name: t\nendpoints: {{out: '0.0.0.0:dynamic'}}\negress: [{rules}]\ndefault: deny\n"


def strays(host: Host, confine: Confine, folder: Path, port: int) -> list[str | None]:
    """Who sends to a destination before, and after its rule is gone, by a socket that is connected to ``port`` of
    another one: the kernel sends to where the last datagram went that one send began and another completed.
    """
    with host.client.with_address(f"{OTHER4}/24"), datagrams(host, OTHER4) as gone:
        steps = ["make", INET, DGRAM, 0, "connect", CLIENT4, port]
        steps += ["option", SOL_UDP, UDP_CORK, "send", OTHER4, gone.getsockname()[1]]
        steps += ["bytes", SOL_UDP, UDP_CORK, "00000000", "wait", "send", "-", "-", "wait"]
        one = confine(host, "direct", policy(CLIENT4, OTHER4), *steps)
        assert one.lines(5)[1:] == ["connect ok", "option ok", "send ok", "bytes ok"]
        before = came(gone, 10)
        apply(host, one, folder, policy(CLIENT4))
        one.resume()
        one.lines(6)
        return [before, came(gone)]


def test_a_connected_socket_sends_to_no_destination_that_lost_its_rule(
    host: Host, confine: Confine, tmp_path: Path
) -> None:
    with datagrams(host) as peer:
        before, after = strays(host, confine, tmp_path, peer.getsockname()[1])
    assert before is not None
    assert after is None


def test_control_where_only_its_peer_is_judged_it_does(without: Without, confine: Confine, tmp_path: Path) -> None:
    undefended = without("in the datagram")
    with datagrams(undefended) as peer:
        assert None not in strays(undefended, confine, tmp_path, peer.getsockname()[1])


# ---- a routing header behind the one that the kernel itself adds to long segments (BIG TCP) --------------------------

SEGMENT6 = "fd98::75"
LONG = 190_000
ETH_P_IPV6, HOP_BY_HOP, ROUTING, TCP = 0x86DD, 0, 43, 6


@contextmanager
def long_segments(host: Host) -> Iterator[None]:
    """The operator lets the host's link have segments that are longer than 64 KiB."""
    for netns in (host.netns, host.client):
        netns.run("ip", "link", "set", "eth0", "gso_max_size", LONG, "gro_max_size", LONG)
    try:
        yield
    finally:
        for netns in (host.netns, host.client):
            netns.run("ip", "link", "set", "eth0", "gso_max_size", 65536, "gro_max_size", 65536)


class Wire:
    """The client's end of the wire: counts the IPv6 packets from the host, by destination and first headers."""

    def __init__(self, host: Host) -> None:
        self.seen: Counter[tuple[str, tuple[int, ...]]] = Counter()
        with host.client.inside():
            self._sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_IPV6))
        self._sock.bind(("eth0", ETH_P_IPV6))
        self._sock.settimeout(0.2)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._count)
        self._thread.start()

    def _count(self) -> None:
        while not self._stopped.is_set():
            try:
                packet = self._sock.recv(48)
            except TimeoutError:
                continue
            headers = (packet[6], packet[40]) if packet[6] == HOP_BY_HOP else (packet[6],)
            self.seen[socket.inet_ntop(socket.AF_INET6, packet[24:40]), headers] += 1

    def close(self) -> None:
        self._stopped.set()
        self._thread.join()
        self._sock.close()


def drain(listener: socket.socket) -> None:
    with listener.accept()[0] as connection:
        while connection.recv(1 << 20):
            pass


def packets(host: Host, confine: Confine) -> Counter[tuple[str, tuple[int, ...]]]:
    """What a connection sends before and after a 32-bit call gave it a route by another address (a segment list)."""
    route = bytes([0, 4, 4, 1, 1, 0, 0, 0]) + b"".join(
        socket.inet_pton(socket.AF_INET6, a) for a in (CLIENT6, SEGMENT6)
    )
    text = f"name: t\nendpoints: {{out: '[::]:dynamic'}}\negress: [{{to: '{CLIENT6}', endpoint: out}}]\ndefault: deny\n"
    with (
        host.client.with_address(f"{SEGMENT6}/64"),
        long_segments(host),
        closing(host.client.listener(CLIENT6)) as far,
        closing(Wire(host)) as wire,
    ):
        threading.Thread(target=drain, args=(far,), daemon=True).start()
        steps = ["make", INET6, STREAM, 0, "connect", CLIENT6, far.getsockname()[1], "much"]
        one = confine(host, "swap", text, *steps, "bytes32", 41, IPV6_RTHDR, route.hex(), "much", "wait")
        assert one.lines(5)[1:] == ["connect ok", "much ok", "bytes32 ok", "much ok"]
    return wire.seen


def test_no_routing_header_hides_behind_the_kernels_own(host: Host, confine: Confine) -> None:
    seen = packets(host, confine)
    assert seen[CLIENT6, (HOP_BY_HOP, TCP)], "long segments without one go"
    assert SEGMENT6 not in {to for to, headers in seen if headers[-1] in (ROUTING, TCP)}


def test_control_where_nobody_looks_behind_it_one_does(without: Without, confine: Confine) -> None:
    host = without("big tcp")  # where the machine is busy, segments are short at times
    assert any(packets(host, confine)[SEGMENT6, (HOP_BY_HOP, ROUTING)] for _ in range(10))


# ---- a server that a 32-bit call ties to an interface, when the other hooks have looked already ----------------------


def serves_tied(host: Host, confine: Confine, transport: str) -> list[bool]:
    """Whether a client reaches a listener before, and after, it is tied to the interface by which the client comes."""
    port = host.port()
    text = f"name: t\nendpoints: {{web: '0.0.0.0:{port}'}}\ningress: [{{bind: '*:80', endpoint: web}}]\ndefault: deny\n"
    tie = [SOL_SOCKET, SO_BINDTODEVICE, b"eth0".hex()]
    steps = ["make", INET, STREAM, 0, "bind", "0.0.0.0", 80, "listen", "wait", "bytes32", *tie, "wait"]
    one = confine(host, transport, text, *steps)
    one.lines(3)
    before = reaches(host, HOST4, port)
    one.resume()
    assert one.lines(4)[-1] == "bytes32 ok"
    return [before, reaches(host, HOST4, port)]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_listener_that_is_tied_to_an_interface_afterwards_hears_nobody(
    host: Host, confine: Confine, transport: str
) -> None:
    assert serves_tied(host, confine, transport) == [True, False]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_control_where_nobody_looks_at_that_it_hears_its_clients(
    without: Without, confine: Confine, transport: str
) -> None:
    assert serves_tied(without("options"), confine, transport) == [True, True]


# ---- a client's address that is shown for another connection (transport splice) --------------------------------------


def test_a_neighbour_does_not_pass_for_a_client_that_waits_at_another_listener(host: Host) -> None:
    """By a connection from the address and port that graftd dials from: the two need only differ in where they go."""
    with plain(host) as container, ExitStack() as stack:
        full = stack.enter_context(container.tcp())
        full.bind(("0.0.0.0", 80))
        full.listen(0)
        victim = stack.enter_context(container.listener(port=81))
        port = published(container)
        waiting = [stack.enter_context(container.tcp()) for _ in range(3)]
        for sock in waiting:
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", 80))
        own = {sock.getsockname()[1] for sock in waiting}
        stack.enter_context(host.client.connected(HOST4, port))

        def dialled_from() -> set[int]:
            listed = container.netns.run("ss", "-Htan", "state", "syn-sent")
            return {int(one) for one in re.findall(r"127\.0\.0\.1:(\d+) +127\.0\.0\.1:80\b", listed)} - own

        until("graftd dials", lambda: bool(dialled_from()))
        (number,) = dialled_from()
        neighbour = stack.enter_context(container.tcp())
        neighbour.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, struct.pack("=HH", number, number))
        neighbour.connect(("127.0.0.1", 81))
        accepted, peer = victim.accept()
        stack.enter_context(accepted)
        assert peer == neighbour.getsockname() == ("127.0.0.1", number)


# ---- an image's annotations replace those by which podman is known, and its own look like the operator's then --------


def configuration(cgroup: str) -> dict[str, Any]:
    """What podman writes for an image with two annotations of its own (seen with 4.3, which adds `io.podman.*`)."""
    asked = {"io.container.manager": "docker", "graft.policy": "secret", "graft.allow-net-admin": "true"}
    sets = {"bounding": ["CAP_NET_ADMIN"]}
    return {"annotations": asked, "linux": {"cgroupsPath": cgroup}, "process": {"capabilities": sets}}


PODMANS = [
    "machine.slice:libpod:0e7ce416218d",
    "/libpod_parent/libpod-0e7ce416218d",
    "/a/b/libpod-payload-0e7ce416218d",
]
DOCKERS = "system.slice:docker:0e7ce416218d"


def choose(folder: Path, cgroup: str) -> str:
    (folder / "policies").mkdir()
    (folder / "policies/secret.yaml").write_text("name: secret\n")
    settings = Settings.from_environment({"GRAFT_STATE_DIR": str(folder)})
    asked = Request(Source.ANNOTATION, "secret")
    return request.choose_policy(settings, asked, configuration(cgroup), RuntimeOptions(), {}).name


@pytest.mark.parametrize("cgroup", PODMANS)
def test_an_image_of_podmans_does_not_pass_for_another_engines(tmp_path: Path, cgroup: str) -> None:
    with pytest.raises(RefusedError, match="is not open"):
        choose(tmp_path, cgroup)
    with pytest.raises(RefusedError, match="CAP_NET_ADMIN"):
        request.check_capabilities(configuration(cgroup), RuntimeOptions(), own_user_namespace=False)


def test_control_an_annotation_of_another_engines_is_the_operators(tmp_path: Path) -> None:
    assert choose(tmp_path, DOCKERS) == "secret"
    request.check_capabilities(configuration(DOCKERS), RuntimeOptions(), own_user_namespace=False)
