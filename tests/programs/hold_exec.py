"""Processes with a listener each, which lend it to nobody: what a program may do in a container being attached.

As a user without privilege, in a user namespace of his own with a FUSE file system:

    hold_exec.py EXECING FUSE FOLDER COUNT SECONDS

When somebody has listed the descriptors of the last of COUNT processes, they begin to execute EXECING; the first lends
its descriptors after SECONDS, the next one after twice that, and so on.
"""

import ctypes
import os
import signal
import socket
import struct
import sys
import threading
import time

EXECING, FUSE, FOLDER, COUNT, SECONDS = *sys.argv[1:4], int(sys.argv[4]), float(sys.argv[5])
CLONE_NEWUSER, CLONE_NEWNS = 0x10000000, 0x00020000
IN_CLOSE_NOWRITE, IN_ONLYDIR = 0x10, 0x01000000
LOOKUP, GETATTR, OPEN, FLUSH, INIT = 1, 3, 14, 25, 26  # fuse_opcode, linux/fuse.h
WITHOUT_ANSWER = (2, 36, 42)  # FORGET, INTERRUPT, BATCH_FORGET
LONG = 90

libc = ctypes.CDLL(None, use_errno=True)


def checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def attributes(node: int) -> bytes:
    """struct fuse_attr; the root is a folder, everything else a file."""
    return struct.pack(
        "<6Q10I", node, 4096, 8, 0, 0, 0, 0, 0, 0, 0o40755 if node == 1 else 0o100755, 1, 0, 0, 0, 4096, 0
    )


class Files:
    """A file system whose file ``d1.7`` takes 1.7 seconds to be closed."""

    def __init__(self) -> None:
        uid, gid = os.getuid(), os.getgid()
        checked(libc.unshare(CLONE_NEWUSER | CLONE_NEWNS))
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        self.fd = os.open(FUSE, os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={self.fd},rootmode=40755,user_id=0,group_id=0"
        checked(libc.mount(b"x", FOLDER.encode(), b"fuse", 6, options.encode()))

    def reply(self, unique: int, data: bytes = b"", error: int = 0) -> None:
        try:
            os.write(self.fd, struct.pack("<IiQ", 16 + len(data), error, unique) + data)
        except OSError:
            pass

    def serve(self) -> None:
        while True:
            raw = os.read(self.fd, 1 << 18)
            _, code, unique, node = struct.unpack_from("<IIQQ", raw)
            if code == INIT:
                limits = struct.pack("<4I2H2I2H8I", 7, 31, 65536, 0, 16, 12, 65536, 1, 16, 0, *[0] * 8)
                self.reply(unique, limits)
            elif code == LOOKUP:
                self.look_up(unique, raw[40:].split(b"\0")[0].decode())
            elif code == GETATTR:
                self.reply(unique, struct.pack("<Q2I", 3600, 0, 0) + attributes(node))
            elif code == OPEN:
                self.reply(unique, struct.pack("<Q2I", 1, 0, 0))
            elif code == FLUSH:
                threading.Timer((node - 100) / 10, self.reply, (unique,)).start()
            elif code not in WITHOUT_ANSWER:
                self.reply(unique, error=0 if code in (18, 34) else -38)  # RELEASE, POLL; else ENOSYS

    def look_up(self, unique: int, name: str) -> None:
        if not name.startswith("d"):
            self.reply(unique, error=-2)
            return
        node = 100 + round(float(name[1:]) * 10)
        self.reply(unique, struct.pack("<4Q2I", node, 0, 3600, 3600, 0, 0) + attributes(node))


def start(listener: socket.socket, begins: int, number: int) -> int:
    child = os.fork()
    if not child:
        os.dup2(listener.fileno(), 9)
        os.dup2(begins, 8)
        os.closerange(3, 8)
        os.closerange(10, 200)
        os.execl(EXECING, "execing", FOLDER, str(SECONDS * (number + 1)), str(LONG), "wait")
    return child


listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(COUNT)]
files = Files()
threading.Thread(target=files.serve, daemon=True).start()
begins, begin = os.pipe()
children = [start(listener, begins, number) for number, listener in enumerate(listeners)]
for listener in listeners:
    listener.close()
while os.readlink(f"/proc/{children[-1]}/exe") != os.path.realpath(EXECING):
    time.sleep(0.01)
watch = checked(libc.inotify_init())
checked(libc.inotify_add_watch(watch, f"/proc/{children[-1]}/fd".encode(), IN_CLOSE_NOWRITE | IN_ONLYDIR))
print("ready", flush=True)
os.read(watch, 4096)
os.write(begin, b"x")
signal.pause()
