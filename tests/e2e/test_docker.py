"""Containers of a real dockerd, started with `--runtime graft`."""

from __future__ import annotations

import json
import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from graft.kernel import cgroup
from graft.model.endpoint import parse_endpoint
from tests.support.engines import IMAGE, Engine, leftovers
from tests.support.installation import Host
from tests.support.namespaces import HOST4
from tests.support.shell import run
from tests.support.wait import PATIENCE, until

pytestmark = pytest.mark.e2e

GRAFT = ["--runtime", "graft"]
NO_NETWORK = ["--network", "none"]


def add(host: Host, name: str, port: int, open_: bool = True) -> None:
    with host.installation.transaction() as change:
        change.endpoints.add(parse_endpoint(name, f"0.0.0.0:{port}", open_=open_))


def pairs(port: int, endpoint: str) -> list[str]:
    return ["-e", f"GRAFT_CONV_PAIRS=0.0.0.0:{port}={endpoint}"]


def answers(host: Host, port: int) -> str:
    """What a server at the host's port says to a client."""
    until(f"port {port} of the host", lambda: host.netns.listens(port))
    with host.client.connected(HOST4, port) as sock:
        return sock.makefile().readline().strip()


def says(text: str) -> list[str]:
    return ["nc", "-ll", "-p", "80", "-e", "echo", text]


def test_iperf3_in_a_container_without_a_network_is_reached_through_the_host(host: Host, docker: Engine) -> None:
    port = host.port()
    add(host, "ep-lo", port)
    docker.started("perf", [*GRAFT, *pairs(5201, "ep-lo")], "iperf3", "-s")
    until("iperf3 listens", lambda: host.netns.listens(port))
    done = run(host.client.command("iperf3", "-c", HOST4, "-p", str(port), "-n", "1M", "-J"), status=0)
    assert json.loads(done.stdout)["end"]["sum_sent"]["bytes"] >= 1 << 20
    assert docker("exec", "perf", "ls", "/sys/class/net").stdout.split() == ["lo"]


def add_unix(host: Host, name: str, path: Path) -> None:
    with host.installation.transaction() as change:
        change.endpoints.add(parse_endpoint(name, f"unix:{path}", open_=True))


def test_a_listener_in_a_container_answers_at_a_unix_socket_of_the_host(
    host: Host, docker: Engine, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("s") / "a.sock"
    add_unix(host, "behind", path)
    docker.started("web", [*GRAFT, *pairs(80, "behind")], *says("from inside"))
    until("the socket", path.is_socket)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(15 * PATIENCE)
        sock.connect(str(path))
        assert sock.makefile().readline() == "from inside\n"
    docker("rm", "-f", "web")
    until("the path is gone", lambda: not path.exists())


@pytest.mark.parametrize("name", ["docker", "podman"])
def test_nginx_in_a_container_binds_its_own_unix_socket_on_the_host(
    host: Host, name: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> None:
    engine: Engine = request.getfixturevalue(name)
    path = tmp_path_factory.mktemp("s") / "a.sock"
    add_unix(host, "own", path)
    configuration = path.with_name("own.conf")
    configuration.write_text(
        "daemon off; master_process off; user root; events {} pid /tmp/pid; error_log stderr; http { access_log off;"
        " client_body_temp_path /tmp/b; proxy_temp_path /tmp/p; fastcgi_temp_path /tmp/f; uwsgi_temp_path /tmp/u;"
        " scgi_temp_path /tmp/s; server { listen unix:/tmp/own.sock; return 200 'own\\n'; } }\n"
    )
    flags = ["-e", "GRAFT_CONV_PAIRS=unix:/tmp/own.sock=own", "-v", f"{configuration}:/etc/own.conf"]
    engine.started("nginx", [*(GRAFT if name == "docker" else []), *flags], "nginx", "-c", "/etc/own.conf")
    until("the socket", path.is_socket)
    fetch = ["curl", "-sS", "--max-time", "10", "--unix-socket", str(path), "http://app/"]
    assert until("an answer", lambda: run(fetch).stdout) == "own\n"
    assert not any(one["relay"] for one in host.ps())
    engine.remove("nginx")
    until("the path is gone", lambda: not path.exists())


def test_a_process_of_docker_exec_is_grafted_too(host: Host, docker: Engine) -> None:
    port = host.port()
    add(host, "late", port)
    docker.started("idle", [*GRAFT, *pairs(80, "late")], "sleep", "1000")
    docker("exec", "-d", "idle", *says("from exec"))
    assert answers(host, port) == "from exec"


@pytest.mark.parametrize("end", [["stop", "-t", "0"], ["kill"], ["rm", "-f"]], ids=lambda end: end[0])
def test_nothing_of_graft_is_left_when_a_container_ends(host: Host, docker: Engine, end: list[str]) -> None:
    port = host.port()
    add(host, "web", port)
    docker.started("web", [*GRAFT, *pairs(80, "web")], *says("hello"))
    docker("exec", "-d", "web", "sleep", "1000")
    assert answers(host, port) == "hello"
    docker(*end, "web")
    until("nothing is left", lambda: not leftovers(host))
    assert not host.netns.listens(port)


def test_a_container_is_grafted_again_after_a_restart(host: Host, docker: Engine) -> None:
    port = host.port()
    add(host, "web", port)
    docker.started("web", [*GRAFT, *pairs(80, "web")], *says("hello"))
    assert answers(host, port) == "hello"
    docker("restart", "-t", "0", "web")
    assert answers(host, port) == "hello"


def test_a_container_does_not_start_before_its_endpoint_exists_and_does_after(host: Host, docker: Engine) -> None:
    port = host.port()
    docker(
        "create", "--name", "early", *docker.run_flags, *NO_NETWORK, *GRAFT, *pairs(80, "later"), IMAGE, *says("hello")
    )
    refused = docker("start", "early", status=1)
    assert "GRAFT_CONV_PAIRS: endpoint 'later' not found" in refused.stderr
    assert not leftovers(host)
    add(host, "later", port)
    docker("start", "early")
    assert answers(host, port) == "hello"


@pytest.mark.slow
def test_twenty_containers_start_in_parallel_each_on_its_own_endpoint(host: Host, docker: Engine) -> None:
    ports = {f"web{number}": host.port() for number in range(20)}
    for name, port in ports.items():
        add(host, name, port)

    def start(name: str) -> None:
        docker.started(name, [*GRAFT, *pairs(80, name)], *says(name))

    with ThreadPoolExecutor(len(ports)) as pool:
        list(pool.map(start, ports))
    assert {name: answers(host, port) for name, port in ports.items()} == {name: name for name in ports}
    docker.remove(*ports)
    until("nothing is left", lambda: not leftovers(host))


def test_an_image_reaches_only_endpoints_that_are_open(host: Host, docker: Engine) -> None:
    add(host, "closed", host.port(), open_=False)
    made = docker("create", "--name", "base", IMAGE, "true").stdout.strip()
    docker("commit", "--change", "ENV GRAFT_CONV_PAIRS=0.0.0.0:80=closed", made, "greedy")
    refused = docker("run", *docker.run_flags, *NO_NETWORK, *GRAFT, "greedy", "true", status=125)
    assert "GRAFT_CONV_PAIRS: the endpoint 'closed' is not open" in refused.stderr


def test_an_environment_reaches_only_policies_that_are_open(host: Host, docker: Engine) -> None:
    port = host.port()
    folder = host.settings.state_dir / "policies"
    folder.mkdir(parents=True, exist_ok=True)
    text = f"name: web\nendpoints: {{own: 0.0.0.0:{port}}}\ningress: [{{bind: 0.0.0.0:80, endpoint: own}}]\n"
    (folder / "web.yaml").write_text(text)
    asking = [*GRAFT, "-e", "GRAFT_POLICY=web"]
    refused = docker.container(asking, "true", status=125)
    assert "GRAFT_POLICY: the policy 'web' is not open" in refused.stderr
    (folder / "web.yaml").write_text(f"{text}open: true\n")
    docker.started("web", asking, *says("by policy"))
    assert answers(host, port) == "by policy"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["-e", "GRAFT_POLICY=nowhere"], "policy 'nowhere' not found"),
        (["-e", "GRAFT_POLICY=/etc/passwd"], "a container's environment can name a policy, not a path"),
        (["-e", "GRAFT_CONV_PAIRS=0.0.0.0=ok"], "GRAFT_CONV_PAIRS: "),
        (["-e", "GRAFT_CONV_PAIRS=0.0.0.0:80=ok", "--cap-add", "NET_ADMIN"], "the container has CAP_NET_ADMIN"),
        (["-e", "GRAFT_CONV_PAIRS=0.0.0.0:80=ok", "--privileged"], "the container has CAP_NET_ADMIN"),
    ],
)
def test_a_container_that_may_not_start_says_why(host: Host, docker: Engine, flags: list[str], said: str) -> None:
    add(host, "ok", host.port())
    assert said in docker.container([*GRAFT, *flags], "true", status=125).stderr
    assert not leftovers(host)


def test_a_program_that_is_not_in_the_image_leaves_nothing(host: Host, docker: Engine) -> None:
    add(host, "ok", host.port())
    docker.container([*GRAFT, *pairs(80, "ok")], "no-such-program", status=127)
    until("nothing is left", lambda: not leftovers(host))


def test_a_container_without_a_seccomp_profile_is_grafted(host: Host, docker: Engine) -> None:
    port = host.port()
    add(host, "web", port)
    docker.started("web", [*GRAFT, "--security-opt", "seccomp=unconfined", *pairs(80, "web")], *says("free"))
    assert answers(host, port) == "free"


def test_a_container_that_asks_for_nothing_is_started_by_runc_unchanged(host: Host, docker: Engine) -> None:
    assert docker.container([*GRAFT], "sh", "-c", "echo said; exit 7", status=7).stdout == "said\n"
    assert docker.container([*GRAFT, "-t"], "sh", "-c", "test -t 1 && echo terminal").stdout.strip() == "terminal"
    assert not leftovers(host)


def test_two_containers_in_the_hosts_namespace_bind_one_port_on_two_endpoints(host: Host, docker: Engine) -> None:
    ports = {"one": host.port(), "two": host.port()}
    for name, port in ports.items():
        add(host, name, port)
        docker.started(name, [*GRAFT, *pairs(80, name)], *says(name), network="host")
    assert {name: answers(host, port) for name, port in ports.items()} == {"one": "one", "two": "two"}
    assert not cgroup.processes(host.cgroup / "supervisors")
    docker.remove(*ports)
    assert not leftovers(host)


def supervisors(host: Host) -> tuple[int, list[int]]:
    """(The shim, its supervisors) where one container runs."""
    pids = cgroup.processes(host.cgroup / "supervisors")
    parents = {pid: int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in pids}
    shim = next(pid for pid in pids if parents[pid] not in pids)
    return shim, [pid for pid in pids if pid != shim]


WAITING = ["sh", "-c", "while ! test -e /tmp/go; do sleep 0.05; done; exec nc -ll -p 80 -e echo still served"]


def let_it_listen(docker: Engine) -> None:
    """End the wait of a container that runs WAITING."""
    pid = docker("inspect", "-f", "{{.State.Pid}}", "web").stdout.strip()
    Path(f"/proc/{pid}/root/tmp/go").touch()


def test_a_supervisor_that_is_killed_is_started_again(host: Host, docker: Engine) -> None:
    port = host.port()
    add(host, "web", port)
    docker.started("web", [*GRAFT, *pairs(80, "web")], *WAITING)
    until("a supervisor", lambda: len(cgroup.processes(host.cgroup / "supervisors")) == 2)
    before = supervisors(host)[1]
    os.kill(before[0], signal.SIGKILL)
    until("another supervisor", lambda: supervisors(host)[1] not in (before, []))
    let_it_listen(docker)
    assert answers(host, port) == "still served"


def test_a_container_whose_shim_is_killed_stays_served_and_leaves_nothing(host: Host, docker: Engine) -> None:
    port = host.port()
    add(host, "web", port)
    docker.started("web", [*GRAFT, *pairs(80, "web")], *WAITING)
    until("a supervisor", lambda: len(cgroup.processes(host.cgroup / "supervisors")) == 2)
    os.kill(supervisors(host)[0], signal.SIGKILL)
    refused = docker("exec", "web", "true", status=None)
    assert refused.returncode != 0
    assert "connection refused" in refused.stdout + refused.stderr
    let_it_listen(docker)
    assert answers(host, port) == "still served"
    docker.remove("web")
    until("nothing is left", lambda: not leftovers(host))
