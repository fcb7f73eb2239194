"""Real containers of docker and podman in the host's network, attached by name and by id."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from graft.kernel import cgroup
from tests.support import hostnet
from tests.support.hostnet import Engine
from tests.support.installation import Host
from tests.support.namespaces import HOST4, Netns
from tests.support.wait import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.fixture(scope="module", params=["docker", "podman"])
def _engine(request: pytest.FixtureRequest, net: tuple[Netns, Netns]) -> Iterator[Engine]:
    make = {"docker": hostnet.docker, "podman": hostnet.podman}[request.param]
    folder = Path(tempfile.mkdtemp(prefix="graft-test-"))  # short: a socket's path has 107 bytes
    with make(net[0], folder) as engine:
        yield engine
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def engine(_engine: Engine, host: Host, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """An engine in the host's namespace, which Graft's own commands find too."""
    for name, value in _engine.environment.items():
        monkeypatch.setitem(os.environ, name, value)
    yield _engine
    _engine.remove_all()
    _engine.started.clear()


def fetched(host: Host, port: int) -> str:
    return host.client.run("curl", "-s", "--max-time", "5", f"http://{HOST4}:{port}/")


def serve(engine: Engine, name: str, says: str) -> None:
    """A web server on port 80 of a container."""
    box = "/bin/busybox"
    engine("exec", name, box, "sh", "-c", f"{box} mkdir -p /tmp/{name} && echo {says} > /tmp/{name}/index.html")
    engine("exec", "-d", name, box, "httpd", "-f", "-p", "80", "-h", f"/tmp/{name}")


def test_two_host_network_containers_on_one_port_are_served_on_two_endpoints(host: Host, engine: Engine) -> None:
    ports = {name: host.port() for name in ("one", "two")}
    for name, port in ports.items():
        number = engine.start(name, "--network", "host")
        rule = f"0.0.0.0:80={host.endpoint(f'0.0.0.0:{port}')}"
        said = host.graft("attach", "--cgroup", name if name == "one" else number[:12], "-i", rule).stdout
        assert said.startswith(f"{name}: {engine.name}, ") and number in said
        assert "transport direct" in said
        serve(engine, name, f"this-is-{name}")
    for name, port in ports.items():
        until("it listens", lambda port=port: host.netns.listens(port))  # type: ignore[misc]
        assert fetched(host, port).strip() == f"this-is-{name}"
    assert not host.netns.listens(80)
    assert cgroup.processes(host.cgroup) == []
    seen = {one["name"]: one for one in json.loads(host.graft("ps", "--json").stdout)}
    assert {name: seen[name]["engine"] for name in ports} == dict.fromkeys(ports, engine.name)
    assert [one["local"].rsplit(":", 1)[1] for one in seen["one"]["sockets"]] == [str(ports["one"])]


def test_a_container_that_is_removed_takes_its_rules_with_it(host: Host, engine: Engine) -> None:
    engine.start("gone", "--network", "host")
    host.graft("attach", "--cgroup", f"{engine.name}:gone", "-i", f"*:80={host.endpoint('0.0.0.0:dynamic')}")
    assert [one["name"] for one in json.loads(host.graft("ps", "--json").stdout)] == ["gone"]
    engine("rm", "-f", "gone")
    assert json.loads(host.graft("ps", "--json").stdout) == []
    assert list(host.maps.ingress.keys()) == []


def test_a_container_that_does_not_run_is_not_attached(host: Host, engine: Engine) -> None:
    engine.start("stopped", "--network", "host")
    engine("stop", "-t", "0", "stopped")
    said = host.graft("attach", "--cgroup", f"{engine.name}:stopped", "-i", "*:80=x", status=3).stderr
    assert "stopped' is not running" in said


def test_a_container_without_the_hosts_network_is_no_direct_one(host: Host, engine: Engine) -> None:
    engine.start("alone", "--network", "none")
    said = host.graft("attach", "--cgroup", "alone", "--transport", "direct", "-i", "*:80=x", status=7).stderr
    assert "direct is impossible: it is in a network namespace of its own" in said
