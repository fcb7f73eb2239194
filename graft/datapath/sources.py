"""Finds the files that travel with the package and are not Python: the C of the BPF programs."""

from __future__ import annotations

from pathlib import Path

from graft.errors import NotFoundError

_PACKAGE = Path(__file__).resolve().parents[1]


def bpf_source_dir() -> Path:
    """The folder that holds graft.h, the programs and the header tree ``include/``.

    A wheel carries it as ``graft/bpf``; in a checkout it lies beside the package. Raises NotFoundError where neither
    is there, which means that the installation is broken.
    """
    for folder in (_PACKAGE / "bpf", _PACKAGE.parent / "bpf"):
        if (folder / "graft.h").is_file():
            return folder
    raise NotFoundError(f"the BPF sources are missing beside {_PACKAGE}", "install the project again")
