// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* connect and send: only what an egress rule grants, from that rule's endpoint. */

/* Whether the socket's source is from another endpoint than the one that it must use now. */
static __always_inline int has_other_source(struct request *request)
{
	return request->tag && request->tag->source && request->tag->source != request->endpoint;
}

/* Whether this socket keeps the source that it has: it is bound to an endpoint, or to an address of its own
 * where it may, or it used this endpoint before. (A socket that sends has at least a port: the kernel assigned
 * one before it called the hook.) */
static __always_inline int has_source(struct bpf_sock_addr *ctx, struct request *request, struct owner *owner,
				      struct endpoint *endpoint, int sending, int bound)
{
	struct local_address local;
	u32 ip[4];
	int has_address;

	read_local_address(&local, ctx->sk);
	if (!local.port)
		return 0;
	/* An IPv6 address cannot be the source towards IPv4. */
	has_address = local.ip[0] | local.ip[1] | local.ip[2] | local.ip[3] ? 1 : 0;
	if (bound && !has_address && is_dual_stack(owner->tag))
		return 1;
	if ((has_address || bound) && local.family != endpoint->family)
		return 0;
	if (bound)
		return 1;
	if (binds_freely(owner->container) && (!sending || has_address))
		return 1;
	if (has_other_source(request) || keeps_lent_port(request->tag, endpoint))
		return 0;
	if (!is_port_of(endpoint, local.port))
		return 0;
	__builtin_memcpy(ip, endpoint->addr, 16);
	/* An AF_INET6 socket that has no address yet has none of either family. */
	return ip[0] == local.ip[0] && ip[1] == local.ip[1] && ip[2] == local.ip[2] && ip[3] == local.ip[3];
}

/* Whether a redirected connection goes to ::1, and not to 127.0.0.1. */
static __always_inline int goes_to_ip6_relay(struct bpf_sock_addr *ctx, struct request *request)
{
	return ctx->user_family == AF_INET6 && !request->mapped && request->relay->six;
}

/* Whether what listens at the relay's port is the relay of this container. */
static __always_inline int relay_listens(struct bpf_sock_addr *ctx, struct owner *owner, struct request *request)
{
	struct bpf_sock_tuple to = {};
	struct bpf_sock *sk;

	/* From port 0: the kernel finds no connection, only who listens. */
	if (goes_to_ip6_relay(ctx, request)) {
		to.ipv6.daddr[3] = bpf_htonl(1);
		to.ipv6.saddr[3] = bpf_htonl(1);
		to.ipv6.dport = bpf_htons(request->relay->port);
		sk = bpf_skc_lookup_tcp(ctx, &to, sizeof(to.ipv6), BPF_F_CURRENT_NETNS, 0);
	} else {
		to.ipv4.daddr = bpf_htonl(0x7f000001);
		to.ipv4.saddr = bpf_htonl(0x7f000001);
		to.ipv4.dport = bpf_htons(request->relay->port);
		sk = bpf_skc_lookup_tcp(ctx, &to, sizeof(to.ipv4), BPF_F_CURRENT_NETNS, 0);
	}
	return is_released_relay(sk, owner->id);
}

/* Puts what is stored of a datagram socket's earlier connect aside: this one may fail, or another thread's may be the last.
 * Of the two the one that says where the socket is connected now is not lost. Returns 0 where there is no memory. */
static __always_inline int put_aside(struct bpf_sock *sk, struct crossing *crossing)
{
	struct crossing *former;

	if (crossing->role != GRAFT_CROSSING_REDIRECTED || !crossing->near_port)
		return 1;
	former = former_crossings.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!former)
		return 0;
	if (!former->near_port || !is_still_there(sk, former) || is_still_there(sk, crossing))
		*former = *crossing;
	return 1;
}

/* Stores the requested destination with a socket, for getpeername and for graftd. Returns 0 where there is no memory. */
static __always_inline int store_crossing(struct bpf_sock_addr *ctx, struct owner *owner, struct request *request)
{
	struct bpf_sock *sk = ctx->sk;
	struct crossing *crossing = crossings.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	u64 ids = bpf_get_current_uid_gid();

	if (!crossing || !put_aside(sk, crossing))
		return 0;
	__builtin_memcpy(crossing->addr, request->addr, 16);
	crossing->port = request->port;
	crossing->family = request->family;
	crossing->role = GRAFT_CROSSING_REDIRECTED;
	crossing->container = owner->id;
	crossing->uid = ids;
	crossing->gid = ids >> 32;
	crossing->near = request->exchange;
	crossing->near_port = request->protocol == IPPROTO_TCP ? 0 :
			      request->exchange                 ? request->relay->datagram_port :
								  request->stand_in;
	return 1;
}

/* Transport splice, and unix sockets: a granted connection goes to Graft's relay inside the container's namespace, which
 * connects from the endpoint, or to the unix socket; the requested destination is stored with the socket. */
static __always_inline int redirect(struct bpf_sock_addr *ctx, struct owner *owner, struct request *request)
{
	request->relay = relays.lookup(&owner->id);
	if (!request->relay || !relay_listens(ctx, owner, request)) {
		request->relay = 0;
		/* No daemon serves this container now. Passed, the connection would take a route that the
		 * operator did not intend. */
		return refuse_with(ECONNREFUSED);
	}
	if (!store_crossing(ctx, owner, request)) {
		request->relay = 0;
		return refuse_with(EACCES);
	}
	return PASS;
}

/* Whether a destination needs an interface, which the socket may be bound to for it. */
static __always_inline int is_link_local(struct request *request)
{
	return request->family == GRAFT_IPV6 && request->addr[0] == 0xfe && (request->addr[1] & 0xc0) == 0x80;
}

/* Records which endpoint a socket got its source from, for the packet hook too. */
static __always_inline void record_source(struct request *request, struct endpoint *from)
{
	if (!request->tag)
		return;
	request->tag->source = request->endpoint;
	request->tag->lent_family = from->family;
	request->tag->lent = (is_unspecified(from->addr) ? 0 : GRAFT_LENT_ADDRESS) | (from->port ? GRAFT_LENT_PORT : 0);
}

/* The source that a connect binds to: a struct sockaddr_in6, or a struct sockaddr_in in its place. */
struct source {
	u16 family;
	u16 port_be;
	u32 flowinfo; /* of a struct sockaddr_in: the address */
	u32 ip[4];
	u32 scope;
};

/* An endpoint's address, as a socket of that family has it; its size. (An IPv6 socket is connected by an IPv4 address too.
 * bpf_bind() would take such an address for it as well, and bind it to that port at all IPv6 addresses.) */
static __always_inline int write_source(struct source *source, struct endpoint *from, u32 family)
{
	__builtin_memset(source, 0, sizeof(*source));
	source->family = family;
	source->port_be = bpf_htons(from->port);
	if (family == AF_INET) {
		__builtin_memcpy(&source->flowinfo, from->addr, 4);
		return 16;
	}
	if (from->family == GRAFT_IPV4) {
		source->ip[2] = bpf_htonl(0xffff);
		__builtin_memcpy(&source->ip[3], from->addr, 4);
	} else {
		__builtin_memcpy(source->ip, from->addr, 16);
	}
	return sizeof(*source);
}

/* How many ports of a range a connect tries. */
#define GRAFT_PORT_TRIES 32

/* Binds a socket that has no source yet to the endpoint that `source` has the address of.
 * Of a range one that is free is looked for, from a random port on. Returns 0 where that fails. */
static __always_inline int bind_source(struct bpf_sock_addr *ctx, struct source *source, int size, struct request *request,
				       struct endpoint *endpoint)
{
	u32 first = endpoint->port, last = endpoint->last_port, start, try;
	int error;

	if (request->protocol == IPPROTO_TCP && first && !leaves_group(ctx)) {
		refuse_with(EADDRINUSE);
		return 0;
	}
	if (!last) {
		error = meets_others(ctx, request, endpoint) ? -EADDRINUSE : bpf_bind(ctx, (void *)source, size);
		if (error == -EADDRINUSE)
			refuse_with(EADDRINUSE);
		return !error;
	}
	start = bpf_get_prandom_u32();
	for (try = 0; try < GRAFT_PORT_TRIES; try++) {
		source->port_be = bpf_htons((u16)(first + (start + try) % (last - first + 1)));
		error = bpf_bind(ctx, (void *)source, size);
		if (!error)
			return 1;
		if (error != -EADDRINUSE)
			return 0;
	}
	refuse_with(EADDRNOTAVAIL);
	return 0;
}

/* Whether a bind to the endpoint would take the IPv4 port too, which the endpoint does not grant: others of the host could
 * not have that any more, or lose their datagrams. */
static __always_inline int takes_ipv4_port_along(struct bpf_sock_addr *ctx, struct endpoint *from)
{
	return from->family == GRAFT_IPV6 && is_unspecified(from->addr) && from->port &&
	       !(from->flags & GRAFT_ENDPOINT_DUAL_STACK) && !is_requester_v6only(ctx);
}

/* Gives a socket the source of the endpoint that the rule for its destination names. */
static __always_inline int take_source(struct bpf_sock_addr *ctx, struct request *request, struct endpoint *from, int verdict)
{
	struct source source;
	int size;

	if (from->family != request->family)
		return REFUSE;
	/* A bind to the unspecified address is needed only to clear another endpoint's address. The kernel does
	 * that, or returns an error where it is too late. */
	if (is_unspecified(from->addr) && !from->port && !has_other_source(request) && !must_clear_address(ctx->sk, request))
		return verdict;
	if (takes_ipv4_port_along(ctx, from))
		return refuse_with(EACCES);
	size = write_source(&source, from, ctx->family);
	if (!bind_source(ctx, &source, size, request, from))
		return REFUSE;
	record_source(request, from);
	return verdict;
}

/* Whether a socket has a port that an endpoint of the other family lent it, where that means nothing. (The kernel keeps
 * such a port with the socket until that is closed.) */
static __always_inline int has_other_familys_port(struct tag *tag, struct request *request)
{
	return tag && tag->lent & GRAFT_LENT_PORT && tag->lent_family != request->family;
}

/* Whether a socket is bound to an endpoint that has no port in the family of its request (an IPv6 socket at an IPv4
 * endpoint): that port would be shown to others as one of the other family's. */
static __always_inline int is_at_other_familys_endpoint(struct tag *tag, struct request *request)
{
	struct endpoint *bound = tag ? endpoints.lookup(&tag->endpoint) : 0;

	return bound && bound->family != request->family && !(bound->flags & GRAFT_ENDPOINT_DUAL_STACK);
}

/* What `sending` is: a connect, a datagram to the address of the send, or one to the socket's peer. */
#define GRAFT_CONNECTS 0
#define GRAFT_SENDS 1
#define GRAFT_SENDS_TO_PEER 2

/* Decides a destination. Returns the endpoint to take the source from, or NULL with *verdict set. */
static __always_inline struct endpoint *decide_destination(struct bpf_sock_addr *ctx, struct request *request,
							   int *verdict, int sending)
{
	struct owner owner;
	struct endpoint *endpoint;
	struct ferry *ferry;
	u32 rule, id = 0;
	int bound;

	*verdict = PASS;
	owner_of(ctx, &owner);
	if (owner.home == GRAFT_HOME_FERRY && sending == GRAFT_CONNECTS)
		*verdict = answer_ferry(ctx, &owner, request);
	if (!owner.id || owner.home == GRAFT_HOME_FERRY)
		return 0; /* (of what a ferry sends the packet hook judges where it arrives) */
	request->container = owner.id;
	request->home = owner.home;
	if (!owner.container) {
		if (owner.home == GRAFT_HOME_HOST)
			*verdict = refuse(&owner, GRAFT_DECISION_REFUSED_CONNECT);
		return 0;
	}
	if (is_exempt(owner.container, request->protocol))
		return 0;
	substitute_loopback(request, owner.home == GRAFT_HOME_HOST);
	if (owner.home == GRAFT_HOME_HOST && is_ferry(&owner, request, &ferry)) {
		/* What its addresses stand for was judged for the sends that took them, not for this one. */
		*verdict = refuse(&owner, GRAFT_DECISION_REFUSED_CONNECT);
		return 0;
	}
	rule = egress_rule(owner.container, request, &id);
	if (rule == GRAFT_VERDICT_DENY) {
		*verdict = refuse(&owner, GRAFT_DECISION_REFUSED_CONNECT);
		return 0;
	}
	if (request->protocol == IPPROTO_TCP &&
	    (owner.home == GRAFT_HOME_CONTAINER || owner.container->transport == GRAFT_TRANSPORT_DIRECT)) {
		if (rule == GRAFT_VERDICT_GRANT && is_relayed(owner.container, id) &&
		    bpf_get_netns_cookie(ctx) == owner.container->netns) {
			*verdict = redirect(ctx, &owner, request);
			return 0;
		}
		crossings.sk_storage_delete(ctx->sk); /* of an earlier connect that failed */
	}
	if (owner.home == GRAFT_HOME_CONTAINER) {
		if (owner.container->transport == GRAFT_TRANSPORT_SPLICE && request->protocol == IPPROTO_UDP) {
			/* (What is stored of an earlier connect stays, for this one may fail, and says where that led.) */
			if (rule == GRAFT_VERDICT_GRANT && bpf_get_netns_cookie(ctx) == owner.container->netns) {
				*verdict = request->family == GRAFT_IPV4 ?
						   redirect_datagrams(ctx, &owner, request) :
						   redirect_datagrams6(ctx, &owner, request, !sending);
				if (*verdict == PASS && !sending && !store_crossing(ctx, &owner, request)) {
					request->relay = 0;
					request->exchange = 0;
					request->stand_in = 0;
					*verdict = refuse_with(EACCES);
				}
				return 0;
			}
		}
		/* Also where a rule grants the destination: this socket was not swapped (a 32-bit or
		 * io_uring call), so it can reach only what the container's own namespace reaches. */
		if (rule != GRAFT_VERDICT_CONTAINER && owner.container->connect_default == GRAFT_DEFAULT_DENY)
			*verdict = refuse(&owner, GRAFT_DECISION_REFUSED_CONNECT);
		return 0;
	}
	request->fixed_source = !binds_freely(owner.container);
	bound = is_bound(ctx->sk, owner.tag, owner.container, bpf_get_netns_cookie(ctx));
	request->bound = bound;
	request->any_source = bound || has_earlier_port(ctx->sk, owner.tag);
	if (sending == GRAFT_SENDS && is_for_inside(&owner, request, rule) && !is_diverted(ctx->sk)) {
		*verdict = call_ferry(ctx, &owner, request);
		return 0;
	}
	if (sending == GRAFT_SENDS && outlasts_its_peer(ctx->sk, owner.tag)) {
		/* No answer would get to it. */
		*verdict = refuse(&owner, GRAFT_DECISION_REFUSED_CONNECT);
		return 0;
	}
	if (rule != GRAFT_VERDICT_GRANT) {
		/* A swapped socket is outside the container's namespace, and may do only what a rule grants. */
		if (!defaults_apply(owner.container) ||
		    (sending == GRAFT_CONNECTS && denies_anything(owner.container) &&
		     (would_mix_peers(ctx, request) || (request->protocol == IPPROTO_UDP && is_to_group(request)))) ||
		    (rule == GRAFT_VERDICT_NONE && owner.container->connect_default == GRAFT_DEFAULT_DENY) ||
		    has_other_familys_port(owner.tag, request) ||
		    (bound && is_at_other_familys_endpoint(owner.tag, request)))
			*verdict = refuse(&owner, GRAFT_DECISION_REFUSED_CONNECT);
		return 0;
	}
	endpoint = endpoint_for(ctx, request, id);
	if (endpoint && !owner.tag)
		owner.tag = tag_of_lent(ctx, &owner, endpoint, sending == GRAFT_CONNECTS);
	request->tag = owner.tag;
	if (!endpoint || is_unix(endpoint) || has_lost_endpoint(ctx->sk, owner.tag, bound) ||
	    (is_diverted(ctx->sk) && !is_link_local(request)) ||
	    (sending == GRAFT_CONNECTS && !owner.tag && lends(endpoint)) || keeps_loopback(ctx->sk, request, endpoint) ||
	    (sending == GRAFT_CONNECTS &&
	     (would_choose_address(ctx, request, endpoint, bound) || would_mix_peers(ctx, request)))) {
		*verdict = refuse(&owner, GRAFT_DECISION_REFUSED_CONNECT);
		return 0;
	}
	count(owner.id, GRAFT_DECISION_CONNECTED);
	request->endpoint = id;
	return has_source(ctx, request, &owner, endpoint, sending, bound) ? 0 : endpoint;
}

/* To loopback instead: to Graft's relay, or for the unspecified address. `plain`: ::1, else ::ffff:127.0.0.1. */
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

static __always_inline int write_exchange4(struct bpf_sock_addr *ctx, struct request *request)
{
	ctx->user_ip4 = bpf_htonl(request->exchange);
	ctx->user_port = bpf_htons(request->relay->datagram_port);
	return PASS;
}

static __always_inline int rewrite_connect4(struct bpf_sock_addr *ctx, struct request *request)
{
	struct endpoint *from;
	int verdict;

	from = decide_destination(ctx, request, &verdict, GRAFT_CONNECTS);
	if (request->exchange)
		return write_exchange4(ctx, request);
	if (request->relay) {
		write_loopback4(ctx);
		ctx->user_port = bpf_htons(request->relay->port);
		return PASS;
	}
	if (request->to_loopback)
		write_loopback4(ctx);
	return from ? take_source(ctx, request, from, verdict) : verdict;
}

static __always_inline int rewrite_connect6(struct bpf_sock_addr *ctx, struct request *request)
{
	struct endpoint *from;
	int verdict;

	from = decide_destination(ctx, request, &verdict, GRAFT_CONNECTS);
	if (request->exchange) {
		write_loopback6(ctx, 0);
		ctx->user_ip6[3] = bpf_htonl(request->exchange);
		ctx->user_port = bpf_htons(request->relay->datagram_port);
		return PASS;
	}
	if (request->stand_in) {
		write_loopback6(ctx, 1);
		ctx->user_port = bpf_htons(request->stand_in);
		return PASS;
	}
	if (request->relay) {
		write_loopback6(ctx, goes_to_ip6_relay(ctx, request));
		ctx->user_port = bpf_htons(request->relay->port);
		return PASS;
	}
	if (request->to_loopback)
		write_loopback6(ctx, !request->mapped);
	return from ? take_source(ctx, request, from, verdict) : verdict;
}

int graft_connect4(struct bpf_sock_addr *ctx)
{
	struct request request;

	read_request4(ctx, &request);
	return trace_request(&request, GRAFT_CALL_CONNECT, rewrite_connect4(ctx, &request));
}

int graft_connect6(struct bpf_sock_addr *ctx)
{
	struct request request;

	read_request6(ctx, &request);
	return trace_request(&request, GRAFT_CALL_CONNECT, rewrite_connect6(ctx, &request));
}
