"""Loops that kernels before 6.7 refuse: they go back otherwise than by a jump (check_cfg(), kernel/bpf/verifier.c)."""

from __future__ import annotations

import struct
from collections.abc import Iterator

_JUMP_CLASSES = (5, 6)  # BPF_JMP, BPF_JMP32
_ALWAYS, _CALL, _EXIT = 0x00, 0x80, 0x90  # BPF_JA, BPF_CALL, BPF_EXIT


def loops_without_jump(program: bytes) -> list[tuple[int, int]]:
    """From which instruction to which one."""
    count = len(program) // 8
    instructions = [struct.unpack_from("=BBhi", program, 8 * number) for number in range(count)]

    def following(at: int) -> Iterator[tuple[int, bool]]:
        """The next ones, in the kernel's order, and whether a loop may go back by that."""
        code, _, offset, _ = instructions[at]
        kind = code & 0xF0 if code & 7 in _JUMP_CLASSES else None
        if kind == _EXIT:
            return
        if kind == _ALWAYS:
            yield at + 1 + offset, True
            return
        is_branch = kind not in (None, _CALL)
        yield at + 1, is_branch
        if is_branch:
            yield at + 1 + offset, True

    found: list[tuple[int, int]] = []
    is_open, seen, path = {0}, {0}, [(0, following(0))]
    while path:
        at, nexts = path[-1]
        for one, may_go_back in nexts:
            if one not in seen:
                seen.add(one)
                is_open.add(one)
                path.append((one, following(one)))
                break
            if one in is_open and not may_go_back:
                found.append((at, one))
        else:
            is_open.discard(at)
            path.pop()
    return found
