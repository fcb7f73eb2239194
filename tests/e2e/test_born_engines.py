"""Transport born in containers of podman and docker: by Graft's runtime, and by a seccomp profile of `graft listen`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.engines import Engine
from tests.support.installation import GRAFT, Host
from tests.support.namespaces import HOST4
from tests.support.shell import run
from tests.support.wait import until

pytestmark = pytest.mark.e2e

DENY = "default: {bind: deny, connect: deny}\n"


def born_policy(host: Host, port: int, default: str = DENY) -> str:
    folder = host.settings.state_dir / "policies"
    folder.mkdir(parents=True, exist_ok=True)
    rules = (
        f"endpoints: {{web: 0.0.0.0:{port}, perf: 0.0.0.0:{port + 1}, out: 0.0.0.0:dynamic}}\n"
        "ingress: [{bind: '*:80', endpoint: web}, {bind: '*:81', endpoint: perf}]\n"
        "egress: [{to: 10.98.0.0/16, endpoint: out}]\n"
    )
    (folder / "born.yaml").write_text(f"name: born\nopen: true\n{rules}{default}")
    return "GRAFT_POLICY=born"


def transports(host: Host) -> list[str]:
    return [one["transport"] for one in json.loads(host.graft("ps", "--json").stdout)]


def fetched(host: Host, port: int) -> str:
    until(f"port {port} of the host", lambda: host.netns.listens(port))
    return host.client.fetch(HOST4, port)


@pytest.mark.parametrize("name", ["podman", "docker"])
def test_nginx_and_a_udp_server_are_served_from_the_start(
    host: Host, name: str, request: pytest.FixtureRequest
) -> None:
    engine: Engine = request.getfixturevalue(name)
    port, _ = host.port(), host.port()
    flags = ["-e", born_policy(host, port), *(["--runtime", "graft"] if name == "docker" else [])]
    engine.started("nginx", flags, "nginx", "-c", "/etc/nginx.conf")
    assert transports(host) == ["born"]
    assert fetched(host, port).startswith("port 80, from 10.98.0.2")
    engine("exec", "-d", "nginx", "iperf3", "-s", "-p", "81")
    until("iperf3 listens", lambda: host.netns.listens(port + 1))
    done = run(host.client.command("iperf3", "-u", "-c", HOST4, "-p", str(port + 1), "-n", "200K", "-J"), status=0)
    total = json.loads(done.stdout)["end"]["sum"]
    assert total["packets"] > 10 and total["lost_packets"] < total["packets"]
    # A socket that the filter does not trap is the container's own.
    assert engine("exec", "nginx", "cat", "/proc/net/tcp").stdout.count("\n") == 1


def test_a_container_with_a_policy_that_leaves_something_inside_has_swap(host: Host, podman: Engine) -> None:
    port = host.port()
    podman.started(
        "nginx", ["-e", born_policy(host, port, "default: {bind: deny}\n")], "nginx", "-c", "/etc/nginx.conf"
    )
    assert transports(host) == ["swap"]
    assert fetched(host, port).startswith("port 80")


@pytest.mark.parametrize("born", [True, False])
def test_a_profile_of_graft_listen_traps_sockets_where_it_is_asked_to(
    host: Host, podman: Engine, tmp_path: Path, born: bool
) -> None:
    listen = host.start_command([GRAFT, "listen"])
    listen.until("graft listen listens", (host.settings.run_dir / "listener").is_socket)
    profile = tmp_path / "profile.json"
    profile.write_text(host.graft("seccomp-profile", *(["--born"] if born else [])).stdout)
    port = host.port()
    flags = ["--security-opt", f"seccomp={profile}", "-e", born_policy(host, port)]
    plain = podman.without_graft()
    plain.started("nginx", flags, "nginx", "-c", "/etc/nginx.conf")
    assert fetched(host, port).startswith("port 80")
    assert transports(host) == ["born" if born else "swap"]
    plain.remove("nginx")
    until("the container is forgotten", lambda: "ended" in listen.said + listen.complained)
    assert listen.stop() == 0


def test_a_container_whose_policy_does_not_fit_its_profile_is_ended(host: Host, podman: Engine, tmp_path: Path) -> None:
    listen = host.start_command([GRAFT, "listen"])
    listen.until("graft listen listens", (host.settings.run_dir / "listener").is_socket)
    profile = tmp_path / "profile.json"
    profile.write_text(host.graft("seccomp-profile", "--born").stdout)
    flags = ["--security-opt", f"seccomp={profile}", "-e", born_policy(host, host.port(), "default: {bind: deny}\n")]
    assert podman.without_graft().container(flags, "sleep", "1000", status=None).returncode != 0
    until("the reason", lambda: "default.connect" in listen.said + listen.complained)
    assert listen.stop() == 0
