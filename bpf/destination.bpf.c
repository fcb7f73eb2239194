// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* Where a socket's packets go, and from where, as the kernel has it: read from the socket and not from the packet. */

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

/* Where a socket's packets of that family go, read from the socket: the host's own NAT may have changed the address in
 * the packet. A datagram socket that is not connected sends to what its sends name, which the sendmsg hook judged. */
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

#ifdef GRAFT_UDP_PENDING
/* The flow that the kernel keeps with a socket, and sends datagrams by: a pending one, which one send began and another
 * one completes (MSG_MORE, UDP_CORK), for which it calls the sendmsg hook only once; and over IPv4 each one that a
 * connected socket sends to its peer, also where a datagram to somewhere else has left its own flow there. The rule may
 * have been removed since. 0: no such flow. */
static __always_inline int read_kept_flow(struct __sk_buff *skb, struct bpf_sock *sk, struct request *remote,
					  struct local_address *source, u8 family, int connected)
{
	void *full = read_pointer((void *)skb + GRAFT_SKB_SK), *flow = full + GRAFT_CORK_FLOW;
	u32 pending = 0;
	u16 port = 0;

	if (!full || bpf_probe_read_kernel(&pending, sizeof(pending), full + GRAFT_UDP_PENDING))
		return 0;
	if (!pending && !(connected && sk->family == AF_INET))
		return 0;
	__builtin_memset(remote, 0, sizeof(*remote));
	__builtin_memset(source, 0, sizeof(*source));
	remote->family = source->family = family;
	remote->protocol = IPPROTO_UDP;
	if (family == GRAFT_IPV4) {
		bpf_probe_read_kernel(source->ip, 4, flow + GRAFT_FLOW4_SADDR);
		bpf_probe_read_kernel(remote->addr, 4, flow + GRAFT_FLOW4_DADDR);
		bpf_probe_read_kernel(&port, sizeof(port), flow + GRAFT_FLOW4_PORTS);
	} else {
		bpf_probe_read_kernel(source->ip, 16, flow + GRAFT_FLOW6_SADDR);
		bpf_probe_read_kernel(remote->addr, 16, flow + GRAFT_FLOW6_DADDR);
		bpf_probe_read_kernel(&port, sizeof(port), flow + GRAFT_FLOW6_PORTS);
	}
	remote->port = bpf_ntohs(port);
	return 1;
}

#else
static __always_inline int read_kept_flow(struct __sk_buff *skb, struct bpf_sock *sk, struct request *remote,
					  struct local_address *source, u8 family, int connected)
{
	return 0;
}
#endif

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

/* Whether a datagram may be one to the socket's peer. (An IPv6 socket sends to IPv4 destinations too.) */
static __always_inline int may_go_to_peer(struct bpf_sock *sk, u8 family)
{
	u32 ip[4] = { sk->dst_ip6[0], sk->dst_ip6[1], sk->dst_ip6[2], sk->dst_ip6[3] };

	asm volatile("" : "+r"(ip[0]), "+r"(ip[1]), "+r"(ip[2]), "+r"(ip[3]));
	if (!is_connected(sk))
		return 0;
	if (sk->family == AF_INET)
		return family == GRAFT_IPV4;
	return (!ip[0] && !ip[1] && ip[2] == bpf_htonl(0xffff)) == (family == GRAFT_IPV4);
}

/* Whether a datagram, or the first packet of a connection, may go to its destination. The connect hook judged a
 * connection when it was requested; it may start later (TCP_FASTOPEN_CONNECT), to another address (an IPv6 socket that
 * the kernel still treats as IPv4), or to an address that the remote end announced (another subflow of MPTCP). So may the
 * source be of an endpoint that the rule named then, or that has moved since. Which of two destinations a datagram of a
 * connected socket has is not seen here, so both are judged. */
static __always_inline int may_leave(struct __sk_buff *skb, struct bpf_sock *sk, struct owner *owner, u8 family,
				     u8 protocol)
{
	u64 netns = owner->tag ? netns_of_tagged(skb, owner->tag) : netns_of(skb);
	struct local_address local, source, *own;
	struct request remote, kept;
	struct ferry *ferry;
	int has_kept, connected = is_connected(sk), bound = is_bound(sk, owner->tag, owner->container, netns);

	if (has_lost_endpoint(sk, owner->tag, bound))
		return 0;
	read_local_address(&local, sk);
	own = has_own_source(sk, owner, bound) ? 0 : &local;
	read_remote(&remote, sk, family, protocol);
	has_kept = protocol == IPPROTO_UDP && read_kept_flow(skb, sk, &kept, &source, family, connected);
	if (has_kept && !may_reach(sk, owner, &kept, netns, &source, own) && !is_ferry(owner, &kept, &ferry))
		return 0;
	if (protocol == IPPROTO_UDP && !may_go_to_peer(sk, family))
		return has_kept || !is_diverted(sk);
	if (protocol == IPPROTO_TCP && goes_to_relay(sk, owner, &remote))
		return 1;
	return may_reach(sk, owner, &remote, netns, &local, own);
}
