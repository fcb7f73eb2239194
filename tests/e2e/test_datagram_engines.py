"""UDP of containers of podman and docker in transport swap: by Graft's runtime, and by a profile of `graft listen`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graft.kernel import cgroup
from tests.support.engines import Engine
from tests.support.installation import GRAFT, Host
from tests.support.namespaces import HOST4
from tests.support.shell import run
from tests.support.wait import until

pytestmark = pytest.mark.e2e


def swap_policy(host: Host, port: int) -> str:
    folder = host.settings.state_dir / "policies"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "datagrams.yaml").write_text(
        f"name: datagrams\nopen: true\nendpoints: {{perf: 0.0.0.0:{port}, out: 0.0.0.0:dynamic}}\n"
        "ingress: [{bind: '*:81', endpoint: perf}]\negress: [{to: 10.98.0.0/16, endpoint: out}]\n"
    )
    return "GRAFT_POLICY=datagrams"


def check_datagrams(host: Host, engine: Engine, port: int) -> None:
    """A server that is started by `exec`, with a supervisor of its own, gets datagrams; both share one ferry."""
    assert [one["transport"] for one in host.ps()] == ["swap"]
    engine("exec", "-d", "perf", "iperf3", "-s", "-p", "81")
    until("iperf3 listens", lambda: host.netns.listens(port))
    done = run(host.client.command("iperf3", "-u", "-c", HOST4, "-p", str(port), "-n", "200K", "-J"), status=0)
    total = json.loads(done.stdout)["end"]["sum"]
    assert total["packets"] > 10 and total["lost_packets"] < total["packets"]
    assert len(list(host.maps.ferries.keys())) == 1


@pytest.mark.parametrize("name", ["podman", "docker"])
def test_a_udp_server_is_reached_at_its_endpoint(host: Host, name: str, request: pytest.FixtureRequest) -> None:
    engine: Engine = request.getfixturevalue(name)
    port = host.port()
    flags = ["-e", swap_policy(host, port), *(["--runtime", "graft"] if name == "docker" else [])]
    engine.started("perf", flags, "sleep", "600")
    check_datagrams(host, engine, port)
    engine.remove("perf")
    until("no ferry is left", lambda: not list(host.maps.ferries.keys()))
    until("no process is left", lambda: not list(cgroup.processes(host.cgroup / "supervisors")))


def test_a_profile_of_graft_listen_bears_datagrams(host: Host, podman: Engine, tmp_path: Path) -> None:
    listen = host.start_command([GRAFT, "listen"])
    listen.until("graft listen listens", (host.settings.run_dir / "listener").is_socket)
    profile = tmp_path / "profile.json"
    profile.write_text(host.graft("seccomp-profile").stdout)
    port = host.port()
    plain = podman.without_graft()
    plain.started("perf", ["--security-opt", f"seccomp={profile}", "-e", swap_policy(host, port)], "sleep", "600")
    check_datagrams(host, plain, port)
    plain.remove("perf")
    until("the container is forgotten", lambda: "ended" in listen.said + listen.complained)
    assert listen.stop() == 0
