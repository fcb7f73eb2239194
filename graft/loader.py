"""Compile the BPF programs with bcc, load them, and pin them with their maps.

The only module that imports bcc. It runs once, in `graft up`; every later command opens the pins.
bcc finds no kernel headers and needs none: BCC_KERNEL_SOURCE names our own tree, bpf/include.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.data import bpf_source_dir
from graft.errors import KernelError
from graft.kernel import bpf
from graft.kernel.btf import Btf

MAPS = (
    "settings",
    "endpoints",
    "endpoint_names",
    "containers",
    "scopes",
    "ingress",
    "egress",
    "egress_ports",
    "tags",
    "options",
    "relays",
    "arrivals",
    "crossings",
    "counters",
    "desks",
    "desk_slots",
)


@dataclass(frozen=True, slots=True)
class Program:
    """A function of the BPF sources and where it goes."""

    name: str
    type: int
    attach: str

    @property
    def function(self) -> str:
        """Its name in C."""
        return f"graft_{self.name}"


def _programs() -> tuple[Program, ...]:
    addr = ("bind", "connect", "sendmsg", "getsockname")
    found = [
        Program(f"{name}{family}", bpf.PROG_CGROUP_SOCK_ADDR, f"{name}{family}") for name in addr for family in (4, 6)
    ]
    found += [Program(f"post_bind{family}", bpf.PROG_CGROUP_SOCK, f"post_bind{family}") for family in (4, 6)]
    found.append(Program("setsockopt", bpf.PROG_CGROUP_SOCKOPT, "setsockopt"))
    found.append(Program("sock_ops", bpf.PROG_SOCK_OPS, "sock_ops"))
    return tuple(found)


PROGRAMS = _programs()

# For the cgroups of Graft's own processes.
OWN_PROGRAMS = (Program("sock_create", bpf.PROG_CGROUP_SOCK, "sock_create"),)

# Those of the splice transport, for its containers' cgroups and the relays' own.
SPLICE_PROGRAMS = (
    Program("splice", bpf.PROG_SOCK_OPS, "sock_ops"),
    Program("getpeername4", bpf.PROG_CGROUP_SOCK_ADDR, "getpeername4"),
    Program("getpeername6", bpf.PROG_CGROUP_SOCK_ADDR, "getpeername6"),
)

# One text in this order: what it is about and the maps first, then a file for each kind of hook.
SOURCES = (
    "graft.bpf.c",
    "owner.bpf.c",
    "rules.bpf.c",
    "bind.bpf.c",
    "connect.bpf.c",
    "desk.bpf.c",
    "sockname.bpf.c",
    "options.bpf.c",
    "listen.bpf.c",
    "splice.bpf.c",
)

# The relay in the kernel, a text of its own: where it does not load, all else does.
RELAY_MAPS = ("flow_targets", "flow_sources", "flows", "flow_taken", "flow_events")
RELAY_PROGRAM = Program("flow", bpf.PROG_SK_SKB, "sk_skb_stream_verdict")
RELAY_SOURCES = ("relay.bpf.c",)
FLOW_EVENT_PAGES = 256
RELAY_SIZES = {
    "GRAFT_MAX_FLOWS": 65536,
    "GRAFT_MAX_BEHIND": 1 << 20,
    "GRAFT_FLOW_EVENT_PAGES": FLOW_EVENT_PAGES,
}

SIZES = {
    "GRAFT_MAX_ENDPOINTS": 4096,
    "GRAFT_MAX_CONTAINERS": 8192,
    "GRAFT_MAX_RULES": 262144,
    "GRAFT_MAX_COUNTERS": 65536,
    "GRAFT_MAX_ARRIVALS": 65536,
    "GRAFT_MAX_DESKS": 8192,
}

# Features that a kernel may lack, newest first; each is tried, and done without where loading fails.
OPTIONAL = ("GRAFT_HAVE_MPTCP", "GRAFT_HAVE_SET_RETVAL")


def probe_offsets() -> dict[str, int]:
    """Where the kernel keeps what the probe of a socket's file reads; empty where it does not tell."""
    try:
        btf = Btf.of_kernel()
    except (OSError, ValueError):
        return {}
    references = btf.offset("file", "f_ref")
    offsets = {
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
    return {**_all_or_none(offsets), **_all_or_none(descriptor)} if _all_or_none(offsets) else {}


def _all_or_none(offsets: Mapping[str, int | None]) -> dict[str, int]:
    known = {name: value for name, value in offsets.items() if value is not None}
    return known if len(known) == len(offsets) else {}


@contextlib.contextmanager
def _stderr_kept() -> Iterator[list[str]]:
    """What the compiler and the verifier, which are C++ and write to descriptor 2, have to say."""
    said: list[str] = []
    sys.stderr.flush()
    saved = os.dup(2)
    with open(os.memfd_create("graft-compiler"), "w+b", buffering=0) as held:
        os.dup2(held.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            held.seek(0)
            said.append(held.read().decode(errors="replace"))


class Loaded:
    """The programs and maps of one compilation, alive as long as this object."""

    def __init__(
        self, module: Any, functions: dict[str, int], maps: Sequence[str], features: frozenset[str] = frozenset()
    ) -> None:
        self._module = module
        self.programs = functions
        self.maps = maps
        self.features = features

    def map_fd(self, name: str) -> int:
        """The descriptor of a map; it stays bcc's."""
        from bcc import lib

        return int(lib.bpf_table_fd(self._module.module, name.encode()))

    def pin(self, folder: Path) -> None:
        """Pin every map and program below ``folder``, which must be a new folder of a bpffs."""
        for name in self.maps:
            bpf.obj_pin(self.map_fd(name), folder / name)
        for name, fd in self.programs.items():
            bpf.obj_pin(fd, folder / f"prog_{name}")


def _compile(sources: Sequence[str], programs: Sequence[Program], flags: list[str]) -> tuple[Any, dict[str, int]]:
    source = bpf_source_dir()
    os.environ["BCC_KERNEL_SOURCE"] = str(source)
    from bcc import BPF

    cflags = [*flags, f"-I{source}", "-Wno-unused-value"]
    # One text: bcc rewrites map accesses only in the file that it was given, not in what that includes.
    text = "\n".join(f'#line 1 "{name}"\n{(source / name).read_text()}' for name in sources)
    module = BPF(text=text.encode(), cflags=cflags)
    fds = {}
    for program in programs:
        attach_type = bpf.ATTACH_TYPES[program.attach]
        fds[program.name] = module.load_func(program.function.encode(), program.type, attach_type=attach_type).fd
    return module, fds


def load() -> Loaded:
    """Compile and load, with every feature that this kernel has.

    Raises KernelError, with the last lines of the verifier's log, where not even the plain programs load,
    or where bcc is missing.
    """
    sizes = [f"-D{name}={value}" for name, value in SIZES.items()]
    offsets = [f"-D{name}={value}" for name, value in probe_offsets().items()]
    attempts = [(tuple(OPTIONAL[index:]), probe) for index in range(len(OPTIONAL) + 1) for probe in (offsets, [])]
    if _bcc_is_missing():
        raise KernelError("bcc is not installed for this Python", "apt-get install python3-bpfcc")
    for features, probe in attempts:
        with contextlib.suppress(Exception), _stderr_kept() as complaints:
            flags = [*sizes, *probe, *(f"-D{name}" for name in features)]
            module, fds = _compile(SOURCES, (*PROGRAMS, *OWN_PROGRAMS, *SPLICE_PROGRAMS), flags)
            return Loaded(module, fds, MAPS, frozenset(features) | ({"GRAFT_PROBE"} if probe else frozenset()))
    raise KernelError(
        f"the kernel does not take the BPF programs\n{_last_lines(complaints)}", "graft doctor tells what is missing"
    )


def load_relay(sizes: Mapping[str, int] = RELAY_SIZES) -> Loaded:
    """Compile and load the relay in the kernel; its program is attached to its map.

    Raises KernelError where this kernel has no sockmap, or does not tell where it keeps what is to be counted.
    """
    if _bcc_is_missing():
        raise KernelError("bcc is not installed for this Python", "apt-get install python3-bpfcc")
    try:
        write_seq = Btf.of_kernel().offset("tcp_sock", "write_seq")
    except (OSError, ValueError):
        write_seq = None
    if write_seq is None:
        raise KernelError("the kernel has no type information for struct tcp_sock")
    flags = [f"-D{name}={value}" for name, value in {**sizes, "GRAFT_TCP_WRITE_SEQ": write_seq}.items()]
    with contextlib.suppress(Exception), _stderr_kept() as complaints:
        module, fds = _compile(RELAY_SOURCES, [RELAY_PROGRAM], flags)
        loaded = Loaded(module, fds, RELAY_MAPS)
        attach_type = bpf.ATTACH_TYPES[RELAY_PROGRAM.attach]
        bpf.prog_attach_map(loaded.map_fd("flow_sources"), fds[RELAY_PROGRAM.name], attach_type)
        return loaded
    raise KernelError(f"the kernel does not take the relay's program\n{_last_lines(complaints)}")


def _last_lines(complaints: list[str]) -> str:
    return "\n".join(complaints[-1].splitlines()[-30:])


def _bcc_is_missing() -> bool:
    try:
        import bcc  # noqa: F401
    except ImportError:
        return True
    return False


def layouts(loaded: Loaded) -> dict[str, tuple[type[ctypes.Structure], type[ctypes.Structure]]]:
    """The key and value types that bcc made of the C structures, for the test that compares layouts."""
    found = {}
    names = ("endpoints", "endpoint_names", "containers", "ingress", "egress", "egress_ports", "counters")
    for name in (*names, "relays", "arrivals"):
        table = loaded._module[name.encode()]
        found[name] = (table.Key, table.Leaf)
    return found
