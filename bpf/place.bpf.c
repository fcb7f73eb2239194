// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* Where a socket stands now, and whether that is an endpoint that it is granted now.
 *
 * No flag says that a socket is bound: it would be inherited by accepted sockets, survive a disconnect that
 * lets go of the port, and outlive the rule. What counts is the kernel's own address of the socket, and the
 * rules as they are at this moment.
 */

/* A socket's own address, IPv4-mapped ones as IPv4. */
struct place {
	u32 ip[4];
	u16 port;
	u8 family;
};

static __always_inline void place4(struct place *place, u32 ip, u32 port)
{
	__builtin_memset(place, 0, sizeof(*place));
	place->ip[0] = ip;
	place->port = port;
	place->family = GRAFT_IPV4;
}

static __always_inline void place6(struct place *place, u32 *ip, u32 port)
{
	if (!ip[0] && !ip[1] && ip[2] == bpf_htonl(0xffff)) {
		place4(place, ip[3], port);
		return;
	}
	__builtin_memset(place, 0, sizeof(*place));
	__builtin_memcpy(place->ip, ip, 16);
	place->port = port;
	place->family = GRAFT_IPV6;
}

static __always_inline void place_of(struct place *place, struct bpf_sock *sk)
{
	u32 family = sk->family, port = sk->src_port, ip4 = sk->src_ip4;
	u32 ip[4] = { sk->src_ip6[0], sk->src_ip6[1], sk->src_ip6[2], sk->src_ip6[3] };

	/* Read here and now: the verifier takes no pointer that a compiler moved to save a load. */
	asm volatile("" : "+r"(family), "+r"(port), "+r"(ip4), "+r"(ip[0]), "+r"(ip[1]), "+r"(ip[2]), "+r"(ip[3]));
	if (family == AF_INET6)
		place6(place, ip, port);
	else
		place4(place, ip4, port);
}

static __always_inline int stands_at(struct place *place, struct endpoint *endpoint)
{
	u32 ip[4];

	if (endpoint->family != place->family || (endpoint->port && endpoint->port != place->port))
		return 0;
	__builtin_memcpy(ip, endpoint->addr, 16);
	return ip[0] == place->ip[0] && ip[1] == place->ip[1] && ip[2] == place->ip[2] && ip[3] == place->ip[3];
}

#define ANY_NETNS 0 /* no cookie is 0: where it cannot be told */

/* Whether the rules of now make of what the program asked for the endpoint that its tag names, and the socket,
 * in the namespace `netns`, stands there. */
static __always_inline int is_granted(struct container *container, struct tag *tag, struct place *place, u8 protocol,
				      u64 netns)
{
	struct endpoint *endpoint = endpoints.lookup(&tag->endpoint);
	struct asked asked;

	if (!endpoint || (netns != ANY_NETNS && endpoint->netns != netns) ||
	    !(endpoint->protocols & protocol_bit(protocol)) || !stands_at(place, endpoint))
		return 0;
	__builtin_memset(&asked, 0, sizeof(asked));
	__builtin_memcpy(asked.addr, tag->addr, 16);
	asked.port = tag->port;
	asked.family = tag->family;
	asked.protocol = protocol;
	return ingress_rule(container, &asked) == tag->endpoint;
}

/* Whether a socket stands at the port of an endpoint that it was given, and is granted no more. */
static __always_inline int has_lost(struct bpf_sock *sk, struct tag *tag, int bound)
{
	return tag && tag->endpoint && tag->given && tag->given == sk->src_port && !bound;
}

/* Whether a datagram socket has the port that it bound before there was a policy that would not let it. */
static __always_inline int has_port_from_before(struct bpf_sock *sk, struct tag *tag)
{
	return tag && !tag->endpoint && tag->open_port && tag->open_port == sk->src_port;
}

/* Whether a socket is tied to an interface, or its packets are marked for another routing table. The setsockopt hook
 * refuses what does that, but the kernel does not call it for 32-bit callers. */
static __always_inline int is_diverted(struct bpf_sock *sk)
{
	return sk->bound_dev_if || sk->mark;
}

/* Whether a socket holds its endpoint. A port that it was given once, let go of, and got another for, is not
 * what it was granted. */
static __always_inline int is_bound(struct bpf_sock *sk, struct tag *tag, struct container *container, u64 netns)
{
	u32 type = sk->type;
	struct place place;

	if (!container || !tag || !tag->endpoint || !tag->given)
		return 0;
	place_of(&place, sk);
	if (place.port != tag->given)
		return 0;
	return is_granted(container, tag, &place, type == SOCK_STREAM ? IPPROTO_TCP : IPPROTO_UDP, netns);
}
