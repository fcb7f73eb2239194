"""What a thirty-sixth reading found in what is saved, and in what is changed for now (`--no-save`): a container came
out of a policy that the operator had put in force.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from graft.commands import transfer
from graft.datapath import rulesets
from graft.errors import ConflictError, UnfinishedError
from graft.kernel import cgroup
from graft.policy.model import policy_from_flags
from graft.state.container_changes import ContainerChanges
from tests.e2e.conftest import WritePolicy, write_policy
from tests.e2e.test_saved_state import attached, box, saver
from tests.hostile.conftest import graft_without
from tests.support.cgroups import new_cgroup
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4
from tests.support.policies import DENY_ALL
from tests.support.puppet import puppet
from tests.support.shell import Word, run
from tests.support.wait import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(250)]
__all__ = ["box", "saver", "write_policy"]


# ---- an import puts all of its file in force --------------------------------------------------------


def test_an_import_attaches_what_was_detached_for_now(
    saver: Host, box: Path, write_policy: WritePolicy, tmp_path: Path
) -> None:
    file = tmp_path / "all.yaml"
    saver.graft("ep", "add", "web", "127.0.0.1:1")
    saver.graft("attach", "--cgroup", box, "--policy", write_policy(DENY_ALL))
    file.write_text(saver.graft("export").stdout)
    saver.graft("detach", "--cgroup", box, "--no-save")
    saver.graft("ep", "del", "--no-save", "web")
    said = saver.graft("import", file).stdout.splitlines()
    assert said[0] == "endpoints made: web"
    assert len(said) == 2 and said[1].startswith("attached: cgroup:"), "not: nothing to change"
    assert attached(saver, box)
    with puppet(box, saver.netns.path) as program:
        assert program.bind("0.0.0.0", saver.port()) == "EACCES"


def detached_for_now(saver: Host, box: Path, write_policy: WritePolicy, folder: Path) -> Path:
    """A file with a container that was detached afterwards, until the next boot."""
    file = folder / "all.yaml"
    saver.graft("attach", "--cgroup", box, "--policy", write_policy(DENY_ALL))
    file.write_text(saver.graft("export").stdout)
    saver.graft("detach", "--cgroup", box, "--no-save")
    return file


def test_what_was_detached_for_now_waits_after_an_import_where_it_does_not_run(
    saver: Host, box: Path, write_policy: WritePolicy, tmp_path: Path
) -> None:
    file = detached_for_now(saver, box, write_policy, tmp_path)
    box.rmdir()
    assert "waits: it is not running" in saver.graft("import", file).stdout
    assert [one["state"] for one in saver.ps()] == ["waiting"]
    box.mkdir()


def test_without_its_resuming_it_is_not_attached(
    saver: Host, box: Path, write_policy: WritePolicy, tmp_path: Path
) -> None:
    file = detached_for_now(saver, box, write_policy, tmp_path)
    run([*graft_without("import resumes"), "import", file], environment=saver.environment, status=0)
    with puppet(box, saver.netns.path) as program:
        assert program.bind("0.0.0.0", saver.port()) == "ok"


# ---- an import that fails ---------------------------------------------------------------------------

WIDE = "name: p\negress: [{to: 0.0.0.0/0, endpoint: out}]\ndefault: deny\n"
NARROW = "name: p\ndefault: deny\n"
DECLARES = (
    "name: {}\nendpoints: {{decl: '127.0.0.1:{}'}}\ningress: [{{bind: '0.0.0.0:80', endpoint: decl}}]\ndefault: deny\n"
)


@pytest.fixture
def second() -> Iterator[Path]:
    with new_cgroup("second") as path:
        yield path


@pytest.fixture
def failing(saver: Host, box: Path, second: Path, write_policy: WritePolicy, tmp_path: Path) -> Iterator[Path]:
    """A file whose import gives ``box`` a policy, and fails at ``second``: a third one uses what that declares."""
    saver.graft("ep", "add", "out", "0.0.0.0:dynamic")
    saver.graft("attach", "--cgroup", box, "--policy", write_policy(WIDE))
    saver.graft("attach", "--cgroup", second, "--policy", write_policy(DENY_ALL))
    file = tmp_path / "all.yaml"
    text = saver.graft("export").stdout
    declared = "endpoints: {decl: '127.0.0.1:4002'}\n    ingress: [{bind: '0.0.0.0:80', endpoint: decl}]"
    assert text.count("name: nothing\n") == 1
    file.write_text(text.replace("name: nothing\n", f"name: nothing\n    {declared}\n"))
    with new_cgroup("third") as third:
        saver.graft("attach", "--no-save", "--cgroup", third, "--policy", write_policy(DECLARES.format("r", 4001)))
        yield file
        saver.graft("detach", "--cgroup", third)


def shown(host: Host, *paths: Path) -> list[str]:
    """What is in force: the policies of these containers, and the endpoints."""
    return [*(host.graft("policy", "show", path).stdout for path in paths), host.graft("ep", "show").stdout]


def test_an_import_that_fails_leaves_the_policies_and_endpoints_that_were_in_force(
    saver: Host, box: Path, second: Path, failing: Path, write_policy: WritePolicy
) -> None:
    saved = saver.graft("export").stdout
    saver.graft("policy", "apply", "--no-save", write_policy(NARROW))
    saver.graft("ep", "set", "--no-save", "out", "127.0.0.1:dynamic")
    before = shown(saver, box, second)
    with saver.client.listener(CLIENT4) as listener, puppet(box, saver.netns.path) as program:
        there = (CLIENT4, listener.getsockname()[1])
        assert program.connect(*there) == "EACCES"
        assert "endpoints.decl" in saver.graft("import", failing, status=4).stderr
        assert program.connect(*there) == "EACCES", "not the policy that is saved"
    assert shown(saver, box, second) == before
    assert saver.graft("export").stdout == saved


def test_without_the_rules_that_an_import_keeps_the_saved_policy_is_in_force(
    saver: Host, box: Path, failing: Path, write_policy: WritePolicy
) -> None:
    saver.graft("policy", "apply", "--no-save", write_policy(NARROW))
    run([*graft_without("rules kept"), "import", failing], environment=saver.environment, status=4)
    assert connects(saver, box) == "ok"


def test_an_import_that_fails_leaves_an_endpoint_deleted_for_now_as_it_is(saver: Host, failing: Path) -> None:
    saver.graft("ep", "del", "--no-save", "--force", "out")
    saver.graft("import", failing, status=4)
    assert "out " not in saver.graft("ep", "show").stdout
    saver.graft("up")
    assert "out " not in saver.graft("ep", "show").stdout, "until the next boot"


def test_what_an_import_cannot_change_back_is_named(
    saver: Host, box: Path, failing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ContainerChanges, "undo", full)
    saver.graft("policy", "apply", "--no-save", "--cgroup", box, write_narrow(failing))
    with pytest.raises(UnfinishedError, match=r"decl.*not changed back: cgroup:\S+box\S*: .*No space left") as raised:
        transfer.import_state(saver.settings, transfer.read_export(failing))
    assert raised.value.exit_code == 8
    assert isinstance(raised.value.__cause__, ConflictError)


def write_narrow(beside: Path) -> Path:
    path = beside.with_name("narrow.yaml")
    path.write_text(NARROW)
    return path


def test_an_import_moves_a_declared_endpoint_from_one_container_to_the_next(
    saver: Host, box: Path, second: Path, write_policy: WritePolicy, tmp_path: Path
) -> None:
    """The old rules of the one, which stay until nothing can fail, do not keep the endpoint from the other."""
    file, port, moved = tmp_path / "all.yaml", saver.port(), saver.port()
    first, last = sorted((box, second))
    saver.graft("attach", "--cgroup", first, "--policy", write_policy(DECLARES.format("one", port)))
    saver.graft("attach", "--cgroup", last, "--policy", write_policy("name: two\ndefault: deny\n"))
    both = saver.graft("export").stdout
    saver.graft("policy", "apply", write_policy("name: one\ndefault: deny\n"))
    saver.graft("policy", "apply", write_policy(DECLARES.format("two", moved)))
    file.write_text(saver.graft("export").stdout)
    back = tmp_path / "back.yaml"
    back.write_text(both)
    saver.graft("import", back)
    assert f"127.0.0.1:{port}" in saver.graft("ep", "show").stdout
    saver.graft("import", file)
    assert f"127.0.0.1:{moved}" in saver.graft("ep", "show").stdout
    assert f"127.0.0.1:{port}" not in saver.graft("ep", "show").stdout
    with puppet(last, saver.netns.path) as program:
        assert program.bind("0.0.0.0", 80) == "ok"
    assert len(rulesets.with_endpoints(saver.maps)) == 1, "nothing is left of the old rules"


def test_the_rules_that_a_killed_import_has_kept_go_with_the_next_one(
    saver: Host, box: Path, write_policy: WritePolicy, tmp_path: Path
) -> None:
    file = tmp_path / "all.yaml"
    saver.graft("ep", "add", "web", "127.0.0.1:1")
    saver.graft("attach", "--cgroup", box, "-i", "*:80=web")
    file.write_text(saver.graft("export").stdout)
    with saver.installation as graft:
        [container] = graft.containers.listing()
        compiled = graft.compile(policy_from_flags(container.policy, [], [], True))
        with graft.transaction() as change:
            change.containers.exchange(container, compiled)
    assert len(rulesets.with_endpoints(saver.maps)) == 1
    saver.graft("import", file)
    assert len(rulesets.with_endpoints(saver.maps)) == 1
    saver.graft("policy", "apply", write_policy(f"name: {container.policy}\ndefault: deny\n"))
    assert not rulesets.with_endpoints(saver.maps)


# ---- a container that starts again ------------------------------------------------------------------


def narrowed(host: Host, box: Path, write_policy: WritePolicy, how: str, *flags: str) -> None:
    """Give ``box`` the narrow policy in one of the ways."""
    chosen: dict[str, list[Word]] = {
        "policy apply": ["policy", "apply", *flags, write_policy(NARROW)],
        "policy apply --cgroup": ["policy", "apply", *flags, "--cgroup", box, write_policy(NARROW)],
        "attach": ["attach", *flags, "--cgroup", box, "--policy", write_policy(NARROW)],
    }
    host.graft(*chosen[how])


def start_again(host: Host, box: Path) -> None:
    """As a container does that ends and starts: its cgroup is made anew, and the watcher attaches it."""
    cgroup.kill(box)
    cgroup.remove(box)
    box.mkdir()
    until("it is attached again", lambda: is_attached(host, box))


def is_attached(host: Host, box: Path) -> bool:
    return any(one.cgroup == str(box) and one.exists for one in host.installation.containers.listing())


@pytest.fixture
def wide(saver: Host, box: Path, write_policy: WritePolicy) -> Host:
    """A host where ``box`` is saved with the wide policy."""
    saver.graft("ep", "add", "out", "0.0.0.0:dynamic")
    saver.graft("attach", "--cgroup", box, "--policy", write_policy(WIDE))
    return saver


def connects(host: Host, box: Path) -> str:
    """What a connect to the client gives in it."""
    with host.client.listener(CLIENT4) as listener, puppet(box, host.netns.path) as program:
        return str(program.connect(CLIENT4, listener.getsockname()[1]))


@pytest.mark.parametrize("how", ["policy apply", "policy apply --cgroup", "attach"])
def test_a_container_does_not_come_out_of_a_policy_for_now_by_starting_again(
    wide: Host, box: Path, write_policy: WritePolicy, how: str
) -> None:
    saved = wide.graft("export").stdout
    narrowed(wide, box, write_policy, how, "--no-save")
    assert connects(wide, box) == "EACCES"
    start_again(wide, box)
    assert connects(wide, box) == "EACCES"
    wide.graft("up")
    start_again(wide, box)
    assert connects(wide, box) == "EACCES"
    assert wide.graft("export").stdout == saved
    wide.graft("down")
    wide.graft("up")
    assert connects(wide, box) == "ok", "a new data plane has what is saved"


def test_without_the_note_of_it_a_container_comes_out_of_a_policy_for_now(
    wide: Host, box: Path, write_policy: WritePolicy
) -> None:
    command = [*graft_without("noted for now"), "policy", "apply", "--no-save", write_policy(NARROW)]
    run(command, environment=wide.environment, status=0)
    assert connects(wide, box) == "EACCES"
    start_again(wide, box)
    assert connects(wide, box) == "ok"


@pytest.mark.parametrize("how", ["policy apply", "policy apply --cgroup"])
def test_one_that_has_ended_before_a_policy_for_now_gets_it_too(
    wide: Host, box: Path, write_policy: WritePolicy, how: str
) -> None:
    cgroup.remove(box)
    narrowed(wide, box, write_policy, how, "--no-save")
    box.mkdir()
    until("it is attached again", lambda: is_attached(wide, box))
    assert connects(wide, box) == "EACCES"


def test_a_policy_for_now_ends_with_one_that_is_saved_and_with_an_import(
    wide: Host, box: Path, write_policy: WritePolicy, tmp_path: Path
) -> None:
    file = tmp_path / "all.yaml"
    file.write_text(wide.graft("export").stdout)
    ways: list[list[Word]] = [
        ["policy", "apply", write_policy(WIDE)],
        ["attach", "--cgroup", box, "--policy", write_policy(WIDE)],
        ["import", file],
    ]
    for words in ways:
        narrowed(wide, box, write_policy, "policy apply", "--no-save")
        wide.graft(*words)
        assert connects(wide, box) == "ok"
        start_again(wide, box)
        assert connects(wide, box) == "ok", words


def test_what_is_attached_for_now_after_it_was_detached_for_now_is_attached_again(
    wide: Host, box: Path, write_policy: WritePolicy
) -> None:
    wide.graft("detach", "--no-save", "--cgroup", box)
    narrowed(wide, box, write_policy, "attach", "--no-save")
    start_again(wide, box)
    assert connects(wide, box) == "EACCES"
    wide.graft("detach", "--no-save", "--cgroup", box)
    cgroup.remove(box)
    assert wide.ps() == [], "it does not wait"
    box.mkdir()


def test_a_note_that_cannot_be_read_stops_no_command(saver: Host, box: Path, write_policy: WritePolicy) -> None:
    """The container waits, by which policy nobody knows, until it is given one."""
    saver.graft("ep", "add", "out", "0.0.0.0:dynamic")
    saver.graft("attach", "--cgroup", box, "--policy", write_policy(WIDE))
    saver.graft("policy", "apply", "--no-save", write_policy(NARROW))
    [note] = (saver.settings.run_dir / "paused" / "policies").iterdir()
    box.rmdir()
    until("it waits", lambda: [one["state"] for one in saver.ps()] == ["waiting"])
    note.write_text("{")
    box.mkdir()
    assert [one["state"] for one in saver.ps()] == ["waiting"]
    saver.graft("up")
    assert not attached(saver, box)
    saver.graft("policy", "apply", write_policy(NARROW))
    until("attached", lambda: attached(saver, box))
    assert not note.exists()
