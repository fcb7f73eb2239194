"""What engines and runtimes say to Graft's runtime: command lines, states; and the operator's options."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.errors import UsageError
from graft.oci import arguments, main, options, state
from graft.oci.options import RuntimeOptions


@pytest.mark.parametrize(
    ("line", "command", "config", "name", "log"),
    [
        ("--version", "", "config.json", "", None),
        (
            "--root /r --log /l --log-format json create --bundle /b --pid-file /p x",
            "create",
            "/b/config.json",
            "x",
            "/l",
        ),
        ("--log=/l --debug --systemd-cgroup run -b /b x", "run", "/b/config.json", "x", "/l"),
        ("--cgroup-manager=cgroupfs create --config c.json -b/b x", "create", "/b/c.json", "x", None),
        ("create x --bundle /b", "create", "/b/config.json", "x", None),
        ("create --no-pivot x", "create", "./config.json", "x", None),
        ("restore --image-path /i -d --bundle /b --work-path /w x", "restore", "/b/config.json", "x", None),
        ("--root /r exec --bundle /b x sh", "exec", "config.json", "", None),
        ("--log /l kill x 9", "kill", "config.json", "", "/l"),
    ],
)
def test_an_engines_command_line_is_parsed(line: str, command: str, config: str, name: str, log: str | None) -> None:
    found = arguments.parse(line.split())
    assert (found.command, found.config, found.id, found.log) == (command, config, name, log)


@given(
    st.lists(
        st.sampled_from(["create", "run", "-b", "--bundle", "--log", "--", "-", "", "=", "x", "--a=b"]), max_size=8
    )
)
def test_any_command_line_is_parsed_without_an_error(words: list[str]) -> None:
    arguments.parse(words)


def test_options_of_the_operator_are_read_line_by_line() -> None:
    text = "---\n# which one\nruntime: crun # the small one\ntrust-annotations: false\nallow-net-admin: true\n"
    assert options.parse(text, "f") == RuntimeOptions("crun", False, True)


@pytest.mark.parametrize("text", ["runtmie: crun", "allow-net-admin: yes", "crun"])
def test_the_error_for_an_invalid_option_names_its_line(text: str) -> None:
    with pytest.raises(UsageError, match=r"^f:2: "):
        options.parse(f"\n{text}\n", "f")


@given(st.binary(max_size=80))
def test_a_message_that_is_no_state_is_a_value_error(raw: bytes) -> None:
    with pytest.raises(ValueError):
        state.parse(raw)


def test_the_state_of_a_hook_and_that_of_a_listener_are_parsed() -> None:
    plain = {"ociVersion": "1.0", "id": "c", "pid": 7, "bundle": "/b", "annotations": {"a": "b"}}
    assert state.parse(json.dumps(plain).encode()) == state.State("c", 7, "/b", {"a": "b"})
    wrapped = {"fds": ["other", "seccompFd"], "pid": 9, "metadata": "m", "state": plain}
    found = state.parse(json.dumps(wrapped).encode())
    assert (found.id, found.pid, found.descriptors) == ("c", 9, ("other", "seccompFd"))


class Sender:
    """A runtime's end of a connection, and the message at the other end."""

    def __init__(self) -> None:
        self.end, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.message = state.Message(other)

    def __enter__(self) -> Sender:
        return self

    def __exit__(self, *_: object) -> None:
        self.end.close()
        self.message.close()


def test_a_message_in_several_parts_is_parsed_when_it_is_complete() -> None:
    with Sender() as sender:
        for part in (b'{"id": "c", "annotations": {"a": "}"', b'}, "pid"', b": 7"):
            sender.end.send(part)
            assert sender.message.read() is None and not sender.message.ended
        sender.end.send(b"}")
        assert sender.message.read() == state.State("c", 7, "", {"a": "}"})


def test_a_message_that_is_never_complete_is_ended() -> None:
    with Sender() as sender:
        pieces = 0
        while not sender.message.ended:
            sender.end.send(b"{}" if pieces else b"[")
            assert sender.message.read() is None
            pieces += 1
        assert pieces == 256


def test_a_message_that_is_too_big_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "_MAX_BYTES", 1000)
    with Sender() as sender:
        sender.end.send(b'{"id": "' + b"x" * 1000)
        assert sender.message.read() is None and sender.message.ended


@pytest.mark.parametrize("form", ["json", "text"])
def test_an_error_is_shown_in_the_log_as_on_standard_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    """An image may have named what it is about; an engine shows a line of the log as it is."""
    words = ["--log", str(tmp_path / "log"), "--log-format", form, "create", "-b", str(tmp_path), "id"]
    with pytest.raises(SystemExit):
        main.fail(arguments.parse(words), "annotation \x1b]0;mine\x07 is not known")
    shown = r"graft: annotation \x1b]0;mine\x07 is not known"
    assert capsys.readouterr().err == shown + "\n"
    line = (tmp_path / "log").read_text()
    message = json.loads(line)["msg"] if form == "json" else json.loads(line.partition("msg=")[2])
    assert message == shown
