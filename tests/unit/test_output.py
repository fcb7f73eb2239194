"""Commands show names that others chose so that no terminal obeys them, and no line is forged."""

from __future__ import annotations

import io
import os
import pty
import sys
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.errors import GraftError
from graft.model.printable import printable
from graft_cli import attach, output

NASTY = "web\x1b[2J\x9b31m\r\ngraft: all is well\u202e\u2028\x7f\udcff\t"
SHOWN = r"web\x1b[2J\x9b31m\r\ngraft: all is well\u202e\u2028\x7f\udcff\t"


def test_control_characters_are_shown_as_python_writes_them() -> None:
    assert printable(NASTY) == SHOWN


@pytest.mark.parametrize(
    "text", ["", "nginx", "a b", r"dev-disk-by\x2duuid.device", "[::]:80", "é 中 😀", "~!@#$%^&*()"]
)
def test_what_only_shows_is_left_as_it_is(text: str) -> None:
    assert printable(text) == text


@given(st.text(st.characters(codec=None)))
def test_any_text_is_one_line_that_does_nothing_but_show(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert len(shown.splitlines()) <= 1
    assert printable(shown) == shown


def test_lines_of_a_command_are_shown_so(capsys: pytest.CaptureFixture[str]) -> None:
    output.say(NASTY, "two")
    output.warn(NASTY)
    assert capsys.readouterr() == (f"{SHOWN}\ntwo\n", f"{SHOWN}\n")


def test_an_error_is_shown_so(capsys: pytest.CaptureFixture[str]) -> None:
    @output.command
    def failing() -> None:
        raise GraftError(f"cgroup: {NASTY}", NASTY)

    with pytest.raises(SystemExit):
        failing()
    assert capsys.readouterr().err == f"graft: cgroup: {SHOWN} ({SHOWN})\n"


def test_a_row_in_a_pipe_has_as_many_cells_as_its_title(capsys: pytest.CaptureFixture[str]) -> None:
    output.listing(("NAME", "CGROUP"), [(NASTY, 7)], [], as_json=False)
    assert capsys.readouterr().out == f"{SHOWN}\t7\n"


def test_json_has_the_name_itself_in_escapes_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    output.listing(("NAME",), [], [{"name": NASTY}], as_json=True)
    shown = capsys.readouterr().out
    assert shown.isascii() and "\x1b" not in shown and "\x7f" not in shown


def on_a_terminal(show: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> str:
    """What a terminal gets from ``show``."""
    ours, theirs = pty.openpty()
    with open(theirs, "w", encoding="utf-8") as terminal:
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "stdout", terminal)
        show()
        monkeypatch.undo()
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # EIO: the other end is closed
        pass
    finally:
        os.close(ours)
    return shown.decode()


@pytest.mark.parametrize("name", ["[bold]x[/bold]", "[/]", "[fe80::1]:80", "[red", ":smile:", "[link=x]y[/link]"])
def test_a_table_takes_no_name_for_markup(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = on_a_terminal(lambda: output.listing(("NAME",), [(name,)], [], as_json=False), monkeypatch)
    assert name in shown


def test_a_table_shows_control_characters_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = on_a_terminal(lambda: output.listing(("NAME",), [(NASTY,)], [], as_json=False), monkeypatch)
    assert SHOWN in shown
    assert "\x1b[2J" not in shown and "\x9b" not in shown


def test_a_terminal_of_another_character_set_gets_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    output.say("é")
    output.listing(("NAME",), [("é",)], [], as_json=False)
    monkeypatch.undo()
    stream.seek(0)
    assert stream.read() == "\\xe9\n\\xe9\n"


def test_a_container_with_very_many_listeners_is_described_in_short() -> None:
    about = {"relay": "splice", "pid": 1, "published": [], "failed": [], "not_granted": ["[::]:1"]}
    lines = attach._relay_lines({**about, "more_not_granted": 70_000, "too_many": 300})
    assert "  and for 70000 more" in lines
    assert "  300 of these have a rule, but are too many for one container" in lines
