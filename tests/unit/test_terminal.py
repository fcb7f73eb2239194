"""The filter that keeps a program from typing on its user's terminal, by the interpreter of classic BPF."""

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from graft.kernel import terminal
from graft.kernel.terminal import IOCTLS, TIOCLINUX, TIOCSTI, filter_program
from tests.support import classic_bpf

ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM
CALLS = [
    (machine, arch, number)
    for machine, table in IOCTLS.items()
    for arch, numbers in table.items()
    for number in numbers
]

every_machine = pytest.mark.parametrize("machine", IOCTLS)
every_ioctl = pytest.mark.parametrize(("machine", "arch", "number"), CALLS)


def interpret(machine: str, arch: int, number: int, request: int) -> int:
    data = classic_bpf.seccomp_data(number, arch, (0, request, 0, 0, 0, 0))
    return classic_bpf.interpret(filter_program(machine), data)


@every_ioctl
@given(upper=st.integers(0, 2**32 - 1))
def test_typing_is_refused_whatever_is_in_the_upper_half(machine: str, arch: int, number: int, upper: int) -> None:
    for request in (TIOCSTI, TIOCLINUX):
        assert interpret(machine, arch, number, upper << 32 | request) == REFUSE


@every_ioctl
@given(request=st.integers(0, 2**64 - 1))
def test_every_other_request_runs(machine: str, arch: int, number: int, request: int) -> None:
    assume(request & 0xFFFFFFFF not in (TIOCSTI, TIOCLINUX))
    assert interpret(machine, arch, number, request) == ALLOW


@every_machine
@given(arch=st.integers(0, 2**32 - 1), number=st.integers(0, 2**32 - 1))
def test_every_other_call_runs(machine: str, arch: int, number: int) -> None:
    for known in (arch, *IOCTLS[machine]):
        if number not in IOCTLS[machine].get(known, ()):
            assert interpret(machine, known, number, TIOCSTI) == ALLOW


@every_machine
def test_the_filter_ends_on_every_path(machine: str) -> None:
    program = list(struct.iter_unpack("=HBBI", filter_program(machine)))
    for at, (code, true, false, _) in enumerate(program):
        if code == 0x15:
            assert at + 1 + max(true, false) < len(program)
    assert program[-1][0] == 0x06


def test_a_machine_whose_numbers_are_not_known_is_refused() -> None:
    with pytest.raises(OSError, match="riscv64"):
        terminal.filter_program("riscv64")
