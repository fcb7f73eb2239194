"""After a reboot with the Debian package: all is restored, and stays whatever is restarted; then it is upgraded, and
removed.
"""

from __future__ import annotations

import pwd
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.shell import output
from tests.support.wait import until
from tests.vm.guest.package import (
    CGROUP,
    CONTAINERS,
    OTHERS_PORT,
    PACKAGE,
    PINS,
    PORT,
    PORTS,
    SAVED,
    UNIT,
    answers,
    is_active,
    listening,
    main_pid,
    root_file_system,
    until_answers,
)


@pytest.mark.parametrize("port", PORTS)
def test_endpoints_and_policies_are_in_force_again(port: int) -> None:
    until("graft.service", lambda: is_active("graft.service"), timeout=60, pause=1)
    assert f":{port}" in output(["graft", "ep", "show"])
    until_answers(port)
    assert ":80 " not in listening()


def test_the_unit_was_started_before_the_network_and_what_listens() -> None:
    order = output(["systemctl", "show", "--property=Before", "graft.service"])
    assert "docker.service" in order and "network-pre.target" in order
    started = [
        int(output(["systemctl", "show", "--value", "--property=ActiveEnterTimestampMonotonic", unit]))
        for unit in ("graft.service", UNIT.name)
    ]
    assert started == sorted(started)


@pytest.mark.parametrize("command", ["stop", "restart"])
def test_a_unit_that_stops_leaves_the_policies_in_force(command: str) -> None:
    before = main_pid("graftd.service")
    output(["systemctl", command, "graft.service"])
    for port in PORTS:
        assert answers(port)
    output(["systemctl", "start", "graft.service"])
    assert main_pid("graftd.service") == before


def test_containers_of_an_engine_that_is_restarted_are_served_again() -> None:
    output(["systemctl", "restart", "docker.service"], timeout=300)
    for _, port in CONTAINERS.values():
        until_answers(port)
    assert ":80 " not in listening()


@contextmanager
def connection_that_stays() -> Iterator[None]:
    """A request that is begun before the block, and answered after it."""
    with socket.create_connection(("127.0.0.1", OTHERS_PORT), timeout=300) as client:
        client.sendall(b"GET /environment HTTP/1.0\r\n")
        yield
        client.sendall(b"\r\n")
        assert b"GRAFT_STATE_DIR" in client.makefile("rb").read()


@pytest.mark.parametrize(
    "how",
    [["kill", "--signal=KILL", "--kill-who=main"], ["kill", "--signal=STOP", "--kill-who=main"], ["reload"]],
    ids=["killed", "stopped", "reloaded"],
)
def test_systemd_keeps_what_the_packages_graftd_relays(how: list[str]) -> None:
    until_answers(OTHERS_PORT)
    before = main_pid("graftd.service")
    with connection_that_stays():
        output(["systemctl", *how, "graftd.service"])
        until("another graftd", lambda: main_pid("graftd.service") not in (0, before), timeout=60)
    until_answers(OTHERS_PORT)


@pytest.mark.parametrize("days", [2, -4])
def test_a_clock_that_jumps_is_noticed_by_nobody(days: int) -> None:
    before = main_pid("graftd.service")
    with connection_that_stays():
        output(["date", "--set", f"{days} days"])
        for port in PORTS:
            until_answers(port)
        output(["docker", "restart", "--time=0", "shop"], timeout=120)
        until_answers(CONTAINERS["shop"][1])
    assert main_pid("graftd.service") == before
    assert "waiting" not in output(["graft", "ps"])


def test_a_container_of_a_user_is_attached_by_root() -> None:
    """Of rootless podman, in a cgroup that is the user's own."""
    output(["useradd", "--create-home", "user"])
    root = "/home/user/root"
    output([*as_user(), "mkdir", root])
    subprocess.run([*as_user(), "tar", "x", "-C", root], input=root_file_system(), check=True)
    output(["loginctl", "enable-linger", "user"])
    until("the user's own systemd", (runtime_dir() / "bus").is_socket, timeout=60, pause=1)
    server = ["httpd", "-f", "-p", "80", "-h", "/etc/graft"]
    options = ["--detach", "--rm", "--network=none", "--name=own"]
    output([*as_user(), "podman", "run", *options, "--rootfs", root, *server], timeout=120)
    found = until("its cgroup", container_cgroup, timeout=60, pause=1)
    assert found is not None
    output(["graft", "ep", "add", "own", "0.0.0.0:8090"])
    output(["graft", "attach", "--no-save", "--cgroup", found, "-i", "0.0.0.0:80=own"])
    until_answers(8090)
    output([*as_user(), "podman", "kill", "own"])
    until("it is gone", lambda: "own" not in output(["graft", "ps"]), pause=1)


def runtime_dir() -> Path:
    return Path(f"/run/user/{pwd.getpwnam('user').pw_uid}")


def as_user() -> list[str]:
    """The words before a command of the user's."""
    bus = f"DBUS_SESSION_BUS_ADDRESS=unix:path={runtime_dir()}/bus"
    return ["runuser", "-u", "user", "--", "env", "-C", "/", f"XDG_RUNTIME_DIR={runtime_dir()}", bus, "HOME=/home/user"]


def container_cgroup() -> Path | None:
    """The cgroup of the user's container."""
    for folder in Path("/sys/fs/cgroup/user.slice").rglob("libpod-*"):
        for procs in folder.rglob("cgroup.procs"):
            if "conmon" not in str(folder) and procs.read_text():
                return procs.parent
    return None


POLICY = "name: pod\nopen: true\nendpoints: {pod: '0.0.0.0:8095'}\ningress: [{bind: '*:80', endpoint: pod}]\n"


def test_a_container_of_podman_has_the_socket_unit_start_graft_listen(tmp_path: Path) -> None:
    Path("/etc/graft/policies/pod.yaml").write_text(POLICY)
    root, profile = tmp_path / "root", tmp_path / "profile.json"
    root.mkdir()
    subprocess.run(["tar", "x", "-C", root], input=root_file_system(), check=True)
    profile.write_text(output(["graft", "seccomp-profile"]))
    output(["systemctl", "start", "graft-listen.socket"])
    assert not is_active("graft-listen.service")
    options = ["--network=none", "--name=pod", f"--security-opt=seccomp={profile}", "--annotation=graft.policy=pod"]
    server = ["httpd", "-f", "-p", "80", "-h", "/etc/graft"]
    output(["podman", "run", "--detach", "--rm", *options, "--rootfs", root, *server], timeout=120)
    until_answers(8095)
    assert is_active("graft-listen.service")
    output(["podman", "kill", "pod"])


def test_down_stops_the_unit_and_the_next_container_starts_it() -> None:
    output(["graft", "down", "--force"])
    assert not is_active("graftd.service") and not is_active("graft-listen.service")
    assert not PINS.exists() and not CGROUP.exists()
    output(["graft", "up"])
    for port in PORTS:
        until_answers(port)
    assert is_active("graftd.service")


def test_an_upgrade_interrupts_nothing() -> None:
    pid = main_pid(UNIT.name)
    with connection_that_stays():
        output(["dpkg", "--install", PACKAGE])
    for port in PORTS:
        assert answers(port)
    assert main_pid(UNIT.name) == pid
    assert "web" in output(["graft", "ep", "show"])


def test_a_removal_leaves_nothing_in_the_kernel_and_a_purge_nothing_at_all() -> None:
    output(["dpkg", "--remove", "graft"])
    assert not PINS.exists() and not CGROUP.exists()
    assert SAVED.exists()
    output(["systemctl", "restart", UNIT.name])
    until_answers_at_home()
    output(["dpkg", "--purge", "graft"])
    assert not SAVED.exists()


def until_answers_at_home() -> None:
    """The web server listens where it asks to."""
    until_answers(80)
    assert f":{PORT} " not in listening()
