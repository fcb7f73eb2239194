"""What a thirty-eighth reading found: containers lost their hooks, or what these are judged by, when their data plane
was lost and graftd could not serve them, when a command was interrupted, or when their records were not there.
"""

from __future__ import annotations

import errno
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import installation
from tests.hostile.conftest import graft_without
from tests.support.cgroups import attach_points, new_cgroup
from tests.support.installation import GRAFT, Host
from tests.support.namespaces import CLIENT4, Netns
from tests.support.plain import Plain, plain
from tests.support.puppet import Puppet, puppet
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


@contextmanager
def boxes(host: Host) -> Iterator[tuple[Path, Path, Puppet, tuple[str, int]]]:
    """A cgroup, another one, a process in the first, and where it tries to connect to."""
    with (
        new_cgroup("box") as box,
        new_cgroup("other") as other,
        host.client.listener(CLIENT4) as listener,
        puppet(box, host.netns.path) as one,
    ):
        yield box, other, one, (CLIENT4, listener.getsockname()[1])


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


# ---- a command is interrupted, or killed, while it puts hooks in the place of others

ENDS = """
import os
from graft.datapath import attachments
attach = attachments.attach
def attach_and_end(settings, path, container, *rest, **named):
    attach(settings, path, container, *rest, **named)
    if container: %s
attachments.attach = attach_and_end
from tests.hostile.undefended import DEFENCES
if %r: DEFENCES[%r]()
from graft_cli.main import main
main()
"""
"""A command line that ends when it has attached the hooks of a container. Without a defence."""

CTRL_C, KILL = "raise KeyboardInterrupt", "os.kill(os.getpid(), 9)"


def run_to_its_end(host: Host, how: str, without: str, *words: Word) -> None:
    done = run([sys.executable, "-c", ENDS % (how, without, without), *words], environment=host.environment)
    assert done.returncode in (-signal.SIGKILL, 130), done.stderr


@pytest.mark.parametrize("without", ["", "begun kept"], ids=["", "control"])
@pytest.mark.parametrize("how", [CTRL_C, KILL], ids=["ctrl-c", "kill"])
def test_a_container_stays_confined_whose_hooks_are_replaced_by_half(
    own: Host, denies: Path, how: str, without: str
) -> None:
    with boxes(own) as (box, other, one, where):
        attach: list[Word] = ["attach", "--cgroup", box, "--policy", denies]
        own.graft(*attach)
        lose_pins(own)
        own.graft("up")
        run_to_its_end(own, how, without, *attach)
        if how == KILL:  # the next command that attaches something finds what was begun
            assert one.connect(*where) == "EACCES"
            words: list[Word] = [*graft_without(without), "attach", "--cgroup", other, "--policy", denies]
            run(words, environment=own.environment, status=0)
        assert one.connect(*where) == ("ok" if without else "EACCES")
        if not without:
            own.graft(*attach)
            assert one.connect(*where) == "EACCES"
            own.graft("detach", "--cgroup", box)
            assert one.connect(*where) == "ok" and not attach_points(box)
            left = {key.value for key in own.maps.containers.keys()}  # noqa: SIM118
            assert left == {one.id for one in own.installation.containers.listing()}


# ---- records that are not there


@pytest.mark.parametrize("without", ["", "unrecorded"], ids=["", "control"])
@pytest.mark.parametrize("how", ["removed", "elsewhere"])
def test_a_container_without_a_record_stays_confined(
    own: Host, denies: Path, tmp_path: Path, how: str, without: str
) -> None:
    """The folder was removed; or a command has another one (GRAFT_RUN_DIR), and the same maps."""
    with boxes(own) as (box, other, one, where):
        own.graft("attach", "--cgroup", box, "--policy", denies)
        environment = dict(own.environment)
        if how == "removed":
            run(["rm", "-rf", own.settings.run_dir / "containers"], status=0)
        else:
            environment["GRAFT_RUN_DIR"] = str(tmp_path / "elsewhere")
        words: list[Word] = ["attach", "--cgroup", other, "--policy", denies]
        run([*graft_without(without), *words], environment=environment, status=0)
        assert one.connect(*where) == ("ok" if without else "EACCES")
        run([GRAFT, "detach", "--cgroup", other], environment=environment, status=0)


# ---- an attach that was killed


@pytest.mark.parametrize("without", ["", "begun kept"], ids=["", "control"])
def test_of_a_killed_attach_no_hooks_are_left(host: Host, denies: Path, without: str) -> None:
    with new_cgroup("killed") as killed, new_cgroup("other") as other:
        run_to_its_end(host, KILL, "", "attach", "--cgroup", killed, "--policy", denies)
        assert attach_points(killed)
        words: list[Word] = [*graft_without(without), "attach", "--cgroup", other, "--policy", denies]
        run(words, environment=host.environment, status=0)
        assert bool(attach_points(killed)) is bool(without)
        with new_cgroup("inner", killed) as inner:
            done = host.graft("attach", "--cgroup", inner, "--policy", denies, status=None)
            assert done.returncode == (7 if without else 0), done.stderr


RECORD_ONLY = """
import os
from graft.state import begun
finish = begun.finish
begun.finish = lambda *args: (finish(*args), os.kill(os.getpid(), 9))
from graft_cli.main import main
main()
"""
"""A command line that is killed when a container has its record, and before that of the lost data plane is gone."""


@pytest.mark.parametrize("without", ["", "nesting"], ids=["", "control"])
def test_a_record_that_was_put_aside_permits_no_nesting(own: Host, denies: Path, without: str) -> None:
    with new_cgroup("top") as top, new_cgroup("inner", top) as inner:
        attach: list[Word] = ["attach", "--cgroup", inner, "--policy", denies]
        own.graft(*attach)
        lose_pins(own)
        own.graft("up")
        killed = run([sys.executable, "-c", RECORD_ONLY, *attach], environment=own.environment)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        own.graft("detach", "--cgroup", inner)
        own.graft("attach", "--cgroup", top, "--policy", denies)
        done = run([*graft_without(without), *attach], environment=own.environment)
        assert done.returncode == (0 if without else 7), done.stderr
        assert bool(attach_points(inner)) is bool(without)


# ---- bpffs is lost where nothing is saved


@pytest.mark.parametrize("without", ["", "put aside"], ids=["", "control"])
def test_the_first_command_finds_that_a_data_plane_is_lost(own: Host, denies: Path, without: str) -> None:
    with new_cgroup("box") as box:
        attach: list[Word] = ["attach", "--cgroup", box, "--policy", denies]
        own.graft(*attach)
        lose_pins(own)
        done = run([*graft_without(without), *attach], environment=own.environment)
        assert done.returncode == (6 if without else 0), done.stderr


@pytest.mark.parametrize("without", ["", "put aside"], ids=["", "control"])
def test_down_removes_the_hooks_of_a_data_plane_that_is_lost(own: Host, denies: Path, without: str) -> None:
    with new_cgroup("box") as box:
        own.graft("attach", "--cgroup", box, "--policy", denies)
        lose_pins(own)
        run([*graft_without(without), "down", "--force"], environment=own.environment, status=0)
        assert bool(attach_points(box)) is bool(without)


TWICE = """
import os, signal, sys
from graft.state import container_changes, installation
def end(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
if sys.argv.pop(1) == "before its hooks":
    container_changes.attachments.attach = end
else:
    installation.Installation.reap = lambda self: None  # as if the first one was killed just after it
    container_changes.ContainerChanges._forget = end
from graft_cli.entry import main
sys.argv[0] = "graft"
sys.exit(main())
"""


def test_what_is_undone_of_one_attach_leaves_the_hooks_of_the_next(own: Host, denies: Path) -> None:
    with new_cgroup("box") as box:
        for when in ("before its hooks", "before it forgets the first one"):
            words: list[Word] = [sys.executable, "-c", TWICE, when, "attach", "--cgroup", box, "--policy", denies]
            run(words, environment=own.environment, status=-signal.SIGKILL)
        own.installation.reap()
        assert attach_points(box)
        assert [one.cgroup for one in own.installation.containers.listing()] == [str(box)]
