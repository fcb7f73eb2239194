"""What the graftd before has left of containers that are not served yet: it has open what nobody serves, and its
listeners still listen. So they are judged a few times a second, and nothing of them stays for long:

    started ──▶ judged at each tick ──┬─ the first scan has ended ──▶ what it has not taken is closed
                                      └─ not served in time ────────▶ everything is closed

(The first is in container_service.py.) A connection is judged by who takes it: until then no byte of it is moved.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Collection

from graft.datapath.layout import USE_INGRESS, Use
from graft.datapath.maps import Maps
from graft.errors import GraftError
from graft.kernel import netns
from graft.splice.kept import Found, Kept
from graft.splice.kept_records import Kind
from graft.splice.log import warn

SECONDS = 10.0
_LISTENERS = (Kind.LISTENER, Kind.DATAGRAMS)


class Unserved:
    """Made when graftd starts."""

    def __init__(self, kept: Kept, maps: Maps) -> None:
        self._kept, self._maps = kept, maps
        self._until = time.monotonic() + SECONDS

    def close(self, containers: Collection[int], served: Collection[int]) -> None:
        """End what is left of other containers than those that have a record, ``containers``; of these, what they may
        not listen on any more; and in the end all that is not ``served``. (What is left for no container stays.)
        """
        if not self._kept.has_found:
            return
        is_over = time.monotonic() > self._until
        late = {number for number in self._kept.found_containers() if is_over and number not in served}
        for number in late.intersection(containers):
            warn(f"container {number} is not served in time: what the previous graftd has left of it is closed")

        def is_to_close(found: Found) -> bool:
            number = found.record.container
            if not number:
                return False
            if number not in containers or number in late:
                return True
            return number not in served and found.record.kind in _LISTENERS and not self._may_listen(found)

        self._kept.close_untaken(is_to_close)

    def _may_listen(self, found: Found) -> bool:
        """Whether the policy in force has the container listen on the endpoint that a listener's tag says it is on."""
        sock, container = found.socks[0], found.record.container
        try:
            tag = self._maps.tags.get(ctypes.c_int32(sock.fileno()))
            value = self._maps.containers.get(ctypes.c_uint32(container))
            if tag is None or value is None or tag.container != container:
                return False
            use = self._maps.uses.get(Use(value.ruleset, tag.endpoint))
            endpoint = self._maps.endpoints.get(ctypes.c_uint32(tag.endpoint))
            if use is None or not use.value & USE_INGRESS or endpoint is None:
                return False
            return int(endpoint.netns) == netns.socket_cookie(sock)
        except (OSError, GraftError):  # Graft's maps are not there any more
            return False
