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
	if (owner->tag)
		write_tag(owner->tag, owner->id, asked, endpoint);
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
			*verdict = refuse(&owner, GRAFT_DECISION_REFUSED_BIND);
		return 0;
	}
	if (owner.home == GRAFT_HOME_CONTAINER) {
		if (owner.container->bind_default == GRAFT_DEFAULT_DENY)
			*verdict = refuse(&owner, GRAFT_DECISION_REFUSED_BIND);
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
