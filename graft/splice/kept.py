"""What outlives this graftd, because its keeper has it open too; and what the graftd before has left.

    this graftd:      socket made ──▶ slot noted (kept_records.py) ──▶ stored (descriptor_store.py)
                      to be closed ──▶ slot freed ──▶ ended ──▶ removed from the keeper's, closed here
    the next graftd:  received ──▶ sorted by slot, cookies compared ──▶ `Found`, until somebody takes it, or closes it

What is found proves nothing: who takes it asks the kernel and the maps whose it is and whether that is granted now.
What nobody takes is ended. Where there is no keeper, nothing is noted.

Slots and the numbers of pipes are used again, and what is told to the keeper may wait here when this process dies: then
the keeper has under a name what had it before. So sockets are known by their cookies, and pipes by their inodes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import stat
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from graft.kernel import socket_calls, tcp
from graft.splice.descriptor_store import DescriptorStore
from graft.splice.event_loop import EventLoop
from graft.splice.kept_records import (
    CONNECTIONS,
    RECORDS_NAME,
    KeptRecords,
    Kind,
    Record,
    parse_name,
    pipe_name,
    slot_name,
)
from graft.splice.log import warn
from graft.splice.pipes import NOT_KEPT, Pipe, inode, throw_away
from graft.splice.publication import Publication

_DIGEST_BYTES = 16
MAX_PIPES = 1024


@dataclass(frozen=True, slots=True)
class Found:
    """What the graftd before has left in a slot: its sockets, as the record says: near, or near and far."""

    slot: int
    record: Record
    socks: tuple[socket.socket, ...]


def digest(wanted: Publication) -> bytes:
    """What a listener is for: two publications have the same digest if they are equal."""
    end, unix = wanted.endpoint, wanted.endpoint.unix
    fields = [
        [end.id, end.family, end.address.hex(), end.port, end.netns, end.dual_stack, unix.spec if unix else None],
        [wanted.family, wanted.address.hex(), wanted.port, wanted.v6only, wanted.protocol],
        [*wanted.dialled[:1], wanted.dialled[1].hex(), wanted.dialled[2]] if wanted.dialled else None,
    ]
    return hashlib.blake2b(json.dumps(fields).encode(), digest_size=_DIGEST_BYTES).digest()


class Kept:
    """``sock`` sends to the keeper, None: there is none. ``received``: names and descriptors that the keeper gave."""

    def __init__(
        self, loop: EventLoop, sock: socket.socket | None = None, received: Sequence[tuple[str, int]] = ()
    ) -> None:
        self.store = DescriptorStore(loop, sock)
        self._loop = loop
        self._found: dict[int, Found] = {}
        self._found_pipes: dict[int, Pipe] = {}
        """By their inodes."""
        self._socks: dict[int, tuple[socket.socket, ...]] = {}
        """What every slot has, found or made."""
        self._pipes: dict[int, tuple[int, int]] = {}
        """Both ends of every pipe that the keeper has, or is to have."""
        self._free_pipes: list[int] = []
        self._next_pipe = 0
        self._records: KeptRecords | None = None
        loop.shares_sockets = self.store.is_kept
        with_records = [fd for name, fd in received if name == RECORDS_NAME]
        if self.store.is_kept:
            self._records = _opened(with_records)
        if self._records is not None:
            if self._records.fd not in with_records:
                self.store.drop(RECORDS_NAME)
                self.store.put(RECORDS_NAME, [self._records.fd])
            self._sort(received)
        else:
            for _, fd in received:
                os.close(fd)

    def _sort(self, received: Sequence[tuple[str, int]]) -> None:
        assert self._records is not None
        records = self._records.occupied()
        by_slot: dict[int, dict[int, socket.socket]] = {}
        pipes: dict[int, list[int]] = {}
        strange = set()
        for name, fd in received:
            kind, number = parse_name(name) or ("", 0)
            if kind == "s" and number in records and stat.S_ISSOCK(os.fstat(fd).st_mode):
                sock = socket.socket(fileno=fd)
                by_slot.setdefault(number, {})[tcp.cookie(sock)] = sock
            elif kind == "p" and stat.S_ISFIFO(os.fstat(fd).st_mode):
                pipes.setdefault(number, []).append(fd)
            elif fd != self._records.fd:
                strange.add(name)
                os.close(fd)
        for name in strange:
            self.store.drop(name)
        self._next_pipe = max(pipes, default=-1) + 1
        self._free_pipes = [number for number in range(self._next_pipe) if number not in pipes]
        self._sort_pipes(pipes, records.values())
        for slot, record in records.items():
            self._sort_slot(slot, record, by_slot.get(slot, {}))

    def _sort_pipes(self, received: Mapping[int, list[int]], records: Collection[Record]) -> None:
        """Those that one connection has, and with both ends. The others are closed."""
        users = Counter(noted for record in records for noted in record.pipes)
        for number, fds in received.items():
            fds.sort(key=_is_writer)
            noted = inode(fds[0])
            is_whole = [(_is_writer(fd), inode(fd)) for fd in fds] == [(False, noted), (True, noted)]
            if is_whole and users[noted] == 1 and noted not in self._found_pipes:
                self._found_pipes[noted] = Pipe((fds[0], fds[1]), number)
                self._pipes[number] = fds[0], fds[1]
            else:
                for fd in fds:
                    if not _is_writer(fd):
                        throw_away(fd)
                    os.close(fd)
                self._drop_pipe(number)

    def _drop_pipe(self, number: int) -> None:
        """Have the keeper close a pipe. Its number is free when the keeper was sent that."""
        self._pipes.pop(number, None)
        self.store.drop(pipe_name(number), partial(self._free_pipes.append, number))

    def _lose_pipe(self, pipe: Pipe) -> None:
        """Close a pipe, and what is in it is lost."""
        throw_away(pipe.read)
        self.drop_pipe(pipe)
        pipe.close()

    def _sort_slot(self, slot: int, record: Record, socks: dict[int, socket.socket]) -> None:
        wanted = [record.near, record.far] if record.far else [record.near]
        found = Found(slot, record, tuple(socks.pop(cookie) for cookie in wanted if cookie in socks))
        for sock in socks.values():
            socket_calls.end(sock)
            sock.close()
        if len(found.socks) == len(wanted):
            for sock in found.socks:
                sock.setblocking(False)
            self._found[slot], self._socks[slot] = found, found.socks
        else:  # it was being stored, or closed
            self.close_found(found)

    # ---- what the graftd before has left

    def containers_with(self, kind: Kind) -> set[int]:
        """For which containers something of that kind was found that nobody has taken."""
        return {found.record.container for found in self._found.values() if found.record.kind is kind}

    @property
    def has_found(self) -> bool:
        """Whether something was found that nobody has taken."""
        return bool(self._found)

    def found_containers(self) -> set[int]:
        """For which containers that is; 0: for none."""
        return {found.record.container for found in self._found.values()}

    def inside(self, container: int) -> socket.socket | None:
        """A socket that was made in a container's network namespace, if the record says so: ask the kernel."""
        for found in self._found.values():
            if found.record.container == container and found.record.kind in (Kind.OUT, Kind.INNER):
                return found.socks[0]
        return None

    def take(self, kind: Kind, container: int, is_it: Callable[[Found], bool] = lambda _: True) -> list[Found]:
        """What was found of that kind for a container, and ``is_it`` says yes to. It is the caller's now."""
        taken = []
        for found in list(self._found.values()):
            if found.record.kind is kind and found.record.container == container:
                with contextlib.suppress(OSError):
                    if is_it(found):
                        taken.append(self._found.pop(found.slot))
        return taken

    def take_pipes(self, found: Found) -> tuple[Pipe | None, Pipe | None] | None:
        """The pipes of the two flows of a connection; None where one of them is lost."""
        pipes = [self._found_pipes.pop(number, None) for number in found.record.pipes]
        if [number != 0 for number in found.record.pipes] == [pipe is not None for pipe in pipes]:
            return pipes[0], pipes[1]
        for pipe in pipes:
            if pipe is not None:
                self._lose_pipe(pipe)
        return None

    def close_found(self, found: Found) -> None:
        """End what somebody took, and cannot use."""
        self._found.pop(found.slot, None)
        for number in found.record.pipes:
            pipe = self._found_pipes.pop(number, None)
            if pipe is not None:
                self._lose_pipe(pipe)
        self.drop(found.slot)
        record = found.record
        for sock in found.socks:
            if record.kind not in CONNECTIONS:
                socket_calls.end(sock)  # at once: its address is for the next that listens there
            self._loop.close(sock, record.container, ends=True)

    def close_untaken(self, is_to_close: Callable[[Found], bool]) -> None:
        """End what nobody has taken."""
        for found in list(self._found.values()):
            if is_to_close(found):
                self.close_found(found)

    # ---- what this one will leave

    def store_all(self, sock: socket.socket) -> None:
        """Store everything with another keeper: the one before was killed."""
        self.store.continue_with(sock)
        if self._records is not None:
            self.store.put(RECORDS_NAME, [self._records.fd])
        for slot, socks in self._socks.items():
            self.store.put(slot_name(slot), [one.fileno() for one in socks])
        for number, ends in self._pipes.items():
            self.store.put(pipe_name(number), ends)

    def add(self, record: Record, *socks: socket.socket) -> int | None:
        """Have sockets outlive this process; gives their slot, None where they do not."""
        if self._records is None or not self.store.is_kept:
            return None
        return self._stored(self._records.add(record), *socks)

    def _stored(self, slot: int | None, *socks: socket.socket) -> int | None:
        if slot is not None:
            self._socks[slot] = socks
            self.store.put(slot_name(slot), [sock.fileno() for sock in socks])
        return slot

    def add_listener(self, kind: Kind, container: int, sock: socket.socket, port: int, address: bytes) -> int | None:
        """The same, of a socket that has no peer."""
        if not self.store.is_kept:
            return None
        return self.add(Record(kind, container, near=tcp.cookie(sock), port=port, address=address), sock)

    def add_accepted(self, record: Record, near: socket.socket) -> int | None:
        """The same, of a connection that was accepted just now. ``record``: what to note of it when it is complete."""
        if self._records is None or not self.store.is_kept:
            return None
        return self._stored(self._records.add_accepted(record, Kind.ACCEPTED, tcp.cookie(near)), near)

    def complete(self, slot: int | None, kind: Kind, far: socket.socket) -> None:
        """It has its far end."""
        if slot is not None and self._records is not None:
            self._socks[slot] = (*self._socks[slot], far)
            self.store.put(slot_name(slot), [far.fileno()], more=True)  # before it counts: else it would be missing
            self._records.complete(slot, kind, tcp.cookie(far))

    def drop(self, slot: int | None) -> None:
        """What is in a slot is closed, or is to be, by its owner."""
        if slot is not None and self._records is not None:
            self._records.release(slot)
            self._socks.pop(slot, None)
            self.store.drop(slot_name(slot))

    def note(self, slot: int | None, flag: int, on: bool = True) -> None:
        """Set a flag of a connection, or clear it."""
        if slot is not None and self._records is not None:
            self._records.set_flag(slot, flag, on)

    def pipe_notes(self, slot: int | None, direction: int) -> tuple[memoryview | list[int], int]:
        """Where to note which pipe a flow has, by its inode, or 0 for none; and at which index.
        ``direction`` 0 is the flow from near. (No call, because this is done for each message.)
        """
        if slot is None or self._records is None:
            return [0], 0
        return self._records.pipe_notes(slot, direction)

    def add_pipe(self, pipe: Pipe) -> None:
        """Have a new pipe outlive this process."""
        if self.store.is_kept and (self._free_pipes or self._next_pipe < MAX_PIPES):
            if not self._free_pipes:
                self._free_pipes.append(self._next_pipe)
                self._next_pipe += 1
            pipe.number = self._free_pipes.pop()
            self._pipes[pipe.number] = pipe.read, pipe.write
            self.store.put(pipe_name(pipe.number), [pipe.read, pipe.write])

    def drop_pipe(self, pipe: Pipe) -> None:
        """A pipe is to be closed."""
        if pipe.number < MAX_PIPES:
            self._drop_pipe(pipe.number)
            pipe.number = NOT_KEPT

    def end_listener(self, sock: socket.socket, slot: int | None) -> None:
        """Before a listener is closed: it listens no more, whatever the keeper does."""
        if slot is not None:
            socket_calls.end(sock)
            self.drop(slot)

    def close(self) -> None:
        """This process ends, and nothing is to outlive it."""
        for found in self._found.values():
            for sock in found.socks:
                socket_calls.end(sock)  # there are no more turns
        self.close_untaken(lambda _: True)
        self.store.close()
        if self._records is not None:
            self._records.close()
            self._records = None


def _is_writer(fd: int) -> bool:
    return (fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE) == os.O_WRONLY


def _opened(fds: Sequence[int]) -> KeptRecords | None:
    """The table of the graftd before, or a new one."""
    for fd in fds:
        try:
            return KeptRecords(fd)
        except (OSError, ValueError) as error:
            warn(f"what the previous graftd has left cannot be read: {error}")
    try:
        return KeptRecords()
    except OSError as error:
        warn(f"nothing will outlive this graftd: {error}")
        return None
