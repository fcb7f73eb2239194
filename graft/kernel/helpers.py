"""The kernel's helpers, and whether this kernel lets a type of BPF programs call them.

The kernel is tested helper by helper, with a program that makes only this call: the verifier checks whether
the call is allowed before it checks the arguments. Source: kernel/bpf/verifier.c, check_helper_call().
"""

from __future__ import annotations

from graft.kernel import bpf_load
from graft.kernel.instructions import CALL, EXIT, INSTRUCTION, MOVE

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

# The verifier's messages for a helper that it does not know, and for one that it does not allow ("program of this type
# cannot use helper" from 6.12 on).
_REFUSALS = ("invalid func ", "unknown func ", "cannot use helper ")


def name(helper: int) -> str:
    """A helper's name in C; its number for one that Graft does not use."""
    return next((f"bpf_{known}" for known, one in HELPERS.items() if one == helper), f"bpf helper {helper}")


def allows(prog_type: int, attach_type: int, helper: int) -> bool:
    """Whether this kernel lets programs of that type, for that attach point, call ``helper``. Needs root.

    Raises OSError where the kernel does not know the type or the attach point.
    """
    program = INSTRUCTION.pack(CALL, 0, 0, helper) + INSTRUCTION.pack(MOVE, 0, 0, 1) + INSTRUCTION.pack(EXIT, 0, 0, 0)
    log = bpf_load.log(prog_type, attach_type, program)
    return not any(refusal in log for refusal in _REFUSALS)
