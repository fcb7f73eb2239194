"""What a graftd leaves to the next one: noted, stored with a keeper, sorted again, continued byte for byte."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from graft.keeper import protocol
from graft.splice import kept_records
from graft.splice.descriptor_store import DescriptorStore
from graft.splice.event_loop import EventLoop
from graft.splice.kept import MAX_PIPES, Kept
from graft.splice.kept_records import COPYING, KeptRecords, Kind, Record
from graft.splice.pipes import Pipe, PipePool


def test_what_was_noted_is_read_by_the_next_one() -> None:
    first = KeptRecords()
    listener = Record(Kind.LISTENER, 7, near=11, port=80, address=bytes(range(16)))
    connection = Record(Kind.INBOUND, 7, 3, 12, 13, 0, 6, True, 443, b"\1" * 16)
    slots = [first.add(one) for one in (listener, connection, listener)]
    first.set_flag(1, COPYING, True)
    notes, at = first.pipe_notes(1, 1)
    notes[at] = 500
    first.release(0)
    second = KeptRecords(os.dup(first.fd))
    found = second.occupied()
    assert slots == [0, 1, 2]
    assert set(found) == {1, 2}
    assert found[1] == Record(Kind.INBOUND, 7, 3, 12, 13, COPYING, 6, True, 443, b"\1" * 16, (0, 500))
    assert found[2] == listener
    assert [second.add(listener), second.add(listener)] == [0, 3]
    for one in (first, second):
        one.close()


def test_the_table_is_limited_and_cannot_shrink() -> None:
    records = KeptRecords()
    for _ in range(kept_records.MAX_SLOTS):
        assert records.add(Record(Kind.CONTROL)) is not None
    assert records.add(Record(Kind.CONTROL)) is None
    with pytest.raises(OSError):
        os.ftruncate(records.fd, 0)
    records.close()


def test_connections_leave_slots_for_listeners() -> None:
    records = KeptRecords()
    slots = 0
    while (last := records.add_accepted(Record(Kind.INBOUND), Kind.ACCEPTED, 1)) is not None:
        slots, one = slots + 1, last
    assert slots == kept_records.MAX_SLOTS - kept_records.FOR_LISTENERS
    for _ in range(kept_records.FOR_LISTENERS):
        assert records.add(Record(Kind.LISTENER)) is not None
    assert records.add(Record(Kind.LISTENER)) is None
    records.release(one)
    assert records.add_accepted(Record(Kind.INBOUND), Kind.ACCEPTED, 1) is None
    assert records.add(Record(Kind.LISTENER)) == one
    records.close()


def test_the_names_of_all_fit_into_one_string_of_the_environment() -> None:
    names = [kept_records.slot_name(slot) for slot in range(kept_records.MAX_SLOTS)]
    names += [kept_records.pipe_name(number) for number in range(MAX_PIPES)]
    assert 2 * sum(len(name) + 1 for name in names) + len("records-1:") < protocol.MAX_NAMES
    assert len({*names}) == len(names)
    assert [kept_records.parse_name(name) for name in ("s0", "pz", "s10", "p", "records", "x1", "s-1", "sA")] == [
        ("s", 0),
        ("p", 35),
        ("s", 36),
        *[None] * 5,
    ]


# ---- messages to the keeper


class Keeper:
    """The keeper's end: what it has by name, read when it is asked to."""

    def __init__(self, folder: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(str(folder / "k"))
        self.sock.setblocking(False)
        self.has: dict[str, list[int]] = {}

    def connected(self) -> socket.socket:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        made.connect(self.sock.getsockname())
        return made

    def read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                raw, fds, _, _ = socket.recv_fds(self.sock, 4096, 8)
                message = protocol.parse(raw)
                if protocol.REMOVE in message:
                    for fd in self.has.pop(message[protocol.NAME], []):
                        os.close(fd)
                elif protocol.BARRIER in message:
                    for fd in fds:
                        os.close(fd)
                elif protocol.STORE in message:
                    self.has.setdefault(message[protocol.NAME], []).extend(fds)

    def received(self) -> list[tuple[str, int]]:
        """What it gives to the next graftd."""
        self.read()
        return [(name, os.dup(fd)) for name, fds in self.has.items() for fd in fds]

    def close(self) -> None:
        self.read()
        for fds in self.has.values():
            for fd in fds:
                os.close(fd)
        self.sock.close()


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Keeper]:
    made = Keeper(tmp_path)
    yield made
    made.close()


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    made = EventLoop(lambda: None, interval=0.005)
    yield made
    made.shut_down()


def test_what_the_keeper_has_no_room_for_waits_and_what_is_closed_meanwhile_is_never_sent(
    keeper: Keeper, loop: EventLoop
) -> None:
    store = DescriptorStore(loop, keeper.connected())
    with open("/dev/null") as file:
        for number in range(100):
            store.put(f"s{number}", [file.fileno()])
        assert not store.has_sent_all
        store.drop("s0")  # sent before: the keeper is told, in order
        for number in range(50, 100):
            store.drop(f"s{number}")
        store.put("s60", [file.fileno(), file.fileno()])
        deadline = time.monotonic() + 10
        while not store.has_sent_all and time.monotonic() < deadline:
            keeper.read()
            loop.turn()
        keeper.read()
    assert store.has_sent_all
    assert sorted(keeper.has) == sorted([f"s{number}" for number in range(1, 50)] + ["s60"])
    assert len(keeper.has["s60"]) == 2
    store.close()


def test_the_question_whether_all_is_done_may_wait_like_everything(keeper: Keeper, loop: EventLoop) -> None:
    """What is sent with it is open until then: else nothing was sent to that keeper any more."""
    store, done = DescriptorStore(loop, keeper.connected()), list[bool]()
    with open("/dev/null") as file:
        for number in range(100):
            store.put(f"s{number}", [file.fileno()])
        store.when_done(lambda: done.append(True))
        loop.turn()
        assert not store.has_sent_all and not done
        while not store.has_sent_all:
            keeper.read()
            loop.turn()
        store.put("later", [file.fileno()])
        keeper.read()
    assert len(keeper.has) == 101
    loop.turn()
    assert done == [True]
    store.close()


def test_far_that_waits_is_dropped_with_near_that_was_sent(keeper: Keeper, loop: EventLoop) -> None:
    store = DescriptorStore(loop, keeper.connected())
    with open("/dev/null") as file:
        store.put("s1", [file.fileno()])
        while store.has_sent_all:
            store.put(f"x{id(object())}", [file.fileno()])
            store.say({"STATUS": "busy"})
        store.put("s1", [file.fileno()], more=True)
        store.drop("s1")
        while not store.has_sent_all:
            keeper.read()
            loop.turn()
        keeper.read()
    assert "s1" not in keeper.has
    store.close()


def test_a_keeper_that_has_died_stops_nothing(keeper: Keeper, loop: EventLoop) -> None:
    store = DescriptorStore(loop, keeper.connected())
    keeper.sock.close()
    with open("/dev/null") as file:
        store.put("s1", [file.fileno()])
        store.drop("s1")
    assert store.has_sent_all and store.flush(1.0)
    keeper.sock = socket.socket()
    keeper.sock.setblocking(False)
    keeper.read = lambda: None  # type: ignore[method-assign]
    store.close()


# ---- what the next one finds


def kept_with(keeper: Keeper, loop: EventLoop) -> Kept:
    return Kept(loop, keeper.connected(), keeper.received())


def test_the_next_one_finds_sockets_as_they_were_noted_and_closes_the_rest(keeper: Keeper, loop: EventLoop) -> None:
    first = kept_with(keeper, loop)
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(sock) for _ in range(4) for sock in socket.socketpair()]
        whole, half, gone = socks[0:2], socks[2:4], socks[4:6]
        record = Record(Kind.INBOUND, 7, 3, port=80)
        slots = [first.add_accepted(record, one[0]) for one in (whole, half, gone)]
        first.complete(slots[0], Kind.INBOUND, whole[1])
        first.complete(slots[1], Kind.INBOUND, half[1])
        half_name = kept_records.slot_name(slots[1] or 0)
        keeper.read()
        os.close(keeper.has[half_name].pop())  # its far end never came to the keeper
        assert first._records is not None
        first._records.release(slots[2] or 0)  # killed before the keeper was told
        second = kept_with(keeper, loop)
        found = second.take(Kind.INBOUND, 7)
        assert [one.slot for one in found] == [slots[0]]
        assert [one.getsockname() for one in found[0].socks] == [one.getsockname() for one in whole]
        assert second.take(Kind.INBOUND, 8) == [] and second.take(Kind.ACCEPTED, 7) == []
        keeper.read()
        assert half_name not in keeper.has
        second.close_found(found[0])
        keeper.read()
        assert kept_records.slot_name(slots[0] or 0) not in keeper.has
        second.close()
        first.close()


def test_what_nobody_takes_is_ended_in_its_containers_turns(keeper: Keeper, loop: EventLoop) -> None:
    first = kept_with(keeper, loop)
    (near, client), (far, server) = socket.socketpair(), socket.socketpair()
    with near, client, far, server:
        first.complete(first.add_accepted(Record(Kind.INBOUND, 7), near), Kind.INBOUND, far)
        second = kept_with(keeper, loop)
        loop._turns.hold(7, 1e12)
        second.close_untaken(lambda _: True)
        loop.turn()
        for peer in (client, server):
            peer.setblocking(False)
            with pytest.raises(BlockingIOError):
                peer.recv(1)
        loop._turns.release(2e12)
        loop.turn()
        assert (client.recv(1), server.recv(1)) == (b"", b"")
        second.close()
        first.close()


def test_a_pipe_that_two_connections_say_they_have_is_nobodys(keeper: Keeper, loop: EventLoop) -> None:
    first = kept_with(keeper, loop)
    pipes = [Pipe(), Pipe()]
    for pipe in pipes:
        first.add_pipe(pipe)
        os.write(pipe.write, b"data")
    with contextlib.ExitStack() as stack:
        slots = []
        for number in (0, 0, 1):
            near, far = socket.socketpair()
            stack.enter_context(near)
            stack.enter_context(far)
            slot = first.add_accepted(Record(Kind.INBOUND, 7), near)
            first.complete(slot, Kind.INBOUND, far)
            notes, at = first.pipe_notes(slot, 1)
            notes[at] = pipes[number].inode
            slots.append(slot or 0)
        second = kept_with(keeper, loop)
        found = {one.slot: second.take_pipes(one) for one in second.take(Kind.INBOUND, 7)}
        assert [found[slot] for slot in slots[:2]] == [None, None]
        taken = found[slots[2]]
        assert taken is not None and taken[0] is None and taken[1] is not None
        assert (taken[1].number, taken[1].filled) == (pipes[1].number, 4)
        for pipe in (*pipes, taken[1]):
            pipe.close()
        del notes
        second.close()
        first.close()


def fill_queue(kept: Kept) -> None:
    """Until the keeper takes nothing more."""
    while kept.store.has_sent_all:
        kept.store.say({"STATUS": "busy"})


def test_the_number_of_a_pipe_is_free_when_the_keeper_was_sent_that(keeper: Keeper, loop: EventLoop) -> None:
    first = kept_with(keeper, loop)
    pipes = [Pipe(), Pipe(), Pipe()]
    first.add_pipe(pipes[0])
    fill_queue(first)
    before = pipes[0].number
    first.drop_pipe(pipes[0])
    first.add_pipe(pipes[1])
    assert pipes[1].number != before
    while not first.store.has_sent_all:
        keeper.read()
        loop.turn()
    first.add_pipe(pipes[2])
    assert pipes[2].number == before
    for pipe in pipes:
        pipe.close()
    first.close()


def test_numbers_wait_for_no_keeper_that_has_died(keeper: Keeper, loop: EventLoop) -> None:
    first = kept_with(keeper, loop)
    pipes = [Pipe(), Pipe()]
    first.add_pipe(pipes[0])
    fill_queue(first)
    before = pipes[0].number
    first.drop_pipe(pipes[0])
    first.store_all(keeper.connected())
    first.add_pipe(pipes[1])
    assert pipes[1].number == before
    for pipe in pipes:
        pipe.close()
    first.close()


def test_a_pipe_that_had_the_same_number_before_is_nobodys(keeper: Keeper, loop: EventLoop) -> None:
    """The keeper has the one before: what it was told of the next one was never sent."""
    first = kept_with(keeper, loop)
    old, new = Pipe(), Pipe()
    first.add_pipe(old)
    os.write(old.write, b"another's")
    keeper.read()
    near, far = socket.socketpair()
    with near, far:
        slot = first.add_accepted(Record(Kind.INBOUND, 7), near)
        first.complete(slot, Kind.INBOUND, far)
        notes, at = first.pipe_notes(slot, 0)
        notes[at] = new.inode
        fds = keeper.received()
        second = Kept(loop, keeper.connected(), fds)
        found = second.take(Kind.INBOUND, 7)
        assert len(found) == 1 and second.take_pipes(found[0]) is None
        assert old.filled == 0  # whoever has it open
        second.close_found(found[0])
        keeper.read()
        assert kept_records.pipe_name(old.number) not in keeper.has
    for pipe in (old, new):
        pipe.close()
    del notes
    second.close()
    first.close()


def test_nothing_is_left_in_a_pipe_that_is_discarded() -> None:
    pipe = Pipe()
    other = os.dup(pipe.read)
    os.write(pipe.write, bytes(100_000))
    PipePool().discard(pipe)
    assert os.read(other, 1) == b""  # its end
    os.close(other)


def test_a_table_of_another_version_is_not_read_and_nothing_is_taken_over(keeper: Keeper, loop: EventLoop) -> None:
    with socket.socket() as sock:
        received = [("records-0", os.memfd_create("other")), ("s0", os.dup(sock.fileno())), ("odd", os.dup(0))]
        kept = Kept(loop, keeper.connected(), received)
    assert kept.take(Kind.LISTENER, 0) == []
    for _, fd in received:
        with pytest.raises(OSError):
            os.fstat(fd)
    kept.close()
