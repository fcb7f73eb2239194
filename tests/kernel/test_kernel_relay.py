"""The relay in the kernel: each known defect of sockmaps, on sockets of this process."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from graft.datapath import loader
from graft.datapath.layout import FlowValue
from graft.datapath.loader import RELAY_MAPS
from graft.datapath.sources import bpf_source_dir
from graft.errors import KernelError
from graft.kernel import tcp
from graft.kernel.bpf import Map
from graft.splice import kernel_flow, selftest, selftest_result
from graft.splice.selftest import CheckFailed, Trial
from graft.splice.selftest_result import SelftestResult
from graft.splice.sockmap import Sockmap
from tests.support.installation import COMPILED

pytestmark = pytest.mark.kernel

MSG_EOR = 0x80


def trial_of(loaded: loader.Loaded) -> Trial:
    return Trial(Sockmap(lambda name: os.dup(loaded.map_fd(name)), after=0))


@pytest.fixture(scope="module")
def loaded(root: None) -> loader.Loaded:
    """The relay's program and maps as `graft up` loads them, without pins."""
    return loader.load_relay(COMPILED)


@pytest.fixture
def trial(loaded: loader.Loaded) -> Iterator[Trial]:
    """A loop with the relay in the kernel."""
    made = trial_of(loaded)
    yield made
    made.close()
    made.sockmap.close()


def relay_map(loaded: loader.Loaded, name: str) -> Map[Any, Any]:
    """One of the relay's maps: cookie of a flow's source -> what the map has of the flow."""
    value = {"flows": FlowValue, "flow_taken": ctypes.c_uint64}.get(name, ctypes.c_int32)
    return Map(loaded.map_fd(name), ctypes.c_uint64, value)


def entries(loaded: loader.Loaded) -> dict[str, int]:
    """How many entries each map has."""
    return {name: len(list(relay_map(loaded, name).keys())) for name in RELAY_MAPS if name != "flow_events"}


def moved_and_left(trial: Trial) -> list[tuple[int, int]]:
    """Of each flow, the client's first."""
    return [trial.sockmap.counts(number) for number in trial.sockmap.flows]


def copies_in_user_space(trial: Trial) -> bool:
    return any(side.flow_from.in_user_space for one in trial.connections for side in (one.near, one.far))


def exactly(sock: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        part = sock.recv(count - len(found))
        assert part, f"the stream ended after {len(found)} bytes of {count}"
        found += part
    return found


def test_a_reader_that_is_blocked_already_gets_what_comes(trial: Trial) -> None:
    client, server = trial.connected()
    found: list[bytes] = []
    with client, server:
        reader = threading.Thread(target=lambda: found.append(server.recv(10)))
        reader.start()  # in recv() before the relay has run at all
        trial.while_relayed(lambda: client.sendall(b"now"), reader.join)
        assert found == [b"now"]
        assert moved_and_left(trial) == [(3, 0), (0, 0)]


@pytest.mark.parametrize("size", [1, 30_000])
def test_what_came_before_the_handover_is_moved_and_comes_first(trial: Trial, size: int) -> None:
    client, server = trial.connected(b"b" * size)
    with client, server:
        found: list[bytes] = []
        trial.while_relayed(lambda: client.sendall(b"after"), lambda: found.append(exactly(server, size + 5)))
        assert found == [b"b" * size + b"after"]
        assert moved_and_left(trial)[0] == (size + 5, 0)


def test_what_came_before_is_moved_though_nothing_more_comes(trial: Trial) -> None:
    client, server = trial.connected(b"all")
    found: list[bytes] = []
    with client, server:
        trial.while_relayed(lambda: found.append(exactly(server, 3)))
    assert found == [b"all"]


def test_an_end_waits_for_what_is_in_the_kernels_queue(trial: Trial) -> None:
    selftest.an_end_waits_for_the_kernels_queue(trial)


def test_an_end_waits_for_the_bytes_before_it_however_slow_their_reader(trial: Trial) -> None:
    selftest.every_byte_arrives_and_no_end_overtakes(trial, 3_000_000, 0.001)


def test_bytes_for_a_target_without_a_map_entry_are_left_and_copied_in_user_space(
    loaded: loader.Loaded, trial: Trial
) -> None:
    client, server = trial.connected()
    with client, server:
        trial.while_relayed(lambda: client.sendall(b"1"), lambda: exactly(server, 1))
        number = next(iter(trial.sockmap.flows))
        relay_map(loaded, "flow_targets").delete(ctypes.c_uint64(number))
        trial.while_relayed(lambda: client.sendall(b"23"), lambda: exactly(server, 2))
        assert moved_and_left(trial)[0] == (1, 2)


def test_a_target_that_is_behind_stops_the_sender_and_the_kernel_continues_afterwards(trial: Trial) -> None:
    client, server = trial.connected()
    with client, server:
        total = 0
        client.settimeout(0.1)

        def fill() -> None:
            nonlocal total
            try:
                while total < 200 << 20:
                    total += client.send(bytes(1 << 18))
            except TimeoutError:
                return

        trial.while_relayed(fill)
        assert total < 32 << 20
        [(_, left), _] = moved_and_left(trial)
        assert left > 0
        trial.while_relayed(lambda: exactly(server, total))
        trial.until(lambda: not copies_in_user_space(trial), "still copying")
        before = moved_and_left(trial)[0]
        trial.while_relayed(lambda: client.sendall(b"again"), lambda: exactly(server, 5))
        assert moved_and_left(trial)[0] == (before[0] + 5, before[1])


def test_bytes_that_come_while_the_last_are_copied_are_copied_too(
    loaded: loader.Loaded, trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, server = trial.connected()
    with client, server:
        trial.while_relayed(lambda: client.sendall(b"1"), lambda: exactly(server, 1))
        number = next(iter(trial.sockmap.flows))
        key = ctypes.c_uint64(number)
        [connection] = trial.connections
        relay_map(loaded, "flow_targets").delete(key)
        report = trial.sockmap.report_copied
        late = [b"late"]

        def report_copied(flow: int, copied: int) -> None:
            if late:
                client.sendall(late.pop())
                relay_map(loaded, "flow_targets").put(key, ctypes.c_int32(connection.far.fd))
            report(flow, copied)

        monkeypatch.setattr(trial.sockmap, "report_copied", report_copied)
        found: list[bytes] = []
        trial.while_relayed(lambda: client.sendall(b"23"), lambda: found.append(exactly(server, 6)))
        assert found == [b"23late"]
        trial.until(lambda: not copies_in_user_space(trial), "still copying")


def test_what_the_kernel_moved_meanwhile_goes_before_what_it_left_again(
    loaded: loader.Loaded, trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, server = trial.connected()
    with client, server:
        trial.while_relayed(lambda: client.sendall(b"1"), lambda: exactly(server, 1))
        number = next(iter(trial.sockmap.flows))
        key = ctypes.c_uint64(number)
        [connection] = trial.connections
        relay_map(loaded, "flow_targets").delete(key)
        report, is_empty = trial.sockmap.report_copied, kernel_flow.KernelFlow.kernel_queue_is_empty
        calls: list[str] = []

        def report_copied(flow: int, copied: int) -> None:
            if "report" in calls:
                report(flow, copied)
                return
            calls.append("report")
            relay_map(loaded, "flow_targets").put(key, ctypes.c_int32(connection.far.fd))
            report(flow, copied)  # from here on the kernel moves
            client.sendall(b"moved ")
            relay_map(loaded, "flow_targets").delete(key)
            client.sendall(b"left")

        def kernel_queue_is_empty(flow: kernel_flow.KernelFlow) -> bool:
            calls.append("queue")
            return is_empty(flow)

        monkeypatch.setattr(trial.sockmap, "report_copied", report_copied)
        monkeypatch.setattr(kernel_flow.KernelFlow, "kernel_queue_is_empty", kernel_queue_is_empty)
        found: list[bytes] = []
        trial.while_relayed(lambda: client.sendall(b"23 "), lambda: found.append(exactly(server, 13)))
        assert found == [b"23 moved left"]
        assert calls.index("report") < len(calls) - 1 - calls[::-1].index("queue")


def test_a_handover_in_the_middle_does_not_depend_on_what_is_acknowledged_just_then(
    trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial.sockmap.after = 2
    real, short = tcp.written, [3] * 4
    # Bytes that are acknowledged between the two questions are missing from the answer.
    monkeypatch.setattr(tcp, "written", lambda sock: real(sock) - (short.pop() if short else 0))
    monkeypatch.setattr(kernel_flow, "STALL_SECONDS", 0.2)
    client, server = trial.connected()
    with client, server:

        def talk() -> None:
            for _ in range(5):
                client.sendall(b"?")
                exactly(server, 1)
            client.shutdown(socket.SHUT_WR)
            assert server.recv(1) == b""

        trial.while_relayed(talk)
        assert trial.sockmap.flows


def test_a_flow_that_ended_before_its_handover_is_moved_by_splice(trial: Trial) -> None:
    client, server = trial.connected()
    with client, server:
        client.sendall(b"short")
        client.shutdown(socket.SHUT_WR)
        found: list[bytes] = []

        def answer() -> None:
            found.append(server.recv(10))
            assert server.recv(10) == b""
            server.sendall(b"reply")
            server.close()

        trial.while_relayed(answer, lambda: found.append(exactly(client, 5)))
        assert found == [b"short", b"reply"]
        trial.until(lambda: not trial.connections, "the connection is still there")


def test_a_flow_whose_kernel_does_not_send_all_bytes_is_reset_and_not_left_hanging(
    trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_flow, "STALL_SECONDS", 0.2)
    real = tcp.received
    monkeypatch.setattr(tcp, "received", lambda sock: real(sock) + 1)  # as if a byte had been lost
    client, server = trial.connected()
    with client, server:
        trial.while_relayed(lambda: client.sendall(b"!"), lambda: exactly(server, 1))

        def read() -> None:
            client.sendall(b"most of it")
            client.shutdown(socket.SHUT_WR)
            with pytest.raises(ConnectionResetError):
                while server.recv(100):
                    pass

        trial.while_relayed(read)


def test_nothing_is_left_of_connections_that_ended(loaded: loader.Loaded, trial: Trial) -> None:
    for size in range(20):
        selftest.every_byte_arrives_and_no_end_overtakes(trial, size, 0)
    assert not trial.sockmap.flows
    assert not any(entries(loaded).values())


def test_flows_of_a_killed_daemon_are_removed(loaded: loader.Loaded) -> None:
    relay_map(loaded, "flows").put(ctypes.c_uint64(7), FlowValue())
    relay_map(loaded, "flow_taken").put(ctypes.c_uint64(7), ctypes.c_uint64(3))
    assert entries(loaded)["flows"] == entries(loaded)["flow_taken"] == 1
    trial_of(loaded)
    assert not any(entries(loaded).values())


def test_this_kernel_passes_the_self_test(root: None) -> None:
    assert selftest_result.run_selftest() == SelftestResult("")


# What a kernel, or an error in the BPF program, may do, and the self-test has to find.
MUTANTS = {
    "does not stop a sender": ("(came - sent) > GRAFT_MAX_BEHIND", "(came - sent) > 0x7fffffff"),
    "takes a bare end for data": ("if (!len)", "if (0)"),
    "drops": ("flow->moved += len;", "flow->moved += len; if (flow->moved > 20000) return SK_DROP;"),
    "moves nothing": ("flow->moved += len;", "return leave_with_source(key, flow, taken, len);"),
    "continues while bytes are left behind": ("flow->left != taken ||", ""),
}


def use_changed_relay(folder: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str) -> None:
    """From now on the relay is loaded with ``new`` where its text has ``old``."""
    sources = folder / "bpf"
    shutil.copytree(bpf_source_dir(), sources)
    text = (sources / "relay.bpf.c").read_text()
    assert old in text
    (sources / "relay.bpf.c").write_text(text.replace(old, new))
    monkeypatch.setattr("graft.datapath.sources.bpf_source_dir", lambda: sources)


def most_segments_queued(trial: Trial) -> int:
    """How many segments of one byte the kernel queues for a reader that reads nothing."""
    client, server = trial.connected()
    most = 0
    with client, server:
        trial.until(lambda: len(trial.sockmap.flows) == 2, "a connection is not handed over")
        [connection] = trial.connections
        number = tcp.cookie(connection.near.sock)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.far.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(0.1)

        def fill() -> None:
            nonlocal most
            with contextlib.suppress(TimeoutError):
                for sent in range(40_000):
                    client.send(b"x", MSG_EOR)
                    if sent % 64 == 0:
                        moved, _ = trial.sockmap.counts(number)
                        most = max(most, moved - tcp.written(connection.far.sock))

        trial.while_relayed(fill)
    return most


def test_a_target_that_is_behind_by_many_small_segments_gets_no_more(trial: Trial) -> None:
    assert most_segments_queued(trial) < 4096


def test_control_a_relay_that_counts_bytes_only_queues_ten_times_as_many(
    root: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_changed_relay(tmp_path, monkeypatch, ">= GRAFT_MAX_SEGMENTS", ">= 0x7fffffff")
    trial = trial_of(loader.load_relay(COMPILED))
    assert most_segments_queued(trial) > 20_000
    trial.close()


@pytest.mark.parametrize("name", MUTANTS)
def test_the_self_test_finds_a_fault(root: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    use_changed_relay(tmp_path, monkeypatch, *MUTANTS[name])
    monkeypatch.setattr(selftest, "CHECK_SECONDS", 2.0)
    monkeypatch.setattr(kernel_flow, "STALL_SECONDS", 0.2)
    trial = trial_of(loader.load_relay(COMPILED))
    with pytest.raises((CheckFailed, OSError)):
        selftest.run_checks(trial)
    trial.close()


def test_a_kernel_that_does_not_take_the_program_says_so(
    root: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = tmp_path / "bpf"
    shutil.copytree(bpf_source_dir(), sources)
    (sources / "relay.bpf.c").write_text("int graft_flow(struct __sk_buff *skb) { return *(int *)0; }")
    monkeypatch.setattr("graft.datapath.sources.bpf_source_dir", lambda: sources)
    with pytest.raises(KernelError, match="relay"):
        loader.load_relay(COMPILED)
