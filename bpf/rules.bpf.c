// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* The rules: one or two lookups for a decision, whatever their number. */

static __always_inline u8 protocol_bit(u8 protocol)
{
	return protocol == IPPROTO_TCP ? GRAFT_TCP : protocol == IPPROTO_UDP ? GRAFT_UDP : 0;
}

/* Whether an endpoint serves a protocol. ICMP has no ports: one that is for any protocol lends its address. */
static __always_inline int serves(struct endpoint *endpoint, u8 protocol)
{
	if (protocol == IPPROTO_ICMP)
		return endpoint->protocols == (GRAFT_TCP | GRAFT_UDP);
	return endpoint->protocols & protocol_bit(protocol);
}

/* Whether this is a socket of a direct container whose protocol no rule can name, and the policy permits such. */
static __always_inline int is_exempt(struct container *container, u8 protocol)
{
	return container->transport == GRAFT_TRANSPORT_DIRECT && container->flags & GRAFT_CONTAINER_OTHERS &&
	       !protocol_bit(protocol) && !(protocol == IPPROTO_ICMP && container->flags & GRAFT_CONTAINER_ICMP);
}

static __always_inline int is_same_address(u8 *one, u8 *other)
{
	u64 first[2], second[2];

	__builtin_memcpy(first, one, 16);
	__builtin_memcpy(second, other, 16);
	return first[0] == second[0] && first[1] == second[1];
}

static __always_inline int is_unspecified(u8 *addr)
{
	u64 word[2];

	__builtin_memcpy(word, addr, 16);
	return !(word[0] | word[1]);
}

/* What a bind becomes, NULL where no rule names the address. The exact address first, then "any". */
static __always_inline struct ingress_value *ingress_rule(u32 ruleset, struct request *request)
{
	struct ingress_key key = {
		.prefixlen = GRAFT_INGRESS_FIXED_BITS + 16,
		.ruleset = ruleset,
		.protocol = request->protocol,
		.family = request->family,
		.port_be = bpf_htons(request->port),
	};
	struct ingress_value *found;

	__builtin_memcpy(key.addr, request->addr, 16);
	found = ingress.lookup(&key);
	if (!found) {
		__builtin_memset(key.addr, 0, 16);
		key.any = 1;
		found = ingress.lookup(&key);
	}
	return found;
}

/* Which port of the endpoint a requested one becomes: 1, with *port; 0: the kernel picks. Of an endpoint that is a range,
 * each port serves exactly one of the rule's. Returns 0 where there is none: the endpoint was changed since the rule was
 * written. */
static __always_inline int endpoint_port(struct endpoint *endpoint, struct ingress_value *rule, u16 requested, u16 *port)
{
	u32 mapped = endpoint->port;

	if (endpoint->last_port) {
		if (!rule->first_port || requested < rule->first_port)
			return 0;
		mapped += requested - rule->first_port;
		if (mapped > endpoint->last_port)
			return 0;
	} else if (!requested && mapped) {
		return 0; /* what the program is told its port is, is told to others: it must be the one it has */
	}
	*port = mapped;
	return 1;
}

/* For the unspecified address the kernel connects to loopback, or, from a socket that has an address, to that one
 * (tcp_v6_connect, ip_route_output_key_hash). It is judged as loopback, and on the host's stack rewritten to it: the
 * address that is judged and the one that the kernel connects to must be the same. */
static __always_inline void substitute_loopback(struct request *request, int host)
{
	u64 word[2];

	__builtin_memcpy(word, request->addr, 16);
	if (word[0] | word[1])
		return;
	if (request->family == GRAFT_IPV4) {
		request->addr[0] = 127;
		request->addr[3] = 1;
	} else {
		request->addr[15] = 1;
	}
	request->to_loopback = host;
}

/* The verdict for a destination, as it is in the maps. */
static __always_inline u32 covering_rule(struct container *container, struct request *request, u32 *endpoint)
{
	struct egress_key key = {
		.prefixlen = GRAFT_EGRESS_FIXED_BITS + (request->family == GRAFT_IPV4 ? 32 : 128),
		.ruleset = container->ruleset,
		.protocol = request->protocol,
		.family = request->family,
	};
	struct egress_value *node;
	struct egress_port_value *found;

	__builtin_memcpy(key.addr, request->addr, 16);
	node = egress.lookup(&key);
	if (!node)
		return GRAFT_VERDICT_NONE;
	if (node->verdict) {
		*endpoint = node->endpoint;
		return node->verdict;
	}

	struct egress_port_key port = {
		.prefixlen = GRAFT_EGRESS_PORT_FIXED_BITS + 16,
		.ruleset = container->ruleset,
		.node = node->node,
		.port_be = bpf_htons(request->port),
	};
	found = egress_ports.lookup(&port);
	if (!found)
		return GRAFT_VERDICT_NONE;
	*endpoint = found->endpoint;
	return found->verdict;
}

/* Whether an IPv4 address is for all on one of the links of a namespace. */
static __always_inline int is_of_all(u64 netns, void *ip)
{
	struct host_address key;

	__builtin_memset(&key, 0, sizeof(key));
	key.netns = netns;
	key.family = GRAFT_IPV4;
	__builtin_memcpy(key.addr, ip, 4);
	return broadcasts.lookup(&key) != 0;
}

/* The same of a datagram for it. */
static __always_inline int is_broadcast(struct request *request, u64 netns)
{
	return request->family == GRAFT_IPV4 && request->protocol != IPPROTO_TCP && is_of_all(netns, request->addr);
}

/* What the rules say of a destination. Only one for it alone grants a broadcast address: of what is sent there the host
 * has a copy for its own sockets that no hook for packets sees, wherever the datagram says that it goes (a program can
 * have the kernel send one to another peer by the route to this one). */
static __always_inline u32 egress_rule(struct container *container, struct request *request, u32 *endpoint)
{
	u32 rule = covering_rule(container, request, endpoint);
	struct endpoint *from;

	if (rule == GRAFT_VERDICT_NAMED)
		return GRAFT_VERDICT_GRANT;
	if (rule != GRAFT_VERDICT_GRANT || request->protocol == IPPROTO_TCP)
		return rule;
	from = endpoints.lookup(endpoint);
	return from && is_broadcast(request, from->netns) ? GRAFT_VERDICT_NONE : rule;
}

/* Whether an endpoint is a unix socket, which no socket of a container has for an address. */
static __always_inline int is_unix(struct endpoint *endpoint)
{
	return endpoint && endpoint->flags & GRAFT_ENDPOINT_UNIX;
}

/* Whether graftd relays what the rule for the endpoint `id` grants, so that the container's socket stays at home. */
static __always_inline int is_relayed(struct container *container, u32 id)
{
	return container->transport == GRAFT_TRANSPORT_SPLICE || is_unix(endpoints.lookup(&id));
}

/* Whether an endpoint, or a ruleset, has a multicast group; `addr` as in an address field. */
static __always_inline int has_group(u32 id, u8 family, void *addr)
{
	struct group key = { .id = id, .family = family };

	__builtin_memcpy(key.addr, addr, 16);
	return groups.lookup(&key) != 0;
}

/* The endpoint, if this socket may use it: of its protocol, and in the namespace where the socket is.
 * A socket that was made in one namespace must not follow an endpoint that moved to another. */
static __always_inline struct endpoint *endpoint_for(struct bpf_sock_addr *ctx, struct request *request, u32 id)
{
	struct endpoint *endpoint = endpoints.lookup(&id);

	if (!endpoint || !serves(endpoint, request->protocol))
		return 0;
	if (endpoint->netns != bpf_get_netns_cookie(ctx))
		return 0;
	return endpoint;
}
