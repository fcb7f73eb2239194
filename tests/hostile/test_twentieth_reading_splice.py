"""Who has graftd take its time has nobody else wait for the lock on what is saved: what the twentieth reading found.

graftd is never started under that lock, and asked for two seconds at most: also for a container of transport direct
whose policy names a unix socket, also where graftd has ended while a command waited for the lock, and also where it is
inside of one long call.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from graft.commands import attach, restore
from graft.kernel.file_lock import is_locked
from graft.model.settings import Settings
from graft.model.transport import Transport
from graft.policy.model import Policy
from graft.policy.reader import load_policy
from graft.saved.store import Store
from graft.splice import client as splice
from graft.splice import control, daemon_process
from graft.state.installation import Installation
from graft.state.records import Container
from tests.support.cgroups import in_cgroup, new_cgroup
from tests.support.installation import Host
from tests.support.plain import Plain, plain
from tests.support.program import start

pytestmark = pytest.mark.kernel


def has_lock(settings: Settings) -> bool:
    return is_locked(settings.state_dir / "saved.lock")


@pytest.fixture
def starts(host: Host, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether the lock on what is saved was taken, each time that graftd was started. None runs at first."""
    found: list[bool] = []
    real = daemon_process._start

    def note(settings: Settings) -> None:
        found.append(has_lock(settings))
        real(settings)

    splice.stop(host.settings)
    monkeypatch.setattr(daemon_process, "_start", note)
    yield found


@pytest.fixture
def direct(host: Host) -> Iterator[Path]:
    """The cgroup of a program in the host's namespace."""
    with new_cgroup("direct") as path:
        program = start([*in_cgroup(path), *host.netns.command("sleep", "600")])
        yield path
        program.stop()


def unix_policy(folder: Path, name: str) -> Policy:
    """A policy whose only rule leads to a unix socket, which graftd relays for."""
    rules = f"endpoints:\n  {name}: unix:{folder}/s\ningress:\n  - {{bind: 0.0.0.0:80, endpoint: {name}}}\n"
    return load_policy(f"name: p\n{rules}", "p.yaml", {})


def test_graftd_is_started_without_the_lock_for_a_unix_socket(
    host: Host, direct: Path, starts: list[bool], tmp_path: Path
) -> None:
    saving = host.saving
    done = attach.attach(saving.installation, str(direct), unix_policy(tmp_path, "one"), save=True)
    assert (done.container.transport, done.is_served, done.unserved) == (Transport.DIRECT, True, "")
    assert starts == [False]
    saving.graft("detach", "--no-save", "--cgroup", direct)
    splice.stop(host.settings)
    starts.clear()
    Store(saving.settings).resume_all()
    assert restore.restore(saving.installation).attached == [f"cgroup:{direct.name}"]
    assert starts == [False]
    saving.graft("detach", "--cgroup", direct)


def start_under_lock(graft: Installation, container: Container, pid: int = 0) -> bool:
    """What `begin_to_serve` was before."""
    splice.serve(graft, container, pid)
    return True


@pytest.fixture
def ended_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """graftd runs when a command looks, and has ended when it has the lock: it had nothing to serve."""
    real = attach.Seen.ensure_daemon

    def ensure(seen: attach.Seen, graft: Installation, policy: Policy) -> None:
        real(seen, graft, policy)
        splice.stop(graft.settings)

    monkeypatch.setattr(attach.Seen, "ensure_daemon", ensure)


@pytest.fixture
def container(host: Host) -> Iterator[Plain]:
    with plain(host.saving) as made:
        yield made


def test_graftd_that_has_ended_meanwhile_is_started_after_the_lock(
    host: Host, container: Plain, starts: list[bool], ended_meanwhile: None
) -> None:
    saving = host.saving
    done = attach.attach(saving.installation, str(container.cgroup), Policy("web"), save=True)
    assert starts == [False, False]
    assert not done.unserved and splice.describe(saving.settings, done.container)["serves"]
    saving.graft("detach", "--no-save", "--cgroup", container.cgroup)
    splice.stop(host.settings)
    starts.clear()
    Store(saving.settings).resume_all()
    assert restore.restore(saving.installation).attached == [f"cgroup:{container.cgroup.name}"]
    assert starts == [False, False]
    [record] = saving.installation.containers.listing()
    assert splice.describe(saving.settings, record)["serves"]
    saving.graft("detach", "--cgroup", container.cgroup)


def test_control_where_it_is_asked_for_as_by_others_it_is_started_under_the_lock(
    host: Host, container: Plain, starts: list[bool], ended_meanwhile: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(splice, "begin_to_serve", start_under_lock)
    saving = host.saving
    attach.attach(saving.installation, str(container.cgroup), Policy("web"), save=True)
    assert starts == [False, True]
    saving.graft("detach", "--cgroup", container.cgroup)


def test_graftd_in_a_long_call_has_two_seconds_under_the_lock(
    host: Host, container: Plain, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving = host.saving
    splice.ensure_daemon(saving.settings)
    graftd = int((control.ask(saving.settings, {"do": "ping"}) or {})["pid"])
    waits: list[float] = []
    ask, ensure = control.ask, attach.Seen.ensure_daemon

    def note(settings: Settings, request: dict[str, Any], timeout: float = control.TIMEOUT_SECONDS) -> Any:
        if not has_lock(settings):
            return ask(settings, request, timeout)
        waits.append(timeout)
        try:
            return ask(settings, request, timeout)
        finally:
            os.kill(graftd, signal.SIGCONT)

    def ensure_and_stop(seen: attach.Seen, graft: Installation, policy: Policy) -> None:
        ensure(seen, graft, policy)
        os.kill(graftd, signal.SIGSTOP)

    monkeypatch.setattr(control, "ask", note)
    monkeypatch.setattr(attach.Seen, "ensure_daemon", ensure_and_stop)
    done = attach.attach(saving.installation, str(container.cgroup), Policy("web"), save=True)
    assert waits == [2.0]
    assert not done.is_served and not done.unserved  # it was told when nobody waited
    saving.graft("detach", "--cgroup", container.cgroup)
