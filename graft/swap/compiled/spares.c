/* Spare sockets of the host's stack: made and tagged ahead of time, as graft/swap/socket_pool.py does it.
 *
 * New ones are made before the next RECV. That is worth as much as all the rest: Python would need longer for one call
 * than this for sixteen.
 */
#include "fast_calls.h"

#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

static int same_kind(const struct kind *a, const struct kind *b)
{
	return a->family == b->family && a->type == b->type && a->protocol == b->protocol && a->uid == b->uid &&
	       a->gid == b->gid;
}

/* The newest spare of a kind, or -1. */
int find_spare(const struct stock *stock, const struct kind *kind)
{
	for (int i = (int)stock->count - 1; i >= 0; i--)
		if (same_kind(&stock->spares[i].kind, kind))
			return i;
	return -1;
}

int remove_spare(struct stock *stock, int index)
{
	int fd = stock->spares[index].fd;

	stock->count--;
	memmove(&stock->spares[index], &stock->spares[index + 1], (stock->count - index) * sizeof(stock->spares[0]));
	return fd;
}

/* The oldest spare makes room where there is none. */
void add_spare(struct stock *stock, const struct kind *kind, int fd)
{
	if (stock->count == MAX_SPARES)
		close(remove_spare(stock, 0));
	stock->spares[stock->count].kind = *kind;
	stock->spares[stock->count++].fd = fd;
}

int count_spares(const struct stock *stock, const struct kind *kind)
{
	int found = 0;

	for (size_t i = 0; i < stock->count; i++)
		found += same_kind(&stock->spares[i].kind, kind);
	return found;
}

void close_spares(struct stock *stock)
{
	while (stock->count)
		close(remove_spare(stock, (int)stock->count - 1));
}

/* Who owns the files that this thread makes from here on. setfsuid(2) says nothing where it fails: it tells what there
 * was, and that is asked for again. */
static int set_file_ids(uint32_t uid, uint32_t gid)
{
	syscall(SYS_setfsgid, gid);
	syscall(SYS_setfsuid, uid);
	return (uint32_t)syscall(SYS_setfsgid, -1) == gid && (uint32_t)syscall(SYS_setfsuid, -1) == uid;
}

/* A host-homed socket of that kind with its tag, or -1. */
static int make_tagged(const struct stock *stock, const struct kind *kind)
{
	volatile uint8_t *next_home = &stock->desk->next_home; /* the hook writes it */
	int fd;

	*next_home = GRAFT_NEXT_HOME_HOST;
	fd = socket(kind->family, kind->type | SOCK_CLOEXEC, kind->protocol);
	if (*next_home == GRAFT_NEXT_HOME_NONE)
		return fd;
	*next_home = GRAFT_NEXT_HOME_NONE; /* the hook did not run: Python knows another way */
	if (fd >= 0)
		close(fd);
	return -1;
}

/* Make spares of a kind that has none left, as its owner: firewalls ask who opened a socket's file. */
void refill(struct stock *stock, const struct kind *kind)
{
	int as_owner = kind->uid || kind->gid, fd;

	if (!stock->refill || find_spare(stock, kind) >= 0)
		return;
	if (!as_owner || set_file_ids(kind->uid, kind->gid))
		for (int i = 0; i < stock->refill && (fd = make_tagged(stock, kind)) >= 0; i++)
			add_spare(stock, kind, fd);
	if (as_owner && !set_file_ids(0, 0))
		_exit(1); /* with the wrong rights nothing may go on; the keeper starts another supervisor */
}
