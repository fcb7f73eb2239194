"""Lines of a log: what cannot be written is lost and counted, and stops nobody."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from graft.keeper import lines, process
from graft.splice import event_loop, log
from graft.splice.event_loop import EventLoop

ENDS_WELL = """
import os
from graft.keeper.process import log
from graft.splice.log import log_failure, warn
for write in (log, warn):
    write("a line")
try:
    1 / 0
except ZeroDivisionError:
    log_failure()
"""


def test_where_standard_error_is_full_or_closed_a_process_goes_on_and_ends_well() -> None:
    for redirection in (">/dev/full", ">&-"):
        done = subprocess.run(["sh", "-c", f'exec "$@" 2{redirection}', "sh", sys.executable, "-c", ENDS_WELL])
        assert done.returncode == 0


def test_control_printed_a_line_that_cannot_be_written_is_an_error() -> None:
    text = "import sys\nprint('a line', file=sys.stderr, flush=True)"
    assert subprocess.run(["sh", "-c", 'exec "$@" 2>/dev/full', "sh", sys.executable, "-c", text]).returncode


def test_lines_that_were_lost_are_counted_in_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, path = lines.Lines(), tmp_path / "log"
    with open("/dev/full", "wb") as full, path.open("ab") as file:
        monkeypatch.setattr(lines, "_STANDARD_ERROR", full.fileno())
        write("one")
        write("two")
        monkeypatch.setattr(lines, "_STANDARD_ERROR", file.fileno())
        write("three")
        write("four")
    three, four = path.read_text().splitlines()
    assert three.endswith(" three (2 lines before this one could not be written)")
    assert four.endswith(" four")


@pytest.mark.parametrize("write", [log.log, process.log])
def test_a_line_has_the_time(write: Callable[[str], None], capfd: pytest.CaptureFixture[str]) -> None:
    write("what")
    assert capfd.readouterr().err.startswith("20")


def test_the_event_loop_goes_on_whatever_becomes_of_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(event_loop, "log_failure", log.FailureLog())
    monkeypatch.setattr(log, "write_line", fail)
    loop, made = EventLoop(lambda: None), list[int]()
    loop.later(lambda: fail())
    loop.later(lambda: made.append(1))
    loop.turn()
    loop.turn()
    loop.shut_down()
    assert made == [1]


@pytest.fixture
def small_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file for lines of which a few are too many."""
    monkeypatch.setattr(lines, "MAX_BYTES", 1000)
    monkeypatch.setattr(lines, "KEPT_BYTES", 400)
    return tmp_path / "log"


def test_a_log_of_grafts_own_keeps_its_last_lines(small_log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fd, longest = os.open(small_log, lines.OPENED | os.O_CREAT, 0o600), 0
    monkeypatch.setattr(lines, "_STANDARD_ERROR", fd)
    for number in range(200):
        lines.write_line(f"line {number}")
        longest = max(longest, small_log.stat().st_size)
    os.close(fd)
    assert longest <= 1000
    numbers = [int(line.partition(" line ")[2]) for line in small_log.read_text().splitlines()]
    assert numbers == list(range(numbers[0], 200))
    assert len(numbers) > 5


@pytest.mark.parametrize("flags", [os.O_WRONLY | os.O_APPEND, os.O_RDWR])
def test_another_file_keeps_all(small_log: Path, monkeypatch: pytest.MonkeyPatch, flags: int) -> None:
    fd = os.open(small_log, flags | os.O_CREAT, 0o600)
    monkeypatch.setattr(lines, "_STANDARD_ERROR", fd)
    for number in range(200):
        lines.write_line(f"line {number}")
    os.close(fd)
    assert len(small_log.read_text().splitlines()) == 200
