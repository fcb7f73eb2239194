"""Makes BPF maps, and tells how one was made, with the types of its keys and values.

A map in a socket's storage is made only with types: bcc describes them as BTF, and the kernel gives that back.

Sources: bpf(2); include/uapi/linux/bpf.h (BPF_MAP_CREATE, BPF_BTF_LOAD, struct bpf_map_info, struct bpf_btf_info).
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass

from graft.kernel.bpf import Map, call, fill_info

_MAP_CREATE, _BTF_LOAD, _BTF_GET_FD_BY_ID = 0, 18, 19  # enum bpf_cmd
_ARRAY, _ARRAY_OF_MAPS = 2, 12  # enum bpf_map_type


class _CreateAttr(ctypes.Structure):
    _fields_ = (
        ("map_type", ctypes.c_uint32),
        ("key_size", ctypes.c_uint32),
        ("value_size", ctypes.c_uint32),
        ("max_entries", ctypes.c_uint32),
        ("map_flags", ctypes.c_uint32),
        ("inner_map_fd", ctypes.c_uint32),
        ("numa_node", ctypes.c_uint32),
        ("map_name", ctypes.c_char * 16),
        ("map_ifindex", ctypes.c_uint32),
        ("btf_fd", ctypes.c_uint32),
        ("btf_key_type_id", ctypes.c_uint32),
        ("btf_value_type_id", ctypes.c_uint32),
    )


class _MapInfo(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("key_size", ctypes.c_uint32),
        ("value_size", ctypes.c_uint32),
        ("max_entries", ctypes.c_uint32),
        ("map_flags", ctypes.c_uint32),
        ("name", ctypes.c_char * 16),
        ("ifindex", ctypes.c_uint32),
        ("btf_vmlinux_value_type_id", ctypes.c_uint32),
        ("netns_dev", ctypes.c_uint64),
        ("netns_ino", ctypes.c_uint64),
        ("btf_id", ctypes.c_uint32),
        ("btf_key_type_id", ctypes.c_uint32),
        ("btf_value_type_id", ctypes.c_uint32),
    )


class _BtfLoadAttr(ctypes.Structure):
    _fields_ = (
        ("btf", ctypes.c_uint64),
        ("log", ctypes.c_uint64),
        ("btf_size", ctypes.c_uint32),
        ("log_size", ctypes.c_uint32),
        ("log_level", ctypes.c_uint32),
    )


class _BtfInfo(ctypes.Structure):
    _fields_ = (("btf", ctypes.c_uint64), ("btf_size", ctypes.c_uint32), ("id", ctypes.c_uint32))


class _BtfIdAttr(ctypes.Structure):
    _fields_ = (("id", ctypes.c_uint32),)


@dataclass(frozen=True, slots=True)
class MapShape:
    """What a program relies on in a map that it uses. ``type`` is of enum bpf_map_type, ``flags`` are BPF_F_*."""

    type: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int


@dataclass(frozen=True, slots=True)
class MapTypes:
    """The types of a map: ``described_by`` is BTF, as bytes, in which ``key`` and ``value`` are numbers of types."""

    described_by: bytes
    key: int
    value: int


def _info(map_fd: int) -> _MapInfo:
    info = _MapInfo()
    fill_info(map_fd, info)
    return info


def map_id(map_fd: int) -> int:
    """The kernel's id of a map, which no later one has."""
    return int(_info(map_fd).id)


def map_shape(map_fd: int) -> MapShape:
    """That of a map. Raises OSError, as all functions here do."""
    info = _info(map_fd)
    return MapShape(info.type, info.key_size, info.value_size, info.max_entries, info.map_flags)


def map_types(map_fd: int) -> MapTypes | None:
    """Those of a map; None where it was made without."""
    info = _info(map_fd)
    if not info.btf_id:
        return None
    fd = call(_BTF_GET_FD_BY_ID, _BtfIdAttr(info.btf_id))
    try:
        found = _BtfInfo()
        fill_info(fd, found)
        described = ctypes.create_string_buffer(found.btf_size)
        fill_info(fd, _BtfInfo(btf=ctypes.addressof(described), btf_size=found.btf_size))
    finally:
        os.close(fd)
    return MapTypes(described.raw, info.btf_key_type_id, info.btf_value_type_id)


def create(name: str, shape: MapShape, types: MapTypes | None = None) -> int:
    """A descriptor of a new map. ``name``: what the kernel shows, by its first 15 bytes."""
    attr = _CreateAttr(
        map_type=shape.type,
        key_size=shape.key_size,
        value_size=shape.value_size,
        max_entries=shape.max_entries,
        map_flags=shape.flags,
        map_name=name.encode()[:15],
    )
    if types is None:
        return call(_MAP_CREATE, attr)
    attr.btf_fd = _load_types(types.described_by)
    attr.btf_key_type_id, attr.btf_value_type_id = types.key, types.value
    try:
        return call(_MAP_CREATE, attr)
    finally:
        os.close(attr.btf_fd)


def _load_types(described_by: bytes) -> int:
    described = ctypes.create_string_buffer(described_by, len(described_by))
    return call(_BTF_LOAD, _BtfLoadAttr(btf=ctypes.addressof(described), btf_size=len(described_by)))


def wait_for_programs() -> None:
    """Wait until each program that runs now has ended, with whatever it had read of the maps by then.

    The kernel waits for them when an entry of a map of maps is replaced (maybe_wait_bpf_programs() of
    kernel/bpf/syscall.c, 5.0). Takes some milliseconds.
    """
    inner = call(_MAP_CREATE, _CreateAttr(_ARRAY, 4, 4, 1))
    try:
        outer = call(_MAP_CREATE, _CreateAttr(_ARRAY_OF_MAPS, 4, 4, 1, 0, inner))
        try:
            Map(outer, ctypes.c_uint32, ctypes.c_uint32).put(ctypes.c_uint32(0), ctypes.c_uint32(inner))
        finally:
            os.close(outer)
    finally:
        os.close(inner)
