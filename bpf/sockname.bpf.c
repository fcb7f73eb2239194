// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* getsockname: addresses as the program knows them. */

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

/* Whether it has the port that its bind to the endpoint got, itself or by the listener that accepted it. */
static __always_inline int has_given_port(struct tag *tag, struct asked *actual)
{
	return tag->endpoint && tag->given && tag->given == actual->port;
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

	if (serve_desk(ctx, GRAFT_IPV4) || !tag)
		return PASS;
	asked4(ctx, &actual);
	if (!has_given_port(tag, &actual))
		return PASS;
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

	if (serve_desk(ctx, GRAFT_IPV6) || !tag)
		return PASS;
	asked6(ctx, &actual);
	if (!has_given_port(tag, &actual))
		return PASS;
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
