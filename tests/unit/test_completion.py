"""Which names a shell is offered, and how bash's words are put together again."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.commands import names
from graft.model.settings import Settings
from graft_cli.completion import join_words, unbroken_end


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    environment = {"GRAFT_RUN_DIR": f"{tmp_path}/run", "GRAFT_STATE_DIR": f"{tmp_path}/state", "GRAFT_PIN_DIR": "/none"}
    return Settings.from_environment(environment)


@pytest.mark.parametrize(
    ("words", "joined"),
    [
        (["graft", "ep", "del", ""], ["graft", "ep", "del", ""]),
        (["graft", "run", "-i", "0.0.0.0", ":", "80", "=", "we"], ["graft", "run", "-i", "0.0.0.0:80=we"]),
        (["graft", "run", "-i", "0.0.0.0", ":", "80", "="], ["graft", "run", "-i", "0.0.0.0:80="]),
        (["graft", "run", "-i", "[", "::", "]", ":", "80", "=", "w"], ["graft", "run", "-i", "[::]:80=w"]),
        (["graft", "run", "-e", "10.0.0.0/8", "=", "o", "-i"], ["graft", "run", "-e", "10.0.0.0/8=o", "-i"]),
        (["graft", "detach", "--cgroup", "docker", ":", "w"], ["graft", "detach", "--cgroup", "docker:w"]),
    ],
)
def test_words_that_bash_divided_are_put_together(words: list[str], joined: list[str]) -> None:
    assert join_words(words) == joined


@pytest.mark.parametrize(
    ("word", "end"), [("we", "we"), ("0.0.0.0:80=we", "we"), ("0.0.0.0:80=", ""), ("docker:w", "w"), ("", "")]
)
def test_bash_replaces_what_follows_the_last_break(word: str, end: str) -> None:
    assert unbroken_end(word) == end


HOSTILE = [
    "$(reboot)",
    "`reboot`",
    "a b",
    "a\nb",
    "a;b",
    "-x",
    "a'b",
    'a"b',
    "a\\b",
    "é",
    "",
    "a>b",
    "~",
    "!!",
    "a*",
    "{a,b}",
]


def test_a_name_that_means_something_to_a_shell_is_not_offered() -> None:
    assert names.plain(["web", "docker:web", "/sys/fs/cgroup/x@1.service", *HOSTILE, "web"]) == [
        "/sys/fs/cgroup/x@1.service",
        "docker:web",
        "web",
    ]


@given(st.text())
def test_what_is_offered_has_only_letters_digits_and_a_few_marks(name: str) -> None:
    for found in names.plain([name]):
        assert not set(found) & set(" \t\n$`'\"\\;&|<>()*?[]{}~!#%^")
        assert found.isascii() and found.isprintable()


def record(number: int, name: str) -> str:
    fields = {"id": number, "name": name, "cgroup": f"/{number}", "transport": "swap", "netns": 1, "policy": "p"}
    return json.dumps(fields | {"endpoints": []})


def test_attached_containers_are_offered_and_records_that_are_none_are_passed_over(settings: Settings) -> None:
    folder = settings.run_dir / "containers"
    folder.mkdir(parents=True)
    for number, name in enumerate(["web", "$(reboot)", "db"], 1):
        (folder / f"{number}.json").write_text(record(number, name))
    (folder / "9.json").write_text("{")
    assert names.attached(settings) == ["db", "web"]


def test_nothing_is_offered_and_nothing_said_where_there_is_nothing(
    settings: Settings, capfd: pytest.CaptureFixture[str]
) -> None:
    assert names.endpoints(settings) == names.attached(settings) == names.saved(settings) == []
    assert capfd.readouterr() == ("", "")


def test_nothing_is_offered_without_root(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert names.endpoints(settings) == []


def test_policies_are_offered_by_their_paths(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = settings.state_dir / "policies"
    folder.mkdir(parents=True)
    (folder / "web.yaml").touch()
    (folder / "notes.txt").touch()
    (here := tmp_path / "here").mkdir()
    (here / "mine.yml").touch()
    monkeypatch.chdir(here)
    monkeypatch.setattr(names, "POLICIES", tmp_path / "none")
    assert names.policy_files(settings, "") == [f"{folder}/web.yaml", "mine.yml"]
    assert names.policy_files(settings, "/") == [f"{folder}/web.yaml"]
