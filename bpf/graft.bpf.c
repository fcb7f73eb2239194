// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* Graft's data plane: everything that decides, on the kernel's own copy of an address.
 *
 * Theory of operation
 *
 *   A socket has a home. `container`: the network namespace of the program that made it. `host`: the
 *   host's stack, where a supervisor made it (transport swap) or where the container lives anyway
 *   (transport direct). Nothing here moves a socket; these programs only say which addresses a socket
 *   may have, and translate between the address that a program asks for and the endpoint it was granted.
 *
 *   Whose socket is it? The kernel runs these programs by the cgroup that a socket was BORN in, so the
 *   cgroup storage `scopes` names the container without trusting the caller. A socket that a supervisor
 *   made was born in the supervisor's cgroup, where the scope is 0: there the socket storage `tags` says
 *   for whom it was made. A socket of neither kind is not Graft's, and is let through untouched.
 *
 *   bind     host-homed: only an address that an ingress rule names, rewritten to its endpoint.
 *   connect  host-homed: only a destination that an egress rule grants, from that rule's endpoint.
 *   both     container-homed: the container's default (leave it alone, or refuse).
 *   direct   the container shares the host's namespace, so all its sockets there are host-homed, tagged or
 *            not, and what no rule names is the default's to decide.
 *   listen   has no hook that could refuse. A host-homed listener hears nobody until the hook has seen that it
 *            stands at its endpoint; one that does not is tied to an interface that cannot exist, besides.
 *   packets  of host-homed sockets, both ways: what comes to a listener that nobody granted, and what goes out
 *            by a way that no system call's hook sees (packet.bpf.c).
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
/* Bit 1 of a bind program's return value lets the caller have a port below 1024: the operator granted
 * the endpoint, so the program needs no CAP_NET_BIND_SERVICE for it (kernel 5.12, bpf-cgroup.h). */
#define PASS_ANY_PORT 3

#define AF_INET 2
#define AF_INET6 10
#define EACCES 13
#define EINVAL 22
#define ECONNREFUSED 111
#define IPPROTO_TCP 6
#define IPPROTO_UDP 17
#define IPPROTO_MPTCP 262
#define SOCK_STREAM 1
#define SOCK_DGRAM 2

/* ---- maps -------------------------------------------------------------------------------------- */

BPF_ARRAY(settings, struct settings, 1);
BPF_HASH(endpoints, u32, struct endpoint, GRAFT_MAX_ENDPOINTS);
BPF_HASH(endpoint_names, struct endpoint_name, u32, GRAFT_MAX_ENDPOINTS);
BPF_HASH(containers, u32, struct container, GRAFT_MAX_CONTAINERS);
BPF_LPM_TRIE(ingress, struct ingress_key, struct ingress_value, GRAFT_MAX_RULES);
BPF_LPM_TRIE(egress, struct egress_key, struct egress_value, GRAFT_MAX_RULES);
BPF_LPM_TRIE(egress_ports, struct egress_port_key, struct egress_port_value, GRAFT_MAX_RULES);
BPF_HASH(desk_slots, u32, struct desk_slot, GRAFT_MAX_DESKS);
BPF_TABLE("lru_hash", struct counter_key, u64, counters, GRAFT_MAX_COUNTERS);

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

/* The splice transport's (splice.bpf.c). A relay and a container take every arrival out again, or the
 * socket that made it does when it closes; that the table forgets the oldest is a second line. */
BPF_HASH(relays, u32, struct relay, GRAFT_MAX_CONTAINERS);
BPF_TABLE("lru_hash", struct arrival, struct crossing, arrivals, GRAFT_MAX_ARRIVALS);
SK_STORAGE(crossings, struct crossing, BPF_F_NO_PREALLOC);
