"""Which kernels are meant, out of those that apt lists. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

NEWEST = "newest"
OLDEST_SUPPORTED = (5, 15)

# Until 7.2 one package has the kernel and its modules; later linux-image-* is empty and depends on the other two.
_PACKAGE = re.compile(r"^linux-(?:image|binary|modules)-((\d+)\.(\d+)\.(\d+)\S*-cloud-amd64)$")


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel of Debian's: its release as `uname -r` says it, and the packages that it comes in."""

    release: str
    packages: tuple[str, ...]

    @property
    def version(self) -> tuple[int, ...]:
        """Its numbers, for comparison: 6.1.0-56 is newer than 6.1.0-9."""
        return tuple(int(number) for number in re.findall(r"\d+", self.release.partition("-cloud")[0]))

    @property
    def is_supported(self) -> bool:
        """Whether Graft promises to work on it."""
        return self.version[:2] >= OLDEST_SUPPORTED


class NoSuchKernel(Exception):
    """A kernel that was asked for and that Debian does not have (any more)."""


def listed(package_names: Iterable[str]) -> list[Kernel]:
    """The kernels among the names of packages, oldest first."""
    packages: dict[str, list[str]] = {}
    for name in package_names:
        found = _PACKAGE.match(name)
        if found:
            packages.setdefault(found[1], []).append(name)
    kernels = [Kernel(release, tuple(sorted(names))) for release, names in packages.items()]
    return sorted(kernels, key=lambda kernel: kernel.version)


def choose(wanted: Sequence[str], kernels: Sequence[Kernel]) -> list[Kernel]:
    """The newest kernel for each of ``wanted``: the beginning of a release (6.1) or "newest". Raises NoSuchKernel."""
    chosen: list[Kernel] = []
    for word in wanted:
        fitting = [one for one in kernels if word == NEWEST or re.match(rf"{re.escape(word)}(?![0-9])", one.release)]
        if not fitting:
            raise NoSuchKernel(f"Debian has no kernel {word}: {', '.join(sorted({_short(one) for one in kernels}))}")
        if fitting[-1] not in chosen:
            chosen.append(fitting[-1])
    return chosen


def _short(kernel: Kernel) -> str:
    return ".".join(map(str, kernel.version[:2]))
