"""One installation of Graft on one host: where it lives, its maps, and what is in them.

    with Installation.open(settings) as graft, graft.transaction() as change:
        change.endpoints.add(endpoint)

What needs the lock is a method of what exists only under the lock. Reading needs none: each change of a map is one
step for whoever reads it.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

from graft.datapath import dataplane
from graft.datapath.maps import Maps
from graft.errors import PrivilegeError
from graft.model.endpoint import Endpoint
from graft.model.settings import Settings
from graft.policy.model import Policy
from graft.state.containers import Compiled, ContainerChanges, Containers, compile_for
from graft.state.endpoints import EndpointChanges, Endpoints


class Installation:
    """What everybody may read; `transaction` to change it. Opens a map when it is first asked for."""

    def __init__(self, settings: Settings) -> None:
        """Of what is up, or will be: a map that is not there is a NotUpError when it is asked for."""
        self.settings = settings
        self.maps = Maps(settings.pin_dir)
        self.endpoints = Endpoints(settings, self.maps)
        self.containers = Containers(settings)

    @classmethod
    def open(cls, settings: Settings) -> Installation:
        """The installation, brought up if it is not. Raises PrivilegeError, KernelError, ConflictError."""
        dataplane.up(settings)
        return cls(settings)

    def __enter__(self) -> Installation:
        return self

    def __exit__(self, *_: object) -> None:
        self.maps.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Alone among all that change this installation, until the block ends or the process dies."""
        with dataplane.locked(self.settings):
            yield Transaction(self.settings, self.maps)

    def compile(self, policy: Policy) -> Compiled:
        """``policy`` with the endpoints that there are, before anybody has to wait for it.

        Raises PolicyError, UsageError.
        """
        return compile_for(policy, policy.resolve(self.endpoints.by_name()))

    def reap(self) -> None:
        """Forget the containers whose cgroup is gone; quick where there is nothing to do."""
        if not all(container.exists for container in self.containers.listing()):
            with self.transaction() as change:
                change.containers.reap()


class Transaction:
    """What may be done under the lock."""

    def __init__(self, settings: Settings, maps: Maps) -> None:
        self._maps = maps
        self.endpoints = EndpointChanges(settings, maps, self._new_id)
        self.containers = ContainerChanges(settings, maps, self.endpoints, self._new_id)

    def _new_id(self) -> int:
        """A number for an endpoint, a container or a ruleset, never given out before."""
        first = ctypes.c_uint32(0)
        value = self._maps.settings.get(first)
        assert value is not None
        value.last_id += 1
        self._maps.settings.put(first, value)
        return int(value.last_id)


def known_endpoints(settings: Settings | None = None) -> dict[str, Endpoint]:
    """The endpoints that a policy may name; none where Graft is not up, or may not be asked."""
    settings = settings or Settings.from_environment()
    try:
        return Installation(settings).endpoints.by_name() if dataplane.is_up(settings) else {}
    except (PrivilegeError, PermissionError):
        return {}
