"""A program that `graft run` starts has neither root's terminal nor its keys nor its inheritable capabilities."""

from __future__ import annotations

import fcntl
import os
import platform
import re
import subprocess
import termios
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hostile.conftest import graft_without
from tests.support.building import Programs
from tests.support.installation import GRAFT, Host
from tests.support.shell import Word, run
from tests.support.wait import PATIENCE

pytestmark = pytest.mark.e2e

TYPED = "id\n"
NET_ADMIN = 1 << 12


# --- the terminal -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Terminal:
    """The terminal on which root starts commands, and a descriptor of each of its ends."""

    master: int
    slave: int

    def run(self, host: Host, command: Sequence[Word]) -> str:
        """Run ``command`` to its end on this terminal; gives its standard output."""
        return subprocess.run(
            [str(word) for word in command],
            stdin=self.slave,
            stdout=subprocess.PIPE,
            env={**os.environ, **host.environment},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            text=True,
            timeout=60 * PATIENCE,
            check=False,
        ).stdout

    def typed(self) -> str:
        """The line that a shell of root's would read now; empty where there is none."""
        os.set_blocking(self.slave, False)
        try:
            return os.read(self.slave, 100).decode()
        except BlockingIOError:
            return ""


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    """A new pseudoterminal that is the controlling terminal of no session yet."""
    master, slave = os.openpty()
    yield Terminal(master, slave)
    os.close(master)
    os.close(slave)


def typing(programs: Programs, way: str) -> list[Word]:
    return ["run", "--user", "nobody", "--", programs["typing"], way, TYPED]


WAYS = ("native", "upper", "i386", "x32") if platform.machine() == "x86_64" else ("native", "upper")


@pytest.mark.parametrize("way", WAYS)
def test_a_users_program_types_nothing_into_roots_shell(
    host: Host, programs: Programs, terminal: Terminal, way: str
) -> None:
    assert terminal.run(host, [GRAFT, *typing(programs, way)]) == "EPERM\n"
    assert terminal.typed() == ""


@pytest.mark.parametrize("way", WAYS[:3])
def test_control_without_the_defence_it_types(host: Host, programs: Programs, terminal: Terminal, way: str) -> None:
    said = terminal.run(host, [*graft_without("terminal"), *typing(programs, way)])
    switch = Path("/proc/sys/dev/tty/legacy_tiocsti")
    if switch.exists() and switch.read_text() == "0\n":
        assert said == "EIO\n"  # this kernel refuses it to every program
    else:
        assert (said, terminal.typed()) == ("typed\n", TYPED)


def test_a_users_program_still_has_the_terminal(host: Host, terminal: Terminal) -> None:
    script = "import os, sys, termios; print(os.isatty(0), len(termios.tcgetattr(0)), os.tcgetpgrp(0) > 0)"
    said = terminal.run(host, [GRAFT, "run", "--user", "nobody", "--", "/usr/bin/python3", "-ISc", script])
    assert said == "True 7 True\n"


# --- keys -------------------------------------------------------------------------------------------

_KEYS = """
import ctypes, os, platform, sys
libc = ctypes.CDLL(None, use_errno=True)
add_key, keyctl = {"x86_64": (248, 250), "aarch64": (217, 219)}[platform.machine()]
JOIN, SEARCH, READ, SESSION = 1, 10, 11, -3
def call(*words):
    return libc.syscall(*(ctypes.c_long(word) if isinstance(word, int) else word for word in words))
"""
WITH_A_KEY = f"""{_KEYS}
assert call(keyctl, JOIN, None) > 0
assert call(add_key, b"user", b"graft-test", b"secret", 6, SESSION) > 0
os.execv(sys.argv[1], sys.argv[1:])
"""
READ_THE_KEY = f"""{_KEYS}
key = call(keyctl, SEARCH, SESSION, b"user", b"graft-test", 0)
content = ctypes.create_string_buffer(16)
print(content.value.decode() if key > 0 and call(keyctl, READ, key, content, 16) > 0 else "no key")
"""


def with_a_key(host: Host, command: Sequence[Word]) -> str:
    """What a program of the user nobody finds in the session keyring where root has a key."""
    program = ["run", "--user", "nobody", "--", "/usr/bin/python3", "-ISc", READ_THE_KEY]
    starts = ["/usr/bin/python3", "-ISc", WITH_A_KEY, *command, *program]
    return run(starts, environment=host.environment, status=0).stdout


def test_a_users_program_has_none_of_roots_keys(host: Host) -> None:
    assert with_a_key(host, [GRAFT]) == "no key\n"


def test_control_without_the_defence_it_reads_them(host: Host) -> None:
    assert with_a_key(host, graft_without("keyring")) == "secret\n"


# --- capabilities -----------------------------------------------------------------------------------


def sets(host: Host, command: Sequence[Word], *options: Word) -> dict[str, int]:
    """The capability sets of a program that `graft run` starts where root has CAP_NET_ADMIN inheritable."""
    starts = ["setpriv", "--inh-caps=+net_admin", *command, "run", *options, "--", "cat", "/proc/self/status"]
    status = run(starts, environment=host.environment, status=0).stdout
    return {name: int(value, 16) for name, value in re.findall(r"^Cap(\w+):\s+(\w+)", status, re.M)}


def test_roots_program_has_no_net_admin_in_any_set(host: Host) -> None:
    found = sets(host, [GRAFT])
    assert [name for name, value in found.items() if value & NET_ADMIN] == []
    allowed = sets(host, [GRAFT], "--allow-net-admin")
    assert allowed["Prm"] & NET_ADMIN
    for name in ("Prm", "Eff", "Bnd"):
        assert found[name] == allowed[name] & ~NET_ADMIN, f"{name}: it lacks more than CAP_NET_ADMIN"


def test_control_without_the_defence_it_keeps_it_by_inheritance(host: Host) -> None:
    found = sets(host, graft_without("capabilities"))
    assert sorted(name for name, value in found.items() if value & NET_ADMIN) == ["Eff", "Inh", "Prm"]


def test_a_users_program_has_no_capability_and_none_to_inherit(host: Host) -> None:
    found = sets(host, [GRAFT], "--user", "nobody")
    assert [found[name] for name in ("Inh", "Prm", "Eff", "Amb")] == [0, 0, 0, 0]
