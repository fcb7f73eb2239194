"""The compiled connect(2) of transport swap, with real hooks: what it answers, what it leaves to Python, and that a
program cannot tell the two from each other.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import threading
from collections.abc import Iterator
from functools import partial

import pytest

from graft.model.transport import Transport
from graft.policy.model import Verdict
from graft.swap import fast_calls
from tests.support.building import Programs
from tests.support.counted import client
from tests.support.installation import Host
from tests.support.namespaces import CLIENT4, CLIENT6
from tests.support.wait import until

pytestmark = pytest.mark.kernel

PLAIN, NONBLOCK, CLOEXEC = [True, False, 0, 0, 0], int(socket.SOCK_NONBLOCK), int(socket.SOCK_CLOEXEC)


@pytest.fixture(autouse=True)
def can_serve(root: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(fast_calls.NOT_COMPILED, raising=False)
    if reason := fast_calls.why_not(Transport.SWAP):
        pytest.skip(reason)


@pytest.fixture
def server(host: Host) -> Iterator[socket.socket]:
    """Listens beside the host, where the program cannot be but through the host's stack."""
    with host.client.listener(CLIENT4) as listener:
        yield listener


def out(host: Host, spec: str = "0.0.0.0:dynamic", to: str = "0.0.0.0/0") -> str:
    return f"{to}={host.endpoint(spec)}"


@pytest.mark.parametrize("flags", [0, NONBLOCK, CLOEXEC, NONBLOCK | CLOEXEC])
def test_what_python_did_once_is_done_again_with_the_sockets_flags(
    host: Host, server: socket.socket, flags: int
) -> None:
    expected = [True, bool(flags & NONBLOCK), int(bool(flags & CLOEXEC)), 0, 0]
    with client(host, out(host)) as one:
        said, handed, served = one.tally(lambda: [one.connect(server, flags=flags) for _ in range(40)])
        assert said == [expected] * 40 and (handed, served) == (1, 39)
        others = [0, NONBLOCK, CLOEXEC, NONBLOCK | CLOEXEC]
        said, handed, served = one.tally(lambda: [one.connect(server, flags=other) for other in others * 3])
        assert said == [[True, bool(other & NONBLOCK), int(bool(other & CLOEXEC)), 0, 0] for other in others * 3]
        assert handed + served == 12 and handed <= 4  # each once, and once where Python took the last spare


def test_every_granted_destination_is_served_once_one_was(host: Host, server: socket.socket) -> None:
    with client(host, out(host, to="10.0.0.0/8")) as one, host.client.listener(CLIENT4) as other:
        assert one.connect(server) == PLAIN
        assert one.tally(lambda: one.connect(other)) == (PLAIN, 0, 1)
        # No rule covers this one: its socket stays in the container, where nothing leads there.
        assert one.tally(lambda: one.do("connect('192.0.2.1', 9)")) == ("ENETUNREACH", 1, 0)
        assert one.tally(lambda: one.connect(server)) == (PLAIN, 0, 1)


def test_an_ipv6_socket_is_replaced_by_one_that_is_ipv6_only_where_it_was(host: Host) -> None:
    value = "kept[-1].getsockopt(41, 26)"
    with client(host, out(host, "[::]:dynamic", "::/0")) as one, host.client.listener(CLIENT6) as listener:
        assert one.connect(listener, family=10) == PLAIN
        for only in (0, 1, 0):
            # Set by the kernel's default for the namespace, not by an option, which would be recorded.
            one.do(f"open('/proc/sys/net/ipv6/bindv6only', 'w').write('{only}')")
            assert one.tally(lambda: one.connect(listener, family=10)) == (PLAIN, 0, 1)
            assert one.do(value) == only


def test_an_address_that_is_not_of_the_sockets_family_is_pythons(host: Host, server: socket.socket) -> None:
    mapped = f"connect('::ffff:{CLIENT4}', {server.getsockname()[1]}, 10)"
    raw = f"connect_raw({server_bytes(server) + bytes(12)!r}, 28, family=10)"
    with client(host, out(host), out(host, "[::]:dynamic", "::/0")) as one, host.client.listener(CLIENT6) as six:
        assert [one.connect(server), one.connect(six, family=10)] == [PLAIN, PLAIN]
        for _ in range(2):
            assert one.tally(lambda: one.do(mapped)) == (PLAIN, 1, 0)
            assert one.tally(lambda: one.do(raw)) == ("EAFNOSUPPORT", 1, 0)
        assert one.tally(lambda: one.connect(six, family=10)) == (PLAIN, 0, 1)


def server_bytes(server: socket.socket) -> bytes:
    """struct sockaddr_in."""
    address, port = server.getsockname()
    return struct.pack("=H", socket.AF_INET) + struct.pack("!H", port) + socket.inet_aton(address) + bytes(8)


@pytest.mark.parametrize("size", ["0", "7", "8", "15", "129", "-1", "1 << 31"])
def test_an_address_that_is_too_short_or_too_long_is_pythons(host: Host, server: socket.socket, size: str) -> None:
    with client(host, out(host)) as one:
        assert one.connect(server) == PLAIN
        code = f"connect_raw({server_bytes(server) + bytes(200)!r}, {size})"
        assert one.tally(lambda: one.do(code)) == ("EINVAL", 1, 0)
        assert one.tally(lambda: one.do("connect_raw(ctypes.c_void_p(8))")) == ("EFAULT", 1, 0)
        assert one.tally(lambda: one.do(f"connect_raw({server_bytes(server) + bytes(200)!r}, 128)")) == ("", 0, 1)


NOT_PLAIN = {
    "an option": ("s.setsockopt(6, 1, 1)", "kept[-1].getsockopt(6, 1)", 1),
    "a duplicate": (
        "globals().update(other=os.dup(s.fileno()))",
        "os.fstat(other).st_ino == "
        "os.fstat(kept[-1].fileno()).st_ino and socket.socket(fileno=other).getpeername() is not None",
        True,
    ),
    "an epoll registration": (
        "globals().update(e=select.epoll()); e.register(s, 4, )",
        "[f for f, _ in e.poll(5)] == [kept[-1].fileno()]",
        True,
    ),
    "a child's copy": (
        "globals().update(r=os.pipe()); pid = os.fork()\nif pid == 0: os.read(r[0], 1); os._exit(0)",
        "[os.write(r[1], b'.'), os.wait()][0]",
        1,
    ),
    "O_ASYNC": ("fcntl.fcntl(s, fcntl.F_SETFL, os.O_ASYNC)", "fcntl.fcntl(kept[-1], 3) & os.O_ASYNC != 0", True),
    "a port": ("s.bind(('127.0.0.1', 0))", "1", 1),
}


@pytest.mark.parametrize("what", NOT_PLAIN)
def test_a_socket_with_more_to_it_is_pythons(host: Host, server: socket.socket, what: str) -> None:
    before, question, expected = NOT_PLAIN[what]
    with client(host, out(host)) as one:
        assert [one.connect(server) for _ in range(3)] == [PLAIN] * 3
        for _ in range(2):
            said, handed, served = one.tally(lambda: one.connect(server, before=before))
            assert said[0] is True and served == 0 and handed >= 1
            assert one.do(question) == expected
        assert one.tally(lambda: one.connect(server)) == (PLAIN, 0, 1)


def test_a_socket_of_another_user_is_replaced_by_one_of_that_user(host: Host, server: socket.socket) -> None:
    with client(host, out(host)) as one:
        assert one.connect(server) == PLAIN
        one.do("[os.setegid(7), os.seteuid(5)]")
        said, handed, served = one.tally(lambda: [one.connect(server) for _ in range(20)])
        assert said == [[True, False, 0, 5, 7]] * 20 and (handed, served) == (1, 19)
        one.do("[os.seteuid(0), os.setegid(0)]")
        assert one.tally(lambda: one.connect(server)) == (PLAIN, 0, 1)


def test_who_opened_a_socket_is_what_counts_and_not_whom_its_file_belongs_to(host: Host, server: socket.socket) -> None:
    with client(host, out(host)) as one:
        assert one.connect(server) == PLAIN
        chowned = "os.fchown(s.fileno(), 5, 7)"
        assert one.tally(lambda: one.connect(server, before=chowned)) == (PLAIN, 0, 1)
        dropped = "[os.setegid(7), os.seteuid(5)]"
        assert one.tally(lambda: one.connect(server, before=dropped)) == (PLAIN, 0, 1)


def test_a_thread_is_pythons_until_it_was_served(host: Host, server: socket.socket) -> None:
    address, port = server.getsockname()
    code = (
        f"[[t.start(), t.join()] for t in [threading.Thread(target=lambda: said.extend("
        f"connect({address!r}, {port}) for _ in range(3)))]] and said.copy()"
    )
    with client(host, out(host)) as one:
        assert one.connect(server) == PLAIN
        one.do("globals().update(said=[]) or 0")
        said, handed, served = one.tally(lambda: one.do(code))
        assert said == [PLAIN] * 3 and (handed, served) == (1, 2)


def test_a_policy_that_is_replaced_decides_the_next_connect(host: Host, server: socket.socket) -> None:
    port = host.port()
    with client(host, out(host)) as one:
        assert one.tally(lambda: [one.connect(server) for _ in range(3)])[1:] == (1, 2)
        one.replace_policy()
        assert one.tally(lambda: one.connect(server)) == ("ENETUNREACH", 1, 0)  # it stays in the container
        one.replace_policy(verdict=Verdict.DENY)
        assert one.tally(lambda: one.connect(server)) == ("EACCES", 1, 0)
        one.replace_policy(out(host, f"0.0.0.0:{port}"))
        assert one.tally(lambda: one.connect(server))[:2] == (PLAIN, 1)
        assert one.do("kept[-1].close() or 0") == 0
        one.replace_policy(out(host))
        assert one.tally(lambda: [one.connect(server) for _ in range(3)])[0] == [PLAIN] * 3


def test_the_supervisor_keeps_a_bounded_number_of_descriptors(host: Host, server: socket.socket) -> None:
    with client(host, out(host)) as one:
        one.connect(server)
        before = len(os.listdir(f"/proc/{one.supervisor()}/fd"))
        for _ in range(5):
            for address in (server.getsockname(), (CLIENT4, 1)):
                one.do(f"[connect(*{address!r}) for _ in range(50)] and 0")
                one.do("[server.close() for server in kept] and kept.clear() or 0")
                while _take(server):
                    pass
        assert len(os.listdir(f"/proc/{one.supervisor()}/fd")) <= before + 40  # of thousands of rounds


def _take(server: socket.socket) -> bool:
    server.settimeout(0.1)
    with contextlib.suppress(TimeoutError):
        server.accept()[0].close()
        return True
    return False


def test_without_spares_every_call_is_pythons(
    host: Host, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fast_calls._SPARES, Transport.SWAP, 0)
    with client(host, out(host)) as one:
        assert one.tally(lambda: [one.connect(server) for _ in range(3)]) == ([PLAIN] * 3, 3, 0)


def test_every_call_is_pythons_where_each_is_to_be_printed(host: Host, server: socket.socket) -> None:
    with client(host, out(host), verbose=True) as one:
        assert one.tally(lambda: [one.connect(server) for _ in range(3)]) == ([PLAIN] * 3, 3, 0)


def test_the_peer_sees_the_end_when_the_program_closes_its_socket(host: Host, server: socket.socket) -> None:
    with client(host, out(host)) as one:
        for _ in range(3):
            assert one.connect(server) == PLAIN
            peer, _ = server.accept()
            one.do("kept.pop().close() or 0")
            peer.settimeout(5)
            assert peer.recv(1) == b""
            peer.close()


def test_a_supervisor_that_is_killed_is_followed_by_one_that_learns_anew(host: Host, server: socket.socket) -> None:
    with client(host, out(host)) as one:
        one.connect(server)
        first = one.supervisor()
        os.kill(first, signal.SIGKILL)
        until("another supervisor", lambda: one.supervisor() not in (0, first))
        said, handed, _ = one.tally(lambda: [one.connect(server) for _ in range(3)])
        assert said == [PLAIN] * 3 and handed >= 1


@pytest.mark.parametrize(("kind", "said", "calls"), [((1, 1), "EINVAL", 1), ((2, 2), "", 2)])
def test_what_is_no_tcp_socket_is_pythons(
    host: Host, server: socket.socket, kind: tuple[int, int], said: str, calls: int
) -> None:
    """A socket of UDP is born on the host's stack already."""
    with client(host, out(host)) as one:
        assert one.connect(server) == PLAIN
        step = "connect_raw({!r}, 16, {}, {})".format(server_bytes(server), *kind)
        assert one.tally(lambda: one.do(step)) == (said, calls, 0)
        for number in (0, 99, -1, 1 << 31):  # the program's standard input, and none
            step = f"libc.connect({number}, {server_bytes(server)!r}, 16)"
            assert one.tally(partial(one.do, step)) == (-1, 1, 0)


def test_a_spare_that_could_not_be_used_is_no_spare_any_more(host: Host, server: socket.socket) -> None:
    address, port = server.getsockname()
    with client(host, out(host)) as one:
        assert one.connect(server, flags=NONBLOCK) == [True, True, 0, 0, 0]
        assert one.connect(server) == PLAIN
        step = f"connect_past_limit({address!r}, {port}, 2, {NONBLOCK})"
        assert one.tally(lambda: [one.do(step) for _ in range(4)]) == (["EBADF"] * 4, 4, 0)
        assert one.tally(lambda: [one.connect(server) for _ in range(20)])[0] == [PLAIN] * 20


def test_a_thread_with_the_id_of_one_that_has_ended_is_pythons_and_served_then(
    host: Host, server: socket.socket
) -> None:
    address, port = server.getsockname()
    with client(host, out(host)) as one:
        one.connect(server)
        first = None
        for _ in range(30):
            if first is not None:
                one.do(f"open('/proc/sys/kernel/ns_last_pid', 'w').write('{first - 1}')")
            (pid, said), handed, served = one.tally(lambda: one.do(f"in_child({address!r}, {port})"))
            assert (said, handed, served) == ([PLAIN, PLAIN], 1, 1)
            if pid == first:
                return
            first = first or pid
    pytest.skip("no id was given to another process in time")


def test_a_socket_that_is_not_the_containers_is_left_alone(host: Host, server: socket.socket) -> None:
    """One that it has received, of another container or of none: the hooks give no answer about it."""
    raw = server_bytes(server)
    with client(host, out(host)) as one, socket.socket() as foreign:
        assert one.connect(server) == PLAIN
        for _ in range(2):
            socket.send_fds(one.gifts, [b"."], [foreign.fileno()])
            # Right after a connect whose answer is still on the desk.
            said = one.tally(lambda: [one.connect(server), one.do(f"same_after_connect({raw!r})")])
            assert said == ([PLAIN, True], 1, 1)


def test_a_number_that_gets_other_files_meanwhile_leaks_nothing(
    host: Host, server: socket.socket, programs: Programs
) -> None:
    """What is behind it when the spare comes is replaced: the program loses a file of its own, and gains nothing."""
    command = [str(programs["renumbering"]), "3", *map(str, server.getsockname())]
    with client(host, out(host)) as one, Draining(server):
        assert one.connect(server) == PLAIN
        before = len(os.listdir(f"/proc/{one.supervisor()}/fd"))
        _, handed, served = one.tally(lambda: one.do(f"subprocess.run({command!r}, stdout=2).returncode"))
        assert served > 50, (handed, served)
        assert len(os.listdir(f"/proc/{one.supervisor()}/fd")) <= before + 40  # of thousands of rounds
        assert one.tally(lambda: [one.connect(server) for _ in range(3)])[0] == [PLAIN] * 3


class Draining:
    """Takes the connections of a listener, and closes them, in a thread."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener, self._thread = listener, threading.Thread(target=self._drain)

    def _drain(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._listener.accept()[0].close()

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()


def test_a_program_cannot_tell_it_from_plain_python(
    host: Host, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, port = server.getsockname()
    hows = [{}, {"flags": NONBLOCK}, {"flags": CLOEXEC}, {"before": NOT_PLAIN["a duplicate"][0]}]
    steps = [f"connect({address!r}, {port}, **{how!r})" for how in hows]
    steps += [f"connect({address!r}, 1)", "connect('192.0.2.1', 9)", f"connect({address!r}, 1, 2, {NONBLOCK})"]

    def served_and_said() -> tuple[int, list[object]]:
        with client(host, out(host, to="10.0.0.0/8")) as one:
            said, _, served = one.tally(lambda: [one.do(step) for step in steps * 3])
            return served, said

    served, said = served_and_said()
    monkeypatch.setenv(fast_calls.NOT_COMPILED, "1")
    assert served_and_said() == (0, said) and served >= 10
