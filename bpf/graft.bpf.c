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
 *   listen   has no hook that could refuse. A host-homed socket that listens on a port that no endpoint
 *            gave it is tied to an interface that cannot exist: it then hears nobody.
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
#define EPERM 1
#define ECONNREFUSED 111
#define IPPROTO_TCP 6
#define IPPROTO_UDP 17
#define IPPROTO_MPTCP 262
#define SOCK_STREAM 1

/* ---- maps -------------------------------------------------------------------------------------- */

BPF_ARRAY(settings, struct settings, 1);
BPF_HASH(endpoints, u32, struct endpoint, GRAFT_MAX_ENDPOINTS);
BPF_HASH(endpoint_names, struct endpoint_name, u32, GRAFT_MAX_ENDPOINTS);
BPF_HASH(containers, u32, struct container, GRAFT_MAX_CONTAINERS);
BPF_LPM_TRIE(ingress, struct ingress_key, struct ingress_value, GRAFT_MAX_RULES);
BPF_LPM_TRIE(egress, struct egress_key, struct egress_value, GRAFT_MAX_RULES);
BPF_LPM_TRIE(egress_ports, struct egress_port_key, struct egress_port_value, GRAFT_MAX_RULES);
BPF_HASH(desk_slots, u32, u32, GRAFT_MAX_DESKS);
BPF_TABLE("lru_hash", struct counter_key, u64, counters, GRAFT_MAX_COUNTERS);
BPF_RINGBUF_OUTPUT(events, 64);

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

/* ---- who, and what was asked ------------------------------------------------------------------- */

/* An address as a hook sees it, IPv4 made plain: ::ffff:1.2.3.4 is family 4 here. */
struct asked {
	u8 addr[16];
	u16 port;
	u8 family;
	u8 protocol;
	u8 mapped;   /* the socket is AF_INET6 and the address IPv4 */
	struct relay *relay; /* transport splice: where a granted connection is turned to */
};

/* The container that a socket belongs to, and where the socket lives. */
struct owner {
	struct container *container; /* NULL: not Graft's, or of a container that is no more */
	struct tag *tag;
	u32 id;
	u8 home;
};

static __always_inline struct tag *tag_of(struct bpf_sock_addr *ctx)
{
	struct tag *tag = tags.sk_storage_get(ctx->sk, 0, 0);

#ifdef GRAFT_HAVE_MPTCP
	/* bind and connect of an MPTCP socket reach the hooks through its first subflow; the tag is
	 * where user space could put it, on the socket that the program holds. */
	if (!tag) {
		void *parent = bpf_skc_to_mptcp_sock(ctx->sk);

		if (parent)
			tag = tags.sk_storage_get(parent, 0, 0);
	}
#endif
	return tag;
}

static __always_inline void owner_of(struct bpf_sock_addr *ctx, struct owner *owner)
{
	struct scope *scope = scopes.get_local_storage(0);

	owner->tag = tag_of(ctx);
	owner->id = owner->tag ? owner->tag->container : scope->container;
	owner->container = owner->id ? containers.lookup(&owner->id) : 0;
	if (owner->tag)
		owner->home = owner->tag->home;
	else if (owner->container && owner->container->transport == GRAFT_TRANSPORT_DIRECT &&
		 owner->container->netns == bpf_get_netns_cookie(ctx))
		owner->home = GRAFT_HOME_HOST;
	else
		owner->home = GRAFT_HOME_CONTAINER; /* also a namespace that a direct container made */
}

/* Whether what no rule names is left alone although the socket is host-homed: in a direct container the
 * host's namespace is the container's own, and its sockets are its own until they hold an endpoint. */
static __always_inline int is_own(struct container *container, struct tag *tag)
{
	return container->transport == GRAFT_TRANSPORT_DIRECT && container->bind_default == GRAFT_DEFAULT_CONTAINER &&
	       !(tag && tag->flags & GRAFT_TAG_BOUND);
}

static __always_inline void asked4(struct bpf_sock_addr *ctx, struct asked *asked)
{
	u32 ip = ctx->user_ip4;

	__builtin_memset(asked, 0, sizeof(*asked));
	__builtin_memcpy(asked->addr, &ip, 4);
	asked->port = bpf_ntohs((u16)ctx->user_port);
	asked->family = GRAFT_IPV4;
	asked->protocol = ctx->protocol;
}

static __always_inline void asked6(struct bpf_sock_addr *ctx, struct asked *asked)
{
	u32 ip[4] = { ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3] };

	__builtin_memset(asked, 0, sizeof(*asked));
	asked->port = bpf_ntohs((u16)ctx->user_port);
	asked->protocol = ctx->protocol;
	if (!ip[0] && !ip[1] && ip[2] == bpf_htonl(0xffff)) {
		__builtin_memcpy(asked->addr, &ip[3], 4);
		asked->family = GRAFT_IPV4;
		asked->mapped = 1;
		return;
	}
	__builtin_memcpy(asked->addr, ip, 16);
	asked->family = GRAFT_IPV6;
}

/* ---- what is told ------------------------------------------------------------------------------ */

static __always_inline void record(struct owner *owner, struct asked *asked, u32 decision, u32 endpoint)
{
	struct counter_key key = { .container = owner->id, .decision = decision };
	u64 *count = counters.lookup(&key);
	u64 one = 1;
	int first = 0;
	struct settings *set = settings.lookup(&first);
	struct event *event;

	if (count)
		__sync_fetch_and_add(count, 1);
	else
		counters.update(&key, &one);
	if (!set || !set->trace)
		return;
	event = events.ringbuf_reserve(sizeof(*event));
	if (!event)
		return;
	event->time = bpf_ktime_get_ns();
	event->container = owner->id;
	event->decision = decision;
	event->pid = bpf_get_current_pid_tgid() >> 32;
	event->endpoint = endpoint;
	__builtin_memcpy(event->addr, asked->addr, 16);
	event->port = asked->port;
	event->family = asked->family;
	event->protocol = asked->protocol;
	event->home = owner->home;
	__builtin_memset(event->zero, 0, sizeof(event->zero));
	bpf_get_current_comm(event->comm, sizeof(event->comm));
	events.ringbuf_submit(event, 0);
}

static __always_inline int refuse(struct owner *owner, struct asked *asked, u32 decision)
{
	record(owner, asked, decision, 0);
#ifdef GRAFT_HAVE_SET_RETVAL
	bpf_set_retval(-EACCES);
#endif
	return REFUSE;
}

/* ---- rules ------------------------------------------------------------------------------------- */

static __always_inline u8 protocol_bit(u8 protocol)
{
	return protocol == IPPROTO_TCP ? GRAFT_TCP : protocol == IPPROTO_UDP ? GRAFT_UDP : 0;
}

/* The id of the endpoint that a bind becomes, 0 where no rule names the address. The exact address
 * first, then "any". */
static __always_inline u32 ingress_rule(struct container *container, struct asked *asked)
{
	struct ingress_key key = {
		.prefixlen = GRAFT_INGRESS_FIXED_BITS + 16,
		.ruleset = container->ruleset,
		.protocol = asked->protocol,
		.family = asked->family,
		.port_be = bpf_htons(asked->port),
	};
	struct ingress_value *found;

	__builtin_memcpy(key.addr, asked->addr, 16);
	found = ingress.lookup(&key);
	if (!found) {
		__builtin_memset(key.addr, 0, 16);
		key.any = 1;
		found = ingress.lookup(&key);
	}
	return found ? found->endpoint : 0;
}

static __always_inline u32 egress_rule(struct container *container, struct asked *asked, u32 *endpoint)
{
	struct egress_key key = {
		.prefixlen = GRAFT_EGRESS_FIXED_BITS + (asked->family == GRAFT_IPV4 ? 32 : 128),
		.ruleset = container->ruleset,
		.protocol = asked->protocol,
		.family = asked->family,
	};
	struct egress_value *node;
	struct egress_port_value *found;

	__builtin_memcpy(key.addr, asked->addr, 16);
	node = egress.lookup(&key);
	if (!node)
		return GRAFT_VERDICT_NONE;

	struct egress_port_key port = {
		.prefixlen = GRAFT_EGRESS_PORT_FIXED_BITS + 16,
		.ruleset = container->ruleset,
		.node = node->node,
		.port_be = bpf_htons(asked->port),
	};
	found = egress_ports.lookup(&port);
	if (!found)
		return GRAFT_VERDICT_NONE;
	*endpoint = found->endpoint;
	return found->verdict;
}

/* The endpoint, if this socket may use it: of its protocol, and in the namespace where the socket is.
 * A socket that was made for one namespace must not follow an endpoint that moved to another. */
static __always_inline struct endpoint *endpoint_for(struct bpf_sock_addr *ctx, struct asked *asked, u32 id)
{
	struct endpoint *endpoint = endpoints.lookup(&id);

	if (!endpoint || !(endpoint->protocols & protocol_bit(asked->protocol)))
		return 0;
	if (endpoint->netns != bpf_get_netns_cookie(ctx))
		return 0;
	return endpoint;
}

/* ---- bind -------------------------------------------------------------------------------------- */

/* What the program asked for is what getsockname will tell it. */
static __always_inline int remember(struct bpf_sock_addr *ctx, struct owner *owner, struct asked *asked, u32 endpoint)
{
	struct tag *tag = owner->tag;

	if (!tag)
		tag = tags.sk_storage_get(ctx->sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!tag)
		return 0;
	tag->container = owner->id;
	tag->home = GRAFT_HOME_HOST;
	tag->endpoint = endpoint;
	tag->family = asked->family;
	tag->port = asked->port;
	__builtin_memcpy(tag->addr, asked->addr, 16);
	return 1;
}

/* Decides a bind. Returns the endpoint to rewrite to, or NULL with *verdict set. */
static __always_inline struct endpoint *decide_bind(struct bpf_sock_addr *ctx, struct asked *asked, int *verdict)
{
	struct owner owner;
	struct endpoint *endpoint;
	u32 id;

	*verdict = PASS;
	owner_of(ctx, &owner);
	if (!owner.id)
		return 0;
	if (!owner.container) {
		/* The container was detached. What it had of the host it may not use again; its own
		 * namespace is no business of ours any more. */
		if (owner.home == GRAFT_HOME_HOST)
			*verdict = refuse(&owner, asked, GRAFT_DECISION_REFUSED_BIND);
		return 0;
	}
	if (owner.home == GRAFT_HOME_CONTAINER) {
		if (owner.container->bind_default == GRAFT_DEFAULT_DENY)
			*verdict = refuse(&owner, asked, GRAFT_DECISION_REFUSED_BIND);
		return 0;
	}
	id = ingress_rule(owner.container, asked);
	if (!id && is_own(owner.container, owner.tag)) {
		/* What an earlier bind asked for that then failed is not this one's address. */
		if (owner.tag)
			tags.sk_storage_delete(ctx->sk);
		return 0;
	}
	endpoint = id ? endpoint_for(ctx, asked, id) : 0;
	if (!endpoint || !remember(ctx, &owner, asked, id)) {
		/* A host-homed socket that no rule gives this address: were it let through, the
		 * container would have a port of the host that nobody granted. */
		*verdict = refuse(&owner, asked, GRAFT_DECISION_REFUSED_BIND);
		return 0;
	}
	*verdict = PASS_ANY_PORT;
	record(&owner, asked, GRAFT_DECISION_REWRITTEN, id);
	return endpoint;
}

int graft_bind4(struct bpf_sock_addr *ctx)
{
	struct asked asked;
	struct endpoint *endpoint;
	int verdict;
	u32 ip;

	asked4(ctx, &asked);
	endpoint = decide_bind(ctx, &asked, &verdict);
	if (!endpoint)
		return verdict;
	if (endpoint->family != GRAFT_IPV4)
		return REFUSE; /* an IPv4 socket cannot have an IPv6 address; `policy check` says so earlier */
	__builtin_memcpy(&ip, endpoint->addr, 4);
	ctx->user_ip4 = ip;
	ctx->user_port = bpf_htons(endpoint->port);
	return verdict;
}

int graft_bind6(struct bpf_sock_addr *ctx)
{
	struct asked asked;
	struct endpoint *endpoint;
	int verdict;
	u32 ip[4] = {};

	asked6(ctx, &asked);
	endpoint = decide_bind(ctx, &asked, &verdict);
	if (!endpoint)
		return verdict;
	if (endpoint->family == GRAFT_IPV4) {
		/* A dual-stack socket takes an IPv4 endpoint as a mapped address. One that is IPv6 only
		 * gets the kernel's own EINVAL for it. */
		ip[2] = bpf_htonl(0xffff);
		__builtin_memcpy(&ip[3], endpoint->addr, 4);
	} else {
		__builtin_memcpy(ip, endpoint->addr, 16);
	}
	ctx->user_ip6[0] = ip[0];
	ctx->user_ip6[1] = ip[1];
	ctx->user_ip6[2] = ip[2];
	ctx->user_ip6[3] = ip[3];
	ctx->user_port = bpf_htons(endpoint->port);
	return verdict;
}

/* Only now is the port really the socket's: a bind that failed (EADDRINUSE) must not leave a socket that
 * counts as bound to its endpoint. (From here there is no way to an MPTCP subflow's parent, whose tag the
 * supervisor marks itself.) */
static __always_inline int mark_bound(struct bpf_sock *ctx)
{
	struct tag *tag = tags.sk_storage_get(ctx, 0, 0);

	if (tag && tag->home == GRAFT_HOME_HOST && tag->endpoint)
		tag->flags |= GRAFT_TAG_BOUND;
	return PASS;
}

int graft_post_bind4(struct bpf_sock *ctx)
{
	return mark_bound(ctx);
}

int graft_post_bind6(struct bpf_sock *ctx)
{
	return mark_bound(ctx);
}

/* ---- connect and send -------------------------------------------------------------------------- */

/* Whether the source of this socket stands already, so that it is not given the endpoint's: it holds an
 * endpoint, or an address of its own where it may, or it left from this endpoint before. (A socket that
 * sends has a port at least: the kernel gave it one before it asked us.) */
static __always_inline int has_source(struct bpf_sock_addr *ctx, struct owner *owner, struct endpoint *endpoint,
				      int sending)
{
	struct bpf_sock *sk = ctx->sk;
	u32 at4 = sk->src_ip4;
	u32 at[4] = { sk->src_ip6[0], sk->src_ip6[1], sk->src_ip6[2], sk->src_ip6[3] };
	u32 ip[4];

	/* Read here and now: the verifier takes no pointer that a compiler moved to save a load. */
	asm volatile("" : "+r"(at4), "+r"(at[0]), "+r"(at[1]), "+r"(at[2]), "+r"(at[3]));
	if (owner->tag && owner->tag->flags & GRAFT_TAG_BOUND)
		return 1;
	if (!sk->src_port)
		return 0;
	if (is_own(owner->container, owner->tag) && (!sending || at4 || at[0] || at[1] || at[2] || at[3]))
		return 1;
	if (endpoint->port && endpoint->port != sk->src_port)
		return 0;
	__builtin_memcpy(ip, endpoint->addr, 16);
	if (endpoint->family == GRAFT_IPV4)
		return ip[0] == at4;
	return ip[0] == at[0] && ip[1] == at[1] && ip[2] == at[2] && ip[3] == at[3];
}

/* Transport splice: a granted connection goes to Graft's relay inside the container's namespace, which
 * makes it from the endpoint; what was asked for is remembered with the socket. */
static __always_inline int turn(struct bpf_sock_addr *ctx, struct owner *owner, struct asked *asked)
{
	struct crossing *crossing;

	asked->relay = relays.lookup(&owner->id);
	if (!asked->relay) {
		/* No daemon serves this container now. Let go on, the connection would take a way that the
		 * operator did not mean. */
#ifdef GRAFT_HAVE_SET_RETVAL
		bpf_set_retval(-ECONNREFUSED);
#endif
		return REFUSE;
	}
	crossing = crossings.sk_storage_get(ctx->sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!crossing) {
		asked->relay = 0;
		return REFUSE;
	}
	__builtin_memcpy(crossing->addr, asked->addr, 16);
	crossing->port = asked->port;
	crossing->family = asked->family;
	crossing->role = GRAFT_CROSSING_TURNED;
	crossing->container = owner->id;
	return PASS;
}

/* Decides a destination. Returns the endpoint to leave from, or NULL with *verdict set. */
static __always_inline struct endpoint *decide_destination(struct bpf_sock_addr *ctx, struct asked *asked, int *verdict,
							   int sending)
{
	struct owner owner;
	struct endpoint *endpoint;
	u32 rule, id = 0;

	*verdict = PASS;
	owner_of(ctx, &owner);
	if (!owner.id)
		return 0;
	if (!owner.container) {
		if (owner.home == GRAFT_HOME_HOST)
			*verdict = refuse(&owner, asked, GRAFT_DECISION_REFUSED_CONNECT);
		return 0;
	}
	rule = egress_rule(owner.container, asked, &id);
	if (rule == GRAFT_VERDICT_DENY) {
		*verdict = refuse(&owner, asked, GRAFT_DECISION_REFUSED_CONNECT);
		return 0;
	}
	if (owner.home == GRAFT_HOME_CONTAINER) {
		if (owner.container->transport == GRAFT_TRANSPORT_SPLICE && asked->protocol == IPPROTO_TCP) {
			if (rule == GRAFT_VERDICT_GRANT && bpf_get_netns_cookie(ctx) == owner.container->netns) {
				*verdict = turn(ctx, &owner, asked);
				return 0;
			}
			crossings.sk_storage_delete(ctx->sk); /* of a connect before that failed */
		}
		/* Also where a rule grants the destination: this socket was not swapped (a 32-bit or
		 * io_uring call), so it goes nowhere but where the container's own namespace goes. */
		if (rule != GRAFT_VERDICT_CONTAINER && owner.container->connect_default == GRAFT_DEFAULT_DENY)
			*verdict = refuse(&owner, asked, GRAFT_DECISION_REFUSED_CONNECT);
		return 0;
	}
	if (rule != GRAFT_VERDICT_GRANT) {
		/* direct: the host's namespace is the container's own, so its default applies. A swapped
		 * socket has left the container's namespace, and has no right of its own out here. */
		if (owner.container->transport != GRAFT_TRANSPORT_DIRECT ||
		    (rule == GRAFT_VERDICT_NONE && owner.container->connect_default == GRAFT_DEFAULT_DENY))
			*verdict = refuse(&owner, asked, GRAFT_DECISION_REFUSED_CONNECT);
		return 0;
	}
	endpoint = endpoint_for(ctx, asked, id);
	if (!endpoint) {
		*verdict = refuse(&owner, asked, GRAFT_DECISION_REFUSED_CONNECT);
		return 0;
	}
	record(&owner, asked, GRAFT_DECISION_CONNECTED, id);
	return has_source(ctx, &owner, endpoint, sending) ? 0 : endpoint;
}

int graft_connect4(struct bpf_sock_addr *ctx)
{
	struct asked asked;
	struct endpoint *from;
	struct sockaddr_in {
		u16 family;
		u16 port_be;
		u32 ip;
		u64 zero;
	} source = { .family = AF_INET };
	int verdict;

	asked4(ctx, &asked);
	from = decide_destination(ctx, &asked, &verdict, 0);
	if (asked.relay) {
		ctx->user_ip4 = bpf_htonl(0x7f000001);
		ctx->user_port = bpf_htons(asked.relay->port);
		return PASS;
	}
	if (!from)
		return verdict;
	__builtin_memcpy(&source.ip, from->addr, 4);
	source.port_be = bpf_htons(from->port);
	if (from->family != GRAFT_IPV4)
		return REFUSE;
	if ((source.ip || source.port_be) && bpf_bind(ctx, (struct sockaddr *)&source, sizeof(source)))
		return REFUSE;
	return verdict;
}

int graft_connect6(struct bpf_sock_addr *ctx)
{
	struct asked asked;
	struct endpoint *from;
	struct sockaddr_in6 {
		u16 family;
		u16 port_be;
		u32 flowinfo;
		u32 ip[4];
		u32 scope;
	} source = { .family = AF_INET6 };
	int verdict;

	asked6(ctx, &asked);
	from = decide_destination(ctx, &asked, &verdict, 0);
	if (asked.relay) {
		int plain = !asked.mapped && asked.relay->six; /* ::1, else ::ffff:127.0.0.1 */

		ctx->user_ip6[0] = 0;
		ctx->user_ip6[1] = 0;
		ctx->user_ip6[2] = plain ? 0 : bpf_htonl(0xffff);
		ctx->user_ip6[3] = plain ? bpf_htonl(1) : bpf_htonl(0x7f000001);
		ctx->user_port = bpf_htons(asked.relay->port);
		return PASS;
	}
	if (!from)
		return verdict;
	if (from->family == GRAFT_IPV4) {
		source.ip[2] = bpf_htonl(0xffff);
		__builtin_memcpy(&source.ip[3], from->addr, 4);
	} else {
		__builtin_memcpy(source.ip, from->addr, 16);
	}
	source.port_be = bpf_htons(from->port);
	if ((from->family == GRAFT_IPV4) != (asked.family == GRAFT_IPV4))
		return REFUSE;
	if (!source.ip[0] && !source.ip[1] && !source.ip[3] && !source.port_be)
		return verdict;
	if (bpf_bind(ctx, (struct sockaddr *)&source, sizeof(source)))
		return REFUSE;
	return verdict;
}

/* An unconnected datagram names its destination each time, and its source address can be set for it alone.
 * Its source port cannot: an endpoint with a port of its own serves sockets that are bound or connected. */
int graft_sendmsg4(struct bpf_sock_addr *ctx)
{
	struct asked asked;
	struct endpoint *from;
	int verdict;
	u32 ip;

	asked4(ctx, &asked);
	from = decide_destination(ctx, &asked, &verdict, 1);
	if (!from)
		return verdict;
	if (from->family != GRAFT_IPV4 || from->port)
		return REFUSE;
	__builtin_memcpy(&ip, from->addr, 4);
	if (ip)
		ctx->msg_src_ip4 = ip;
	return verdict;
}

int graft_sendmsg6(struct bpf_sock_addr *ctx)
{
	struct asked asked;
	struct endpoint *from;
	int verdict;
	u32 ip[4];

	asked6(ctx, &asked);
	from = decide_destination(ctx, &asked, &verdict, 1);
	if (!from)
		return verdict;
	/* Towards a mapped destination the kernel asks graft_sendmsg4. */
	if (from->family != GRAFT_IPV6 || from->port)
		return REFUSE;
	__builtin_memcpy(ip, from->addr, 16);
	if (ip[0] | ip[1] | ip[2] | ip[3]) {
		ctx->msg_src_ip6[0] = ip[0];
		ctx->msg_src_ip6[1] = ip[1];
		ctx->msg_src_ip6[2] = ip[2];
		ctx->msg_src_ip6[3] = ip[3];
	}
	return verdict;
}

/* ---- addresses as the program knows them ------------------------------------------------------- */

/* The desk of the calling supervisor; NULL for everybody else. A container cannot ask: it is neither in
 * the supervisors' cgroup, nor does its process have a desk. */
static __always_inline struct desk *desk_of_caller(void)
{
	int first = 0;
	struct settings *set = settings.lookup(&first);
	u32 pid = bpf_get_current_pid_tgid() >> 32;
	u32 *slot;

	if (!set || bpf_get_current_cgroup_id() != set->supervisors)
		return 0;
	slot = desk_slots.lookup(&pid);
	return slot ? desks.lookup(slot) : 0;
}

#ifdef GRAFT_SK_SOCKET
/* What no system call tells: whether the socket's file is watched by an epoll instance, and how many
 * references it has. Offsets come from the kernel's own type information (/sys/kernel/btf/vmlinux). */
static __always_inline void probe(struct bpf_sock_addr *ctx, struct desk *desk)
{
	void *sk, *socket = 0, *file = 0, *epolls = 0;
	u64 references = 0;

	sk = bpf_skc_to_tcp_sock(ctx->sk);
	if (!sk)
		return;
	if (bpf_probe_read_kernel(&socket, 8, sk + GRAFT_SK_SOCKET) || !socket)
		return;
	if (bpf_probe_read_kernel(&file, 8, socket + GRAFT_SOCKET_FILE) || !file)
		return;
	if (bpf_probe_read_kernel(&epolls, 8, file + GRAFT_FILE_EP) ||
	    bpf_probe_read_kernel(&references, 8, file + GRAFT_FILE_REFERENCES))
		return;
	if (epolls) /* the list's head; it stays, empty, when the last registration goes */
		bpf_probe_read_kernel(&epolls, 8, epolls);
	desk->references = references;
	desk->probed = GRAFT_PROBED | (epolls ? GRAFT_PROBED_EPOLL : 0);
}
#else
static __always_inline void probe(struct bpf_sock_addr *ctx, struct desk *desk) {}
#endif

/* The rule that speaks of the address in the question, by the code that the bind and connect hooks use. */
static __always_inline void answer_rule(struct desk *desk, struct container *container)
{
	struct asked asked = { .port = desk->port, .family = desk->family, .protocol = IPPROTO_TCP };
	struct endpoint *endpoint;
	u32 id = 0;

	desk->verdict = GRAFT_VERDICT_NONE;
	__builtin_memcpy(asked.addr, desk->addr, 16);
	if (desk->call == GRAFT_CALL_BIND) {
		id = ingress_rule(container, &asked);
		if (id)
			desk->verdict = GRAFT_VERDICT_GRANT;
	} else {
		desk->verdict = egress_rule(container, &asked, &id);
	}
	endpoint = id ? endpoints.lookup(&id) : 0;
	if (!endpoint || !(endpoint->protocols & GRAFT_TCP)) {
		if (desk->verdict == GRAFT_VERDICT_GRANT)
			desk->verdict = GRAFT_VERDICT_NONE;
		return;
	}
	desk->endpoint = id;
	desk->endpoint_netns = endpoint->netns;
	desk->endpoint_family = endpoint->family;
}

/* A kernel that leads nowhere from a subflow to its MPTCP socket would let the hooks take a host-homed
 * one for nobody's: there MPTCP sockets stay in the container. */
static __always_inline int is_swappable(u32 protocol)
{
#ifdef GRAFT_HAVE_MPTCP
	return protocol == IPPROTO_TCP || protocol == IPPROTO_MPTCP;
#else
	return protocol == IPPROTO_TCP;
#endif
}

/* Answers a supervisor. Returns 0 where the caller is none, and the hook has its usual work to do. */
static __always_inline int serve_desk(struct bpf_sock_addr *ctx, u8 family)
{
	struct desk *desk = desk_of_caller();
	struct options *seen;
	struct owner owner;

	if (!desk)
		return 0;
	desk->answered = 0;
	desk->endpoint = 0;
	desk->probed = 0;
	if (ctx->type != SOCK_STREAM || !is_swappable(ctx->protocol))
		return 1;
	probe(ctx, desk);
	owner_of(ctx, &owner);
	if (!owner.container || owner.id != desk->container)
		return 1;
	desk->netns = bpf_get_netns_cookie(ctx);
	desk->container_netns = owner.container->netns;
	desk->bind_default = owner.container->bind_default;
	desk->connect_default = owner.container->connect_default;
	desk->home = owner.home;
	desk->tag_flags = owner.tag ? owner.tag->flags : 0;
	desk->socket_family = family;
	desk->protocol = ctx->protocol;
	desk->state = ctx->sk->state;
	/* Not ctx->user_port: that one stays when a connect that failed has let go of its port. */
	desk->local_port = ctx->sk->src_port;
	if (desk->family)
		answer_rule(desk, owner.container);
	desk->options.count = 0;
	desk->options.overflow = 0;
	seen = options.sk_storage_get(ctx->sk, 0, 0);
	if (seen)
		__builtin_memcpy(&desk->options, seen, sizeof(desk->options));
	desk->answered = 1;
	return 1;
}

/* Whether the socket's own address is its endpoint's: a listener, or a socket bound and not connected.
 * An accepted connection has the address that its client reached, which the program may see. */
static __always_inline int shows_endpoint(struct tag *tag, u8 *addr, u8 family)
{
	struct endpoint *endpoint = endpoints.lookup(&tag->endpoint);
	int i;

	if (!endpoint || endpoint->family != family)
		return 0;
	for (i = 0; i < 16; i++)
		if (addr[i] != endpoint->addr[i])
			return 0;
	return 1;
}

static __always_inline int unconnected(struct bpf_sock_addr *ctx)
{
	return ctx->sk->state == BPF_TCP_LISTEN || ctx->sk->state == BPF_TCP_CLOSE;
}

int graft_getsockname4(struct bpf_sock_addr *ctx)
{
	struct tag *tag = tags.sk_storage_get(ctx->sk, 0, 0);
	struct asked actual;
	u32 ip;

	if (serve_desk(ctx, GRAFT_IPV4) || !tag || !(tag->flags & GRAFT_TAG_BOUND))
		return PASS;
	asked4(ctx, &actual);
	ctx->user_port = bpf_htons(tag->port);
	if (tag->family == GRAFT_IPV4 && shows_endpoint(tag, actual.addr, GRAFT_IPV4)) {
		__builtin_memcpy(&ip, tag->addr, 4);
		/* A wildcard that was asked for stands for whatever address a client reached. */
		if (ip || unconnected(ctx))
			ctx->user_ip4 = ip;
	}
	return PASS;
}

int graft_getsockname6(struct bpf_sock_addr *ctx)
{
	struct tag *tag = tags.sk_storage_get(ctx->sk, 0, 0);
	struct asked actual;
	u32 ip[4] = {};
	int wildcard;

	if (serve_desk(ctx, GRAFT_IPV6) || !tag || !(tag->flags & GRAFT_TAG_BOUND))
		return PASS;
	asked6(ctx, &actual);
	ctx->user_port = bpf_htons(tag->port);
	if (!shows_endpoint(tag, actual.addr, actual.family))
		return PASS;
	if (tag->family == GRAFT_IPV4) {
		ip[2] = bpf_htonl(0xffff);
		__builtin_memcpy(&ip[3], tag->addr, 4);
		wildcard = !ip[3];
	} else {
		__builtin_memcpy(ip, tag->addr, 16);
		wildcard = !(ip[0] | ip[1] | ip[2] | ip[3]);
	}
	if (wildcard && !unconnected(ctx))
		return PASS;
	ctx->user_ip6[0] = ip[0];
	ctx->user_ip6[1] = ip[1];
	ctx->user_ip6[2] = ip[2];
	ctx->user_ip6[3] = ip[3];
	return PASS;
}

/* ---- options ----------------------------------------------------------------------------------- */

#define SOL_IP 0
#define SOL_SOCKET 1
#define SOL_IPV6 41
#define SO_BINDTODEVICE 25
#define SO_MARK 36
#define SO_BINDTOIFINDEX 62
#define IP_HDRINCL 3
#define IP_OPTIONS 4
#define IP_TRANSPARENT 19
#define IPV6_TRANSPARENT 75
#define IPV6_UNICAST_IF 76

/* Options that would take a host-homed socket past its policy: to another interface, past the routing
 * table (a source route too), or into the addresses of others. Multicast (IP 32..48, IPv6 20, 21 and
 * 42..48) and anycast (IPv6 27, 28) join groups on the host's links. Numbers: linux/in.h, linux/in6.h. */
static __always_inline int reaches_past_policy(int level, int name)
{
	if (level == SOL_SOCKET)
		return name == SO_BINDTODEVICE || name == SO_MARK || name == SO_BINDTOIFINDEX;
	if (level == SOL_IP)
		return name == IP_TRANSPARENT || name == IP_HDRINCL || name == IP_OPTIONS || (name >= 32 && name <= 50);
	if (level == SOL_IPV6)
		return name == IPV6_TRANSPARENT || name == IPV6_UNICAST_IF || (name >= 20 && name <= 21) ||
		       (name >= 27 && name <= 30) || (name >= 42 && name <= 48);
	return 0;
}

static __always_inline void remember_option(struct bpf_sock *sk, int level, int name)
{
	struct options *seen = options.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	u32 i;

	if (!seen)
		return;
	if (level < 0 || level > 0xffff || name < 0 || name > 0xffff) {
		seen->overflow = 1;
		return;
	}
	for (i = 0; i < GRAFT_OPTIONS_MAX; i++)
		if (i < seen->count && seen->option[i].level == level && seen->option[i].name == name)
			return;
	i = seen->count;
	if (i < GRAFT_OPTIONS_MAX) {
		seen->option[i].level = level;
		seen->option[i].name = name;
		seen->count = i + 1;
		return;
	}
	seen->overflow = 1;
}

/* Whether a policy confines this untagged socket: a direct container's, in the host's namespace, where some
 * addresses are denied. */
static __always_inline int is_confined(struct bpf_sockopt *ctx, u32 id)
{
	struct container *container = id ? containers.lookup(&id) : 0;

	if (!container || container->transport != GRAFT_TRANSPORT_DIRECT)
		return 0;
	if (container->bind_default != GRAFT_DEFAULT_DENY && container->connect_default != GRAFT_DEFAULT_DENY)
		return 0;
	return container->netns == bpf_get_netns_cookie(ctx);
}

int graft_setsockopt(struct bpf_sockopt *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct scope *scope = scopes.get_local_storage(0);
	struct owner owner = {};
	struct asked nothing = {};

	/* The kernel shows a program at most a page of a long value; a length of 0 tells it to use the
	 * caller's own copy instead of failing the call (Documentation/bpf/prog_cgroup_sockopt.rst). */
	if (ctx->optlen > (u64)ctx->optval_end - (u64)ctx->optval)
		ctx->optlen = 0;
	if (!sk)
		return PASS;
	owner.tag = tags.sk_storage_get(sk, 0, 0);
	owner.id = owner.tag ? owner.tag->container : scope->container;
	owner.home = owner.tag ? owner.tag->home : GRAFT_HOME_CONTAINER;
	if (!owner.tag && reaches_past_policy(ctx->level, ctx->optname) && is_confined(ctx, owner.id))
		owner.home = GRAFT_HOME_HOST;
	if (owner.home == GRAFT_HOME_HOST) {
		if (!reaches_past_policy(ctx->level, ctx->optname)) {
			/* A twin may be replaced by another one, as long as it is neither bound nor connected. */
			if (owner.tag && !(owner.tag->flags & GRAFT_TAG_BOUND) && sk->state == BPF_TCP_CLOSE)
				remember_option(sk, ctx->level, ctx->optname);
			return PASS;
		}
		record(&owner, &nothing, GRAFT_DECISION_REFUSED_OPTION, owner.tag ? owner.tag->endpoint : 0);
		return REFUSE;
	}
	if (scope->container || owner.tag)
		remember_option(sk, ctx->level, ctx->optname);
	return PASS;
}

/* ---- listen ------------------------------------------------------------------------------------ */

/* The tag of a listener in a direct container that may listen on its endpoints only, made if it has none. */
static __always_inline struct tag *confined_listener(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	struct scope *scope = scopes.get_local_storage(0);
	u32 id = scope->container;
	struct container *container = id ? containers.lookup(&id) : 0;
	struct tag *tag;

	if (!container || container->transport != GRAFT_TRANSPORT_DIRECT ||
	    container->bind_default != GRAFT_DEFAULT_DENY || container->netns != bpf_get_netns_cookie(ctx))
		return 0;
	tag = tags.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (tag) {
		tag->container = id;
		tag->home = GRAFT_HOME_HOST;
	}
	return tag;
}

/* No hook can refuse a listen(). The supervisor refuses it where it is asked; a call that passes the
 * filter untouched (32-bit, io_uring), or of a container that needs no supervisor, ends here: the listener
 * is tied to the last interface number there is, which no interface has, and the setsockopt hook keeps it
 * from being untied. */
int graft_sock_ops(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk;
	struct tag *tag;
	struct container *container;
	u32 nowhere = 0x7fffffff;
	struct owner owner = {};
	struct asked asked = {};

	if (ctx->op != BPF_SOCK_OPS_TCP_LISTEN_CB)
		return 1;
	sk = ctx->sk;
	if (!sk)
		return 1;
	tag = tags.sk_storage_get(sk, 0, 0);
#ifdef GRAFT_HAVE_MPTCP
	if (!tag) {
		void *parent = bpf_skc_to_mptcp_sock(sk);

		if (parent)
			tag = tags.sk_storage_get(parent, 0, 0);
	}
#endif
	if (!tag)
		tag = confined_listener(ctx, sk);
	if (!tag || tag->home != GRAFT_HOME_HOST)
		return 1;
	/* A socket that its container had before it was detached may not listen again either. */
	container = containers.lookup(&tag->container);
	if (container && (tag->flags & GRAFT_TAG_BOUND || is_own(container, tag)))
		return 1;
	bpf_setsockopt(ctx, SOL_SOCKET, SO_BINDTOIFINDEX, &nowhere, sizeof(nowhere));
	tag->flags |= GRAFT_TAG_DEAF;
	owner.id = tag->container;
	owner.home = tag->home;
	asked.port = ctx->local_port;
	record(&owner, &asked, GRAFT_DECISION_DEAFENED, tag->endpoint);
	return 1;
}
