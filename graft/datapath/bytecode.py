"""What a compilation gives: the instructions of each program, and the maps that they use. Pure.

A program refers to a map by its place among the maps of the compilation; in a compiler's output it is a descriptor of
that process. As bytes it is a line with a checksum, then JSON, compressed:

    graft-bytecode 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08

The checksum finds what a disk or a truncated write has changed; it does not say who wrote it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import astuple, dataclass

from graft.kernel.bpf_maps import MapShape, MapTypes

_FIRST_LINE = re.compile(rb"graft-bytecode ([0-9a-f]{64})\n")


@dataclass(frozen=True, slots=True)
class MapForm:
    """How a map is made."""

    shape: MapShape
    types: MapTypes | None


@dataclass(frozen=True, slots=True)
class Bytecode:
    """``maps`` by name, in the order by which programs refer to them; ``programs``: instructions by function."""

    maps: Mapping[str, MapForm]
    programs: Mapping[str, bytes]


def encode(bytecode: Bytecode) -> bytes:
    """It as bytes."""
    described = sorted({form.types.described_by for form in bytecode.maps.values() if form.types})
    value = {
        "types": [_text(one) for one in described],
        "maps": {
            name: [
                astuple(form.shape),
                [described.index(form.types.described_by), form.types.key, form.types.value] if form.types else None,
            ]
            for name, form in bytecode.maps.items()
        },
        "programs": {function: _text(code) for function, code in bytecode.programs.items()},
    }
    body = zlib.compress(json.dumps(value).encode("ascii"))
    return b"graft-bytecode %s\n%s" % (_checksum(body), body)


def decode(raw: bytes) -> Bytecode:
    """What was encoded. Raises ValueError for anything else."""
    first = _FIRST_LINE.match(raw)
    body = raw[first.end() :] if first else b""
    if first is None or first[1] != _checksum(body):
        raise ValueError("not what was written")
    value = json.loads(zlib.decompress(body))
    described = [_bytes(one) for one in value["types"]]
    maps = {}
    for name, (shape, types) in value["maps"].items():
        maps[name] = MapForm(MapShape(*shape), MapTypes(described[types[0]], *types[1:]) if types else None)
    return Bytecode(maps, {function: _bytes(code) for function, code in value["programs"].items()})


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest().encode("ascii")


def _text(value: bytes) -> str:
    return base64.b64encode(value).decode("ascii")


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
