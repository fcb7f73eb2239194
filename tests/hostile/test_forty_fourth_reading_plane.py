"""What was known before a forty-fourth reading, and not mended: what ends after Graft was taken down and brought up
again removed what another container had got, and what could not be restored once was not tried again.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from graft.commands import watcher_process
from graft.saved.store import ATTACHMENTS
from tests.e2e.conftest import WritePolicy, write_policy
from tests.e2e.test_saved_state import box, saver
from tests.hostile.test_fortieth_reading_records import DENIES
from tests.hostile.test_forty_first_reading_plane import CONTROL, STOPS, across, may_bind, start_again
from tests.support.cgroups import attach_points
from tests.support.installation import Host
from tests.support.shell import Word
from tests.support.wait import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]
__all__ = ["box", "saver", "write_policy"]

BEFORE_ITS_END = STOPS.format(module="run", name="end_container")


@CONTROL
def test_the_end_of_a_program_removes_nothing_of_another_data_plane(
    bare_host: Host, box: Path, write_policy: WritePolicy, is_control: bool
) -> None:
    """Its shell has stopped it (Ctrl-Z). A container there has the number that it had."""
    host, policy = bare_host, write_policy(DENIES)
    host.graft("up")
    words: list[Word] = ["run", *host.run_flags, "--policy", policy, "--", "true"]
    attach: list[Word] = ["attach", "--cgroup", box, "--policy", policy]
    done = across(host, BEFORE_ITS_END, is_control, words, lambda: host.graft(*attach))
    assert [one["name"] for one in host.ps()] == ([] if is_control else [box.name])
    assert is_control or "Graft was taken down, and brought up again, while it ran" in done.stderr
    assert attach_points(box) and not may_bind(host, box)
    host.graft("down", "--force")


@CONTROL
def test_what_could_not_be_restored_is_tried_again(
    saver: Host, box: Path, write_policy: WritePolicy, is_control: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else may write to what is saved, until the operator sees to that."""
    store = start_again(saver, box, write_policy(DENIES))
    saver.graft("down", "--force")
    store.folder.chmod(0o777)
    assert "others" in saver.graft("up", status=None).stderr
    if is_control:
        watcher_process.stop(saver.settings)
    store.folder.chmod(0o700)
    (store.folder / ATTACHMENTS / "a").touch()  # else it tries again after half a minute
    (store.folder / ATTACHMENTS / "a").unlink()
    assert watcher_process.is_running(saver.settings) is not is_control
    if not is_control:
        until("it is restored", lambda: bool(saver.ps()))
    assert may_bind(saver, box) is is_control
