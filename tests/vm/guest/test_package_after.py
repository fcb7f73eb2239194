"""After a reboot with the Debian package: all is restored; then it is upgraded, and removed."""

from __future__ import annotations

import pytest

from tests.support.shell import output
from tests.support.wait import until
from tests.vm.guest.package import (
    CGROUP,
    PACKAGE,
    PINS,
    PORT,
    SAVED,
    UNIT,
    answers,
    is_active,
    listening,
    until_answers,
)


def test_endpoints_and_policies_are_in_force_again() -> None:
    until("graft.service", lambda: is_active("graft.service"), timeout=60, pause=1)
    assert "web" in output(["graft", "ep", "show"])
    until_answers(PORT)
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
    output(["systemctl", command, "graft.service"])
    assert answers(PORT)
    output(["systemctl", "start", "graft.service"])


def test_an_upgrade_interrupts_nothing() -> None:
    pid = output(["systemctl", "show", "--value", "--property=MainPID", UNIT.name])
    output(["dpkg", "--install", PACKAGE])
    assert answers(PORT)
    assert output(["systemctl", "show", "--value", "--property=MainPID", UNIT.name]) == pid
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
