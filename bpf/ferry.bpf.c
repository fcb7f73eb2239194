// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* The ferry: datagrams between a host-homed socket of a swap container and the container's own network namespace.
 *
 * Theory of operation
 *
 *   An unconnected datagram socket has one home, and may talk to both worlds. Where it is on the host's stack, what it
 *   sends to a destination that the policy leaves in the container goes to a process of Graft's, on the host's loopback,
 *   which sends it on from a socket inside; answers come back the same way (graft/swap/ferry.py).
 *
 *      sendmsg   the destination becomes the ferry's address that stands for it: 127.254.x.y, or one of its ports at ::1
 *      egress    the datagram gets the ferry's mark, if it is the ferry that receives it
 *      ingress   the ferry receives nothing without its mark, and from its addresses a socket of the container neither
 *      egress    of the ferry: only to sockets of its container, with the mark
 *      recvmsg   an address of the ferry's is shown as the one that it stands for
 *      connect   of the ferry: a question, whose socket receives at an address
 *
 *   Which address stands for which is a table of a fixed number of places for each container (`berths`). The hook only
 *   fills places that are free, and the ferry empties those that were not used for a while.
 */

#define GRAFT_FERRY_NET_MASK 0xffff0000
#define GRAFT_BERTH_TRIES 8
#define ENOBUFS 105

/* The place of a peer: the one that it has, or a free one, taken for it. Returns 0 where neither is found. */
static __always_inline int find_berth(u32 container, struct request *peer, u16 *place)
{
	u32 places = peer->family == GRAFT_IPV4 ? GRAFT_BERTHS4 : GRAFT_BERTHS6, word[4], first, try;
	struct berth_key key = { .container = container, .family = peer->family };
	struct berth new = { .port = peer->port, .family = peer->family, .used = bpf_ktime_get_ns() };
	struct berth *found;

	__builtin_memcpy(word, peer->addr, 16);
	__builtin_memcpy(new.addr, peer->addr, 16);
	first = (word[0] ^ word[1] ^ word[2] ^ word[3] ^ ((u32)peer->port << 16)) * 0x9e3779b1u >> 16;
	for (try = 0; try < GRAFT_BERTH_TRIES; try++) {
		key.place = (first + try) % places;
		found = berths.lookup(&key);
		if (!found && !berths.insert(&key, &new)) {
			*place = key.place;
			return 1;
		}
		if (!found)
			found = berths.lookup(&key); /* another socket has just taken it */
		if (found && found->port == peer->port && is_same_address(found->addr, peer->addr)) {
			found->used = new.used;
			*place = key.place;
			return 1;
		}
	}
	return 0;
}

/* Whether a datagram of a host-homed socket is for the container's own stack. */
static __always_inline int is_for_inside(struct owner *owner, struct request *request, u32 rule)
{
	if (owner->container->transport != GRAFT_TRANSPORT_SWAP || request->protocol != IPPROTO_UDP)
		return 0;
	return rule == GRAFT_VERDICT_CONTAINER ||
	       (rule == GRAFT_VERDICT_NONE && owner->container->connect_default == GRAFT_DEFAULT_CONTAINER);
}

/* Whether a socket, which it releases, is of that home of the container's. */
static __always_inline int is_released_of(struct bpf_sock *sk, u32 container, u8 home)
{
	struct tag *tag;
	int found;

	if (!sk)
		return 0;
	tag = tags.sk_storage_get(sk, 0, 0);
	found = tag && tag->home == home && tag->container == container;
	bpf_sk_release(sk);
	return found;
}

/* Whether the socket that receives at the ferry's address for this request is the ferry's: when a ferry has died, whoever
 * takes its port has it. */
static __always_inline int ferry_receives(struct bpf_sock_addr *ctx, struct owner *owner, struct request *request,
					  struct ferry *ferry)
{
	struct bpf_sock_tuple to = {};
	u16 place = request->place;
	struct bpf_sock *sk;

	if (request->family == GRAFT_IPV4) {
		to.ipv4.saddr = bpf_htonl(0x7f000001);
		to.ipv4.daddr = bpf_htonl(GRAFT_FERRY_NET | place);
		to.ipv4.dport = bpf_htons(ferry->port);
		sk = bpf_sk_lookup_udp(ctx, &to, sizeof(to.ipv4), BPF_F_CURRENT_NETNS, 0);
	} else {
		if (place >= GRAFT_BERTHS6)
			return 0;
		to.ipv6.saddr[3] = bpf_htonl(1);
		to.ipv6.daddr[3] = bpf_htonl(1);
		to.ipv6.dport = bpf_htons(ferry->ports6[place]);
		sk = bpf_sk_lookup_udp(ctx, &to, sizeof(to.ipv6), BPF_F_CURRENT_NETNS, 0);
	}
	return is_released_of(sk, owner->id, GRAFT_HOME_FERRY);
}

/* A ferry asks whose socket receives what it sends to an address, by a connect, which is always refused. The answer is in
 * the tag of the socket that it asks with. It costs what the kernel's own lookup costs, whatever sockets others have. */
static __always_inline int answer_ferry(struct bpf_sock_addr *ctx, struct owner *owner, struct request *request)
{
	struct tag *answer = owner->tag, *tag;
	struct bpf_sock_tuple to = {};
	struct bpf_sock *sk;

	if (!answer)
		return refuse_with(EACCES);
	answer->owned = 0;
	if (request->family == GRAFT_IPV4) {
		to.ipv4.saddr = bpf_htonl(GRAFT_FERRY_NET);
		__builtin_memcpy(&to.ipv4.daddr, request->addr, 4);
		to.ipv4.dport = bpf_htons(request->port);
		sk = bpf_sk_lookup_udp(ctx, &to, sizeof(to.ipv4), BPF_F_CURRENT_NETNS, 0);
	} else {
		to.ipv6.saddr[3] = bpf_htonl(1);
		__builtin_memcpy(to.ipv6.daddr, request->addr, 16);
		to.ipv6.dport = bpf_htons(request->port);
		sk = bpf_sk_lookup_udp(ctx, &to, sizeof(to.ipv6), BPF_F_CURRENT_NETNS, 0);
	}
	if (!sk)
		return refuse_with(EACCES);
	tag = tags.sk_storage_get(sk, 0, 0);
	if (tag && tag->home == GRAFT_HOME_HOST && tag->container == owner->id) {
		answer->uid = tag->uid;
		answer->gid = tag->gid;
		answer->owned = tag->owned ? GRAFT_OWNED_KNOWN : GRAFT_OWNED_UNKNOWN;
	}
	bpf_sk_release(sk);
	return refuse_with(EACCES);
}

/* Finds the ferry's address for a destination inside: request->ferry and request->place. Returns a verdict. */
static __always_inline int call_ferry(struct bpf_sock_addr *ctx, struct owner *owner, struct request *request)
{
	struct ferry *ferry = ferries.lookup(&owner->id);

	request->to_loopback = 0;
	if (!ferry)
		return refuse(owner, GRAFT_DECISION_REFUSED_CONNECT);
	if (!find_berth(owner->id, request, &request->place))
		return refuse_with(ENOBUFS);
	if (!ferry_receives(ctx, owner, request, ferry))
		return refuse_with(ECONNREFUSED);
	request->ferry = ferry;
	return PASS;
}

/* To the ferry, from the socket's own address or loopback: whatever a control message says. */
static __always_inline void write_ferry4(struct bpf_sock_addr *ctx, struct request *request)
{
	int has_ip6 = 0;
	u32 own = own_ip4(ctx->sk, &has_ip6);

	ctx->user_ip4 = bpf_htonl(GRAFT_FERRY_NET | request->place);
	ctx->user_port = bpf_htons(request->ferry->port);
	ctx->msg_src_ip4 = own ? own : bpf_htonl(0x7f000001);
}

/* To a port at ::1, from the socket's own address or ::1: whatever a control message says. */
static __always_inline void write_loopback_port6(struct bpf_sock_addr *ctx, struct local_address *local, u16 port)
{
	u32 ip[4] = { 0, 0, 0, bpf_htonl(1) };

	ctx->user_ip6[0] = 0;
	ctx->user_ip6[1] = 0;
	ctx->user_ip6[2] = 0;
	ctx->user_ip6[3] = bpf_htonl(1);
	ctx->user_port = bpf_htons(port);
	if (local->family == GRAFT_IPV6 && (local->ip[0] | local->ip[1] | local->ip[2] | local->ip[3]))
		__builtin_memcpy(ip, local->ip, 16);
	ctx->msg_src_ip6[0] = ip[0];
	ctx->msg_src_ip6[1] = ip[1];
	ctx->msg_src_ip6[2] = ip[2];
	ctx->msg_src_ip6[3] = ip[3];
}

static __always_inline int write_ferry6(struct bpf_sock_addr *ctx, struct request *request)
{
	u16 place = request->place;
	struct local_address local;

	read_local_address(&local, ctx->sk);
	if (place >= GRAFT_BERTHS6 || !request->ferry->ports6[place] ||
	    (local.family != GRAFT_IPV6 && (local.ip[0] | local.ip[1] | local.ip[2] | local.ip[3])))
		return refuse_with(EACCES);
	write_loopback_port6(ctx, &local, request->ferry->ports6[place]);
	return PASS;
}

/* The place that an address of this ferry's stands for: 1, with *key. */
static __always_inline int berth_of(struct ferry *ferry, u32 container, u32 ip, u16 port, struct berth_key *key)
{
	if ((ip & bpf_htonl(GRAFT_FERRY_NET_MASK)) != bpf_htonl(GRAFT_FERRY_NET) || port != ferry->port || !port)
		return 0;
	key->container = container;
	key->family = GRAFT_IPV4;
	key->place = bpf_ntohl(ip) & ~GRAFT_FERRY_NET_MASK;
	return 1;
}

static __always_inline int berth6_of(struct ferry *ferry, u32 container, u16 port, struct berth_key *key)
{
	u32 i;

	for (i = 0; i < GRAFT_BERTHS6; i++) {
		if (port && ferry->ports6[i] == port) {
			key->container = container;
			key->family = GRAFT_IPV6;
			key->place = i;
			return 1;
		}
	}
	return 0;
}

static __always_inline int is_loopback6(u8 *addr)
{
	u32 word[4];

	__builtin_memcpy(word, addr, 16);
	return !(word[0] | word[1] | word[2]) && word[3] == bpf_htonl(1);
}

/* Whether `remote` is the ferry of this container; the ferry is *found. */
static __always_inline int is_ferry(struct owner *owner, struct request *remote, struct ferry **found)
{
	struct berth_key key;
	u32 ip;

	if (!owner->container || owner->container->transport != GRAFT_TRANSPORT_SWAP)
		return 0;
	if (remote->family == GRAFT_IPV4 ? remote->addr[0] != 127 || remote->addr[1] != 254 : !is_loopback6(remote->addr))
		return 0;
	*found = ferries.lookup(&owner->id);
	if (!*found)
		return 0;
	__builtin_memcpy(&ip, remote->addr, 4);
	return remote->family == GRAFT_IPV4 ? berth_of(*found, owner->id, ip, remote->port, &key) :
					      berth6_of(*found, owner->id, remote->port, &key);
}

/* Whether a datagram comes from an address of the ferry's, `ip` at `port` (of IPv4; 0 for ::1): 1, with the place that this
 * stands for. */
static __always_inline int is_ferried(struct bpf_sock_addr *ctx, u32 ip, u16 port, struct berth_key *key)
{
	struct tag *tag = tags.sk_storage_get(ctx->sk, 0, 0);
	struct ferry *ferry;

	if (!tag || tag->home != GRAFT_HOME_HOST)
		return 0;
	ferry = ferries.lookup(&tag->container);
	if (!ferry)
		return 0;
	return ip ? berth_of(ferry, tag->container, ip, port, key) : berth6_of(ferry, tag->container, port, key);
}
