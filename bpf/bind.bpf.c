// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* bind: only what an ingress rule names, rewritten to its endpoint. */

/* What the program asked for is what getsockname will tell it. */
static __always_inline void write_tag(struct tag *tag, u32 container, struct asked *asked, u32 endpoint)
{
	tag->container = container;
	tag->home = GRAFT_HOME_HOST;
	tag->endpoint = endpoint;
	tag->family = asked->family;
	tag->port = asked->port;
	tag->given = 0;
	__builtin_memcpy(tag->addr, asked->addr, 16);
}

static __always_inline int remember(struct bpf_sock_addr *ctx, struct owner *owner, struct asked *asked, u32 endpoint)
{
	/* The tag of an MPTCP socket is its parent's; its subflow, which plain TCP clients are accepted
	 * from, gets one of its own here. */
	struct tag *own = tags.sk_storage_get(ctx->sk, 0, BPF_SK_STORAGE_GET_F_CREATE);

	if (!own)
		return 0;
	write_tag(own, owner->id, asked, endpoint);
	own->open_port = 0;
	if (owner->tag)
		write_tag(owner->tag, owner->id, asked, endpoint);
	return 1;
}

/* A bind that no endpoint is given for: what an earlier one asked for that then failed is not its address. */
static __always_inline void forget_endpoint(struct bpf_sock_addr *ctx, struct owner *owner)
{
	struct tag *own = tags.sk_storage_get(ctx->sk, 0, 0);

	if (own) {
		own->container = owner->id;
		own->home = GRAFT_HOME_HOST;
		own->endpoint = 0;
		own->given = 0;
	}
	if (owner->tag) {
		owner->tag->endpoint = 0;
		owner->tag->given = 0;
	}
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
			*verdict = refuse(&owner, GRAFT_DECISION_REFUSED_BIND);
		return 0;
	}
	if (owner.home == GRAFT_HOME_CONTAINER) {
		/* In transport splice a granted bind stays where it is, and is published. */
		if (owner.container->bind_default == GRAFT_DEFAULT_DENY &&
		    !(owner.container->transport == GRAFT_TRANSPORT_SPLICE && ingress_rule(owner.container, asked)))
			*verdict = refuse(&owner, GRAFT_DECISION_REFUSED_BIND);
		return 0;
	}
	if (is_left_alone(owner.container, asked->protocol))
		return 0;
	if (ctx->sk->src_port) {
		/* The kernel's own answer to a second bind, before the tag forgets the first. */
		*verdict = refuse_with(EINVAL);
		return 0;
	}
	id = is_diverted(ctx->sk) ? 0 : ingress_rule(owner.container, asked);
	if (!id && binds_freely(owner.container)) {
		forget_endpoint(ctx, &owner);
		return 0;
	}
	endpoint = id ? endpoint_for(ctx, asked, id) : 0;
	if (!endpoint || !remember(ctx, &owner, asked, id)) {
		/* A host-homed socket that no rule gives this address: were it let through, the
		 * container would have a port of the host that nobody granted. */
		*verdict = refuse(&owner, GRAFT_DECISION_REFUSED_BIND);
		return 0;
	}
	*verdict = PASS_ANY_PORT;
	count(owner.id, GRAFT_DECISION_REWRITTEN);
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

#ifdef GRAFT_V6ONLY_BYTE
/* IPV6_V6ONLY, which no helper tells: a bit of struct sock, which is what the kernel calls these programs with. */
static __always_inline int is_v6only(struct bpf_sock *ctx)
{
	u8 byte = 0;

	return !bpf_probe_read_kernel(&byte, 1, (void *)ctx + GRAFT_V6ONLY_BYTE) && byte & GRAFT_V6ONLY_MASK;
}
#else
static __always_inline int is_v6only(struct bpf_sock *ctx)
{
	return 0;
}
#endif

/* Whether this bind took the IPv4 port along with the IPv6 one, and its endpoint does not give that. */
static __always_inline int takes_ipv4_too(struct bpf_sock *ctx, struct place *place, struct endpoint *endpoint)
{
	if (place->family != GRAFT_IPV6 || place->ip[0] | place->ip[1] | place->ip[2] | place->ip[3])
		return 0;
	return !(endpoint->flags & GRAFT_ENDPOINT_DUAL_STACK) && !is_v6only(ctx);
}

/* The tag of a socket of a direct container that binds where it likes. It is for a later policy, under which
 * what hears now goes on hearing: without memory for it the socket does without. */
static __always_inline struct tag *free_binder(struct bpf_sock *ctx)
{
	struct scope *scope = scopes.get_local_storage(0);
	u32 id = scope->container;
	struct container *container = id ? containers.lookup(&id) : 0;
	struct tag *tag;

	if (!lives_with_host(container, bpf_get_netns_cookie(ctx)) || !binds_freely(container))
		return 0;
	tag = tags.sk_storage_get(ctx, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (tag) {
		tag->container = id;
		tag->home = GRAFT_HOME_HOST;
	}
	return tag;
}

/* The kernel has bound the socket, and here it can still be undone. Only now is the port really the socket's: a
 * bind that failed (EADDRINUSE) must not leave one that counts as bound. (From here there is no way to an MPTCP
 * subflow's parent, whose tag the supervisor completes itself.) */
static __always_inline int confirm(struct bpf_sock *ctx, struct place *place)
{
	u8 protocol = ctx->type == SOCK_STREAM ? IPPROTO_TCP : IPPROTO_UDP;
	struct tag *tag = tags.sk_storage_get(ctx, 0, 0);
	struct container *container;
	struct endpoint *endpoint;

	if (!tag)
		tag = free_binder(ctx);
	if (!tag || tag->home != GRAFT_HOME_HOST)
		return PASS;
	container = containers.lookup(&tag->container);
	if (!tag->endpoint) {
		if (!container || !binds_freely(container))
			return refuse_with(EACCES);
		if (protocol == IPPROTO_UDP)
			tag->open_port = place->port;
		return PASS;
	}
	endpoint = endpoints.lookup(&tag->endpoint);
	if (!container || !endpoint || !is_granted(container, tag, place, protocol, bpf_get_netns_cookie(ctx)) ||
	    takes_ipv4_too(ctx, place, endpoint)) {
		count(tag->container, GRAFT_DECISION_REFUSED_BIND);
		return refuse_with(EACCES);
	}
	tag->given = place->port;
	if (protocol == IPPROTO_UDP)
		tag->open_port = place->port;
	return PASS;
}

int graft_post_bind4(struct bpf_sock *ctx)
{
	struct place place;

	place4(&place, ctx->src_ip4, ctx->src_port);
	return confirm(ctx, &place);
}

int graft_post_bind6(struct bpf_sock *ctx)
{
	u32 ip[4] = { ctx->src_ip6[0], ctx->src_ip6[1], ctx->src_ip6[2], ctx->src_ip6[3] };
	struct place place;

	place6(&place, ip, ctx->src_port);
	return confirm(ctx, &place);
}
