"""Real containers of docker and podman in the host's network, attached by name and by id."""

from __future__ import annotations

from functools import partial

import pytest

from graft.kernel import cgroup
from tests.support.engines import Engine
from tests.support.installation import Host
from tests.support.namespaces import HOST4
from tests.support.wait import until

pytestmark = pytest.mark.e2e

SLEEP = ("sleep", "600")


def serve(engine: Engine, name: str, says: str) -> None:
    """A web server on port 80 of a container."""
    engine("exec", name, "sh", "-c", f"mkdir -p /tmp/{name} && echo {says} > /tmp/{name}/index.html")
    engine("exec", "-d", name, "httpd", "-f", "-p", "80", "-h", f"/tmp/{name}")


def test_two_host_network_containers_on_one_port_are_served_on_two_endpoints(host: Host, plain_engine: Engine) -> None:
    engine, ports = plain_engine, {name: host.port() for name in ("one", "two")}
    for name, port in ports.items():
        number = engine.started(name, [], *SLEEP, network="host")
        rule = f"0.0.0.0:80={host.endpoint(f'0.0.0.0:{port}')}"
        said = host.graft("attach", "--cgroup", name if name == "one" else number[:12], "-i", rule).stdout
        assert said.startswith(f"{name}: {engine.name}, ") and number in said
        assert "transport direct" in said
        serve(engine, name, f"this-is-{name}")
    for name, port in ports.items():
        until("it listens", partial(host.netns.listens, port))
        assert host.client.fetch(HOST4, port).strip() == f"this-is-{name}"
    assert not host.netns.listens(80)
    assert not cgroup.processes(host.cgroup / "supervisors")
    seen = {one["name"]: one for one in host.ps()}
    assert {name: seen[name]["engine"] for name in ports} == dict.fromkeys(ports, engine.name)
    assert [one["local"].rsplit(":", 1)[1] for one in seen["one"]["sockets"]] == [str(ports["one"])]


def test_a_container_that_is_removed_takes_its_rules_with_it(host: Host, plain_engine: Engine) -> None:
    plain_engine.started("gone", [], *SLEEP, network="host")
    host.graft("attach", "--cgroup", f"{plain_engine.name}:gone", "-i", f"*:80={host.endpoint('0.0.0.0:dynamic')}")
    assert [one["name"] for one in host.ps()] == ["gone"]
    plain_engine.remove("gone")
    assert host.ps() == []
    assert list(host.maps.ingress.keys()) == []


def test_a_container_that_does_not_run_is_not_attached(host: Host, plain_engine: Engine) -> None:
    plain_engine.started("stopped", [], *SLEEP, network="host")
    plain_engine("stop", "-t", "0", "stopped")
    said = host.graft("attach", "--cgroup", f"{plain_engine.name}:stopped", "-i", "*:80=x", status=3).stderr
    assert "stopped' is not running" in said


def test_a_container_without_the_hosts_network_is_no_direct_one(host: Host, plain_engine: Engine) -> None:
    plain_engine.started("alone", [], *SLEEP)
    said = host.graft("attach", "--cgroup", "alone", "--transport", "direct", "-i", "*:80=x", status=7).stderr
    assert "direct is impossible: it is in a network namespace of its own" in said
