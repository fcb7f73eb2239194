"""What a forty-fourth reading found where Graft was taken down and brought up again, or its pins were lost: what was
begun before reached what has its number now. And what was known before: what could not be restored was not tried again.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from graft.commands import watcher_process
from graft.saved.store import ATTACHMENTS
from graft.splice import control
from tests.e2e.conftest import WritePolicy, write_policy
from tests.e2e.test_saved_state import box, saver
from tests.hostile.conftest import graft_without
from tests.hostile.test_fortieth_reading_records import DENIES, HOOKS_OFF, kill
from tests.hostile.test_forty_first_reading_plane import CONTROL, STOPS, across, may_bind, start_again
from tests.hostile.test_unix_paths import folder
from tests.support.cgroups import attach_points, new_cgroup
from tests.support.installation import GRAFT, Host
from tests.support.program import Program
from tests.support.puppet import puppet
from tests.support.shell import Word, run
from tests.support.wait import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]
__all__ = ["box", "folder", "saver", "write_policy"]

# ---- Graft is taken down, and brought up again --------------------------------------------------------

BEFORE_ITS_END = STOPS.format(module="run", name="end_container")
BEFORE_IT_CLOSES = STOPS.format(module="detach", name="withdraw")


@CONTROL
def test_the_end_of_a_program_removes_nothing_of_another_data_plane(
    bare_host: Host, box: Path, write_policy: WritePolicy, is_control: bool
) -> None:
    """Its shell has stopped it (Ctrl-Z). A container there has the number that it had."""
    host, policy = bare_host, write_policy(DENIES)
    host.graft("up")
    words: list[Word] = ["run", *host.run_flags, "--policy", policy, "--", "true"]
    attach: list[Word] = ["attach", "--cgroup", box, "--policy", policy]
    done = across(host, BEFORE_ITS_END, is_control, words, lambda: host.graft(*attach))
    assert [one["name"] for one in host.ps()] == ([] if is_control else [box.name])
    assert is_control or "Graft was taken down, and brought up again, while it ran" in done.stderr
    assert attach_points(box) and not may_bind(host, box)
    host.graft("down", "--force")


def test_nor_does_that_of_one_that_the_fork_server_has_started(
    saver: Host, box: Path, write_policy: WritePolicy
) -> None:
    """A saved container is restored with the number."""
    program = saver.start_command([GRAFT, "run", "--user", "nobody", "--deny", "--", "sleep", "600"])
    until("it runs", lambda: saver.installation.containers.listing())
    [first] = saver.installation.containers.listing()
    saver.graft("attach", "--cgroup", box, "--policy", write_policy(DENIES))
    os.kill(first.pid, signal.SIGSTOP)
    saver.graft("down", "--force")
    saver.graft("up")
    assert [one.id for one in saver.installation.containers.listing()] == [first.id]
    os.kill(first.pid, signal.SIGCONT)
    program.process.wait(30)
    assert [one["name"] for one in saver.ps()] == [box.name]
    assert not may_bind(saver, box)


@CONTROL
def test_a_detach_closes_nothing_of_another_data_plane(
    bare_host: Host, box: Path, write_policy: WritePolicy, is_control: bool
) -> None:
    host, port = bare_host, bare_host.port()
    policy = write_policy("name: web\ndefault: deny\ningress: [{bind: '0.0.0.0:80', endpoint: web}]\n")
    host.graft("ep", "add", "web", f"0.0.0.0:{port}")
    host.graft("attach", "--cgroup", box, "--policy", policy)
    with new_cgroup("other") as other, puppet(other, host.netns.path) as program:

        def attach_other() -> None:
            host.graft("ep", "add", "web", f"0.0.0.0:{port}")
            host.graft("attach", "--cgroup", other, "--policy", policy)
            program.listener("0.0.0.0", 80)

        across(host, BEFORE_IT_CLOSES, is_control, ["detach", "--cgroup", box], attach_other)
        assert host.netns.listens(port) is not is_control
        host.graft("down", "--force")


# ---- the pins are lost, and programs go on with the maps of before ----------------------------------------

EACH_LINE = """
import socket, sys
kept = []
for line in sys.stdin:
    try:
        print("ok", {call}, flush=True)
    except OSError as error:
        print("refused", error.errno, flush=True)
"""
BINDS = EACH_LINE.format(call="kept.append(socket.socket(socket.AF_UNIX)) or kept[-1].bind(sys.argv[1])")
CONNECTS = EACH_LINE.format(call="socket.create_connection((sys.argv[1], 5432), 5).recv(100)")
FAR = "198.51.100.7"


def answer(program: Program) -> str:
    """What it says of its next try."""
    before = len(program.said.splitlines())
    program.tell("\n")
    program.until("an answer", lambda: len(program.said.splitlines()) > before)
    return program.said.splitlines()[-1]


@contextmanager
def served(path: Path) -> Iterator[None]:
    """Somebody sends the file's name to each client at a unix socket that is root's only."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        path.chmod(0o600)
        listening.listen()

        def serve() -> None:
            while True:
                try:
                    client, _ = listening.accept()
                except OSError:
                    return
                with client:
                    client.sendall(path.stem.encode())

        serving = threading.Thread(target=serve)
        serving.start()
        yield
        listening.shutdown(socket.SHUT_RDWR)
        serving.join()


def lose_pins(host: Host, without: str) -> None:
    """Somebody removes the pins; a new data plane is made, in which an endpoint is the first one."""
    run(["rm", "-rf", host.settings.pin_dir], status=0)
    run([*graft_without(without), "up"], environment=host.environment, status=0)


def leads_to(endpoint: str) -> str:
    """A policy by which what is for an address far away goes to an endpoint."""
    return f"name: p\ndefault: deny\negress: [{{to: {FAR}, ports: [5432], endpoint: {endpoint}}}]\n"


def is_given(host: Host, policy: Path, text: str) -> None:
    """The one container gets another policy."""
    policy.write_text(text)
    [one] = host.installation.containers.listing()
    host.graft("policy", "apply", policy, "--cgroup", one.id)


@CONTROL
def test_a_program_of_a_lost_data_plane_does_not_serve_at_anothers_unix_endpoint(
    saver: Host, folder: Path, tmp_path: Path, is_control: bool
) -> None:
    """Which has, in the new one, the number of its own."""
    for name in ("first", "admin"):
        saver.graft("ep", "add", name, f"unix:{folder}/{name}.sock")
    command: list[Word] = ["run", "--user", "nobody", "-i", "unix:/own.sock=first", "--", "python3", "-c", BINDS]
    program = saver.start_command([GRAFT, *command, "/own.sock"], talk=True)
    assert answer(program) == "ok None"
    saver.graft("ep", "add", "mine", f"unix:{folder}/mine.sock")
    is_given(
        saver,
        tmp_path / "p.yaml",
        "name: p\ndefault: deny\ningress: [{bind: 'unix:/own.sock', endpoint: mine}]\n",
    )
    lose_pins(saver, "numbers of endpoints" if is_control else "")
    answer(program)
    assert (folder / "admin.sock").exists() is is_control


@CONTROL
def test_nor_is_it_connected_to_one(saver: Host, folder: Path, tmp_path: Path, is_control: bool) -> None:
    """graftd looks by the same numbers, and has the old maps where it goes on."""
    policy = tmp_path / "p.yaml"
    policy.write_text(leads_to("first"))
    with served(folder / "first.sock"), served(folder / "admin.sock"), served(folder / "mine.sock"):
        for name in ("first", "admin"):
            saver.graft("ep", "add", name, f"unix:{folder}/{name}.sock")
        command: list[Word] = ["run", "--user", "nobody", "--policy", policy, "--", "python3", "-c", CONNECTS, FAR]
        program = saver.start_command([GRAFT, *command], talk=True)
        assert answer(program) == "ok b'first'"
        saver.graft("ep", "add", "mine", f"unix:{folder}/mine.sock")
        is_given(saver, policy, leads_to("mine"))
        lose_pins(saver, "lost plane" if is_control else "")
        assert ("admin" in answer(program)) is is_control
        program.stop()


@CONTROL
def test_graftd_does_not_go_on_with_the_maps_of_a_lost_data_plane(
    saver: Host, box: Path, folder: Path, tmp_path: Path, is_control: bool
) -> None:
    """Where only a program with a supervisor, which goes on, has used it: it would serve no other container."""
    policy = tmp_path / "p.yaml"
    policy.write_text(leads_to("first"))
    with served(folder / "first.sock"):
        for name in ("first", "app"):
            saver.graft("ep", "add", name, f"unix:{folder}/{name}.sock")
        command: list[Word] = ["run", "--user", "nobody", "--policy", policy, "--", "python3", "-c", CONNECTS, FAR]
        program = saver.start_command([GRAFT, *command], talk=True)
        assert answer(program) == "ok b'first'"
        lose_pins(saver, "graftd of before" if is_control else "")
        saver.graft("attach", "--cgroup", box, "-i", "0.0.0.0:80=app")
        with puppet(box, saver.netns.path) as server:
            server.listener("0.0.0.0", 80)
            if is_control:
                with pytest.raises(AssertionError, match="it is served"):
                    until("it is served", lambda: (folder / "app.sock").exists(), 2)
            else:
                until("it is served", lambda: (folder / "app.sock").exists())
        program.stop()


@CONTROL
def test_nor_does_one_that_serves_nobody(
    saver: Host, box: Path, folder: Path, tmp_path: Path, is_control: bool
) -> None:
    """In the foreground, as a service manager has it."""
    policy = tmp_path / "p.yaml"
    policy.write_text(leads_to("first"))
    daemon = saver.start_command([GRAFT, "daemon"])
    until("it answers", lambda: control.ask(saver.settings, {"do": "ping"}))
    lose_pins(saver, "graftd of before" if is_control else "")
    with served(folder / "first.sock"), puppet(box, saver.netns.path) as program:
        saver.graft("ep", "add", "first", f"unix:{folder}/first.sock")
        saver.graft("attach", "--cgroup", box, "--policy", policy)
        assert (program.connect(FAR, 5432) == "ok") is not is_control
    daemon.stop()


@CONTROL
def test_the_end_of_a_program_leaves_what_is_begun_with_its_number(
    saver: Host, box: Path, write_policy: WritePolicy, is_control: bool
) -> None:
    """A detach that was killed with the hooks off: the next command finishes it."""
    policy = write_policy(DENIES)
    words: list[Word] = ["run", *saver.run_flags, "--policy", policy, "--", "true"]
    begun = saver.settings.run_dir / "begun"

    def detach_half() -> None:
        saver.graft("attach", "--cgroup", box, "--policy", policy)
        kill(saver, HOOKS_OFF, "", "detach", "--cgroup", box)
        assert list(begun.iterdir())

    across(saver, BEFORE_ITS_END, is_control, words, detach_half)
    assert bool(list(begun.iterdir())) is not is_control


# ---- what could not be restored ---------------------------------------------------------------------------


@CONTROL
def test_what_could_not_be_restored_is_tried_again(
    saver: Host, box: Path, write_policy: WritePolicy, is_control: bool
) -> None:
    """Somebody else may write to what is saved, until the operator sees to that."""
    store = start_again(saver, box, write_policy(DENIES))
    saver.graft("down", "--force")
    store.folder.chmod(0o777)
    assert "others" in saver.graft("up", status=None).stderr
    if is_control:
        watcher_process.stop(saver.settings)
    store.folder.chmod(0o700)
    (store.folder / ATTACHMENTS / "a").touch()  # else it tries again after half a minute
    (store.folder / ATTACHMENTS / "a").unlink()
    assert watcher_process.is_running(saver.settings) is not is_control
    if not is_control:
        until("it is restored", lambda: bool(saver.ps()))
    assert may_bind(saver, box) is is_control
