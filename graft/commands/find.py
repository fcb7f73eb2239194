"""Finds an attached container by what an operator wrote."""

from __future__ import annotations

import contextlib
from dataclasses import replace

from graft.errors import NotFoundError
from graft.state.engines import resolve
from graft.state.installation import Installation
from graft.state.records import Container


def find(graft: Installation, text: str) -> Container:
    """The attached container that ``text`` names: a name or id from `graft ps`, or what `graft attach` accepts. By the
    name that its engine has for it now, where that was asked.

    Raises NotFoundError.
    """
    with contextlib.suppress(NotFoundError):
        return graft.containers.find(text)
    target = resolve(text)
    found = graft.containers.at(target.cgroup)
    if found is None:
        raise NotFoundError(f"cgroup: {target.name} is not attached", "graft ps")
    return replace(found, name=target.name) if found.engine == target.engine else found
