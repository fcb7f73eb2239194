// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* sendmsg: a datagram goes only where an egress rule grants it, from that rule's endpoint. */

/* Whether a send names no destination: of a connected socket, with a control message. The kernel then passes an
 * address of zeros, and sends to the peer. */
static __always_inline int goes_to_peer(struct bpf_sock_addr *ctx, struct request *request)
{
	u64 word[2];

	__builtin_memcpy(word, request->addr, 16);
	return !request->port && !(word[0] | word[1]) && is_connected(ctx->sk);
}

/* Whether a datagram cannot be sent from the endpoint that its destination's rule names: the endpoint has a port, or
 * the unspecified address where the socket has another endpoint's. Or the socket is bound to an endpoint of the other
 * family (else it would leave from that), whose port means nothing in this one. */
static __always_inline int cannot_leave_from(struct bpf_sock *sk, struct request *request, struct endpoint *from)
{
	u32 ip[4];

	__builtin_memcpy(ip, from->addr, 16);
	return request->bound || from->port || has_other_source(request) || keeps_lent_port(request->tag, from) ||
	       (!(ip[0] | ip[1] | ip[2] | ip[3]) && must_clear_address(sk, request));
}

/* Whether the kernel picks the source of a datagram, where neither the socket nor its endpoint has an address. */
static __always_inline int leaves_source_to_kernel(struct request *request)
{
	return request->fixed_source && !request->any_source;
}

/* Whether a datagram may leave from the source that a control message names; it need not name one. */
static __always_inline int may_name_source(struct bpf_sock_addr *ctx, struct request *request, u32 *ip, u8 family)
{
	return !request->any_source || !(ip[0] | ip[1] | ip[2] | ip[3]) || is_hosts(bpf_get_netns_cookie(ctx), ip, family);
}

/* Whether a send is to the IPv4 peer of an IPv6 socket: the kernel then passes the peer's address, whether or not the
 * program named one (udpv6_sendmsg in net/ipv6/udp.c). */
static __always_inline int goes_to_mapped_peer(struct bpf_sock *sk, struct request *request)
{
	u32 ip;

	__builtin_memcpy(&ip, request->addr, 4);
	return sk->family == AF_INET6 && request->family == GRAFT_IPV4 && is_connected(sk) && ip == sk->dst_ip6[3] &&
	       sk->dst_ip6[2] == bpf_htonl(0xffff) && !(sk->dst_ip6[0] | sk->dst_ip6[1]) &&
	       request->port == bpf_ntohs(sk->dst_port);
}

/* Whether a send is to the peer of a socket whose connect was redirected to Graft's relay. */
static __always_inline int goes_to_relayed_peer(struct bpf_sock_addr *ctx, struct request *request)
{
	return (goes_to_peer(ctx, request) || goes_to_mapped_peer(ctx->sk, request)) && standing_crossing(ctx->sk);
}

/* The source address of a datagram can be set for it alone, and is set: a control message may have named another one,
 * also on a connected socket. Its source port cannot: an endpoint with a port serves sockets that are bound or
 * connected. */
static __always_inline int rewrite_send4(struct bpf_sock_addr *ctx, struct request *request)
{
	struct endpoint *from;
	int verdict, sending = GRAFT_SENDS, has_ip6 = 0;
	u32 ip = 0, named[4] = {};

	if (goes_to_relayed_peer(ctx, request))
		return PASS;
	if (goes_to_peer(ctx, request)) {
		u32 peer = ctx->sk->dst_ip4;

		__builtin_memcpy(request->addr, &peer, 4);
		request->port = bpf_ntohs(ctx->sk->dst_port);
		sending = GRAFT_SENDS_TO_PEER;
	}
	from = decide_destination(ctx, request, &verdict, sending);
	if (request->ferry) {
		write_ferry4(ctx, request);
		return verdict;
	}
	if (request->exchange)
		return write_exchange4(ctx, request);
	if (request->to_loopback)
		write_loopback4(ctx);
	if (!from) {
		if (verdict != PASS || !request->fixed_source)
			return verdict;
	} else {
		if (from->family != GRAFT_IPV4 || cannot_leave_from(ctx->sk, request, from))
			return refuse_with(EACCES);
		__builtin_memcpy(&ip, from->addr, 4);
	}
	if (!ip && request->fixed_source)
		ip = own_ip4(ctx->sk, &has_ip6);
	if (ip || has_ip6 || leaves_source_to_kernel(request)) {
		ctx->msg_src_ip4 = ip;
		return verdict;
	}
	named[0] = ctx->msg_src_ip4;
	return may_name_source(ctx, request, named, GRAFT_IPV4) ? verdict : refuse_with(EACCES);
}

static __always_inline int rewrite_send6(struct bpf_sock_addr *ctx, struct request *request)
{
	struct endpoint *from;
	struct local_address local;
	int verdict, sending = GRAFT_SENDS;
	u32 ip[4] = {};

	if (goes_to_relayed_peer(ctx, request))
		return PASS;
	if (goes_to_peer(ctx, request)) {
		ip[0] = ctx->sk->dst_ip6[0];
		ip[1] = ctx->sk->dst_ip6[1];
		ip[2] = ctx->sk->dst_ip6[2];
		ip[3] = ctx->sk->dst_ip6[3];
		__builtin_memcpy(request->addr, ip, 16);
		request->port = bpf_ntohs(ctx->sk->dst_port);
		sending = GRAFT_SENDS_TO_PEER;
	}
	from = decide_destination(ctx, request, &verdict, sending);
	if (request->ferry)
		return write_ferry6(ctx, request);
	if (request->stand_in)
		return write_stand_in(ctx, request);
	if (request->to_loopback)
		write_loopback6(ctx, !request->mapped);
	if (!from) {
		if (verdict != PASS || !request->fixed_source)
			return verdict;
		__builtin_memset(ip, 0, sizeof(ip)); /* a peer's, perhaps */
	} else {
		/* For a mapped destination the kernel calls graft_sendmsg4. */
		if (from->family != GRAFT_IPV6 || cannot_leave_from(ctx->sk, request, from))
			return refuse_with(EACCES);
		__builtin_memcpy(ip, from->addr, 16);
	}
	read_local_address(&local, ctx->sk);
	if (!(ip[0] | ip[1] | ip[2] | ip[3]) && request->fixed_source && local.family == GRAFT_IPV6)
		__builtin_memcpy(ip, local.ip, 16);
	if (ip[0] | ip[1] | ip[2] | ip[3] || leaves_source_to_kernel(request)) {
		ctx->msg_src_ip6[0] = ip[0];
		ctx->msg_src_ip6[1] = ip[1];
		ctx->msg_src_ip6[2] = ip[2];
		ctx->msg_src_ip6[3] = ip[3];
		return verdict;
	}
	ip[0] = ctx->msg_src_ip6[0];
	ip[1] = ctx->msg_src_ip6[1];
	ip[2] = ctx->msg_src_ip6[2];
	ip[3] = ctx->msg_src_ip6[3];
	return may_name_source(ctx, request, ip, GRAFT_IPV6) ? verdict : refuse_with(EACCES);
}

int graft_sendmsg4(struct bpf_sock_addr *ctx)
{
	struct request request;

	read_request4(ctx, &request);
	return trace_request(&request, GRAFT_CALL_SEND, rewrite_send4(ctx, &request));
}

int graft_sendmsg6(struct bpf_sock_addr *ctx)
{
	struct request request;

	read_request6(ctx, &request);
	return trace_request(&request, GRAFT_CALL_SEND, rewrite_send6(ctx, &request));
}
