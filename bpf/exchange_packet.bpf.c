// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* Datagrams between a container's sockets and Graft's relay (exchange.bpf.c, stand_in.bpf.c), as packets: nobody else in
 * their network namespace has a part in them. Other containers of a pod may share it, and /proc/net/udp shows all its
 * addresses.
 *
 *      egress    of a container's socket: what goes to the relay, by an exchange of that socket, gets the relay's mark
 *      ingress   the relay receives nothing without its mark
 *      egress    of the relay: only to sockets that were made in the container's cgroup or below, with another mark
 *      ingress   from the relay's addresses a socket of the container receives nothing without that
 *
 * A socket that is connected stays so when graftd has forgotten its remote end, or was killed: the address that it is
 * connected to may stand for another one by then, or be a stranger's. So the socket remembers whom it was connected to
 * (crossings), and exchanges nothing with its peer but what is of that remote end, and has passed the relay.
 */

#define GRAFT_CGROUP_LEVELS 32 /* the root is 0 */

static __always_inline int is_plain_udp(struct __sk_buff *skb, struct packet *packet)
{
	return read_packet(skb, packet) && packet->plain && packet->protocol == IPPROTO_UDP;
}

/* Whether that is where a socket is connected to. */
static __always_inline int is_peer(struct bpf_sock *sk, u8 family, u32 *address, u16 port)
{
	u32 ip4 = sk->dst_ip4, port_be = sk->dst_port;
	u32 ip[4] = { sk->dst_ip6[0], sk->dst_ip6[1], sk->dst_ip6[2], sk->dst_ip6[3] };

	asm volatile("" : "+r"(port_be), "+r"(ip4), "+r"(ip[0]), "+r"(ip[1]), "+r"(ip[2]), "+r"(ip[3]));
	if (port != bpf_ntohs((u16)port_be))
		return 0;
	if (family == GRAFT_IPV4)
		return address[0] == (sk->family == AF_INET6 ? ip[3] : ip4);
	return address[0] == ip[0] && address[1] == ip[1] && address[2] == ip[2] && address[3] == ip[3];
}

/* The remote end that a socket is connected to by the relay; NULL where it is not. */
static __always_inline struct crossing *connected_end(struct bpf_sock *sk)
{
	return is_connected(sk) ? standing_crossing(sk) : 0;
}

/* Whether an exchange is with the remote end that a socket is connected to; NULL: it is not, and any will do. */
static __always_inline int is_with(struct crossing *crossing, u8 *address, u16 port)
{
	u64 theirs[2], wanted[2];

	if (!crossing)
		return 1;
	__builtin_memcpy(theirs, address, 16);
	__builtin_memcpy(wanted, crossing->addr, 16);
	return port == crossing->port && theirs[0] == wanted[0] && theirs[1] == wanted[1];
}

/* Whether a packet goes to the address of an exchange that its socket may use: one with a client, or one that it began. */
static __always_inline int is_own_exchange(struct __sk_buff *skb, struct owner *owner, struct packet *packet,
					   struct crossing *crossing)
{
	struct exchange_slot key = { .container = owner->id };
	u32 address = bpf_ntohl(packet->to[0]);
	struct exchange *found;

	key.slot = address % GRAFT_EXCHANGE_SLOTS;
	key.out = address >> 23 & 1;
	found = exchanges.lookup(&key);
	if (!found || exchange_address(key.out, found->generation, key.slot) != address ||
	    !is_with(crossing, found->addr, found->port))
		return 0;
	if (!key.out)
		return found->local_port != 0; /* 0: its client is forgotten */
	if (found->cookie != bpf_get_socket_cookie(skb))
		return 0;
	found->used = bpf_ktime_get_ns(); /* no hook on a system call sees a send() of a connected socket */
	return 1;
}

/* The same of a stand-in: one for a client of its port, or one that it took. */
static __always_inline int is_own_stand_in(struct __sk_buff *skb, struct owner *owner, struct packet *packet,
					   struct crossing *crossing)
{
	struct stand_in_key key = { .container = owner->id, .port = packet->to_port };
	struct stand_in *found = stand_ins.lookup(&key);

	if (!found || !is_with(crossing, found->addr, found->port))
		return 0;
	if (!found->cookie)
		return found->local_port == packet->from_port; /* 0: it is forgotten */
	return found->cookie == bpf_get_socket_cookie(skb);
}

/* Whether a packet goes to Graft's relay, by an exchange of its socket. */
static __always_inline int is_for_relay(struct __sk_buff *skb, struct owner *owner, struct relay *relay,
					struct packet *packet, struct crossing *crossing)
{
	if (!relay)
		return 0;
	if (packet->family == GRAFT_IPV6)
		return is_own_stand_in(skb, owner, packet, crossing);
	return relay->datagram_port == packet->to_port && is_own_exchange(skb, owner, packet, crossing);
}

/* What a container's socket sends to the relay. The mark is shown to the relay only: if somebody else receives at that
 * address by now, what is for the relay is dropped. */
static __always_inline int leaves_for_relay(struct __sk_buff *skb, struct bpf_sock *sk, struct owner *owner)
{
	struct relay *relay = relays.lookup(&owner->id);
	struct crossing *crossing;
	struct packet packet;
	struct bpf_sock *to;
	int own;

	if (!is_plain_udp(skb, &packet) || !is_on_loopback(packet.to, packet.family))
		return PASS;
	/* No hook on a system call sees a plain send() of a connected socket. */
	crossing = is_peer(sk, packet.family, packet.to, packet.to_port) ? connected_end(sk) : 0;
	own = is_for_relay(skb, owner, relay, &packet, crossing);
	if (!own && !crossing)
		return PASS;
	to = receiver_of(skb, &packet);
	if (!to)
		return PASS; /* it is told that nobody does */
	if (!is_released_relay(to, owner->id))
		return drop(owner);
	if (own)
		skb->mark = relay->mark;
	return PASS;
}

/* The relay that a socket of graftd's is: of the container that becomes `owner`. NULL for any other socket. */
static __always_inline struct relay *relay_of(struct bpf_sock *sk, struct owner *owner)
{
	struct crossing *mark = crossings.sk_storage_get(sk, 0, 0);

	if (!mark || mark->role != GRAFT_CROSSING_LISTENER)
		return 0;
	owner->id = mark->container;
	return relays.lookup(&owner->id);
}

/* Whether a socket was made in that cgroup or below it. */
static __always_inline int is_of_cgroup(struct bpf_sock *sk, u64 cgroup)
{
	u64 above;
	int level;

	for (level = 0; level < GRAFT_CGROUP_LEVELS; level++) {
		above = bpf_sk_ancestor_cgroup_id(sk, level);
		if (!above || above == cgroup)
			return above != 0;
	}
	return 0;
}

/* What the relay sends: the port of a socket of the container's that was closed may be another program's since, and a
 * socket that shares its address with others' is not the container's alone. */
static __always_inline int leaves_relay(struct __sk_buff *skb, struct relay *relay, struct owner *owner)
{
	struct packet packet;
	struct bpf_sock *to;
	int found;

	if (!is_plain_udp(skb, &packet))
		return drop(owner);
	to = receiver_of(skb, &packet);
	if (!to)
		return drop(owner);
	found = is_of_cgroup(to, relay->cgroup) && is_groups_own(to, relay->cgroup);
	bpf_sk_release(to);
	if (!found)
		return drop(owner);
	skb->mark = relay->answer_mark;
	return PASS;
}

/* A packet out of a network namespace of a container's: of one of its own sockets, or of graftd's there. */
static __always_inline int leaves_inside(struct __sk_buff *skb, struct bpf_sock *sk, struct owner *owner)
{
	struct relay *relay;

	if (sk->protocol != IPPROTO_UDP)
		return PASS;
	if (owner->id)
		return owner->container && owner->container->transport == GRAFT_TRANSPORT_SPLICE ?
			       leaves_for_relay(skb, sk, owner) :
			       PASS;
	relay = relay_of(sk, owner);
	if (!owner->id)
		return PASS;
	return relay ? leaves_relay(skb, relay, owner) : drop(owner);
}

/* Whether what comes from an address of the relay's is of the remote end that the socket is connected to. */
static __always_inline int comes_from_end(struct owner *owner, struct packet *packet, struct crossing *crossing)
{
	struct stand_in_key key = { .container = owner->id, .port = packet->from_port };
	struct stand_in *stand_in;
	struct exchange *exchange;

	if (!crossing)
		return 1;
	if (packet->family == GRAFT_IPV4) {
		exchange = relayed_sender(owner, packet->from[0]);
		return exchange && is_with(crossing, exchange->addr, exchange->port);
	}
	stand_in = stand_ins.lookup(&key);
	return stand_in && is_with(crossing, stand_in->addr, stand_in->port);
}

/* Whether a datagram's source is what the recvmsg hook takes for an address of the relay's. Behind options its port is not
 * seen. */
static __always_inline int has_relays_address(struct owner *owner, struct relay *relay, struct packet *packet)
{
	struct stand_in_key key = { .container = owner->id, .port = packet->from_port };

	if (!is_on_loopback(packet->from, packet->family))
		return 0;
	if (!packet->plain)
		return 1;
	return packet->family == GRAFT_IPV4 ? relay->datagram_port == packet->from_port : stand_ins.lookup(&key) != 0;
}

/* What a socket of the container's receives: when graftd was killed, whoever takes a port of the relay's could pass for
 * the remote ends that it stood for. The mark is removed: a program could read it by a socket filter. */
static __always_inline int arrives_from_relay(struct __sk_buff *skb, struct bpf_sock *sk, struct owner *owner)
{
	struct relay *relay = relays.lookup(&owner->id);
	struct crossing *crossing = connected_end(sk); /* (then all that it receives is from there) */
	struct packet packet;

	if (!relay || !relay->datagram_port)
		return crossing ? drop(owner) : PASS;
	if (!read_packet(skb, &packet))
		return drop(owner);
	if (!crossing && !has_relays_address(owner, relay, &packet))
		return PASS;
	if (!relay->answer_mark || skb->mark != relay->answer_mark || !comes_from_end(owner, &packet, crossing))
		return drop(owner);
	skb->mark = 0;
	return PASS;
}

/* A packet that comes in there. */
static __always_inline int arrives_inside(struct __sk_buff *skb, struct bpf_sock *sk, struct owner *owner)
{
	struct relay *relay;

	if (sk->protocol != IPPROTO_UDP)
		return PASS;
	if (owner->id)
		return arrives_from_relay(skb, sk, owner);
	relay = relay_of(sk, owner);
	if (!owner->id)
		return PASS;
	return relay && relay->mark && skb->mark == relay->mark ? PASS : drop(owner);
}
