"""Graft's errors: what went wrong, a hint, and the exit code for scripts."""

from __future__ import annotations


class GraftError(Exception):
    """An error for the operator.

    ``message`` is one line that names the field or the object; ``hint`` says what would be right.
    ``exit_code`` is the exit code of the command.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def lines(self) -> list[str]:
        """The lines for a terminal: one, or one for each problem."""
        return [f"graft: {self.message}" + (f" ({self.hint})" if self.hint else "")]


class UsageError(GraftError):
    """Invalid input: an address, a name, a policy."""

    exit_code = 2


class NotFoundError(GraftError):
    """A named object (endpoint, container, namespace, file) was not found."""

    exit_code = 3


class ConflictError(GraftError):
    """An object exists already, or is in use."""

    exit_code = 4


class PrivilegeError(GraftError):
    """The call needs root, and the caller is not."""

    exit_code = 5


class KernelError(GraftError):
    """The kernel refused a request or lacks a feature."""

    exit_code = 6


class RefusedError(GraftError):
    """Graft refuses, for safety; the operator may force it."""

    exit_code = 7


class UnfinishedError(GraftError):
    """The command did its work, except for a part that other programs blocked."""

    exit_code = 8
