"""What a thirty-eighth reading found: containers lost their hooks, or what these are judged by, when their data plane
was lost and graftd could not serve them, when a command was interrupted, or when their records were not there.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import installation
from tests.hostile.conftest import graft_without
from tests.support.installation import Host
from tests.support.namespaces import Netns
from tests.support.plain import Plain, plain
from tests.support.shell import Word, run
from tests.support.wait import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

LOOPBACK = "127.0.0.1/8", "dev", "lo"


@pytest.fixture
def own(net: tuple[Netns, Netns], tmp_path: Path) -> Iterator[Host]:
    """An installation that may lose its pins."""
    with installation(tmp_path, *net, "lost") as made:
        made.graft("up")
        yield made


@pytest.fixture
def denies(tmp_path: Path) -> Path:
    """A policy that permits nothing on the host's stack; in transport splice, nothing at all but to listen inside."""
    policy = tmp_path / "denies.yaml"
    policy.write_text("name: nothing\ndefault: {bind: container, connect: deny}\n")
    return policy


def lose_pins(host: Host) -> None:
    """As if bpffs were unmounted."""
    run(["rm", "-rf", host.settings.pin_dir], status=0)


# ---- graftd says that it cannot serve a container


def connects_inside(container: Plain) -> str:
    with container.tcp() as sock:
        return errno.errorcode.get(sock.connect_ex(("127.0.0.1", 9)), "ok")


@pytest.mark.parametrize("without", ["", "kept unserved"], ids=["", "control"])
@pytest.mark.parametrize("how", ["attach", "up"])
def test_a_container_that_graftd_cannot_serve_stays_confined(own: Host, denies: Path, how: str, without: str) -> None:
    """No port is free at 127.0.0.1 of its namespace, say, or root there has deleted that: graftd cannot listen."""
    used = own.saving if how == "up" else own
    with plain(used) as container:
        attach: list[Word] = ["attach", "--cgroup", container.cgroup, "--policy", denies]
        used.graft(*attach)
        assert connects_inside(container) == "EACCES"
        container.netns.run("ip", "address", "del", *LOOPBACK)
        lose_pins(used)
        if how == "attach":
            used.graft("up")
        done = run([*graft_without(without), *(["up"] if how == "up" else attach)], environment=used.environment)
        if not without:
            assert connects_inside(container) == "EACCES"
            assert how == "up" or done.returncode == 8, done.stderr
            assert "not served: " in used.graft("ps").stdout
        container.netns.run("ip", "address", "add", *LOOPBACK)
        assert connects_inside(container) == ("ECONNREFUSED" if without else "EACCES")
        if not without:
            until("it is served", lambda: container.described()["serves"], timeout=30)
            used.graft("detach", "--cgroup", container.cgroup)
