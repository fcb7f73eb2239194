"""What a thirty-sixth reading found in what is saved, and in what is changed for now (`--no-save`): a container came out
of a policy that the operator had put in force.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.conftest import WritePolicy, write_policy
from tests.e2e.test_saved_state import attached, box, saver
from tests.support.installation import Host
from tests.support.policies import DENY_ALL
from tests.support.puppet import puppet

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(250)]
__all__ = ["box", "saver", "write_policy"]


# ---- an import puts all of its file in force --------------------------------------------------------


def test_an_import_attaches_what_was_detached_for_now(
    saver: Host, box: Path, write_policy: WritePolicy, tmp_path: Path
) -> None:
    file = tmp_path / "all.yaml"
    saver.graft("ep", "add", "web", "127.0.0.1:1")
    saver.graft("attach", "--cgroup", box, "--policy", write_policy(DENY_ALL))
    file.write_text(saver.graft("export").stdout)
    saver.graft("detach", "--cgroup", box, "--no-save")
    saver.graft("ep", "del", "--no-save", "web")
    said = saver.graft("import", file).stdout.splitlines()
    assert said[0] == "endpoints made: web"
    assert len(said) == 2 and said[1].startswith("attached: cgroup:"), "not: nothing to change"
    assert attached(saver, box)
    with puppet(box, saver.netns.path) as program:
        assert program.bind("0.0.0.0", saver.port()) == "EACCES"


def test_what_was_detached_for_now_waits_after_an_import_where_it_does_not_run(
    saver: Host, box: Path, write_policy: WritePolicy, tmp_path: Path
) -> None:
    file = tmp_path / "all.yaml"
    saver.graft("attach", "--cgroup", box, "--policy", write_policy(DENY_ALL))
    file.write_text(saver.graft("export").stdout)
    saver.graft("detach", "--cgroup", box, "--no-save")
    box.rmdir()
    assert "waits: it is not running" in saver.graft("import", file).stdout
    assert [one["state"] for one in saver.ps()] == ["waiting"]
    box.mkdir()
