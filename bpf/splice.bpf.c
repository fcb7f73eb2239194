// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* The splice transport: the addresses that the two ends of a relayed connection see of each other.
 *
 * Theory of operation
 *
 *   A relay (graft/splice) joins two connections: an external one, on the host's stack, and one with a
 *   program of the container, inside its namespace. These programs see the second, from both ends.
 *
 *      in    relay: the client is stored with the connecting socket (DIALING)
 *               connect -> `arrivals` -> the container's accepted socket (ACCEPTED); getpeername shows it
 *      out   connect hook (connect.bpf.c): the destination is stored with the program's socket (REDIRECTED)
 *               connect -> `arrivals` -> the relay's accepted socket (RELAYED), which the relay reads
 *
 *   Both directions work alike: the connecting side's socket stores its crossing under the connection's two addresses
 *   just before its first packet is sent, and the accepting side's takes it when it is established,
 *   which is before accept() can return it. A connecting socket that is never accepted removes its entry when it
 *   closes. A socket of any other connection finds no entry, and keeps its own peer.
 *
 *   In: only a socket of the client's own container takes the arrival, and marks it as taken (ACCEPTED): the relay looks
 *   for that before it passes the first byte, and removes it. Without an entry, which others may have pushed out of the
 *   map, it passes none (graft/splice/far_check.py). Out: the connect hook redirects to a listener that
 *   has a crossing as its mark (LISTENER).
 *
 *   This file is compiled together with the others, and attached only to the relays' cgroup and to
 *   containers of this transport.
 */

/* One end of a connection, IPv4-mapped addresses as IPv4; its family. */
static __always_inline u8 read_end(struct bpf_sock_ops *ctx, int local, u8 *addr)
{
	u32 ip[4];

	if (ctx->family == AF_INET) {
		ip[0] = local ? ctx->local_ip4 : ctx->remote_ip4;
		__builtin_memcpy(addr, ip, 4);
		return GRAFT_IPV4;
	}
	ip[0] = local ? ctx->local_ip6[0] : ctx->remote_ip6[0];
	ip[1] = local ? ctx->local_ip6[1] : ctx->remote_ip6[1];
	ip[2] = local ? ctx->local_ip6[2] : ctx->remote_ip6[2];
	ip[3] = local ? ctx->local_ip6[3] : ctx->remote_ip6[3];
	if (!ip[0] && !ip[1] && ip[2] == bpf_htonl(0xffff)) {
		__builtin_memcpy(addr, &ip[3], 4);
		return GRAFT_IPV4;
	}
	__builtin_memcpy(addr, ip, 16);
	return GRAFT_IPV6;
}

/* The key of a connection in `arrivals`, at the side that connects or at the one that accepts. With both addresses: from
 * the same port others in the namespace may connect to elsewhere. */
static __always_inline void read_arrival_key(struct bpf_sock_ops *ctx, int connecting, struct arrival *key)
{
	u16 local = ctx->local_port, remote = bpf_ntohl(ctx->remote_port);

	__builtin_memset(key, 0, sizeof(*key));
	key->netns = bpf_get_netns_cookie(ctx);
	key->port = connecting ? local : remote;
	key->to_port = connecting ? remote : local;
	key->family = read_end(ctx, connecting, key->addr);
	read_end(ctx, !connecting, key->to);
}

/* The crossing of a connecting socket; NULL for a connection without a relay. */
static __always_inline struct crossing *outgoing_crossing(struct bpf_sock *sk)
{
	struct crossing *crossing = crossings.sk_storage_get(sk, 0, 0);

	if (!crossing)
		return 0;
	return crossing->role == GRAFT_CROSSING_DIALING || crossing->role == GRAFT_CROSSING_REDIRECTED ? crossing : 0;
}

static __always_inline void record_arrival(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	struct crossing *crossing = outgoing_crossing(sk);
	struct arrival key;

	if (!crossing)
		return;
	read_arrival_key(ctx, 1, &key);
	arrivals.update(&key, crossing);
	bpf_sock_ops_cb_flags_set(ctx, BPF_SOCK_OPS_STATE_CB_FLAG);
}

static __always_inline void take_arrival(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	struct scope *scope = scopes.get_local_storage(0);
	struct crossing *found, *own, taken;
	struct arrival key;

	read_arrival_key(ctx, 0, &key);
	found = arrivals.lookup(&key);
	if (!found)
		return;
	taken = *found; /* once: the map may give its memory to another entry at any time */
	if (taken.role == GRAFT_CROSSING_DIALING) {
		/* A client is for its container only: in a shared namespace the port may be another one's since. The entry
		 * stays as it is, and graftd resets the connection. */
		if (taken.container != scope->container)
			return;
		taken.role = GRAFT_CROSSING_ACCEPTED;
		arrivals.update(&key, &taken);
	} else if (taken.role == GRAFT_CROSSING_REDIRECTED) {
		taken.role = GRAFT_CROSSING_RELAYED;
		arrivals.delete(&key);
	} else {
		return;
	}
	own = crossings.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (own)
		*own = taken;
}

int graft_splice(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct arrival key;

	if (!sk)
		return 1;
	if (ctx->op == BPF_SOCK_OPS_TCP_CONNECT_CB) {
		record_arrival(ctx, sk);
	} else if (ctx->op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB) {
		take_arrival(ctx, sk);
	} else if (ctx->op == BPF_SOCK_OPS_STATE_CB && ctx->args[1] == BPF_TCP_CLOSE && outgoing_crossing(sk)) {
		read_arrival_key(ctx, 1, &key);
		arrivals.delete(&key);
	}
	return 1;
}

/* What getpeername() and accept() show a program of the container. */
static __always_inline struct crossing *shown_peer(struct bpf_sock_addr *ctx)
{
	struct crossing *crossing = crossings.sk_storage_get(ctx->sk, 0, 0);

	return crossing && crossing->role == GRAFT_CROSSING_ACCEPTED ? crossing : standing_crossing(ctx->sk);
}

int graft_getpeername4(struct bpf_sock_addr *ctx)
{
	struct crossing *peer = shown_peer(ctx);
	u32 ip;

	if (!peer || peer->family != GRAFT_IPV4)
		return PASS;
	__builtin_memcpy(&ip, peer->addr, 4);
	ctx->user_ip4 = ip;
	ctx->user_port = bpf_htons(peer->port);
	return PASS;
}

int graft_getpeername6(struct bpf_sock_addr *ctx)
{
	struct crossing *peer = shown_peer(ctx);
	u32 ip[4] = {};

	if (!peer)
		return PASS;
	if (peer->family == GRAFT_IPV4) {
		ip[2] = bpf_htonl(0xffff);
		__builtin_memcpy(&ip[3], peer->addr, 4);
	} else {
		__builtin_memcpy(ip, peer->addr, 16);
	}
	ctx->user_ip6[0] = ip[0];
	ctx->user_ip6[1] = ip[1];
	ctx->user_ip6[2] = ip[2];
	ctx->user_ip6[3] = ip[3];
	ctx->user_port = bpf_htons(peer->port);
	return PASS;
}
