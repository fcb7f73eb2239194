"""seccomp user notification: installing a filter, the listener, and its ioctls. (The filters: seccomp_filter.py.)

Sources: seccomp(2), seccomp_unotify(2), include/uapi/linux/seccomp.h.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import struct
from typing import TYPE_CHECKING, NamedTuple

from graft.kernel.syscalls import syscall

if TYPE_CHECKING:
    from typing_extensions import Buffer

_libc = ctypes.CDLL(None, use_errno=True)

_SET_MODE_FILTER = 1
_FLAG_NEW_LISTENER = 1 << 3
_FLAG_WAIT_KILLABLE_RECV = 1 << 5

_USER_NOTIF_FLAG_CONTINUE = 1
_FD_SYNC_WAKE_UP = 1
_ADDFD_FLAG_SETFD = 1
_ADDFD_FLAG_SEND = 2
_O_CLOEXEC = 0o2000000


def _ioc(direction: int, nr: int, size: int) -> int:
    return direction << 30 | size << 16 | ord("!") << 8 | nr


_NOTIF_SIZE, _RESP_SIZE, _ADDFD_SIZE = 80, 24, 24
_NOTIF_RECV = _ioc(3, 0, _NOTIF_SIZE)
_NOTIF_SEND = _ioc(3, 1, _RESP_SIZE)
_NOTIF_ID_VALID = _ioc(1, 2, 8)
_NOTIF_ADDFD = _ioc(1, 3, _ADDFD_SIZE)
_NOTIF_SET_FLAGS = _ioc(1, 4, 8)

# struct seccomp_notif: id, pid, flags, then struct seccomp_data: nr, arch, instruction_pointer, args[6]. Unused members
# are skipped; of arguments that the kernel treats as int, also the upper halves (second in memory on the machines that
# seccomp_filter.py knows).
_NOTIF = struct.Struct("=QI4xiI8xi4xQI4x24x")
_RESP = struct.Struct("=QqiI")
_ADDFD = struct.Struct("=QIIII")
_ID = struct.Struct("=Q")
_RECEIVE = ctypes.c_ulong(_NOTIF_RECV)


class _FilterProgram(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def install_listener(text: bytes) -> tuple[int, bool]:
    """Install a filter on the calling process, permanently, and give the descriptor of its notifications.

    The second value says whether signals that do not kill leave a trapped call waiting.

    Needs CAP_SYS_ADMIN (or no_new_privs). With WAIT_KILLABLE_RECV (5.19) signals, which Go's runtime
    sends all the time, do not restart a call that a supervisor is handling.
    """
    try:
        return install(text, _FLAG_NEW_LISTENER | _FLAG_WAIT_KILLABLE_RECV), True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return install(text, _FLAG_NEW_LISTENER), False


def install(text: bytes, flags: int = 0) -> int:
    """Install a filter on the calling process, permanently. Needs CAP_SYS_ADMIN (or no_new_privs). Raises OSError."""
    instructions = ctypes.create_string_buffer(text, len(text))
    program = _FilterProgram(len(text) // 8, ctypes.addressof(instructions))
    return syscall("seccomp", _SET_MODE_FILTER, flags, ctypes.byref(program))


def is_listener(fd: int) -> bool:
    """Whether a descriptor is a notification descriptor (5.0). Nothing is looked up in /proc, which others may hold."""
    try:
        fcntl.ioctl(fd, _NOTIF_ID_VALID, _ID.pack(0))
    except OSError as error:
        return error.errno == errno.ENOENT  # no call waits that has this number
    return True


def hung_up(listener: int) -> bool:
    """Whether every process with the filter of that notification descriptor has ended (5.9)."""
    poll = select.poll()
    poll.register(listener, 0)
    return bool(poll.poll(0))


class Notification(NamedTuple):
    """One trapped call (struct seccomp_notif): the waiting thread (``pid``), the call and its arguments.

    The arguments are those of bind and connect; for listen ``address`` is the backlog.
    """

    id: int
    pid: int
    nr: int
    arch: int
    fd: int
    address: int
    size: int

    @classmethod
    def unpack(cls, raw: Buffer) -> Notification:
        """From the bytes that the kernel wrote."""
        return cls._make(_NOTIF.unpack_from(raw))


class Listener:
    """A notification descriptor."""

    SIZE = _NOTIF_SIZE

    def __init__(self, fd: int) -> None:
        self.fd = fd
        # Reused for each call. bytearray: fcntl.ioctl() first tries a writable buffer, and bytes only after that fails.
        self._response = bytearray(_RESP_SIZE)
        self._addfd = bytearray(_ADDFD_SIZE)

    def wake_on_this_core(self) -> bool:
        """Enable synchronous wake-up (6.6): the caller sleeps anyway, so the supervisor runs on its core."""
        try:
            fcntl.ioctl(self.fd, _NOTIF_SET_FLAGS, _FD_SYNC_WAKE_UP)
        except OSError:
            return False
        return True

    def receive(self, into: ctypes.Array[ctypes.c_char]) -> bool:
        """Write the next notification to ``into``, SIZE bytes of zeros. Blocks where none is waiting.

        The kernel itself writes it there, before this call can return or the process can die: a notification, which
        the kernel delivers once only, is never lost. False, and ``into`` is still zero, where the caller
        has ended (ENOENT) or a signal interrupted this call.
        """
        if _libc.ioctl(self.fd, _RECEIVE, into) == 0:
            return True
        code = ctypes.get_errno()
        if code in (errno.ENOENT, errno.EINTR):
            return False
        raise OSError(code, f"ioctl(SECCOMP_IOCTL_NOTIF_RECV): {os.strerror(code)}")

    def is_valid(self, unique: int) -> bool:
        """Whether that call is still waiting; then what was read about its process before was about this process."""
        try:
            fcntl.ioctl(self.fd, _NOTIF_ID_VALID, _ID.pack(unique))
        except FileNotFoundError:
            return False
        return True

    def _send(self, unique: int, error: int, flags: int, value: int = 0) -> bool:
        _RESP.pack_into(self._response, 0, unique, value, error, flags)
        while True:
            try:
                fcntl.ioctl(self.fd, _NOTIF_SEND, self._response)
                return True
            except InterruptedError:
                continue
            except FileNotFoundError:
                return False

    def resume(self, unique: int) -> bool:
        """Let the call run. False if its caller has ended."""
        return self._send(unique, 0, _USER_NOTIF_FLAG_CONTINUE)

    def answer(self, unique: int, error: int = 0) -> bool:
        """Return from the call without running it: 0, or errno ``error``. False if its caller has ended."""
        return self._send(unique, -error, 0)

    def answer_value(self, unique: int, value: int) -> bool:
        """Return ``value`` from the call without running it. False if its caller has ended."""
        return self._send(unique, 0, 0, value)

    def replace(self, unique: int, source: int, target: int, cloexec: bool) -> None:
        """Replace the caller's descriptor ``target`` with our descriptor ``source``.

        Raises OSError: ENOENT (the caller has ended), EBADF or EMFILE (the caller has no such descriptor).
        """
        self._add(unique, _ADDFD_FLAG_SETFD, source, target, cloexec)

    def answer_with(self, unique: int, source: int, cloexec: bool) -> None:
        """Return from the call with a new descriptor of the caller's, of the same file as our descriptor ``source``.

        One step (5.14): the caller has the descriptor and its number, or neither. Raises OSError: ENOENT (the caller
        has ended, or was interrupted), EMFILE (it may have no more descriptors); the call is unanswered then.

        A signal to this process before the caller has run is an exception: the kernel forgets the descriptor, but not
        that the call is answered, and the caller gets 0. For a caller that its own signals do not interrupt,
        `add` and `answer_value` have no such gap.
        """
        self._add(unique, _ADDFD_FLAG_SEND, source, 0, cloexec)

    def add(self, unique: int, source: int, cloexec: bool) -> int:
        """Give the caller our descriptor ``source``; the call is still to be answered. Gives the caller's number of it.

        A caller whose wait ends before it is answered keeps it. Raises OSError as `answer_with`.
        """
        return self._add(unique, 0, source, 0, cloexec)

    def _add(self, unique: int, flags: int, source: int, target: int, cloexec: bool) -> int:
        _ADDFD.pack_into(self._addfd, 0, unique, flags, source, target, _O_CLOEXEC if cloexec else 0)
        interrupted = False
        while True:
            try:
                return int(fcntl.ioctl(self.fd, _NOTIF_ADDFD, self._addfd))
            except InterruptedError:  # the kernel undid it, or has not started
                interrupted = True
            except BlockingIOError:  # EINPROGRESS: the call is answered, see `answer_with`
                if not interrupted:
                    raise
                return 0
