// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* Decisions as they happen, for whoever watches (`graft trace`).
 *
 *   All watchers read one ring buffer, each at its own place; the fastest one gives the room free, and a slower one sees
 *   that it was overtaken. They renew a lease: one that was killed is forgotten by the clock, with nothing to clean up.
 *   Where nobody watches, a decision pays for one lookup in an array. Events are for people: nothing that decides reads
 *   them, and one that finds no room is counted as lost.
 */

#define BPF_RB_NO_WAKEUP 1 /* who watches looks now and then */

BPF_RINGBUF_OUTPUT(decisions, GRAFT_WATCH_PAGES);
BPF_ARRAY(watches, struct watch, 2);

static __always_inline struct watch *find_watch(void)
{
	u32 zero = 0;
	struct watch *watch = watches.lookup(&zero);

	return watch && watch->until && watch->until > bpf_ktime_get_ns() ? watch : 0;
}

/* The thread that asks: the program's, also where its supervisor makes the call for it. Not in every kind of program may
 * that be asked (read_task() is for the others). */
static __always_inline void read_caller(struct event *event)
{
	u64 ids = bpf_get_current_pid_tgid();
	struct desk *desk = desk_of_caller();

	if (desk) {
		event->tid = desk->tid;
		read_served(desk, event);
		return;
	}
	event->tid = ids;
	event->pid = ids >> 32;
	bpf_get_current_comm(event->comm, sizeof(event->comm));
}

static __always_inline void publish(struct event *event)
{
	u32 one = 1;
	struct watch *watch;

	event->time = bpf_ktime_get_ns();
	if (!decisions.ringbuf_output(event, sizeof(*event), BPF_RB_NO_WAKEUP))
		return;
	watch = watches.lookup(&one);
	if (watch)
		__sync_fetch_and_add(&watch->lost, 1);
}

/* What became of a request, from what the hook that decided it has written down. */
static __always_inline u8 outcome_of(struct request *request, int verdict)
{
	u32 relayed = request->relay != 0;

	/* clang would test all three at once, by an OR with the pointer that the verifier refuses. */
	asm volatile("" : "+r"(relayed));
	if (verdict == REFUSE)
		return GRAFT_OUTCOME_REFUSED;
	if (relayed || request->exchange || request->stand_in)
		return GRAFT_OUTCOME_RELAYED;
	if (request->endpoint)
		return GRAFT_OUTCOME_GRANTED;
	return request->home == GRAFT_HOME_HOST && !request->ferry ? GRAFT_OUTCOME_PASSED : GRAFT_OUTCOME_CONTAINER;
}

static __always_inline void describe(struct event *event, u32 container, u8 call, u8 outcome, struct request *request)
{
	event->container = container;
	event->call = call;
	event->outcome = outcome;
	event->family = request->family;
	event->protocol = request->protocol;
	event->port = request->port;
	event->endpoint = request->endpoint;
	event->endpoint_port = request->endpoint_port;
	__builtin_memcpy(event->addr, request->addr, 16);
}

/* A bind, a connect or a datagram's destination was decided. Returns the verdict. */
static __always_inline int trace_request(struct request *request, u8 call, int verdict)
{
	struct watch *watch = request->container ? find_watch() : 0;
	struct event event = {};

	if (!watch)
		return verdict;
	describe(&event, request->container, call, outcome_of(request, verdict), request);
	read_caller(&event);
	publish(&event);
	return verdict;
}

/* A call about a socket that names no address: `of` is the one that it has to do with. */
static __always_inline void trace_call(u32 container, u8 call, u8 outcome, struct request *of)
{
	struct watch *watch = container ? find_watch() : 0;
	struct event event = {};

	if (!watch)
		return;
	describe(&event, container, call, outcome, of);
	read_task(&event);
	publish(&event);
}

/* A packet was dropped that came from there: whichever thread runs now has nothing to do with it. */
static __always_inline void trace_packet(u32 container, struct request *from)
{
	struct watch *watch = container ? find_watch() : 0;
	struct event event = {};

	if (!watch)
		return;
	describe(&event, container, GRAFT_CALL_PACKET, GRAFT_OUTCOME_REFUSED, from);
	publish(&event);
}

/* What a listener's bind requested, and its endpoint. */
static __always_inline void trace_listen(struct owner *owner, u8 outcome)
{
	struct request request = { .protocol = IPPROTO_TCP };
	struct tag *tag = owner->tag;

	if (!find_watch())
		return;
	if (tag && tag->endpoint) {
		request.family = tag->family;
		request.port = tag->port;
		request.endpoint = tag->endpoint;
		__builtin_memcpy(request.addr, tag->addr, 16);
	}
	trace_call(owner->id, GRAFT_CALL_LISTEN, outcome, &request);
}
