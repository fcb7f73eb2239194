"""Work in a child of a shim: its result, or its error."""

from __future__ import annotations

import os
import signal

import pytest

from graft.errors import ConflictError, KernelError
from graft.oci.children import in_child


def test_the_result_is_the_childs() -> None:
    assert in_child(lambda: (os.getpid() != parent, "done")) == (True, "done")


parent = os.getpid()


def test_an_error_is_raised_with_its_hint() -> None:
    def fail() -> None:
        raise ConflictError("there already", "graft ps")

    with pytest.raises(ConflictError) as error:
        in_child(fail)
    assert (error.value.message, error.value.hint) == ("there already", "graft ps")


def test_a_child_that_dies_is_an_error() -> None:
    with pytest.raises(KernelError):
        in_child(lambda: os.kill(os.getpid(), signal.SIGKILL))
