// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* The desk: a supervisor's question about a socket, answered where it will be decided. */

/* The desk of the calling supervisor; NULL for everybody else. A container cannot ask: it is neither in
 * the supervisors' cgroup, nor does its process have a desk. */
static __always_inline struct desk *desk_of_caller(void)
{
	int first = 0;
	struct settings *set = settings.lookup(&first);
	u32 pid = bpf_get_current_pid_tgid() >> 32;
	u32 *slot;

	if (!set || bpf_get_current_cgroup_id() != set->supervisors)
		return 0;
	slot = desk_slots.lookup(&pid);
	return slot ? desks.lookup(slot) : 0;
}

#ifdef GRAFT_SK_SOCKET
/* What no system call tells: whether the socket's file is watched by an epoll instance, and how many
 * references it has. Offsets come from the kernel's own type information (/sys/kernel/btf/vmlinux). */
static __always_inline void probe(struct bpf_sock_addr *ctx, struct desk *desk)
{
	void *sk, *socket = 0, *file = 0, *epolls = 0;
	u64 references = 0;

	sk = bpf_skc_to_tcp_sock(ctx->sk);
	if (!sk)
		return;
	if (bpf_probe_read_kernel(&socket, 8, sk + GRAFT_SK_SOCKET) || !socket)
		return;
	if (bpf_probe_read_kernel(&file, 8, socket + GRAFT_SOCKET_FILE) || !file)
		return;
	if (bpf_probe_read_kernel(&epolls, 8, file + GRAFT_FILE_EP) ||
	    bpf_probe_read_kernel(&references, 8, file + GRAFT_FILE_REFERENCES))
		return;
	if (epolls) /* the list's head; it stays, empty, when the last registration goes */
		bpf_probe_read_kernel(&epolls, 8, epolls);
	desk->references = references;
	desk->probed = GRAFT_PROBED | (epolls ? GRAFT_PROBED_EPOLL : 0);
}
#else
static __always_inline void probe(struct bpf_sock_addr *ctx, struct desk *desk) {}
#endif

/* The rule that speaks of the address in the question, by the code that the bind and connect hooks use. */
static __always_inline void answer_rule(struct desk *desk, struct container *container)
{
	struct asked asked = { .port = desk->port, .family = desk->family, .protocol = IPPROTO_TCP };
	struct endpoint *endpoint;
	u32 id = 0;

	desk->verdict = GRAFT_VERDICT_NONE;
	__builtin_memcpy(asked.addr, desk->addr, 16);
	if (desk->call == GRAFT_CALL_BIND) {
		id = ingress_rule(container, &asked);
		if (id)
			desk->verdict = GRAFT_VERDICT_GRANT;
	} else {
		desk->verdict = egress_rule(container, &asked, &id);
	}
	endpoint = id ? endpoints.lookup(&id) : 0;
	if (!endpoint || !(endpoint->protocols & GRAFT_TCP)) {
		if (desk->verdict == GRAFT_VERDICT_GRANT)
			desk->verdict = GRAFT_VERDICT_NONE;
		return;
	}
	desk->endpoint = id;
	desk->endpoint_netns = endpoint->netns;
	desk->endpoint_family = endpoint->family;
}

/* A kernel that leads nowhere from a subflow to its MPTCP socket would let the hooks take a host-homed
 * one for nobody's: there MPTCP sockets stay in the container. */
static __always_inline int is_swappable(u32 protocol)
{
#ifdef GRAFT_HAVE_MPTCP
	return protocol == IPPROTO_TCP || protocol == IPPROTO_MPTCP;
#else
	return protocol == IPPROTO_TCP;
#endif
}

/* Answers a supervisor. Returns 0 where the caller is none, and the hook has its usual work to do. */
static __always_inline int serve_desk(struct bpf_sock_addr *ctx, u8 family)
{
	struct desk *desk = desk_of_caller();
	struct options *seen;
	struct owner owner;

	if (!desk)
		return 0;
	desk->answered = 0;
	desk->endpoint = 0;
	desk->probed = 0;
	if (ctx->type != SOCK_STREAM || !is_swappable(ctx->protocol))
		return 1;
	probe(ctx, desk);
	owner_of(ctx, &owner);
	if (!owner.container || owner.id != desk->container)
		return 1;
	desk->netns = bpf_get_netns_cookie(ctx);
	desk->container_netns = owner.container->netns;
	desk->bind_default = owner.container->bind_default;
	desk->connect_default = owner.container->connect_default;
	desk->home = owner.home;
	desk->tag_flags = owner.tag ? owner.tag->flags : 0;
	desk->socket_family = family;
	desk->protocol = ctx->protocol;
	desk->state = ctx->sk->state;
	/* Not ctx->user_port: that one stays when a connect that failed has let go of its port. */
	desk->local_port = ctx->sk->src_port;
	if (desk->family)
		answer_rule(desk, owner.container);
	desk->options.count = 0;
	desk->options.overflow = 0;
	seen = options.sk_storage_get(ctx->sk, 0, 0);
	if (seen)
		__builtin_memcpy(&desk->options, seen, sizeof(desk->options));
	desk->answered = 1;
	return 1;
}
