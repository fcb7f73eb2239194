// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* setsockopt: options recorded before a swap, and those refused that reach past the policy. */

#define SOL_IP 0
#define SOL_SOCKET 1
#define SOL_IPV6 41
#define SO_BINDTODEVICE 25
#define SO_MARK 36
#define SO_BINDTOIFINDEX 62
#define IP_HDRINCL 3
#define IP_OPTIONS 4
#define IP_TRANSPARENT 19
#define IPV6_TRANSPARENT 75
#define IPV6_UNICAST_IF 76

/* Options that would take a host-homed socket past its policy: to another interface, past the routing
 * table (a source route too), or into the addresses of others. Multicast (IP 32..48, IPv6 20, 21 and
 * 42..48) and anycast (IPv6 27, 28) join groups on the host's links. Numbers: linux/in.h, linux/in6.h. */
static __always_inline int reaches_past_policy(int level, int name)
{
	if (level == SOL_SOCKET)
		return name == SO_BINDTODEVICE || name == SO_MARK || name == SO_BINDTOIFINDEX;
	if (level == SOL_IP)
		return name == IP_TRANSPARENT || name == IP_HDRINCL || name == IP_OPTIONS || (name >= 32 && name <= 50);
	if (level == SOL_IPV6)
		return name == IPV6_TRANSPARENT || name == IPV6_UNICAST_IF || (name >= 20 && name <= 21) ||
		       (name >= 27 && name <= 30) || (name >= 42 && name <= 48);
	return 0;
}

static __always_inline void remember_option(struct bpf_sock *sk, int level, int name)
{
	struct options *seen = options.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	u32 i;

	if (!seen)
		return;
	if (level < 0 || level > 0xffff || name < 0 || name > 0xffff) {
		seen->overflow = 1;
		return;
	}
	for (i = 0; i < GRAFT_OPTIONS_MAX; i++)
		if (i < seen->count && seen->option[i].level == level && seen->option[i].name == name)
			return;
	i = seen->count;
	if (i < GRAFT_OPTIONS_MAX) {
		seen->option[i].level = level;
		seen->option[i].name = name;
		seen->count = i + 1;
		return;
	}
	seen->overflow = 1;
}

/* Whether a policy confines this untagged socket: a direct container's, in the host's namespace, where some
 * addresses are denied. */
static __always_inline int is_confined(struct bpf_sockopt *ctx, u32 id)
{
	struct container *container = id ? containers.lookup(&id) : 0;

	if (!container || container->transport != GRAFT_TRANSPORT_DIRECT)
		return 0;
	if (container->bind_default != GRAFT_DEFAULT_DENY && container->connect_default != GRAFT_DEFAULT_DENY)
		return 0;
	return container->netns == bpf_get_netns_cookie(ctx);
}

int graft_setsockopt(struct bpf_sockopt *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct scope *scope = scopes.get_local_storage(0);
	struct owner owner = {};

	/* The kernel shows a program at most a page of a long value; a length of 0 tells it to use the
	 * caller's own copy instead of failing the call (Documentation/bpf/prog_cgroup_sockopt.rst). */
	if (ctx->optlen > (u64)ctx->optval_end - (u64)ctx->optval)
		ctx->optlen = 0;
	if (!sk)
		return PASS;
	owner.tag = tags.sk_storage_get(sk, 0, 0);
	owner.id = owner.tag ? owner.tag->container : scope->container;
	owner.home = owner.tag ? owner.tag->home : GRAFT_HOME_CONTAINER;
	if (!owner.tag && reaches_past_policy(ctx->level, ctx->optname) && is_confined(ctx, owner.id))
		owner.home = GRAFT_HOME_HOST;
	if (owner.home == GRAFT_HOME_HOST) {
		if (!reaches_past_policy(ctx->level, ctx->optname)) {
			/* A twin may be replaced by another one, as long as it is neither bound nor connected. */
			if (owner.tag && !(owner.tag->flags & GRAFT_TAG_BOUND) && sk->state == BPF_TCP_CLOSE)
				remember_option(sk, ctx->level, ctx->optname);
			return PASS;
		}
		count(owner.id, GRAFT_DECISION_REFUSED_OPTION);
		return REFUSE;
	}
	if (scope->container || owner.tag)
		remember_option(sk, ctx->level, ctx->optname);
	return PASS;
}
