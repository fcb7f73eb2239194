"""A program that runs while a test talks to it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from tests.support.shell import Word
from tests.support.wait import PATIENCE, until

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Program:
    """A started command; its output goes to files."""

    process: subprocess.Popen[bytes]
    out: IO[bytes]
    err: IO[bytes]

    @property
    def said(self) -> str:
        """Its standard output so far."""
        return Path(self.out.name).read_text(errors="replace")

    @property
    def complained(self) -> str:
        """Its standard error so far."""
        return Path(self.err.name).read_text(errors="replace")

    def until(self, what: str, condition: Callable[[], T], timeout: float = 15) -> T:
        """Poll ``condition``; fails the test at the deadline, or where the program ends first."""

        def alive_and_true() -> T:
            found = condition()
            assert found or self.process.poll() is None, self._ended(what)
            return found

        try:
            return until(what, alive_and_true, timeout)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.said}\n{self.complained}") from None

    def _ended(self, what: str) -> str:
        return f"ended with {self.process.returncode} before: {what}\n{self.said}\n{self.complained}"

    def says(self, text: str, timeout: float = 15) -> str:
        """Wait until ``text`` is in its output; gives all of the output."""
        self.until(f"{text!r} in the output", lambda: text in self.said, timeout)
        return self.said

    def child(self) -> int:
        """The process id of the program that `graft run` started."""
        for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            if "/supervisors" not in Path(f"/proc/{pid}/cgroup").read_text():
                return int(pid)
        raise AssertionError("`graft run` has started no program")

    def tell(self, text: str) -> None:
        """Write to its standard input (started with ``talk=True``)."""
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def wait(self, timeout: float = 30) -> int:
        """Its exit status; a negative one is the signal that ended it."""
        try:
            return self.process.wait(timeout * PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end after {timeout * PATIENCE:.0f} s\n{self.said}\n{self.complained}") from None

    def stop(self, signum: signal.Signals = signal.SIGTERM) -> int:
        """End it, with SIGKILL where ``signum`` does not."""
        if self.process.poll() is None:
            self.process.send_signal(signum)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10 * PATIENCE)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        for kept in (self.out, self.err):
            kept.close()
        return self.process.returncode


def start(command: Sequence[Word], environment: Mapping[str, str] | None = None, talk: bool = False) -> Program:
    """Start ``command`` in a session of its own; with ``talk`` its standard input is a pipe."""
    out, err = tempfile.NamedTemporaryFile(), tempfile.NamedTemporaryFile()  # noqa: SIM115
    process = subprocess.Popen(
        [str(word) for word in command],
        stdin=subprocess.PIPE if talk else subprocess.DEVNULL,
        stdout=out,
        stderr=err,
        env=dict(os.environ if environment is None else environment),
        start_new_session=True,
    )
    return Program(process, out, err)
