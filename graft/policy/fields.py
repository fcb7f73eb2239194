"""The fields of one mapping in a policy: each is read by its key, and each error is reported at its own line.

Without pydantic on purpose: every check and every message would have to be Graft's own there too, and the import takes
longer than anything else in reading a policy.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import TypeVar

from graft.errors import UsageError
from graft.model.address import shown
from graft.policy.document import Document, FieldPath, Value

T = TypeVar("T")
Parser = Callable[[str, str], T]
"""``parse(text, field)``: raises UsageError with the message ``FIELD: ...``."""

_FIELD = "field"
_KINDS: Mapping[type, str] = {str: "text", bool: "true or false", list: "a list", dict: "a mapping"}
_EXAMPLES = {
    "name": "name: nginx",
    "address": "address: 0.0.0.0:8080",
    "bind": "bind: 0.0.0.0:80",
    "endpoint": "endpoint: NAME",
    "to": "to: 10.0.0.0/8",
}
"""What a missing key could look like."""
_MEANT_BY_EMPTY = {"ports": "leave ports out to mean every port"}


class Fields:
    """The fields of the mapping ``value`` at ``path``, which may have ``keys`` and no others.

    Each method returns None for a missing key, and for an invalid value. ``valid`` is False once an error is reported.
    """

    def __init__(self, document: Document, path: FieldPath, value: Value, keys: tuple[str, ...]) -> None:
        self.valid = True
        self._document = document
        self._path = path
        self._values: dict[str, Value] | None = self.check((), _of_type, value, dict, f"of {', '.join(keys)}")
        for key in self._values or ():
            if key not in keys:
                near = difflib.get_close_matches(key, keys, 1)
                self.report((key,), "unknown key", f"did you mean {near[0]}?" if near else f"one of {', '.join(keys)}")

    def required(self, key: str, parse: Parser[T]) -> T | None:
        """The text of ``key``, which must be there, as ``parse`` reads it."""
        if self._values is not None and key not in self._values:
            self.report((key,), "the key is missing", _EXAMPLES[key])
        return self.text(key, parse)

    def text(self, key: str, parse: Parser[T]) -> T | None:
        """The text of ``key`` as ``parse`` reads it."""
        return self._field(key, _parse_text, parse)

    def texts(self, key: str, parse: Parser[T], hint: str) -> tuple[T, ...] | None:
        """The texts in the list of ``key``, each as ``parse`` reads it. The list may not be empty."""
        items = self.of_type(key, list, hint)
        if items is None:
            return None
        if not items:
            self.report((key,), "the list is empty", _MEANT_BY_EMPTY.get(key, f"leave {key} out"))
        parsed = [self.check((key, index), _parse_text, item, parse) for index, item in enumerate(items)]
        return tuple(item for item in parsed if item is not None)

    def of_type(self, key: str, kind: type[T], hint: str) -> T | None:
        """The value of ``key``, which must be of the type ``kind``; ``hint`` says what would be right."""
        return self._field(key, _of_type, kind, hint)

    def check(self, path: FieldPath, function: Callable[..., T], *arguments: object) -> T | None:
        """The result of ``function(*arguments, field)``. Its UsageError is reported at ``path`` below this mapping."""
        try:
            return function(*arguments, _FIELD)
        except UsageError as error:
            self.report(path, error.message.removeprefix(f"{_FIELD}: "), error.hint)
            return None

    def check_all(self, function: Callable[..., object], *arguments: object) -> None:
        """Call ``function(*arguments)``. Its UsageError, which names a field, is reported at that field."""
        try:
            function(*arguments)
        except UsageError as error:
            field, _, message = error.message.partition(": ")
            self.report((field.replace(" ", "_"),), message, error.hint)

    def report(self, path: FieldPath, message: str, hint: str | None) -> None:
        """Report a problem of the field at ``path`` below this mapping."""
        self.valid = False
        self._document.report((*self._path, *path), message, hint)

    def _field(self, key: str, function: Callable[..., T], *arguments: object) -> T | None:
        if self._values is None or key not in self._values:
            return None
        return self.check((key,), function, self._values[key], *arguments)


def choice(choices: Mapping[str, T]) -> Parser[T]:
    """A parser of the words in ``choices``: it returns the value of each."""

    def parse(text: str, field: str) -> T:
        if text not in choices:
            raise UsageError(f"{field}: {shown(text)} is not possible here", " or ".join(choices))
        return choices[text]

    return parse


def _parse_text(value: Value, parse: Parser[T], field: str) -> T:
    hint = "in quotes, if it is meant as text" if isinstance(value, bool) else "a single value"
    return parse(_of_type(value, str, hint, field), field)


def _of_type(value: Value, kind: type[T], hint: str, field: str) -> T:
    if value is None:
        raise UsageError(f"{field}: there is no value", "leave the key out, or give it a value")
    if not isinstance(value, kind):
        raise UsageError(f"{field}: must be {_KINDS[kind]}, not {_KINDS[type(value)]}", hint)
    return value
