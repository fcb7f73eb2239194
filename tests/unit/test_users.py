"""The user that a program is to run as: a name or an id, and never a number that the kernel takes for "as it is"."""

from __future__ import annotations

import os
import pwd

import pytest

from graft.errors import NotFoundError, UsageError
from graft.kernel import process
from graft.kernel.process import User, parse_user

NOBODY = pwd.getpwnam("nobody")
LAST = 4294967294


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nobody:0", (NOBODY.pw_uid, 0)),
        ("0:nogroup", (0, NOBODY.pw_gid)),
        (str(NOBODY.pw_uid), (NOBODY.pw_uid, NOBODY.pw_gid)),
        ("0000000012:13", (12, 13)),
        (f"{LAST}:{LAST}", (LAST, LAST)),
    ],
)
def test_a_user_by_name_or_number(text: str, expected: tuple[int, int]) -> None:
    found = parse_user(text)
    assert (found.uid, found.gid) == expected


@pytest.mark.parametrize("number", [LAST + 1, LAST + 2, 1 << 64, "9" * 5000])
@pytest.mark.parametrize("text", ["{}", "nobody:{}", "{}:0"])
def test_a_number_that_is_no_id_is_refused(text: str, number: int | str) -> None:
    with pytest.raises(UsageError, match=r"^--user: '[0-9.]+' is not an id$"):
        parse_user(text.format(number))


@pytest.mark.parametrize("text", ["²", "nobody:²", "٣", "-1", "nobody:-1", "0x0", " 0", "nobody:+0", ""])
def test_what_only_looks_like_a_number_is_a_name(text: str) -> None:
    with pytest.raises(NotFoundError):
        parse_user(text)


@pytest.mark.parametrize("user", [User(LAST + 1, 1, (1,)), User(1, LAST + 1, (1,)), User(-1, 1, (1,))])
def test_such_an_id_is_not_switched_to(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("setgroups", "setresgid", "setresuid"):
        monkeypatch.setattr(os, name, lambda *_: pytest.fail("switched"))
    with pytest.raises(ValueError, match="not an id"):
        process.switch_user(user)
