"""Whether the relay in the kernel may be used on this machine: the self-test's result, stored while it is valid.

A result is stored with everything that it depends on: the kernel, its boot, and the parts of Graft that relay. When one
of these changes, the test runs again. A test that ran out of time or memory is inconclusive: its result is not stored,
the relay is not used, and the next caller tests again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from graft import __version__
from graft.datapath.loader import RELAY_SIZES, RELAY_SOURCES
from graft.datapath.sources import bpf_source_dir
from graft.errors import UsageError
from graft.kernel.atomic_file import write_atomically
from graft.model import json_text
from graft.model.json_text import mapping, text, text_by_name
from graft.model.settings import Settings

_NAME = "kernel-relay.json"
_MAX_BYTES = 1 << 16
TIMEOUT_SECONDS = 60.0  # of the whole test; it takes about one second
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_RELAY_MODULES = ("connection.py", "kernel_flow.py", "sockmap.py", "selftest.py")
FAILED, INCONCLUSIVE = 1, 2
"""Exit statuses of the self-test."""


@dataclass(frozen=True, slots=True)
class SelftestResult:
    """``problem`` says in one line what is wrong with the relay in the kernel; empty where it may be used.

    ``conclusive``: it says something about the kernel, so it may be stored. ``tested``: what there was when the test
    began (`depends_on`); None: what there is now.
    """

    problem: str
    conclusive: bool = True
    tested: Mapping[str, str] | None = field(default=None, compare=False)


def depends_on() -> dict[str, str]:
    """What a result depends on: it is not valid for another kernel, another boot or another relay."""
    return {
        "boot": _BOOT_ID.read_text().strip(),
        "kernel": os.uname().release,
        "version": __version__,
        "relay": _relay_hash(),
    }


def _relay_hash() -> str:
    sources, modules = bpf_source_dir(), Path(__file__).parent
    files = [*(sources / name for name in (*RELAY_SOURCES, "graft.h")), *(modules / name for name in _RELAY_MODULES)]
    found = hashlib.sha256(repr(sorted(RELAY_SIZES.items())).encode())
    for file in files:
        found.update(hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()


def stored(settings: Settings) -> SelftestResult | None:
    """The stored result, if it is still valid; None where there is none. Only reads a few files."""
    with contextlib.suppress(OSError, UsageError):
        return parse((settings.run_dir / _NAME).read_bytes(), depends_on())
    return None


def parse(raw: bytes, wanted: dict[str, str]) -> SelftestResult | None:
    """The stored result in ``raw``; None where it depends on anything else than ``wanted``. Raises UsageError."""
    found = mapping(json_text.parse(raw, _NAME, _MAX_BYTES), _NAME)
    problem = text(found.get("problem"), "problem")
    return (
        SelftestResult(problem)
        if text_by_name(found.get("depends_on"), "depends_on") == wanted and "problem" in found
        else None
    )


def store(settings: Settings, result: SelftestResult) -> None:
    """Store ``result`` if it is conclusive. Raises OSError."""
    if not result.conclusive:
        return
    file = settings.run_dir / _NAME
    if not file.parent.exists():  # else it is not made: others may hold the folder above
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomically(
        file, json.dumps({"depends_on": result.tested or depends_on(), "problem": result.problem}).encode()
    )


def get(settings: Settings) -> SelftestResult:
    """The stored result, or that of a test that runs now. Needs root."""
    result = stored(settings)
    if result is None:
        result = run_selftest()
        store(settings, result)
    return result


def run_selftest(started: Callable[[subprocess.Popen[str]], None] = lambda _: None) -> SelftestResult:
    """Test now, in another process; ``started`` is called with it. Raises OSError."""
    tested = depends_on()  # the relay may be replaced while its test runs
    return replace(_run(started), tested=tested)


def _run(started: Callable[[subprocess.Popen[str]], None]) -> SelftestResult:
    command = [sys.executable, "-P", "-m", "graft.splice.selftest"]  # -P: nothing from the working directory
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/") as process:
        started(process)
        try:
            output, errors = process.communicate(timeout=TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            return SelftestResult("its self-test does not end", conclusive=False)
    if process.returncode == 0:
        return SelftestResult("")
    lines = (output.strip() or errors.strip() or "its self-test failed").splitlines()
    return SelftestResult(lines[0] if output.strip() else lines[-1], conclusive=process.returncode == FAILED)
