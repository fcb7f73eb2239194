// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* Packets that go out: what a program can set besides an address, and what starts or ends after its rule. */

#define IPPROTO_HOPOPTS 0
#define GRAFT_JUMBO 65535 /* the longest payload that the length field of an IPv6 header can express */

/* Whether the host has applied IPsec to the packet (ESP, AH, IPComp). No option that a program can set does that. */
static __always_inline int is_ipsec(u8 protocol)
{
	return protocol == 50 || protocol == 51 || protocol == 108;
}

/* Whether the kernel itself has added the hop-by-hop header: it does so to a segment that is longer than the length field
 * can express (BIG TCP), before all headers that a program may have added. */
static __always_inline int is_big_tcp(struct __sk_buff *skb)
{
	u8 next = 0;

	return skb->len > GRAFT_IPV6_HEADER + GRAFT_JUMBO &&
	       !bpf_skb_load_bytes(skb, GRAFT_IPV6_HEADER, &next, 1) && next == IPPROTO_TCP;
}

#if defined(GRAFT_SKB_SK) && defined(GRAFT_NET_FWMARK_ACCEPT)
/* Whether the operator has accepted connections marked as their first packet is (net.ipv4.tcp_fwmark_accept). */
static __always_inline int are_accepted_marked(struct __sk_buff *skb)
{
	void *net = net_of(skb);
	u8 value = 0;

	return net && !bpf_probe_read_kernel(&value, sizeof(value), net + GRAFT_NET_FWMARK_ACCEPT) && value;
}
#else
static __always_inline int are_accepted_marked(struct __sk_buff *skb)
{
	return 1;
}
#endif

/* Whether a program has marked its connection for another routing table. (One without a tag was there, and perhaps
 * marked, before its policy.) */
static __always_inline int has_marked(struct __sk_buff *skb, struct bpf_sock *sk, struct owner *owner)
{
	int accepted;

	if (!sk->mark || !owner->tag)
		return 0;
	accepted = owner->tag->open_port && owner->tag->open_port == sk->src_port;
	return !(accepted && are_accepted_marked(skb));
}

/* Whether a datagram is for a socket of that home of the container's. */
static __always_inline int is_received_by(struct __sk_buff *skb, struct packet *packet, u32 container, u8 home)
{
	return is_released_of(receiver_of(skb, packet), container, home);
}

/* It sends only to datagram sockets of its container: another socket may have got the port of one that was closed. They
 * know by the mark that it is the ferry's. */
static __always_inline int leaves_ferry(struct __sk_buff *skb, struct owner *owner)
{
	struct ferry *ferry = ferries.lookup(&owner->id);
	struct packet packet;

	if (!ferry || !read_packet(skb, &packet) || !packet.plain || packet.protocol != IPPROTO_UDP ||
	    !is_received_by(skb, &packet, owner->id, GRAFT_HOME_HOST))
		return drop(owner);
	skb->mark = ferry->mark;
	return PASS;
}

/* A datagram to the container's ferry gets the ferry's mark. Returns 0 for one at whose address is no ferry any more. */
static __always_inline int set_ferry_mark(struct __sk_buff *skb, struct owner *owner, int ipv6)
{
	struct request remote = { .protocol = IPPROTO_UDP };
	struct packet packet;
	struct ferry *ferry;
	u8 first = 0;

	if (owner->container->transport != GRAFT_TRANSPORT_SWAP)
		return 1;
	/* Nearly every datagram is for a network, which one byte tells: a ferry is at 127.254.0.0/16 or ::1. */
	if (bpf_skb_load_bytes(skb, ipv6 ? GRAFT_IPV6_DESTINATION : GRAFT_IPV4_DESTINATION, &first, 1))
		return 0;
	if (first != (ipv6 ? 0 : 127))
		return 1;
	if (!read_packet(skb, &packet))
		return 0;
	__builtin_memcpy(remote.addr, packet.to, 16);
	remote.port = packet.to_port;
	remote.family = packet.family;
	if (!is_ferry(owner, &remote, &ferry))
		return 1;
	if (!is_received_by(skb, &packet, owner->id, GRAFT_HOME_FERRY))
		return 0;
	skb->mark = ferry->mark;
	return 1;
}

int graft_skb_egress(struct __sk_buff *skb)
{
	u8 head[12] = {};
	struct bpf_sock *sk = skb->sk;
	u32 type, protocol, state, mark;
	struct owner owner;
	int tcp, ipv6;

	sk = sk ? bpf_sk_fullsock(sk) : 0;
	if (!sk)
		return PASS;
	type = sk->type;
	protocol = sk->protocol;
	state = sk->state;
	mark = sk->mark;
	tcp = is_tcp(type, protocol);
	if (bpf_skb_load_bytes(skb, 0, head, sizeof(head)))
		return tcp ? REFUSE : PASS; /* no IP header: from a raw socket */
	ipv6 = head[0] >> 4 == 6;
	if (tcp && state != BPF_TCP_SYN_SENT && !mark &&
	    (head[0] == GRAFT_IPV4_PLAIN || (ipv6 && head[6] == IPPROTO_TCP)))
		return PASS;
	if (!is_host_homed(skb, sk, &owner))
		return owner.home == GRAFT_HOME_FERRY ? leaves_ferry(skb, &owner) : leaves_inside(skb, sk, &owner);
	if (owner.container && defaults_apply(owner.container) && !denies_anything(owner.container))
		return PASS;
	if (may_ping(owner.container, type, protocol))
		return is_permitted_ping(skb, sk, &owner, 1) ? PASS : drop(&owner);
	if (!has_rules(type, protocol))
		return owner.container && passes_others(owner.container) ? PASS : drop(&owner);
	/* Options, or extension headers. */
	if (ipv6 ? head[6] != (tcp ? IPPROTO_TCP : IPPROTO_UDP) && !is_ipsec(head[6]) &&
			  !(tcp && head[6] == IPPROTO_HOPOPTS && is_big_tcp(skb)) :
		  head[0] != GRAFT_IPV4_PLAIN)
		return drop(&owner);
	if (tcp && state != BPF_TCP_SYN_SENT)
		return has_marked(skb, sk, &owner) ? drop(&owner) : PASS;
	if (!owner.container ||
	    !may_leave(skb, sk, &owner, ipv6 ? GRAFT_IPV6 : GRAFT_IPV4, tcp ? IPPROTO_TCP : IPPROTO_UDP))
		return drop(&owner);
	return tcp || set_ferry_mark(skb, &owner, ipv6) ? PASS : drop(&owner);
}
