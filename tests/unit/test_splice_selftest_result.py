"""The self-test's result: stored with what it depends on, and only if it says something about the kernel."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from graft.datapath.sources import bpf_source_dir
from graft.model.settings import Settings
from graft.splice import selftest, selftest_result
from graft.splice.selftest_result import FAILED, INCONCLUSIVE, SelftestResult


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        Path("/proc/self/ns/net"), tmp_path / "pins", tmp_path / "run", tmp_path / "state", tmp_path, "graft-x"
    )


def test_a_result_is_stored(settings: Settings) -> None:
    assert selftest_result.stored(settings) is None
    for problem in ("", "bytes are lost"):
        selftest_result.store(settings, SelftestResult(problem))
        assert selftest_result.stored(settings) == SelftestResult(problem)


def test_an_inconclusive_result_is_not_stored(settings: Settings) -> None:
    selftest_result.store(settings, SelftestResult("its self-test does not end", conclusive=False))
    assert selftest_result.stored(settings) is None


@pytest.mark.parametrize("what", ["boot", "kernel", "version", "relay"])
def test_a_result_is_not_valid_when_something_that_it_depends_on_changes(settings: Settings, what: str) -> None:
    selftest_result.store(settings, SelftestResult(""))
    file = settings.run_dir / "kernel-relay.json"
    found = json.loads(file.read_text())
    found["depends_on"][what] = "another"
    file.write_text(json.dumps(found))
    assert selftest_result.stored(settings) is None


def test_a_result_of_an_old_version_with_the_boot_only_is_not_valid(settings: Settings) -> None:
    settings.run_dir.mkdir()
    boot = selftest_result.depends_on()["boot"]
    (settings.run_dir / "kernel-relay.json").write_text(json.dumps({"boot": boot, "problem": ""}))
    assert selftest_result.stored(settings) is None


def test_a_change_in_the_relays_source_is_another_relay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = selftest_result.depends_on()
    sources = tmp_path / "bpf"
    shutil.copytree(bpf_source_dir(), sources)
    monkeypatch.setattr(selftest_result, "bpf_source_dir", lambda: sources)
    assert selftest_result.depends_on() == before
    text = (sources / "relay.bpf.c").read_text()
    (sources / "relay.bpf.c").write_text(text + "\n")
    assert selftest_result.depends_on() != before


def test_the_self_test_runs_once_while_its_result_is_valid(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    tested: list[int] = []

    def test() -> SelftestResult:
        tested.append(1)
        return SelftestResult("bytes are lost")

    monkeypatch.setattr(selftest_result, "run_selftest", test)
    assert [selftest_result.get(settings).problem for _ in range(3)] == ["bytes are lost"] * 3
    assert tested == [1]


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("exit 0", SelftestResult("")),
        (f"echo bytes are lost; exit {FAILED}", SelftestResult("bytes are lost")),
        (f"echo a transfer hangs; exit {INCONCLUSIVE}", SelftestResult("a transfer hangs", conclusive=False)),
        ("kill -9 $$", SelftestResult("its self-test failed", conclusive=False)),
        ("exec sleep 60", SelftestResult("its self-test does not end", conclusive=False)),
    ],
)
def test_the_self_tests_exit_status_says_whether_its_result_is_conclusive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, expected: SelftestResult
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(selftest_result, "TIMEOUT_SECONDS", 5.0 if "sleep" not in script else 0.2)
    assert selftest_result.run_selftest() == expected


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (selftest.CheckFailed("bytes are lost"), FAILED),
        (selftest.Inconclusive("a transfer hangs"), INCONCLUSIVE),
        (OSError(12, os.strerror(12)), INCONCLUSIVE),
    ],
)
def test_the_self_test_distinguishes_a_wrong_kernel_from_a_lack_of_time(
    monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("graft.kernel.netns.unshare_netns", fail)
    assert selftest.main() == status


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (TimeoutError("timed out"), selftest.Inconclusive),
        (OSError(24, os.strerror(24)), selftest.Inconclusive),
        (ConnectionResetError(104, os.strerror(104)), selftest.CheckFailed),
    ],
)
def test_a_check_that_ran_out_of_time_is_inconclusive(error: OSError, kind: type[Exception]) -> None:
    def check(_trial: selftest.Trial) -> None:
        raise error

    with pytest.raises(selftest.CheckFailed) as raised:
        selftest.run_check(None, check)  # type: ignore[arg-type]
    assert type(raised.value) is kind


def test_a_result_is_of_the_relay_that_was_tested(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of one that an upgrade has put in its place meanwhile."""
    relay = ["old"]

    def run(_started: object) -> SelftestResult:
        relay[0] = "new"
        return SelftestResult("")

    monkeypatch.setattr(selftest_result, "_relay_hash", lambda: relay[0])
    monkeypatch.setattr(selftest_result, "_run", run)
    assert selftest_result.get(settings).problem == ""
    assert selftest_result.stored(settings) is None
