"""Sets of ports as whole numbers (bit n stands for port n), and ranges of ports as prefixes.

Rules over ports overlap and nest. As numbers, "the ports that are still free" is one `& ~taken`, and
two rules overlap where `a & b` is not zero. A longest-prefix map has no ranges, so each range of ports
is split into prefixes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from graft.errors import UsageError

PORT_BITS = 16
MAX_PORT = (1 << PORT_BITS) - 1

EVERY_PORT = (1 << (MAX_PORT + 1)) - 1
"""All ports, including 0: the ports of a rule that names none."""


@dataclass(frozen=True, slots=True, order=True)
class PortRange:
    """The ports ``first`` to ``last``, both included. Raises UsageError where that is not a range."""

    first: int
    last: int

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.last <= MAX_PORT:
            raise UsageError(
                f"ports: {self.first}-{self.last} is not a range of ports", "FIRST-LAST, such as 8000-8099"
            )

    def __contains__(self, port: int) -> bool:
        return self.first <= port <= self.last

    def __len__(self) -> int:
        return self.last - self.first + 1

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"

    @property
    def mask(self) -> int:
        """The range as a set of ports."""
        return ((1 << len(self)) - 1) << self.first


def ports_text(count: int) -> str:
    """``1 port``, ``100 ports``."""
    return f"{count} port{'' if count == 1 else 's'}"


def mapped_port(requested: int, first: int, port: int, last_port: int) -> int | None:
    """Which port of an endpoint a requested one becomes; None where there is none.

    The endpoint has ``port`` to ``last_port``, or only ``port`` where that is 0; port 0 is dynamic. ``first`` is the
    first port of the rule's range, 0 where that was not written for a range of ports. Equal to
    `endpoint_port` of bpf/rules.bpf.c.
    """
    if not last_port:
        return port if requested or not port else None
    mapped = port + requested - first
    return mapped if 0 < first <= requested and mapped <= last_port else None


def mask_of(ranges: Iterable[PortRange]) -> int:
    """The ports of all of ``ranges`` together."""
    mask = 0
    for ports in ranges:
        mask |= ports.mask
    return mask


def ranges_of(mask: int) -> Iterator[PortRange]:
    """The ranges of consecutive ports in ``mask``, in order."""
    digits = bin(mask)[:1:-1]  # without "0b", the lowest port first
    first = digits.find("1")
    while first >= 0:
        gap = digits.find("0", first)
        end = gap if gap >= 0 else len(digits)
        yield PortRange(first, end - 1)
        first = digits.find("1", end)


def lowest_port(mask: int) -> int:
    """The first port of ``mask``, which must not be empty."""
    return (mask & -mask).bit_length() - 1


def split_range(ports: PortRange) -> Iterator[tuple[int, int]]:
    """``ports`` as (port, bits) prefixes: a port belongs to one if it has the same ``bits`` leading bits as ``port``.

    As few prefixes as possible, at most 30.
    """
    first = ports.first
    while first <= ports.last:
        # The block may be as big as the alignment of its first port, and must not go past the end.
        aligned = (first & -first).bit_length() - 1 if first else PORT_BITS
        fits = (ports.last - first + 1).bit_length() - 1
        free = min(aligned, fits)
        yield first, PORT_BITS - free
        first += 1 << free


def prefixes_of(mask: int) -> Iterator[tuple[int, int]]:
    """All of ``mask`` as (port, bits) prefixes, which do not overlap."""
    for ports in ranges_of(mask):
        yield from split_range(ports)
