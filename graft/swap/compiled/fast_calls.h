/* The compiled part of a supervisor: the plain calls of a container, answered without the interpreter.
 *
 * Theory of operation
 *
 *     RECV ──┬── socket(2), transport born: birth.c      ──┬── answered: the next RECV
 *            ├── connect(2), transport swap: connect.c   ──┤
 *            └── all else ─────────────────────────────────┴── any doubt, any failure: to Python
 *
 * Everything that needs thought is done by Python (graft/swap/supervisor.py, birth.py), which gets the notification as
 * the kernel wrote it and not answered. So nothing here may answer a call in another way than Python did before, and
 * whatever fails changes nothing: Python finds out what is wrong. A thread is known once Python has served it
 * (callers.c), and the first spare sockets of a kind are Python's (spares.c).
 *
 * The notification being served is in the journal, memory that is shared with the keeper's process, until it is
 * answered. The loop (loop.c) runs without the interpreter's lock: one thread at a time may be in it, and no other may
 * touch the object meanwhile (module.c, the only file that knows Python).
 *
 * Sources: seccomp_unotify(2), include/uapi/linux/seccomp.h. Of arguments that the kernel treats as int the lower half
 * is what counts.
 */
#ifndef FAST_CALLS_H
#define FAST_CALLS_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1 /* O_PATH, process_vm_readv */
#endif
#include <linux/seccomp.h>
#include <linux/types.h>
#include <stddef.h>
#include <stdint.h>

#include "graft.h"

#define MAX_SPARES 64
#define MAX_CALLERS 128 /* two descriptors each; Python's own cache has 512, and some systems allow 1024 in all */
#define MAX_NAME 64
#define MAX_ANSWERS 16
#define CLOSE_TOGETHER 8
#define TIME_BOUNDS 13

struct kind {
	int family, type, protocol; /* type: may have SOCK_NONBLOCK, never SOCK_CLOEXEC */
	uint32_t uid, gid;
};

struct spare {
	struct kind kind;
	int fd;
};

/* Spare sockets, the oldest first. Where the desk is there, `refill` more are made when the last of a kind was used. */
struct stock {
	size_t count;
	struct spare spares[MAX_SPARES];
	struct desk *desk;
	int refill;
};

struct caller {
	uint32_t tid; /* 0: no caller */
	int pidfd;
	int fdinfo; /* /proc/TID/fdinfo; -1 where no connect is answered */
	int netns; /* /proc/TID/ns/net itself, the symbolic link (O_PATH); -1 where no birth is answered */
};

struct births {
	int number; /* of socket(2); -1: not answered */
	char name[MAX_NAME]; /* of the container's namespace, as the link says it */
	size_t name_size;
};

/* struct desk is a question, and an answer; what is compared of that is from here to there, and has no padding. Who opened
 * the socket comes before it: that decides nothing, and a container may have any number of users. */
#define ANSWER_AT offsetof(struct desk, netns)
#define ANSWER_SIZE (offsetof(struct desk, options.option) - ANSWER_AT)

/* The answer to a question about a socket that Python replaced by one of that kind, but for its owner. */
struct known_answer {
	uint8_t bytes[ANSWER_SIZE];
	struct kind kind;
};

struct connects {
	int number; /* of connect(2); -1: not answered */
	size_t count, next; /* of known answers; which is overwritten next where there is no room */
	struct known_answer answers[MAX_ANSWERS];
	size_t replaced_count;
	int replaced[CLOSE_TOGETHER]; /* sockets of which this process has the last descriptor */
};

/* How long calls took, in nanoseconds: memory that others read, written by this process only
 * (graft/state/call_times.py, which also says what the bounds are). */
struct call_times {
	uint64_t bounds[TIME_BOUNDS];
	uint64_t counts[TIME_BOUNDS + 1];
	uint64_t total;
};

struct fast_calls {
	int listener;
	uint32_t arch;
	struct call_times *times; /* NULL: nobody wants to know */
	struct stock stock;
	struct caller callers[MAX_CALLERS]; /* by tid % MAX_CALLERS */
	struct births births;
	struct connects connects;
	unsigned long long served;
};

/* spares.c */
int find_spare(const struct stock *stock, const struct kind *kind);
int remove_spare(struct stock *stock, int index);
void add_spare(struct stock *stock, const struct kind *kind, int fd);
int count_spares(const struct stock *stock, const struct kind *kind);
void refill(struct stock *stock, const struct kind *kind);
void close_spares(struct stock *stock);

/* callers.c */
struct caller *find_caller(struct fast_calls *self, uint32_t tid);
int know(struct fast_calls *self, uint32_t tid, int pidfd, int fdinfo);
void forget(struct caller *caller);
void forget_all(struct fast_calls *self);

/* birth.c, connect.c: whether the call is answered */
int answer_birth(struct fast_calls *self, const struct seccomp_notif *call);
int answer_connect(struct fast_calls *self, const struct seccomp_notif *call);
void remember(struct connects *connects, const void *answer, const struct kind *kind);
void close_replaced(struct connects *connects);

/* loop.c */
int add_descriptor(const struct fast_calls *self, struct seccomp_notif_addfd *add);
void respond(const struct fast_calls *self, struct seccomp_notif_resp *response);
int serve_batch(struct fast_calls *self, struct seccomp_notif *page);

#endif
