"""What a thirty-sixth reading found: a container whose cgroup has a name that is not UTF-8 was attached, and no command
found it afterwards: it kept its policy when others got a narrower one, and nobody removed what it had in the maps.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from graft.kernel import cgroup
from tests.hostile.conftest import graft_without
from tests.kernel.test_lifecycle import numbers
from tests.support.cgroups import new_cgroup
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4
from tests.support.puppet import puppet
from tests.support.shell import Word, run
from tests.support.wait import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(250)]

WIDE = "name: p\nendpoints: {out: '0.0.0.0:dynamic'}\negress: [{to: 0.0.0.0/0, endpoint: out}]\ndefault: deny\n"
NARROW = "name: p\ndefault: deny\n"
TIMES = 3
UNREADABLE = "names of any bytes"


@pytest.fixture
def odd(tmp_path: Path) -> Iterator[Path]:
    """A cgroup as a user may name one in a tree that is delegated to him."""
    path = Path(os.fsdecode(os.fsencode(cgroup.v2_mount()) + b"/graft-test-%d-x\xff\xfe" % os.getpid()))
    path.mkdir()
    try:
        yield path
    finally:
        if path.exists():
            path.rmdir()


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A wide policy and a narrow one of its name."""
    wide, narrow = tmp_path / "wide.yaml", tmp_path / "narrow.yaml"
    wide.write_text(WIDE)
    narrow.write_text(NARROW)
    return wide, narrow


@pytest.mark.parametrize("without", ["", UNREADABLE], ids=["", "control"])
@pytest.mark.parametrize("by_path", [False, True])
def test_it_gets_the_policy_that_others_get(
    host: Host, odd: Path, files: tuple[Path, Path], by_path: bool, without: str
) -> None:
    command = graft_without(without)
    wide, narrow = files
    with host.client.listener(CLIENT4) as listener, puppet(odd, host.netns.path) as process:
        port = listener.getsockname()[1]
        run([*command, "attach", "--cgroup", odd, "--policy", wide], environment=host.environment, status=0)
        try:
            assert process.connect(CLIENT4, port) == "ok"
            chosen: list[Word] = ["--cgroup", odd] if by_path else []
            run([*command, "policy", "apply", narrow, *chosen], environment=host.environment)
            assert process.connect(CLIENT4, port) == ("ok" if without else "EACCES")
        finally:
            host.graft("detach", "--cgroup", odd)


def test_nothing_is_left_of_it_each_time_that_it_is_made_anew(host: Host, odd: Path, files: tuple[Path, Path]) -> None:
    saving, before = host.saving, numbers(host)
    saving.graft("attach", "--cgroup", odd, "--policy", files[0])
    try:
        for _ in range(TIMES):
            seen = numbers(host)
            odd.rmdir()
            odd.mkdir()
            until("attached again", lambda: numbers(host) - seen)  # noqa: B023
        saving.graft("ps")
        assert len(numbers(host) - before) == 1
    finally:
        saving.graft("detach", "--cgroup", odd)


def test_policy_apply_says_that_one_cannot_be_read(host: Host, files: tuple[Path, Path]) -> None:
    wide, narrow = files
    with new_cgroup("other") as other:
        host.graft("attach", "--cgroup", other, "--policy", wide)
        [record] = (one for one in host.installation.containers.listing() if one.cgroup == str(other))
        file = host.settings.run_dir / "containers" / f"{record.id}.json"
        text = file.read_text()
        try:
            file.write_text("{")
            said = host.graft("policy", "apply", narrow, status=8)
            assert str(file) in said.stderr
        finally:
            file.write_text(text)
            host.graft("detach", "--cgroup", other)
