"""A command line with one of its defences left out, for controls: an attack that fails must work here.

    python undefended.py DEFENCE run ...
    python undefended.py DEFENCE runtime ...    the OCI runtime
    python undefended.py DEFENCE forks ...      the fork server
    python undefended.py DEFENCE entry run ...  as a user starts it: by way of a fork server

Nothing of this is in the product. What is put back here is what there was before the defence. One that the hooks
hold is left out of the BPF programs' text, so that it matters what `up` is run with (tests/hostile/conftest.py).
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import json
import os
import shutil
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from functools import partial
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from graft.commands import (
    attach,
    find,
    identified,
    policy_apply,
    policy_learn,
    restore,
    saving,
    transfer,
    watcher,
    watcher_process,
)
from graft.commands.identified import Looked
from graft.commands.sightings import SETTLED_SECONDS, Sightings
from graft.commands.transport_choice import choose_transport
from graft.datapath import dataplane, loader, sources
from graft.datapath.compile_cache import compile_cached
from graft.datapath.sources import BpfSources, bpf_source_dir
from graft.errors import KernelError, UsageError
from graft.keeper import own_names, protocol
from graft.kernel import (
    capabilities,
    cgroup,
    keyring,
    netns,
    process,
    sockdiag,
    sockets,
    surroundings,
    terminal,
    unix_files,
    unix_rights,
)
from graft.kernel.peers import Peer
from graft.kernel.pidfd import pidfd_getfd
from graft.kernel.seccomp import Listener, Notification
from graft.kernel.sockdiag import Diagnostics, ListeningSocket
from graft.kernel.syscalls import syscall
from graft.model.settings import Settings
from graft.model.transport import Home
from graft.oci import listener, shim
from graft.oci.state import State
from graft.policy.model import Policy
from graft.saved.model import SavedAttachment, Target
from graft.saved.store import Store
from graft.saved.whole import PreparedWhole
from graft.splice.datagram_clients import Client
from graft.state import (
    bound_sockets,
    detached,
    engines,
    helper_process,
    inventory,
    leftovers,
    liveness,
    members,
    named_namespaces,
    socket_holders,
    stack_listing,
    thread_namespaces,
    withdrawal,
)
from graft.state.container_changes import ContainerChanges
from graft.state.installation import Installation
from graft.state.left_children import LeftChildren
from graft.state.leftovers_aside import LeftoversAside
from graft.state.members import Members
from graft.state.records import Container
from graft.swap import socket_copy, socket_pool, supervisor
from graft.swap.decision import Action, Decision, SocketFacts
from graft.swap.desk import Desk, DeskAnswer
from graft.swap.processes import Process
from graft.swap.unix_bind import UnixBind, UnixBinder

COMMAND = Path(__file__).resolve()


def _signals() -> None:
    def copy_signal_owner(old: int, new: int) -> None:
        fcntl.fcntl(new, 15, fcntl.fcntl(old, 16, struct.pack("=ii", 0, 0)))
        fcntl.fcntl(new, 10, fcntl.fcntl(old, 11))
        fcntl.fcntl(new, fcntl.F_SETFL, fcntl.fcntl(new, fcntl.F_GETFL) | os.O_ASYNC)

    socket_copy._copy_signal_owner = copy_signal_owner


def _rights() -> None:
    def as_it_is(_least: int, value: int) -> int:
        return value

    # Names that graft/swap/socket_copy.py looks up when it copies an option.
    socket_copy.__dict__["with_capabilities"] = lambda *_: contextlib.nullcontext()
    socket_copy.__dict__["max"] = as_it_is


def _opener() -> None:
    """A twin's file is opened as root."""
    socket_pool.__dict__["owning_files_as"] = lambda *_: contextlib.nullcontext()


def _chowned() -> None:
    """A twin is made, and a unix socket's file owned, as the user that fstat(2) tells of the socket."""

    def owner_of(fd: int) -> tuple[int, int]:
        status = os.fstat(fd)
        return status.st_uid, status.st_gid

    def ask_and_look(self: Desk, fd: int, *question: Any) -> DeskAnswer | None:
        answer = ask(self, fd, *question)
        owned = answer and answer.descriptor._replace(owner=owner_of(fd))
        return answer._replace(descriptor=owned) if answer and owned else None

    def bind_and_look(
        self: UnixBinder, notification: Notification, process: Process, fd: int, is_waiting: Callable[[], bool]
    ) -> UnixBind | None:
        looking = SimpleNamespace(file_owner=lambda: owner_of(fd))
        return bind(self, notification, looking, fd, is_waiting)  # type: ignore[arg-type]

    ask, bind = Desk.ask, UnixBinder.bind
    Desk.ask, UnixBinder.bind = ask_and_look, bind_and_look  # type: ignore[method-assign, assignment]


def _units_of_systemds() -> None:
    """Any cgroup of that name is the unit, where systemd does not answer."""
    engines._is_systemds = lambda folder, top: True


def _waiting_callers() -> None:
    """Who made a call is whoever has its thread's id."""
    Listener.is_valid = lambda self, unique: True  # type: ignore[method-assign]


Change = tuple[str, str, str]
"""A file of the BPF sources, a piece of it that stands there once, and what stands there instead."""


def _at_once(file: str, function: str, statement: str) -> Change:
    """The C function with that signature begins, and where ``statement`` returns ends, with ``statement``."""
    return file, f"{function}\n{{\n", f"{function}\n{{\n\t{statement}\n"


_WITHOUT_A_PEER = _at_once(
    "local_address.bpf.c", "int outlasts_its_peer(struct bpf_sock *sk, struct tag *tag)", "return 0;"
)
_BESIDE_OTHERS = ("connect.bpf.c", "meets_others(ctx, request, endpoint) ? -EADDRINUSE : ", "")
_BY_ITS_NOTE = _at_once(
    "ingress.bpf.c",
    "int is_anothers(u64 netns, struct packet *packet, u16 port, u8 protocol, u32 container, u64 since)",
    "return 0;",
)
_ASTRAY = ("destination.bpf.c", "\treturn !is_noted_as_hosts(netns, packet->to, GRAFT_IPV4);", "\treturn 0;")
_BY_ITS_SOCKET = (
    "destination.bpf.c",
    "packet.protocol != IPPROTO_UDP || is_transformed(skb, packet.family)",
    "packet.family",
)


# What completes a connection is not judged, as what begins it is not.
_CONNECTING = _at_once(
    "ingress.bpf.c",
    "int may_connect(struct __sk_buff *skb, struct bpf_sock *sk, struct owner *owner)",
    "return 1;",
)

HOOKS: dict[str, tuple[Change, ...]] = {
    # No defence: for tests/bench/trace_cost.py.
    "trace": (_at_once("trace.bpf.c", "static __always_inline struct watch *find_watch(void)", "return 0;"),),
    # A container of transport splice has nothing in the host's namespace that would have to be judged.
    "splice on the host": (
        (
            "owner.bpf.c",
            "return container && is_unsupervised(container) &&",
            "return container && container->transport == GRAFT_TRANSPORT_DIRECT &&",
        ),
    ),
    # What no rule names, graftd's sockets for a container do by the policy's default, as the container's own.
    "no default for graftd": (
        (
            "owner.bpf.c",
            "(container->transport == GRAFT_TRANSPORT_SPLICE && scope->container)",
            "is_unsupervised(container)",
        ),
    ),
    # The peer of an IPv6 socket is known by its last word.
    "all of the peer": (
        (
            "sendmsg.bpf.c",
            "sk->dst_ip6[2] == bpf_htonl(0xffff) && !(sk->dst_ip6[0] | sk->dst_ip6[1]) &&",
            "",
        ),
    ),
    # No defence: a kernel that does not tell who opened a socket.
    "told opener": (("desk.bpf.c", "\tprobe_owner(desk, file);\n", ""),),
    # A socket that was bound to an endpoint once counts as bound, wherever it stands now.
    "bound": (("local_address.bpf.c", "\tif (local.port != tag->bound_port)\n\t\treturn 0;\n", "\treturn 1;\n"),),
    # What one ruleset said of a request is good for all that follow.
    "number of the ruleset": (
        (
            "local_address.bpf.c",
            "if (tag->found_endpoint == (ruleset | rule->endpoint) && port >> 16 == (ruleset >> 16 | tag->port))",
            "if ((u32)tag->found_endpoint == rule->endpoint)",
        ),
    ),
    # And each port of a range that is an endpoint is as good as the one that the socket's own request becomes.
    "port by port": (
        ("local_address.bpf.c", "\tif (local.port != tag->bound_port)\n\t\treturn 0;\n", ""),
        (
            "local_address.bpf.c",
            "(port && port != local->port)",
            "(port && (local->port < endpoint->port || local->port > endpoint->last_port))",
        ),
    ),
    # No hook looks at what comes in, or at what goes out.
    "packets in": (_at_once("ingress.bpf.c", "int graft_skb_ingress(struct __sk_buff *skb)", "return PASS;"),),
    "packets out": (
        _at_once("egress.bpf.c", "int graft_skb_egress(struct __sk_buff *skb)", "return PASS;"),
        _CONNECTING,
    ),
    # A listener for whose tag there is no memory goes on.
    "memory": (
        _at_once("create.bpf.c", "struct container *container, u32 id)", "return PASS;"),
        ("listen.bpf.c", "\tif (owner.tag)\n\t\towner.tag->open_port = 0;\n", "\tif (!owner.tag)\n\t\treturn 1;\n"),
        (
            "ingress.bpf.c",
            "|| accepts_anyone(skb, sk, owner, id, endpoint);",
            "|| !owner->tag || accepts_anyone(skb, sk, owner, id, endpoint);",
        ),
    ),
    # An IPv6 bind takes the IPv4 port along.
    "ipv4": (
        _at_once(
            "bind.bpf.c",
            "int takes_ipv4_port(struct bpf_sock *ctx, struct local_address *local, struct endpoint *endpoint)",
            "return 0;",
        ),
        _at_once(
            "ingress.bpf.c", "int is_of_other_family(struct __sk_buff *skb, struct endpoint *endpoint)", "return 0;"
        ),
    ),
    # Sockets of any protocol are let through.
    "protocols": (_at_once("owner.bpf.c", "int has_rules(u32 type, u32 protocol)", "return 1;"),),
    # No address at all is judged as it stands.
    "unspecified": (
        _at_once("rules.bpf.c", "void substitute_loopback(struct request *request, int host)", "return;"),
        _at_once("egress.bpf.c", "int graft_skb_egress(struct __sk_buff *skb)", "return PASS;"),
        _CONNECTING,
    ),
    # A datagram leaves from the address that it names.
    "source": (
        ("sendmsg.bpf.c", "\tif (ip || has_ip6 || leaves_source_to_kernel(request)) {\n", "\tif (0) {\n"),
        ("sendmsg.bpf.c", "ip[0] | ip[1] | ip[2] | ip[3] || leaves_source_to_kernel(request)", "0"),
        ("connect.bpf.c", "if ((has_address || bound) && local.family != endpoint->family)", "if (0)"),
        _at_once("local_address.bpf.c", "int is_hosts(u64 netns, u32 *ip, u8 family)", "return 1;"),
        ("destination.bpf.c", "&remote, netns, &source, own)", "&remote, netns, &source, 0)"),
    ),
    # Any option may be set, and nobody looks at whether a socket is tied to an interface.
    "options": (
        _at_once("options.bpf.c", "int bypasses_policy(int level, int name)", "return 0;"),
        _at_once("local_address.bpf.c", "int is_diverted(struct bpf_sock *sk)", "return 0;"),
    ),
    # A socket that pings may have a source that is not the host's, or not its endpoint's.
    "free source": (
        _at_once("options.bpf.c", "int frees_source(u32 type, u32 protocol, int level, int name)", "return 0;"),
        ("options.bpf.c", "name == IPV6_FREEBIND ||", ""),
    ),
    "ping source": (("ping.bpf.c", "\treturn !(ip[0] | ip[1] | ip[2] | ip[3]) ||\n", "\treturn !(ip[0] & 0) ||\n"),),
    # Every endpoint has every multicast group.
    "groups": (_at_once("rules.bpf.c", "int has_group(u32 id, u8 family, void *addr)", "return 1;"),),
    # Flow labels are leased by whoever likes.
    "flow labels": (("options.bpf.c", "name == IPV6_FLOWLABEL_MGR || ", ""),),
    # Nobody looks at whether a socket is bound to what it is granted no more.
    "lost": (
        _at_once(
            "local_address.bpf.c",
            "int has_lost_endpoint(struct bpf_sock *sk, struct tag *tag, int bound)",
            "return 0;",
        ),
        _at_once(
            "chosen_source.bpf.c", "int must_clear_address(struct bpf_sock *sk, struct request *request)", "return 0;"
        ),
        _at_once(
            "local_address.bpf.c",
            "int has_own_source(struct bpf_sock *sk, struct owner *owner, int bound)",
            "return 1;",
        ),
    ),
    # Where a datagram goes, and from where, is what its socket says by then.
    "in the datagram": (_BY_ITS_SOCKET,),
    # Or from where: what an endpoint lent a socket is the socket's.
    "lent": (
        _at_once(
            "local_address.bpf.c",
            "int has_own_source(struct bpf_sock *sk, struct owner *owner, int bound)",
            "return 1;",
        ),
        _at_once("local_address.bpf.c", "int keeps_lent_port(struct tag *tag, struct endpoint *endpoint)", "return 0;"),
        _WITHOUT_A_PEER,
    ),
    # A datagram goes by whatever route the kernel has for it.
    "astray": (_ASTRAY,),
    "astray6": (
        _at_once("destination.bpf.c", "int is_astray6(void *route, struct packet *packet, u64 netns)", "return 0;"),
    ),
    # And the program may choose the peer after the route.
    "astray, and begun": (
        _ASTRAY,
        _at_once("chosen_source.bpf.c", "int has_begun_datagram(struct bpf_sock_addr *ctx)", "return 0;"),
    ),
    "begun": (_at_once("chosen_source.bpf.c", "int has_begun_datagram(struct bpf_sock_addr *ctx)", "return 0;"),),
    # A broadcast address is one like others.
    "broadcasts": (
        _at_once("rules.bpf.c", "int is_broadcast(struct request *request, u64 netns)", "return 0;"),
        _at_once("options.bpf.c", "int misreads_addresses(u32 protocol, int level, int name)", "return 0;"),
    ),
    # Protocols without rules may leave, whatever container.
    "others": (("owner.bpf.c", "\treturn defaults_apply(container) && container->flags", "\treturn container->flags"),),
    "its source": (("destination.bpf.c", "&remote, netns, &source, own)", "&remote, netns, &source, 0)"),),
    # Established connections pass with any mark.
    "mark": (("egress.bpf.c", "state != BPF_TCP_SYN_SENT && !mark &&\n", "state != BPF_TCP_SYN_SENT &&\n"),),
    # A ferry hears whoever knows its address, and delivers to whoever has the port.
    "ferry's mark": (
        _at_once("ingress.bpf.c", "int arrives_at_ferry(struct __sk_buff *skb, struct owner *owner)", "return PASS;"),
    ),
    "ferry's receiver": (
        _at_once("egress.bpf.c", "int leaves_ferry(struct __sk_buff *skb, struct owner *owner)", "return PASS;"),
    ),
    # Whoever names the ferry's address as his own is the ferry; and so is whoever has its port.
    "ferry's mark on answers": (
        (
            "ingress.bpf.c",
            "\tif (is_forged(skb, owner, &remote, packet.plain))\n\t\treturn drop(owner);\n",
            "",
        ),
    ),
    "ferry's own port": (
        ("ferry.bpf.c", "\tif (!ferry_receives(ctx, owner, request, ferry))\n", "\tif (0)\n"),
        ("egress.bpf.c", "if (!is_received_by(skb, &packet, owner->id, GRAFT_HOME_FERRY))", "if (0)"),
    ),
    # A datagram that no hook at a call has judged since its endpoint is for TCP only.
    "exchange's protocol": (("packet.bpf.c", " && serves(endpoint, remote->protocol) &&\n", " &&\n"),),
    # A datagram socket that is connected to port 0 is not connected, and the packet is not looked at.
    "port 0": (
        _at_once("local_address.bpf.c", "int is_connected(struct bpf_sock *sk)", "return sk->dst_port != 0;"),
        _BY_ITS_SOCKET,
    ),
    # A hop-by-hop header on a long segment is the kernel's own, whatever comes behind it.
    "big tcp": (("egress.bpf.c", "&next, 1) && next == IPPROTO_TCP;", "&next, 1);"),),
    # What a container listened with goes on without it.
    "dead": (
        ("ingress.bpf.c", "(!owner->container)\n\t\treturn drop(owner);", "(!owner->container)\n\t\treturn PASS;"),
    ),
    # Whoever listens at the relay's port gets what is redirected there.
    "relay's mark": (
        ("connect.bpf.c", "if (!request->relay || !relay_listens(ctx, owner, request)) {", "if (!request->relay) {"),
    ),
    # Whoever has the port of the relay for datagrams gets what is sent there.
    "relay's mark for datagrams": (
        ("exchange.bpf.c", "if (!relay_receives(ctx, owner, relay->datagram_port, address))", "if (0)"),
        ("stand_in.bpf.c", "if (!relay_receives(ctx, owner, port, 0))", "if (0)"),
        ("exchange_packet.bpf.c", "if (!is_released_relay(to, owner->id))", "if (bpf_sk_release(to), 0)"),
    ),
    # The relay for datagrams hears whoever knows its address, and delivers to whoever has the port; an exchange is for
    # any socket of the container.
    "datagram relay's mark": (
        _at_once(
            "exchange_packet.bpf.c",
            "int arrives_inside(struct __sk_buff *skb, struct bpf_sock *sk, struct owner *owner)",
            "return PASS;",
        ),
    ),
    # And whoever has its port passes for it.
    "datagram relay's mark on answers": (
        _at_once(
            "exchange_packet.bpf.c",
            "int arrives_from_relay(struct __sk_buff *skb, struct bpf_sock *sk, struct owner *owner)",
            "return PASS;",
        ),
    ),
    # A connected socket hears whoever has the address that it is connected to, and sends to whomever that stands for.
    "whom a socket is connected to": (
        _at_once("exchange_packet.bpf.c", "struct crossing *connected_end(struct bpf_sock *sk)", "return 0;"),
    ),
    "datagram relay's receiver": (
        _at_once("exchange_packet.bpf.c", "int is_of_cgroup(struct bpf_sock *sk, u64 cgroup)", "return 1;"),
    ),
    # A socket that shares its address with a stranger's counts for both, and a container has as many slots as there are
    # addresses for them.
    "group of receivers": (("exchange_packet.bpf.c", " && is_groups_own(to, relay->cgroup)", ""),),
    "slots of a container": (("exchange.bpf.c", "% GRAFT_EXCHANGE_OUT_SLOTS", "% GRAFT_EXCHANGE_SLOTS"),),
    # An address of the relay's that stands for nobody any more is shown as it is.
    "nobody": (("receive.bpf.c", "\tif (!exchange) {\n", "\tif (!exchange)\n\t\treturn 0;\n\tif (0) {\n"),),
    "exchange's own socket": (
        ("exchange_packet.bpf.c", "if (found->cookie != bpf_get_socket_cookie(skb))", "if (0)"),
        ("exchange_packet.bpf.c", "\treturn found->cookie == bpf_get_socket_cookie(skb);", "\treturn 1;"),
    ),
    # A second bind is judged, and written down, like the first.
    "second bind": (("bind.bpf.c", "\tif (ctx->sk->src_port) {\n", "\tif (0) {\n"),),
    # Two binds at once: the last one that wrote its request down says what the other one has bound.
    "binds at once": (_at_once("bind.bpf.c", "int is_of_other_bind(struct tag *tag)", "return 0;"),),
    # A port that an endpoint lends is the socket's in both families.
    "lent family": (
        _at_once("connect.bpf.c", "int has_other_familys_port(struct tag *tag, struct request *request)", "return 0;"),
        _at_once("connect.bpf.c", "struct bpf_sock_addr *ctx, struct endpoint *from)", "return 0;"),
        (
            "connect.bpf.c",
            "write_source(&source, from, ctx->family);",
            "write_source(&source, from, request->family == GRAFT_IPV6 || request->mapped ? AF_INET6 : AF_INET);",
        ),
        _WITHOUT_A_PEER,
    ),
    # A server at all addresses answers from whatever address it names.
    "foreign source": (
        ("options.bpf.c", "name == IP_FREEBIND || ", ""),
        ("options.bpf.c", "name == IPV6_FREEBIND ||", ""),
        _at_once("local_address.bpf.c", "int is_hosts(u64 netns, u32 *ip, u8 family)", "return 1;"),
    ),
    # A port is good for the family that its endpoint does not have, where no rule speaks of the destination.
    "family of the endpoint": (
        ("connect.bpf.c", " ||\n\t\t    (bound && is_at_other_familys_endpoint(owner.tag, request)))", ")"),
    ),
    # A connect to a group gives a socket the address of an option.
    "chosen address": (_at_once("chosen_source.bpf.c", "struct endpoint *endpoint, int bound)", "return 0;"),),
    # Nobody looks at whether a socket has a route of its own when it connects.
    "chosen route": (_at_once("chosen_source.bpf.c", "int has_chosen_route(struct bpf_sock_addr *ctx)", "return 0;"),),
    # An address that an endpoint lent is no reason to ask what the kernel takes when that is cleared.
    "cleared address": (("chosen_source.bpf.c", "if (!bound && must_clear_address(ctx->sk, request))", "if (0)"),),
    # The places of all ferries are in a table that a hundred containers can fill.
    "berths": (("graft.bpf.c", "struct berth, berths, GRAFT_MAX_BERTHS,", "struct berth, berths, 32768,"),),
    # A map of rules that is soon full. (No defence: for tests of what is said then.)
    "room for rules": (("graft.bpf.c", "struct ingress_value, GRAFT_MAX_RULES", "struct ingress_value, 64"),),
    # An address of the host's loopback that the kernel picked is good for any destination.
    "loopback source": (
        _at_once(
            "local_address.bpf.c",
            "u64 strays_from_loopback(struct local_address *source, struct request *remote)",
            "return 0;",
        ),
    ),
    "loopback source at calls": (
        _at_once(
            "chosen_source.bpf.c",
            "int keeps_loopback(struct bpf_sock *sk, struct request *request, struct endpoint *endpoint)",
            "return 0;",
        ),
    ),
    # What an endpoint lends a socket without a tag is written down nowhere.
    "lent without a tag": (
        ("connect.bpf.c", "\tif (endpoint && !owner.tag)\n\t\towner.tag = ", "\tif (0)\n\t\towner.tag = "),
        ("connect.bpf.c", "!owner.tag && lends(endpoint)", "0"),
    ),
    # A bind to no endpoint leaves the port open that the last one gave.
    "open port": (
        ("bind.bpf.c", "\t\town->open_port = 0;\n\t\town->at_unix = 0;\n\t\town->binder", "\t\town->binder"),
        ("bind.bpf.c", "\t\towner->tag->open_port = 0;\n", ""),
    ),
    # What an endpoint lent is good for receiving, whatever became of it.
    "lost source": (
        _at_once(
            "local_address.bpf.c", "int keeps_others_source(struct bpf_sock *sk, struct tag *tag, u32 id)", "return 0;"
        ),
        _WITHOUT_A_PEER,
    ),
    # Anybody on the host reaches the listener that graftd alone is to reach.
    "leftovers at its port": (("bind.bpf.c", "if (meets_leftover(ctx, request, endpoint))", "if (0)"), _BY_ITS_NOTE),
    # Of the sockets at a port a bind looks only for those that had an endpoint.
    "lent and free ports": (
        _at_once(
            "shared_port.bpf.c",
            "int is_ungranted(struct bpf_sock *sk, struct tag *tag, struct container *container, u64 netns)",
            "return container ? tag->endpoint && !is_bound(sk, tag, container, netns) : 1;",
        ),
    ),
    # An endpoint lends the port that another container has.
    "others at a lent port": (_BESIDE_OTHERS,),
    # And who is lent it joins the group of who listens there.
    "group of a lent port": (
        _BESIDE_OTHERS,
        _at_once("shared_port.bpf.c", "int leaves_group(struct bpf_sock_addr *ctx)", "return 1;"),
    ),
    # One that another thread is about to join is not noticed.
    "options that are under way": (("shared_port.bpf.c", "\treturn !seen->asked_group;\n", "\treturn 1;\n"),),
    # What is known of an MPTCP socket's options is its subflow's.
    "options of the whole": (("shared_port.bpf.c", "\tif (parent)\n", "\tif (0)\n"),),
    # A rule grants any port to what was bound freely, where the kernel is to choose it.
    "certain port": (("local_address.bpf.c", "&& port && matches_endpoint(local", "&& matches_endpoint(local"),),
    # A server that was there once counts, whoever has bound the place since.
    "time of a bind": (("server.bpf.c", "server->bound > since && ", ""),),
    # Of MPTCP no option joins a group.
    "groups of MPTCP": (
        (
            "options.bpf.c",
            "if (!is_tcp(type, protocol) || ctx->level",
            "if (protocol != IPPROTO_TCP || ctx->level",
        ),
    ),
    # A port that was bound freely once is its socket's, whoever is granted it.
    "earlier port": (
        _BY_ITS_NOTE,
        _at_once(
            "ingress.bpf.c",
            "int another_is_found(struct __sk_buff *skb, struct owner *owner, struct packet *packet)",
            "return 0;",
        ),
    ),
    # Whom a packet is for says only the kernel's lookup.
    "servers": (_BY_ITS_NOTE,),
    # What was bound freely is granted by no rule.
    "granted place": (
        (
            "local_address.bpf.c",
            "\tendpoint = place_for(container, &request, local, netns);\n",
            "\treturn 0;\n",
        ),
    ),
    # One of both families is granted what one endpoint of IPv6 grants.
    "one family": (
        (
            "local_address.bpf.c",
            "\treturn endpoint && (endpoint->family == GRAFT_IPV4 || !is_unspecified(endpoint->addr) ||\n"
            "\t\t\t    endpoint->flags & GRAFT_ENDPOINT_DUAL_STACK);\n",
            "\treturn endpoint != 0;\n",
        ),
    ),
    # A container has one note at a place.
    "same request": (("server.bpf.c", "is_same_request(found, &server)", "found->container == server.container"),),
    # And one with many addresses takes the places of others.
    "own places": (
        ("server.bpf.c", "if (found->container == server.container) {", "if (0) {"),
        ("server.bpf.c", "seen[earlier] == found->container", "0"),
    ),
    # And so does a third one.
    "several places": (("server.bpf.c", "!has_own && seen[earlier] == found->container", "0"),),
    # Two that bind at the same moment note themselves in one place.
    "notes at once": (("server.bpf.c", "servers.insert(&key", "servers.update(&key"),),
    # What was refused counts as an option that may still take effect.
    "refused options": (
        (
            "shared_port.bpf.c",
            "\t\t__sync_fetch_and_add(&seen->asked_group, -1); /* it is refused, and none that takes effect */\n",
            "",
        ),
    ),
    # A bind that leaves the port to the kernel counts, whoever has lent the port since.
    "bound without a port": (
        (
            "shared_port.bpf.c",
            "tag->bound_port != local.port : tag->lent & GRAFT_LENT_PORT",
            "tag->bound_port != local.port : 0",
        ),
    ),
    # A port counts as granted when the hook after the bind has been called.
    "being bound": (
        (
            "shared_port.bpf.c",
            "if (tag->bound_port ? tag->bound_port != local.port : tag->lent & GRAFT_LENT_PORT)",
            "if (tag->bound_port != local.port)",
        ),
    ),
    # Of the connects of a socket only the last one is known, whatever became of it.
    "former connects": (
        (
            "local_address.bpf.c",
            "\tcrossing = former_crossings.sk_storage_get(sk, 0, 0);\n"
            "\treturn crossing && is_still_there(sk, crossing) ? crossing : 0;",
            "\treturn 0;",
        ),
    ),
    # What a ferry has brought from a peer that it has forgotten is shown as from the ferry.
    "forgotten peers": (
        (
            "receive.bpf.c",
            "\t\tberth = berths.lookup(&key);\n\t\tif (berth) {",
            "\t\tberth = berths.lookup(&key);\n\t\tif (!berth)\n\t\t\treturn 0;\n\t\telse {",
        ),
    ),
    # And what it has lent is good for receiving without a peer.
    "peer of a lent port": (_WITHOUT_A_PEER,),
    "unix listener": (_at_once("ingress.bpf.c", "int is_unix_listener(struct owner *owner)", "return 0;"),),
    # No hook refuses anything.
    "hooks": tuple(
        _at_once(f"{file}.bpf.c", f"int graft_{hook}(struct {context})", "return PASS;")
        for file, hook, context in (
            ("bind", "bind4", "bpf_sock_addr *ctx"),
            ("bind", "bind6", "bpf_sock_addr *ctx"),
            ("bind", "post_bind4", "bpf_sock *ctx"),
            ("bind", "post_bind6", "bpf_sock *ctx"),
            ("connect", "connect4", "bpf_sock_addr *ctx"),
            ("connect", "connect6", "bpf_sock_addr *ctx"),
            ("options", "setsockopt", "bpf_sockopt *ctx"),
            ("listen", "sock_ops", "bpf_sock_ops *ctx"),
            ("ingress", "skb_ingress", "__sk_buff *skb"),
            ("egress", "skb_egress", "__sk_buff *skb"),
        )
    ),
}


def _own_binds() -> None:
    """A bind that no rule grants is made by the supervisor too, in the container's namespace, with its rights."""

    def get_replacement(
        self: supervisor.Supervisor, decision: Decision, facts: SocketFacts, owner: socket_pool.Owner
    ) -> Any:
        home = Home.HOST if decision.action is Action.TO_HOST else Home.CONTAINER
        where = decision.netns if home is Home.HOST else facts.container_netns
        family = socket_copy.AF_INET if facts.family == 4 else socket_copy.AF_INET6
        kind = socket_pool.SocketKind(family, socket_copy.SOCK_STREAM, facts.protocol, owner)
        return self._pool.get(home, where, kind)

    supervisor.Supervisor._get_replacement = get_replacement  # type: ignore[method-assign]
    vars(supervisor)["_TO_HOST"] = Action.TO_CONTAINER  # what `_replace` compares with before it binds


def _out_of_the_hooks(changes: tuple[Change, ...]) -> Callable[[], None]:
    def leave_out() -> None:
        sys.path.append(str(COMMAND.parents[2]))  # this runs as a file of its own
        from tests.hostile.changed_hooks import compile_changed

        intact = BpfSources.read()
        digest = loader.digest(intact)
        folder = Path(tempfile.mkdtemp(prefix="graft-undefended-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        shutil.copytree(bpf_source_dir(), folder, dirs_exist_ok=True)
        for name, there, instead in changes:
            text = (folder / name).read_text()
            assert text.count(there) == 1, f"{name}: this stands there {text.count(there)} times: {there}"
            (folder / name).write_text(text.replace(there, instead))
        vars(sources)["bpf_source_dir"] = lambda: folder
        vars(loader)["digest"] = lambda _: digest  # other commands do not replace these hooks
        vars(loader)["compile_cached"] = partial(compile_changed, compile_cached, intact)

    return leave_out


def _noted_first() -> None:
    """`graft detach` does nothing where what is saved cannot be read, and closes no socket where it cannot note it."""

    @contextlib.contextmanager
    def removed(settings: Settings, container: Container, save: bool) -> Iterator[list[str]]:
        store = Store(settings)
        with store.locked(saves=save):
            each, _ = saving._each_of(store, container)
            yield []
            for one in each:
                saving.forget(store, one.target, save)

    saving.removed = removed


def _shares() -> None:
    """One limit for the connections of all containers."""
    from graft.splice import resources, shares

    def can_take(self: shares.Share, count: int = 1) -> bool:
        return self.shares.free >= count

    shares.Share.can_take = can_take  # type: ignore[method-assign]
    resources.DaemonResources.reclaim = lambda self, count: None  # type: ignore[method-assign]


def _turns() -> None:
    """The daemon runs all steps of a job in one turn, whoever else waits."""
    from graft.splice import container_service, jobs
    from graft.splice.event_loop import EventLoop

    def in_one_step(steps: jobs.Stepwise[None]) -> jobs.Stepwise[None]:
        for _ in steps:
            pass
        yield from ()

    def job(
        loop: EventLoop, owner: int, steps: jobs.Stepwise[None], done: Callable[[BaseException | None], None]
    ) -> jobs.Job:
        return jobs.Job(loop, owner, in_one_step(steps), done)

    vars(container_service)["Job"] = job
    _slow_calls()  # else the container would wait after each


def _slow_calls() -> None:
    """No container waits, however long its calls take, and a turn has as many calls as it likes."""
    from graft.splice import event_loop, slow_calls

    slow_calls.SlowCalls.note = lambda *_: None  # type: ignore[method-assign]
    event_loop.EventLoop.turn_is_over = lambda self: False  # type: ignore[method-assign]


def _owners_of_closes() -> None:
    """What the daemon does not watch, it closes in its own turns."""
    from graft.splice import event_loop

    def close(self: event_loop.EventLoop, sock: socket.socket, owner: int, *more: Any, **others: Any) -> None:
        closed(self, sock, owner if sock.fileno() in self._handlers else event_loop.DAEMON, *more, **others)

    closed = event_loop.EventLoop.close
    event_loop.EventLoop.close = close  # type: ignore[method-assign]


def _far_check() -> None:
    """The daemon takes every connection that it made for the container's."""
    from graft.splice.far_check import FarCheck

    FarCheck.__call__ = lambda *_: True  # type: ignore[method-assign]


def _taken() -> None:
    """The daemon takes an arrival that is not there for one that the container's hook took."""
    from graft.splice.far_check import FarCheck

    def check(self: FarCheck, sock: socket.socket) -> bool:
        return self._arrivals.peek(self._key(sock)) is None or checked(self, sock)

    checked = FarCheck.__call__
    FarCheck.__call__ = check  # type: ignore[method-assign]


def _older_kernel() -> None:
    """A kernel that cannot refuse descriptors (before 6.16)."""
    unix_rights.refused_by_kernel = lambda: False  # type: ignore[assignment]


def _descriptors() -> None:
    """The daemon takes descriptors that somebody sends, as on such a kernel, and drops them where it stands."""
    unix_rights.refuse = lambda sock: None
    unix_rights.refused_by_kernel = lambda: True  # type: ignore[assignment]


def _acl() -> None:
    """A folder's default ACL is a new socket's too."""
    unix_files._remove_acl = lambda file, kind: None


def _log() -> None:
    """The daemon writes whatever a container causes."""
    from graft.splice.log import ContainerLog, log

    ContainerLog.__call__ = lambda self, text: log(text, self.container)  # type: ignore[method-assign]


def _lost_lines() -> None:
    """What cannot be logged is an error of whoever logs it."""
    from graft.keeper import lines
    from graft.splice.log import FailureLog

    def write(text: str) -> bool:
        return os.write(2, text.encode()) > 0

    lines.write = write
    FailureLog.__call__ = FailureLog._write  # type: ignore[method-assign]


def _restored_in_run() -> None:
    """That what is saved was restored is noted in /run, if it has room."""
    from graft.commands import up
    from graft.kernel.atomic_file import write_atomically
    from graft.state import restored

    _for_now_when_lost()

    def ensure(settings: Settings) -> None:
        if (settings.state_dir / "saved").exists() and not restored.is_restored(settings):
            up.main()  # here, as a process of its own would have the defence

    def note(settings: Settings) -> None:
        with contextlib.suppress(OSError):
            write_atomically(settings.run_dir / "restored", bytes(8192))  # more than `graft up` may have made room for

    restored.is_restored = lambda settings: (settings.run_dir / "restored").exists()
    restored.set_restored, restored.ensure_restored = note, ensure


def _aside() -> None:
    """The daemon waits for the installation's lock in its event loop."""
    from graft.splice import background

    def run(
        _self: background.Background, call: Callable[[], object], done: Callable[[object, Exception | None], None]
    ) -> None:
        done(call(), None)

    background.Background.run = run  # type: ignore[method-assign,assignment]


def _others_in_the_cgroup() -> None:
    """A container's cgroup may have the operator's processes, where its runtime has ended."""
    from graft.oci import plan

    plan._has_others = lambda path: False


def _cgroup_id() -> None:
    """A cgroup is known by its path."""
    from graft.splice import listeners

    Container.exists = property(lambda self: self.cgroup_path.exists())  # type: ignore[assignment]
    cgroup.open_events = lambda path, number: os.open(path, os.O_PATH)
    cgroup.is_removed = lambda events: (
        not os.path.exists(os.readlink(f"/proc/self/fd/{events}").removesuffix(" (deleted)"))
    )
    vars(listeners)["cgroup_ids"] = lambda path, _root: cgroup.ids(path)


def _slow_peers() -> None:
    """A container waits for what is slow on whatever side of its connections."""
    from graft.splice import slow_calls

    def note(self: slow_calls.SlowCalls, owner: int, seconds: float, now: float, _blamed: object = None) -> None:
        noted(self, owner, seconds, now)

    noted = slow_calls.SlowCalls.note
    slow_calls.SlowCalls.note = note  # type: ignore[method-assign,assignment]


def _pipes_inodes() -> None:
    """Pipes are known by their numbers, which are used again at once, and what is in one stays there."""
    from graft.splice import kept, kept_records, pipes

    def add_pipe(self: kept.Kept, pipe: pipes.Pipe) -> None:
        added(self, pipe)
        pipe.inode = pipe.number + 1

    def drop_pipe(self: kept.Kept, number: int) -> None:
        self._pipes.pop(number, None)
        self.store.drop(kept_records.pipe_name(number))
        self._free_pipes.append(number)

    def sort_pipes(self: kept.Kept, received: Any, records: Any) -> None:
        numbers = {fd: number + 1 for number, fds in received.items() for fd in fds}
        kept.__dict__["inode"] = numbers.__getitem__
        sort(self, received, records)

    added, sort = kept.Kept.add_pipe, kept.Kept._sort_pipes
    kept.Kept.add_pipe = add_pipe  # type: ignore[method-assign]
    kept.Kept._drop_pipe = drop_pipe  # type: ignore[method-assign]
    kept.Kept._sort_pipes = sort_pipes  # type: ignore[method-assign]
    pipes.throw_away = kept.__dict__["throw_away"] = lambda read: None


def _namespace_kept() -> None:
    """A container's network namespace is that of one of its processes."""
    from graft.splice.kept import Kept

    Kept.inside = lambda self, container: None  # type: ignore[method-assign]


def _unserved() -> None:
    """And what was left of a container that cannot be served stays."""
    from graft.splice.container_service import ContainerService
    from graft.splice.unserved import Unserved

    def scanned(self: ContainerService, error: BaseException | None) -> None:
        self.__dict__["_close_untaken"] = (lambda: None) if error else partial(closed, self)
        ended(self, error)

    closed, ended = ContainerService._close_untaken, ContainerService._scanned
    ContainerService._scanned = scanned  # type: ignore[method-assign]
    Unserved.close = lambda self, containers, served: None  # type: ignore[method-assign]
    _namespace_kept()


def _datagram_peers() -> None:
    """Whoever is connected to a port of the daemon's keeps it for the container."""
    from graft.splice.publication import PublicationPlan

    def add(self: PublicationPlan, one: ListeningSocket) -> None:
        self._others = ()
        added(self, one)

    added = PublicationPlan.add_datagram_socket
    PublicationPlan.add_datagram_socket = add  # type: ignore[method-assign]


def _ferrys_owner() -> None:
    """What a ferry makes inside is root's, and has the port that it asks for."""
    from graft.swap import ferry

    vars(ferry)["owning_files_as"] = vars(ferry)["with_capabilities"] = lambda *_: contextlib.nullcontext()


def _ferrys_only_owner() -> None:
    """Where a ferry knows of one user only, everything is his; and who makes a socket untrapped, it is not told."""
    from graft.swap.ferry_owners import FerryOwners

    def of(self: FerryOwners, family: int, address: str, port: int) -> tuple[int, int]:
        return next(iter(self._known)) if len(self._known) == 1 else asked(self, family, address, port)

    asked = FerryOwners.of
    FerryOwners.of = of  # type: ignore[method-assign]
    supervisor.__dict__["_IPPROTO_UDP"] = -1


def _ferrys_question() -> None:
    """A ferry looks for a port in the list of all datagram sockets that the machine has (proc_net_udp(5))."""
    from graft.swap.ferry_owners import HostSockets

    def owner_at(self: HostSockets, family: int, address: str, port: int) -> tuple[int, int] | None:
        at = f":{port:04X}".encode()
        lists = [Path("/proc/thread-self/net", name).read_bytes().splitlines() for name in ("udp", "udp6")]
        users = [int(line.split()[7]) for lines in lists for line in lines[1:] if line.split()[1].endswith(at)]
        return (users[0], users[0]) if users else None

    HostSockets.owner_at = owner_at  # type: ignore[method-assign]


def _datagram_turns() -> None:
    """So many datagrams of a socket are relayed in one turn, however long each takes."""
    from graft.splice.datagram_sockets import Receiver
    from graft.splice.event_loop import EventLoop

    def make(self: Receiver, sock: socket.socket, serve: Callable[[Any], None], _loop: EventLoop) -> None:
        made(self, sock, serve, type("Loop", (), {"turn_is_over": lambda self: False})())

    made = Receiver.__init__
    Receiver.__init__ = make  # type: ignore[method-assign,assignment]


def _freed_slots() -> None:
    """The slot of a socket that is closed counts as used as long as any."""
    from graft.splice.datagrams import Slots

    Slots.give_up = Slots._age_slot = lambda *_: None  # type: ignore[method-assign,assignment]


def _forgotten_clients() -> None:
    """Nothing is left in the maps of a client that is forgotten."""
    from graft.splice.datagrams import Slots
    from graft.splice.stand_in_sockets import StandIn, StandInSockets

    def remove_client(self: Slots, client: Client) -> None:
        removed(self, client)
        self._erase(client.number)

    def forget(self: StandInSockets, gone: StandIn, address: bytes, port: int, local_port: int) -> None:
        forgotten(self, gone, address, port, local_port)
        self._maps.stand_ins.delete(self.key(gone.port))

    removed, forgotten = Slots.remove_client, StandInSockets.forget
    Slots.remove_client = remove_client  # type: ignore[method-assign]
    StandInSockets.forget = forget  # type: ignore[method-assign]


def _ports_again() -> None:
    """A port is used again as soon as the kernel picks it."""
    from graft.splice.forgotten import Forgotten

    Forgotten.__contains__ = lambda *_: False  # type: ignore[method-assign]
    Forgotten.__len__ = lambda _: 0  # type: ignore[method-assign]


def _one_client_for_another() -> None:
    """Clients are forgotten until there is room for one more."""
    from graft.splice.stand_in_sockets import StandIn
    from graft.splice.stand_ins import StandIns

    def make_for_client(self: StandIns) -> StandIn:
        while True:
            try:
                return self._sockets.make()
            except OSError:
                if not self.clients.remove_longest_unanswered():
                    raise

    StandIns._make_for_client = make_for_client  # type: ignore[method-assign]


def _half_made_relays() -> None:
    """What was made of the relays of a container stays open where the rest could not be made."""
    from graft.splice.relays import Relays

    Relays._stop_datagrams = lambda self: None  # type: ignore[method-assign]


def _group_of_listeners() -> None:
    """The daemon asks for one of the listeners that share an address: here it is always the container's."""
    from graft.splice.far_check import FarCheck

    def is_containers(self: FarCheck, sock: socket.socket) -> bool:
        self._diagnostics = self._diagnostics or self._netns.run(Diagnostics)
        listeners = self._diagnostics.listeners_at(sock.family, *sock.getpeername()[:2])
        return any(one.cgroup in self.cgroups for piece in list(listeners) for one in piece)

    FarCheck._is_containers = is_containers  # type: ignore[method-assign]


def _listeners_counted() -> None:
    """Listeners that take no IPv4 connection are counted with those that may get it, and decide by their number."""
    from graft.splice.far_check import FarCheck

    def listens_alone(self: FarCheck, family: int, address: str, port: int) -> bool:
        return self._has_all(self._asked().listeners_at(family, address, port))

    FarCheck._listens_alone = listens_alone  # type: ignore[method-assign]


def _bounded_addresses() -> None:
    """What was noted of a namespace before stays noted, and comes before what is found later."""
    from graft.datapath import layout
    from graft.state import host_addresses

    def put_all(table: Any, live: object, host: int, found: Mapping[int, Set[bytes]]) -> None:
        room = layout.MAX_NOTED - host_addresses._ROOM_OF_HOST - len(list(table.keys()))
        for packed in islice(chain.from_iterable(found.values()), max(0, room)):
            table.put(layout.HostAddress.from_buffer_copy(packed), ctypes.c_uint32(1))

    host_addresses._replace = put_all


def _names_of_any_bytes() -> None:
    """A record is written that cannot be read again: of a cgroup whose name is not UTF-8."""
    from graft.model import json_text
    from graft.state import records

    json_text.raw_path = json_text.path
    records.encode_checked = lambda container: records.encode(container).encode()


def _hooks_stay() -> None:
    """An attach that fails takes away the hooks that were there before it, too."""
    from graft.datapath import attachments
    from graft.state.container_changes import ContainerChanges

    create = ContainerChanges.create

    def create_or_detach(self: ContainerChanges, compiled: Any, path: Path, *rest: Any, **named: Any) -> Any:
        try:
            return create(self, compiled, path, *rest, **named)
        except BaseException:
            attachments.detach_predecessors(path)
            raise

    ContainerChanges.create = create_or_detach  # type: ignore[method-assign]


def _own_descriptors() -> None:
    """The own folder in /proc of a process of root's is looked up each time."""
    unix_files.pin_own_descriptors = lambda: None
    own_names.pin = lambda inherited=0: None


def _keepers_folder() -> None:
    """graftd reaches its keeper's socket by the keeper's folder in /proc."""
    from graft.splice import descriptor_store

    def connected(told: Mapping[str, str]) -> socket.socket | None:
        own, keepers = protocol.inherited_folder(told), f"/proc/{os.getppid()}/fd"
        if own is None:
            return connect(told)
        folder = os.fstat(own)
        number = next(one for one in os.listdir(keepers) if os.path.samestat(os.stat(f"{keepers}/{one}"), folder))
        return connect({**told, protocol.NOTIFY_SOCKET: f"{keepers}/{number}/{protocol.SOCKET}"})

    connect, descriptor_store.connected = descriptor_store.connected, connected


def _open_stat() -> None:
    """graftd's watchdog opens again each time what it reads of the loop's thread."""
    from graft.splice.watchdog import Activity, Watchdog, parse_activity

    def activity(self: Watchdog) -> Activity:
        os.close(self._stat)  # it keeps the name in the kernel's cache
        now = parse_activity(Path(f"/proc/self/task/{os.getpid()}/stat").read_text())
        self._stat = os.open("/dev/null", os.O_RDONLY)
        return now

    Watchdog._activity = activity  # type: ignore[method-assign]
    own_names.pin = lambda inherited=0: None


def _cgroup_events() -> None:
    """The daemon asks by its id whether a cgroup exists, in its event loop."""
    from graft.splice.cgroups import Cgroups

    known: dict[int, Container] = {}
    Cgroups.update = lambda self, records: known.update(records)  # type: ignore[method-assign]
    Cgroups.gone = lambda self, numbers: {one for one in numbers if not known[one].exists}  # type: ignore[method-assign]


def _terminal() -> None:
    terminal.refuse_terminal_injection = lambda: None


def _keyring() -> None:
    keyring.leave_session_keyring = lambda: None


def _capabilities() -> None:
    def drop(capability: int) -> None:
        syscall("prctl", 24, capability, 0, 0, 0)  # PR_CAPBSET_DROP, and no other set

    capabilities.drop = drop


def _listener() -> None:
    def refuse(self: listener.ListenerServer, state: State, error: Exception, first: int | None) -> None:
        self._report(f"{state.id}: refused, and ended: {error}")
        os.kill(state.pid, 9)

    listener.ListenerServer._refuse = refuse  # type: ignore[method-assign]


def _cgroup_root() -> None:
    """A container was attached at its first process's cgroup, wherever its cgroup namespace has its root."""
    cgroup.whole_of_process = cgroup.of_process


def _asking() -> None:
    """What was asked of a container's sockets was asked by the command itself, of a copy of each."""

    def run_each(
        work: Callable[[Any], Any],
        items: Sequence[Any],
        timeout: float = 0,
        keep_running: bool = False,
        longest: float = 0,
        keep: Collection[int] = (),
        exit_timeout: float = 0,
    ) -> Any:
        return helper_process.HelperResult({number: work(item) for number, item in enumerate(items)}, 0)

    def run_one(work: Callable[[], Any], timeout: float = 0) -> Any:
        return work()

    def find(pids: Iterable[int], inodes: frozenset[int]) -> socket_holders.Places:
        found = looked_up(pids, inodes)
        for place in (place for places in found.values() for place in places):
            with socket.socket(fileno=pidfd_getfd(os.pidfd_open(place.pid), place.fd)):
                pass  # which asks it for its family and its name
        return found

    looked_up = socket_holders.find
    helper_process.run_each, helper_process.run_one, socket_holders.find = run_each, run_one, find


def _tags() -> None:
    """A container's sockets were those of its processes, and of a process those of its first thread."""

    def sockets_by_container(
        settings: Settings, listed: Sequence[Container], stack: inventory.HostStack, *_: Any, **__: Any
    ) -> Any:
        found = by_tags(settings, listed, stack)
        for container in listed:
            inside = cgroup.processes(container.cgroup_path)
            found.sockets[container.id] = [
                one
                for one in found.sockets[container.id]
                if any(place.pid in inside and place.tid == place.pid for place in one.places)
            ]
        return found

    by_tags: Any = inventory.sockets_by_container
    inventory.sockets_by_container = sockets_by_container  # type: ignore[assignment]
    inventory.tagged = lambda settings, container, stack, doubts=stack_listing.NO_DOUBTS: ([], doubts)


def _destroy() -> None:
    """A kernel that is not to be asked to end a socket."""
    sockets.can_destroy = lambda release=None: False


def _leftovers() -> None:
    """What others have of a container's sockets is theirs when it has ended."""
    leftovers.closed_after = lambda graft, *containers: contextlib.nullcontext()  # type: ignore[assignment]
    leftovers.close_all = lambda graft: None
    LeftoversAside.closed_after = lambda self, graft, container: leftovers.closed_after(graft)  # type: ignore[method-assign]


def _leftovers_waited_for() -> None:
    """`graft listen` itself waits until what others have of a container's sockets is closed."""
    LeftoversAside.closed_after = (  # type: ignore[method-assign]
        lambda self, graft, container: leftovers.closed_after(graft, container)
    )


def _supervisors_waited_for() -> None:
    """`graft listen` waits for the supervisors of each container that has ended."""

    def stop_supervisors(attachments: Sequence[shim.Attachment], patience: float | None = None) -> None:
        for one in attachments:
            stop([one])

    stop = shim.stop_supervisors
    shim.stop_supervisors = stop_supervisors


def _own_cgroups() -> None:
    """A container's supervisors are those whose parent keeps its supervisors running."""
    from graft.commands import ps

    def supervisors(graft: Installation, listed: Sequence[Container], inside: object) -> dict[int, tuple[int, ...]]:
        parents = {pid.value: _parent(pid.value) for pid in graft.maps.desk_slots.keys()}  # noqa: SIM118
        return {one.id: tuple(pid for pid, parent in parents.items() if parent == one.pid) for one in listed}

    ps._supervisors = supervisors


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return 0


def _cgroup_last() -> None:
    """Where `graft down` cannot remove Graft's cgroup, it goes no further."""
    from graft.commands import down

    def is_removed(path: Path, patience: float) -> bool:
        cgroup.remove(path, patience)
        return True

    down._is_removed = is_removed


def _detached() -> None:
    """Of a container that was detached nobody knows whether it had a supervisor."""
    detached.numbers = lambda settings: frozenset()


def _listing() -> None:
    """A kernel that does not answer (before 6.9: anybody who ends a socket of his own that is locked sees to that)."""
    sockets.list_sockets = sockets.list_tcp = lambda *_: threading.Event().wait()  # type: ignore[assignment]


def _bound_apart() -> None:
    """What is only bound is listed with all others."""
    sockdiag.OPEN_STATES = sockets.OPEN_STATES = 0xFFFFFFFF  # type: ignore[attr-defined]


def _bound_apart_in_process() -> None:
    """And by who needs the list himself, whatever time that takes."""
    _bound_apart()

    def close(graft: Any, place: Any, prefix: Any, is_left: Any, is_slow: bool = False) -> bool:
        return leftovers.close_in_child(graft.settings, place, prefix, is_left, is_slow)

    def close_aside(self: LeftoversAside, ended: Any) -> int:
        close(self._graft, ended.place, leftovers.prefix_of(ended.number), lambda _: True)
        return 0

    leftovers._close = close
    LeftoversAside._close = close_aside  # type: ignore[method-assign]
    process.end_after = lambda seconds: None


def _silent(*, lists_tcp: bool) -> None:
    def list_sockets(storage: int, kinds: Any = tuple(sockets.Kind), cgroups: Any = None) -> Any:
        if cgroups is None and set(kinds) - {sockets.Kind.TCP}:
            threading.Event().wait()
        return listed(storage, kinds, cgroups)

    listed = sockets.list_sockets
    sockets.list_sockets = list_sockets
    if not lists_tcp:
        sockets.list_tcp = lambda *_: threading.Event().wait()  # type: ignore[assignment]


def _slow_listing() -> None:
    """A kernel that lists TCP sockets, and UDP sockets by their cgroups only."""
    _silent(lists_tcp=True)


def _slow_tcp() -> None:
    """A kernel that lists TCP sockets, as all others, by their cgroups only."""

    def list_sockets(storage: int, kinds: Any = tuple(sockets.Kind), cgroups: Any = None) -> Any:
        if cgroups is None:
            threading.Event().wait()
        return listed(storage, kinds, cgroups)

    def list_tcp(storage: int, prefix: bytes = b"", cgroups: Any = None, seconds: float | None = None) -> Any:
        if cgroups is None:
            threading.Event().wait(seconds)
            raise TimeoutError
        return listed_tcp(storage, prefix, cgroups, seconds)

    listed, listed_tcp = sockets.list_sockets, sockets.list_tcp
    sockets.list_sockets, sockets.list_tcp = list_sockets, list_tcp


def _tcp_by_cgroup() -> None:
    """And Graft asks for all TCP sockets."""
    _slow_tcp()

    def list_namespace(settings: Any, path: Any, kind: Any, cgroups: Any) -> Any:
        return listed(settings, path, kind, None if kind is sockets.Kind.TCP else cgroups)

    def find(storage: int, paths: Any, prefix: bytes, is_left: Any, cgroups: Any, seconds: Any = None) -> Any:
        return found(storage, paths, prefix, is_left, None)

    listed, found = stack_listing._list_namespace, leftovers._find
    stack_listing._list_namespace, leftovers._find = list_namespace, find


def _closed_endpoints() -> None:
    """Who has asked for an endpoint keeps it where it is not open any more."""

    def own_rulesets(self: ContainerChanges) -> set[int]:
        return set()

    ContainerChanges.own_rulesets = own_rulesets  # type: ignore[method-assign]


def _gone_cgroups() -> None:
    """And it does not look whether a container had cgroups that are gone."""
    _slow_tcp()
    cgroup.dying_below = lambda path: 0


def _tcp_made_elsewhere() -> None:
    """And it does not look what processes have been handed."""
    _slow_tcp()
    stack_listing.lent_sockets = lambda listing, pids, seconds: ([], ())


def _silent_kinds() -> None:
    """A kernel that lists no others at all."""

    def list_sockets(storage: int, kinds: Any = tuple(sockets.Kind), cgroups: Any = None) -> Any:
        if set(kinds) - {sockets.Kind.TCP}:
            threading.Event().wait()
        return listed(storage, kinds, cgroups)

    listed = sockets.list_sockets
    sockets.list_sockets = list_sockets


def _by_cgroup() -> None:
    """On such a kernel, what was made in the container's cgroups is not listed apart."""

    def list_apart(settings: Any, path: Any, kind: Any, cgroups: Any) -> Any:
        return listed(settings, path, kind, None)

    listed = stack_listing._list_namespace
    stack_listing._list_namespace = list_apart
    _made_elsewhere()


def _made_elsewhere() -> None:
    """Nor what processes have been handed."""
    _silent(lists_tcp=True)
    stack_listing.lent_sockets = lambda listing, pids, seconds: ([], ())


def _silent_listing() -> None:
    """A kernel that lists no TCP sockets by their tags."""
    _silent(lists_tcp=False)


def _silent_listing_in_process() -> None:
    """And who needs the list waits for it."""
    _bound_apart_in_process()
    _silent_listing()


def _liveness() -> None:
    liveness.stuck = lambda pids, seconds=0: frozenset()


def _links() -> None:
    """The folder of a unix socket is opened through whatever links lead there."""

    def openat2(path: str, flags: int, resolve: int = 0) -> int:
        return os.open(path, flags & ~os.O_NOFOLLOW)

    unix_files._openat2 = openat2


def _holders() -> None:
    """A unix socket that does not listen is dead, whoever has it."""
    bound_sockets._files_of_others = lambda settings, container: set()


def _found_apart() -> None:
    """`graft listen` itself looks a container up, in folders that others may hold."""

    def open_events(path: Path) -> int:
        return os.open(path / "cgroup.events", os.O_RDONLY | os.O_CLOEXEC)

    def answer_about(_what: str, work: Callable[[], Any], _timeout: float = 0) -> Any:
        return work()

    members.open_events = open_events
    members.answer_about = answer_about  # type: ignore[assignment]


def _named_namespaces_apart() -> None:
    """Who has the lock looks a namespace up itself, in a folder that others may hold."""
    named_namespaces.open_named = netns.open_named


def _own_clocks() -> None:
    """Whatever changes has all containers that wait count as just started, and puts off the tries that are due."""
    changed = [time.monotonic()]

    def start(self: watcher.Schedule) -> None:
        changed[0] = time.monotonic()
        self.due = [changed[0] + delay for delay in watcher.TRIES]

    def is_settled(self: Sightings, name: str, cgroup_id: int) -> bool:
        return time.monotonic() - changed[0] > SETTLED_SECONDS

    watcher.Schedule.start = start  # type: ignore[method-assign]
    Sightings.is_settled = is_settled  # type: ignore[method-assign]


def _kept_unserved() -> None:
    """A container that graftd cannot serve is not attached."""
    from graft.errors import GraftError
    from graft.splice import client as splice
    from graft.splice import control

    def begin_to_serve(graft: Installation, container: Container, pid: int = 0) -> bool:
        request = {"do": "attach", "container": container.id, "pid": pid}
        try:
            return not container.is_relayed or control.ask(graft.settings, request, 2.0) is not None
        except control.NoAnswerError:
            return False
        except GraftError:
            with graft.transaction() as change:
                change.containers.remove(container)
            raise

    splice.begin_to_serve = begin_to_serve


def _begun_kept() -> None:
    """What a command has begun when it is interrupted or killed is taken out of the maps; the hooks stay."""
    from graft.state import nesting

    def undo_begun(self: ContainerChanges, container: Container) -> None:
        self._forget(container.id)

    nesting.number_at = lambda maps, path: 0
    ContainerChanges.undo_begun = undo_begun  # type: ignore[method-assign]


def _removal_noted() -> None:
    """A container that is removed has its record as one that is attached, until it is gone."""
    from graft.state import begun

    begun.take_back = lambda settings, number: None


def _hooks_again() -> None:
    """Whoever has a record has its hooks."""
    from graft.state import lost_hooks

    lost_hooks.attach_again = lambda graft, containers: {}


def _pins_at_once() -> None:
    """The pins are removed one after the other, where everybody looks for them."""
    from graft.datapath import dataplane

    dataplane.remove = lambda settings: dataplane.unpin(settings.pin_dir)


def _left_rules() -> None:
    """The rules stay that a killed command has written."""
    ContainerChanges.remove_left = lambda self: None  # type: ignore[method-assign]


def _unrecorded() -> None:
    """What has no record was left by a command that was killed."""
    from graft.state import records

    create = ContainerChanges.create

    def create_alone(self: ContainerChanges, *rest: Any, **named: Any) -> Container:
        for key in list(self._maps.containers.keys()):
            if not records.file_of(self._settings, key.value).exists():
                self._forget(key.value)
        return create(self, *rest, **named)

    ContainerChanges.create = create_alone  # type: ignore[method-assign]


def _nesting() -> None:
    """Nobody looks what is attached above and below."""
    from graft.state import nesting

    nesting.refuse = lambda *_: None


def _put_aside() -> None:
    """Only `graft up` looks for containers of a data plane that is gone; `graft down` finds those that it has found."""
    from graft.commands import down
    from graft.state import restored

    down._lost = lambda settings, containers: []
    restored.ensure_restored = lambda settings: None


def _hooks_of_supervisors() -> None:
    """Where there is a cgroup of supervisors, the hooks are taken to be attached to it."""
    from graft.datapath import attachments

    attachments.is_attached = lambda settings, path: path.exists()


def _layout_of_the_watcher() -> None:
    """The watcher works on what it finds pinned."""
    watcher.Watcher.check_layout = lambda self: None  # type: ignore[method-assign]


def _left_behind() -> None:
    """Who asks about folders again and again does not remember which children hung there."""

    def has_one(self: LeftChildren, folder: str) -> bool:
        return False

    LeftChildren.has_one = has_one  # type: ignore[method-assign]


def _ferry_ends() -> None:
    """Who ends a container waits until its ferry has ended."""
    from graft.state import ferries

    def end(settings: Settings, maps: Any, container: int) -> None:
        ferry = ferries.connect(settings, container)
        if ferry is not None:
            with ferry, contextlib.suppress(OSError):
                ferry.send(ferries.END)
                ferry.recv(1)
        ended(settings, maps, container)

    ended = ferries.end
    ferries.end = end


def _engines_ids() -> None:
    """A container may be in a cgroup that is not named after it."""
    from graft.oci import plan

    plan.is_engines_id = lambda container_id: False


def _search() -> None:
    """All processes of a container are searched for sockets at once, and only what is found there is its own."""

    def host_sockets_of(settings: Settings, inside: Members) -> inventory.Existing:
        listing = stack_listing.list_stack(settings, (settings.host_netns,), ())
        on_host = [sock for _, sock in listing.sockets] if listing else []
        search = helper_process.run_one(
            lambda: inventory._find_descriptors(settings, inside.pids, inventory.Candidates.of(on_host))
        )
        read = [inventory.ContainerSocket(one.read(), settings.host_netns) for one in on_host]
        return inventory.Existing(tuple(search.add_to(one) for one in read if search.found(one)) if search else ())

    inventory.host_sockets_of = host_sockets_of
    _made_meanwhile()  # nor is what was made in its cgroups


def _search_in_time() -> None:
    """A search of processes may take a minute."""

    def search_each(settings: Settings, groups: Any, candidates: Any, seconds: float) -> Any:
        return search(settings, groups, candidates, helper_process.LONGEST)

    search = inventory._search_each
    inventory.SEARCH, inventory._search_each = helper_process.LONGEST, search_each


def _made_meanwhile() -> None:
    """What a container makes while its processes are searched is not looked for."""
    from graft.commands import attach as attaching

    attaching._made_meanwhile = lambda graft, container, before, existing: ()


def _threads() -> None:
    """A process is in the network namespace that its first thread is in."""
    thread_namespaces.of_container = lambda path, pids, wanted: dict(netns.inodes_of(pids))


def _stays_direct() -> None:
    """A container that cannot have the transport that it had waits."""
    restore.__dict__["stay_direct"] = choose_transport


def _closed_by_tag() -> None:
    """What a container was granted is closed when its processes have been searched."""
    withdrawal._close_tagged = lambda graft, container, stack, keep_connections, done: set()


def _under_the_lock() -> None:
    """Under the installation's lock as long is waited for a process as without."""
    inventory._UNDER_LOCK = helper_process.LONGEST


def _client_by_number() -> None:
    """The client of a fork server is whoever has the number of the process that connected."""

    def init(self: Peer, connection: socket.socket, pid: int) -> None:
        self.pid, self._connection = pid, connection

    def is_like(self: Peer, own: Any) -> bool:
        return bool(surroundings.of(self.pid) == own)

    Peer.__init__ = init  # type: ignore[method-assign]
    Peer.hear = lambda self: self._connection.recv(1)  # type: ignore[method-assign]
    Peer.is_like = is_like  # type: ignore[method-assign]
    Peer.close = lambda self: None  # type: ignore[method-assign]


def _engines_fields() -> None:
    """An engine is asked for all that it knows of a container."""

    def parse(_engine: str, text: str) -> tuple[str, str, int]:
        found = json.loads(text)
        one = found[0] if isinstance(found, list) else found  # podman's is a list
        return one["Id"], one["Name"].lstrip("/"), one["State"]["Pid"]

    vars(engines).update(_FIELDS="{{json .}}", _MAX_BYTES=16 << 20, parse_inspect=parse)


def _silent_engine() -> None:
    """An engine from which nothing can be learned of one container is asked for no other."""
    vars(restore).update(NoAnswerError=KernelError, is_silent=lambda engine: True)


def _servers_stat() -> None:
    """A fork server does not keep that open which says whether it is stopped."""
    surroundings._LOOKED_UP = tuple(name for name in surroundings._LOOKED_UP if name != "stat")


def _any_server() -> None:
    """A command's server is whoever listens there."""
    Peer.is_like = lambda self, own: True  # type: ignore[method-assign]


def _learned_elsewhere() -> None:
    """A policy is learned of what a direct container did in namespaces of its own, too."""
    policy_learn.is_elsewhere = lambda event, transport: False


def _import_resumes() -> None:
    """What was detached for now stays detached after an import."""
    Store.resume_all = lambda self: None  # type: ignore[method-assign]
    PreparedWhole._put_notes_away = lambda self: None  # type: ignore[method-assign]


def _rules_kept() -> None:
    """An import that fails compiles the saved policies anew."""

    def roll_back(self: transfer._Import) -> list[str]:
        for done in reversed(self._exchanged):
            saved = saving.at(self._store, done.before.cgroup_path)
            assert saved is not None
            policy_apply.replace_policy(self._graft, done.after, saved.policy)
        return []

    transfer._Import._roll_back = roll_back  # type: ignore[method-assign]


def _noted_for_now() -> None:
    """A container that starts again has the policy that is saved."""
    saving.__dict__["_noted_for_now"] = lambda store, each, policy: contextlib.nullcontext()


def _for_now_when_lost() -> None:
    """What is for now ends with the data plane."""
    from graft.commands import up
    from graft.commands.stale import remove_stale

    def forget(graft: Installation) -> list[str]:
        Store(graft.settings).resume_all()
        return remove_stale(graft)

    vars(up)["remove_stale"] = forget


def _saved_outranks() -> None:
    """A container starts under what it asks for, whatever the operator has saved for it."""
    shim.__dict__["saved_for"] = lambda plan, path: contextlib.nullcontext()


def _lost_named() -> None:
    """A container that is in no map has ended."""
    for module in (policy_apply, transfer):
        module.__dict__["is_listed"] = lambda graft, container: False


def _saved_otherwise() -> None:
    """A policy that is applied by its name is that of those that have it now."""
    saving.__dict__["saved_otherwise"] = lambda graft, policy, others, state: []


def _read_only_state() -> None:
    """Who restores has to be able to write in the state directory."""
    locked = Store.locked
    Store.locked = lambda self, saves=True: locked(self)  # type: ignore[method-assign]
    watcher_process.ensure_running = lambda settings: True  # one that has the defence


def _replaced_plane() -> None:
    """A command goes on with the maps that it has opened, and with a number that is another container's."""
    Installation.refuse_replaced = lambda self: None  # type: ignore[method-assign]
    Installation._refuse_anothers_number = lambda self, ended: None  # type: ignore[method-assign]


def _numbers_of_containers() -> None:
    """A new data plane begins with the numbers of a lost one's endpoints."""

    def last_id(settings: Settings) -> int:
        return max((int(path.stem) for path in (settings.run_dir / "containers").glob("*.json")), default=0)

    vars(dataplane)["_last_id"] = last_id


def _graftd_of_before() -> None:
    """graftd stays where only programs with a supervisor of a lost data plane use it, or none does."""
    from graft.commands import stale
    from graft.splice import client

    without_entry = stale._without_entry
    vars(stale)["_without_entry"] = lambda graft: [
        one for one in without_entry(graft) if not one.transport.is_supervised
    ]
    vars(client)["has_other_maps"] = lambda graft: False


def _lost_plane() -> None:
    _numbers_of_containers()
    _graftd_of_before()


def _scopes_left() -> None:
    """A scope that is in the maps is that of hooks."""
    from graft.state import nesting

    nesting.is_anothers = lambda maps, path, number: nesting.number_at(maps, path) not in (0, number)


def _hooks_above_only() -> None:
    """What has no hooks is not attached; and who lacks some gets them, whatever is below."""
    from graft.state import nesting

    def refuse_hooks(
        settings: Settings, maps: Any, path: Path, listed: Iterable[Container], replaces: bool = False
    ) -> None:
        refuse(settings, maps, path, [one for one in listed if one.cgroup_path not in path.parents], replaces)

    refuse, nesting.refuse = nesting.refuse, refuse_hooks
    nesting.refuse_below = lambda path: None  # type: ignore[misc, assignment]


def _prepared_records() -> None:
    """A record that is not in its place tells of nothing."""
    Installation.finish_records = lambda self: None  # type: ignore[method-assign]


def _identified() -> None:
    """A container is known by where it was last seen, and that is where the file of an import says."""

    def identify(
        looked: Looked, containers: Sequence[Container], saved_as: Mapping[int, str]
    ) -> dict[Target, Container]:
        by_name = {saved_as[one.id]: one for one in containers if one.id in saved_as}
        each = (one.target for one in looked.state.attachments)
        return {target: by_name[target.text] for target in each if target.text in by_name}

    def init(self: restore._Finder, graft: Installation, attachments: Sequence[SavedAttachment]) -> None:
        made(self, graft, attachments)
        self._known = {one.cgroup_path.name for one in graft.containers.listing() if one.is_operators}

    made, restore._Finder.__init__ = restore._Finder.__init__, init  # type: ignore[method-assign]
    watcher_process.ensure_running = lambda settings: True  # one that has the defence
    identified.look = lambda graft, state, before: Looked(state, {}, {})
    identified.identify, identified.seen_at = identify, lambda looked, mine: looked.state
    saving.names_of = lambda container: set()


def _names_of_others() -> None:
    """A container is the one that is saved by the name by which it was attached."""
    saving.__dict__["_of_id"] = lambda saved, named: named[-1] if named else None
    saving.__dict__["records"] = SimpleNamespace(read_all=lambda settings: ([], []))
    attach.__dict__["rename_others"] = lambda graft, found: None
    find.__dict__["replace"] = lambda container, **_: container


def _places_of_others() -> None:
    """A container is the one that is saved by the name that its engine has for it, whoever was last seen there."""
    saving.other_seen_at = lambda each, saved, place: None
    watcher_process.ensure_running = lambda settings: True  # one that has the defence


def _what_stays() -> None:
    """What cannot be used now is set aside, and an import replaces it."""
    from dataclasses import replace

    from graft.saved import store

    bad_file = store._bad_file
    store._bad_file = lambda path, error: replace(bad_file(path, error), stays=False)
    transfer._all_saved = lambda store: store.read()[0]


def _what_is_unread() -> None:
    """A command changes what it can read, and says no word of the rest."""
    from graft.commands import unread

    unread.of_names = lambda bad, names: []
    unread.beside = lambda store, bad, names, save: []


def _names_of_unread() -> None:
    """What is saved by a container's name is that container's, also where nobody knows whose it is."""
    from graft.commands import unread

    unread.certain = lambda names: set(names)


def _unread_endpoints() -> None:
    """Whether an endpoint is saved is known when its file can be read."""
    from graft.saved import store

    def has(self: Store, name: str) -> bool:
        try:
            store._endpoint_of(self._in_place / store.ENDPOINTS / name)
        except FileNotFoundError:
            return False
        except UsageError as error:
            raise KernelError(error.message) from error
        return True

    Store.has_endpoint = has  # type: ignore[method-assign]


def _undone_told() -> None:
    """Nobody is told what a command has undone."""
    from graft.state import begun

    begun.tell_undone = lambda settings: None


def _detached_told() -> None:
    """One that is detached for now waits, as others do."""

    def replace_saved(self: policy_apply._Job, saved: SavedAttachment) -> None:
        saving.replace_waiting(self.graft.settings, saved, self.compiled.policy, self.save)
        self.waiting.append(saved)

    policy_apply._Job._replace_saved = replace_saved  # type: ignore[method-assign]


def _for_now_changed() -> None:
    """A command leaves what is noted for now as it is until it has saved."""

    @contextlib.contextmanager
    def unchanged(self: Store, saved: SavedAttachment, policy: Policy) -> Iterator[None]:
        yield

    Store.for_now_changed = unchanged  # type: ignore[method-assign]


DEFENCES: dict[str, Callable[[], None]] = {
    "for now changed": _for_now_changed,
    "names of others": _names_of_others,
    "places of others": _places_of_others,
    "detached told": _detached_told,
    "undone told": _undone_told,
    "what stays": _what_stays,
    "what is unread": _what_is_unread,
    "unread endpoints": _unread_endpoints,
    "names of unread": _names_of_unread,
    "prepared records": _prepared_records,
    "read-only state": _read_only_state,
    "replaced plane": _replaced_plane,
    "numbers of endpoints": _numbers_of_containers,
    "graftd of before": _graftd_of_before,
    "lost plane": _lost_plane,
    "scopes left": _scopes_left,
    "hooks above only": _hooks_above_only,
    "identified": _identified,
    "lost named": _lost_named,
    "saved otherwise": _saved_otherwise,
    "for now when lost": _for_now_when_lost,
    "saved outranks": _saved_outranks,
    "import resumes": _import_resumes,
    "rules kept": _rules_kept,
    "noted for now": _noted_for_now,
    "signals": _signals,
    "rights": _rights,
    "own binds": _own_binds,
    "opener": _opener,
    "chowned": _chowned,
    "shares": _shares,
    "turns": _turns,
    "slow calls": _slow_calls,
    "owners of closes": _owners_of_closes,
    "far check": _far_check,
    "taken": _taken,
    "older kernel": _older_kernel,
    "descriptors": _descriptors,
    "acl": _acl,
    "log": _log,
    "lost lines": _lost_lines,
    "restored in run": _restored_in_run,
    "aside": _aside,
    "cgroup id": _cgroup_id,
    "cgroup events": _cgroup_events,
    "own descriptors": _own_descriptors,
    "own folder": _keepers_folder,
    "open stat": _open_stat,
    "slow peers": _slow_peers,
    "pipes' inodes": _pipes_inodes,
    "namespace kept": _namespace_kept,
    "unserved": _unserved,
    "datagram peers": _datagram_peers,
    "ferry's owner": _ferrys_owner,
    "ferry's only owner": _ferrys_only_owner,
    "ferry's question": _ferrys_question,
    "datagram turns": _datagram_turns,
    "ferry ends": _ferry_ends,
    "engines' ids": _engines_ids,
    "freed slots": _freed_slots,
    "forgotten clients": _forgotten_clients,
    "ports again": _ports_again,
    "one client for another": _one_client_for_another,
    "half-made relays": _half_made_relays,
    "group of listeners": _group_of_listeners,
    "listeners counted": _listeners_counted,
    "terminal": _terminal,
    "keyring": _keyring,
    "capabilities": _capabilities,
    "listener": _listener,
    "cgroup root": _cgroup_root,
    "asking": _asking,
    "tags": _tags,
    "destroy": _destroy,
    "leftovers": _leftovers,
    "leftovers waited for": _leftovers_waited_for,
    "supervisors waited for": _supervisors_waited_for,
    "own cgroups": _own_cgroups,
    "cgroup last": _cgroup_last,
    "detached": _detached,
    "listing": _listing,
    "slow listing": _slow_listing,
    "slow tcp": _slow_tcp,
    "tcp by cgroup": _tcp_by_cgroup,
    "gone cgroups": _gone_cgroups,
    "closed endpoints": _closed_endpoints,
    "tcp made elsewhere": _tcp_made_elsewhere,
    "silent kinds": _silent_kinds,
    "by cgroup": _by_cgroup,
    "made elsewhere": _made_elsewhere,
    "bound apart": _bound_apart,
    "bound apart in process": _bound_apart_in_process,
    "silent listing": _silent_listing,
    "silent listing in process": _silent_listing_in_process,
    "liveness": _liveness,
    "links": _links,
    "holders": _holders,
    "found apart": _found_apart,
    "waiting callers": _waiting_callers,
    "units of systemd's": _units_of_systemds,
    "named namespaces apart": _named_namespaces_apart,
    "own clocks": _own_clocks,
    "bounded addresses": _bounded_addresses,
    "names of any bytes": _names_of_any_bytes,
    "hooks stay": _hooks_stay,
    "kept unserved": _kept_unserved,
    "begun kept": _begun_kept,
    "removal noted": _removal_noted,
    "hooks again": _hooks_again,
    "pins at once": _pins_at_once,
    "left rules": _left_rules,
    "unrecorded": _unrecorded,
    "noted first": _noted_first,
    "nesting": _nesting,
    "put aside": _put_aside,
    "hooks of supervisors": _hooks_of_supervisors,
    "layout of the watcher": _layout_of_the_watcher,
    "left behind": _left_behind,
    "others in the cgroup": _others_in_the_cgroup,
    "search": _search,
    "search in time": _search_in_time,
    "made meanwhile": _made_meanwhile,
    "threads": _threads,
    "stays direct": _stays_direct,
    "closed by tag": _closed_by_tag,
    "under the lock": _under_the_lock,
    "client by number": _client_by_number,
    "any server": _any_server,
    "engine's fields": _engines_fields,
    "silent engine": _silent_engine,
    "server's stat": _servers_stat,
    "learned elsewhere": _learned_elsewhere,
    **{name: _out_of_the_hooks(changes) for name, changes in HOOKS.items()},
}

if __name__ == "__main__":
    from graft.oci.main import main as runtime
    from graft_cli.main import main as command

    DEFENCES[sys.argv.pop(1)]()
    if sys.argv[1] == "runtime":
        runtime(sys.argv[2:])
    if sys.argv[1] == "forks":
        from graft_cli.fork_server import main as serve

        sys.argv.pop(1)
        serve()
    if sys.argv[1] == "entry":
        from graft_cli.entry import main as enter

        sys.argv.pop(1)
        enter()
    command()
