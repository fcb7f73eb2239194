"""An upgrade, or its undoing, while hooks are compiled: what is noted of the hooks in force, and kept in the cache, is
of the texts that were compiled. And what keeps the kernel from looking at a program says nothing of that program.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from graft.datapath import compile_cache, dataplane, loader, offsets
from graft.datapath.bcc_compiler import compile_text
from graft.datapath.bytecode import Bytecode
from graft.datapath.programs import EXTENSIONS
from graft.datapath.sources import BpfSources, bpf_source_dir
from graft.errors import KernelError
from graft.kernel import bpf, bpf_load
from graft.kernel.btf import Btf
from tests.kernel.test_renewal import HOLE, Machine, as_other
from tests.support.installation import COMPILED, Host

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(300)]
__all__ = ["as_other"]

AsOther = Callable[..., pytest.MonkeyPatch]
CONTROL = pytest.mark.parametrize("is_control", [False, True], ids=["", "control"])


@pytest.fixture
def host(bare_host: Host, tmp_path: Path) -> Host:
    """With a cache of its own, in which nothing is."""
    bare_host.environment["GRAFT_CACHE_DIR"] = str(tmp_path / "cache")
    return bare_host


def confines(host: Host) -> bool:
    """Whether a container is confined there."""
    with ExitStack() as stack:
        return Machine(host, stack).confines()


def replace_files(folder: Path, by: Path) -> None:
    """What a package manager does, as far as the hole goes."""
    for name, _, _ in HOLE:
        shutil.copy(by / name, folder / name)


@CONTROL
def test_hooks_whose_text_is_replaced_while_they_are_compiled_are_not_noted_as_the_new_ones(
    host: Host, as_other: AsOther, tmp_path: Path, is_control: bool
) -> None:
    other, new = as_other(*HOLE), bpf_source_dir()

    def compile_and_replace(sources: BpfSources, names: Sequence[str], constants: Mapping[str, int]) -> Bytecode:
        made = compile_text(sources, names, constants)
        replace_files(tmp_path / "other", new)
        return made

    other.setattr(compile_cache, "compile_text", compile_and_replace)
    if is_control:
        digest = loader.digest
        other.setattr(loader, "digest", lambda _: digest(BpfSources.read()))
    dataplane.up(host.settings)
    other.undo()
    host.graft("up")
    assert confines(host) is not is_control


@CONTROL
def test_what_is_compiled_is_not_kept_as_another_text(
    host: Host, as_other: AsOther, tmp_path: Path, is_control: bool
) -> None:
    """The upgrade is undone between the two, and done again later."""
    other, now = as_other(), tmp_path / "other"
    before = tmp_path / "before"
    shutil.copytree(now, before)
    for name, old, new in HOLE:
        (before / name).write_text((before / name).read_text().replace(old, new))

    def replace_and_compile(sources: BpfSources, names: Sequence[str], constants: Mapping[str, int]) -> Bytecode:
        replace_files(now, before)
        return compile_text(BpfSources.read() if is_control else sources, names, constants)

    other.setattr(compile_cache, "compile_text", replace_and_compile)
    dataplane.up(host.settings)
    other.undo()
    host.graft("down", "--force")
    host.graft("up")
    assert confines(host) is not is_control


def test_the_compiler_sees_the_headers_that_were_read(tmp_path: Path) -> None:
    sources = BpfSources({"graft.h": "#define NUMBER 7\n", "include/asm/types.h": "#define OTHER 8\n"})
    with sources.copied_headers() as folder:
        assert (folder / "graft.h").read_text() == "#define NUMBER 7\n"
        assert (folder / "include/asm/types.h").read_text() == "#define OTHER 8\n"
        assert folder.stat().st_mode & 0o777 == 0o700
    assert not folder.exists()


@pytest.mark.parametrize("name", ["graft.h", "include/linux/types.h", "bind.bpf.c"])
def test_hooks_of_any_other_text_are_others(name: str) -> None:
    sources = BpfSources.read()
    changed = BpfSources({**sources.files, name: sources.files[name] + "\n"})
    assert loader.digest(changed) != loader.digest(sources) == loader.digest(BpfSources.read())


# ---- a kernel that has no time, or no memory, for a program ---------------------------------------------


def test_a_load_that_a_signal_ends_is_tried_again(root: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-Z and fg, or a terminal that changes its size: the verifier ends with EAGAIN."""
    ticks = []
    monkeypatch.setattr(bpf_load, "_TRIES", 100)
    before = signal.signal(signal.SIGALRM, lambda *_: ticks.append(signal.setitimer(signal.ITIMER_REAL, 0)))
    call = bpf.call

    def interrupted(*given: object) -> int:
        if len(ticks) < 20:
            signal.setitimer(signal.ITIMER_REAL, 0.0005)
        return call(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(bpf, "call", interrupted)
    try:
        loaded = loader.load(COMPILED)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert loaded.extensions == EXTENSIONS and ticks


def test_one_that_never_ends_is_not_taken_for_a_verdict(root: None) -> None:
    """Signals come faster than the verifier is done. Without a word there would be hooks without extensions."""
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        with pytest.raises(KernelError, match="loads no BPF program now"):
            loader.load(COMPILED)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EMFILE, errno.EAGAIN])
def test_nor_is_a_lack_of_memory_or_descriptors(root: None, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Of one program, when all others are loaded."""
    call, loads = bpf.call, []

    def without_room(command: int, attr: object) -> int:
        loads.append(command)
        if command == bpf_load._PROG_LOAD and loads.count(command) > 12:
            raise OSError(number, os.strerror(number))
        return call(command, attr)  # type: ignore[arg-type]

    monkeypatch.setattr(bpf, "call", without_room)
    with pytest.raises(KernelError, match=os.strerror(number)):
        loader.load(COMPILED)


def test_type_information_that_cannot_be_read_now_is_not_none(root: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else hooks would be loaded without what needs it, and stay."""

    def of_kernel() -> Btf:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    offsets.structure_offsets.cache_clear()
    with monkeypatch.context() as without:
        without.setattr(Btf, "of_kernel", of_kernel)
        with pytest.raises(KernelError, match="type information cannot be read"):
            loader.load(COMPILED)
    assert offsets.structure_offsets()
