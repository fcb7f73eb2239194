"""What a shell is given to complete a command line with: for typer's ``autocompletion``, and bash's own words."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any

import typer

from graft.model.settings import Settings

_BREAKS = re.compile(r"[=:]+")


def init() -> None:
    """Make typer ready to answer a shell."""
    from typer import _completion_classes

    classes: Any = _completion_classes

    class Bash(classes.BashComplete):  # type: ignore[misc]  # typer's class is private
        """bash takes ``0.0.0.0:80=web`` for five words, and replaces the last one only."""

        def get_completion_args(self) -> tuple[list[str], str]:
            words, self.kept = os.environ["COMP_WORDS"].split("\n"), 0
            if len(words) > 1:  # a line for each, as typer's script for bash has them
                joined = join_words(words[: int(os.environ["COMP_CWORD"]) + 1])
                self.kept = len(joined[-1]) - len(unbroken_end(joined[-1]))
                os.environ["COMP_WORDS"], os.environ["COMP_CWORD"] = "\n".join(joined), str(len(joined) - 1)
            found: tuple[list[str], str] = super().get_completion_args()
            return found

        def format_completion(self, item: Any) -> str:
            return str(super().format_completion(item))[self.kept :]

    classes.completion_init()
    classes.add_completion_class(Bash, "bash")


def join_words(words: list[str]) -> list[str]:
    """``words`` as the operator wrote them, where bash divided them at ``:`` and ``=``."""
    joined: list[str] = []
    glue = False
    for word in words:
        is_break = bool(_BREAKS.fullmatch(word))
        if joined and (glue or (is_break and len(joined) > 1)):
            joined[-1] += word
        else:
            joined.append(word)
        glue = is_break
    return joined


def unbroken_end(word: str) -> str:
    """What bash takes for the last word in ``word``."""
    return _BREAKS.split(word)[-1]


def endpoints() -> list[str]:
    """The endpoints' names."""
    from graft.commands import names

    return names.endpoints(Settings.from_environment())


def endpoints_to_change(context: typer.Context) -> list[str]:
    """The same, where the command is not `graft ep add`, which needs a new one."""
    return [] if context.info_name == "add" else endpoints()


def rule_endpoints(incomplete: str) -> list[str]:
    """The same in a rule, after ``=``."""
    left, equals, _ = incomplete.rpartition("=")
    return [f"{left}={name}" for name in endpoints()] if equals else []


def attached() -> list[str]:
    """The attached containers' names."""
    from graft.commands import names

    return names.attached(Settings.from_environment())


def containers() -> list[str]:
    """The same, and those of saved ones."""
    from graft.commands import names

    settings = Settings.from_environment()
    return sorted({*names.attached(settings), *names.saved(settings)})


def policy_files(incomplete: str) -> list[str]:
    """Policies, by their paths. Where there are none that begin so, the shell completes files."""
    from graft.commands import names

    return names.policy_files(Settings.from_environment(), incomplete)


def engines() -> list[str]:
    """The engines of `graft runtime install`."""
    from graft.oci import engine_install

    return list(engine_install.DEFAULTS)


def _list_of(names: Iterable[str], incomplete: str) -> list[str]:
    """Lists with commas that begin so, one name longer each."""
    left, comma, _ = incomplete.rpartition(",")
    return [f"{left}{comma}{name}" for name in names if name not in left.split(",")]


def bench_cases(incomplete: str) -> list[str]:
    """What `graft bench` can measure."""
    from graft.bench.command import CASES

    return _list_of((case.name for case in CASES), incomplete)


def bench_workloads(incomplete: str) -> list[str]:
    """How it can."""
    from graft.bench.options import workload_names
    from graft.bench.workloads import WORKLOADS

    return _list_of(workload_names(WORKLOADS), incomplete)
