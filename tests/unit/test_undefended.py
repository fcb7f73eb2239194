"""A defence that a control leaves out of the hooks has to be found in their text: else the control would be none."""

from __future__ import annotations

import pytest

from graft.datapath.sources import bpf_source_dir
from tests.hostile.undefended import HOOKS


@pytest.mark.parametrize("defence", sorted(HOOKS))
def test_each_piece_stands_there_once(defence: str) -> None:
    for file, piece, _ in HOOKS[defence]:
        assert (bpf_source_dir() / file).read_text().count(piece) == 1, (file, piece)
