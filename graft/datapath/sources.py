"""Finds the files that travel with the package and are not Python: the C of the BPF programs."""

from __future__ import annotations

from pathlib import Path

from graft.errors import NotFoundError

_PACKAGE = Path(__file__).resolve().parents[1]


def bpf_source_dir() -> Path:
    """The folder with graft.h, the programs and the header tree ``include/``.

    In a wheel it is ``graft/bpf``; in a checkout it is beside the package. Raises NotFoundError where neither
    exists, which means that the installation is broken.
    """
    for folder in (_PACKAGE / "bpf", _PACKAGE.parent / "bpf"):
        if (folder / "graft.h").is_file():
            return folder
    raise NotFoundError(f"BPF sources not found in {_PACKAGE} or beside it", "install the project again")
