// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* The relay in the kernel: bytes go from one of Graft's sockets to another without waking graftd.
 *
 * Theory of operation
 *
 *   A relayed connection is two sockets of Graft's own and two flows, one each way. graftd accepts, dials
 *   and decides as for splice(2) (graft/splice); a flow that it finds worth it, it hands over:
 *
 *      flow_targets   cookie of the source -> the target. No program: to be listed changes nothing.
 *      flow_sources   cookie of the source -> the source. Its program, below, now gets what arrives.
 *
 *   Targets first, so that no byte ever meets the program without a way to go: what arrived before waits in
 *   the source's own queue, unread, and graftd has the kernel look at it once more when both are listed.
 *   Only Graft's sockets are listed, never a program's: one that is blocked in recv() would not wake.
 *
 *   What the program sends on is taken from the source at once and queued, without limit and without telling
 *   the sender to stop, until the target's buffer has room. So it is counted here: a target that is behind
 *   by GRAFT_MAX_BEHIND bytes gets no more from the kernel. From then on bytes are left with the source, whose
 *   window closes; graftd is told (`flow_events`), waits until the queue is out, carries over by hand what was
 *   left, and says in `flow_taken` how much that was. When that is all of it, and not before, the kernel
 *   goes on: the order of bytes depends on nothing but these counts, which change under the source's lock.
 *
 *   Loaded on its own (graft/datapath/loader.py): a kernel that does not take it has the other transports all the same.
 */
#include <linux/types.h>
#include "graft.h"

/* By hand: bcc's macros have no lookup in a sockhash. */
struct sockhash_table {
	u64 key;
	int leaf;
	void *(*lookup)(u64 *);
	int (*sk_redirect_hash)(void *, void *, u64);
	u32 max_entries;
};
__attribute__((section("maps/sockhash"))) struct sockhash_table flow_targets = { .max_entries = GRAFT_MAX_FLOWS };
__attribute__((section("maps/sockhash"))) struct sockhash_table flow_sources = { .max_entries = GRAFT_MAX_FLOWS };
BPF_ANNOTATE_KV_PAIR(flow_targets, u64, int);
BPF_ANNOTATE_KV_PAIR(flow_sources, u64, int);

BPF_F_TABLE("hash", u64, struct flow, flows, GRAFT_MAX_FLOWS, BPF_F_NO_PREALLOC);
BPF_F_TABLE("hash", u64, u64, flow_taken, GRAFT_MAX_FLOWS, BPF_F_NO_PREALLOC);
BPF_RINGBUF_OUTPUT(flow_events, GRAFT_FLOW_EVENT_PAGES);

/* Leave bytes with the source. The first ones since graftd had taken all are the ones to tell of. */
static inline int leave(u64 key, struct flow *flow, u64 taken, u32 len)
{
	if (flow->left == taken)
		flow_events.ringbuf_output(&key, sizeof(key), 0);
	flow->left += len;
	return SK_PASS;
}

int graft_flow(struct __sk_buff *skb)
{
	u64 key = bpf_get_socket_cookie(skb);
	u32 len = skb->len, written = 0;
	struct flow *flow;
	struct bpf_sock *target;
	u64 taken = 0, *told;
	void *tcp;

	/* The end of a stream without data. Sent on, it would count as an error of the target's; the end
	 * itself is graftd's to hand on, when all that came before it is written. */
	if (!len)
		return SK_DROP;
	flow = flows.lookup(&key);
	if (!flow)
		return SK_DROP; /* given up by graftd: this connection is being closed */
	if (flow->left) {
		told = flow_taken.lookup(&key);
		if (told)
			taken = *told;
	}
	target = flow_targets.lookup(&key);
	if (!target)
		return leave(key, flow, taken, len); /* to redirect to nobody would be to drop */
	tcp = bpf_skc_to_tcp_sock(target);
	if (tcp)
		bpf_probe_read_kernel(&written, sizeof(written), tcp + GRAFT_TCP_WRITE_SEQ);
	bpf_sk_release(target);
	if (!flow->started) {
		flow->started = 1;
		flow->first = written;
	}
	if (flow->left != taken ||
	    (s32)((u32)(flow->moved + taken) - (written - flow->first)) > GRAFT_MAX_BEHIND)
		return leave(key, flow, taken, len);
	flow->moved += len;
	/* To the target's sending side (no BPF_F_INGRESS): the other is slower by two orders of magnitude. */
	return flow_targets.sk_redirect_hash(skb, &key, 0);
}
