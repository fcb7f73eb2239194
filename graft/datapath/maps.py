"""The pinned maps, opened at their first use, with their types.

A command works on the maps that it has opened, also when another one has removed that data plane meanwhile and made it
anew: so it asks under the lock whether they are the ones in force (`are_pinned`).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from graft.datapath import layout
from graft.errors import GraftError, KernelError
from graft.kernel import bpf_maps
from graft.kernel.bpf import Map


class NotUpError(GraftError):
    """Graft's maps are not pinned."""

    exit_code = 3


@contextlib.contextmanager
def needs_room(field: str) -> Iterator[None]:
    """Raises KernelError, naming ``field``, where a map has no room for what the block writes."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.E2BIG):  # of a trie, and of a hash table
            raise
        raise KernelError(
            f"{field}: no room: the tables that all containers share are full",
            "detach containers, or write fewer rules",
        ) from error


class Maps:
    """One installation's maps. Each property raises NotUpError where Graft is not up."""

    def __init__(self, pin_dir: Path) -> None:
        self.pin_dir = pin_dir

    def close(self) -> None:
        """Close the maps that were opened. One that is used afterwards is opened again."""
        for name, value in list(vars(self).items()):
            if isinstance(value, Map):
                value.close()
                del self.__dict__[name]

    def are_pinned(self) -> bool:
        """Whether those that were opened are of the data plane that is pinned now. Raises NotUpError where none is."""
        return self.number == Maps(self.pin_dir).number

    @property
    def number(self) -> int:
        """What tells the data plane that they are of from any other: the kernel's id of the map `settings`."""
        return bpf_maps.map_id(self.settings.fd)

    def _open(self, name: str, key: type, value: type) -> Map:  # type: ignore[type-arg]
        if name != "settings":  # that one first: as long as it is pinned, what was opened later is of its data plane
            _ = self.settings
        try:
            return Map.pinned(self.pin_dir / name, key, value)
        except FileNotFoundError:
            raise NotUpError(f"Graft is not up: nothing is pinned at {self.pin_dir}", "graft up") from None
        except OSError as error:
            raise KernelError(f"cannot open {self.pin_dir / name}: {error.strerror}") from error

    @cached_property
    def settings(self) -> Map[ctypes.c_uint32, layout.SettingsValue]:
        """One entry, at 0."""
        return self._open("settings", ctypes.c_uint32, layout.SettingsValue)

    @cached_property
    def endpoints(self) -> Map[ctypes.c_uint32, layout.EndpointValue]:
        """id -> endpoint."""
        return self._open("endpoints", ctypes.c_uint32, layout.EndpointValue)

    @cached_property
    def endpoint_names(self) -> Map[layout.EndpointNameKey, ctypes.c_uint32]:
        """name -> id."""
        return self._open("endpoint_names", layout.EndpointNameKey, ctypes.c_uint32)

    @cached_property
    def groups(self) -> Map[layout.GroupKey, ctypes.c_uint32]:
        """A multicast group of an endpoint, or of a ruleset -> 1."""
        return self._open("groups", layout.GroupKey, ctypes.c_uint32)

    @cached_property
    def containers(self) -> Map[ctypes.c_uint32, layout.ContainerValue]:
        """id -> container."""
        return self._open("containers", ctypes.c_uint32, layout.ContainerValue)

    @cached_property
    def scopes(self) -> Map[ctypes.c_uint64, layout.Scope]:
        """id of a cgroup that the programs are attached to -> container."""
        return self._open("scopes", ctypes.c_uint64, layout.Scope)

    @cached_property
    def ingress(self) -> Map[layout.IngressKey, layout.IngressValue]:
        """Which bind becomes which endpoint."""
        return self._open("ingress", layout.IngressKey, layout.IngressValue)

    @cached_property
    def egress(self) -> Map[layout.EgressKey, layout.EgressValue]:
        """Destination -> node."""
        return self._open("egress", layout.EgressKey, layout.EgressValue)

    @cached_property
    def egress_ports(self) -> Map[layout.EgressPortKey, layout.EgressPortValue]:
        """(node, port) -> verdict."""
        return self._open("egress_ports", layout.EgressPortKey, layout.EgressPortValue)

    @cached_property
    def uses(self) -> Map[layout.Use, ctypes.c_uint32]:
        """A ruleset and an endpoint that its rules name -> how."""
        return self._open("uses", layout.Use, ctypes.c_uint32)

    @cached_property
    def tags(self) -> Map[ctypes.c_int32, layout.Tag]:
        """Descriptor of a socket -> tag."""
        return self._open("tags", ctypes.c_int32, layout.Tag)

    @cached_property
    def options(self) -> Map[ctypes.c_int32, layout.OptionsValue]:
        """Descriptor of a socket -> the options that were set on it before its swap."""
        return self._open("options", ctypes.c_int32, layout.OptionsValue)

    @cached_property
    def desks(self) -> Map[ctypes.c_uint32, layout.DeskValue]:
        """Slot -> desk."""
        return self._open("desks", ctypes.c_uint32, layout.DeskValue)

    @cached_property
    def desk_slots(self) -> Map[ctypes.c_uint32, layout.DeskSlot]:
        """Process id of a supervisor -> its desk."""
        return self._open("desk_slots", ctypes.c_uint32, layout.DeskSlot)

    @cached_property
    def relays(self) -> Map[ctypes.c_uint32, layout.RelayValue]:
        """Container -> where Graft listens inside its namespace."""
        return self._open("relays", ctypes.c_uint32, layout.RelayValue)

    @cached_property
    def crossings(self) -> Map[ctypes.c_int32, layout.CrossingValue]:
        """Descriptor of a socket -> the remote end of the relayed connection."""
        return self._open("crossings", ctypes.c_int32, layout.CrossingValue)

    @cached_property
    def arrivals(self) -> Map[layout.ArrivalKey, layout.CrossingValue]:
        """Source address of a connection between a relay and a container -> its remote end."""
        return self._open("arrivals", layout.ArrivalKey, layout.CrossingValue)

    @cached_property
    def ferries(self) -> Map[ctypes.c_uint32, layout.FerryValue]:
        """Container -> its ferry's sockets on the host's loopback."""
        return self._open("ferries", ctypes.c_uint32, layout.FerryValue)

    @cached_property
    def berths(self) -> Map[layout.BerthKey, layout.BerthValue]:
        """An address of a ferry's -> the address inside that it stands for."""
        return self._open("berths", layout.BerthKey, layout.BerthValue)

    @cached_property
    def noted_addresses(self) -> Map[layout.HostAddress, ctypes.c_uint32]:
        """An address of the host's -> 1."""
        return self._open("noted_addresses", layout.HostAddress, ctypes.c_uint32)

    @cached_property
    def broadcasts(self) -> Map[layout.HostAddress, ctypes.c_uint32]:
        """A broadcast address of one of the host's links -> 1."""
        return self._open("broadcasts", layout.HostAddress, ctypes.c_uint32)

    @cached_property
    def exchanges(self) -> Map[layout.ExchangeSlot, layout.ExchangeValue]:
        """Slot of a container -> the remote end of an exchange of datagrams."""
        return self._open("exchanges", layout.ExchangeSlot, layout.ExchangeValue)

    @cached_property
    def exchange_clients(self) -> Map[layout.ExchangeClient, ctypes.c_uint32]:
        """Client of a container's datagram socket -> the exchange's address."""
        return self._open("exchange_clients", layout.ExchangeClient, ctypes.c_uint32)

    @cached_property
    def stand_ins(self) -> Map[layout.StandInKey, layout.StandInValue]:
        """A port at ::1 of a container -> the remote end that it stands for."""
        return self._open("stand_ins", layout.StandInKey, layout.StandInValue)

    @cached_property
    def stand_in_ports(self) -> Map[layout.StandInPlace, ctypes.c_uint32]:
        """Remote end of a container's socket -> the port of its stand-in."""
        return self._open("stand_in_ports", layout.StandInPlace, ctypes.c_uint32)

    @cached_property
    def offers(self) -> Map[ctypes.c_uint32, layout.Offer]:
        """Container -> the stand-ins that its hooks may take."""
        return self._open("offers", ctypes.c_uint32, layout.Offer)

    @cached_property
    def counters(self) -> Map[layout.CounterKey, ctypes.c_uint64]:
        """(container, decision) -> how often."""
        return self._open("counters", layout.CounterKey, ctypes.c_uint64)

    @cached_property
    def watches(self) -> Map[ctypes.c_uint32, layout.WatchValue]:
        """At 0: until when somebody watches decisions; at 1: how many were lost."""
        return self._open("watches", ctypes.c_uint32, layout.WatchValue)

    @cached_property
    def decisions(self) -> Map[ctypes.c_uint32, ctypes.c_uint32]:
        """The ring buffer of decisions; only its descriptor is of use."""
        return self._open("decisions", ctypes.c_uint32, ctypes.c_uint32)
