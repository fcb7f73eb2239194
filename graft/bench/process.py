"""Programs that the benchmark starts: run to their end, or kept while something is measured."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from graft.errors import GraftError

Environment = Mapping[str, str] | None


class BenchError(GraftError):
    """A measurement that could not be made, with what the program said, in lines of their own."""

    def lines(self) -> list[str]:
        """The lines for a terminal."""
        first, *more = self.message.splitlines() or [""]
        return [f"graft: {first}", *(f"  {line}" for line in more)]


class ProgramFailed(BenchError):
    """A program ended with a ``status`` that is not 0; ``said`` is its last word on why."""

    def __init__(self, command: Sequence[str], status: int, said: str) -> None:
        super().__init__(f"status {status}: {' '.join(command)}\n{said}".rstrip())
        self.status = status
        self.said = said


def joined(cgroup: Path, command: Sequence[str]) -> list[str]:
    """``command`` in a cgroup: its CPU time is counted there, and all that it starts can be killed by it."""
    return ["sh", "-c", 'echo $$ >"$0/cgroup.procs" && exec "$@"', str(cgroup), *command]


def run(command: Sequence[str], timeout: float = 60, environment: Environment = None) -> str:
    """Run ``command`` and give its standard output. Raises BenchError where it fails or takes too long."""
    with _started(command, subprocess.PIPE, environment) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            raise BenchError(f"no end after {timeout:.0f} s: {' '.join(command)}") from None
        finally:
            _end(process)
    if process.returncode != 0:
        raise ProgramFailed(command, process.returncode, errors or output)
    return output


@contextmanager
def kept(command: Sequence[str], environment: Environment = None) -> Iterator[subprocess.Popen[str]]:
    """Keep ``command`` running while the block does, and end it with SIGTERM, or SIGKILL where that does not help."""
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process = _started(command, said, environment)
        try:
            yield process
        except BenchError as error:
            said.seek(0)
            raise BenchError(f"{error}\n{' '.join(command)} said:\n{said.read()}") from error
        finally:
            _end(process)


def wait_until(what: str, condition: Callable[[], bool], process: subprocess.Popen[str], timeout: float = 15) -> None:
    """Poll ``condition`` until it is true. Raises BenchError at the deadline or where ``process`` ends."""
    deadline = time.monotonic() + timeout
    while not condition():
        if process.poll() is not None:
            raise BenchError(f"ended with status {process.returncode} before {what}")
        if time.monotonic() > deadline:
            raise BenchError(f"not within {timeout:.0f} s: {what}")
        time.sleep(0.02)


def _started(command: Sequence[str], output: int | IO[str], environment: Environment) -> subprocess.Popen[str]:
    """Start ``command`` in a session of its own: a Ctrl-C comes to the benchmark, which then ends what it started."""
    errors = subprocess.PIPE if output == subprocess.PIPE else subprocess.STDOUT
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            text=True,
            env=environment,
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise BenchError(f"{error.filename} is not installed") from error


def _end(process: subprocess.Popen[str]) -> None:
    """End ``process`` and what is left of its session."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
