// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* recvfrom and recvmsg: who really sent a datagram that a ferry (ferry.bpf.c) or graftd's relay (exchange.bpf.c,
 * stand_in.bpf.c) brings. */

#define GRAFT_LOOPBACK_FIRST 127

struct sender {
	u8 addr[16];
	u16 port;
	u8 family;
};

/* Finds who sent what came from `ip`, in IPv4's loopback network, or, where that is 0, from ::1. Returns 0 where it came by
 * neither of the two. Of an exchange, or a place of the ferry's, that nobody knows any more the sender is 0.0.0.0, or ::, at
 * port 0: nothing can be sent there, and nobody takes it for a program of this machine, as he would the relay's address. */
static __always_inline int find_sender(struct bpf_sock_addr *ctx, u32 ip, struct sender *sender)
{
	u16 port = bpf_ntohs((u16)ctx->user_port);
	struct berth_key key = {};
	struct exchange *exchange;
	struct stand_in *stand_in;
	struct berth *berth;
	struct owner owner;

	if (is_ferried(ctx, ip, port, &key)) {
		__builtin_memset(sender, 0, sizeof(*sender));
		sender->family = key.family;
		berth = berths.lookup(&key);
		if (berth) {
			__builtin_memcpy(sender->addr, berth->addr, 16);
			sender->port = berth->port;
		}
		return 1;
	}
	if (!ip) {
		stand_in = stood_for_sender(ctx, port);
		if (!stand_in)
			return 0;
		__builtin_memcpy(sender->addr, stand_in->addr, 16);
		sender->port = stand_in->port;
		sender->family = GRAFT_IPV6;
		return 1;
	}
	if (!is_relays_port(ctx, port, &owner))
		return 0;
	exchange = relayed_sender(&owner, ip);
	if (!exchange) {
		__builtin_memset(sender, 0, sizeof(*sender));
		sender->family = GRAFT_IPV4;
		return 1;
	}
	__builtin_memcpy(sender->addr, exchange->addr, 16);
	sender->port = exchange->port;
	sender->family = exchange->family;
	return 1;
}

int graft_recvmsg4(struct bpf_sock_addr *ctx)
{
	struct sender sender;
	u32 ip = ctx->user_ip4;

	if (bpf_ntohl(ip) >> 24 != GRAFT_LOOPBACK_FIRST || !find_sender(ctx, ip, &sender))
		return PASS;
	if (sender.family != GRAFT_IPV4) /* a socket that was of IPv6 before (IPV6_ADDRFORM) */
		__builtin_memset(&sender, 0, sizeof(sender));
	__builtin_memcpy(&ip, sender.addr, 4);
	ctx->user_ip4 = ip;
	ctx->user_port = bpf_htons(sender.port);
	return PASS;
}

int graft_recvmsg6(struct bpf_sock_addr *ctx)
{
	u32 ip[4] = { ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3] };
	int mapped = !ip[0] && !ip[1] && ip[2] == bpf_htonl(0xffff);
	struct sender sender;

	if (mapped ? bpf_ntohl(ip[3]) >> 24 != GRAFT_LOOPBACK_FIRST : ip[0] | ip[1] | ip[2] || ip[3] != bpf_htonl(1))
		return PASS;
	if (!find_sender(ctx, mapped ? ip[3] : 0, &sender))
		return PASS;
	if (sender.family == GRAFT_IPV4) {
		ip[0] = 0;
		ip[1] = 0;
		ip[2] = bpf_htonl(0xffff);
		__builtin_memcpy(&ip[3], sender.addr, 4);
	} else {
		__builtin_memcpy(ip, sender.addr, 16);
	}
	ctx->user_ip6[0] = ip[0];
	ctx->user_ip6[1] = ip[1];
	ctx->user_ip6[2] = ip[2];
	ctx->user_ip6[3] = ip[3];
	ctx->user_port = bpf_htons(sender.port);
	return PASS;
}
