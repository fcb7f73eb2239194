r"""Text for a terminal or a log, with untrusted parts.

A container chooses the names of its processes, cgroups and sockets, an image its annotations. A terminal executes
escape sequences in them, and a newline starts a line that looks like Graft's own. So each line that is shown goes
through here (cli/output.py for commands), and every character that is not plain is shown as Python would write it:
\x1b, \n, \u202e.
"""

from __future__ import annotations

import re

# Besides control characters (C0, DEL, C1): characters that change the direction of text or have no width, other blanks
# and line ends, and halves of surrogate pairs, which stand for bytes of a file's name that are not UTF-8.
_SUSPECT = re.compile(r"[^\x20-\x7e]")


def printable(text: str) -> str:
    """``text`` as one line of plain characters."""
    return _SUSPECT.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    character = found[0]
    if character.isprintable():
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
