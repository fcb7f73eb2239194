"""Where this kernel keeps what the BPF programs read of it: offsets that become constants when they are compiled.

From the kernel's own type information, so that one source fits every kernel. A group of them is known as a whole or
not at all, and the code that needs it is left out then.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from graft.kernel.btf import Btf


@cache  # all of the kernel's types are gone through, and the loader asks for each text that it compiles
def socket_file() -> dict[str, int]:
    """For the desk's look at a socket's file and descriptor (bpf/desk.bpf.c); empty where the kernel does not tell."""
    try:
        return _socket_file(Btf.of_kernel())
    except (OSError, ValueError):
        return {}


def _socket_file(btf: Btf) -> dict[str, int]:
    references = btf.offset("file", "f_ref")
    file = {
        "GRAFT_SK_SOCKET": btf.offset("sock", "sk_socket"),
        "GRAFT_SOCKET_FILE": btf.offset("socket", "file"),
        "GRAFT_FILE_EP": btf.offset("file", "f_ep"),
        "GRAFT_FILE_REFERENCES": btf.offset("file", "f_count") if references is None else references,
    }
    descriptor = {
        "GRAFT_TASK_FILES": btf.offset("task_struct", "files"),
        "GRAFT_TASK_PID_LINKS": btf.offset("task_struct", "pid_links"),
        "GRAFT_PID_TASKS": btf.offset("pid", "tasks"),
        "GRAFT_PROC_INODE_PID": btf.offset("proc_inode", "pid"),
        "GRAFT_PROC_INODE_VFS": btf.offset("proc_inode", "vfs_inode"),
        "GRAFT_FILES_TABLE": btf.offset("files_struct", "fdt"),
        "GRAFT_TABLE_SIZE": btf.offset("fdtable", "max_fds"),
        "GRAFT_TABLE_FILES": btf.offset("fdtable", "fd"),
        "GRAFT_TABLE_CLOEXEC": btf.offset("fdtable", "close_on_exec"),
        "GRAFT_FILE_INODE": btf.offset("file", "f_inode"),
        "GRAFT_FILE_FLAGS": btf.offset("file", "f_flags"),
        "GRAFT_INODE_UID": btf.offset("inode", "i_uid"),
        "GRAFT_INODE_GID": btf.offset("inode", "i_gid"),
    }
    return {**_all_or_none(file), **_all_or_none(descriptor)} if _all_or_none(file) else {}


def write_seq() -> int | None:
    """Of what a TCP socket was given to send (bpf/relay.bpf.c); None where the kernel does not tell."""
    try:
        return Btf.of_kernel().offset("tcp_sock", "write_seq")
    except (OSError, ValueError):
        return None


def _all_or_none(offsets: Mapping[str, int | None]) -> dict[str, int]:
    known = {name: value for name, value in offsets.items() if value is not None}
    return known if len(known) == len(offsets) else {}
