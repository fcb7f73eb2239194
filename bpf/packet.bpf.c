// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* Packets of host-homed sockets: a second line of defence, behind the hooks on system calls.
 *
 * in    A listener receives only at the port that the listen hook wrote into its tag, and a datagram socket
 *       that is not bound to an endpoint receives only from destinations that it may send to. So a listener that
 *       bypassed the other hooks, in any way, has no clients; and it receives nothing from the first packet on,
 *       not from the moment when a hook was called. A connection that is being made is judged by what comes too.
 * out   What a program can set besides an address, where no hook sees it (a control message, options that were
 *       set before the policy, or by a 32-bit caller): source routes and other IP options, another interface,
 *       protocols without hooks; a connection that starts, or a datagram that is completed, after its rule was
 *       removed.
 *
 * Nearly every packet belongs to an established TCP connection, and passes after a check of three fields.
 */

#define GRAFT_IPV4_HEADER 20
#define GRAFT_IPV6_HEADER 40
#define GRAFT_IPV4_DESTINATION 16
#define GRAFT_IPV6_DESTINATION 24
#define GRAFT_IPV4_PLAIN 0x45 /* version 4, five words: no options */

/* The needed fields of an IP header, and the ports after it. */
struct packet {
	u32 from[4];
	u32 to[4];
	u16 from_port;
	u16 to_port;
	u8 family;
	u8 plain;    /* no options, no extension headers */
	u8 protocol; /* IPv6: the first next header */
};

/* 0 where the packet is shorter than its header. */
static __always_inline int read_packet(struct __sk_buff *skb, struct packet *packet)
{
	u8 head[GRAFT_IPV6_HEADER];
	u16 port[2] = {};

	__builtin_memset(packet, 0, sizeof(*packet));
	if (bpf_skb_load_bytes(skb, 0, head, GRAFT_IPV4_HEADER))
		return 0;
	if (head[0] >> 4 == 4) {
		packet->family = GRAFT_IPV4;
		packet->plain = head[0] == GRAFT_IPV4_PLAIN;
		packet->protocol = head[9];
		__builtin_memcpy(packet->from, head + 12, 4);
		__builtin_memcpy(packet->to, head + 16, 4);
		if (packet->plain)
			bpf_skb_load_bytes(skb, GRAFT_IPV4_HEADER, port, 4);
	} else {
		if (bpf_skb_load_bytes(skb, 0, head, GRAFT_IPV6_HEADER))
			return 0;
		packet->family = GRAFT_IPV6;
		packet->protocol = head[6];
		packet->plain = packet->protocol == IPPROTO_TCP || packet->protocol == IPPROTO_UDP;
		__builtin_memcpy(packet->from, head + 8, 16);
		__builtin_memcpy(packet->to, head + 24, 16);
		if (packet->plain)
			bpf_skb_load_bytes(skb, GRAFT_IPV6_HEADER, port, 4);
	}
	packet->from_port = bpf_ntohs(port[0]);
	packet->to_port = bpf_ntohs(port[1]);
	return 1;
}

/* The socket that will receive a packet of UDP in this namespace, or NULL; to be released. */
static __always_inline struct bpf_sock *receiver_of(struct __sk_buff *skb, struct packet *packet)
{
	struct bpf_sock_tuple tuple = {};

	if (packet->family == GRAFT_IPV4) {
		tuple.ipv4.saddr = packet->from[0];
		tuple.ipv4.daddr = packet->to[0];
		tuple.ipv4.sport = bpf_htons(packet->from_port);
		tuple.ipv4.dport = bpf_htons(packet->to_port);
		return bpf_sk_lookup_udp(skb, &tuple, sizeof(tuple.ipv4), BPF_F_CURRENT_NETNS, 0);
	}
	__builtin_memcpy(tuple.ipv6.saddr, packet->from, 16);
	__builtin_memcpy(tuple.ipv6.daddr, packet->to, 16);
	tuple.ipv6.sport = bpf_htons(packet->from_port);
	tuple.ipv6.dport = bpf_htons(packet->to_port);
	return bpf_sk_lookup_udp(skb, &tuple, sizeof(tuple.ipv6), BPF_F_CURRENT_NETNS, 0);
}

#ifdef GRAFT_SKB_SK
/* The kernel's struct net of the namespace that the packet's socket is in. */
static __always_inline void *net_of(struct __sk_buff *skb)
{
	void *sk = read_pointer((void *)skb + GRAFT_SKB_SK); /* skb is the kernel's own struct sk_buff */

	return sk ? read_pointer(sk + GRAFT_SOCK_NET) : 0;
}

/* The cookie of that namespace; ANY_NETNS where it is not found. */
static __always_inline u64 netns_of(struct __sk_buff *skb)
{
	void *net = net_of(skb);
	u64 cookie = ANY_NETNS;

	if (!net || bpf_probe_read_kernel(&cookie, sizeof(cookie), net + GRAFT_NET_COOKIE))
		return ANY_NETNS;
	return cookie;
}

#else
static __always_inline u64 netns_of(struct __sk_buff *skb)
{
	return ANY_NETNS;
}
#endif

/* The same of a socket with a tag, found once: a socket stays in its namespace. */
static __always_inline u64 netns_of_tagged(struct __sk_buff *skb, struct tag *tag)
{
	if (!tag->netns)
		tag->netns = netns_of(skb);
	return tag->netns;
}

/* Whether a packet's socket is host-homed, and its owner. An untagged socket of a direct container counts as
 * host-homed unless it is known to be in another namespace, one of transport splice only if it is known not to be. */
static __always_inline int is_host_homed(struct __sk_buff *skb, struct bpf_sock *sk, struct owner *owner)
{
	struct scope *scope = scopes.get_local_storage(0);
	u64 netns;

	resolve_owner(owner, tag_of(sk), scope->container);
	if (owner->tag || !owner->container)
		return owner->home == GRAFT_HOME_HOST;
	if (!is_unsupervised(owner->container))
		return 0;
	netns = netns_of(skb);
	if (netns == ANY_NETNS)
		return owner->container->transport == GRAFT_TRANSPORT_DIRECT;
	return shares_host_netns(owner->container, netns);
}

/* Whether packets are permitted between this container, in the namespace `netns`, and the remote end. *from: the
 * endpoint of a rule that grants it, remote->endpoint its id; else NULL. */
static __always_inline int may_exchange_with(struct container *container, struct request *remote, u64 netns,
					     struct endpoint **from)
{
	u32 id = 0, rule = egress_rule(container, remote, &id);
	struct endpoint *endpoint;

	*from = 0;
	if (rule == GRAFT_VERDICT_GRANT) {
		endpoint = endpoints.lookup(&id);
		*from = endpoint;
		remote->endpoint = id;
		return endpoint && !is_unix(endpoint) && serves(endpoint, remote->protocol) &&
		       (netns == ANY_NETNS || endpoint->netns == netns);
	}
	return defaults_apply(container) && rule != GRAFT_VERDICT_DENY &&
	       (rule == GRAFT_VERDICT_CONTAINER || container->connect_default == GRAFT_DEFAULT_CONTAINER);
}

static __always_inline int drop(struct owner *owner)
{
	count(owner->id, GRAFT_DECISION_DROPPED);
	return REFUSE;
}
