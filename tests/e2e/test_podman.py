"""Containers of a real podman over crun, with Graft's runtime and without it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from graft.swap import fork_servers
from tests.e2e.conftest import MakeCgroup
from tests.support.engines import Engine, leftovers
from tests.support.installation import GRAFT, Host
from tests.support.namespaces import HOST4
from tests.support.program import Program
from tests.support.shell import output
from tests.support.wait import until

pytestmark = pytest.mark.e2e


def web_policy(host: Host, port: int, name: str = "web", extra: str = "open: true\n") -> str:
    folder = host.settings.state_dir / "policies"
    folder.mkdir(parents=True, exist_ok=True)
    rules = f"endpoints: {{nx4: 0.0.0.0:{port}}}\ningress: [{{bind: 0.0.0.0:80, endpoint: nx4}}]\n"
    (folder / f"{name}.yaml").write_text(f"name: {name}\n{rules}{extra}")
    return name


def fetched(host: Host, port: int) -> str:
    """What a web server at the host's port answers, once it listens."""
    until(f"port {port} of the host", lambda: host.netns.listens(port))
    return host.client.fetch(HOST4, port)


def test_nginx_without_a_network_is_served_by_the_host(host: Host, podman: Engine) -> None:
    port = host.port()
    note = f"graft.policy={web_policy(host, port)}"
    podman.started("nginx", ["--annotation", note], "nginx", "-c", "/etc/nginx.conf")
    assert fetched(host, port).startswith("port 80, from 10.98.0.2")
    assert podman("exec", "nginx", "ls", "/sys/class/net").stdout.split() == ["lo"]
    assert "0050" not in podman("exec", "nginx", "cat", "/proc/net/tcp").stdout


def test_a_container_costs_two_children_of_the_fork_server_and_goes_on_without_it(host: Host, podman: Engine) -> None:
    port = host.port()
    podman.started(
        "nginx", ["--annotation", f"graft.policy={web_policy(host, port)}"], "nginx", "-c", "/etc/nginx.conf"
    )
    assert fetched(host, port).startswith("port 80")
    supervisor = next(one for one in host.ps() if one["engine"] == "oci")["supervisor"]
    shim = parent(supervisor)
    server = parent(shim)
    assert [name_of(pid) for pid in (shim, server)] == ["graft-shim", "graft-forks"]
    assert server in fork_servers.running(host.settings)
    os.kill(server, signal.SIGKILL)
    assert fetched(host, port).startswith("port 80")
    podman("exec", "nginx", "true")
    podman("stop", "-t", "0", "nginx")
    until("nothing is left", lambda: not leftovers(host))


def test_a_container_starts_though_the_fork_server_is_stopped(host: Host, podman: Engine) -> None:
    host.run([], "true")
    servers = fork_servers.running(host.settings)
    assert servers
    for server in servers:
        os.kill(server, signal.SIGSTOP)
    port = host.port()
    try:
        policy = f"graft.policy={web_policy(host, port)}"
        podman.started("nginx", ["--annotation", policy], "nginx", "-c", "/etc/nginx.conf")
        assert fetched(host, port).startswith("port 80")
        podman("stop", "-t", "0", "nginx")
        until("nothing is left", lambda: not leftovers(host))
    finally:
        for server in servers:
            os.kill(server, signal.SIGCONT)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])


def name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def test_a_process_of_podman_exec_is_grafted_too(host: Host, podman: Engine) -> None:
    port = host.port()
    podman.started("idle", ["-e", f"GRAFT_POLICY={web_policy(host, port)}"], "sleep", "1000")
    podman("exec", "-d", "idle", "nginx", "-c", "/etc/nginx.conf")
    assert fetched(host, port).startswith("port 80")


def test_a_web_server_of_podman_answers_at_a_unix_socket_of_the_host(
    host: Host, podman: Engine, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("s") / "a.sock"
    folder = host.settings.state_dir / "policies"
    folder.mkdir(parents=True, exist_ok=True)
    rules = f"endpoints: {{a: 'unix:{path}'}}\ningress: [{{bind: 0.0.0.0:80, endpoint: a}}]\n"
    (folder / "behind.yaml").write_text(f"name: behind\n{rules}open: true\n")
    podman.started("nginx", ["-e", "GRAFT_POLICY=behind"], "nginx", "-c", "/etc/nginx.conf")
    until("the socket", path.is_socket)
    said = output(["curl", "-sS", "--max-time", "10", "--unix-socket", path, "http://app/"])
    assert said.startswith("port 80, from 127.0.0.1")
    podman("stop", "-t", "0", "nginx")
    until("nothing is left", lambda: not leftovers(host))
    until("the path is gone", lambda: not path.exists())


def test_no_new_privileges_makes_no_difference(host: Host, podman: Engine) -> None:
    port = host.port()
    flags = ["--security-opt", "no-new-privileges", "-e", f"GRAFT_POLICY={web_policy(host, port)}"]
    podman.started("nginx", flags, "nginx", "-c", "/etc/nginx.conf")
    assert fetched(host, port).startswith("port 80")


def test_stop_and_restart_leave_nothing_of_before(host: Host, podman: Engine) -> None:
    port = host.port()
    podman.started("nginx", ["-e", f"GRAFT_POLICY={web_policy(host, port)}"], "nginx", "-c", "/etc/nginx.conf")
    assert fetched(host, port).startswith("port 80")
    podman("restart", "-t", "0", "nginx")
    assert fetched(host, port).startswith("port 80")
    podman("stop", "-t", "0", "nginx")
    until("nothing is left", lambda: not leftovers(host))


def test_an_annotation_reaches_only_open_policies_because_podman_copies_an_images(host: Host, podman: Engine) -> None:
    note = f"graft.policy={web_policy(host, host.port(), 'shut', '')}"
    refused = podman.container(["--annotation", note], "true", status=126)
    assert "podman copies an image's annotations" in refused.stderr


def test_net_admin_is_refused_with_the_reason(host: Host, podman: Engine) -> None:
    flags = ["--cap-add", "NET_ADMIN", "-e", f"GRAFT_POLICY={web_policy(host, host.port())}"]
    refused = podman.container(flags, "true", status=126)
    assert "the container has CAP_NET_ADMIN" in refused.stderr
    assert not leftovers(host)


def test_a_container_that_cannot_be_attached_says_why_though_crun_hides_its_hooks(
    host: Host, podman: Engine, make_cgroup: MakeCgroup
) -> None:
    above = make_cgroup()
    host.graft("attach", "--cgroup", above, "-i", f"0.0.0.0:80={host.endpoint('0.0.0.0:1')}")
    flags = ["--cgroup-parent", f"/{above.name}", "-e", f"GRAFT_POLICY={web_policy(host, host.port())}"]
    refused = podman.container(flags, "true", status=126)
    assert "which is attached: each call would be decided twice" in refused.stderr
    host.graft("detach", "--cgroup", above)
    until("nothing is left", lambda: not leftovers(host))


@pytest.fixture
def graft_listen(host: Host) -> Iterator[Program]:
    """`graft listen`, which serves the listeners of containers with its seccomp profile."""
    program = host.start_command([GRAFT, "listen"])
    program.until("graft listen listens", (host.settings.run_dir / "listener").is_socket)
    yield program
    assert program.stop() == 0


@pytest.fixture
def profile(host: Host, tmp_path: Path, graft_listen: Program) -> Path:
    """The seccomp profile of `graft listen`."""
    file = tmp_path / "profile.json"
    file.write_text(host.graft("seccomp-profile").stdout)
    return file


def test_podman_without_the_wrapper_is_grafted_through_a_seccomp_profile(
    host: Host, podman: Engine, graft_listen: Program, profile: Path
) -> None:
    plain_podman = podman.without_graft()
    port = host.port()
    flags = ["--security-opt", f"seccomp={profile}", "--annotation", f"graft.policy={web_policy(host, port)}"]
    plain_podman.started("nginx", flags, "nginx", "-c", "/etc/nginx.conf")
    assert fetched(host, port).startswith("port 80")
    plain_podman.remove("nginx")
    until("the container is forgotten", lambda: "ended" in graft_listen.said + graft_listen.complained)


def test_a_container_that_asks_a_listener_for_too_much_is_ended(
    host: Host, podman: Engine, graft_listen: Program, profile: Path
) -> None:
    plain_podman = podman.without_graft()
    host.graft("ep", "add", "closed", f"0.0.0.0:{host.port()}")
    flags = ["--security-opt", f"seccomp={profile}", "-e", "GRAFT_CONV_PAIRS=0.0.0.0:80=closed"]
    assert plain_podman.container(flags, "sleep", "1000", status=None).returncode != 0
    until("the reason", lambda: "the endpoint 'closed' is not open" in graft_listen.said + graft_listen.complained)
