"""The compiled part of a supervisor, as far as it goes without a listener: its stock, the threads that it knows, and
which connects Python shows it."""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.datapath import layout
from graft.model.sockaddr import Sockaddr
from graft.model.transport import Home, Transport
from graft.policy.model import Verdict
from graft.state.call_times import Slot
from graft.swap import fast_calls
from graft.swap._fast_calls import FastCalls
from graft.swap.decision import TCP_CLOSE, Action, Call, Decision, SocketFacts, decide
from graft.swap.desk import Descriptor, DeskAnswer
from graft.swap.fast_calls import CompiledStock, is_plain_connect
from graft.swap.socket_pool import SocketKind

TCP = (socket.AF_INET, socket.SOCK_STREAM, 6, 0, 0)
UDP = (socket.AF_INET, socket.SOCK_DGRAM, 0, 0, 0)
MAX_SPARES, MAX_CALLERS = 64, 128
ANSWER_SIZE = layout.DeskValue.options.offset + 8 - layout.DeskValue.netns.offset  # to the options themselves


def new_desk() -> bytearray:
    return bytearray(ctypes.sizeof(layout.DeskValue))


@pytest.fixture(params=["births", "connects"])
def fast(request: pytest.FixtureRequest) -> Iterator[FastCalls]:
    one = FastCalls(-1, 0xC000003E, new_desk())
    if request.param == "births":
        one.answer_births(41, "net:[1]")
    else:
        one.answer_connects(42)
    yield one


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def new() -> int:
    return os.open(os.devnull, os.O_RDONLY)


def own_thread() -> tuple[int, int]:
    """A pidfd and an fdinfo folder."""
    return os.pidfd_open(os.getpid()), os.open("/proc/self/fdinfo", os.O_RDONLY)


def test_a_spare_is_taken_by_its_kind_and_owner_only(fast: FastCalls) -> None:
    fd = new()
    fast.add(*TCP, fd)
    for at, other in enumerate((10, 2, 0, 5, 7)):
        kind: Any = [*TCP[:at], other, *TCP[at + 1 :]]
        assert (fast.count(*kind), fast.take(*kind)) == (0, -1)
    assert (fast.count(*TCP), fast.take(*TCP), fast.count(*TCP), fast.take(*TCP)) == (1, fd, 0, -1)
    os.close(fd)


def test_the_stock_is_bounded_and_the_oldest_go(fast: FastCalls) -> None:
    before = len(descriptors())
    for _ in range(3):
        fast.add(*UDP, new())
    for _ in range(MAX_SPARES):
        fast.add(*TCP, new())
    assert (fast.count(*UDP), fast.count(*TCP)) == (0, MAX_SPARES)
    assert len(descriptors()) == before + MAX_SPARES


def test_the_threads_that_are_known_are_bounded_and_the_descriptors_are_its_own(fast: FastCalls) -> None:
    pidfd, fdinfo = own_thread()
    before = len(descriptors())
    for tid in range(1, 4 * MAX_CALLERS):
        fast.know(tid, pidfd, fdinfo)
        fast.know(tid, pidfd, fdinfo)
    assert len(descriptors()) == before + 2 * MAX_CALLERS
    os.close(pidfd)
    os.close(fdinfo)


def test_a_thread_that_cannot_be_looked_up_leaves_nothing_behind(
    fast: FastCalls, request: pytest.FixtureRequest
) -> None:
    births = request.node.callspec.params["fast"] == "births"
    pidfd, fdinfo = own_thread()
    before = descriptors()
    with pytest.raises(OSError, match="Bad file"):
        fast.know(1, -1, fdinfo)
    with pytest.raises(OSError, match="Bad file"):
        fast.know(1, pidfd, -1)
    if births:
        with pytest.raises(OSError, match="No such file"):
            fast.know(1, pidfd, folder := os.open("/", os.O_RDONLY))
        os.close(folder)
    assert descriptors() == before
    os.close(pidfd)
    os.close(fdinfo)


def test_all_is_closed_and_released_with_the_object() -> None:
    before, types = descriptors(), sys.getrefcount(FastCalls)
    desk, slot = new_desk(), bytearray(ctypes.sizeof(Slot))
    references = sys.getrefcount(desk)
    pidfd, fdinfo = own_thread()
    for _ in range(50):
        fast = FastCalls(-1, 1, desk)
        fast.answer_births(1, "net:[1]")
        fast.make_spares(16)
        fast.add(*TCP, new())
        fast.know(7, pidfd, fdinfo)
        fast.answer_connects(2)
        fast.know(7, pidfd, fdinfo)
        fast.count_times(slot)
    del fast
    slot.append(0)  # nothing has its memory any more
    os.close(pidfd)
    os.close(fdinfo)
    assert (descriptors(), sys.getrefcount(FastCalls), sys.getrefcount(desk)) == (before, types, references)
    desk.append(0)  # nothing has its memory any more


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((-1, 1, bytearray(7)), ValueError),
        ((-1, 1, bytes(ctypes.sizeof(layout.DeskValue))), BufferError),
        ((-1, 1), TypeError),
        (("x", 1, new_desk()), TypeError),
    ],
)
def test_what_is_no_desk_is_refused(arguments: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        FastCalls(*arguments)


@pytest.mark.parametrize("name", ["", "n" * 64])
def test_what_is_no_namespaces_name_is_refused(fast: FastCalls, name: str) -> None:
    with pytest.raises(ValueError):
        fast.answer_births(1, name)


@pytest.mark.parametrize("size", [0, ANSWER_SIZE - 1, ANSWER_SIZE + 1])
def test_what_is_no_answer_is_refused(fast: FastCalls, size: int) -> None:
    with pytest.raises(ValueError):
        fast.remember(bytes(size), *TCP[:3])


def test_the_answers_that_are_known_are_bounded(fast: FastCalls) -> None:
    """A container can bring about as many as it has flags and endpoints."""
    for number in range(10_000):
        fast.remember(number.to_bytes(ANSWER_SIZE, "big"), *TCP[:3])


def test_what_is_no_page_is_refused(fast: FastCalls) -> None:
    pages: tuple[Any, ...] = (bytearray(79), bytes(80), None)
    for page, error in zip(pages, (ValueError, BufferError, TypeError), strict=True):
        with pytest.raises(error):
            fast.serve(page)


def test_an_error_of_the_listener_is_raised(fast: FastCalls) -> None:
    with mmap.mmap(-1, mmap.PAGESIZE) as page, pytest.raises(OSError, match="Bad file"):
        fast.serve(page)


@pytest.mark.parametrize(("slot", "error"), [(bytearray(7), ValueError), (bytes(7), BufferError), (None, TypeError)])
def test_what_is_no_slot_of_call_times_is_refused(fast: FastCalls, slot: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        fast.count_times(slot)


@pytest.mark.parametrize("count", [-1, MAX_SPARES + 1])
def test_too_many_spares_are_refused(fast: FastCalls, count: int) -> None:
    with pytest.raises(ValueError):
        fast.make_spares(count)


def test_a_stock_is_filled_for_the_pool_and_gives_sockets(fast: FastCalls) -> None:
    kind = SocketKind(socket.AF_INET6, socket.SOCK_STREAM | socket.SOCK_NONBLOCK, 6, (5, 7))
    stock, before = CompiledStock(fast, Transport.BORN), len(descriptors())
    assert stock.take(kind) is None
    for _ in range(2):
        stock.fill(kind, lambda: socket.socket(*kind[:3]))
    assert fast.count(*kind[:3], 5, 7) == len(descriptors()) - before == 16
    taken = stock.take(kind)
    assert taken is not None and taken.family == socket.AF_INET6 and fast.count(*kind[:3], 5, 7) == 15
    taken.close()


BOTH = [Transport.SWAP, Transport.BORN]


@pytest.mark.parametrize("transport", BOTH)
def test_plain_python_serves_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, transport: Transport) -> None:
    desk: Any = SimpleNamespace(memory=new_desk())
    monkeypatch.delenv(fast_calls.NOT_COMPILED, raising=False)
    monkeypatch.setattr(fast_calls, "_tells_ids", lambda: True)
    monkeypatch.setattr(fast_calls, "threads_have_pidfds", lambda: True)
    assert fast_calls.why_not(transport) == "" and fast_calls.open_fast_calls(-1, transport, "net:[1]", desk)
    assert (fast_calls.open_fast_calls(-1, transport, "", desk) is None) == (transport is Transport.BORN)
    monkeypatch.setenv(fast_calls.NOT_COMPILED, "1")
    assert "GRAFT_NO_COMPILED" in fast_calls.why_not(transport)
    assert fast_calls.open_fast_calls(-1, transport, "net:[1]", desk) is None


def test_plain_python_serves_where_a_part_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(fast_calls.NOT_COMPILED, raising=False)
    monkeypatch.setattr(fast_calls, "threads_have_pidfds", lambda: True)
    monkeypatch.setattr(fast_calls, "_tells_ids", lambda: False)
    assert "6.13" in fast_calls.why_not(Transport.BORN) and not fast_calls.why_not(Transport.SWAP)
    monkeypatch.setattr(fast_calls, "threads_have_pidfds", lambda: False)
    assert "6.13" in fast_calls.why_not(Transport.BORN) and "6.9" in fast_calls.why_not(Transport.SWAP)
    monkeypatch.setattr(fast_calls, "LAYOUT_VERSION", layout.LAYOUT_VERSION + 1)
    assert all("another version" in fast_calls.why_not(transport) for transport in BOTH)
    monkeypatch.setitem(sys.modules, "graft.swap._fast_calls", None)
    monkeypatch.delattr("graft.swap._fast_calls")
    assert all("compiler" in fast_calls.why_not(transport) for transport in BOTH)


ADDRESS = Sockaddr(4, bytes(16), 80)
TO_HOST = Decision(Action.TO_HOST, 3, 1)
FACTS = SocketFacts(
    netns=2,
    container_netns=2,
    endpoint_netns=1,
    endpoint=3,
    local_port=0,
    home=Home.CONTAINER,
    family=4,
    state=TCP_CLOSE,
    bound=0,
    verdict=Verdict.GRANT,
    endpoint_family=4,
    bind_default=0,
    connect_default=0,
    protocol=socket.IPPROTO_TCP,
    endpoint_flags=0,
)
DESCRIPTOR = Descriptor(
    references=3, flags=os.O_RDWR, probed=layout.PROBED | layout.PROBED_FLAGS, options=0, overflow=0, owner=None
)


def is_plain(call: Call = Call.CONNECT, address: Sockaddr | None = ADDRESS, **changed: Any) -> bool:
    facts = FACTS._replace(**{name: value for name, value in changed.items() if name in FACTS._fields})
    descriptor = DESCRIPTOR._replace(**{name: value for name, value in changed.items() if name in DESCRIPTOR._fields})
    return is_plain_connect(call, address, changed.get("decision", TO_HOST), DeskAnswer(facts, descriptor, b""))


def test_a_connect_that_needs_a_new_socket_and_its_flags_is_plain() -> None:
    assert decide(Call.CONNECT, ADDRESS, FACTS) == TO_HOST
    for flags in (0, os.O_NONBLOCK, os.O_CLOEXEC, os.O_NONBLOCK | os.O_CLOEXEC):
        for more in (0, layout.PROBED_OWNER):
            assert is_plain(flags=os.O_RDWR | flags, probed=DESCRIPTOR.probed | more)


@pytest.mark.parametrize(
    "changed",
    [
        {"call": Call.BIND},
        {"call": Call.LISTEN},
        {"address": None},
        {"address": ADDRESS._replace(mapped=True)},
        {"decision": Decision(Action.TO_HOST, 3, 1, v6only=True)},
        {"decision": Decision(Action.TO_CONTAINER)},
        {"decision": Decision(Action.REFUSE)},
        {"decision": Decision(Action.RESUME)},
        {"home": Home.HOST},
        {"protocol": 262},
        {"local_port": 1},
        {"options": 1},
        {"overflow": 1},
        {"probed": layout.PROBED_FLAGS},
        {"probed": layout.PROBED},
        {"probed": DESCRIPTOR.probed | layout.PROBED_EPOLL},
        {"flags": os.O_RDWR | os.O_ASYNC},
        {"flags": os.O_RDWR | os.O_APPEND},
        {"flags": os.O_RDONLY},
    ],
)
def test_a_connect_that_needs_more_is_not(changed: dict[str, Any]) -> None:
    assert is_plain() and not is_plain(**changed)


@given(
    facts=st.builds(
        FACTS._replace,  # a socket of the container's, of which a connect may make one of the host's
        endpoint_netns=st.integers(1, 3),
        endpoint=st.integers(0, 3),
        local_port=st.integers(0, 1),
        family=st.sampled_from([4, 6]),
        bound=st.integers(0, 1),
        verdict=st.sampled_from([int(one) for one in Verdict]),
        endpoint_family=st.sampled_from([4, 6]),
        connect_default=st.integers(0, 1),
        endpoint_flags=st.integers(0, 31),
    ),
    addresses=st.lists(st.tuples(st.binary(min_size=16, max_size=16), st.integers(0, 65535)), min_size=2, max_size=2),
    only=st.lists(st.booleans(), min_size=2, max_size=2),
)
def test_of_a_connects_address_a_decision_takes_the_family_alone(
    facts: SocketFacts, addresses: list[tuple[bytes, int]], only: list[bool]
) -> None:
    """So the compiled part need not compare it, nor ask first whether a socket is IPv6-only."""
    first, second = (
        decide(Call.CONNECT, Sockaddr(facts.family, *address), facts, v6only)
        for address, v6only in zip(addresses, only, strict=True)
    )
    assert first == second
