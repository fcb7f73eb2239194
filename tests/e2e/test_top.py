"""`graft top`: in a pipe, as JSON, and in place on a terminal."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from typing import Any

import pytest

from graft.state import call_times
from tests.e2e.conftest import MakeCgroup, StartPuppet, WritePolicy
from tests.support.installation import GRAFT, Host
from tests.support.namespaces import HOST4
from tests.support.plain import plain
from tests.support.policies import DENY_ALL
from tests.support.relayed import pair, published, talk
from tests.support.wait import until

pytestmark = pytest.mark.e2e

INTERVAL = ("--interval", "0.5")


def records(text: str) -> dict[str, Any]:
    """What `graft top --json` prints."""
    return dict(json.loads(text))


def test_refusals_and_sockets_of_a_container_are_shown(
    host: Host, make_cgroup: MakeCgroup, start_puppet: StartPuppet, write_policy: WritePolicy
) -> None:
    path = make_cgroup()
    host.graft("attach", "--cgroup", path, "--policy", write_policy(DENY_ALL))
    program = start_puppet(path)
    assert program.bind("127.0.0.1", 81) == "EACCES"
    [one] = records(host.graft("top", "--json", *INTERVAL).stdout)["containers"]
    assert (one["refusals"], one["refusals_per_second"], one["transport"]) == (1, 0.0, "direct")
    assert one["bytes_in_per_second"] is None
    line, row, *rest = host.graft("top", "--once", *INTERVAL).stdout.splitlines()
    assert line.startswith("1 container, ") and not rest
    assert row.split("\t")[1:3] == [one["name"], "direct"]


def test_what_graftd_relays_meanwhile_is_shown_for_a_second(host: Host) -> None:
    with plain(host) as container, container.listener() as listener:
        port = published(container)
        top = host.start_command([GRAFT, "top", *INTERVAL])
        top.until("a first table", lambda: "\tsplice\t" in top.said)
        client, accepted = pair(container, listener, port)
        with client, accepted:

            def has_rates() -> bool:
                talk(client, accepted)
                rows = [line.split("\t") for line in top.said.splitlines() if "\tsplice\t" in line]
                return any(row[5] not in ("-", "0.0") for row in rows) and any(
                    row[6] not in ("-", "0 bytes") for row in rows
                )

            top.until("rates", has_rates)
        assert "graftd runs" in top.said
        top.process.send_signal(signal.SIGINT)
        assert (top.wait(), top.complained) == (0, "")


def test_on_a_terminal_the_table_is_refreshed_in_place(host: Host) -> None:
    ours, theirs = pty.openpty()
    command = [str(GRAFT), "top", *INTERVAL]
    environment = {**os.environ, **host.environment, "TERM": "xterm", "COLUMNS": "120"}
    top = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True)
    os.close(theirs)
    shown = b""
    os.set_blocking(ours, False)

    def has(text: bytes) -> bool:
        nonlocal shown
        try:
            shown += os.read(ours, 65536)
        except BlockingIOError:
            pass
        return shown.count(text) >= 3

    until("three tables", lambda: has(b"CONN/S"))
    assert b"\x1b[1A" in shown  # a line up
    top.send_signal(signal.SIGINT)
    assert top.wait(30) == 0
    os.close(ours)


CONNECTS = """
import socket, sys
for line in sys.stdin:
    for _ in range(int(line)):
        with socket.socket() as sock:
            assert sock.connect_ex((sys.argv[1], 9))
    print("done", flush=True)
"""


@pytest.mark.parametrize("transport", ["swap", "born"])
def test_each_trapped_call_is_in_a_histogram_and_the_next_supervisor_counts_on(host: Host, transport: str) -> None:
    """The first one is Python's, the others are the compiled part's."""
    host = host.with_transport(transport)
    grants = ("-e", f"{HOST4}={host.endpoint('0.0.0.0:dynamic')}")
    program = host.start(*grants, "--", sys.executable, "-uc", CONNECTS, HOST4, talk=True)
    number = host.container(program).id if program.until("it is attached", lambda: host.ps()) else 0
    program.tell("100\n")
    program.says("done")
    until("100 calls", lambda: counted(host, number) == 100)
    first = host.supervisor(program)
    os.kill(first, signal.SIGKILL)
    program.until("the next supervisor", lambda: host.supervisor_or_0(program) not in (0, first))
    top = host.start_command([GRAFT, "top", "--json", "--interval", "3"])
    program.tell("50\n")
    until("50 more", lambda: counted(host, number) == 150)
    assert top.wait() == 0
    [one] = records(top.said)["containers"]
    assert one["calls"]["count"] == sum(bucket["count"] for bucket in one["calls"]["buckets"]) <= 150
    assert 0 < counted_seconds(host, number) < 60
    program.stop()
    until("nothing is left", lambda: not (host.settings.run_dir / "call-times" / str(number)).exists())


def counted(host: Host, container: int) -> int:
    found = call_times.read(host.settings, container)
    return 0 if found is None else found.count


def counted_seconds(host: Host, container: int) -> float:
    found = call_times.read(host.settings, container)
    assert found is not None
    return found.total / 1e9


def test_where_graft_is_not_up_it_says_so(bare_host: Host) -> None:
    assert bare_host.graft("top", "--once", *INTERVAL).stdout == "Graft is not up\n"
    assert records(bare_host.graft("top", "--json", *INTERVAL).stdout)["up"] is False
    assert not bare_host.settings.pin_dir.exists()


@pytest.mark.parametrize("interval", ["0", "-1", "x", "nan"])
def test_an_interval_that_is_none_is_refused(host: Host, interval: str) -> None:
    assert "--interval" in host.graft("top", "--interval", interval, status=2).stderr
