"""What Graft writes to systemd's journal, as journalctl finds it by its fields."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import MakeCgroup, StartPuppet, WritePolicy
from tests.support.cgroups import new_cgroup
from tests.support.installation import GRAFT, Host
from tests.support.journald import Journald, journald
from tests.support.plain import plain
from tests.support.policies import DENY_ALL
from tests.support.relayed import published
from tests.support.units import confined_as
from tests.support.wait import until

pytestmark = pytest.mark.e2e

UNIT = Path(__file__).parents[2] / "debian" / "graft.graft-trace.service"
NOTICE, INFO = "5", "6"


@pytest.fixture
def journal() -> Iterator[Journald]:
    with journald() as made:
        yield made


def test_graftd_says_of_which_container_it_speaks(host: Host, journal: Journald) -> None:
    daemon = host.start_daemon((*journal.connected, GRAFT))
    with plain(host) as container:
        published(container)
        name, number = container.container.name, container.container.id
        entries = until("it is served", lambda: journal.entries("SYSLOG_IDENTIFIER=graftd", f"GRAFT_CONTAINER={name}"))
        assert [(one["MESSAGE"], one["PRIORITY"], one["GRAFT_CONTAINER_ID"]) for one in entries] == [
            (f"{name}: served, container {number}", INFO, str(number))
        ]
    until("it is not any more", lambda: len(journal.entries(f"GRAFT_CONTAINER={name}")) == 2)
    assert daemon.complained == ""


def test_the_watcher_of_a_unit_writes_to_the_journal(host: Host, journal: Journald) -> None:
    host = host.saving
    with new_cgroup("comes") as path:
        host.graft("ep", "add", "away", "0.0.0.0:dynamic")
        host.graft("attach", "--cgroup", path, "-e", "192.0.2.7=away")
        host.graft("down", "--force")
        again(host, journal, path)
    host.graft("down", "--force", "--forget")
    host.graft("up")


def again(host: Host, journal: Journald, path: Path) -> None:
    """`graft up` of a unit starts a watcher, which attaches the container when it appears."""
    path.rmdir()
    up = host.start_command((*journal.connected, GRAFT, "up"))
    assert up.wait() == 0
    path.mkdir()
    [entry] = until("it is attached", lambda: journal.entries("SYSLOG_IDENTIFIER=graft-watch", "PRIORITY=6"))
    assert entry["MESSAGE"] == f"attached {entry['GRAFT_CONTAINER']}"
    assert path.name in entry["GRAFT_CONTAINER"]


def test_refusals_are_entries_with_a_field_for_each_part(
    host: Host, journal: Journald, make_cgroup: MakeCgroup, start_puppet: StartPuppet, write_policy: WritePolicy
) -> None:
    path = make_cgroup()
    host.graft("attach", "--cgroup", path, "--policy", write_policy(DENY_ALL))
    trace = host.start_command((*journal.inside, GRAFT, "trace", "--journal", "--verdict", "refused"))
    trace.until("it watches", lambda: "watching" in trace.complained)
    assert start_puppet(path).bind("127.0.0.1", 81) == "EACCES"
    found = ("SYSLOG_IDENTIFIER=graft-trace", "GRAFT_OUTCOME=refused", "GRAFT_CALL=bind", "GRAFT_PORT=81")
    [entry] = until("an entry", lambda: journal.entries(*found))
    name = host.ps_of(path)["name"]
    assert entry["MESSAGE"].startswith(f"{name} ") and " bind tcp 127.0.0.1:81 -> refused" in entry["MESSAGE"]
    assert (entry["GRAFT_ADDRESS"], entry["GRAFT_CONTAINER"], entry["PRIORITY"]) == ("127.0.0.1", name, NOTICE)
    assert trace.said == ""


def test_the_capabilities_of_the_packages_unit_are_enough(
    host: Host, journal: Journald, make_cgroup: MakeCgroup, start_puppet: StartPuppet, write_policy: WritePolicy
) -> None:
    path = make_cgroup()
    host.graft("attach", "--cgroup", path, "--policy", write_policy(DENY_ALL))
    command = (*journal.inside, *confined_as(UNIT), GRAFT, "trace", "--journal", "--verdict", "refused")
    trace = host.start_command(command)
    trace.until("it watches", lambda: "watching" in trace.complained)
    assert start_puppet(path).bind("127.0.0.1", 81) == "EACCES"
    until("an entry", lambda: journal.entries("SYSLOG_IDENTIFIER=graft-trace", "GRAFT_PORT=81"))
    trace.process.send_signal(signal.SIGINT)
    assert trace.wait() == 130


def test_without_a_journal_the_lines_are_printed(
    host: Host, make_cgroup: MakeCgroup, start_puppet: StartPuppet, write_policy: WritePolicy
) -> None:
    path = make_cgroup()
    host.graft("attach", "--cgroup", path, "--policy", write_policy(DENY_ALL))
    hidden = ("unshare", "--mount", "--propagation=private", "sh", "-c", 'mount -t tmpfs none /run/systemd; exec "$@"')
    Path("/run/systemd").mkdir(exist_ok=True)
    trace = host.start_command((*hidden, "sh", GRAFT, "trace", "--journal"))
    trace.until("it watches", lambda: "watching" in trace.complained)
    assert start_puppet(path).bind("127.0.0.1", 81) == "EACCES"
    trace.until("a line", lambda: "127.0.0.1:81 -> refused" in trace.complained)


def test_json_and_the_journal_exclude_each_other(host: Host) -> None:
    assert "--journal" in host.graft("trace", "--journal", "--json", status=2).stderr
