"""Loads BPF programs from their instructions.

Sources: bpf(2); include/uapi/linux/bpf.h (BPF_PROG_LOAD, `union bpf_attr`).
"""

from __future__ import annotations

import ctypes
import errno
import os

from graft.errors import KernelError
from graft.kernel import bpf

_PROG_LOAD = 5
_LOG_BYTES = 1 << 16
_LONG_LOG_BYTES = 16 << 20
_LICENCE = b"GPL"
_TRIES = 10
"""How often a program is loaded that the kernel did not look at to the end."""
_PASSING = (errno.EAGAIN, errno.EINTR, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
"""Say nothing of the program: no memory, no descriptor; the verifier ends with EAGAIN when a signal is pending."""


class _LoadAttr(ctypes.Structure):
    _fields_ = (
        ("prog_type", ctypes.c_uint32),
        ("insn_cnt", ctypes.c_uint32),
        ("insns", ctypes.c_uint64),
        ("license", ctypes.c_uint64),
        ("log_level", ctypes.c_uint32),
        ("log_size", ctypes.c_uint32),
        ("log_buf", ctypes.c_uint64),
        ("kern_version", ctypes.c_uint32),
        ("prog_flags", ctypes.c_uint32),
        ("prog_name", ctypes.c_char * 16),
        ("prog_ifindex", ctypes.c_uint32),
        ("expected_attach_type", ctypes.c_uint32),
    )


def load(prog_type: int, attach_type: int, name: str, instructions: bytes) -> int:
    """A descriptor of the program. ``name``: what the kernel shows, by its first 15 bytes.

    Raises OSError: its strerror is the verifier's log, where the verifier refuses it. KernelError where the kernel did
    not judge it, as `log` does.
    """
    shown = name.encode()[:15]
    try:
        return _load(prog_type, attach_type, instructions, shown)
    except OSError as error:
        found = ctypes.create_string_buffer(_LONG_LOG_BYTES)
        try:
            return _load(prog_type, attach_type, instructions, shown, found)
        except OSError:
            raise OSError(error.errno, found.value.decode(errors="replace") or error.strerror) from error


def log(prog_type: int, attach_type: int, instructions: bytes) -> str:
    """The verifier's log for a program, at log level 1. The program is not kept.

    Raises OSError only where the kernel refused it without asking the verifier (an unknown type, no rights).
    """
    found = ctypes.create_string_buffer(_LOG_BYTES)
    try:
        os.close(_load(prog_type, attach_type, instructions, log=found))
    except OSError:
        if not found.value:
            raise
    return found.value.decode(errors="replace")


def _load(
    prog_type: int,
    attach_type: int,
    instructions: bytes,
    name: bytes = b"",
    log: ctypes.Array[ctypes.c_char] | None = None,
) -> int:
    code = ctypes.create_string_buffer(instructions, len(instructions))
    licence = ctypes.create_string_buffer(_LICENCE)
    attr = _LoadAttr(
        prog_type=prog_type,
        insn_cnt=len(instructions) // 8,
        insns=ctypes.addressof(code),
        license=ctypes.addressof(licence),
        log_level=0 if log is None else 1,
        log_size=0 if log is None else len(log),
        log_buf=0 if log is None else ctypes.addressof(log),
        prog_name=name,
        expected_attach_type=attach_type,
    )
    for _ in range(_TRIES):
        try:
            return bpf.call(_PROG_LOAD, attr)
        except OSError as error:
            problem = error
            if error.errno != errno.EAGAIN:
                break
    if problem.errno in _PASSING:
        raise KernelError(f"the kernel loads no BPF program now: {problem.strerror}", "try again") from problem
    raise problem
