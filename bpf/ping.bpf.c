// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* Sockets that ping (ICMP datagram sockets): no hook sees where they send, so each packet is judged by itself. */

#define ICMP_ECHO 8
#define ICMPV6_ECHO_REQUEST 128

/* An echo request's type and code; a ping socket can send it and the extended one, which asks for an interface by name. */
static __always_inline int is_echo_request(struct __sk_buff *skb, u8 family)
{
	u8 head[2] = {};

	if (bpf_skb_load_bytes(skb, family == GRAFT_IPV4 ? GRAFT_IPV4_HEADER : GRAFT_IPV6_HEADER, head, sizeof(head)))
		return 0;
	return head[0] == (family == GRAFT_IPV4 ? ICMP_ECHO : ICMPV6_ECHO_REQUEST) && !head[1];
}

/* Whether ICMP may pass between a container and the remote end `other`, which a rule leads there from an endpoint:
 * without an address of its own from any of the host's. `own`: the packet's other address. */
static __always_inline int may_echo(struct bpf_sock *sk, struct owner *owner, struct packet *packet, u32 *other, u32 *own,
				    u64 netns)
{
	struct request remote;
	struct endpoint *from;
	u32 ip[4];

	__builtin_memset(&remote, 0, sizeof(remote));
	__builtin_memcpy(remote.addr, other, 16);
	remote.family = packet->family;
	remote.protocol = IPPROTO_ICMP;
	if ((is_diverted(sk) && !is_link_local(&remote)) || !may_exchange_with(owner->container, &remote, netns, &from))
		return 0;
	if (!from)
		return 1;
	__builtin_memcpy(ip, from->addr, 16);
	return !(ip[0] | ip[1] | ip[2] | ip[3]) ||
	       (ip[0] == own[0] && ip[1] == own[1] && ip[2] == own[2] && ip[3] == own[3]);
}

/* A packet of a socket that pings, judged by itself: no hook has seen where it is sent. Where the host's own NAT has
 * changed its addresses, by those that it has now. */
static __always_inline int is_permitted_ping(struct __sk_buff *skb, struct bpf_sock *sk, struct owner *owner, int outgoing)
{
	struct packet packet;

	if (!read_packet(skb, &packet) ||
	    packet.protocol != (packet.family == GRAFT_IPV4 ? IPPROTO_ICMP : IPPROTO_ICMPV6))
		return 0;
	if (!outgoing)
		return may_echo(sk, owner, &packet, packet.from, packet.to, ANY_NETNS);
	return (packet.family == GRAFT_IPV6 || packet.plain) && is_echo_request(skb, packet.family) &&
	       may_echo(sk, owner, &packet, packet.to, packet.from, netns_of(skb));
}
