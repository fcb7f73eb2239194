"""Offsets of the members of kernel structures that the BPF programs read: constants for the compiler.

They come from the kernel's own type information, so that one source fits every kernel. If one offset of a group is not
found, the whole group is left out, and with it the code that needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

from graft.errors import KernelError
from graft.kernel.btf import Btf

Offsets = Mapping[str, int | None]


@cache  # reads all of the kernel's types, and the loader calls it for each text that it compiles
def structure_offsets() -> dict[str, int]:
    """The offsets that the hooks need; empty where the kernel has no type information. Raises KernelError where that
    cannot be read now.

    Of a socket's file and descriptor (bpf/desk.bpf.c), the thread that a supervisor serves (bpf/caller.bpf.c),
    IPV6_V6ONLY (bpf/local_address.bpf.c), the interface and the route that a program
    has chosen and whether it has begun a datagram (bpf/chosen_source.bpf.c), a packet's namespace, its connection, its
    route and what IPsec has done to it, and a setting of the namespace (bpf/packet.bpf.c, translated.bpf.c,
    destination.bpf.c, egress.bpf.c), and a group of sockets with the cgroup of each (bpf/reuseport.bpf.c).
    """
    try:
        btf = _of_kernel()
        file = _all_or_none(_file(btf))
        others = [_all_or_none(group(btf)) for group in _groups()]
    except (FileNotFoundError, ValueError):
        return {}
    return {name: value for group in (file, *others) for name, value in group.items()} if file else {}


def missing() -> list[str]:
    """The offsets that this kernel's type information does not have; all of them where there is none. What the hooks do
    without then, docs/kernel.md tells.
    """
    try:
        btf = _of_kernel()
        found = [group(btf) for group in (_file, *_groups())]
    except (FileNotFoundError, ValueError):
        return ["all of them"]
    return [name for offsets in found for name, value in offsets.items() if value is None]


def _groups() -> tuple[Callable[[Btf], Offsets], ...]:
    of_sockets = (_descriptor, _v6only, _begun, _interface, _route, _labels, _group)
    return (*of_sockets, _packet, _tracked, _transformed, _routed, _mark)


def _file(btf: Btf) -> Offsets:
    references = btf.offset("file", "f_ref")
    return {
        "GRAFT_SK_SOCKET": btf.offset("sock", "sk_socket"),
        "GRAFT_SOCKET_FILE": btf.offset("socket", "file"),
        "GRAFT_FILE_EP": btf.offset("file", "f_ep"),
        "GRAFT_FILE_REFERENCES": btf.offset("file", "f_count") if references is None else references,
    }


def _descriptor(btf: Btf) -> Offsets:
    return {
        "GRAFT_TASK_FILES": btf.offset("task_struct", "files"),
        "GRAFT_TASK_PID": btf.offset("task_struct", "pid"),
        "GRAFT_TASK_TGID": btf.offset("task_struct", "tgid"),
        "GRAFT_TASK_COMM": btf.offset("task_struct", "comm"),
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
        "GRAFT_FILE_OPENER": btf.offset("file", "f_cred"),
        "GRAFT_OPENER_UID": btf.offset("cred", "fsuid"),
        "GRAFT_OPENER_GID": btf.offset("cred", "fsgid"),
    }


def _v6only(btf: Btf) -> Offsets:
    bit = btf.bit_offset("sock_common", "skc_ipv6only")
    return {
        "GRAFT_V6ONLY_BYTE": None if bit is None else bit // 8,
        "GRAFT_V6ONLY_MASK": None if bit is None else 1 << bit % 8,
        "GRAFT_SOCK_ADDR_SK": btf.offset("bpf_sock_addr_kern", "sk"),
    }


def _begun(btf: Btf) -> Offsets:
    return {"GRAFT_UDP_PENDING": btf.offset("udp_sock", "pending")}


def _interface(btf: Btf) -> Offsets:
    return {
        "GRAFT_UNICAST_INTERFACE": btf.offset("inet_sock", "uc_index"),
        "GRAFT_SOCK_INET6": btf.offset("inet_sock", "pinet6"),
        "GRAFT_UNICAST_INTERFACE6": btf.offset("ipv6_pinfo", "ucast_oif"),
        "GRAFT_PKTINFO_INTERFACE6": _nested(btf, "ipv6_pinfo.sticky_pktinfo", "in6_pktinfo.ipi6_ifindex"),
    }


def _route(btf: Btf) -> Offsets:
    return {
        "GRAFT_IP_OPTIONS": btf.offset("inet_sock", "inet_opt"),
        "GRAFT_IP_OPTIONS_ROUTE": _nested(btf, "ip_options_rcu.opt", "ip_options.srr"),
        "GRAFT_IP6_OPTIONS": btf.offset("ipv6_pinfo", "opt"),
        "GRAFT_IP6_OPTIONS_ROUTE": btf.offset("ipv6_txoptions", "srcrt"),
    }


def _labels(btf: Btf) -> Offsets:
    """Of the labels that a socket has leased: of struct inet_sock from 6.17 on, before of struct ipv6_pinfo."""
    of_socket = btf.offset("inet_sock", "ipv6_fl_list")
    if of_socket is not None:
        return {"GRAFT_FLOW_LABELS": of_socket}
    return {"GRAFT_FLOW_LABELS6": btf.offset("ipv6_pinfo", "ipv6_fl_list")}


def _packet(btf: Btf) -> Offsets:
    return {
        "GRAFT_SKB_SK": btf.offset("sk_buff", "sk"),
        "GRAFT_SOCK_NET": btf.offset("sock_common", "skc_net"),
        "GRAFT_NET_COOKIE": btf.offset("net", "net_cookie"),
    }


def _tracked(btf: Btf) -> Offsets:
    """Where the kernel has no type of a tracked connection (it is a module's), that is as all releases have had it: the
    program checks it.
    """
    tuples = btf.offset("nf_conn", "tuplehash")
    return {
        "GRAFT_SKB_TRACKED": btf.offset("sk_buff", "_nfct"),
        "GRAFT_TRACKED_TUPLES": 16 if tuples is None else tuples,
    }


def _transformed(btf: Btf) -> Offsets:
    return {
        "GRAFT_SKB_CONTROL": btf.offset("sk_buff", "cb"),
        "GRAFT_CONTROL_FLAGS4": btf.offset("inet_skb_parm", "flags"),
        "GRAFT_CONTROL_FLAGS6": btf.offset("inet6_skb_parm", "flags"),
    }


def _routed(btf: Btf) -> Offsets:
    return {
        "GRAFT_SKB_ROUTE": btf.offset("sk_buff", "_skb_refdst"),
        "GRAFT_ROUTE_FLAGS": btf.offset("rtable", "rt_flags"),
        "GRAFT_ROUTE6_FLAGS": btf.offset("rt6_info", "rt6i_flags"),
        "GRAFT_ROUTE6_PREFIX": btf.offset("rt6_info", "rt6i_dst"),
    }


def _mark(btf: Btf) -> Offsets:
    return {"GRAFT_NET_FWMARK_ACCEPT": _nested(btf, "net.ipv4", "netns_ipv4.sysctl_tcp_fwmark_accept")}


def _group(btf: Btf) -> Offsets:
    return {
        "GRAFT_SOCK_REUSEPORT": btf.offset("sock", "sk_reuseport_cb"),
        "GRAFT_SOCK_CGROUP": _nested(btf, "sock.sk_cgrp_data", "sock_cgroup_data.cgroup"),
        "GRAFT_GROUP_COUNT": btf.offset("sock_reuseport", "num_socks"),
        "GRAFT_GROUP_SOCKETS": btf.offset("sock_reuseport", "socks"),
        "GRAFT_CGROUP_SELF": btf.offset("cgroup", "self"),
        "GRAFT_CGROUP_PARENT": _nested(btf, "cgroup.self", "cgroup_subsys_state.parent"),
        "GRAFT_CGROUP_NODE": btf.offset("cgroup", "kn"),
        "GRAFT_NODE_ID": btf.offset("kernfs_node", "id"),
    }


def write_seq_offset() -> int | None:
    """The offset of tcp_sock.write_seq (bpf/relay.bpf.c); None where the kernel has no type information."""
    try:
        return _of_kernel().offset("tcp_sock", "write_seq")
    except (FileNotFoundError, ValueError):
        return None


def _of_kernel() -> Btf:
    """The kernel's type information. Raises FileNotFoundError where there is none, ValueError where it is of another
    form, and KernelError where it cannot be read now: without it other hooks would be loaded, and stay.
    """
    try:
        return Btf.of_kernel()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise KernelError(f"the kernel's type information cannot be read: {error.strerror}", "try again") from error


def _nested(btf: Btf, outer: str, inner: str) -> int | None:
    """The offset of a member of a structure (``inner``) that is itself one of another (``outer``)."""
    first, second = btf.offset(*outer.split(".")), btf.offset(*inner.split("."))
    return None if first is None or second is None else first + second


def _all_or_none(offsets: Offsets) -> dict[str, int]:
    known = {name: value for name, value in offsets.items() if value is not None}
    return known if len(known) == len(offsets) else {}
