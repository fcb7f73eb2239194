// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* Packets of host-homed sockets: a second line, behind the hooks on system calls.
 *
 * in    A listener hears nobody but at the port that the listen hook wrote into its tag, and a datagram socket
 *       that stands at no endpoint hears only whom it may speak to. So a listener that slipped past the other
 *       hooks, whichever way, has no clients; and it is deaf from the first packet on, not from the moment when
 *       a hook got to it.
 * out   What can be said besides an address, where no hook sees it (a cmsg, options that were set before the
 *       policy, or by a 32-bit caller): source routes and other options of IP's, another interface, protocols
 *       without hooks; a connection that begins, or a datagram that ends, when its rule is gone.
 *
 * Nearly every packet is one of an established TCP connection, and leaves after a look at one field.
 */

#define GRAFT_IPV4_HEADER 20
#define GRAFT_IPV6_HEADER 40
#define GRAFT_IPV4_PLAIN 0x45 /* version 4, five words: no options */
#define IPPROTO_HOPOPTS 0
#define GRAFT_JUMBO 65535
#define ETH_P_IP 0x0800

/* An IP header with the source port behind it, as far as it is needed. */
struct packet {
	u32 from[4];
	u32 to[4];
	u16 from_port;
	u8 family;
	u8 plain;    /* no options, no extension headers */
	u8 protocol; /* IPv6: the first next header */
};

/* 0 where the packet is too short for what it says it is. */
static __always_inline int read_packet(struct __sk_buff *skb, struct packet *packet)
{
	u8 head[GRAFT_IPV6_HEADER];
	u16 port = 0;

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
			bpf_skb_load_bytes(skb, GRAFT_IPV4_HEADER, &port, 2);
	} else {
		if (bpf_skb_load_bytes(skb, 0, head, GRAFT_IPV6_HEADER))
			return 0;
		packet->family = GRAFT_IPV6;
		packet->protocol = head[6];
		packet->plain = packet->protocol == IPPROTO_TCP || packet->protocol == IPPROTO_UDP;
		__builtin_memcpy(packet->from, head + 8, 16);
		__builtin_memcpy(packet->to, head + 24, 16);
		if (packet->plain)
			bpf_skb_load_bytes(skb, GRAFT_IPV6_HEADER, &port, 2);
	}
	packet->from_port = bpf_ntohs(port);
	return 1;
}

#ifdef GRAFT_SKB_SK
/* The cookie of the namespace that the packet's socket is in; ANY_NETNS where it cannot be found. */
static __always_inline u64 netns_of(struct __sk_buff *skb)
{
	void *sk = follow((void *)skb + GRAFT_SKB_SK); /* what this program runs with is the kernel's sk_buff */
	void *net = sk ? follow(sk + GRAFT_SOCK_NET) : 0;
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

static __always_inline int is_elsewhere(struct __sk_buff *skb, struct container *container)
{
	u64 netns = netns_of(skb);

	return netns != ANY_NETNS && netns != container->netns;
}

/* Whether a packet's socket is host-homed, and whose. An untagged one of a direct container is taken for one
 * unless it is known to be in another namespace. */
static __always_inline int is_host_homed(struct __sk_buff *skb, struct bpf_sock *sk, struct owner *owner)
{
	struct scope *scope = scopes.get_local_storage(0);

	whose(owner, tag_of(sk), scope->container);
	if (owner->tag || !owner->container)
		return owner->home == GRAFT_HOME_HOST;
	return owner->container->transport == GRAFT_TRANSPORT_DIRECT && !is_elsewhere(skb, owner->container);
}

/* Whoever a packet comes from, as a destination that rules speak of. */
static __always_inline void sender_of(struct asked *asked, struct packet *packet)
{
	__builtin_memset(asked, 0, sizeof(*asked));
	__builtin_memcpy(asked->addr, packet->from, 16);
	asked->port = packet->from_port;
	asked->family = packet->family;
	asked->protocol = packet->protocol;
}

/* Whether packets may go between this container, in the namespace `netns`, and that far end. */
static __always_inline int may_speak_with(struct container *container, struct asked *far, u64 netns)
{
	u32 id = 0, rule = egress_rule(container, far, &id);
	struct endpoint *endpoint;

	if (rule == GRAFT_VERDICT_GRANT) {
		endpoint = endpoints.lookup(&id);
		return endpoint && (netns == ANY_NETNS || endpoint->netns == netns);
	}
	return container->transport == GRAFT_TRANSPORT_DIRECT && rule != GRAFT_VERDICT_DENY &&
	       (rule == GRAFT_VERDICT_CONTAINER || container->connect_default == GRAFT_DEFAULT_CONTAINER);
}

static __always_inline int drop(struct owner *owner)
{
	count(owner->id, GRAFT_DECISION_DROPPED);
	return REFUSE;
}

/* Whether a packet comes to an IPv6 endpoint over IPv4, which that does not have. */
static __always_inline int is_of_other_family(struct __sk_buff *skb, struct tag *tag)
{
	struct endpoint *endpoint = endpoints.lookup(&tag->endpoint);

	return endpoint && endpoint->family == GRAFT_IPV6 && !(endpoint->flags & GRAFT_ENDPOINT_DUAL_STACK) &&
	       skb->protocol == bpf_htons(ETH_P_IP);
}

/* Whether whoever comes may be heard: a listener at the port that the listen hook wrote down, a datagram socket at the
 * endpoint that it is granted now (or at a port that it had before there was a policy). */
static __always_inline int is_open(struct bpf_sock *sk, struct owner *owner)
{
	struct tag *tag = owner->tag;
	struct place place;

	if (!tag || !tag->open_port || tag->open_port != sk->src_port)
		return 0;
	if (sk->protocol == IPPROTO_TCP || !tag->endpoint)
		return 1;
	place_of(&place, sk);
	/* Only a direct container's can be host-homed: no transport has twins for datagrams. */
	return is_granted(owner->container, tag, &place, IPPROTO_UDP, owner->container->netns);
}

/* Groups are joined by an option that the hook refuses, but 32-bit callers do not meet the hook. */
static __always_inline int is_for_a_group(struct packet *packet)
{
	u8 first = packet->to[0] & 0xff;

	return packet->family == GRAFT_IPV4 ? first >= 224 && first < 240 : first == 0xff;
}

int graft_skb_ingress(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk;
	struct packet packet;
	struct owner owner;
	struct asked far;
	u32 type, protocol;
	int open;

	sk = sk ? bpf_sk_fullsock(sk) : 0;
	if (!sk)
		return PASS;
	type = sk->type;
	protocol = sk->protocol;
	if (is_tcp(type, protocol) && sk->state != BPF_TCP_LISTEN)
		return PASS;
	if (!is_host_homed(skb, sk, &owner))
		return PASS;
	/* A container that is no more has no listeners, whoever has a copy of one. */
	if (!owner.container)
		return drop(&owner);
	if (binds_freely(owner.container) && !denies(owner.container))
		return PASS;
	if (!has_rules(type, protocol))
		return binds_freely(owner.container) || owner.container->flags & GRAFT_CONTAINER_OTHERS ? PASS : drop(&owner);
	open = binds_freely(owner.container) || is_open(sk, &owner);
	if (owner.tag && owner.tag->endpoint && is_of_other_family(skb, owner.tag))
		return drop(&owner);
	if (is_tcp(type, protocol))
		return open ? PASS : drop(&owner);
	if (!read_packet(skb, &packet))
		return drop(&owner);
	/* What was bound before there was a policy goes on as it was. */
	if (is_for_a_group(&packet) && !(owner.tag && owner.tag->open_port && !owner.tag->endpoint))
		return drop(&owner);
	if (open)
		return PASS;
	/* At an endpoint that it has lost it hears not even those. */
	if (has_lost(sk, owner.tag, 0) || !packet.plain)
		return drop(&owner);
	sender_of(&far, &packet);
	return may_speak_with(owner.container, &far, ANY_NETNS) ? PASS : drop(&owner);
}

/* Where a socket's packets of that family go, by the socket: what stands in the packet may be what the host's own NAT made
 * of it. A datagram socket that is not connected goes where its sends name, which the sendmsg hook has judged. */
static __always_inline void far_end(struct asked *far, struct bpf_sock *sk, u8 family, u8 protocol)
{
	u32 ip4 = sk->dst_ip4, port = sk->dst_port;
	u32 ip[4] = { sk->dst_ip6[0], sk->dst_ip6[1], sk->dst_ip6[2], sk->dst_ip6[3] };

	asm volatile("" : "+r"(port), "+r"(ip4), "+r"(ip[0]), "+r"(ip[1]), "+r"(ip[2]), "+r"(ip[3]));
	__builtin_memset(far, 0, sizeof(*far));
	far->port = bpf_ntohs((u16)port);
	far->family = family;
	far->protocol = protocol;
	if (family == GRAFT_IPV4)
		__builtin_memcpy(far->addr, &ip4, 4);
	else
		__builtin_memcpy(far->addr, ip, 16);
}

#ifdef GRAFT_UDP_PENDING
/* Where a datagram goes that one send began and another one ends (MSG_MORE, UDP_CORK): only the first meets the sendmsg
 * hook, and the rule of then may be gone. The kernel keeps the flow until the datagram has left. 0: none is begun. */
static __always_inline int far_end_of_begun(struct __sk_buff *skb, struct asked *far, u8 family)
{
	void *sk = follow((void *)skb + GRAFT_SKB_SK), *flow = sk + GRAFT_CORK_FLOW;
	u32 pending = 0;
	u16 port = 0;

	if (!sk || bpf_probe_read_kernel(&pending, sizeof(pending), sk + GRAFT_UDP_PENDING) || !pending)
		return 0;
	__builtin_memset(far, 0, sizeof(*far));
	far->family = family;
	far->protocol = IPPROTO_UDP;
	if (family == GRAFT_IPV4) {
		bpf_probe_read_kernel(far->addr, 4, flow + GRAFT_FLOW4_DADDR);
		bpf_probe_read_kernel(&port, sizeof(port), flow + GRAFT_FLOW4_PORTS);
	} else {
		bpf_probe_read_kernel(far->addr, 16, flow + GRAFT_FLOW6_DADDR);
		bpf_probe_read_kernel(&port, sizeof(port), flow + GRAFT_FLOW6_PORTS);
	}
	far->port = bpf_ntohs(port);
	return 1;
}

#else
static __always_inline int far_end_of_begun(struct __sk_buff *skb, struct asked *far, u8 family)
{
	return 0;
}
#endif

/* Whether the host itself has wrapped the packet (IPsec): ESP, AH, IPComp. No option of a program's does that. */
static __always_inline int is_wrapped(u8 protocol)
{
	return protocol == 50 || protocol == 51 || protocol == 108;
}

/* Whether a datagram, or the first packet of a connection, may go where it goes. The connect hook judged a connection
 * when it was asked for; it may begin later (TCP_FASTOPEN_CONNECT), elsewhere (an IPv6 socket that the kernel takes for
 * the IPv4 one that it was once), or at an address that the far end named (a further subflow of MPTCP). */
static __always_inline int may_leave(struct __sk_buff *skb, struct bpf_sock *sk, struct owner *owner, u8 family,
				     u8 protocol)
{
	u64 netns = netns_of(skb);
	struct asked far;

	if (has_lost(sk, owner->tag, is_bound(sk, owner->tag, owner->container, netns)))
		return 0;
	if (protocol != IPPROTO_UDP || !far_end_of_begun(skb, &far, family))
		far_end(&far, sk, family, protocol);
	if (is_diverted(sk) && !is_link_local(&far))
		return 0;
	if (protocol == IPPROTO_UDP && !far.port)
		return 1;
	return may_speak_with(owner->container, &far, netns);
}

int graft_skb_egress(struct __sk_buff *skb)
{
	u8 head[12] = {};
	struct bpf_sock *sk = skb->sk;
	u32 type, protocol, state;
	struct owner owner;
	int tcp, six;

	sk = sk ? bpf_sk_fullsock(sk) : 0;
	if (!sk)
		return PASS;
	type = sk->type;
	protocol = sk->protocol;
	state = sk->state;
	tcp = is_tcp(type, protocol);
	if (bpf_skb_load_bytes(skb, 0, head, sizeof(head)))
		return tcp ? REFUSE : PASS; /* no header of IP's: a raw socket's affair */
	six = head[0] >> 4 == 6;
	if (tcp && state != BPF_TCP_SYN_SENT && (head[0] == GRAFT_IPV4_PLAIN || (six && head[6] == IPPROTO_TCP)))
		return PASS;
	if (!is_host_homed(skb, sk, &owner))
		return PASS;
	if (owner.container && owner.container->transport == GRAFT_TRANSPORT_DIRECT && !denies(owner.container))
		return PASS;
	if (!has_rules(type, protocol))
		return owner.container && owner.container->flags & GRAFT_CONTAINER_OTHERS ? PASS : drop(&owner);
	/* Options, or extension headers. Before a segment that is longer than its length field can say the kernel itself
	 * puts one (BIG TCP). */
	if (six ? head[6] != (tcp ? IPPROTO_TCP : IPPROTO_UDP) && !is_wrapped(head[6]) &&
			  !(tcp && head[6] == IPPROTO_HOPOPTS && skb->len > GRAFT_JUMBO) :
		  head[0] != GRAFT_IPV4_PLAIN)
		return drop(&owner);
	if (tcp && state != BPF_TCP_SYN_SENT)
		return PASS;
	if (!owner.container ||
	    !may_leave(skb, sk, &owner, six ? GRAFT_IPV6 : GRAFT_IPV4, tcp ? IPPROTO_TCP : IPPROTO_UDP))
		return drop(&owner);
	return PASS;
}
