"""Two minutes of the soak, `make soak` for more."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak.soak import soak
from tests.support.installation import Host
from tests.support.wait import PATIENCE

pytestmark = pytest.mark.e2e
SECONDS = 120.0


@pytest.mark.timeout(900 * PATIENCE)
def test_what_is_served_is_served_whatever_is_killed(bare_host: Host, tmp_path: Path) -> None:
    bare_host.graft("up")
    report = soak(bare_host, tmp_path / "work", SECONDS, seed=12, show=print)
    assert report.problems == []
    assert report.requests > 1000 and report.forbidden_tried > 500
    assert sum(report.events.values()) > 20
