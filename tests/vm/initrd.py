"""An initrd of busybox and the modules that mount the root disk, made byte by byte. Pure.

Sources: cpio "newc", Documentation/driver-api/early-userspace/buffer-format.rst; modules.dep, depmod(8).
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

WANTED = ("virtio_pci", "virtio_blk", "virtio_mmio", "ext4")

_FOLDER, _PROGRAM, _FILE, _LINK = 0o40755, 0o100755, 0o100644, 0o120777


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of an archive. ``data`` of a link is where it points."""

    path: str
    mode: int
    data: bytes = b""


def module_name(path: str) -> str:
    """virtio_blk, of kernel/drivers/block/virtio_blk.ko.xz."""
    return PurePosixPath(path).name.partition(".ko")[0].replace("-", "_")


def load_order(modules_dep: str, wanted: Iterable[str] = WANTED) -> list[str]:
    """Paths of the modules to load, each after those that it needs. What is not a module is built in."""
    needs = {path: names.split() for path, _, names in (line.partition(":") for line in modules_dep.splitlines())}
    paths = {module_name(path): path for path in needs}
    order: list[str] = []

    def add(path: str) -> None:
        for needed in reversed(needs[path]):
            add(needed)
        if path not in order:
            order.append(path)

    for name in wanted:
        if name in paths:
            add(paths[name])
    return order


def init_script(modules: Sequence[str]) -> str:
    """What the kernel starts first: it loads ``modules``, mounts the root disk and goes over to systemd."""
    return "\n".join(
        [
            "#!/bin/sh",
            "b=/bin/busybox",
            "$b mount -t devtmpfs devtmpfs /dev",
            "$b mount -t proc proc /proc",
            *(f"$b insmod /modules/{module_name(path)}.ko" for path in modules),
            "tries=0",
            "while [ ! -b /dev/vda ] && [ $tries -lt 300 ]; do $b sleep 0.1; tries=$((tries + 1)); done",
            "$b mount -t ext4 -o rw /dev/vda /root",
            "$b umount /proc",
            "$b mount --move /dev /root/dev",
            "exec $b switch_root /root /sbin/init",
            "",
        ]
    )


def initrd(busybox: bytes, modules: Mapping[str, bytes]) -> bytes:
    """The whole, compressed. ``modules``: path -> what is to be loaded, in this order."""
    entries = [Entry(path, _FOLDER) for path in ("bin", "modules", "dev", "proc", "root")]
    entries += [Entry("bin/busybox", _PROGRAM, busybox), Entry("bin/sh", _LINK, b"busybox")]
    entries += [Entry(f"modules/{module_name(path)}.ko", _FILE, data) for path, data in modules.items()]
    entries.append(Entry("init", _PROGRAM, init_script(list(modules)).encode()))
    return gzip.compress(archive(entries), 1)


def archive(entries: Iterable[Entry]) -> bytes:
    """A cpio archive of the format "newc"."""
    listed = [*entries, Entry("TRAILER!!!", 0)]
    return b"".join(_packed(number, entry) for number, entry in enumerate(listed, 1))


def _packed(number: int, entry: Entry) -> bytes:
    # inode, mode, uid, gid, links, time, size, device (2), device of a special file (2), length of the name, check
    fields = (number, entry.mode, 0, 0, 1, 0, len(entry.data), 0, 0, 0, 0, len(entry.path) + 1, 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + entry.path.encode() + b"\0"
    return _padded(head) + _padded(entry.data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
