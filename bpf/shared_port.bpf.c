// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* UDP ports that sockets of several containers have (SO_REUSEADDR, SO_REUSEPORT).
 *
 * Of those the kernel chooses who gets a datagram, before the hook for packets drops what that one gets: a server would miss
 * some, or all, as the other one chooses (SO_REUSEPORT with a program, SO_INCOMING_CPU, which of them was bound last). So
 * nobody binds an endpoint's port beside a socket of another container that is not granted it, and none is lent a port beside
 * another container's. The kernel closes no datagram socket that its program has bound.
 *
 * Only a socket without a peer is found: one that has a peer gets what that sends, and nothing else.
 */

/* Who must not be at the port already. */
#define GRAFT_NONE_UNGRANTED 0
#define GRAFT_NO_OTHERS 1

/* Whether a socket has its port by something other than a rule for binds that grants it now: an endpoint that it has lost,
 * one that has lent it a port to connect from, binds that were free once. One of a container that binds freely still has
 * its port by that; one of a container that is gone counts by what it had of an endpoint. */
static __always_inline int is_ungranted(struct bpf_sock *sk, struct tag *tag, struct container *container, u64 netns)
{
	int has_had_endpoint = tag->endpoint || tag->lent;

	if (!container)
		return has_had_endpoint;
	if (!has_had_endpoint && is_unsupervised(container) && container->bind_default == GRAFT_DEFAULT_CONTAINER)
		return 0;
	return !is_bound(sk, tag, container, netns);
}

/* Whether a socket, which it releases, is another container's that must not be there. */
static __always_inline int is_released_others(struct bpf_sock *sk, u32 container, u64 netns, int unwanted)
{
	struct container *other;
	struct tag *tag;
	int found = 0;

	if (!sk)
		return 0;
	tag = tags.sk_storage_get(sk, 0, 0);
	if (tag && tag->home == GRAFT_HOME_HOST && tag->container != container) {
		other = containers.lookup(&tag->container);
		found = unwanted == GRAFT_NO_OTHERS ? other != 0 : is_ungranted(sk, tag, other, netns);
	}
	bpf_sk_release(sk);
	return found;
}

/* The same of the datagram socket that the kernel finds at an IPv4 port; `address` as in a sockaddr. */
static __always_inline int meets4(struct bpf_sock_addr *ctx, u32 container, u32 address, u16 port_be, int unwanted)
{
	struct bpf_sock_tuple to = {};
	struct bpf_sock *sk;

	to.ipv4.daddr = address;
	to.ipv4.dport = port_be;
	sk = bpf_sk_lookup_udp(ctx, &to, sizeof(to.ipv4), BPF_F_CURRENT_NETNS, 0);
	return is_released_others(sk, container, bpf_get_netns_cookie(ctx), unwanted);
}

/* Whether a datagram socket would share this port of the endpoint with one that must not be there. */
static __always_inline int meets(struct bpf_sock_addr *ctx, u32 container, struct endpoint *endpoint, u16 port, int unwanted)
{
	struct bpf_sock_tuple to = {};
	struct bpf_sock *sk;
	u32 address;

	if (endpoint->family == GRAFT_IPV4) {
		__builtin_memcpy(&address, endpoint->addr, 4);
		return meets4(ctx, container, address, bpf_htons(port), unwanted);
	}
	__builtin_memcpy(to.ipv6.daddr, endpoint->addr, 16);
	to.ipv6.dport = bpf_htons(port);
	sk = bpf_sk_lookup_udp(ctx, &to, sizeof(to.ipv6), BPF_F_CURRENT_NETNS, 0);
	if (is_released_others(sk, container, bpf_get_netns_cookie(ctx), unwanted))
		return 1;
	return endpoint->flags & GRAFT_ENDPOINT_DUAL_STACK && meets4(ctx, container, 0, bpf_htons(port), unwanted);
}

/* At a bind: one that is not granted it. */
static __always_inline int meets_leftover(struct bpf_sock_addr *ctx, u32 container, struct endpoint *endpoint, u16 port)
{
	return meets(ctx, container, endpoint, port, GRAFT_NONE_UNGRANTED);
}

/* Where an endpoint lends it: any. A disconnect (AF_UNSPEC) leaves the borrower at the port, in the place of who serves. */
static __always_inline int meets_others(struct bpf_sock_addr *ctx, u32 container, struct endpoint *endpoint, u16 port)
{
	return meets(ctx, container, endpoint, port, GRAFT_NO_OTHERS);
}
