// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* setsockopt: records the options set before a swap, and refuses those that bypass the policy. */

#define SOL_IP 0
#define SOL_IPV6 41
#define SO_BINDTODEVICE 25
#define SO_MARK 36
#define SO_BINDTOIFINDEX 62
#define IP_HDRINCL 3
#define IP_OPTIONS 4
#define IP_FREEBIND 15
#define IP_TRANSPARENT 19
#define IP_IPSEC_POLICY 16
#define IP_XFRM_POLICY 17
#define IP_MULTICAST_IF 32
#define IP_MULTICAST_LOOP 34
#define IP_ADD_MEMBERSHIP 35
#define IP_DROP_MEMBERSHIP 36
#define MCAST_JOIN_GROUP 42
#define MCAST_LEAVE_GROUP 45
#define IP_MULTICAST_ALL 49
#define IPV6_ADDRFORM 1
#define IPV6_2292PKTOPTIONS 6
#define IPV6_NEXTHOP 9
#define IPV6_MULTICAST_IF 17
#define IPV6_JOIN_GROUP 20
#define IPV6_LEAVE_GROUP 21
#define IPV6_MULTICAST_ALL 29
#define IPV6_FLOWLABEL_MGR 32
#define IPV6_IPSEC_POLICY 34
#define IPV6_HDRINCL 36
#define IPV6_PKTINFO 50
#define IPV6_HOPOPTS 54
#define IPV6_RTHDRDSTOPTS 55
#define IPV6_RTHDR 57
#define IPV6_DSTOPTS 59
#define IPV6_TRANSPARENT 75
#define IPV6_UNICAST_IF 76
#define IPV6_FREEBIND 78
#define SOL_TCP 6
#define TCP_REPAIR 19
#define TCP_REPAIR_WINDOW 29

/* Options by which a host-homed socket would bypass its policy: another interface, a route past the routing
 * table (a source route or another IP option too), or addresses of others, and such as the host does not have. Multicast
 * (IP 32..48, IPv6 17, 20, 21, 29 and 42..48) and anycast (IPv6 27, 28) join groups on the host's links, or send on one of
 * them: that is for a policy to permit (permits_multicast). TCP_REPAIR makes a connection that no hook has seen;
 * IP_LOCAL_PORT_RANGE (51) chooses a port where the kernel must choose it. A flow label that one socket leases for
 * itself alone takes every label that is not leased from all others of the namespace (IPV6_FLOWLABEL_MGR). Numbers:
 * linux/in.h, linux/in6.h, linux/tcp.h. */
static __always_inline int bypasses_policy(int level, int name)
{
	if (level == SOL_SOCKET)
		return name == SO_BINDTODEVICE || name == SO_MARK || name == SO_BINDTOIFINDEX;
	if (level == SOL_IP)
		return name == IP_FREEBIND || name == IP_TRANSPARENT || name == IP_HDRINCL || name == IP_OPTIONS ||
		       name == IP_IPSEC_POLICY || name == IP_XFRM_POLICY || (name >= 32 && name <= 51);
	if (level == SOL_IPV6)
		return name == IPV6_TRANSPARENT || name == IPV6_UNICAST_IF || name == IPV6_FREEBIND || name == IPV6_PKTINFO ||
		       name == IPV6_2292PKTOPTIONS || name == IPV6_NEXTHOP || name == IPV6_MULTICAST_IF ||
		       name == IPV6_HOPOPTS || name == IPV6_RTHDRDSTOPTS || name == IPV6_RTHDR ||
		       name == IPV6_DSTOPTS || name == IPV6_FLOWLABEL_MGR || (name >= 20 && name <= 21) ||
		       (name >= 27 && name <= 30) ||
		       (name >= IPV6_IPSEC_POLICY && name <= IPV6_HDRINCL) || (name >= 42 && name <= 48);
	if (level == SOL_TCP)
		return name == TCP_REPAIR || name == TCP_REPAIR_WINDOW;
	return 0;
}

/* An echo request leaves from the address that its socket is bound to, or that a control message names: with these, from
 * one that is not the host's. (Of other sockets the hooks set both.) */
static __always_inline int frees_source(u32 type, u32 protocol, int level, int name)
{
	return is_ping(type, protocol) &&
	       ((level == SOL_IP && name == IP_FREEBIND) || (level == SOL_IPV6 && name == IPV6_FREEBIND));
}

/* A datagram socket keeps the addresses that it used last, those of IPv6, and reads them as others when it becomes one of
 * IPv4. */
static __always_inline int misreads_addresses(u32 protocol, int level, int name)
{
	return protocol == IPPROTO_UDP && level == SOL_IPV6 && name == IPV6_ADDRFORM;
}

/* Whether a call sets SO_REUSEPORT of a TCP socket (to leave a group is anybody's). */
static __always_inline int sets_group_option(struct bpf_sockopt *ctx, u32 type, u32 protocol)
{
	u8 *value = ctx->optval, *end = ctx->optval_end;

	if (!is_tcp(type, protocol) || ctx->level != SOL_SOCKET || ctx->optname != SO_REUSEPORT)
		return 0;
	if (ctx->optlen < 4 || (void *)value + 4 > (void *)end)
		return 1;
	return value[0] | value[1] | value[2] | value[3];
}


/* How a socket sends to groups, whether it receives those that others joined, and leaving one. */
static __always_inline int is_multicast_setting(int level, int name)
{
	if (level == SOL_IP)
		return (name >= IP_MULTICAST_IF && name <= IP_MULTICAST_LOOP) || name == IP_DROP_MEMBERSHIP ||
		       name == MCAST_LEAVE_GROUP || name == IP_MULTICAST_ALL;
	return level == SOL_IPV6 && (name == IPV6_MULTICAST_IF || name == IPV6_LEAVE_GROUP ||
				     name == MCAST_LEAVE_GROUP || name == IPV6_MULTICAST_ALL);
}

/* struct group_req begins with an interface; its address, of struct sockaddr, is aligned as on 64-bit machines. */
#define GRAFT_GROUP_REQ_FAMILY 8
#define GRAFT_GROUP_REQ_ADDR4 12
#define GRAFT_GROUP_REQ_ADDR6 16
/* No request is longer. Of a value longer than a page the kernel would read its own copy after the hook. */
#define GRAFT_MAX_JOIN 256

/* The group that a socket joins, in any interface; of those for single sources (IP_ADD_SOURCE_MEMBERSHIP, ...) none. */
static __always_inline int read_group(struct bpf_sockopt *ctx, u8 *addr)
{
	u8 *value = ctx->optval, *end = ctx->optval_end;
	u16 family;

	__builtin_memset(addr, 0, 16);
	if (ctx->optlen <= 0 || ctx->optlen > GRAFT_MAX_JOIN)
		return 0;
	if (ctx->level == SOL_IP && ctx->optname == IP_ADD_MEMBERSHIP) {
		if ((void *)value + 8 > (void *)end)
			return 0;
		__builtin_memcpy(addr, value, 4);
		return GRAFT_IPV4;
	}
	if (ctx->level == SOL_IPV6 && ctx->optname == IPV6_JOIN_GROUP) {
		if ((void *)value + 20 > (void *)end)
			return 0;
		__builtin_memcpy(addr, value, 16);
		return GRAFT_IPV6;
	}
	if (ctx->optname != MCAST_JOIN_GROUP || (void *)value + 32 > (void *)end)
		return 0;
	family = *(u16 *)(value + GRAFT_GROUP_REQ_FAMILY);
	if (ctx->level == SOL_IP && family == AF_INET) {
		__builtin_memcpy(addr, value + GRAFT_GROUP_REQ_ADDR4, 4);
		return GRAFT_IPV4;
	}
	if (ctx->level == SOL_IPV6 && family == AF_INET6) {
		__builtin_memcpy(addr, value + GRAFT_GROUP_REQ_ADDR6, 16);
		return GRAFT_IPV6;
	}
	return 0;
}

/* Whether a rule lets the socket have this multicast option: joining a group only where its endpoint has it, or, before a
 * bind, where some endpoint has it that a bind may become. Afterwards the packet hook judges what it receives. */
static __always_inline int permits_multicast(struct bpf_sockopt *ctx, struct bpf_sock *sk, struct owner *owner)
{
	u8 addr[16];
	u8 family;

	if (!owner->container || !(owner->container->flags & GRAFT_CONTAINER_MULTICAST))
		return 0;
	if (is_multicast_setting(ctx->level, ctx->optname))
		return 1;
	family = read_group(ctx, addr);
	if (!family)
		return 0;
	if (!sk->src_port)
		return has_group(owner->container->ruleset, family, addr);
	return owner->tag && has_group(owner->tag->endpoint, family, addr) &&
	       is_bound(sk, owner->tag, owner->container, bpf_get_netns_cookie(ctx));
}

/* An option that cannot be recorded is refused: without it the replacement socket would differ from the program's. */
static __always_inline int record_option(struct bpf_sock *sk, int level, int name)
{
	struct options *seen = options.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	u32 i;

	if (!seen)
		return REFUSE;
	if (level < 0 || level > 0xffff || name < 0 || name > 0xffff) {
		seen->overflow = 1;
		return PASS;
	}
	for (i = 0; i < GRAFT_OPTIONS_MAX; i++)
		if (i < seen->count && seen->option[i].level == level && seen->option[i].name == name)
			return PASS;
	i = seen->count;
	if (i < GRAFT_OPTIONS_MAX) {
		seen->option[i].level = level;
		seen->option[i].name = name;
		seen->count = i + 1;
		return PASS;
	}
	seen->overflow = 1;
	return PASS;
}

/* Whether a host-homed socket may not bypass the policy. In a direct container that denies nothing this applies
 * only to a socket with an endpoint. */
static __always_inline int is_confined(struct owner *owner)
{
	if (!owner->container || !defaults_apply(owner->container) || denies_anything(owner->container))
		return 1;
	return owner->tag && owner->tag->endpoint;
}

/* Whether the socket may still be replaced: one of a swap container, neither bound nor connected. (A datagram socket may
 * be connected again.) */
static __always_inline int may_be_replaced(struct owner *owner, struct bpf_sock *sk)
{
	if (!owner->container || owner->container->transport != GRAFT_TRANSPORT_SWAP)
		return 0;
	return owner->home == GRAFT_HOME_CONTAINER ||
	       (owner->tag && !owner->tag->bound_port && (sk->state == BPF_TCP_CLOSE || sk->protocol == IPPROTO_UDP));
}

static __always_inline void trace_option(struct owner *owner, u8 protocol, u32 level, u32 name)
{
	struct request request = { .protocol = protocol };

	__builtin_memcpy(request.addr, &level, 4);
	__builtin_memcpy(request.addr + 4, &name, 4);
	trace_call(owner->id, GRAFT_CALL_OPTION, GRAFT_OUTCOME_REFUSED, &request);
}

int graft_setsockopt(struct bpf_sockopt *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct scope *scope = scopes.get_local_storage(0);
	struct owner owner = {};
	u32 type, protocol;
	int may_join;

	/* The kernel passes at most a page of a long value; with a length of 0 it uses the caller's own
	 * copy instead of failing the call (Documentation/bpf/prog_cgroup_sockopt.rst). */
	if (ctx->optlen > (u64)ctx->optval_end - (u64)ctx->optval)
		ctx->optlen = 0;
	if (!sk)
		return PASS;
	resolve_owner(&owner, tags.sk_storage_get(sk, 0, 0), scope->container);
	type = sk->type;
	protocol = sk->protocol;
	may_join = !owner.container || !sets_group_option(ctx, type, protocol) || may_join_group(sk);
	if (bypasses_policy(ctx->level, ctx->optname) || frees_source(type, protocol, ctx->level, ctx->optname) ||
	    misreads_addresses(protocol, ctx->level, ctx->optname) || !may_join) {
		if (!owner.tag && shares_host_netns(owner.container, bpf_get_netns_cookie(ctx)))
			owner.home = GRAFT_HOME_HOST;
		if (owner.home == GRAFT_HOME_HOST && is_confined(&owner) && !permits_multicast(ctx, sk, &owner)) {
			count(owner.id, GRAFT_DECISION_REFUSED_OPTION);
			trace_option(&owner, protocol, ctx->level, ctx->optname);
			return REFUSE;
		}
	}
	return may_be_replaced(&owner, sk) ? record_option(sk, ctx->level, ctx->optname) : PASS;
}
