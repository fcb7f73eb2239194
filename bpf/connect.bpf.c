// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* connect and send: only what an egress rule grants, from that rule's endpoint. */

/* Whether the socket has got its source from another endpoint than the one that it is to leave from now. */
static __always_inline int is_lent_by_another(struct asked *asked)
{
	return asked->tag && asked->tag->source && asked->tag->source != asked->endpoint;
}

/* Whether the source of this socket stands already, so that it is not given the endpoint's: it holds an
 * endpoint, or an address of its own where it may, or it left from this endpoint before. (A socket that
 * sends has a port at least: the kernel gave it one before it asked us.) */
static __always_inline int has_source(struct bpf_sock_addr *ctx, struct asked *asked, struct owner *owner,
				      struct endpoint *endpoint, int sending, int bound)
{
	struct place place;
	u32 ip[4];
	int somewhere;

	place_of(&place, ctx->sk);
	if (!place.port)
		return 0;
	/* An IPv6 address is no source towards IPv4. */
	somewhere = place.ip[0] | place.ip[1] | place.ip[2] | place.ip[3] ? 1 : 0;
	if ((somewhere || bound) && place.family != endpoint->family)
		return 0;
	if (bound)
		return 1;
	if (binds_freely(owner->container) && (!sending || somewhere))
		return 1;
	if (is_lent_by_another(asked))
		return 0;
	if (endpoint->port && endpoint->port != place.port)
		return 0;
	__builtin_memcpy(ip, endpoint->addr, 16);
	/* An AF_INET6 socket that has no address yet has none of either family. */
	return ip[0] == place.ip[0] && ip[1] == place.ip[1] && ip[2] == place.ip[2] && ip[3] == place.ip[3];
}

/* Transport splice: a granted connection goes to Graft's relay inside the container's namespace, which
 * makes it from the endpoint; what was asked for is remembered with the socket. */
static __always_inline int redirect(struct bpf_sock_addr *ctx, struct owner *owner, struct asked *asked)
{
	struct crossing *crossing;

	asked->relay = relays.lookup(&owner->id);
	if (!asked->relay) {
		/* No daemon serves this container now. Let go on, the connection would take a way that the
		 * operator did not mean. */
		return refuse_with(ECONNREFUSED);
	}
	crossing = crossings.sk_storage_get(ctx->sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!crossing) {
		asked->relay = 0;
		return refuse_with(EACCES);
	}
	__builtin_memcpy(crossing->addr, asked->addr, 16);
	crossing->port = asked->port;
	crossing->family = asked->family;
	crossing->role = GRAFT_CROSSING_REDIRECTED;
	crossing->container = owner->id;
	return PASS;
}

/* Whether an address that the socket was given by an endpoint is to be taken off it, because the one that it leaves from
 * now has none of its own. (What the kernel picked for it by its routes, or what it had before there was a policy, it
 * may keep.) */
static __always_inline int has_address_to_lose(struct bpf_sock *sk, struct asked *asked)
{
	struct place place;

	if (!asked->tag || !(asked->tag->endpoint || asked->tag->source))
		return 0;
	place_of(&place, sk);
	return place.ip[0] | place.ip[1] | place.ip[2] | place.ip[3] ? 1 : 0;
}

/* Whether a destination is told apart by the interface that the socket is tied to for it. */
static __always_inline int is_link_local(struct asked *asked)
{
	return asked->family == GRAFT_IPV6 && asked->addr[0] == 0xfe && (asked->addr[1] & 0xc0) == 0x80;
}

/* Remembers from which endpoint a socket has got its source. */
static __always_inline void note_source(struct asked *asked)
{
	if (asked->tag)
		asked->tag->source = asked->endpoint;
}

/* Decides a destination. Returns the endpoint to leave from, or NULL with *verdict set. */
static __always_inline struct endpoint *decide_destination(struct bpf_sock_addr *ctx, struct asked *asked, int *verdict,
							   int sending)
{
	struct owner owner;
	struct endpoint *endpoint;
	u32 rule, id = 0;
	int bound;

	*verdict = PASS;
	owner_of(ctx, &owner);
	if (!owner.id)
		return 0;
	if (!owner.container) {
		if (owner.home == GRAFT_HOME_HOST)
			*verdict = refuse(&owner, GRAFT_DECISION_REFUSED_CONNECT);
		return 0;
	}
	if (is_left_alone(owner.container, asked->protocol))
		return 0;
	name_loopback(asked, owner.home == GRAFT_HOME_HOST);
	rule = egress_rule(owner.container, asked, &id);
	if (rule == GRAFT_VERDICT_DENY) {
		*verdict = refuse(&owner, GRAFT_DECISION_REFUSED_CONNECT);
		return 0;
	}
	if (owner.home == GRAFT_HOME_CONTAINER) {
		if (owner.container->transport == GRAFT_TRANSPORT_SPLICE && asked->protocol == IPPROTO_TCP) {
			if (rule == GRAFT_VERDICT_GRANT && bpf_get_netns_cookie(ctx) == owner.container->netns) {
				*verdict = redirect(ctx, &owner, asked);
				return 0;
			}
			crossings.sk_storage_delete(ctx->sk); /* of a connect before that failed */
		}
		/* Also where a rule grants the destination: this socket was not swapped (a 32-bit or
		 * io_uring call), so it goes nowhere but where the container's own namespace goes. */
		if (rule != GRAFT_VERDICT_CONTAINER && owner.container->connect_default == GRAFT_DEFAULT_DENY)
			*verdict = refuse(&owner, GRAFT_DECISION_REFUSED_CONNECT);
		return 0;
	}
	asked->confined = !binds_freely(owner.container);
	bound = is_bound(ctx->sk, owner.tag, owner.container, bpf_get_netns_cookie(ctx));
	asked->anywhere = bound || has_port_from_before(ctx->sk, owner.tag);
	if (rule != GRAFT_VERDICT_GRANT) {
		/* direct: the host's namespace is the container's own, so its default applies. A swapped
		 * socket has left the container's namespace, and has no right of its own out here. */
		if (owner.container->transport != GRAFT_TRANSPORT_DIRECT ||
		    (rule == GRAFT_VERDICT_NONE && owner.container->connect_default == GRAFT_DEFAULT_DENY))
			*verdict = refuse(&owner, GRAFT_DECISION_REFUSED_CONNECT);
		return 0;
	}
	endpoint = endpoint_for(ctx, asked, id);
	if (!endpoint || has_lost(ctx->sk, owner.tag, bound) || (is_diverted(ctx->sk) && !is_link_local(asked))) {
		*verdict = refuse(&owner, GRAFT_DECISION_REFUSED_CONNECT);
		return 0;
	}
	count(owner.id, GRAFT_DECISION_CONNECTED);
	asked->tag = owner.tag;
	asked->endpoint = id;
	return has_source(ctx, asked, &owner, endpoint, sending, bound) ? 0 : endpoint;
}

/* Towards loopback instead: Graft's relay, or what no address stands for. `plain`: ::1, else ::ffff:127.0.0.1. */
static __always_inline void write_loopback4(struct bpf_sock_addr *ctx)
{
	ctx->user_ip4 = bpf_htonl(0x7f000001);
}

static __always_inline void write_loopback6(struct bpf_sock_addr *ctx, int plain)
{
	ctx->user_ip6[0] = 0;
	ctx->user_ip6[1] = 0;
	ctx->user_ip6[2] = plain ? 0 : bpf_htonl(0xffff);
	ctx->user_ip6[3] = plain ? bpf_htonl(1) : bpf_htonl(0x7f000001);
}

int graft_connect4(struct bpf_sock_addr *ctx)
{
	struct asked asked;
	struct endpoint *from;
	struct sockaddr_in {
		u16 family;
		u16 port_be;
		u32 ip;
		u64 zero;
	} source = { .family = AF_INET };
	int verdict;

	asked4(ctx, &asked);
	from = decide_destination(ctx, &asked, &verdict, 0);
	if (asked.relay) {
		write_loopback4(ctx);
		ctx->user_port = bpf_htons(asked.relay->port);
		return PASS;
	}
	if (asked.named)
		write_loopback4(ctx);
	if (!from)
		return verdict;
	__builtin_memcpy(&source.ip, from->addr, 4);
	source.port_be = bpf_htons(from->port);
	if (from->family != GRAFT_IPV4)
		return REFUSE;
	/* To no address at all where it has another one's: the kernel does that, or says that it is too late. */
	if (!source.ip && !source.port_be && !is_lent_by_another(&asked) && !has_address_to_lose(ctx->sk, &asked))
		return verdict;
	if (bpf_bind(ctx, (struct sockaddr *)&source, sizeof(source)))
		return REFUSE;
	note_source(&asked);
	return verdict;
}

int graft_connect6(struct bpf_sock_addr *ctx)
{
	struct asked asked;
	struct endpoint *from;
	struct sockaddr_in6 {
		u16 family;
		u16 port_be;
		u32 flowinfo;
		u32 ip[4];
		u32 scope;
	} source = { .family = AF_INET6 };
	int verdict;

	asked6(ctx, &asked);
	from = decide_destination(ctx, &asked, &verdict, 0);
	if (asked.relay) {
		write_loopback6(ctx, !asked.mapped && asked.relay->six);
		ctx->user_port = bpf_htons(asked.relay->port);
		return PASS;
	}
	if (asked.named)
		write_loopback6(ctx, !asked.mapped);
	if (!from)
		return verdict;
	if (from->family == GRAFT_IPV4) {
		source.ip[2] = bpf_htonl(0xffff);
		__builtin_memcpy(&source.ip[3], from->addr, 4);
	} else {
		__builtin_memcpy(source.ip, from->addr, 16);
	}
	source.port_be = bpf_htons(from->port);
	if ((from->family == GRAFT_IPV4) != (asked.family == GRAFT_IPV4))
		return REFUSE;
	if (!source.ip[0] && !source.ip[1] && !source.ip[3] && !source.port_be && !is_lent_by_another(&asked) &&
	    !has_address_to_lose(ctx->sk, &asked))
		return verdict;
	if (bpf_bind(ctx, (struct sockaddr *)&source, sizeof(source)))
		return REFUSE;
	note_source(&asked);
	return verdict;
}

/* Whether a send names no destination: of a connected socket that says something besides (a cmsg). The kernel then
 * shows no address at all, and goes to the peer. */
static __always_inline int goes_to_peer(struct bpf_sock_addr *ctx, struct asked *asked)
{
	u64 word[2];

	__builtin_memcpy(word, asked->addr, 16);
	return !asked->port && !(word[0] | word[1]) && ctx->sk->dst_port;
}

/* Whether a datagram may not leave from the endpoint that its destination's rule names: from a port of it, or from no
 * address where the socket has another one's. */
static __always_inline int cannot_leave_from(struct bpf_sock *sk, struct asked *asked, struct endpoint *from)
{
	u32 ip[4];

	__builtin_memcpy(ip, from->addr, 16);
	return from->port || is_lent_by_another(asked) ||
	       (!(ip[0] | ip[1] | ip[2] | ip[3]) && has_address_to_lose(sk, asked));
}

/* Whether the kernel picks the source of a datagram, where neither the socket nor its endpoint has an address. */
static __always_inline int leaves_source_to_kernel(struct asked *asked)
{
	return asked->confined && !asked->anywhere;
}

/* The source address of a datagram can be set for it alone, and is: a control message may have named another one, of a
 * connected socket too. Its source port cannot: an endpoint with a port of its own serves sockets that are bound or
 * connected. */
int graft_sendmsg4(struct bpf_sock_addr *ctx)
{
	struct asked asked;
	struct endpoint *from;
	int verdict;
	u32 ip = 0;

	asked4(ctx, &asked);
	if (goes_to_peer(ctx, &asked)) {
		u32 peer = ctx->sk->dst_ip4;

		__builtin_memcpy(asked.addr, &peer, 4);
		asked.port = bpf_ntohs(ctx->sk->dst_port);
	}
	from = decide_destination(ctx, &asked, &verdict, 1);
	if (asked.named)
		write_loopback4(ctx);
	if (!from) {
		if (verdict != PASS || !asked.confined)
			return verdict;
	} else {
		if (from->family != GRAFT_IPV4 || cannot_leave_from(ctx->sk, &asked, from))
			return refuse_with(EACCES);
		__builtin_memcpy(&ip, from->addr, 4);
	}
	if (!ip && asked.confined)
		ip = ctx->sk->src_ip4;
	if (ip || leaves_source_to_kernel(&asked))
		ctx->msg_src_ip4 = ip;
	return verdict;
}

int graft_sendmsg6(struct bpf_sock_addr *ctx)
{
	struct asked asked;
	struct endpoint *from;
	struct place place;
	int verdict;
	u32 ip[4] = {};

	asked6(ctx, &asked);
	if (goes_to_peer(ctx, &asked)) {
		ip[0] = ctx->sk->dst_ip6[0];
		ip[1] = ctx->sk->dst_ip6[1];
		ip[2] = ctx->sk->dst_ip6[2];
		ip[3] = ctx->sk->dst_ip6[3];
		__builtin_memcpy(asked.addr, ip, 16);
		asked.port = bpf_ntohs(ctx->sk->dst_port);
	}
	from = decide_destination(ctx, &asked, &verdict, 1);
	if (asked.named)
		write_loopback6(ctx, !asked.mapped);
	if (!from) {
		if (verdict != PASS || !asked.confined)
			return verdict;
		__builtin_memset(ip, 0, sizeof(ip)); /* a peer's, perhaps */
	} else {
		/* Towards a mapped destination the kernel asks graft_sendmsg4. */
		if (from->family != GRAFT_IPV6 || cannot_leave_from(ctx->sk, &asked, from))
			return refuse_with(EACCES);
		__builtin_memcpy(ip, from->addr, 16);
	}
	place_of(&place, ctx->sk);
	if (!(ip[0] | ip[1] | ip[2] | ip[3]) && asked.confined && place.family == GRAFT_IPV6)
		__builtin_memcpy(ip, place.ip, 16);
	if (ip[0] | ip[1] | ip[2] | ip[3] || leaves_source_to_kernel(&asked)) {
		ctx->msg_src_ip6[0] = ip[0];
		ctx->msg_src_ip6[1] = ip[1];
		ctx->msg_src_ip6[2] = ip[2];
		ctx->msg_src_ip6[3] = ip[3];
	}
	return verdict;
}
