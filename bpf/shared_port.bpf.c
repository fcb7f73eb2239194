// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* Ports that sockets of several containers have (UDP: SO_REUSEADDR or SO_REUSEPORT; listeners of TCP: SO_REUSEPORT).
 *
 * Of those the kernel chooses who gets a datagram or a client, before the hook for packets drops what that one gets: a server
 * would miss some, or all, as the other one chooses (SO_REUSEPORT with a program, SO_INCOMING_CPU, which of them was bound
 * last). And a listener that has lost its endpoint hears on: it would hear the next one's clients. So nobody binds an
 * endpoint's port beside a socket of another container that is not granted it, and none is lent a port beside another
 * container's. The kernel closes no socket that its program has bound. Where one is there all the same, the hook for packets
 * keeps from it what is for a container that is granted the port (server.bpf.c).
 *
 * Only a listener, or a datagram socket without a peer, is found: one that has a peer gets what that sends, and nothing else.
 */

/* Who must not be at the port already. */
#define GRAFT_NONE_UNGRANTED 0
#define GRAFT_NO_OTHERS 1
#define GRAFT_NONE_GRANTED 2

/* Whether a socket has the port of an endpoint that it is granted now; also one of which the hook that records the port has
 * not been called yet (0). */
static __always_inline int has_granted_port(struct bpf_sock *sk, struct tag *tag, struct container *container, u64 netns)
{
	struct local_address local;
	u32 type = sk->type;
	u8 protocol;

	asm volatile("" : "+r"(type)); /* as in read_local_address */
	read_local_address(&local, sk);
	protocol = type == SOCK_STREAM ? IPPROTO_TCP : IPPROTO_UDP;
	if (!tag->endpoint)
		return tag->open_port == local.port && is_granted_place(container, &local, protocol, netns);
	if (tag->bound_port ? tag->bound_port != local.port : tag->lent & GRAFT_LENT_PORT)
		return 0;
	return is_granted(container, tag, &local, protocol, netns);
}

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
	return !has_granted_port(sk, tag, container, netns);
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
		if (unwanted == GRAFT_NONE_UNGRANTED)
			found = is_ungranted(sk, tag, other, netns);
		else
			found = other && (unwanted == GRAFT_NO_OTHERS || has_granted_port(sk, tag, other, netns));
	}
	found = found && sk->src_port; /* 0: it is being closed */
	bpf_sk_release(sk);
	return found;
}

/* The socket that the kernel finds for somebody who has no address yet: no connection, only who listens. */
static __always_inline struct bpf_sock *found_at(struct bpf_sock_addr *ctx, struct bpf_sock_tuple *to, u32 size, u8 protocol)
{
	return protocol == IPPROTO_TCP ? bpf_sk_lookup_tcp(ctx, to, size, BPF_F_CURRENT_NETNS, 0) :
					 bpf_sk_lookup_udp(ctx, to, size, BPF_F_CURRENT_NETNS, 0);
}

/* The same of the one that the kernel finds at an IPv4 port; `address` as in a sockaddr. */
static __always_inline int meets4(struct bpf_sock_addr *ctx, u32 container, u8 protocol, u32 address, u16 port_be,
				  int unwanted)
{
	struct bpf_sock_tuple to = {};
	struct bpf_sock *sk;

	to.ipv4.daddr = address;
	to.ipv4.dport = port_be;
	sk = found_at(ctx, &to, sizeof(to.ipv4), protocol);
	return is_released_others(sk, container, bpf_get_netns_cookie(ctx), unwanted);
}

/* Whether a socket would share this port of the endpoint with one that must not be there. */
static __always_inline int meets(struct bpf_sock_addr *ctx, u32 container, u8 protocol, struct endpoint *endpoint, u16 port,
				 int unwanted)
{
	struct bpf_sock_tuple to = {};
	struct bpf_sock *sk;
	u32 address;

	if (endpoint->family == GRAFT_IPV4) {
		__builtin_memcpy(&address, endpoint->addr, 4);
		return meets4(ctx, container, protocol, address, bpf_htons(port), unwanted);
	}
	__builtin_memcpy(to.ipv6.daddr, endpoint->addr, 16);
	to.ipv6.dport = bpf_htons(port);
	sk = found_at(ctx, &to, sizeof(to.ipv6), protocol);
	if (is_released_others(sk, container, bpf_get_netns_cookie(ctx), unwanted))
		return 1;
	return endpoint->flags & GRAFT_ENDPOINT_DUAL_STACK &&
	       meets4(ctx, container, protocol, 0, bpf_htons(port), unwanted);
}

/* At a bind to that port of the endpoint: one that is not granted it. */
static __always_inline int meets_leftover(struct bpf_sock_addr *ctx, struct request *request, struct endpoint *endpoint)
{
	u16 port = request->endpoint_port;

	return port && meets(ctx, request->container, request->protocol, endpoint, port, GRAFT_NONE_UNGRANTED);
}

/* Where an endpoint lends it: any. A disconnect (AF_UNSPEC) leaves the borrower at the port, in the place of who serves. */
static __always_inline int meets_others(struct bpf_sock_addr *ctx, struct request *request, struct endpoint *endpoint)
{
	u16 port = endpoint->port;

	return port && meets(ctx, request->container, request->protocol, endpoint, port, GRAFT_NO_OTHERS);
}

/* ---- SO_REUSEPORT of who is lent a port for a TCP connect -------------------------------------- */

#define GRAFT_OFTEN (1u << 30) /* counted no further, or the count would begin anew */

/* What is stored of a socket's options, of an MPTCP socket with the one that the program has. NULL: no memory. */
static __always_inline struct options *options_of(struct bpf_sock *sk)
{
#ifdef GRAFT_HAVE_MPTCP
	void *parent = bpf_skc_to_mptcp_sock(sk);

	if (parent)
		return options.sk_storage_get(parent, 0, BPF_SK_STORAGE_GET_F_CREATE);
#endif
	return options.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
}

/* Who connects does not share the port with who listens: a socket that was lent it could listen there too, and is in the
 * server's group before any hook is called. The option is taken from it (before 6.1 the kernel does not let a hook do that),
 * and refused from then on. A setsockopt of another thread may have been judged before and take effect afterwards: so each
 * is counted before it looks for `borrowed`, and here that is counted before those are looked for. The one that was made is
 * in effect if the option is set; with more of them one may be still to come. */
static __always_inline int leaves_group(struct bpf_sock_addr *ctx)
{
	struct options *seen = options_of(ctx->sk);
	int set = 0, off = 0;

	if (!seen)
		return 0;
	if (seen->borrowed < GRAFT_OFTEN)
		__sync_fetch_and_add(&seen->borrowed, 1);
	if (bpf_getsockopt(ctx, SOL_SOCKET, SO_REUSEPORT, &set, sizeof(set)))
		return 1;
	bpf_setsockopt(ctx, SOL_SOCKET, SO_REUSEPORT, &off, sizeof(off));
	if (seen->asked_group == 1 && set)
		__sync_fetch_and_add(&seen->asked_group, -1); /* what is set from now on is refused */
	return !seen->asked_group;
}

/* Whether a setsockopt may join a group of sockets: not of one that was lent a port, or where there is no memory to count. */
static __always_inline int may_join_group(struct bpf_sock *sk)
{
	struct options *seen = options.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);

	if (!seen)
		return 0;
	if (seen->asked_group < GRAFT_OFTEN) {
		__sync_fetch_and_add(&seen->asked_group, 1);
		if (!seen->borrowed)
			return 1;
		__sync_fetch_and_add(&seen->asked_group, -1); /* it is refused, and none that takes effect */
	}
	return 0;
}
