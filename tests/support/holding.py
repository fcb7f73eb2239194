"""The beginning of a program that holds a folder: nobody, with a page of memory that never comes (userfaultfd(2))."""

NOBODY_WITH_A_PAGE = r"""
import ctypes, fcntl, mmap, os, signal, struct, sys, threading, time
signal.alarm(100)
libc = ctypes.CDLL(None, use_errno=True)
uffd = libc.syscall(323, os.O_CLOEXEC)  # as root here; without any privilege a file of FUSE does
assert uffd >= 0, os.strerror(ctypes.get_errno())
fcntl.ioctl(uffd, 0xC018AA3F, bytearray(struct.pack("QQQ", 0xAA, 0, 0)))
page = mmap.mmap(-1, 4096)
at = ctypes.addressof(ctypes.c_char.from_buffer(page))
fcntl.ioctl(uffd, 0xC020AA00, bytearray(struct.pack("QQQQ", at, 4096, 1, 0)))
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
"""
"""What reads into ``at`` waits for ever. `libc`, `os`, `signal`, `struct`, `sys`, `threading` and `time` are there."""
