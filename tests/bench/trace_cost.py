"""`python -m tests.bench.trace_cost` (root): what a connect costs in its hook where nobody watches decisions, where one
or two `graft trace` do, and in hooks without the code for it. As the kernel measures it (kernel.bpf_stats_enabled).
"""

from __future__ import annotations

import ctypes
import os
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from graft.kernel import bpf
from tests.conftest import installation
from tests.hostile.conftest import graft_without
from tests.support.cgroups import in_cgroup, new_cgroup
from tests.support.installation import GRAFT, Host
from tests.support.namespaces import host_and_client
from tests.support.shell import output
from tests.support.wait import until

_ROUNDS, _CONNECTS = 7, 20_000
_STATS = Path("/proc/sys/kernel/bpf_stats_enabled")
_RUN_TIME = 192  # of run_time_ns, with run_cnt after it, in struct bpf_prog_info (include/uapi/linux/bpf.h)
_INFO_SIZE = 256
_CONNECT = f"""
import socket
for _ in range({_CONNECTS}):
    with socket.socket() as sock:
        sock.connect_ex(("127.0.0.1", 9))
"""


def run_time(folder: Path) -> tuple[int, int]:
    """For how many nanoseconds, and how often, the connect hook of a cgroup has run."""
    opened = os.open(folder, os.O_RDONLY)
    [number] = bpf.prog_ids(opened, bpf.ATTACH_TYPES["connect4"])
    program = bpf.prog_by_id(number)
    buffer = ctypes.create_string_buffer(_INFO_SIZE)
    bpf.call(bpf._OBJ_GET_INFO_BY_FD, bpf._InfoAttr(program, _INFO_SIZE, ctypes.addressof(buffer)))
    os.close(program)
    os.close(opened)
    nanoseconds, runs = struct.unpack_from("QQ", buffer.raw, _RUN_TIME)
    return nanoseconds, runs


def measured(host: Host, folder: Path, watchers: int) -> float:
    """Nanoseconds for each call of the hook."""
    for _ in range(watchers):
        watcher = host.start_command([GRAFT, "trace"])
        watcher.until("it watches", lambda: "watching" in watcher.complained)  # noqa: B023
    before = run_time(folder)
    output([*in_cgroup(folder), *host.netns.command(sys.executable, "-c", _CONNECT)])
    after = run_time(folder)
    host.stop_programs()
    until("nobody watches", lambda: not is_watched(host))
    return (after[0] - before[0]) / (after[1] - before[1])


def is_watched(host: Host) -> bool:
    """Whether the last watcher's lease goes on: it is forgotten by the clock."""
    value = host.maps.watches.get(ctypes.c_uint32(0))
    return value is not None and int(value.until) > time.clock_gettime_ns(time.CLOCK_MONOTONIC)


@contextmanager
def counted() -> Iterator[None]:
    """Have the kernel measure BPF programs meanwhile."""
    before = _STATS.read_text()
    _STATS.write_text("1")
    try:
        yield
    finally:
        _STATS.write_text(before)


def main() -> None:
    """Measure, in turns, and print medians with the lowest and the highest."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        net = stack.enter_context(host_and_client())
        made: dict[str, tuple[Host, Path]] = {}
        for defence in ("", "trace"):
            host = stack.enter_context(installation(folder / f"h{len(made)}", *net, f"trace-{len(made)}"))
            output([*graft_without(defence), "up"], environment=host.environment)
            path = stack.enter_context(new_cgroup(f"trace-{len(made)}"))
            host.graft("ep", "add", "out", "0.0.0.0:dynamic")
            host.graft("attach", "--cgroup", path, "--transport", "direct", "--deny", "-e", "127.0.0.0/8=out")
            stack.callback(host.remove_at, path)
            made[defence] = host, path
        stack.enter_context(counted())
        cases = {"hooks without it": ("trace", 0), "nobody watches": ("", 0), "one watches": ("", 1), "two": ("", 2)}
        figures: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(_ROUNDS):
            for name, (defence, watchers) in cases.items():
                figures[name].append(measured(*made[defence], watchers))
        for name, values in figures.items():
            print(f"{name:16} {statistics.median(values):6.0f} ns  ({min(values):.0f}-{max(values):.0f})")


if __name__ == "__main__":
    main()
