"""Records of attached containers: a bad one is named, and the others are read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from graft.errors import ConflictError, NotFoundError, UsageError
from graft.model.endpoint import parse_endpoint
from graft.model.settings import Settings
from graft.model.transport import Transport
from graft.policy.limits import MAX_RULES
from graft.policy.model import Policy, policy_from_flags
from graft.state import members, records
from graft.state.compiled_policy import compile_for
from graft.state.containers import Containers
from graft.state.records import Container
from tests.support.readers import RECORD

WEB = Container(7, "web", "/sys/fs/cgroup/docker/web", Transport.SWAP, 12, "web", ("nx4",), 42, 99, "docker", "splice")


@pytest.fixture
def installation(tmp_path: Path) -> Settings:
    (tmp_path / "containers").mkdir()
    return Settings.from_environment({"GRAFT_RUN_DIR": str(tmp_path)})


def put(installation: Settings, name: str, raw: bytes) -> Path:
    path = installation.run_dir / "containers" / name
    path.write_bytes(raw)
    return path


def test_a_record_is_read_as_it_was_written(installation: Settings) -> None:
    records.save(installation, WEB)
    assert Containers(installation).listing() == [WEB]
    assert records.parse_record(RECORD, "7.json") == WEB


def test_a_cgroup_may_have_a_name_that_is_not_utf8(installation: Settings) -> None:
    odd = replace(WEB, cgroup="/sys/fs/cgroup/x\udcff\udcfe")
    records.save(installation, odd)
    assert Containers(installation).listing() == [odd]


@pytest.mark.parametrize("cgroup", ["/x\ud800", "/x\0", "x", "/a/../x"])
def test_what_could_not_be_read_again_is_not_written(installation: Settings, cgroup: str) -> None:
    with pytest.raises(UsageError):
        records.save(installation, replace(WEB, cgroup=cgroup))
    assert list((installation.run_dir / "containers").iterdir()) == []


def test_a_record_of_a_newer_graft_is_read_as_far_as_it_is_known() -> None:
    assert records.parse_record(RECORD[:-1] + b', "later": [1]}', "7.json") == WEB


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 10_000, RECORD[:-2], RECORD + RECORD])
def test_a_bad_record_is_left_out_and_named(installation: Settings, raw: bytes) -> None:
    put(installation, "7.json", RECORD)
    bad = put(installation, "8.json", raw)
    found, wrong = records.read_all(installation)
    assert found == Containers(installation).listing() == [WEB]
    assert [error.message.startswith(f"{bad}: ") for error in wrong] == [True]


def test_what_is_no_file_is_left_out_and_named(installation: Settings) -> None:
    (installation.run_dir / "containers" / "8.json").mkdir()
    (installation.run_dir / "containers" / "9.json").symlink_to("nowhere")
    found, (wrong,) = records.read_all(installation)
    assert found == []
    assert wrong.message.endswith("8.json: cannot be read: Is a directory")


def test_a_container_that_is_not_found_may_be_in_a_bad_record(installation: Settings) -> None:
    bad = put(installation, "8.json", b"{")
    with pytest.raises(NotFoundError) as missing:
        Containers(installation).find("web")
    assert missing.value.hint is not None and str(bad) in missing.value.hint


@pytest.mark.parametrize(
    ("others", "text", "found"),
    [
        ([replace(WEB, id=3, origin="asked"), replace(WEB, id=9, origin="pairs")], "web", 7),
        ([replace(WEB, id=3, name="7")], "7", 7),  # whoever starts a container chooses its name
        ([replace(WEB, id=3, name=WEB.cgroup)], WEB.cgroup, 7),
        ([replace(WEB, id=3, name="other", origin="asked")], "other", 3),
    ],
)
def test_what_is_found_by_a_name_is_not_what_somebody_has_given_that_name(
    installation: Settings, others: list[Container], text: str, found: int
) -> None:
    for one in (WEB, *(replace(other, cgroup=f"/sys/fs/cgroup/{other.id}") for other in others)):
        records.save(installation, one)
    assert Containers(installation).find(text).id == found


def test_a_name_of_two_containers_is_ambiguous(installation: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = set[int]()
    monkeypatch.setattr(members, "gone", lambda _containers: gone)
    for one in (WEB, replace(WEB, id=9, cgroup="/sys/fs/cgroup/9")):
        records.save(installation, one)
    with pytest.raises(ConflictError, match="'web' is ambiguous: 7, 9"):
        Containers(installation).find("web")
    gone.add(7)  # it has ended
    assert Containers(installation).find("web").id == 9


TOO_BIG = policy_from_flags("p", ["0.0.0.0:80=nx4"] * (MAX_RULES + 1), [])
FOR_NX4 = policy_from_flags("p", ["0.0.0.0:80=nx4"], [])


@pytest.mark.parametrize("policy", [TOO_BIG, FOR_NX4])
def test_a_policy_that_cannot_be_compiled_is_refused_before_a_transaction(policy: Policy) -> None:
    with pytest.raises(UsageError):  # what a transaction takes is a compiled policy
        compile_for(policy, {})


def test_what_was_compiled_before_is_taken_while_its_endpoints_are_the_same() -> None:
    endpoints = {"nx4": parse_endpoint("nx4", "0.0.0.0:8080")}
    before = compile_for(FOR_NX4, endpoints)
    more = {**endpoints, "other": parse_endpoint("other", "0.0.0.0:8081")}
    assert compile_for(FOR_NX4, more, before) is before
    changed = {"nx4": parse_endpoint("nx4", "0.0.0.0:8080", proto="tcp")}
    assert compile_for(FOR_NX4, changed, before).rules.entries < before.rules.entries
