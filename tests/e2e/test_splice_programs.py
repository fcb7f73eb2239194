"""Real programs in containers that ran before Graft: nginx in podman, redis, PostgreSQL."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from graft.kernel import cgroup
from tests.support.engines import Engine
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, HOST4
from tests.support.plain import Plain
from tests.support.program import Program
from tests.support.shell import Word, output
from tests.support.wait import until

pytestmark = pytest.mark.e2e


@pytest.fixture
def nginx(host: Host, podman: Engine) -> Iterator[Path]:
    """nginx in a podman container that was started without Graft and has no network; gives its cgroup."""
    plain_podman = podman.without_graft()
    plain_podman.started("plain", [], "nginx", "-c", "/etc/nginx.conf")
    pid = int(plain_podman("inspect", "--format", "{{.State.Pid}}", "plain").stdout)
    path = cgroup.of_process(pid)
    yield path
    host.graft("detach", "--cgroup", path, status=None)
    plain_podman.remove("plain")


def load(host: Host, port: int) -> subprocess.Popen[str]:
    """Requests for three seconds on eight connections, fewer than the 1000 after which nginx ends one."""
    command = host.client.command("hey", "-c", "8", "-q", "100", "-z", "3s", f"http://{HOST4}:{port}/")
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def answers(said: str) -> int:
    found = re.search(r"\[200\]\s+(\d+) responses", said)
    assert found, said
    return int(found[1])


def test_nginx_of_podman_is_published_and_sees_its_clients_own_address(host: Host, nginx: Path, relay: str) -> None:
    port = host.port()
    rule = f"0.0.0.0:80={host.endpoint(f'0.0.0.0:{port}')}"
    said = host.graft("attach", "--cgroup", nginx, "--relay", relay, "-i", rule).stdout
    assert "transport splice" in said
    assert f"0.0.0.0:{port} is relayed to its listener 0.0.0.0:80" in said
    assert host.client.fetch(HOST4, port).strip() == f"port 80, from {CLIENT4}"


def test_nginx_under_load_keeps_every_connection_while_its_endpoint_moves(host: Host, nginx: Path, relay: str) -> None:
    first, second = host.port(), host.port()
    endpoint = host.endpoint(f"0.0.0.0:{first}")
    host.graft("attach", "--cgroup", nginx, "--relay", relay, "-i", f"0.0.0.0:80={endpoint}")
    with load(host, first) as running:
        until("connected", lambda: host.netns.sockets(f"sport = :{first}").count("ESTAB") >= 8)
        host.graft("ep", "set", endpoint, f"0.0.0.0:{second}")
        until("moved", lambda: host.netns.listens(second) and not host.netns.listens(first))
        assert host.client.fetch(HOST4, second).strip() == f"port 80, from {CLIENT4}"
        assert running.stdout is not None
        said = running.stdout.read()
    assert answers(said) > 100
    assert "Error distribution" not in said, said


def test_nginx_under_load_is_withdrawn_at_once_and_can_be_published_again(host: Host, nginx: Path, relay: str) -> None:
    port = host.port()
    endpoint = host.endpoint(f"0.0.0.0:{port}")
    host.graft("attach", "--cgroup", nginx, "--relay", relay, "-i", f"0.0.0.0:80={endpoint}")
    with load(host, port) as running:
        until("connected", lambda: host.netns.sockets(f"sport = :{port}").count("ESTAB") >= 8)
        host.graft("detach", "--cgroup", nginx)
        assert not host.netns.listens(port)
        host.graft("attach", "--cgroup", nginx, "--relay", relay, "-i", f"0.0.0.0:80={endpoint}")
        assert host.client.fetch(HOST4, port).strip() == f"port 80, from {CLIENT4}"
        assert running.stdout is not None
        running.stdout.read()


# ---- redis ----------------------------------------------------------------------------------------


def redis(folder: Path) -> list[Word]:
    words: list[Word] = ["redis-server", "--port", "6379", "--bind", "0.0.0.0", "--protected-mode", "no"]
    return [*words, "--save", "", "--dir", folder, "--daemonize", "no"]


def test_redis_in_a_container_is_reached_through_an_endpoint(container: Plain, host: Host, tmp_path: Path) -> None:
    container.start(*redis(tmp_path))
    port = host.port()
    container.attach("-i", f"0.0.0.0:6379={host.endpoint(f'0.0.0.0:{port}')}")
    container.until_published(port)
    client = ("redis-cli", "-h", HOST4, "-p", str(port))
    assert host.client.run(*client, "set", "key", "v" * 100_000).strip() == "OK"
    assert host.client.run(*client, "get", "key").strip() == "v" * 100_000
    assert f"addr={CLIENT4}:" in host.client.run(*client, "client", "list")
    benchmark = host.client.run(
        "redis-benchmark", *client[1:], "-q", "-n", "2000", "-c", "20", "-t", "set,get,lrange_100"
    )
    assert "requests per second" in benchmark


def test_a_container_reaches_a_redis_outside_from_its_endpoint(container: Plain, host: Host, tmp_path: Path) -> None:
    server = host.start_command(host.client.command(*redis(tmp_path)))
    server.until("redis listens", lambda: host.client.listens(6379))
    container.attach("-e", f"{CLIENT4}/32={host.endpoint('0.0.0.0:dynamic')}")
    client = container.command("redis-cli", "-h", CLIENT4)
    assert output([*client, "ping"]).strip() == "PONG"
    assert f"addr={HOST4}:" in output([*client, "client", "list"])


# ---- PostgreSQL -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(root: None) -> Iterator[Path]:
    """A PostgreSQL cluster that accepts only the test's client and host."""
    folder = Path(tempfile.mkdtemp(prefix="graft-postgres-"))
    shutil.chown(folder, "postgres", "postgres")
    output([*as_postgres(), postgres_program("initdb"), "-D", folder / "data", "--auth=reject", "--no-sync"])
    hba = folder / "data/pg_hba.conf"
    hba.write_text(f"host all all {CLIENT4}/32 trust\nhost all all {HOST4}/32 trust\n")
    yield folder
    shutil.rmtree(folder)


def as_postgres() -> list[Word]:
    return ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]


def postgres_program(name: str) -> Path:
    return max(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))


def postgres(folder: Path) -> list[Word]:
    words: list[Word] = [*as_postgres(), postgres_program("postgres"), "-D", folder / "data", "-k", folder]
    return [*words, "-c", "listen_addresses=*", "-c", "fsync=off"]


def until_ready(server: Program) -> None:
    server.until("PostgreSQL is ready", lambda: "ready to accept connections" in server.complained, timeout=30)


def queries(host: str, port: int) -> list[str]:
    """A query for the client's address and for a megabyte of text."""
    query = "select inet_client_addr(), md5(string_agg(n::text, '')) from generate_series(1, 150000) n"
    connection = f"host={host} port={port} user=postgres dbname=postgres sslmode=disable"
    return ["psql", "-At", "-c", query, "-c", "select repeat('x', 1000000)", connection]


EXPECTED_BYTES = 1_000_000


def test_postgresql_in_a_container_accepts_a_client_by_its_own_address(
    container: Plain, host: Host, cluster: Path
) -> None:
    until_ready(container.start(*postgres(cluster)))
    port = host.port()
    container.attach("-i", f"0.0.0.0:5432={host.endpoint(f'0.0.0.0:{port}')}")
    container.until_published(port)
    said = host.client.run(*queries(HOST4, port))
    assert said.startswith(f"{CLIENT4}|")
    assert said.count("x") == EXPECTED_BYTES


def test_a_container_reaches_a_postgresql_outside_from_its_endpoint(
    container: Plain, host: Host, cluster: Path
) -> None:
    until_ready(host.start_command(host.client.command(*postgres(cluster))))
    container.attach("-e", f"{CLIENT4}/32={host.endpoint('0.0.0.0:dynamic')}")
    said = output(container.command(*queries(CLIENT4, 5432)))
    assert said.startswith(f"{HOST4}|")
    assert said.count("x") == EXPECTED_BYTES
