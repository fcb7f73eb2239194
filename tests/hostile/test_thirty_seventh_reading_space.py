"""What the thirty-seventh reading found, where no space is left: a data plane that was restored while /run was full, as
a container can make it, was restored again by each command, with what an operator had taken away.
"""

from __future__ import annotations

import pytest

from tests.hostile.conftest import graft_without
from tests.hostile.test_thirty_second_reading import Small, small
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
        run(["rm", "-rf", host.settings.pin_dir], status=0)
        assert "web" in saver.graft("ep", "show").stdout, "until a data plane is made again"
        saver.graft("detach", "--cgroup", one.cgroup)
