"""The network namespaces of endpoints, each kept by a mount, by the id of its endpoint.

run_dir/netns/ID         the namespace
run_dir/netns/ID.name    the name that the operator gave for it
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from graft.datapath.maps import Maps
from graft.kernel import netns
from graft.kernel.atomic_file import PreparedFile, prepare_file
from graft.model.settings import Settings
from graft.state import host_addresses, named_namespaces


def pin_of(settings: Settings, endpoint: int) -> Path:
    """A path by which it can be entered."""
    return settings.run_dir / "netns" / str(endpoint)


def _label_of(settings: Settings, endpoint: int) -> Path:
    return pin_of(settings, endpoint).with_suffix(".name")


def name_of(settings: Settings, endpoint: int) -> str | None:
    """As the operator named it; None for the host's."""
    label = _label_of(settings, endpoint)
    return os.fsdecode(label.read_bytes()) if label.exists() else None


def release(settings: Settings, endpoint: int) -> None:
    """Keep none for this endpoint. Safe to repeat."""
    netns.release(pin_of(settings, endpoint))
    _label_of(settings, endpoint).unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A namespace that an endpoint is to have. ``label``: a file with its name; None: the host's, which is not kept."""

    settings: Settings
    endpoint: int
    cookie: int
    opened: int
    label: PreparedFile | None

    def commit(self) -> None:
        """Keep it in the place of the one that the endpoint had. Raises KernelError: then that is kept."""
        if self.label is None:
            release(self.settings, self.endpoint)
            return
        netns.keep(self.opened, pin_of(self.settings, self.endpoint))
        self.label.commit()


@contextlib.contextmanager
def prepared(settings: Settings, maps: Maps, endpoint: int, name: str | None) -> Iterator[Prepared]:
    """All is done for it that needs space, and undone where the block fails. Raises NotFoundError, ConflictError,
    KernelError, OSError.
    """
    host = settings.host_netns
    opened = netns.open_place(host) if name is None else named_namespaces.open_named(name)
    try:
        cookie = host_addresses.note(maps, host, opened)
        with contextlib.nullcontext() if name is None else _files(settings, endpoint, name) as label:
            yield Prepared(settings, endpoint, cookie, opened, label)
    finally:
        os.close(opened)


@contextlib.contextmanager
def _files(settings: Settings, endpoint: int, name: str) -> Iterator[PreparedFile]:
    """The label, and the file to mount on, which stays if the block does not fail."""
    pin = pin_of(settings, endpoint)
    pin.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    label = prepare_file(_label_of(settings, endpoint), os.fsencode(name))
    is_new = not pin.exists()
    try:
        if is_new:
            pin.touch(mode=0o600)
        yield label
    except BaseException:
        label.discard()
        if is_new:
            netns.release(pin)
        raise
