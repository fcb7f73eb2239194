"""YAML as policies use it: mappings, lists, text, true and false, and the line of each value.

A hostile text is refused before it costs much: no aliases (a few lines of them can stand for gigabytes), no tags, no
duplicate keys, and limits on size, depth and number of values, checked while the nodes are composed. Numbers stay text:
YAML would convert `1:30` to 90.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

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


@dataclass(slots=True)
class Document:
    """The values of a text, the line of each by its path, and what is wrong with it."""

    value: Value = None
    lines: dict[FieldPath, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def report(self, path: FieldPath, message: str, hint: str | None = None) -> None:
        """Add a problem of the value at ``path``; for one that is not written out, of the nearest value around it."""
        known = path
        while known and known not in self.lines:
            known = known[:-1]
        if not isinstance(self.at(known), dict):  # a short form, which has no parts in the text
            path = known
        self.problems.append(Problem(self.lines.get(known, 1), format_path(path), message, hint))

    def below(self, path: FieldPath) -> Document:
        """The document that the value at ``path`` is by itself; `take_problems` brings back what is wrong with it."""
        size = len(path)
        lines = {known[size:]: line for known, line in self.lines.items() if known[:size] == path}
        return Document(self.at(path), lines)

    def take_problems(self, path: FieldPath, problems: Iterable[Problem]) -> None:
        """Add the problems of what is `below` ``path``, whose fields are named from there."""
        prefix, whole = format_path(path), format_path(())
        for problem in problems:
            field = prefix if problem.field == whole else f"{prefix}.{problem.field}"
            self.problems.append(replace(problem, field=field))

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


def read_document(text: str, max_bytes: int = MAX_BYTES, max_values: int = MAX_VALUES) -> Document:
    """The document in ``text`` and its problems. After a syntax error the value is None."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return _refused(1, "the text is not UTF-8")
    if size > max_bytes:
        return _refused(1, f"the text has {size} bytes", f"at most {max_bytes}")
    try:
        root = _compose(text, max_values)
    except PolicyError as error:
        return Document(problems=list(error.problems))
    except yaml.YAMLError as error:
        return _refused(*_syntax_error(error, text))
    assert root is not None  # the loader refuses an empty document
    document = Document()
    document.value = _read_node(root, (), document)
    return document


def _compose(text: str, max_values: int) -> yaml.Node | None:
    loader = _Loader(text, max_values)
    try:
        return loader.get_single_node()
    finally:
        loader.dispose()  # its parser refers to itself


def _refused(line: int, message: str, hint: str | None = None) -> Document:
    return Document(problems=[Problem(line, format_path(()), message, hint)])


def _syntax_error(error: yaml.YAMLError, text: str) -> tuple[int, str, str | None]:
    """Line, message and hint of an error of the parser."""
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return line, f"character {error.character:#04x} is not allowed in YAML", None
    assert isinstance(error, yaml.MarkedYAMLError)
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else 1
    lines = text.splitlines()
    source = lines[line - 1] if line <= len(lines) else ""
    hint = 'an address that begins with *, [ or : needs quotes: "*:80"' if _UNQUOTED.search(source) else None
    return line, f"not YAML: {error.problem or error.context}", hint


class _Loader(yaml.BaseLoader):
    """Composes the nodes of one document, and stops at the first event that a policy may not have."""

    def __init__(self, text: str, max_values: int) -> None:
        super().__init__(text)
        self._path: FieldPath = ()
        self._values, self._max_values = 0, max_values

    def get_single_node(self) -> yaml.Node | None:
        if not self.check_node():
            raise self._refusal((), "the policy is empty", "at least a name: and rules")
        root = self.get_node()
        if self.check_node():
            raise self._refusal((), "a second document follows", "one policy per file, without ---")
        return root

    def compose_node(self, parent: yaml.Node | None, index: int | yaml.Node | None) -> yaml.Node | None:
        """A key has the ``index`` None, and its value the key's node."""
        outer = self._path
        if index is not None:
            self._path = (*outer, index.value if isinstance(index, yaml.Node) else index)
        self._check_next()
        if index is None and parent is not None and not self.check_event(yaml.ScalarEvent):
            raise self._refusal(outer, "a key must be text")
        node = super().compose_node(parent, index)  # type: ignore[arg-type]  # the stub knows no mappings
        self._path = outer
        return node

    def _check_next(self) -> None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        self._values += 1
        if isinstance(event, yaml.AliasEvent):
            raise self._refusal(self._path, f"aliases (*{_cut(event.anchor)}) are not allowed", "write the value out")
        if event.tag is not None:
            raise self._refusal(self._path, f"tags ({_cut(event.tag)}) are not allowed", "the value without it")
        if len(self._path) > MAX_DEPTH:
            raise self._refusal(self._path[:2], "nested too deep")
        if self._values > self._max_values:
            raise self._refusal((), f"more than {self._max_values} values", "fewer rules")
        event.anchor = None  # without aliases it has no meaning; a duplicate is no error

    def _refusal(self, path: FieldPath, message: str, hint: str | None = None) -> PolicyError:
        line = _line(self.peek_event())  # type: ignore[no-untyped-call]
        return PolicyError("policy", [Problem(line, format_path(path), message, hint)])


def _cut(name: object) -> str:
    """An anchor or a tag, shortened, as a message shows it: without quotes."""
    return shown(str(name))[1:-1]


def _line(item: yaml.Event | yaml.Node) -> int:
    assert item.start_mark is not None  # what the parser makes has one
    return item.start_mark.line + 1


def _read_node(node: yaml.Node, path: FieldPath, document: Document) -> Value:
    """The value of ``node``. The lines of its parts, and its duplicate keys, are added to ``document``."""
    document.lines.setdefault(path, _line(node))
    if isinstance(node, yaml.ScalarNode):
        return _read_scalar(node)
    if isinstance(node, yaml.SequenceNode):
        return [_read_node(item, (*path, index), document) for index, item in enumerate(node.value)]
    values: dict[str, Value] = {}
    for key, item in node.value:
        here = (*path, key.value)
        if key.value in values:
            hint = f"the first is on line {document.lines[here]}"
            document.problems.append(Problem(_line(key), format_path(here), "duplicate key", hint))
        else:
            document.lines[here] = _line(key)
        values.setdefault(key.value, _read_node(item, here, document))
    return values


def _read_scalar(node: yaml.ScalarNode) -> Value:
    text = str(node.value)
    if node.style is not None:  # in quotes, or a block of text
        return text
    return None if text in _NULLS else _SWITCHES.get(text, text)
