// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* bind: only what an ingress rule names, rewritten to its endpoint. */

/* getsockname shows the program the address that it requested. */
static __always_inline void write_tag(struct tag *tag, u32 container, struct request *request, u32 endpoint,
				      int at_unix)
{
	tag->container = container;
	tag->home = GRAFT_HOME_HOST;
	tag->endpoint = endpoint;
	tag->family = request->family;
	tag->port = request->port;
	tag->bound_port = 0;
	tag->at_unix = at_unix;
	tag->binder = bpf_get_current_pid_tgid();
	tag->found_endpoint = 0;
	__builtin_memcpy(tag->addr, request->addr, 16);
}

static __always_inline int record_bind(struct bpf_sock_addr *ctx, struct owner *owner, struct request *request,
				       u32 endpoint, int at_unix)
{
	/* The tag of an MPTCP socket is its parent's; its subflow, which accepts plain TCP clients,
	 * gets one of its own here. */
	struct tag *own = tags.sk_storage_get(ctx->sk, 0, BPF_SK_STORAGE_GET_F_CREATE);

	if (!own)
		return 0;
	write_tag(own, owner->id, request, endpoint, at_unix);
	own->open_port = 0;
	if (owner->tag)
		write_tag(owner->tag, owner->id, request, endpoint, at_unix);
	return 1;
}

/* A bind to no endpoint: an earlier bind that failed may have left its endpoint in the tag. */
static __always_inline void clear_endpoint(struct bpf_sock_addr *ctx, struct owner *owner)
{
	struct tag *own = tags.sk_storage_get(ctx->sk, 0, 0);

	if (own) {
		own->container = owner->id;
		own->home = GRAFT_HOME_HOST;
		own->endpoint = 0;
		own->bound_port = 0;
		own->open_port = 0;
		own->at_unix = 0;
		own->binder = bpf_get_current_pid_tgid();
	}
	if (owner->tag) {
		owner->tag->endpoint = 0;
		owner->tag->bound_port = 0;
		owner->tag->open_port = 0;
		owner->tag->at_unix = 0;
	}
}

/* Decides a bind. Returns the endpoint to rewrite to, or NULL with *verdict set. */
static __always_inline struct endpoint *decide_bind(struct bpf_sock_addr *ctx, struct request *request, int *verdict)
{
	struct ingress_value *rule;
	struct endpoint *endpoint;
	struct owner owner;

	*verdict = PASS;
	owner_of(ctx, &owner);
	if (!owner.id || owner.home == GRAFT_HOME_FERRY)
		return 0;
	request->container = owner.id;
	request->home = owner.home;
	if (!owner.container) {
		/* The container was detached: its host-homed sockets may not be bound again; Graft no
		 * longer decides about those in its own namespace. */
		if (owner.home == GRAFT_HOME_HOST)
			*verdict = refuse(&owner, GRAFT_DECISION_REFUSED_BIND);
		return 0;
	}
	if (owner.home == GRAFT_HOME_CONTAINER) {
		/* In transport splice, and where the endpoint is a unix socket, a granted bind stays in the container's
		 * namespace, and is published. */
		if (owner.container->bind_default == GRAFT_DEFAULT_DENY) {
			rule = ingress_rule(owner.container->ruleset, request);
			if (!rule || !is_relayed(owner.container, rule->endpoint))
				*verdict = refuse(&owner, GRAFT_DECISION_REFUSED_BIND);
		}
		return 0;
	}
	if (is_exempt(owner.container, request->protocol))
		return 0;
	if (ctx->sk->src_port) {
		/* The kernel's own error for a second bind, before the tag of the first is overwritten. */
		*verdict = refuse_with(EINVAL);
		return 0;
	}
	rule = is_diverted(ctx->sk) ? 0 : ingress_rule(owner.container->ruleset, request);
	if (!rule && (binds_freely(owner.container) ||
		      (may_have_any_port(owner.container, request->protocol) && !request->port &&
		       is_unspecified(request->addr) && !is_diverted(ctx->sk)))) {
		clear_endpoint(ctx, &owner);
		return 0;
	}
	endpoint = rule ? endpoint_for(ctx, request, rule->endpoint) : 0;
	/* For a unix socket a direct container listens on loopback, for graftd alone (ingress.bpf.c). */
	if (is_unix(endpoint) && owner.container->transport != GRAFT_TRANSPORT_DIRECT)
		endpoint = 0;
	if (!endpoint || !endpoint_port(endpoint, rule, request->port, &request->endpoint_port) ||
	    !record_bind(ctx, &owner, request, rule->endpoint, is_unix(endpoint))) {
		/* No rule grants this address to a host-homed socket: passed, the container would get a
		 * port of the host without a grant. */
		*verdict = refuse(&owner, GRAFT_DECISION_REFUSED_BIND);
		return 0;
	}
	if (meets_leftover(ctx, request, endpoint)) {
		count(owner.id, GRAFT_DECISION_REFUSED_BIND);
		*verdict = refuse_with(EADDRINUSE);
		return 0;
	}
	*verdict = PASS_ANY_PORT;
	request->endpoint = rule->endpoint;
	count(owner.id, GRAFT_DECISION_REWRITTEN);
	return endpoint;
}

static __always_inline int rewrite_bind4(struct bpf_sock_addr *ctx, struct request *request)
{
	struct endpoint *endpoint;
	int verdict;
	u32 ip;

	endpoint = decide_bind(ctx, request, &verdict);
	if (!endpoint)
		return verdict;
	if (endpoint->family != GRAFT_IPV4)
		return REFUSE; /* an IPv4 socket cannot have an IPv6 address; `policy check` reports it earlier */
	__builtin_memcpy(&ip, endpoint->addr, 4);
	ctx->user_ip4 = ip;
	ctx->user_port = bpf_htons(request->endpoint_port);
	return verdict;
}

static __always_inline int rewrite_bind6(struct bpf_sock_addr *ctx, struct request *request)
{
	struct endpoint *endpoint;
	int verdict;
	u32 ip[4] = {};

	endpoint = decide_bind(ctx, request, &verdict);
	if (!endpoint)
		return verdict;
	if (endpoint->family == GRAFT_IPV4) {
		/* A dual-stack socket takes an IPv4 endpoint as a mapped address. For one that is IPv6 only
		 * the kernel returns EINVAL. */
		ip[2] = bpf_htonl(0xffff);
		__builtin_memcpy(&ip[3], endpoint->addr, 4);
	} else {
		__builtin_memcpy(ip, endpoint->addr, 16);
	}
	ctx->user_ip6[0] = ip[0];
	ctx->user_ip6[1] = ip[1];
	ctx->user_ip6[2] = ip[2];
	ctx->user_ip6[3] = ip[3];
	ctx->user_port = bpf_htons(request->endpoint_port);
	return verdict;
}

int graft_bind4(struct bpf_sock_addr *ctx)
{
	struct request request;

	read_request4(ctx, &request);
	return trace_request(&request, GRAFT_CALL_BIND, rewrite_bind4(ctx, &request));
}

int graft_bind6(struct bpf_sock_addr *ctx)
{
	struct request request;

	read_request6(ctx, &request);
	return trace_request(&request, GRAFT_CALL_BIND, rewrite_bind6(ctx, &request));
}

/* Whether this bind took the IPv4 port together with the IPv6 one, and its endpoint does not grant that. */
static __always_inline int takes_ipv4_port(struct bpf_sock *ctx, struct local_address *local, struct endpoint *endpoint)
{
	if (local->family != GRAFT_IPV6 || local->ip[0] | local->ip[1] | local->ip[2] | local->ip[3])
		return 0;
	return !(endpoint->flags & GRAFT_ENDPOINT_DUAL_STACK) && !is_v6only(ctx);
}

/* Tags a socket of a direct container whose binds are not restricted. The tag is for a later policy, under which
 * the socket continues to receive; without memory for the tag the socket stays untagged. */
static __always_inline struct tag *tag_free_bind(struct bpf_sock *ctx)
{
	struct scope *scope = scopes.get_local_storage(0);
	u32 id = scope->container;
	struct container *container = id ? containers.lookup(&id) : 0;
	struct tag *tag;

	if (!shares_host_netns(container, bpf_get_netns_cookie(ctx)) || !binds_freely(container))
		return 0;
	tag = tags.sk_storage_get(ctx, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (tag) {
		tag->container = id;
		tag->home = GRAFT_HOME_HOST;
	}
	return tag;
}

/* Whether another bind of the same socket has written the tag since this one did: the kernel locks the socket for the
 * bind hook, and again for the bind itself, but not in between. The tag does not say then what the socket is bound to. */
static __always_inline int is_of_other_bind(struct tag *tag)
{
	return tag->binder && tag->binder != (u32)bpf_get_current_pid_tgid();
}

/* The kernel has bound the socket, and here the bind can still be undone. The port is recorded here and not earlier: a
 * bind that failed (EADDRINUSE) must not leave a socket that counts as bound. (An MPTCP subflow's parent cannot be
 * reached from here: the supervisor completes its tag.) */
static __always_inline int check_bind(struct bpf_sock *ctx, struct local_address *local)
{
	u8 protocol = ctx->type == SOCK_STREAM ? IPPROTO_TCP : IPPROTO_UDP;
	struct tag *tag = tags.sk_storage_get(ctx, 0, 0);
	struct container *container;
	struct endpoint *endpoint;

	if (!tag)
		tag = tag_free_bind(ctx);
	if (!tag || tag->home != GRAFT_HOME_HOST)
		return PASS;
	tag->since = bpf_ktime_get_ns();
	container = containers.lookup(&tag->container);
	if (is_of_other_bind(tag)) {
		count(tag->container, GRAFT_DECISION_REFUSED_BIND);
		return refuse_with(EACCES);
	}
	if (!tag->endpoint) {
		if (container && may_have_any_port(container, protocol) &&
		    !(local->ip[0] | local->ip[1] | local->ip[2] | local->ip[3]))
			return PASS; /* (the hook before passed no other port than the kernel's choice) */
		if (!container || !binds_freely(container))
			return refuse_with(EACCES);
		if (protocol == IPPROTO_UDP)
			tag->open_port = local->port;
		return PASS;
	}
	endpoint = endpoints.lookup(&tag->endpoint);
	if (!container || !endpoint || !is_granted(container, tag, local, protocol, bpf_get_netns_cookie(ctx)) ||
	    takes_ipv4_port(ctx, local, endpoint)) {
		count(tag->container, GRAFT_DECISION_REFUSED_BIND);
		return refuse_with(EACCES);
	}
	if (!tag->at_unix && !note_server(tag, endpoint, local->port, protocol))
		return refuse_with(EACCES);
	tag->bound_port = local->port;
	if (protocol == IPPROTO_UDP)
		tag->open_port = local->port;
	return PASS;
}

int graft_post_bind4(struct bpf_sock *ctx)
{
	struct local_address local;

	local_address4(&local, ctx->src_ip4, ctx->src_port);
	return check_bind(ctx, &local);
}

int graft_post_bind6(struct bpf_sock *ctx)
{
	u32 ip[4] = { ctx->src_ip6[0], ctx->src_ip6[1], ctx->src_ip6[2], ctx->src_ip6[3] };
	struct local_address local;

	local_address6(&local, ip, ctx->src_port);
	return check_bind(ctx, &local);
}
