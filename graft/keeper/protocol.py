"""What graftd and its keeper say to each other: systemd's sd_notify protocol. Pure.

    graftd ── datagram to $NOTIFY_SOCKET: lines NAME=VALUE, descriptors beside them (SCM_RIGHTS) ──▶ keeper
    graftd ◀── at its start: descriptors from 3 on, LISTEN_FDS, LISTEN_FDNAMES, LISTEN_PID ───────── keeper

Graft's own keeper has graftd inherit one descriptor more, after those: of the folder that its socket is in. So graftd
gets to that by its own folder in /proc, /proc/self/fd, of which it keeps in the kernel's cache what it looks up there
(own_names.py). Any user may list the keeper's, and hold it. And that path is short, however long the
folder's is (unix(7)), and the same in each mount namespace.

Sources: sd_notify(3), sd_pid_notify_with_fds(3), sd_listen_fds(3), sd_event_set_watchdog(3) and sd_watchdog_enabled(3)
of systemd.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

READY, STOPPING = "READY", "STOPPING"
STORE, REMOVE, NAME, POLL = "FDSTORE", "FDSTOREREMOVE", "FDNAME", "FDPOLL"
WATCHDOG = "WATCHDOG"
BARRIER = "BARRIER"

COMMAND = "X_GRAFT_COMMAND"
"""How to start the next graftd, word by word; for Graft's own keeper only, the service manager has its own."""
_BETWEEN_WORDS = "\x1f"

NOTIFY_SOCKET, WATCHDOG_USEC, WATCHDOG_PID = "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"
_FDS, _NAMES, _PID = "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID"
VARIABLES = (NOTIFY_SOCKET, WATCHDOG_USEC, WATCHDOG_PID, _FDS, _NAMES, _PID)
"""Of the environment: for graftd alone, and for none of its children."""

SOCKET = "keeper.sock"
"""In run_dir: what Graft's own keeper receives messages at."""
_OWN_DESCRIPTORS = "/proc/self/fd/"

FIRST_DESCRIPTOR = 3
MAX_NAME = 255
MAX_MESSAGE = 4096
MAX_DESCRIPTORS = 253
"""In one message (SCM_MAX_FD, include/net/scm.h)."""
MAX_NAMES = (1 << 17) - 256
"""All names together, with a colon each: they are one string of the environment (MAX_ARG_STRLEN of execve(2))."""
REPLACED = 75
"""Exit status of a graftd that has ended so that another one takes its place."""


def is_name(text: str) -> bool:
    """Whether descriptors may be stored under it: printable ASCII without a colon."""
    return 0 < len(text) <= MAX_NAME and all(" " < one < "\x7f" and one != ":" for one in text)


def encode(fields: Mapping[str, str]) -> bytes:
    """A message. Raises ValueError where a value has a line break."""
    if any("\n" in name + value or "=" in name for name, value in fields.items()):
        raise ValueError(f"not a message: {dict(fields)!r}")
    return "\n".join(f"{name}={value}" for name, value in fields.items()).encode()


def parse(raw: bytes) -> dict[str, str]:
    """The fields of a message; lines that are none are left out."""
    found = {}
    for line in raw.decode(errors="replace").split("\n"):
        name, is_field, value = line.partition("=")
        if is_field:
            found[name] = value
    return found


def store(name: str) -> bytes:
    """Keep the descriptors beside this message, whatever becomes of their other ends."""
    return f"{STORE}=1\n{NAME}={name}\n{POLL}=0".encode()


def remove(name: str) -> bytes:
    """Close all descriptors of that name."""
    return f"{REMOVE}=1\n{NAME}={name}".encode()


def address(folder: int) -> str:
    """The path of the socket of Graft's own keeper, for a process that has open the folder that it is in."""
    return f"{_OWN_DESCRIPTORS}{folder}/{SOCKET}"


def inherited_folder(environment: Mapping[str, str]) -> int | None:
    """The descriptor in an `address` that this process was started with; None where the service manager keeps it."""
    number, _, name = environment.get(NOTIFY_SOCKET, "").removeprefix(_OWN_DESCRIPTORS).partition("/")
    return int(number) if name == SOCKET and number.isascii() and number.isdigit() else None


def command(words: Sequence[str]) -> dict[str, str]:
    """The field by which the next graftd is started by this command."""
    return {COMMAND: _BETWEEN_WORDS.join(words)}


def parse_command(message: Mapping[str, str]) -> list[str]:
    """The command in a message, nothing where there is none."""
    return message[COMMAND].split(_BETWEEN_WORDS) if message.get(COMMAND) else []


def listen_environment(names: Sequence[str], pid: int) -> dict[str, str]:
    """What tells process ``pid`` which descriptors it starts with: those from `FIRST_DESCRIPTOR` on."""
    return {_FDS: str(len(names)), _NAMES: ":".join(names), _PID: str(pid)} if names else {}


def listen_descriptors(environment: Mapping[str, str], pid: int) -> list[tuple[int, str]]:
    """Which descriptors process ``pid`` was started with, and their names; none where they are for another process."""
    number, count = environment.get(_PID, ""), environment.get(_FDS, "")
    if number != str(pid) or not (count.isascii() and count.isdigit()):
        return []
    names = environment.get(_NAMES, "").split(":")
    names += [""] * (int(count) - len(names))
    return [(FIRST_DESCRIPTOR + index, names[index]) for index in range(int(count))]
