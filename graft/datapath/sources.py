"""Finds and reads the files that travel with the package and are not Python: the C of the BPF programs."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class BpfSources:
    """The texts of the folder, by their names in it, each read once: an upgrade may replace files at any time, and what
    is compiled, what it is called in the cache, and what is noted of the hooks in force, are to be of the same texts.
    """

    files: Mapping[str, str]

    @classmethod
    def read(cls) -> BpfSources:
        """As they are now. Raises OSError."""
        folder = bpf_source_dir()
        paths = [path for path in folder.rglob("*") if path.suffix in (".c", ".h")]
        return cls({str(path.relative_to(folder)): path.read_text() for path in paths})

    def text(self, names: Sequence[str]) -> str:
        """Those files as the one text that is compiled: bcc rewrites map accesses only in the file that it compiles,
        not in what that includes.
        """
        return "\n".join(f'#line 1 "{name}"\n{self.files[name]}' for name in names)

    @property
    def headers(self) -> list[tuple[str, str]]:
        """What a file may include: graft.h and the header tree. Names and texts."""
        return sorted((name, text) for name, text in self.files.items() if name.endswith(".h"))

    @contextlib.contextmanager
    def copied_headers(self) -> Iterator[Path]:
        """A folder with the headers for the compiler, which opens them by their names. Raises OSError."""
        with tempfile.TemporaryDirectory(prefix="graft-headers-") as made:
            for name, text in self.headers:
                (Path(made) / name).parent.mkdir(parents=True, exist_ok=True)
                (Path(made) / name).write_text(text)
            yield Path(made)
