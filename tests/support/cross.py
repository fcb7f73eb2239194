"""Values and layouts in the C headers of an architecture, checked by a compiler for it. Nothing is run, so that one
machine can check all of them.
"""

from __future__ import annotations

import ctypes
import re
import struct
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

# By the names that both the native and the cross compiler have (.ci/setup).
COMPILERS = {"x86_64": "x86_64-linux-gnu-gcc", "aarch64": "aarch64-linux-gnu-gcc"}

Values = Mapping[str, int]
"""A constant expression in C -> the value that Python has for it."""


def complaints(machine: str, source: str, *flags: str | Path) -> str:
    """The errors and warnings of the compiler for ``machine`` about a C text."""
    command = [COMPILERS[machine], "-fsyntax-only", "-Wall", *flags, "-x", "c", "-"]
    return subprocess.run(command, input=source, capture_output=True, text=True).stderr


def differences(
    machine: str, headers: Sequence[str], values: Values, *flags: str | Path, before: str = ""
) -> list[str]:
    """Those of ``values`` that are others on ``machine``, each as ``C expression is not VALUE``.

    ``before`` is text to compile ahead of them, below the headers. Raises AssertionError where it does not compile.
    """
    lines = [f"#include <{header}>" for header in headers]
    checks = [
        f'_Static_assert(({expression}) == {value}, "{expression} is not {value}");'
        for expression, value in values.items()
    ]
    reported = complaints(machine, "\n".join(["#define _GNU_SOURCE", *lines, before, *checks, ""]), *flags)
    found = re.findall(r'static assertion failed: "(.*)"', reported)
    assert len(found) == len(re.findall(r"\berror:|\bwarning:", reported)), reported
    return found


def places(layout: struct.Struct) -> Iterator[tuple[int, int]]:
    """Offset and size of each value of a format without alignment."""
    assert layout.format.startswith("=")
    at = 0
    for count, kind in re.findall(r"(\d*)([A-Za-z])", layout.format):
        size, repeat = struct.calcsize(f"={kind}"), int(count or 1)
        if kind == "s":
            size, repeat = repeat, 1
        for _ in range(repeat):
            if kind != "x":
                yield at, size
            at += size


def packed_members(structure: str, layout: struct.Struct, members: Iterable[str]) -> dict[str, int]:
    """Offset and size of the ``members`` of a C structure, as ``layout`` has them, one member for each value.

    Of a member that ends in ``!`` only a part is read, from its beginning.
    """
    values = {}
    for member, (offset, size) in zip(members, places(layout), strict=True):
        name = member.rstrip("!")
        values[f"__builtin_offsetof({structure}, {name})"] = offset
        if name == member:
            values[f"sizeof((({structure} *)0)->{name})"] = size
    return values


def members(structure: str, python: type[ctypes.Structure], names: Mapping[str, str] | None = None) -> dict[str, int]:
    """Offset and size of each field of a ctypes structure as a member of the C structure.

    ``names`` are those of fields that have another name in C, an empty one for a field that C does not have.
    """
    values = {}
    for field, *_ in python._fields_:
        name = (names or {}).get(field, field)
        if name:
            values[f"__builtin_offsetof({structure}, {name})"] = getattr(python, field).offset
            values[f"sizeof((({structure} *)0)->{name})"] = getattr(python, field).size
    return values
