"""The Debian package is installed, and used; then the guest reboots (test_package_after.py)."""

from __future__ import annotations

from tests.support.shell import output
from tests.vm.guest.package import (
    CGROUP,
    CONTAINERS,
    OTHERS_PORT,
    PACKAGE,
    PINS,
    PORT,
    PRIVATE_UNIT,
    SAVED,
    SERVICE,
    UNIT,
    is_active,
    listening,
    make_image,
    until_answers,
)


def test_the_package_is_installed_and_its_unit_has_loaded_the_hooks() -> None:
    assert not PINS.exists() and not SAVED.exists()
    output(["dpkg", "--install", PACKAGE])
    assert is_active("graft.service")
    assert PINS.exists()
    assert output(["graft", "--version"]).startswith("graft ")


def test_its_manual_and_completion_are_where_they_are_looked_for() -> None:
    listed = output(["dpkg", "--listfiles", "graft"]).splitlines()
    assert {"/usr/share/man/man8/graft-run.8.gz", "/usr/share/bash-completion/completions/graft"} <= set(listed)


def test_a_unit_that_is_attached_is_served_on_its_endpoint() -> None:
    UNIT.write_text(SERVICE.format(more=""))
    output(["systemctl", "daemon-reload"])
    output(["systemctl", "enable", "--quiet", UNIT.name])
    output(["graft", "ep", "add", "web", f"0.0.0.0:{PORT}"])
    output(["systemctl", "start", UNIT.name])
    output(["graft", "attach", "--cgroup", UNIT.name, "-i", "0.0.0.0:80=web"])
    output(["systemctl", "restart", UNIT.name])
    until_answers(PORT)
    assert ":80 " not in listening()
    assert CGROUP.exists()


def test_a_unit_with_a_network_of_its_own_is_relayed_by_the_packages_graftd() -> None:
    PRIVATE_UNIT.write_text(SERVICE.format(more="PrivateNetwork=yes"))
    output(["systemctl", "daemon-reload"])
    output(["systemctl", "enable", "--quiet", "--now", PRIVATE_UNIT.name])
    output(["graft", "ep", "add", "other", f"0.0.0.0:{OTHERS_PORT}"])
    output(["graft", "attach", "--cgroup", PRIVATE_UNIT.name, "-i", "0.0.0.0:80=other"])
    until_answers(OTHERS_PORT)
    output(["systemctl", "enable", "--quiet", "--now", "graftd.service"])  # in the place of the one that attach started
    until_answers(OTHERS_PORT)
    assert is_active("graftd.service")


def test_containers_of_docker_are_served_on_their_endpoints() -> None:
    output(["systemctl", "enable", "--quiet", "--now", "docker.service"], timeout=300)
    make_image()
    for name, (network, port) in CONTAINERS.items():
        output(["graft", "ep", "add", name, f"0.0.0.0:{port}"])
        server = ["sh", "-c", "sleep 60; exec httpd -f -p 80 -h /etc/graft"]
        options = [f"--name={name}", f"--network={network}", "--restart=always"]
        output(["docker", "run", "--detach", *options, "box", *server], timeout=120)
        output(["graft", "attach", "--cgroup", f"docker:{name}", "-i", f"0.0.0.0:80={name}"])
    for _, port in CONTAINERS.values():
        until_answers(port)
    assert ":80 " not in listening()
