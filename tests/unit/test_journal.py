"""Entries of systemd's journal, as its native protocol has them; whether standard error is the journal's."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from graft.kernel import journal
from graft.kernel.journal import STREAM, Journal, encode, of_standard_error


def test_a_field_is_a_line_and_one_with_a_line_break_has_its_length() -> None:
    assert encode({"PRIORITY": "6", "MESSAGE": "plain = text"}) == b"PRIORITY=6\nMESSAGE=plain = text\n"
    forged = "two\nPRIORITY=0"
    assert encode({"MESSAGE": forged}) == b"MESSAGE\n" + struct.pack("<Q", len(forged)) + forged.encode() + b"\n"
    assert encode({"A": "\udcff\u00e9"}) == b"A=\\udcff\xc3\xa9\n"


@pytest.mark.parametrize("stream", ["", "1", "x:y", "1:2", ":"])
def test_what_is_not_the_journals_stream_is_no_journal(monkeypatch: pytest.MonkeyPatch, stream: str) -> None:
    monkeypatch.setenv(STREAM, stream)
    assert of_standard_error("graftd") is None


def test_the_stream_that_the_service_manager_named_is_the_journals(monkeypatch: pytest.MonkeyPatch) -> None:
    found = os.fstat(2)
    monkeypatch.setenv(STREAM, f"{found.st_dev}:{found.st_ino}")
    assert of_standard_error("graftd") is not None


def test_where_there_is_no_journal_nothing_is_sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(journal, "_SOCKET", str(tmp_path / "none"))
    assert Journal("graftd").send("text") is False
