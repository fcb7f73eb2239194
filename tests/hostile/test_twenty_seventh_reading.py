"""What the twenty-seventh reading found: a call waits for its supervisor, another thread executes a set-user-id
program, which takes the caller's id over, and the supervisor did for that one what it had begun to do for the caller.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hostile.conftest import graft_without
from tests.support.building import Programs
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4
from tests.support.shell import Word

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

DEFENDED = pytest.mark.parametrize("without", ["", "waiting callers"], ids=["", "control"])
DUPLICATES = 900
"""Of one socket, all of them registered: what replaces it is registered as often, which takes some time."""


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="gu-") as made:
        Path(made).chmod(0o755)
        yield Path(made)


def event_of(host: Host, programs: Programs, folder: Path, without: str, microseconds: int) -> str:
    """What a set-user-id program got that waits with an epoll instance of its own."""
    suid = folder / "suid"
    shutil.copy(programs["waiting_root"], suid)
    suid.chmod(0o4755)
    with host.client.listener() as far:
        rule = f"{CLIENT4}={host.endpoint('0.0.0.0:dynamic')}"
        words: list[Word] = [programs["registering"], CLIENT4, far.getsockname()[1], microseconds, DUPLICATES, suid]
        program = host.start_command(
            [*graft_without(without), "run", "--user", "nobody", "-e", rule, "--", *words], talk=True
        )
        program.wait()
    assert "euid 0" in program.said, program.complained
    return program.said


@DEFENDED
def test_nothing_is_registered_with_a_program_that_was_executed_meanwhile(
    host: Host, programs: Programs, folder: Path, without: str
) -> None:
    delays = [20_000, 40_000, 60_000, 80_000, 120_000]
    has_event = ["data 4141" in event_of(host, programs, folder, without, one) for one in delays]
    if without and not any(has_event):
        pytest.skip("the supervisor was not in between, on this machine, this time")
    assert any(has_event) == bool(without)


def is_others_file(host: Host, programs: Programs, folder: Path, without: str, seconds: int) -> bool:
    """Whether a program made a file on the host that is another one's."""
    path = folder / "a.sock"
    rule = f"unix:/own.sock={host.endpoint(f'unix:{path}')}"
    words: list[Word] = [programs["owning"], "/own.sock", path, seconds, 1500, "/usr/bin/umount", "--version"]
    program = host.start_command(
        [*graft_without(without), "run", "--user", "nobody", "-i", rule, "--", *words], talk=True
    )
    program.until("an answer", lambda: "\n" in program.said, seconds + 15)
    is_others = "listens at a socket of 0:" in program.said and os.stat(path).st_uid == 0
    assert is_others or "never" in program.said
    program.process.kill()
    program.wait()
    return is_others


@DEFENDED
def test_a_unix_sockets_file_is_not_the_users_whose_program_was_executed_meanwhile(
    host: Host, programs: Programs, folder: Path, without: str
) -> None:
    is_others = is_others_file(host, programs, folder, without, 20 if without else 8)
    if without and not is_others:
        pytest.skip("the supervisor did not ask in between, on this machine, this time")
    assert is_others == bool(without)
