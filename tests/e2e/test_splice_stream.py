"""The bytes that pass a relay: each arrives, with each end of a stream, and no more are buffered than fit."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.namespaces import CLIENT4
from tests.support.plain import Plain
from tests.support.relayed import pair, published, read_all, reset, resident_bytes, talk, transfer
from tests.support.wait import PATIENCE, until

pytestmark = pytest.mark.e2e

LINGER = struct.pack("ii", 1, 0)
sizes = st.one_of(st.integers(0, 5000), st.integers(0, 3_000_000))


def test_what_comes_in_and_the_answer_arrive_byte_by_byte_whatever_the_sizes(container: Plain) -> None:
    with container.listener() as listener:
        port = published(container)

        @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
        @given(
            there=sizes,
            back=sizes,
            half_close=st.booleans(),
            swapped=st.booleans(),
            talks=st.booleans(),
            seed=st.integers(0, 1 << 30),
        )
        def check(there: int, back: int, half_close: bool, swapped: bool, talks: bool, seed: int) -> None:
            client, accepted = pair(container, listener, port)
            with client, accepted:
                ends = (accepted, client) if swapped else (client, accepted)
                if talks:
                    talk(*ends)
                transfer(*ends, there, back, half_close, seed)

        check()


def test_what_goes_out_and_the_answer_arrive_byte_by_byte_whatever_the_sizes(container: Plain) -> None:
    published(container)
    with container.host.client.listener(CLIENT4) as world:
        port = world.getsockname()[1]

        @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
        @given(there=sizes, back=sizes, half_close=st.booleans(), talks=st.booleans(), seed=st.integers(0, 1 << 30))
        def check(there: int, back: int, half_close: bool, talks: bool, seed: int) -> None:
            program = container.tcp()
            program.connect((CLIENT4, port))
            accepted, _ = world.accept()
            accepted.settimeout(15 * PATIENCE)
            with program, accepted:
                if talks:
                    talk(program, accepted)
                transfer(program, accepted, there, back, half_close, seed)

        check()


def test_an_urgent_byte_arrives_in_its_place(container: Plain) -> None:
    with container.listener() as listener:
        client, accepted = pair(container, listener, published(container))
        with client, accepted:
            talk(client, accepted)
            client.sendall(b"one ")
            client.send(b"!", socket.MSG_OOB)
            client.sendall(b" two")
            client.shutdown(socket.SHUT_WR)
            assert read_all(accepted) == b"one ! two"


@pytest.mark.parametrize("from_client", [True, False])
def test_a_reset_arrives_as_a_reset(container: Plain, from_client: bool) -> None:
    with container.listener() as listener:
        client, accepted = pair(container, listener, published(container))
        ours, theirs = (client, accepted) if from_client else (accepted, client)
        with theirs:
            talk(ours, theirs)
            ours.sendall(b"x")
            assert theirs.recv(1) == b"x"
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER)
            ours.close()
            assert reset(theirs)


def test_a_reset_after_a_half_close_arrives_too(container: Plain) -> None:
    with container.listener() as listener:
        client, accepted = pair(container, listener, published(container))
        with accepted:
            talk(client, accepted)
            client.shutdown(socket.SHUT_WR)
            assert accepted.recv(1) == b""
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER)
            client.close()
            until("reset", lambda: accepted.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))


def test_a_close_in_the_middle_of_a_transfer_resets_the_sender(container: Plain) -> None:
    with container.listener() as listener:
        client, accepted = pair(container, listener, published(container))
        with client:
            talk(client, accepted)
            client.sendall(bytes(100_000))
            accepted.close()  # with data unread: the kernel resets
            with pytest.raises((ConnectionResetError, BrokenPipeError)):
                for _ in range(1000):
                    client.sendall(bytes(100_000))


def test_a_slow_reader_stops_its_sender_and_memory_stays_bounded(container: Plain) -> None:
    with container.listener() as listener:
        port = published(container)
        daemon = container.daemon()
        before = resident_bytes(daemon)
        pairs = [pair(container, listener, port) for _ in range(8)]
        sent = 0
        for client, accepted in pairs:
            talk(client, accepted)
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    if not select.select([], [client], [], 0.2)[1]:
                        break
                    sent += client.send(bytes(1 << 20))
        # The most that the buffers of four sockets may take, two of them receiving and two sending, and a pipe.
        receiving, sending = (int(Path(f"/proc/sys/net/ipv4/tcp_{one}mem").read_text().split()[2]) for one in "rw")
        assert 8 << 10 < sent < 8 * (2 * (receiving + sending) + (1 << 20))
        assert resident_bytes(daemon) - before < 20 << 20
        for client, accepted in pairs:
            client.close()
            accepted.close()
