// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* Graft's data plane: everything that decides, on the kernel's own copy of an address.
 *
 * Theory of operation
 *
 *   A socket has a home. `container`: the network namespace of the program that made it. `host`: the
 *   host's stack, where a supervisor made it (transport swap) or which the container shares
 *   (transport direct). Nothing here moves a socket; these programs only decide which addresses a socket
 *   may have, and translate between the address that a program requests and the endpoint it was granted.
 *
 *   Which container does a socket belong to? The kernel runs these programs by the cgroup that a socket was
 *   CREATED in, so the cgroup storage `scopes` names the container without trusting the caller. A socket that a
 *   supervisor made was created in the supervisor's cgroup, where the scope is 0: there the socket storage
 *   `tags` names the container. A socket of neither kind is not Graft's, and is passed unchanged.
 *
 *   bind     host-homed: only an address that an ingress rule names, rewritten to its endpoint.
 *   connect  host-homed: only a destination that an egress rule grants, from that rule's endpoint.
 *   both     container-homed: the container's default (leave it alone, or refuse).
 *   direct   the container shares the host's namespace, so all its sockets there are host-homed, tagged or
 *            not, and the default decides what no rule names.
 *   listen   has no hook that can refuse. A host-homed listener receives nothing until the hook has checked that it
 *            is bound to its endpoint; one that is not is also bound to an interface that cannot exist.
 *   packets  of host-homed sockets, both directions: to a listener that was not granted, and from a socket in a
 *            way that no hook on a system call sees (packet.bpf.c).
 *
 *   Every refusal is EACCES where the kernel lets a program choose (5.18), else EPERM.
 */
#include <linux/types.h>
#include "graft.h"

#ifndef __always_inline
#define __always_inline inline __attribute__((always_inline))
#endif

#define PASS 1
#define REFUSE 0
/* Bit 1 of a bind program's return value permits a port below 1024: the operator granted
 * the endpoint, so the program needs no CAP_NET_BIND_SERVICE for it (kernel 5.12, bpf-cgroup.h). */
#define PASS_ANY_PORT 3

#define AF_INET 2
#define AF_INET6 10
#define EACCES 13
#define EINVAL 22
#define EADDRINUSE 98
#define EADDRNOTAVAIL 99
#define ECONNREFUSED 111
#define IPPROTO_ICMP 1
#define IPPROTO_TCP 6
#define IPPROTO_UDP 17
#define IPPROTO_ICMPV6 58
#define IPPROTO_MPTCP 262
#define SOCK_STREAM 1
#define SOCK_DGRAM 2
#define SOL_SOCKET 1
#define SO_REUSEPORT 15

/* ---- maps -------------------------------------------------------------------------------------- */

BPF_ARRAY(settings, struct settings, 1);
BPF_HASH(endpoints, u32, struct endpoint, GRAFT_MAX_ENDPOINTS);
BPF_HASH(endpoint_names, struct endpoint_name, u32, GRAFT_MAX_ENDPOINTS);
BPF_HASH(groups, struct group, u32, GRAFT_MAX_GROUPS);
BPF_HASH(containers, u32, struct container, GRAFT_MAX_CONTAINERS);
BPF_LPM_TRIE(ingress, struct ingress_key, struct ingress_value, GRAFT_MAX_RULES);
BPF_LPM_TRIE(egress, struct egress_key, struct egress_value, GRAFT_MAX_RULES);
BPF_LPM_TRIE(egress_ports, struct egress_port_key, struct egress_port_value, GRAFT_MAX_RULES);
BPF_F_TABLE("hash", struct use, u32, uses, GRAFT_MAX_RULES, BPF_F_NO_PREALLOC);
BPF_HASH(desk_slots, u32, struct desk_slot, GRAFT_MAX_DESKS);
BPF_TABLE("lru_hash", struct counter_key, u64, counters, GRAFT_MAX_COUNTERS);

/* No helper says whether an address is the host's. Commands note those that it has (graft/state/host_addresses.py), and the
 * broadcast addresses of its links. Which of them others send to, the hook for packets notes itself, in a table of its own:
 * others may fill that. */
BPF_F_TABLE("hash", struct host_address, u32, noted_addresses, GRAFT_MAX_NOTED, BPF_F_NO_PREALLOC);
BPF_F_TABLE("hash", struct host_address, u32, broadcasts, GRAFT_MAX_NOTED, BPF_F_NO_PREALLOC);
BPF_TABLE("lru_hash", struct host_address, u32, host_addresses, GRAFT_MAX_HOST_ADDRESSES);

/* By hand: bcc's macro keys cgroup storage by (cgroup, attach type); keyed by the cgroup alone, one
 * entry serves all the programs of a cgroup, and one update switches them together. */
struct scopes_table {
	u64 key;
	struct scope leaf;
	struct scope *(*lookup)(u64 *);
	int (*update)(u64 *, struct scope *);
	void *(*get_local_storage)(u64);
};
__attribute__((section("maps/cgroup_storage"))) struct scopes_table scopes = {};

/* By hand: bcc's macro has no flags, and a desk is mapped into its supervisor's memory. */
struct desks_table {
	int key;
	struct desk leaf;
	struct desk *(*lookup)(u32 *);
	u32 max_entries;
	int flags;
};
__attribute__((section("maps/array"))) struct desks_table desks = {
	.max_entries = GRAFT_MAX_DESKS, .flags = BPF_F_MMAPABLE };
BPF_ANNOTATE_KV_PAIR(desks, int, struct desk);

/* By hand: bcc's macro lacks BPF_F_CLONE, without which an accepted socket has no tag. */
#define SK_STORAGE(_name, _leaf, _flags)                                     \
	struct _name##_table {                                               \
		int key;                                                     \
		_leaf leaf;                                                  \
		void *(*sk_storage_get)(void *, void *, int);                \
		int (*sk_storage_delete)(void *);                            \
		u32 flags;                                                   \
	};                                                                   \
	__attribute__((section("maps/sk_storage"))) struct _name##_table _name = { .flags = (_flags) }; \
	BPF_ANNOTATE_KV_PAIR(_name, int, _leaf)

SK_STORAGE(tags, struct tag, BPF_F_NO_PREALLOC | BPF_F_CLONE);
SK_STORAGE(options, struct options, BPF_F_NO_PREALLOC);
BPF_TABLE("lru_hash", struct server_place, struct server, servers, GRAFT_MAX_SERVERS);

/* Of transport splice (splice.bpf.c). The accepting socket removes its arrival, or graftd, or the connecting socket
 * does when it closes; as a fallback the table evicts the oldest. */
BPF_HASH(relays, u32, struct relay, GRAFT_MAX_CONTAINERS);
BPF_TABLE("lru_hash", struct arrival, struct crossing, arrivals, GRAFT_MAX_ARRIVALS);
SK_STORAGE(crossings, struct crossing, BPF_F_NO_PREALLOC);
SK_STORAGE(former_crossings, struct crossing, BPF_F_NO_PREALLOC);
BPF_F_TABLE("hash", struct exchange_slot, struct exchange, exchanges, GRAFT_MAX_EXCHANGES, BPF_F_NO_PREALLOC);
BPF_F_TABLE("hash", struct exchange_client, u32, exchange_clients, GRAFT_MAX_EXCHANGES, BPF_F_NO_PREALLOC);
BPF_F_TABLE("hash", struct stand_in_key, struct stand_in, stand_ins, GRAFT_MAX_STAND_INS, BPF_F_NO_PREALLOC);
BPF_F_TABLE("hash", struct stand_in_place, u32, stand_in_ports, GRAFT_MAX_STAND_INS, BPF_F_NO_PREALLOC);
BPF_F_TABLE("hash", u32, struct offer, offers, GRAFT_MAX_CONTAINERS, BPF_F_NO_PREALLOC);

/* Of transport swap (ferry.bpf.c). */
BPF_F_TABLE("hash", u32, struct ferry, ferries, GRAFT_MAX_FERRIES, BPF_F_NO_PREALLOC);
BPF_F_TABLE("hash", struct berth_key, struct berth, berths, GRAFT_MAX_BERTHS, BPF_F_NO_PREALLOC);
