// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* The desk: a supervisor's question about a socket, answered by the code that decides. */

#define O_CLOEXEC 02000000

#ifdef GRAFT_PROBE
#ifdef GRAFT_TASK_FILES
/* What /proc/TID/fdinfo/FD would return, read the way it reads it. Only where that descriptor is still this file: another
 * thread of the program may have replaced it. */
static __always_inline void probe_descriptor(struct desk *desk, void *file)
{
	void *task = thread_of(desk->fdinfo);
	u32 flags = 0, cloexec = 0;

	if (!task || file_at(task, desk->fd, &cloexec) != file ||
	    bpf_probe_read_kernel(&flags, 4, file + GRAFT_FILE_FLAGS))
		return;
	desk->flags = (flags & ~O_CLOEXEC) | (cloexec ? O_CLOEXEC : 0);
	desk->probed |= GRAFT_PROBED_FLAGS;
}

/* Who opened the file, which is whom firewalls ask about (meta skuid of nft(8)). Not the owner that fstat() returns: a
 * program may change that, by fchown(), to a group that it is in, and with CAP_CHOWN to anybody. */
static __always_inline void probe_owner(struct desk *desk, void *file)
{
	void *opener = read_pointer(file + GRAFT_FILE_OPENER);
	u32 uid = 0, gid = 0;

	if (!opener || bpf_probe_read_kernel(&uid, 4, opener + GRAFT_OPENER_UID) ||
	    bpf_probe_read_kernel(&gid, 4, opener + GRAFT_OPENER_GID))
		return;
	desk->uid = uid;
	desk->gid = gid;
	desk->probed |= GRAFT_PROBED_OWNER;
}
#else
static __always_inline void probe_descriptor(struct desk *desk, void *file) {}
static __always_inline void probe_owner(struct desk *desk, void *file) {}
#endif

/* What no system call returns: whether the socket's file is registered with an epoll instance, and how many
 * references it has. And what would take several calls. */
static __always_inline void probe(struct bpf_sock_addr *ctx, struct desk *desk)
{
	/* (Of UDP and MPTCP the kernel has no such helper; the context is its own struct bpf_sock_addr_kern, which begins
	 * so.) */
	void *sk = ctx->protocol == IPPROTO_TCP ? bpf_skc_to_tcp_sock(ctx->sk) : read_pointer(ctx);
	void *socket = sk ? read_pointer(sk + GRAFT_SK_SOCKET) : 0;
	void *file = socket ? read_pointer(socket + GRAFT_SOCKET_FILE) : 0;
	void *epolls = 0;
	u64 references = 0;

	if (!file || bpf_probe_read_kernel(&epolls, 8, file + GRAFT_FILE_EP) ||
	    bpf_probe_read_kernel(&references, 8, file + GRAFT_FILE_REFERENCES))
		return;
	if (epolls) /* the list's head; it remains, empty, when the last registration is removed */
		epolls = read_pointer(epolls);
	desk->references = references;
	desk->probed = GRAFT_PROBED | (epolls ? GRAFT_PROBED_EPOLL : 0);
	probe_descriptor(desk, file);
	probe_owner(desk, file);
}
#else
static __always_inline void probe(struct bpf_sock_addr *ctx, struct desk *desk) {}
#endif

/* The rule for the address in the question, looked up by the code that the bind and connect hooks use. */
static __always_inline void answer_rule(struct desk *desk, struct container *container, u8 protocol)
{
	struct request request = { .port = desk->port, .family = desk->family, .protocol = protocol };
	struct ingress_value *bind;
	struct endpoint *endpoint;
	u32 id = 0;

	desk->verdict = GRAFT_VERDICT_NONE;
	__builtin_memcpy(request.addr, desk->addr, 16);
	if (desk->call == GRAFT_CALL_BIND) {
		bind = ingress_rule(container->ruleset, &request);
		if (bind) {
			id = bind->endpoint;
			desk->verdict = GRAFT_VERDICT_GRANT;
		}
	} else {
		substitute_loopback(&request, 0);
		desk->verdict = egress_rule(container, &request, &id);
	}
	endpoint = id ? endpoints.lookup(&id) : 0;
	if (!endpoint || !(endpoint->protocols & protocol_bit(protocol))) {
		if (desk->verdict == GRAFT_VERDICT_GRANT)
			desk->verdict = GRAFT_VERDICT_NONE;
		return;
	}
	desk->endpoint = id;
	desk->endpoint_netns = endpoint->netns;
	desk->endpoint_family = endpoint->family;
	desk->endpoint_flags = endpoint->flags | (endpoint->port ? GRAFT_ENDPOINT_HAS_PORT : 0);
}

/* Where the kernel has no helper that finds the MPTCP socket of a subflow, the hooks could not find the tag of a
 * host-homed one: there MPTCP sockets stay in the container. */
static __always_inline int is_swappable(u32 type, u32 protocol)
{
	if (type == SOCK_DGRAM)
		return protocol == IPPROTO_UDP;
#ifdef GRAFT_HAVE_MPTCP
	return type == SOCK_STREAM && (protocol == IPPROTO_TCP || protocol == IPPROTO_MPTCP);
#else
	return type == SOCK_STREAM && protocol == IPPROTO_TCP;
#endif
}

/* A call that its supervisor has refused, which no other hook sees. */
static __always_inline void trace_desk(struct desk *desk, u8 protocol)
{
	struct request request = {
		.port = desk->port,
		.family = desk->family,
		.protocol = protocol,
		.container = desk->container,
	};

	__builtin_memcpy(request.addr, desk->addr, 16);
	trace_request(&request, desk->call & ~GRAFT_CALL_REFUSED, REFUSE);
}

/* Answers a supervisor. Returns 0 where the caller is not one, and the hook does its usual work. */
static __always_inline int serve_desk(struct bpf_sock_addr *ctx, u8 family)
{
	struct desk *desk = desk_of_caller();
	struct options *seen;
	struct owner owner;

	if (!desk)
		return 0;
	if (desk->call & GRAFT_CALL_REFUSED) {
		trace_desk(desk, ctx->protocol);
		return 1;
	}
	desk->answered = 0;
	desk->uid = 0;
	desk->gid = 0;
	desk->endpoint = 0;
	desk->endpoint_flags = 0;
	desk->references = 0;
	desk->flags = 0;
	desk->probed = 0;
	if (!is_swappable(ctx->type, ctx->protocol))
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
	desk->bound = is_bound(ctx->sk, owner.tag, owner.container, desk->netns);
	desk->socket_family = family;
	desk->protocol = ctx->protocol;
	desk->state = ctx->sk->state;
	/* Not ctx->user_port: it keeps its value when a failed connect has released the port. */
	desk->local_port = ctx->sk->src_port;
	if (desk->family)
		answer_rule(desk, owner.container, ctx->type == SOCK_DGRAM ? IPPROTO_UDP : IPPROTO_TCP);
	desk->options.count = 0;
	desk->options.overflow = 0;
	seen = options.sk_storage_get(ctx->sk, 0, 0);
	if (seen)
		__builtin_memcpy(&desk->options, seen, sizeof(desk->options));
	desk->answered = 1;
	return 1;
}
