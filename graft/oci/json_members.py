"""Adds and removes one member of an object in a JSON text, and leaves every other byte as the operator wrote it.

Writing the whole document anew would lose its layout, and what a float or a long number looks like. Pure.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from graft.errors import UsageError
from graft.model.address import shown

_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()
_INDENT = "    "  # of an object that shows none


@dataclass(frozen=True, slots=True)
class Member:
    """A member of an object: ``key``, and where it is in the text. ``lead`` is the white space before its key."""

    key: str
    lead: str
    start: int
    value_start: int
    end: int


@dataclass(frozen=True, slots=True)
class JsonObject:
    """An object in a text, from its brace at ``start``."""

    start: int
    members: tuple[Member, ...]

    def find(self, key: str, source: str) -> Member | None:
        """The member ``key``. Raises UsageError if there are two: readers differ in which one counts."""
        found = [member for member in self.members if member.key == key]
        if len(found) > 1:
            raise UsageError(f"{source}: {shown(key)[1:-1]}: the key is there twice", "leave one of them")
        return found[0] if found else None


def read_object(text: str, at: int) -> JsonObject:
    """The object that begins at ``at`` of ``text``, which has to be valid JSON."""
    start = at = _after_space(text, at)
    assert text[at] == "{"
    members: list[Member] = []
    while text[at] != "}":
        key_at = _after_space(text, at + 1)
        if text[key_at] == "}":
            break
        key, key_end = _DECODER.raw_decode(text, key_at)
        value_at = _after_space(text, _after_space(text, key_end) + 1)
        _, end = _DECODER.raw_decode(text, value_at)
        members.append(Member(key, text[at + 1 : key_at], key_at, value_at, end))
        at = _after_space(text, end)
    return JsonObject(start, tuple(members))


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def with_member(text: str, target: JsonObject, key: str, value: object) -> str:
    """``text`` with one more member, the last of ``target``, written as the others are."""
    if target.members:
        last = target.members[-1]
        at, lead, comma = last.end, last.lead or " ", ","
    else:
        at, comma = target.start + 1, ""
        inner = _SPACE.match(text, at)
        lead = f"\n{_margin(text, target.start)}{_INDENT}" if inner and "\n" in inner[0] else ""
    return text[:at] + f"{comma}{lead}{json.dumps(key)}: {_rendered(value, lead, _indent(text))}" + text[at:]


def _margin(text: str, at: int) -> str:
    """The white space that the line of ``at`` begins with."""
    line = text[text.rfind("\n", 0, at) + 1 : at]
    return line[: len(line) - len(line.lstrip())]


def _indent(text: str) -> str:
    """What each level of ``text`` is indented by."""
    members = read_object(text, 0).members
    return (members[0].lead.rpartition("\n")[2] if members else "") or _INDENT


def _rendered(value: object, lead: str, indent: str) -> str:
    """``value`` on one line, or with parts on lines of their own where its key has one."""
    if "\n" not in lead:
        return json.dumps(value)
    margin = lead.rpartition("\n")[2]
    return json.dumps(value, indent=indent).replace("\n", f"\n{margin}")


def with_value(text: str, member: Member, value: object) -> str:
    """``text`` with another value of ``member``."""
    return text[: member.value_start] + _rendered(value, member.lead, _indent(text)) + text[member.end :]


def without_member(text: str, target: JsonObject, member: Member) -> str:
    """``text`` without ``member`` of ``target``: of what `with_member` made, what was there before."""
    index = target.members.index(member)
    if index:
        return text[: target.members[index - 1].end] + text[member.end :]
    if len(target.members) > 1:
        return text[: member.start] + text[target.members[1].start :]
    return text[: target.start + 1] + text[member.end :]
