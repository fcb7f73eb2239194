"""Manual pages from what `--help` says: `python -m graft_cli.manual FOLDER` writes one for each command. man(7)."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
import typer.main

from graft import __version__

from .main import app

SECTION = 8  # commands of the administrator
_ENVIRONMENT = (
    ("GRAFT_HOST_NETNS", "The host's network namespace. Default: /proc/1/ns/net."),
    ("GRAFT_PIN_DIR", "Where maps and programs are pinned. Default: /sys/fs/bpf/graft."),
    ("GRAFT_RUN_DIR", "Sockets and locks. Default: /run/graft."),
    ("GRAFT_STATE_DIR", "What survives a reboot. Default: /var/lib/graft."),
    ("GRAFT_CACHE_DIR", "The hooks as they were compiled here; may be deleted. Default: /var/cache/graft."),
    ("GRAFT_NO_SAVE", "1: as --no-save on every command that saves."),
)


Command = Any
"""A command, option or argument of click's, of which typer may have a copy of its own: no class to name."""


def pages() -> dict[str, str]:
    """The text of every page by its file name."""
    root: Command = typer.main.get_command(app)
    return {f"{name}.{SECTION}": text for name, text in _pages(root, _context(root, "graft"), ("graft",))}


def _context(command: Command, name: str, parent: Command = None) -> Command:
    return command.make_context(name, [], parent=parent, resilient_parsing=True)


def _pages(command: Command, context: Command, words: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    below = _subcommands(command, context)
    yield "-".join(words), _page(command, context, words, below)
    for name, sub in below:
        yield from _pages(sub, _context(sub, name, context), (*words, name))


def _subcommands(command: Command, context: Command) -> list[tuple[str, Command]]:
    if not hasattr(command, "list_commands"):
        return []
    found = [(name, command.get_command(context, name)) for name in command.list_commands(context)]
    return [(name, sub) for name, sub in found if not sub.hidden]


def _page(command: Command, context: Command, words: tuple[str, ...], below: list[tuple[str, Command]]) -> str:
    name, summary = "-".join(words), command.get_short_help_str(200).rstrip(".")
    usage = " ".join(command.collect_usage_pieces(context))
    paragraphs = re.split(r"\n\s*\n", (command.help or "").strip())
    lines = [
        f'.TH {_text(name.upper())} {SECTION} "" "Graft {__version__}" "Graft"',
        ".SH NAME",
        f"{_text(name)} \\- {_text(summary)}",
        ".SH SYNOPSIS",
        f".B {_text(' '.join(words))}",
        _text(usage),
        ".SH DESCRIPTION",
        *(line for text in paragraphs for line in (".PP", _text(" ".join(text.split())))),
    ]
    options = [record for one in command.get_params(context) if (record := _record(one, context)) is not None]
    if options:
        lines += [".SH OPTIONS", *(line for record in options for line in _item(*record))]
    if below:
        lines.append(".SH COMMANDS")
        for sub, one in below:
            lines += _item(f"{' '.join(words)} {sub}", one.get_short_help_str(200))
    if words == ("graft",):
        lines += [".SH ENVIRONMENT", *(line for record in _ENVIRONMENT for line in _item(*record))]
        lines += [".SH FILES", *_item("/etc/graft/environment", "Settings for the systemd units.")]
    others = [f"{name}-{sub}" for sub, _ in below] or (["-".join(words[:-1])] if len(words) > 1 else [])
    if others:
        lines += [".SH SEE ALSO", ",\n".join(f".BR {_text(one)} ({SECTION})" for one in others)]
    return "\n".join(lines) + "\n"


def _record(one: Command, context: Command) -> tuple[str, str] | None:
    """An option or argument, and what is said about it; None for one that `--help` does not show."""
    record: tuple[str, str] | None = one.get_help_record(context)
    return record


def _item(term: str, text: str) -> list[str]:
    return [".TP", f".B {_text(term)}", _text(" ".join(text.split()))]


def _text(text: str) -> str:
    """As roff has it: a backslash, a hyphen that is one of the keyboard's, a line that begins like a request."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{escaped}" if escaped[:1] in (".", "'") else escaped


def main(folder: Path) -> None:
    """Write all pages into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
