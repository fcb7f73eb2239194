"""What docker, podman and systemd say of a container, and which cgroup that is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from graft.errors import ConflictError, KernelError, NotFoundError, UsageError
from graft.kernel import cgroup
from graft.state import engines
from graft.state.engines import (
    EngineAnswer,
    FoundContainer,
    NoAnswerError,
    cut_at_id,
    is_silent,
    parse_inspect,
    parse_show,
    resolve,
    run,
)

ID = "0123456789abcdef" * 4


def inspected(number: object = ID, name: object = "/web", pid: object = 42) -> str:
    return f"{number} {name} {pid}\n"


def test_inspect_gives_id_name_and_process() -> None:
    assert parse_inspect("docker", inspected()) == (ID, "web", 42)
    assert parse_inspect("podman", inspected(name="web")) == (ID, "web", 42)


UNREADABLE = [
    *("", "{}", "[]", "null", "<no value> /web 42\n", inspected().strip(), inspected() * 2, "\n" + inspected()),
    *(inspected(name="a b"), inspected(name="//web"), inspected(name=""), inspected(name="a\x1b[m")),
    *(inspected(pid="<no value>"), inspected(pid=-1), inspected(pid="4e6"), inspected(pid=""), inspected(pid="٣")),
    *(inspected(number="../../etc"), inspected(number=ID[1:]), inspected(number=ID.upper())),
]


@pytest.mark.parametrize("text", UNREADABLE)
def test_what_cannot_be_read_of_a_container_is_an_error(text: str) -> None:
    with pytest.raises(KernelError, match="docker: cannot read"):
        parse_inspect("docker", text)


def test_a_process_that_cannot_be_is_an_error() -> None:
    with pytest.raises(KernelError, match="4194305 is not the number of a process"):
        parse_inspect("docker", inspected(pid=4194305))


def test_a_container_that_does_not_run_is_not_found() -> None:
    with pytest.raises(NotFoundError, match="is not running"):
        parse_inspect("podman", inspected(pid=0))


@pytest.mark.parametrize(
    ("path", "cut"),
    [
        (f"/docker/{ID}", f"/docker/{ID}"),
        (f"/system.slice/docker-{ID}.scope", f"/system.slice/docker-{ID}.scope"),
        (f"/machine.slice/libpod-{ID}.scope/container/init.scope", f"/machine.slice/libpod-{ID}.scope"),
        (f"/a.service/libpod-payload-{ID}", f"/a.service/libpod-payload-{ID}"),
        (f"/docker/{'a' + ID}", None),
        (f"/docker/{ID[:-1]}", None),
        ("/user.slice", None),
    ],
)
def test_a_containers_cgroup_is_the_folder_that_is_named_by_its_id(path: str, cut: str | None) -> None:
    assert cut_at_id(Path(path), ID) == (None if cut is None else Path(cut))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("ControlGroup=/system.slice/a.service\nMainPID=7\n", ("/system.slice/a.service", 7)),
        ("MainPID=0\nControlGroup=\n", ("", 0)),
        ("", ("", 0)),
        ("MainPID=x\n", ("", 0)),
    ],
)
def test_systemctl_show_gives_cgroup_and_process(text: str, found: tuple[str, int]) -> None:
    assert parse_show(text) == found


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of the v2 tree."""
    monkeypatch.setattr(cgroup, "v2_mount", lambda: tmp_path)
    return tmp_path


def make(tree: Path, path: str) -> Path:
    made = tree / path
    made.mkdir(parents=True)
    (made / "cgroup.procs").write_text("")
    return made


def engine(answers: dict[str, str], seen: list[Sequence[str]] | None = None) -> Callable[[Sequence[str]], EngineAnswer]:
    """Commands that are there say what ``answers`` has for them, or fail; others are not installed."""

    def run(command: Sequence[str]) -> EngineAnswer:
        if seen is not None:
            seen.append(command)
        if command[0] not in answers:
            return EngineAnswer(None)
        text = answers[command[0]]
        return EngineAnswer(0, text) if text else EngineAnswer(1, "", f"Error: no such thing as {command[-1]}\n")

    return run


NOTHING = engine({})


@pytest.mark.parametrize("way", ["system.slice/web", "/system.slice/web", "cgroup:system.slice/web", "absolute"])
def test_a_cgroup_is_found_by_its_path(tree: Path, way: str) -> None:
    path = make(tree, "system.slice/web")
    found = resolve(str(path) if way == "absolute" else way, NOTHING)
    assert (found.cgroup, found.engine, found.name) == (path, "cgroup", "system.slice/web")


@pytest.mark.parametrize("text", ["/", "../..", "/system.slice/../..", "cgroup:.", "/etc"])
def test_what_is_not_below_the_tree_is_no_cgroup(tree: Path, text: str) -> None:
    with pytest.raises(NotFoundError):
        resolve(text, NOTHING)


def test_a_name_of_two_engines_is_a_conflict_until_one_is_chosen(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = "f" * 64
    places = {1: make(tree, f"docker/{ID}"), 2: make(tree, f"libpod_parent/libpod-{other}")}
    monkeypatch.setattr(cgroup, "of_process", places.__getitem__)
    run = engine({"docker": inspected(pid=1), "podman": inspected(other, "web", 2)})
    with pytest.raises(ConflictError, match="docker:web, podman:web"):
        resolve("web", run)
    assert resolve("podman:web", run) == FoundContainer(places[2], "podman", "web", other, 2)


def test_one_container_by_two_commands_is_one(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = make(tree, f"docker/{ID}")
    monkeypatch.setattr(cgroup, "of_process", lambda pid: place)
    assert resolve("web", engine({"docker": inspected(), "podman": inspected()})).cgroup == place


def test_a_process_outside_the_containers_cgroup_is_refused(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "of_process", lambda pid: tree / "somebody-else")
    with pytest.raises(KernelError, match="does not contain the container's id"):
        resolve("web", engine({"docker": inspected()}))


@pytest.mark.parametrize("asked", ["web", ID, ID[:12]])
def test_a_container_is_found_by_its_name_and_by_its_id(
    tree: Path, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    place = make(tree, f"docker/{ID}")
    monkeypatch.setattr(cgroup, "of_process", lambda pid: place)
    assert resolve(f"docker:{asked}", engine({"docker": inspected()})).name == "web"


@pytest.mark.parametrize("asked", ["other", ID[:3], ID[:11]])
def test_the_answer_for_another_container_is_not_taken(tree: Path, monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    place = make(tree, f"docker/{ID}")
    monkeypatch.setattr(cgroup, "of_process", lambda pid: place)
    with pytest.raises(NotFoundError, match="answers for the container 'web'"):
        resolve(f"docker:{asked}", engine({"docker": inspected()}))


def test_nothing_found_says_what_was_tried(tree: Path) -> None:
    with pytest.raises(NotFoundError) as raised:
        resolve("web", engine({"podman": ""}))
    for said in (
        "no cgroup 'web'",
        "docker is not installed",
        "no such thing as web",
        "no cgroup is named web.service",
    ):
        assert said in raised.value.message


def test_a_unit_is_found_by_systemctl(tree: Path) -> None:
    path = make(tree, "system.slice/web.service")
    run = engine({"systemctl": "ControlGroup=/system.slice/web.service\nMainPID=0\n"})
    assert resolve("web", run) == FoundContainer(path, "systemd", "web.service")
    assert resolve("unit:web.service", run).cgroup == path


def test_a_unit_that_does_not_run_is_not_found(tree: Path) -> None:
    with pytest.raises(NotFoundError, match=r"web\.service is not running"):
        resolve("unit:web", engine({"systemctl": "ControlGroup=\nMainPID=0\n"}))


def test_two_cgroups_of_one_units_name_are_a_conflict(tree: Path) -> None:
    make(tree, "a.slice/web.service")
    make(tree, "b.slice/web.service")
    with pytest.raises(ConflictError, match=r"2 cgroups are named web\.service"):
        resolve("unit:web", NOTHING)


@pytest.mark.parametrize("above", ["docker/a", "user.slice/user@1000.service/app.slice", "a.slice/b.scope"])
def test_a_cgroup_that_others_can_make_is_no_unit_where_systemd_does_not_answer(tree: Path, above: str) -> None:
    make(tree, f"{above}/web.service")
    for text in ("web", "unit:web"):
        with pytest.raises(NotFoundError):
            resolve(text, NOTHING)
    path = make(tree, "system.slice/web.service")
    assert resolve("unit:web", NOTHING).cgroup == path


@pytest.mark.parametrize("name", ["--help", "-x", "a b", "a;b", "$(x)", "a\nb", ""])
@pytest.mark.parametrize("kind", ["docker", "podman", "unit"])
def test_a_name_that_is_none_reaches_no_command(tree: Path, kind: str, name: str) -> None:
    seen: list[Sequence[str]] = []
    with pytest.raises(UsageError):
        resolve(f"{kind}:{name}", engine({"docker": "", "podman": "", "systemctl": ""}, seen))
    assert seen == []


# ---- how a command is run ---------------------------------------------------------------------------


def test_a_command_gives_its_status_and_both_outputs() -> None:
    assert run(["sh", "-c", "echo out; echo err >&2; exit 3"]) == EngineAnswer(3, "out\n", "err\n")
    assert run(["no-such-command-anywhere"]).status is None


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_command_that_writes_without_an_end_is_killed(stream: str) -> None:
    with pytest.raises(KernelError, match="writes more than 1048576 bytes") as raised:
        run([sys.executable, "-c", f"import sys\nwhile True: sys.{stream}.write('x' * 65536)"])
    assert not isinstance(raised.value, NoAnswerError)


@pytest.mark.parametrize("script", ["sleep 60", "while :; do echo x; sleep 0.01; done", "exec >&- 2>&-; sleep 60"])
def test_a_command_that_does_not_end_is_killed(script: str) -> None:
    with pytest.raises(NoAnswerError, match="sh did not answer within 1 s"):
        run(["sh", "-c", script], 1)


@pytest.mark.parametrize(("script", "silent"), [("exit 1", False), ("yes", False), ("sleep 60", True)])
def test_an_engine_is_silent_if_it_does_not_answer_about_no_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, silent: bool
) -> None:
    program = tmp_path / "docker"
    program.write_text(f"#!/bin/sh\nexec {script}\n".replace("exec exit", "exit"))
    program.chmod(0o755)
    monkeypatch.setattr(engines, "_PROBE_TIMEOUT", 1.0)
    assert is_silent(str(program)) == silent
    assert not is_silent(str(tmp_path / "none"))
