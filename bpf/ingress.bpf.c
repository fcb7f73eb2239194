// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* Packets that come in: who may reach a listener, a datagram socket, or a socket that is connecting. */

#define ETH_P_IP 0x0800

/* Whether a packet arrives over IPv4 at an IPv6 endpoint that is not dual-stack. */
static __always_inline int is_of_other_family(struct __sk_buff *skb, struct endpoint *endpoint)
{
	return endpoint && endpoint->family == GRAFT_IPV6 && !(endpoint->flags & GRAFT_ENDPOINT_DUAL_STACK) &&
	       skb->protocol == bpf_htons(ETH_P_IP);
}

/* Whether a socket receives from any client: a listener at the port that the listen hook recorded, a datagram socket
 * at the endpoint that it is granted now (or at a port that it had before there was a policy). Not one at an endpoint
 * that a 32-bit call has tied to an interface since: in a VRF that is another address of the same name. */
static __always_inline int accepts_anyone(struct __sk_buff *skb, struct bpf_sock *sk, struct owner *owner, u32 id,
					  struct endpoint *endpoint)
{
	struct tag *tag = owner->tag;
	struct local_address local;

	if (!tag || !tag->open_port || tag->open_port != sk->src_port)
		return 0;
	if (!id)
		return 1;
	read_local_address(&local, sk);
	/* (A link-local address ties its socket to an interface by itself.) */
	if (is_diverted(sk) && !(local.family == GRAFT_IPV6 && (local.ip[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000)))
		return 0;
	if (sk->protocol == IPPROTO_TCP)
		return 1;
	return is_granted_at(owner->container, tag, id, endpoint, &local, IPPROTO_UDP, netns_of_tagged(skb, tag));
}

/* Whether a listener is one of a direct container whose endpoint was a unix socket when it was bound: the host's users
 * must reach it by that, and not by the port on loopback; by neither when the endpoint is gone. */
static __always_inline int is_unix_listener(struct owner *owner)
{
	return owner->tag && owner->tag->endpoint && owner->tag->at_unix;
}

/* Whether a packet is of a connection that graftd has begun (splice.bpf.c), until the listener's side has its socket. */
static __always_inline int is_from_relay(struct __sk_buff *skb, struct bpf_sock *sk, struct owner *owner)
{
	struct crossing *crossing;
	struct packet packet;
	struct arrival key;

	if (!read_packet(skb, &packet) || !packet.plain)
		return 0;
	__builtin_memset(&key, 0, sizeof(key));
	key.netns = owner->container->netns;
	__builtin_memcpy(key.addr, packet.from, 16);
	__builtin_memcpy(key.to, packet.to, 16);
	key.port = packet.from_port;
	key.to_port = sk->src_port;
	key.family = packet.family;
	crossing = arrivals.lookup(&key);
	return crossing && crossing->role == GRAFT_CROSSING_DIALING && crossing->container == owner->id;
}

/* The setsockopt hook refuses to join a group, but the kernel does not call it for 32-bit callers. */
static __always_inline int is_multicast(struct packet *packet)
{
	u8 first = packet->to[0] & 0xff;

	return packet->family == GRAFT_IPV4 ? first >= 224 && first < 240 : first == 0xff;
}

/* Whether a packet may complete a connection that its socket has begun: an answer, or the remote end's own first packet
 * (both ends connect, and neither listens), which needs no first packet of the socket's that the egress hook would have
 * judged. */
static __always_inline int may_connect(struct __sk_buff *skb, struct bpf_sock *sk, struct owner *owner)
{
	u8 family = skb->protocol == bpf_htons(ETH_P_IP) ? GRAFT_IPV4 : GRAFT_IPV6;

	if (defaults_apply(owner->container) && !denies_anything(owner->container))
		return 1;
	return may_leave(skb, sk, owner, family, IPPROTO_TCP);
}

/* The sender of a packet, as a destination that rules judge. */
static __always_inline void read_sender(struct request *request, struct packet *packet)
{
	__builtin_memset(request, 0, sizeof(*request));
	__builtin_memcpy(request->addr, packet->from, 16);
	request->port = packet->from_port;
	request->family = packet->family;
	request->protocol = packet->protocol;
}

/* A server at all addresses may answer from the one that its client asked: see is_hosts. */
static __always_inline void note_arrival(struct __sk_buff *skb, struct owner *owner, struct packet *packet,
					 struct endpoint *endpoint)
{
	struct container *container = owner->container;
	u64 home = is_unsupervised(container) ? container->host_netns : container->netns;

	if (!endpoint || is_unspecified(endpoint->addr))
		note_as_hosts(skb, endpoint ? endpoint->netns : home, packet->to, packet->family);
}

/* The ferry hears nobody but the sockets of its container, whose datagrams have its mark. */
static __always_inline int arrives_at_ferry(struct __sk_buff *skb, struct owner *owner)
{
	struct ferry *ferry = ferries.lookup(&owner->id);

	return ferry && ferry->mark && skb->mark == ferry->mark ? PASS : drop(owner);
}

/* Whether a datagram comes from an address of the container's ferry, but not from the ferry, whose datagrams have its mark:
 * any user of the host can name such a source. Behind options its port is not seen. The mark is removed: a program could
 * read it by a socket filter. */
static __always_inline int is_forged(struct __sk_buff *skb, struct owner *owner, struct request *remote, int plain)
{
	struct ferry *ferry;

	if (!plain)
		return owner->container->transport == GRAFT_TRANSPORT_SWAP &&
		       (remote->family == GRAFT_IPV4 ? remote->addr[0] == 127 : is_loopback6(remote->addr));
	if (!is_ferry(owner, remote, &ferry))
		return 0;
	if (!ferry->mark || skb->mark != ferry->mark)
		return 1;
	skb->mark = 0;
	return 0;
}

/* Whether a server of another container is there by the kernel's own lookup for a client that has no address: `servers` may
 * have lost it. The kernel finds one socket only, which may be this one. */
static __always_inline int another_is_found(struct __sk_buff *skb, struct owner *owner, struct packet *packet)
{
	struct packet to = *packet;

	__builtin_memset(to.from, 0, sizeof(to.from));
	to.from_port = 0;
	return is_released_others(receiver_of(skb, &to), owner->id, ANY_NETNS, GRAFT_NONE_GRANTED);
}

/* Whether what is sent to that address and port is for another container, which has bound it after `since`. */
static __always_inline int is_anothers(u64 netns, struct packet *packet, u16 port, u8 protocol, u32 container, u64 since)
{
	struct server_place key = { .netns = netns, .port = port, .family = packet->family, .protocol = protocol };

	if (netns == ANY_NETNS)
		return 0;
	__builtin_memcpy(key.addr, packet->to, 16);
	if (is_anothers_place(&key, container, since, packet->family))
		return 1;
	__builtin_memset(key.addr, 0, 16);
	if (is_anothers_place(&key, container, since, packet->family))
		return 1;
	if (packet->family == GRAFT_IPV6)
		return 0;
	key.family = GRAFT_IPV6; /* one that is dual-stack */
	return is_anothers_place(&key, container, since, packet->family);
}

/* Whether a datagram is a broadcast: of that, as of what is sent to a group, each socket has a copy. What a program of the
 * host itself sends has another type there. */
static __always_inline int is_for_all(struct __sk_buff *skb, struct packet *packet, u64 netns)
{
	return packet->family == GRAFT_IPV4 &&
	       (skb->pkt_type == PACKET_BROADCAST || packet->to[0] == 0xffffffff || packet->to[0] == bpf_htonl(0x7fffffff) ||
		is_of_all(netns, packet->to));
}

/* Whether what arrives at a listener, or at a datagram socket that any client may reach, is for a server of another container:
 * that one is granted the place now, and this one has it from an endpoint that it has lost, or from before there was a policy.
 * The kernel prefers a socket that is connected to the sender, or (over IPv6) that was, at one address, or tied to an
 * interface, to any server. */
static __always_inline int is_for_another(struct __sk_buff *skb, struct bpf_sock *sk, struct owner *owner, u32 id,
					  struct endpoint *endpoint, struct packet *packet, u8 protocol)
{
	struct tag *tag = owner->tag;
	struct local_address local;
	u64 netns;

	if (!tag)
		return 0;
	netns = netns_of_tagged(skb, tag);
	read_local_address(&local, sk);
	if (id ? is_granted_at(owner->container, tag, id, endpoint, &local, protocol, netns) :
		 is_granted_place(owner->container, &local, protocol, netns))
		return 0;
	if (!is_anothers(netns, packet, local.port, protocol, owner->id, tag->since) &&
	    (protocol != IPPROTO_UDP || !another_is_found(skb, owner, packet)))
		return 0;
	return protocol == IPPROTO_TCP || !is_for_all(skb, packet, netns);
}

static __always_inline int judge_ingress(struct __sk_buff *skb, struct owner *owner)
{
	struct bpf_sock *sk = skb->sk;
	struct packet packet;
	struct endpoint *endpoint;
	struct request remote;
	struct ferry *ferry;
	u32 type, protocol, id;
	int open;

	sk = sk ? bpf_sk_fullsock(sk) : 0;
	if (!sk)
		return PASS;
	type = sk->type;
	protocol = sk->protocol;
	if (is_tcp(type, protocol) && sk->state != BPF_TCP_LISTEN && sk->state != BPF_TCP_SYN_SENT)
		return PASS;
	if (!is_host_homed(skb, sk, owner))
		return owner->home == GRAFT_HOME_FERRY ? arrives_at_ferry(skb, owner) : arrives_inside(skb, sk, owner);
	/* A container that no longer exists has no listeners, even if a process still has one open. */
	if (!owner->container)
		return drop(owner);
	if (is_tcp(type, protocol) && sk->state == BPF_TCP_SYN_SENT)
		return may_connect(skb, sk, owner) ? PASS : drop(owner);
	id = owner->tag ? owner->tag->endpoint : 0;
	endpoint = id ? endpoints.lookup(&id) : 0;
	if (is_tcp(type, protocol) && is_unix_listener(owner))
		return accepts_anyone(skb, sk, owner, id, endpoint) && is_from_relay(skb, sk, owner) ? PASS : drop(owner);
	if (binds_freely(owner->container) && !denies_anything(owner->container))
		return PASS;
	if (may_ping(owner->container, type, protocol))
		return is_permitted_ping(skb, sk, owner, 0) ? PASS : drop(owner);
	if (!has_rules(type, protocol))
		return binds_freely(owner->container) || passes_others(owner->container) ? PASS : drop(owner);
	open = binds_freely(owner->container) || accepts_anyone(skb, sk, owner, id, endpoint);
	if (is_of_other_family(skb, endpoint))
		return drop(owner);
	if (is_tcp(type, protocol) && !open)
		return drop(owner);
	if (!read_packet(skb, &packet))
		return drop(owner);
	if (is_tcp(type, protocol))
		return !binds_freely(owner->container) && is_for_another(skb, sk, owner, id, endpoint, &packet, IPPROTO_TCP) ?
			       drop(owner) : PASS;
	/* At an endpoint only its groups. A socket that was bound before there was a policy continues as before. */
	if (is_multicast(&packet) && !has_earlier_port(sk, owner->tag) &&
	    !(open && owner->tag && has_group(owner->tag->endpoint, packet.family, packet.to)))
		return drop(owner);
	read_sender(&remote, &packet);
	if (is_forged(skb, owner, &remote, packet.plain))
		return drop(owner);
	if (open && is_multicast(&packet))
		return PASS;
	if (open) {
		if (!id && !binds_freely(owner->container) &&
		    is_for_another(skb, sk, owner, id, endpoint, &packet, IPPROTO_UDP))
			return drop(owner);
		note_arrival(skb, owner, &packet, endpoint);
		return PASS;
	}
	/* At an endpoint that it has lost it receives not even from permitted destinations. */
	if (has_lost_endpoint(sk, owner->tag, 0) || !packet.plain)
		return drop(owner);
	if (!may_exchange_with(owner->container, &remote, ANY_NETNS, &endpoint)) {
		if (!is_ferry(owner, &remote, &ferry))
			return drop(owner);
	} else if (outlasts_its_peer(sk, owner->tag)) {
		return drop(owner);
	}
	return keeps_others_source(sk, owner->tag, endpoint ? remote.endpoint : 0) ? drop(owner) : PASS;
}

/* A packet that arrives is dropped. Of one that leaves only the count is known: with this the program for those would be too
 * long for the verifier, which goes through the end once for each way to it. */
static __always_inline int trace_drop(struct __sk_buff *skb, u32 container)
{
	struct request remote;
	struct packet packet;

	if (!container || !find_watch() || !read_packet(skb, &packet))
		return REFUSE;
	read_sender(&remote, &packet);
	trace_packet(container, &remote);
	return REFUSE;
}

int graft_skb_ingress(struct __sk_buff *skb)
{
	struct owner owner = {};

	return judge_ingress(skb, &owner) == REFUSE ? trace_drop(skb, owner.id) : PASS;
}
