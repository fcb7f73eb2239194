/* The threads that Python has served, each with descriptors that keep meaning it when its id is given to another one. */
#include "fast_calls.h"

#include <fcntl.h>
#include <unistd.h>

static void close_if_open(int fd)
{
	if (fd >= 0)
		close(fd);
}

void forget(struct caller *caller)
{
	if (!caller->tid)
		return;
	close_if_open(caller->pidfd);
	close_if_open(caller->fdinfo);
	close_if_open(caller->netns);
	caller->tid = 0;
}

void forget_all(struct fast_calls *self)
{
	for (size_t i = 0; i < MAX_CALLERS; i++)
		forget(&self->callers[i]);
}

/* NULL where the thread is not known. One that is may have ended: its pidfd tells. */
struct caller *find_caller(struct fast_calls *self, uint32_t tid)
{
	struct caller *caller = &self->callers[tid % MAX_CALLERS];

	return tid && caller->tid == tid ? caller : NULL;
}

/* Remember a thread by its pidfd and its open /proc/TID/fdinfo. 0, or -1 with errno: nothing has changed then. */
int know(struct fast_calls *self, uint32_t tid, int pidfd, int fdinfo)
{
	struct caller new = { .tid = tid, .fdinfo = -1, .netns = -1 };

	if (!tid || find_caller(self, tid))
		return 0;
	new.pidfd = fcntl(pidfd, F_DUPFD_CLOEXEC, 0);
	if (new.pidfd < 0)
		return -1;
	if (self->connects.number >= 0)
		new.fdinfo = fcntl(fdinfo, F_DUPFD_CLOEXEC, 0);
	if (self->births.number >= 0)
		new.netns = openat(fdinfo, "../ns/net", O_PATH | O_NOFOLLOW | O_CLOEXEC);
	if ((self->connects.number >= 0 && new.fdinfo < 0) || (self->births.number >= 0 && new.netns < 0)) {
		forget(&new);
		return -1;
	}
	forget(&self->callers[tid % MAX_CALLERS]);
	self->callers[tid % MAX_CALLERS] = new;
	return 0;
}
