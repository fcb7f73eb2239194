// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* listen: a host-homed socket that nobody gave a port to hears nobody. */

/* The tag of a listener in a direct container that may listen on its endpoints only, made if it has none. */
static __always_inline struct tag *confined_listener(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	struct scope *scope = scopes.get_local_storage(0);
	u32 id = scope->container;
	struct container *container = id ? containers.lookup(&id) : 0;
	struct tag *tag;

	if (!container || container->transport != GRAFT_TRANSPORT_DIRECT ||
	    container->bind_default != GRAFT_DEFAULT_DENY || container->netns != bpf_get_netns_cookie(ctx))
		return 0;
	tag = tags.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (tag) {
		tag->container = id;
		tag->home = GRAFT_HOME_HOST;
	}
	return tag;
}

/* No hook can refuse a listen(). The supervisor refuses it where it is asked; a call that passes the
 * filter untouched (32-bit, io_uring), or of a container that needs no supervisor, ends here: the listener
 * is tied to the last interface number there is, which no interface has, and the setsockopt hook keeps it
 * from being untied. */
int graft_sock_ops(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk;
	struct tag *tag;
	struct container *container;
	u32 nowhere = 0x7fffffff;

	if (ctx->op != BPF_SOCK_OPS_TCP_LISTEN_CB)
		return 1;
	sk = ctx->sk;
	if (!sk)
		return 1;
	tag = tags.sk_storage_get(sk, 0, 0);
#ifdef GRAFT_HAVE_MPTCP
	if (!tag) {
		void *parent = bpf_skc_to_mptcp_sock(sk);

		if (parent)
			tag = tags.sk_storage_get(parent, 0, 0);
	}
#endif
	if (!tag)
		tag = confined_listener(ctx, sk);
	if (!tag || tag->home != GRAFT_HOME_HOST)
		return 1;
	/* A socket that its container had before it was detached may not listen again either. */
	container = containers.lookup(&tag->container);
	if (container && (tag->flags & GRAFT_TAG_BOUND || is_own(container, tag)))
		return 1;
	bpf_setsockopt(ctx, SOL_SOCKET, SO_BINDTOIFINDEX, &nowhere, sizeof(nowhere));
	tag->flags |= GRAFT_TAG_DEAF;
	count(tag->container, GRAFT_DECISION_DEAFENED);
	return 1;
}
