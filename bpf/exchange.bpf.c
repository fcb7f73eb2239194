// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* Transport splice, datagrams: Graft's relay and the sockets of a container tell exchanges apart by address.
 *
 * Theory of operation
 *
 *   An exchange is what goes between one socket of the container and one remote end. In the container's namespace the
 *   relay (graft/splice/datagrams.py) has one socket for all of them. To the container's sockets each remote end is an
 *   address of its own in 127.0.0.0/8, at the relay's port:
 *
 *      127.  d gggggggg ggg ssss ssss ssss     d: direction, g: generation, s: slot
 *
 *      in    relay: a client gets a slot, and its datagrams come from the slot's address
 *               recvmsg hook: shows the client      sendmsg hook: an answer to the client goes to the slot's address
 *      out   sendmsg or connect hook: a granted destination gets a slot, and the datagram goes to the slot's address
 *               the relay reads the destination from the slot; its answers come from there, recvmsg shows who sent them
 *
 *   A container has so many slots in each direction and no more, so it takes none of another one's room in the map: a new
 *   exchange takes the one, of a few, that was used longest ago. The relay frees those of sockets that are closed. The
 *   generation tells the relay, and the hooks, that a slot is not theirs any more.
 *
 *   IPv6 has one loopback address, so there each remote end is a port at ::1: stand_in.bpf.c. But an IPv6 socket that is
 *   connected to an IPv6 destination, and may speak IPv4, gets a slot too, of ::ffff:127.0.0.0/104.
 */

static __always_inline u32 exchange_address(int out, u32 generation, u32 slot)
{
	return 127u << 24 | (out ? 1u << 23 : 0) | generation << GRAFT_EXCHANGE_SLOT_BITS | slot;
}

/* The address at which the relay answers for a client of the socket's; 0: the remote end is no client. */
static __always_inline u32 client_exchange(struct bpf_sock_addr *ctx, struct owner *owner, struct request *request)
{
	struct exchange_client key = {
		.container = owner->id,
		.local_port = ctx->sk->src_port,
		.port = request->port,
	};
	u32 *found;

	__builtin_memcpy(key.addr, request->addr, 4);
	found = exchange_clients.lookup(&key);
	return found ? *found : 0;
}

static __always_inline int is_exchange(struct exchange *found, u64 cookie, struct request *request)
{
	u64 theirs[2], wanted[2];

	__builtin_memcpy(theirs, found->addr, 16);
	__builtin_memcpy(wanted, request->addr, 16);
	return found->cookie == cookie && found->port == request->port && found->family == request->family &&
	       theirs[0] == wanted[0] && theirs[1] == wanted[1];
}

/* The address of the exchange between the socket and a destination, begun if there is none; 0: no memory for it. */
static __always_inline u32 destination_exchange(struct bpf_sock_addr *ctx, struct owner *owner, struct request *request)
{
	struct exchange_slot key = { .container = owner->id, .out = 1 };
	struct exchange made = { .port = request->port, .family = request->family };
	u64 now = bpf_ktime_get_ns(), oldest = ~0ULL, word[2];
	u32 first, way, chosen = 0;
	struct exchange *found;

	made.cookie = bpf_get_socket_cookie(ctx);
	__builtin_memcpy(made.addr, request->addr, 16);
	__builtin_memcpy(word, request->addr, 16);
	first = (u32)(((made.cookie ^ word[0] ^ (word[1] << 7) ^ (u64)request->port << 40) * 0x9e3779b97f4a7c15ULL) >> 40);
#pragma unroll
	for (way = 0; way < GRAFT_EXCHANGE_WAYS; way++) {
		key.slot = (first + way) % GRAFT_EXCHANGE_OUT_SLOTS;
		found = exchanges.lookup(&key);
		if (found && is_exchange(found, made.cookie, request)) {
			found->used = now;
			return exchange_address(1, found->generation, key.slot);
		}
		if (!found || found->used < oldest) {
			oldest = found ? found->used : 0;
			chosen = key.slot;
		}
	}
	key.slot = chosen;
	made.used = now;
	made.generation = bpf_get_prandom_u32() % GRAFT_EXCHANGE_GENERATIONS + 1;
	if (exchanges.update(&key, &made))
		return 0;
	return exchange_address(1, made.generation, chosen);
}

/* Whether the socket that receives at an exchange's address, or where that is 0 at ::1, is the relay of this container. */
static __always_inline int relay_receives(struct bpf_sock_addr *ctx, struct owner *owner, u16 port, u32 address)
{
	struct bpf_sock_tuple to = {};
	struct bpf_sock *sk;

	if (address) {
		to.ipv4.saddr = bpf_htonl(0x7f000001);
		to.ipv4.daddr = bpf_htonl(address);
		to.ipv4.dport = bpf_htons(port);
		sk = bpf_sk_lookup_udp(ctx, &to, sizeof(to.ipv4), BPF_F_CURRENT_NETNS, 0);
	} else {
		to.ipv6.saddr[3] = bpf_htonl(1);
		to.ipv6.daddr[3] = bpf_htonl(1);
		to.ipv6.dport = bpf_htons(port);
		sk = bpf_sk_lookup_udp(ctx, &to, sizeof(to.ipv6), BPF_F_CURRENT_NETNS, 0);
	}
	return is_released_relay(sk, owner->id);
}

/* A datagram to a granted destination, or a connect to one: it goes to the relay, at the exchange's address. */
static __always_inline int redirect_datagrams(struct bpf_sock_addr *ctx, struct owner *owner, struct request *request)
{
	struct relay *relay = relays.lookup(&owner->id);
	u32 address = 0;

	if (!relay || !relay->datagram_port)
		return refuse_with(ECONNREFUSED);
	if (request->family == GRAFT_IPV4)
		address = client_exchange(ctx, owner, request);
	if (!address)
		address = destination_exchange(ctx, owner, request);
	if (!address)
		return refuse_with(EACCES);
	if (!relay_receives(ctx, owner, relay->datagram_port, address))
		return refuse_with(ECONNREFUSED);
	request->exchange = address;
	request->relay = relay;
	return PASS;
}

/* Who sent a datagram that came from `ip`, at `port`; NULL where that is not the relay's. */
static __always_inline struct exchange *relayed_sender(struct bpf_sock_addr *ctx, u32 ip, u16 port)
{
	struct exchange_slot key = {};
	struct exchange *found;
	struct relay *relay;
	struct owner owner;
	u32 address = bpf_ntohl(ip);

	if (address >> 24 != 127)
		return 0;
	owner_of(ctx, &owner);
	relay = relays.lookup(&owner.id);
	if (!relay || !relay->datagram_port || relay->datagram_port != port)
		return 0;
	key.container = owner.id;
	key.slot = address % GRAFT_EXCHANGE_SLOTS;
	key.out = address >> 23 & 1;
	found = exchanges.lookup(&key);
	if (!found || exchange_address(key.out, found->generation, key.slot) != address)
		return 0;
	return found;
}
