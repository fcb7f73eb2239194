"""bpf(2): entries of maps, pins, attachments. (bpf_load.py loads programs, bpf_maps.py makes maps.)

Sources: bpf(2); include/uapi/linux/bpf.h (commands, `union bpf_attr`, attach types). The first three
commands are on the path of every swapped socket, so a map keeps its attribute block and buffers.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Generic, TypeVar, cast

from graft.kernel.syscalls import number, syscall

_libc = ctypes.CDLL(None, use_errno=True)

# enum bpf_cmd
_MAP_LOOKUP_ELEM, _MAP_UPDATE_ELEM, _MAP_DELETE_ELEM, _MAP_GET_NEXT_KEY = 1, 2, 3, 4
_OBJ_PIN, _OBJ_GET, _PROG_ATTACH, _PROG_DETACH = 6, 7, 8, 9
_MAP_LOOKUP_AND_DELETE_BATCH = 25  # since 5.6
_MAP_GET_NEXT_ID, _PROG_GET_FD_BY_ID, _OBJ_GET_INFO_BY_FD, _PROG_QUERY = 12, 13, 15, 16

ALLOW_MULTI = 2
_REPLACE = 4  # BPF_F_REPLACE, since 5.6
_NOEXIST = 1  # BPF_NOEXIST
_AT_ONCE = 8192
QUERY_EFFECTIVE = 1
_MOST_MAPS = 64  # MAX_USED_MAPS: of one program

# enum bpf_attach_type
ATTACH_TYPES = {
    "skb_ingress": 0,
    "skb_egress": 1,
    "sock_create": 2,
    "sock_ops": 3,
    "sk_skb_stream_verdict": 5,
    "bind4": 8,
    "bind6": 9,
    "connect4": 10,
    "connect6": 11,
    "post_bind4": 12,
    "post_bind6": 13,
    "sendmsg4": 14,
    "sendmsg6": 15,
    "setsockopt": 22,
    "recvmsg4": 19,
    "recvmsg6": 20,
    "getpeername4": 29,
    "getpeername6": 30,
    "getsockname4": 31,
    "getsockname6": 32,
}
CGROUP_ATTACH_TYPES = tuple(number for name, number in ATTACH_TYPES.items() if not name.startswith("sk_skb"))

# enum bpf_prog_type
PROG_CGROUP_SKB = 8
PROG_CGROUP_SOCK, PROG_SOCK_OPS, PROG_SK_SKB, PROG_CGROUP_SOCK_ADDR, PROG_CGROUP_SOCKOPT = 9, 13, 14, 18, 25


class _ElemAttr(ctypes.Structure):
    _fields_ = (
        ("map_fd", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("key", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
    )


class _BatchAttr(ctypes.Structure):
    _fields_ = (
        ("in_batch", ctypes.c_uint64),
        ("out_batch", ctypes.c_uint64),
        ("keys", ctypes.c_uint64),
        ("values", ctypes.c_uint64),
        ("count", ctypes.c_uint32),
        ("map_fd", ctypes.c_uint32),
        ("elem_flags", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
    )


class _ObjAttr(ctypes.Structure):
    _fields_ = (("pathname", ctypes.c_uint64), ("bpf_fd", ctypes.c_uint32), ("file_flags", ctypes.c_uint32))


class _AttachAttr(ctypes.Structure):
    _fields_ = (
        ("target_fd", ctypes.c_uint32),
        ("attach_bpf_fd", ctypes.c_uint32),
        ("attach_type", ctypes.c_uint32),
        ("attach_flags", ctypes.c_uint32),
        ("replace_bpf_fd", ctypes.c_uint32),
    )


class _QueryAttr(ctypes.Structure):
    _fields_ = (
        ("target_fd", ctypes.c_uint32),
        ("attach_type", ctypes.c_uint32),
        ("query_flags", ctypes.c_uint32),
        ("attach_flags", ctypes.c_uint32),
        ("prog_ids", ctypes.c_uint64),
        ("prog_cnt", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    )


class _InfoAttr(ctypes.Structure):
    _fields_ = (("bpf_fd", ctypes.c_uint32), ("info_len", ctypes.c_uint32), ("info", ctypes.c_uint64))


class _ProgInfo(ctypes.Structure):
    """The head of struct bpf_prog_info."""

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("tag", ctypes.c_uint8 * 8),
        ("lengths", ctypes.c_uint32 * 2),
        ("instructions", ctypes.c_uint64 * 2),
        ("load_time", ctypes.c_uint64),
        ("uid", ctypes.c_uint32),
        ("maps", ctypes.c_uint32),
        ("map_ids", ctypes.c_uint64),
        ("name", ctypes.c_char * 16),
    )


class _IdAttr(ctypes.Structure):
    _fields_ = (("id", ctypes.c_uint32), ("next_id", ctypes.c_uint32), ("open_flags", ctypes.c_uint32))


def call(command: int, attr: ctypes.Structure) -> int:
    """The system call. Raises OSError, as all functions here do."""
    return syscall("bpf", command, ctypes.byref(attr), ctypes.sizeof(attr))


def is_permitted() -> bool:
    """Whether this process has the rights of the host's root, and not only those of a user namespace or a container.

    kernel/bpf/syscall.c (bpf_obj_get_next_id): ids are listed only for CAP_SYS_ADMIN in the first user namespace.
    """
    try:
        call(_MAP_GET_NEXT_ID, _IdAttr())
    except OSError as error:
        return error.errno != errno.EPERM
    return True


def obj_pin(fd: int, path: Path) -> None:
    """Pin the map or program ``fd`` at ``path`` of a bpffs, readable by its owner only."""
    name = ctypes.create_string_buffer(os.fsencode(path))
    call(_OBJ_PIN, _ObjAttr(pathname=ctypes.addressof(name), bpf_fd=fd))
    os.chmod(path, 0o600)


def obj_get(path: Path) -> int:
    """A new descriptor of what is pinned at ``path``."""
    name = ctypes.create_string_buffer(os.fsencode(path))
    return call(_OBJ_GET, _ObjAttr(pathname=ctypes.addressof(name)))


def prog_attach(cgroup_fd: int, prog_fd: int, attach_type: int) -> None:
    """Attach in addition to what is attached there (BPF_F_ALLOW_MULTI)."""
    call(_PROG_ATTACH, _AttachAttr(cgroup_fd, prog_fd, attach_type, ALLOW_MULTI))


def prog_replace(cgroup_fd: int, prog_fd: int, old_fd: int, attach_type: int) -> None:
    """Attach in the place of another program, in one step."""
    call(_PROG_ATTACH, _AttachAttr(cgroup_fd, prog_fd, attach_type, ALLOW_MULTI | _REPLACE, old_fd))


def prog_attach_map(map_fd: int, prog_fd: int, attach_type: int) -> None:
    """Attach a program to a sockmap or sockhash: it runs for their sockets, and is detached when the map is freed."""
    call(_PROG_ATTACH, _AttachAttr(map_fd, prog_fd, attach_type))


def prog_detach(cgroup_fd: int, prog_fd: int, attach_type: int) -> None:
    """Undo prog_attach."""
    call(_PROG_DETACH, _AttachAttr(cgroup_fd, prog_fd, attach_type))


def prog_ids(cgroup_fd: int, attach_type: int, effective: bool = False) -> list[int]:
    """Ids of the programs attached to a cgroup, or (``effective``) run for it, including those of its parents."""
    ids = (ctypes.c_uint32 * 64)()
    attr = _QueryAttr(
        target_fd=cgroup_fd,
        attach_type=attach_type,
        query_flags=QUERY_EFFECTIVE if effective else 0,
        prog_ids=ctypes.addressof(ids),
        prog_cnt=len(ids),
    )
    call(_PROG_QUERY, attr)
    return list(ids[: attr.prog_cnt])


def fill_info(fd: int, info: ctypes.Structure) -> None:
    """Fill ``info``, the head of struct bpf_prog_info, bpf_map_info or bpf_btf_info, for what ``fd`` is."""
    call(_OBJ_GET_INFO_BY_FD, _InfoAttr(fd, ctypes.sizeof(info), ctypes.addressof(info)))


def _prog_info(prog_fd: int, wanted: _ProgInfo | None = None) -> _ProgInfo:
    info = wanted or _ProgInfo()
    fill_info(prog_fd, info)
    return info


def prog_id(prog_fd: int) -> int:
    """The kernel's id of a program."""
    return int(_prog_info(prog_fd).id)


def prog_by_id(number: int) -> int:
    """A new descriptor of the program with that id."""
    return call(_PROG_GET_FD_BY_ID, _IdAttr(number))


def _info_by_id(number: int, wanted: _ProgInfo) -> _ProgInfo | None:
    """None where there is no such program any more."""
    try:
        fd = prog_by_id(number)
    except FileNotFoundError:
        return None
    try:
        return _prog_info(fd, wanted)
    finally:
        os.close(fd)


def prog_name(number: int) -> str:
    """The name of the program with that id, its first 15 bytes; empty where it no longer exists."""
    info = _info_by_id(number, _ProgInfo())
    return "" if info is None else bytes(info.name).decode(errors="replace")


def prog_maps(number: int) -> frozenset[int]:
    """The ids of the maps that the program with that id uses; none where it no longer exists."""
    ids = (ctypes.c_uint32 * _MOST_MAPS)()
    info = _info_by_id(number, _ProgInfo(maps=_MOST_MAPS, map_ids=ctypes.addressof(ids)))
    return frozenset() if info is None else frozenset(ids[: info.maps])


KeyT = TypeVar("KeyT", bound="ctypes.Structure | ctypes._SimpleCData[int]")
ValueT = TypeVar("ValueT", bound="ctypes.Structure | ctypes._SimpleCData[int]")


class Map(Generic[KeyT, ValueT]):
    """A BPF map by its descriptor, with keys and values as ctypes objects.

    Not for use by several threads at once: lookups share one value buffer.
    """

    def __init__(self, fd: int, key: type[KeyT], value: type[ValueT]) -> None:
        self.fd = fd
        self._owned = False
        self._key, self._value = key, value
        self._found = value()
        self._attr = _ElemAttr(map_fd=fd, value=ctypes.addressof(self._found))
        self._lookup = (ctypes.c_long(number("bpf")), ctypes.c_int(_MAP_LOOKUP_ELEM), ctypes.byref(self._attr))
        self._attr_size = ctypes.c_uint(ctypes.sizeof(_ElemAttr))
        self._written = _ElemAttr(map_fd=fd)
        self._update = (ctypes.c_long(number("bpf")), ctypes.c_int(_MAP_UPDATE_ELEM), ctypes.byref(self._written))

    @classmethod
    def pinned(cls, path: Path, key: type[KeyT], value: type[ValueT]) -> Map[KeyT, ValueT]:
        """The map that is pinned at ``path``; its descriptor is closed with this object."""
        opened = cls(obj_get(path), key, value)
        opened._owned = True
        return opened

    def close(self) -> None:
        """Close the descriptor."""
        self._owned = False
        os.close(self.fd)

    def __del__(self) -> None:
        if getattr(self, "_owned", False):
            self.close()

    def peek(self, key: KeyT) -> ValueT | None:
        """The value of ``key``, in a buffer that the next call overwrites; None where there is no entry."""
        self._attr.key = ctypes.addressof(key)
        if _libc.syscall(*self._lookup, self._attr_size) == 0:
            return self._found
        code = ctypes.get_errno()
        if code == errno.ENOENT:
            return None
        raise OSError(code, f"bpf(BPF_MAP_LOOKUP_ELEM): {os.strerror(code)}")

    def get(self, key: KeyT) -> ValueT | None:
        """A copy of the value of ``key``; None where there is no entry."""
        found = self.peek(key)
        return None if found is None else cast(ValueT, self._value.from_buffer_copy(found))

    def put(self, key: KeyT, value: ValueT) -> None:
        """Write, over an entry that is there already."""
        attr = self._written
        attr.key, attr.value = ctypes.addressof(key), ctypes.addressof(value)
        if _libc.syscall(*self._update, self._attr_size) != 0:
            code = ctypes.get_errno()
            raise OSError(code, f"bpf(BPF_MAP_UPDATE_ELEM): {os.strerror(code)}")

    def insert(self, key: KeyT, value: ValueT) -> bool:
        """Write where there is no entry; False where there is one."""
        attr = _ElemAttr(self.fd, 0, ctypes.addressof(key), ctypes.addressof(value), _NOEXIST)
        try:
            call(_MAP_UPDATE_ELEM, attr)
        except FileExistsError:
            return False
        return True

    def delete(self, key: KeyT) -> bool:
        """Remove an entry; False where there was none."""
        try:
            call(_MAP_DELETE_ELEM, _ElemAttr(self.fd, 0, ctypes.addressof(key)))
        except FileNotFoundError:
            return False
        return True

    def keys(self) -> list[KeyT]:
        """All current keys. Read at once, so that entries can be deleted while the caller iterates."""
        found: list[KeyT] = []
        key = self.next_key(None)
        while key is not None:
            found.append(key)
            key = self.next_key(key)
        return found

    def next_key(self, key: KeyT | None) -> KeyT | None:
        """The key behind this one, or the first; None behind the last. (Behind one that is not there: the first.)"""
        following = self._key()
        attr = _ElemAttr(self.fd, 0, 0 if key is None else ctypes.addressof(key), ctypes.addressof(following))
        try:
            call(_MAP_GET_NEXT_KEY, attr)
        except FileNotFoundError:
            return None
        return following

    def clear(self) -> None:
        """Remove all current entries of a hash, which may be very many."""
        keys, values = (self._key * _AT_ONCE)(), (self._value * _AT_ONCE)()
        after = ctypes.c_uint32()  # where the next call goes on, by the kernel's own number
        attr = _BatchAttr(0, ctypes.addressof(after), ctypes.addressof(keys), ctypes.addressof(values), 0, self.fd)
        while True:
            attr.count = _AT_ONCE
            try:
                call(_MAP_LOOKUP_AND_DELETE_BATCH, attr)
            except FileNotFoundError:  # there are no more
                return
            attr.in_batch = ctypes.addressof(after)

    def items(self) -> Iterator[tuple[KeyT, ValueT]]:
        """All entries that still exist when they are read."""
        for key in self.keys():
            value = self.get(key)
            if value is not None:
                yield key, value
