// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* listen: a host-homed socket without a granted port receives nothing. */

/* The tag of a listener in a direct container, made if it has none. */
static __always_inline struct tag *tag_direct_listener(struct bpf_sock *sk, u32 id)
{
	struct tag *tag = tags.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);

	if (tag) {
		tag->container = id;
		tag->home = GRAFT_HOME_HOST;
		tag->endpoint = 0;
		tag->since = bpf_ktime_get_ns();
	}
	return tag;
}

/* No hook can refuse a listen(). The supervisor refuses the calls that it receives; a call that the filter does
 * not trap (32-bit, io_uring), or of a container that needs no supervisor, is handled here. A listener receives
 * nothing until this hook has written its port into its tag (ingress.bpf.c). One that is not granted is
 * also bound to the highest interface number, which no interface has, so that the kernel answers its
 * clients as if there were no listener. That may fail, where the socket is bound to another interface already. */
int graft_sock_ops(struct bpf_sock_ops *ctx)
{
	struct scope *scope = scopes.get_local_storage(0);
	u32 no_interface = 0x7fffffff;
	struct bpf_sock *sk;
	struct owner owner;
	u64 netns;

	if (ctx->op != BPF_SOCK_OPS_TCP_LISTEN_CB)
		return 1;
	sk = ctx->sk;
	if (!sk)
		return 1;
	netns = bpf_get_netns_cookie(ctx);
	resolve_owner(&owner, tag_of(sk), scope->container);
	if (!owner.tag && shares_host_netns(owner.container, netns)) {
		owner.home = GRAFT_HOME_HOST;
		owner.tag = tag_direct_listener(sk, owner.id);
	}
	if (owner.home != GRAFT_HOME_HOST)
		return 1;
	if (owner.container && (binds_freely(owner.container) ||
				(!is_diverted(sk) && is_bound(sk, owner.tag, owner.container, netns)))) {
		if (owner.tag)
			owner.tag->open_port = sk->src_port;
		trace_listen(&owner, owner.tag && owner.tag->endpoint ? GRAFT_OUTCOME_GRANTED : GRAFT_OUTCOME_PASSED);
		return 1;
	}
	if (owner.tag)
		owner.tag->open_port = 0;
	bpf_setsockopt(ctx, SOL_SOCKET, SO_BINDTOIFINDEX, &no_interface, sizeof(no_interface));
	count(owner.id, GRAFT_DECISION_CLOSED_LISTENER);
	trace_listen(&owner, GRAFT_OUTCOME_REFUSED);
	return 1;
}
