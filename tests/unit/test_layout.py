"""graft/layout.py against the C compiler's own idea of bpf/graft.h: every size, every offset, every constant."""

from __future__ import annotations

import ctypes
import subprocess

import pytest

from graft import decision, desk, layout
from graft.data import bpf_source_dir

STRUCTS: dict[str, type[ctypes.Structure]] = {
    "endpoint": layout.EndpointValue,
    "endpoint_name": layout.EndpointNameKey,
    "container": layout.ContainerValue,
    "ingress_key": layout.IngressKey,
    "ingress_value": layout.IngressValue,
    "egress_key": layout.EgressKey,
    "egress_value": layout.EgressValue,
    "egress_port_key": layout.EgressPortKey,
    "egress_port_value": layout.EgressPortValue,
    "scope": layout.Scope,
    "tag": layout.Tag,
    "option": layout.Option,
    "options": layout.Options,
    "counter_key": layout.CounterKey,
    "settings": layout.SettingsValue,
    "desk": layout.Desk,
    "desk_slot": layout.DeskSlot,
    "flow": layout.FlowValue,
}

CONSTANTS = {
    "GRAFT_NAME_LEN": layout.NAME_LEN,
    "GRAFT_OPTIONS_MAX": layout.OPTIONS_MAX,
    "GRAFT_LAYOUT_VERSION": layout.LAYOUT_VERSION,
    "GRAFT_INGRESS_FIXED_BITS": layout.INGRESS_FIXED_BITS,
    "GRAFT_EGRESS_FIXED_BITS": layout.EGRESS_FIXED_BITS,
    "GRAFT_EGRESS_PORT_FIXED_BITS": layout.EGRESS_PORT_FIXED_BITS,
    "GRAFT_ENDPOINT_OPEN": layout.ENDPOINT_OPEN,
    "GRAFT_ENDPOINT_DECLARED": layout.ENDPOINT_DECLARED,
    "GRAFT_ENDPOINT_DUAL_STACK": layout.ENDPOINT_DUAL_STACK,
    "GRAFT_CONTAINER_DENIES": layout.CONTAINER_DENIES,
    "GRAFT_CONTAINER_OTHERS": layout.CONTAINER_OTHERS,
    "GRAFT_PROBED": layout.PROBED,
    "GRAFT_PROBED_EPOLL": layout.PROBED_EPOLL,
    "GRAFT_PROBED_FLAGS": layout.PROBED_FLAGS,
    "GRAFT_PROBED_OWNED": layout.PROBED_OWNED,
    **{f"GRAFT_BIRTH_{one.name}": one.value + 1 for one in layout.Home},
    **{f"GRAFT_CALL_{one.name}": one.value for one in decision.Call},
    **{f"GRAFT_HOME_{one.name}": one.value for one in layout.Home},
    **{f"GRAFT_TRANSPORT_{one.name}": one.value for one in layout.Transport},
    **{f"GRAFT_DECISION_{one.name}": one.value for one in layout.Decision},
}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What a C program prints of the header: `struct.member` -> offset, `struct` -> size, `NAME` -> value."""
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
    said = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in (line.split() for line in said.splitlines())}


@pytest.mark.parametrize("name", STRUCTS)
def test_a_structure_has_the_size_and_the_offsets_that_c_gives_it(told: dict[str, int], name: str) -> None:
    python = STRUCTS[name]
    offsets = {field: getattr(python, field).offset for field, *_ in python._fields_}
    assert offsets == {field: told[f"{name}.{field}"] for field in offsets}
    assert ctypes.sizeof(python) == told[name]


def test_constants_have_the_values_of_the_header(told: dict[str, int]) -> None:
    assert {name: told[name] for name in CONSTANTS} == CONSTANTS


def test_every_structure_of_the_header_is_compared_or_the_kernels_alone() -> None:
    text = (bpf_source_dir() / "graft.h").read_text()
    kernels_own = {"relay", "crossing", "arrival", "arrival_key"}  # of the splice transport, compared elsewhere
    named = {line.split()[1] for line in text.splitlines() if line.startswith("struct ") and line.endswith("{")}
    assert named - set(STRUCTS) <= kernels_own


def test_the_answer_of_a_desk_is_read_as_it_is_laid_out() -> None:
    fields = [name for name, *_ in layout.Desk._fields_]
    answer = fields[fields.index("netns") : fields.index("options")]
    answer = [name for name in answer if name != "birth" and not name.startswith("zero")]
    facts = [{"family": "socket_family"}.get(name, name) for name in decision.Facts._fields]
    assert [*answer, "options", "overflow"] == [*facts, *desk.Descriptor._fields]
    assert desk._QUESTION.size == layout.Desk.netns.offset
    assert desk._ANSWER.size == layout.Desk.options.offset + layout.Options.option.offset - layout.Desk.netns.offset


def test_map_keys_have_no_padding_that_a_lookup_could_miss() -> None:
    for name in ("ingress_key", "egress_key", "egress_port_key", "counter_key", "endpoint_name"):
        python = STRUCTS[name]
        assert sum(ctypes.sizeof(kind) for _, kind, *_ in python._fields_) == ctypes.sizeof(python)
