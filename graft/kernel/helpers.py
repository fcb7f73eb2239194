"""Which of the kernel's helpers a BPF program calls, and whether this kernel lets its type call them.

The kernel is tested helper by helper, with a program that makes only this call: the verifier checks whether
the call is allowed before it checks the arguments. Sources: kernel/bpf/verifier.c, check_helper_call(); struct
bpf_insn in include/uapi/linux/bpf.h.
"""

from __future__ import annotations

import struct

from graft.kernel import bpf

# enum bpf_func_id: the helpers that Graft's programs call.
HELPERS = {
    "map_lookup_elem": 1,
    "map_update_elem": 2,
    "map_delete_elem": 3,
    "ktime_get_ns": 5,
    "get_prandom_u32": 7,
    "get_current_pid_tgid": 14,
    "get_current_uid_gid": 15,
    "skb_load_bytes": 26,
    "get_current_task": 35,
    "get_socket_cookie": 46,
    "setsockopt": 49,
    "sock_ops_cb_flags_set": 59,
    "bind": 64,
    "sk_redirect_hash": 72,
    "get_current_cgroup_id": 80,
    "get_local_storage": 81,
    "sk_lookup_udp": 85,
    "sk_release": 86,
    "sk_fullsock": 95,
    "sk_storage_get": 107,
    "sk_storage_delete": 108,
    "probe_read_kernel": 113,
    "get_netns_cookie": 122,
    "sk_ancestor_cgroup_id": 129,
    "ringbuf_output": 130,
    "skc_to_tcp_sock": 137,
    "set_retval": 187,
    "skc_to_mptcp_sock": 196,
}

_INSTRUCTION = struct.Struct("=BBhi")  # opcode; destination and source register, 4 bits each; offset; immediate
_CALL, _MOVE, _EXIT = 0x85, 0xB7, 0x95  # BPF_JMP | BPF_CALL; BPF_ALU64 | BPF_MOV | BPF_K; BPF_JMP | BPF_EXIT
_WIDE = 0x18  # BPF_LD | BPF_DW | BPF_IMM: two instructions long

# The verifier's messages for a helper that it does not know, and for one that it does not allow ("program of this type
# cannot use helper" from 6.12 on).
_REFUSALS = ("invalid func ", "unknown func ", "cannot use helper ")


def name(helper: int) -> str:
    """A helper's name in C; its number for one that Graft does not use."""
    return next((f"bpf_{known}" for known, one in HELPERS.items() if one == helper), f"bpf helper {helper}")


def calls(instructions: bytes) -> frozenset[int]:
    """The numbers of the helpers that a program calls."""
    found = set()
    second_half = False
    for opcode, registers, _, immediate in _INSTRUCTION.iter_unpack(instructions):
        if not second_half and opcode == _CALL and registers >> 4 == 0:  # else a call of a function or a kfunc
            found.add(immediate)
        second_half = not second_half and opcode == _WIDE
    return frozenset(found)


def allows(prog_type: int, attach_type: int, helper: int) -> bool:
    """Whether this kernel lets programs of that type, for that attach point, call ``helper``. Needs root.

    Raises OSError where the kernel does not know the type or the attach point.
    """
    program = (
        _INSTRUCTION.pack(_CALL, 0, 0, helper) + _INSTRUCTION.pack(_MOVE, 0, 0, 1) + _INSTRUCTION.pack(_EXIT, 0, 0, 0)
    )
    log = bpf.prog_log(prog_type, attach_type, program)
    return not any(refusal in log for refusal in _REFUSALS)
