"""A BPF program as the compiler made it: which helpers it calls, and which maps it uses.

Source: struct bpf_insn in include/uapi/linux/bpf.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping

INSTRUCTION = struct.Struct("=BBhi")
"""Opcode; destination and source register, 4 bits each; offset; immediate."""
CALL, MOVE, EXIT = 0x85, 0xB7, 0x95  # BPF_JMP | BPF_CALL; BPF_ALU64 | BPF_MOV | BPF_K; BPF_JMP | BPF_EXIT
_WIDE = 0x18  # BPF_LD | BPF_DW | BPF_IMM: two instructions long
_MAPS = (1, 2)  # the source register of a wide one whose immediate is a map's descriptor: BPF_PSEUDO_MAP_FD, _MAP_VALUE


def calls(instructions: bytes) -> frozenset[int]:
    """The numbers of the helpers that a program calls."""
    # With another source register it is a call of a function or a kfunc.
    return frozenset(immediate for opcode, source, immediate in _each(instructions) if opcode == CALL and source == 0)


def with_maps(instructions: bytes, descriptors: Mapping[int, int]) -> bytes:
    """The same program on other maps: ``descriptors`` of those that it was compiled with -> of those to use. One that
    is not among them stays.
    """
    changed = bytearray(instructions)
    for place, (opcode, source, immediate) in enumerate(_each(instructions)):
        if opcode == _WIDE and source in _MAPS:
            number = struct.pack("=i", descriptors.get(immediate, immediate))
            changed[(place + 1) * INSTRUCTION.size - len(number) : (place + 1) * INSTRUCTION.size] = number
    return bytes(changed)


def _each(instructions: bytes) -> Iterator[tuple[int, int, int]]:
    """Opcode, source register and immediate of each; all are 0 for the second half of a wide one."""
    second_half = False
    for opcode, registers, _, immediate in INSTRUCTION.iter_unpack(instructions):
        yield (0, 0, 0) if second_half else (opcode, registers >> 4, immediate)
        second_half = not second_half and opcode == _WIDE
