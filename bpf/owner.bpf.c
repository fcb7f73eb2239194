// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* Which container a socket belongs to, which address a call requests, and what a refusal returns. */

#ifdef GRAFT_PROBE
/* Offsets come from the kernel's own type information (/sys/kernel/btf/vmlinux). A pointer that cannot be
 * followed reads as NULL. */
static __always_inline void *read_pointer(void *pointer)
{
	void *found = 0;

	return bpf_probe_read_kernel(&found, sizeof(found), pointer) ? 0 : found;
}

#ifdef GRAFT_SOCK_ADDR_SK
/* The kernel's own struct sock of the socket that a hook decides about: ctx is a struct bpf_sock_addr_kern. */
static __always_inline void *requesting_socket(struct bpf_sock_addr *ctx)
{
	return read_pointer((void *)ctx + GRAFT_SOCK_ADDR_SK);
}
#endif
#endif

/* A requested address as a hook sees it, and what was found out about it. ::ffff:1.2.3.4 is family 4 here. Rules also
 * judge the remote end of a packet as the destination of a request. */
struct request {
	u8 addr[16];
	u16 port;
	u8 family;
	u8 protocol;
	u8 mapped;   /* the socket is AF_INET6 and the address IPv4 */
	u8 to_loopback;      /* no address was requested, and the one here must be written for it */
	struct relay *relay; /* transport splice: where a granted connection is redirected to */
	u32 exchange;        /* and the address there, of datagrams (exchange.bpf.c) */
	u16 stand_in;        /* or the port there, of datagrams over IPv6 (stand_in.bpf.c) */
	struct tag *tag;     /* of a socket whose source must be an endpoint */
	u32 endpoint;        /* its id */
	u32 container;       /* for who traces: whose request it is, 0 where it is nobody's of Graft */
	u8 home;             /* and where its socket is */
	u16 endpoint_port;   /* a bind: the port of the endpoint that it becomes; 0: the kernel picks */
	u8 fixed_source;     /* the socket may not choose a source of its own */
	u8 any_source;       /* but without an address of its own it may send from any of the host's */
	u8 bound;            /* the socket is bound to an endpoint that it is granted now */
	u16 place;           /* transport swap: of the ferry's addresses, the one for this destination */
	struct ferry *ferry; /* a datagram to the container's own stack goes to it */
};

/* The container that a socket belongs to, and where the socket lives. */
struct owner {
	struct container *container; /* NULL: not Graft's, or of a container that no longer exists */
	struct tag *tag;
	u32 id;
	u8 home;
};

/* The tag of a socket. For an MPTCP socket the hooks see bind, connect, listen and packets on its subflows; user space
 * can set the tag only on the socket that the program has, their parent. */
static __always_inline struct tag *tag_of(struct bpf_sock *sk)
{
	struct tag *tag = tags.sk_storage_get(sk, 0, 0);

#ifdef GRAFT_HAVE_MPTCP
	if (!tag) {
		void *parent = bpf_skc_to_mptcp_sock(sk);

		if (parent)
			tag = tags.sk_storage_get(parent, 0, 0);
	}
#endif
	return tag;
}

/* A socket's container is its tag's, else that of the cgroup that it was created in. A tag of a container
 * that no longer exists, on a socket that was created in a container's cgroup, is from an earlier attachment of
 * that cgroup: what was granted then is not granted now. (A replacement socket was created in the supervisors'
 * cgroup, whose scope is 0, and remains the dead container's.) */
static __always_inline void resolve_owner(struct owner *owner, struct tag *tag, u32 scope)
{
	owner->tag = tag;
	owner->id = tag ? tag->container : scope;
	owner->container = owner->id ? containers.lookup(&owner->id) : 0;
	if (tag && !owner->container && scope) {
		owner->container = containers.lookup(&scope);
		if (owner->container) {
			owner->tag = 0;
			owner->id = scope;
		}
	}
	owner->home = owner->tag ? owner->tag->home : GRAFT_HOME_CONTAINER;
}

/* Whether a container's programs make their sockets themselves, wherever they are: transports direct and splice. */
static __always_inline int is_unsupervised(struct container *container)
{
	return container->transport == GRAFT_TRANSPORT_DIRECT || container->transport == GRAFT_TRANSPORT_SPLICE;
}

/* Whether an untagged socket in the namespace `netns` is host-homed: in the host's own, of a container without a
 * supervisor. A direct container shares that namespace. Of transport splice a program may have been there: it left with
 * sockets, or one of its threads stayed. What it has there is judged as in a direct container. A socket in a namespace
 * that the container made itself is not host-homed. */
static __always_inline int shares_host_netns(struct container *container, u64 netns)
{
	return container && is_unsupervised(container) && container->host_netns == netns;
}

static __always_inline void owner_of(struct bpf_sock_addr *ctx, struct owner *owner)
{
	struct scope *scope = scopes.get_local_storage(0);

	resolve_owner(owner, tag_of(ctx->sk), scope->container);
	if (!owner->tag && shares_host_netns(owner->container, bpf_get_netns_cookie(ctx)))
		owner->home = GRAFT_HOME_HOST;
}

/* Whether a socket is of TCP. An SCTP socket may be a stream too. */
static __always_inline int is_tcp(u32 type, u32 protocol)
{
	return type == SOCK_STREAM && (protocol == IPPROTO_TCP || protocol == IPPROTO_MPTCP);
}

/* Whether rules can apply to such a socket: the kernel calls the sock_addr hooks for these protocols, and no other. */
static __always_inline int has_rules(u32 type, u32 protocol)
{
	return is_tcp(type, protocol) || (type == SOCK_DGRAM && protocol == IPPROTO_UDP);
}

/* Whether a socket is of the kind that may ping without privileges (net/ipv4/ping.c). */
static __always_inline int is_ping(u32 type, u32 protocol)
{
	return type == SOCK_DGRAM && (protocol == IPPROTO_ICMP || protocol == IPPROTO_ICMPV6);
}

/* Whether the policy judges such sockets. The kernel calls no hook for what they send, and the one at connect from 6.0
 * on: their packets are judged (packet.bpf.c). */
static __always_inline int may_ping(struct container *container, u32 type, u32 protocol)
{
	return container && container->flags & GRAFT_CONTAINER_ICMP && is_ping(type, protocol);
}

/* Whether a policy denies anything, so that protocols that no rule can name must not bypass it. */
static __always_inline int denies_anything(struct container *container)
{
	return container->bind_default == GRAFT_DEFAULT_DENY || container->connect_default == GRAFT_DEFAULT_DENY ||
	       container->flags & GRAFT_CONTAINER_DENIES;
}

/* Whether a socket of a swap container may have a port of the kernel's choice that is no endpoint: the one that it would
 * get with its first datagram. It receives there only from where it may send to. */
static __always_inline int may_have_any_port(struct container *container, u8 protocol)
{
	return container->transport == GRAFT_TRANSPORT_SWAP && protocol == IPPROTO_UDP &&
	       container->bind_default == GRAFT_DEFAULT_CONTAINER;
}

/* Whether what no rule names may be the policy's default on a host-homed socket: in a direct container the host's
 * namespace is the container's own, and in transport splice it was, for a socket that a program of the container made.
 * graftd's sockets for that container, made in a cgroup of Graft's, may do what a rule grants and nothing else. */
static __always_inline int defaults_apply(struct container *container)
{
	struct scope *scope = scopes.get_local_storage(0);

	return container->transport == GRAFT_TRANSPORT_DIRECT ||
	       (container->transport == GRAFT_TRANSPORT_SPLICE && scope->container);
}

/* Whether protocols that no rule can name are permitted although the socket is host-homed. (Of a supervised container such
 * a socket was made for a rule that is gone, as one that pings was.) */
static __always_inline int passes_others(struct container *container)
{
	return defaults_apply(container) && container->flags & GRAFT_CONTAINER_OTHERS;
}

/* Whether binds that no rule names are permitted although the socket is host-homed. */
static __always_inline int binds_freely(struct container *container)
{
	return defaults_apply(container) && container->bind_default == GRAFT_DEFAULT_CONTAINER;
}

/* Rules have one number for ICMP of both families, and no ports. */
static __always_inline void read_protocol(struct bpf_sock_addr *ctx, struct request *request)
{
	request->protocol = ctx->protocol;
	if (ctx->protocol == IPPROTO_ICMPV6)
		request->protocol = IPPROTO_ICMP;
	if (request->protocol == IPPROTO_ICMP)
		request->port = 0;
}

static __always_inline void read_request4(struct bpf_sock_addr *ctx, struct request *request)
{
	u32 ip = ctx->user_ip4;

	__builtin_memset(request, 0, sizeof(*request));
	__builtin_memcpy(request->addr, &ip, 4);
	request->port = bpf_ntohs((u16)ctx->user_port);
	request->family = GRAFT_IPV4;
	read_protocol(ctx, request);
}

static __always_inline void read_request6(struct bpf_sock_addr *ctx, struct request *request)
{
	u32 ip[4] = { ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3] };

	__builtin_memset(request, 0, sizeof(*request));
	request->port = bpf_ntohs((u16)ctx->user_port);
	read_protocol(ctx, request);
	if (!ip[0] && !ip[1] && ip[2] == bpf_htonl(0xffff)) {
		__builtin_memcpy(request->addr, &ip[3], 4);
		request->family = GRAFT_IPV4;
		request->mapped = 1;
		return;
	}
	__builtin_memcpy(request->addr, ip, 16);
	request->family = GRAFT_IPV6;
}

static __always_inline void count(u32 container, u32 decision)
{
	struct counter_key key = { .container = container, .decision = decision };
	u64 *found = counters.lookup(&key);
	u64 one = 1;

	/* A removed container's sockets may outlive it, and are refused; its counters would be removed by nobody. */
	if (found)
		__sync_fetch_and_add(found, 1);
	else if (containers.lookup(&container))
		counters.update(&key, &one);
}

static __always_inline int refuse_with(int error)
{
#ifdef GRAFT_HAVE_SET_RETVAL
	bpf_set_retval(-error);
#endif
	return REFUSE;
}

static __always_inline int refuse(struct owner *owner, u32 decision)
{
	count(owner->id, decision);
	return refuse_with(EACCES);
}

/* Whether a socket, which it releases, is one of graftd's that listens for the container. graftd marks them with what only
 * root can write: anybody in the namespace may have taken the port since, if graftd was killed or its socket closed. */
static __always_inline int is_released_relay(struct bpf_sock *sk, u32 container)
{
	struct crossing *mark;
	int ours;

	if (!sk)
		return 0;
	mark = crossings.sk_storage_get(sk, 0, 0);
	ours = mark && mark->role == GRAFT_CROSSING_LISTENER && mark->container == container;
	bpf_sk_release(sk);
	return ours;
}
