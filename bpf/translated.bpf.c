// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* What a datagram said before the host made something else of it: by its own NAT, or by IPsec. The hook for packets comes
 * after both. */

#ifdef GRAFT_SKB_TRACKED
/* struct nf_conntrack_tuple and nf_conntrack_tuple_hash (include/net/netfilter/nf_conntrack_tuple.h): what identifies the
 * packets of one direction, as their sender wrote them. */
struct tuple_end {
	u32 ip[4];
	u16 port_be;
	u16 rest;
};
struct tuple {
	u64 links[2];
	struct tuple_end from;
	struct tuple_end to;
};
#define GRAFT_TRACKING_BITS 7    /* NFCT_INFOMASK, of the pointer to struct nf_conn */
#define GRAFT_FIRST_ANSWER 3     /* IP_CT_IS_REPLY */

static __always_inline int is_end(struct tuple_end *end, u32 *ip, u16 port)
{
	return end->ip[0] == ip[0] && end->ip[1] == ip[1] && end->ip[2] == ip[2] && end->ip[3] == ip[3] &&
	       end->port_be == bpf_htons(port);
}

/* Gives a packet the addresses that it had before the host's NAT. Returns 0 where no NAT has had it. What it is now has to
 * be what answers are expected from and at: else this is not the structure that it is taken for. */
static __always_inline int undo_nat(struct __sk_buff *skb, struct packet *packet)
{
	u64 word = (u64)read_pointer((void *)skb + GRAFT_SKB_TRACKED);
	void *tuples = (void *)(word & ~(u64)GRAFT_TRACKING_BITS) + GRAFT_TRACKED_TUPLES;
	u64 answers = (word & GRAFT_TRACKING_BITS) >= GRAFT_FIRST_ANSWER;
	struct tuple sent, answer;

	if (!(word & ~(u64)GRAFT_TRACKING_BITS) ||
	    bpf_probe_read_kernel(&sent, sizeof(sent), tuples + answers * sizeof(sent)) ||
	    bpf_probe_read_kernel(&answer, sizeof(answer), tuples + !answers * sizeof(answer)))
		return 0;
	if (!is_end(&answer.from, packet->to, packet->to_port) || !is_end(&answer.to, packet->from, packet->from_port))
		return 0;
	__builtin_memcpy(packet->to, sent.to.ip, 16);
	__builtin_memcpy(packet->from, sent.from.ip, 16);
	packet->to_port = bpf_ntohs(sent.to.port_be);
	packet->from_port = bpf_ntohs(sent.from.port_be);
	return 1;
}
#else
static __always_inline int undo_nat(struct __sk_buff *skb, struct packet *packet)
{
	return 0;
}
#endif

#ifdef GRAFT_SKB_CONTROL
#define GRAFT_TRANSFORMED4 0x04 /* IPSKB_XFRM_TRANSFORMED, include/net/ip.h */
#define GRAFT_TRANSFORMED6 0x01 /* IP6SKB_XFRM_TRANSFORMED, include/linux/ipv6.h */

/* Whether IPsec has put a packet into another one: its headers are the host's, also where they are of UDP (RFC 3948). */
static __always_inline int is_transformed(struct __sk_buff *skb, u8 family)
{
	void *control = (void *)skb + GRAFT_SKB_CONTROL;
	u16 flags = 0;

	if (family == GRAFT_IPV4) {
		bpf_probe_read_kernel(&flags, sizeof(flags), control + GRAFT_CONTROL_FLAGS4);
		return flags & GRAFT_TRANSFORMED4;
	}
	bpf_probe_read_kernel(&flags, sizeof(flags), control + GRAFT_CONTROL_FLAGS6);
	return flags & GRAFT_TRANSFORMED6;
}
#else
static __always_inline int is_transformed(struct __sk_buff *skb, u8 family)
{
	return 0;
}
#endif
