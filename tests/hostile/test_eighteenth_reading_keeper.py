"""What an eighteenth reading found about graftd's keeper, and commands: a user of the host who holds the folder in
/proc of a process, in the moment in which it is made or has a lock, kept graftd from coming back, and all commands
waiting.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from select import select

import pytest

from graft.commands import attach, restore
from graft.errors import KernelError
from graft.kernel.file_lock import is_locked
from graft.model.settings import Settings
from graft.policy.model import Policy
from graft.saved.store import Store
from graft.splice import client as splice
from graft.splice import daemon_process
from tests.hostile.conftest import graft_without
from tests.hostile.test_daemon_shares import served
from tests.hostile.test_seventeenth_reading_keeper import log_of
from tests.hostile.test_sixteenth_reading_keeper import graftd, keeper
from tests.support.building import Programs
from tests.support.installation import Host
from tests.support.namespaces import Netns, namespace
from tests.support.plain import Plain, plain
from tests.support.relayed import published
from tests.support.shell import Word
from tests.support.wait import PATIENCE, kill, until

pytestmark = pytest.mark.e2e

RACES = 16
"""He wins about every second one."""


class Grabbing:
    """tests/programs/grabbing.c, which waits for its victim."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self._output = process.stdout
        assert self._output.readline() == "ready\n"

    def holds(self, seconds: float) -> int:
        """The process id of its victim; 0 where it gets none in time."""
        return int(self._output.readline().split()[1]) if select([self._output], [], [], seconds)[0] else 0


@contextmanager
def grabbing(programs: Programs, *words: Word) -> Iterator[Grabbing]:
    """Wait for a victim, and hold it until the block ends."""
    command = [str(word) for word in (programs["grabbing"], *words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Grabbing(process)
        finally:
            process.kill()


# ---- who holds the child of graftd's keeper before it has looked anything up


@pytest.fixture
def served_container(host: Host, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Plain]]:
    """A container to attach. Its graftd's keeper is started with a line of Python before. Both end with the test."""
    with ExitStack() as stack:

        def start(line: str) -> Plain:
            splice.stop(host.settings)
            monkeypatch.setattr(
                daemon_process,
                "_KEEPER",
                daemon_process._KEEPER.replace("from graft", f"{line}; from graft", 1),
            )
            daemon_process.ensure_running(host.settings)
            return stack.enter_context(plain(host))

        yield start
    splice.stop(host.settings)


HAS_ALL_TIME = "from graft.keeper.prepared import Forks; Forks.__init__.__defaults__ = (1e6,)"


@contextmanager
def taken_child(container: Plain, programs: Programs) -> Iterator[None]:
    """Hold the folder of the next graftd, and kill the one that runs."""
    host = container.host
    with grabbing(programs, "child", "graft-keeper", keeper(host)) as grab:
        kill(graftd(host))
        grab.holds(2.0 * PATIENCE)
        yield


@pytest.mark.flaky(reruns=1)  # it depends on how much of the machine it gets
@pytest.mark.timeout(300)
def test_graftd_comes_back_though_its_child_is_held(
    served_container: Callable[[str], Plain], programs: Programs
) -> None:
    container = served_container("pass")
    with container.listener() as listener:
        port = published(container)
        for _ in range(RACES):
            with taken_child(container, programs):
                assert served(container, listener, port, 20 * PATIENCE)
            if "waits in the kernel for its own folder" in log_of(container.host):
                return
    pytest.skip("nobody was quick enough")


@pytest.mark.timeout(300)
def test_control_one_that_waits_for_its_child_starts_no_other(
    served_container: Callable[[str], Plain], programs: Programs
) -> None:
    container = served_container(HAS_ALL_TIME)
    with container.listener() as listener:
        port = published(container)
        for _ in range(RACES):
            with taken_child(container, programs):
                is_back = served(container, listener, port, 5 * PATIENCE)
            until("it is back", lambda: served(container, listener, port, 1.0), timeout=30)
            if not is_back:
                return
    pytest.skip("nobody was quick enough")


# ---- who waits for a graftd that does not start


def test_who_starts_a_graftd_that_is_never_ready_does_not_wait_for_ever(
    bare_host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare_host.graft("up")
    monkeypatch.setattr(daemon_process, "_READY_SECONDS", 0.5)
    monkeypatch.setattr(daemon_process, "graftd_command", lambda *_: ["/bin/sleep", "600"])
    with pytest.raises(KernelError, match="not ready after") as raised:
        daemon_process.ensure_running(bare_host.settings)
    assert raised.value.hint == f"see {bare_host.settings.run_dir}/graftd.log"


@pytest.fixture
def noted_locks(host: Host, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether the lock on what is saved was taken, each time that graftd was to be started."""
    found: list[bool] = []
    ensure = splice.ensure_daemon

    def note(settings: Settings) -> None:
        found.append(is_locked(settings.state_dir / "saved.lock"))
        ensure(settings)

    monkeypatch.setattr(splice, "ensure_daemon", note)
    yield found


def test_graftd_is_started_without_the_lock_on_what_is_saved(host: Host, noted_locks: list[bool]) -> None:
    saving = host.saving
    with plain(saving) as container:
        splice.stop(host.settings)
        attach.attach(saving.installation, str(container.cgroup), Policy("web"), save=True)
        assert noted_locks == [False]
        saving.graft("detach", "--no-save", "--cgroup", container.cgroup)
        splice.stop(host.settings)
        noted_locks.clear()
        Store(saving.settings).resume_all()
        assert restore.restore(saving.installation).attached == [f"cgroup:{container.cgroup.name}"]
        assert noted_locks == [False]
        saving.graft("detach", "--cgroup", container.cgroup)


# ---- who holds a command that has the installation's lock


@pytest.fixture(scope="module")
def other() -> Iterator[Netns]:
    with namespace("other") as made:
        yield made


def adds(host: Host, words: list[Word], programs: Programs, seconds: float, other: Netns, name: str) -> int | None:
    """The status of `graft ep add --netns`, whose folder is held as soon as it has the lock, and which ends in time."""
    lock = host.settings.run_dir / "lock"
    command = [*words, "ep", "add", name, f"127.0.0.1:{host.port()}", "--netns", other.name]
    with grabbing(programs, "lock", lock.stat().st_ino) as grab:
        process = subprocess.Popen(
            [str(word) for word in command], env={**os.environ, **host.environment}, stderr=subprocess.DEVNULL
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            assert grab.holds(0), "it waits for something else"
            return None
        finally:
            process.kill()


_names = itertools.count()


def test_a_command_gets_on_whose_folder_is_held_while_it_has_the_lock(
    host: Host, programs: Programs, other: Netns
) -> None:
    words: list[Word] = [Path(sys.executable).with_name("graft")]
    for _ in range(RACES // 2):
        assert adds(host, words, programs, 20 * PATIENCE, other, f"held{next(_names)}") == 0


@pytest.mark.timeout(300)
def test_control_else_it_waits_with_the_lock(host: Host, programs: Programs, other: Netns) -> None:
    words = graft_without("own descriptors")
    for _ in range(RACES):
        if adds(host, words, programs, 5 * PATIENCE, other, f"held{next(_names)}") is None:
            return
    pytest.skip("nobody was quick enough")
