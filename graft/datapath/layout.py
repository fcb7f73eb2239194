"""The structures of bpf/graft.h, for Python. tests/unit/test_layout.py compares the two.

Ports are in host order unless a name ends in ``_be``; addresses are in network order, an IPv4 one in the
first four bytes of its field.
"""

from __future__ import annotations

import ctypes
import enum

NAME_LEN = 32
OPTIONS_MAX = 32
LAYOUT_VERSION = 20

INGRESS_FIXED_BITS = 8 * (4 + 4 + 16)
EGRESS_FIXED_BITS = 8 * (4 + 4)
EGRESS_PORT_FIXED_BITS = 8 * (4 + 4)


class HookDecision(enum.IntEnum):
    """What a hook decided (CounterKey.decision)."""

    REWRITTEN = 0
    CONNECTED = 1
    REFUSED_BIND = 3
    REFUSED_CONNECT = 4
    REFUSED_OPTION = 5
    CLOSED_LISTENER = 6
    DROPPED = 7


class TracedCall(enum.IntEnum):
    """What a call asked for (EventValue.call)."""

    BIND = 0
    CONNECT = 1
    LISTEN = 2
    SEND = 3
    SOCKET = 4
    OPTION = 5
    PACKET = 6


class TracedOutcome(enum.IntEnum):
    """What became of it (EventValue.outcome)."""

    REFUSED = 0
    GRANTED = 1
    RELAYED = 2
    CONTAINER = 3
    PASSED = 4


CALL_REFUSED = 128
ENDPOINT_OPEN = 1
ENDPOINT_DECLARED = 2
ENDPOINT_DUAL_STACK = 4
ENDPOINT_UNIX = 8
ENDPOINT_HAS_PORT = 16
USE_INGRESS = 1
USE_PORT_0 = 2
OWNED_KNOWN = 1
OWNED_UNKNOWN = 2
CONTAINER_DENIES = 1
CONTAINER_OTHERS = 2
CONTAINER_ICMP = 4
CONTAINER_MULTICAST = 8
PROBED = 1
PROBED_EPOLL = 2
PROBED_FLAGS = 4
PROBED_OWNER = 8
MAX_DESKS = 8192
WATCH_PAGES = 64
MAX_RULES = 262144
MAX_EXCHANGES = 524288
MAX_STAND_INS = 65536
MAX_NOTED = 65536
VERDICT_NAMED = 4
"""In the maps only: a GRANT of a rule for this one IPv4 address, which may be a broadcast address."""
BERTHS4, BERTHS6 = 256, 16
MAX_FERRIES = 1920
MAX_BERTHS = MAX_FERRIES * (BERTHS4 + BERTHS6)
"""All places of as many ferries as there can be: no container can fill them for another one."""
FERRY_NET = 0x7FFE0000  # 127.254.0.0/16
EXCHANGE_SLOT_BITS = 12
EXCHANGE_SLOTS = 4096
EXCHANGE_OUT_SLOTS = 512
EXCHANGE_GENERATIONS = 2046
MAX_OFFERED = 128

_ADDR = ctypes.c_ubyte * 16


def container_flags(denies: bool, leaves_others: bool, names_icmp: bool, names_groups: bool) -> int:
    """ContainerValue.flags of a ruleset."""
    flags = CONTAINER_DENIES * denies | CONTAINER_OTHERS * leaves_others
    return flags | CONTAINER_ICMP * names_icmp | CONTAINER_MULTICAST * names_groups


class EndpointValue(ctypes.Structure):
    """`endpoints`: id -> this."""

    _fields_ = (
        ("netns", ctypes.c_uint64),
        ("addr", _ADDR),
        ("port", ctypes.c_uint16),
        ("family", ctypes.c_uint8),
        ("protocols", ctypes.c_uint8),
        ("last_port", ctypes.c_uint16),
        ("flags", ctypes.c_uint16),
    )


class EndpointNameKey(ctypes.Structure):
    """`endpoint_names`: this -> id."""

    _fields_ = (("name", ctypes.c_char * NAME_LEN),)


class GroupKey(ctypes.Structure):
    """`groups`: this -> 1. ``id``: an endpoint's or a ruleset's."""

    _fields_ = (
        ("id", ctypes.c_uint32),
        ("family", ctypes.c_uint8),
        ("zero", ctypes.c_uint8 * 3),
        ("addr", _ADDR),
    )


class ContainerValue(ctypes.Structure):
    """`containers`: id -> this."""

    _fields_ = (
        ("netns", ctypes.c_uint64),
        ("ruleset", ctypes.c_uint32),
        ("transport", ctypes.c_uint8),
        ("bind_default", ctypes.c_uint8),
        ("connect_default", ctypes.c_uint8),
        ("flags", ctypes.c_uint8),
        ("host_netns", ctypes.c_uint64),
    )


class IngressKey(ctypes.Structure):
    """`ingress`: this -> IngressValue, by longest prefix."""

    _fields_ = (
        ("prefixlen", ctypes.c_uint32),
        ("ruleset", ctypes.c_uint32),
        ("protocol", ctypes.c_uint8),
        ("family", ctypes.c_uint8),
        ("any", ctypes.c_uint8),
        ("zero", ctypes.c_uint8),
        ("addr", _ADDR),
        ("port_be", ctypes.c_uint16),
        ("zero2", ctypes.c_uint16),
    )


class IngressValue(ctypes.Structure):
    """The endpoint that a bind becomes, and where the rule's range begins, if the endpoint is a range."""

    _fields_ = (("endpoint", ctypes.c_uint32), ("first_port", ctypes.c_uint16), ("zero", ctypes.c_uint16))


class EgressKey(ctypes.Structure):
    """`egress`: this -> EgressValue, by longest prefix."""

    _fields_ = (
        ("prefixlen", ctypes.c_uint32),
        ("ruleset", ctypes.c_uint32),
        ("protocol", ctypes.c_uint8),
        ("family", ctypes.c_uint8),
        ("zero", ctypes.c_uint8 * 2),
        ("addr", _ADDR),
    )


class EgressValue(ctypes.Structure):
    """The node that a destination's ports are listed under; and what holds for all of them, where one thing does."""

    _fields_ = (("node", ctypes.c_uint32), ("verdict", ctypes.c_uint32), ("endpoint", ctypes.c_uint32))


class HostAddress(ctypes.Structure):
    """`noted_addresses`, `broadcasts`: this -> 1."""

    _fields_ = (("netns", ctypes.c_uint64), ("addr", _ADDR), ("family", ctypes.c_uint64))


class Use(ctypes.Structure):
    """`uses`: this -> USE_*."""

    _fields_ = (("ruleset", ctypes.c_uint32), ("endpoint", ctypes.c_uint32))


class EgressPortKey(ctypes.Structure):
    """`egress_ports`: this -> EgressPortValue, by longest prefix."""

    _fields_ = (
        ("prefixlen", ctypes.c_uint32),
        ("ruleset", ctypes.c_uint32),
        ("node", ctypes.c_uint32),
        ("port_be", ctypes.c_uint16),
        ("zero", ctypes.c_uint16),
    )


class EgressPortValue(ctypes.Structure):
    """What to do with a destination."""

    _fields_ = (("verdict", ctypes.c_uint32), ("endpoint", ctypes.c_uint32))


class Scope(ctypes.Structure):
    """`scopes`: id of a cgroup -> this."""

    _fields_ = (("container", ctypes.c_uint32), ("zero", ctypes.c_uint32))


class Tag(ctypes.Structure):
    """`tags`: socket -> this."""

    _fields_ = (
        ("container", ctypes.c_uint32),
        ("endpoint", ctypes.c_uint32),
        ("home", ctypes.c_uint8),
        ("family", ctypes.c_uint8),
        ("port", ctypes.c_uint16),
        ("bound_port", ctypes.c_uint16),
        ("open_port", ctypes.c_uint16),
        ("addr", _ADDR),
        ("source", ctypes.c_uint32),
        ("lent", ctypes.c_uint8),
        ("at_unix", ctypes.c_uint8),
        ("lent_family", ctypes.c_uint8),
        ("owned", ctypes.c_uint8),
        ("binder", ctypes.c_uint32),
        ("uid", ctypes.c_uint32),
        ("gid", ctypes.c_uint32),
        ("zero", ctypes.c_uint32),
        ("found_endpoint", ctypes.c_uint64),
        ("found_port", ctypes.c_uint64),
        ("netns", ctypes.c_uint64),
        ("since", ctypes.c_uint64),
    )


class ServerPlace(ctypes.Structure):
    """`servers`: this -> ServerValue."""

    _fields_ = (
        ("netns", ctypes.c_uint64),
        ("addr", _ADDR),
        ("port", ctypes.c_uint16),
        ("family", ctypes.c_uint8),
        ("protocol", ctypes.c_uint8),
        ("number", ctypes.c_uint32),
    )


class ServerValue(ctypes.Structure):
    """`servers`: ServerPlace -> this."""

    _fields_ = (
        ("bound", ctypes.c_uint64),
        ("container", ctypes.c_uint32),
        ("endpoint", ctypes.c_uint32),
        ("addr", _ADDR),
        ("port", ctypes.c_uint16),
        ("family", ctypes.c_uint8),
        ("zero", ctypes.c_uint8 * 5),
    )


class Option(ctypes.Structure):
    """One option that a program set."""

    _fields_ = (("level", ctypes.c_uint16), ("name", ctypes.c_uint16))


class OptionsValue(ctypes.Structure):
    """`options`: socket -> this."""

    _fields_ = (
        ("count", ctypes.c_uint32),
        ("overflow", ctypes.c_uint32),
        ("option", Option * OPTIONS_MAX),
        ("asked_group", ctypes.c_uint32),
        ("borrowed", ctypes.c_uint32),
    )


class DeskSlot(ctypes.Structure):
    """`desk_slots`: a supervisor's process id -> this."""

    _fields_ = (("cgroup", ctypes.c_uint64), ("desk", ctypes.c_uint32), ("zero", ctypes.c_uint32))


class DeskValue(ctypes.Structure):
    """`desks`: a supervisor's question about a socket, and a hook's answer."""

    ADDRESS = _ADDR
    _fields_ = (
        ("fdinfo", ctypes.c_int32),
        ("fd", ctypes.c_int32),
        ("container", ctypes.c_uint32),
        ("port", ctypes.c_uint16),
        ("family", ctypes.c_uint8),
        ("call", ctypes.c_uint8),
        ("addr", _ADDR),
        ("tid", ctypes.c_uint32),
        ("zero", ctypes.c_uint32),
        ("uid", ctypes.c_uint32),
        ("gid", ctypes.c_uint32),
        ("netns", ctypes.c_uint64),
        ("container_netns", ctypes.c_uint64),
        ("endpoint_netns", ctypes.c_uint64),
        ("endpoint", ctypes.c_uint32),
        ("local_port", ctypes.c_uint16),
        ("answered", ctypes.c_uint8),
        ("home", ctypes.c_uint8),
        ("socket_family", ctypes.c_uint8),
        ("state", ctypes.c_uint8),
        ("bound", ctypes.c_uint8),
        ("verdict", ctypes.c_uint8),
        ("endpoint_family", ctypes.c_uint8),
        ("bind_default", ctypes.c_uint8),
        ("connect_default", ctypes.c_uint8),
        ("next_home", ctypes.c_uint8),
        ("protocol", ctypes.c_uint16),
        ("endpoint_flags", ctypes.c_uint16),
        ("references", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("probed", ctypes.c_uint32),
        ("options", OptionsValue),
    )


class FerryValue(ctypes.Structure):
    """`ferries`: container -> its ferry's sockets on the host's loopback."""

    _fields_ = (
        ("mark", ctypes.c_uint32),
        ("port", ctypes.c_uint16),
        ("zero", ctypes.c_uint16),
        ("ports6", ctypes.c_uint16 * BERTHS6),
    )


class BerthKey(ctypes.Structure):
    """`berths`: an address of a ferry's -> BerthValue."""

    _fields_ = (
        ("container", ctypes.c_uint32),
        ("place", ctypes.c_uint16),
        ("family", ctypes.c_uint8),
        ("zero", ctypes.c_uint8),
    )


class BerthValue(ctypes.Structure):
    """The address inside that an address of a ferry's stands for."""

    _fields_ = (
        ("addr", _ADDR),
        ("port", ctypes.c_uint16),
        ("family", ctypes.c_uint8),
        ("zero", ctypes.c_uint8 * 5),
        ("used", ctypes.c_uint64),
    )


class Crossing(enum.IntEnum):
    """Which socket a crossing is stored with (CrossingValue.role)."""

    DIALING = 1
    ACCEPTED = 2
    REDIRECTED = 3
    RELAYED = 4
    LISTENER = 5


class RelayValue(ctypes.Structure):
    """`relays`: container -> where Graft listens inside its namespace."""

    _fields_ = (
        ("port", ctypes.c_uint16),
        ("six", ctypes.c_uint8),
        ("zero", ctypes.c_uint8),
        ("datagram_port", ctypes.c_uint16),
        ("zero2", ctypes.c_uint16),
        ("cgroup", ctypes.c_uint64),
        ("mark", ctypes.c_uint32),
        ("answer_mark", ctypes.c_uint32),
    )


class ExchangeSlot(ctypes.Structure):
    """`exchanges`: this -> ExchangeValue."""

    _fields_ = (
        ("container", ctypes.c_uint32),
        ("slot", ctypes.c_uint16),
        ("out", ctypes.c_uint8),
        ("zero", ctypes.c_uint8),
    )


class ExchangeValue(ctypes.Structure):
    """The remote end of an exchange of datagrams."""

    _fields_ = (
        ("addr", _ADDR),
        ("used", ctypes.c_uint64),
        ("cookie", ctypes.c_uint64),
        ("port", ctypes.c_uint16),
        ("family", ctypes.c_uint8),
        ("zero", ctypes.c_uint8),
        ("generation", ctypes.c_uint16),
        ("local_port", ctypes.c_uint16),
    )


class ExchangeClient(ctypes.Structure):
    """`exchange_clients`: this -> the exchange's address."""

    _fields_ = (
        ("container", ctypes.c_uint32),
        ("local_port", ctypes.c_uint16),
        ("port", ctypes.c_uint16),
        ("addr", ctypes.c_ubyte * 4),
    )


class StandInKey(ctypes.Structure):
    """`stand_ins`: this -> StandInValue."""

    _fields_ = (
        ("container", ctypes.c_uint32),
        ("port", ctypes.c_uint16),
        ("zero", ctypes.c_uint8 * 2),
    )


class StandInValue(ctypes.Structure):
    """The remote end that a stand-in stands for."""

    _fields_ = (
        ("addr", _ADDR),
        ("cookie", ctypes.c_uint64),
        ("begun", ctypes.c_uint64),
        ("connected", ctypes.c_uint64),
        ("port", ctypes.c_uint16),
        ("local_port", ctypes.c_uint16),
        ("zero", ctypes.c_uint32),
    )


class StandInPlace(ctypes.Structure):
    """`stand_in_ports`: this -> the stand-in's port."""

    _fields_ = (
        ("addr", _ADDR),
        ("cookie", ctypes.c_uint64),
        ("container", ctypes.c_uint32),
        ("port", ctypes.c_uint16),
        ("local_port", ctypes.c_uint16),
    )


class Offer(ctypes.Structure):
    """`offers`: container -> this."""

    _fields_ = (
        ("count", ctypes.c_uint32),
        ("ports", ctypes.c_uint16 * MAX_OFFERED),
    )


class CrossingValue(ctypes.Structure):
    """`crossings`: socket -> the remote end of the relayed connection."""

    _fields_ = (
        ("addr", _ADDR),
        ("port", ctypes.c_uint16),
        ("family", ctypes.c_uint8),
        ("role", ctypes.c_uint8),
        ("container", ctypes.c_uint32),
        ("uid", ctypes.c_uint32),
        ("gid", ctypes.c_uint32),
        ("near", ctypes.c_uint32),
        ("near_port", ctypes.c_uint16),
        ("zero", ctypes.c_uint16),
    )


class ArrivalKey(ctypes.Structure):
    """`arrivals`: both addresses of a connection, the connecting side's first -> CrossingValue."""

    _fields_ = (
        ("netns", ctypes.c_uint64),
        ("addr", _ADDR),
        ("to", _ADDR),
        ("port", ctypes.c_uint16),
        ("to_port", ctypes.c_uint16),
        ("family", ctypes.c_uint8),
        ("zero", ctypes.c_uint8 * 3),
    )


class FlowValue(ctypes.Structure):
    """`flows`: cookie of a flow's source -> this."""

    _fields_ = (
        ("moved", ctypes.c_uint64),
        ("left", ctypes.c_uint64),
        ("first", ctypes.c_uint32),
        ("started", ctypes.c_uint32),
        ("mark", ctypes.c_uint32),
        ("segments", ctypes.c_uint32),
        ("earlier", ctypes.c_uint32),
        ("zero", ctypes.c_uint32),
    )


class CounterKey(ctypes.Structure):
    """`counters`: this -> how often."""

    _fields_ = (("container", ctypes.c_uint32), ("decision", ctypes.c_uint32))


class WatchValue(ctypes.Structure):
    """`watches`: entry 0 is the watchers' and has ``until``, entry 1 the hooks' and has ``lost``."""

    _fields_ = (("until", ctypes.c_uint64), ("lost", ctypes.c_uint64))


class EventValue(ctypes.Structure):
    """In `decisions`."""

    _fields_ = (
        ("time", ctypes.c_uint64),
        ("container", ctypes.c_uint32),
        ("tid", ctypes.c_uint32),
        ("pid", ctypes.c_uint32),
        ("endpoint", ctypes.c_uint32),
        ("comm", ctypes.c_char * 16),
        ("addr", _ADDR),
        ("port", ctypes.c_uint16),
        ("endpoint_port", ctypes.c_uint16),
        ("family", ctypes.c_uint8),
        ("protocol", ctypes.c_uint8),
        ("call", ctypes.c_uint8),
        ("outcome", ctypes.c_uint8),
    )


class SettingsValue(ctypes.Structure):
    """`settings`: one entry, at 0."""

    _fields_ = (
        ("version", ctypes.c_uint32),
        ("last_id", ctypes.c_uint32),
        ("hooks", ctypes.c_uint8 * 16),
    )
