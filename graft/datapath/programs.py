"""The list of BPF programs: where each is attached, which of the kernel's helpers it may call, what is lost without it.

Pure: what this kernel allows is passed in (graft/kernel/helpers.py asks the kernel), so that a test can check the same
decisions for a table of other kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from graft.kernel import bpf, helpers

Calls = Mapping[str, frozenset[int]]
"""Name of a program -> the numbers of the helpers that it calls."""

_NO_SPLICE = "no transport splice"


@dataclass(frozen=True, slots=True)
class Program:
    """A function of the BPF sources and where it is attached.

    ``without``: what is lost where the kernel refuses it; empty where Graft does not work without it.
    """

    name: str
    type: int
    attach: str
    purpose: str
    without: str = ""

    @property
    def function(self) -> str:
        """Its name in C."""
        return f"graft_{self.name}"

    @property
    def needed(self) -> bool:
        """Whether Graft does not work without it."""
        return not self.without


def _both(name: str, purpose: str, kind: int = bpf.PROG_CGROUP_SOCK_ADDR, without: str = "") -> Iterator[Program]:
    for family in (4, 6):
        yield Program(f"{name}{family}", kind, f"{name}{family}", purpose, without)


# On every container's cgroup, and on those of Graft's own processes.
PROGRAMS = (
    *_both("bind", "only addresses of granted endpoints"),
    *_both("connect", "only granted destinations"),
    *_both("sendmsg", "only granted destinations, UDP"),
    *_both("recvmsg", "shows who sent what a ferry or graftd brings"),
    *_both("getsockname", "shows the requested address; answers supervisors"),
    *_both("post_bind", "undoes a bind that is not its endpoint's", bpf.PROG_CGROUP_SOCK),
    Program("sock_create", bpf.PROG_CGROUP_SOCK, "sock_create", "tags sockets as they are made"),
    Program("setsockopt", bpf.PROG_CGROUP_SOCKOPT, "setsockopt", "no option that bypasses the policy"),
    Program("sock_ops", bpf.PROG_SOCK_OPS, "sock_ops", "no listener without an endpoint"),
    Program("skb_ingress", bpf.PROG_CGROUP_SKB, "skb_ingress", "no packet to a listener without an endpoint"),
    Program("skb_egress", bpf.PROG_CGROUP_SKB, "skb_egress", "only packets that the policy permits"),
)

# Of the splice transport: on its containers' cgroups and the relays' own.
SPLICE_PROGRAMS = (
    Program("splice", bpf.PROG_SOCK_OPS, "sock_ops", "passes a client's address through a relay", _NO_SPLICE),
    *_both("getpeername", "shows a server its client's address", without=_NO_SPLICE),
)

RELAY_PROGRAM = Program("flow", bpf.PROG_SK_SKB, "sk_skb_stream_verdict", "the relay in the kernel", "splice(2) relays")

ALL_PROGRAMS = (*PROGRAMS, *SPLICE_PROGRAMS)
"""Those that are compiled together; the relay's program is compiled on its own."""


@dataclass(frozen=True, slots=True)
class Extension:
    """Optional code: compiled in only where the kernel allows its helpers in every program that calls them."""

    flag: str
    helpers: frozenset[int]


MPTCP = Extension("GRAFT_HAVE_MPTCP", frozenset({helpers.HELPERS["skc_to_mptcp_sock"]}))
SET_RETVAL = Extension("GRAFT_HAVE_SET_RETVAL", frozenset({helpers.HELPERS["set_retval"]}))
PROBE = Extension(
    "GRAFT_PROBE",
    frozenset(helpers.HELPERS[name] for name in ("probe_read_kernel", "skc_to_tcp_sock", "get_current_task")),
)
EXTENSIONS = frozenset({MPTCP, SET_RETVAL, PROBE})


@dataclass(frozen=True, slots=True)
class ProgramCheck:
    """Whether a kernel accepts a program: if not, ``reason`` in one line, and the verifier's ``log``."""

    program: Program
    reason: str = ""
    log: str = ""

    @property
    def accepted(self) -> bool:
        """Whether the kernel accepts it."""
        return not self.reason


def refused_calls(
    programs: Iterable[Program], calls: Calls, allows: Callable[[Program, int], bool]
) -> dict[str, frozenset[int]]:
    """For each program that calls any, the helpers that it may not call."""
    refused = {
        program.name: frozenset(helper for helper in calls[program.name] if not allows(program, helper))
        for program in programs
    }
    return {name: numbers for name, numbers in refused.items() if numbers}


def allowed_extensions(extensions: frozenset[Extension], refused: Calls) -> frozenset[Extension]:
    """The extensions of which no helper was refused to any program."""
    every = frozenset().union(*refused.values())
    return frozenset(one for one in extensions if not one.helpers & every)


def reason(program: Program, refused: frozenset[int], log: str) -> str:
    """Why a kernel refuses ``program``, in one line: the helpers that it may not call, or the log's last line."""
    if refused:
        names = ", ".join(helpers.name(number) for number in sorted(refused))
        return f"{names} not allowed in {program.attach} programs"
    lines = [line.strip() for line in log.splitlines()]
    log_lines = [line for line in lines if line and not line.startswith(("processed ", "HINT:", "bpf: "))]
    return log_lines[-1] if log_lines else "the kernel gives no reason"
