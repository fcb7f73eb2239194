"""A terminal that a program shares with its user: the program may read and write it, but not inject input.

TIOCSTI inserts a character into the terminal's input, as if it had been typed, and TIOCLINUX pastes what the program
has selected on a console: the next reader gets it, such as the shell of root that started the program
(ioctl_tty(2), ioctl_console(2)). A new session would prevent this, but without job control and ^C. So a seccomp
filter refuses these two requests, with EPERM, and allows everything else.

The kernel treats a request as an unsigned int (fs/ioctl.c): only the lower half of the argument counts, and the filter
checks only that. Numbers: arch/x86/entry/syscalls, arch/arm/tools/syscall.tbl, asm-generic/ioctls.h (the same in
all of these), linux/audit.h.
"""

from __future__ import annotations

import errno
import struct
import termios

from graft.kernel import seccomp
from graft.kernel.seccomp_filter import architecture
from graft.kernel.syscalls import MACHINE

TIOCSTI, TIOCLINUX = termios.TIOCSTI, 0x541C
_X32 = 0x40000000
_NR, _ARCH, _REQUEST = 0, 4, 24  # struct seccomp_data: nr, arch, and the lower half of args[1]
_RET_ALLOW, _RET_ERRNO = 0x7FFF0000, 0x00050000
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06

# The numbers of ioctl for each AUDIT_ARCH that a program of the machine may call by: x86's are of 64 bits, x32 (in both
# of its tables) and i386; 32-bit Arm's.
IOCTLS: dict[str, dict[int, tuple[int, ...]]] = {
    "x86_64": {0xC000003E: (16, _X32 | 16, _X32 | 514), 0x40000003: (54,)},
    "aarch64": {0xC00000B7: (29,), 0x40000028: (54,)},
}


def filter_program(machine: str = MACHINE) -> bytes:
    """The BPF filter. Raises OSError(ENOSYS) for a machine whose numbers are not known."""
    architecture(machine)
    tables, refused = IOCTLS[machine], (TIOCSTI, TIOCLINUX)
    allow, refuse = (_RETURN, 0, 0, _RET_ALLOW), (_RETURN, 0, 0, _RET_ERRNO | errno.EPERM)
    program: list[tuple[int, int, int, int]] = [(_LOAD, 0, 0, _ARCH)]
    look = len(program) + sum(len(numbers) + 3 for numbers in tables.values()) + 1  # where the request is looked at
    for arch, numbers in tables.items():
        program += [(_JUMP_IF_EQUAL, 0, len(numbers) + 2, arch), (_LOAD, 0, 0, _NR)]
        for number in numbers:
            program.append((_JUMP_IF_EQUAL, look - len(program) - 1, 0, number))
        program.append(allow)
    program += [allow, (_LOAD, 0, 0, _REQUEST)]
    program += [(_JUMP_IF_EQUAL, len(refused) - index, 0, request) for index, request in enumerate(refused)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in (*program, allow, refuse))


def refuse_terminal_injection() -> None:
    """Stop the calling process and its children from injecting input into a terminal. Raises OSError.

    Needs CAP_SYS_ADMIN.
    """
    seccomp.install(filter_program())
