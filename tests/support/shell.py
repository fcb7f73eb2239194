"""Commands run to their end, with what they said in the test's report where they fail."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.wait import PATIENCE

Result = subprocess.CompletedProcess[str]
Word = str | Path | int

AS_NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--")
"""The words to put before a command that is to run as the user nobody."""


def run(
    command: Sequence[Word],
    *,
    environment: Mapping[str, str] | None = None,
    stdin: str | None = None,
    timeout: float = 60,
    status: int | None = None,
) -> Result:
    """``command`` run to its end. With ``status``, any other exit status fails the test."""
    result = subprocess.run(
        [str(word) for word in command],
        env=None if environment is None else {**os.environ, **environment},
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout * PATIENCE,
        check=False,
    )
    if status is not None and result.returncode != status:
        raise AssertionError(
            f"status {result.returncode}, not {status}: {' '.join(map(str, command))}\n{result.stdout}{result.stderr}"
        )
    return result


def output(command: Sequence[Word], **options: object) -> str:
    """Standard output of a ``command`` that has to end with 0."""
    return run(command, status=0, **options).stdout  # type: ignore[arg-type]
