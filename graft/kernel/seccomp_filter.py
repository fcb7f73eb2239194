"""The seccomp filters of supervised programs: which system calls their supervisor is notified of. Pure.

A filter sees a call's number, its architecture and its arguments, not the memory behind a pointer. Calls of another
architecture (32-bit) and x86's x32 numbers pass: they act on sockets of the container's own namespace, and the hooks
enforce the policy on host-homed ones all the same.

Sources: seccomp(2), include/uapi/linux/seccomp.h, include/uapi/linux/audit.h, include/uapi/linux/bpf_common.h.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from graft.kernel.syscalls import MACHINE

_RET_ALLOW = 0x7FFF0000
_RET_USER_NOTIF = 0x7FC00000

_LOAD, _AND, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x54, 0x15, 0x06
_NR, _ARCH, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data; arguments have eight bytes

# AUDIT_ARCH_* and the system calls' numbers of the architectures that Graft knows. Of an argument that the kernel
# treats as int the lower half is first in memory on all of them.
_ARCHES: dict[str, tuple[int, dict[str, int]]] = {
    "x86_64": (0xC000003E, {"socket": 41, "connect": 42, "bind": 49, "listen": 50}),
    "aarch64": (0xC00000B7, {"socket": 198, "connect": 203, "bind": 200, "listen": 201}),
}
TRAPPED = ("bind", "connect", "listen")

IPPROTO_MPTCP = 262
FAMILIES = (int(socket.AF_INET), int(socket.AF_INET6))
PROTOCOLS = {
    int(socket.SOCK_STREAM): (0, int(socket.IPPROTO_TCP), IPPROTO_MPTCP),
    int(socket.SOCK_DGRAM): (0, int(socket.IPPROTO_UDP), int(socket.IPPROTO_ICMP), int(socket.IPPROTO_ICMPV6)),
}
"""The sockets that can be born on the host's stack: their protocols by their types."""
PING_PROTOCOLS = (int(socket.IPPROTO_ICMP), int(socket.IPPROTO_ICMPV6))
"""Those of sockets that ping, which are born only under a policy with a rule for ICMP."""

DATAGRAMS = {int(socket.SOCK_DGRAM): (0, int(socket.IPPROTO_UDP))}
"""Those of transport swap: UDP alone, where its policy has rules for it."""

TYPE_FLAGS = int(socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)


Protocols = Mapping[int, tuple[int, ...]]


def can_be_born(family: int, kind: int, protocol: int, protocols: Protocols = PROTOCOLS) -> bool:
    """Whether a filter for ``protocols`` traps such a socket. ``kind`` is a type with its flags."""
    return family in FAMILIES and protocol in protocols.get(kind & ~TYPE_FLAGS, ())


def architecture(machine: str = MACHINE) -> tuple[int, dict[str, int]]:
    """A machine's AUDIT_ARCH and the numbers of the calls that a filter may trap. Raises OSError(ENOSYS) if unknown."""
    try:
        return _ARCHES[machine]
    except KeyError:
        raise OSError(errno.ENOSYS, f"seccomp: {machine} is not known") from None


@dataclass(frozen=True, slots=True)
class _Step:
    """An instruction whose jumps name the label that they go to; "" is the next instruction."""

    code: int
    value: int
    if_true: str = ""
    if_false: str = ""
    label: str = ""


def swap_filter(machine: str = MACHINE, datagrams: bool = False) -> bytes:
    """Notify for bind, connect and listen of this architecture, allow all else.

    ``datagrams``: notify for socket too, where it is of UDP.
    """
    arch, calls = architecture(machine)
    steps = _for_architecture(arch)
    steps += [_Step(_JUMP_IF_EQUAL, calls[name], if_true="notify") for name in TRAPPED]
    return _assemble(steps + _for_socket(calls["socket"], DATAGRAMS) if datagrams else steps)


def born_filter(machine: str = MACHINE) -> bytes:
    """Notify for socket of this architecture, where it is of a kind that `PROTOCOLS` has, allow all else."""
    arch, calls = architecture(machine)
    return _assemble(_for_architecture(arch) + _for_socket(calls["socket"], PROTOCOLS))


def _for_socket(number: int, every: Protocols) -> list[_Step]:
    """Notify for a socket of ``every``, and allow all other calls."""
    steps = [_Step(_JUMP_IF_EQUAL, number, if_false="allow"), _load_argument(0)]
    steps += [_Step(_JUMP_IF_EQUAL, family, if_true="type") for family in FAMILIES]
    steps.append(_Step(_RETURN, _RET_ALLOW))
    steps.append(_load_argument(1, "type"))
    steps.append(_Step(_AND, ~TYPE_FLAGS & 0xFFFFFFFF))
    steps += [_Step(_JUMP_IF_EQUAL, kind, if_true=f"type {kind}") for kind in every]
    steps.append(_Step(_RETURN, _RET_ALLOW))
    for kind, protocols in every.items():
        steps.append(_load_argument(2, f"type {kind}"))
        steps += [_Step(_JUMP_IF_EQUAL, protocol, if_true="notify") for protocol in protocols]
        steps.append(_Step(_RETURN, _RET_ALLOW))
    return steps


def _load_argument(index: int, label: str = "") -> _Step:
    return _Step(_LOAD, _FIRST_ARGUMENT + 8 * index, label=label)


def _for_architecture(arch: int) -> list[_Step]:
    """Go on with the call's number where it is of ``arch``."""
    return [_Step(_LOAD, _ARCH), _Step(_JUMP_IF_EQUAL, arch, if_false="allow"), _Step(_LOAD, _NR)]


def _assemble(steps: list[_Step]) -> bytes:
    """The instructions (struct sock_filter) with the two ends that jumps name."""
    steps = [
        *steps,
        _Step(_RETURN, _RET_ALLOW, label="allow"),
        _Step(_RETURN, _RET_USER_NOTIF, label="notify"),
    ]
    at = {step.label: index for index, step in enumerate(steps) if step.label}
    text = b""
    for index, step in enumerate(steps):
        distances = (at[label] - index - 1 if label else 0 for label in (step.if_true, step.if_false))
        text += struct.pack("=HBBI", step.code, *distances, step.value)
    return text
