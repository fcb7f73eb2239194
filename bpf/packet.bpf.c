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
#define GRAFT_IPV4_PLAIN 0x45 /* version 4, five words: no options */
#define IPPROTO_HOPOPTS 0
#define ICMP_ECHO 8
#define ICMPV6_ECHO_REQUEST 128
#define GRAFT_JUMBO 65535 /* the longest payload that the length field of an IPv6 header can express */
#define ETH_P_IP 0x0800

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

static __always_inline int is_in_other_netns(struct __sk_buff *skb, struct container *container)
{
	u64 netns = netns_of(skb);

	return netns != ANY_NETNS && netns != container->netns;
}

/* Whether a packet's socket is host-homed, and its owner. An untagged socket of a direct container counts as
 * host-homed unless it is known to be in another namespace. */
static __always_inline int is_host_homed(struct __sk_buff *skb, struct bpf_sock *sk, struct owner *owner)
{
	struct scope *scope = scopes.get_local_storage(0);

	resolve_owner(owner, tag_of(sk), scope->container);
	if (owner->tag || !owner->container)
		return owner->home == GRAFT_HOME_HOST;
	return owner->container->transport == GRAFT_TRANSPORT_DIRECT && !is_in_other_netns(skb, owner->container);
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
		return endpoint && !is_unix(endpoint) && (netns == ANY_NETNS || endpoint->netns == netns);
	}
	return container->transport == GRAFT_TRANSPORT_DIRECT && rule != GRAFT_VERDICT_DENY &&
	       (rule == GRAFT_VERDICT_CONTAINER || container->connect_default == GRAFT_DEFAULT_CONTAINER);
}

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
	if (!serves(from, IPPROTO_ICMP))
		return 0;
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

static __always_inline int drop(struct owner *owner)
{
	count(owner->id, GRAFT_DECISION_DROPPED);
	return REFUSE;
}

/* Whether a packet arrives over IPv4 at an IPv6 endpoint that is not dual-stack. */
static __always_inline int is_of_other_family(struct __sk_buff *skb, struct tag *tag)
{
	struct endpoint *endpoint = endpoints.lookup(&tag->endpoint);

	return endpoint && endpoint->family == GRAFT_IPV6 && !(endpoint->flags & GRAFT_ENDPOINT_DUAL_STACK) &&
	       skb->protocol == bpf_htons(ETH_P_IP);
}

/* Whether a socket receives from any client: a listener at the port that the listen hook recorded, a datagram socket
 * at the endpoint that it is granted now (or at a port that it had before there was a policy). Not one at an endpoint
 * that a 32-bit call has tied to an interface since: in a VRF that is another address of the same name. */
static __always_inline int accepts_anyone(struct __sk_buff *skb, struct bpf_sock *sk, struct owner *owner)
{
	struct tag *tag = owner->tag;
	struct local_address local;

	if (!tag || !tag->open_port || tag->open_port != sk->src_port)
		return 0;
	if (!tag->endpoint)
		return 1;
	read_local_address(&local, sk);
	/* (A link-local address ties its socket to an interface by itself.) */
	if (is_diverted(sk) && !(local.family == GRAFT_IPV6 && (local.ip[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000)))
		return 0;
	if (sk->protocol == IPPROTO_TCP)
		return 1;
	return is_granted(owner->container, tag, &local, IPPROTO_UDP, netns_of(skb));
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

/* Whether a connection goes to graftd, which judges its destination itself (connect.bpf.c). */
static __always_inline int goes_to_relay(struct bpf_sock *sk, struct owner *owner, struct request *remote)
{
	struct crossing *crossing = crossings.sk_storage_get(sk, 0, 0);
	struct relay *relay = relays.lookup(&owner->id);
	u32 ip[4];

	if (!crossing || !relay || crossing->role != GRAFT_CROSSING_REDIRECTED || crossing->container != owner->id)
		return 0;
	__builtin_memcpy(ip, remote->addr, 16);
	if (remote->port != relay->port)
		return 0;
	if (remote->family == GRAFT_IPV4)
		return ip[0] == bpf_htonl(0x7f000001);
	return !(ip[0] | ip[1] | ip[2]) && ip[3] == bpf_htonl(1);
}

/* The setsockopt hook refuses to join a group, but the kernel does not call it for 32-bit callers. */
static __always_inline int is_multicast(struct packet *packet)
{
	u8 first = packet->to[0] & 0xff;

	return packet->family == GRAFT_IPV4 ? first >= 224 && first < 240 : first == 0xff;
}

/* The ferry hears nobody but the sockets of its container, whose datagrams have its mark. */
static __always_inline int arrives_at_ferry(struct __sk_buff *skb, struct owner *owner)
{
	struct ferry *ferry = ferries.lookup(&owner->id);

	return ferry && ferry->mark && skb->mark == ferry->mark ? PASS : drop(owner);
}

/* It sends only to datagram sockets of its container: another socket may have got the port of one that was closed. */
static __always_inline int leaves_ferry(struct __sk_buff *skb, struct owner *owner)
{
	struct bpf_sock_tuple tuple = {};
	struct packet packet;
	struct bpf_sock *to;
	struct tag *tag;
	int found;

	if (!read_packet(skb, &packet) || !packet.plain || packet.protocol != IPPROTO_UDP)
		return drop(owner);
	if (packet.family == GRAFT_IPV4) {
		tuple.ipv4.saddr = packet.from[0];
		tuple.ipv4.daddr = packet.to[0];
		tuple.ipv4.sport = bpf_htons(packet.from_port);
		tuple.ipv4.dport = bpf_htons(packet.to_port);
		to = bpf_sk_lookup_udp(skb, &tuple, sizeof(tuple.ipv4), BPF_F_CURRENT_NETNS, 0);
	} else {
		__builtin_memcpy(tuple.ipv6.saddr, packet.from, 16);
		__builtin_memcpy(tuple.ipv6.daddr, packet.to, 16);
		tuple.ipv6.sport = bpf_htons(packet.from_port);
		tuple.ipv6.dport = bpf_htons(packet.to_port);
		to = bpf_sk_lookup_udp(skb, &tuple, sizeof(tuple.ipv6), BPF_F_CURRENT_NETNS, 0);
	}
	if (!to)
		return drop(owner);
	tag = tags.sk_storage_get(to, 0, 0);
	found = tag && tag->home == GRAFT_HOME_HOST && tag->container == owner->id;
	bpf_sk_release(to);
	return found ? PASS : drop(owner);
}

/* Where a socket's packets of that family go, read from the socket: the host's own NAT may have changed the address in
 * the packet. A datagram socket that is not connected sends to what its sends name, which the sendmsg hook judged. */
static __always_inline void read_remote(struct request *remote, struct bpf_sock *sk, u8 family, u8 protocol)
{
	u32 ip4 = sk->dst_ip4, port = sk->dst_port;
	u32 ip[4] = { sk->dst_ip6[0], sk->dst_ip6[1], sk->dst_ip6[2], sk->dst_ip6[3] };

	asm volatile("" : "+r"(port), "+r"(ip4), "+r"(ip[0]), "+r"(ip[1]), "+r"(ip[2]), "+r"(ip[3]));
	__builtin_memset(remote, 0, sizeof(*remote));
	remote->port = bpf_ntohs((u16)port);
	remote->family = family;
	remote->protocol = protocol;
	if (family == GRAFT_IPV4)
		__builtin_memcpy(remote->addr, &ip4, 4);
	else
		__builtin_memcpy(remote->addr, ip, 16);
}

#ifdef GRAFT_UDP_PENDING
/* The flow that the kernel keeps with a socket, and sends datagrams by: a pending one, which one send began and another
 * one completes (MSG_MORE, UDP_CORK), for which it calls the sendmsg hook only once; and over IPv4 each one that a
 * connected socket sends to its peer, also where a datagram to somewhere else has left its own flow there. The rule may
 * have been removed since. 0: no such flow. */
static __always_inline int read_kept_flow(struct __sk_buff *skb, struct bpf_sock *sk, struct request *remote,
					  struct local_address *source, u8 family, int connected)
{
	void *full = read_pointer((void *)skb + GRAFT_SKB_SK), *flow = full + GRAFT_CORK_FLOW;
	u32 pending = 0;
	u16 port = 0;

	if (!full || bpf_probe_read_kernel(&pending, sizeof(pending), full + GRAFT_UDP_PENDING))
		return 0;
	if (!pending && !(connected && sk->family == AF_INET))
		return 0;
	__builtin_memset(remote, 0, sizeof(*remote));
	__builtin_memset(source, 0, sizeof(*source));
	remote->family = source->family = family;
	remote->protocol = IPPROTO_UDP;
	if (family == GRAFT_IPV4) {
		bpf_probe_read_kernel(source->ip, 4, flow + GRAFT_FLOW4_SADDR);
		bpf_probe_read_kernel(remote->addr, 4, flow + GRAFT_FLOW4_DADDR);
		bpf_probe_read_kernel(&port, sizeof(port), flow + GRAFT_FLOW4_PORTS);
	} else {
		bpf_probe_read_kernel(source->ip, 16, flow + GRAFT_FLOW6_SADDR);
		bpf_probe_read_kernel(remote->addr, 16, flow + GRAFT_FLOW6_DADDR);
		bpf_probe_read_kernel(&port, sizeof(port), flow + GRAFT_FLOW6_PORTS);
	}
	remote->port = bpf_ntohs(port);
	return 1;
}

#else
static __always_inline int read_kept_flow(struct __sk_buff *skb, struct bpf_sock *sk, struct request *remote,
					  struct local_address *source, u8 family, int connected)
{
	return 0;
}
#endif

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

/* `own`: the socket's local address; NULL where its source is not judged. */
static __always_inline int may_reach(struct bpf_sock *sk, struct owner *owner, struct request *remote, u64 netns,
				     struct local_address *source, struct local_address *own)
{
	struct endpoint *endpoint;

	if ((is_diverted(sk) && !is_link_local(remote)) ||
	    !may_exchange_with(owner->container, remote, netns, &endpoint))
		return 0;
	return !own || !endpoint || leaves_from(source, own, owner->tag, endpoint, remote->endpoint);
}

/* Whether a datagram may be one to the socket's peer. (An IPv6 socket sends to IPv4 destinations too.) */
static __always_inline int may_go_to_peer(struct bpf_sock *sk, u8 family)
{
	u32 ip[4] = { sk->dst_ip6[0], sk->dst_ip6[1], sk->dst_ip6[2], sk->dst_ip6[3] };

	asm volatile("" : "+r"(ip[0]), "+r"(ip[1]), "+r"(ip[2]), "+r"(ip[3]));
	if (!is_connected(sk))
		return 0;
	if (sk->family == AF_INET)
		return family == GRAFT_IPV4;
	return (!ip[0] && !ip[1] && ip[2] == bpf_htonl(0xffff)) == (family == GRAFT_IPV4);
}

/* Whether a datagram, or the first packet of a connection, may go to its destination. The connect hook judged a
 * connection when it was requested; it may start later (TCP_FASTOPEN_CONNECT), to another address (an IPv6 socket that
 * the kernel still treats as IPv4), or to an address that the remote end announced (another subflow of MPTCP). So may the
 * source be of an endpoint that the rule named then, or that has moved since. Which of two destinations a datagram of a
 * connected socket has is not seen here, so both are judged. */
static __always_inline int may_leave(struct __sk_buff *skb, struct bpf_sock *sk, struct owner *owner, u8 family,
				     u8 protocol)
{
	u64 netns = netns_of(skb);
	struct local_address local, source, *own;
	struct request remote, kept;
	struct ferry *ferry;
	int has_kept, connected = is_connected(sk), bound = is_bound(sk, owner->tag, owner->container, netns);

	if (has_lost_endpoint(sk, owner->tag, bound))
		return 0;
	read_local_address(&local, sk);
	own = has_own_source(sk, owner, bound) ? 0 : &local;
	read_remote(&remote, sk, family, protocol);
	has_kept = protocol == IPPROTO_UDP && read_kept_flow(skb, sk, &kept, &source, family, connected);
	if (has_kept && !may_reach(sk, owner, &kept, netns, &source, own) && !is_ferry(owner, &kept, &ferry))
		return 0;
	if (protocol == IPPROTO_UDP && !may_go_to_peer(sk, family))
		return has_kept || !is_diverted(sk);
	if (protocol == IPPROTO_TCP && goes_to_relay(sk, owner, &remote))
		return 1;
	return may_reach(sk, owner, &remote, netns, &local, own);
}

/* Whether a packet may complete a connection that its socket has begun: an answer, or the remote end's own first packet
 * (both ends connect, and neither listens), which needs no first packet of the socket's that the egress hook would have
 * judged. */
static __always_inline int may_connect(struct __sk_buff *skb, struct bpf_sock *sk, struct owner *owner)
{
	u8 family = skb->protocol == bpf_htons(ETH_P_IP) ? GRAFT_IPV4 : GRAFT_IPV6;

	if (owner->container->transport == GRAFT_TRANSPORT_DIRECT && !denies_anything(owner->container))
		return 1;
	return may_leave(skb, sk, owner, family, IPPROTO_TCP);
}

/* A server at all addresses may answer from the one that its client asked: see is_hosts. */
static __always_inline void note_arrival(struct owner *owner, struct packet *packet)
{
	struct endpoint *endpoint = owner->tag && owner->tag->endpoint ? endpoints.lookup(&owner->tag->endpoint) : 0;

	if (!endpoint || is_unspecified(endpoint->addr))
		note_as_hosts(endpoint ? endpoint->netns : owner->container->netns, packet->to, packet->family);
}

int graft_skb_ingress(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk;
	struct packet packet;
	struct owner owner;
	struct endpoint *endpoint;
	struct request remote;
	struct ferry *ferry;
	u32 type, protocol;
	int open;

	sk = sk ? bpf_sk_fullsock(sk) : 0;
	if (!sk)
		return PASS;
	type = sk->type;
	protocol = sk->protocol;
	if (is_tcp(type, protocol) && sk->state != BPF_TCP_LISTEN && sk->state != BPF_TCP_SYN_SENT)
		return PASS;
	if (!is_host_homed(skb, sk, &owner))
		return owner.home == GRAFT_HOME_FERRY ? arrives_at_ferry(skb, &owner) : PASS;
	/* A container that no longer exists has no listeners, even if a process still has one open. */
	if (!owner.container)
		return drop(&owner);
	if (is_tcp(type, protocol) && sk->state == BPF_TCP_SYN_SENT)
		return may_connect(skb, sk, &owner) ? PASS : drop(&owner);
	if (is_tcp(type, protocol) && is_unix_listener(&owner))
		return accepts_anyone(skb, sk, &owner) && is_from_relay(skb, sk, &owner) ? PASS : drop(&owner);
	if (binds_freely(owner.container) && !denies_anything(owner.container))
		return PASS;
	if (may_ping(owner.container, type, protocol))
		return is_permitted_ping(skb, sk, &owner, 0) ? PASS : drop(&owner);
	if (!has_rules(type, protocol))
		return binds_freely(owner.container) || owner.container->flags & GRAFT_CONTAINER_OTHERS ? PASS : drop(&owner);
	open = binds_freely(owner.container) || accepts_anyone(skb, sk, &owner);
	if (owner.tag && owner.tag->endpoint && is_of_other_family(skb, owner.tag))
		return drop(&owner);
	if (is_tcp(type, protocol))
		return open ? PASS : drop(&owner);
	if (!read_packet(skb, &packet))
		return drop(&owner);
	/* At an endpoint only its groups. A socket that was bound before there was a policy continues as before. */
	if (is_multicast(&packet) && !(owner.tag && owner.tag->open_port && !owner.tag->endpoint) &&
	    !(open && owner.tag && has_group(owner.tag->endpoint, packet.family, packet.to)))
		return drop(&owner);
	if (open) {
		if (!is_multicast(&packet))
			note_arrival(&owner, &packet);
		return PASS;
	}
	/* At an endpoint that it has lost, or whose address or port it keeps, it receives not even from permitted destinations. */
	if (has_lost_endpoint(sk, owner.tag, 0) || keeps_lost_source(sk, owner.tag) || !packet.plain)
		return drop(&owner);
	read_sender(&remote, &packet);
	return may_exchange_with(owner.container, &remote, ANY_NETNS, &endpoint) || is_ferry(&owner, &remote, &ferry) ?
		       PASS : drop(&owner);
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

/* A datagram to the container's ferry gets the ferry's mark; no other one may have it. Returns 0 for one that has. */
static __always_inline int set_ferry_mark(struct __sk_buff *skb, struct owner *owner)
{
	struct request remote = { .protocol = IPPROTO_UDP };
	struct packet packet;
	struct ferry *ferry;

	if (owner->container->transport != GRAFT_TRANSPORT_SWAP)
		return 1;
	if (!read_packet(skb, &packet))
		return 0;
	__builtin_memcpy(remote.addr, packet.to, 16);
	remote.port = packet.to_port;
	remote.family = packet.family;
	if (is_ferry(owner, &remote, &ferry))
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
		return owner.home == GRAFT_HOME_FERRY ? leaves_ferry(skb, &owner) : PASS;
	if (owner.container && owner.container->transport == GRAFT_TRANSPORT_DIRECT && !denies_anything(owner.container))
		return PASS;
	if (may_ping(owner.container, type, protocol))
		return is_permitted_ping(skb, sk, &owner, 1) ? PASS : drop(&owner);
	if (!has_rules(type, protocol))
		return owner.container && owner.container->flags & GRAFT_CONTAINER_OTHERS ? PASS : drop(&owner);
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
	return tcp || set_ferry_mark(skb, &owner) ? PASS : drop(&owner);
}
