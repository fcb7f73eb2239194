"""What the thirty-fourth reading found: where /run was full, as a container can make it, an endpoint that could not be
changed had lost its network namespace, or had another one already.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hostile.test_thirty_second_reading import Small, small
from tests.support.installation import Host
from tests.support.namespaces import namespace
from tests.support.small_run import empty, fill

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]
__all__ = ["small"]


def shown(host: Host) -> str:
    return host.graft("ep", "show").stdout


@pytest.mark.parametrize("changed", ["127.0.0.1:5002 --netns {other}", "127.0.0.1:5001 --netns {other}", "unix:{path}"])
def test_where_run_is_full_an_endpoint_is_changed_or_keeps_its_namespace(
    small: Small, tmp_path: Path, changed: str
) -> None:
    host, others = small
    with namespace("one") as one, namespace("two") as two:
        words = changed.format(other=two.name, path=tmp_path / "sock").split()
        host.graft("ep", "add", "e", "127.0.0.1:5001", "--netns", one.name)
        before, folder = shown(host), host.settings.run_dir / "netns"
        files = {path: path.stat().st_ino for path in folder.iterdir()}
        assert one.name in before
        fill(others)
        done = host.graft("ep", "set", "e", *words, status=None)
        assert done.returncode == 6 and "No space left" in done.stderr
        assert shown(host) == before
        assert {path: path.stat().st_ino for path in folder.iterdir()} == files
        empty(others)
        host.graft("ep", "set", "e", *words)
        after = shown(host)
        assert after != before and one.name not in after
        pins = [path for path in folder.iterdir() if path.suffix != ".name"]
        assert len(pins) == len(list(folder.iterdir())) - len(pins) == ("netns" in changed)
        assert not any(path.stat().st_ino == inode for path, inode in files.items() if path in pins)
        host.graft("ep", "del", "e")
        assert not list(folder.iterdir())


def test_where_run_is_full_an_endpoint_on_the_host_stays_there(small: Small) -> None:
    host, others = small
    with namespace("one") as one:
        host.graft("ep", "add", "e", "127.0.0.1:5001")
        before, folder = shown(host), host.settings.run_dir / "netns"
        fill(others)
        done = host.graft("ep", "set", "e", "127.0.0.1:5001", "--netns", one.name, status=None)
        assert done.returncode == 6 and "No space left" in done.stderr
        assert shown(host) == before
        assert not list(folder.glob("*"))
        empty(others)
        host.graft("ep", "set", "e", "127.0.0.1:5001", "--netns", one.name)
        assert one.name in shown(host)
        host.graft("ep", "set", "e", "127.0.0.1:5001")
        assert shown(host) == before
        host.graft("ep", "del", "e")
