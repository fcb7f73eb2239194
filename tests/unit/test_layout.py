"""Structures and constants of bpf/graft.h, as a C compiler sees them, against those of Python."""

from __future__ import annotations

import ctypes
import re
import subprocess

import pytest

from graft.datapath import layout, loader
from graft.datapath.sources import bpf_source_dir
from graft.model.endpoint import MAX_ENDPOINT_NAME, Protocol
from graft.model.transport import Home, Transport
from graft.model.unix_socket import UNIX_FAMILY
from graft.policy.model import Default, Verdict
from graft.swap import decision, desk

STRUCTS: dict[str, type[ctypes.Structure]] = {
    "endpoint": layout.EndpointValue,
    "group": layout.GroupKey,
    "exchange_slot": layout.ExchangeSlot,
    "exchange": layout.ExchangeValue,
    "exchange_client": layout.ExchangeClient,
    "stand_in_key": layout.StandInKey,
    "stand_in": layout.StandInValue,
    "stand_in_place": layout.StandInPlace,
    "offer": layout.Offer,
    "endpoint_name": layout.EndpointNameKey,
    "container": layout.ContainerValue,
    "ingress_key": layout.IngressKey,
    "ingress_value": layout.IngressValue,
    "egress_key": layout.EgressKey,
    "egress_value": layout.EgressValue,
    "egress_port_key": layout.EgressPortKey,
    "egress_port_value": layout.EgressPortValue,
    "use": layout.Use,
    "host_address": layout.HostAddress,
    "scope": layout.Scope,
    "tag": layout.Tag,
    "server_place": layout.ServerPlace,
    "server": layout.ServerValue,
    "option": layout.Option,
    "options": layout.OptionsValue,
    "counter_key": layout.CounterKey,
    "settings": layout.SettingsValue,
    "watch": layout.WatchValue,
    "event": layout.EventValue,
    "desk": layout.DeskValue,
    "desk_slot": layout.DeskSlot,
    "flow": layout.FlowValue,
    "relay": layout.RelayValue,
    "crossing": layout.CrossingValue,
    "arrival": layout.ArrivalKey,
    "ferry": layout.FerryValue,
    "berth_key": layout.BerthKey,
    "berth": layout.BerthValue,
}

CONSTANTS = {
    **{f"GRAFT_CALL_{one.name}": one.value for one in layout.TracedCall},
    **{f"GRAFT_OUTCOME_{one.name}": one.value for one in layout.TracedOutcome},
    "GRAFT_CALL_REFUSED": layout.CALL_REFUSED,
    "GRAFT_NAME_LEN": layout.NAME_LEN,
    "GRAFT_VERDICT_NAMED": layout.VERDICT_NAMED,
    "GRAFT_OPTIONS_MAX": layout.OPTIONS_MAX,
    "GRAFT_LAYOUT_VERSION": layout.LAYOUT_VERSION,
    "GRAFT_INGRESS_FIXED_BITS": layout.INGRESS_FIXED_BITS,
    "GRAFT_EGRESS_FIXED_BITS": layout.EGRESS_FIXED_BITS,
    "GRAFT_EGRESS_PORT_FIXED_BITS": layout.EGRESS_PORT_FIXED_BITS,
    "GRAFT_ENDPOINT_OPEN": layout.ENDPOINT_OPEN,
    "GRAFT_ENDPOINT_DECLARED": layout.ENDPOINT_DECLARED,
    "GRAFT_ENDPOINT_DUAL_STACK": layout.ENDPOINT_DUAL_STACK,
    "GRAFT_ENDPOINT_UNIX": layout.ENDPOINT_UNIX,
    "GRAFT_ENDPOINT_HAS_PORT": layout.ENDPOINT_HAS_PORT,
    "GRAFT_UNIX": UNIX_FAMILY,
    "GRAFT_CONTAINER_DENIES": layout.CONTAINER_DENIES,
    "GRAFT_CONTAINER_OTHERS": layout.CONTAINER_OTHERS,
    "GRAFT_EXCHANGE_SLOT_BITS": layout.EXCHANGE_SLOT_BITS,
    "GRAFT_EXCHANGE_SLOTS": layout.EXCHANGE_SLOTS,
    "GRAFT_EXCHANGE_OUT_SLOTS": layout.EXCHANGE_OUT_SLOTS,
    "GRAFT_EXCHANGE_GENERATIONS": layout.EXCHANGE_GENERATIONS,
    "GRAFT_MAX_OFFERED": layout.MAX_OFFERED,
    "GRAFT_CONTAINER_ICMP": layout.CONTAINER_ICMP,
    "GRAFT_CONTAINER_MULTICAST": layout.CONTAINER_MULTICAST,
    "GRAFT_OWNED_KNOWN": layout.OWNED_KNOWN,
    "GRAFT_OWNED_UNKNOWN": layout.OWNED_UNKNOWN,
    "GRAFT_PROBED": layout.PROBED,
    "GRAFT_PROBED_EPOLL": layout.PROBED_EPOLL,
    "GRAFT_PROBED_FLAGS": layout.PROBED_FLAGS,
    "GRAFT_PROBED_OWNER": layout.PROBED_OWNER,
    "GRAFT_USE_INGRESS": layout.USE_INGRESS,
    "GRAFT_USE_PORT_0": layout.USE_PORT_0,
    "GRAFT_BERTHS4": layout.BERTHS4,
    "GRAFT_BERTHS6": layout.BERTHS6,
    "GRAFT_FERRY_NET": layout.FERRY_NET,
    "GRAFT_IPV4": 4,
    "GRAFT_IPV6": 6,
    "GRAFT_TCP": Protocol.TCP.value,
    "GRAFT_UDP": Protocol.UDP.value,
    "GRAFT_NEXT_HOME_NONE": 0,
    **{f"GRAFT_NEXT_HOME_{one.name}": one.value + 1 for one in Home},
    **{f"GRAFT_CALL_{one.name}": one.value for one in decision.Call},
    **{f"GRAFT_HOME_{one.name}": one.value for one in Home},
    **{f"GRAFT_TRANSPORT_{one.name}": one.value for one in Transport},
    **{f"GRAFT_DEFAULT_{one.name}": one.value for one in Default},
    **{f"GRAFT_VERDICT_{one.name}": one.value for one in Verdict},
    **{f"GRAFT_CROSSING_{one.name}": one.value for one in layout.Crossing},
    **{f"GRAFT_DECISION_{one.name}": one.value for one in layout.HookDecision},
}

C_ONLY = {
    "GRAFT_SERVERS_AT_A_PLACE", "GRAFT_OFTEN",
    "GRAFT_IPV4_HEADER", "GRAFT_IPV6_HEADER", "GRAFT_IPV4_PLAIN", "GRAFT_IPV4_DESTINATION",
    "GRAFT_IPV6_DESTINATION", "GRAFT_JUMBO", "GRAFT_PORT_TRIES",
    "GRAFT_LENT_ADDRESS", "GRAFT_LENT_PORT",
    "GRAFT_FERRY_NET_MASK", "GRAFT_BERTH_TRIES", "GRAFT_CONNECTS", "GRAFT_SENDS", "GRAFT_SENDS_TO_PEER",
    "GRAFT_GROUP_REQ_FAMILY", "GRAFT_GROUP_REQ_ADDR4", "GRAFT_GROUP_REQ_ADDR6", "GRAFT_MAX_JOIN",
    "GRAFT_NONE_GRANTED", "GRAFT_NONE_UNGRANTED", "GRAFT_NO_OTHERS",
    "GRAFT_LOOPBACK_FIRST", "GRAFT_CGROUP_LEVELS", "GRAFT_GROUP_STEPS", "GRAFT_GROUP_MORE",
    "GRAFT_GROUP_OWN", "GRAFT_GROUP_SHARED", "GRAFT_TRACKING_BITS", "GRAFT_FIRST_ANSWER", "GRAFT_TRANSFORMED4",
    "GRAFT_TRANSFORMED6", "GRAFT_ROUTE_NOT_COUNTED", "GRAFT_LOOPBACK_LINK",
}  # fmt: skip
"""Constants that Python does not use: they describe packets (bpf/packet.bpf.c, egress.bpf.c, translated.bpf.c) or an
option's value (bpf/options.bpf.c), limit a loop, name a case of C's, or are of what only the hooks read of a tag.
"""


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """The header as a C program prints it: `struct.member` -> offset, `struct` -> size, `NAME` -> value."""
    lines = [f'printf("{name} %lld\\n", (long long){name});' for name in CONSTANTS]
    for name, python in STRUCTS.items():
        lines.append(f'printf("{name} %zu\\n", sizeof(struct {name}));')
        for field, *_ in python._fields_:
            member = f"struct {name}, {field}"
            lines.append(f'printf("{name}.{field} %zu\\n", offsetof({member}));')
    folder = tmp_path_factory.mktemp("layout")
    source = folder / "layout.c"
    body = "\n".join(lines)
    source.write_text(
        f"#include <stdio.h>\n#include <stddef.h>\n#include <linux/types.h>\n"
        f'#include "graft.h"\nint main(void) {{\n{body}\nreturn 0; }}\n'
    )
    program = folder / "layout"
    subprocess.run(["gcc", f"-I{bpf_source_dir()}", "-o", program, source], check=True)
    output = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in (line.split() for line in output.splitlines())}


@pytest.mark.parametrize("name", STRUCTS)
def test_a_structure_has_the_size_and_the_offsets_of_c(header: dict[str, int], name: str) -> None:
    python = STRUCTS[name]
    offsets = {field: getattr(python, field).offset for field, *_ in python._fields_}
    assert offsets == {field: header[f"{name}.{field}"] for field in offsets}
    assert ctypes.sizeof(python) == header[name]


def test_constants_have_the_values_of_the_header(header: dict[str, int]) -> None:
    assert {name: header[name] for name in CONSTANTS} == CONSTANTS


def test_every_structure_of_the_header_is_compared() -> None:
    text = (bpf_source_dir() / "graft.h").read_text()
    assert set(re.findall(r"^struct (\w+) \{$", text, re.M)) == set(STRUCTS)


def test_every_constant_of_the_bpf_sources_is_compared_or_used_in_c_alone() -> None:
    texts = [file.read_text() for file in bpf_source_dir().glob("*.[ch]")]
    defined = {name for text in texts for name in re.findall(r"^#define (GRAFT_\w+)[ \t]+[^ \t\n]", text, re.M)}
    assert defined == set(CONSTANTS) | C_ONLY


def test_sizes_that_are_passed_to_the_compiler_are_those_that_python_uses() -> None:
    assert loader.SIZES["GRAFT_MAX_DESKS"] == layout.MAX_DESKS
    assert loader.SIZES["GRAFT_MAX_EXCHANGES"] == layout.MAX_EXCHANGES
    assert loader.SIZES["GRAFT_MAX_STAND_INS"] == layout.MAX_STAND_INS
    assert layout.NAME_LEN == MAX_ENDPOINT_NAME + 1


def test_an_answer_of_a_desk_is_read_by_the_names_of_its_fields() -> None:
    written = layout.DeskValue(uid=8, gid=9, netns=1, endpoint=2, socket_family=6, verdict=3, protocol=262)
    written.references, written.flags, written.probed = 4, 5, 6
    written.options.count, written.options.overflow = 7, 1
    first, compared = layout.DeskValue.uid.offset, layout.DeskValue.netns.offset
    raw = bytes(written)[: first + desk._ANSWER.size]
    answer = desk._parse_answer(raw[first:])
    facts = answer.facts
    assert (facts.netns, facts.endpoint, facts.family, facts.verdict, facts.protocol) == (1, 2, 6, 3, 262)
    expected = desk.Descriptor(references=4, flags=5, probed=6, options=7, overflow=1, owner=None)
    assert (answer.descriptor, answer.raw) == (expected, raw[compared:])
    written.probed |= layout.PROBED_OWNER
    raw = bytes(written)[: first + desk._ANSWER.size]
    answer = desk._parse_answer(raw[first:])
    expected = expected._replace(probed=6 | layout.PROBED_OWNER, owner=(8, 9))
    assert (answer.descriptor, answer.raw) == (expected, raw[compared:])
    assert desk._QUESTION.size == first
    assert (
        desk._QUESTION.size + desk._ANSWER.size == layout.DeskValue.options.offset + layout.OptionsValue.option.offset
    )
