"""`graft metrics`: scraped by a real Prometheus, checked by promtool, and closed to everybody else."""

from __future__ import annotations

import re
import socket
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from graft.splice import control
from tests.e2e.conftest import MakeCgroup, StartPuppet, WritePolicy
from tests.support.installation import GRAFT, Host
from tests.support.namespaces import CLIENT4, HOST4, Netns
from tests.support.plain import Plain, plain
from tests.support.policies import DENY_ALL
from tests.support.program import Program
from tests.support.prometheus import Prometheus, prometheus
from tests.support.relayed import pair, published, talk
from tests.support.shell import run
from tests.support.units import confined_as
from tests.support.wait import PATIENCE, until

pytestmark = pytest.mark.e2e

UNIT = Path(__file__).parents[2] / "debian" / "graft.graft-metrics.service"
SCRAPE = 30  # seconds for something to be scraped


def serve(host: Host, listen: str, *options: str, before: Sequence[str] = ()) -> Program:
    """`graft metrics --listen` in the host's namespace, answering; ``before`` are words before the command."""
    program = host.start_command(host.netns.command(*before, GRAFT, "metrics", "--listen", listen, *options))
    program.until("it serves", lambda: "served at" in program.complained)
    return program


@pytest.fixture
def scraped(host: Host, tmp_path: Path) -> Iterator[Prometheus]:
    """A Prometheus that scrapes the installation."""
    port = host.port()
    serve(host, f"127.0.0.1:{port}")
    with prometheus(host, tmp_path, f"127.0.0.1:{port}") as made:
        yield made


def test_prometheus_gets_what_the_hooks_decide_and_which_sockets_there_are(
    host: Host, scraped: Prometheus, make_cgroup: MakeCgroup, start_puppet: StartPuppet, write_policy: WritePolicy
) -> None:
    path = make_cgroup()
    host.graft("attach", "--cgroup", path, "--policy", write_policy(DENY_ALL))
    program = start_puppet(path)
    name = host.ps_of(path)["name"]
    refused = f'graft_decisions_total{{container="{name}",decision="refused_bind"}}'
    until("the container is there", lambda: scraped.value(refused) == 0, SCRAPE)
    assert [program.bind("127.0.0.1", 81) for _ in range(3)] == ["EACCES"] * 3
    until("the refusals", lambda: scraped.value(refused) == 3, SCRAPE)
    assert scraped.value(f'graft_container_info{{container="{name}",transport="direct"}}') == 1
    assert scraped.value('graft_containers{transport="direct"}') == 1
    assert scraped.value("graft_sockets_complete") == 1
    assert scraped.target()["lastError"] == ""


def test_prometheus_gets_the_sockets_of_a_supervised_program(host: Host, scraped: Prometheus) -> None:
    port = host.port()
    listening = 'graft_sockets{protocol="tcp",state="listening"}'
    host.start("-i", f"0.0.0.0:80={host.endpoint(f'0.0.0.0:{port}')}", "--", "socat", "TCP-LISTEN:80,fork", "PIPE")
    until("its listener", lambda: scraped.value(listening) == 1, SCRAPE)
    assert scraped.value("graft_endpoints") == 1
    with host.client.connected(HOST4, port):
        until("its connection", lambda: scraped.value('graft_sockets{state="established"}') == 1, SCRAPE)


@pytest.mark.parametrize("relay", ["splice", "kernel"])
def test_prometheus_gets_what_graftd_relays(host: Host, scraped: Prometheus, relay: str) -> None:
    with plain(host, relay) as container, container.listener() as listener:
        port = published(container)
        client, accepted = pair(container, listener, port)
        with client, accepted:
            talk(client, accepted)
            until("to the container", lambda: scraped.value('graft_relay_bytes_total{direction="in"}') == 64, SCRAPE)
            assert scraped.value('graft_relay_bytes_total{direction="out"}') == 48
            assert scraped.value("graft_relay_open_connections") == 1
        assert scraped.value('graft_relay_connections_total{direction="in"}') == 1
        until("it is closed", lambda: scraped.value("graft_relay_open_connections") == 0, SCRAPE)
        assert scraped.value('graft_relay_bytes_total{direction="in"}') == 64
        with host.client.listener(CLIENT4) as world, container.tcp() as program:
            program.connect(world.getsockname())
            world.accept()[0].close()
        until("out", lambda: scraped.value('graft_relay_connections_total{direction="out"}') == 1, SCRAPE)
        started = scraped.value("graft_graftd_start_time_seconds")
        assert started is not None and 0 < time.time() - started < 300 * PATIENCE


def test_promtool_finds_nothing_wrong(host: Host, relayed_container: Plain) -> None:
    published(relayed_container)
    host.start("-i", f"0.0.0.0:80={host.endpoint('0.0.0.0:dynamic')}", "--", "socat", "TCP-LISTEN:80,fork", "PIPE")
    until("a call", lambda: re.search(r"^graft_call_seconds_count{.*} [^0]", host.graft("metrics").stdout, re.M))
    text = host.graft("metrics").stdout
    assert "graft_relay_bytes_total{" in text and "graft_decisions_total{" in text
    checked = run(["/usr/bin/promtool", "check", "metrics"], stdin=text)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


@pytest.fixture
def relayed_container(host: Host) -> Iterator[Plain]:
    """A container that runs without Graft, to be relayed."""
    with plain(host) as made:
        yield made


def test_a_host_without_graft_has_metrics_and_stays_without(bare_host: Host) -> None:
    assert "\ngraft_up 0.0\n" in bare_host.graft("metrics").stdout
    assert not bare_host.settings.pin_dir.exists()


def get(path: Path, request: bytes) -> bytes:
    """What is answered at a unix socket."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(30 * PATIENCE)
        sock.connect(str(path))
        sock.sendall(request)
        parts = []
        while part := sock.recv(65536):
            parts.append(part)
    return b"".join(parts)


def test_a_unix_socket_is_roots_only_and_goes_with_its_process(host: Host, tmp_path: Path) -> None:
    path = tmp_path / "metrics.sock"
    program = serve(host, f"unix:{path}")
    status = path.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o600, 0)
    answer = get(path, b"GET /metrics HTTP/1.1\r\nHost: graft\r\n\r\n")
    assert answer.startswith(b"HTTP/1.0 200 OK\r\n") and b"\ngraft_up 1.0\n" in answer
    again = host.graft("metrics", "--listen", f"unix:{path}", status=4)
    assert "another process listens there" in again.stderr
    assert program.stop() == 0
    assert not path.exists()


def test_a_unix_socket_has_the_owner_and_the_mode_that_were_asked_for(host: Host, tmp_path: Path) -> None:
    path = tmp_path / "metrics.sock"
    serve(host, f"unix:{path}", "--owner", "nobody:nogroup", "--mode", "0660")
    status = path.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o660, 65534, 65534)


def test_the_capabilities_of_the_packages_unit_are_enough(
    host: Host, relayed_container: Plain, netns: Callable[[], Netns], tmp_path: Path
) -> None:
    published(relayed_container)
    host.endpoint("0.0.0.0:8080", netns=str(netns().path))
    path = tmp_path / "metrics.sock"
    program = serve(host, f"unix:{path}", "--owner", "nobody", before=confined_as(UNIT))
    text = get(path, b"GET /metrics HTTP/1.1\r\n\r\n").decode()
    assert "\ngraft_sockets_complete 1.0\n" in text and "\ngraft_graftd_up 1.0\n" in text
    assert 'graft_relay_bytes_total{container="' in text
    assert program.complained.count("\n") == 1


def test_slow_and_strange_clients_delay_nobody(host: Host, tmp_path: Path) -> None:
    path = tmp_path / "metrics.sock"
    serve(host, f"unix:{path}")
    silent = [socket.socket(socket.AF_UNIX) for _ in range(20)]
    for sock in silent:
        sock.connect(str(path))
        sock.send(b"GET /metrics HTTP/1.1\r\n")
    assert get(path, b"x" * 20000 + b"\r\n\r\n") == b""
    assert b"501" in get(path, b"DELETE /metrics HTTP/1.1\r\n\r\n")
    assert b" 200 " in get(path, b"GET /metrics HTTP/1.1\r\n\r\n")
    silent[0].settimeout(30 * PATIENCE)
    assert silent[0].recv(10) == b""  # it was hung up on
    for sock in silent:
        sock.close()


@pytest.mark.parametrize("listen", ["0.0.0.0:9469", "[::]:9469", f"{CLIENT4}:9469"])
def test_any_other_address_is_refused_in_one_line(host: Host, listen: str) -> None:
    refused = host.graft("metrics", "--listen", listen, status=2).stderr
    assert re.fullmatch(r"graft: --listen: .* is not a loopback address: .*\n", refused)


def test_graftd_answers_for_all_containers_at_once(host: Host, relayed_container: Plain) -> None:
    published(relayed_container)
    asked = control.ask(host.settings, {"do": "traffic"})
    assert asked is not None
    assert set(asked["containers"]) == {str(relayed_container.container.id)}
