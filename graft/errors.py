"""The one family of errors: what went wrong, a hint, and the exit code that a script can act on."""

from __future__ import annotations


class GraftError(Exception):
    """Something an operator can read and act on.

    ``message`` is one line that names the field or the thing; ``hint`` says what would be right.
    ``exit_code`` is what the command line ends with.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def lines(self) -> list[str]:
        """What a terminal shows: one line, or one for each thing that is wrong."""
        return [f"graft: {self.message}" + (f" ({self.hint})" if self.hint else "")]


class UsageError(GraftError):
    """Input that is wrong in itself: an address, a name, a policy."""

    exit_code = 2


class NotFoundError(GraftError):
    """A named thing (endpoint, container, namespace, file) that is not there."""

    exit_code = 3


class ConflictError(GraftError):
    """A thing that is there already, or is in use."""

    exit_code = 4


class PrivilegeError(GraftError):
    """The call needs root, and the caller is not."""

    exit_code = 5


class KernelError(GraftError):
    """The kernel refused something or lacks a feature."""

    exit_code = 6


class RefusedError(GraftError):
    """Graft itself refuses, for safety; the operator may insist."""

    exit_code = 7


class UnfinishedError(GraftError):
    """What was asked for is done, but for something that others keep from being done."""

    exit_code = 8
