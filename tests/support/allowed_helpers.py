"""The helpers that a kernel allows each type of BPF program: asked of the running one, or read from the table.

The table beside this file, allowed_helpers.json, holds what 5.15, 6.1 and 6.12 allow, so that a test can tell without
a virtual machine whether the programs still load there. It was made with

    make allowed-helpers KERNELS="6.1 6.12"

which runs this module in each guest. Linux 5.15 is no Debian kernel. Its entries are what 5.10 allows, asked in the
same way, and the one helper more that Graft needs and v5.15 has in its sources: bpf_get_netns_cookie in sock_ops
programs (net/core/filter.c, sock_ops_func_proto) and in setsockopt programs (kernel/bpf/cgroup.c,
cg_sockopt_func_proto). What is not listed there counts as refused. The rows of recvmsg4 and recvmsg6 are not asked of a
guest yet: they are those of getpeername without the helpers for options, which alone depend on where such a program is
attached besides bpf_bind (net/core/filter.c, sock_addr_func_proto); on 6.18 both rows are equal.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterable
from pathlib import Path

from graft.datapath.loader import kernel_allows
from graft.datapath.programs import ALL_PROGRAMS, RELAY_PROGRAM, Program
from graft.kernel import bpf

TABLE = Path(__file__).with_suffix(".json")
_HELPERS = range(1, 212)  # __BPF_FUNC_MAX of 6.12, which no later kernel raises: new ones are kfuncs


def ranges(numbers: Iterable[int]) -> str:
    """Numbers as text: 1-3,7."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(f"{first}-{last}" if first != last else str(first) for first, last in spans)


def numbers(text: str) -> frozenset[int]:
    """The numbers that `ranges` wrote."""
    spans = [span.partition("-") for span in text.split(",") if span]
    return frozenset(one for first, _, last in spans for one in range(int(first), int(last or first) + 1))


def asked() -> dict[str, str]:
    """Attach point -> the helpers that the running kernel allows there."""
    types = {program.attach: program.type for program in (*ALL_PROGRAMS, RELAY_PROGRAM)}
    return {
        attach: ranges(one for one in _HELPERS if kernel_allows(kind, bpf.ATTACH_TYPES[attach], one))
        for attach, kind in sorted(types.items())
    }


def table(kernel: str) -> Callable[[Program, int], bool]:
    """What the table says of ``kernel`` ("6.1"), as graft/datapath/programs.py wants it."""
    entry = {attach: numbers(text) for attach, text in json.loads(TABLE.read_text())[kernel]["allowed"].items()}
    return lambda program, helper: helper in entry[program.attach]


if __name__ == "__main__":
    release = platform.release()
    short = ".".join(release.split(".")[:2])
    print(json.dumps({short: {"kernel": release, "allowed": asked()}}, indent=2))
