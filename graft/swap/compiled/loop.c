/* Receives calls, and has each answered by who can, until one is Python's. */
#include "fast_calls.h"

#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>

/* Calls in a row before Python looks whether it is to stop: the signal that says so comes between two of them only if
 * it is lucky, and is sent a hundred times a second. */
#define BATCH 256

/* The caller's number of a descriptor that it is given, or -1. */
int add_descriptor(const struct fast_calls *self, struct seccomp_notif_addfd *add)
{
	int number;

	do
		number = ioctl(self->listener, SECCOMP_IOCTL_NOTIF_ADDFD, add);
	while (number < 0 && errno == EINTR); /* the kernel undid it, or has not started */
	return number;
}

/* ENOENT: the caller has ended, and needs no answer. */
void respond(const struct fast_calls *self, struct seccomp_notif_resp *response)
{
	while (ioctl(self->listener, SECCOMP_IOCTL_NOTIF_SEND, response) && errno == EINTR)
		;
}

static int answer(struct fast_calls *self, const struct seccomp_notif *call)
{
	if (call->data.arch != self->arch)
		return 0;
	if (call->data.nr == self->births.number)
		return answer_birth(self, call);
	if (call->data.nr == self->connects.number)
		return answer_connect(self, call);
	return 0;
}

static uint64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

static void count_time(struct call_times *times, uint64_t taken)
{
	int bucket = 0;

	while (bucket < TIME_BOUNDS && taken > times->bounds[bucket])
		bucket++;
	times->counts[bucket]++;
	times->total += taken;
}

/* 1: the notification in the page is Python's; 0: there is none; -1: an error of RECV. */
int serve_batch(struct fast_calls *self, struct seccomp_notif *page)
{
	uint64_t started = 0;

	for (int i = 0; i < BATCH; i++) {
		if (ioctl(self->listener, SECCOMP_IOCTL_NOTIF_RECV, page))
			return errno == EINTR || errno == ENOENT ? 0 : -1;
		if (self->times)
			started = now();
		if (!answer(self, page))
			return 1;
		if (self->times)
			count_time(self->times, now() - started);
		self->served++;
		memset(page, 0, sizeof(*page));
	}
	return 0;
}
