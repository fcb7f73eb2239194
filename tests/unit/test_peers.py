"""Who speaks at the other end of a unix socket."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator

import pytest

from graft.kernel import peers, surroundings
from graft.kernel.peers import Peer

Ends = tuple[socket.socket, socket.socket]


@pytest.fixture
def ends() -> Iterator[Ends]:
    """Ours, which names senders, and the other one."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        peers.name_senders(ours)
        yield ours, theirs


def in_child(theirs: socket.socket, said: bytes, goes_on: bool) -> int:
    """A child that says something, and gives its number when it has."""
    child = os.fork()
    if child == 0:
        theirs.send(said)
        if goes_on:
            signal.pause()
        os._exit(0)
    if not goes_on:
        os.waitpid(child, 0)
    return child


@contextlib.contextmanager
def going_on(theirs: socket.socket, said: bytes) -> Iterator[int]:
    child = in_child(theirs, said, goes_on=True)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_what_the_process_says_is_heard(ends: Ends) -> None:
    ours, theirs = ends
    with contextlib.closing(Peer(ours, os.getpid())) as peer:
        theirs.send(b"?")
        assert peer.hear() == b"?"
        assert peer.is_like(surroundings.of())
        assert not peer.is_like(surroundings.of()._replace(label=b"confined"))


def test_what_another_process_says_is_not(ends: Ends) -> None:
    """The process that is looked at would be let in."""
    ours, theirs = ends
    peer = Peer(ours, os.getpid())
    with contextlib.closing(peer), going_on(theirs, b"?"), pytest.raises(PermissionError):
        peer.hear()


def test_what_was_said_before_counts_for_nothing(ends: Ends) -> None:
    """It may be from another process that had this number then."""
    ours, theirs = ends
    theirs.send(b"?")
    with pytest.raises(PermissionError):
        Peer(ours, os.getpid())


def test_nor_does_what_was_said_when_no_senders_were_named(ends: Ends) -> None:
    ours, theirs = ends
    with contextlib.closing(Peer(ours, os.getpid())) as peer:
        peers.name_senders(ours, wanted=False)
        theirs.send(b"?")
        peers.name_senders(ours)
        with pytest.raises(PermissionError):
            peer.hear()


def test_who_has_ended_is_nobody(ends: Ends) -> None:
    ours, theirs = ends
    with going_on(theirs, b"+") as child:
        assert peers.hear(ours) == (b"+", child)
        peer = Peer(ours, child)
        assert peer.is_like(surroundings.of())
    with contextlib.closing(peer):
        assert not peer.is_like(surroundings.of())
        with pytest.raises(ProcessLookupError):
            Peer(ours, child)


def test_who_has_hung_up_says_nothing(ends: Ends) -> None:
    ours, theirs = ends
    with contextlib.closing(Peer(ours, os.getpid())) as peer:
        theirs.close()
        with pytest.raises(PermissionError):
            peer.hear()


def test_descriptors_that_come_with_it_are_not_taken(ends: Ends) -> None:
    ours, theirs = ends
    with contextlib.closing(Peer(ours, os.getpid())) as peer:
        before = os.listdir("/proc/self/fd")
        socket.send_fds(theirs, [b"?"], [0, 1, 2])
        assert peer.hear() == b"?"
        assert os.listdir("/proc/self/fd") == before
