"""What the thirty-seventh reading found, where no space is left: a data plane that was restored while /run was full, as
a container can make it, was restored again by each command, with what an operator had taken away. And an endpoint that
could not be changed, as the table of multicast groups was full, had another network namespace and other groups.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from graft.datapath import layout
from graft.errors import KernelError
from graft.kernel import netns
from graft.model.endpoint import parse_endpoint
from tests.hostile.conftest import graft_without
from tests.hostile.test_thirty_second_reading import Small, small
from tests.support.installation import Host
from tests.support.namespaces import namespace
from tests.support.plain import plain
from tests.support.shell import Result, Word, run
from tests.support.small_run import empty, fill

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]
__all__ = ["small"]


@pytest.mark.parametrize("defence", ["", "restored in run"], ids=["", "control"])
def test_what_was_taken_away_for_now_stays_away_where_run_was_full(small: Small, defence: str) -> None:
    host, others = small
    saver = host.saving

    def graft(*words: Word) -> Result:
        return run([*graft_without(defence), *words], environment=saver.environment, status=0)

    saver.graft("ep", "add", "web", f"0.0.0.0:{host.port()}", "--open")
    with plain(host) as one:
        saver.graft("attach", "--cgroup", one.cgroup, "-i", "0.0.0.0:80=web")
        run(["rm", "-rf", host.settings.pin_dir], status=0)  # as after a boot
        fill(others)
        graft("up")
        graft("ep", "del", "--no-save", "--force", "web")
        graft("detach", "--no-save", "--cgroup", one.cgroup)
        there = graft("ep", "show").stdout
        empty(others)
        assert ("web" in there) == bool(defence)
        if not defence:
            assert "attached" not in [line["state"] for line in saver.ps()]
        if defence:
            saver.graft("detach", "--cgroup", one.cgroup)


@contextmanager
def groups_but(host: Host, free: int) -> Iterator[None]:
    """The table of multicast groups has room for ``free`` more."""
    groups, keys = host.maps.groups, []
    try:
        for number in range(1 << 20):
            key = layout.GroupKey(id=0x7FFF0000, family=4)
            key.addr[:] = number.to_bytes(4, "big") + bytes(12)
            try:
                groups.put(key, ctypes.c_uint32(1))
            except OSError:
                break
            keys.append(key)
        for key in keys[len(keys) - free :]:
            groups.delete(key)
        yield
    finally:
        for key in keys:
            groups.delete(key)
        groups.close()


def state(host: Host, name: str) -> tuple[object, ...]:
    """All that is known of an endpoint: its value, and which namespace is kept for it."""
    stored = host.installation.endpoints.find(name)
    files = {path.name: path.stat().st_ino for path in (host.settings.run_dir / "netns").glob(f"{stored.id}*")}
    return stored, files, bytes(host.maps.endpoints.get(ctypes.c_uint32(stored.id)) or b"")


@pytest.mark.parametrize("free", [0, 1])
@pytest.mark.parametrize("was_named", [True, False], ids=["named", "host"])
def test_where_the_table_of_groups_is_full_an_endpoint_is_as_it_was(host: Host, free: int, was_named: bool) -> None:
    with namespace("one") as one, namespace("two") as two:
        words = ["e37", f"0.0.0.0:{host.port()}", "--proto", "udp"]
        changed = [*words, "--netns", two.name, "--multicast", "239.1.1.2", "--multicast", "239.1.1.3"]
        host.graft("ep", "add", *words, *(("--netns", one.name) if was_named else ()), "--multicast", "239.1.1.1")
        try:
            before = state(host, "e37")
            with groups_but(host, free):
                done = host.graft("ep", "set", *changed, status=6)
                assert "no room" in done.stderr
                assert state(host, "e37") == before
            host.graft("ep", "set", *changed)
            stored = host.installation.endpoints.find("e37")
            assert [str(group) for group in stored.endpoint.multicast] == ["239.1.1.2", "239.1.1.3"]
            assert host.installation.endpoints.netns_path(stored).stat().st_ino == two.path.stat().st_ino
        finally:
            host.graft("ep", "del", "e37")


def test_where_a_namespace_cannot_be_kept_an_endpoint_is_as_it_was(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    mount = netns._mount
    failed: list[str] = []

    def fails_once(opened: int, target: Path) -> int:
        if not failed:
            failed.append(os.readlink(f"/proc/self/fd/{opened}"))
            return 12
        return mount(opened, target)

    with namespace("one") as one, namespace("two") as two:
        port = host.port()
        host.graft(
            "ep", "add", "e37", f"0.0.0.0:{port}", "--proto", "udp", "--netns", one.name, "--multicast", "239.1.1.1"
        )
        try:
            before = state(host, "e37")
            changed = parse_endpoint("e37", f"0.0.0.0:{port + 1}", "udp", two.name, multicast=["239.1.1.2"])
            monkeypatch.setattr(netns, "_mount", fails_once)
            with (
                host.installation as graft,
                graft.transaction() as change,
                pytest.raises(KernelError, match="cannot keep"),
            ):
                change.endpoints.change(changed)
            assert failed and state(host, "e37") == before
        finally:
            host.graft("ep", "del", "e37")
