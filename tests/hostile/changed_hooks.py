"""Compiles only those programs that a change of the hooks' text reaches, and takes the others from the intact hooks.

The compiler takes ten seconds for all of them, and there are two hundred controls that leave out a piece each.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from graft.datapath.bytecode import Bytecode
from graft.datapath.sources import BpfSources

Compile = Callable[[Path | None, BpfSources, Sequence[str], Mapping[str, int]], Bytecode]

_FUNCTION = re.compile(r"^(?:static|int)\b[^;{}#]*?\b(\w+)\([^;{}#]*\)\n\{\n.*?^\}$", re.MULTILINE | re.DOTALL)
_MACRO = re.compile(r"^#define (\w+)\b(?:.*\\\n)*.*$", re.MULTILINE)
_WORD = re.compile(r"\w+")


def compile_changed(
    compile_all: Compile,
    intact: BpfSources,
    folder: Path | None,
    changed: BpfSources,
    names: Sequence[str],
    constants: Mapping[str, int],
) -> Bytecode:
    """What ``compile_all`` gives for ``changed``."""
    before = compile_all(folder, intact, names, constants)
    assert intact.headers == changed.headers, "only the text of programs is compared"
    reached = programs_reached(intact.text(names), changed.text(names), before.programs)
    if not reached:
        return before  # another text than the one that was changed: the relay's
    if reached == set(before.programs):
        return compile_all(folder, changed, names, constants)
    left = set(before.programs) - reached
    fewer = {name: _without(changed.files[name], left) for name in names}
    after = compile_all(folder, replace(changed, files={**changed.files, **fewer}), names, constants)
    assert list(after.maps) == list(before.maps) and set(after.programs) == reached
    return Bytecode(before.maps, {**before.programs, **after.programs})


def programs_reached(intact: str, changed: str, programs: Iterable[str]) -> set[str]:
    """The programs in which anything has changed: in themselves, or in what they call."""
    if _rest(intact) != _rest(changed):
        return set(programs)  # a type, a map, a constant
    before, after = _definitions(intact), _definitions(changed)
    reached = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    words = {name: set(_WORD.findall(" ".join(before.get(name, []) + after.get(name, [])))) for name in before | after}
    size = 0
    while size < len(reached):
        size = len(reached)
        reached |= {name for name, mentions in words.items() if mentions & reached}
    return reached & set(programs)


def _definitions(text: str) -> dict[str, list[str]]:
    """The text of each function and macro; several where the preprocessor chooses."""
    found: dict[str, list[str]] = defaultdict(list)
    for pattern in (_FUNCTION, _MACRO):
        for match in pattern.finditer(text):
            found[match[1]].append(match[0])
    return dict(found)


def _rest(text: str) -> str:
    return _FUNCTION.sub(r"function \1", text)


def _without(text: str, functions: set[str]) -> str:
    return _FUNCTION.sub(lambda match: "" if match[1] in functions else match[0], text)
