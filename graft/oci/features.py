"""Whether a runtime can be told SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, which keeps a program's own signals
from restarting a call that a supervisor is at work on (Go's runtime sends them all the time).

Asked once for each runtime and remembered: an unknown flag would keep a container from starting.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from graft.errors import UsageError
from graft.kernel.files import write_atomically
from graft.model import json_text
from graft.model.json_text import mapping, texts
from graft.oci.seccomp_profile import WAIT_KILLABLE

_SINCE = (5, 19)
_MAX_BYTES = 1 << 20


def knows_wait_killable(runtime: str, remembered: Path) -> bool:
    """Whether both the kernel and ``runtime`` know it; ``remembered`` is a file for the answer."""
    major, minor = os.uname().release.split(".")[:2]
    if (int(major), int("".join(filter(str.isdigit, minor)) or 0)) < _SINCE:
        return False
    status = os.stat(runtime)
    key = f"{os.path.realpath(runtime)} {status.st_mtime_ns} {status.st_size}"
    try:
        answers = parse_answers(remembered.read_bytes())
    except (OSError, UsageError):
        answers = {}
    if key not in answers:
        answers = {key: _ask(runtime)}
        write_atomically(remembered, json.dumps(answers).encode())
    return answers[key]


def _ask(runtime: str) -> bool:
    """`features` of the runtime-spec (runc 1.1, crun 1.9); an older crun is asked by looking into its text."""
    try:
        said = subprocess.run([runtime, "features"], capture_output=True, timeout=10, check=True).stdout
        return WAIT_KILLABLE in supported_flags(said)
    except (OSError, subprocess.SubprocessError, UsageError):
        return os.path.basename(runtime) == "crun" and WAIT_KILLABLE.encode() in Path(runtime).read_bytes()


def supported_flags(said: bytes) -> list[str]:
    """Which flags of a seccomp filter a runtime knows, by its `features`. Raises UsageError."""
    features = mapping(json_text.parse(said, "features", _MAX_BYTES), "features")
    seccomp = mapping(mapping(features.get("linux"), "linux").get("seccomp"), "linux.seccomp")
    return texts(seccomp.get("supportedFlags"), "linux.seccomp.supportedFlags")


def parse_answers(raw: bytes) -> dict[str, bool]:
    """What was remembered. Raises UsageError."""
    found = mapping(json_text.parse(raw, "features.json", _MAX_BYTES), "features.json")
    return {key: answer for key, answer in found.items() if isinstance(answer, bool)}
