"""YAML as policies use it: mappings, lists, text, true and false, and the line of everything.

The parser's events are read one by one, so that a hostile text is refused before it costs anything: no
aliases (a few lines of them can stand for gigabytes), no tags, no key twice, and limits on size, depth and
number of values. Numbers stay text: `0.0.0.0:80`, `8000-8099` and `1:30` mean what they say here, not what
YAML makes of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import yaml

from graft.model.address import shown
from graft.policy.limits import MAX_BYTES, MAX_DEPTH, MAX_VALUES
from graft.policy.model import PolicyError, Problem

FieldPath = tuple[str | int, ...]
Value = str | bool | None | list["Value"] | dict[str, "Value"]

_NULLS = {"", "~", "null", "Null", "NULL"}
_SWITCHES = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
_UNQUOTED = re.compile(r"[:,{-]\s+(\*|\[|::)")


@dataclass(frozen=True, slots=True)
class Document:
    """The values of a text, the line of each by its path, and what was wrong with the YAML itself."""

    value: Value = None
    lines: dict[FieldPath, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def problem(self, path: FieldPath, message: str, hint: str | None = None) -> Problem:
        """A problem of the value at ``path``, or of the one nearest to it that was written."""
        known = path
        while known and known not in self.lines:
            known = known[:-1]
        if not isinstance(self.at(known), dict):  # a short form: its parts have no place of their own
            path = known
        return Problem(self.lines.get(known, 1), format_path(path), message, hint)

    def at(self, path: FieldPath) -> Value:
        """The value at ``path``, None where there is none."""
        value = self.value
        for step in path:
            if isinstance(value, dict) and isinstance(step, str):
                value = value.get(step)
            elif isinstance(value, list) and isinstance(step, int) and step < len(value):
                value = value[step]
            else:
                return None
        return value


def format_path(path: FieldPath) -> str:
    """``ingress[0].bind``; the whole document is ``policy``."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            text += f"{'.' if text else ''}{step if _PLAIN_KEY.fullmatch(step) else shown(step)}"
    return text or "policy"


def read_document(text: str) -> Document:
    """The document in ``text``, with what is wrong in ``problems``. After an error of syntax the value is None."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return _refused(1, "the text is not UTF-8")
    if size > MAX_BYTES:
        return _refused(1, f"the text has {size} bytes", f"at most {MAX_BYTES}")
    try:
        return _Reader(text).read()
    except PolicyError as error:
        return Document(problems=list(error.problems))
    except yaml.YAMLError as error:
        return _refused(*_syntax_error(error, text))


def _refused(line: int, message: str, hint: str | None = None) -> Document:
    return Document(problems=[Problem(line, format_path(()), message, hint)])


def _syntax_error(error: yaml.YAMLError, text: str) -> tuple[int, str, str | None]:
    """Line, message and hint of what the parser could not read."""
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return line, f"character {error.character:#04x} may not stand in YAML", None
    assert isinstance(error, yaml.MarkedYAMLError)
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else 1
    lines = text.splitlines()
    source = lines[line - 1] if line <= len(lines) else ""
    hint = 'an address that begins with *, [ or : needs quotes: "*:80"' if _UNQUOTED.search(source) else None
    return line, f"not YAML: {error.problem or error.context}", hint


class _Reader:
    """Builds one document from the parser's events."""

    def __init__(self, text: str) -> None:
        self._events: Iterator[yaml.Event] = yaml.parse(text, Loader=yaml.SafeLoader)
        self._document = Document()
        self._values = 0

    def read(self) -> Document:
        next(self._events)  # the stream's start
        first = next(self._events)
        if isinstance(first, yaml.StreamEndEvent):
            raise self._stop(first, (), "the policy is empty", "at least a name: and rules")
        value = self._value(next(self._events), ())
        next(self._events)  # the document's end
        after = next(self._events)
        if isinstance(after, yaml.DocumentStartEvent):
            raise self._stop(after, (), "a second document follows", "one policy a file, no ---")
        return Document(value, self._document.lines, self._document.problems)

    def _value(self, event: yaml.Event, path: FieldPath) -> Value:
        self._admit(event, path)
        self._document.lines.setdefault(path, _line(event))
        if isinstance(event, yaml.ScalarEvent):
            return _scalar(event)
        if isinstance(event, yaml.SequenceStartEvent):
            return self._list(path)
        return self._mapping(path)

    def _admit(self, event: yaml.Event, path: FieldPath) -> None:
        self._values += 1
        if isinstance(event, yaml.AliasEvent):
            raise self._stop(event, path, f"aliases (*{_cut(event.anchor)}) are not allowed", "write the value out")
        if (tag := getattr(event, "tag", None)) is not None:
            raise self._stop(event, path, f"tags ({_cut(tag)}) are not allowed", "the value without it")
        if len(path) > MAX_DEPTH:
            raise self._stop(event, path[:2], "nested too deep")
        if self._values > MAX_VALUES:
            raise self._stop(event, (), f"more than {MAX_VALUES} values", "fewer rules")

    def _list(self, path: FieldPath) -> Value:
        items: list[Value] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            items.append(self._value(event, (*path, len(items))))
        return items

    def _mapping(self, path: FieldPath) -> Value:
        items: dict[str, Value] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            self._admit(event, path)
            if not isinstance(event, yaml.ScalarEvent):
                raise self._stop(event, path, "a key has to be text")
            here = (*path, str(event.value))
            line = _line(event)
            if event.value in items:
                first = self._document.lines[here]
                hint = f"the first is on line {first}"
                self._document.problems.append(Problem(line, format_path(here), "the key is there twice", hint))
                self._value(next(self._events), here)
            else:
                self._document.lines[here] = line
                items[event.value] = self._value(next(self._events), here)
        return items

    def _stop(self, event: yaml.Event, path: FieldPath, message: str, hint: str | None = None) -> PolicyError:
        return PolicyError("policy", [Problem(_line(event), format_path(path), message, hint)])


def _cut(name: object) -> str:
    """A name of YAML's own, where a message has it without quotes."""
    return shown(str(name))[1:-1]


def _line(event: yaml.Event) -> int:
    assert event.start_mark is not None  # only events that a program makes itself have none
    return event.start_mark.line + 1


def _scalar(event: yaml.ScalarEvent) -> Value:
    text = str(event.value)
    if event.style is None and text in _NULLS:
        return None
    if event.style is None and text in _SWITCHES:
        return _SWITCHES[text]
    return text
