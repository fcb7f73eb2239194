"""The BPF programs as bcc compiles them on each architecture.

It compiles for the host's ABI first, so their code differs between architectures, and the verifier has to accept
each. The variable ARCH names the architecture to bcc.
"""

from __future__ import annotations

import pytest

from graft.datapath import loader
from graft.datapath.bcc_compiler import CompileError, compile_text
from graft.datapath.loader import Loaded
from graft.datapath.sources import BpfSources
from tests.support.installation import COMPILED

pytestmark = pytest.mark.kernel

ARCHITECTURES = {"x86": "__x86_64__", "arm64": "__aarch64__"}  # what bcc calls each, and its compiler


def taken(loaded: Loaded) -> dict[str, str]:
    return {one.program.name: one.reason for one in loaded.checks}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bcc_compiles_for_the_architecture_that_arch_names(
    root: None, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"#ifndef {ARCHITECTURES[architecture]}\n#error another one\n#endif\n"
    sources = BpfSources({**BpfSources.read().files, "asked.c": text})
    for named in ARCHITECTURES:
        monkeypatch.setenv("ARCH", named)
        if named == architecture:
            compile_text(sources, ["asked.c"], {})
        else:
            with pytest.raises(CompileError, match="another one"):
                compile_text(sources, ["asked.c"], {})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_this_kernel_takes_the_programs_of_each_architecture(
    root: None, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ARCH", raising=False)
    here, relay_here = loader.examine(COMPILED), loader.examine_relay(COMPILED)
    monkeypatch.setenv("ARCH", architecture)
    there, relay_there = loader.examine(COMPILED), loader.examine_relay(COMPILED)
    assert there.is_complete, loader.logs(there.checks)
    assert (taken(there), there.extensions) == (taken(here), here.extensions)
    assert taken(relay_there) == taken(relay_here)
