// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* Whose a socket is, what was asked of it, and what a refusal returns. */

/* An address as a hook sees it, IPv4 made plain: ::ffff:1.2.3.4 is family 4 here. */
struct asked {
	u8 addr[16];
	u16 port;
	u8 family;
	u8 protocol;
	u8 mapped;   /* the socket is AF_INET6 and the address IPv4 */
	u8 named;    /* no address was asked for, and the one here is to be written for it */
	struct relay *relay; /* transport splice: where a granted connection is turned to */
	struct tag *tag;     /* of a socket that is to leave from an endpoint */
	u32 endpoint;        /* its id */
	u8 confined;         /* a source of its own is not for the socket to choose */
	u8 anywhere;         /* but where the socket has no address, it may speak from any of the host's */
};

/* The container that a socket belongs to, and where the socket lives. */
struct owner {
	struct container *container; /* NULL: not Graft's, or of a container that is no more */
	struct tag *tag;
	u32 id;
	u8 home;
};

/* The tag of a socket. Of an MPTCP one bind, connect, listen and packets reach the hooks through its subflows; the tag
 * is where user space could put it, on the socket that the program holds. */
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

/* Whose a socket is: its tag's container, else that of the cgroup that it was born in. A tag of a container
 * that is no more, on a socket that was born in a container's cgroup, is from an earlier attachment of that
 * cgroup: what it was granted then is no grant now. (A twin was born in the supervisors' cgroup, whose scope
 * is 0, and stays the dead container's.) */
static __always_inline void whose(struct owner *owner, struct tag *tag, u32 scope)
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

/* Whether an untagged socket in the namespace `netns` is host-homed: the container's, in the namespace that it
 * shares with the host. In another one, that a direct container made itself, it is not. */
static __always_inline int lives_with_host(struct container *container, u64 netns)
{
	return container && container->transport == GRAFT_TRANSPORT_DIRECT && container->netns == netns;
}

static __always_inline void owner_of(struct bpf_sock_addr *ctx, struct owner *owner)
{
	struct scope *scope = scopes.get_local_storage(0);

	whose(owner, tag_of(ctx->sk), scope->container);
	if (!owner->tag && lives_with_host(owner->container, bpf_get_netns_cookie(ctx)))
		owner->home = GRAFT_HOME_HOST;
}

/* Whether a socket is of TCP. An SCTP socket may be a stream too. */
static __always_inline int is_tcp(u32 type, u32 protocol)
{
	return type == SOCK_STREAM && (protocol == IPPROTO_TCP || protocol == IPPROTO_MPTCP);
}

/* Whether rules can speak of such a socket: the sock_addr hooks are called for these protocols, and no other. */
static __always_inline int has_rules(u32 type, u32 protocol)
{
	return is_tcp(type, protocol) || (type == SOCK_DGRAM && protocol == IPPROTO_UDP);
}

/* Whether a policy denies anything, so that what no rule can speak of must not get past it. */
static __always_inline int denies(struct container *container)
{
	return container->bind_default == GRAFT_DEFAULT_DENY || container->connect_default == GRAFT_DEFAULT_DENY ||
	       container->flags & GRAFT_CONTAINER_DENIES;
}

/* Whether binds that no rule names are left alone although the socket is host-homed: in a direct container
 * the host's namespace is the container's own. */
static __always_inline int binds_freely(struct container *container)
{
	return container->transport == GRAFT_TRANSPORT_DIRECT && container->bind_default == GRAFT_DEFAULT_CONTAINER;
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

static __always_inline void count(u32 container, u32 decision)
{
	struct counter_key key = { .container = container, .decision = decision };
	u64 *found = counters.lookup(&key);
	u64 one = 1;

	if (found)
		__sync_fetch_and_add(found, 1);
	else
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
