"""Netlink messages (netlink(7)) of any sender: read to their end, or refused."""

from __future__ import annotations

import errno
import struct

import pytest

from graft.kernel.sockdiag import parse_listener, split_messages

HEADER = 16


def message(kind: int, body: bytes, size: int | None = None) -> bytes:
    return struct.pack("=IHHII", HEADER + len(body) if size is None else size, kind, 0, 0, 0) + body


def test_messages_are_split_at_their_sizes_rounded_up() -> None:
    data = message(20, b"abcde") + bytes(3) + message(20, b"") + message(3, bytes(4))
    assert list(split_messages(data)) == [(20, b"abcde"), (20, b""), (3, bytes(4))]


@pytest.mark.parametrize("size", [0, 1, 15, 21, 1 << 31, (1 << 32) - 1])
def test_a_size_that_cannot_be_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"a message of {size} bytes where 20 are left"):
        list(split_messages(message(20, bytes(4), size)))


def test_an_error_of_the_kernels_is_raised() -> None:
    with pytest.raises(OSError) as failed:
        list(split_messages(message(2, struct.pack("=i", -errno.ENOENT) + bytes(16))))
    assert failed.value.errno == errno.ENOENT


def test_a_rest_that_is_no_message_is_left() -> None:
    assert list(split_messages(message(20, b"abcd") + bytes(15))) == [(20, b"abcd")]


SOCKET = struct.pack("=BBBB2s2s16s16sIII5I", 2, 10, 0, 0, b"\x01\xbb", b"\0\0", bytes(16), bytes(16), 3, *[0] * 6, 77)


@pytest.mark.parametrize(
    ("attributes", "v6only", "cgroup"),
    [
        (b"", False, 0),
        (struct.pack("=HH", 4, 11), False, 0),  # an attribute of no bytes
        (struct.pack("=HHB3x", 5, 11, 1), True, 0),
        (struct.pack("=HHQ", 12, 21, 4711), False, 4711),
        (struct.pack("=HHQQ", 20, 21, 4711, 1), False, 4711),
        (struct.pack("=HH", 0, 21) * 5, False, 0),
        (struct.pack("=HH", 65535, 21) + b"\x07", False, 7),  # longer than what is there
    ],
)
def test_attributes_of_any_length_are_read(attributes: bytes, v6only: bool, cgroup: int) -> None:
    found = parse_listener(SOCKET + attributes)
    assert (found.port, found.device, found.inode, found.v6only, found.cgroup) == (443, 3, 77, v6only, cgroup)


def test_too_little_of_a_socket_is_refused() -> None:
    for size in range(len(SOCKET)):
        with pytest.raises(ValueError):
            parse_listener(SOCKET[:size])
