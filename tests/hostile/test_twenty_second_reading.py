"""What the twenty-second reading found: a container that ends keeps others of its policy from the new one, and what a
flood of decisions or of connections does to who looks.
"""

from __future__ import annotations

import ctypes
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from graft.commands import metrics_server, policy_apply, policy_learn
from graft.datapath import layout
from graft.datapath.decisions import Decisions
from graft.errors import UsageError
from graft.policy.reader import load_policy
from graft.saved.store import Store
from tests.hostile.test_twenty_first_reading import policy
from tests.support.cgroups import new_cgroup
from tests.support.installation import GRAFT, Host
from tests.support.namespaces import CLIENT4
from tests.support.puppet import puppet
from tests.support.shell import output

pytestmark = pytest.mark.e2e

# ---- a container that ends while the policy of several is replaced


@pytest.fixture
def paths(host: Host) -> Iterator[list[Path]]:
    with new_cgroup("one") as one, new_cgroup("two") as two, new_cgroup("three") as three:
        yield [one, two, three]
        for path in (one, two, three):
            host.remove_at(path)


def test_one_that_ends_keeps_no_other_from_the_new_policy(
    host: Host, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving, file = host.saving, tmp_path / "shared.yaml"
    for path in paths:
        saving.graft("attach", "--cgroup", path, "--policy", policy(file, "0.0.0.0"))
    text = policy(file, "127.0.0.1", ", ports: [80]").read_text()
    real: Any = policy_apply._replace

    def replace(graft: Any, container: Any, *more: Any, **named: Any) -> Any:
        if container.cgroup == str(paths[1]):
            saving.remove_at(paths[1])  # it has ended just now
        return real(graft, container, *more, **named)

    monkeypatch.setattr(policy_apply, "_replace", replace)
    done = policy_apply.apply(saving.installation, load_policy(text, "shared.yaml", {}), save=True)
    assert [one.cgroup for one in done.containers] == [str(paths[0]), str(paths[2])]
    for path in (paths[0], paths[2]):
        assert "127.0.0.0/8:80 from decl = 127.0.0.1:dynamic" in saving.graft("policy", "show", path).stdout
    saved = {one.target.name: one.policy for one in Store(saving.settings).read()[0].attachments}
    assert [str(saved[path.name].endpoints[0].address) for path in paths] == ["127.0.0.1"] * 3
    saving.graft("down", "--force", "--forget")
    saving.graft("up")


# ---- who looks at what is decided


def test_a_lease_that_has_ended_is_told(host: Host) -> None:
    decisions = Decisions(host.maps)
    assert not decisions.renew()
    host.maps.watches.put(ctypes.c_uint32(0), layout.WatchValue(until=1))
    assert decisions.renew()
    assert not decisions.renew()
    decisions.close()


def test_who_does_very_many_things_is_not_learned(
    host: Host, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = paths[0]
    host.graft("attach", "--cgroup", path)
    monkeypatch.setattr(policy_learn, "MAX_RULES", 3)
    container = next(one for one in host.installation.containers.listing() if one.cgroup == str(path))
    learning = policy_learn.Learning(host.installation, container)
    ports = iter(range(9, 100))
    with (
        puppet(path, host.netns.path) as program,
        pytest.raises(UsageError, match="more than 3 different things"),
    ):
        learning.watch(600, lambda _passed, _count: program.sendto(CLIENT4, next(ports)))


# ---- who scrapes the metrics


def test_idle_connections_keep_no_scraper_away(host: Host) -> None:
    port = host.port()
    server = host.start_command([*host.netns.command(GRAFT), "metrics", "--listen", f"127.0.0.1:{port}"])
    server.until("it listens", lambda: "served at" in server.complained)
    idle = []
    with host.netns.inside():
        for _ in range(metrics_server._MAX_CLIENTS + 16):
            one = socket.create_connection(("127.0.0.1", port))
            one.send(b"G")
            idle.append(one)
        found = output(["curl", "--silent", "--fail", f"http://127.0.0.1:{port}/metrics"])
    assert "graft_build_info" in found
    for one in idle:
        one.close()
    server.stop()
