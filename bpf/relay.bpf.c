// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* The relay in the kernel: bytes go from one of Graft's sockets to another without waking graftd.
 *
 * Theory of operation
 *
 *   A relayed connection is two sockets of Graft's own and two flows, one in each direction. graftd accepts,
 *   connects and decides as for splice(2) (graft/splice); it hands a busy flow to the kernel:
 *
 *      flow_targets   cookie of the source -> the target. No program: listing a socket here changes nothing.
 *      flow_sources   cookie of the source -> the source. Its program, below, gets what arrives from now on.
 *
 *   Targets first, so that the program always finds a target: what arrived before waits in
 *   the source's own queue, unread, and graftd makes the kernel process it again when both are listed.
 *   Only Graft's sockets are listed, never a program's: one that is blocked in recv() would not wake.
 *
 *   What the program redirects is taken from the source at once and queued, without limit and without stopping
 *   the sender, until the target's buffer has room. So it is counted here: a target that is behind
 *   by GRAFT_MAX_BEHIND bytes, or by GRAFT_MAX_SEGMENTS segments (each takes a kilobyte of the kernel's memory, though it
 *   be of one byte), gets no more from the kernel. From then on bytes are left with the source, whose
 *   window closes; an event wakes graftd (`flow_events`), which waits until the queue is empty, relays what was
 *   left, and writes to `flow_taken` how much that was. When that is all of it, and not before, the kernel
 *   continues: the order of bytes depends only on these counts, which change under the source's lock.
 *
 *   Loaded on its own (graft/datapath/loader.py): a kernel that refuses it still has the other transports.
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

/* Leave bytes with the source. The first ones after graftd had taken all need an event. */
static inline int leave_with_source(u64 key, struct flow *flow, u64 taken, u32 len)
{
	if (flow->left == taken)
		flow_events.ringbuf_output(&key, sizeof(key), 0);
	flow->left += len;
	return SK_PASS;
}

/* How many segments may be queued. Which of them were sent cannot be seen, only how many bytes. So they are counted in
 * two parts: when the target has been sent all that had come when the second part began, the first part is sent.
 */
static inline u32 queued_segments(struct flow *flow, u32 came, u32 sent)
{
	if ((s32)(sent - flow->mark) >= 0) {
		flow->earlier = sent == came ? 0 : flow->segments;
		flow->segments = 0;
		flow->mark = came;
	}
	return flow->earlier + flow->segments;
}

int graft_flow(struct __sk_buff *skb)
{
	u64 key = bpf_get_socket_cookie(skb);
	u32 len = skb->len, written = 0, came, sent;
	struct flow *flow;
	struct bpf_sock *target;
	u64 taken = 0, *recorded;
	void *tcp;

	/* The end of a stream without data. Redirected, it would count as an error of the target's; graftd
	 * shuts the target down, when all that came before the end is written. */
	if (!len)
		return SK_DROP;
	flow = flows.lookup(&key);
	if (!flow)
		return SK_DROP; /* removed by graftd: this connection is being closed */
	if (flow->left) {
		recorded = flow_taken.lookup(&key);
		if (recorded)
			taken = *recorded;
	}
	target = flow_targets.lookup(&key);
	if (!target)
		return leave_with_source(key, flow, taken, len); /* a redirect without a target would drop it */
	tcp = bpf_skc_to_tcp_sock(target);
	if (tcp)
		bpf_probe_read_kernel(&written, sizeof(written), tcp + GRAFT_TCP_WRITE_SEQ);
	bpf_sk_release(target);
	if (!flow->started) {
		flow->started = 1;
		flow->first = written;
	}
	came = flow->moved + taken;
	sent = written - flow->first;
	if (flow->left != taken || (s32)(came - sent) > GRAFT_MAX_BEHIND ||
	    queued_segments(flow, came, sent) >= GRAFT_MAX_SEGMENTS)
		return leave_with_source(key, flow, taken, len);
	flow->moved += len;
	flow->segments++;
	/* To the target's send queue (no BPF_F_INGRESS): its receive queue is slower by two orders of magnitude. */
	return flow_targets.sk_redirect_hash(skb, &key, 0);
}
