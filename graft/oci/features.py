"""Whether a runtime supports SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, with which a program's own signals do not
restart a call that a supervisor is serving (Go's runtime sends them all the time).

A container would not start with a flag that its runtime does not know. Each runtime is asked once.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from graft.errors import UsageError
from graft.kernel.atomic_file import write_atomically
from graft.model import json_text
from graft.model.json_text import mapping, texts
from graft.oci.seccomp_profile import WAIT_KILLABLE

_SINCE = (5, 19)
_MAX_BYTES = 1 << 20


def supports_wait_killable(runtime: str, cache: Path) -> bool:
    """Whether both the kernel and ``runtime`` support it; ``cache`` is a file for the answer."""
    major, minor = os.uname().release.split(".")[:2]
    if (int(major), int("".join(filter(str.isdigit, minor)) or 0)) < _SINCE:
        return False
    status = os.stat(runtime)
    key = f"{os.path.realpath(runtime)} {status.st_mtime_ns} {status.st_size}"
    try:
        answers = parse_cache(cache.read_bytes())
    except (OSError, UsageError):
        answers = {}
    if key not in answers:
        answers = {key: _runtime_supports(runtime)}
        write_atomically(cache, json.dumps(answers).encode())
    return answers[key]


def _runtime_supports(runtime: str) -> bool:
    """By the sub-command `features` (runc 1.1, crun 1.9); in an older crun's file the flag's name is looked for."""
    try:
        output = subprocess.run([runtime, "features"], capture_output=True, timeout=10, check=True).stdout
        return WAIT_KILLABLE in supported_flags(output)
    except (OSError, subprocess.SubprocessError, UsageError):
        return os.path.basename(runtime) == "crun" and WAIT_KILLABLE.encode() in Path(runtime).read_bytes()


def supported_flags(output: bytes) -> list[str]:
    """The flags of a seccomp filter in the output of a runtime's `features`. Raises UsageError."""
    features = mapping(json_text.parse(output, "features", _MAX_BYTES), "features")
    seccomp = mapping(mapping(features.get("linux"), "linux").get("seccomp"), "linux.seccomp")
    return texts(seccomp.get("supportedFlags"), "linux.seccomp.supportedFlags")


def parse_cache(raw: bytes) -> dict[str, bool]:
    """The answers in the cache. Raises UsageError."""
    found = mapping(json_text.parse(raw, "features.json", _MAX_BYTES), "features.json")
    return {key: answer for key, answer in found.items() if isinstance(answer, bool)}
