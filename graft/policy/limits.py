"""How big a policy may be, from any source: a file, the flags of a command, GRAFT_CONV_PAIRS.

A container's image can set that variable, and a policy may be compiled under the lock that every command waits for. So
the size of a policy is checked first, and reading, checking and compiling one take a time about proportional to it.
docs/policy.md has the same numbers.
"""

from __future__ import annotations

from graft.errors import UsageError
from graft.policy.model import Origin, Policy

MAX_BYTES = 1 << 20
"""Of text, in UTF-8."""

MAX_DEPTH = 16
"""Of values inside each other, in a file."""

MAX_VALUES = 50_000
"""Of values and keys in a file. Each port that a rule lists is a value too."""

MAX_RULES = 2048
"""Of ingress, and of egress; the most endpoints too."""

MAX_ENTRIES = 32768
"""Map entries of one policy. The maps are finite and shared (GRAFT_MAX_RULES of graft/datapath/loader.py)."""

MAX_PAIRS_ENTRIES = 512
"""The same of GRAFT_CONV_PAIRS, which nobody but the container's image may have written."""

MAX_ASKED_ENTRIES = 131072
"""Of all policies that containers have asked for in their environment: half of the maps, so that whatever images ask
for, there is room for what the operator says."""

GROUP_ENTRIES = 16
"""For how many a multicast group counts there: its map is that much smaller (GRAFT_MAX_GROUPS)."""

FEWER_RULES = "fewer, with wider prefixes or ranges"


def max_entries(policy: Policy) -> int:
    """How many map entries a policy may have."""
    return MAX_PAIRS_ENTRIES if policy.origin is Origin.PAIRS else MAX_ENTRIES


def check_text(text: str, field: str) -> None:
    """Raises UsageError, naming ``field``, for a text that is longer than a policy may be."""
    size = len(text.encode(errors="replace"))
    if size > MAX_BYTES:
        raise UsageError(f"{field}: the text has {size} bytes", f"at most {MAX_BYTES}")


def check_count(count: int, field: str) -> None:
    """Raises UsageError, naming ``field``, for more rules (or endpoints) than a policy may have."""
    if count > MAX_RULES:
        raise UsageError(f"{field}: more than {MAX_RULES} of them", FEWER_RULES)


def check_size(policy: Policy) -> None:
    """Raises UsageError for a policy that has too many rules or endpoints."""
    check_count(len(policy.endpoints), "endpoints")
    check_count(len(policy.ingress) + len(policy.unix_ingress), "ingress")
    check_count(len(policy.egress), "egress")
