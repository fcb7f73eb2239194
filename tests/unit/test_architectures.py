"""Every number and layout that Graft has from the kernel, against the headers of each architecture it knows.

Nothing is run: a compiler for the architecture looks at assertions (tests/support/cross.py). What is newer than
Debian 12's headers is defined here in the kernel's own words.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import re
import runpy
import socket
import struct
import sys
import termios
from pathlib import Path

import pytest

from graft.datapath.sources import bpf_source_dir
from graft.kernel import (
    bpf,
    bpf_load,
    bpf_maps,
    capabilities,
    epoll,
    helpers,
    instructions,
    keyring,
    mounts,
    netns,
    pidfd,
    process,
    seccomp,
    seccomp_filter,
    sockdiag,
    socket_calls,
    sockets,
    syscalls,
    tasks,
    tcp,
    terminal,
)
from graft.oci import state
from graft.splice import inbound
from graft.swap import socket_copy, supervisor
from tests.support.building import SOURCES
from tests.support.cross import COMPILERS, complaints, differences, members, packed_members, places
from tests.unit.test_layout import CONSTANTS, STRUCTS

AUDIT_ARCHES = {"x86_64": "AUDIT_ARCH_X86_64", "aarch64": "AUDIT_ARCH_AARCH64"}
LISTENER = seccomp.Listener(-1)
COMPILED = [
    file
    for folder in ("swap/compiled", "swap/compiled_waiter", "oci/compiled")
    for file in sorted((bpf_source_dir().parent / "graft" / folder).glob("*.c"))
]
C_PROGRAMS = [*sorted(SOURCES.glob("*.c")), SOURCES.parents[1] / "graft" / "bench" / "compiled" / "peer.c"]


@pytest.fixture(params=COMPILERS)
def machine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_wrong_value_is_noticed(machine: str) -> None:
    values = {"O_CLOEXEC": 0o2000000, "O_EXCL": 0o400, "sizeof(long)": 8, "__NR_bind": 1}
    assert differences(machine, ["asm/unistd.h", "fcntl.h"], values) == ["O_EXCL is not 256", "__NR_bind is not 1"]
    with pytest.raises(AssertionError, match="NO_SUCH_NAME"):
        differences(machine, [], {"NO_SUCH_NAME": 1})


def test_headers_are_those_of_the_architecture(machine: str) -> None:
    """A compiler that finds another machine's headers would agree with anything: these differ between the two."""
    apart = {
        "x86_64": {
            "O_DIRECTORY": 0o200000,
            "O_NOFOLLOW": 0o400000,
            "__NR_openat": 257,
            "sizeof(struct epoll_event)": 12,
        },
        "aarch64": {
            "O_DIRECTORY": 0o40000,
            "O_NOFOLLOW": 0o100000,
            "__NR_openat": 56,
            "sizeof(struct epoll_event)": 16,
        },
    }
    assert not differences(machine, ["asm/unistd.h", "fcntl.h", "sys/epoll.h"], apart[machine])


def test_the_architectures_are_those_that_graft_has_numbers_for() -> None:
    assert set(COMPILERS) == set(syscalls._TABLES) == set(seccomp_filter._ARCHES) == set(terminal.IOCTLS)


def test_system_calls_have_their_numbers(machine: str) -> None:
    numbers = syscalls._TABLES[machine] | syscalls._COMMON | seccomp_filter.architecture(machine)[1]
    assert not differences(machine, ["asm/unistd.h"], {f"__NR_{name}": number for name, number in numbers.items()})


def test_a_32_bit_python_has_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """uname(2) gives it the name of the kernel's architecture, whose numbers would be other calls there."""
    monkeypatch.setattr(sys, "maxsize", (1 << 31) - 1)
    there = runpy.run_path(syscalls.__file__)
    assert there["MACHINE"] == f"32-bit {platform.machine()}"
    with pytest.raises(OSError, match=there["MACHINE"]) as refused:
        there["number"]("bpf")
    assert refused.value.errno == errno.ENOSYS


def test_words_are_64_bits_the_lower_half_first(machine: str) -> None:
    # What is read of a notification's arguments, of descriptor bit maps (bpf/desk.bpf.c) and of BTF relies on it.
    assert not differences(
        machine, ["limits.h"], {"__BYTE_ORDER__": 1234, "sizeof(void *)": 8, "sizeof(long)": 8, "sizeof(int)": 4}
    )


def test_the_seccomp_filter_is_written_as_the_kernel_reads_it(machine: str) -> None:
    program = list(struct.iter_unpack("=HBBI", seccomp_filter.swap_filter(machine)))
    values = {
        AUDIT_ARCHES[machine]: program[1][3],
        "__builtin_offsetof(struct seccomp_data, arch)": program[0][3],
        "__builtin_offsetof(struct seccomp_data, nr)": program[2][3],
        "sizeof(((struct seccomp_data *)0)->nr)": 4,
        "BPF_LD | BPF_W | BPF_ABS": program[0][0],
        "BPF_JMP | BPF_JEQ | BPF_K": program[1][0],
        "BPF_RET | BPF_K": program[-1][0],
        "SECCOMP_RET_ALLOW": program[-2][3],
        "SECCOMP_RET_USER_NOTIF": program[-1][3],
        "sizeof(struct sock_filter)": 8,
        **members("struct sock_fprog", seccomp._FilterProgram),
    }
    assert not differences(machine, ["linux/seccomp.h", "linux/filter.h", "linux/audit.h"], values)


def test_the_filter_for_terminals_is_written_as_the_kernel_reads_it(machine: str) -> None:
    native, compat = terminal.IOCTLS[machine].items()
    values = {
        AUDIT_ARCHES[machine]: native[0],
        "__NR_ioctl": native[1][0],
        {"x86_64": "AUDIT_ARCH_I386", "aarch64": "AUDIT_ARCH_ARM"}[machine]: compat[0],
        "TIOCSTI": terminal.TIOCSTI,
        "TIOCLINUX": terminal.TIOCLINUX,
        "__builtin_offsetof(struct seccomp_data, nr)": terminal._NR,
        "__builtin_offsetof(struct seccomp_data, arch)": terminal._ARCH,
        "__builtin_offsetof(struct seccomp_data, args[1])": terminal._REQUEST,
        "BPF_LD | BPF_W | BPF_ABS": terminal._LOAD,
        "BPF_JMP | BPF_JEQ | BPF_K": terminal._JUMP_IF_EQUAL,
        "BPF_RET | BPF_K": terminal._RETURN,
        "SECCOMP_RET_ALLOW": terminal._RET_ALLOW,
        "SECCOMP_RET_ERRNO": terminal._RET_ERRNO,
        "EPERM": errno.EPERM,
    }
    if machine == "x86_64":
        values["__X32_SYSCALL_BIT"] = terminal._X32
    headers = ["asm/unistd.h", "asm/ioctls.h", "errno.h", "linux/seccomp.h", "linux/filter.h", "linux/audit.h"]
    assert not differences(machine, headers, values)


def test_seccomp_notifications_are_read_and_answered_as_the_kernel_lays_them_out(machine: str) -> None:
    newer = """
    #ifndef SECCOMP_IOCTL_NOTIF_SET_FLAGS /* 6.6 */
    #define SECCOMP_IOCTL_NOTIF_SET_FLAGS SECCOMP_IOW(4, __u64)
    #define SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP (1UL << 0)
    #endif
    """
    notification = ("id", "pid", "data.nr", "data.arch", "data.args[0]!", "data.args[1]", "data.args[2]!")
    values = {
        "SECCOMP_SET_MODE_FILTER": seccomp._SET_MODE_FILTER,
        "SECCOMP_FILTER_FLAG_NEW_LISTENER": seccomp._FLAG_NEW_LISTENER,
        "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV": seccomp._FLAG_WAIT_KILLABLE_RECV,
        "SECCOMP_USER_NOTIF_FLAG_CONTINUE": seccomp._USER_NOTIF_FLAG_CONTINUE,
        "SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP": seccomp._FD_SYNC_WAKE_UP,
        "SECCOMP_ADDFD_FLAG_SETFD": seccomp._ADDFD_FLAG_SETFD,
        "SECCOMP_IOCTL_NOTIF_RECV": seccomp._NOTIF_RECV,
        "SECCOMP_IOCTL_NOTIF_SEND": seccomp._NOTIF_SEND,
        "SECCOMP_IOCTL_NOTIF_ID_VALID": seccomp._NOTIF_ID_VALID,
        "SECCOMP_IOCTL_NOTIF_ADDFD": seccomp._NOTIF_ADDFD,
        "SECCOMP_IOCTL_NOTIF_SET_FLAGS": seccomp._NOTIF_SET_FLAGS,
        "sizeof(struct seccomp_notif)": LISTENER.SIZE,
        "sizeof(struct seccomp_notif_resp)": len(LISTENER._response),
        "sizeof(struct seccomp_notif_addfd)": len(LISTENER._addfd),
        **packed_members("struct seccomp_notif", seccomp._NOTIF, notification),
        **packed_members("struct seccomp_notif_resp", seccomp._RESP, ("id", "val", "error", "flags")),
        **packed_members(
            "struct seccomp_notif_addfd", seccomp._ADDFD, ("id", "flags", "srcfd", "newfd", "newfd_flags")
        ),
    }
    assert seccomp._NOTIF.size == LISTENER.SIZE
    assert not differences(machine, ["linux/seccomp.h", "sys/ioctl.h"], values, before=newer)


def test_an_epoll_event_is_packed_where_the_kernel_packs_it(machine: str) -> None:
    event = epoll.event_type(machine)
    values = {
        "EPOLL_CTL_ADD": epoll._CTL_ADD,
        "sizeof(struct epoll_event)": struct.calcsize("=IQ") if machine == "x86_64" else struct.calcsize("@IQ"),
        **members("struct epoll_event", event),
    }
    assert not differences(machine, ["sys/epoll.h"], values)


def test_bpf_has_the_kernels_numbers_and_layouts(machine: str) -> None:
    odd_names = {
        "skb_ingress": "BPF_CGROUP_INET_INGRESS",
        "skb_egress": "BPF_CGROUP_INET_EGRESS",
        "sock_create": "BPF_CGROUP_INET_SOCK_CREATE",
        "sock_ops": "BPF_CGROUP_SOCK_OPS",
        "sk_skb_stream_verdict": "BPF_SK_SKB_STREAM_VERDICT",
        "sendmsg4": "BPF_CGROUP_UDP4_SENDMSG",
        "sendmsg6": "BPF_CGROUP_UDP6_SENDMSG",
        "recvmsg4": "BPF_CGROUP_UDP4_RECVMSG",
        "recvmsg6": "BPF_CGROUP_UDP6_RECVMSG",
        "setsockopt": "BPF_CGROUP_SETSOCKOPT",
        **{f"post_bind{family}": f"BPF_CGROUP_INET{family}_POST_BIND" for family in (4, 6)},
    }
    attach_types = {
        odd_names.get(name, f"BPF_CGROUP_INET{name[-1]}_{name[:-1].upper()}"): number
        for name, number in bpf.ATTACH_TYPES.items()
    }
    query = {name: f"query.{name}" for name, *_ in bpf._QueryAttr._fields_} | {"pad": ""}
    info = {name: f"info.{name}" for name, *_ in bpf._InfoAttr._fields_}
    log = {"log": "btf_log_buf", "log_size": "btf_log_size", "log_level": "btf_log_level"}
    head = {"lengths": "", "instructions": "", "uid": "created_by_uid", "maps": "nr_map_ids"}
    values = {
        "BPF_MAP_CREATE": bpf_maps._MAP_CREATE,
        "BPF_BTF_LOAD": bpf_maps._BTF_LOAD,
        "BPF_BTF_GET_FD_BY_ID": bpf_maps._BTF_GET_FD_BY_ID,
        "BPF_MAP_TYPE_ARRAY": bpf_maps._ARRAY,
        "BPF_MAP_TYPE_ARRAY_OF_MAPS": bpf_maps._ARRAY_OF_MAPS,
        "BPF_MAP_LOOKUP_ELEM": bpf._MAP_LOOKUP_ELEM,
        "BPF_MAP_UPDATE_ELEM": bpf._MAP_UPDATE_ELEM,
        "BPF_MAP_DELETE_ELEM": bpf._MAP_DELETE_ELEM,
        "BPF_MAP_GET_NEXT_KEY": bpf._MAP_GET_NEXT_KEY,
        "BPF_PROG_LOAD": bpf_load._PROG_LOAD,
        "BPF_OBJ_PIN": bpf._OBJ_PIN,
        "BPF_OBJ_GET": bpf._OBJ_GET,
        "BPF_PROG_ATTACH": bpf._PROG_ATTACH,
        "BPF_PROG_DETACH": bpf._PROG_DETACH,
        "BPF_PROG_GET_FD_BY_ID": bpf._PROG_GET_FD_BY_ID,
        "BPF_OBJ_GET_INFO_BY_FD": bpf._OBJ_GET_INFO_BY_FD,
        "BPF_PROG_QUERY": bpf._PROG_QUERY,
        "BPF_F_ALLOW_MULTI": bpf.ALLOW_MULTI,
        "BPF_F_QUERY_EFFECTIVE": bpf.QUERY_EFFECTIVE,
        "BPF_PROG_TYPE_CGROUP_SOCK": bpf.PROG_CGROUP_SOCK,
        "BPF_PROG_TYPE_SOCK_OPS": bpf.PROG_SOCK_OPS,
        "BPF_PROG_TYPE_SK_SKB": bpf.PROG_SK_SKB,
        "BPF_PROG_TYPE_CGROUP_SOCK_ADDR": bpf.PROG_CGROUP_SOCK_ADDR,
        "BPF_PROG_TYPE_CGROUP_SOCKOPT": bpf.PROG_CGROUP_SOCKOPT,
        **attach_types,
        **{f"BPF_FUNC_{name}": number for name, number in helpers.HELPERS.items()},
        "BPF_JMP | BPF_CALL": instructions.CALL,
        "BPF_ALU64 | BPF_MOV | BPF_K": instructions.MOVE,
        "BPF_JMP | BPF_EXIT": instructions.EXIT,
        "BPF_LD | BPF_DW | BPF_IMM": instructions._WIDE,
        "sizeof(struct bpf_insn)": instructions.INSTRUCTION.size,
        **members("union bpf_attr", bpf._ElemAttr, {"pad": ""}),
        **members("union bpf_attr", bpf_maps._CreateAttr),
        **members("union bpf_attr", bpf_maps._BtfLoadAttr, log),
        **members("union bpf_attr", bpf_maps._BtfIdAttr, {"id": "btf_id"}),
        **members("union bpf_attr", bpf._ObjAttr),
        **members("union bpf_attr", bpf._AttachAttr),
        **members("union bpf_attr", bpf._QueryAttr, query),
        **members("union bpf_attr", bpf._InfoAttr, info),
        **members("union bpf_attr", bpf._IdAttr, {"id": "prog_id"}),
        **members("union bpf_attr", bpf_load._LoadAttr),
        **members("struct bpf_prog_info", bpf._ProgInfo, head),
        **members("struct bpf_map_info", bpf_maps._MapInfo),
        **members("struct bpf_btf_info", bpf_maps._BtfInfo),
        "BPF_PSEUDO_MAP_FD": instructions._MAPS[0],
        "BPF_PSEUDO_MAP_VALUE": instructions._MAPS[1],
    }
    assert not differences(machine, ["linux/bpf.h"], values)


def test_namespaces_processes_and_mounts_have_the_kernels_numbers(machine: str) -> None:
    values = {
        "CLONE_NEWNET": netns.CLONE_NEWNET,
        "SO_NETNS_COOKIE": netns.SO_NETNS_COOKIE,
        "MS_BIND": netns._MS_BIND,
        "MNT_DETACH": netns._MNT_DETACH,
        "SIOCGIFFLAGS": netns._SIOCGIFFLAGS,
        "SIOCSIFFLAGS": netns._SIOCSIFFLAGS,
        "IFF_UP": netns._IFF_UP,
        "sizeof(struct ifreq)": netns._IFREQ.size,
        "__builtin_offsetof(struct ifreq, ifr_flags)": 16,
        "MS_NOSUID | MS_NODEV | MS_NOEXEC": mounts._MS_NOSUID_NODEV_NOEXEC,
        "O_EXCL": pidfd.PIDFD_THREAD,  # what linux/pidfd.h defines it as, from 6.9 on
        "sizeof(struct iovec)": 16,
        "__builtin_offsetof(struct iovec, iov_len)": pidfd._Iovec.len.offset,
        "PR_SET_NAME": process._PR_SET_NAME,
        "PR_CAPBSET_DROP": capabilities._PR_CAPBSET_DROP,
        "PR_CAP_AMBIENT": capabilities._PR_CAP_AMBIENT,
        "PR_CAP_AMBIENT_LOWER": capabilities._PR_CAP_AMBIENT_LOWER,
        "PR_CAP_AMBIENT_CLEAR_ALL": capabilities._PR_CAP_AMBIENT_CLEAR_ALL,
        "CAP_NET_ADMIN": capabilities.CAP_NET_ADMIN,
        "_LINUX_CAPABILITY_VERSION_3": capabilities._VERSION_3,
        "_LINUX_CAPABILITY_U32S_3": 2,
        "KEYCTL_JOIN_SESSION_KEYRING": keyring._JOIN_SESSION_KEYRING,
        "KCMP_FILES": tasks._KCMP_FILES,
        "F_SETSIG": socket_copy._F_SETSIG,
        "F_GETSIG": socket_copy._F_GETSIG,
        "F_SETOWN_EX": socket_copy._F_SETOWN_EX,
        "F_GETOWN_EX": socket_copy._F_GETOWN_EX,
        "sizeof(struct f_owner_ex)": 8,
        **packed_members("struct ucred", state._UCRED, ("pid", "uid", "gid")),
        **members("struct __user_cap_header_struct", capabilities._Header),
        **members("struct __user_cap_data_struct", capabilities._Sets),
    }
    headers = [
        "sched.h",
        "sys/socket.h",
        "sys/mount.h",
        "fcntl.h",
        "sys/uio.h",
        "sys/prctl.h",
        "sys/ioctl.h",
        "net/if.h",
    ]
    more = ["net/if.h", "linux/capability.h", "linux/keyctl.h", "linux/kcmp.h"]
    assert not differences(machine, [*headers, *more], values)


def test_the_socket_options_that_are_copied_have_their_numbers(machine: str) -> None:
    names = (
        "REUSEADDR DONTROUTE BROADCAST KEEPALIVE OOBINLINE NO_CHECK LINGER REUSEPORT RCVLOWAT RCVTIMEO_OLD "
        "SNDTIMEO_OLD TIMESTAMP_OLD TIMESTAMPNS_OLD TIMESTAMPING_OLD RXQ_OVFL PEEK_OFF SELECT_ERR_QUEUE "
        "MAX_PACING_RATE INCOMING_CPU ZEROCOPY TIMESTAMP_NEW TIMESTAMPNS_NEW TIMESTAMPING_NEW RCVTIMEO_NEW "
        "SNDTIMEO_NEW BUF_LOCK TXREHASH"
    )
    values = {
        **{f"SO_{name}": number for name, number in zip(names.split(), sorted(socket_copy._UNCHANGED[1]), strict=True)},
        "SOL_SOCKET": socket_copy.SOL_SOCKET,
        "SO_SNDBUF": socket_copy._SNDBUF,
        "SO_RCVBUF": socket_copy._RCVBUF,
        "SO_SNDBUFFORCE": socket_copy._SNDBUFFORCE,
        "SO_RCVBUFFORCE": socket_copy._RCVBUFFORCE,
        "SO_PRIORITY": socket_copy._PRIORITY,
        "SO_ATTACH_FILTER": socket_calls.SO_ATTACH_FILTER,
        "SO_LOCK_FILTER": socket_calls.SO_LOCK_FILTER,
        "SO_GET_FILTER": socket_calls._SO_GET_FILTER,
        "sizeof(struct sock_filter)": socket_calls._INSTRUCTION_SIZE,
        "SO_COOKIE": tcp.SO_COOKIE,
        "TIOCOUTQ": termios.TIOCOUTQ,
        "SIOCOUTQ": termios.TIOCOUTQ,
        **members("struct sock_fprog", socket_calls.FilterProgram),
    }
    assert not differences(machine, ["asm/socket.h", "linux/filter.h", "asm/ioctls.h", "linux/sockios.h"], values)


def test_protocols_and_their_structures_are_the_kernels(machine: str) -> None:
    (acked, _), (received, _) = places(tcp._ACKED_AND_RECEIVED)
    identity = [f"id.idiag_{name}" for name in ("sport", "dport", "src", "dst", "if", "cookie[0]", "cookie[1]")]
    before, after = ("family", "state", "timer", "retrans"), ("expires", "rqueue", "wqueue", "uid", "inode")
    diag = [*(f"idiag_{name}" for name in before), *identity, *(f"idiag_{name}" for name in after)]
    netlink = [f"nlmsg_{name}" for name in ("len", "type", "flags", "seq", "pid")]
    values = {
        "AF_INET": socket_copy.AF_INET,
        "AF_INET6": socket_copy.AF_INET6,
        "SOCK_STREAM": socket_copy.SOCK_STREAM,
        "TCP_CONGESTION": socket_copy._TCP_CONGESTION,
        "IPV6_V6ONLY": socket_copy.IPV6_V6ONLY,
        "IPPROTO_MPTCP": supervisor._IPPROTO_MPTCP,
        "IPPROTO_MPTCP + 0": sockdiag.IPPROTO_MPTCP,
        "IPPROTO_TCP": socket.IPPROTO_TCP,
        "IP_BIND_ADDRESS_NO_PORT": inbound.IP_BIND_ADDRESS_NO_PORT,
        "sizeof(struct sockaddr_in6)": socket_calls.SOCKADDR_SIZE,
        "__builtin_offsetof(struct sockaddr_in6, sin6_addr)": 8,
        "__builtin_offsetof(struct tcp_info, tcpi_bytes_acked)": acked,
        "__builtin_offsetof(struct tcp_info, tcpi_bytes_received)": received,
        "NETLINK_SOCK_DIAG": sockdiag.NETLINK_SOCK_DIAG,
        "SOCK_DIAG_BY_FAMILY": sockdiag._SOCK_DIAG_BY_FAMILY,
        "SOCK_DESTROY": sockdiag._SOCK_DESTROY,
        "NLMSG_ERROR": sockdiag._NLMSG_ERROR,
        "NLMSG_DONE": sockdiag._NLMSG_DONE,
        "NLM_F_REQUEST | NLM_F_DUMP": sockdiag._REQUEST_DUMP,
        "NLM_F_REQUEST | NLM_F_ACK": sockdiag._REQUEST_ACK,
        "NLA_F_NESTED": sockdiag._NESTED,
        "INET_DIAG_SKV6ONLY": sockdiag._SKV6ONLY,
        "INET_DIAG_SK_BPF_STORAGES": sockdiag._SK_BPF_STORAGES,
        "INET_DIAG_REQ_SK_BPF_STORAGES": sockdiag._REQUEST_STORAGES,
        "INET_DIAG_REQ_PROTOCOL": sockdiag._REQUEST_PROTOCOL,
        "INET_DIAG_REQ_BYTECODE": sockdiag._REQUEST_BYTECODE,
        "INET_DIAG_BC_JMP": sockdiag._BC_JMP,
        "INET_DIAG_BC_S_COND": sockdiag._BC_S_COND,
        "INET_DIAG_BC_CGROUP_COND": sockdiag._BC_CGROUP_COND,
        "sizeof(struct inet_diag_bc_op)": sockdiag._OPERATION.size,
        "sizeof(struct inet_diag_hostcond)": sockdiag._HOST.size,
        "SO_COOKIE": sockets._SO_COOKIE,
        "SO_BINDTOIFINDEX": sockets._SO_BINDTOIFINDEX,
        "SK_DIAG_BPF_STORAGE_REQ_MAP_FD": sockdiag._STORAGE_MAP,
        "SK_DIAG_BPF_STORAGE_MAP_VALUE": sockdiag._STORAGE_VALUE,
        "INET_DIAG_CGROUP_ID": sockdiag._CGROUP_ID,
        "sizeof(struct inet_diag_req_v2)": sockdiag._REQUEST.size,
        "__builtin_offsetof(struct inet_diag_msg, id)": sockdiag._IDENTITY.start,
        "sizeof(struct inet_diag_sockid)": sockdiag._IDENTITY.stop - sockdiag._IDENTITY.start,
        "__builtin_offsetof(struct inet_diag_sockid, idiag_dport)": sockdiag._REMOTE_PORT.start,
        "__builtin_offsetof(struct inet_diag_sockid, idiag_cookie)": 40,
        "sizeof(struct inet_diag_msg)": sockdiag._MESSAGE.size,
        "BPF_TCP_LISTEN": sockdiag._TCP_LISTEN,
        **packed_members("struct nlmsghdr", sockdiag._HEADER, netlink),
        **packed_members("struct nlattr", sockdiag._ATTRIBUTE, ("nla_len", "nla_type")),
        **packed_members("struct inet_diag_msg", sockdiag._MESSAGE, diag),
    }
    headers = ["netinet/in.h", "sys/socket.h", "linux/tcp.h", "linux/netlink.h", "linux/sock_diag.h"]
    assert not differences(machine, [*headers, "linux/inet_diag.h", "linux/bpf.h"], values)


def test_the_numbers_that_the_bpf_programs_define_themselves_are_the_kernels(machine: str) -> None:
    """They have no headers but their own: what they call by a name of the kernel's is written down in them."""
    ours = re.compile(r"GRAFT_|SK_STORAGE|PASS|REFUSE")
    values = {
        name: int(number, 8 if number.startswith("0") and number != "0" else 10)
        for file in sorted(bpf_source_dir().glob("*.bpf.c"))
        for name, number in re.findall(r"^#define (\w+) (\d+)$", file.read_text(), re.M)
        if not ours.match(name)
    }
    assert {"O_CLOEXEC", "EACCES", "SO_BINDTOIFINDEX", "IPPROTO_MPTCP", "AF_INET6"} <= set(values)
    kernels_only = {
        name: values.pop(name) for name in ("IPV6_FLOWLABEL_MGR",)
    }  # in6.h hides it where libc's is read too
    headers = ["fcntl.h", "errno.h", "sys/socket.h", "asm/socket.h", "netinet/in.h", "netinet/tcp.h", "linux/icmp.h"]
    headers += ["linux/icmpv6.h", "linux/if_packet.h"]
    assert not differences(machine, headers, values)
    assert not differences(machine, ["linux/in6.h"], kernels_only)


def test_the_structures_of_the_bpf_programs_are_laid_out_as_python_has_them(machine: str) -> None:
    values = dict(CONSTANTS)
    for name, python in STRUCTS.items():
        values |= members(f"struct {name}", python)
        values[f"sizeof(struct {name})"] = ctypes.sizeof(python)
    assert not differences(machine, ["linux/types.h", "graft.h"], values, f"-I{bpf_source_dir()}")


@pytest.mark.parametrize("file", C_PROGRAMS, ids=lambda file: file.stem)
def test_the_c_programs_of_tests_and_benchmark_compile(machine: str, file: Path) -> None:
    assert not complaints(machine, file.read_text(), "-pthread", "-I", file.parent)


@pytest.mark.parametrize("file", [file for file in COMPILED if file.name != "module.c"], ids=lambda file: file.stem)
def test_the_compiled_part_compiles(machine: str, file: Path) -> None:
    """All but what speaks to Python, whose headers are there for one architecture only."""
    assert not complaints(machine, file.read_text(), "-Wextra", "-I", bpf_source_dir(), "-I", file.parent)
