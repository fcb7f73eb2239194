// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* Addresses that a socket has by the kernel's choice, and keeps until it is disconnected: a program must not make that
 * choice, nor use it for what it was not made for. And the tag that says what an endpoint has lent.
 */

/* Whether the socket has an address of the host's loopback, by the kernel's choice, and the destination is elsewhere. */
static __always_inline int keeps_loopback(struct bpf_sock *sk, struct request *request, struct endpoint *endpoint)
{
	struct local_address local;

	if (!request->fixed_source || request->any_source || !is_unspecified(endpoint->addr))
		return 0;
	read_local_address(&local, sk);
	return strays_from_loopback(&local, request);
}

#if defined(GRAFT_SOCK_ADDR_SK) && defined(GRAFT_UNICAST_INTERFACE)
/* Whether the program has named the interface that its datagrams leave by (IP_UNICAST_IF, IPV6_UNICAST_IF, IPV6_PKTINFO):
 * of that the kernel takes the address. The setsockopt hook refuses these options, but the kernel does not call it for
 * 32-bit callers. */
static __always_inline int has_chosen_interface(struct bpf_sock_addr *ctx)
{
	u32 index = 0, index6 = 0, pktinfo = 0;
	void *sk = requesting_socket(ctx), *six;

	if (!sk)
		return 0;
	bpf_probe_read_kernel(&index, sizeof(index), sk + GRAFT_UNICAST_INTERFACE);
	six = ctx->sk->family == AF_INET6 ? read_pointer(sk + GRAFT_SOCK_INET6) : 0;
	if (six) {
		bpf_probe_read_kernel(&index6, sizeof(index6), six + GRAFT_UNICAST_INTERFACE6);
		bpf_probe_read_kernel(&pktinfo, sizeof(pktinfo), six + GRAFT_PKTINFO_INTERFACE6);
	}
	return index || index6 || pktinfo;
}
#else
static __always_inline int has_chosen_interface(struct bpf_sock_addr *ctx)
{
	return 0;
}
#endif

/* Whether the program has said by which way its packets go: a source route, a routing header, or a flow label of its own,
 * which may have one. The kernel takes the address for the first hop. A program can say so only in a 32-bit call, and take
 * it back before anything is sent, so that no packet shows it. */
static __always_inline int has_chosen_route(struct bpf_sock_addr *ctx)
{
#if defined(GRAFT_SOCK_ADDR_SK) && defined(GRAFT_SOCK_INET6) && defined(GRAFT_IP_OPTIONS)
	void *sk = requesting_socket(ctx), *six, *options;
	u8 route = 0;

	if (!sk)
		return 0;
	options = read_pointer(sk + GRAFT_IP_OPTIONS);
	if (options)
		bpf_probe_read_kernel(&route, sizeof(route), options + GRAFT_IP_OPTIONS_ROUTE);
	six = ctx->family == AF_INET6 ? read_pointer(sk + GRAFT_SOCK_INET6) : 0;
	if (!six || route)
		return route;
	options = read_pointer(six + GRAFT_IP6_OPTIONS);
	if (options && read_pointer(options + GRAFT_IP6_OPTIONS_ROUTE))
		return 1;
#if defined(GRAFT_FLOW_LABELS)
	return read_pointer(sk + GRAFT_FLOW_LABELS) != 0;
#elif defined(GRAFT_FLOW_LABELS6)
	return read_pointer(six + GRAFT_FLOW_LABELS6) != 0;
#else
	return 0;
#endif
#else
	return 0;
#endif
}

static __always_inline int is_to_group(struct request *request)
{
	return request->family == GRAFT_IPV4 ? (request->addr[0] & 0xf0) == 0xe0 : request->addr[0] == 0xff;
}

/* Whether an address that the socket got from an endpoint must be cleared, because the endpoint that it must use now
 * has the unspecified address. (An address that the kernel picked by its routes, or that the socket had before there
 * was a policy, is kept.) */
static __always_inline int must_clear_address(struct bpf_sock *sk, struct request *request)
{
	struct local_address local;

	if (!request->tag || !(request->tag->endpoint || request->tag->source))
		return 0;
	read_local_address(&local, sk);
	return local.ip[0] | local.ip[1] | local.ip[2] | local.ip[3] ? 1 : 0;
}

/* Whether the kernel would take a socket's address from what the program has said, and keep it: a connect to a group takes
 * that of IP_MULTICAST_IF, which a 32-bit call can set to any of the host's, or one of IPV6_MULTICAST_IF's interface; another
 * connect one of the interface that the program has chosen, or of the way to the first hop that it has. */
static __always_inline int would_choose_address(struct bpf_sock_addr *ctx, struct request *request,
						struct endpoint *endpoint, int bound)
{
	struct local_address local;

	if (!request->fixed_source || !(bound || is_unspecified(endpoint->addr)))
		return 0;
	if (!has_chosen_route(ctx) &&
	    (request->protocol != IPPROTO_UDP || !(is_to_group(request) || has_chosen_interface(ctx))))
		return 0;
	if (!bound && must_clear_address(ctx->sk, request))
		return 1; /* it will have none */
	read_local_address(&local, ctx->sk);
	return !(local.ip[0] | local.ip[1] | local.ip[2] | local.ip[3]);
}

/* Whether a socket has begun a datagram that the kernel still takes more for (MSG_MORE, UDP_CORK). It has its route already,
 * and would go to whom the socket is connected next. */
static __always_inline int has_begun_datagram(struct bpf_sock_addr *ctx)
{
#if defined(GRAFT_SOCK_ADDR_SK) && defined(GRAFT_UDP_PENDING)
	void *sk = requesting_socket(ctx);
	s32 pending = 0;

	return !sk || bpf_probe_read_kernel(&pending, sizeof(pending), sk + GRAFT_UDP_PENDING) || pending;
#else
	return 0;
#endif
}

/* Whether a datagram socket would get a peer by whose route it could send what no hook sees: see egress_rule. */
static __always_inline int would_mix_peers(struct bpf_sock_addr *ctx, struct request *request)
{
	u32 ip;

	if (request->protocol != IPPROTO_UDP)
		return 0;
	__builtin_memcpy(&ip, request->addr, 4);
	return is_broadcast(request, bpf_get_netns_cookie(ctx)) || (request->family == GRAFT_IPV4 && ip == 0xffffffff) ||
	       has_begun_datagram(ctx);
}

/* Whether a connect takes an address or a port from the endpoint, which the socket's tag must say. */
static __always_inline int lends(struct endpoint *endpoint)
{
	return endpoint->port || !is_unspecified(endpoint->addr);
}

/* The tag that says what this endpoint lends, of a socket of a direct container that has none (it was made before there was
 * a policy, or before that denied anything). A tag of an earlier container's is this one's from here on: what was lent then
 * stays written down. NULL: there is no memory for it, or no need. */
static __always_inline struct tag *tag_of_lent(struct bpf_sock_addr *ctx, struct owner *owner, struct endpoint *endpoint,
					       int connects)
{
	struct tag *tag = tags.sk_storage_get(ctx->sk, 0, 0);

	if (!tag && connects && lends(endpoint))
		tag = tags.sk_storage_get(ctx->sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (tag && tag->container != owner->id) {
		tag->container = owner->id;
		tag->home = GRAFT_HOME_HOST;
		tag->open_port = 0;
	}
	return tag;
}
