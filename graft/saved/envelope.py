"""The bytes of a saved file: a line with version and checksum, then JSON.

    graft-saved 1 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
    {"name": "nx4", "endpoint": "0.0.0.0:8080"}

The checksum (SHA-256) is that of the version and of all bytes below the first line. It finds what a disk or a
truncated write has changed; it does not say who wrote the file (graft/saved/store.py looks at its owner).
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from graft.errors import UsageError
from graft.model import json_text
from graft.policy.document import Value

VERSION = 1
MAX_BYTES = 8 << 20
"""Of a file. A policy of the greatest size takes less."""

_FIRST_LINE = re.compile(rb"graft-saved ([1-9][0-9]{0,8}) ([0-9a-f]{64})\n")


class NewerError(UsageError):
    """A file is whole, and of a newer version of Graft."""


def encode(value: dict[str, Value], version: int = VERSION) -> bytes:
    """The file of ``value``."""
    body = (json.dumps(value, indent=1) + "\n").encode("ascii")
    return b"graft-saved %d %s\n" % (version, _checksum(version, body)) + body


def _checksum(version: int, body: bytes) -> bytes:
    return hashlib.sha256(b"%d\n" % version + body).hexdigest().encode("ascii")


def decode(raw: bytes, source: str) -> Any:
    """The value in a file. Raises UsageError, which names ``source``, for one that is damaged; NewerError."""
    if len(raw) > MAX_BYTES:
        raise UsageError(f"{source}: too big")
    found = _FIRST_LINE.match(raw)
    if found is None:
        raise UsageError(f"{source}: damaged: the first line is not that of a saved file")
    version, body = int(found[1]), raw[found.end() :]
    if _checksum(version, body) != found[2]:
        raise UsageError(f"{source}: damaged: the checksum is wrong")
    if version != VERSION:
        raise NewerError(f"{source}: of version {version}, which this Graft cannot read (it writes {VERSION})")
    return json_text.parse(body, source, MAX_BYTES)
