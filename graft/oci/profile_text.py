"""A seccomp profile for podman's `--security-opt seccomp=`, with Graft's listener in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from graft.errors import NotFoundError, UsageError
from graft.model import json_text
from graft.oci.seccomp_profile import Profile, check_profile, with_notifications

_METADATA, BORN_METADATA = "graft", "graft-born"
_MAX_BYTES = 16 << 20
_DEFAULTS = (Path("/etc/containers/seccomp.json"), Path("/usr/share/containers/seccomp.json"))


def read_base(file: Path | None, defaults: Sequence[Path] = _DEFAULTS) -> Profile:
    """The profile in ``file``, by default podman's own. Raises NotFoundError, UsageError."""
    path = file or next((path for path in defaults if path.exists()), None)
    if path is None:
        raise NotFoundError("--base: podman's own profile not found", "--base FILE")
    try:
        with path.open("rb") as opened:
            return parse_base(opened.read(_MAX_BYTES + 1), f"--base: {path}")
    except FileNotFoundError:
        raise NotFoundError(f"--base: {path} not found") from None
    except OSError as error:
        raise UsageError(f"--base: cannot read {path}: {error.strerror}") from error


def parse_base(raw: bytes, source: str) -> Profile:
    """The profile in ``raw``, which comes from ``source``. Raises UsageError for an invalid one."""
    found = json_text.parse(raw, source, _MAX_BYTES)
    if not isinstance(found, dict) or "defaultAction" not in found:
        raise UsageError(f"{source} is not a seccomp profile", "an object with defaultAction and syscalls")
    return check_profile(found, source)


def profile_text(base: Profile, listener: Path, born: bool = False) -> str:
    """``base`` with bind, connect, listen and socket (of datagrams) notified at ``listener``, as JSON.

    ``born``: with socket alone, of every type. Raises ConflictError.
    The runtime repeats the metadata to `graft listen`, which so knows what the profile traps.
    """
    metadata = BORN_METADATA if born else _METADATA
    return json.dumps(with_notifications(base, str(listener), metadata, str(listener), born, not born), indent=2)
