/* The plain case of transport swap: connect(2) on a socket that is replaced by a spare one, as Python did it before.
 *
 *     known thread? ── an address? ── duplicate ── ask the hooks ── an answer that is known? ── its owner
 *         ── a spare of that kind and owner? ── ADDFD in the socket's place ── close the spare ── SEND: the call runs
 *
 * Nothing is decided here. Python served a call first, and said what its socket was replaced by and what the hooks'
 * answer was, byte for byte (graft/swap/fast_calls.py says which calls it does that for). The answer has all that a
 * decision about a connect of a container's socket is made of, and more (graft/swap/decision.py; of the address it takes
 * no more than the family, and whether the socket is IPv6-only makes no difference): the namespaces, the rule's verdict and endpoint as the policy in force has it, the socket's state, its flags,
 * how many options were set, and what refers to its file. So an answer that is equal means the same decision.
 *
 * Sources: process_vm_readv(2), pidfd_getfd(2), ip(7), ipv6(7).
 */
#include "fast_calls.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

union address {
	struct sockaddr any;
	struct sockaddr_in in;
	struct sockaddr_in6 in6;
};

/* A new answer takes the oldest one's place where there is no room. */
void remember(struct connects *connects, const void *answer, const struct kind *kind)
{
	struct known_answer *known;

	for (size_t i = 0; i < connects->count; i++)
		if (!memcmp(connects->answers[i].bytes, answer, ANSWER_SIZE))
			return;
	if (connects->count < MAX_ANSWERS)
		connects->count++;
	known = &connects->answers[connects->next];
	connects->next = (connects->next + 1) % MAX_ANSWERS;
	memcpy(known->bytes, answer, ANSWER_SIZE);
	known->kind = *kind;
}

void close_replaced(struct connects *connects)
{
	while (connects->replaced_count)
		close(connects->replaced[--connects->replaced_count]);
}

/* Write the address of a call to the desk, as graft/model/sockaddr.py reads it. 0: none, a short one, or one that an
 * IPv6 socket has for IPv4. */
static int write_address(const struct seccomp_notif *call, struct desk *desk)
{
	union address address;
	uint32_t size = (uint32_t)call->data.args[2];
	struct iovec here = { &address, size < sizeof(address) ? size : sizeof(address) };
	struct iovec there = { (void *)(uintptr_t)call->data.args[1], here.iov_len };

	if (size < sizeof(address.in) || size > sizeof(struct sockaddr_storage) ||
	    process_vm_readv(call->pid, &here, 1, &there, 1, 0) != (ssize_t)here.iov_len)
		return 0;
	memset(desk->addr, 0, sizeof(desk->addr));
	if (address.any.sa_family == AF_INET) {
		desk->family = GRAFT_IPV4;
		desk->port = ntohs(address.in.sin_port);
		memcpy(desk->addr, &address.in.sin_addr, sizeof(address.in.sin_addr));
		return 1;
	}
	if (address.any.sa_family != AF_INET6 || here.iov_len < sizeof(address.in6) ||
	    IN6_IS_ADDR_V4MAPPED(&address.in6.sin6_addr))
		return 0;
	desk->family = GRAFT_IPV6;
	desk->port = ntohs(address.in6.sin6_port);
	memcpy(desk->addr, &address.in6.sin6_addr, sizeof(address.in6.sin6_addr));
	return 1;
}

/* Ask the hooks about the socket; the known answer that theirs is equal to, or NULL. (`container` is Python's to write,
 * and never changes. `answered` is part of the answer. Rules for the two families name different endpoints, so that the
 * answers differ where the families do; but who knows what rules there will be.) */
static const struct known_answer *ask(struct connects *connects, struct desk *desk, const struct caller *caller,
				      int number, int duplicate)
{
	union address name;
	socklen_t size = sizeof(name);

	desk->fdinfo = caller->fdinfo;
	desk->fd = number;
	desk->call = GRAFT_CALL_CONNECT;
	desk->answered = 0;
	if (getsockname(duplicate, &name.any, &size) || desk->socket_family != desk->family)
		return NULL;
	for (size_t i = 0; i < connects->count; i++)
		if (!memcmp(connects->answers[i].bytes, (const char *)desk + ANSWER_AT, ANSWER_SIZE))
			return &connects->answers[i];
	return NULL;
}

/* The kind of the spare that the socket is replaced by: its owner is who opened the socket. */
static int find_kind(const struct desk *desk, const struct known_answer *known, struct kind *kind)
{
	*kind = known->kind;
	kind->uid = desk->uid;
	kind->gid = desk->gid;
	return !!(desk->probed & GRAFT_PROBED_OWNER);
}

static int copy_v6only(int from, int to)
{
	int value;
	socklen_t size = sizeof(value);

	return !getsockopt(from, IPPROTO_IPV6, IPV6_V6ONLY, &value, &size) &&
	       !setsockopt(to, IPPROTO_IPV6, IPV6_V6ONLY, &value, size);
}

static int unblock(int fd)
{
	int on = 1;

	return !ioctl(fd, FIONBIO, &on);
}

/* Put a spare at the number of the program's socket, with its flags. */
static int put_in_place(const struct fast_calls *self, const struct seccomp_notif *call, int spare, int duplicate)
{
	const struct desk *desk = self->stock.desk;
	struct seccomp_notif_addfd add = {
		.id = call->id,
		.flags = SECCOMP_ADDFD_FLAG_SETFD,
		.srcfd = spare,
		.newfd = (int)call->data.args[0],
		.newfd_flags = desk->flags & O_CLOEXEC,
	};

	if (desk->socket_family == GRAFT_IPV6 && !copy_v6only(duplicate, spare))
		return 0;
	if (desk->flags & O_NONBLOCK && !unblock(spare))
		return 0;
	return add_descriptor(self, &add) >= 0;
}

/* Replace the socket; whether that was done, and the kind that was used. This process's copy of the new one is closed
 * before the program goes on: its close() must be the last one, or its peer sees no end. One that did not get there is
 * not as spares are any more. */
static int replace(struct fast_calls *self, const struct seccomp_notif *call, const struct caller *caller,
		   int duplicate, struct kind *kind)
{
	struct desk *desk = self->stock.desk;
	const struct known_answer *known = ask(&self->connects, desk, caller, (int)call->data.args[0], duplicate);
	int index, spare, done;

	if (!known || !find_kind(desk, known, kind))
		return 0;
	index = find_spare(&self->stock, kind);
	if (index < 0)
		return 0;
	spare = remove_spare(&self->stock, index);
	done = put_in_place(self, call, spare, duplicate);
	close(spare);
	return done;
}

/* The old socket is open here only, is registered nowhere, and has no port (all of which its answer says): it is closed
 * later, together with others. */
int answer_connect(struct fast_calls *self, const struct seccomp_notif *call)
{
	struct seccomp_notif_resp response = { .id = call->id, .flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE };
	struct connects *connects = &self->connects;
	struct caller *caller = find_caller(self, call->pid);
	struct kind kind;
	int duplicate;

	if (!caller || !connects->count || !write_address(call, self->stock.desk))
		return 0;
	duplicate = (int)syscall(SYS_pidfd_getfd, caller->pidfd, (int)call->data.args[0], 0);
	if (duplicate < 0) {
		if (errno == ESRCH)
			forget(caller); /* it has ended, and its id is another thread's now */
		return 0;
	}
	if (!replace(self, call, caller, duplicate, &kind)) {
		close(duplicate);
		return 0;
	}
	respond(self, &response);
	connects->replaced[connects->replaced_count++] = duplicate;
	if (connects->replaced_count == CLOSE_TOGETHER)
		close_replaced(connects);
	refill(&self->stock, &kind);
	return 1;
}
