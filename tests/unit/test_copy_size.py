"""How many bytes graftd takes out of a peer's queue in one call."""

from __future__ import annotations

from graft.splice.copy_size import CopySize
from graft.splice.slow_calls import SLOW_SECONDS


def test_what_takes_long_is_taken_in_pieces_that_do_not() -> None:
    size, each = CopySize(1 << 18), SLOW_SECONDS / 2048  # bytes that came one by one
    slow = 0
    for _ in range(100):
        count = min(size.bytes, 4096)
        slow += count * each > SLOW_SECONDS
        size.note(count, count * each)
    assert slow == 1


def test_it_grows_to_the_most_and_no_further() -> None:
    size = CopySize(1 << 16)
    size.note(1 << 16, 10 * SLOW_SECONDS)
    assert size.bytes < 1 << 12
    for _ in range(10):
        size.note(size.bytes, size.bytes * SLOW_SECONDS / (1 << 20))
    assert size.bytes == 1 << 16


def test_what_was_all_there_is_says_nothing_about_more() -> None:
    size = CopySize(1 << 16)
    size.note(1, SLOW_SECONDS / 100)
    assert size.bytes == 1 << 16
