"""The seccomp filter, run by an interpreter of the classic BPF instructions that it uses."""

from __future__ import annotations

import errno
import socket
import struct

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from graft.kernel import seccomp
from graft.kernel.seccomp import Notification
from graft.kernel.seccomp_filter import (
    FAMILIES,
    PROTOCOLS,
    TRAPPED,
    TYPE_FLAGS,
    architecture,
    born_filter,
    can_be_born,
    swap_filter,
)
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
    """What the filter of transport swap returns for a call."""
    return classic_bpf.interpret(swap_filter(machine), classic_bpf.seccomp_data(nr, arch))


def interpret_born(nr: int, arch: int, machine: str, *arguments: int) -> int:
    """What the filter of transport born returns for a call."""
    padded = (*arguments, *(0,) * (6 - len(arguments)))
    return classic_bpf.interpret(born_filter(machine), classic_bpf.seccomp_data(nr, arch, padded))


@every_machine
def test_bind_connect_and_listen_are_trapped(machine: str) -> None:
    arch, calls = architecture(machine)
    assert {name: interpret(calls[name], arch, machine) for name in ("bind", "connect", "listen")} == dict.fromkeys(
        TRAPPED, NOTIFY
    )


@every_machine
@given(number=st.integers(0, 2**32 - 1))
def test_every_other_call_is_allowed(machine: str, number: int) -> None:
    arch, calls = architecture(machine)
    trapped = {calls[name] for name in TRAPPED}
    assert interpret(number, arch, machine) == (NOTIFY if number in trapped else ALLOW)


@every_machine
@given(number=st.integers(0, 2**32 - 1), other=st.integers(0, 2**32 - 1))
def test_calls_of_another_architecture_are_allowed(machine: str, number: int, other: int) -> None:
    assume(other != architecture(machine)[0])
    assert interpret(number, other, machine) == ALLOW


KNOWN = st.sampled_from(
    [(family, kind, protocol) for family in FAMILIES for kind in PROTOCOLS for protocol in PROTOCOLS[kind]]
)
FLAGS = st.sampled_from([0, socket.SOCK_NONBLOCK, socket.SOCK_CLOEXEC, TYPE_FLAGS])
ANY = st.one_of(st.integers(0, 300), st.integers(0, 2**32 - 1))


@every_machine
@given(known=KNOWN, flags=FLAGS, upper=st.tuples(*[st.integers(0, 2**32 - 1)] * 3))
def test_born_traps_tcp_mptcp_udp_and_ping_sockets(
    machine: str, known: tuple[int, int, int], flags: int, upper: tuple[int, int, int]
) -> None:
    arch, calls = architecture(machine)
    family, kind, protocol = known
    # The kernel takes these arguments as int: the upper halves of the registers mean nothing.
    arguments = (half << 32 | value for half, value in zip(upper, (family, kind | flags, protocol), strict=True))
    assert interpret_born(calls["socket"], arch, machine, *arguments) == NOTIFY
    assert can_be_born(family, kind | flags, protocol)


@every_machine
@given(family=ANY, kind=ANY, protocol=ANY)
def test_born_leaves_every_other_socket_at_home(machine: str, family: int, kind: int, protocol: int) -> None:
    arch, calls = architecture(machine)
    kinds = {(1, 0), (1, 6), (1, 262), (2, 0), (2, 17), (2, 1), (2, 58)}
    known = family in (2, 10) and (kind & ~TYPE_FLAGS, protocol) in kinds
    assert interpret_born(calls["socket"], arch, machine, family, kind, protocol) == (NOTIFY if known else ALLOW)
    assert can_be_born(family, kind, protocol) == known


@every_machine
@given(family=ANY, kind=ANY, protocol=ANY)
def test_swap_traps_sockets_of_udp_alone_where_the_policy_has_rules_for_it(
    machine: str, family: int, kind: int, protocol: int
) -> None:
    arch, calls = architecture(machine)

    def interpreted(name: str, *arguments: int) -> int:
        padded = (*arguments, *(0,) * (6 - len(arguments)))
        data = classic_bpf.seccomp_data(calls[name], arch, padded)
        return classic_bpf.interpret(swap_filter(machine, datagrams=True), data)

    known = family in (2, 10) and kind & ~TYPE_FLAGS == 2 and protocol in (0, 17)
    assert interpreted("socket", family, kind, protocol) == (NOTIFY if known else ALLOW)
    assert interpret(calls["socket"], arch, machine) == ALLOW
    assert {interpreted(name) for name in TRAPPED} == {NOTIFY}


@every_machine
@given(number=st.integers(0, 2**32 - 1))
def test_born_traps_no_other_call(machine: str, number: int) -> None:
    arch, calls = architecture(machine)
    assume(number != calls["socket"])
    assert interpret_born(number, arch, machine, socket.AF_INET, socket.SOCK_STREAM, 0) == ALLOW


@every_machine
def test_32_bit_and_x32_numbers_are_not_taken_for_those_of_this_architecture(machine: str) -> None:
    arch, calls = architecture(machine)
    other, numbers = COMPAT[machine]
    for number in (*calls.values(), *numbers):
        assert interpret(number, other, machine) == ALLOW
        assert interpret(number | X32, arch, machine) == ALLOW
        assert interpret_born(number, other, machine, socket.AF_INET, socket.SOCK_STREAM) == ALLOW
        assert interpret_born(number | X32, arch, machine, socket.AF_INET, socket.SOCK_STREAM) == ALLOW


@every_machine
def test_the_filter_ends_on_every_path_and_reads_only_number_and_architecture(machine: str) -> None:
    program = list(struct.iter_unpack("=HBBI", swap_filter(machine)))
    assert {k for code, _, _, k in program if code == 0x20} == {0, 4}
    check_ends(program)


@every_machine
def test_the_filter_of_born_ends_on_every_path(machine: str) -> None:
    check_ends(list(struct.iter_unpack("=HBBI", born_filter(machine))))
    check_ends(list(struct.iter_unpack("=HBBI", swap_filter(machine, datagrams=True))))


def check_ends(program: list[tuple[int, int, int, int]]) -> None:
    for at, (code, true, false, _) in enumerate(program):
        if code == 0x15:
            assert at + 1 + max(true, false) < len(program)
    assert program[-1][0] == 0x06


def test_an_unknown_machine_is_refused() -> None:
    for unknown in ("riscv64", "32-bit aarch64", "aarch64_be"):
        with pytest.raises(OSError, match=unknown) as refused:
            swap_filter(unknown)
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
