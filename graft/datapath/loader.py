"""Load the BPF programs that this kernel accepts, each on its own, and pin them with their maps.

What a kernel lacks is found here and nowhere else: helper by helper before anything is loaded, so that optional code
is compiled out, then program by program. If the kernel refuses a program that is needed, loading fails; one that is
optional is left out, and `graft doctor` shows the reason.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from graft.datapath import offsets
from graft.datapath.bytecode import Bytecode
from graft.datapath.compile_cache import compile_cached
from graft.datapath.compiled import Compiled, NotLoaded
from graft.datapath.layout import (
    MAX_BERTHS,
    MAX_DESKS,
    MAX_EXCHANGES,
    MAX_FERRIES,
    MAX_NOTED,
    MAX_RULES,
    MAX_STAND_INS,
    WATCH_PAGES,
)
from graft.datapath.programs import (
    ALL_PROGRAMS,
    EXTENSIONS,
    PROBE,
    RELAY_PROGRAM,
    Calls,
    Extension,
    Program,
    ProgramCheck,
    allowed_extensions,
    reason,
    refused_calls,
)
from graft.datapath.sources import BpfSources
from graft.errors import KernelError
from graft.kernel import bpf, helpers, instructions

MAPS = (
    "settings",
    "endpoints",
    "endpoint_names",
    "groups",
    "containers",
    "scopes",
    "ingress",
    "egress",
    "egress_ports",
    "uses",
    "noted_addresses",
    "broadcasts",
    "tags",
    "options",
    "servers",
    "relays",
    "arrivals",
    "exchanges",
    "exchange_clients",
    "stand_ins",
    "stand_in_ports",
    "offers",
    "crossings",
    "former_crossings",
    "ferries",
    "berths",
    "counters",
    "watches",
    "decisions",
    "desks",
    "desk_slots",
)

# Compiled as one text in this order: the overview and the maps first, then a file for each kind of hook.
SOURCES = (
    "graft.bpf.c",
    "owner.bpf.c",
    "caller.bpf.c",
    "trace.bpf.c",
    "rules.bpf.c",
    "local_address.bpf.c",
    "ferry.bpf.c",
    "shared_port.bpf.c",
    "server.bpf.c",
    "bind.bpf.c",
    "exchange.bpf.c",
    "stand_in.bpf.c",
    "chosen_source.bpf.c",
    "connect.bpf.c",
    "sendmsg.bpf.c",
    "receive.bpf.c",
    "desk.bpf.c",
    "create.bpf.c",
    "sockname.bpf.c",
    "options.bpf.c",
    "listen.bpf.c",
    "packet.bpf.c",
    "reuseport.bpf.c",
    "exchange_packet.bpf.c",
    "translated.bpf.c",
    "destination.bpf.c",
    "ping.bpf.c",
    "ingress.bpf.c",
    "egress.bpf.c",
    "splice.bpf.c",
)

# The relay in the kernel, a text of its own.
RELAY_MAPS = ("flow_targets", "flow_sources", "flows", "flow_taken", "flow_events")
RELAY_SOURCES = ("relay.bpf.c",)
FLOW_EVENT_PAGES = 256
RELAY_SIZES = {
    "GRAFT_MAX_FLOWS": 65536,
    "GRAFT_MAX_BEHIND": 1 << 20,
    "GRAFT_MAX_SEGMENTS": 2048,  # as many as GRAFT_MAX_BEHIND has in segments of an Ethernet's size, twice
    "GRAFT_FLOW_EVENT_PAGES": FLOW_EVENT_PAGES,
}

SIZES = {
    "GRAFT_MAX_ENDPOINTS": 4096,
    "GRAFT_MAX_CONTAINERS": 8192,
    "GRAFT_MAX_GROUPS": 16384,
    "GRAFT_MAX_RULES": MAX_RULES,
    "GRAFT_MAX_COUNTERS": 65536,
    "GRAFT_MAX_ARRIVALS": 65536,
    "GRAFT_MAX_HOST_ADDRESSES": 16384,
    "GRAFT_MAX_NOTED": MAX_NOTED,
    "GRAFT_MAX_SERVERS": 65536,
    "GRAFT_MAX_EXCHANGES": MAX_EXCHANGES,
    "GRAFT_EXCHANGE_WAYS": 8,
    "GRAFT_MAX_STAND_INS": MAX_STAND_INS,
    "GRAFT_OFFER_TRIES": 16,
    "GRAFT_MAX_DESKS": MAX_DESKS,
    "GRAFT_MAX_FERRIES": MAX_FERRIES,
    "GRAFT_MAX_BERTHS": MAX_BERTHS,
    "GRAFT_WATCH_PAGES": WATCH_PAGES,
}

_OLDEST = "Graft needs Linux 5.15 or later"


class ProgramsRefused(KernelError):
    """The kernel refuses a program that Graft needs. ``checks``: of every program that was tried."""

    def __init__(self, checks: Sequence[ProgramCheck]) -> None:
        first = next(one for one in checks if not one.accepted and one.program.needed)
        super().__init__(f"the kernel refuses the BPF programs: {first.program.name}: {first.reason}", _OLDEST)
        self.checks = checks

    @property
    def log(self) -> str:
        """The verifier's logs, of all programs that were refused."""
        return logs(self.checks)


def logs(checks: Sequence[ProgramCheck]) -> str:
    """The verifier's logs of the programs that were refused, each below a line with the name and the reason."""
    return "\n".join(f"{one.program.name}: {one.reason}\n{one.log}" for one in checks if not one.accepted)


@dataclass(frozen=True, slots=True)
class Loaded:
    """The programs that the kernel accepted, by name and descriptor, and their maps; valid as long as this object.
    ``sources``: what they were compiled from.
    """

    sources: BpfSources
    compiled: Compiled
    programs: Mapping[str, int]
    maps: Sequence[str]
    extensions: frozenset[Extension] = frozenset()
    checks: Sequence[ProgramCheck] = field(default=())

    @property
    def is_complete(self) -> bool:
        """Whether every needed program is among them."""
        return all(one.accepted or not one.program.needed for one in self.checks)

    def map_fd(self, name: str) -> int:
        """The descriptor of a map, which is closed with ``compiled``."""
        return self.compiled.map_fd(name)

    def pin(self, folder: Path) -> None:
        """Pin every map and program below ``folder``, which must be a new folder of a bpffs."""
        for name in self.maps:
            bpf.obj_pin(self.map_fd(name), folder / name)
        for name, fd in self.programs.items():
            bpf.obj_pin(fd, folder / f"prog_{name}")


@cache
def kernel_allows(prog_type: int, attach_type: int, helper: int) -> bool:
    """Whether this kernel lets such programs call a helper; False where it does not know such programs."""
    try:
        return helpers.allows(prog_type, attach_type, helper)
    except OSError:
        return False


def _allows(program: Program, helper: int) -> bool:
    return kernel_allows(program.type, bpf.ATTACH_TYPES[program.attach], helper)


def constants(extensions: frozenset[Extension]) -> dict[str, int]:
    """The constants that the text of the hooks is compiled with."""
    probe = offsets.structure_offsets() if PROBE in extensions else {}
    return {**SIZES, **probe, **{one.flag: 1 for one in extensions}}


def calls_of(bytecode: Bytecode, programs: Sequence[Program]) -> Calls:
    """The helpers that each program calls."""
    return {one.name: instructions.calls(bytecode.programs[one.function]) for one in programs}


def compile_for(
    sources: BpfSources, allows: Callable[[Program, int], bool], cache: Path | None = None
) -> tuple[Bytecode, frozenset[Extension]]:
    """The hooks, compiled with every extension whose helpers they may call by ``allows``, and these extensions.

    Raises CompileError.
    """
    wanted = EXTENSIONS if offsets.structure_offsets() else EXTENSIONS - {PROBE}
    compiled = _compile_hooks(sources, cache, wanted)
    allowed = allowed_extensions(wanted, refused_calls(ALL_PROGRAMS, calls_of(compiled, ALL_PROGRAMS), allows))
    return (compiled if allowed == wanted else _compile_hooks(sources, cache, allowed)), allowed


def _compile_hooks(sources: BpfSources, cache: Path | None, extensions: frozenset[Extension]) -> Bytecode:
    return compile_cached(cache, sources, SOURCES, constants(extensions))


_NONE: Mapping[str, int] = {}


def examine(cache: Path | None = None, pinned: Mapping[str, int] = _NONE) -> Loaded:
    """Compile the hooks, load the programs that this kernel accepts. Raises CompileError, and what `Compiled` raises.

    ``cache``: the folder of what was compiled before; None to compile anew. ``pinned``: maps to load them on, by name;
    others are made.
    """
    sources = BpfSources.read()
    bytecode, extensions = compile_for(sources, _allows, cache)
    loaded = _load_each(sources, Compiled(bytecode, pinned), ALL_PROGRAMS, MAPS, extensions)
    if loaded.is_complete or not extensions:
        return loaded
    # The helpers are allowed, but the verifier refuses how they are used.
    plain = _load_each(sources, Compiled(_compile_hooks(sources, cache, frozenset()), pinned), ALL_PROGRAMS, MAPS)
    return plain if plain.is_complete else loaded


def _load_each(
    sources: BpfSources,
    compiled: Compiled,
    programs: Sequence[Program],
    maps: Sequence[str],
    extensions: frozenset[Extension] = frozenset(),
) -> Loaded:
    refused = refused_calls(programs, calls_of(compiled.bytecode, programs), _allows)
    fds: dict[str, int] = {}
    checks = []
    for program in programs:
        try:
            fds[program.name] = compiled.load(program)
            checks.append(ProgramCheck(program))
        except NotLoaded as error:
            log = str(error)
            checks.append(ProgramCheck(program, reason(program, refused.get(program.name, frozenset()), log), log))
    return Loaded(sources, compiled, fds, maps, extensions, tuple(checks))


def load(cache: Path | None = None, pinned: Mapping[str, int] = _NONE) -> Loaded:
    """`examine`, which raises ProgramsRefused too: for a program that is needed."""
    loaded = examine(cache, pinned)
    if not loaded.is_complete:
        raise ProgramsRefused(loaded.checks)
    return loaded


def digest(sources: BpfSources) -> bytes:
    """16 bytes that tell the text of the hooks, and what else of Graft decides what becomes of it, from any other."""
    decides = [sources.text(SOURCES), sources.headers, SIZES, ALL_PROGRAMS]
    return hashlib.sha256(repr(decides).encode()).digest()[:16]


def examine_relay(cache: Path | None = None) -> Loaded:
    """Compile the relay in the kernel, and load its program if this kernel accepts it. ``cache`` as in `examine`.

    Raises CompileError where this kernel has no sockmap, KernelError where it has no type information.
    """
    write_seq = offsets.write_seq_offset()
    if write_seq is None:
        raise KernelError("the kernel has no type information for struct tcp_sock")
    sources = BpfSources.read()
    bytecode = compile_cached(cache, sources, RELAY_SOURCES, {**RELAY_SIZES, "GRAFT_TCP_WRITE_SEQ": write_seq})
    return _load_each(sources, Compiled(bytecode, _NONE), [RELAY_PROGRAM], RELAY_MAPS)


def load_relay(cache: Path | None = None) -> Loaded:
    """The relay in the kernel, its program attached to its map. Raises KernelError where that is not possible."""
    loaded = examine_relay(cache)
    [check] = loaded.checks
    if not check.accepted:
        raise KernelError(f"the kernel refuses the relay's program: {check.reason}")
    attach_type = bpf.ATTACH_TYPES[RELAY_PROGRAM.attach]
    try:
        bpf.prog_attach_map(loaded.map_fd("flow_sources"), loaded.programs[RELAY_PROGRAM.name], attach_type)
    except OSError as error:
        raise KernelError(f"cannot attach the relay's program to its map: {error.strerror}") from error
    return loaded
