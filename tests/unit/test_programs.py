"""Which code is left out for a kernel that refuses a helper: decided without a kernel."""

from __future__ import annotations

import struct

from graft.datapath.programs import (
    ALL_PROGRAMS,
    EXTENSIONS,
    MPTCP,
    PROBE,
    RELAY_PROGRAM,
    SET_RETVAL,
    Program,
    allowed_extensions,
    reason,
    refused_calls,
)
from graft.kernel import bpf, helpers, instructions

LISTEN = Program("sock_ops", bpf.PROG_SOCK_OPS, "sock_ops", "listen")
CREATE = Program("sock_create", bpf.PROG_CGROUP_SOCK, "sock_create", "tags", "slower")


def instruction(opcode: int, source: int = 0, immediate: int = 0) -> bytes:
    return struct.pack("=BBhi", opcode, source << 4, 0, immediate)


def test_calls_of_helpers_are_found_and_calls_of_functions_are_not() -> None:
    program = b"".join(
        [
            instruction(0x85, immediate=14),
            instruction(0x85, source=1, immediate=99),  # BPF_PSEUDO_CALL
            instruction(0x85, source=2, immediate=98),  # a kfunc
            instruction(0x85, immediate=14),
            instruction(0x85, immediate=1),
            instruction(0x95),
        ]
    )
    assert instructions.calls(program) == {1, 14}


def test_the_second_half_of_a_wide_load_is_no_call() -> None:
    assert instructions.calls(instruction(0x18) + instruction(0x85, immediate=14) + instruction(0x95)) == frozenset()


def test_a_program_is_given_other_maps() -> None:
    def text(first: int, second: int) -> bytes:
        return b"".join(
            [
                instruction(0x18, source=1, immediate=first),  # BPF_PSEUDO_MAP_FD
                instruction(0, source=1, immediate=3),
                instruction(0x18, source=2, immediate=second),  # BPF_PSEUDO_MAP_VALUE
                instruction(0),
                instruction(0x18, immediate=3),  # a number
                instruction(0),
                instruction(0x85, source=1, immediate=3),
                instruction(0x18, source=1, immediate=9),
                instruction(0),
            ]
        )

    assert instructions.with_maps(text(3, 4), {3: 70000, 4: 5}) == text(70000, 5)


def test_a_helper_has_its_name_in_messages() -> None:
    assert helpers.name(122) == "bpf_get_netns_cookie"
    assert helpers.name(16) == "bpf helper 16"


def test_refused_helpers_are_listed_by_program() -> None:
    calls = {"sock_ops": frozenset({1, 122}), "sock_create": frozenset({1, 14})}
    refused = refused_calls([LISTEN, CREATE], calls, lambda program, helper: (program, helper) != (LISTEN, 122))
    assert refused == {"sock_ops": {122}}


def test_an_extension_is_left_out_if_any_program_may_not_call_one_of_its_helpers() -> None:
    assert allowed_extensions(EXTENSIONS, {}) == EXTENSIONS
    assert allowed_extensions(EXTENSIONS, {"sock_ops": frozenset({196})}) == {SET_RETVAL, PROBE}
    assert allowed_extensions(EXTENSIONS, {"bind4": frozenset({187}), "getsockname4": frozenset({35})}) == {MPTCP}


def test_a_refused_helper_of_no_extension_leaves_the_extensions() -> None:
    assert allowed_extensions(EXTENSIONS, {"setsockopt": frozenset({122})}) == EXTENSIONS


def test_the_reason_is_one_line() -> None:
    assert (
        reason(LISTEN, frozenset({122, 16}), "")
        == "bpf helper 16, bpf_get_netns_cookie not allowed in sock_ops programs"
    )
    log = "bpf: Failed to load program: Permission denied\n0: (79) r1\nR1 invalid mem access\nprocessed 9 insns\n\n"
    assert reason(LISTEN, frozenset(), log) == "R1 invalid mem access"
    assert reason(LISTEN, frozenset(), "") == "the kernel gives no reason"


def test_every_program_says_what_it_is_for_and_names_an_attach_point() -> None:
    for program in (*ALL_PROGRAMS, RELAY_PROGRAM):
        assert program.purpose and program.attach in bpf.ATTACH_TYPES
    assert len({program.name for program in ALL_PROGRAMS}) == len(ALL_PROGRAMS)
