"""Untrusted JSON: read within limits, and the types of its parts checked.

An engine's configuration of a container, a runtime's state of one, a file of run_dir: each may contain what an image
wrote, or only half of what Graft wrote. Python's own parser raises RecursionError for a text of brackets, and a list
in place of a mapping raises AttributeError somewhere else. Here both are a UsageError that names the field.

A missing part and null are the same, as for the runtimes, which are written in Go.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

from graft.errors import UsageError
from graft.model.address import shown

MAX_DEPTH = 64
"""Levels of nested lists and mappings. An OCI configuration has eight."""

_KINDS = {dict: "a mapping", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}


def parse(raw: bytes | str, source: str, most: int) -> Any:
    """The value in ``raw``, of at most ``most`` bytes. Raises UsageError that names ``source``."""
    if len(raw) > most:
        raise UsageError(f"{source}: too big", f"at most {most} bytes")
    try:
        value = json.loads(raw, parse_constant=_refuse_constant)
    except RecursionError:
        raise UsageError(f"{source}: nested too deep", f"at most {MAX_DEPTH} levels") from None
    except ValueError as error:  # no JSON, no UTF-8, or a number of thousands of digits
        raise UsageError(f"{source}: not JSON: {error}") from None
    if _is_deeper(value, MAX_DEPTH):
        raise UsageError(f"{source}: nested too deep", f"at most {MAX_DEPTH} levels")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def _is_deeper(value: Any, most: int) -> bool:
    """Whether there are more than ``most`` levels of lists and mappings. (Not recursive: recursion has a limit.)"""
    level = [value]
    for _ in range(most + 1):
        level = [inner for one in level for inner in _parts(one) if isinstance(inner, (dict, list))]
        if not level:
            return False
    return True


def refuse_nul(value: Any, field: str) -> None:
    """Raises UsageError for a text or a name with a NUL, in what `parse` gave: a program in C that reads the same text
    sees another name than Python does.
    """
    if isinstance(value, str) and "\0" in value:
        raise UsageError(f"{field}: {shown(value)} has a NUL", "programs in C read only what is before it")
    if isinstance(value, dict):
        for name, inner in value.items():
            refuse_nul(name, field)
            refuse_nul(inner, f"{field}.{_key(name)}")
    elif isinstance(value, list):
        for inner in value:
            refuse_nul(inner, field)


def _parts(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def mapping(value: Any, field: str) -> dict[str, Any]:
    """A mapping; empty where it is missing. Raises UsageError that names ``field``, as all functions here do."""
    return {} if value is None else _of(dict, value, field)


def items(value: Any, field: str) -> list[Any]:
    """A list; empty where it is missing."""
    return [] if value is None else _of(list, value, field)


def text(value: Any, field: str) -> str:
    """A text; empty where it is missing."""
    return "" if value is None else _of(str, value, field)


def texts(value: Any, field: str) -> list[str]:
    """A list of texts."""
    return [_of(str, one, f"{field}[{index}]") for index, one in enumerate(items(value, field))]


def mappings(value: Any, field: str) -> list[dict[str, Any]]:
    """A list of mappings."""
    return [_of(dict, one, f"{field}[{index}]") for index, one in enumerate(items(value, field))]


def text_by_name(value: Any, field: str) -> dict[str, str]:
    """A mapping of texts."""
    return {name: text(one, f"{field}.{_key(name)}") for name, one in mapping(value, field).items()}


def path(value: Any, field: str) -> str:
    """A text that the kernel accepts as a path; empty where it is missing."""
    found = text(value, field)
    if "\0" in found or not _can_encode(found, "strict"):
        raise UsageError(f"{field}: {shown(found)} is not a path")
    return found


def raw_path(value: Any, field: str) -> str:
    """A path that the kernel has given, of any bytes: those that are not UTF-8 stand in it as os.fsdecode has them."""
    found = text(value, field)
    if "\0" in found or not _can_encode(found, "surrogateescape"):
        raise UsageError(f"{field}: {shown(found)} is not a path")
    return found


def number(value: Any, field: str, most: int) -> int:
    """A whole number from 0 to ``most``; 0 where it is missing."""
    if value is None:
        return 0
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise UsageError(f"{field}: must be a number from 0 to {most}")
    return value


def _of(kind: type, value: Any, field: str) -> Any:
    if not isinstance(value, kind):
        raise UsageError(f"{field}: must be {_KINDS[kind]}, not {_KINDS.get(type(value), 'nothing')}")
    return value


def _key(name: str) -> str:
    return name if len(name) <= 64 and name.isprintable() else shown(name)


def _can_encode(found: str, errors: str) -> bool:
    try:
        found.encode(errors=errors)
    except UnicodeEncodeError:
        return False
    return True
