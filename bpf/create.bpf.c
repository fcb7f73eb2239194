// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* socket: a socket that a policy confines has its tag before socket() returns. */

/* A supervisor's next socket: tagged here it needs one system call less than from user space. desk->next_home tells the
 * supervisor that it was tagged. */
static __always_inline int tag_replacement(struct bpf_sock *ctx, struct desk *desk)
{
	struct tag *tag = tags.sk_storage_get(ctx, 0, BPF_SK_STORAGE_GET_F_CREATE);

	if (!tag)
		return REFUSE;
	tag->container = desk->container;
	tag->home = desk->next_home - GRAFT_NEXT_HOME_CONTAINER + GRAFT_HOME_CONTAINER;
	desk->next_home = GRAFT_NEXT_HOME_NONE;
	return PASS;
}

static __always_inline void trace_creation(u32 container, u32 protocol)
{
	struct request request = { .container = container, .protocol = protocol };

	trace_request(&request, GRAFT_CALL_SOCKET, REFUSE);
}

/* A socket of a direct container that denies something. One of another protocol (SCTP, UDP-Lite, raw; ICMP without a
 * rule) would not reach any hook; and one that cannot be tagged now might not be recognised later. */
static __always_inline int tag_confined(struct bpf_sock *ctx, struct container *container, u32 id)
{
	struct tag *tag;

	if (!has_rules(ctx->type, ctx->protocol) && !may_ping(container, ctx->type, ctx->protocol)) {
		if (container->flags & GRAFT_CONTAINER_OTHERS)
			return PASS;
		count(id, GRAFT_DECISION_REFUSED_BIND);
		trace_creation(id, ctx->protocol);
		return REFUSE;
	}
	tag = tags.sk_storage_get(ctx, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!tag)
		return REFUSE;
	tag->container = id;
	tag->home = GRAFT_HOME_HOST;
	return PASS;
}

int graft_sock_create(struct bpf_sock *ctx)
{
	struct scope *scope = scopes.get_local_storage(0);
	u32 id = scope->container;
	struct container *container;
	struct desk *desk;

	if (!id) {
		desk = desk_of_caller();
		return desk && desk->next_home != GRAFT_NEXT_HOME_NONE ? tag_replacement(ctx, desk) : PASS;
	}
	container = containers.lookup(&id);
	if (shares_host_netns(container, bpf_get_netns_cookie(ctx)) && denies_anything(container))
		return tag_confined(ctx, container, id);
	return PASS;
}
