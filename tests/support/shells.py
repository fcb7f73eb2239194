"""Real shells complete a command line: bash and zsh at a terminal, by the key Tab; fish is asked what it would do."""

from __future__ import annotations

import os
import pty
import re
import select
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.shell import run
from tests.support.wait import PATIENCE

START: Mapping[str, Sequence[str]] = {
    "bash": ["bash", "--norc", "--noprofile", "-i"],
    "zsh": ["zsh", "-f", "-i"],
}
PREPARE: Mapping[str, str] = {
    "bash": "source {script}",
    "zsh": "autoload -Uz compinit; compinit -D; source {script}",
}
_HOME = "\x01"  # Ctrl-A: to the beginning of the line


def completed(shell: str, script: Path, line: str, environment: Mapping[str, str]) -> str:
    """``line`` as it is after the key Tab, in a ``shell`` that has read the completion ``script``."""
    if shell == "fish":
        return _completed_by_fish(script, line, environment)
    keys = f"{PREPARE[shell].format(script=script)}\n{line}\t{_HOME}echo '<'\"$GRAFT_TEST_WORD\" \n"
    text = _at_terminal(START[shell], keys, {**os.environ, **environment, "TERM": "dumb", "GRAFT_TEST_WORD": "line"})
    found = re.search(r"^<line (.*?) *\r?$", text, re.MULTILINE)
    assert found, text
    return found[1]


def _completed_by_fish(script: Path, line: str, environment: Mapping[str, str]) -> str:
    """The same, if there is one word to complete it with; ``line`` itself if there are none, or several."""
    command = ["fish", "--no-config", "-c", f"source {script}; complete -C {shlex.quote(line)}"]
    words = [row.split("\t")[0] for row in run(command, environment=environment, status=0).stdout.splitlines()]
    return f"{line.rpartition(' ')[0]} {words[0]}" if len(words) == 1 else line


def _at_terminal(command: Sequence[str], keys: str, environment: Mapping[str, str]) -> str:
    """What a program writes to a terminal until the line that begins with `<line`."""
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=dict(environment), start_new_session=True
        )
        os.close(theirs)
        os.write(ours, keys.encode())
        return _read_until(ours, re.compile(r"^<line .*\n", re.MULTILINE))
    finally:
        os.close(ours)  # the shell's terminal hangs up
        process.kill()
        process.wait()


def _read_until(terminal: int, end: re.Pattern[str]) -> str:
    text, deadline = "", time.monotonic() + 20 * PATIENCE
    while not end.search(text):
        ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"the shell did not answer: {text!r}"
        text += os.read(terminal, 1 << 16).decode(errors="replace")
    return text
