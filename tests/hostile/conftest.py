"""What hostile programs are tried on: victims that a test starts itself."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator

import pytest

Victims = Callable[[int], "subprocess.Popen[bytes]"]


@pytest.fixture
def victims() -> Iterator[Victims]:
    """Starts a sleeping process of the user with that id, in a process group of its own."""
    started: list[subprocess.Popen[bytes]] = []

    def start(user: int) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(["sleep", "60"], user=user, group=user, extra_groups=[], process_group=0))
        return started[-1]

    yield start
    for one in started:
        one.kill()
        one.wait()
