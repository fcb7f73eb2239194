"""What a thirty-eighth reading found in what is saved: a container came out of a policy that the operator had put in
force, by a data plane that was lost, a command that was ended, or a policy that was applied by its name.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import WritePolicy, write_policy
from tests.e2e.test_saved_state import attached, box, saver
from tests.hostile.conftest import graft_without
from tests.hostile.test_thirty_sixth_reading_saved import NARROW, WIDE, connects, wide
from tests.support.installation import Host
from tests.support.shell import Word, run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(250)]
__all__ = ["box", "saver", "wide", "write_policy"]


# ---- what is for now, when the data plane is lost ---------------------------------------------------


@pytest.fixture
def lost(wide: Host, box: Path, write_policy: WritePolicy) -> Iterator[Host]:
    """A host where ``box`` is saved with a wide policy, has a narrow one for now, and whose bpffs is lost."""
    wide.graft("policy", "apply", "--no-save", write_policy(NARROW))
    assert connects(wide, box) == "EACCES"
    run(["rm", "-rf", wide.settings.pin_dir], status=0)
    yield wide


@pytest.mark.parametrize("command", [["up"], ["ep", "show"]], ids=" ".join)
def test_a_policy_for_now_outlives_the_data_plane(lost: Host, box: Path, command: list[Word]) -> None:
    lost.graft(*command)
    assert attached(lost, box)
    assert connects(lost, box) == "EACCES"
    lost.graft("down")
    lost.graft("up")
    assert connects(lost, box) == "ok", "that ends what is for now"


def test_without_its_note_a_lost_data_plane_puts_the_saved_policy_in_force(lost: Host, box: Path) -> None:
    run([*graft_without("for now when lost"), "up"], environment=lost.environment, status=0)
    assert connects(lost, box) == "ok"


def test_what_was_taken_away_for_now_does_not_come_back_with_a_new_data_plane(
    saver: Host, box: Path, write_policy: WritePolicy
) -> None:
    saver.graft("ep", "add", "web", f"127.0.0.1:{saver.port()}")
    saver.graft("attach", "--cgroup", box, "--policy", write_policy(WIDE.replace("out", "web")))
    saver.graft("detach", "--no-save", "--cgroup", box)
    saver.graft("ep", "del", "--no-save", "web")
    run(["rm", "-rf", saver.settings.pin_dir], status=0)
    saver.graft("up")
    assert "web" not in saver.graft("ep", "show").stdout
    assert saver.ps() == []
