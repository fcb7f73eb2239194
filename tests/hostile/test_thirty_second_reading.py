"""What the thirty-second reading found: where /run was full, as a container can make it, a line that could not be
logged ended graftd, and its keeper, and with them the relays of all containers.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from graft.kernel import cgroup
from graft.splice import control, daemon_process
from tests.hostile.conftest import graft_without
from tests.hostile.test_sixteenth_reading_keeper import graftd, keeper
from tests.support.cgroups import new_cgroup
from tests.support.installation import Host
from tests.support.namespaces import Netns
from tests.support.plain import Plain, plain
from tests.support.relayed import pair, published, talk
from tests.support.small_run import empty, fill, fill_page, small_run
from tests.support.wait import PATIENCE, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

Small = tuple[Host, Path]


@pytest.fixture
def small(net: tuple[Netns, Netns], tmp_path: Path) -> Iterator[Small]:
    """An installation whose run_dir is in a small tmpfs, and the folder of that where others write."""
    with small_run(net, tmp_path) as made:
        yield made


def fill_all(host: Host, others: Path) -> None:
    """No page is free, and the log's last one is full."""
    fill_page(host.settings.run_dir / "graftd.log")
    fill(others)


def end(container: Plain) -> None:
    """It ends, of which graftd logs a line. Its cgroup is there again, for the fixture."""
    number = next(
        one.id for one in container.host.installation.containers.listing() if one.cgroup == str(container.cgroup)
    )
    cgroup.kill(container.cgroup)
    container.process.wait()
    cgroup.remove(container.cgroup)
    until("graftd serves it no more", lambda: not serves(container.host, number))
    container.cgroup.mkdir()


def serves(host: Host, number: int) -> bool:
    """Whether a graftd serves that container; while there is none, nobody knows."""
    answer = control.ask(host.settings, {"do": "ping"})
    return answer is None or number in answer["containers"]


def is_reset(sock: socket.socket) -> bool:
    """Whether a connection that has nothing to read is reset, within some seconds."""
    sock.settimeout(3 * PATIENCE)
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False


def test_where_run_is_full_graftd_serves_on(small: Small) -> None:
    host, others = small
    with plain(host) as victim, plain(host) as hostile, victim.listener() as listener, hostile.listener():
        port = published(victim)
        published(hostile)
        client, accepted = pair(victim, listener, port)
        before = graftd(host)
        fill_all(host, others)
        end(hostile)
        talk(client, accepted)
        assert graftd(host) == before
        empty(others)
        with plain(host) as later, later.listener():
            published(later)
            text = (host.settings.run_dir / "graftd.log").read_text()
        assert "could not be written)" in text


def test_control_where_a_line_must_be_written_all_connections_are_reset(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, others = small
    command = [*map(str, graft_without("lost lines")), "daemon"]
    monkeypatch.setattr(daemon_process, "graftd_command", lambda *_: command)
    daemon_process.ensure_running(host.settings)
    with plain(host) as victim, plain(host) as hostile, victim.listener() as listener, hostile.listener():
        port = published(victim)
        published(hostile)
        client, accepted = pair(victim, listener, port)
        talk(client, accepted)
        fill_all(host, others)
        end(hostile)
        assert is_reset(client)


def test_where_run_is_full_the_keeper_starts_another_graftd(small: Small) -> None:
    host, others = small
    with plain(host) as victim, victim.listener() as listener:
        port = published(victim)
        client, accepted = pair(victim, listener, port)
        talk(client, accepted)
        before, its_keeper = graftd(host), keeper(host)
        fill_all(host, others)
        os.kill(before, signal.SIGKILL)
        until("another graftd", lambda: answers(host, before))
        assert keeper(host) == its_keeper
        talk(client, accepted)


def answers(host: Host, before: int) -> bool:
    """Whether another graftd answers."""
    answer = control.ask(host.settings, {"do": "ping"})
    return answer is not None and answer["pid"] != before


# ---- commands


def egress(host: Host, group: Path) -> list[str]:
    """The egress rules that are in force for a cgroup."""
    return [line for line in host.graft("policy", "show", group).stdout.splitlines() if "egress" in line]


def test_where_run_is_full_a_policy_is_replaced_and_saved_or_neither(small: Small, tmp_path: Path) -> None:
    made, others = small
    host = made.saving
    host.graft("ep", "add", "out", "0.0.0.0:dynamic")
    wide, narrow = tmp_path / "wide.yaml", tmp_path / "narrow.yaml"
    for file, to in ((wide, "0.0.0.0/0"), (narrow, "10.0.0.1/32")):
        file.write_text(f"name: p\negress: [{{to: {to}, endpoint: out}}]\ndefault: deny\n")
    with new_cgroup("one") as one:
        host.graft("attach", "--cgroup", one, "--policy", wide)
        before, records = egress(host, one), host.settings.run_dir / "containers"
        fill(others)
        done = host.graft("policy", "apply", narrow, status=None)
        assert done.returncode == 6 and "No space left" in done.stderr
        assert egress(host, one) == before
        assert "0.0.0.0/0" in host.graft("export").stdout
        assert [path.suffix for path in records.iterdir()] == [".json"]
        empty(others)
        host.graft("policy", "apply", narrow)
        assert egress(host, one) != before
        assert "10.0.0.1" in host.graft("export").stdout
        host.graft("detach", "--cgroup", one)
