"""Whether the relay in the kernel may serve on this machine: what the self-test said of it, and how long that holds.

A verdict is kept with all that it depends on: the kernel, since its start, and what of Graft relays. Where one of these
changes, the test is made anew. A test that found nothing out, because there was no time or no memory, is no verdict on
the kernel: the relay does not serve, and the next one who asks tests again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from graft import __version__
from graft.datapath.loader import RELAY_SIZES, RELAY_SOURCES
from graft.datapath.sources import bpf_source_dir
from graft.errors import UsageError
from graft.kernel.files import write_atomically
from graft.model import json_text
from graft.model.json_text import mapping, text, text_by_name
from graft.model.settings import Settings

_NAME = "kernel-relay.json"
_MAX_BYTES = 1 << 16
_ALL_SECONDS = 60.0  # for the whole test; it takes about one
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_RELAY_MODULES = ("connection.py", "kernel_flow.py", "sockmap.py", "selftest.py")
FAILED, INCONCLUSIVE = 1, 2
"""Exit statuses of the self-test."""


@dataclass(frozen=True, slots=True)
class SelftestResult:
    """What is wrong with the relay in the kernel, in one line; empty where nothing is. ``lasting``: it may be kept."""

    problem: str
    lasting: bool = True


def depends_on() -> dict[str, str]:
    """What a verdict holds for: another kernel, another start of it or another relay needs another one."""
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


def kept(settings: Settings) -> SelftestResult | None:
    """The verdict that is kept and still holds, None where there is none. Reads a few files, and tests nothing."""
    with contextlib.suppress(OSError, UsageError):
        return parse((settings.run_dir / _NAME).read_bytes(), depends_on())
    return None


def parse(raw: bytes, wanted: dict[str, str]) -> SelftestResult | None:
    """The verdict that was kept, None where it depends on anything else than ``wanted``. Raises UsageError."""
    found = mapping(json_text.parse(raw, _NAME, _MAX_BYTES), _NAME)
    problem = text(found.get("problem"), "problem")
    return (
        SelftestResult(problem)
        if text_by_name(found.get("depends_on"), "depends_on") == wanted and "problem" in found
        else None
    )


def keep(settings: Settings, verdict: SelftestResult) -> None:
    """Keep a verdict, if it is a lasting one. Raises OSError."""
    if not verdict.lasting:
        return
    file = settings.run_dir / _NAME
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomically(file, json.dumps({"depends_on": depends_on(), "problem": verdict.problem}).encode())


def verdict(settings: Settings) -> SelftestResult:
    """The verdict that is kept, or that of a test which is made now. Needs root."""
    found = kept(settings)
    if found is None:
        found = test()
        keep(settings, found)
    return found


def test(started: Callable[[subprocess.Popen[str]], None] = lambda _: None) -> SelftestResult:
    """Test now, in a process of its own, of which ``started`` is told."""
    command = [sys.executable, "-m", "graft.splice.selftest"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        started(process)
        try:
            said, complained = process.communicate(timeout=_ALL_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            return SelftestResult("its self-test does not end", lasting=False)
    if process.returncode == 0:
        return SelftestResult("")
    lines = (said.strip() or complained.strip() or "its self-test failed").splitlines()
    return SelftestResult(lines[0] if said.strip() else lines[-1], lasting=process.returncode == FAILED)
