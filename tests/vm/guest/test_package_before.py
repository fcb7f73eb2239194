"""The Debian package is installed, and used; then the guest reboots (test_package_after.py)."""

from __future__ import annotations

from tests.support.shell import output
from tests.vm.guest.package import (
    CGROUP,
    PACKAGE,
    PINS,
    PORT,
    SAVED,
    SERVICE,
    UNIT,
    is_active,
    listening,
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
    UNIT.write_text(SERVICE)
    output(["systemctl", "daemon-reload"])
    output(["systemctl", "enable", "--quiet", UNIT.name])
    output(["graft", "ep", "add", "web", f"0.0.0.0:{PORT}"])
    output(["systemctl", "start", UNIT.name])
    output(["graft", "attach", "--cgroup", UNIT.name, "-i", "0.0.0.0:80=web"])
    output(["systemctl", "restart", UNIT.name])
    until_answers(PORT)
    assert ":80 " not in listening()
    assert CGROUP.exists()
