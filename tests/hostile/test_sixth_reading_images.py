"""What a sixth reading found around containers: a cgroup below the one of the container, annotations that only the
runtime package's wrapper looked at, code in the working directory, and an id that is none.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from graft.errors import ConflictError, RefusedError
from graft.kernel import cgroup, netns
from graft.kernel.syscalls import syscall
from graft.model.settings import Settings
from graft.model.transport import Transport
from graft.oci import shim
from graft.oci.listener import ListenerServer
from graft.oci.options import RuntimeOptions
from graft.oci.plan import Plan, find_container
from graft.oci.request import check_annotations
from graft.oci.state import State
from graft.policy.model import Policy
from graft.splice import daemon_process, selftest_result
from graft.state.installation import Installation
from tests.hostile.conftest import graft_without
from tests.hostile.test_fourth_reading import DOCKERS, PODMANS
from tests.support import engines
from tests.support.cgroups import new_cgroup
from tests.support.installation import Host
from tests.support.shell import Word, output, run
from tests.support.wait import until

pytestmark = pytest.mark.e2e

SUBGROUPS = ("run.oci.delegate-cgroup", "run.oci.systemd.subgroup")
FILTERS = ("run.oci.seccomp.receiver", "run.oci.seccomp.plugins", "run.oci.seccomp_bpf_data")

# ---- an image has crun put its first process into a cgroup below the container's, out of which it moves -------------

PORT = 40863
_PROGRAM = f"""
tries() {{
    nc -l -p {PORT} & sleep 0.5
    busybox grep -qE ':{PORT:04X} 0+:0000 0A' /proc/net/tcp /proc/net/tcp6 && echo "$1: listens" || echo "$1: refused"
    kill $! 2>/dev/null || true
}}
tries before
mkdir /sys/fs/cgroup/out && echo $$ >/sys/fs/cgroup/out/cgroup.procs && busybox grep 0:: /proc/self/cgroup
tries after
"""
# crun makes cgroups below the container's only where cgroup v2 stands alone.
_V2_ALONE = '[ "$0" = /sys/fs/cgroup ] || { umount -l "$0" && mount -t cgroup2 cgroup2 /sys/fs/cgroup; } && exec "$@"'


def _bundle(folder: Path, name: str, annotations: dict[str, str]) -> Path:
    """A bundle of a container on the host's network, whose program may write to the cgroups that it sees."""
    (folder / "policy.yaml").write_text("name: sealed\ndefault: deny\n")
    mounts = [("/proc", "proc", ["nosuid"]), ("/sys", "sysfs", ["ro"]), ("/sys/fs/cgroup", "cgroup", ["rw"])]
    config = {
        "ociVersion": "1.0.2",
        "annotations": {"graft.policy": str(folder / "policy.yaml"), **annotations},
        "root": {"path": str(engines.make_root(folder / "root"))},
        "process": {"cwd": "/", "args": ["sh", "-c", _PROGRAM], "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}},
        "mounts": [{"destination": at, "type": kind, "source": kind, "options": how} for at, kind, how in mounts],
        "linux": {
            "cgroupsPath": f"/{name}/one",
            "namespaces": [{"type": kind} for kind in ("pid", "mount", "cgroup", "ipc")],
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@contextmanager
def _controllers_kept() -> Iterator[None]:
    """Where cgroup v2 stands alone crun enables every controller for it, and then refuses to run beside cgroup v1."""
    file = cgroup.v2_mount() / "cgroup.subtree_control"
    before = set(file.read_text().split())
    try:
        yield
    finally:
        for name in set(file.read_text().split()) - before:
            file.write_text(f"-{name}")


def _moves_out(host: Host, folder: Path, defence: str, annotations: dict[str, str]) -> list[str]:
    """What a container's program says that tries a bind, moves into a cgroup beside its own, and tries it again."""
    with _controllers_kept(), new_cgroup("images") as parent:
        command = [*graft_without(defence), "runtime"] if defence else None
        runtime = engines.runtime_script(host, folder, "crun", command)
        words: list[Word] = [runtime, f"--root={folder / 'crun'}", "--cgroup-manager=cgroupfs"]
        words += ["run", "-b", _bundle(folder, parent.name, annotations), f"images-{os.getpid()}"]
        alone = ["unshare", "--mount", "sh", "-c", _V2_ALONE, cgroup.v2_mount(), *words]
        return output(host.netns.command(*alone)).splitlines()


@pytest.mark.parametrize("annotations", [{}, {SUBGROUPS[0]: "inner"}])
def test_a_container_does_not_leave_the_cgroup_that_is_attached(
    host: Host, tmp_path: Path, annotations: dict[str, str]
) -> None:
    assert _moves_out(host, tmp_path, "", annotations) == ["before: refused", "0::/out", "after: refused"]


def test_control_attached_where_its_first_process_is_it_does(host: Host, tmp_path: Path) -> None:
    said = _moves_out(host, tmp_path, "cgroup root", {SUBGROUPS[0]: "inner"})
    assert said == ["before: refused", "0::/out", "after: listens"]


@contextmanager
def _below_its_root(path: Path, *moves: Path) -> Iterator[int]:
    """A process whose cgroup namespace has its root at ``path``, and that has moved on from there since."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        cgroup.enter(path)
        syscall("unshare", 0x02000000)  # CLONE_NEWCGROUP
        for move in moves:
            cgroup.enter(move)
        theirs.send(b"x")
        signal.pause()
    try:
        ours.recv(1)
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        ours.close()
        theirs.close()


def _plan(engine_cgroup: Path, container_id: str = "one") -> Plan:
    settings = Settings.from_environment({"GRAFT_HOST_NETNS": "/proc/self/ns/net"})
    return Plan(settings, Policy("any"), Transport.DIRECT, container_id, None, engine_cgroup)


def test_a_container_is_the_cgroup_that_is_its_namespaces_root(root: None) -> None:
    with new_cgroup("images") as top, new_cgroup("below", top) as below, new_cgroup("beside", top) as beside:
        inner = below / "a" / "b"
        inner.mkdir(parents=True)
        for where, moves, expected in (
            (below, (), below),
            (below, (inner,), below),
            (below, (inner, below), below),
            (inner, (), inner),
            (below, (beside,), beside),  # put there by somebody else: it cannot see it
            (cgroup.v2_mount(), (inner,), cgroup.v2_mount()),
        ):
            with _below_its_root(where, *moves) as pid:
                assert cgroup.whole_of_process(pid) == expected
    assert cgroup.whole_of_process(os.getpid()) == cgroup.of_process(os.getpid())


def test_the_root_is_found_wherever_the_caller_is(root: None) -> None:
    with new_cgroup("images") as top, new_cgroup("below", top) as below, new_cgroup("beside", top) as beside:
        inner = below / "a" / "b"
        inner.mkdir(parents=True)
        home = cgroup.of_process(os.getpid())
        with _below_its_root(below / "a", inner) as pid:
            try:
                for place in (home, top, below, beside, inner.parent, inner):
                    cgroup.enter(place)
                    assert cgroup.whole_of_process(pid) == below / "a"
                    assert cgroup.of_process(os.getpid()) == place
            finally:
                cgroup.enter(home)


def test_a_namespace_whose_root_is_the_engines_cgroup_is_none_of_the_containers(root: None) -> None:
    with new_cgroup("engine") as engine, new_cgroup("container", engine) as own:
        with _below_its_root(engine, own) as pid, pytest.raises(RefusedError, match="shares its engine's"):
            find_container(pid, _plan(engine))
        with _below_its_root(own) as pid:
            assert find_container(pid, _plan(engine))[0] == own


def test_a_program_that_runs_before_it_is_attached_makes_no_root_of_its_own(root: None) -> None:
    """Under `graft listen` nothing waits: it may move first, and make a cgroup namespace then."""
    container_id = "0e7ce416218d" * 5 + "abcd"
    with new_cgroup("engine") as engine, new_cgroup("payload", engine) as parent:
        own = parent / f"libpod-{container_id}"
        (own / "inner" / f"libpod-{container_id}").mkdir(parents=True)
        with _below_its_root(own / "inner") as pid:
            assert find_container(pid, _plan(engine, container_id))[0] == own
        with _below_its_root(own / "inner" / own.name) as pid:
            assert find_container(pid, _plan(engine, container_id))[0] == own


@pytest.mark.parametrize("name", SUBGROUPS)
@pytest.mark.parametrize("at", [*PODMANS, DOCKERS])
def test_an_image_names_no_cgroup_below_its_containers(name: str, at: str) -> None:
    config = {"annotations": {name: "inner"}, "linux": {"cgroupsPath": at}}
    if at == DOCKERS:
        check_annotations(config, RuntimeOptions(), notified=False)
    else:
        check_annotations({**config, "annotations": {name: ""}}, RuntimeOptions(), notified=True)
        check_annotations(config, RuntimeOptions(trust_annotations=True), notified=True)
        with pytest.raises(RefusedError, match="cannot tell crun what to do"):
            check_annotations(config, RuntimeOptions(), notified=False)
    with pytest.raises(RefusedError, match="cannot tell crun what to do"):
        check_annotations(config, RuntimeOptions(trust_annotations=False), notified=False)


@pytest.mark.parametrize("name", SUBGROUPS)
def test_no_annotation_takes_a_container_out_of_the_cgroup_that_is_attached(name: str) -> None:
    check_annotations({"annotations": {name: "below/..."}}, RuntimeOptions(), notified=False)
    with pytest.raises(ConflictError, match="leads out of"):
        check_annotations({"annotations": {name: "below/../../beside"}}, RuntimeOptions(), notified=False)


@pytest.mark.parametrize("name", FILTERS)
def test_no_annotation_takes_the_listener_elsewhere(name: str) -> None:
    config = {"annotations": {name: "x"}}
    check_annotations(config, RuntimeOptions(), notified=False)  # a container without notifications has none of Graft's
    with pytest.raises(ConflictError, match=name):
        check_annotations(config, RuntimeOptions(trust_annotations=True), notified=True)


@pytest.mark.parametrize("annotation", ["", *FILTERS, *SUBGROUPS])
def test_the_wrapper_starts_no_container_with_such_an_annotation(host: Host, tmp_path: Path, annotation: str) -> None:
    folder = host.settings.state_dir / "policies"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "any.yaml").write_text("name: any\nopen: true\n")
    config = {
        "annotations": {"graft.policy": "any", **({annotation: "x"} if annotation else {})},
        "linux": {"cgroupsPath": PODMANS[0], "namespaces": [{"type": "network"}]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    runtime = engines.runtime_script(host, tmp_path, "true")
    done = run(host.netns.command(runtime, "create", "--bundle", tmp_path, "one"), status=1 if annotation else 0)
    assert (f"annotation {annotation}: " in done.stderr) == bool(annotation)
    until("nothing is left", lambda: not engines.leftovers(host))


# ---- `graft listen`, under podman without the wrapper: the same annotations, and a cgroup that is another's ---------


@pytest.mark.parametrize("annotation", [*FILTERS, *SUBGROUPS])
def test_a_listener_serves_no_container_with_such_an_annotation(tmp_path: Path, annotation: str) -> None:
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies/any.yaml").write_text("name: any\nopen: true\n")
    places = {"GRAFT_STATE_DIR": str(tmp_path), "GRAFT_PIN_DIR": f"{tmp_path}/pins"}
    settings = Settings.from_environment({**places, "GRAFT_HOST_NETNS": "/proc/self/ns/net"})
    server = ListenerServer(settings, RuntimeOptions(), Path("/"), print)
    config: dict[str, Any] = {"annotations": {"graft.policy": "any"}, "linux": {"cgroupsPath": PODMANS[0]}}
    with _own_network() as pid:
        state = State("one", pid, str(tmp_path))
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert server._plan(state).policy.name == "any"
        config["annotations"][annotation] = "x"
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises((ConflictError, RefusedError), match=annotation):
            server._plan(state)


@contextmanager
def _own_network() -> Iterator[int]:
    program = subprocess.Popen(["unshare", "--net", "sh", "-c", "echo; exec sleep 600"], stdout=subprocess.PIPE)
    try:
        assert program.stdout is not None and program.stdout.readline()
        yield program.pid
    finally:
        program.kill()
        program.communicate()


def _attach_again(host: Host, path: Path, container_id: str, netns_of: str) -> str:
    """What a new `graft listen` has of a container at a cgroup: its record's name. Raises RefusedError."""
    plan = Plan(host.settings, Policy("any"), Transport.SWAP, container_id, None, Path("/nowhere"))
    found = shim.Attachment(plan, Installation(plan.settings))._attached_before(path, netns.cookie(Path(netns_of)))
    return found.name if found else ""


@pytest.mark.parametrize(
    ("engine", "name", "same_netns", "reused"),
    [
        ("oci", "0123456789ab", True, True),
        ("graft", "0123456789ab", True, False),  # `graft attach` or `graft run`: another's, with another's grants
        ("oci", "victim", True, False),
        ("oci", "0123456789ab", False, False),
    ],
)
def test_a_listener_uses_no_record_of_another_container(
    host: Host, engine: str, name: str, same_netns: bool, reused: bool
) -> None:
    with new_cgroup("images") as path, _own_network() as pid:
        inside = f"/proc/{pid}/ns/net"
        cookie = netns.cookie(Path(inside) if same_netns else None)
        with host.installation as graft, graft.transaction() as change:
            compiled = graft.compile(Policy("any"))
            made = change.containers.create(compiled, path, cookie, Transport.SWAP, name=name, engine=engine)
        try:
            if reused:
                assert _attach_again(host, path, "0123456789abcdef", inside) == name
            else:
                with pytest.raises(RefusedError, match="another container is attached"):
                    _attach_again(host, path, "0123456789abcdef", inside)
        finally:
            with host.installation as graft, graft.transaction() as change:
                change.containers.remove(made)
        assert _attach_again(host, path, "0123456789abcdef", inside) == ""


# ---- a command of root's, in a folder of somebody else's -------------------------------------------------------------


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with modules of that name of somebody else's; the path of what they write."""
    found = tmp_path / "found"
    for name in ("graft/__init__.py", "json.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"open({str(found)!r}, 'w').close(); raise SystemExit(0)\n")
    monkeypatch.chdir(tmp_path)
    return found


def test_the_selftest_imports_nothing_from_the_working_directory(root: None, trap: Path) -> None:
    selftest_result.run_selftest()
    assert not trap.exists()


def test_the_daemon_imports_nothing_from_the_working_directory(host: Host, trap: Path) -> None:
    daemon_process.stop(host.settings)
    daemon_process.ensure_running(host.settings)
    assert not trap.exists()


def test_control_with_the_working_directory_on_pythons_path_it_would(trap: Path) -> None:
    run([sys.executable, "-m", "graft.splice.selftest"], status=0)
    assert trap.exists()


# ---- an id that is none: the program keeps root's --------------------------------------------------------------------


@pytest.mark.parametrize("user", ["nobody:4294967295", "4294967295", "4294967295:0", f"nobody:{1 << 64}", ""])
def test_no_program_keeps_roots_ids_by_a_number_that_is_no_id(host: Host, user: str) -> None:
    refused = host.graft("run", "--user", user, "--", "id", status=None)
    assert refused.returncode not in (0, 1) and refused.stdout == ""
    assert refused.stderr.count("\n") <= 2 and "--user: " in refused.stderr and "Traceback" not in refused.stderr
