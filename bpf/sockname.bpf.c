// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* getsockname: addresses as the program requested them. */

/* Whether the socket's local address is its endpoint's: a listener, or a socket bound and not connected.
 * An accepted connection has the address that its client connected to, which the program may see. */
static __always_inline int is_endpoint_address(struct tag *tag, u8 *addr, u8 family)
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

/* Whether it has the port of its own bind to the endpoint, or of the listener that accepted it. An MPTCP socket that
 * its program has bound itself has no port in its tag: the hook after a bind sees the first subflow only. */
static __always_inline int has_bound_port(struct tag *tag, struct request *local)
{
	struct endpoint *endpoint;

	if (!tag->endpoint)
		return 0;
	if (tag->bound_port)
		return tag->bound_port == local->port;
	endpoint = endpoints.lookup(&tag->endpoint);
	return endpoint && endpoint->port && endpoint->port == local->port;
}

/* The requested port. Of a socket that requested none in particular the program sees the port that it got: others are
 * told of it. */
static __always_inline void show_port(struct bpf_sock_addr *ctx, struct tag *tag)
{
	if (tag->port)
		ctx->user_port = bpf_htons(tag->port);
}

static __always_inline int is_unconnected(struct bpf_sock_addr *ctx)
{
	return ctx->sk->state == BPF_TCP_LISTEN || ctx->sk->state == BPF_TCP_CLOSE;
}

int graft_getsockname4(struct bpf_sock_addr *ctx)
{
	struct tag *tag = tags.sk_storage_get(ctx->sk, 0, 0);
	struct request local;
	u32 ip;

	if (serve_desk(ctx, GRAFT_IPV4) || !tag)
		return PASS;
	read_request4(ctx, &local);
	if (!has_bound_port(tag, &local))
		return PASS;
	show_port(ctx, tag);
	if (tag->family == GRAFT_IPV4 && is_endpoint_address(tag, local.addr, GRAFT_IPV4)) {
		__builtin_memcpy(&ip, tag->addr, 4);
		/* For a requested wildcard an accepted connection shows the address that its client connected to. */
		if (ip || is_unconnected(ctx))
			ctx->user_ip4 = ip;
	}
	return PASS;
}

int graft_getsockname6(struct bpf_sock_addr *ctx)
{
	struct tag *tag = tags.sk_storage_get(ctx->sk, 0, 0);
	struct request local;
	u32 ip[4] = {};
	int wildcard;

	if (serve_desk(ctx, GRAFT_IPV6) || !tag)
		return PASS;
	read_request6(ctx, &local);
	if (!has_bound_port(tag, &local))
		return PASS;
	show_port(ctx, tag);
	if (!is_endpoint_address(tag, local.addr, local.family))
		return PASS;
	if (tag->family == GRAFT_IPV4) {
		ip[2] = bpf_htonl(0xffff);
		__builtin_memcpy(&ip[3], tag->addr, 4);
		wildcard = !ip[3];
	} else {
		__builtin_memcpy(ip, tag->addr, 16);
		wildcard = !(ip[0] | ip[1] | ip[2] | ip[3]);
	}
	if (wildcard && !is_unconnected(ctx))
		return PASS;
	ctx->user_ip6[0] = ip[0];
	ctx->user_ip6[1] = ip[1];
	ctx->user_ip6[2] = ip[2];
	ctx->user_ip6[3] = ip[3];
	return PASS;
}
