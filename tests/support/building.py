"""Small C programs, compiled when a test first asks for them."""

from __future__ import annotations

from pathlib import Path

from tests.support.shell import output

SOURCES = Path(__file__).resolve().parents[1] / "programs"


class Programs:
    """tests/programs/NAME.c as an executable; ``programs["NAME"]`` is its path."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __getitem__(self, name: str) -> Path:
        return self.build(name)

    def build(self, name: str, *flags: str) -> Path:
        """Compile with more flags than usual, such as -static."""
        target = self._folder / "".join((name, *flags))
        if not target.exists():
            source = SOURCES / f"{name}.c"
            output(["gcc", "-O1", "-Wall", "-Werror", "-pthread", *flags, "-o", target, source])
        return target
