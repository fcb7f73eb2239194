"""Loading program by program: what is refused is left out or named, and keeps nothing else from loading."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from graft.commands import doctor
from graft.datapath import attachments, compile_cache, compiled, dataplane, loader
from graft.datapath.loader import ProgramsRefused
from graft.datapath.programs import (
    ALL_PROGRAMS,
    EXTENSIONS,
    MPTCP,
    PROBE,
    PROGRAMS,
    RELAY_PROGRAM,
    SPLICE_PROGRAMS,
    ProgramCheck,
    refused_calls,
)
from graft.datapath.sources import BpfSources, bpf_source_dir
from graft.errors import KernelError
from graft.kernel import bpf_maps, helpers, instructions
from graft.model.settings import Settings
from tests.support.allowed_helpers import TABLE, table
from tests.support.cgroups import attach_points, new_cgroup
from tests.support.control_flow import loops_without_jump
from tests.support.installation import COMPILED, Host

pytestmark = pytest.mark.kernel

AddForbiddenCall = Callable[[str], None]

# bpf_skb_store_bytes: for packets only, so that no kernel has ever allowed it in a program of Graft's.
_FORBIDDEN = "((int (*)(void *, u32, void *, u32, u64))9)(ctx, 0, 0, 0, 0);"


@pytest.fixture
def add_forbidden_call(root: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AddForbiddenCall]:
    """Adds a call that the kernel does not allow to the BPF program of that name."""
    sources = tmp_path / "bpf"
    shutil.copytree(bpf_source_dir(), sources)
    monkeypatch.setattr("graft.datapath.sources.bpf_source_dir", lambda: sources)

    def add(function: str) -> None:
        for file in sources.glob("*.bpf.c"):
            text = file.read_text()
            start = re.compile(rf"^(int graft_{function}\(.*\)\n{{\n(?:\t[^\n]*[;]\n)*?)\n", re.M)
            changed, count = start.subn(rf"\1\n\t{_FORBIDDEN}\n", text)
            if count:
                file.write_text(changed)
                return
        raise AssertionError(f"no such program: {function}")

    yield add


def test_what_was_loaded_is_closed_when_nobody_refers_to_it(root: None) -> None:
    loader.examine(COMPILED)
    gc.collect()
    before = set(os.listdir("/proc/self/fd"))
    assert loader.examine(COMPILED).is_complete
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) <= before


def test_this_kernel_takes_every_program(root: None) -> None:
    loaded = loader.examine(COMPILED)
    assert [one.reason for one in loaded.checks if not one.accepted] == []
    assert set(loaded.programs) == {program.name for program in ALL_PROGRAMS}
    assert all(instructions.calls(loaded.compiled.bytecode.programs[program.function]) for program in ALL_PROGRAMS)


def test_what_was_compiled_once_is_loaded_without_a_compiler(
    root: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = loader.examine(tmp_path)
    assert loader.examine_relay(tmp_path).is_complete

    def compile_text(*_: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(compile_cache, "compile_text", compile_text)
    again = loader.load(tmp_path)
    assert again.programs.keys() == first.programs.keys() and again.extensions == first.extensions
    for name in loader.MAPS:
        made, before = (one.map_fd(name) for one in (again, first))
        assert bpf_maps.map_shape(made) == bpf_maps.map_shape(before)
        assert bpf_maps.map_types(made) == bpf_maps.map_types(before)
    assert loader.load_relay(tmp_path).is_complete


def test_a_program_that_is_not_needed_is_left_out_and_all_else_loads(
    bare_host: Host, add_forbidden_call: AddForbiddenCall
) -> None:
    add_forbidden_call("splice")
    add_forbidden_call("getpeername4")
    dataplane.up(bare_host.settings)
    pinned = {pin.name for pin in bare_host.settings.pin_dir.glob("prog_*")}
    assert pinned >= {f"prog_{program.name}" for program in PROGRAMS}
    assert not pinned & {"prog_splice", "prog_getpeername4"}
    bare_host.graft("ep", "add", "web", "0.0.0.0:8080")
    server = "import socket; s = socket.create_server(('0.0.0.0', 80)); print(s.getsockname(), flush=True); s.accept()"
    program = bare_host.start("-i", "0.0.0.0:80=web", "--", "/usr/bin/python3", "-c", server)
    program.says("('0.0.0.0', 80)")
    assert bare_host.netns.listens(8080)


def test_transport_splice_says_that_its_program_is_missing(
    bare_host: Host, add_forbidden_call: AddForbiddenCall
) -> None:
    add_forbidden_call("getpeername6")
    dataplane.up(bare_host.settings)
    with new_cgroup("other") as folder:
        with pytest.raises(KernelError, match="refused getpeername6") as error:
            attachments.attach(bare_host.settings, folder, 1, splice=True)
        assert error.value.hint == "graft doctor shows the reason"
        assert attach_points(folder) == set()


def test_up_without_a_program_that_is_needed_is_one_line_and_a_file(
    bare_host: Host, add_forbidden_call: AddForbiddenCall
) -> None:
    add_forbidden_call("sock_ops")
    with pytest.raises(KernelError) as error:
        dataplane.up(bare_host.settings)
    log = bare_host.settings.run_dir / "verifier.log"
    [line] = error.value.lines()
    assert "sock_ops: bpf helper 9 not allowed in sock_ops programs" in line
    assert "Linux 5.15" in line and str(log) in line and "\n" not in line
    assert log.stat().st_mode & 0o077 == 0
    assert "sock_ops" in log.read_text() and "#9" in log.read_text()
    assert not bare_host.settings.pin_dir.exists()


def test_programs_that_the_verifier_refuses_are_loaded_without_extensions(
    root: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = compiled.Compiled.load

    def picky(made: compiled.Compiled, program: object) -> int:
        if program is PROGRAMS[0] and helpers.HELPERS["set_retval"] in instructions.calls(
            made.bytecode.programs[PROGRAMS[0].function]
        ):
            raise compiled.NotLoaded("too complex")
        return real(made, program)  # type: ignore[arg-type]

    monkeypatch.setattr(compiled.Compiled, "load", picky)
    assert loader.load(COMPILED).extensions == frozenset()


@pytest.mark.parametrize(("helper", "dropped"), [("skc_to_mptcp_sock", MPTCP), ("get_current_task", PROBE)])
def test_an_extension_whose_helper_is_not_allowed_is_compiled_out(
    root: None, monkeypatch: pytest.MonkeyPatch, helper: str, dropped: object
) -> None:
    real, number = loader.kernel_allows, helpers.HELPERS[helper]
    monkeypatch.setattr(
        loader, "kernel_allows", lambda kind, attach, asked: asked != number and real(kind, attach, asked)
    )
    loaded = loader.load(COMPILED)
    assert loaded.extensions == EXTENSIONS - {dropped}
    assert all(
        number not in instructions.calls(loaded.compiled.bytecode.programs[program.function])
        for program in ALL_PROGRAMS
    )


def test_doctor_names_the_program_the_reason_and_what_is_lost(root: None, add_forbidden_call: AddForbiddenCall) -> None:
    add_forbidden_call("splice")
    found = {feature.name: feature for feature in doctor.features(Settings.from_environment())}
    splice = found["program splice"]
    assert (splice.present, splice.needed) == (False, False)
    assert splice.without == "no transport splice: bpf helper 9 not allowed in sock_ops programs"
    assert "#9" in splice.log
    assert found["program sock_ops"].present and found["bpf_set_retval"].present


def test_doctor_lists_every_program(host: Host, doctor_report: dict[str, dict[str, Any]]) -> None:
    for program in (*ALL_PROGRAMS, RELAY_PROGRAM):
        assert doctor_report[f"program {program.name}"]["present"] is True
    assert host.graft("doctor", "--verbose").stdout.count("\n") == len(doctor_report)


def test_the_error_names_the_first_needed_program() -> None:
    error = ProgramsRefused(
        [ProgramCheck(SPLICE_PROGRAMS[0], "no", "log 1"), ProgramCheck(PROGRAMS[0], "why", "log 2")]
    )
    assert "bind4: why" in error.message
    assert error.log == "splice: no\nlog 1\nbind4: why\nlog 2"


@pytest.mark.parametrize("kernel", sorted(json.loads(TABLE.read_text())))
def test_the_programs_call_only_what_older_kernels_allow(root: None, kernel: str) -> None:
    assert refused_by(kernel) == {}


def test_the_programs_have_only_loops_that_older_kernels_take(root: None) -> None:
    """Else 6.1 refuses one, and all are loaded there without extensions."""
    made, extensions = loader.compile_for(BpfSources.read(), lambda *_: True, COMPILED)
    assert extensions == EXTENSIONS
    for program in ALL_PROGRAMS:
        assert not loops_without_jump(made.programs[program.function]), program.name


def test_a_loop_that_goes_back_without_a_jump_is_noticed() -> None:
    jump = struct.pack("=BBhi", 0x05, 0, 1, 0)  # over the body, to the loop's condition
    body, condition = struct.pack("=BBhi", 0xB7, 0, 0, 0), struct.pack("=BBhi", 0x15, 0, -2, 0)
    end = struct.pack("=BBhi", 0x95, 0, 0, 0)
    assert loops_without_jump(jump + body + condition + end) == [(1, 2)]
    assert loops_without_jump(body + condition + end) == []


def test_a_helper_that_an_older_kernel_does_not_allow_is_noticed(
    root: None, add_forbidden_call: AddForbiddenCall
) -> None:
    add_forbidden_call("sock_ops")
    assert refused_by("6.1") == {"sock_ops": {9}}


def refused_by(kernel: str) -> dict[str, frozenset[int]]:
    """What a kernel of the table would refuse, once everything is compiled out that is not needed."""
    allows = table(kernel)
    made, _ = loader.compile_for(BpfSources.read(), allows, COMPILED)
    return refused_calls(ALL_PROGRAMS, loader.calls_of(made, ALL_PROGRAMS), allows)
