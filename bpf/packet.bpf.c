// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* Packets of host-homed sockets: a second line, behind the hooks on system calls.
 *
 * in    A listener hears nobody but at the port that the listen hook wrote into its tag, and a datagram socket
 *       that holds no endpoint hears only whom it may speak to. So a listener that slipped past the other
 *       hooks, whichever way, has no clients; and it is deaf from the first packet on, not from the moment when
 *       a hook got to it.
 * out   What can be said besides an address, where no hook sees it (a cmsg, options that were set before the
 *       policy): source routes and other options of IP's, a source address that is not the socket's, protocols
 *       without hooks.
 *
 * Nearly every packet is one of an established TCP connection, and leaves after a look at one field.
 */

#define GRAFT_IPV4_HEADER 20
#define GRAFT_IPV6_HEADER 40
#define GRAFT_IPV4_PLAIN 0x45 /* version 4, five words: no options */
#define IPPROTO_HOPOPTS 0
#define GRAFT_JUMBO 65535

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

int graft_skb_ingress(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk;
	struct packet packet;
	struct owner owner;
	struct asked far;
	u32 protocol;

	sk = sk ? bpf_sk_fullsock(sk) : 0;
	if (!sk)
		return PASS;
	protocol = sk->protocol;
	if (protocol == IPPROTO_TCP && sk->state != BPF_TCP_LISTEN)
		return PASS;
	if (!is_host_homed(skb, sk, &owner) || (owner.container && binds_freely(owner.container)))
		return PASS;
	if (owner.tag && owner.tag->heard && owner.tag->heard == sk->src_port)
		return PASS;
	if (protocol != IPPROTO_TCP && protocol != IPPROTO_UDP && owner.container &&
	    owner.container->flags & GRAFT_CONTAINER_OTHERS)
		return PASS;
	if (protocol != IPPROTO_UDP || !owner.container || !read_packet(skb, &packet))
		return drop(&owner);
	asked_of(&far, &packet, packet.from, packet.from_port);
	return may_speak_with(owner.container, &far) ? PASS : drop(&owner);
}

/* Whether a datagram leaves from another address than its socket's. One that has none gets it from the hook. */
static __always_inline int has_other_source(struct bpf_sock *sk, struct packet *packet)
{
	struct place place;
	int same;

	place_of(&place, sk);
	if (!(place.ip[0] | place.ip[1] | place.ip[2] | place.ip[3]) || place.family != packet->family)
		return 0;
	same = place.ip[0] == packet->from[0] && place.ip[1] == packet->from[1] && place.ip[2] == packet->from[2] &&
	       place.ip[3] == packet->from[3];
	return !same;
}

int graft_skb_egress(struct __sk_buff *skb)
{
	u8 head[12] = {};
	struct bpf_sock *sk;
	struct packet packet;
	struct owner owner;
	struct asked far;

	if (!bpf_skb_load_bytes(skb, 0, head, sizeof(head)) &&
	    ((head[0] == GRAFT_IPV4_PLAIN && head[9] == IPPROTO_TCP) || (head[0] >> 4 == 6 && head[6] == IPPROTO_TCP)))
		return PASS;
	sk = skb->sk;
	sk = sk ? bpf_sk_fullsock(sk) : 0;
	if (!sk || !is_host_homed(skb, sk, &owner))
		return PASS;
	if (owner.container && owner.container->transport == GRAFT_TRANSPORT_DIRECT && !denies(owner.container))
		return PASS;
	if (!read_packet(skb, &packet))
		return drop(&owner);
	/* The kernel itself says with a header of its own that a segment is longer than its length field can (BIG TCP). */
	if (packet.family == GRAFT_IPV6 && packet.protocol == IPPROTO_HOPOPTS && sk->protocol == IPPROTO_TCP &&
	    skb->len > GRAFT_JUMBO)
		return PASS;
	if (packet.protocol != IPPROTO_TCP && packet.protocol != IPPROTO_UDP && sk->protocol == packet.protocol &&
	    owner.container && owner.container->flags & GRAFT_CONTAINER_OTHERS)
		return PASS;
	if (!packet.plain || packet.protocol != IPPROTO_UDP || !owner.container || has_other_source(sk, &packet))
		return drop(&owner);
	asked_of(&far, &packet, packet.to, packet.to_port);
	return may_speak_with(owner.container, &far) ? PASS : drop(&owner);
}
