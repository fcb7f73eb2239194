// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* Where packets go, and from where: of a connection read from its socket, of a datagram from the datagram itself. */

/* Whether a connection goes to graftd, which judges its destination itself (connect.bpf.c). */
static __always_inline int goes_to_relay(struct bpf_sock *sk, struct owner *owner, struct request *remote)
{
	struct crossing *crossing = crossings.sk_storage_get(sk, 0, 0);
	struct relay *relay = relays.lookup(&owner->id);
	u32 ip[4];

	if (!crossing || !relay || crossing->role != GRAFT_CROSSING_REDIRECTED || crossing->container != owner->id)
		return 0;
	__builtin_memcpy(ip, remote->addr, 16);
	if (remote->port != relay->port)
		return 0;
	if (remote->family == GRAFT_IPV4)
		return ip[0] == bpf_htonl(0x7f000001);
	return !(ip[0] | ip[1] | ip[2]) && ip[3] == bpf_htonl(1);
}

/* Where a connection's packets of that family go, read from the socket: the host's own NAT may have changed the address
 * in the packet. */
static __always_inline void read_remote(struct request *remote, struct bpf_sock *sk, u8 family, u8 protocol)
{
	u32 ip4 = sk->dst_ip4, port = sk->dst_port;
	u32 ip[4] = { sk->dst_ip6[0], sk->dst_ip6[1], sk->dst_ip6[2], sk->dst_ip6[3] };

	asm volatile("" : "+r"(port), "+r"(ip4), "+r"(ip[0]), "+r"(ip[1]), "+r"(ip[2]), "+r"(ip[3]));
	__builtin_memset(remote, 0, sizeof(*remote));
	remote->port = bpf_ntohs((u16)port);
	remote->family = family;
	remote->protocol = protocol;
	if (family == GRAFT_IPV4)
		__builtin_memcpy(remote->addr, &ip4, 4);
	else
		__builtin_memcpy(remote->addr, ip, 16);
}

/* `own`: the socket's local address; NULL where its source is not judged. */
static __always_inline int may_reach(struct bpf_sock *sk, struct owner *owner, struct request *remote, u64 netns,
				     struct local_address *source, struct local_address *own)
{
	u64 strays = own ? strays_from_loopback(source, remote) : 0;
	struct endpoint *endpoint;

	if ((is_diverted(sk) && !is_link_local(remote)) ||
	    !may_exchange_with(owner->container, remote, netns, &endpoint))
		return 0;
	return !own || !endpoint || leaves_from(source, own, owner->tag, endpoint, remote->endpoint, strays);
}

/* Whether the first packet of a connection may go to its destination. The connect hook judged a connection when it was
 * requested; it may start later (TCP_FASTOPEN_CONNECT), to another address (an IPv6 socket that the kernel still treats as
 * IPv4), or to an address that the remote end announced (another subflow of MPTCP). So may the source be of an endpoint
 * that the rule named then, or that has moved since. `own`: see may_reach. */
static __always_inline int may_start(struct bpf_sock *sk, struct owner *owner, u8 family, u8 protocol, u64 netns,
				     struct local_address *local, struct local_address *own)
{
	struct request remote;

	read_remote(&remote, sk, family, protocol);
	if (protocol == IPPROTO_TCP && goes_to_relay(sk, owner, &remote))
		return 1;
	return may_reach(sk, owner, &remote, netns, local, own);
}

/* Whether a datagram may go where its headers say, from where they say. */
static __always_inline int may_go(struct bpf_sock *sk, struct owner *owner, struct packet *packet, u64 netns,
				  struct local_address *own)
{
	struct local_address source;
	struct request remote;
	struct ferry *ferry;

	if (packet->from_port != sk->src_port)
		return 0;
	__builtin_memset(&remote, 0, sizeof(remote));
	__builtin_memcpy(remote.addr, packet->to, 16);
	remote.port = packet->to_port;
	remote.family = packet->family;
	remote.protocol = IPPROTO_UDP;
	if (is_ferry(owner, &remote, &ferry))
		return !is_diverted(sk);
	__builtin_memset(&source, 0, sizeof(source));
	__builtin_memcpy(source.ip, packet->from, 16);
	source.family = packet->family;
	return may_reach(sk, owner, &remote, netns, &source, own);
}

/* The family of a datagram socket's peer: an IPv6 socket has one of IPv4 too. */
static __always_inline u8 family_of_peer(struct bpf_sock *sk)
{
	u32 ip[4] = { sk->dst_ip6[0], sk->dst_ip6[1], sk->dst_ip6[2], sk->dst_ip6[3] };

	asm volatile("" : "+r"(ip[0]), "+r"(ip[1]), "+r"(ip[2]), "+r"(ip[3]));
	if (sk->family == AF_INET || (!ip[0] && !ip[1] && ip[2] == bpf_htonl(0xffff)))
		return GRAFT_IPV4;
	return GRAFT_IPV6;
}

/* Whether a datagram that IPsec has put into another one may leave: only its socket still says where it goes. */
static __always_inline int may_send_hidden(struct bpf_sock *sk, struct owner *owner, u64 netns, struct local_address *local,
					   struct local_address *own)
{
	if (!is_connected(sk))
		return !is_diverted(sk);
	return may_start(sk, owner, family_of_peer(sk), IPPROTO_UDP, netns, local, own);
}

#ifdef GRAFT_SKB_ROUTE
#define GRAFT_ROUTE_NOT_COUNTED 1 /* SKB_DST_NOREF, of the pointer to the route */
#define RTCF_LOCAL 0x80000000
#define RTCF_BROADCAST 0x10000000
#define RTCF_MULTICAST 0x20000000
#define RTF_LOCAL 0x80000000
#define RTF_ANYCAST 0x00100000

/* The IPv6 destinations of a route: struct rt6key. */
struct route_prefix {
	u32 ip[4];
	s32 bits;
};

static __always_inline int is_in_prefix(u32 *ip, struct route_prefix *prefix)
{
	u32 differ = 0;
	s32 i, bits;

#pragma unroll
	for (i = 0; i < 4; i++) {
		bits = prefix->bits - 32 * i;
		if (bits >= 32)
			differ |= ip[i] ^ prefix->ip[i];
		else if (bits > 0)
			differ |= (ip[i] ^ prefix->ip[i]) & bpf_htonl(0xffffffffu << (32 - bits));
	}
	return !differ;
}

static __always_inline int is_astray6(void *route, struct packet *packet, u64 netns)
{
	struct route_prefix prefix;
	u32 flags = 0;

	if (bpf_probe_read_kernel(&flags, sizeof(flags), route + GRAFT_ROUTE6_FLAGS) ||
	    bpf_probe_read_kernel(&prefix, sizeof(prefix), route + GRAFT_ROUTE6_PREFIX))
		return 1;
	return flags & (RTF_LOCAL | RTF_ANYCAST) && !is_in_prefix(packet->to, &prefix) &&
	       !is_noted_as_hosts(netns, packet->to, GRAFT_IPV6); /* (IPVS keeps the route that a packet had) */
}

static __always_inline int is_astray4(void *route, struct packet *packet, u64 netns)
{
	u32 flags = 0;

	if (bpf_probe_read_kernel(&flags, sizeof(flags), route + GRAFT_ROUTE_FLAGS))
		return 1;
	if (!(flags & RTCF_LOCAL) || flags & (RTCF_BROADCAST | RTCF_MULTICAST))
		return 0;
	return !is_noted_as_hosts(netns, packet->to, GRAFT_IPV4);
}

/* Whether a datagram is delivered on this host though it is for another one. The kernel takes its destination from what the
 * socket was connected to last, and its route from where it was begun (MSG_MORE), or the other way round; and it uses the
 * route to an earlier peer when another thread connects the socket anew. */
static __always_inline int is_delivered_astray(struct __sk_buff *skb, struct packet *packet, u64 netns)
{
	u64 word = (u64)read_pointer((void *)skb + GRAFT_SKB_ROUTE);
	void *route = (void *)(word & ~(u64)GRAFT_ROUTE_NOT_COUNTED);

	return packet->family == GRAFT_IPV4 ? is_astray4(route, packet, netns) : is_astray6(route, packet, netns);
}
#else
static __always_inline int is_delivered_astray(struct __sk_buff *skb, struct packet *packet, u64 netns)
{
	return 0;
}
#endif

/* Whether a datagram may leave, by what is in it. Its socket may have another peer by now, or none: another thread connects
 * it anew while the kernel reads the peer's address, port and source for this one, one after the other and without a lock.
 * (Of an established peer, and of a datagram that one send began and another one completes, the kernel asks no hook.) */
static __always_inline int may_send(struct __sk_buff *skb, struct bpf_sock *sk, struct owner *owner, u64 netns,
				    struct local_address *local, struct local_address *own)
{
	struct packet packet;

	if (!read_packet(skb, &packet))
		return 0;
	if (packet.protocol != IPPROTO_UDP || is_transformed(skb, packet.family))
		return may_send_hidden(sk, owner, netns, local, own);
	if (is_delivered_astray(skb, &packet, netns))
		return 0;
	return may_go(sk, owner, &packet, netns, own) ||
	       (undo_nat(skb, &packet) && may_go(sk, owner, &packet, netns, own));
}

/* Whether a datagram, or the first packet of a connection, may go to its destination. */
static __always_inline int may_leave(struct __sk_buff *skb, struct bpf_sock *sk, struct owner *owner, u8 family,
				     u8 protocol)
{
	u64 netns = owner->tag ? netns_of_tagged(skb, owner->tag) : netns_of(skb);
	int bound = is_bound(sk, owner->tag, owner->container, netns);
	struct local_address local, *own;

	if (has_lost_endpoint(sk, owner->tag, bound))
		return 0;
	read_local_address(&local, sk);
	own = has_own_source(sk, owner, bound) ? 0 : &local;
	if (protocol == IPPROTO_UDP)
		return may_send(skb, sk, owner, netns, &local, own);
	return may_start(sk, owner, family, protocol, netns, &local, own);
}
