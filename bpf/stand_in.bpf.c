// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* Transport splice, datagrams over IPv6: each remote end is a port of Graft's relay at ::1, its stand-in.
 *
 * Theory of operation
 *
 *   A stand-in is a socket of the relay's (graft/splice/stand_ins.py) in the container's namespace.
 *
 *      in    relay: a client gets a stand-in, and its datagrams come from there
 *               recvmsg hook: shows the client      sendmsg or connect hook: what is for the client goes to its stand-in
 *      out   sendmsg or connect hook: a granted destination gets one of those that the relay offers
 *               the relay reads the destination from the table; answers come from there, recvmsg shows who sent them
 *
 *   A port has no generation. So it stands for one remote end and no other: a hook takes only what stands for nothing yet,
 *   and the relay closes what is not used any more, where no socket is connected to it, and offers another port.
 */

/* The port of the stand-in for a remote end; 0: there is none. `cookie`: of the socket; 0: for a client of its port. */
static __always_inline u16 placed_stand_in(struct bpf_sock_addr *ctx, struct owner *owner, struct request *request,
					   u64 cookie)
{
	struct stand_in_place place = { .cookie = cookie, .container = owner->id, .port = request->port };
	u32 *found;

	if (!cookie)
		place.local_port = ctx->sk->src_port;
	__builtin_memcpy(place.addr, request->addr, 16);
	found = stand_in_ports.lookup(&place);
	return found ? *found : 0;
}

/* Notes that `port` stands for a destination of the socket's from now on. Returns 0 where it stands for another one, or
 * there is no memory. */
static __always_inline int take_stand_in(struct bpf_sock_addr *ctx, struct owner *owner, struct request *request,
					 u64 cookie, u32 port)
{
	struct stand_in_place place = { .cookie = cookie, .container = owner->id, .port = request->port };
	struct stand_in_key key = { .container = owner->id, .port = port };
	struct stand_in made = { .cookie = cookie, .port = request->port, .begun = bpf_ktime_get_ns() };

	made.local_port = ctx->sk->src_port;
	__builtin_memcpy(made.addr, request->addr, 16);
	if (stand_ins.insert(&key, &made))
		return 0;
	__builtin_memcpy(place.addr, request->addr, 16);
	if (!stand_in_ports.update(&place, &port))
		return 1;
	stand_ins.delete(&key);
	return 0;
}

/* Undoes take_stand_in. */
static __always_inline void give_back_stand_in(struct owner *owner, struct request *request, u64 cookie, u16 port)
{
	struct stand_in_place place = { .cookie = cookie, .container = owner->id, .port = request->port };
	struct stand_in_key key = { .container = owner->id, .port = port };

	__builtin_memcpy(place.addr, request->addr, 16);
	stand_in_ports.delete(&place);
	stand_ins.delete(&key);
}

/* A free one of the stand-ins that the relay offers, for a destination of the socket's; 0: there is none. */
static __always_inline u16 new_stand_in(struct bpf_sock_addr *ctx, struct owner *owner, struct request *request, u64 cookie)
{
	struct offer *offer = offers.lookup(&owner->id);
	u32 first = bpf_get_prandom_u32(), try, port;

	if (!offer)
		return 0;
	for (try = 0; try < GRAFT_OFFER_TRIES; try++) {
		port = offer->ports[(first + try) & (offer->count - 1) & (GRAFT_MAX_OFFERED - 1)];
		if (port && take_stand_in(ctx, owner, request, cookie, port))
			return port;
	}
	return 0;
}

/* Whether a connect goes by an address of IPv4's, of which there are more: the socket may speak IPv4. (One that has an
 * IPv6 address does not always receive what comes from there.) */
static __always_inline int connects_by_address(struct bpf_sock_addr *ctx)
{
	struct local_address local;

	read_local_address(&local, ctx->sk);
	return !(local.family == GRAFT_IPV6 && (local.ip[0] | local.ip[1] | local.ip[2] | local.ip[3])) &&
	       !is_requester_v6only(ctx);
}

/* Notes that a socket is connected to a stand-in, so that it is not closed meanwhile. Returns 0 where it stands for nothing
 * any more. */
static __always_inline int note_connected(struct owner *owner, u16 port)
{
	struct stand_in_key key = { .container = owner->id, .port = port };
	struct stand_in *found = stand_ins.lookup(&key);

	if (!found)
		return 0;
	found->connected = bpf_ktime_get_ns();
	return 1;
}

/* A datagram to a granted IPv6 destination, or a connect to one: it goes to the stand-in for that. */
static __always_inline int redirect_datagrams6(struct bpf_sock_addr *ctx, struct owner *owner, struct request *request,
					       int connects)
{
	struct relay *relay = relays.lookup(&owner->id);
	u64 cookie = bpf_get_socket_cookie(ctx);
	int of_client;
	u16 port;

	if (!relay || !relay->datagram_port)
		return refuse_with(ECONNREFUSED);
	port = placed_stand_in(ctx, owner, request, 0);
	if (!port && connects && connects_by_address(ctx))
		return redirect_datagrams(ctx, owner, request);
	of_client = port != 0;
	if (!port)
		port = placed_stand_in(ctx, owner, request, cookie);
	if (!port)
		port = new_stand_in(ctx, owner, request, cookie);
	if (!port)
		return refuse_with(ENOBUFS);
	if (!relay_receives(ctx, owner, port, 0)) {
		if (!of_client) /* the relay has just closed it, or is gone: the next send takes another one */
			give_back_stand_in(owner, request, cookie, port);
		return refuse_with(ECONNREFUSED);
	}
	if (connects && !note_connected(owner, port))
		return refuse_with(ECONNREFUSED);
	request->stand_in = port;
	request->relay = relay;
	return PASS;
}

/* Who sent a datagram that came from ::1, at `port`; NULL where that is no stand-in. */
static __always_inline struct stand_in *stood_for_sender(struct bpf_sock_addr *ctx, u16 port)
{
	struct stand_in_key key = { .port = port };
	struct owner owner;

	owner_of(ctx, &owner);
	key.container = owner.id;
	return stand_ins.lookup(&key);
}

static __always_inline int write_stand_in(struct bpf_sock_addr *ctx, struct request *request)
{
	struct local_address local;

	read_local_address(&local, ctx->sk);
	write_loopback_port6(ctx, &local, request->stand_in);
	return PASS;
}
