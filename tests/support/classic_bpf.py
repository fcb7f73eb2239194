"""An interpreter of classic BPF that knows what Graft's seccomp filters use."""

from __future__ import annotations

import struct
from collections.abc import Sequence


def seccomp_data(nr: int, arch: int, arguments: Sequence[int] = (0,) * 6) -> bytes:
    """struct seccomp_data of linux/seccomp.h: number, architecture, instruction pointer, arguments."""
    return struct.pack("=iIQ6Q", nr - (1 << 32) if nr & 1 << 31 else nr, arch, 0, *arguments)


def interpret(text: bytes, data: bytes) -> int:
    """What a filter returns."""
    program = list(struct.iter_unpack("=HBBI", text))
    accumulator = at = 0
    while True:
        code, true, false, k = program[at]
        at += 1
        if code == 0x20:  # ld [k]
            accumulator = struct.unpack_from("=I", data, k)[0]
        elif code == 0x54:  # and #k
            accumulator &= k
        elif code == 0x15:  # jeq #k
            at += true if accumulator == k else false
        elif code == 0x06:  # ret #k
            return int(k)
        else:
            raise AssertionError(f"instruction {code:#x}")
