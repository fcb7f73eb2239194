// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* A socket's local address, and whether that is an endpoint that the socket is granted now.
 *
 * No flag says that a socket is bound: it would be inherited by accepted sockets, survive a disconnect that
 * releases the port, and outlive the rule. What counts is the kernel's own address of the socket, and the
 * rules as they are at this moment.
 */

/* A socket's local address, IPv4-mapped ones as IPv4. */
struct local_address {
	u32 ip[4];
	u16 port;
	u8 family;
	u8 connected; /* or connecting: where it was bound to no address, the kernel has picked one */
};

static __always_inline void local_address4(struct local_address *local, u32 ip, u32 port)
{
	__builtin_memset(local, 0, sizeof(*local));
	local->ip[0] = ip;
	local->port = port;
	local->family = GRAFT_IPV4;
}

static __always_inline void local_address6(struct local_address *local, u32 *ip, u32 port)
{
	if (!ip[0] && !ip[1] && ip[2] == bpf_htonl(0xffff)) {
		local_address4(local, ip[3], port);
		return;
	}
	__builtin_memset(local, 0, sizeof(*local));
	__builtin_memcpy(local->ip, ip, 16);
	local->port = port;
	local->family = GRAFT_IPV6;
}

static __always_inline void read_local_address(struct local_address *local, struct bpf_sock *sk)
{
	u32 family = sk->family, port = sk->src_port, ip4 = sk->src_ip4, state = sk->state;
	u32 ip[4] = { sk->src_ip6[0], sk->src_ip6[1], sk->src_ip6[2], sk->src_ip6[3] };

	/* All loads before any use: the verifier refuses a context pointer that the compiler moved to save a load. */
	asm volatile("" : "+r"(family), "+r"(port), "+r"(ip4), "+r"(state));
	asm volatile("" : "+r"(ip[0]), "+r"(ip[1]), "+r"(ip[2]), "+r"(ip[3]));
	if (family == AF_INET6)
		local_address6(local, ip, port);
	else
		local_address4(local, ip4, port);
	local->connected = state != BPF_TCP_CLOSE && state != BPF_TCP_LISTEN;
}

/* `port`: that of the endpoint which the socket's own request becomes; 0: any. */
static __always_inline int matches_endpoint(struct local_address *local, struct endpoint *endpoint, u16 port)
{
	u32 ip[4];

	if (endpoint->family != local->family || (port && port != local->port))
		return 0;
	__builtin_memcpy(ip, endpoint->addr, 16);
	if (local->connected && !(ip[0] | ip[1] | ip[2] | ip[3]))
		return 1;
	return ip[0] == local->ip[0] && ip[1] == local->ip[1] && ip[2] == local->ip[2] && ip[3] == local->ip[3];
}

#define ANY_NETNS 0 /* where the namespace is not known: no cookie is 0 */

/* The rule for what a socket's program requested, looked up once for each ruleset: its rules never change, and no other
 * ruleset ever has its number. Each half names the ruleset, and what the request was: of two hooks that write at the same
 * time for different requests, no mixture counts. 0: it does not lead to `rule->endpoint`. */
static __always_inline int found_rule(struct container *container, struct tag *tag, u8 protocol, struct ingress_value *rule)
{
	u32 number = container->ruleset;
	u64 ruleset = (u64)number << 32, port = tag->found_port;
	struct ingress_value *found;
	struct request request;

	if (tag->found_endpoint == (ruleset | rule->endpoint) && port >> 16 == (ruleset >> 16 | tag->port)) {
		rule->first_port = port;
		return 1;
	}
	__builtin_memset(&request, 0, sizeof(request));
	__builtin_memcpy(request.addr, tag->addr, 16);
	request.port = tag->port;
	request.family = tag->family;
	request.protocol = protocol;
	found = ingress_rule(number, &request);
	if (!found || found->endpoint != rule->endpoint)
		return 0;
	rule->first_port = found->first_port;
	tag->found_endpoint = ruleset | rule->endpoint;
	tag->found_port = ruleset | (u32)request.port << 16 | rule->first_port;
	return 1;
}

/* Whether the current rules map what the program requested to the endpoint `id`, and the socket, in the namespace `netns`,
 * is bound there. */
static __always_inline int is_granted_at(struct container *container, struct tag *tag, u32 id, struct endpoint *endpoint,
					 struct local_address *local, u8 protocol, u64 netns)
{
	struct ingress_value rule = { .endpoint = id };
	u16 port;

	if (!endpoint || (netns != ANY_NETNS && endpoint->netns != netns) ||
	    !(endpoint->protocols & protocol_bit(protocol)))
		return 0;
	return found_rule(container, tag, protocol, &rule) && endpoint_port(endpoint, &rule, tag->port, &port) &&
	       matches_endpoint(local, endpoint, port);
}

/* The same of the endpoint that its tag names. */
static __always_inline int is_granted(struct container *container, struct tag *tag, struct local_address *local,
				      u8 protocol, u64 netns)
{
	u32 id = tag->endpoint;

	return is_granted_at(container, tag, id, endpoints.lookup(&id), local, protocol, netns);
}

/* The endpoint that a rule for what was requested leads to, if a socket in the namespace `netns` is bound to its port, and
 * address. */
static __always_inline struct endpoint *place_for(struct container *container, struct request *request, struct local_address *local, u64 netns)
{
	struct ingress_value *rule = ingress_rule(container->ruleset, request);
	struct endpoint *endpoint;
	u32 id = rule ? rule->endpoint : 0;
	u16 port;

	endpoint = id ? endpoints.lookup(&id) : 0;
	if (!endpoint || (netns != ANY_NETNS && endpoint->netns != netns) ||
	    !(endpoint->protocols & protocol_bit(request->protocol)))
		return 0;
	/* (Of a dynamic endpoint the kernel chooses the port: it grants no certain one.) */
	return endpoint_port(endpoint, rule, request->port, &port) && port && matches_endpoint(local, endpoint, port) ?
		       endpoint : 0;
}

/* Whether the current rules grant the place of a socket that was bound there while no rule was needed. One at [::] may have
 * the IPv4 port too, which a dual-stack endpoint alone grants. */
static __always_inline int is_granted_place(struct container *container, struct local_address *local, u8 protocol, u64 netns)
{
	struct endpoint *endpoint;
	struct request request;

	__builtin_memset(&request, 0, sizeof(request));
	__builtin_memcpy(request.addr, local->ip, 16);
	request.port = local->port;
	request.family = local->family;
	request.protocol = protocol;
	endpoint = place_for(container, &request, local, netns);
	return endpoint && (endpoint->family == GRAFT_IPV4 || !is_unspecified(endpoint->addr) ||
			    endpoint->flags & GRAFT_ENDPOINT_DUAL_STACK);
}

/* Whether a socket still has the port that it got from an endpoint, and the endpoint is no longer granted. */
static __always_inline int has_lost_endpoint(struct bpf_sock *sk, struct tag *tag, int bound)
{
	return tag && tag->endpoint && tag->bound_port && tag->bound_port == sk->src_port && !bound;
}

/* Whether a socket has a port that its endpoint lent it, and does not have any more (`graft ep set`). The kernel keeps
 * such a port with the socket until that is closed. */
static __always_inline int keeps_lent_port(struct tag *tag, struct endpoint *endpoint)
{
	return tag && tag->source && tag->lent & GRAFT_LENT_PORT && !endpoint->port;
}

/* Whether a datagram socket has the port that it bound before there was a policy that would not let it. */
static __always_inline int has_earlier_port(struct bpf_sock *sk, struct tag *tag)
{
	return tag && !tag->endpoint && tag->open_port && tag->open_port == sk->src_port;
}

/* Whether a socket is bound to an interface, or its packets are marked for another routing table. The setsockopt hook
 * refuses these options, but the kernel does not call it for 32-bit callers. */
static __always_inline int is_diverted(struct bpf_sock *sk)
{
	return sk->bound_dev_if || sk->mark;
}

/* Whether a datagram socket has a peer: by its state, because the kernel lets it connect to port 0 too. */
static __always_inline int is_connected(struct bpf_sock *sk)
{
	return sk->state == BPF_TCP_ESTABLISHED;
}

/* Whether a socket is connected where it was led when its crossing was stored. A later connect may have failed, or have led
 * elsewhere: the kernel calls no hook when it has succeeded. Of TCP it is. */
static __always_inline int is_still_there(struct bpf_sock *sk, struct crossing *crossing)
{
	u32 ip4 = sk->dst_ip4, port = sk->dst_port;
	u32 ip[4] = { sk->dst_ip6[0], sk->dst_ip6[1], sk->dst_ip6[2], sk->dst_ip6[3] };

	asm volatile("" : "+r"(port), "+r"(ip4), "+r"(ip[0]), "+r"(ip[1]), "+r"(ip[2]), "+r"(ip[3]));
	if (!crossing->near_port)
		return 1;
	if (bpf_ntohs((u16)port) != crossing->near_port)
		return 0;
	if (!crossing->near)
		return sk->family == AF_INET6 && !(ip[0] | ip[1] | ip[2]) && ip[3] == bpf_htonl(1);
	return bpf_ntohl(sk->family == AF_INET6 ? ip[3] : ip4) == crossing->near;
}

/* What is stored of the connect by which a socket of a container is connected to Graft's relay; NULL: it is not. */
static __always_inline struct crossing *standing_crossing(struct bpf_sock *sk)
{
	struct crossing *crossing = crossings.sk_storage_get(sk, 0, 0);

	if (!crossing || crossing->role != GRAFT_CROSSING_REDIRECTED)
		return 0;
	if (is_still_there(sk, crossing))
		return crossing;
	crossing = former_crossings.sk_storage_get(sk, 0, 0);
	return crossing && is_still_there(sk, crossing) ? crossing : 0;
}

/* Whether a socket is bound to its endpoint. One that released the port of its bind and has another one is not. */
static __always_inline int is_bound(struct bpf_sock *sk, struct tag *tag, struct container *container, u64 netns)
{
	u32 type = sk->type;
	struct local_address local;

	if (!container || !tag || !tag->endpoint || !tag->bound_port)
		return 0;
	read_local_address(&local, sk);
	if (local.port != tag->bound_port)
		return 0;
	return is_granted(container, tag, &local, type == SOCK_STREAM ? IPPROTO_TCP : IPPROTO_UDP, netns);
}

/* Whether the endpoint that a socket is bound to has its port in both families. */
static __always_inline int is_dual_stack(struct tag *tag)
{
	struct endpoint *bound = tag ? endpoints.lookup(&tag->endpoint) : 0;

	return bound && bound->flags & GRAFT_ENDPOINT_DUAL_STACK;
}

/* Whether a port is one that connections from the endpoint may leave from. */
static __always_inline int is_port_of(struct endpoint *endpoint, u16 port)
{
	u16 last = endpoint->last_port ? endpoint->last_port : endpoint->port;

	return !endpoint->port || (port >= endpoint->port && port <= last);
}

/* Every host has these, a whole network of IPv4. (Noted one by one they would push all others out of host_addresses.) */
static __always_inline int is_on_loopback(u32 *ip, u8 family)
{
	if (family == GRAFT_IPV4)
		return (ip[0] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
	return !(ip[0] | ip[1] | ip[2]) && ip[3] == bpf_htonl(1);
}

/* Whether a datagram from the one address to the other would let its sender pass for a client on the host's loopback. The
 * kernel picks such a source for destinations there; the socket keeps it for later ones. One that was connected over IPv6
 * has 127.0.0.6 (LOOPBACK4_IPV6) for IPv4, which shows when it is made an IPv4 socket (IPV6_ADDRFORM). Without a branch for
 * each word: the verifier would follow all of them through the rest of a program. */
static __always_inline u64 strays_from_loopback(struct local_address *source, struct request *remote)
{
	u64 from, to;
	u32 ip[4];

	__builtin_memcpy(ip, remote->addr, 16);
	if (source->family == GRAFT_IPV4) {
		from = (source->ip[0] ^ bpf_htonl(0x7f000000)) & bpf_htonl(0xff000000);
		to = (ip[0] ^ bpf_htonl(0x7f000000)) & bpf_htonl(0xff000000);
	} else {
		from = source->ip[0] | source->ip[1] | source->ip[2] | (source->ip[3] ^ bpf_htonl(1));
		to = ip[0] | ip[1] | ip[2] | (ip[3] ^ bpf_htonl(1));
	}
	from |= source->family ^ remote->family;
	asm volatile("" : "+r"(from), "+r"(to));
	return ((from - 1) & (0 - to)) >> 63;
}

/* Whether a source is what the connect and sendmsg hooks would give now: the endpoint's address and port; where it has
 * no address the socket's, and that not from when it had one. */
static __always_inline int leaves_from(struct local_address *source, struct local_address *own, struct tag *tag,
				       struct endpoint *endpoint, u32 id, u64 strays)
{
	if (tag->source && tag->source != id)
		return 0;
	if (endpoint->port ? !is_port_of(endpoint, own->port) : keeps_lent_port(tag, endpoint))
		return 0;
	source->port = own->port;
	if (!is_unspecified(endpoint->addr))
		return matches_endpoint(source, endpoint, 0);
	if ((tag->source && tag->lent & GRAFT_LENT_ADDRESS) || strays)
		return 0;
	return !(own->ip[0] | own->ip[1] | own->ip[2] | own->ip[3]) || own->family != source->family ||
	       (own->ip[0] == source->ip[0] && own->ip[1] == source->ip[1] && own->ip[2] == source->ip[2] &&
		own->ip[3] == source->ip[3]);
}

/* Whether a socket still has the address or the port that an endpoint lent it, and must not receive there from a remote
 * end that the rules lead to from the endpoint `id`: another one, or the lender is gone, or has others now. (0: from none,
 * where a container in direct may exchange with it.) */
static __always_inline int keeps_others_source(struct bpf_sock *sk, struct tag *tag, u32 id)
{
	struct endpoint *lender;
	struct local_address local;

	if (!tag || !tag->source || !tag->lent)
		return 0;
	if (id && id != tag->source)
		return 1;
	lender = endpoints.lookup(&tag->source);
	if (!lender || keeps_lent_port(tag, lender))
		return 1;
	read_local_address(&local, sk);
	if (tag->lent & GRAFT_LENT_PORT && !is_port_of(lender, local.port))
		return 1;
	return tag->lent & GRAFT_LENT_ADDRESS && !matches_endpoint(&local, lender, 0);
}

/* Whether a datagram socket has a port that an endpoint lent it for a peer, and has no peer any more (a connect to AF_UNSPEC):
 * the kernel leaves it the port. It is no server there: it would have what comes for one. */
static __always_inline int outlasts_its_peer(struct bpf_sock *sk, struct tag *tag)
{
	return tag && tag->source && tag->lent & GRAFT_LENT_PORT && !is_connected(sk);
}

static __always_inline void address_key(struct host_address *key, u64 netns, u32 *ip, u8 family)
{
	__builtin_memset(key, 0, sizeof(*key));
	key->netns = netns;
	key->family = family;
	__builtin_memcpy(key->addr, ip, 16);
}

/* Whether the address is one of the host's in that namespace, as commands have noted. */
static __always_inline int is_noted_as_hosts(u64 netns, u32 *ip, u8 family)
{
	struct host_address key;

	address_key(&key, netns, ip, family);
	return is_on_loopback(ip, family) || noted_addresses.lookup(&key);
}

/* The same of one to which something was sent. A program that may answer from whichever of these its client
 * asked could name any address there is, where it has set IP_FREEBIND (IPv6) or IP_TRANSPARENT by a 32-bit call, or the
 * host lets everybody (net.ipv6.ip_nonlocal_bind). */
static __always_inline int is_hosts(u64 netns, u32 *ip, u8 family)
{
	struct host_address key;

	address_key(&key, netns, ip, family);
	return is_on_loopback(ip, family) || host_addresses.lookup(&key);
}

#define GRAFT_LOOPBACK_LINK 1
#define PACKET_HOST 0
#define PACKET_BROADCAST 1

/* What a link has brought was sent to an address of the host's, if the kernel delivers it: it has looked. Not what a program
 * of this machine has sent (see is_delivered_astray), or had copied as a broadcast. */
static __always_inline void note_as_hosts(struct __sk_buff *skb, u64 netns, u32 *ip, u8 family)
{
	int is_brought = skb->ingress_ifindex != GRAFT_LOOPBACK_LINK && skb->pkt_type == PACKET_HOST;
	struct host_address key;
	u32 one = 1;

	if (is_on_loopback(ip, family))
		return;
	address_key(&key, netns, ip, family);
	if (!host_addresses.lookup(&key) && (is_brought || noted_addresses.lookup(&key)))
		host_addresses.update(&key, &one);
}

/* Whether a socket's source is its own: the endpoint's that it is bound to, or one that it may choose. */
static __always_inline int has_own_source(struct bpf_sock *sk, struct owner *owner, int bound)
{
	return bound || !owner->tag || has_earlier_port(sk, owner->tag) || binds_freely(owner->container);
}

#ifdef GRAFT_V6ONLY_BYTE
/* IPV6_V6ONLY, which no helper returns: a bit of the kernel's own struct sock. */
static __always_inline int is_v6only(void *sk)
{
	u8 byte = 0;

	return !bpf_probe_read_kernel(&byte, 1, sk + GRAFT_V6ONLY_BYTE) && byte & GRAFT_V6ONLY_MASK;
}

/* The same of a socket whose address a hook decides about. */
static __always_inline int is_requester_v6only(struct bpf_sock_addr *ctx)
{
	void *sk = requesting_socket(ctx);

	return sk && is_v6only(sk);
}
#else
static __always_inline int is_v6only(void *sk)
{
	return 0;
}

static __always_inline int is_requester_v6only(struct bpf_sock_addr *ctx)
{
	return 0;
}
#endif

/* A socket's own IPv4 address. (An IPv6 address of its own is 127.0.0.6 to the kernel here: it cannot be the source.) */
static __always_inline u32 own_ip4(struct bpf_sock *sk, int *has_ip6)
{
	struct local_address local;
	u32 ip = 0;

	read_local_address(&local, sk);
	*has_ip6 = local.family == GRAFT_IPV6 && (local.ip[0] | local.ip[1] | local.ip[2] | local.ip[3]);
	if (local.family == GRAFT_IPV4)
		ip = local.ip[0];
	return ip;
}
