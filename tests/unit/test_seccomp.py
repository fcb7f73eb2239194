"""The seccomp filter, run by an interpreter of the classic BPF instructions that it uses."""

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from graft.kernel import seccomp
from graft.kernel.seccomp import Notification, architecture, filter_program
from tests.support import classic_bpf

ALLOW, NOTIFY = 0x7FFF0000, 0x7FC00000
MACHINES = ("x86_64", "aarch64")
ARCH, CALLS = architecture()
X32 = 0x40000000
I386, ARM = 0x40000003, 0x40000028  # AUDIT_ARCH_* of linux/audit.h
# bind, connect, listen: arch/x86/entry/syscalls/syscall_32.tbl, arch/arm/tools/syscall.tbl
COMPAT = {"x86_64": (I386, (361, 362, 363)), "aarch64": (ARM, (282, 283, 284))}

every_machine = pytest.mark.parametrize("machine", MACHINES)


def interpret(nr: int, arch: int, machine: str) -> int:
    """What the filter returns for a call."""
    return classic_bpf.interpret(filter_program(machine), classic_bpf.seccomp_data(nr, arch))


@every_machine
def test_bind_connect_and_listen_are_trapped(machine: str) -> None:
    arch, calls = architecture(machine)
    assert {name: interpret(number, arch, machine) for name, number in calls.items()} == dict.fromkeys(
        ("bind", "connect", "listen"), NOTIFY
    )


@every_machine
@given(number=st.integers(0, 2**32 - 1))
def test_every_other_call_is_allowed(machine: str, number: int) -> None:
    arch, calls = architecture(machine)
    assert interpret(number, arch, machine) == (NOTIFY if number in calls.values() else ALLOW)


@every_machine
@given(number=st.integers(0, 2**32 - 1), other=st.integers(0, 2**32 - 1))
def test_calls_of_another_architecture_are_allowed(machine: str, number: int, other: int) -> None:
    assume(other != architecture(machine)[0])
    assert interpret(number, other, machine) == ALLOW


@every_machine
def test_32_bit_and_x32_numbers_are_not_taken_for_those_of_this_architecture(machine: str) -> None:
    arch, calls = architecture(machine)
    other, numbers = COMPAT[machine]
    for number in (*calls.values(), *numbers):
        assert interpret(number, other, machine) == ALLOW
        assert interpret(number | X32, arch, machine) == ALLOW


@every_machine
def test_the_filter_ends_on_every_path_and_reads_only_number_and_architecture(machine: str) -> None:
    program = list(struct.iter_unpack("=HBBI", filter_program(machine)))
    assert {k for code, _, _, k in program if code == 0x20} == {0, 4}
    for at, (code, true, false, _) in enumerate(program):
        if code == 0x15:
            assert at + 1 + max(true, false) < len(program)
    assert program[-1][0] == 0x06


def test_an_unknown_machine_is_refused() -> None:
    for unknown in ("riscv64", "32-bit aarch64", "aarch64_be"):
        with pytest.raises(OSError, match=unknown) as refused:
            filter_program(unknown)
        assert refused.value.errno == errno.ENOSYS


def test_a_notification_is_parsed() -> None:
    # linux/seccomp.h: id, pid, flags, {nr, arch, instruction_pointer, args[6]}
    junk = 0xBAD << 32
    raw = struct.pack("=QIIiIQ6Q", 7, 1234, 0, 49, ARCH, 0xDEAD, junk | 3, 0x7FFF00000000, junk | 16, 4, 5, 6)
    assert len(raw) == seccomp.Listener.SIZE == 80
    found = Notification.unpack(raw)
    assert (found.id, found.pid, found.nr, found.arch) == (7, 1234, 49, ARCH)
    assert (found.fd, found.address, found.size) == (3, 0x7FFF00000000, 16)


def test_a_descriptor_is_a_signed_int_as_in_the_kernel() -> None:
    raw = struct.pack("=QIIiIQ6Q", 7, 1234, 0, 49, ARCH, 0, 0xFFFFFFFF, 0, 0, 0, 0, 0)
    assert Notification.unpack(raw).fd == -1
