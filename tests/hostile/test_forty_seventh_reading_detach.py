"""What a forty-seventh reading found: `graft detach`, with --no-save too, did nothing while a folder of what is saved
could not be read, and closed no socket where it could not note what it had done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from graft.commands import saving
from graft.saved.model import Target
from graft.saved.store import ATTACHMENTS, ENDPOINTS, Store
from tests.e2e.conftest import WritePolicy, write_policy
from tests.e2e.test_saved_state import box, saver
from tests.hostile.test_fortieth_reading_records import graft as graft_of
from tests.hostile.test_thirty_eighth_reading_engines import alone
from tests.support.cgroups import attach_points
from tests.support.installation import Host
from tests.support.puppet import puppet

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]
__all__ = ["box", "saver", "write_policy"]


@contextmanager
def no_folder(path: Path) -> Iterator[None]:
    """ENOTDIR: as with an error of the disk, nothing in it can be listed."""
    aside = path.with_name(f"{path.name}.aside")
    if path.exists():
        path.rename(aside)
    path.write_bytes(b"")
    try:
        yield
    finally:
        path.unlink()
        if aside.exists():
            aside.rename(path)


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """Others can write it."""
    path.chmod(0o777)
    try:
        yield
    finally:
        path.chmod(0o700)


@contextmanager
def no_lock(path: Path) -> Iterator[None]:
    """It is a folder."""
    path.unlink()
    path.mkdir()
    try:
        yield
    finally:
        path.rmdir()


Damage = Callable[[Store], AbstractContextManager[None]]
DAMAGES: dict[str, Damage] = {
    "not listed": lambda store: no_folder(store.folder / ATTACHMENTS),
    "endpoints not listed": lambda store: no_folder(store.folder / ENDPOINTS),
    "writable": lambda store: writable(store.folder / ATTACHMENTS),
    "no lock": lambda store: no_lock(store.folder.with_name("saved.lock")),
}
EACH = pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
CONTROL = pytest.mark.parametrize("without", ["", "noted first"], ids=["", "control"])


@EACH
@CONTROL
def test_rules_are_taken_away_for_now_whatever_is_saved(saver: Host, box: Path, damage: Damage, without: str) -> None:
    saver.graft("attach", "--cgroup", box, "--deny")
    alone(saver)
    with damage(Store(saver.settings)):
        saved = saver.graft("detach", "--cgroup", box, status=None)
        assert saved.returncode in (6, 7) and "--no-save" in saved.stderr
        assert attach_points(box), "what cannot be saved is not done"
        done = graft_of(saver, without, "detach", "--no-save", "--cgroup", box, status=None)
        assert (attach_points(box) == set()) is not bool(without)
        assert without or (done.returncode == 8 and "may come back" in done.stderr and "Traceback" not in done.stderr)
    saver.graft("up")
    assert (attach_points(box) == set()) is not bool(without), "it stays away in this boot"


@EACH
def test_it_is_found_by_another_name_all_the_same(saver: Host, box: Path, damage: Damage) -> None:
    saver.graft("attach", "--cgroup", box, "--deny")
    alone(saver)
    with damage(Store(saver.settings)):
        name = Target("cgroup", saving.below_mount(box)).text
        assert "may come back" in saver.graft("detach", "--no-save", "--cgroup", name, status=8).stderr
        assert attach_points(box) == set()


@CONTROL
def test_sockets_are_closed_though_nothing_can_be_noted(
    saver: Host, box: Path, write_policy: WritePolicy, without: str
) -> None:
    port = saver.port()
    saver.graft("ep", "add", "web", f"0.0.0.0:{port}")
    policy = write_policy("name: web\ningress: [{bind: '0.0.0.0:80', endpoint: web}]\ndefault: deny\n")
    saver.graft("attach", "--cgroup", box, "--policy", policy)
    alone(saver)
    with puppet(box, saver.netns.path) as program, no_folder(saver.settings.run_dir / "paused"):
        program.listener("0.0.0.0", 80)
        done = graft_of(saver, without, "detach", "--no-save", "--cgroup", box, status=None)
        assert attach_points(box) == set()
        assert ("closed, because" in done.stdout) is not bool(without)
        assert without or done.returncode == 8
