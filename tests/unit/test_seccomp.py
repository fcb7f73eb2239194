"""The seccomp filter, run by an interpreter of classic BPF that knows what the filter uses."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from graft.kernel import seccomp
from graft.kernel.seccomp import Notification, architecture, filter_program

ALLOW, NOTIFY = 0x7FFF0000, 0x7FC00000
ARCH, CALLS = architecture()
I386, X32 = 0x40000003, 0x40000000


def interpret(nr: int, arch: int) -> int:
    """What the filter returns for a call. struct seccomp_data: nr, arch, instruction pointer, arguments."""
    data = struct.pack("=iIQ6Q", nr - (1 << 32) if nr & 1 << 31 else nr, arch, 0, *[0] * 6)
    program = list(struct.iter_unpack("=HBBI", filter_program()))
    accumulator = at = 0
    while True:
        code, true, false, k = program[at]
        at += 1
        if code == 0x20:  # ld [k]
            accumulator = struct.unpack_from("=I", data, k)[0]
        elif code == 0x15:  # jeq #k
            at += true if accumulator == k else false
        elif code == 0x06:  # ret #k
            return int(k)
        else:
            raise AssertionError(f"instruction {code:#x}")


def test_bind_connect_and_listen_are_trapped() -> None:
    assert {name: interpret(number, ARCH) for name, number in CALLS.items()} == dict.fromkeys(
        ("bind", "connect", "listen"), NOTIFY
    )


@given(st.integers(0, 2**32 - 1))
def test_every_other_call_runs_on_untouched(number: int) -> None:
    assert interpret(number, ARCH) == (NOTIFY if number in CALLS.values() else ALLOW)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1).filter(lambda arch: arch != ARCH))
def test_calls_of_another_architecture_run_on_untouched(number: int, arch: int) -> None:
    assert interpret(number, arch) == ALLOW


def test_numbers_of_32_bit_and_x32_programs_are_not_taken_for_ours() -> None:
    for number in (*CALLS.values(), 361, 362, 363):
        assert interpret(number, I386) == ALLOW
        assert interpret(number | X32, ARCH) == ALLOW


def test_the_filter_ends_on_every_path_and_looks_at_nothing_but_number_and_architecture() -> None:
    program = list(struct.iter_unpack("=HBBI", filter_program()))
    assert {k for code, _, _, k in program if code == 0x20} == {0, 4}
    for at, (code, true, false, _) in enumerate(program):
        if code == 0x15:
            assert at + 1 + max(true, false) < len(program)
    assert program[-1][0] == 0x06


def test_a_notification_is_read_from_its_bytes() -> None:
    # linux/seccomp.h: id, pid, flags, {nr, arch, instruction_pointer, args[6]}
    junk = 0xBAD << 32
    raw = struct.pack("=QIIiIQ6Q", 7, 1234, 0, 49, ARCH, 0xDEAD, junk | 3, 0x7FFF00000000, junk | 16, 4, 5, 6)
    assert len(raw) == seccomp.Listener.SIZE == 80
    found = Notification.unpack(raw)
    assert (found.id, found.pid, found.nr, found.arch) == (7, 1234, 49, ARCH)
    assert (found.fd, found.address, found.size) == (3, 0x7FFF00000000, 16)


def test_a_descriptor_is_an_int_as_the_kernel_reads_it() -> None:
    raw = struct.pack("=QIIiIQ6Q", 7, 1234, 0, 49, ARCH, 0, 0xFFFFFFFF, 0, 0, 0, 0, 0)
    assert Notification.unpack(raw).fd == -1
