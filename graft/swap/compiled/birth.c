/* The plain case of transport born: socket(2) of a known thread, answered with a spare socket.
 *
 *     plain kind? ── known thread? ── same namespace? ── a spare of its kind and owner? ── ADDFD ── close ── SEND
 *
 * Sources: include/uapi/linux/pidfd.h, proc_pid_ns(5).
 */
#include "fast_calls.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

/* PIDFD_GET_INFO (6.13): headers are older than kernels. */
struct thread_info {
	uint64_t mask, cgroup;
	uint32_t pid, tgid, ppid, ruid, rgid, euid, egid, suid, sgid, fsuid, fsgid;
	int32_t exit_code;
};
#define GET_INFO _IOWR(0xFF, 11, struct thread_info)
#define INFO_CREDENTIALS (1 << 1)

/* Whether the call can have a spare; then its kind, but for its owner. */
static int is_plain(const struct seccomp_notif *call, struct kind *kind)
{
	int type;

	kind->family = (int)call->data.args[0];
	kind->type = (int)call->data.args[1] & ~SOCK_CLOEXEC;
	kind->protocol = (int)call->data.args[2];
	if (kind->family != AF_INET && kind->family != AF_INET6)
		return 0;
	type = kind->type & ~SOCK_NONBLOCK;
	return (type == SOCK_STREAM && (kind->protocol == 0 || kind->protocol == IPPROTO_TCP)) ||
	       (type == SOCK_DGRAM && (kind->protocol == 0 || kind->protocol == IPPROTO_UDP));
}

/* Whether the thread is known and in the container's namespace now; then who owns the files that it makes now. */
static int is_at_home(struct fast_calls *self, uint32_t tid, struct kind *kind)
{
	struct caller *caller = find_caller(self, tid);
	struct thread_info info = { .mask = INFO_CREDENTIALS };
	char name[MAX_NAME];
	ssize_t size;

	if (!caller)
		return 0;
	if (ioctl(caller->pidfd, GET_INFO, &info)) {
		forget(caller); /* it has ended, and its id is another thread's now */
		return 0;
	}
	if (!(info.mask & INFO_CREDENTIALS))
		return 0;
	kind->uid = info.fsuid;
	kind->gid = info.fsgid;
	size = readlinkat(caller->netns, "", name, sizeof(name));
	return size > 0 && (size_t)size == self->births.name_size && !memcmp(name, self->births.name, size);
}

/* This process's copy is closed before the program goes on: its close() must be the last one, or its peer sees no end.
 * Only death ends a caller's wait (graft/swap/birth.py): where SEND finds nobody, nobody has the descriptor. */
int answer_birth(struct fast_calls *self, const struct seccomp_notif *call)
{
	struct seccomp_notif_addfd add = { .id = call->id };
	struct seccomp_notif_resp response = { .id = call->id };
	struct kind kind;
	int index, number;

	if (!is_plain(call, &kind) || !is_at_home(self, call->pid, &kind))
		return 0;
	index = find_spare(&self->stock, &kind);
	if (index < 0)
		return 0;
	add.srcfd = self->stock.spares[index].fd;
	add.newfd_flags = (int)call->data.args[1] & SOCK_CLOEXEC ? O_CLOEXEC : 0;
	number = add_descriptor(self, &add);
	if (number < 0)
		return 0;
	close(remove_spare(&self->stock, index));
	response.val = number;
	respond(self, &response);
	refill(&self->stock, &kind);
	return 1;
}
