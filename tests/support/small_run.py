"""An installation whose run_dir is in a small tmpfs, as /run is one, and others who fill that."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import installation
from tests.support.installation import Host
from tests.support.namespaces import Netns
from tests.support.shell import output, run

_PAGE = 4096


@contextmanager
def small_run(net: tuple[Netns, Netns], folder: Path) -> Iterator[tuple[Host, Path]]:
    """Gives the installation, and the folder where others may write, beside its own."""
    others, own = folder / "slash-run", folder / "made" / "run"
    for one in (others, own):
        one.mkdir(parents=True)
    output(["mount", "-t", "tmpfs", "-o", "size=8m,mode=0755", "tmpfs", others])
    (others / "graft").mkdir(mode=0o700)
    output(["mount", "--bind", others / "graft", own])
    try:
        with installation(folder / "made", *net, "small-run") as host:
            host.graft("up")
            try:
                yield host, others
            finally:
                empty(others)
                host.stop_programs()
    finally:
        run(["umount", "-l", own])
        run(["umount", "-l", others])


def fill(others: Path) -> None:
    """Until there is no page left."""
    with contextlib.suppress(OSError), (others / "filler").open("ab", buffering=0) as file:
        while True:
            file.write(bytes(_PAGE))


def empty(others: Path) -> None:
    """There is room again."""
    (others / "filler").unlink(missing_ok=True)


def fill_page(log: Path) -> None:
    """What was logged before happens to end with a page: one that the file has already has room, though nothing else
    has.
    """
    with log.open("ab") as file:
        file.write(b"." * (-log.stat().st_size % _PAGE))
