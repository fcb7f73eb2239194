// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* Packets of host-homed sockets: a second line, behind the hooks on system calls.
 *
 * in    A listener hears nobody but at the port that the listen hook wrote into its tag, and a datagram socket
 *       that stands at no endpoint hears only whom it may speak to. So a listener that slipped past the other
 *       hooks, whichever way, has no clients; and it is deaf from the first packet on, not from the moment when
 *       a hook got to it.
 * out   What can be said besides an address, where no hook sees it (a cmsg, options that were set before the
 *       policy, or by a 32-bit caller): source routes and other options of IP's, a source address that is not the
 *       socket's, another interface, protocols without hooks; and a connection that begins when its rule is gone.
 *
 * Nearly every packet is one of an established TCP connection, and leaves after a look at one field.
 */

#define GRAFT_IPV4_HEADER 20
#define GRAFT_IPV6_HEADER 40
#define GRAFT_IPV4_PLAIN 0x45 /* version 4, five words: no options */
#define IPPROTO_HOPOPTS 0
#define GRAFT_JUMBO 65535
#define ETH_P_IP 0x0800

/* An IP header with the ports behind it, as far as it is needed. */
struct packet {
	u32 from[4];
	u32 to[4];
	u16 from_port;
	u16 to_port;
	u8 family;
	u8 plain;    /* no options, no extension headers */
	u8 protocol; /* IPv6: the first next header */
};

/* 0 where the packet is too short for what it says it is. */
static __always_inline int read_packet(struct __sk_buff *skb, struct packet *packet)
{
	u8 head[GRAFT_IPV6_HEADER];
	u16 ports[2] = {};

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
			bpf_skb_load_bytes(skb, GRAFT_IPV4_HEADER, ports, 4);
	} else {
		if (bpf_skb_load_bytes(skb, 0, head, GRAFT_IPV6_HEADER))
			return 0;
		packet->family = GRAFT_IPV6;
		packet->protocol = head[6];
		packet->plain = packet->protocol == IPPROTO_TCP || packet->protocol == IPPROTO_UDP;
		__builtin_memcpy(packet->from, head + 8, 16);
		__builtin_memcpy(packet->to, head + 24, 16);
		if (packet->plain)
			bpf_skb_load_bytes(skb, GRAFT_IPV6_HEADER, ports, 4);
	}
	packet->from_port = bpf_ntohs(ports[0]);
	packet->to_port = bpf_ntohs(ports[1]);
	return 1;
}

#ifdef GRAFT_SKB_SK
/* The cookie of the namespace that the packet's socket is in; 0 where it cannot be found. */
static __always_inline u64 netns_of(struct __sk_buff *skb)
{
	void *sk = follow((void *)skb + GRAFT_SKB_SK); /* what this program runs with is the kernel's sk_buff */
	void *net = sk ? follow(sk + GRAFT_SOCK_NET) : 0;
	u64 cookie = 0;

	if (!net || bpf_probe_read_kernel(&cookie, sizeof(cookie), net + GRAFT_NET_COOKIE))
		return 0;
	return cookie;
}

static __always_inline int is_elsewhere(struct __sk_buff *skb, struct container *container)
{
	u64 netns = netns_of(skb);

	return netns && netns != container->netns;
}
#else
static __always_inline int is_elsewhere(struct __sk_buff *skb, struct container *container)
{
	return 0;
}
#endif

/* Whether a packet's socket is host-homed, and whose. An untagged one of a direct container is taken for one
 * unless it is known to be in another namespace. */
static __always_inline int is_host_homed(struct __sk_buff *skb, struct bpf_sock *sk, struct owner *owner)
{
	struct scope *scope = scopes.get_local_storage(0);

	whose(owner, listener_tag(sk), scope->container);
	if (owner->tag || !owner->container)
		return owner->home == GRAFT_HOME_HOST;
	return owner->container->transport == GRAFT_TRANSPORT_DIRECT && !is_elsewhere(skb, owner->container);
}

static __always_inline void asked_of(struct asked *asked, struct packet *packet, u32 *addr, u16 port)
{
	__builtin_memset(asked, 0, sizeof(*asked));
	__builtin_memcpy(asked->addr, addr, 16);
	asked->port = port;
	asked->family = packet->family;
	asked->protocol = packet->protocol;
	if (packet->family == GRAFT_IPV6 && !addr[0] && !addr[1] && addr[2] == bpf_htonl(0xffff)) {
		__builtin_memset(asked->addr, 0, 16);
		__builtin_memcpy(asked->addr, &addr[3], 4);
		asked->family = GRAFT_IPV4;
	}
}

/* Whether a datagram may go between this container and that far end. */
static __always_inline int may_speak_with(struct container *container, struct asked *far)
{
	u32 endpoint, rule = egress_rule(container, far, &endpoint);

	if (rule == GRAFT_VERDICT_GRANT)
		return 1;
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
static __always_inline int hears_everybody(struct bpf_sock *sk, struct owner *owner)
{
	struct tag *tag = owner->tag;
	struct place place;

	if (!tag || !tag->heard || tag->heard != sk->src_port)
		return 0;
	if (sk->protocol == IPPROTO_TCP || !tag->endpoint)
		return 1;
	place_of(&place, sk);
	return is_granted(owner->container, tag, &place, IPPROTO_UDP, ANY_NETNS);
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
	int heard;

	sk = sk ? bpf_sk_fullsock(sk) : 0;
	if (!sk)
		return PASS;
	type = sk->type;
	protocol = sk->protocol;
	if (type == SOCK_STREAM && sk->state != BPF_TCP_LISTEN)
		return PASS;
	if (!is_host_homed(skb, sk, &owner))
		return PASS;
	/* A container that is no more has no listeners, whoever has a copy of one. */
	if (!owner.container)
		return drop(&owner);
	if (binds_freely(owner.container))
		return PASS;
	if (owner.tag && owner.tag->endpoint && is_of_other_family(skb, owner.tag))
		return drop(&owner);
	heard = hears_everybody(sk, &owner);
	if (type == SOCK_STREAM)
		return heard ? PASS : drop(&owner);
	if (!has_rules(type, protocol))
		return owner.container->flags & GRAFT_CONTAINER_OTHERS ? PASS : drop(&owner);
	if (!read_packet(skb, &packet))
		return drop(&owner);
	if (heard)
		return owner.tag && owner.tag->endpoint && is_for_a_group(&packet) ? drop(&owner) : PASS;
	asked_of(&far, &packet, packet.from, packet.from_port);
	return packet.plain && may_speak_with(owner.container, &far) ? PASS : drop(&owner);
}

/* Whether a datagram leaves from another address than its socket's. One that has none gets it from the hook. */
static __always_inline int has_other_source(struct bpf_sock *sk, struct packet *packet)
{
	struct place place;

	place_of(&place, sk);
	if (!(place.ip[0] | place.ip[1] | place.ip[2] | place.ip[3]))
		return 0;
	return place.family != packet->family || place.ip[0] != packet->from[0] || place.ip[1] != packet->from[1] ||
	       place.ip[2] != packet->from[2] || place.ip[3] != packet->from[3];
}

/* Whether a packet may go where it goes: a datagram, or the first packet of a connection. The connect hook judged a
 * connection when it was asked for; it may begin later (TCP_FASTOPEN_CONNECT), or towards an address that the far
 * end named (a further subflow of MPTCP). */
static __always_inline int may_leave(struct bpf_sock *sk, struct owner *owner, struct packet *packet)
{
	struct asked far;

	if (!packet->plain || !owner->container)
		return 0;
	asked_of(&far, packet, packet->to, packet->to_port);
	if (is_diverted(sk) && !is_link_local(&far))
		return 0;
	if (packet->protocol == IPPROTO_UDP && has_other_source(sk, packet))
		return 0;
	return may_speak_with(owner->container, &far);
}

int graft_skb_egress(struct __sk_buff *skb)
{
	u8 head[12] = {};
	struct bpf_sock *sk = skb->sk;
	struct packet packet;
	struct owner owner;
	u32 type, protocol, state;

	sk = sk ? bpf_sk_fullsock(sk) : 0;
	if (!sk)
		return PASS;
	type = sk->type;
	protocol = sk->protocol;
	state = sk->state;
	if (type == SOCK_STREAM && state != BPF_TCP_SYN_SENT && !bpf_skb_load_bytes(skb, 0, head, sizeof(head)) &&
	    (head[0] == GRAFT_IPV4_PLAIN || (head[0] >> 4 == 6 && head[6] == IPPROTO_TCP)))
		return PASS;
	if (!is_host_homed(skb, sk, &owner))
		return PASS;
	if (owner.container && owner.container->transport == GRAFT_TRANSPORT_DIRECT && !denies(owner.container))
		return PASS;
	if (!has_rules(type, protocol))
		return owner.container && owner.container->flags & GRAFT_CONTAINER_OTHERS ? PASS : drop(&owner);
	if (!read_packet(skb, &packet))
		return drop(&owner);
	if (type == SOCK_STREAM && state != BPF_TCP_SYN_SENT) {
		/* Options, or a header that the kernel itself puts before a segment that is longer than its length
		 * field can say (BIG TCP). */
		return packet.family == GRAFT_IPV6 && packet.protocol == IPPROTO_HOPOPTS && skb->len > GRAFT_JUMBO
			       ? PASS
			       : drop(&owner);
	}
	return may_leave(sk, &owner, &packet) ? PASS : drop(&owner);
}
