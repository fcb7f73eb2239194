"""Programs of all kinds, unchanged: static, in Go, with threads, forking, with epoll, both ways."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.support.building import Programs
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, CLIENT6, HOST4, HOST6, Netns
from tests.support.wait import until

pytestmark = pytest.mark.e2e


@pytest.fixture(params=["swap", "born"])
def host(host: Host, request: pytest.FixtureRequest) -> Host:
    """The host, where every `graft run` has that transport."""
    return host.with_transport(request.param)


@contextmanager
def echo(netns: Netns, address: str = "0.0.0.0") -> Iterator[tuple[int, list[str]]]:
    """A server that sends a byte back to each connection: its port, and the addresses of its clients."""
    listener = netns.listener(address)
    peers: list[str] = []

    def answer(peer: socket.socket) -> None:
        with peer:
            peer.sendall(peer.recv(1))

    def serve() -> None:
        while True:
            try:
                peer, name = listener.accept()
            except OSError:
                return
            peers.append(name[0])
            answer(peer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1], peers
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)


def received(netns: Netns, address: str, port: int) -> str:
    """Everything that a server sends until it closes the connection."""
    with netns.connected(address, port) as sock:
        data = b""
        while more := sock.recv(4096):
            data += more
    return data.decode()


def out_rule(host: Host) -> list[str]:
    return ["-e", f"0.0.0.0/0={host.endpoint('0.0.0.0:dynamic')}"]


def in_rule(host: Host) -> tuple[list[str], int]:
    port = host.port()
    return ["-i", f"0.0.0.0:80={host.endpoint(f'0.0.0.0:{port}')}"], port


def test_a_static_server(host: Host, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("static\n")
    rules, port = in_rule(host)
    program = host.start(*rules, "--", "busybox", "httpd", "-f", "-p", "0.0.0.0:80", "-h", tmp_path)
    program.until("httpd", lambda: host.netns.listens(port))
    assert host.client.fetch(HOST4, port) == "static\n"


def test_a_static_client(host: Host, programs: Programs) -> None:
    static = programs.build("connecting", "-static")
    with echo(host.client) as (port, peers):
        assert host.run(out_rule(host), static, 1, 3, "blocking", CLIENT4, port).stdout == "3\n"
    assert peers == [HOST4] * 3


def test_a_server_written_in_go(host: Host, tmp_path: Path) -> None:
    (tmp_path / "hooks.json").write_text(
        json.dumps([{"id": "h", "execute-command": "/bin/true", "response-message": "go"}])
    )
    rules, port = in_rule(host)
    dual = ["-i", f"[::]:80={rules[1].split('=')[1]}"]
    program = host.start(
        *rules, *dual, "--", "webhook", "-hooks", tmp_path / "hooks.json", "-ip", "0.0.0.0", "-port", "80"
    )
    program.until("webhook", lambda: host.netns.listens(port))
    for _ in range(3):
        assert host.client.fetch(HOST4, port, "/hooks/h") == "go"


def test_a_client_written_in_go_makes_many_connections_at_once(host: Host, tmp_path: Path) -> None:
    with host.client.inside():
        server = Web()
    try:
        result = host.run(
            out_rule(host), "hey", "-n", "400", "-c", "20", "-disable-keepalive", f"http://{CLIENT4}:{server.port}/"
        )
    finally:
        server.close()
    assert "[200]\t400 responses" in result.stdout, result.stdout
    assert "Error distribution" not in result.stdout
    assert set(server.peers) == {HOST4}


class Web:
    """A small web server in the namespace of the thread that makes it."""

    def __init__(self) -> None:
        self.peers = peers = []  # type: list[str]

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                peers.append(self.client_address[0])
                self.send_response(200)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"ok")

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 256

        self._server = Server(("0.0.0.0", 0), Handler)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)


@pytest.mark.parametrize("kind", ["blocking", "nonblocking"])
def test_threads_that_connect_at_the_same_time(host: Host, programs: Programs, kind: str) -> None:
    with echo(host.client) as (port, peers):
        result = host.run(out_rule(host), programs["connecting"], 8, 25, kind, CLIENT4, port)
    assert (result.stdout, result.stderr) == ("200\n", "")
    assert peers == [HOST4] * 200


def test_a_preforking_server_whose_workers_share_the_port(host: Host, programs: Programs) -> None:
    rules, port = in_rule(host)
    program = host.start(*rules, "--", programs["preforking"], 4, 80)
    program.until("all workers", lambda: program.said.count("ready") == 4)
    listeners = host.netns.run("ss", "-Hltn", f"sport = :{port}").splitlines()
    assert len(listeners) == 4
    assert {received(host.client, HOST4, port) for _ in range(80)} == {f"{worker}\n" for worker in range(4)}


def test_a_server_that_starts_children_with_vfork(host: Host, programs: Programs) -> None:
    rules, port = in_rule(host)
    program = host.start(*rules, "--", programs["vforking"], 80)
    program.says("ready")
    assert received(host.client, HOST4, port) == "hello\n"


def test_copies_and_epoll_registrations_made_before_bind_follow_the_socket(host: Host, programs: Programs) -> None:
    rules, port = in_rule(host)
    program = host.start(*rules, "--", programs["hanging"], 80)
    program.says("ready")
    for _ in range(2):
        assert received(host.client, HOST4, port) == ""
    program.until("two connections", lambda: program.said.count("accepted 1234567890abcdef") == 2)


def test_a_child_of_a_child_is_served_too(host: Host, programs: Programs) -> None:
    with echo(host.client) as (port, peers):
        command = f"(setsid sh -c '{programs['connecting']} 1 2 blocking {CLIENT4} {port}' & wait)"
        assert host.run(out_rule(host), "sh", "-c", command).stdout == "2\n"
    assert peers == [HOST4] * 2


def _check_transfer(result: dict[str, Any]) -> None:
    """All was sent; what is still on its way when iperf3 stops its clock is not counted as received."""
    assert result["end"]["sum_sent"]["bytes"] >= 20_000_000
    assert result["end"]["sum_received"]["bytes"] >= 1_000_000


@pytest.mark.parametrize("reverse", [[], ["-R"]])
def test_iperf3_as_a_server(host: Host, reverse: list[str]) -> None:
    port = host.port()
    rules = ["-i", f"*:5201={host.endpoint(f'0.0.0.0:{port}')}"]
    program = host.start(*rules, "--", "iperf3", "-s", "-1")
    program.until("iperf3", lambda: host.netns.listens(port))
    words = ["iperf3", "-c", HOST4, "-p", str(port), "-n", "20M", "-P", "2", "-J", *reverse]
    result = json.loads(host.client.run(*words))
    _check_transfer(result)
    assert program.wait() == 0


@pytest.mark.parametrize("reverse", [[], ["-R"]])
def test_iperf3_as_a_client(host: Host, reverse: list[str]) -> None:
    port = host.port()
    server = host.start_command(host.client.command("iperf3", "-s", "-1", "-p", port))
    server.until("iperf3", lambda: host.client.listens(port))
    words = ["iperf3", "-c", CLIENT4, "-p", str(port), "-n", "20M", "-P", "2", "-J", *reverse]
    result = json.loads(host.run(out_rule(host), *words).stdout)
    _check_transfer(result)
    assert result["start"]["connected"][0]["remote_host"] == CLIENT4


def test_a_connection_over_ipv6_leaves_from_its_endpoint(host: Host, programs: Programs) -> None:
    rules = ["-e", f"::/0={host.endpoint(f'[{HOST6}]:dynamic')}"]
    with echo(host.client, "::") as (port, peers):
        said = host.run(
            rules, programs["calls"], "socket", 6, "connect", CLIENT6, port, "peer", "name"
        ).stdout.splitlines()
        until("the connection", lambda: peers)
    assert said[:2] == ["connect ok", f"peer {CLIENT6} {port}"]
    assert said[2].startswith(f"name {HOST6} ")
    assert peers == [HOST6]


def test_a_connection_leaves_from_the_address_and_port_of_its_endpoint(host: Host, programs: Programs) -> None:
    source = host.port()
    rules = ["-e", f"0.0.0.0/0={host.endpoint(f'{HOST4}:{source}')}"]
    listener = host.client.listener()
    host.run(rules, programs["calls"], "socket", 4, "connect", CLIENT4, listener.getsockname()[1])
    peer, name = listener.accept()
    assert name == (HOST4, source)
    peer.close()
    listener.close()


def test_an_endpoint_in_another_namespace_serves_there(host: Host, programs: Programs, tmp_path: Path) -> None:
    port = host.port()
    rules = ["-i", f"0.0.0.0:80={host.endpoint(f'{CLIENT4}:{port}', netns=str(host.client.path))}"]
    program = host.start(*rules, "--", programs["vforking"], 80)
    program.says("ready")
    assert received(host.netns, CLIENT4, port) == "hello\n"
    assert host.client.listens(port) and not host.netns.listens(port)


def test_getsockname_of_an_accepted_connection_has_the_port_that_was_asked_for(host: Host) -> None:
    rules, port = in_rule(host)
    script = (
        "import socket\ns = socket.socket(); s.bind(('0.0.0.0', 80)); s.listen(); print(s.getsockname(), flush=True)\n"
        "c, peer = s.accept(); print(c.getsockname(), peer == c.getpeername(), peer[0], flush=True)\n"
    )
    program = host.start(*rules, "--", "/usr/bin/python3", "-ISc", script)
    program.says("('0.0.0.0', 80)")
    host.client.connected(HOST4, port).close()
    assert program.wait() == 0
    assert program.said.splitlines()[1] == f"('{HOST4}', 80) True {CLIENT4}"
