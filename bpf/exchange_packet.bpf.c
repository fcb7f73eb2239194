// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* Datagrams between a container's sockets and Graft's relay (exchange.bpf.c, stand_in.bpf.c), as packets: nobody else in
 * their network namespace has a part in them. Other containers of a pod may share it, and /proc/net/udp shows all its
 * addresses.
 *
 *      egress    of a container's socket: what goes to the relay, by an exchange of that socket, gets the relay's mark
 *      ingress   the relay receives nothing without its mark
 *      egress    of the relay: only to sockets that were made in the container's cgroup or below, with another mark
 *      ingress   from the relay's addresses a socket of the container receives nothing without that
 */

#define GRAFT_CGROUP_LEVELS 32 /* the root is 0 */

static __always_inline int is_plain_udp(struct __sk_buff *skb, struct packet *packet)
{
	return read_packet(skb, packet) && packet->plain && packet->protocol == IPPROTO_UDP;
}

/* Whether a packet goes to the address of an exchange that its socket may use: one with a client, or one that it began. */
static __always_inline int is_own_exchange(struct __sk_buff *skb, struct owner *owner, struct packet *packet)
{
	struct exchange_slot key = { .container = owner->id };
	u32 address = bpf_ntohl(packet->to[0]);
	struct exchange *found;

	key.slot = address % GRAFT_EXCHANGE_SLOTS;
	key.out = address >> 23 & 1;
	found = exchanges.lookup(&key);
	if (!found || exchange_address(key.out, found->generation, key.slot) != address)
		return 0;
	if (!key.out)
		return 1;
	if (found->cookie != bpf_get_socket_cookie(skb))
		return 0;
	found->used = bpf_ktime_get_ns(); /* no hook on a system call sees a send() of a connected socket */
	return 1;
}

/* The same of a stand-in: one for a client of its port, or one that it took. */
static __always_inline int is_own_stand_in(struct __sk_buff *skb, struct owner *owner, struct packet *packet)
{
	struct stand_in_key key = { .container = owner->id, .port = packet->to_port };
	struct stand_in *found = stand_ins.lookup(&key);

	if (!found)
		return 0;
	if (!found->cookie)
		return found->local_port == packet->from_port;
	return found->cookie == bpf_get_socket_cookie(skb);
}

/* Whether a packet goes to Graft's relay, by an exchange of its socket. */
static __always_inline int is_for_relay(struct __sk_buff *skb, struct owner *owner, struct relay *relay,
					struct packet *packet)
{
	if (!relay)
		return 0;
	if (packet->family == GRAFT_IPV6)
		return is_own_stand_in(skb, owner, packet);
	return relay->datagram_port == packet->to_port && is_own_exchange(skb, owner, packet);
}

/* Whether a packet goes to the peer of a socket whose connect was redirected to the relay: no hook on a system call sees
 * a plain send() there. */
static __always_inline int goes_to_redirected_peer(struct bpf_sock *sk, struct packet *packet)
{
	struct crossing *crossing = crossings.sk_storage_get(sk, 0, 0);

	return crossing && crossing->role == GRAFT_CROSSING_REDIRECTED && packet->to_port == bpf_ntohs(sk->dst_port);
}

/* What a container's socket sends to the relay. The mark is shown to the relay only: if somebody else receives at that
 * address by now, what is for the relay is dropped. */
static __always_inline int leaves_for_relay(struct __sk_buff *skb, struct bpf_sock *sk, struct owner *owner)
{
	struct relay *relay = relays.lookup(&owner->id);
	struct packet packet;
	struct bpf_sock *to;
	int own, redirected;

	if (!is_plain_udp(skb, &packet) || !is_on_loopback(packet.to, packet.family))
		return PASS;
	redirected = goes_to_redirected_peer(sk, &packet);
	own = is_for_relay(skb, owner, relay, &packet);
	if (!own && !redirected)
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
static __always_inline int arrives_from_relay(struct __sk_buff *skb, struct owner *owner)
{
	struct relay *relay = relays.lookup(&owner->id);
	struct packet packet;

	if (!relay || !relay->datagram_port)
		return PASS;
	if (!read_packet(skb, &packet))
		return drop(owner);
	if (!has_relays_address(owner, relay, &packet))
		return PASS;
	if (!relay->answer_mark || skb->mark != relay->answer_mark)
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
		return arrives_from_relay(skb, owner);
	relay = relay_of(sk, owner);
	if (!owner->id)
		return PASS;
	return relay && relay->mark && skb->mark == relay->mark ? PASS : drop(owner);
}
